"""A small matrix of cases for the emulated CUDA kernels, for builds with a sanitizer or with a seeded defect.

    python matrix.py MODULE [ORDER ...]

Needs numpy only: torch takes too long to import under a sanitizer. Ends with code 0 and "N cases hold" if they do.
"""

from __future__ import annotations

import sys

import build
import numpy as np

ORDERS = ("sequential", "reversed", "shuffled")
F64 = np.float64
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-7, "float16": 2.0**-10}
STORED = {"float32": np.float32, "float64": F64, "bfloat16": np.uint16, "float16": np.float16}
DEVICES = [(False, 232448), (True, 65536)]  # float64 slow or not, shared memory of a block


def stored(x, dtype):
    """float64 as an array of this dtype; numpy has no bfloat16, so its bits."""
    if dtype != "bfloat16":
        return x.astype(STORED[dtype])
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def values(x, dtype):
    return x.astype(F64) if dtype != "bfloat16" else (x.astype(np.uint32) << 16).view(np.float32).astype(F64)


def exact(x, skip=0):
    """A copy in memory of its own that ends with its last element, `skip` elements after an aligned address."""
    memory = np.full(x.size + skip, 0xFF, np.uint8).astype(x.dtype) if skip else np.empty(x.size, x.dtype)
    copy = memory[skip:].reshape(x.shape)
    copy[...] = x
    return copy


def truth(G, rtol):
    """Aligned gradient with uniform weights and the smallest kept singular value, and the rank."""
    norms = np.linalg.norm(G, axis=1)
    C = np.where(norms > norms.max() * 1e-7, 1 / np.maximum(norms, 1e-300), 0)[:, None] * G
    s = np.linalg.svd(C, compute_uv=False)
    R = int((s > s[0] * rtol).sum())
    U, S, Vh = np.linalg.svd(G, full_matrices=False)
    return S[R - 1] * (np.full(len(G), 1 / len(G)) @ U[:, :R]) @ Vh[:R] if R else np.zeros(G.shape[1]), R


class Matrix:
    def __init__(self, path):
        self.module = build.load(path)
        self.dtypes = self.module.dtypes
        self.bits = {}
        self.cases = 0

    def check(self, name, error, limit):
        self.cases += 1
        if not error <= limit:
            raise AssertionError(f"{name}: {error:.3g} > {limit:.3g}")

    def same(self, name, *arrays):
        """Bitwise the same in every order of threads."""
        got = b"".join(a.tobytes() for a in arrays)
        if self.bits.setdefault(name, got) != got:
            raise AssertionError(f"{name}: other bits in another order of threads")

    def session(self, device):
        self.module.set_shared_limit(device[1])
        return self.module.Session(*device)

    def flat(self, G, dtype, out=None):
        x = self.module.Input()
        size = G.itemsize
        x.B, x.T, x.P, x.dtype = 1, G.shape[0], G.shape[1], dtype
        x.base, x.next_row = G.ctypes.data, G.strides[0] if G.shape[0] > 1 else G.shape[1] * size
        x.out = 0 if out is None else out.ctypes.data
        return x

    def rows(self, columns, outs, T):
        x = self.module.Input()
        x.T, x.ragged = T, True
        x.segments = [
            ([0 if g is None else g.ctypes.data for g in rows], out.ctypes.data, out.size, dtype)
            for (rows, dtype), out in zip(columns, outs, strict=True)
        ]
        return x

    def run_align(self, name, x, T, device, G, outs, dtypes, rtol, limit):
        M, alpha, rank = np.empty((T, T)), np.empty(T), np.empty(1, np.int64)
        policy = {"weights": 0, "scale": "min", "rank_rule": "normalized", "rtol": rtol, "zero": EPS["float32"]}
        addresses = [a.ctypes.data for a in (M, alpha, rank)]
        self.module.align(self.session(device), x, policy, *addresses)
        want, R = truth(G, rtol)
        got = np.concatenate([values(o, d) for o, d in zip(outs, dtypes, strict=True)])
        limit += max(EPS[d] for d in dtypes)
        self.check(name, np.linalg.norm(got - want) / np.linalg.norm(want), limit)
        self.check(f"{name}: rank", abs(int(rank[0]) - R), 0)
        self.same(name, *outs, M, alpha, rank)

    def align(self, T, P, dtype, device, skip=0, kappa=1.0, spread=1.0):
        name = f"align {T} x {P} {dtype} slow={device[0]} skip={skip} kappa={kappa} spread={spread}"
        rng = np.random.default_rng(T)
        X = rng.standard_normal((T, P))
        if kappa > 1:
            U, _ = np.linalg.qr(rng.standard_normal((T, T)))
            V, _ = np.linalg.qr(X.T)
            X = U * np.logspace(0, -np.log10(kappa), T) @ V.T
            X /= np.linalg.norm(X, axis=1, keepdims=True)
        G = exact(stored(X * np.logspace(0, np.log10(spread), T)[:, None], dtype), skip)
        out = exact(np.zeros(P, G.dtype), skip)
        rtol = T * EPS["float32"] if kappa > 1 else max(np.sqrt(T * EPS["float32"]), EPS[dtype] * (dtype != "float64"))
        self.run_align(
            name, self.flat(G, dtype, out), T, device, values(G, dtype), [out], [dtype], rtol, 2e-6 if T <= 40 else 1e-4
        )

    def ragged(self, T, dtypes, device):
        name = f"ragged {T} {dtypes} slow={device[0]}"
        rng = np.random.default_rng(T)
        columns, dense = [], []
        for k, n in enumerate((1, 17, 0, 64, 700, 333, 3001)):
            dtype = dtypes[k % len(dtypes)]
            rows = [exact(stored(rng.standard_normal(n), dtype), skip=(k + t) % 3) for t in range(T)]
            missing = [t for t in range(T) if T > 1 and (t + k) % 4 == 3]
            for t in missing:
                rows[t] = None
            columns.append((rows, dtype))
            dense.append(np.stack([np.zeros(n) if g is None else values(g, dtype) for g in rows]))
        outs = [np.empty(d.shape[1], STORED[dtype]) for d, (_, dtype) in zip(dense, columns, strict=True)]
        kinds = [dtype for _, dtype in columns]
        rtol = max(np.sqrt(T * EPS["float32"]), *(EPS[d] for d in kinds))
        self.run_align(name, self.rows(columns, outs, T), T, device, np.concatenate(dense, 1), outs, kinds, rtol, 1e-5)

    def gram(self, T, P, dtype, exactly, device):
        name = f"gram {T} x {P} {dtype} exact={exactly} slow={device[0]}"
        G = exact(stored(np.random.default_rng(T).standard_normal((T, P)), dtype))
        M = np.empty((T, T))
        self.module.gram(self.session(device), self.flat(G, dtype), exactly, M.ctypes.data)
        X = values(G, dtype)
        norms = np.linalg.norm(X, axis=1)
        self.check(name, np.abs((M - X @ X.T) / norms / norms[:, None]).max(), 1e-12 if exactly else 6e-7)
        self.same(name, M)

    def sign_drop(self, T, P, dtype, leak, skip=0):
        name = f"sign_drop {T} x {P} {dtype} leak={leak} skip={skip}"
        G = exact(stored(np.random.default_rng(T).standard_normal((T, P)), dtype), skip)
        out, seed, leaks = exact(np.zeros(P, G.dtype), skip), np.array([5]), np.full(T, leak)
        address = leaks.ctypes.data if leak else 0
        self.module.sign_drop(self.session(DEVICES[0]), self.flat(G, dtype, out), seed.ctypes.data, address)
        X, got = values(G, dtype), values(out, dtype)
        p, q = np.maximum(X, 0).sum(0), np.minimum(X, 0).sum(0)
        error = np.minimum(np.abs(got - p - leak * q), np.abs(got - q - leak * p))
        self.check(name, (error / (p - q)).max(), EPS[dtype])
        self.same(name, out)

    def rescaled(self, T, P, scale):
        if "float64" not in self.dtypes:
            return
        name = f"rescaled {T} x {P} {scale}"
        X = np.random.default_rng(T).standard_normal((T, P))
        G, out = exact(X * scale), np.empty(P)
        alpha, rank, M = np.empty(T), np.empty(1, np.int64), np.empty((T, T))
        policy = {"weights": 0, "scale": "min", "rank_rule": "normalized", "rtol": 1e-7, "zero": EPS["float64"]}
        addresses = [a.ctypes.data for a in (M, alpha, rank)]
        self.module.align(self.session(DEVICES[0]), self.flat(G, "float64", out), policy, *addresses)
        want, _ = truth(X, 1e-7)
        self.check(name, np.linalg.norm(out / scale - want) / np.linalg.norm(want), 1e-12)
        self.same(name, out, alpha)

    def eigh(self, T, device):
        name = f"eigh {T} slow={device[0]}"
        A = np.random.default_rng(T).standard_normal((2, T, T))
        M = exact(A + A.transpose(0, 2, 1))
        lam, V = np.empty((2, T)), np.empty((2, T, T))
        self.module.eigh(self.session(device), M.ctypes.data, 2, T, lam.ctypes.data, V.ctypes.data)
        size = np.abs(M).sum(-1).max() * T * EPS["float64"]
        self.check(name, np.abs(M @ V - V * lam[:, None]).max() / size, 10)
        self.check(f"{name}: V", np.abs(V.transpose(0, 2, 1) @ V - np.eye(T)).max() / (T * EPS["float64"]), 10)
        self.same(name, lam, V)

    def run(self):
        # One launch; exact chains of both kinds; float32 blocks of every width. Other types: one of each kind.
        shapes = [(1, 37), (3, 517), (9, 100), (32, 65), (8, 4201), (33, 301), (64, 131)]
        for device in DEVICES:
            for k, dtype in enumerate(self.dtypes):
                for T, P in shapes[:: 2 if k else 1]:
                    self.align(T, P, dtype, device)
                self.align(5, 301, dtype, device, skip=1)
                self.sign_drop(5, 2501, dtype, 0.0)
                self.sign_drop(3, 301, dtype, 0.25, skip=1)
                self.ragged(3, (dtype,), device)
            self.align(3, 10_951, "float32", device)
            self.align(12, 2777, "float32", device, skip=1)
            self.align(17, 2001, "float32", device, kappa=1e4)
            self.align(6, 130, "float32", device, spread=1e5)
            self.align(70, 301, "float32", device, spread=1e5)
            self.ragged(17, self.dtypes, device)
            self.gram(70, 133, "float32", True, device)
            self.gram(130, 133, "float32", False, device)
            for T in (1, 3, 8, 20, 64):
                self.eigh(T, device)
        for scale in (1e200, 1e-200):
            self.rescaled(3, 100, scale)
            self.rescaled(20, 1703, scale)


def main():
    matrix = Matrix(sys.argv[1])
    for order in sys.argv[2:] or ORDERS:
        matrix.module.set_order(order, 5)
        matrix.run()
    print(f"{matrix.cases} cases hold")


if __name__ == "__main__":
    main()

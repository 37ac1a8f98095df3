"""The one table of parity cases: what the reference, the CPU's kernels, CUDA's on the host and CUDA's are all held to.

A file of tests subclasses `Parity` and names its `backends`: ops/test_reference.py, ops/test_ops.py,
emulation/test_kernels.py and cuda/test_cuda.py do. They share the cases, the truth, which is a float64 SVD, and the
limits. A case is left out where no backend `takes` it, by its size or its strides. Without `--slow` products of
parameters are thinned, pairwise or, where that takes its time, to every value once: see thinning.py. What only one
backend has (launches, orders of threads, graphs, streams) stays in its own file. So does emulation/matrix.py: under a
sanitizer torch takes too long to import, and what runs there is not compared but watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from adversaries import PATTERNS
from helpers import (
    BF16,
    DEPENDENT,
    DTYPES,
    EPS,
    EPS32,
    EPS64,
    F16,
    F32,
    F64,
    check_guard,
    conditioned,
    contract,
    default_rtol,
    dense,
    dtype_id,
    flat,
    generator,
    gram_error,
    guarded,
    hard_to_round,
    nearest,
    randn,
    relative,
    residuals,
    rounded,
    same_numbers,
    svd_truth,
)
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmtl import ops
from fastmtl.ops import reference

Grads = Sequence[Tensor | None]  # entry t·K + k is tensor k of row t

SCALES = ("min", "median", "rmse")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

# ------------------------------------------------------------------------------------------------ the table

# Around the width of every vector, tile and group of tasks.
TASKS = (*range(1, 14), 16, 17, 24, 31, 32, 33, 40, 48, 49, 63, 64, 65, 100, 128, 130, 200, 300)
SIZES = (0, 1, 7, 8, 15, 16, 17, 31, 63, 64, 65, 255, 257, 512, 513, 1000, 1025, 4095, 4096, 4097, 10_000, 20_011)


def _shapes() -> list[tuple[int, int]]:
    """Every T with a few P and every P with a few T; all P for the smallest T."""
    pairs = {(T, SIZES[(3 * i + 5 * j) % len(SIZES)]) for i, T in enumerate(TASKS) for j in range(3)}
    pairs |= {(T, P) for T in (1, 2, 3, 5) for P in SIZES}
    pairs |= {(T, P) for T in (4, 8, 10, 12, 16) for P in (17, 1025, 4097)}
    pairs |= {(T, 10_000) for T in (6, 7, 11, 24, 40, 48, 64, 65)}
    # Where a CUDA block and its one launch end, and a few columns beyond.
    pairs |= {(T, 32768 // T + 1 + 13 * T if T <= 32 else 517 + T) for T in TASKS if 1 < T <= 64}
    pairs |= {(1, 40_003), (3, 200_003), (10, 100_001), (300, 1025)}
    return sorted(pairs | {(T, 70_001) for T in TASKS if 15 < T <= 130})


SHAPES = _shapes()
STRIDED = [
    (1, 9), (1, 40_001), (2, 65), (3, 1000), (3, 11_001), (5, 17), (8, 4097), (11, 513), (16, 1025), (17, 2049),
    (33, 300), (64, 83), (64, 2049), (70, 129),
]  # fmt: skip
BATCHES = [
    (0, 3, 10), (1, 1, 1), (1, 5, 100), (2, 2, 0), (3, 4, 17), (7, 2, 1), (8, 8, 64), (9, 3, 333), (17, 6, 65),
    (33, 10, 40), (5, 33, 50), (2, 64, 100), (2, 70, 100), (2, 70, 300), (3, 9, 4001), (70, 4, 33), (3, 12, 9000),
    (4, 40, 2000), (100, 20, 300), (512, 4, 33), (512, 8, 204),
]  # fmt: skip
NOT_FINITE = [(1, 1), (2, 9), (3, 1000), (3, 12_001), (5, 70), (8, 4099), (13, 65), (20, 2001), (50, 301), (70, 40)]
COLUMNS = [(), (1,), (3, 4), (0,), (17,), (5, 0, 2), (64,), (1, 1, 1, 1), (4097,), (10, 33), (2, 3, 5, 7), (16,)]
RAGGED_TASKS = (1, 2, 3, 4, 8, 11, 17, 20, 33, 40, 64, 65, 70)
MIXED = ((F32, F64), (BF16, F32), (F32, F64, BF16), (F16, BF16, F64, F32))
SEVERAL = (2, 3, 5, 9, 17, 33, 64, 65, 130)
# What the accuracy contract covers: any spread of row norms up to κ = 1e4, and κ T eps32 <= 0.3.
CONDITIONED_TASKS = (2, 3, 4, 8, 10, 12, 16, 17, 24, 32, 40, 48, 64, 100)
EXTREME = [(2, 1e5), (10, 1e5), (24, 1e5), (2, 1e6)]
ENLARGED = [
    (F32, 1e25), (F32, 1e-25), (F32, 1e-38), (F64, 1e160), (F64, 1e-160), (F64, 1e200), (F64, 1e-200), (F64, 1e300),
    (F64, 1e-300), (BF16, 1e30),
]  # fmt: skip
BALANCED_TASKS = (1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 16, 17, 24, 31, 32, 33, 40, 64, 65, 100)
SPECTRAL_TASKS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 31, 32, 33, 40, 48, 63, 64, 65, 70)


def strided(T: int, P: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """[T, P] of many strides. What lies between rows is NaN: it must not be read."""
    wide = torch.full((T, P + 13), torch.nan, dtype=dtype)
    wide[:, 3 : P + 3] = randn(T, P, dtype=dtype)
    yield wide[:, 3 : P + 3]
    padded = torch.full((T, (P + 31) // 16 * 16), torch.nan, dtype=dtype)  # 16 bytes at a time, but for the tail
    padded[:, :P] = randn(T, P, dtype=dtype, seed=1)
    yield padded[:, :P]
    yield torch.cat([torch.full((1,), torch.nan, dtype=dtype), randn(T * P, dtype=dtype)])[1:].view(T, P)  # unaligned
    yield randn(2 * T, P, dtype=dtype)[::2]
    yield randn(1, P, dtype=dtype).expand(T, P)
    yield randn(P, T, dtype=dtype).T
    yield randn(T, 2 * P, dtype=dtype)[:, ::2]


def strided_batches(B: int, T: int, P: int, dtype: torch.dtype) -> Iterator[Tensor]:
    poisoned = torch.full((B, T + 1, P + 5), torch.nan, dtype=dtype)
    poisoned[:, :T, :P] = randn(B, T, P, dtype=dtype)
    yield poisoned[:, :T, :P]
    yield randn(2 * B, T, P, dtype=dtype)[::2]
    yield randn(T, B, P, dtype=dtype).transpose(0, 1)  # tasks outermost
    yield randn(P, B, T, dtype=dtype).permute(1, 2, 0)  # columns outermost
    yield randn(1, T, P, dtype=dtype).expand(B, T, P)
    yield randn(B, T, P, dtype=dtype)[2:3]


def ragged(
    T: int, kinds: Sequence[torch.dtype] = (F32,), missing: float = 0.0, columns: Sequence = COLUMNS, seed: int = 0
) -> list[Tensor | None]:
    """T rows of K tensors; entry (t, k) is missing with this probability, but no column entirely."""
    gen, K = generator(seed), len(columns)
    absent = torch.rand(T, K, generator=gen) < missing
    absent[torch.randint(T, (K,), generator=gen), torch.arange(K)] = False
    return [
        None if absent[t, k] else randn(*shape, dtype=kinds[k % len(kinds)], seed=100 * t + k)
        for t in range(T)
        for k, shape in enumerate(columns)
    ]


def spoilt(grads: list[Tensor | None], k: int, value: float, K: int) -> list[Tensor | None]:
    """The first gradient of column k ends with this value."""
    i = next(i for i in range(k, len(grads), K) if grads[i] is not None)
    last = grads[i].clone()
    last.view(-1)[-1] = value
    return [*grads[:i], last, *grads[i + 1 :]]


def with_spectrum(spectrum: Tensor, seed: int = 0) -> Tensor:
    """Q diag(spectrum) Qᵀ with a random orthogonal Q, exactly symmetric."""
    Q, _ = torch.linalg.qr(randn(*spectrum.shape * 2, dtype=F64, seed=seed))
    A = (Q * spectrum) @ Q.T
    return (A + A.T) / 2


def symmetric(T: int, seed: int = 0) -> Tensor:
    A = randn(T, T, dtype=F64, seed=seed)
    return A + A.T


def line(T: int) -> Tensor:
    return torch.linspace(0, 1, T, dtype=F64)


def graded(T: int, smallest: int = 8, seed: int = 0) -> Tensor:
    """D C D with a benign C: every eigenvalue is determined to relative accuracy, however small."""
    A = with_spectrum(0.5 + line(T), seed) * torch.logspace(0, -smallest, T, dtype=F64)
    A = A * torch.logspace(0, -smallest, T, dtype=F64)[:, None]
    return A.tril() + A.tril(-1).T


def _clustered(T: int) -> Tensor:
    clusters = torch.tensor([1.0, 1.0 + 1e-12, 2.0, -3.0], dtype=F64)
    return with_spectrum(clusters.repeat(T // 4 + 1)[:T] + 1e-14 * line(T))


def _outer(T: int) -> Tensor:
    v = randn(T, dtype=F64, seed=T)
    return torch.outer(v, v)


def _tridiagonal(T: int) -> Tensor:
    one = torch.ones(T - 1, dtype=F64)
    return 2 * torch.eye(T, dtype=F64) - torch.diag(one, 1) - torch.diag(one, -1)


# Symmetric matrices by name: T -> [T, T].
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "random": symmetric,
    "psd": lambda T: with_spectrum(line(T) + 0.1),
    "indefinite": lambda T: with_spectrum(line(T) - 0.5),
    "negative definite": lambda T: -with_spectrum(line(T) + 0.1),
    "clustered": _clustered,
    "repeated": lambda T: with_spectrum(torch.where(line(T) < 0.5, 1.0, 2.0)),
    "one": lambda T: torch.eye(T, dtype=F64),
    "zero": lambda T: torch.zeros(T, T, dtype=F64),
    "diagonal": lambda T: torch.diag(randn(T, dtype=F64, seed=T)),
    "all ones": lambda T: torch.ones(T, T, dtype=F64),
    "rank one": _outer,
    "spiked": lambda T: torch.eye(T, dtype=F64) + 1e6 * _outer(T),
    "geometric": lambda T: with_spectrum(torch.logspace(0, -12, T, dtype=F64)),
    "graded up": lambda T: graded(T).flip(0, 1),
    "graded down": graded,
    "tridiagonal": _tridiagonal,
    "antidiagonal": lambda T: torch.eye(T, dtype=F64).flip(0).clone(),
    "tiny": lambda T: symmetric(T) * 2.0**-100,
    "huge": lambda T: symmetric(T) * 2.0**100,
}


# ------------------------------------------------------------------------------------------------ backends


@dataclass
class Aligned:
    """What `align` and `align_rows` compute; out is a list for rows."""

    out: Tensor | list[Tensor]
    M: Tensor
    alpha: Tensor
    lam: Tensor
    rank: Tensor
    launches: list[str] = field(default_factory=list)


def policy(
    T: int,
    dtype: torch.dtype,
    weights: Tensor | None = None,
    scale: str = "min",
    rtol: float | None = None,
    rank_rule: str = "normalized",
) -> tuple:
    """The options of Aligned-MTL as ops take them."""
    rtol = default_rtol(T, dtype) if rtol is None else rtol
    return weights, scale, rtol, EPS64 if dtype is F64 else EPS32, rank_rule


class Torch:
    """The ops of torch tensors, or their reference, on a device; what comes back lies on the CPU."""

    any_strides = True

    def __init__(
        self,
        impl: ModuleType = ops,
        device: str = "cpu",
        entries: float = 1e6,
        exact: float = 1e-12,
        blocks: Callable[[int, torch.dtype], bool] = lambda T, dtype: T > 16 and dtype is not F64,
    ) -> None:
        """How large a matrix may be, how exact its Gram is, and where `align` may take blocks in float32."""
        self.impl, self.device, self.entries, self.exact, self.blocks = impl, device, entries, exact, blocks

    def takes(self, *shape: int) -> bool:
        return math.prod(shape) <= self.entries

    def takes_spectra(self, T: int) -> bool:
        return True

    def on(self, args):
        """Tensors on the device, in their strides and with what lies between."""
        if self.device == "cpu":
            return args

        def place(x: Tensor) -> Tensor:
            storage = x.new_empty(0).set_(x.untyped_storage())
            return storage.to(self.device).as_strided(x.size(), x.stride(), x.storage_offset())

        return pytree.tree_map_only(Tensor, place, args)

    def grams(self, G: Tensor) -> list[tuple[Tensor, float]]:
        """Every Gram matrix that there is of G, and the limit of its error."""
        return [(self.impl.gram(self.on(G)).cpu(), self.exact)]

    def grams_of_rows(self, grads: Grads, T: int) -> list[tuple[Tensor, float]]:
        return [(self.impl.gram_rows(self.on(grads), T).cpu(), self.exact)]

    def aligned_gram_limit(self, T: int, dtype: torch.dtype) -> float:
        return 2e-6 if self.blocks(T, dtype) else 1e-12

    def combine(self, G: Tensor, alpha: Tensor, offset: int = 0) -> Tensor:
        buffer, out = guarded((*G.shape[:-2], G.shape[-1]), G.dtype, offset, self.device)
        self.impl.combine(self.on(G), self.on(alpha), out)
        check_guard(buffer, out.numel(), offset)
        return out.cpu()

    def _outs(self, grads: Grads, T: int) -> tuple[tuple[Tensor, ...], ...]:
        K = len(grads) // T
        like = [next(g for g in grads[k::K] if g is not None) for k in range(K)]
        return tuple(zip(*(guarded(g.shape, g.dtype, device=self.device) for g in like), strict=True))

    def combine_rows(self, grads: Grads, alpha: Tensor) -> list[Tensor]:
        buffers, outs = self._outs(grads, len(alpha))
        self.impl.combine_rows(self.on(grads), self.on(alpha), list(outs))
        for buffer, out in zip(buffers, outs, strict=True):
            check_guard(buffer, out.numel())
        return [out.cpu() for out in outs]

    def align(self, G: Tensor, offset: int = 0, **options) -> Aligned:
        buffer, out = guarded((*G.shape[:-2], G.shape[-1]), G.dtype, offset, self.device)
        G = self.on(G)
        self.impl.align(G, *self.on(policy(G.shape[-2], G.dtype, **options)), out)
        check_guard(buffer, out.numel(), offset)
        # The op writes no more than that; the rest is that of rows.
        seen = [self._align_rows(list(g), G.shape[-2], G.dtype, **options) for g in ([G] if G.ndim == 2 else G)]
        rest = [[getattr(one, name) for one in seen] for name in ("M", "alpha", "lam", "rank")]
        return Aligned(out.cpu(), *([x[0] for x in rest] if G.ndim == 2 else [torch.stack(x) for x in rest if x]))

    def align_rows(self, grads: Grads, T: int, dtype: torch.dtype, **options) -> Aligned:
        """`dtype` is the one that decides on tolerances."""
        return self._align_rows(self.on(grads), T, dtype, **options)

    def _align_rows(self, grads: Grads, T: int, dtype: torch.dtype, **options) -> Aligned:
        buffers, outs = self._outs(grads, T)
        options = self.on(policy(T, dtype, **options))
        M, alpha, rank = self.impl.align_rows(grads, T, *options, list(outs))
        lam = self.impl.balance(M, *options)[1]  # as `Info.eigenvalues` reads them
        for buffer, out in zip(buffers, outs, strict=True):
            check_guard(buffer, out.numel())
        return Aligned([out.cpu() for out in outs], *[x.cpu() for x in (M, alpha, lam, rank)])

    def balance(self, M: Tensor, dtype: torch.dtype = F64, **options) -> tuple[Tensor, ...]:
        got = self.impl.balance(self.on(M), *self.on(policy(M.shape[-1], dtype, **options)))
        return tuple(x.cpu() for x in got)

    def eigh(self, M: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.cpu() for x in self.impl.eigh(self.on(M)))


# ------------------------------------------------------------------------------------------------ checks


def check_gram(backend, G: Tensor) -> None:
    for M, limit in backend.grams(G):
        assert gram_error(M, G) <= limit
        assert torch.equal(M, M.mT)


def check_combine(backend, G: Tensor, alpha: Tensor | None = None, offset: int = 0) -> None:
    """Accumulated in float64 and rounded once."""
    alpha = randn(*G.shape[:-1], dtype=F64, seed=1) if alpha is None else alpha
    X = G.to(F64)
    expected = (alpha[..., None, :] @ X).squeeze(-2)
    largest = (alpha.abs()[..., None, :] @ X.abs()).squeeze(-2)
    assert rounded(backend.combine(G, alpha, offset), expected, slack=1e-13 * largest)


def check_align(backend, G: Tensor, kappa: float | None = None, offset: int = 0, **options) -> Aligned:
    """Against a float64 SVD, or many; `kappa` where it is known better."""
    got = backend.align(G, offset, **options)
    entries = [(G, got.out, got.rank)] if G.ndim == 2 else zip(G, got.out, got.rank, strict=True)
    for g, out, rank in entries:
        expected, R, its_kappa = svd_truth(g, **options)
        assert rank == R
        assert relative(out, expected) <= contract(len(g), its_kappa if kappa is None else kappa, g.dtype)
    return got


def check_rows(backend, grads: Grads, T: int, kappa: float | None = None, **options) -> Aligned:
    """All three functions of a ragged list, as of the matrix behind it."""
    K = len(grads) // T
    G = dense([grads[t * K : (t + 1) * K] for t in range(T)])
    coarsest = max((g.dtype for g in grads if g is not None), key=EPS.__getitem__)
    for M, limit in backend.grams_of_rows(grads, T):
        assert gram_error(M, G) <= limit
    alpha = randn(T, dtype=F64, seed=1)
    outs = backend.combine_rows(grads, alpha)
    lengths = [out.numel() for out in outs]
    for out, want in zip(outs, (alpha @ G.to(F64)).split(lengths), strict=True):
        assert rounded(out.reshape(-1), want, slack=1e-12)

    options = {"rtol": default_rtol(T, coarsest), **options}
    got = backend.align_rows(grads, T, coarsest, **options)
    expected, R, its_kappa = svd_truth(G, **options)
    limit = contract(T, its_kappa if kappa is None else kappa)
    assert got.rank == R
    off = backend.aligned_gram_limit(T, coarsest)
    assert gram_error(got.M, G) <= off
    lam = torch.linalg.eigvalsh(G.to(F64) @ G.to(F64).T).flip(0)
    assert ((got.lam - lam).abs() <= T * off * lam[0]).all()
    for out, want in zip(got.out, expected.split(lengths), strict=True):
        finest = torch.finfo(out.dtype).tiny * EPS[out.dtype] * want.numel() ** 0.5  # where results are subnormal
        error = (out.reshape(-1).to(F64) - want).norm()
        assert error <= (limit + EPS[out.dtype]) * expected.norm() + finest
    return got


def check_not_finite(got: Aligned) -> None:
    assert got.rank == 0
    assert got.alpha.isnan().all()
    assert got.lam.isnan().all()
    assert not got.M.isfinite().all()
    assert not flat(got.out if isinstance(got.out, list) else [got.out]).isfinite().any()


# ------------------------------------------------------------------------------------------------ the tests


def table(**values: Sequence) -> Callable[[Callable], Callable]:
    """Parametrizes a test by one value that decides whether a backend takes the case: a shape, or T for spectra."""

    def mark(test: Callable) -> Callable:
        test.table = values
        return test

    return mark


class Parity:
    """The tests. A subclass names its backends."""

    backends: ClassVar[Sequence]

    def pytest_generate_tests(self, metafunc) -> None:
        for name, values in getattr(metafunc.function, "table", {}).items():
            kept = [x for x in values if next(self.taking(name, x), None)]
            metafunc.parametrize(name, kept, ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else str(x))

    @classmethod
    def taking(cls, name: str, value) -> Iterator:
        for backend in cls.backends:
            if backend.takes(*value) if name == "shape" else name != "spectral" or backend.takes_spectra(value):
                yield backend

    @classmethod
    def aligning(cls, T: int, P: int = 1) -> Iterator:
        """Backends that take it, and an eigenproblem of this size."""
        return (backend for backend in cls.backends if backend.takes(T, P) and backend.takes_spectra(T))

    # -------------------------------------------------------------------------------------------- flat [T, P]

    @dtypes
    @table(shape=SHAPES)
    def test_gram_and_combine(self, order, shape, dtype):
        G = randn(*shape, dtype=dtype, seed=shape[0])
        for backend in self.taking("shape", shape):
            check_gram(backend, G)
            check_combine(backend, G)

    @dtypes
    @table(shape=[shape for shape in SHAPES if shape[1]])
    def test_align(self, order, shape, dtype):
        T, P = shape
        n = T + P + DTYPES.index(dtype)
        G, w = randn(T, P, dtype=dtype, seed=T), torch.rand(T, dtype=F64, generator=generator(P)) + 0.1
        chosen = {"scale": SCALES[n % 3], "weights": w if n % 2 else None}
        if n % 4 == 3 and (dtype is F64 or svd_truth(G)[2] <= 1e3):  # else the contract says nothing
            chosen["rank_rule"] = "gram"
        for backend in self.aligning(T, P):
            check_align(backend, G, **chosen)

    @dtypes
    @table(shape=STRIDED)
    def test_strides(self, shape, dtype):
        for k, G in enumerate(strided(*shape, dtype)):
            for backend in self.taking("shape", shape):
                if not backend.any_strides and G.stride(1) != 1:
                    continue
                check_gram(backend, G)
                check_combine(backend, G)
                if G.stride(0) == 0:
                    M = backend.grams(G)[0][0]
                    assert relative(M, M[:1, :1].expand_as(M)) <= 1e-14
                if backend.takes_spectra(shape[0]):
                    check_align(backend, G, kappa=10 if G.stride(0) == 0 else None)
                for offset in (1, 3) if k == 2 else ():
                    check_combine(backend, G, offset=offset)
                    if backend.takes_spectra(shape[0]):
                        check_align(backend, G, offset=offset)

    def test_combine_accumulates_in_float64(self):
        G = randn(6, 5000)
        G = torch.cat([G, -G * (1 + 1e-4)])
        for backend in self.backends:
            check_combine(backend, G, torch.ones(12, dtype=F64))
            check_combine(backend, G, torch.logspace(0, 12, 12, dtype=F64))

    @pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
    def test_results_are_rounded_once(self, dtype):
        """To nearest, ties to even, in whole vectors and beside them: α of a gradient of ones is the result."""
        alpha = hard_to_round(dtype)
        expected, P = [nearest(x, dtype) for x in alpha.tolist()], 21
        for backend in self.backends:
            for column in backend.combine(torch.ones(len(alpha), 1, P, dtype=dtype), alpha[:, None]).T:
                assert same_numbers(column, expected)
            for x, want in zip(alpha[::7], expected[::7], strict=True):
                (rows,) = backend.combine_rows([torch.ones(P, dtype=dtype)], x[None])
                assert same_numbers(rows, [want] * P), x

    def test_float16_subnormals_and_overflow(self):
        G = torch.full((2, 100), 2.0**-24, dtype=F16)
        for backend in self.backends:
            assert backend.grams(G)[0][0][0, 1].item() == 100 * 2.0**-48
            assert (backend.combine(G, torch.tensor([1.0, 2.0], dtype=F64)) == 3 * 2.0**-24).all()
            assert backend.combine(G, torch.tensor([2.0**40, 0.0], dtype=F64)).isposinf().all()

    # -------------------------------------------------------------------------------------------- batches

    @dtypes
    @table(shape=BATCHES)
    def test_batches(self, shape, dtype):
        G = randn(*shape, dtype=dtype, seed=shape[0])
        for backend in self.taking("shape", shape):
            check_gram(backend, G)
            check_combine(backend, G)
            if shape[0] and shape[2] and backend.takes_spectra(shape[1]):
                w = torch.arange(1.0, shape[1] + 1.0, dtype=F64)
                check_align(backend, G[:20], scale="rmse", weights=w)

    @dtypes
    def test_strides_of_batches(self, dtype):
        for G in strided_batches(5, 4, 130, dtype):
            for backend in self.backends:
                if backend.any_strides or G.stride(2) == 1:
                    check_gram(backend, G)
                    check_combine(backend, G)
                    check_align(backend, G)

    def test_no_columns(self):
        for T in (1, 3, 8, 20, 64):
            for dtype in DTYPES:
                for backend in self.aligning(T):
                    assert not backend.grams(torch.empty(2, T, 0, dtype=dtype))[0][0].any()
                    for got in (
                        backend.align(torch.empty(T, 0, dtype=dtype)),
                        backend.align_rows([torch.empty(0, dtype=dtype)] * (3 * T), T, dtype),
                    ):
                        assert got.rank == 0
                        assert not any(x.any() for x in (got.M, got.alpha, got.lam))

    def test_batch_entries_of_different_rank_and_size(self):
        for T, P in ((5, 300), (20, 2000)):
            G = randn(7, T, P)
            G[1, 3] = G[1, 0]
            G[2] = 0
            G[3] *= 1e20
            G[4] *= 1e-20
            G[5, 2] *= 1e4
            G[6, 1, 3] = torch.inf
            for backend in self.backends:
                check_align(backend, G[:6])
                got = backend.align(G)
                assert got.rank.tolist() == [T, T - 1, 0, T, T, T, 0]
                assert got.out[:6].isfinite().all()
                assert not got.out[6].isfinite().any()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_a_matrix_that_is_not_finite_spares_the_rest_of_the_batch(self, bad):
        for B, T, P in ((20, 3, 90), (2, 8, 9000), (2, 20, 2000), (2, 40, 50), (2, 70, 300)):
            G = randn(B, T, P)
            broken = G.clone()
            broken[1, T - 1, P // 3] = bad
            rest = [b for b in range(B) if b != 1]
            for backend in self.aligning(T):
                got = backend.align(broken).out
                assert torch.equal(got[rest], backend.align(G).out[rest])
                assert not got[1].isfinite().any()

    # -------------------------------------------------------------------------------------------- ragged lists

    @dtypes
    @pytest.mark.parametrize("missing", [0.0, 0.3, 0.9])
    @table(spectral=RAGGED_TASKS)
    def test_ragged(self, order, spectral, missing, dtype):
        T = spectral
        for backend in self.taking("spectral", T):
            check_rows(backend, ragged(T, (dtype,), missing, seed=T), T)

    def test_missing_rows(self):
        K = len(COLUMNS)
        grads = ragged(4)
        grads[2 * K : 3 * K] = [None] * K
        for backend in self.backends:
            got = check_rows(backend, grads, 4)
            assert got.rank == 3
            assert got.alpha[2] == 0.0

    @pytest.mark.parametrize("kinds", MIXED, ids=lambda kinds: "-".join(map(dtype_id, kinds)))
    @table(spectral=(1, 3, 8, 20, 40, 70))
    def test_dtypes_differ_between_tensors(self, spectral, kinds):
        grads = ragged(spectral, kinds, missing=0.2, columns=[*COLUMNS, (50,), (51,), (52,)])
        for backend in self.taking("spectral", spectral):
            check_rows(backend, grads, spectral)

    @dtypes
    def test_views_of_one_buffer(self, dtype):
        """They begin at any element."""
        G = randn(5, 2000, dtype=dtype)
        for backend in self.backends:
            got = check_rows(backend, [g for row in G for g in row.split([1, 999, 0, 16, 984])], 5)
            assert relative(flat(got.out), backend.align(G).out.to(F64)) <= 1e-7 + EPS[dtype]
            assert relative(got.M, backend.grams(G)[0][0]) <= 1e-8

    @dtypes
    def test_strides_differ_between_tasks(self, dtype):
        """Channels-last, transposed and sliced gradients of one tensor: products go by index, not by memory order."""
        shape = (2, 6, 5, 4)
        values = [randn(*shape, dtype=dtype, seed=s) for s in range(5)]
        grads = [
            values[0],
            values[1].contiguous(memory_format=torch.channels_last),
            values[2].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
            torch.stack([values[3], values[3]], -1)[..., 0],
            values[4][:1].expand(shape),
        ]
        more = [g for i, g in enumerate(grads) for g in (g, None if i == 2 else randn(3, dtype=dtype, seed=i))]
        alike = [g.contiguous(memory_format=torch.channels_last) for g in values]
        for backend in self.backends:
            for rows in (grads, more, alike) if backend.any_strides else ():
                check_rows(backend, rows, 5)

    @pytest.mark.parametrize("K", [55, 400, 3000])
    def test_many_tensors(self, K):
        """More segments than any block holds and than a launch can carry, most of them tiny."""
        grads = ragged(6, (F32,), 0.1, [((i * 7) % 40,) for i in range(K)] + [(5000,), (3, 1000)])
        for backend in self.backends:
            check_rows(backend, grads, 6)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_rows_that_are_not_finite(self, bad):
        K = len(COLUMNS)
        for k in (0, 4, 8, 10):
            for T, kinds in ((3, (F32,)), (3, (F64, F32)), (20, (F32,)), (9, (F16, F32, BF16))):
                grads = ragged(T, kinds, missing=0.2, seed=k)
                i = next(t for t in range(T) if grads[t * K + k] is not None) * K + k
                wholly = [*grads[:i], grads[i].clone().fill_(bad), *grads[i + 1 :]]
                for rows in (wholly, spoilt(grads, k, bad, K)):
                    for backend in self.aligning(T):
                        check_not_finite(backend.align_rows(rows, T, F32))

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("T", SEVERAL)
    def test_a_missing_row_beside_one_that_is_not_finite(self, T, bad):
        """What is missing is not multiplied: its products are none, whatever the other row holds."""
        K = len(COLUMNS)
        for kinds in ((F32,), (F64,), (BF16, F32, F16, F64)):
            grads = ragged(T, kinds, missing=0.2, seed=T)
            grads[(T - 1) * K + 2 : T * K] = [None] * (K - 2)
            for k in (k for k in range(K) if not any(g is not None for g in grads[k::K])):
                grads[k] = randn(*COLUMNS[k], dtype=kinds[k % len(kinds)])
            for k in (1, 4):
                grads = spoilt(grads, k, bad, K)
            expected = reference.gram_rows(grads, T)
            for backend in self.backends:
                results = [backend.grams_of_rows(grads, T)[0][0]]
                if backend.takes_spectra(T):
                    results += [backend.align_rows(grads, T, F32).M]
                for M in results:
                    assert torch.equal(M.isnan(), expected.isnan())
                    assert torch.equal(M.isposinf(), expected.isposinf())
                    assert torch.equal(M.isneginf(), expected.isneginf())

    @pytest.mark.parametrize("size", [1e200, 1e-200])
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
    def test_a_nan_beside_float64_that_is_rescaled(self, dtype, size):
        """The rescaled Gram leaves finite entries of other types out; it must not lose a NaN with them."""
        wide = randn(3, 40, dtype=F64) * size
        for bad in (0.0, torch.nan, torch.inf):
            rows = [g for t in range(3) for g in (wide[t], torch.full((9,), bad if t == 1 else 0.0, dtype=dtype))]
            for backend in self.backends:
                got = backend.align_rows(rows, 3, F64)
                assert got.rank == (3 if bad == 0.0 else 0)
                assert got.alpha.isfinite().all() == (bad == 0.0)
                assert all(g.isfinite().all() == (bad == 0.0) for g in got.out)

    # -------------------------------------------------------------------------------------------- ranks, κ, scales

    @dtypes
    @pytest.mark.parametrize("rank_rule", ["normalized", "gram"])
    @pytest.mark.parametrize("name", DEPENDENT)
    def test_dependent_tasks(self, name, rank_rule, dtype):
        G = DEPENDENT[name](dtype)
        more = torch.cat([G] * (40_000 // G.numel() + 1), 1) if G.shape[1] > 7 else G  # more than one block or thread
        for backend in self.backends:
            for scale in SCALES:
                got = check_align(backend, G, kappa=10, scale=scale, rank_rule=rank_rule)
                assert got.rank < len(G)
                check_align(backend, more, kappa=10, scale=scale, rank_rule=rank_rule)

    @pytest.mark.parametrize("kappa", [1e0, 1e1, 1e2, 1e3, 1e4])
    @table(spectral=CONDITIONED_TASKS)
    def test_conditioning_and_spread_rows(self, spectral, kappa):
        T, rtol = spectral, spectral * EPS32
        for P in (max(300, 4 * T), 1100, 20_000 if T >= 64 else 32768 // T + 100):
            for spread in (1.0, 1e6):
                G = conditioned(T, P, kappa, spread, seed=T)
                for backend in self.aligning(T, P):
                    check_align(backend, G, kappa=kappa, rtol=rtol, scale="min")
            for backend in self.aligning(T, P):
                check_align(
                    backend, G, kappa=kappa, rtol=rtol, scale="rmse", weights=torch.arange(1.0, T + 1, dtype=F64)
                )

    @table(spectral=(6, 17, 24, 40))
    def test_where_a_float32_gram_is_barely_good_enough(self, spectral):
        """Sums in float32 blocks are allowed where the row-normalised Gram is benign: up to its edge."""
        T = spectral
        for P in (300, 2000, 9000):
            for kappa in (7.0, 10.0, 12.0, 15.0, 18.0, 20.0, 25.0, 30.0):
                for backend in self.taking("spectral", T):
                    if backend.blocks(T, F32):
                        check_align(backend, conditioned(T, P, kappa, seed=T), kappa=kappa, rtol=T * EPS32)

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize(("T", "kappa"), EXTREME)
    def test_extreme_conditioning(self, T, kappa, scale):
        G = conditioned(T, 4111, kappa, seed=T)
        for backend in self.backends:
            check_align(backend, G, kappa=kappa, rtol=T * EPS32, scale=scale)

    @pytest.mark.parametrize("T", [3, 10, 50])
    def test_conditioning_of_ragged_rows(self, T):
        G = conditioned(T, 3000, 1e3, seed=T)
        for backend in self.backends:
            check_rows(backend, [g for row in G for g in row.split([1, 1999, 0, 1000])], T, 1e3, rtol=T * EPS32)

    @pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
    def test_half_precision(self, dtype):
        G = randn(5, 3001, dtype=dtype)
        ratios = torch.tensor([150, 1, 1, 1, 1.0])[:, None]
        for X in (G, G * ratios.to(dtype), torch.cat([G, G.to(F64).sum(0, keepdim=True).to(dtype)])):
            for scale in SCALES:
                for backend in self.backends:
                    check_align(backend, X, kappa=10, scale=scale)
                    check_align(backend, torch.cat([X] * 3, 1), kappa=10, scale=scale)

    @pytest.mark.parametrize(("dtype", "size"), ENLARGED, ids=dtype_id)
    @table(spectral=(1, 5, 20, 50, 70))
    def test_scales(self, spectral, dtype, size):
        for P in (701, 9001):
            G = randn(spectral, P, dtype=dtype)
            scaled = (G.to(F64) * size).to(dtype)
            for backend in self.taking("spectral", spectral):
                got, plain = check_align(backend, scaled), backend.align(G)
                assert got.launches == plain.launches
                limit = {F32: 3e-7, F64: 1e-13, BF16: 4e-2}[dtype]
                limit = 1e-5 if size == 1e-38 else limit  # subnormal entries
                assert relative(got.alpha, plain.alpha) <= limit
                assert relative(got.out.to(F64) / size, plain.out.to(F64)) <= limit
                if dtype is F64:  # eigenvalues have the size of the squares, which is out of range
                    assert not got.lam.isfinite().any() if size > 1 else got.lam.max() < 1e-300

    @pytest.mark.parametrize("T", [3, 8, 12, 20])
    def test_one_column_sets_the_scale(self, T):
        """Wherever it is: all threads are asked for the largest entry, which says that the products overflow."""
        for column in (0, 40, 100, 127, 128, 200, 255, 300, 599):
            G = randn(T, 600, dtype=F64, seed=column)
            G[:, column] *= 2.0**600
            for backend in self.aligning(T, 600):
                got, plain = backend.align(G), backend.align(G * 2.0**-600)
                assert got.rank == plain.rank
                assert relative(got.alpha, plain.alpha) <= 1e-12
                assert relative(got.out * 2.0**-600, plain.out) <= 1e-12

    def test_float64_scales_of_ragged_rows_and_batches(self):
        for T, P in ((4, 300), (20, 2000), (40, 500)):
            G = randn(T, P, dtype=F64)
            for backend in self.backends:
                plain = backend.align(G)
                for size in (1e200, 1e-200):
                    rows = [g for row in G * size for g in row.split([100, P - 100])]
                    got = backend.align_rows(rows, T, F64)
                    assert got.rank == T
                    assert relative(torch.cat(got.out) / size, plain.out) <= 1e-12
                    assert relative(got.alpha, plain.alpha) <= 1e-12
                got = backend.align(torch.stack([G, G * 1e200, G * 1e-200, G * 0, G * 1e90, G * 1e-90]))
                assert got.rank.tolist() == [T, T, T, 0, T, T]
                for b, size in ((0, 1.0), (1, 1e200), (2, 1e-200), (4, 1e90), (5, 1e-90)):
                    assert relative(got.out[b] / size, plain.out) <= 1e-12
                assert not got.out[3].any()

    def test_subnormal_float64(self):
        G = (randn(3, 500, dtype=F64) * 2.0**60).round() * 2.0**-1074
        for backend in self.backends:
            got = backend.align(G)
            assert got.rank == 3
            assert relative(got.alpha, backend.align(randn(3, 500, dtype=F64)).alpha) <= 1e-12

    @pytest.mark.parametrize("name", PATTERNS)
    @pytest.mark.cover(1)
    @table(spectral=(6, 9, 17, 40, 48, 70))
    def test_adversaries(self, spectral, name):
        """Gradients whose float32 sums round the same way."""
        G = PATTERNS[name](spectral, 4096, generator(spectral)).to(F32)
        for backend in self.taking("spectral", spectral):
            check_align(backend, G)
            check_align(backend, torch.stack([G, randn(*G.shape), -G]))

    @dtypes
    @table(shape=NOT_FINITE)
    def test_not_finite(self, shape, dtype):
        T, P = shape
        for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
            for t, p in {(0, 0), (T - 1, P - 1), (T // 2, P // 3), ((T - 1) * (i % 2), P * i // 4)}:
                G = randn(T, P, dtype=dtype)
                G[t, p] = bad
                for backend in self.aligning(T, P):
                    check_not_finite(backend.align(G))
                    M = backend.grams(G)[0][0]
                    assert not M[t].isfinite().all()
                    alpha, lam, rank = backend.balance(M, dtype)
                    assert alpha.isnan().all()
                    assert lam.isnan().all()
                    assert rank == 0

    @dtypes
    def test_zero_gradients_give_zero(self, dtype):
        for T, P in ((1, 1), (4, 1000), (3, 12_000), (20, 2000), (64, 20), (70, 9)):
            for backend in self.aligning(T, P):
                got = backend.align(torch.zeros(T, P, dtype=dtype))
                assert got.rank == 0
                assert not any(x.any() for x in (got.out, got.alpha, got.lam))

    # -------------------------------------------------------------------------------------------- balance, eigh

    @pytest.mark.parametrize("rank_rule", ["normalized", "gram"])
    @table(spectral=BALANCED_TASKS)
    def test_balance(self, order, spectral, rank_rule):
        T = spectral
        for i, batch in enumerate(((), (1,), (3,), (9,), (0,)) if T <= 17 else ((), (9,) if T <= 33 else (2,))):
            G = randn(*batch, T, 4 * T + 8, dtype=F64, seed=T + i)
            if T <= 33 and i % 3 == 0:  # beyond, the reference takes minutes for it
                G[..., T // 2, :] = 0  # a task that is absent
            M = reference.gram(G)
            w = None if i % 2 else torch.rand(T, dtype=F64, generator=generator(T)) - 0.3
            chosen = {"weights": w, "scale": SCALES[(T + i) % 3], "rtol": 1e-3, "rank_rule": rank_rule}
            want_alpha, want_lam, want_rank = reference.balance(M, *policy(T, F32, **chosen))
            for backend in self.taking("spectral", T):
                alpha, lam, rank = backend.balance(M, F32, **chosen)
                assert torch.equal(rank, want_rank)
                assert (lam >= 0).all()
                assert (lam[..., 1:] <= lam[..., :-1]).all()
                assert ((lam - want_lam).abs() <= 20 * T * EPS64 * want_lam[..., :1]).all()
                if M.numel():
                    size = want_alpha.abs().amax(-1, keepdim=True)
                    assert ((alpha - want_alpha).abs() <= 50 * T * EPS64 * 100 * size).all()

    @pytest.mark.parametrize("spread", [1e3, 1e6])
    @table(spectral=(3, 8, 20, 33, 64, 70))
    def test_balance_of_a_graded_gram(self, spectral, spread):
        """Small eigenvalues from rows of very different norm keep their relative accuracy."""
        T = spectral
        M = reference.gram(conditioned(T, 3 * T, 10.0, spread, dtype=F64, seed=T))
        want_alpha, want_lam, want_rank = reference.balance(M, *policy(T, F32, rtol=1e-6))
        for backend in self.taking("spectral", T):
            alpha, lam, rank = backend.balance(M, F32, rtol=1e-6)
            assert rank == want_rank == T
            assert ((lam - want_lam).abs() <= 1e-10 * want_lam).all()
            assert relative(alpha, want_alpha) <= 1e-10

    @pytest.mark.parametrize(("rtol", "rank"), [(0.0, 4), (0.05, 3), (0.2, 2), (0.6, 1)])
    def test_balance_counts_by_rtol(self, rtol, rank):
        M = torch.diag(torch.tensor([1.0, 0.25, 0.01, 0.0001], dtype=F64))
        for backend in self.backends:
            assert backend.balance(M, F32, rtol=rtol, rank_rule="gram")[2] == rank
            assert backend.balance(M, F32, rtol=rtol)[2] == 4

    @table(spectral=SPECTRAL_TASKS)
    def test_eigh(self, order, spectral):
        """LAPACK's own test ratios; alone as in a batch."""
        T = spectral
        M = torch.stack([make(T) for make in SPECTRA.values()])
        expected = torch.linalg.eigvalsh(M)
        for backend in self.taking("spectral", T):
            lam, V = backend.eigh(M)
            assert (lam[:, 1:] >= lam[:, :-1]).all()
            assert max(residuals(M, lam, V)) < 10
            size = M.abs().sum(-1).amax(-1, keepdim=True)
            assert ((lam - expected).abs() <= 10 * T * EPS64 * size).all()
            for b in (0, 9):
                one, its_vectors = backend.eigh(M[b])
                assert relative(one, lam[b]) <= T * EPS64
                assert max(residuals(M[b], one, its_vectors)) < 10

    @table(spectral=(2, 3, 8, 17, 32, 40, 64, 70))
    def test_eigh_reads_only_the_lower_triangle(self, spectral):
        M = torch.stack([symmetric(spectral, seed) for seed in range(3)])
        for backend in self.taking("spectral", spectral):
            (lam, V), (other, W) = backend.eigh(M), backend.eigh(M.tril() + torch.full_like(M, torch.nan).triu(1))
            assert torch.equal(lam, other)
            assert torch.equal(V, W)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @table(spectral=(1, 2, 3, 8, 20, 40, 64, 70))
    def test_eigh_of_a_matrix_that_is_not_finite_spares_the_others(self, spectral, bad):
        T = spectral
        M = torch.stack([symmetric(T, seed) for seed in range(9)])
        for backend in self.taking("spectral", T):
            lam, V = backend.eigh(M)
            for b, (i, j) in ((4, (0, 0)), (8, (T - 1, 0))):
                broken = M.clone()
                broken[b, i, j] = broken[b, j, i] = bad
                got, vectors = backend.eigh(broken)
                assert got[b].isnan().all()
                assert vectors[b].isnan().all()
                rest = [k for k in range(9) if k != b]
                assert torch.equal(got[rest], lam[rest])
                assert torch.equal(vectors[rest], V[rest])

    @pytest.mark.parametrize("flip", [False, True], ids=["large first", "small first"])
    @table(spectral=(2, 3, 5, 8, 13, 32))
    def test_small_eigenvalues_of_graded_matrices(self, spectral, flip):
        """A relative stopping rule keeps every eigenvalue accurate, LAPACK does not."""
        mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed")
        T = spectral
        A = graded(T, 9, seed=T)
        A = A.flip(0, 1) if flip else A
        with mpmath.workdps(60):
            exact = mpmath.eigsy(mpmath.matrix(A.tolist()), eigvals_only=True)
            expected = torch.tensor(sorted(float(x) for x in exact), dtype=F64)
        for backend in self.taking("spectral", T):
            lam = backend.eigh(torch.stack([symmetric(T), A, symmetric(T, 1)]))[0][1]
            assert ((lam - expected) / expected).abs().max().item() <= 50 * T * EPS64

"""The solvers on a small matrix of cases, for builds with a sanitizer.

    python weights_matrix.py MODULE ORDER

Needs numpy only, as matrix.py does. Prints a digest of all results, which depends neither on the build nor on the order
of threads.
"""

from __future__ import annotations

import hashlib
import sys

import build
import numpy as np
from matrix import exact

LIMITS = (232448, 0)  # shared memory of a block: scratch lies there or does not
METHODS = [
    ("mgda",),
    ("dual_cone", None, False),
    ("dual_cone", "weights", True),
    ("cagrad", 0.4),
    ("nash", 1.0),
    ("nash", 0.5),
    ("pcgrad", "seed", True),
    ("gradvac", "seed", 0.3, "targets"),
]


def grams(T):
    """M [B, T, T] of gradients with duplicates, of low rank, with opposed rows, and with a zero row."""
    rng = np.random.default_rng(T)
    G = rng.standard_normal((4, T, 3 * T + 5))
    G[0, T // 2] = G[0, 0]
    G[1] = rng.standard_normal((T, T // 2 + 1)) @ rng.standard_normal((T // 2 + 1, 3 * T + 5)) + 0.3
    G[2, T - 1] = -G[2, 0]
    G[3, T // 2] = 0.0
    G = G[1:2] if T > 32 else G
    return exact(np.einsum("bip,bjp->bij", G, G))


def digest(module, order):
    module.set_order(order, 5)
    found = hashlib.sha256()
    for T in (1, 2, 5, 9, 33):
        M = grams(T)
        B = len(M)
        for method, *arguments in METHODS:
            for limit in LIMITS:
                module.set_shared_limit(limit)
                alpha, residual = np.empty((B, T)), np.zeros(B)
                named = {
                    "weights": exact(np.linspace(0.1, 1.0, T)),
                    "seed": exact(np.array([987654321 << 24])),
                    "targets": exact(np.zeros((B, T, T))),
                }
                rest = [0 if x is None else named[x].ctypes.data if isinstance(x, str) else x for x in arguments]
                session = module.Session(False, limit)
                addresses = [alpha.ctypes.data, residual.ctypes.data, *rest]
                getattr(module, method)(session, M.ctypes.data, B, T, *addresses)
                for array in (alpha, residual, named["targets"]):
                    found.update(array.tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(digest(build.load(sys.argv[1]), sys.argv[2]))

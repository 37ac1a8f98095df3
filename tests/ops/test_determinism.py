"""The same bits for any number of threads and on every run: reductions have a fixed order, and no atomics."""

import pytest
import torch
from helpers import BF16, EPS32, F16, F32, F64, dtype_id, needs_extension, randn

import fastmtl
from fastmtl import ops

pytestmark = needs_extension  # the reference leaves the order of sums to the BLAS

POLICY = (None, "min", 1e-3, EPS32, "normalized")
THREADS = (1, 2, 3)


def bits(x):
    """All tensors of a result as integers, so that NaN and -0 compare by bits."""
    if isinstance(x, torch.Tensor):
        return [x.clone().reshape(-1).view(torch.uint8)]
    return [b for part in x for b in bits(part)]


def check(call):
    """`call` gives the same bits on 1, 2 and 3 threads, and when it is repeated."""
    expected = None
    for threads in (*THREADS, 2, 1):
        torch.set_num_threads(threads)
        got = bits(call())
        expected = got if expected is None else expected
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), f"{threads} threads"


def aligned(G):
    out = torch.empty(G.shape[:-2] + G.shape[-1:], dtype=G.dtype)
    ops.align(G, *POLICY, out=out)
    return out


def combined(G):
    out = torch.empty(G.shape[:-2] + G.shape[-1:], dtype=G.dtype)
    ops.combine(G, randn(*G.shape[:-1], dtype=F64, seed=1), out=out)
    return out


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize(
    ("T", "P"),
    [
        (1, 300_001),
        (2, 300_001),
        (3, 90_001),
        (5, 60_000),
        (8, 100_003),
        (12, 70_001),
        (16, 40_001),
        (24, 30_011),
        (33, 20_011),
        (48, 20_011),
        (64, 12_011),
    ],
)
def test_matrix(T, P, dtype):
    G = randn(T, P, dtype=dtype)
    check(lambda: ops.gram(G))
    check(lambda: combined(G))
    check(lambda: aligned(G))


def test_larger_than_the_caches():
    G = randn(4, 3_300_001)
    check(lambda: ops.gram(G))
    check(lambda: aligned(G))


@pytest.mark.parametrize("T", [3, 10, 40])
def test_unaligned_rows(T):
    G = randn(T * 20_003 + 1)[1:].view(T, 20_003)
    check(lambda: ops.gram(G))
    check(lambda: aligned(G))


@pytest.mark.parametrize(
    "shape", [(3, 4, 70_001), (7, 3, 1000), (64, 8, 512), (300, 4, 33), (9, 20, 5000), (33, 40, 300)]
)
def test_batch(shape):
    G = randn(*shape)
    check(lambda: ops.gram(G))
    check(lambda: combined(G))
    check(lambda: aligned(G))


@pytest.mark.parametrize("T", [2, 6, 17, 50])
def test_ragged(T):
    sizes = [1, 30_000, 7, 0, 4096, 11_111]
    rows = [[None if (t * k) % 5 == 3 else randn(n, seed=10 * t + k) for k, n in enumerate(sizes)] for t in range(T)]
    grads = [g for row in rows for g in row]
    alpha = randn(T, dtype=F64)
    check(lambda: ops.gram_rows(grads, T))

    def combine_rows():
        out = [torch.empty(n) for n in sizes]
        ops.combine_rows(grads, alpha, out)
        return out

    def align_rows():
        out = [torch.empty(n) for n in sizes]
        return *ops.align_rows(grads, T, *POLICY, out), *out

    check(combine_rows)
    check(align_rows)
    check(lambda: fastmtl.AlignedMTL()(rows))


@pytest.mark.parametrize("leak", [None, 0.3])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=dtype_id)
def test_random_signs(dtype, leak):
    """A coordinate's random number is its own, whichever thread works on it."""
    seed = torch.tensor(5)
    for shape in ((3, 300_001), (12, 70_001), (3, 4, 70_001), (64, 8, 512), (300, 4, 33)):
        G = randn(*shape, dtype=dtype)
        leaks = None if leak is None else torch.full((shape[-2],), leak, dtype=F64)

        def dropped(G=G, leaks=leaks):
            out = torch.empty(G.shape[:-2] + G.shape[-1:], dtype=dtype)
            ops.sign_drop(G, seed, leaks, out)
            return out

        check(dropped)
    sizes = [1, 30_000, 7, 0, 4096, 111_111]
    grads = [
        None if (t * k) % 5 == 3 else randn(n, dtype=dtype, seed=10 * t + k)
        for t in range(4)
        for k, n in enumerate(sizes)
    ]

    def dropped_rows():
        out = [torch.empty(n, dtype=dtype) for n in sizes]
        ops.sign_drop_rows(grads, 4, seed, None, out)
        return out

    check(dropped_rows)


@pytest.mark.parametrize(("batch", "T"), [(1000, 3), (300, 8), (65, 16), (40, 32), (1, 30), (5, 48), (3, 64)])
def test_eigenproblems(batch, T):
    A = randn(batch, T, T + 3, dtype=F64)
    M = A @ A.mT
    check(lambda: ops.balance(M, *POLICY))
    if T <= 32:  # larger ones are LAPACK's
        check(lambda: ops.eigh(M))


def test_rank_deficient_and_ill_conditioned():
    G = randn(6, 50_001)
    G = torch.cat([G, G[:2], G[:1] * 1e-3 + 1e-5 * randn(1, 50_001, seed=2)])
    check(lambda: aligned(G))
    G = torch.cat([randn(50, 20_001), randn(50, 20_001)[:1]])
    check(lambda: ops.gram(G))


def test_the_place_in_memory_does_not_matter():
    """Rows read in place from different alignments give the same bits."""
    P = 50_001
    for T in (3, 9):
        values = randn(T, P)
        results = []
        for offset in (0, 1, 2, 3, 5, 8, 13):
            buffer = torch.zeros(T * (P + 16) + 16)
            G = buffer[offset:].as_strided((T, P), (P + 16, 1))
            G.copy_(values)
            results.append((*bits(ops.gram(G)), *bits(aligned(G))))
        for got in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))

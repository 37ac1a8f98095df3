"""The reference ops against a float64 singular value decomposition: they are what every kernel is held to."""

import pytest
import torch
from helpers import (
    BF16,
    DEPENDENT,
    DTYPES,
    EPS,
    EPS32,
    EPS64,
    F32,
    F64,
    condition,
    conditioned,
    contract,
    default_rtol,
    dense,
    dtype_id,
    flat,
    gram_error,
    randn,
    relative,
    svd_align,
    svd_rank,
)

from fastmtl.ops import reference

SCALES = ("min", "median", "rmse")


def policy(G, scale="min", rtol=None, weights=None, rank_rule="normalized"):
    zero = EPS64 if G.dtype is F64 else EPS32
    return weights, scale, default_rtol(G.shape[-2], G.dtype) if rtol is None else rtol, zero, rank_rule


def aligned(G, **options):
    out = torch.full((*G.shape[:-2], G.shape[-1]), torch.nan, dtype=G.dtype)
    reference.align(G, *policy(G, **options), out=out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 1), (3, 0), (4, 100), (2, 5, 33), (0, 3, 4), (70, 40)])
def test_gram(shape, dtype):
    G = randn(*shape, dtype=dtype)
    assert gram_error(reference.gram(G), G) <= 1e-14


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("T", "P"), [(1, 1), (1, 50), (2, 3), (3, 400), (6, 6), (10, 1000), (17, 900), (40, 2000), (80, 999)]
)
def test_align_equals_svd(T, P, scale):
    for dtype in DTYPES:
        G = randn(T, P, dtype=dtype, seed=T + P)
        w = torch.rand(T, dtype=F64) + 0.1
        expected = svd_align(G, w, scale)
        assert relative(aligned(G, scale=scale, weights=w), expected) <= contract(T, condition(G), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_tasks(name, dtype):
    G = DEPENDENT[name](dtype)
    T = G.shape[0]
    for scale in SCALES:
        assert relative(aligned(G, scale=scale), svd_align(G, scale=scale)) <= contract(T, 10, dtype) + EPS[dtype]
    _, _, rank = reference.balance(reference.gram(G), *policy(G))
    assert rank == svd_rank(G)
    assert rank < T


# What the accuracy contract covers: any spread of row norms up to κ = 1e4, and κ T eps32 <= 0.3.
CONDITIONS = [
    (T, spread, kappa)
    for T in (2, 10, 32)
    for kappa in (1e0, 1e2, 1e3, 1e4, 1e5, 1e6)
    for spread in (1.0, 1e6)
    if kappa * T * EPS32 <= 0.3 and (kappa <= 1e4 or spread == 1.0)
]


@pytest.mark.parametrize(("T", "spread", "kappa"), CONDITIONS)
def test_conditioning(T, spread, kappa):
    G = conditioned(T, 1500, kappa, spread)
    for scale in SCALES:
        got = aligned(G, scale=scale, rtol=T * EPS32)
        assert relative(got, svd_align(G, scale=scale, rtol=T * EPS32)) <= contract(T, kappa)


def test_small_eigenvalues_of_spread_rows_survive_beyond_the_small_solver():
    G = conditioned(80, 1000, 1e2, spread=1e6)
    rtol = 80 * EPS32
    assert relative(aligned(G, rtol=rtol), svd_align(G, rtol=rtol)) <= contract(80, 1e2)


@pytest.mark.parametrize(("rank_rule", "rank"), [("normalized", 3), ("gram", 1)])
def test_a_large_task_is_not_mistaken_for_dependent_ones(rank_rule, rank):
    G = randn(3, 5000) * torch.tensor([1e5, 1.0, 1.0])[:, None]
    _alpha, lam, got = reference.balance(reference.gram(G), *policy(G, rank_rule=rank_rule))
    assert got == rank == svd_rank(G, rank_rule=rank_rule)
    assert relative(aligned(G, rank_rule=rank_rule), svd_align(G, rank_rule=rank_rule)) <= 2e-6
    assert torch.equal(lam, lam.sort(descending=True).values)


def test_rows_at_the_rounding_floor_count_as_zero():
    G = randn(4, 3000) * torch.tensor([1.0, 1e-9, 1.0, 1.0])[:, None]
    _, _, rank = reference.balance(reference.gram(G), *policy(G))
    assert rank == 3
    assert relative(aligned(G), svd_align(G)) <= 2e-6
    wide = G.to(F64)  # in float64 the same row is far above rounding noise
    assert reference.balance(reference.gram(wide), *policy(wide))[2] == 4


@pytest.mark.parametrize(("dtype", "scale"), [(F32, 1e25), (F32, 1e-25), (F64, 1e200), (F64, 1e-200), (F64, 1e-300)])
def test_scales_beyond_the_range_of_a_gram(dtype, scale):
    G = randn(5, 700, dtype=dtype)
    assert relative(aligned(G * scale), svd_align(G * scale)) <= contract(5, 2, dtype)
    batch = torch.stack([G, G * scale, -2 * G])
    for got, one in zip(aligned(batch), batch, strict=True):
        assert relative(got, svd_align(one)) <= contract(5, 2, dtype)
    rows = [list(r.split([1, 500, 199])) for r in G * scale]
    out = [torch.empty_like(g) for g in rows[0]]
    _M, alpha, rank = reference.align_rows([g for r in rows for g in r], 5, *policy(G), out)
    assert relative(flat(out), svd_align(G * scale)) <= contract(5, 2, dtype)
    assert rank == 5
    assert relative(alpha, reference.balance(reference.gram(G), *policy(G))[0]) <= 1e-6


def test_zero_gradients_give_zero():
    G = torch.zeros(4, 100)
    alpha, lam, rank = reference.balance(reference.gram(G), *policy(G))
    assert rank == 0
    assert not alpha.any()
    assert not lam.any()
    assert not aligned(G).any()


def test_ragged_equals_dense():
    rows = [
        [randn(3, 4, seed=1), None, randn(5, dtype=F64, seed=2), None, torch.empty(0)],
        [randn(3, 4, seed=3), randn(2, dtype=BF16, seed=4), None, None, torch.empty(0)],
        [None, None, None, None, None],
        [randn(3, 4, seed=5), randn(2, dtype=BF16, seed=6), randn(5, dtype=F64, seed=7), None, torch.empty(0)],
    ]
    rows = [[g for k, g in enumerate(row) if k != 3] for row in rows]  # a column without any gradient is left out
    G = dense(rows)
    grads = [g for row in rows for g in row]
    out = [torch.empty(3, 4), torch.empty(2, dtype=BF16), torch.empty(5, dtype=F64), torch.empty(0)]
    options = (None, "min", 1e-3, EPS32, "normalized")
    M, alpha, rank = reference.align_rows(grads, 4, *options, out)
    assert gram_error(reference.gram_rows(grads, 4), G) <= 1e-14
    assert gram_error(M, G) <= 1e-14
    assert rank == 3
    assert alpha[2] == 0.0
    assert relative(reference.balance(M, *options)[1], torch.linalg.eigvalsh(G @ G.T).flip(0)) <= 1e-12
    expected = svd_align(G, rtol=1e-3)
    assert relative(flat(out[:1]), expected[:12]) <= 1e-6
    assert relative(flat(out[1:2]), expected[12:14]) <= EPS[BF16]
    assert relative(out[2], expected[14:]) <= 1e-12


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_in_non_finite_out(bad):
    for t, p in ((0, 0), (2, 57), (3, 99)):
        G = randn(4, 100)
        G[t, p] = bad
        assert not aligned(G).isfinite().any()
        alpha, lam, rank = reference.balance(reference.gram(G), *policy(G))
        assert alpha.isnan().all()
        assert lam.isnan().all()
        assert rank == 0


def test_a_non_finite_matrix_leaves_the_rest_of_the_batch_alone():
    G = randn(3, 4, 50)
    G[1, 2, 3] = torch.nan
    out = aligned(G)
    assert not out[1].isfinite().any()
    for b in (0, 2):
        assert torch.equal(out[b], aligned(G[b]))


@pytest.mark.parametrize("scale", SCALES)
def test_alpha_and_eigenvalues(scale):
    G = randn(7, 300, dtype=F64)
    w = torch.arange(1.0, 8.0)
    alpha, lam, rank = reference.balance(reference.gram(G), *policy(G, scale=scale, weights=w))
    U, s, _ = torch.linalg.svd(G, full_matrices=False)
    c = {"min": s[-1], "median": s[3], "rmse": s.square().mean().sqrt()}[scale]
    assert alpha.dtype is lam.dtype is F64
    assert rank.dtype is torch.int64
    assert relative(lam, s.square()) <= 1e-13
    assert relative(alpha, c * ((w.to(F64) @ U) / s) @ U.T) <= 1e-13


def test_median_is_the_lower_one():
    M = torch.diag(torch.tensor([16.0, 9.0, 4.0, 1.0], dtype=F64))
    alpha, _, _ = reference.balance(M, torch.ones(4), "median", 1e-3, EPS64, "normalized")
    assert relative(alpha, 2.0 / torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=F64)) <= 1e-15

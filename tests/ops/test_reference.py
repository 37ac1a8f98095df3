"""The reference ops against a float64 singular value decomposition: they are what every kernel is held to."""

import pytest
import torch
from helpers import (
    BF16,
    EPS,
    EPS32,
    EPS64,
    F32,
    F64,
    conditioned,
    contract,
    dense,
    flat,
    gram_error,
    randn,
    relative,
    svd_align,
    svd_rank,
)
from parity import SCALES, Parity, Torch, policy

from fastmtl.ops import reference


class Reference(Torch):
    most_tasks = 24  # beyond, its rotations, in Python, take seconds

    def takes_spectra(self, T):
        return self.most_tasks >= T


@pytest.mark.cover(1)
class TestReference(Parity):
    backends = (Reference(reference, entries=5e4, exact=1e-13, blocks=lambda T, dtype: False),)

    def pytest_generate_tests(self, metafunc):
        if metafunc.config.getoption("--slow"):
            Reference.most_tasks = 40
        super().pytest_generate_tests(metafunc)


def aligned(G, **options):
    out = torch.full((*G.shape[:-2], G.shape[-1]), torch.nan, dtype=G.dtype)
    reference.align(G, *policy(G.shape[-2], G.dtype, **options), out=out)
    return out


def test_small_eigenvalues_of_spread_rows_survive_beyond_the_small_solver():
    G = conditioned(80, 1000, 1e2, spread=1e6)
    rtol = 80 * EPS32
    assert relative(aligned(G, rtol=rtol), svd_align(G, rtol=rtol)) <= contract(80, 1e2)


@pytest.mark.parametrize(("rank_rule", "rank"), [("normalized", 3), ("gram", 1)])
def test_a_large_task_is_not_mistaken_for_dependent_ones(rank_rule, rank):
    G = randn(3, 5000) * torch.tensor([1e5, 1.0, 1.0])[:, None]
    _alpha, lam, got = reference.balance(reference.gram(G), *policy(3, F32, rank_rule=rank_rule))
    assert got == rank == svd_rank(G, rank_rule=rank_rule)
    assert relative(aligned(G, rank_rule=rank_rule), svd_align(G, rank_rule=rank_rule)) <= 2e-6
    assert torch.equal(lam, lam.sort(descending=True).values)


def test_rows_at_the_rounding_floor_count_as_zero():
    G = randn(4, 3000) * torch.tensor([1.0, 1e-9, 1.0, 1.0])[:, None]
    _, _, rank = reference.balance(reference.gram(G), *policy(4, F32))
    assert rank == 3
    assert relative(aligned(G), svd_align(G)) <= 2e-6
    wide = G.to(F64)  # in float64 the same row is far above rounding noise
    assert reference.balance(reference.gram(wide), *policy(4, F64))[2] == 4


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


@pytest.mark.parametrize("scale", SCALES)
def test_alpha_and_eigenvalues(scale):
    G = randn(7, 300, dtype=F64)
    w = torch.arange(1.0, 8.0)
    alpha, lam, rank = reference.balance(reference.gram(G), *policy(7, F64, scale=scale, weights=w))
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

"""The accuracy contract on gradients whose rounding errors add up: flat, in ragged lists, in batches, at every T."""

import math

import pytest
import torch
from adversaries import PATTERNS
from helpers import BF16, DTYPES, EPS32, EPS64, F16, F32, F64, contract, default_rtol, dtype_id, generator, gram_error
from helpers import relative as relative_error

import fastmtl
from fastmtl import ops

TASKS = (2, 3, 5, 8, 13, 17, 24, 33, 40, 41, 64, 100, 129)
SCALES = ("min", "median", "rmse")


def gradients(name, T, dtype=F32, P=8192):
    """P is large enough for float32 blocks to be taken where they may be."""
    return PATTERNS[name](T, max(P, 24 * T), generator(T)).to(dtype)


def rank_and_condition(G):
    """Of the row-normalised G, by the default rule; the condition number is that of the kept space."""
    C = G.to(F64)
    C = C / C.norm(dim=1, keepdim=True).clamp_min(1e-300)
    lam = torch.linalg.eigvalsh(C @ C.T).flip(0).clamp_min(0)
    R = int((lam > lam[0] * default_rtol(len(G), G.dtype) ** 2).sum())
    return R, float((lam[0] / lam[R - 1]).sqrt())


def truth(G, R, scale="min"):
    """Aligned-MTL by a float64 SVD."""
    U, s, Vh = torch.linalg.svd(G.to(F64), full_matrices=False)
    size = {"min": s[R - 1], "median": s[R // 2], "rmse": s[:R].square().mean().sqrt()}[scale]
    return size * (U[:, :R].mean(0) @ Vh[:R])


def check(G, got, scale="min"):
    """Whether `got` keeps the contract; False where it says nothing about G."""
    R, kappa = rank_and_condition(G)
    if kappa * len(G) * EPS32 > 0.3 or kappa > 1e5:
        return False
    # Float64 sums round alike too.
    limit = contract(len(G), kappa, G.dtype) + (G.shape[1] * EPS64 if G.dtype is F64 else 0)
    assert relative_error(got, truth(G, R, scale)) <= limit, f"T {len(G)}, κ {kappa:.1f}"
    return True


@pytest.mark.parametrize("name", PATTERNS)
def test_flat(name):
    said = 0
    for k, T in enumerate(TASKS):
        G = gradients(name, T)
        said += check(G, fastmtl.AlignedMTL(scale=SCALES[k % 3])(G), SCALES[k % 3])
    assert said >= len(TASKS) // 2


@pytest.mark.parametrize("name", ["hadamard 0.354", "bfloat16 values", "one-hot"])
def test_many_tasks(name):
    G = gradients(name, 300 if name.startswith("hadamard") else 200)
    assert check(G, fastmtl.AlignedMTL()(G))


def test_the_first_columns_mislead():
    """They are well-conditioned, and random; what decides is what comes after them."""
    for T in (24, 41, 100, 150):
        late = gradients("hadamard 0.1", T, P=24_000)
        G = torch.cat([0.01 * torch.randn(T, 24_000), late], 1)
        assert check(G, fastmtl.AlignedMTL()(G))


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("name", PATTERNS)
def test_other_types(name, dtype):
    for T in (3, 24, 64):
        G = gradients(name, T, dtype)
        check(G, fastmtl.AlignedMTL()(G))


@pytest.mark.parametrize("name", PATTERNS)
def test_ragged(name):
    """Tensors of odd sizes, of which some tasks miss some: a missing gradient is a zero one."""
    for T in (5, 17, 40, 48, 130):
        G = gradients(name, T)
        P = G.shape[1]
        sizes = [1, 7, P // 3, 129, P - P // 3 - 137]
        rows = [list(g.split(sizes)) for g in G]
        for t in range(0, T, 4):
            rows[t][3] = None
            G[t, P // 3 + 8 : P // 3 + 137] = 0
        check(G, torch.cat(fastmtl.AlignedMTL()(rows)))


@pytest.mark.parametrize("name", PATTERNS)
def test_batched(name):
    for T in (6, 20, 48):
        G = torch.stack([gradients(name, T), 3 * gradients("offset signs 0.5", T), -gradients(name, T)])
        for one, got in zip(G, fastmtl.AlignedMTL()(G), strict=True):
            check(one, got)


@pytest.mark.parametrize("name", PATTERNS)
def test_rows_of_uneven_norms(name):
    """The probe's vectors are scaled by norms that are guessed from a few columns."""
    for T in (24, 64, 130):
        factors = 10 ** (6 * torch.rand(T, 1, dtype=F64, generator=generator(1)) - 3)
        G = (PATTERNS[name](T, 8192, generator(T)) * factors).to(F32)
        G[: T // 2, ::3] = 0
        late = torch.cat([torch.zeros(T, 5000), G], 1)  # the first columns say nothing
        check(late, fastmtl.AlignedMTL()(late))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gram_is_exact(dtype):
    """The op itself always takes float64 products."""
    for name in PATTERNS:
        for T in (3, 17, 64, 130):
            G = gradients(name, T, dtype, P=2048)
            assert gram_error(ops.gram(G), G) <= 1e-12


def test_no_worse_than_plain_float32():
    """The error that a user of `G @ G.T` gets is the least that one may expect."""
    for T in (17, 24, 40, 63):
        G = gradients("hadamard 0.354", T)
        expected = truth(G, T)
        lam, V = torch.linalg.eigh(G @ G.T)
        plain = (lam[0].sqrt() * (V @ (V.T @ torch.full((T,), 1 / T) * lam.rsqrt()))) @ G
        assert relative_error(fastmtl.AlignedMTL()(G), expected) <= relative_error(plain, expected) / 10


@pytest.mark.parametrize("name", ["hadamard 0.354", "hadamard 0.1", "bfloat16 values", "one-hot"])
def test_same_bits_for_any_number_of_threads(name):
    for T in (24, 64, 100):
        G = gradients(name, T, P=60_000)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fastmtl.AlignedMTL()(G))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_ranks_are_those_of_the_truth():
    """Errors that add up could also make dependent rows independent."""
    for name in PATTERNS:
        for T in (16, 48, 130):
            G = gradients(name, T)
            G[T // 2] = -G[0]
            rank = ops.balance(ops.gram(G), None, "min", math.sqrt(T * EPS32), EPS32, "normalized")[2]
            assert rank.item() == rank_and_condition(G)[0], (name, T)

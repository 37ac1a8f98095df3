"""`AlignedMTL` as a user calls it: matrices, batches, rows, `out=`, options, the Gram-only entry, and no state."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    BF16,
    DEPENDENT,
    DTYPES,
    EPS,
    EPS32,
    F16,
    F32,
    F64,
    condition,
    conditioned,
    contract,
    default_rtol,
    dense,
    dtype_id,
    flat,
    randn,
    relative,
    svd_align,
    svd_rank,
)

import fastmtl

SCALES = ("min", "median", "rmse")


def weights(T, seed=100):
    return torch.rand(T, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.1


# ------------------------------------------------------------------------------------------------ against the SVD


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("T", "P"), [(1, 1), (1, 999), (2, 3), (3, 1000), (5, 3001), (10, 50_000), (16, 2000), (48, 3000), (100, 999)]
)
def test_matrix(T, P, dtype):
    G = randn(T, P, dtype=dtype, seed=T)
    w = weights(T)
    for scale in SCALES:
        got = fastmtl.AlignedMTL(weights=w, scale=scale)(G)
        assert got.dtype is dtype
        assert got.shape == (P,)
        assert relative(got, svd_align(G, w, scale)) <= contract(T, condition(G), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rank_rule", ["normalized", "gram"])
@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_tasks(name, rank_rule, dtype):
    G = DEPENDENT[name](dtype)
    T = G.shape[0]
    for scale in SCALES:
        method = fastmtl.AlignedMTL(scale=scale, rank_rule=rank_rule)
        expected = svd_align(G, scale=scale, rank_rule=rank_rule)
        assert relative(method(G), expected) <= 2 * EPS[dtype] + contract(T, 10, dtype)


# Accuracy where the Gram in float32 fails: κ of the row-normalised G, and the spread of row norms on top of it.
CONDITIONS = [
    (T, spread, kappa)
    for T in (2, 4, 10, 32, 64, 100)
    for kappa in (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
    for spread in (1.0, 1e6)
    if kappa * T * EPS32 <= 0.3 and (kappa <= 1e4 or spread == 1.0)
]


@pytest.mark.parametrize(("T", "spread", "kappa"), CONDITIONS)
def test_accuracy_contract(T, spread, kappa):
    G = conditioned(T, 4096 + T, kappa, spread, seed=1)
    for scale in SCALES:
        got = fastmtl.AlignedMTL(weights=weights(T), scale=scale, rtol=T * EPS32)(G)
        assert relative(got, svd_align(G, weights(T), scale, rtol=T * EPS32)) <= contract(T, kappa)


@pytest.mark.parametrize(("kappa", "T", "P"), [(1e4, 8, 200_007), (1e3, 48, 60_001), (1e5, 8, 200_007)])
def test_accuracy_contract_over_many_columns(kappa, T, P):
    G = conditioned(T, P, kappa)
    got = fastmtl.AlignedMTL(rtol=T * EPS32)(G)
    assert relative(got, svd_align(G, rtol=T * EPS32)) <= contract(T, kappa)


@pytest.mark.parametrize(("T", "kappa"), [(2, 1e6), (3, 1e5), (12, 1e5)])
def test_accuracy_contract_of_uneven_rows_against_sixty_digits(T, kappa):
    """Norms over 1e6 and κ above 1e4 at once, which the float64 decomposition used elsewhere cannot measure."""
    mp = pytest.importorskip("mpmath", reason="mpmath is not installed")
    G = conditioned(T, 40, kappa, 1e6, seed=1)
    with mp.workdps(60):
        exact = mp.matrix(G.double().tolist())
        lam, V = mp.eigsy(exact * exact.T)
        scaled = mp.diag([mp.sqrt(min(lam) / x) for x in lam])
        alpha = V * (scaled * (V.T * (mp.ones(T, 1) / T)))
        expected = torch.tensor([float(x) for x in alpha.T * exact], dtype=F64)
    assert relative(fastmtl.AlignedMTL(rtol=1e-8)(G), expected) <= contract(T, kappa)


@pytest.mark.parametrize(
    ("dtype", "ratio"), [(F32, 1e5), (F32, 1e3), (F64, 1e8), (BF16, 150.0), (F16, 150.0)], ids=dtype_id
)
def test_one_task_much_larger(dtype, ratio):
    """The rank is decided on normalised rows: a large task does not make the others look dependent."""
    G = (randn(6, 9001, dtype=F64) * torch.tensor([ratio, 1, 1, 1, 1, 1.0])[:, None]).to(dtype)
    limit = 1e-7 if dtype is F64 else contract(6, 2, dtype) + EPS[dtype]  # 1e-7: of the SVD itself, eps * ratio
    assert svd_rank(G) == 6
    assert relative(fastmtl.AlignedMTL()(G), svd_align(G)) <= limit
    gram_rule = fastmtl.AlignedMTL(rank_rule="gram")(G)
    expected = svd_align(G, rank_rule="gram")
    assert relative(gram_rule, expected) <= limit
    if ratio > 1e3:
        assert gram_rule.norm() > 100 * fastmtl.AlignedMTL()(G).norm()  # what the normalised rule avoids


def test_one_task_at_the_rounding_floor():
    G = randn(4, 9001) * torch.tensor([1, 1e-9, 1, 1.0])[:, None]
    assert relative(fastmtl.AlignedMTL()(G), svd_align(G)) <= 2e-6


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F32, 1e25), (F32, 1e18), (F32, 1e-18), (F32, 1e-25), (F64, 1e200), (F64, 1e-200)],
    ids=dtype_id,
)
def test_extreme_scales(dtype, scale):
    """Loss scaling and vanishing gradients must not change the direction, though float32 squares over- or underflow."""
    G = randn(5, 3001, dtype=dtype)
    expected = svd_align(G * scale)
    assert relative(fastmtl.AlignedMTL()(G * scale), expected) <= 2e-6
    assert relative(fastmtl.AlignedMTL(scale="rmse")(G * scale), svd_align(G * scale, scale="rmse")) <= 2e-6
    rows = fastmtl.AlignedMTL()([list(r.split([1, 3000])) for r in G * scale])
    assert relative(flat(rows), expected) <= 2e-6
    batch = fastmtl.AlignedMTL()(torch.stack([G, G * scale]))
    assert relative(batch[1], expected) <= 2e-6
    assert relative(batch[0], svd_align(G)) <= 2e-6


def test_zero_gradients_give_zero():
    for G in (torch.zeros(4, 1000), torch.zeros(3, 4, 10), torch.zeros(1, 1), torch.zeros(70, 20)):
        for scale in SCALES:
            assert not fastmtl.AlignedMTL(scale=scale)(G).any()
    assert not flat(fastmtl.AlignedMTL()([[torch.zeros(3), torch.zeros(2)]] * 3)).any()


def test_no_columns():
    assert fastmtl.AlignedMTL()(torch.empty(3, 0)).shape == (0,)
    assert fastmtl.AlignedMTL()(torch.empty(2, 3, 0)).shape == (2, 0)
    assert fastmtl.AlignedMTL()(torch.empty(0, 3, 5)).shape == (0, 5)
    assert [g.shape for g in fastmtl.AlignedMTL()([[torch.empty(0, 2)]] * 3)] == [(0, 2)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_non_finite_gradients_give_non_finite_results(dtype, bad):
    """A loss scaler has to see it, everywhere, and nothing may raise."""
    for T, P in ((1, 5), (3, 1000), (8, 77), (50, 300)):
        for t, p in ((0, 0), (T - 1, P - 1), (T // 2, P // 2)):
            G = randn(T, P, dtype=dtype)
            G[t, p] = bad
            assert not fastmtl.AlignedMTL()(G).isfinite().any()
            rows = [[r[:3], r[3:], torch.zeros(4, dtype=dtype)] for r in G]
            rows[0][2] = None
            assert not flat(fastmtl.AlignedMTL()(rows)).isfinite().any()
            batch = torch.stack([randn(T, P, dtype=dtype, seed=1), G])
            out = fastmtl.AlignedMTL()(batch)
            assert out[0].isfinite().all()
            assert not out[1].isfinite().any()


# ------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_batch_is_each_of_its_matrices(dtype):
    G = randn(7, 5, 300, dtype=dtype) * torch.tensor([1, 2, 0, 4, 5, 1e3, 1e-3]).to(dtype)[:, None, None]
    got = fastmtl.AlignedMTL(scale="median")(G)
    assert got.shape == (7, 300)
    for b in range(7):
        expected = svd_align(G[b], scale="median")
        assert relative(got[b], expected) <= contract(5, 10, dtype)


def test_rows_of_tensors():
    rows = [
        [randn(4, 3, seed=1), randn(7, dtype=BF16, seed=2), None, randn(2, dtype=F64, seed=3), torch.tensor(1.5)],
        [None, randn(7, dtype=BF16, seed=4), None, randn(2, dtype=F64, seed=5), torch.tensor(-0.5)],
        [randn(4, 3, seed=6), None, None, None, None],
    ]
    got = fastmtl.AlignedMTL(rtol=1e-3)(rows)
    assert got[2] is None
    like = [rows[0][0], rows[0][1], None, rows[0][3], rows[0][4]]
    for g, x in zip(got, like, strict=True):
        if x is not None:
            assert g.shape == x.shape
            assert g.dtype is x.dtype
    expected = svd_align(dense(rows), rtol=1e-3)
    assert relative(flat([got[0]]), expected[:12]) <= 2e-6
    assert relative(flat([got[1]]), expected[12:19]) <= EPS[BF16]
    assert relative(flat([got[3]]), expected[19:21]) <= 2e-6
    assert relative(flat([got[4]]), expected[21:]) <= 2e-6


def test_rows_of_one_tensor_and_missing_rows():
    G = randn(4, 200)
    expected = fastmtl.AlignedMTL()(G)
    (got,) = fastmtl.AlignedMTL()(list(G))
    assert relative(got, expected) <= 1e-7
    (got,) = fastmtl.AlignedMTL()(tuple([g] for g in G))
    assert relative(got, expected) <= 1e-7
    G[2] = 0
    (got,) = fastmtl.AlignedMTL()([G[0], G[1], None, G[3]])
    assert relative(got, fastmtl.AlignedMTL()(G)) <= 1e-7


def test_the_default_tolerance_of_mixed_dtypes_is_that_of_the_coarsest():
    """What differs by less than bfloat16 rounding is no new direction, though float32 parts would resolve it."""
    half, single = randn(3, 500, dtype=BF16), randn(3, 5)
    half[2], single[2] = half[0], single[0] + 0.04 * randn(5, seed=1)
    rows = [[h, s] for h, s in zip(half, single, strict=True)]
    got = flat(fastmtl.AlignedMTL()(rows))
    wide = dense(rows)
    assert svd_rank(wide, rtol=EPS[BF16]) == 2
    assert svd_rank(wide, rtol=default_rtol(3, F32)) == 3
    assert relative(got, svd_align(wide, rtol=EPS[BF16])) <= 2 * EPS[BF16]


# ------------------------------------------------------------------------------------------------ out=


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_out(dtype):
    method = fastmtl.AlignedMTL()
    G = randn(4, 100, dtype=dtype)
    out = torch.full((100,), torch.nan, dtype=dtype)
    assert method(G, out=out) is out
    assert torch.equal(out, method(G))
    batch = torch.stack([G, G.flip(0)])
    column = torch.full((2, 100, 2), 7.0, dtype=dtype)
    assert torch.equal(method(batch, out=column[..., 0]), method(batch))
    assert (column[..., 1] == 7.0).all()


def test_out_of_rows():
    method = fastmtl.AlignedMTL()
    rows = [[randn(3, 4, seed=t), None, randn(5, seed=10 + t)] for t in range(3)]
    expected = method(rows)
    out = [torch.full((3, 4), torch.nan), None, torch.full((5,), torch.nan)]
    got = method(rows, out=out)
    assert got[0] is out[0]
    assert got[1] is None
    assert got[2] is out[2]
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[2], expected[2])
    transposed = torch.empty(4, 3).T
    assert torch.equal(method(rows, out=(transposed, None, torch.empty(5)))[0], expected[0])


def test_out_may_be_the_neighbour_of_the_gradients():
    buffer = randn(5, 64)
    expected = fastmtl.AlignedMTL()(buffer[:4])
    assert torch.equal(fastmtl.AlignedMTL()(buffer[:4], out=buffer[4]), expected)


def test_the_gradients_are_left_alone():
    G = randn(4, 100)
    before = G.clone()
    fastmtl.AlignedMTL()(G)
    fastmtl.AlignedMTL()([list(r.split([1, 99])) for r in G])
    assert torch.equal(G, before)


# ------------------------------------------------------------------------------------------------ options


def test_weights():
    G = randn(3, 500)
    mean, ones = fastmtl.AlignedMTL()(G), fastmtl.AlignedMTL(weights="sum")(G)
    assert torch.equal(mean, fastmtl.AlignedMTL(weights="mean")(G))
    assert relative(ones, 3 * mean.to(F64)) <= 2 * EPS32
    for given in (
        torch.ones(3),
        torch.ones(3, dtype=torch.int64),
        [1, 1, 1],
        (1.0, 1.0, 1.0),
        torch.ones(3, dtype=BF16),
    ):
        assert torch.equal(fastmtl.AlignedMTL(weights=given)(G), ones)
    signed = torch.tensor([0.5, -2.0, 0.0])
    assert relative(fastmtl.AlignedMTL(weights=signed)(G), svd_align(G, signed)) <= 2e-6


def test_weights_are_copied():
    w = torch.tensor([1.0, 2.0, 3.0])
    method = fastmtl.AlignedMTL(weights=w)
    G = randn(3, 100)
    before = method(G)
    w.zero_()
    assert torch.equal(method(G), before)


def test_rtol():
    G = conditioned(3, 400, 100.0)
    for rtol, rank in ((1e-4, 3), (0.05, 2), (0.5, 1)):
        method = fastmtl.AlignedMTL(rtol=rtol)
        assert svd_rank(G, rtol) == rank
        assert relative(method(G), svd_align(G, rtol=rtol)) <= 2e-6


@pytest.mark.parametrize("scale", SCALES)
def test_weighting(scale):
    G = randn(6, 400, dtype=F64)
    M = G @ G.T
    method = fastmtl.AlignedMTL(weights=weights(6), scale=scale)
    alpha = method.weighting(M)
    assert alpha.dtype is F64
    assert relative(alpha @ G, svd_align(G, weights(6), scale)) <= 1e-12
    batch = method.weighting(torch.stack([M, 4 * M, 0 * M]))
    assert batch.shape == (3, 6)
    assert relative(batch[0], alpha) <= 1e-13
    assert relative(batch[1], alpha) <= 1e-13  # α does not depend on the size of G
    assert not batch[2].any()
    assert relative(method.weighting(M.float()), alpha) <= 1e-5


def test_weighting_takes_the_dtype_of_the_gradients():
    G = randn(2, 3000, dtype=F64)
    G = torch.stack([G[0], G[0] + 1e-3 * G[1]])  # one task in bfloat16, two in float64
    M = G @ G.T
    assert relative(fastmtl.AlignedMTL().weighting(M) @ G, svd_align(G)) <= 1e-6
    assert relative(fastmtl.AlignedMTL().weighting(M, dtype=BF16) @ G, svd_align(G, rtol=EPS[BF16])) <= 1e-6


def test_repr_shows_the_options():
    assert repr(fastmtl.AlignedMTL()) == "AlignedMTL(weights='mean', scale='min', rtol=None, rank_rule='normalized')"
    method = fastmtl.AlignedMTL(weights=[1, 2.5], scale="rmse", rtol=1e-3, rank_rule="gram")
    again = eval(repr(method), {"AlignedMTL": fastmtl.AlignedMTL})
    assert repr(again) == repr(method)
    assert "weights=[1.0, 2.5]" in repr(method)
    G = randn(2, 50)
    assert torch.equal(again(G), method(G))


# ------------------------------------------------------------------------------------------------ no state


@pytest.mark.parametrize("transfer", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, copy.copy])
@pytest.mark.parametrize(
    "options",
    [{}, {"weights": "mean"}, {"weights": "sum"}, {"weights": [1.0, 2.0, 3.0], "scale": "rmse", "rtol": 1e-3}],
)
def test_copies_behave_the_same(options, transfer):
    method = fastmtl.AlignedMTL(**options)
    G = randn(3, 100)
    expected = method(G)
    again = transfer(method)
    assert repr(again) == repr(method)
    assert torch.equal(again(G), expected)


def test_options_are_compared_by_value():
    """Strings that come from a file or a command line are equal to those in the code, not identical."""
    G = randn(3, 100)
    for name, value in (("weights", "mean"), ("weights", "sum"), ("scale", "rmse"), ("rank_rule", "gram")):
        read = "".join(list(value))
        assert read is not value
        assert torch.equal(fastmtl.AlignedMTL(**{name: read})(G), fastmtl.AlignedMTL(**{name: value})(G))


def test_no_state_between_calls():
    method = fastmtl.AlignedMTL()
    before = dict(vars(method))
    inputs = [randn(3, 100), randn(5, 70, dtype=F64), randn(2, 4, 30), torch.full((2, 3), torch.nan), randn(40, 100)]
    first = [method(G) for G in inputs]
    second = [method(G) for G in reversed(inputs)][::-1]
    assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(first, second, strict=True))
    assert vars(method) == before


def test_shared_between_threads():
    method = fastmtl.AlignedMTL()
    inputs = [randn(T, P, seed=T) for T, P in ((2, 5000), (3, 100), (8, 3000), (12, 2000), (20, 500), (48, 200))] * 8
    expected = [method(G) for G in inputs[:6]] * 8
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(method, inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_inference_mode_and_no_grad():
    G = randn(3, 100)
    expected = fastmtl.AlignedMTL()(G)
    with torch.inference_mode():
        assert torch.equal(fastmtl.AlignedMTL()(randn(3, 100)), expected)
    parameter = randn(3, 100).requires_grad_()
    with torch.no_grad():
        assert torch.equal(fastmtl.AlignedMTL()(parameter), expected)


# ------------------------------------------------------------------------------------------------ public codes


def public_formula(G, scale):
    """The published code's `ProcrustesSolver` on the rows of G: float32 Gram, weights one."""
    M = G @ G.T
    lam, V = torch.linalg.eigh(M)
    rank = int((lam > lam.max() * G.shape[0] * EPS32).sum())
    order = lam.argsort(descending=True)[:rank]
    lam, V = lam[order], V[:, order]
    s = {"min": lam[-1], "median": lam.median(), "rmse": lam.mean()}[scale].sqrt()
    return ((V * (s / lam.sqrt())) @ V.T).sum(0) @ G


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("T", [2, 3, 5, 10])
def test_parity_with_the_published_code(T, scale):
    """Where a float32 Gram is good enough, both are the same map."""
    G = conditioned(T, 2000, 5.0, spread=3.0)
    assert relative(fastmtl.AlignedMTL(weights="sum", scale=scale)(G), public_formula(G, scale).to(F64)) <= 1e-5


@pytest.mark.parametrize("scale", SCALES)
def test_parity_with_torchjd(scale):
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    G = conditioned(4, 2000, 5.0, spread=3.0)
    theirs = aggregation.AlignedMTL(scale_mode=scale)(G)
    assert relative(fastmtl.AlignedMTL(scale=scale)(G), theirs.to(F64)) <= 1e-5
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    theirs = aggregation.AlignedMTL(pref_vector=w, scale_mode=scale)(G)
    assert relative(fastmtl.AlignedMTL(weights=w, scale=scale)(G), theirs.to(F64)) <= 1e-5

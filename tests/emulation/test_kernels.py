"""Every CUDA kernel on the host against the truth, through the cases of the CPU kernels, in three orders of threads."""

import functools

import build
import harness
import pytest
import torch
from adversaries import PATTERNS
from harness import LARGE_SHARED, SMALL_SHARED, Device
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
    condition,
    conditioned,
    contract,
    default_rtol,
    dense,
    dtype_id,
    flat,
    generator,
    gram_error,
    hard_to_round,
    nearest,
    randn,
    relative,
    residuals,
    rounded,
    same_numbers,
    svd_align,
    svd_rank,
)

from fastmtl import ops
from fastmtl.ops import reference

pytestmark = pytest.mark.cover(1)  # an emulated kernel takes its time

ORDERS = ("sequential", "reversed", "shuffled")
SCALES = ("min", "median", "rmse")
TASKS = (1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 31, 32, 33, 48, 63, 64)
DEVICES = [Device(slow, limit) for slow in (False, True) for limit in (SMALL_SHARED, LARGE_SHARED)]
FAST, SLOW = Device(False), Device(True)

SMALL = ["align_small"]
EXACT = ["gram_stream", "gram_reduce", "balance", "combine"]
EXACT_GROUPS = ["gram_groups", "gram_reduce", "balance", "combine"]
# Float32 blocks, what they cost, and an exact pass.
PROBE = ["probe_vectors", "gram_probe", "probe_bound"]
BLOCKS = ["gram_tiles", "gram_reduce", *PROBE, "balance", *EXACT_GROUPS]


def sizes(T):
    """One that takes one block and its one launch, and one with more columns than that where there is such a limit."""
    large = 32768 // T + 1 + 13 * T if T <= 32 else 517 + T
    return (1 + 37 * T % 101, 8 * T + 700 % (T + 1), large) if T > 1 else (5, 517, 40_003)


@pytest.fixture(params=ORDERS)
def order(request):
    harness.module().set_order(request.param, 11)
    yield request.param
    harness.module().set_order("sequential", 0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices this small gain nothing from several threads, which wait for each other where a machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(T):
    return torch.rand(T, dtype=F64, generator=generator(T)) + 0.1


def alpha_for(*shape):
    return randn(*shape, dtype=F64, seed=1)


def in_blocks(device, T, dtype):
    return dtype is not F64 and (8 if device.slow else 64) < T


def blocks_limit(blocks):
    """Sums of 128 products in float32 are good to some 3e-7 of the row norms."""
    return 6e-7 if blocks else 1e-12


def check_gram(device, G):
    for exact in (True, False):
        M, bounds = device.gram(G, exact)
        blocks = not exact and in_blocks(device, G.shape[-2], G.dtype)
        assert len(bounds) == blocks * (len(G) if G.ndim == 3 else 1)
        assert gram_error(M, G) <= blocks_limit(blocks)
        assert torch.equal(M, M.mT)


def check_combine(device, G, alpha=None, offset=0):
    alpha = alpha_for(*G.shape[:-1]) if alpha is None else alpha
    expected = torch.empty((*G.shape[:-2], G.shape[-1]), dtype=F64)
    reference.combine(G, alpha, out=expected)
    out = device.combine(G, alpha, offset)
    largest = (alpha.abs()[..., None, :] @ G.to(F64).abs()).squeeze(-2)
    assert rounded(out, expected, slack=1e-13 * largest)


def check_align(device, G, kappa=None, offset=0, **options):
    """Against the truth; returns the result."""
    T = G.shape[-2]
    got = device.align(G, offset, **options)
    entries = [got.out] if G.ndim == 2 else got.out
    ranks = [got.rank] if G.ndim == 2 else got.rank
    rule = {k: v for k, v in options.items() if k in ("rtol", "rank_rule")}
    for g, out, rank in zip([G] if G.ndim == 2 else G, entries, ranks, strict=True):
        assert rank == svd_rank(g, **rule)
        limit = contract(T, condition(g, options.get("rtol")) if kappa is None else kappa, G.dtype)
        assert relative(out, svd_align(g, **options)) <= limit
    return got


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.bits(), b.bits(), strict=True))


# ------------------------------------------------------------------------------------------------ a warp's product


def test_mma(order):
    """c + 3 a b, as it is emulated and by shuffles, against torch, from the layout that csrc/cuda/mma.cuh describes."""
    a, b, c = randn(16, 8, dtype=F64, seed=1), randn(8, 8, dtype=F64, seed=2), torch.arange(1.0, 5.0, dtype=F64)
    operands, sums = torch.empty(32, 3, 2, dtype=F64), torch.full((2, 32, 4), torch.nan, dtype=F64)
    expected = torch.empty(32, 4, dtype=F64)
    for lane in range(32):
        g, q = divmod(lane, 4)
        operands[lane] = torch.stack([a[g, [q, q + 4]], a[g + 8, [q, q + 4]], b[[q, q + 4], g]])
        expected[lane] = c + 3 * (a @ b)[[g, g, g + 8, g + 8], [2 * q, 2 * q + 1, 2 * q, 2 * q + 1]]
    harness.module().mma(operands.data_ptr(), sums.data_ptr())
    assert torch.equal(sums[0], sums[1])
    assert relative(sums[0], expected) <= 1e-14


# ------------------------------------------------------------------------------------------------ flat [T, P]


@pytest.mark.parametrize("T", [*TASKS, 65, 100, 130])
def test_gram_and_combine(order, T):
    for P in sizes(T) if T <= 64 else (37, 517):
        for dtype in DTYPES if T * P < 100_000 else (F32, BF16):
            G = randn(T, P, dtype=dtype, seed=T)
            for device in (FAST, SLOW):
                check_gram(device, G)
            check_combine(FAST, G)


@functools.cache
def case(T, P, dtype, scale, rank_rule, weighted):
    """G, options, truth, rank, limit; the orders share them. None where the limits say nothing about such a G."""
    G = randn(T, P, dtype=dtype, seed=T)
    kappa = condition(G)
    if kappa > 1e3 and dtype is not F64:
        return None
    options = {"scale": scale, "weights": weights(T) if weighted else None, "rank_rule": rank_rule}
    truth = svd_align(G, **options).to(dtype if dtype is F64 else F32)
    return G, options, truth, svd_rank(G, rank_rule=rank_rule), contract(T, kappa, dtype)


@pytest.mark.parametrize("T", TASKS)
def test_align(order, T):
    for i, P in enumerate(sizes(T)):
        for k, dtype in enumerate(DTYPES):
            n = T + i + k
            given = case(T, P, dtype, SCALES[n % 3], "gram" if n % 4 == 3 else "normalized", (i + k) % 2 == 1)
            if given is None:
                continue
            G, options, truth, rank, limit = given
            for device in DEVICES[k % 2 :: 2] if T < 63 else DEVICES:
                got = device.align(G, **options)
                assert got.rank == rank
                assert relative(got.out, truth) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [1, 2, 3, 8, 9, 17, 32, 33, 64])
def test_threads_in_any_order_give_the_same_bits(T, dtype):
    inputs = [randn(T, P, dtype=dtype, seed=T) for P in sizes(T)[1:]]
    inputs.append(conditioned(T, 12_000 // T, 1e3, 1e3, dtype=dtype, seed=T))
    inputs.append(randn(3, T, 60, dtype=dtype))
    for k, G in enumerate(inputs):
        device = (Device(False, SMALL_SHARED), Device(True, LARGE_SHARED))[(k + T) % 2]
        results = []
        for name in ORDERS:
            harness.module().set_order(name, T)
            results.append(device.align(G, weights=weights(T)))
        harness.module().set_order("sequential", 0)
        assert same(results[0], results[1])
        assert same(results[0], results[2])


@pytest.mark.parametrize("T", [1, 2, 3, 8, 9, 16, 33, 64, 100])
def test_cpu_and_cuda_agree(T):
    """The same op on the same tensors; without the extension the reference stands for the CPU."""
    for P in sizes(T):
        for dtype in DTYPES:
            G = randn(T, P, dtype=dtype, seed=T + 1)
            M = ops.gram(G)
            size = M.diagonal().sqrt()[:, None] * M.diagonal().sqrt()
            assert ((FAST.gram(G)[0] - M).abs() <= 1e-12 * size).all()
            alpha = alpha_for(T)
            out = torch.empty(P, dtype=dtype)
            ops.combine(G, alpha, out)
            ulp = EPS[dtype] * out.to(F64).abs() + torch.finfo(dtype).tiny * EPS[dtype]
            slack = 1e-13 * (alpha.abs() @ G.to(F64).abs())
            assert ((FAST.combine(G, alpha).to(F64) - out.to(F64)).abs() <= ulp + slack).all()
            if T > 64:
                continue
            policy = (None, "min", default_rtol(T, dtype), EPS64 if dtype is F64 else EPS32, "normalized")
            kappa = condition(G)
            ops.align(G, *policy, out)
            want_alpha, want_lam, want_rank = ops.balance(M, *policy)
            lam, V = ops.eigh(M)
            for device in (FAST, SLOW):
                got = device.align(G)
                assert got.rank == want_rank
                assert relative(got.out, out) <= 2 * contract(T, kappa, dtype)
                got_alpha, got_lam, got_rank = device.balance(M, dtype)
                assert got_rank == want_rank
                assert relative(got_alpha, want_alpha) <= max(1e-12, 1e-14 * T * kappa**2)
                assert ((got_lam - want_lam).abs() <= 20 * T * EPS64 * want_lam[0]).all()
                got_lam, W = device.eigh(M)
                assert ((got_lam - lam).abs() <= 10 * T * EPS64 * lam.abs().max()).all()
                assert max(residuals(M, got_lam, W)) < 10
            assert max(residuals(M, lam, V)) < 10


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("T", "P"),
    [(1, 40_001), (2, 65), (3, 1000), (3, 11_001), (5, 17), (8, 4097), (11, 513), (17, 2049), (33, 300), (64, 83)],
)
def test_strides(T, P, dtype):
    wide = torch.full((T, P + 13), torch.nan, dtype=dtype)  # what lies between rows must not be read
    wide[:, 3 : P + 3] = randn(T, P, dtype=dtype)
    padded = torch.full((T, (P + 31) // 16 * 16), torch.nan, dtype=dtype)  # 16 bytes at a time, but for the tail
    padded[:, :P] = randn(T, P, dtype=dtype, seed=1)
    odd = torch.cat([torch.full((1,), torch.nan, dtype=dtype), randn(T * P, dtype=dtype)])[1:].view(T, P)
    views = {
        "row stride > P": wide[:, 3 : P + 3],
        "padded rows": padded[:, :P],
        "unaligned": odd,
        "every other row": randn(2 * T, P, dtype=dtype)[::2],
        "expanded": randn(1, P, dtype=dtype).expand(T, P),
    }
    for G in views.values():
        for device in (FAST, SLOW):
            check_gram(device, G)
            check_align(device, G, kappa=10 if G.stride(0) == 0 else None)
        check_combine(FAST, G)
    for offset in (1, 3):
        check_combine(FAST, odd, offset=offset)
        check_align(FAST, odd, offset=offset)


def test_no_columns_and_no_matrices():
    for dtype in DTYPES:
        for T in (1, 3, 8, 20, 64):
            got = FAST.align(torch.empty(T, 0, dtype=dtype))
            assert got.rank == 0
            assert not got.alpha.any()
            assert not got.lam.any()
            assert not FAST.gram(torch.empty(2, T, 0, dtype=dtype))[0].any()
        assert FAST.align(torch.empty(0, 3, 5, dtype=dtype)).launches == []
        assert FAST.combine(torch.empty(0, 3, 5, dtype=dtype), torch.empty(0, 3, dtype=F64)).shape == (0, 5)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_half_results_are_rounded_once(dtype):
    alpha = hard_to_round(dtype)[::7]
    out = FAST.combine(torch.ones(len(alpha), 1, 9, dtype=dtype), alpha[:, None])
    expected = [nearest(x, dtype) for x in alpha.tolist()]
    for column in out.T:
        assert same_numbers(column, expected)


def test_float16_subnormals_and_overflow():
    G = torch.full((2, 100), 2.0**-24, dtype=F16)
    assert FAST.gram(G)[0][0, 1].item() == 100 * 2.0**-48
    assert (FAST.combine(G, torch.tensor([1.0, 2.0], dtype=F64)) == 3 * 2.0**-24).all()
    assert FAST.combine(G, torch.tensor([2.0**40, 0.0], dtype=F64)).isposinf().all()


# ------------------------------------------------------------------------------------------------ launches


@pytest.mark.parametrize(
    ("device", "T", "P", "dtype", "launches"),
    [
        (FAST, 3, 4096, F32, SMALL),
        (FAST, 32, 1024, F64, SMALL),
        (SLOW, 32, 1024, BF16, SMALL),
        (FAST, 3, 4097, F32, EXACT),
        (FAST, 8, 5000, BF16, EXACT),
        (SLOW, 4, 9000, F32, EXACT),
        (FAST, 9, 4000, F32, EXACT_GROUPS),
        (FAST, 16, 4000, F16, EXACT_GROUPS),
        (FAST, 17, 2000, F32, EXACT_GROUPS),
        (FAST, 33, 100, F16, EXACT_GROUPS),
        (SLOW, 5, 7000, F32, EXACT),
        (SLOW, 9, 4000, F32, BLOCKS),
        (SLOW, 33, 100, F16, BLOCKS),
        (FAST, 64, 700, F64, [*EXACT_GROUPS[:3], *EXACT_GROUPS]),
        (SLOW, 3, 12_000, F64, [*EXACT[:3], *EXACT]),
    ],
    ids=lambda value: "" if isinstance(value, (list, Device)) else dtype_id(value),
)
def test_launches(device, T, P, dtype, launches):
    G = randn(T, P, dtype=dtype)
    got = device.align(G)
    assert got.launches == launches
    # The intermediate results need not be wanted.
    assert torch.equal(device.align(G, wanted=False).out, got.out)
    rows = device.align_rows([g for row in G for g in row.split([P - 5, 5])], T, dtype)
    assert rows.launches == ["upload", *launches]
    assert torch.equal(torch.cat(rows.out), got.out) or relative(torch.cat(rows.out), got.out) <= 3e-7 + EPS[dtype]


def test_launches_of_other_functions():
    G = randn(100, 600)
    FAST.gram(G)
    assert FAST.launches() == ["gram_groups", "gram_tiles", "gram_reduce", "gram_reduce"]
    FAST.gram(G[:64])
    assert FAST.launches() == ["gram_groups", "gram_reduce"]
    FAST.combine(G, alpha_for(100))
    assert FAST.launches() == ["combine"]
    FAST.balance(torch.eye(5, dtype=F64))
    assert FAST.launches() == ["balance"]
    FAST.eigh(torch.eye(5, dtype=F64))
    assert FAST.launches() == ["eigh"]


@pytest.mark.parametrize("T", [9, 17, 40, 64])
def test_the_second_pass_runs_only_where_it_is_needed(order, T):
    good = randn(T, 3000 + 1000 * (T < 9), seed=T)
    good = good if T * good.shape[1] > 32768 else randn(T, 32768 // T + 100, seed=T)
    M, blocks = SLOW.gram(good, False)
    assert blocks
    got = SLOW.align(good)
    assert torch.equal(got.M, M)
    assert not torch.equal(M, SLOW.gram(good)[0])
    hard = conditioned(T, good.shape[1], 1e4, seed=T)
    got = SLOW.align(hard, rtol=T * EPS32)
    assert torch.equal(got.M, SLOW.gram(hard)[0])
    limit = 2e-6 if T <= 40 else 1e-4
    assert relative(got.out, svd_align(hard, rtol=T * EPS32)) <= limit
    # In a batch each matrix is judged alone.
    both = SLOW.align(torch.stack([good, hard, good]), rtol=T * EPS32)
    assert torch.equal(both.M[0], both.M[2])
    first, exact = SLOW.gram(torch.stack([good, hard, good]), False)[0], SLOW.gram(torch.stack([good, hard, good]))[0]
    assert torch.equal(both.M, torch.stack([first[0], exact[1], first[2]]))
    assert relative(both.out[1], svd_align(hard, rtol=T * EPS32)) <= limit


def relative_to_norms(M, G):
    """Δ = D^-½ (M - G Gᵀ) D^-½."""
    exact = G.to(F64) @ G.to(F64).T
    norms = exact.diagonal().sqrt()
    return (M - exact) / norms / norms[:, None]


@pytest.mark.parametrize("name", ["random", *PATTERNS])
def test_the_probe_measures_what_float32_costs(name):
    """Between the spectral norm of the error and a multiple of its Frobenius norm, over what is promised."""
    for device, T in ((SLOW, 9), (SLOW, 40), (SLOW, 41), (FAST, 70), (FAST, 130)):
        P = 3000 if T > 64 else 8192
        G = randn(T, P, seed=T) if name == "random" else PATTERNS[name](T, P, generator(T)).to(F32)
        G = G * 10 ** (4 * torch.rand(T, 1, generator=generator(2)) - 2)
        M, (bound,) = device.gram(G, False)
        promised = 2e-6 if T <= 40 else 1e-4
        error = relative_to_norms(M, G)
        assert torch.linalg.matrix_norm(error, 2) <= promised * bound + 1e-14 * T
        assert promised * bound <= 30 * error.norm() + 1e-12 * T
        rows = [part.contiguous() for row in G for part in row.split([P // 3, 5, P - P // 3 - 5])]
        rows[4] = None
        M, (bound,) = device.gram_rows(rows, T, False)
        G[1, P // 3 : P // 3 + 5] = 0
        error = relative_to_norms(M, G)
        assert torch.linalg.matrix_norm(error, 2) <= promised * bound + 1e-14 * T


@pytest.mark.parametrize("name", PATTERNS)
def test_adversaries(name):
    """Gradients whose float32 sums round the same way, where float64 is slow and where it is not."""
    for T in (6, 9, 17, 40, 48):
        G = PATTERNS[name](T, 4096, generator(T)).to(F32)
        for device in (FAST, SLOW):
            check_align(device, G)
    check_align(SLOW, torch.stack([G, randn(*G.shape), -G]))


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    ("B", "T", "P"),
    [
        (1, 5, 100),
        (3, 4, 17),
        (7, 2, 1),
        (8, 8, 64),
        (9, 3, 333),
        (17, 6, 65),
        (70, 4, 33),
        (5, 33, 50),
        (2, 64, 100),
        (3, 9, 4001),
    ],
)
def test_batches(B, T, P):
    for k, dtype in enumerate(DTYPES):
        G = randn(B, T, P, dtype=dtype, seed=B)
        check_gram(DEVICES[k], G)
        check_combine(DEVICES[k], G)
        check_align(DEVICES[k], G, scale="rmse", weights=torch.arange(1.0, T + 1.0, dtype=F64))
    check_gram(FAST, randn(2, 70, 100))


def test_strides_of_batches():
    for dtype in DTYPES:
        B, T, P = 5, 4, 130
        poisoned = torch.full((B, T + 1, P + 5), torch.nan, dtype=dtype)
        poisoned[:, :T, :P] = randn(B, T, P, dtype=dtype)
        for G in (
            randn(2 * B, T, P, dtype=dtype)[::2],
            poisoned[:, :T, :P],
            randn(T, B, P, dtype=dtype).transpose(0, 1),
            randn(1, T, P, dtype=dtype).expand(B, T, P),
            randn(B, T, 128, dtype=dtype),
        ):
            check_gram(FAST, G)
            check_combine(FAST, G)
            check_align(FAST, G)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("T", "P"), [(1, 900), (3, 333), (8, 2000), (9, 70), (32, 200)])
def test_a_matrix_alone_and_in_a_batch_gives_the_same_bits(T, P, dtype):
    """Where both take one launch, that is."""
    G = randn(5, T, P, dtype=dtype)
    got = FAST.align(G)
    assert got.launches == SMALL
    for b in range(5):
        one = FAST.align(G[b])
        assert one.launches == SMALL
        assert torch.equal(got.out[b], one.out)
        assert torch.equal(got.M[b], one.M)
        assert torch.equal(got.alpha[b], one.alpha)
        assert torch.equal(got.lam[b], one.lam)


def test_batch_entries_of_different_rank_and_size():
    for T, P in ((5, 300), (20, 2000)):
        G = randn(7, T, P)
        G[1, 3] = G[1, 0]
        G[2] = 0
        G[3] *= 1e20
        G[4] *= 1e-20
        G[5, 2] *= 1e4
        G[6, 1, 3] = torch.inf
        for device in DEVICES:
            check_align(device, G[:6])
            got = device.align(G)
            assert got.rank.tolist() == [T, T - 1, 0, T, T, T, 0]
            assert got.out[:6].isfinite().all()
            assert not got.out[6].isfinite().any()


# ------------------------------------------------------------------------------------------------ ragged rows

COLUMNS = [1, 12, 0, 17, 64, 4097, 0, 330, 16]


def ragged(T, dtypes=(F32,), missing=0.0, columns=COLUMNS, seed=0):
    """T rows of K tensors; entry (t, k) is missing with this probability, but no column entirely."""
    gen, K = generator(seed), len(columns)
    absent = torch.rand(T, K, generator=gen) < missing
    absent[torch.randint(T, (K,), generator=gen), torch.arange(K)] = False
    return [
        None if absent[t, k] else randn(n, dtype=dtypes[k % len(dtypes)], seed=100 * t + k)
        for t in range(T)
        for k, n in enumerate(columns)
    ]


def check_rows(device, grads, T, kappa=None, **options):
    K = len(grads) // T
    rows = [grads[t * K : (t + 1) * K] for t in range(T)]
    G = dense(rows)
    coarsest = max((g.dtype for g in grads if g is not None), key=EPS.__getitem__)
    exact, _ = device.gram_rows(grads, T)
    assert gram_error(exact, G) <= 1e-12
    M, blocks = device.gram_rows(grads, T, False)
    assert gram_error(M, G) <= blocks_limit(blocks)

    alpha = alpha_for(T)
    outs = device.combine_rows(grads, alpha)
    expected = (alpha @ G.to(F64)).split([o.numel() for o in outs])
    for out, want in zip(outs, expected, strict=True):
        assert rounded(out, want, slack=1e-12)

    policy = {"rtol": default_rtol(T, coarsest), **options}
    got = device.align_rows(grads, T, coarsest, **policy)
    assert got.rank == svd_rank(G, policy["rtol"])
    limit = contract(T, condition(G, policy["rtol"]) if kappa is None else kappa)
    truth = svd_align(G, **policy)
    lam = torch.linalg.eigvalsh(reference.gram_rows(grads, T)).flip(0)
    assert ((got.lam - lam).abs() <= T * (blocks_limit(True) if blocks else EPS64 * 20) * lam[0]).all()
    for out, want in zip(got.out, truth.split([o.numel() for o in got.out]), strict=True):
        assert (out.to(F64) - want).norm() <= (limit + EPS[out.dtype]) * truth.norm()
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [1, 2, 3, 8, 11, 17, 40, 64])
def test_ragged(T, dtype):
    for device in (FAST, SLOW):
        check_rows(device, ragged(T, (dtype,)), T)
    rows = ragged(T, (dtype,), 0.3, seed=T)
    check_rows(FAST, rows, T)
    check_rows(SLOW, rows, T)


def test_ragged_in_any_order(order):
    for T in (3, 9, 20, 40):
        check_rows(SLOW, ragged(T, (F32, BF16), 0.2), T)


def test_missing_rows_and_unaligned_tensors():
    K = len(COLUMNS)
    grads = ragged(4)
    grads[2 * K : 3 * K] = [None] * K
    got = check_rows(FAST, grads, 4)
    assert got.rank == 3
    assert got.alpha[2] == 0.0
    for dtype in DTYPES:  # views of one buffer, which begin at any element
        G = randn(5, 2000, dtype=dtype)
        split = [1, 999, 0, 16, 984]
        check_rows(SLOW, [g for row in G for g in row.split(split)], 5)


@pytest.mark.parametrize("T", [1, 3, 8, 20])
def test_dtypes_differ_between_tensors(T):
    for dtypes in ((F32, F64), (BF16, F32), (F32, F64, BF16), (F16, BF16, F64, F32)):
        for device in (FAST, SLOW):
            check_rows(device, ragged(T, dtypes, missing=0.2, columns=[*COLUMNS, 50, 51, 52]), T)


def test_all_tensors_empty():
    for T in (1, 5, 20):
        grads = [torch.empty(0) for _ in range(3 * T)]
        got = FAST.align_rows(grads, T, F32)
        assert got.rank == 0
        assert not got.alpha.any()
        assert not got.M.any()


@pytest.mark.parametrize(
    ("T", "K", "uploads"), [(3, 55, 1), (6, 40, 1), (6, 41, 1), (6, 370, 1), (6, 371, 2), (6, 800, 3)]
)
def test_many_tensors(T, K, uploads):
    """Tables of up to 440 words, up to 4080, and more than one launch can carry."""
    columns = [1 + (i * 7) % 40 for i in range(K)]
    got = check_rows(FAST, ragged(T, (F32,), 0.1, columns), T)
    assert got.launches.count("upload") == uploads


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_rows(bad):
    K = len(COLUMNS)
    for k in (0, 3, 5, 8):
        for T, dtypes in ((3, (F32,)), (3, (F64, F32)), (20, (F32,)), (9, (F16, F32, BF16))):
            grads = ragged(T, dtypes, missing=0.2, seed=k)
            i = next(t for t in range(T) if grads[t * K + k] is not None) * K + k
            grads[i] = grads[i].clone().fill_(bad)
            for device in (FAST, SLOW):
                check_non_finite(device.align_rows(grads, T, F32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("T", [2, 3, 5, 9, 17, 33, 64, 65, 130])
def test_a_missing_row_beside_one_that_is_not_finite(T, bad):
    """What is missing is not multiplied: its products are none, whatever the other row holds."""
    K = len(COLUMNS)
    for dtypes in ((F32,), (F64,), (BF16, F32, F16, F64)):
        grads = ragged(T, dtypes, missing=0.2, seed=T)
        grads[(T - 1) * K + 2 : T * K] = [None] * (K - 2)
        for k in (1, 3):
            i = next(t for t in range(T) if grads[t * K + k] is not None) * K + k
            grads[i] = grads[i].clone()
            grads[i][-1] = bad
        expected = reference.gram_rows(grads, T)
        for device in (FAST, SLOW):
            results = [device.gram_rows(grads, T)[0]]
            if T <= 64:
                results += [device.align_rows(grads, T, F32).M]
            for M in results:
                assert torch.equal(M.isnan(), expected.isnan())
                assert torch.equal(M.isposinf(), expected.isposinf())
                assert torch.equal(M.isneginf(), expected.isneginf())


def check_non_finite(got):
    assert got.rank == 0
    assert got.alpha.isnan().all()
    assert got.lam.isnan().all()
    assert not flat(got.out if isinstance(got.out, list) else [got.out]).isfinite().any()


@pytest.mark.parametrize("size", [1e200, 1e-200])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_a_nan_beside_float64_that_is_rescaled(dtype, size):
    """The second pass leaves finite entries of other types out; it must not lose a NaN with them."""
    grads = [
        randn(40, dtype=F64, seed=t) * size if k == 0 else torch.zeros(9, dtype=dtype)
        for t in range(3)
        for k in range(2)
    ]
    got = FAST.align_rows(grads, 3, F32)
    assert got.rank == 3
    for bad in (torch.nan, torch.inf):
        grads[3][4] = bad
        check_non_finite(FAST.align_rows(grads, 3, F32))


# ------------------------------------------------------------------------------------------------ ranks, κ, scales


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_tasks(name, dtype):
    G = DEPENDENT[name](dtype)
    more = torch.cat([G] * (40_000 // G.numel() + 1), 1) if G.shape[1] > 7 else G  # enough for more than one block
    for scale in SCALES:
        for rank_rule in ("normalized", "gram"):
            check_align(FAST, G, kappa=10, scale=scale, rank_rule=rank_rule)
        check_align(SLOW, more, kappa=10, scale=scale)
    assert FAST.align(G).rank < G.shape[0]


@pytest.mark.parametrize("kappa", [1e0, 1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("T", [2, 3, 4, 8, 10, 17, 32, 40, 64])
def test_conditioning_and_spread_rows(T, kappa):
    for spread in (1.0, 1e6):
        for P in (max(300, 4 * T), 32768 // T + 100):
            G = conditioned(T, P, kappa, spread, seed=T)
            for device in (FAST, SLOW):
                check_align(device, G, kappa=kappa, rtol=T * EPS32, scale="min")
    check_align(SLOW, G, kappa=kappa, rtol=T * EPS32, scale="rmse", weights=weights(T))


@pytest.mark.parametrize("T", [6, 17, 24, 40])
def test_where_a_float32_gram_is_barely_good_enough(T):
    for P in (2000, 9000):
        for kappa in (7.0, 10.0, 15.0, 20.0, 30.0):
            check_align(SLOW, conditioned(T, P, kappa, seed=T), kappa=kappa, rtol=T * EPS32)


@pytest.mark.parametrize(("kappa", "T"), [(1e5, 2), (1e5, 10), (1e5, 24), (1e6, 2)])
def test_extreme_conditioning(T, kappa):
    G = conditioned(T, 4111, kappa, seed=T)
    for device in (FAST, SLOW):
        for scale in SCALES:
            check_align(device, G, kappa=kappa, rtol=T * EPS32, scale=scale)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_half_precision(dtype):
    G = randn(5, 3001, dtype=dtype)
    ratios = torch.tensor([150, 1, 1, 1, 1.0])[:, None]
    for X in (G, G * ratios.to(dtype), torch.cat([G, G.to(F64).sum(0, keepdim=True).to(dtype)])):
        for scale in SCALES:
            check_align(FAST, X, kappa=10, scale=scale)
            check_align(SLOW, torch.cat([X] * 3, 1), kappa=10, scale=scale)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F32, 1e25), (F32, 1e-25), (F32, 1e-38), (F64, 1e200), (F64, 1e-200), (F64, 1e300), (BF16, 1e30)],
    ids=dtype_id,
)
@pytest.mark.parametrize("T", [1, 5, 20, 50])
def test_scales(T, dtype, scale):
    for P in (701, 9001):
        G = randn(T, P, dtype=dtype)
        scaled = (G.to(F64) * scale).to(dtype)
        for device in (FAST, SLOW):
            got, plain = device.align(scaled), device.align(G)
            assert got.rank == T
            assert got.launches == plain.launches
            limit = {F32: 3e-7, F64: 1e-13, BF16: 4e-2}[dtype]
            limit = 1e-5 if scale == 1e-38 else limit  # subnormal entries
            assert relative(got.alpha, plain.alpha) <= limit
            assert relative(got.out.to(F64) / scale, plain.out.to(F64)) <= limit
            if dtype is F64:  # eigenvalues have the size of the squares, which is out of range
                assert got.lam.isinf().all() if scale > 1 else not got.lam.any()


def test_float64_scales_of_ragged_rows_and_batches():
    for T, P in ((4, 300), (20, 2000), (40, 500)):
        G = randn(T, P, dtype=F64)
        plain = FAST.align(G)
        for scale in (1e200, 1e-200):
            rows = [g for row in G * scale for g in row.split([100, P - 100])]
            got = FAST.align_rows(rows, T, F64)
            assert got.rank == T
            assert relative(torch.cat(got.out) / scale, plain.out) <= 1e-12
        batch = torch.stack([G, G * 1e200, G * 1e-200, G * 0, G * 1e90, G * 1e-90])
        got = FAST.align(batch)
        assert got.rank.tolist() == [T, T, T, 0, T, T]
        for b, scale in ((0, 1.0), (1, 1e200), (2, 1e-200), (4, 1e90), (5, 1e-90)):
            assert relative(got.out[b] / scale, plain.out) <= 1e-12
        assert not got.out[3].any()


def test_subnormal_float64():
    G = (randn(3, 500, dtype=F64) * 2.0**60).round() * 2.0**-1074
    plain = FAST.align(randn(3, 500, dtype=F64))
    got = FAST.align(G)
    assert got.rank == 3
    assert relative(got.alpha, plain.alpha) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("T", "P"), [(1, 1), (2, 9), (3, 1000), (3, 12_001), (8, 4099), (13, 65), (20, 2001), (50, 301)]
)
def test_non_finite(T, P, dtype):
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        for t, p in {(0, 0), (T - 1, P - 1), (T // 2, P // 3), ((T - 1) * (i % 2), P * i // 4)}:
            G = randn(T, P, dtype=dtype)
            G[t, p] = bad
            for device in (FAST, SLOW):
                check_non_finite(device.align(G))
            M, _ = FAST.gram(G)
            assert not M[t].isfinite().all()
            alpha, lam, rank = FAST.balance(M, dtype)
            assert alpha.isnan().all()
            assert lam.isnan().all()
            assert rank == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_zero_gradients_give_zero(dtype):
    for T, P in ((1, 1), (4, 1000), (3, 12_000), (20, 2000), (64, 20)):
        for device in (FAST, SLOW):
            got = device.align(torch.zeros(T, P, dtype=dtype))
            assert got.rank == 0
            assert not got.out.any()
            assert not got.alpha.any()
            assert not got.lam.any()


# ------------------------------------------------------------------------------------------------ balance and eigh


@functools.cache
def balance_case(T, rank_rule, scale, weighted):
    M = reference.gram(randn(3, T, 4 * T + 8, dtype=F64, seed=T))
    w = torch.rand(T, dtype=F64, generator=generator(T)) - 0.3 if weighted else None
    return M, w, reference.balance(M, w, scale, 1e-3, EPS64, rank_rule)


@pytest.mark.parametrize("rank_rule", ["normalized", "gram"])
@pytest.mark.parametrize("T", TASKS)
def test_balance(order, T, rank_rule):
    scale = SCALES[T % 3]
    M, w, (want_alpha, want_lam, want_rank) = balance_case(T, rank_rule, scale, T % 2 == 0)
    for device in (Device(limit=SMALL_SHARED), FAST):
        alpha, lam, rank = device.balance(M, weights=w, scale=scale, rtol=1e-3, rank_rule=rank_rule)
        assert torch.equal(rank, want_rank)
        assert (lam[..., 1:] <= lam[..., :-1]).all()
        assert ((lam - want_lam).abs() <= 20 * T * EPS64 * want_lam[..., :1]).all()
        size = want_alpha.abs().amax(-1, keepdim=True)
        assert ((alpha - want_alpha).abs() <= 50 * T * EPS64 * 100 * size).all()


@pytest.mark.parametrize("spread", [1e3, 1e6])
@pytest.mark.parametrize("T", [3, 8, 20, 33, 64])
def test_balance_of_a_graded_gram(T, spread):
    """Small eigenvalues from rows of very different norm keep their relative accuracy."""
    M = reference.gram(conditioned(T, 3 * T, 10.0, spread, dtype=F64, seed=T))
    want_alpha, want_lam, want_rank = reference.balance(M, None, "min", 1e-6, EPS32, "normalized")
    for device in (Device(limit=SMALL_SHARED), FAST):
        alpha, lam, rank = device.balance(M, F32, rtol=1e-6)
        assert rank == want_rank == T
        assert ((lam - want_lam).abs() <= 1e-10 * want_lam).all()
        assert relative(alpha, want_alpha) <= 1e-10


@pytest.mark.parametrize(("rtol", "rank"), [(0.0, 4), (0.05, 3), (0.2, 2), (0.6, 1)])
def test_balance_counts_by_rtol(rtol, rank):
    M = torch.diag(torch.tensor([1.0, 0.25, 0.01, 0.0001], dtype=F64))
    assert FAST.balance(M, F32, rtol=rtol, rank_rule="gram")[2] == rank
    assert FAST.balance(M, F32, rtol=rtol)[2] == 4


def spectra(T):
    """Symmetric matrices [12, T, T] of all kinds."""
    line = torch.linspace(0, 1, T, dtype=F64)
    Q, _ = torch.linalg.qr(randn(T, T, dtype=F64, seed=T))
    v, d = randn(T, dtype=F64, seed=1), torch.logspace(0, -8, T, dtype=F64)
    A = randn(T, T, dtype=F64, seed=2)
    C = (Q * (1 + line)) @ Q.T
    every = [
        A + A.T,
        C,
        (Q * (line - 0.5)) @ Q.T,
        (Q * torch.where(line < 0.5, 1.0, 2.0)) @ Q.T,
        (Q * torch.logspace(0, -12, T, dtype=F64)) @ Q.T,
        torch.eye(T, dtype=F64),
        torch.zeros(T, T, dtype=F64),
        torch.ones(T, T, dtype=F64),
        torch.outer(v, v),
        C * d * d[:, None],
        (C * d * d[:, None]).flip(0, 1),
        torch.eye(T, dtype=F64).flip(0),
        (A + A.T) * 2.0**-300,
        (A + A.T) * 2.0**300,
    ]
    return torch.stack([(X + X.T) / 2 for X in every])


@pytest.mark.parametrize("T", [*TASKS, 7, 15, 23])
def test_eigh(order, T):
    M = spectra(T)
    expected = torch.linalg.eigvalsh(M)
    results = []
    for device in (Device(limit=SMALL_SHARED), FAST):
        lam, V = device.eigh(M)
        assert (lam[:, 1:] >= lam[:, :-1]).all()
        assert max(residuals(M, lam, V)) < 10
        size = M.abs().sum(-1).amax(-1, keepdim=True)
        assert ((lam - expected).abs() <= 10 * T * EPS64 * size).all()
        results.append((lam, V))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for b in (0, 9):
        lam, V = FAST.eigh(M[b])
        assert torch.equal(lam, results[0][0][b])
        assert torch.equal(V, results[0][1][b])


@pytest.mark.parametrize("T", [2, 3, 8, 17, 32, 40, 64])
def test_eigh_reads_only_the_lower_triangle(T):
    M = spectra(T)[:3]
    lam, V = FAST.eigh(M)
    noise = torch.full((T, T), torch.nan, dtype=F64).triu(1)
    other, W = FAST.eigh(M.tril() + torch.where(noise.isnan(), noise, 0.0))
    assert torch.equal(lam, other)
    assert torch.equal(V, W)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("T", [1, 2, 3, 8, 20, 40, 64])
def test_eigh_of_a_non_finite_matrix_spares_the_others(T, bad):
    M = spectra(T)[:4]
    lam, V = FAST.eigh(M)
    for b, (i, j) in ((1, (0, 0)), (3, (T - 1, 0))):
        broken = M.clone()
        broken[b, i, j] = broken[b, j, i] = bad
        got, vectors = FAST.eigh(broken)
        assert got[b].isnan().all()
        assert vectors[b].isnan().all()
        rest = [k for k in range(4) if k != b]
        assert torch.equal(got[rest], lam[rest])
        assert torch.equal(vectors[rest], V[rest])


@pytest.mark.parametrize("T", [2, 3, 8, 13, 32])
def test_small_eigenvalues_of_graded_matrices(T):
    """A = D C D with a benign C: every eigenvalue is accurate, however small."""
    mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed")
    C = spectra(T)[1]
    d = torch.logspace(0, -9, T, dtype=F64)
    for order in (d, d.flip(0)):
        A = C * order * order[:, None]
        A = A.tril() + A.tril(-1).T
        with mpmath.workdps(60):
            exact = mpmath.eigsy(mpmath.matrix(A.tolist()), eigvals_only=True)
            expected = torch.tensor(sorted(float(x) for x in exact), dtype=F64)
        lam, _ = FAST.eigh(A)
        assert ((lam - expected) / expected).abs().max().item() <= 50 * T * EPS64


# ------------------------------------------------------------------------------------------------ sanitizers


ONLY_F32 = ("FASTMTL_EMULATE_ONLY_F32",)


@pytest.mark.parametrize(
    ("mode", "order_of_threads", "defines"),
    [
        ("address", "sequential", ONLY_F32),
        ("thread", "reversed", ONLY_F32),  # races do not depend on the type
        pytest.param("address", "sequential", (), marks=pytest.mark.slow),
    ],
)
def test_under_a_sanitizer(mode, order_of_threads, defines):
    """Accesses outside of arrays, undefined behaviour and races, over a smaller matrix of cases."""
    matrix = str(harness.KERNELS.with_name("matrix.py"))
    result = build.run(mode, [matrix, str(harness.built(mode, defines)), order_of_threads])
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("cases hold\n")

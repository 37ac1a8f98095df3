"""Every CUDA kernel on the host against the truth, through the cases of the CPU kernels, in three orders of threads."""

import harness
import pytest
import torch
from adversaries import PATTERNS
from harness import LARGE_SHARED, ORDERS, SMALL_SHARED, Device
from helpers import (
    BF16,
    DTYPES,
    EPS,
    EPS32,
    F16,
    F32,
    F64,
    conditioned,
    dtype_id,
    generator,
    randn,
    relative,
    svd_align,
)
from parity import SCALES, SPECTRA, SPECTRAL_TASKS, Parity, check_align, check_rows, ragged

pytestmark = pytest.mark.cover(1)  # an emulated kernel takes its time

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


class TestEmulated(Parity):
    """Every case in one of the orders of threads, or with `--slow` in all of them."""

    backends = (FAST, Device(True, SMALL_SHARED))


def weights(T):
    return torch.rand(T, dtype=F64, generator=generator(T)) + 0.1


def bits(aligned):
    """All of it for comparisons in which NaN equals NaN."""
    every = [aligned.out, aligned.M, aligned.alpha, aligned.lam, aligned.rank]
    return [x.contiguous().view(torch.uint8) if x.ndim else x for x in every]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


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


# ------------------------------------------------------------------------------------------------ misaligned rows


def placed(T, P, dtype, head, step=0):
    """[T, P] whose rows begin `head` elements after a multiple of 16 bytes, each `step` further than the one before."""
    width = (P + 64) // 16 * 16 + step
    buffer = torch.full((T * width + 16,), torch.nan, dtype=dtype)
    G = buffer[head:].as_strided((T, P), (width, 1), buffer[head:].storage_offset())
    G.copy_(randn(T, P, dtype=dtype, seed=T))
    assert buffer.data_ptr() % 16 == 0
    return G


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [2, 3, 8, 12, 24, 33, 40, 48, 64, 70])
def test_rows_begin_anywhere(order, T, dtype):
    """All alike, with the result or without it, so that the first columns are read one by one; or each elsewhere."""
    P, vector = 1100 + T, 16 // dtype.itemsize
    for head, step, out in ((0, 0, 0), (vector - 1, 0, vector - 1), (1, 0, 0), (1, 1, 1)):
        G = placed(T, P, dtype, head, step)
        for device in (FAST, SLOW) if dtype is F32 else (FAST,):
            M = device.gram(G)[0]
            assert relative(M, G.to(F64) @ G.to(F64).T) <= 1e-14 * T
            if T > 8 and dtype is not F64:
                assert relative(device.gram(G, exact=False)[0], M) <= 1e-6
        alpha = weights(T)
        expected = (alpha @ G.to(F64)).to(dtype)
        assert relative(FAST.combine(G, alpha, offset=out), expected) <= EPS[dtype]
        # A list of a few columns and the others.
        rows = [part for row in G for part in row.split([3, P - 3])]
        assert relative(FAST.gram_rows(rows, T)[0], M) <= 1e-14 * T
        assert relative(torch.cat(FAST.combine_rows(rows, alpha)), expected) <= EPS[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize(("T", "exact", "lanes"), [(3, True, 32), (8, True, 32), (16, True, 4), (40, False, 8)])
def test_what_lanes_read_together_lies_together(T, exact, lanes, dtype):
    """Sectors of 32 bytes that an instruction of a warp touches; `lanes` neighbours of the Gram pass share a row."""
    device, P, size = (FAST if exact else SLOW), 8192, dtype.itemsize
    alpha = weights(T)

    def loads(run):
        harness.module().watch_loads(True)
        try:
            run()
            asked, wide, moved = harness.module().watched()
        finally:
            harness.module().watch_loads(False)
        assert T * P * size <= asked <= 1.01 * T * P * size
        return wide / asked, moved / asked

    def most(lanes):  # wherever their stretch begins
        return ((lanes - 1) * size // 32 + 2) * 32 / (lanes * size)

    aligned, alike, odd = placed(T, P, dtype, 0), placed(T, P, dtype, 1), placed(T, P, dtype, 1, 1)
    assert loads(lambda: device.gram(aligned, exact=exact)) == (1, 1)
    assert loads(lambda: device.combine(aligned, alpha)) == (1, 1)
    assert loads(lambda: device.gram(alike, exact=exact))[0] >= 0.97
    assert loads(lambda: device.combine(alike, alpha, offset=1))[0] >= 0.97
    for run, together in ((lambda: device.gram(odd, exact=exact), lanes), (lambda: device.combine(odd, alpha), 32)):
        wide, share = loads(run)
        assert wide == 0
        assert share <= most(together)


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
    FAST.combine(G, weights(100))
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


@pytest.mark.cover(1)
@pytest.mark.parametrize("T", [9, 40, 41, 70, 130])
@pytest.mark.parametrize("name", ["random", *PATTERNS])
def test_the_probe_measures_what_float32_costs(name, T):
    """Between the spectral norm of the error and a multiple of its Frobenius norm, over what is promised."""
    device, P = (FAST, 3000) if T > 64 else (SLOW, 8192)
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


# ------------------------------------------------------------------------------------------------ batches


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


# ------------------------------------------------------------------------------------------------ ragged rows


@pytest.mark.parametrize(
    ("T", "K", "uploads"), [(3, 55, 1), (6, 40, 1), (6, 41, 1), (6, 370, 1), (6, 371, 2), (6, 800, 3)]
)
def test_many_tensors(T, K, uploads):
    """Tables of up to 440 words, up to 4080, and more than one launch can carry."""
    columns = [(1 + (i * 7) % 40,) for i in range(K)]
    got = check_rows(FAST, ragged(T, (F32,), 0.1, columns), T)
    assert got.launches.count("upload") == uploads


# ------------------------------------------------------------------------------------------------ many tasks


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"{device.slow}-{device.limit}")
@pytest.mark.parametrize("T", [48, 63, 64])
def test_align_wherever_the_eigenvectors_lie(order, T, device):
    for P, dtype in zip((8 * T, 517 + T, 1 + T // 3), (F32, F64, BF16), strict=True):
        check_align(device, randn(T, max(P, T), dtype=dtype, seed=T), scale=SCALES[P % 3], weights=weights(T))


@pytest.mark.parametrize("T", [T for T in SPECTRAL_TASKS if T <= 64])
def test_eigh_gives_the_same_bits_wherever_its_scratch_lies(order, T):
    M = torch.stack([make(T) for make in SPECTRA.values()])
    lam, V = FAST.eigh(M)
    other, W = Device(limit=SMALL_SHARED).eigh(M)
    assert torch.equal(lam, other)
    assert torch.equal(V, W)
    for b in (0, 9):
        one, vectors = FAST.eigh(M[b])
        assert torch.equal(one, lam[b])
        assert torch.equal(vectors, V[b])

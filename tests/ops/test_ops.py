"""Every op against its reference: on a machine where the extension is built this compares the kernels with it.

The same file runs once per instruction set (see test_isa.py).
"""

import functools
import math

import pytest
import torch
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
    dtype_id,
    flat,
    generator,
    gram_error,
    gram_limit,
    hard_to_round,
    nearest,
    randn,
    relative,
    residuals,
    rounded,
    same_numbers,
    svd_align,
)
from torch import library

from fastmtl import ops
from fastmtl.ops import reference

TASKS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 24, 33, 40, 48, 49, 64, 65, 100, 128, 200, 300)
SIZES = (0, 1, 7, 8, 15, 16, 17, 31, 63, 64, 65, 255, 257, 1000, 1025, 4095, 4096, 4097, 10_000, 20_011)


def shapes():
    """Every T with a few P and every P with a few T; all P up to 1025 for the smallest T."""
    pairs = {(T, SIZES[(3 * i + 5 * j) % len(SIZES)]) for i, T in enumerate(TASKS) for j in range(3)}
    pairs |= {(T, P) for T in (1, 2, 3, 5) for P in SIZES}
    pairs |= {(T, P) for T in (4, 8, 10, 12, 16) for P in (17, 1025, 4097)}
    pairs |= {(T, 10_000) for T in (6, 7, 11, 24, 40, 48, 64, 65)}
    pairs |= {(3, 200_003), (10, 100_001), (300, 1025)}
    return sorted(pairs)


SHAPES = shapes()


def policy(G, scale="min", weights=None, rtol=None, rank_rule="normalized"):
    zero = EPS64 if G.dtype is F64 else EPS32
    return weights, scale, default_rtol(G.shape[-2], G.dtype) if rtol is None else rtol, zero, rank_rule


def guarded(shape, dtype, offset=0):
    """An output in the middle of a larger buffer, everything poisoned: finds unwritten and foreign elements."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 128 + offset,), 7.0, dtype=dtype)
    out = buffer[64 + offset : 64 + offset + size].view(shape)
    out.fill_(torch.nan)
    return buffer, out


def check_guard(buffer, size, offset=0):
    assert (buffer[: 64 + offset] == 7.0).all()
    assert (buffer[64 + offset + size :] == 7.0).all()


@functools.cache
def alpha_for(T):
    return torch.randn(T, dtype=F64, generator=generator(T))


def check_gram(G):
    M = ops.gram(G)
    assert gram_error(M, G) <= gram_limit(G.dtype)
    assert torch.equal(M, M.mT)
    return M


def check_combine(G, alpha=None, offset=0):
    shape = (*G.shape[:-2], G.shape[-1])
    alpha = randn(*G.shape[:-1], dtype=F64, seed=1) if alpha is None else alpha
    expected = torch.empty(shape, dtype=F64)
    reference.combine(G, alpha, out=expected)
    buffer, out = guarded(shape, G.dtype, offset)
    ops.combine(G, alpha, out=out)
    check_guard(buffer, out.numel(), offset)
    # Accumulated in float64 and rounded once.
    largest = (alpha.abs()[..., None, :] @ G.to(F64).abs()).squeeze(-2)
    assert rounded(out, expected, slack=1e-13 * largest)


def check_align(G, kappa=None, offset=0, **options):
    T = G.shape[-2]
    shape = (*G.shape[:-2], G.shape[-1])
    expected = torch.empty(shape, dtype=F64)
    if G.ndim == 3 or T <= 24:
        reference.align(G.to(F64), *policy(G, **options), out=expected)
    else:  # where the reference is slow, the truth itself
        expected = svd_align(G, **options)
    buffer, out = guarded(shape, G.dtype, offset)
    ops.align(G, *policy(G, **options), out=out)
    check_guard(buffer, out.numel(), offset)
    entries = [(G, out, expected)] if G.ndim == 2 else zip(G, out, expected, strict=True)
    for g, got, want in entries:
        limit = contract(T, condition(g, options.get("rtol")) if kappa is None else kappa, G.dtype)
        assert relative(got, want) <= limit


def check_balance(M, *options, kappa=10.0):
    alpha, lam, rank = ops.balance(M, *options)
    want_alpha, want_lam, want_rank = reference.balance(M, *options)
    assert alpha.dtype is lam.dtype is F64
    assert rank.dtype is torch.int64
    assert torch.equal(rank, want_rank)
    T = M.shape[-1]
    if M.numel():
        assert (lam >= 0).all()
        assert (lam[..., 1:] <= lam[..., :-1]).all()
        assert ((lam - want_lam).abs() <= 20 * T * EPS64 * want_lam[..., :1]).all()
        size = want_alpha.abs().amax(-1, keepdim=True)
        assert ((alpha - want_alpha).abs() <= 50 * T * EPS64 * kappa**2 * size).all()
    else:
        assert alpha.shape == want_alpha.shape
    return alpha, lam, rank


# ------------------------------------------------------------------------------------------------ flat [T, P]


@pytest.mark.parametrize(("T", "P"), SHAPES)
def test_gram_and_combine(T, P):
    for dtype in DTYPES if T * P <= 200_000 else (F32, BF16):
        G = randn(T, P, dtype=dtype, seed=T)
        M = check_gram(G)
        if P == 0:
            assert not M.any()
        check_combine(G, alpha_for(T))


@pytest.mark.parametrize(("T", "P"), SHAPES)
def test_align(T, P):
    for i, dtype in enumerate(DTYPES if T * P <= 100_000 else (F32,)):
        G = randn(T, P, dtype=dtype, seed=T)
        w = torch.rand(T, dtype=F64, generator=generator(P)) + 0.1
        check_align(G, scale=("min", "median", "rmse")[(T + P + i) % 3], weights=w if (T + i) % 2 else None)


@pytest.mark.parametrize(("T", "P", "dtype"), [(3, 4_400_003, F32), (7, 3_700_001, BF16)], ids=dtype_id)
def test_larger_than_the_caches(T, P, dtype):
    """Results are then written past the cache, which needs its own care with alignment and with the ends of tensors."""
    G = randn(T, P + 1, dtype=dtype)[:, 1:]
    alpha = alpha_for(T)
    expected = sum(a * g for a, g in zip(alpha, G.to(F64), strict=True))
    check_gram(G)
    buffer, out = guarded((P,), dtype, offset=3)
    ops.combine(G, alpha, out)
    check_guard(buffer, P, offset=3)
    assert rounded(out, expected, slack=1e-13 * expected.abs().max())
    sizes = [17, P // 2, 1, 0, 33, P - P // 2 - 51]
    buffers, outs = zip(*(guarded((n,), dtype) for n in sizes), strict=True)
    ops.combine_rows([g for row in G for g in row.split(sizes)], alpha, list(outs))
    for kept, n in zip(buffers, sizes, strict=True):
        check_guard(kept, n)
    assert torch.equal(torch.cat(outs), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("T", "P"), [(1, 9), (2, 65), (3, 1000), (5, 17), (8, 4097), (11, 513), (16, 1025), (33, 300), (70, 129)]
)
def test_strides(T, P, dtype):
    check = [check_gram, check_combine, check_align]
    wide = torch.full((T, P + 13), torch.nan, dtype=dtype)  # row stride > P: what lies between rows must not be read
    wide[:, 3 : P + 3] = randn(T, P, dtype=dtype)
    odd = torch.cat([torch.full((1,), torch.nan, dtype=dtype), randn(T * P, dtype=dtype)])[1:].view(T, P)  # not aligned
    views = {
        "row stride > P": wide[:, 3 : P + 3],
        "unaligned": odd,
        "transposed": randn(P, T, dtype=dtype).T,
        "every other column": randn(T, 2 * P, dtype=dtype)[:, ::2],
        "every other row": randn(2 * T, P, dtype=dtype)[::2],
        "last row first": randn(T, P, dtype=dtype).flip(0),
    }
    for name, G in views.items():
        assert G.shape == (T, P), name
        for function in check:
            function(G)
    for offset in (1, 3):
        check_combine(odd, offset=offset)
        check_align(odd, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_strided_out(dtype):
    G = randn(4, 100, dtype=dtype)
    for function in (
        lambda out: ops.combine(G, alpha_for(4), out=out),
        lambda out: ops.align(G, *policy(G), out=out),
    ):
        dense = torch.empty(100, dtype=dtype)
        function(dense)
        column = torch.full((100, 3), 7.0, dtype=dtype)
        function(column[:, 1])
        assert torch.equal(column[:, 1], dense)
        assert (column[:, [0, 2]] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_expanded_rows(dtype):
    row = randn(1, 300, dtype=dtype)
    G = row.expand(5, 300)
    M = check_gram(G)
    assert relative(M, torch.full((5, 5), M[0, 0].item(), dtype=F64)) <= 1e-14
    check_align(G)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_rows_more_than_two_to_the_31_elements_apart(dtype):
    stride, P = 2**31 + 17, 1000
    try:
        base = torch.empty(stride + P, dtype=dtype)  # only the pages of the two rows are ever touched
    except RuntimeError:
        pytest.skip("not enough memory to reserve a buffer of 2^31 elements")
    G = base.as_strided((2, P), (stride, 1))
    G.copy_(randn(2, P, dtype=dtype))
    check_gram(G)
    check_combine(G)
    check_align(G)


def test_combine_accumulates_in_float64():
    G = randn(6, 5000)
    G = torch.cat([G, -G * (1 + 1e-4)])
    check_combine(G, torch.ones(12, dtype=F64))
    check_combine(G, torch.logspace(0, 12, 12, dtype=F64))


IMPLEMENTATIONS = pytest.mark.parametrize("impl", [ops, reference], ids=["op", "reference"])


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_results_are_rounded_once(dtype, impl):
    """To the nearest number, ties to even, in whole vectors and beside them: α of a gradient of ones is the result."""
    alpha = hard_to_round(dtype)
    B, P = len(alpha), 21
    out, rows = torch.empty(B, P, dtype=dtype), torch.empty(P, dtype=dtype)
    impl.combine(torch.ones(B, 1, P, dtype=dtype), alpha[:, None], out)
    expected = [nearest(x, dtype) for x in alpha.tolist()]
    for k in range(P):
        assert same_numbers(out[:, k], expected), k
    for x, want in zip(alpha[::7], expected[::7], strict=True):
        impl.combine_rows([torch.ones(P, dtype=dtype)], x[None], [rows])
        assert same_numbers(rows, [want] * P), x


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_sums_are_rounded_once(dtype, impl):
    """Sums that are exact in float64, of numbers that the dtype holds: by way of float32 their tails are lost."""
    info = torch.finfo(dtype)
    columns = [
        (lead * 2.0**e, s * info.eps / 2 * 2.0**e, r * small)
        for lead in (1.0, 1 + info.eps)
        for e in (0, 3)
        for s in (-1, 1)
        for r in (-1, 0, 1)
        for small in (info.tiny * info.eps, info.tiny if dtype is F16 else 2.0**-40)
    ]
    G = torch.tensor(columns, dtype=F64).T.to(dtype).contiguous()
    assert torch.equal(G.to(F64).T, torch.tensor(columns, dtype=F64))
    P, expected = len(columns), [nearest(math.fsum(c), dtype) for c in columns]
    seed, ones = torch.tensor(1), torch.ones(3, dtype=F64)
    up = G.abs()  # then GradDrop has no choice
    positive = [nearest(math.fsum(map(abs, c)), dtype) for c in columns]
    for got, want, call in (
        (torch.empty(P, dtype=dtype), expected, lambda out: impl.combine(G, ones, out)),
        (torch.empty(P, dtype=dtype), expected, lambda out: impl.combine_rows(list(G), ones, [out])),
        (torch.empty(P, dtype=dtype), positive, lambda out: impl.sign_drop(up, seed, None, out)),
        (
            torch.empty(P, dtype=dtype),
            positive,
            lambda out: impl.sign_drop_rows(list(up), 3, seed, ones, [out]),
        ),
    ):
        call(got)
        assert same_numbers(got, want)


def test_float16_subnormals_and_overflow():
    G = torch.full((2, 100), 2.0**-24, dtype=F16)
    assert ops.gram(G)[0, 1].item() == 100 * 2.0**-48
    out = torch.empty(100, dtype=F16)
    ops.combine(G, torch.tensor([1.0, 2.0], dtype=F64), out=out)
    assert (out == 3 * 2.0**-24).all()
    ops.combine(G, torch.tensor([2.0**40, 0.0], dtype=F64), out=out)
    assert out.isposinf().all()


# ------------------------------------------------------------------------------------------------ batches


BATCHES = [
    (0, 3, 10),
    (1, 1, 1),
    (1, 5, 100),
    (2, 2, 0),
    (3, 4, 17),
    (7, 2, 1),
    (8, 8, 64),
    (9, 3, 333),
    (17, 6, 65),
    (33, 10, 40),
    (5, 33, 50),
    (2, 70, 100),
    (512, 4, 33),
]


@pytest.mark.parametrize(("B", "T", "P"), BATCHES)
def test_batched(B, T, P):
    for dtype in DTYPES:
        G = randn(B, T, P, dtype=dtype, seed=B)
        M = check_gram(G)
        assert M.shape == (B, T, T)
        check_combine(G)
        check_align(G[:20], scale="rmse", weights=torch.arange(1.0, T + 1.0, dtype=F64))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_batched_strides(dtype):
    B, T, P = 5, 4, 130
    poisoned = torch.full((B, T + 1, P + 5), torch.nan, dtype=dtype)
    poisoned[:, :T, :P] = randn(B, T, P, dtype=dtype)
    views = {
        "every other entry": randn(2 * B, T, P, dtype=dtype)[::2],
        "inner part": poisoned[:, :T, :P],
        "tasks outermost": randn(T, B, P, dtype=dtype).transpose(0, 1),
        "columns outermost": randn(P, B, T, dtype=dtype).permute(1, 2, 0),
        "expanded": randn(1, T, P, dtype=dtype).expand(B, T, P),
        "one entry": randn(B, T, P, dtype=dtype)[2:3],
    }
    for name, G in views.items():
        assert G.shape[1:] == (T, P), name
        check_gram(G)
        check_combine(G)
        check_align(G)


def test_a_batch_equals_its_entries():
    G = randn(11, 6, 700)
    out = torch.empty(11, 700)
    ops.align(G, *policy(G), out=out)
    for b in range(11):
        one = torch.empty(700)
        ops.align(G[b], *policy(G), out=one)
        assert relative(out[b], one) <= 1e-7
        assert relative(ops.gram(G)[b], ops.gram(G[b])) <= 1e-8


def test_batch_entries_of_different_rank_and_size():
    G = randn(6, 5, 300)
    G[1, 3] = G[1, 0]
    G[2] = 0
    G[3] *= 1e20
    G[4] *= 1e-20
    G[5, 2] *= 1e4
    check_align(G)
    _, _, rank = check_balance(ops.gram(G), *policy(G), kappa=1e4)
    assert rank.tolist() == [5, 4, 0, 5, 5, 5]


# ------------------------------------------------------------------------------------------------ ragged rows


COLUMNS = [(), (1,), (3, 4), (0,), (17,), (5, 0, 2), (64,), (1, 1, 1, 1), (4097,), (10, 33), (2, 3, 5, 7)]


def ragged(T, dtypes=(F32,), missing=0.0, columns=COLUMNS, seed=0):
    """T rows of K tensors; entry (t, k) is missing with this probability, but no column entirely."""
    gen = generator(seed)
    grads = [
        randn(*shape, dtype=dtypes[k % len(dtypes)], seed=100 * t + k)
        for t in range(T)
        for k, shape in enumerate(columns)
    ]
    K = len(columns)
    absent = torch.rand(T, K, generator=gen) < missing
    absent[torch.randint(T, (K,), generator=gen), torch.arange(K)] = False
    return [None if absent[i // K, i % K] else g for i, g in enumerate(grads)], K


def check_rows(grads, T, rtol=None, limit=None, **options):
    K = len(grads) // T
    like = [next(g for g in grads[k::K] if g is not None) for k in range(K)]
    coarsest = max((g.dtype for g in like), key=EPS.__getitem__)
    norm = torch.zeros(T, dtype=F64)
    for i, g in enumerate(grads):
        norm[i // K] += 0 if g is None else g.to(F64).square().sum()
    size = (norm[:, None] * norm).sqrt()

    M, want = ops.gram_rows(grads, T), reference.gram_rows(grads, T)
    assert M.dtype is F64
    assert ((M - want).abs() <= gram_limit(coarsest) * size).all()

    alpha = alpha_for(T)
    buffers, out = zip(*(guarded(g.shape, g.dtype) for g in like), strict=True)
    expected = [torch.empty(g.shape, dtype=F64) for g in like]
    ops.combine_rows(grads, alpha, list(out))
    reference.combine_rows(grads, alpha, expected)
    for buffer, got, one in zip(buffers, out, expected, strict=True):
        check_guard(buffer, got.numel())
        assert rounded(got, one, slack=1e-12)

    settings = policy(torch.empty(T, 0, dtype=coarsest), rtol=rtol, **options)
    buffers, out = zip(*(guarded(g.shape, g.dtype) for g in like), strict=True)
    M, alpha, rank = ops.align_rows(grads, T, *settings, list(out))
    _, want_alpha, want_rank = reference.align_rows(grads, T, *settings, expected)
    assert ((M - want).abs() <= gram_limit(coarsest, T) * size).all()
    assert M.dtype is alpha.dtype is F64
    assert rank.dtype is torch.int64
    assert rank.shape == ()
    assert rank == want_rank
    limit = contract(T, 10.0) if limit is None else limit
    assert relative(alpha, want_alpha) <= limit
    scale = flat(expected).norm()
    for buffer, got, one in zip(buffers, out, expected, strict=True):
        check_guard(buffer, got.numel())
        assert (got.to(F64) - one).norm() <= (limit + EPS[got.dtype]) * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 11, 17, 40, 65])
def test_ragged(T, dtype):
    grads, _ = ragged(T, (dtype,))
    check_rows(grads, T)


@pytest.mark.parametrize("missing", [0.3, 0.9])
@pytest.mark.parametrize("T", [2, 5, 12, 33])
def test_missing_gradients(T, missing):
    for dtype in (F32, BF16):
        grads, _ = ragged(T, (dtype,), missing)
        check_rows(grads, T, limit=1e-5 if T == 33 else None)


def test_missing_rows():
    grads, K = ragged(4)
    grads[2 * K : 3 * K] = [None] * K
    check_rows(grads, 4)
    _, alpha, rank = ops.align_rows(grads, 4, *policy(torch.empty(4, 0)), [torch.empty_like(g) for g in grads[:K]])
    assert rank == 3
    assert alpha[2] == 0.0


@pytest.mark.parametrize("T", [1, 3, 8])
def test_dtypes_differ_between_parameters(T):
    for dtypes in ((F32, F64), (BF16, F32), (F16, BF16, F64, F32)):
        grads, _ = ragged(T, dtypes, missing=0.2)
        check_rows(grads, T)


def test_one_tensor_a_row_equals_the_matrix():
    G = randn(7, 3000)
    out, one = torch.empty(3000), torch.empty(3000)
    ops.align(G, *policy(G), out=out)
    M, alpha, _rank = ops.align_rows(list(G), 7, *policy(G), [one])
    assert relative(one, out) <= 1e-7
    assert relative(M, ops.gram(G)) <= 1e-8
    assert relative(alpha, ops.balance(ops.gram(G), *policy(G))[0]) <= 1e-7


def test_views_of_one_buffer_equal_the_matrix():
    G = randn(5, 2000)
    sizes = [1, 999, 0, 16, 984]
    rows = [g for row in G for g in row.split(sizes)]
    result = torch.empty(2000)
    ops.align_rows(rows, 5, *policy(G), list(result.split(sizes)))
    out = torch.empty(2000)
    ops.align(G, *policy(G), out=out)
    assert relative(result, out) <= 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_strides_differ_between_tasks(dtype):
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
    check_rows(grads, 5)
    check_rows([g for i, g in enumerate(grads) for g in (g, None if i == 2 else randn(3, dtype=dtype, seed=i))], 5)


def test_all_tasks_channels_last():
    grads = [randn(2, 6, 5, 4, seed=s).contiguous(memory_format=torch.channels_last) for s in range(3)]
    check_rows(grads, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = torch.empty(2, 6, 5, 4).contiguous(memory_format=layout)
        ops.combine_rows(grads, torch.ones(3, dtype=F64), [out])
        assert relative(out, sum(g.to(F64) for g in grads)) <= EPS32


def test_many_parameters():
    """More segments than any block holds, most of them tiny."""
    columns = [((i * 7) % 40,) for i in range(700)] + [(5000,), (3, 3000)]
    grads, _ = ragged(6, (F32,), 0.1, columns)
    check_rows(grads, 6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_rows(bad):
    for k in (0, 4, 8, 10):
        grads, K = ragged(3, missing=0.2, seed=k)
        i = next(t for t in range(3) if grads[t * K + k] is not None) * K + k
        grads[i] = grads[i].clone().fill_(bad)
        out = [torch.zeros_like(next(g for g in grads[j::K] if g is not None)) for j in range(K)]
        M, alpha, rank = ops.align_rows(grads, 3, *policy(torch.empty(3, 0)), out)
        assert alpha.isnan().all()
        assert not M.isfinite().all()
        assert rank == 0
        for o in out:
            assert not o.isfinite().any()


# ------------------------------------------------------------------------------------------------ ranks, κ, scales


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_tasks(name, dtype):
    G = DEPENDENT[name](dtype)
    for scale in ("min", "median", "rmse"):
        check_align(G, kappa=10, scale=scale)
    _, _, rank = check_balance(ops.gram(G), *policy(G))
    assert rank < G.shape[0]


@pytest.mark.parametrize("kappa", [1e0, 1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("T", [2, 3, 4, 8, 10, 12, 16, 24, 32, 40, 48, 64, 100])
def test_conditioning_and_spread_rows(T, kappa):
    for spread in (1.0, 1e6):
        G = conditioned(T, 1100, kappa, spread, seed=T)
        check_align(G, kappa=kappa, rtol=T * EPS32, scale="min")
    check_align(G, kappa=kappa, rtol=T * EPS32, scale="rmse")


@pytest.mark.parametrize("T", [17, 24, 40])
def test_where_a_float32_gram_is_barely_good_enough(T):
    """Sums in float32 blocks are allowed where the row-normalised Gram is benign: up to its edge."""
    for P in (300, 2000, 9000):
        for kappa in (7.0, 10.0, 12.0, 15.0, 18.0, 20.0, 25.0, 30.0):
            G = conditioned(T, P, kappa, seed=T)
            out = torch.empty(P)
            ops.align(G, *policy(G, rtol=T * EPS32), out)
            assert relative(out, svd_align(G, rtol=T * EPS32)) <= contract(T, kappa), (P, kappa)


@pytest.mark.parametrize(("kappa", "T"), [(1e5, 2), (1e5, 10), (1e5, 24), (1e6, 2)])
def test_extreme_conditioning(T, kappa):
    G = conditioned(T, 4111, kappa, seed=T)
    for scale in ("min", "median", "rmse"):
        check_align(G, kappa=kappa, rtol=T * EPS32, scale=scale)


@pytest.mark.parametrize("T", [3, 10, 50])
def test_conditioning_of_ragged_rows(T):
    G = conditioned(T, 3000, 1e3, seed=T)
    rows = [g for row in G for g in row.split([1, 1999, 0, 1000])]
    limit = contract(T, 1e3)
    check_rows(rows, T, rtol=T * EPS32, limit=limit)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F32, 1e25), (F32, 1e-25), (F32, 1e-38), (F64, 1e200), (F64, 1e-200), (BF16, 1e30)],
    ids=dtype_id,
)
@pytest.mark.parametrize("T", [1, 5, 50])
def test_scales(T, dtype, scale):
    G = randn(T, 701, dtype=dtype)
    scaled = (G.to(F64) * scale).to(dtype)
    check_align(scaled)
    out, plain = torch.empty(701, dtype=dtype), torch.empty(701, dtype=dtype)
    ops.align(scaled, *policy(G), out=out)
    ops.align(G, *policy(G), out=plain)
    limit = {F32: 3e-7, F64: 1e-13, BF16: 4e-2}[dtype]
    limit = 1e-5 if scale == 1e-38 else limit  # subnormal entries
    assert relative(out.to(F64) / scale, plain.to(F64)) <= limit


def test_float64_scales_of_ragged_rows_and_batches():
    G = randn(4, 300, dtype=F64)
    for scale in (1e200, 1e-200):
        rows = [g for row in G * scale for g in row.split([100, 200])]
        out, plain = torch.empty(300, dtype=F64), torch.empty(300, dtype=F64)
        _, alpha, rank = ops.align_rows(rows, 4, *policy(G), list(out.split([100, 200])))
        ops.align(G, *policy(G), out=plain)
        assert rank == 4
        assert relative(out / scale, plain) <= 1e-13
        assert relative(alpha, ops.balance(ops.gram(G), *policy(G))[0]) <= 1e-13
    check_align(torch.stack([G, G * 1e200, G * 1e-200, G * 0]))


@pytest.mark.parametrize("scale", [1e200, 1e-200])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
def test_a_nan_beside_float64_that_is_rescaled(dtype, scale):
    """The rescaled Gram leaves finite entries of other types out; it must not lose a NaN with them."""
    wide = randn(3, 40, dtype=F64) * scale
    for bad in (0.0, torch.nan, torch.inf):
        rows = [g for t in range(3) for g in (wide[t], torch.full((9,), bad if t == 1 else 0.0, dtype=dtype))]
        out = [torch.empty(40, dtype=F64), torch.empty(9, dtype=dtype)]
        _, alpha, rank = ops.align_rows(rows, 3, *policy(wide), out)
        assert rank == (3 if bad == 0.0 else 0)
        assert alpha.isfinite().all() == (bad == 0.0)
        assert all(g.isfinite().all() == (bad == 0.0) for g in out)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("T", "P"), [(1, 1), (2, 9), (3, 1000), (5, 70), (8, 4099), (13, 65), (50, 301), (70, 40)])
def test_non_finite(T, P, dtype):
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        for t, p in {(0, 0), (T - 1, P - 1), (T // 2, P // 3), ((T - 1) * (i % 2), P * i // 4)}:
            G = randn(T, P, dtype=dtype)
            G[t, p] = bad
            out = torch.zeros(P, dtype=dtype)
            ops.align(G, *policy(G), out=out)
            assert not out.isfinite().any()
            assert not ops.gram(G)[t].isfinite().all()
            alpha, lam, rank = ops.balance(ops.gram(G), *policy(G))
            assert alpha.isnan().all()
            assert lam.isnan().all()
            assert rank == 0


def test_a_non_finite_entry_spares_the_rest_of_the_batch():
    G = randn(20, 3, 90)
    out, again = torch.empty(20, 90), torch.empty(20, 90)
    ops.align(G, *policy(G), out=out)
    G[7, 1, 2] = torch.nan
    G[19, 0, 89] = -torch.inf
    ops.align(G, *policy(G), out=again)
    rest = [b for b in range(20) if b not in (7, 19)]
    assert torch.equal(again[rest], out[rest])
    assert not again[[7, 19]].isfinite().any()


# ------------------------------------------------------------------------------------------------ balance and eigh


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 100])
@pytest.mark.parametrize("rank_rule", ["normalized", "gram"])
def test_balance(T, rank_rule):
    for i, batch in enumerate(((), (1,), (3,), (9,), (0,)) if T <= 33 else ((), (2,))):
        M = reference.gram(randn(*batch, T, 4 * T + 8, dtype=F64, seed=T + i))
        w = None if i % 2 else torch.rand(T, dtype=F64) - 0.3
        check_balance(M, w, ("min", "median", "rmse")[(T + i) % 3], default_rtol(T, F32), EPS32, rank_rule)


@pytest.mark.parametrize("T", [1, 2, 9, 32, 33, 48, 100])
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_align_gram(T, scale):
    """The weights and the rank of `balance`, by whatever way; and those of each matrix are those of the batch."""
    options = (torch.linspace(0.5, 1.5, T, dtype=F64), scale, default_rtol(T, F32), EPS32, "normalized")
    good, dependent = (reference.gram(conditioned(T, 3 * T, kappa, dtype=F64, seed=T)) for kappa in (3.0, 1e5))
    M = torch.stack([good, dependent, 7 * good, torch.full((T, T), torch.nan, dtype=F64)])
    alpha, rank = ops.align_gram(M, *options)
    want, _, want_rank = ops.balance(M, *options)
    assert torch.equal(rank, want_rank)
    assert rank[0] == T
    assert all(relative(a, b) <= 1e-8 for a, b in zip(alpha[:3], want[:3], strict=True))
    assert alpha[3].isnan().all()
    if T > 32:
        for one, a, r in zip(M, alpha, rank, strict=True):
            alone = ops.align_gram(one, *options)
            assert torch.equal(alone[0].nan_to_num(7.0), a.nan_to_num(7.0))
            assert alone[1] == r


def test_balance_of_many():
    M = reference.gram(randn(2000, 3, 12, dtype=F64))
    check_balance(M, None, "median", 1e-3, EPS32, "normalized", kappa=100)


def test_balance_of_a_float32_gram():
    M = reference.gram(randn(6, 50, dtype=F64)).float()
    options = (torch.arange(6.0, dtype=F64), "min", 1e-3, EPS32, "normalized")
    narrow, wide = ops.balance(M, *options), ops.balance(M.to(F64), *options)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("spread", [1e3, 1e6])
@pytest.mark.parametrize("T", [3, 8, 20, 33, 70])
def test_balance_of_a_graded_gram(T, spread):
    """Small eigenvalues from rows of very different norm keep their relative accuracy."""
    M = reference.gram(conditioned(T, 3 * T, 10.0, spread, dtype=F64, seed=T))
    options = (None, "min", 1e-6, EPS32, "normalized")
    alpha, lam, rank = ops.balance(M, *options)
    want_alpha, want_lam, want_rank = reference.balance(M, *options)
    assert rank == want_rank == T
    assert ((lam - want_lam).abs() <= 1e-10 * want_lam).all()
    assert relative(alpha, want_alpha) <= 1e-10


@pytest.mark.parametrize(("rtol", "rank"), [(0.0, 4), (0.05, 3), (0.2, 2), (0.6, 1)])
def test_balance_counts_by_rtol(rtol, rank):
    M = torch.diag(torch.tensor([1.0, 0.25, 0.01, 0.0001], dtype=F64))
    assert check_balance(M, None, "min", rtol, EPS32, "gram")[2] == rank
    assert check_balance(M, None, "min", rtol, EPS32, "normalized")[2] == 4


@pytest.mark.parametrize("T", [1, 2, 3, 8, 9, 17, 32, 33, 64, 70])
def test_eigh(T):
    for batch in ((), (1,), (3,), (8,), (9,), (0,), (2, 3)) if T <= 33 else ((), (2,)):
        for dtype in (F64, F32) if T <= 33 else (F64,):
            A = randn(*batch, T, T, dtype=F64, seed=T)
            M = (A + A.mT).to(dtype)
            lam, V = ops.eigh(M)
            want, _ = reference.eigh(M)
            assert lam.dtype is V.dtype is dtype
            assert lam.shape == want.shape
            assert V.shape == M.shape
            if M.numel():
                assert ((lam - want).abs() <= 10 * EPS[dtype] * want.abs().amax(-1, keepdim=True)).all()
                assert max(residuals(M, lam, V)) < 10


# ------------------------------------------------------------------------------------------------ registration


def op_cases():
    options = ("min", 1e-3, EPS32, "normalized")
    grads = [randn(3, 2), randn(7), None, randn(7, seed=1)]
    M = reference.gram(randn(3, 20, dtype=F64))
    w = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    yield "gram", (randn(3, 20),), {}
    yield "gram", (randn(2, 3, 20, dtype=BF16),), {}
    yield "gram", (randn(3, 20, dtype=F64).requires_grad_(),), {}
    yield "gram_rows", (grads, 2, None), {}
    yield "gram_rows", (grads, 2, [torch.zeros(3, 2), torch.zeros(7)]), {}
    yield "balance", (M, None, *options), {}
    yield "balance", (torch.stack([M, 2 * M]), w, *options), {}
    yield "align_gram", (M, None, *options), {}
    yield "align_gram", (torch.stack([M, 2 * M]).float(), w, *options), {}
    yield "eigh", (M,), {}
    yield "eigh", (torch.stack([M, M]).float(),), {}
    yield "combine", (randn(3, 20), w), {"out": torch.empty(20)}
    yield "combine", (randn(2, 3, 20, dtype=F16), torch.stack([w, w])), {"out": torch.empty(2, 20, dtype=F16)}
    yield "combine_rows", (grads, w[:2], [torch.empty(3, 2), torch.empty(7)]), {}
    yield "align", (randn(3, 20), w, *options), {"out": torch.empty(20)}
    yield "align", (randn(2, 3, 20), None, *options), {"out": torch.empty(2, 20)}
    yield "align_rows", (grads, 2, None, *options, [torch.empty(3, 2), torch.empty(7)]), {}
    seed, batch = torch.tensor(7), torch.stack([M, 2 * M])
    for solved, rest in (
        ("mgda", ()),
        ("dual_cone", (w, True)),
        ("cagrad", (0.5,)),
        ("nash", (1.0,)),
        ("unit_solve", (None, 1e-6)),
    ):
        yield solved, (M, *rest), {}
        yield solved, (batch.float(), *rest), {}
    yield "dual_cone", (M, None, False), {}
    yield "unit_solve", (M, w, 0.0), {}
    yield "constant", (M, w), {}
    yield "constant", (batch.float(), None), {}
    yield "pcgrad", (M, seed, True), {}
    yield "pcgrad", (batch.float(), seed, False), {}
    yield "gradvac", (M, seed, 0.5, torch.zeros_like(M)), {}
    yield "gradvac", (batch, seed, 0.5, torch.zeros_like(batch)), {}
    yield "sign_drop", (randn(2, 3, 20, dtype=F16), seed, w, torch.empty(2, 20, dtype=F16)), {}
    yield "sign_drop_rows", (grads, 2, seed, None, [torch.empty(3, 2), torch.empty(7)]), {}


OP_CASES = list(op_cases())


@pytest.mark.parametrize(
    ("name", "args", "kwargs"), OP_CASES, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(OP_CASES)]
)
def test_opcheck(name, args, kwargs):
    library.opcheck(getattr(ops, name), args, kwargs)


def test_every_op_is_checked():
    names = {name for name in ops.__all__ if name.islower()}
    assert {name for name, _, _ in OP_CASES} == names


def test_gram_has_a_derivative():
    for shape in ((3, 5), (2, 3, 4)):
        G = randn(*shape, dtype=F64).requires_grad_()
        assert torch.autograd.gradcheck(ops.gram, (G,))
    G = randn(3, 50).requires_grad_()
    (grad,) = torch.autograd.grad(ops.gram(G).diagonal().sum(), G)  # Σ‖g_t‖²
    assert grad.dtype is F32
    assert relative(grad, 2 * G.detach()) <= 1e-6


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("gram_rows", lambda x: ops.gram_rows([x[0], x[1]], 2)),
        ("balance", lambda x: ops.balance(x, None, "min", 1e-3, EPS32, "normalized")[0]),
        ("eigh", lambda x: ops.eigh(x)[0]),
        ("eigh", lambda x: ops.eigh(x)[1]),
    ],
    ids=["gram_rows", "balance", "eigenvalues", "eigenvectors"],
)
def test_no_derivative_is_an_error_and_not_a_wrong_gradient(name, call):
    x = torch.eye(2, dtype=F64).requires_grad_()
    result = call(x)
    assert result.requires_grad, "the graph was silently cut"
    with pytest.raises(NotImplementedError, match=f"fastmtl::{name} has no derivative"):
        result.sum().backward()
    assert x.grad is None

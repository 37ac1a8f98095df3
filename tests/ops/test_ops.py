"""Every op as the CPU's kernels compute it, where they are built: the cases of parity.py, and what is the ops' own.

The same file runs once per instruction set (see test_isa.py).
"""

import math

import pytest
import torch
from helpers import (
    BF16,
    DTYPES,
    EPS,
    EPS32,
    EPS64,
    F16,
    F32,
    F64,
    check_guard,
    conditioned,
    default_rtol,
    dtype_id,
    guarded,
    nearest,
    randn,
    relative,
    residuals,
    rounded,
    same_numbers,
)
from parity import Parity, Torch, check_align, check_combine, check_gram, policy
from torch import library

from fastmtl import ops
from fastmtl.ops import reference

CPU = Torch()


class TestCpu(Parity):
    backends = (CPU,)


# ------------------------------------------------------------------------------------------------ flat [T, P]


@pytest.mark.parametrize(("T", "P", "dtype"), [(3, 4_400_003, F32), (7, 3_700_001, BF16)], ids=dtype_id)
def test_larger_than_the_caches(T, P, dtype):
    """Results are then written past the cache, which needs its own care with alignment and with the ends of tensors."""
    G = randn(T, P + 1, dtype=dtype)[:, 1:]
    alpha = randn(T, dtype=F64, seed=1)
    expected = sum(a * g for a, g in zip(alpha, G.to(F64), strict=True))
    check_gram(CPU, G)
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
def test_strided_out(dtype):
    G = randn(4, 100, dtype=dtype)
    for function in (
        lambda out: ops.combine(G, randn(4, dtype=F64, seed=1), out=out),
        lambda out: ops.align(G, *policy(4, dtype), out=out),
    ):
        dense = torch.empty(100, dtype=dtype)
        function(dense)
        column = torch.full((100, 3), 7.0, dtype=dtype)
        function(column[:, 1])
        assert torch.equal(column[:, 1], dense)
        assert (column[:, [0, 2]] == 7.0).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_rows_more_than_two_to_the_31_elements_apart(dtype):
    stride, P = 2**31 + 17, 1000
    try:
        base = torch.empty(stride + P, dtype=dtype)  # only the pages of the two rows are ever touched
    except RuntimeError:
        pytest.skip("not enough memory to reserve a buffer of 2^31 elements")
    G = base.as_strided((2, P), (stride, 1))
    G.copy_(randn(2, P, dtype=dtype))
    check_gram(CPU, G)
    check_combine(CPU, G)
    check_align(CPU, G)


@pytest.mark.parametrize("impl", [ops, reference], ids=["op", "reference"])
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


# ------------------------------------------------------------------------------------------------ batches


def test_a_batch_equals_its_entries():
    G = randn(11, 6, 700)
    out = torch.empty(11, 700)
    ops.align(G, *policy(6, F32), out=out)
    for b in range(11):
        one = torch.empty(700)
        ops.align(G[b], *policy(6, F32), out=one)
        assert relative(out[b], one) <= 1e-7
        assert relative(ops.gram(G)[b], ops.gram(G[b])) <= 1e-8


# ------------------------------------------------------------------------------------------------ ragged rows


def test_one_tensor_a_row_equals_the_matrix():
    G = randn(7, 3000)
    out, one = torch.empty(3000), torch.empty(3000)
    ops.align(G, *policy(7, F32), out=out)
    M, alpha, _rank = ops.align_rows(list(G), 7, *policy(7, F32), [one])
    assert relative(one, out) <= 1e-7
    assert relative(M, ops.gram(G)) <= 1e-8
    assert relative(alpha, ops.balance(ops.gram(G), *policy(7, F32))[0]) <= 1e-7


def test_all_tasks_channels_last():
    grads = [randn(2, 6, 5, 4, seed=s).contiguous(memory_format=torch.channels_last) for s in range(3)]
    for layout in (torch.contiguous_format, torch.channels_last):
        out = torch.empty(2, 6, 5, 4).contiguous(memory_format=layout)
        ops.combine_rows(grads, torch.ones(3, dtype=F64), [out])
        assert relative(out, sum(g.to(F64) for g in grads)) <= EPS32


# ------------------------------------------------------------------------------------------------ balance and eigh


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
    options = policy(3, F32, scale="median", rtol=1e-3)
    (alpha, lam, rank), (want, want_lam, want_rank) = ops.balance(M, *options), reference.balance(M, *options)
    assert torch.equal(rank, want_rank)
    assert ((lam - want_lam).abs() <= 60 * EPS64 * want_lam[:, :1]).all()
    assert ((alpha - want).abs() <= 150 * EPS64 * 100**2 * want.abs().amax(-1, keepdim=True)).all()


def test_balance_of_a_float32_gram():
    M = reference.gram(randn(6, 50, dtype=F64)).float()
    options = (torch.arange(6.0, dtype=F64), "min", 1e-3, EPS32, "normalized")
    narrow, wide = ops.balance(M, *options), ops.balance(M.to(F64), *options)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


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
                assert ((lam - want).abs() <= (10 + T / 4) * EPS[dtype] * want.abs().amax(-1, keepdim=True)).all()
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
    yield "balance_many", (M, None, *options), {}
    yield "balance_many", (torch.stack([M, 2 * M]).float(), w, *options), {}
    yield "second_pass", (M, torch.tensor(0.1, dtype=F64), True), {}
    yield "second_pass", (torch.stack([M, 2 * M]).float(), torch.tensor([0.1, 1e99], dtype=F64), False), {}
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

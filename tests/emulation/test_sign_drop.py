"""The CUDA kernel of GradDrop on the host against the reference: the same choice in every coordinate."""

import pytest
import torch
from harness import Device
from helpers import BF16, DTYPES, F16, F32, F64, dtype_id, randn, rounded

from fastmtl.ops import reference

DEVICE = Device()
COLUMNS = [1, 12, 0, 17, 64, 4097, 0, 330, 2]
SEED = torch.tensor(-(2**40) + 12345)


def leaks(T):
    return torch.linspace(0, 1, T + 1, dtype=F64)[1:].contiguous()


def check(G, leak=None, offset=0):
    """A wrong choice is off by far more than the rounding that is allowed."""
    expected = torch.empty((*G.shape[:-2], G.shape[-1]), dtype=F64)
    reference.sign_drop(G, SEED, leak, expected)
    got = DEVICE.sign_drop(G, SEED, leak, offset)
    assert rounded(got, expected, 0.0 if leak is None else 1e-15 * G.to(F64).abs().sum(-2))
    return got


def check_rows(grads, T, leak=None):
    K = len(grads) // T
    like = [next(g for g in grads[k::K] if g is not None) for k in range(K)]
    expected = [torch.empty(g.shape, dtype=F64) for g in like]
    reference.sign_drop_rows(grads, T, SEED, leak, expected)
    for got, want in zip(DEVICE.sign_drop_rows(grads, T, SEED, leak), expected, strict=True):
        assert rounded(got, want, 0.0 if leak is None else 1e-13)


def ragged(T, dtypes=(F32,)):
    return [
        None if (2 * t + k) % 5 == 3 and T > 2 else randn(n, dtype=dtypes[k % len(dtypes)], seed=100 * t + k)
        for t in range(T)
        for k, n in enumerate(COLUMNS)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [1, 2, 4, 5, 9])
def test_matrix(order, T, dtype):
    for P in (1, 7, 8, 513, 5003):
        G = randn(T, P, dtype=dtype, seed=T)
        check(G)
        check(G, leaks(T))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_strides(dtype):
    T, P = 3, 1029
    wide = torch.full((T, P + 13), torch.nan, dtype=dtype)  # what lies between rows must not be read
    wide[:, 3 : P + 3] = randn(T, P, dtype=dtype)
    padded = torch.full((T, 1040), torch.nan, dtype=dtype)  # 16 bytes at a time, but for the tail
    padded[:, :P] = wide[:, 3 : P + 3]
    odd = torch.cat([torch.full((1,), torch.nan, dtype=dtype), padded[:, :P].reshape(-1)])[1:].view(T, P)
    results = [check(wide[:, 3 : P + 3]), check(padded[:, :P]), check(odd), check(odd, offset=3)]
    assert all(torch.equal(results[0], got) for got in results[1:])
    check(randn(1, P, dtype=dtype).expand(T, P), leaks(T))


@pytest.mark.parametrize("shape", [(3, 4, 17), (5, 2, 1), (2, 3, 1040), (3, 1, 600), (0, 3, 5), (2, 3, 0)], ids=str)
def test_batches(order, shape):
    for dtype in DTYPES:
        check(randn(*shape, dtype=dtype))
    check(randn(2 * shape[0], *shape[1:])[::2], leaks(shape[1]))


@pytest.mark.parametrize("dtypes", [*((d,) for d in DTYPES), (F32, F64), (F16, BF16, F64, F32)], ids=str)
def test_ragged(order, dtypes):
    """Numbers count over the tensors of all types, in their order; the kernel takes one type after another."""
    for T in (1, 3, 6):
        grads = ragged(T, dtypes)
        check_rows(grads, T)
        check_rows(grads, T, leaks(T))


def test_a_list_of_parts_draws_as_the_whole():
    G = randn(4, 3000)
    whole = DEVICE.sign_drop(G, SEED)
    for sizes in ([3000], [1, 2999], [1000, 0, 515, 1485], [7] * 428 + [4]):
        parts = DEVICE.sign_drop_rows([g for row in G for g in row.split(sizes)], 4, SEED)
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(bad):
    for dtype in DTYPES:
        G = randn(5, 1001, dtype=dtype)
        for p in (3, 1000):
            G[2, p] = bad
        for leak in (None, leaks(5)):
            finite = DEVICE.sign_drop(G, SEED, leak).isfinite()
            assert (~finite).nonzero().flatten().tolist() == [3, 1000]


def test_all_bits_of_the_seed_count():
    G = torch.tensor([[1.0], [-1.0]]).expand(2, 4000).contiguous()
    results = [DEVICE.sign_drop(G, torch.tensor(seed)) for seed in (0, 1, 1 << 32, -1, 1 << 62)]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert 1700 < (a == b).sum() < 2300


def test_launches():
    DEVICE.sign_drop(randn(3, 100), SEED)
    assert DEVICE.launches() == ["sign_drop"]
    DEVICE.sign_drop_rows(ragged(3, (F32, F64)), 3, SEED)
    assert DEVICE.launches() == ["upload", "sign_drop", "sign_drop"]

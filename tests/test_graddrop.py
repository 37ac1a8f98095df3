"""GradDrop: in every coordinate one sign is drawn, by its share, and its gradients are summed."""

import math

import pytest
import torch
from helpers import BF16, DTYPES, EPS, F16, F64, dense, dtype_id, generator, randn
from torch import nn

import fastmtl
from fastmtl import GradDrop

F32 = torch.float32


def parts(G):
    """The sums of the positive and of the negative entries of every coordinate, float64."""
    X = G.to(F64)
    return X.clamp_min(0).sum(-2), X.clamp_max(0).sum(-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [1, 2, 5, 20])
def test_every_coordinate_is_the_sum_of_one_sign(T, dtype):
    G = randn(T, 500, dtype=dtype)
    got = GradDrop(generator(1))(G)
    assert got.dtype is dtype
    assert got.shape == (500,)
    positive, negative = parts(G)
    limit = EPS[dtype] * (positive - negative) * (T if dtype in (F32, F64) else 1)
    is_positive = (got.to(F64) - positive).abs() <= limit
    is_negative = (got.to(F64) - negative).abs() <= limit
    assert (is_positive | is_negative).all()
    if T > 1:
        assert (is_positive & ~is_negative).any()
        assert (is_negative & ~is_positive).any()


def test_coordinates_without_conflict_are_summed():
    G = randn(4, 300)
    assert torch.allclose(GradDrop()(G.abs()), G.abs().sum(0))
    assert torch.allclose(GradDrop()(-G.abs()), -G.abs().sum(0))
    one = randn(1, 300)
    assert torch.equal(GradDrop()(one), one[0])
    assert torch.equal(GradDrop()(torch.zeros(3, 5)), torch.zeros(5))
    signed = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(GradDrop()(signed), signed[0])


@pytest.mark.parametrize(
    "column", [[1.0, -1.0], [3.0, -1.0], [1.0, -9.0], [2.0, 2.0, -1.0], [-0.5, 0.25, -0.25, 1.0], [1e-3, -1e3]]
)
def test_the_frequency_follows_the_sign_purity(column):
    N = 20000
    G = torch.tensor(column)[:, None].expand(-1, N).contiguous()
    got = GradDrop(generator(5))(G)
    probability = 0.5 * (1 + sum(column) / sum(abs(x) for x in column))
    deviation = math.sqrt(probability * (1 - probability) / N)
    assert abs((got > 0).double().mean().item() - probability) <= 4 * deviation


def test_the_mean_over_draws():
    """E[g] = P · positive + (1 - P) · negative, the purity P that of each coordinate."""
    G = randn(5, 40, dtype=F64)
    gen, N = generator(2), 4000
    mean = sum(GradDrop(gen)(G) for _ in range(N)) / N
    positive, negative = parts(G)
    P = positive / (positive - negative)
    deviation = (positive - negative) * (P * (1 - P) / N).sqrt()
    assert ((mean - (P * positive + (1 - P) * negative)).abs() <= 5 * deviation + 1e-9).all()


def test_coordinates_are_drawn_independently():
    G = torch.tensor([[1.0], [-1.0]]).expand(2, 20000).contiguous()
    positive = (GradDrop(generator(3))(G) > 0).double()
    correlation = ((positive[1:] - 0.5) * (positive[:-1] - 0.5)).mean().item() * 4
    assert abs(correlation) <= 4 / math.sqrt(20000)


def test_the_generator_sets_the_draw():
    G = randn(4, 200)
    first = GradDrop(generator(1))(G)
    assert torch.equal(GradDrop(generator(1))(G), first)
    assert not torch.equal(GradDrop(generator(2))(G), first)
    gen = generator(1)
    method = GradDrop(gen)
    assert torch.equal(method(G), first)
    assert not torch.equal(method(G), first)  # it goes on


def test_the_global_generator_is_the_default():
    G = randn(4, 200)
    torch.manual_seed(7)
    first = GradDrop()(G)
    second = GradDrop()(G)
    torch.manual_seed(7)
    assert torch.equal(GradDrop()(G), first)
    assert not torch.equal(second, first)
    state = torch.get_rng_state()
    GradDrop(generator(1))(G)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite(value, dtype):
    """Whichever sign is drawn: a loss scaler has to see it."""
    for seed in range(5):
        G = randn(3, 50, dtype=dtype)
        G[1, 7] = value
        got = GradDrop(generator(seed))(G)
        assert not got[7].isfinite()
        assert got.isfinite().sum() == 49


def test_both_infinities_in_one_coordinate():
    got = GradDrop()(torch.tensor([[torch.inf, 1.0], [-torch.inf, 1.0]]))
    assert not got[0].isfinite()
    assert got[1] == 2.0


@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_half_precision_is_summed_in_float32(dtype):
    """Many small terms beside a large one would be lost in the sum of a half."""
    G = torch.full((201, 30), 2.0**-10, dtype=dtype)
    G[0] = 1.0
    expected = 1.0 + 200 * 2.0**-10
    assert (GradDrop()(G).to(F64) - expected).abs().max() <= EPS[dtype]


def test_ragged_rows_count_missing_gradients_as_zeros():
    rows = [[randn(3, 4, seed=t), None if t == 1 else randn(7, seed=9 + t), None] for t in range(3)]
    full = [[torch.zeros_like(rows[0][k]) if g is None else g for k, g in enumerate(row[:2])] for row in rows]
    got = GradDrop(generator(4))(rows)
    expected = GradDrop(generator(4))(full)
    assert got[2] is None
    assert [g.shape for g in got[:2]] == [(3, 4), (7,)]
    for g, e in zip(got[:2], expected, strict=True):
        assert torch.equal(g, e)
    positive, negative = parts(dense(rows))
    flat = torch.cat([g.reshape(-1) for g in got[:2]]).to(F64)
    nearest = torch.minimum((flat - positive).abs(), (flat - negative).abs())
    assert (nearest <= 1e-6).all()


def test_rows_of_different_dtypes():
    rows = [[randn(5, seed=t), randn(6, dtype=BF16, seed=9 + t)] for t in range(3)]
    got = GradDrop()(rows)
    assert [g.dtype for g in got] == [F32, BF16]


def test_a_batch_is_drawn_entry_by_entry():
    G = randn(3, 4, 60)
    got = GradDrop(generator(1))(G)
    assert got.shape == (3, 60)
    positive, negative = parts(G)
    nearest = torch.minimum((got - positive).abs(), (got - negative).abs())
    assert (nearest <= 1e-5).all()


def test_rows_of_any_stride_are_left_as_they_are():
    G = randn(60, 4).T
    before = G.clone()
    got = GradDrop(generator(1))(G)
    assert torch.equal(got, GradDrop(generator(1))(G.contiguous()))
    assert torch.equal(G, before)


def test_out():
    G, out = randn(3, 10), torch.full((10,), 7.0)
    assert GradDrop(generator(1))(G, out=out) is out
    assert torch.equal(out, GradDrop(generator(1))(G))


def test_backward():
    a, own = nn.Parameter(randn(50)), nn.Parameter(torch.tensor(2.0))
    G = randn(3, 50, seed=1)
    losses = [(a * g).sum() + own * t for t, g in enumerate(G)]
    info = GradDrop(generator(1)).backward(losses, [a])
    assert torch.equal(a.grad, GradDrop(generator(1))(G))
    assert own.grad == 3.0
    assert info.alpha is info.gram is info.eigenvalues is info.rank is None


def test_what_needs_a_gram_is_refused():
    a = nn.Parameter(randn(5))
    losses = [(a * randn(5, seed=t)).sum() for t in range(2)]
    for options in ({"groups": [[a]]}, {"process_group": True, "shared": [a]}):
        with pytest.raises(ValueError, match="expected a method that works on the Gram matrix, got GradDrop"):
            GradDrop().backward(losses, **options)
    with pytest.raises(ValueError, match="global_gram: expected a method that works on the Gram matrix"):
        fastmtl.fan_out(a * 1, 2, GradDrop(), global_gram=True)
    assert a.grad is None


def test_repr():
    assert repr(GradDrop()) == "GradDrop()"

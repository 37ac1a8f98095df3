"""GradDrop: in every coordinate one sign is drawn, by its share, and its gradients are summed."""

import copy
import math
import pickle

import pytest
import torch
from helpers import BF16, DTYPES, EPS, F16, F32, F64, dense, dtype_id, generator, needs_extension, randn, rounded
from torch import library, nn

import fastmtl
from fastmtl import GradDrop, ops
from fastmtl.ops import reference

SEED = torch.tensor(-(2**40) + 12345)


def parts(G):
    """The sums of the positive and of the negative entries of every coordinate, float64."""
    X = G.to(F64)
    return X.clamp_min(0).sum(-2), X.clamp_max(0).sum(-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [1, 2, 5, 20])
def test_every_coordinate_is_the_sum_of_one_sign(T, dtype):
    G = randn(T, 500, dtype=dtype)
    got = GradDrop(generator=generator(1))(G)
    assert got.dtype is dtype
    assert got.shape == (500,)
    positive, negative = parts(G)
    limit = EPS[dtype] * (positive - negative) * (math.sqrt(T) if dtype is F64 else 1)  # that of these sums
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
    for size in (5e-324, 1e-310, 1e308):  # shares of these would be lost to rounding
        extreme = torch.full((2, 1000), 0.0, dtype=F64)
        extreme[0, ::2], extreme[0, 1::2] = size, -size
        assert torch.equal(GradDrop()(extreme), extreme[0])


@pytest.mark.parametrize(
    "column", [[1.0, -1.0], [3.0, -1.0], [1.0, -9.0], [2.0, 2.0, -1.0], [-0.5, 0.25, -0.25, 1.0], [1e-3, -1e3]]
)
def test_the_frequency_follows_the_sign_purity(column):
    N = 20000
    G = torch.tensor(column)[:, None].expand(-1, N).contiguous()
    got = GradDrop(generator=generator(5))(G)
    probability = 0.5 * (1 + sum(column) / sum(abs(x) for x in column))
    deviation = math.sqrt(probability * (1 - probability) / N)
    assert abs((got > 0).double().mean().item() - probability) <= 4 * deviation


def test_the_mean_over_draws():
    """E[g] = P · positive + (1 - P) · negative, the purity P that of each coordinate."""
    G = randn(5, 40, dtype=F64)
    gen, N = generator(2), 4000
    mean = sum(GradDrop(generator=gen)(G) for _ in range(N)) / N
    positive, negative = parts(G)
    P = positive / (positive - negative)
    deviation = (positive - negative) * (P * (1 - P) / N).sqrt()
    assert ((mean - (P * positive + (1 - P) * negative)).abs() <= 5 * deviation + 1e-9).all()


def test_coordinates_are_drawn_independently():
    G = torch.tensor([[1.0], [-1.0]]).expand(2, 20000).contiguous()
    positive = (GradDrop(generator=generator(3))(G) > 0).double()
    for lag in (1, 2, 3, 4, 5, 8, 16, 512, 1024):
        correlation = ((positive[lag:] - 0.5) * (positive[:-lag] - 0.5)).mean().item() * 4
        assert abs(correlation) <= 4.5 / math.sqrt(20000 - lag)


def test_the_generator_sets_the_draw():
    G = randn(4, 200)
    first = GradDrop(generator=generator(1))(G)
    assert torch.equal(GradDrop(generator=generator(1))(G), first)
    assert not torch.equal(GradDrop(generator=generator(2))(G), first)
    gen = generator(1)
    method = GradDrop(generator=gen)
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
    GradDrop(generator=generator(1))(G)
    assert torch.equal(torch.get_rng_state(), state)
    third = GradDrop()(G)
    torch.set_rng_state(state)  # what a checkpoint holds
    assert torch.equal(GradDrop()(G), third)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite(value, dtype):
    """Whichever sign is drawn: a loss scaler has to see it."""
    for seed in range(5):
        G = randn(3, 50, dtype=dtype)
        G[1, 7] = value
        got = GradDrop(generator=generator(seed))(G)
        assert not got[7].isfinite()
        assert got.isfinite().sum() == 49


def test_both_infinities_in_one_coordinate():
    got = GradDrop()(torch.tensor([[torch.inf, 1.0], [-torch.inf, 1.0]]))
    assert not got[0].isfinite()
    assert got[1] == 2.0


@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_half_precision_is_summed_in_float64(dtype):
    """Many small terms beside a large one would be lost in the sum of a half."""
    G = torch.full((201, 30), 2.0**-10, dtype=dtype)
    G[0] = 1.0
    expected = 1.0 + 200 * 2.0**-10
    assert (GradDrop()(G).to(F64) - expected).abs().max() <= EPS[dtype]


def test_ragged_rows_count_missing_gradients_as_zeros():
    rows = [[randn(3, 4, seed=t), None if t == 1 else randn(7, seed=9 + t), None] for t in range(3)]
    full = [[torch.zeros_like(rows[0][k]) if g is None else g for k, g in enumerate(row[:2])] for row in rows]
    got = GradDrop(generator=generator(4))(rows)
    expected = GradDrop(generator=generator(4))(full)
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
    got = GradDrop(generator=generator(1))(G)
    assert got.shape == (3, 60)
    positive, negative = parts(G)
    nearest = torch.minimum((got - positive).abs(), (got - negative).abs())
    assert (nearest <= 1e-5).all()


def test_rows_of_any_stride_are_left_as_they_are():
    G = randn(60, 4).T
    before = G.clone()
    got = GradDrop(generator=generator(1))(G)
    assert torch.equal(got, GradDrop(generator=generator(1))(G.contiguous()))
    assert torch.equal(G, before)


def test_out():
    G, out = randn(3, 10), torch.full((10,), 7.0)
    assert GradDrop(generator=generator(1))(G, out=out) is out
    assert torch.equal(out, GradDrop(generator=generator(1))(G))


def test_backward():
    a, own = nn.Parameter(randn(50)), nn.Parameter(torch.tensor(2.0))
    G = randn(3, 50, seed=1)
    losses = [(a * g).sum() + own * t for t, g in enumerate(G)]
    info = GradDrop(generator=generator(1)).backward(losses, [a])
    assert torch.equal(a.grad, GradDrop(generator=generator(1))(G))
    assert own.grad == 3.0
    assert info.alpha is info.gram is info.eigenvalues is info.rank is None


def test_what_needs_a_gram_is_refused():
    a = nn.Parameter(randn(5))
    losses = [(a * randn(5, seed=t)).sum() for t in range(2)]
    for options in ({"groups": [[a]]}, {"process_group": True, "shared": [a]}):
        with pytest.raises(ValueError, match="expected a method that works on the Gram matrix, got GradDrop"):
            GradDrop().backward(losses, **options)
    with pytest.raises(ValueError, match="process_group: expected a method that works on the Gram matrix"):
        fastmtl.fan_out(a * 1, 2, GradDrop(), process_group=True)
    assert a.grad is None


# ------------------------------------------------------------------------------------------------ leak


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [1, 2, 5, 11])
def test_leak(T, dtype):
    """Of the sign that was not drawn every task keeps its part."""
    G, leak = randn(T, 700, dtype=dtype), torch.linspace(0, 1, T, dtype=F64)
    got = GradDrop(leak=leak, generator=generator(1))(G)
    plain = GradDrop(generator=generator(1))(G)
    X = G.to(F64)
    positive, negative = parts(G)
    up = (plain.to(F64) - positive).abs() < (plain.to(F64) - negative).abs()
    expected = torch.where(up, positive + leak @ X.clamp_max(0), negative + leak @ X.clamp_min(0))
    assert rounded(got, expected, 1e-14 * (positive - negative) + EPS[dtype] / 2 * expected.abs())


def test_one_number_leaks_for_all_tasks():
    G = randn(4, 300)
    expected = GradDrop(leak=[0.25] * 4, generator=generator(1))(G)
    assert torch.equal(GradDrop(leak=0.25, generator=generator(1))(G), expected)
    assert torch.equal(GradDrop(leak=torch.tensor(0.25), generator=generator(1))(G), expected)
    assert torch.equal(GradDrop(leak=torch.full((4,), 0.25), generator=generator(1))(G), expected)
    assert not torch.equal(GradDrop(generator=generator(1))(G), expected)
    for none in (0, 0.0, [0.0] * 4, (0,) * 4):
        assert torch.equal(GradDrop(leak=none, generator=generator(1))(G), GradDrop(generator=generator(1))(G))
    assert (GradDrop(leak=1)(G) - G.sum(0)).abs().max() <= 1e-6
    assert (GradDrop(leak=[1, 1, 1, 1])(G) - G.sum(0)).abs().max() <= 1e-6


def test_leak_on_rows_and_batches():
    G, leak = randn(3, 40), (0.0, 0.5, 1.0)
    whole = GradDrop(leak=leak, generator=generator(1))(G)
    parts_ = GradDrop(leak=leak, generator=generator(1))([list(row.split([13, 27])) for row in G])
    assert torch.equal(torch.cat(parts_), whole)
    batch = GradDrop(leak=leak, generator=generator(1))(torch.stack([G, G]))
    assert torch.equal(batch[0], whole)
    assert not torch.equal(batch[1], whole)  # other random numbers


def test_leak_in_a_copy_and_a_pickle():
    G, method = randn(3, 40), GradDrop(leak=[0.0, 0.5, 1.0])
    expected = GradDrop(leak=[0.0, 0.5, 1.0], generator=generator(1))(G)
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        other.generator = generator(1)
        assert torch.equal(other(G), expected)


def test_errors():
    for wrong in (-0.1, 1.1, [0.5, 2.0], torch.tensor([-1.0])):
        with pytest.raises(ValueError, match=r"leak: expected numbers within \[0, 1\], got"):
            GradDrop(leak=wrong)
    with pytest.raises(ValueError, match="leak: expected finite numbers, got nan"):
        GradDrop(leak=math.nan)
    for wrong in ([], torch.zeros(2, 2), [[0.5]]):
        with pytest.raises(ValueError, match=r"leak: expected one number or shape \[T\], got shape"):
            GradDrop(leak=wrong)
    for wrong in ("half", True, generator(1), [None], ["x"]):
        with pytest.raises(TypeError, match="leak: expected a number, T numbers or None, got"):
            GradDrop(leak=wrong)
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator or None, got int"):
        GradDrop(generator=5)
    method, G = GradDrop(leak=[0.5, 0.5]), randn(3, 4)
    for gradients in (G, torch.stack([G, G]), list(G)):
        with pytest.raises(ValueError, match=r"leak: expected length 3 \(the number of tasks\), got 2"):
            method(gradients)


def test_repr():
    assert repr(GradDrop()) == "GradDrop()"
    assert repr(GradDrop(leak=0.5)) == "GradDrop(leak=0.5)"
    assert repr(GradDrop(leak=[0, 0.5])) == "GradDrop(leak=[0.0, 0.5])"


# ------------------------------------------------------------------------------------------------ ops


def leaks(T):
    return torch.linspace(0, 1, T + 1, dtype=F64)[1:].contiguous()


def check(G, leak=None, out=None):
    """The kernel makes the reference's choice in every coordinate: another one is off by far more than is allowed."""
    shape = (*G.shape[:-2], G.shape[-1])
    expected, out = torch.empty(shape, dtype=F64), torch.empty(shape, dtype=G.dtype) if out is None else out
    reference.sign_drop(G, SEED, leak, expected)
    ops.sign_drop(G, SEED, leak, out)
    assert rounded(out, expected, 0.0 if leak is None else 1e-15 * G.to(F64).abs().sum(-2))
    return out


def check_rows(grads, outs, leak=None):
    expected = [torch.empty(x.shape, dtype=F64) for x in outs]
    T = len(grads) // len(outs)
    reference.sign_drop_rows(grads, T, SEED, leak, expected)
    ops.sign_drop_rows(grads, T, SEED, leak, outs)
    for out, want in zip(outs, expected, strict=True):
        assert rounded(out, want, 0.0 if leak is None else 1e-13)


def test_frozen():
    """What a seed draws is part of the interface: a run that is resumed has to see the same."""
    G, out = torch.tensor([[1.0], [-1.0]]).expand(2, 32), torch.empty(32)
    ops.sign_drop(G, torch.tensor(2026), None, out)
    assert "".join("+-"[int(x < 0)] for x in out) == "+--+-++----------+-+++++--++---+"
    got = GradDrop(generator=generator(7))(G)
    assert "".join("+-"[int(x < 0)] for x in got) == "++-++-++---++---++++---+-++-+-++"


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [1, 2, 5, 6, 11, 40])
def test_op(T, dtype):
    for P in (0, 1, 3, 16, 67, 511, 513, 4099, 40_001):
        G = randn(T, P, dtype=dtype, seed=T)
        check(G)
        check(G, leaks(T))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_op_on_strides(dtype):
    G = randn(6, 2000, dtype=dtype)
    expected = check(G)
    wide = torch.full((6, 2013), torch.nan, dtype=dtype)
    wide[:, 5:2005] = G
    columns = G.T.contiguous().T
    for view in (wide[:, 5:2005], columns):
        for out in (None, torch.empty(2001, dtype=dtype)[1:], torch.empty(2000, 2, dtype=dtype)[:, 0]):
            assert torch.equal(check(view, out=out), expected)
    check(randn(1, 300, dtype=dtype).expand(4, 300), leaks(4))


@needs_extension
@pytest.mark.parametrize(
    "shape", [(3, 4, 17), (5, 2, 1), (300, 3, 40), (2, 3, 100_003), (9, 20, 5000), (0, 3, 5), (2, 3, 0)], ids=str
)
def test_op_on_batches(shape):
    for dtype in DTYPES:
        check(randn(*shape, dtype=dtype))
    check(randn(shape[1], shape[0], shape[2]).transpose(0, 1), leaks(shape[1]))


@needs_extension
@pytest.mark.parametrize("dtypes", [(F32,), (F64,), (F32, BF16), (F16, BF16, F64, F32)], ids=str)
def test_op_on_rows(dtypes):
    shapes = [(1,), (3, 5), (0,), (), (2, 3, 4, 5), (40_001,), (7,)]
    for T in (1, 3, 8):
        grads = [
            None if (t + k) % 4 == 3 and T > 1 else randn(*shape, dtype=dtypes[k % len(dtypes)], seed=10 * t + k)
            for t in range(T)
            for k, shape in enumerate(shapes)
        ]
        outs = [torch.empty(shape, dtype=dtypes[k % len(dtypes)]) for k, shape in enumerate(shapes)]
        check_rows(grads, outs)
        check_rows(grads, outs, leaks(T))
        for t in range(T):
            grads[t * len(shapes) + 3] = None
        check_rows(grads, outs)
        assert outs[3] == 0.0


@needs_extension
def test_op_on_layouts():
    """Numbers go with the order in memory of the first gradient that is there."""
    x = [randn(2, 3, 4, 5, seed=t) for t in range(3)]
    last = [g.contiguous(memory_format=torch.channels_last) for g in x]
    sliced = randn(2, 3, 4, 10)[..., ::2]
    like = [torch.empty_like(x[0]), torch.empty_like(last[0])]
    for grads in (x, last, [last[0], *x[1:]], [x[0], *last[1:]], [None, *last[1:]], [sliced, *last[1:]]):
        for out in like:
            check_rows([g for g in grads for g in (g, randn(9))], [out, torch.empty(9)])


@needs_extension
def test_the_place_in_memory_and_in_a_list_does_not_matter():
    values = randn(6, 30_000)
    whole = check(values)
    for sizes in ([30_000], [1, 29_999], [1000, 0, 515, 28_485], [7] * 4285 + [5]):
        outs = [torch.empty(n) for n in sizes]
        ops.sign_drop_rows([g for row in values for g in row.split(sizes)], 6, SEED, None, outs)
        assert torch.equal(torch.cat(outs), whole)
    for offset in (1, 3, 8):
        buffer = torch.zeros(6 * 30_016 + 16)
        G = buffer[offset:].as_strided((6, 30_000), (30_016, 1))
        G.copy_(values)
        assert torch.equal(check(G), whole)


def test_all_bits_of_the_seed_count():
    G, out = torch.tensor([[1.0], [-1.0]]).expand(2, 4000), torch.empty(4000)
    results = []
    for seed in (0, 1, 1 << 32, -1, 1 << 62):
        ops.sign_drop(G, torch.tensor(seed), None, out)
        results.append(out.clone())
    for i, a in enumerate(results):
        for b in results[:i]:
            assert 1750 < (a == b).sum() < 2250


@needs_extension
def test_op_errors():
    G, out = randn(3, 4), torch.empty(4)
    for seed in (torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor(1, dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="seed: expected one int64 number"):
            ops.sign_drop(G, seed, None, out)
        with pytest.raises(RuntimeError, match="seed: expected one int64 number"):
            ops.sign_drop_rows(list(G), 3, seed, None, [out])
    for leak in (
        torch.zeros(3),
        torch.zeros(2, dtype=F64),
        torch.zeros(3, 1, dtype=F64),
        torch.zeros(6, dtype=F64)[::2],
    ):
        with pytest.raises(RuntimeError, match=r"leak: expected a contiguous float64 tensor of shape \[3\]"):
            ops.sign_drop(G, SEED, leak, out)
    with pytest.raises(RuntimeError, match="out: expected"):
        ops.sign_drop(G, SEED, None, torch.empty(5))


@pytest.mark.parametrize("leak", [None, torch.tensor([0.5, 0.0], dtype=F64)], ids=["none", "leak"])
def test_opcheck(leak):
    library.opcheck(ops.sign_drop, (randn(2, 30), SEED, leak), {"out": torch.empty(30)})
    grads = [randn(3, 2), randn(7), None, randn(7, seed=1)]
    library.opcheck(ops.sign_drop_rows, (grads, 2, SEED, leak, [torch.empty(3, 2), torch.empty(7)]))


@pytest.mark.parametrize("form", ["matrix", "batch", "rows"])
def test_out_bumps_the_version_counter(form):
    G = randn(3, 10)
    out = torch.ones(2, 10) if form == "batch" else torch.ones(10)
    version = out._version
    if form == "rows":
        GradDrop()(list(G), out=[out])
    else:
        GradDrop()(torch.stack([G, G]) if form == "batch" else G, out=out)
    assert out._version > version


def test_compile():
    """The seed is drawn inside of the graph."""
    G, method = randn(3, 90), GradDrop(leak=0.25)
    rows = [list(row.split([40, 50])) for row in G]
    compiled = torch.compile(lambda G, rows: (method(G), method(rows)), fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    got, parts_ = compiled(G, rows)
    torch.manual_seed(3)
    assert torch.equal(got, method(G))
    assert torch.equal(torch.cat(parts_), torch.cat(method(rows)))
    assert not torch.equal(compiled(G, rows)[0], got)

"""Methods that keep something as large as gradients, and the trimmed mean: by the letter of their papers."""

import copy
import math
from collections import Counter

import pytest
import torch
from helpers import BF16, F32, F64, dtype_id, randn, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmtl

T = 4


def steps(n=5, P=30, dtype=F64):
    """Gradients and losses of some steps."""
    for k in range(n):
        yield randn(T, P, dtype=dtype, seed=k) + 0.1, torch.rand(T, dtype=F64, generator=gen(k)) + 0.5


def gen(seed):
    return torch.Generator().manual_seed(seed)


def config(G, w):
    """ConFIG by a pseudo-inverse."""
    units = G / G.norm(dim=1, keepdim=True)
    u = torch.linalg.pinv(units) @ w
    u = u / u.norm()
    return (G @ u).sum() * u


class Naive:
    """Each method as its paper has it, on matrices; MoCo and DB-MTL as LibMTL."""

    def __init__(self):
        self.k, self.y, self.w = 0, 0.0, torch.full((T,), 1 / T, dtype=F64)
        self.m = torch.zeros(T, 30, dtype=F64)
        self.f = self.s = 0.0

    def MoCo(self, G, L):
        self.k += 1
        G = G / G.norm(dim=1, keepdim=True) * L[:, None]
        self.y = self.y - 0.5 / self.k**0.5 * (self.y - G)
        self.w = (self.w - 0.1 / self.k**0.5 * (self.y @ self.y.T) @ self.w).softmax(0)
        return self.w @ self.y

    def DBMTL(self, G, L):
        self.y = 0.9 * self.y + 0.1 * G / L[:, None]
        norms = self.y.norm(dim=1)
        return (norms.max() / norms) @ self.y

    def ExcessMTL(self, G, L):
        self.y = self.y + G.square()
        r = (G.square() / (self.y + 1e-7).sqrt()).sum(1)
        if not self.k:
            self.first = r
        self.k += 1
        exponent = r if self.k == 1 else r / (self.first + 1e-7)
        self.w = self.w * exponent.exp()
        self.w = self.w / self.w.sum()
        return self.w @ G

    def MConFIG(self, G, L):
        self.k += 1
        self.m = 0.9 * self.m + 0.1 * G
        c = config(self.m / (1 - 0.9**self.k), torch.ones(T, dtype=F64))
        f = c * (1 - 0.9**self.k)
        self.s = 0.999 * self.s + 0.001 * ((f - 0.9 * self.f) / 0.1) ** 2
        self.f = f
        return c / ((self.s / (1 - 0.999**self.k)).sqrt() + 1e-8)

    def Bloop(self, G, L):
        m = G[0] if not self.k else self.y
        self.k += 1
        a = G[1:].sum(0)
        g = G[0] + a - (a @ m) / (m @ m) * m
        self.y = 0.99 * m + 0.01 * G[0] if self.k > 1 else G[0]
        return g


KINDS = ["MoCo", "DBMTL", "ExcessMTL", "MConFIG", "Bloop"]
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_the_definition(kind):
    method, naive = getattr(fastmtl, kind)(), Naive()
    for G, L in steps():
        assert relative(method(G, losses=L), getattr(naive, kind)(G, L)) <= 1e-10


@kinds
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=dtype_id)
def test_rows_and_batches_are_matrices(kind, dtype):
    """Parameters of any shape, strides and number, some of which a task does not reach; each matrix on its own."""
    one, rows, batch, other = (getattr(fastmtl, kind)() for _ in range(4))
    for k, (G, L) in enumerate(steps(3, dtype=dtype)):
        G[1, 10:16] = 0
        parts = [[g[:10].reshape(2, 5).T.contiguous().T, None if t == 1 else g[10:16], g[16:]] for t, g in enumerate(G)]
        expected = one(G, losses=L)
        got = torch.cat([x.reshape(-1) for x in rows(parts, losses=L)])
        assert got.dtype is dtype
        assert relative(got, expected.to(F64)) <= (1e-12 if dtype is F64 else 1e-5 if dtype is F32 else 1e-2)
        both = batch(torch.stack([G, 2 * G.flip(1)]), losses=L)
        assert relative(both[0], expected.to(F64)) <= (1e-12 if dtype is F64 else 1e-5 if dtype is F32 else 1e-2)
        flipped = other(2 * G.flip(1), losses=L)
        assert relative(both[1], flipped.to(F64)) <= (1e-12 if dtype is F64 else 1e-5 if dtype is F32 else 1e-2), k


@kinds
def test_many_pieces_take_few_calls(kind):
    """What is kept is moved by an op on rows, a group of pieces at a time; pieces are not concatenated by torch."""
    shapes = [(8, 5), (8,), (3, 1, 2)] * 20
    method, other = getattr(fastmtl, kind)(), getattr(fastmtl, kind)()
    losses = torch.rand(T, generator=gen(1)) + 0.5
    rows = [[randn(*shape, seed=10 * k + t) for k, shape in enumerate(shapes)] for t in range(T)]
    rows[1][4] = rows[1][5] = rows[3][59] = None
    matrix = torch.stack(
        [
            torch.cat([torch.zeros(shapes[k]).flatten() if g is None else g.flatten() for k, g in enumerate(r)])
            for r in rows
        ]
    )
    method(rows, losses=losses), other(matrix, losses=losses)
    calls = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        result = method(rows, losses=losses)
    expected = other(matrix, losses=losses)
    assert relative(torch.cat([g.flatten() for g in result]), expected.double()) <= 1e-5
    assert not any("cat" in name and count > 1 for name, count in calls.items())
    views = ("view", "split", "slice", "select", "empty")
    assert sum(n for name, n in calls.items() if not any(x in name for x in views)) < len(shapes) * T, calls


@kinds
def test_gradients_stay_where_they_are(kind):
    method = getattr(fastmtl, kind)()
    for G, L in steps(2, dtype=F32):
        before = G.clone()
        method(G, losses=L)
        assert torch.equal(G, before)


@kinds
def test_a_non_finite_step_is_none(kind):
    method, other = getattr(fastmtl, kind)(), getattr(fastmtl, kind)()
    for G, L in steps(3):
        method(G, losses=L), other(G, losses=L)
    state = copy.deepcopy(method.state_dict())
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = torch.where(torch.arange(30) == 4, bad, G)
        assert method(broken, losses=L).isnan().all()
        rows = [list(g.split([10, 20])) for g in broken]
        assert all(g.isnan().all() for g in copy.deepcopy(method)(rows, losses=L))
    assert all(torch.equal(method.state_dict()[key], state[key]) for key in state)
    assert torch.equal(method(G, losses=L), other(G, losses=L))


@kinds
def test_an_absent_task_keeps_its_memory(kind):
    """Missing or zero: what is remembered of it stays, and it takes no part (but in M-ConFIG, with its momentum)."""
    missing, zero = getattr(fastmtl, kind)(), getattr(fastmtl, kind)()
    for G, L in steps(3):
        missing(G, losses=L), zero(G, losses=L)
    state = copy.deepcopy(missing.state_dict())
    G[2] = 0
    g = missing([None if t == 2 else [row] for t, row in enumerate(G)], losses=L)[0]
    assert relative(g, zero(G, losses=L)) <= 1e-14
    for key in ("y", "squares", "momenta"):
        if key in state:
            assert torch.equal(missing.state_dict()[key][2], state[key][2])
            assert not torch.equal(missing.state_dict()[key][1], state[key][1])
    if kind == "ExcessMTL":
        assert missing.state_dict()["w"][2] == state["w"][2]
        assert missing.state_dict()["w"].exp().sum() == pytest.approx(state["w"].exp().sum())
    if kind == "MoCo":
        assert missing.state_dict()["w"][2] == state["w"][2]
    nobody = zero(torch.zeros_like(G), losses=L)
    assert nobody.isfinite().all()
    assert kind == "MConFIG" or not nobody.any()


@kinds
def test_a_loss_scaler(kind):
    """The same step whatever the scaler's factor."""
    plain, scaled = getattr(fastmtl, kind)(), getattr(fastmtl, kind)()
    S = 2.0**10
    for G, L in steps(3):
        expected = plain(G, losses=L)
        assert relative(scaled(G * S, losses=L * S, grad_scale=S) / S, expected) <= 1e-12
    for key, value in plain.state_dict().items():
        assert torch.allclose(scaled.state_dict()[key].to(F64), value.to(F64), rtol=1e-10)


@kinds
def test_gradients_of_other_sizes(kind):
    method = getattr(fastmtl, kind)()
    (G, L), *_ = steps(1)
    method(G, losses=L)
    with pytest.raises(ValueError, match=r"expected gradients as in the first step, for \w+ of shape \[.*30\], got"):
        method(G[:, :20], losses=L)
    method.reset()
    method(G[:, :20], losses=L)


def test_one_task_a_step():
    """M-ConFIG: as all at once where each step brings what it brings; zero until every task has had a gradient."""
    method = fastmtl.MConFIG()
    grads = [g for G, _ in steps(2) for g in G]
    m, counts, k = torch.zeros(T, 30, dtype=F64), torch.zeros(T), 0
    f = s = 0.0
    for i, g in enumerate(grads):
        t = i % T
        (got,) = method([[g] if j == t else None for j in range(T)])
        m[t] = 0.9 * m[t] + 0.1 * g
        counts[t] += 1
        if i < T - 1:
            assert not got.any()
            continue
        k += 1
        c = config(m / (1 - 0.9 ** counts[:, None]), torch.ones(T, dtype=F64))
        new = c * (1 - 0.9**k)
        s = 0.999 * s + 0.001 * ((new - 0.9 * f) / 0.1) ** 2
        f = new
        assert relative(got, c / ((s / (1 - 0.999**k)).sqrt() + 1e-8)) <= 1e-6  # 0.9 ** counts is float32


@pytest.mark.parametrize("length", ["projection", "min", "max", "harmonic", "arithmetic", "geometric"])
def test_lengths_of_config(length):
    G = randn(T, 30, dtype=F64) * torch.tensor([1.0, 2.0, 5.0, 0.1], dtype=F64)[:, None]
    norms, plain = G.norm(dim=1), fastmtl.ConFIG()(G)
    u = plain / plain.norm()
    tracked = {
        "min": norms.min(),
        "max": norms.max(),
        "harmonic": T / (1 / norms).sum(),
        "arithmetic": norms.mean(),
        "geometric": norms.log().mean().exp(),
    }
    expected = plain if length == "projection" else tracked[length] * (G @ u / norms).sum() * u
    assert relative(fastmtl.ConFIG(length=length)(G), expected) <= 1e-10
    rows = [G[0], None, *G[1:]]
    (got,) = fastmtl.ConFIG(length=length)([None if g is None else [g] for g in rows])
    assert relative(got, expected) <= 1e-10


@pytest.mark.parametrize("trim", [0, 1, 3])
def test_trimmed_mean_without_absent_tasks(trim):
    G = randn(9, 50, dtype=F64)
    G[4] *= 1e30  # somebody's
    expected = G.sort(0).values[trim : 9 - trim].mean(0)
    assert relative(fastmtl.TrimmedMean(trim=trim)(G), expected) <= 1e-12
    (got,) = fastmtl.TrimmedMean(trim=trim)([None, *([g] for g in G[:5]), None, *([g] for g in G[5:])])
    assert relative(got, expected) <= 1e-12
    few = fastmtl.TrimmedMean(trim=trim)([[G[0]], [G[1]], *([None] * 7)])[0]
    assert relative(few, G[:2].mean(0)) <= 1e-12
    assert not fastmtl.TrimmedMean(trim=trim)(torch.zeros(9, 5)).any()
    huge = torch.full((9, 5), 3e38)  # their sum is no float32
    assert torch.equal(fastmtl.TrimmedMean(trim=trim)(huge), huge[0])


@pytest.mark.parametrize("kind", [*KINDS, "TrimmedMean"])
def test_memory_in_a_training_loop(kind):
    """State is where the method is, moves in training alone, and a copy goes on alike."""
    torch.manual_seed(0)
    encoder, heads = nn.Linear(6, 5), nn.ModuleList(nn.Linear(5, 1) for _ in range(T))
    method = getattr(fastmtl, kind)()
    x = randn(8, 6)

    def step(m):
        h = encoder(x)
        encoder.zero_grad()
        m.backward([head(h).square().mean() for head in heads], shared=encoder)
        return [p.grad.clone() for p in encoder.parameters()]

    step(method)
    step(method)
    other = getattr(fastmtl, kind)()
    other.load_state_dict(method.state_dict())
    assert all(map(torch.equal, step(method), step(other)))
    state = copy.deepcopy(method.state_dict())
    method.eval()
    step(method)
    assert all(torch.equal(method.state_dict()[key], state[key]) for key in state)
    assert method.to("meta") is method
    assert all(x.is_meta for x in method.buffers())


def test_bloop_of_16_bits_is_rounded_once():
    """Where most of the auxiliary gradient is projected out, a rounding before that would be seen."""
    G = torch.stack([randn(400), 9 * randn(400) + 0.5 * randn(400, seed=1)]).to(BF16)
    method = fastmtl.Bloop(rho=0.5)
    method(G + 0.1 * randn(2, 400, seed=2).to(BF16))
    mean = method.mean.double()
    g, a = G.double()
    expected = g + a - (a @ mean) / (mean @ mean) * mean
    assert relative(method(G), expected) <= 2.0**-8
    assert a.norm() > 5 * expected.norm()


class Largest(TorchDispatchMode):
    """The most numbers of a new tensor: of one that is no view of what was there, nor overwritten."""

    def __init__(self, there):
        super().__init__()
        self.there, self.found = {x.untyped_storage().data_ptr() for x in there}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.there:
                self.found = max(self.found, x.numel())
        return result


@kinds
def test_nothing_is_concatenated(kind):
    """A step allocates nothing as large as the gradient of all parameters; M-ConFIG that, once."""
    method, shapes = getattr(fastmtl, kind)(), [(300, 200), (70_000,), (5,)]
    P = sum(math.prod(shape) for shape in shapes)
    rows = [[randn(*shape, seed=7 * t + k) for k, shape in enumerate(shapes)] for t in range(T)]
    out = [torch.empty(shape) for shape in shapes]
    losses = torch.ones(T)
    method(rows, out=out, losses=losses)
    with Largest([*(g for row in rows for g in row), *out, *method.buffers()]) as largest:
        method(rows, out=out, losses=losses)
    assert largest.found <= (P if kind == "MConFIG" else P // 2)

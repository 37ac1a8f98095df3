"""`torch.compile(fullgraph=True)`: no graph break anywhere in the call, and the same numbers as eager."""

import shutil
import warnings

import pytest
import torch
from helpers import BF16, F64, randn

import fastmtl

METHODS = {
    "defaults": fastmtl.AlignedMTL(),
    "options": fastmtl.AlignedMTL(weights=[1.0, 2.0, 3.0], scale="rmse", rtol=1e-3, rank_rule="gram"),
    "sum": fastmtl.AlignedMTL(weights="sum", scale="median"),
}
ROWS = [[randn(3, 4, seed=t), None if t == 1 else randn(7, seed=10 + t)] for t in range(3)]
MIXED = [[randn(3, 4, seed=t), randn(7, dtype=BF16, seed=10 + t), None] for t in range(3)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a is b if a is None else all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_matrix(name):
    m = METHODS[name]
    compiled = torch.compile(lambda G: m(G), fullgraph=True, backend="aot_eager")
    for G in (randn(3, 100), randn(3, 41, dtype=F64), randn(3, 100, dtype=BF16)):
        assert equal(compiled(G), m(G))


@pytest.mark.parametrize("name", METHODS)
def test_batch(name):
    m = METHODS[name]
    G = randn(5, 3, 60)
    assert equal(torch.compile(lambda G: m(G), fullgraph=True, backend="aot_eager")(G), m(G))


@pytest.mark.parametrize("name", METHODS)
def test_rows(name):
    m = METHODS[name]
    compiled = torch.compile(lambda rows: m(rows), fullgraph=True, backend="aot_eager")
    for rows in (ROWS, MIXED, list(randn(3, 20))):
        assert equal(compiled(rows), m(rows))


def test_out():
    m = fastmtl.AlignedMTL()
    G, out = randn(3, 100), torch.empty(100)
    result = torch.compile(lambda G, out: m(G, out=out), fullgraph=True, backend="aot_eager")(G, out)
    assert equal(out, m(G))
    assert equal(result, out)
    outs = [torch.empty(3, 4), torch.empty(7)]
    result = torch.compile(lambda rows, out: m(rows, out=out), fullgraph=True, backend="aot_eager")(ROWS, outs)
    assert equal(outs, m(ROWS))
    assert equal(result, outs)


def test_weighting_and_eigh():
    m = fastmtl.AlignedMTL(weights=[1.0, 2.0, 3.0])
    M = fastmtl.ops.gram(randn(3, 50))
    assert equal(torch.compile(lambda M: m.weighting(M), fullgraph=True, backend="aot_eager")(M), m.weighting(M))
    assert equal(torch.compile(fastmtl.eigh, fullgraph=True, backend="aot_eager")(M), fastmtl.eigh(M))


def test_without_warnings():
    """Dynamo warns of what it traces differently from eager Python: a user could do nothing about it."""
    m = fastmtl.AlignedMTL()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(lambda G, rows: (m(G), m(rows)), fullgraph=True, backend="aot_eager")(randn(3, 100), ROWS)
    assert not [str(w.message) for w in caught if "Dynamo" in str(w.message)]


def test_changing_shapes():
    m = fastmtl.AlignedMTL()
    compiled = torch.compile(lambda G: m(G), fullgraph=True, backend="aot_eager", dynamic=True)
    for P in (2, 17, 100, 1000):
        G = randn(4, P)
        assert equal(compiled(G), m(G))


def test_amid_other_work():
    """Reads what the graph computed before, and what it computes afterwards reads the result."""
    m = fastmtl.AlignedMTL()

    def step(G):
        scaled = G * torch.tensor([1.0, 2.0, 3.0])[:, None]
        g = m(scaled)
        scaled.zero_()
        return g * 2 + scaled.sum(), m(list(G))[0] - g

    G = randn(3, 100)
    assert equal(torch.compile(step, fullgraph=True, backend="aot_eager")(G), step(G))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor():
    m = fastmtl.AlignedMTL()

    def step(G, rows, out):
        m(G * 2.0, out=out)
        return m(G.sin()) + 1.0, m(torch.stack([G, G])), m([[g * 2 for g in row if g is not None][:1] for row in rows])

    G, out, again = randn(3, 100), torch.empty(100), torch.empty(100)
    expected = step(G, ROWS, out)
    got = torch.compile(step, fullgraph=True)(G, ROWS, again)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_compiled_can_be_aligned():
    torch.manual_seed(0)
    trunk, heads = torch.nn.Linear(4, 4), torch.nn.ModuleList([torch.nn.Linear(4, 1) for _ in range(2)])
    x = randn(6, 4)

    def losses(x):
        h = trunk(x).tanh()
        return [head(h).square().mean() for head in heads]

    grads = []
    for f in (losses, torch.compile(losses, backend="aot_eager")):
        trunk.zero_grad()
        heads.zero_grad()
        # The compiled losses are outputs of one graph: passes after the first need it again.
        fastmtl.AlignedMTL().backward(f(x), trunk.parameters())
        grads.append([p.grad.clone() for p in (*trunk.parameters(), *heads.parameters())])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)

"""`torch.compile(fullgraph=True)`: no graph break anywhere in the call, and the same numbers as eager."""

import shutil
import warnings

import pytest
import torch
from helpers import BF16, F64, HEADERS, randn

import fastmtl

METHODS = {
    "defaults": fastmtl.AlignedMTL(),
    "options": fastmtl.AlignedMTL(weights=[1.0, 2.0, 3.0], scale="rmse", rtol=1e-3, rank_rule="gram"),
    "sum": fastmtl.AlignedMTL(weights="sum", scale="median"),
}
COMPILES = HEADERS and (shutil.which("g++") or shutil.which("clang++"))
inductor = pytest.mark.skipif(not COMPILES, reason="inductor needs a C++ compiler and Python's headers (python3-dev)")
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


@inductor
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


# ------------------------------------------------------------------------------------------------ the training API

TASKS = 3
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=inductor),
]


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        nn = torch.nn
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 2) for _ in range(TASKS)])

    def losses(self, hs, y):
        outputs = [head(h) for head, h in zip(self.heads, hs, strict=True)]
        return [5.0**t * torch.nn.functional.mse_loss(output, y[t]) for t, output in enumerate(outputs)]

    def compile_parts(self, **options):
        for part in (self.encoder, *self.heads):
            part.compile(**options)
        return self


def by_fan_out(model, x, y):
    hs = fastmtl.fan_out(model.encoder(x), TASKS, fastmtl.AlignedMTL())
    sum(model.losses(hs, y)).backward()
    return hs.info


def by_backward(model, x, y, **options):
    h = model.encoder(x)
    options = {name: h if value == "h" else value for name, value in options.items()}
    return fastmtl.AlignedMTL().backward(model.losses([h] * TASKS, y), **options)


def assert_trains_alike(step, model, reference_step, batches=(16, 16, 16)):
    """Three steps of an optimizer; from the second step on nothing may be compiled again."""
    reference = Network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, reference)]
    for i, size in enumerate(batches):
        x, y = randn(size, 5, seed=i), randn(TASKS, size, 2, seed=10 + i)
        again = i > 0 and size == batches[0]
        with torch.compiler.set_stance("fail_on_recompile" if again else "default"):
            info = step(model, x, y)
        expected = reference_step(reference, x, y)
        for name in ("alpha", "gram", "eigenvalues", "rank"):
            torch.testing.assert_close(getattr(info, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_fan_out_between_a_compiled_encoder_and_compiled_heads():
    assert_trains_alike(by_fan_out, Network().compile_parts(backend="aot_eager", fullgraph=True), by_fan_out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fan_out_inside(backend):
    """The whole forward is one graph, its backward aggregates, and `info` comes out through buffers."""
    info = fastmtl.Info(TASKS)

    def total(model, x, y, info):
        hs = fastmtl.fan_out(model.encoder(x), TASKS, fastmtl.AlignedMTL(), info=info)
        assert hs.info is info
        return sum(model.losses(hs, y))

    compiled = torch.compile(total, fullgraph=True, backend=backend)

    def step(model, x, y):
        info.alpha.fill_(torch.nan)
        compiled(model, x, y, info).backward()
        return info

    assert_trains_alike(step, Network(), by_fan_out)


def test_fan_out_inside_with_batches_of_several_sizes():
    info = fastmtl.Info(TASKS)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(model, x, y):
        return sum(model.losses(fastmtl.fan_out(model.encoder(x), TASKS, fastmtl.AlignedMTL(), info=info), y))

    def step(model, x, y):
        total(model, x, y).backward()
        return info

    assert_trains_alike(step, Network(), by_fan_out, batches=(16, 7, 16, 5))


def test_backward_through_the_representation_of_a_compiled_encoder():
    """Each compiled graph is passed through once: nothing has to be retained."""

    def step(model, x, y):
        return by_backward(model, x, y, representation="h")

    assert_trains_alike(step, Network().compile_parts(backend="aot_eager"), step)


@pytest.mark.parametrize("options", [{}, {"features": "h"}], ids=["shared", "features"])
def test_several_passes_through_a_compiled_encoder(options):
    def step(model, x, y):
        return by_backward(model, x, y, **options)

    assert_trains_alike(step, Network().compile_parts(backend="aot_eager"), step)


def test_several_passes_after_a_single_one():
    """The first backward decides: after a single pass a compiled graph gives buffers away, unless torch is told."""
    model = Network().compile_parts(backend="aot_eager")
    x, y = randn(16, 5), randn(TASKS, 16, 2)
    by_fan_out(model, x, y)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="donated_buffer=False"):
        by_backward(model, x, y)
    assert all(p.grad is None for p in model.parameters())

    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        by_fan_out(model, x, y)
        model.zero_grad()
        assert_trains_alike(by_backward, model, by_backward)


STATELESS = {
    "MGDA": fastmtl.MGDA,
    "CAGrad": fastmtl.CAGrad,
    "PCGrad": fastmtl.PCGrad,
    "NashMTL": fastmtl.NashMTL,
    "IMTL": fastmtl.IMTL,
    "ConFIG": fastmtl.ConFIG,
    "Krum": fastmtl.Krum,
    "Uniform": fastmtl.Uniform,
    "RLW": fastmtl.RLW,
    "UPGrad": fastmtl.UPGrad,
    "DualProj": fastmtl.DualProj,
    "FairGrad": lambda: fastmtl.FairGrad(fairness=2.0),
    "GradDrop": fastmtl.GradDrop,
}


def _step(method, info):
    w = randn(6, 5, seed=1).requires_grad_()
    x = randn(8, 6, seed=2)

    def losses(w):
        hs = fastmtl.fan_out(torch.tanh(x @ w), 3, method, info=info)
        return sum((10**t * (h - t) ** 2).mean() for t, h in enumerate(hs))

    return w, losses


@pytest.mark.parametrize("name", STATELESS)
def test_fan_out_of_every_method(name):
    results = []
    for compiled in (False, True):
        info = fastmtl.Info(3)
        w, losses = _step(STATELESS[name](), info)
        torch.manual_seed(0)
        (torch.compile(losses, fullgraph=True, backend="aot_eager") if compiled else losses)(w).backward()
        results.append((w.grad, info.alpha))
    (eager, alpha), (traced, traced_alpha) = results
    assert torch.allclose(traced, eager, rtol=1e-5, atol=1e-7)
    assert torch.allclose(traced_alpha, alpha, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("make", "scale"),
    [
        (lambda: fastmtl.MGDA(normalization="loss"), 8.0),
        (fastmtl.NashMTL, 8.0),
        (lambda: fastmtl.FairGrad(fairness=2.0), torch.tensor(8.0)),
    ],
    ids=["losses", "scale", "a tensor as scale"],
)
def test_losses_and_a_scale_inside(make, scale):
    """With a loss scaler the total is multiplied after it was made; a task that is absent is no matter."""

    def run(compiled):
        info = fastmtl.Info(TASKS)
        model, method = Network(), make()

        def total(x, y, scale):
            hs = fastmtl.fan_out(model.encoder(x), TASKS, method, info=info, grad_scale=scale)
            losses = model.losses(hs, y)
            return hs.total([losses[0], None, losses[2]])

        step = torch.compile(total, fullgraph=True, backend="aot_eager") if compiled else total
        for i in range(2):
            model.zero_grad()
            value = step(randn(8, 5, seed=i), randn(TASKS, 8, 2, seed=10 + i), scale)
            (value if scale is None else value * scale).backward()
        return [p.grad for p in model.encoder.parameters()], info.alpha

    (eager, alpha), (traced, traced_alpha) = run(False), run(True)
    torch.testing.assert_close(traced_alpha, alpha, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-6)


def test_losses_that_a_traced_step_was_not_told():
    """The sum in place of `total`: no graph raises there, and no step is taken by weights that are made up."""
    info, method = fastmtl.Info(2), fastmtl.MGDA(normalization="loss")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def summed(w):
        return sum((h * (t + 1)).square().sum() for t, h in enumerate(fastmtl.fan_out(w * 2, 2, method, info=info)))

    w = randn(4).requires_grad_()
    summed(w).backward()
    assert w.grad.isnan().all()
    assert info.alpha.isnan().all()


WAYS = {
    "every": {"every": 2},
    "gramian": {"engine": "gramian"},
    "groups": {},
    "accumulate": {},
    "scaled heads": {"scale_heads": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_other_way_on_compiled_parts(way):
    """Compiled encoder and heads: the same as eager ones, or what does not go says so."""

    def steps(model):
        method, found = fastmtl.AlignedMTL(), []
        for i in range(2):
            model.zero_grad()
            h = model.encoder(randn(16, 5, seed=i))
            losses = model.losses([h] * TASKS, randn(TASKS, 16, 2, seed=10 + i))
            shared = {} if way == "groups" else {"shared": model.encoder}
            if way == "groups":
                shared = {"groups": [model.encoder[0], model.encoder[2]]}
            if way == "accumulate":
                accumulator = method.accumulate(**shared)
                accumulator.add(losses)
                info = accumulator.backward()
            else:
                info = method.backward(losses, **shared, **WAYS[way])
            found.append((info.alpha, [p.grad.clone() for p in model.parameters()]))
        return found

    eager = steps(Network())
    with torch._functorch.config.patch(donated_buffer=False):
        traced = steps(Network().compile_parts(backend="aot_eager"))
    for (alpha, grads), (traced_alpha, traced_grads) in zip(eager, traced, strict=True):
        torch.testing.assert_close(traced_alpha, alpha, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(traced_grads, grads, rtol=1e-4, atol=1e-6)


STATE = [fastmtl.GradVac(), fastmtl.NashMTL(every=2), fastmtl.scalarization.DWA(3)]


@pytest.mark.parametrize("method", STATE, ids=repr)
def test_what_a_traced_step_cannot_do(method):
    def losses(w):
        return sum(h.sum() for h in fastmtl.fan_out(w * 2, 3, method))

    with pytest.raises(Exception, match=r"not available inside torch\.compile"):
        torch.compile(losses, fullgraph=True, backend="aot_eager")(randn(4).requires_grad_())

"""What docs/trust.md promises and no other test shows: threads, forks, transforms, interruptions, odd inputs."""

import ast
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import BF16, F16, F32, F64, dtype_id, flat, needs_extension, randn, relative, rounded
from models import MLP, MTAN, encoded, losses_of
from torch import nn
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jacrev, jvp, vmap

import fastmtl
from fastmtl import ops

ROOT = Path(__file__).parents[1]

# Without state and without random numbers: the same gradients give the same result, whoever asks.
METHODS = {
    "AlignedMTL": fastmtl.AlignedMTL(),
    "AlignedMTL with weights": fastmtl.AlignedMTL(weights=[1.0, 2.0, 3.0]),
    "MGDA": fastmtl.MGDA(),
    "CAGrad": fastmtl.CAGrad(),
    "IMTL": fastmtl.IMTL(),
    "NashMTL": fastmtl.NashMTL(),
    "UPGrad": fastmtl.UPGrad(),
    "DualProj": fastmtl.DualProj(),
    "FairGrad": fastmtl.FairGrad(),
    "ConFIG": fastmtl.ConFIG(),
    "Krum": fastmtl.Krum(),
    "Uniform": fastmtl.Uniform(),
}
every = pytest.mark.parametrize("name", METHODS)


# ------------------------------------------------------------------------------------------------ threads and forks


@every
def test_eight_threads_give_what_one_gives(name):
    method = METHODS[name]
    inputs = [randn(3, P, seed=P) for P in (10, 3000, 40_000, 7, 100_000, 513)]
    grams = [G.double() @ G.double().T for G in inputs]

    def work(i):
        return method(inputs[i % 6]), method([[x] for x in inputs[i % 6]])[0], method.weighting(grams[i % 6])

    expected = [work(i) for i in range(6)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(work, range(96)))
    for i, results in enumerate(got):
        for result, one in zip(results, expected[i % 6], strict=True):
            assert torch.equal(result, one), i


@pytest.mark.parametrize("way", ["shared", "representation", "fan_out"])
def test_eight_threads_train_models_of_their_own(way):
    method = fastmtl.AlignedMTL()  # one for all

    def prepared(seed):
        model = MLP(3)  # here: its initialisation draws from torch's global generator
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p += 0.1 * randn(*p.shape, seed=100 * seed + i)
        return model

    def gradients(model):
        for _ in range(5):
            h = model.encoder(model.x)
            if way == "fan_out":
                hs = fastmtl.fan_out(h, 3, method)
                sum(model.loss(t, hs[t]) for t in range(3)).backward()
            else:
                options = {"shared": model.encoder.parameters()} if way == "shared" else {"representation": h}
                method.backward(losses_of(model, h), **options)
        return [p.grad for p in model.parameters()]

    expected = [gradients(prepared(seed)) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(gradients, [prepared(seed) for seed in range(16)]))
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(script):
    """In a process of its own, so that threads and forks are those of the script alone."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


FORK = """
import multiprocessing, torch, fastmtl
close = lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6)  # the reference's products depend on the threads
torch.set_num_threads(4)
G, M = torch.randn(12, 400_000), torch.randn(8, 20, 30).double()
M = M @ M.mT
methods = fastmtl.AlignedMTL(), fastmtl.MGDA(), fastmtl.UPGrad()
work = lambda: [m(G) for m in methods] + [m.weighting(M) for m in methods] + [fastmtl.GradDrop(leak=1.0)(G)]
expected = work()  # by four threads, which the child does not inherit

def child(connection):
    torch.set_num_threads(1)  # as DataLoader does in its workers
    connection.send([close(a, b) for a, b in zip(work(), expected, strict=True)])

context = multiprocessing.get_context("fork")
here, there = context.Pipe()
process = context.Process(target=child, args=(there,))
process.start()
print(here.poll(60) and all(here.recv()))
process.join(10)
print(process.exitcode)
process.kill()
print(all(close(a, b) for a, b in zip(work(), expected, strict=True)))
"""

WORKERS = """
import torch, fastmtl
close = lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6)
torch.set_num_threads(4)
method = fastmtl.AlignedMTL()

class Gradients(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return method(torch.randn(6, 200_000, generator=torch.Generator().manual_seed(i)))

expected = [Gradients()[i] for i in range(8)]
loader = torch.utils.data.DataLoader(
    Gradients(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
)
for _ in range(2):
    print(all(close(a, b) for a, b in zip(loader, expected, strict=True)))
"""

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="fork is safe on Linux alone")


@needs_fork
def test_a_fork_after_use():
    assert run(FORK) == ["True", "0", "True"]


@needs_fork
def test_data_loader_workers():
    assert run(WORKERS) == ["True", "True"]


# ------------------------------------------------------------------------------------------------ modes and transforms


@every
def test_inference_mode(name):
    method, G = METHODS[name], randn(3, 200)
    M = G.double() @ G.double().T
    expected = method(G), method.weighting(M), method(list(G))[0]
    with torch.inference_mode():
        inside = G.clone()
        assert torch.equal(method(inside), expected[0])
        assert torch.equal(method(G), expected[0])
        assert torch.equal(method(list(inside))[0], expected[2])
        assert torch.equal(method.weighting(M.clone()), expected[1])
        assert torch.equal(method(G, out=torch.empty(200)), expected[0])
    assert torch.equal(method(inside), expected[0])  # what was made inside, outside
    assert torch.equal(method(G), expected[0])  # nothing that the method keeps was made inside


def test_grad_vac_in_inference_mode():
    one, other = fastmtl.GradVac(), fastmtl.GradVac()
    for step in range(4):
        G = randn(3, 50, seed=step)
        torch.manual_seed(step)
        expected = one(G)
        torch.manual_seed(step)
        with torch.inference_mode(step % 2 == 1):
            got = other(G)
        assert torch.equal(got, expected)
    assert torch.equal(one.targets, other.targets)


def test_backward_in_inference_mode_says_that_there_is_no_graph():
    with torch.inference_mode():
        model = MLP()
        with pytest.raises(ValueError, match=r"losses: expected at least one loss that requires grad"):
            fastmtl.AlignedMTL().backward(losses_of(model, model.encoder(model.x)))
        hs = fastmtl.fan_out(model.encoder(model.x), 2, fastmtl.AlignedMTL())
        assert model.loss(1, hs[1]).isfinite()


STEPS = {  # what is passed back, of the model and its representation; and how
    "shared": (losses_of, {}),
    "stacked": (lambda model, h: torch.stack(losses_of(model, h)), {}),
    "gramian": (losses_of, {"engine": "gramian"}),
    "auto": (losses_of, {"engine": "auto"}),
    "examples": (lambda _, h: h.square().sum(1), {"batch_dim": 0}),
    "examples one by one": (lambda _, h: h.square().sum(1).unbind(), {"engine": "auto"}),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", STEPS)
def test_a_step_where_nothing_is_recorded(way, mode):
    """A plain backward may be called there, of a graph that was made before; and so may a step."""
    losses, options = STEPS[way]
    found = []
    for inside in (torch.enable_grad, mode):
        model = MLP(dtype=F64)
        given = losses(model, model.encoder(model.x))
        with inside():
            fastmtl.UPGrad().backward(given, shared=model.encoder, **options)
        found.append(flat([p.grad for p in model.encoder.parameters()]))
    assert torch.equal(*found)


@every
def test_vmap_of_weighting(name):
    G = randn(5, 3, 40, dtype=F64)
    M = G @ G.mT
    got = vmap(METHODS[name].weighting)(M)
    torch.testing.assert_close(got, METHODS[name].weighting(M), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("transform", [vmap, functionalize])
@every
def test_vmap_and_functionalize_of_gradients_are_refused(name, transform):
    """A batch [B, T, P] needs no vmap."""
    G, method = randn(5, 3, 40), METHODS[name]
    where = f"does not work inside torch.func.{transform.__name__}"
    with pytest.raises(NotImplementedError, match=rf"^G: .*{where}"):
        transform(method)(G)
    with pytest.raises(NotImplementedError, match=rf"^G: .*{where}"):
        transform(lambda g: method(g, out=torch.empty(40)))(G)
    with pytest.raises(NotImplementedError, match=rf"^rows\[0\]\[0\]: .*{where}"):
        transform(lambda g: method(list(g))[0])(G)
    assert method(G).shape == (5, 40)


def forward_mode(f, x):
    """The tangent by `forward_ad` itself, as users of torch before `torch.func` have it."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


@pytest.mark.parametrize("derivative", [lambda f, x: jvp(f, (x,), (x,))[1], forward_mode], ids=["jvp", "forward_ad"])
@pytest.mark.parametrize("name", [*METHODS, "GradDrop"])
def test_forward_mode_is_refused(name, derivative):
    method, G = METHODS.get(name, fastmtl.GradDrop()), randn(3, 40)
    with pytest.raises(ValueError, match=r"^G: has a forward-mode tangent, but the aggregation has no derivative"):
        derivative(method, G)
    with pytest.raises(ValueError, match=r"^G: has a forward-mode tangent"):
        derivative(lambda g: method(g, torch.empty(40)), G)
    with pytest.raises(ValueError, match=r"^rows\[0\]\[0\]: has a forward-mode tangent"):
        derivative(lambda g: method(list(g))[0], G)
    if name != "GradDrop":
        with pytest.raises(ValueError, match=r"^M: has a forward-mode tangent, but task weights have no derivative"):
            derivative(method.weighting, G @ G.T)
    assert derivative(lambda g: method(g.detach()).sum() + g.sum(), G) == G.sum()


@pytest.mark.parametrize("via", ["node", "hooks"])
def test_fan_out_where_gradients_would_be_plainly_summed_is_refused(via):
    W, x = randn(4, 4).requires_grad_(), randn(6, 4)
    method = fastmtl.AlignedMTL()

    def loss(x, W=W):
        hs = fastmtl.fan_out(x @ W, 2, method, via=via)
        return hs[0].sum() + hs[1].square().sum()

    for transformed in (vmap(loss), functionalize(loss), lambda x: jvp(loss, (x,), (x,))[0]):
        with pytest.raises(NotImplementedError, match=r"^h: requires grad, but not within this transform"):
            transformed(x)
        with torch.no_grad():  # nothing to lose
            torch.testing.assert_close(transformed(x).sum(), loss(x))
    with pytest.raises(RuntimeError, match=r"autograd.Function with functorch transforms"):
        grad(loss)(x)


@pytest.mark.parametrize("transform", [lambda f: grad(lambda x: f(x).sum()), jacrev], ids=["grad", "jacrev"])
@pytest.mark.parametrize("name", [*METHODS, "GradDrop"])
def test_reverse_mode_is_refused(name, transform):
    method, G = METHODS.get(name, fastmtl.GradDrop()), randn(3, 40)
    with pytest.raises(ValueError, match=r"requires_grad=True, but the aggregation has no derivative"):
        transform(method)(G)
    with pytest.raises(ValueError, match=r"requires_grad=True, but the aggregation has no derivative"):
        transform(lambda g: method(list(g))[0])(G)
    if name != "GradDrop":
        with pytest.raises(ValueError, match=r"M: has requires_grad=True, but task weights have no derivative"):
            transform(method.weighting)(G @ G.T)


def test_training_inside_a_transform_is_refused():
    model, x = nn.Linear(3, 2), randn(4, 3)

    def step(x):
        h = model(x)
        fastmtl.AlignedMTL().backward([h.sum(), h.square().sum()], shared=model.parameters())
        return h.sum()

    with pytest.raises(ValueError, match=r"losses: expected at least one loss that requires grad"):
        vmap(step)(x)
    with pytest.raises(ValueError, match=r"shared: expected parameters that a loss depends on"):
        grad(step)(x[0])
    for via in ("node", "hooks"):

        def total(parameters, via=via):
            h = torch.func.functional_call(model, parameters, (x,))
            hs = fastmtl.fan_out(h, 2, fastmtl.AlignedMTL(), via=via)
            return hs[0].sum() + hs[1].square().sum()

        with pytest.raises(RuntimeError, match=r"functorch transforms"):
            grad(total)(dict(model.named_parameters()))
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------ interruptions


def interrupt():
    """Ctrl-C, also where the tests run in the background of a shell, which has it ignored there."""
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, ignored)


def exhaust():
    raise MemoryError("no room")


class Interrupted(torch.autograd.Function):
    """The identity, in whose backward something happens in the n-th pass."""

    @staticmethod
    def forward(ctx, x, what, passes):
        ctx.what, ctx.passes = what, passes
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.passes[0] -= 1
        if ctx.passes[0] == 0:
            ctx.what()
        return gradient, None, None


faults = pytest.mark.parametrize(
    ("what", "error"), [(interrupt, KeyboardInterrupt), (exhaust, MemoryError)], ids=["interrupt", "memory"]
)
WAYS = {
    "shared": lambda model, h: {"shared": model.encoder.parameters()},
    "default": lambda model, h: {},
    "representation": lambda model, h: {"representation": h},
    "features": lambda model, h: {"features": h},
    "groups": lambda model, h: {"groups": [[p] for p in model.encoder.parameters()]},
}
ways = pytest.mark.parametrize("way", WAYS)


def prepared(model):
    """Every parameter with a gradient and two hooks; what must not change, and what must not be called."""
    fired = []
    for i, p in enumerate(model.parameters()):
        p.grad = randn(*p.shape, seed=i)
        p.register_hook(fired.append)
        p.register_post_accumulate_grad_hook(fired.append)
    return [(p.grad, p.grad.clone(), p.grad._version) for p in model.parameters()], fired


def check_untouched(model, before, fired):
    assert not fired
    for p, (gradient, values, version) in zip(model.parameters(), before, strict=True):
        assert p.grad is gradient
        assert p.grad._version == version
        assert torch.equal(p.grad, values)


def check_next_step(model, way, fired):
    """The step that follows is a step as ever: nothing is left behind, hooks included."""
    for p in model.parameters():
        p.grad = None
    h = model.encoder(model.x)
    fastmtl.MGDA().backward(losses_of(model, h), **WAYS[way](model, h))
    assert len(fired) == 2 * len(list(model.parameters()))
    fresh = type(model)(len(model.heads))
    h = fresh.encoder(fresh.x)
    fastmtl.MGDA().backward(losses_of(fresh, h), **WAYS[way](fresh, h))
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@faults
@ways
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_interrupted_in_the_heads(passes, way, what, error):
    model = MLP(3)
    before, fired = prepared(model)
    h = model.encoder(model.x)
    left = [passes]
    losses = [Interrupted.apply(loss, what, left) for loss in losses_of(model, h)]
    with pytest.raises(error):
        fastmtl.MGDA().backward(losses, **WAYS[way](model, h))
    check_untouched(model, before, fired)
    check_next_step(model, way, fired)


@faults
@ways
@pytest.mark.parametrize("last", [False, True])
def test_interrupted_in_the_encoder(last, way, what, error):
    model = MLP(3)
    before, fired = prepared(model)
    passes = 3 if last and way != "representation" else 1
    h = Interrupted.apply(model.encoder[0](model.x), what, [passes])
    h = model.encoder[1:](h)
    with pytest.raises(error):
        fastmtl.MGDA().backward(losses_of(model, h), **WAYS[way](model, h))
    check_untouched(model, before, fired)
    check_next_step(model, way, fired)


@faults
@ways
def test_interrupted_in_a_tensor_hook(way, what, error):
    model = MLP(3)
    before, fired = prepared(model)
    h = model.encoder(model.x)
    h.register_hook(lambda gradient: what())
    with pytest.raises(error):
        fastmtl.MGDA().backward(losses_of(model, h), **WAYS[way](model, h))
    check_untouched(model, before, fired)
    check_next_step(model, way, fired)


@faults
@ways
@pytest.mark.parametrize("op", ["gram_rows", "mgda", "combine_rows"])
def test_interrupted_in_the_aggregation(op, way, what, error, monkeypatch):
    model = MLP(3)
    before, fired = prepared(model)
    h = model.encoder(model.x)
    with monkeypatch.context() as patch:
        patch.setattr(ops, op, lambda *args: what())
        with pytest.raises(error):
            fastmtl.MGDA().backward(losses_of(model, h), **WAYS[way](model, h))
    check_untouched(model, before, fired)
    check_next_step(model, way, fired)


@faults
def test_interrupted_among_feature_maps(what, error):
    model = MTAN()
    before, fired = prepared(model)
    maps = encoded(model)
    maps = [maps[0], Interrupted.apply(maps[1], what, [1])]
    with pytest.raises(error):
        fastmtl.MGDA().backward(losses_of(model, maps), representation=maps)
    check_untouched(model, before, fired)


@faults
@pytest.mark.parametrize("method", [fastmtl.GradVac(), fastmtl.NashMTL(every=2)], ids=["GradVac", "NashMTL"])
def test_an_interruption_before_the_weights_leaves_the_state(method, what, error):
    method.reset()
    model = MLP(2)
    h = model.encoder(model.x)
    method.backward(losses_of(model, h), model.encoder.parameters())
    state = {name: value.clone() for name, value in method.state_dict().items()}
    assert state
    losses = [Interrupted.apply(loss, what, [1]) for loss in losses_of(model, model.encoder(model.x))]
    with pytest.raises(error):
        method.backward(losses, model.encoder.parameters())
    torch.testing.assert_close(method.state_dict(), state, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ odd inputs


@pytest.mark.parametrize(("dtype", "exponent"), [(F32, -140), (BF16, -128), (F16, -20)], ids=["f32", "bf16", "f16"])
@every
def test_subnormals(name, dtype, exponent):
    """They are numbers like others: the result is that of the same gradients 2^k times as large, rounded once."""
    G = torch.ldexp(randn(3, 500, dtype=F64), torch.tensor(exponent)).to(dtype)
    assert ((G == 0) | (G.abs() < torch.finfo(dtype).tiny)).double().mean() > 0.9
    assert (G != 0).double().mean() > 0.9
    method = fastmtl.NashMTL(max_norm=0) if name == "NashMTL" else METHODS[name]
    large = torch.ldexp(G.to(F64), torch.tensor(-exponent))
    M = large @ large.T
    expected = method.weighting(M, dtype=dtype) @ large
    if name not in ("FairGrad", "NashMTL"):  # whose results have one length, however long the gradients are
        expected = torch.ldexp(expected, torch.tensor(exponent))
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for got in (method(G), method(list(G))[0]):
        assert got.any()
        assert rounded(got, expected, slack=1e-6 * expected.abs() + 1e-6 * step), dtype_id(dtype)


@pytest.mark.parametrize("name", ["AlignedMTL", "MGDA", "UPGrad", "Uniform"])
def test_one_hundred_thousand_tensors(name):
    lengths = [(7 * k) % 5 + 1 for k in range(50_000)]
    G = randn(2, sum(lengths), seed=1)
    rows = [list(row.split(lengths)) for row in G]
    rows[1][123] = None
    G[1, sum(lengths[:123]) : sum(lengths[:124])] = 0
    got = METHODS[name](rows)
    assert [g.numel() for g in got] == lengths
    assert relative(flat(got), METHODS[name](G)) <= 1e-6


@needs_extension  # the reference draws one number after another
def test_grad_drop_of_one_hundred_thousand_tensors():
    G = randn(2, 150_000, seed=1)
    torch.manual_seed(4)
    got = fastmtl.GradDrop(leak=0.5)([list(row.split(3)) for row in G])
    torch.manual_seed(4)
    assert torch.equal(flat(got), flat([fastmtl.GradDrop(leak=0.5)(G)]))


@pytest.mark.parametrize("name", [*METHODS, "GradDrop"])
def test_out_that_overlaps_an_input_is_an_error(name):
    method = METHODS.get(name, fastmtl.GradDrop())
    memory = randn(4000)
    G = memory[:1200].view(3, 400)
    before = memory.clone()
    for start in (0, 400, 801, 1199):
        with pytest.raises(ValueError, match="out: expected memory that does not overlap"):
            method(G, out=memory[start : start + 400])
        with pytest.raises(ValueError, match=r"out\[1\]: expected memory that does not overlap"):
            method([[x[:300], x[300:]] for x in G], out=[memory[2000:2300], memory[start : start + 100]])
    assert torch.equal(memory, before)
    assert torch.equal(method(G.clone(), out=memory[1200:1600]), memory[1200:1600])  # beside them it is none


# ------------------------------------------------------------------------------------------------ no unpickling

UNPICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe_loads(source):
    """The lines that import a module which unpickles, or load with something that may."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.partition(".")[0] in UNPICKLES for name in names):
            yield node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            torch_load = called == "torch.load" and options.get("weights_only") != "True"
            numpy_load = re.fullmatch(r"(np|numpy)\.load", called) and options.get("allow_pickle", "False") != "False"
            if torch_load or numpy_load or called in ("pd.read_pickle", "pandas.read_pickle"):
                yield node.lineno


def test_nothing_unpickles():
    files = [*(ROOT / "fastmtl").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    assert len(files) > 40
    found = {str(path.relative_to(ROOT)): list(unsafe_loads(path.read_text())) for path in files}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("import pickle", True),
        ("from joblib import load", True),
        ("torch.load(f)", True),
        ("torch.load(f, weights_only=False)", True),
        ("torch.load(f, weights_only=True)", False),
        ("np.load(f, allow_pickle=True)", True),
        ("np.load(f)", False),
        ("import json", False),
    ],
)
def test_what_counts_as_unpickling(source, unsafe):
    assert bool(list(unsafe_loads(source))) == unsafe

"""A method of one's own, as docs/your-own-method.md shows it, at every entry that a method has."""

import copy
import datetime
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import F32, F64, flat, randn
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl.info import Info

ROOT = Path(__file__).parents[2]
T = 3
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMESPACE: dict = {"__name__": "your_own_method"}
for _block in BLOCK.finditer((ROOT / "docs" / "your-own-method.md").read_text()):
    if "class Wrong" not in _block[1] and "class " in _block[1]:
        exec(compile(_block[1], "docs/your-own-method.md", "exec"), NAMESPACE)


def towards_sum(M):
    """α_t = <g_t, Σ g> / Σ ‖g‖²."""
    return M.sum(-1) / M.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)


MAKE = {
    "the tutorial's": lambda: NAMESPACE["UnitMean"](),
    "a function": lambda: fastmtl.GramMethod.of(towards_sum),
    "with state": lambda: NAMESPACE["Smooth"](momentum=0.5),
}
methods = pytest.mark.parametrize("name", MAKE)


def weights_of(name, M, before=None):
    """What the method should say of M [T, T], by plain loops; `before` is what the one with state remembers."""
    M = M.double()
    norms = [M[t, t].sqrt() for t in range(len(M))]
    if name == "the tutorial's":
        return torch.stack([1 / (n * len(M)) if n > 0 else n for n in norms])
    if name == "a function":
        return torch.stack([sum(M[t]) for t in range(len(M))]) / sum(n**2 for n in norms)
    shares = torch.stack([1 / n if n > 0 else n for n in norms])
    shares = shares / shares.sum()
    return shares if before is None else 0.5 * before + 0.5 * shares


def close(x, y, rtol=1e-9):
    torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=rtol * y.abs().max().item())


# ------------------------------------------------------------------------------------------------ calls


@methods
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
def test_matrix_batch_and_rows(name, dtype):
    G = randn(4, T, 50, dtype=dtype) * torch.tensor([1.0, 10.0, 0.1])[:, None].to(dtype)
    rtol = {F64: 1e-9, F32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    expected = torch.stack([weights_of(name, g.double() @ g.double().T) @ g.double() for g in G])
    assert MAKE[name]()(G[0]).dtype is dtype
    close(MAKE[name]()(G[0]), expected[0], rtol)
    close(MAKE[name]()(G), expected, rtol)
    close(MAKE[name]()(list(G[1]))[0], expected[1], rtol)
    first, second = MAKE[name]()([[g[:20].reshape(4, 5), g[20:]] for g in G[2]])
    close(torch.cat([first.reshape(-1), second]), expected[2], rtol)
    out = torch.empty(50, dtype=dtype)
    assert MAKE[name]()(G[3], out) is out
    close(out, expected[3], rtol)
    alpha = MAKE[name]().weighting(G[0].double() @ G[0].double().T)
    close(alpha, weights_of(name, G[0].double() @ G[0].double().T))


@methods
def test_missing_rows(name):
    G = randn(T, 50, dtype=F64)
    zeroed = torch.stack([G[0], torch.zeros(50, dtype=F64), G[2]])
    expected = weights_of(name, zeroed @ zeroed.T)
    assert expected[1] == 0
    close(MAKE[name]()(zeroed), expected @ zeroed)
    (result,) = MAKE[name]()([G[0], None, G[2]])
    close(result, expected @ zeroed)
    partly = [[G[0, :20], None], None, [None, G[2, 20:]]]
    whole = torch.zeros(T, 50, dtype=F64)
    whole[0, :20], whole[2, 20:] = G[0, :20], G[2, 20:]
    close(torch.cat(MAKE[name]()(partly)), weights_of(name, whole @ whole.T) @ whole)
    assert MAKE[name]().weighting(torch.zeros(T, T)).eq(0).all()


@methods
def test_gradients_that_are_not_finite(name):
    G = randn(T, 50)
    G[1, 3] = torch.inf
    assert not MAKE[name]()(G).isfinite().any()
    assert MAKE[name]().weighting(G @ G.T).isnan().all()


# ------------------------------------------------------------------------------------------------ training


TARGETS = [randn(16, T, 2, dtype=F64, seed=50 + i) for i in range(2)]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(T))
        self.double()

    def losses(self, hs, i=0, x=None):
        y = TARGETS[i] if x is None else TARGETS[i][x]
        return [
            10.0**t * (head(h) - y[:, t]).square().mean()
            for t, (head, h) in enumerate(zip(self.heads, hs, strict=True))
        ]


def data(i=0):
    return randn(16, 6, dtype=F64, seed=10 + i)


def truth(model, name, at, i=0, before=None):
    """The encoder's update, by plain autograd: aggregated at its parameters, or at the representation."""
    h = model.encoder(data(i))
    losses, parameters = model.losses([h] * T, i), list(model.encoder.parameters())
    cut = parameters if at == "parameters" else [h]
    G = torch.stack([flat(torch.autograd.grad(loss, cut, retain_graph=True)) for loss in losses])
    alpha = weights_of(name, G @ G.T, before)
    if at == "parameters":
        return alpha @ G, alpha
    return flat(torch.autograd.grad(h, parameters, (alpha @ G).view_as(h))), alpha


def own(model, i=0):
    h = model.encoder(data(i))
    return flat(torch.autograd.grad(sum(model.losses([h] * T, i)), list(model.heads.parameters())))


def updates(model):
    gradients = [[p.grad for p in part.parameters() if p.grad is not None] for part in (model.encoder, model.heads)]
    return [flat(part) for part in gradients]


EXACT = {
    "shared": lambda h, model: {"shared": model.encoder},
    "found": lambda h, model: {},
    "features": lambda h, model: {"features": h, "shared": model.encoder.parameters()},
    "batched": lambda h, model: {"features": h, "batched": True},
    "gramian": lambda h, model: {"shared": model.encoder, "engine": "gramian"},
    "auto": lambda h, model: {"shared": model.encoder, "engine": "auto"},
}


@methods
@pytest.mark.parametrize("path", EXACT)
def test_backward_is_exact(name, path):
    model, method, before = Model(), MAKE[name](), None
    for i in range(2):
        model.zero_grad()
        h = model.encoder(data(i))
        info = method.backward(model.losses([h] * T, i), **EXACT[path](h, model))
        update, alpha = truth(model, name, "parameters", i, before)
        close(info.alpha, alpha)
        close(updates(model)[0], update)
        close(updates(model)[1], own(model, i))
        before = alpha


@methods
def test_scaled_heads(name):
    model = Model()
    info = MAKE[name]().backward(model.losses([model.encoder(data())] * T), model.encoder, scale_heads=True)
    expected = own(model).reshape(T, -1) * info.alpha[:, None]
    close(updates(model)[1], expected.reshape(-1))


@methods
def test_groups(name):
    model = Model()
    parts = [list(model.encoder[0].parameters()), list(model.encoder[2].parameters())]
    losses = model.losses([model.encoder(data())] * T)
    for n, part in enumerate(parts):
        G = torch.stack([flat(torch.autograd.grad(loss, part, retain_graph=True)) for loss in losses])
        parts[n] = part, weights_of(name, G @ G.T) @ G
    MAKE[name]().backward(losses, groups=[part for part, _ in parts])
    for part, update in parts:
        close(flat([p.grad for p in part]), update)


def through_representation(model, method, i):
    h = model.encoder(data(i))
    return method.backward(model.losses([h] * T, i), representation=h)


def by_aliases(via):
    def step(model, method, i):
        hs = fastmtl.fan_out(model.encoder(data(i)), T, method, via=via)
        hs.total(model.losses(hs, i)).backward()
        return hs.info

    return step


def by_hooks_on_modules(model, method, i):
    with fastmtl.attach(model.encoder, model.heads, method) as handle:
        h = model.encoder(data(i))
        handle.total(model.losses([h] * T, i)).backward()
        return handle.info


def checkpointed(model, method, i):
    h = checkpoint(model.encoder, data(i), use_reentrant=False)
    hs = fastmtl.fan_out(h, T, method)
    losses = model.losses(hs, i)
    hs.total([checkpoint(lambda x=x: x * 1.0, use_reentrant=False) for x in losses]).backward()
    return hs.info


UPPER = {
    "representation": through_representation,
    "node": by_aliases("node"),
    "hooks": by_aliases("hooks"),
    "attach": by_hooks_on_modules,
    "checkpoint": checkpointed,
}


@methods
@pytest.mark.parametrize("path", UPPER)
def test_the_upper_bound(name, path):
    model, method, monitor, before = Model(), MAKE[name](), fastmtl.Monitor(), None
    for i in range(2):
        model.zero_grad()
        info = UPPER[path](model, method, i)
        update, alpha = truth(model, name, "representation", i, before)
        close(info.alpha, alpha)
        close(updates(model)[0], update)
        close(updates(model)[1], own(model, i))
        monitor.record(info)
        before = alpha
    assert monitor.history["alpha"].shape == (2, T)
    assert monitor.history["alpha"][1] == pytest.approx(alpha.numpy(), rel=1e-9)
    assert info.condition_number.item() == pytest.approx(fastmtl.diagnostics.condition_number(info).item())
    assert info.as_dict()["alpha/1"] == pytest.approx(alpha[1].item(), rel=1e-9)
    assert fastmtl.diagnostics.total_norm(info).item() == pytest.approx((alpha @ info.gram @ alpha).sqrt().item())


@methods
@pytest.mark.parametrize("at", ["parameters", "representation", "node"])
def test_a_loss_that_is_missing(name, at):
    model, method = Model(), MAKE[name]()
    h = model.encoder(data())
    hs = fastmtl.fan_out(h, T, method) if at == "node" else [h] * T
    losses = model.losses(hs)
    cut = list(model.encoder.parameters()) if at == "parameters" else [h]
    G = torch.stack([flat(torch.autograd.grad(loss, cut, retain_graph=True)) for loss in losses])
    G[1] = 0
    alpha = weights_of(name, G @ G.T)
    losses[1] = None
    if at == "node":
        hs.total(losses).backward()
        info = hs.info
    else:
        info = method.backward(losses, **({"shared": model.encoder} if at == "parameters" else {"representation": h}))
    close(info.alpha, alpha)
    assert info.alpha[1] == 0
    update = alpha @ G
    if at != "parameters":
        again = model.encoder(data())
        update = flat(torch.autograd.grad(again, list(model.encoder.parameters()), update.view_as(again)))
    close(updates(model)[0], update)
    assert all(p.grad is None for p in model.heads[1].parameters())


# ------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("name", [name for name in MAKE if name != "with state"])
def test_compiled(name):
    method, G = MAKE[name](), randn(T, 40)
    whole = torch.compile(lambda x: method(x), fullgraph=True, backend="aot_eager")
    close(whole(G), method(G), 1e-6)
    model, twin = Model(), Model()
    info = fastmtl.Info(T)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x):
        hs = fastmtl.fan_out(model.encoder(x), T, method, info=info)
        return hs.total(model.losses(hs))

    loss(data()).backward()
    update, alpha = truth(twin, name, "representation")
    close(info.alpha, alpha)
    close(updates(model)[0], update)


def test_a_method_with_state_is_not_compiled_into_a_fan_out():
    model, method = Model(), MAKE["with state"]()

    @torch.compile(fullgraph=True, backend="eager")
    def loss(x):
        hs = fastmtl.fan_out(model.encoder(x), T, method)
        return hs.total(model.losses(hs))

    with pytest.raises(Exception, match="methods with state"):
        loss(data())


# ------------------------------------------------------------------------------------------------ two processes


def in_a_world(rank, size, folder, name):
    """Gradients and Gram of the whole batch from two halves of it."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{name.replace(' ', '-')}"
    dist.init_process_group("gloo", store, datetime.timedelta(seconds=100), size, rank)
    half = slice(8 * rank, 8 * rank + 8)
    for at in ("parameters", "representation"):
        model, method, before = Model(), MAKE[name](), None
        for i in range(2):
            model.zero_grad()
            h = model.encoder(data(i)[half])
            if at == "parameters":
                info = method.backward(model.losses([h] * T, i, half), model.encoder.parameters(), process_group=True)
            else:
                hs = fastmtl.fan_out(h, T, method, process_group=True)
                hs.total(model.losses(hs, i, half)).backward()
                info = hs.info
                for p in model.encoder.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= size
            update, alpha = truth(model, name, at, i, before)
            close(info.alpha, alpha)
            close(updates(model)[0], update)
            before = alpha
    dist.destroy_process_group()


@methods
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_processes(name, tmp_path):
    torch.multiprocessing.start_processes(in_a_world, (2, str(tmp_path), name), nprocs=2, start_method="spawn")


# ------------------------------------------------------------------------------------------------ what is wrong with it


def returning(value):
    return fastmtl.GramMethod.of(lambda M: value(M), name="mine")


WRONG = {
    "a list": (lambda M: [1.0] * T, TypeError, r"a floating tensor, got list"),
    "nothing": (lambda M: None, TypeError, r"got NoneType"),
    "integers": (lambda M: torch.ones(T, dtype=torch.int64), TypeError, r"got int64 tensor of shape \[3\]"),
    "complex numbers": (lambda M: M[0] * 1j, TypeError, r"got complex128 tensor"),
    "a matrix": (lambda M: M, ValueError, r"of shape \[3\] on cpu for M of shape \[3, 3\], .*got float64 .*\[3, 3\]"),
    "a number": (lambda M: M.sum(), ValueError, r"got float64 tensor of shape \[\]"),
    "elsewhere": (lambda M: M[0].to("meta"), ValueError, r"got float64 tensor of shape \[3\] on meta"),
    "a derivative": (lambda M: M[0] * torch.ones((), requires_grad=True), ValueError, "detached.*requires_grad=True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_comes_back_is_checked(case):
    value, error, message = WRONG[case]
    method, G = returning(value), randn(T, 9)
    for call in (lambda: method(G), lambda: method([g for g in G]), lambda: method.weighting(G @ G.T)):  # noqa: C416
        with pytest.raises(error, match=rf"GramMethod.of\(mine\).weigh: expected task weights .*{message}"):
            call()
    model = Model()
    with pytest.raises(error, match=r"weigh: expected task weights"):
        method.backward(model.losses([model.encoder(data())] * T), model.encoder)
    assert all(p.grad is None for p in model.parameters())


def test_what_solve_returns_is_checked():
    class ForOneMatrix(fastmtl.GramMethod):
        def solve(self, M, dtype, context=None):
            return Info.of(M.new_ones(M.shape[-1]), M)

    method, model = ForOneMatrix(), Model()
    method(randn(T, 9))
    expected = rf"ForOneMatrix\(\).solve: expected float64 task weights of shape \[2, {T}\] .*got .* shape \[{T}\]"
    with pytest.raises(ValueError, match=expected):
        method(randn(2, T, 9))
    with pytest.raises(ValueError, match=expected):
        method.weighting(torch.eye(T).expand(2, T, T))
    losses = model.losses([model.encoder(data())] * T)
    with pytest.raises(ValueError, match=expected):
        method.backward(losses, groups=[[p] for p in list(model.encoder.parameters())[:2]])
    assert all(p.grad is None for p in model.parameters())


def test_float32_weights_and_writing_into_M_do_no_harm():
    def weigh(M):
        M.zero_()
        return torch.arange(1.0, M.shape[-1] + 1).expand(M.shape[:-1])

    G = randn(T, 9, dtype=F64)
    method = fastmtl.GramMethod.of(weigh)
    close(method(G), torch.tensor([1.0, 2.0, 3.0], dtype=F64) @ G)
    info = method.backward([(g * p).sum() for p in [nn.Parameter(G[0].clone())] for g in G])
    close(info.gram, G @ G.T)


def test_what_has_to_be_written_is_said():
    class Nothing(fastmtl.GramMethod):
        pass

    class Bare(fastmtl.Method):
        pass

    G = randn(T, 9)
    with pytest.raises(NotImplementedError, match=r"Nothing: expected it to define weigh\(self, M\)"):
        Nothing()(G)
    with pytest.raises(NotImplementedError, match=r"Bare: expected it to define aggregate_matrix\("):
        Bare()(G)
    with pytest.raises(NotImplementedError, match=r"Bare: expected it to define aggregate_list\("):
        Bare()(list(G))
    for f in (3, None, fastmtl.MGDA, fastmtl.MGDA()):
        with pytest.raises(TypeError, match="f: expected a function of a Gram matrix, got"):
            fastmtl.GramMethod.of(f)


# ------------------------------------------------------------------------------------------------ copies and state


def test_a_function_is_a_method_like_others():
    method = fastmtl.GramMethod.of(towards_sum)
    assert repr(method) == "GramMethod.of(towards_sum)"
    assert repr(fastmtl.GramMethod.of(torch.nn.Linear(T, 1))) == "GramMethod.of(Linear)"
    assert not method.state_dict()
    G = randn(T, 9)
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert torch.equal(other(G), method(G))
        assert repr(other) == repr(method)


def test_a_module_is_part_of_the_method():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=F64))

        def forward(self, M):
            return (self.scale * M.diagonal(dim1=-2, dim2=-1)).detach()

    method = fastmtl.GramMethod.of(Learned())
    assert list(method.state_dict()) == ["f.scale"]
    assert len(list(method.parameters())) == 1
    close(method.weighting(torch.eye(T)), torch.full((T,), 2.0))


def test_the_state_is_saved_restored_and_left_alone_in_evaluation():
    Ms = [randn(T, 9, dtype=F64, seed=s) @ randn(T, 9, dtype=F64, seed=s).T for s in range(3)]
    method, twin = MAKE["with state"](), MAKE["with state"]()
    first = method.weighting(Ms[0])
    twin.load_state_dict(method.state_dict())
    second = method.weighting(Ms[1])
    assert torch.equal(twin.weighting(Ms[1]), second)
    method.eval()
    assert torch.equal(method.weighting(Ms[2]), method.weighting(Ms[2]))
    assert torch.equal(method.mean, second)
    method.train().reset()
    assert method.mean is None
    assert torch.equal(method.weighting(Ms[0]), first)
    method.load_state_dict({})
    assert method.mean is None
    assert torch.equal(copy.deepcopy(twin).mean, twin.mean)


@pytest.mark.parametrize("make", [lambda: fastmtl.GradVac(), lambda: fastmtl.NashMTL(every=3)])
def test_the_state_of_built_in_methods_stays_in_evaluation(make):
    Ms = [randn(T, 9, dtype=F64, seed=s) @ randn(T, 9, dtype=F64, seed=s).T for s in range(4)]
    method = make().eval()
    method.weighting(Ms[0])
    assert not method.state_dict()
    method.train()
    for M in Ms[:2]:
        method.weighting(M)
    before = copy.deepcopy(method.state_dict())
    method.eval()
    for M in Ms[2:]:
        method.weighting(M)
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key])

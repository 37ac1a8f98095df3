"""What holds for every method: it trains, resumes bit for bit, and keeps the conventions that all share."""

import copy
import inspect
import io
import re
from pathlib import Path

import pytest
import torch
from helpers import F64, generator, randn
from torch import nn

import fastmtl
from fastmtl import catalog, methods, scalarization
from fastmtl.methods.base import GramMethod

T = 4
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"

# name -> a new instance for T tasks
GRAM = {
    "AlignedMTL": fastmtl.AlignedMTL,
    "AlignedMTL median": lambda: fastmtl.AlignedMTL(weights=[1.0, 2.0, 3.0, 4.0], scale="median"),
    "MGDA": fastmtl.MGDA,
    "MGDA l2": lambda: fastmtl.MGDA(normalization="l2"),
    "MGDA loss": lambda: fastmtl.MGDA(normalization="loss"),
    "MGDA loss+": lambda: fastmtl.MGDA(normalization="loss+"),
    "PCGrad": fastmtl.PCGrad,
    "PCGrad step": lambda: fastmtl.PCGrad(order="step", reduction="mean"),
    "GradVac": fastmtl.GradVac,
    "CAGrad": fastmtl.CAGrad,
    "CAGrad 0.4": lambda: fastmtl.CAGrad(c=0.4, rescale=0),
    "IMTL": fastmtl.IMTL,
    "NashMTL": fastmtl.NashMTL,
    "NashMTL every 3": lambda: fastmtl.NashMTL(every=3),
    "NashMTL plain": lambda: fastmtl.NashMTL(max_norm=0),
    "Uniform": fastmtl.Uniform,
    "Uniform sum": lambda: fastmtl.Uniform(weights="sum"),
    "RLW": fastmtl.RLW,
    "UPGrad": fastmtl.UPGrad,
    "UPGrad weights": lambda: fastmtl.UPGrad(weights=[4.0, 3.0, 2.0, 1.0]),
    "DualProj": fastmtl.DualProj,
    "FairGrad": fastmtl.FairGrad,
    "FairGrad 2": lambda: fastmtl.FairGrad(fairness=2.0),
    "FairGrad 0": lambda: fastmtl.FairGrad(fairness=0.0),
    "ConFIG": fastmtl.ConFIG,
    "ConFIG weights": lambda: fastmtl.ConFIG(weights=[1.0, 2.0, 1.0, 2.0]),
    "Krum": lambda: fastmtl.Krum(byzantine=1),
    "Krum 2": lambda: fastmtl.Krum(byzantine=0, selected=2, squared=False),
    "ConFIG length": lambda: fastmtl.ConFIG(length="geometric"),
    "PCD": lambda: fastmtl.PCD(eps=0.0),
    "PCD taus": lambda: fastmtl.PCD(tau=[0.1, 0.5, 0.0], beta=0.5, eps=0.0),
    "SDMGrad": fastmtl.SDMGrad,
    "SDMGrad weights": lambda: fastmtl.SDMGrad(weights=[0.4, 0.3, 0.2, 0.1], iterations=3),
    "MoDo": fastmtl.MoDo,
    "CRMOGM": fastmtl.CRMOGM,
    "CRMOGM UPGrad": lambda: fastmtl.CRMOGM(method=fastmtl.UPGrad(), momentum=0.5),
}
# Those that keep something as large as gradients, and those that look at every coordinate.
MEMORY = {
    "ExcessMTL": fastmtl.ExcessMTL,
    "ExcessMTL warm-up": lambda: fastmtl.ExcessMTL(warmup=2),
    "MoCo": fastmtl.MoCo,
    "MoCo plain": lambda: fastmtl.MoCo(normalize=False, rho=0.1),
    "DBMTL": fastmtl.DBMTL,
    "DBMTL plain": lambda: fastmtl.DBMTL(log=False, beta=0.5, beta_decay=0.5),
    "MConFIG": fastmtl.MConFIG,
    "Bloop": fastmtl.Bloop,
}
GRADIENTS = {
    **GRAM,
    **MEMORY,
    "GradDrop": fastmtl.GradDrop,
    "GradDrop leak": lambda: fastmtl.GradDrop(leak=[0.1, 0.2, 0.3, 0.4]),
    "TrimmedMean": fastmtl.TrimmedMean,
}
LOSSES = {
    "LS": scalarization.LS,
    "RLW": scalarization.RLW,
    "DWA": lambda: scalarization.DWA(T, window=2),
    "Uncertainty": lambda: scalarization.Uncertainty(T),
    "GLS": scalarization.GLS,
    "STCH": lambda: scalarization.STCH(mu=100.0),  # with a small mu one task alone trains
    "FAMO": lambda: scalarization.FAMO(T),
    "IMTLL": lambda: scalarization.IMTLL(T),
    "GradNorm": lambda: scalarization.GradNorm(T),
    "COSMOS": scalarization.COSMOS,
    "PBI": lambda: scalarization.PBI(theta=0.1),  # with a large theta the smaller losses rise
    "GO4Align": lambda: scalarization.GO4Align(T),
    "SoftAdapt": lambda: scalarization.SoftAdapt(T),
    "ReLoBRaLo": lambda: scalarization.ReLoBRaLo(T),
    "NTK": lambda: scalarization.NTK(T),
    "PiKE": lambda: scalarization.PiKE(T),
}
# Of whose task the first is another than the rest.
RANKED = {"PCD", "PCD taus"}
DRAWS = {"PCGrad", "PCGrad step", "GradVac", "RLW"}
gram_methods = pytest.mark.parametrize("name", GRAM)


def step_losses(name):
    return {"losses": torch.tensor([1.0, 2.0, 0.5, 4.0])} if "loss" in name else {}


def weigh(name, M, seed=0, method=None, **options):
    torch.manual_seed(seed)
    return (method or GRAM[name]()).weighting(M, **step_losses(name), **options)


def test_every_class_is_tried():
    everything = {
        kind for module in (methods, scalarization) for kind in vars(module).values() if inspect.isclass(kind)
    }
    tried = {type(make()) for make in [*GRADIENTS.values(), *LOSSES.values()]}
    assert tried == everything - {scalarization.Scalarization}
    assert {kind.__name__ for kind in everything if kind.__module__.startswith("fastmtl.methods")} <= set(
        fastmtl.__all__
    )


# ------------------------------------------------------------------------------------------------ training


class Run:
    """A model, an optimizer and a method, and the way in which a step is made."""

    def __init__(self, make, way):
        torch.manual_seed(7)
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(T))
        self.method = make()
        own = list(self.method.parameters())
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.heads.parameters(), *own], lr=1e-2)
        self.way = way

    def losses(self, hs, i):
        targets = randn(T, 16, 2, seed=100 + i)
        return [
            (10**t * (head(h) - y) ** 2).mean()
            for t, (head, h, y) in enumerate(zip(self.heads, hs, targets, strict=True))
        ]

    def step(self, i):
        x, method = randn(16, 6, seed=i), self.method
        self.optimizer.zero_grad()
        h = self.encoder(x)
        if self.way in ("node", "hooks"):
            hs = fastmtl.fan_out(h, T, method, via=self.way)
            hs.total(self.losses(hs, i)).backward()
        elif self.way == "representation":
            method.backward(self.losses([h] * T, i), representation=h)
        elif self.way == "layer":
            method.backward(self.losses([h] * T, i), self.encoder)
        elif self.way == "losses":
            method.backward(self.losses([h] * T, i))
        else:
            method.backward(self.losses([h] * T, i), shared=self.encoder.parameters())
        self.optimizer.step()
        method.after_step(lambda: self.losses([self.encoder(x)] * T, i))

    def parameters(self):
        return [p.detach().clone() for p in [*self.encoder.parameters(), *self.heads.parameters()]]

    def save(self):
        state = {
            "model": [self.encoder.state_dict(), self.heads.state_dict()],
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
        }
        file = io.BytesIO()
        torch.save({**state, "rng": torch.get_rng_state()}, file)
        return file.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.encoder.load_state_dict(state["model"][0])
        self.heads.load_state_dict(state["model"][1])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        torch.set_rng_state(state["rng"])


WAYS = [(name, way) for name in GRADIENTS for way in ("shared", "representation", "node", "hooks")]
WAYS += [(name, "layer" if name == "GradNorm" else "losses") for name in LOSSES]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_trains_and_resumes_bit_for_bit(name, way):
    make = GRADIENTS[name] if way in ("shared", "representation", "node", "hooks") else LOSSES[name]
    run = Run(make, way)
    before = run.parameters()
    for i in range(4):
        run.step(i)
    saved = run.save()
    for i in range(4, 9):
        run.step(i)
    after = run.parameters()
    assert all(p.isfinite().all() for p in after)
    assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    resumed = Run(make, way)
    resumed.load(saved)
    for i in range(4, 9):
        resumed.step(i)
    assert all(torch.equal(p, q) for p, q in zip(after, resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_ways_through_a_representation_agree(name):
    runs = []
    for way in ("representation", "node", "hooks"):
        run = Run(GRADIENTS[name], way)
        torch.manual_seed(3)
        for i in range(3):
            run.step(i)
        runs.append(run.parameters())
    for other in runs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("name", GRADIENTS)
def test_reset_begins_anew(name):
    method = GRADIENTS[name]()
    if not method.on_gram:
        Gs = [randn(T, 30, seed=s, dtype=F64) for s in range(5)]
        losses = torch.rand(5, T, dtype=F64) + 0.5
        first = [method(G, losses=L) for G, L in zip(Gs, losses, strict=True)]
        again = [method(G, losses=L) for G, L in zip(Gs, losses, strict=True)]
        method.reset()
        assert not method.state_dict()
        if name in MEMORY:
            anew = [method(G, losses=L) for G, L in zip(Gs, losses, strict=True)]
            assert all(torch.equal(x, y) for x, y in zip(first, anew, strict=True))
            assert any(not torch.equal(x, y) for x, y in zip(first, again, strict=True))
        return
    Ms = [randn(T, 30, seed=s, dtype=F64) @ randn(T, 30, seed=s, dtype=F64).T for s in range(5)]
    first = [weigh(name, M, method=method) for M in Ms]
    again = [weigh(name, M, method=method) for M in Ms]
    method.reset()
    assert not method.state_dict()
    anew = [weigh(name, M, method=method) for M in Ms]
    assert all(torch.equal(x, y) for x, y in zip(first, anew, strict=True))
    if method.state_dict():
        assert any(not torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("name", [*GRADIENTS, *LOSSES])
def test_copies_are_independent(name):
    method = {**LOSSES, **GRADIENTS}[name]()
    other = copy.deepcopy(method)
    assert repr(other) == repr(method)
    assert type(method).__name__ in repr(method)


# ------------------------------------------------------------------------------------------------ conventions


@gram_methods
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
def test_weighting_gives_float64_weights(name, dtype):
    G = randn(T, 50, dtype=dtype)
    M = G.double() @ G.double().T
    alpha = weigh(name, M, dtype=dtype)
    assert alpha.dtype is F64
    assert alpha.shape == (T,)
    torch.manual_seed(0)
    g = GRAM[name]()(G, **step_losses(name))
    assert torch.allclose(g.double(), alpha @ G.double(), rtol=1e-5, atol=1e-5 * g.abs().max().item())


@gram_methods
def test_rows_and_matrix_agree(name):
    rows = [[randn(3, 5, seed=t), randn(7, seed=t + 50)] for t in range(T)]
    rows[1][1] = None
    torch.manual_seed(0)
    first, second = GRAM[name]()(rows, **step_losses(name))
    G = torch.stack([torch.cat([x.reshape(-1), torch.zeros(7) if y is None else y]) for x, y in rows])
    torch.manual_seed(0)
    g = GRAM[name]()(G, **step_losses(name))
    assert torch.allclose(torch.cat([first.reshape(-1), second]), g, rtol=1e-5, atol=1e-6)


@gram_methods
def test_a_batch_is_its_entries(name):
    G = randn(6, T, 40, dtype=F64)
    M = G @ G.mT
    batch = weigh(name, M)
    assert batch.shape == (6, T)
    if name in DRAWS:  # every entry draws its own order; without conflict it does not matter
        assert torch.equal(weigh(name, M), batch)
        return
    for b in range(6):
        assert torch.allclose(weigh(name, M[b]), batch[b], rtol=1e-12, atol=1e-14)


@gram_methods
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_scales(name, scale):
    """All but the methods of a fixed length give the same weights for gradients of any size."""
    G = randn(T, 40, dtype=F64)
    M = G @ G.T
    got, expected = weigh(name, M * scale**2), weigh(name, M)
    assert got.isfinite().all()
    if name == "MoDo":  # a step of a given size
        return
    if name.startswith(("NashMTL", "FairGrad")) and name != "FairGrad 0":
        got, expected = got / got.sum(), expected / expected.sum()
    assert torch.allclose(got, expected, rtol=1e-9)


@gram_methods
@pytest.mark.parametrize("S", [2.0**16, torch.tensor(2.0**16)], ids=["float", "tensor"])
def test_grad_scale_makes_every_method_homogeneous(name, S):
    G = randn(T, 40)
    losses = step_losses(name)
    torch.manual_seed(0)
    plain = GRAM[name]()(G, **losses)
    torch.manual_seed(0)
    scaled = GRAM[name]()(G * S, grad_scale=S, **{key: value * S for key, value in losses.items()})
    assert torch.equal(scaled / S, plain)
    rows = GRAM[name]()
    torch.manual_seed(0)
    (again,) = rows([[g * S] for g in G], grad_scale=S, **{key: value * S for key, value in losses.items()})
    assert torch.equal(again / S, plain)


def scaled_steps(name, factors, told):
    """What three steps with these factors of a loss scaler bring, unscaled: gradients, or derivatives by the losses."""
    method, results = catalog.make(name, tasks=T), []
    for seed, S in enumerate(factors):
        G, losses = S * randn(T, 30, dtype=F64, seed=seed), S * randn(T, dtype=F64, seed=seed).exp()
        options = {"grad_scale": S} if told else {}
        torch.manual_seed(seed)
        if method.on_losses:
            losses.requires_grad_()
            results += torch.autograd.grad(method(losses, **options), losses)
        else:
            results.append(method(G, **options, **({"losses": losses} if method.needs_losses else {})) / S)
    return torch.cat(results)


def test_the_page_names_the_methods_that_need_the_factor_of_a_loss_scaler():
    needed, entries = set(), list(catalog.entries())
    for entry in entries:
        if entry.needs.startswith("losses") and entry.state:
            continue  # "all that keep state": tests/scalarization has them
        plain, told, untold = (
            scaled_steps(entry.make, factors, told)
            for factors, told in (
                ((1.0, 1.0, 1.0), False),
                ((2.0**8, 2.0**10, 2.0**3), True),
                ((2.0**8, 2.0**10, 2.0**3), False),
            )
        )
        assert torch.allclose(told, plain, rtol=1e-12, atol=1e-15), entry.make
        if not torch.allclose(untold, plain, rtol=1e-9, atol=0):
            needed.add(entry.name.rpartition(".")[2])
    _, _, section = PAGE.read_text(encoding="utf-8").partition("## Loss scalers")
    _, _, named = section.partition("```")[0].partition("`grad_scale=`")
    keepers = {entry.name for entry in entries if entry.memory}
    assert "methods that keep gradients" in named
    assert needed == (set(re.findall(r"`(\w+)`", named)) | keepers) - {"CRMOGM"}  # which depends on what it is around


@pytest.mark.parametrize("name", ["NashMTL", "NashMTL plain", "FairGrad", "MGDA loss", "GradVac"])
@pytest.mark.parametrize("way", ["shared", "representation", "node", "hooks"])
def test_grad_scale_while_training(name, way):
    """Losses that a scaler has multiplied, with gradients divided afterwards: the very same steps."""
    S = 2.0**12
    results = []
    for scale in (None, S):
        run = Run(GRAM[name], way)
        torch.manual_seed(0)
        for i in range(2):
            h = run.encoder(randn(16, 6, seed=i))
            factor = 1.0 if scale is None else scale
            run.optimizer.zero_grad()
            if way in ("node", "hooks"):
                hs = fastmtl.fan_out(h, T, run.method, via=way, grad_scale=scale)
                (hs.total(run.losses(hs, i)) * factor).backward()
            else:
                where = {"representation": h} if way == "representation" else {"shared": run.encoder.parameters()}
                run.method.backward([loss * factor for loss in run.losses([h] * T, i)], grad_scale=scale, **where)
            for p in [*run.encoder.parameters(), *run.heads.parameters()]:
                p.grad /= factor
            run.optimizer.step()
        results.append(run.parameters())
    for p, q in zip(*results, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


@gram_methods
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_leave_the_state(name, bad):
    method = GRAM[name]()
    G = randn(T, 30, dtype=F64)
    for seed in range(2):
        weigh(name, G @ G.T, seed=seed, method=method)
    state = copy.deepcopy(method.state_dict()) if isinstance(method, nn.Module) else {}
    broken = G.clone()
    broken[1, 3] = bad
    torch.manual_seed(0)
    assert not method(broken, **step_losses(name)).isfinite().any()
    if isinstance(method, nn.Module):
        now = method.state_dict()
        assert now.keys() == state.keys()
        assert all(torch.equal(now[key], state[key]) for key in state)
    assert weigh(name, G @ G.T, method=method).isfinite().all()


@gram_methods
@pytest.mark.parametrize(
    "case", ["zero row", "all zero", "duplicate", "opposed", "rank 1", "spread", "P = 1", "T = 1", "T = 2"]
)
def test_degenerate_gradients_give_finite_weights(name, case):
    tasks = {"T = 1": 1, "T = 2": 2}.get(case, T)
    if tasks < T and (name.startswith("Krum") or any(c in name for c in ("weights", "median", "loss", "taus"))):
        with pytest.raises(ValueError, match=r"weights|losses|tau|tasks"):
            weigh(name, torch.eye(tasks, dtype=F64))
        return
    G = randn(tasks, 30, dtype=F64)
    if case == "zero row":
        G[2] = 0
    elif case == "all zero":
        G[:] = 0
    elif case == "duplicate":
        G[3] = G[0]
    elif case == "opposed":
        G[3] = -G[0]
    elif case == "rank 1":
        G = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=F64)[:, None] * G[:1]
    elif case == "spread":
        G = G * torch.logspace(0, 6, T, dtype=F64)[:, None]
    elif case == "P = 1":
        G = G[:, :1]
    method = GRAM[name]()
    torch.manual_seed(0)
    g = method(G, **step_losses(name))
    assert g.isfinite().all()
    assert weigh(name, G @ G.T, method=method).isfinite().all()


@pytest.mark.parametrize(
    "name", [n for n in GRAM if n not in DRAWS | RANKED and not any(c in n for c in ("weights", "median"))]
)
def test_the_order_of_tasks_does_not_matter(name):
    G = randn(T, 40, dtype=F64)
    order = torch.tensor([2, 0, 3, 1])
    losses = step_losses(name)
    got = GRAM[name]().weighting(G[order] @ G[order].T, **{k: v[order] for k, v in losses.items()})
    assert torch.allclose(got, weigh(name, G @ G.T)[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["MGDA loss", "MGDA loss+"])
def test_missing_losses_are_named(name):
    method = GRAM[name]()
    G = randn(T, 10)
    for call in (lambda: method(G), lambda: method(list(G)), lambda: method.weighting(G @ G.T)):
        with pytest.raises(ValueError, match=r"losses: expected the 4 task losses, which MGDA\(.*needs, got none"):
            call()
    with pytest.raises(ValueError, match="losses: expected 4"):
        method(G, losses=torch.ones(3))
    with pytest.raises(TypeError, match=r"losses\[0\]: expected a floating scalar tensor"):
        method(G, losses=[1.0, 2.0, 3.0, 4.0])
    h = randn(8, 5).requires_grad_()
    hs = fastmtl.fan_out(h, T, method)
    with pytest.raises(RuntimeError, match="total"):
        sum(x.square().sum() for x in hs).backward()


def test_only_methods_that_converge_say_so():
    def info_of(method):
        encoder = nn.Linear(3, 2)
        h = encoder(randn(5, 3))
        return method.backward([h[:, 0].sum(), h[:, 1].square().sum()], shared=encoder.parameters())

    for method in (
        fastmtl.MGDA(),
        fastmtl.CAGrad(),
        fastmtl.UPGrad(),
        fastmtl.DualProj(),
        fastmtl.NashMTL(),
        fastmtl.IMTL(),
    ):
        info = info_of(method)
        assert info.residual.dtype is F64
        assert info.residual.shape == ()
        assert info.converged.item() is True
    for method in (fastmtl.AlignedMTL(), fastmtl.PCGrad(), fastmtl.GradVac(), fastmtl.Uniform(), fastmtl.GradDrop()):
        info = info_of(method)
        assert info.residual is None
        assert info.converged is None


@pytest.mark.parametrize("name", ["GradVac", "NashMTL every 3"])
def test_state_made_in_inference_mode(name):
    method, G = GRAM[name](), randn(T, 50, dtype=F64)
    with torch.inference_mode():
        method(G)
    assert method(G).isfinite().all()


def test_layer_wise_targets_are_a_state_for_each_group():
    encoder = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    method = fastmtl.GradVac()
    for _ in range(2):
        h = encoder(randn(6, 4))
        method.backward([h[:, 0].sum(), -h[:, 1].sum()], groups=[encoder[0].parameters(), encoder[1].parameters()])
    assert method.targets.shape == (2, 2, 2)
    with pytest.raises(ValueError, match=r"targets of shape \[2, 2, 2\], got.*reset"):
        method.weighting(torch.eye(2, dtype=F64))


def test_both_halves_of_imtl():
    """IMTL-L scales the losses, IMTL-G balances their gradients."""
    torch.manual_seed(0)
    encoder, heads = nn.Linear(4, 3), nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
    scales, method = scalarization.IMTLL(2), fastmtl.IMTL()
    h = encoder(randn(6, 4))
    losses = [head(h).square().mean() * 10**t for t, head in enumerate(heads)]
    info = method.backward(scales.scaled(losses), shared=encoder.parameters())
    expected = torch.stack(losses).detach() - 1  # d/ds (e^s L - s) at s = 0
    assert torch.allclose(scales.s.grad, expected)
    assert info.converged


# ------------------------------------------------------------------------------------------------ the list


def test_the_list_names_every_method():
    listed = {entry.name.rpartition(".")[2] for entry in catalog.entries()}
    assert listed == {type(make()).__name__ for make in [*GRADIENTS.values(), *LOSSES.values()]}
    entries = {entry.name: entry for entry in catalog.entries()}
    assert entries["PCGrad"].paper == "Yu et al., NeurIPS 2020"
    assert entries["GradVac"].state == "targets"
    assert entries["GradDrop"].needs == "gradients"
    assert entries["scalarization.GradNorm"].libmtl == "GradNorm"
    assert all(entry.paper for entry in entries.values() if "Uniform" not in entry.name and "LS" not in entry.name)


def test_the_page_of_methods_has_the_list():
    assert catalog.table(markdown=True) in PAGE.read_text()


def test_names_in_torchjd_exist():
    reason = "torchjd is not installed"
    aggregation = pytest.importorskip("torchjd.aggregation", reason=reason)
    scalar = pytest.importorskip("torchjd.scalarization", reason=reason)
    for entry in catalog.entries():
        for name in filter(None, entry.torchjd.split(", ")):
            assert hasattr(scalar if entry.name.startswith("scalarization") else aggregation, name), (entry.name, name)


@gram_methods
def test_weights_have_no_derivative(name):
    M = torch.eye(T, dtype=F64).requires_grad_()
    with pytest.raises(ValueError, match="M: has requires_grad=True, but task weights have no derivative"):
        GRAM[name]().weighting(M)
    with torch.no_grad():
        assert weigh(name, M).isfinite().all()


def test_weighted_methods_check_the_number_of_tasks():
    for method in (
        fastmtl.UPGrad(weights=[1.0, 2.0]),
        fastmtl.DualProj(weights=[1.0, 2.0]),
        fastmtl.ConFIG(weights=[1.0, 2.0]),
        fastmtl.Uniform(weights=[1.0, 2.0]),
    ):
        assert isinstance(method, GramMethod)
        with pytest.raises(ValueError, match="weights: expected length 4"):
            method(randn(4, 5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastmtl.MGDA(normalization="l1"), "normalization: expected one of"),
        (lambda: fastmtl.CAGrad(c=-1), "c: expected a finite number >= 0, got -1"),
        (lambda: fastmtl.CAGrad(rescale=2), "rescale: expected one of 0, 1, got 2"),
        (lambda: fastmtl.PCGrad(order="random"), "order: expected one of"),
        (lambda: fastmtl.PCGrad(reduction="max"), "reduction: expected one of"),
        (lambda: fastmtl.GradVac(beta=2), r"beta: expected a finite number in \[0, 1\], got 2"),
        (lambda: fastmtl.NashMTL(max_norm=-1), "max_norm: expected a finite number >= 0, got -1"),
        (lambda: fastmtl.NashMTL(every=0), "every: expected an integer >= 1, got 0"),
        (lambda: fastmtl.FairGrad(fairness=float("inf")), "fairness: expected a finite number >= 0, got inf"),
        (lambda: fastmtl.IMTL(rtol=-1), "rtol: expected a finite number >= 0 or None, got -1"),
        (lambda: fastmtl.ConFIG(rtol=-1), "rtol: expected a finite number >= 0 or None, got -1"),
        (lambda: fastmtl.Krum(byzantine=-1), "byzantine: expected an integer >= 0, got -1"),
        (lambda: fastmtl.Krum(selected=0), "selected: expected an integer >= 1, got 0"),
        (lambda: fastmtl.Krum(byzantine=2).weighting(torch.eye(4)), "Krum.*: expected at least 5 tasks, got 4"),
        (lambda: fastmtl.UPGrad(weights="both"), 'weights: expected None, "mean", "sum" or T numbers'),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_draws_follow_the_generator():
    G = randn(T, 20, dtype=F64)
    M = G @ G.T - 0.5
    for kind in (fastmtl.PCGrad, fastmtl.GradVac, fastmtl.RLW):
        one, other = kind(generator=generator(3)), kind(generator=generator(3))
        state = torch.get_rng_state()
        assert all(torch.equal(one.weighting(M), other.weighting(M)) for _ in range(3))
        assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------ by name


EVERY = [entry.make for entry in catalog.entries()]


@pytest.mark.parametrize("name", EVERY)
def test_made_by_name(name):
    method = catalog.make(name, tasks=T)
    for other in (name.upper(), name.replace("-", "_"), name.replace("-", "").title()):
        assert repr(catalog.make(other, tasks=T)) == repr(method)
    assert isinstance(method, scalarization.Scalarization if method.on_losses else fastmtl.Method)


def test_made_with_options():
    assert repr(catalog.make("cagrad", c=0.4)) == "CAGrad(c=0.4, rescale=1)"
    assert catalog.make("stch", tasks=3, mu=0.5).tasks == 3
    assert catalog.make("stch", tasks=3, mu=0.5).mu == 0.5
    assert isinstance(catalog.make("NashMTL"), fastmtl.NashMTL)
    assert isinstance(catalog.make("uniform", tasks=3), scalarization.LS)
    assert len(set(EVERY)) == len(EVERY)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: catalog.make("agrad"), ValueError, "name: expected one of aligned, mgda, .*famo, .*, got 'agrad'"),
        (lambda: catalog.make(None), ValueError, "name: expected one of .*, got None"),
        (lambda: catalog.make("cagrad", d=1), TypeError, r"d: expected an option of CAGrad \(c, rescale\)"),
        (lambda: catalog.make("famo"), ValueError, "tasks: expected the number of tasks, which FAMO needs, got None"),
        (lambda: catalog.make("krum", tasks=2), ValueError, "expected at least 3 tasks, got 2"),
        (lambda: catalog.make("aligned", tasks=2, weights=[1.0] * 3), ValueError, "weights: expected length 2"),
        (lambda: catalog.make("uniform", tasks=2, weights=[1.0] * 3), ValueError, "weights: expected length 2"),
    ],
)
def test_what_cannot_be_made_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_names_are_those_of_the_table():
    assert catalog.names() == tuple(entry.make for entry in catalog.entries())
    assert len(set(catalog.names())) == len(catalog.names())


@pytest.mark.parametrize("name", EVERY)
def test_one_loop_trains_all(name):
    """No question of what kind a method is."""
    torch.manual_seed(0)
    encoder, heads = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.ModuleList(nn.Linear(8, 2) for _ in range(T))
    method = catalog.make(name, tasks=T).to("cpu").train()
    modules = nn.ModuleDict({"encoder": encoder, "heads": heads, "method": method})
    optimizer = torch.optim.Adam(modules.parameters(), 1e-2)
    x, y = randn(16, 6), randn(T, 16, 2, seed=1)

    def losses():
        h = encoder(x)
        return {f"task {t}": (head(h) - y[t]).square().mean() for t, head in enumerate(heads)}

    first = sum(losses().values()).item()
    for step in range(40):
        optimizer.zero_grad()
        info = method.backward(losses(), shared=encoder)
        optimizer.step()
        method.after_step(losses)
        if step % 10 == 9:
            method.end_epoch()
    assert sum(losses().values()).item() < first
    assert info.names == ("task 0", "task 1", "task 2", "task 3")
    if name not in ("graddrop", "trimmed-mean"):
        assert info.as_dict()["alpha/task 2"] == info.alpha[2].item()
    state = {key: value.clone() for key, value in modules.state_dict().items() if torch.is_tensor(value)}
    method.eval()
    method.backward(losses(), shared=encoder)
    drawn = "_extra_state"
    for key, value in modules.state_dict().items():
        if torch.is_tensor(value) and not key.endswith(drawn):
            assert torch.equal(value.nan_to_num(), state[key].nan_to_num()), key
    other = catalog.make(name, tasks=T)
    other.load_state_dict(method.state_dict())
    method.reset()
    assert repr(copy.deepcopy(method)) == repr(catalog.make(name, tasks=T))


@pytest.mark.parametrize("name", [entry.make for entry in catalog.entries() if entry.name.startswith("scalar")])
@pytest.mark.parametrize(
    "option",
    [
        *({"batched": True}, {"groups": []}, {"process_group": True}, {"engine": "gramian"}),
        *({"every": 2}, {"batch_dim": 0}, {"per": "task"}, {"check": False}),
    ],
    ids=str,
)
def test_what_one_backward_cannot_do_is_refused(name, option):
    takes = inspect.signature(scalarization.Scalarization.backward).parameters
    assert takes.keys() == inspect.signature(fastmtl.Method.backward).parameters.keys()
    p = torch.ones(T, requires_grad=True)
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: expected none for .*, which makes one backward pass"):
        catalog.make(name, tasks=T).backward([p[t] * 2 for t in range(T)], **option)
    assert p.grad is None
    with pytest.raises(TypeError, match="shared: expected a module or an iterable of parameters, got float32 tensor"):
        catalog.make(name, tasks=T).backward([p[t] * 2 for t in range(T)], p)


# ------------------------------------------------------------------------------------------------ what a step saw


def test_info_as_numbers():
    G = randn(T, 9, dtype=F64) * torch.tensor([1.0, 0.0, 3.0, 1.0], dtype=F64)[:, None]
    p = nn.Parameter(torch.ones(9, dtype=F64))
    info = fastmtl.AlignedMTL().backward({k: g @ p for k, g in zip("abcd", G, strict=True)}, [p])
    numbers = info.as_dict()
    assert set(numbers) == {f"{f}/{k}" for f in ("alpha", "norm") for k in "abcd"} | {"rank", "condition_number"}
    assert all(type(x) is float for x in numbers.values())
    assert numbers["norm/c"] == pytest.approx(G[2].norm().item())
    assert numbers["alpha/b"] == 0.0
    assert numbers["rank"] == 3
    s = torch.linalg.svdvals(G)
    assert numbers["condition_number"] == pytest.approx((s[0] / s[2]).item())
    assert repr(info).startswith("Info(alpha=[a: ")
    assert len(repr(info)) < 100


@pytest.mark.parametrize("name", ["MGDA", "UPGrad", "Uniform", "AlignedMTL"])
def test_the_condition_number_is_that_of_the_diagnostics(name):
    M = randn(5, T, 9, dtype=F64)
    M = M @ M.mT
    info = GRAM[name]().solve(M, F64)
    assert torch.equal(info.condition_number, fastmtl.diagnostics.condition_number(info))
    assert torch.equal(info.condition_number, fastmtl.diagnostics.condition_number(M))
    numbers = info.as_dict()
    assert numbers["alpha/4/2"] == info.alpha[4, 2].item()
    assert numbers["condition_number/3"] == info.condition_number[3].item()
    assert "tensor of shape [5, 4]" in repr(info)


def test_an_info_without_a_gram_matrix():
    info = fastmtl.Info.of()
    assert info.condition_number is None
    assert info.converged is None
    assert info.as_dict() == {}
    assert repr(info) == "Info()"
    assert repr(fastmtl.Info(12)).count("nan") < 12

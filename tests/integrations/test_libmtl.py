"""`fastmtl.integrations.libmtl` in a minimal trainer that follows LibMTL's protocol: shape of model, losses, epochs."""

import copy
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from helpers import F64, randn
from torch import nn

import fastmtl
from fastmtl import scalarization
from fastmtl.catalog import entries
from fastmtl.integrations import libmtl

TASKS = ("a", "b")

# LibMTL's name: (weight_args, the same method of this package; for IMTL the part on gradients)
GRADIENTS = {
    "Aligned_MTL": ({}, lambda: fastmtl.AlignedMTL(weights="sum")),
    "MGDA": ({"mgda_gn": "loss+"}, lambda: fastmtl.MGDA(normalization="loss+")),
    "PCGrad": ({}, fastmtl.PCGrad),
    "GradVac": ({"GradVac_beta": 0.2, "GradVac_group_type": 0}, lambda: fastmtl.GradVac(beta=0.2)),
    "CAGrad": ({"calpha": 0.3, "rescale": 0}, lambda: fastmtl.CAGrad(c=0.3, rescale=0)),
    "IMTL": ({}, fastmtl.IMTL),
    "Nash_MTL": (
        {"update_weights_every": 2, "optim_niter": 5, "max_norm": 0.3},
        lambda: fastmtl.NashMTL(max_norm=0.3, every=2),
    ),
    "GradDrop": ({"leak": 0.25}, lambda: fastmtl.GradDrop(leak=0.25)),
    "RGW": ({}, fastmtl.RLW),
    "UPGrad": ({"UPGrad_norm_eps": 1e-4, "UPGrad_reg_eps": 0.1}, lambda: fastmtl.UPGrad(ridge=0.1)),
    "FairGrad": ({"FairGrad_alpha": 2.0}, lambda: fastmtl.FairGrad(fairness=2.0)),
}
# Of gradients of parameters alone; DB_MTL and ExcessMTL have tests of their own.
PARAMETERS = {
    "MoCo": (
        {"MoCo_beta": 0.4, "MoCo_gamma": 0.2, "MoCo_rho": 0.1},
        lambda: fastmtl.MoCo(beta=0.4, gamma=0.2, rho=0.1),
    ),
    "DB_MTL": ({"DB_beta": 0.5, "DB_beta_sigma": 0.5}, None),
    "ExcessMTL": ({"robust_step_size": 0.1}, None),
    "MoDo": ({"MoDo_gamma": 0.1, "MoDo_rho": 0.2}, lambda: fastmtl.MoDo(gamma=0.1, rho=0.2)),
    "SDMGrad": (
        {"SDMGrad_lamda": 0.5, "SDMGrad_niter": 3},
        lambda: fastmtl.SDMGrad(lam=0.5, iterations=3, lr=5.0),
    ),
}
LOSSES = {
    "EW": ({}, lambda: scalarization.LS(weights="sum")),
    "RLW": ({"dist": "constrained_Bernoulli"}, lambda: scalarization.RLW(distribution="constrained_bernoulli")),
    "DWA": ({"T": 1.5}, lambda: scalarization.DWA(2, temperature=1.5)),
    "UW": ({}, lambda: scalarization.Uncertainty(2, initial=-0.5)),
    "GLS": ({}, lambda: scalarization.GLS(2)),
    "STCH": ({"STCH_mu": 0.5, "STCH_warmup_epoch": 1}, lambda: scalarization.STCH(mu=0.5, warmup=1, tasks=2)),
    "FAMO": ({"FAMO_w_lr": 0.1, "FAMO_w_gamma": 0.01}, lambda: scalarization.FAMO(2, lr=0.1, weight_decay=0.01)),
    "GradNorm": ({"alpha": 0.5}, lambda: scalarization.GradNorm(2, alpha=0.5)),
}
CASES = GRADIENTS | PARAMETERS | LOSSES

both = pytest.mark.parametrize("rep_grad", [False, True], ids=["parameters", "representation"])
every = pytest.mark.parametrize("name", CASES)


class Architecture(nn.Module):
    """Hard sharing, as an architecture presents itself to a weighting."""

    def __init__(self, rep_grad, multi_input):
        super().__init__()
        torch.manual_seed(1)
        self.task_name, self.task_num, self.device = list(TASKS), len(TASKS), torch.device("cpu")
        self.rep_grad, self.multi_input = rep_grad, multi_input
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
        self.decoders = nn.ModuleDict({task: nn.Linear(6, 2) for task in TASKS})
        if rep_grad:
            self.rep, self.rep_tasks = {}, {}

    def forward(self, x, only=None):
        rep = self.encoder(x)
        predictions = {}
        for task in TASKS if only is None else [only]:
            seen = rep
            if self.rep_grad:
                if self.multi_input:
                    self.rep[task] = rep
                else:
                    self.rep = rep
                seen = self.rep_tasks[task] = rep.detach().clone().requires_grad_()
            predictions[task] = self.decoders[task](seen)
        return predictions

    def get_share_params(self):
        return self.encoder.parameters()


class Mixture(Architecture):
    """Experts, shared or a task's own, mixed by a gate of each task: MMoE, with own experts CGC.

    As they present themselves: representations by task, of one input, and no `encoder`.
    """

    own = False

    def __init__(self, rep_grad, multi_input):
        super().__init__(rep_grad, multi_input)
        del self.encoder
        self.experts_shared = nn.ModuleList(nn.Sequential(nn.Linear(5, 6), nn.Tanh()) for _ in range(2))
        if self.own:
            self.experts_specific = nn.ModuleDict({task: nn.Sequential(nn.Linear(5, 6), nn.Tanh()) for task in TASKS})
        self.gate_specific = nn.ModuleDict({
            task: nn.Sequential(nn.Linear(5, 2 + self.own), nn.Softmax(dim=-1)) for task in TASKS
        })  # fmt: skip

    def forward(self, x, only=None):
        shared = [expert(x) for expert in self.experts_shared]
        predictions = {}
        for task in TASKS if only is None else [only]:
            experts = torch.stack([*shared, self.experts_specific[task](x)] if self.own else shared)
            rep = torch.einsum("ij...,ji->j...", experts, self.gate_specific[task](x))
            if self.rep_grad:
                self.rep[task], self.rep_tasks[task] = rep, rep.detach().clone().requires_grad_()
                rep = self.rep_tasks[task]
            predictions[task] = self.decoders[task](rep)
        return predictions

    def get_share_params(self):
        return self.experts_shared.parameters()


class Customized(Mixture):
    own = True


class Trainer:
    """Two epochs of three steps on the same six batches; task "b" has larger losses."""

    def __init__(
        self,
        weighting,
        weight_args=None,
        rep_grad=False,
        multi_input=False,
        dtype=torch.float32,
        lr=0.02,
        architecture=Architecture,
    ):
        class Model(architecture, weighting):
            def __init__(self):
                super().__init__(rep_grad, multi_input)
                self.init_param()

        self.model, self.weight_args = Model(), weight_args or {}
        for name, part in self.model.named_children():
            if name not in ("method", "scales"):
                part.to(dtype)  # LibMTL moves a model to a device, never to a dtype: the state of methods is float64
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.batches = [
            (
                randn(8, 5, dtype=dtype, seed=i),
                {task: randn(8, 2, dtype=dtype, seed=20 + i + t) for t, task in enumerate(TASKS)},
            )
            for i in range(3)
        ]

    def losses(self, batch):
        x, targets = batch
        losses = torch.zeros(len(TASKS), dtype=x.dtype)
        predictions = None if self.model.multi_input else self.model(x)
        for t, task in enumerate(TASKS):
            prediction = self.model(x + t, task)[task] if predictions is None else predictions[task]
            losses[t] = 3.0**t * (prediction - targets[task]).square().mean()
        return losses

    def backward(self, batch=None):
        self.optimizer.zero_grad(set_to_none=False)
        return self.model.backward(self.losses(batch or self.batches[0]), **self.weight_args)

    def train(self, epochs=2):
        weights = np.zeros([len(TASKS), epochs, len(self.batches)])
        sums = []
        for epoch in range(epochs):
            self.model.epoch = epoch
            self.model.train()
            for i, batch in enumerate(self.batches):
                w = self.backward(batch)
                if w is not None:
                    weights[:, epoch, i] = w
                self.optimizer.step()
                if hasattr(self.model, "update_w"):
                    with torch.no_grad():
                        self.model.update_w(self.losses(batch))
            with torch.no_grad():
                sums.append(sum(float(self.losses(batch).sum()) for batch in self.batches))
        return weights, sums


def trainer_of(name, **options):
    return Trainer(getattr(libmtl, name), dict(CASES[name][0]), **options)


class Direct:
    """The same model and batches, and the methods called as in a loop without LibMTL."""

    def __init__(self, name, rep_grad):
        self.model = Architecture(False, False)
        self.method = CASES[name][1]()
        self.scales = scalarization.IMTLL(2) if name == "IMTL" else None
        own = self.method.parameters() if isinstance(self.method, scalarization.Scalarization) else []
        extra = self.scales.parameters() if self.scales else []
        self.parameters = [*self.model.parameters(), *own, *extra]
        self.rep_grad = rep_grad

    def losses(self, batch):
        x, targets = batch
        h = self.model.encoder(x)
        return h, [
            3.0**t * (self.model.decoders[task](h) - targets[task]).square().mean() for t, task in enumerate(TASKS)
        ]

    def backward(self, batch):
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        h, losses = self.losses(batch)
        if self.scales:
            losses = self.scales.scaled(losses)
        if isinstance(self.method, scalarization.Scalarization):
            return self.method.backward(losses, self.model.encoder)
        where = {"representation": h} if self.rep_grad else {"shared": self.model.encoder.parameters()}
        return self.method.backward(losses, **where)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.cover(1)
@both
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1]])
def test_training_is_that_of_the_method_called_directly(name, rep_grad):
    """With `rep_sum=False`, which is the upper bound of `backward(representation=…)`."""
    if rep_grad and name in (*PARAMETERS, "GradDrop", "GradNorm"):
        return  # they refuse it, draw otherwise, or look at another layer
    trainer, direct = trainer_of(name, rep_grad=rep_grad), Direct(name, rep_grad)
    if rep_grad and name in GRADIENTS:
        trainer.weight_args = {**trainer.weight_args, "rep_sum": False}
    optimizer = torch.optim.SGD(direct.parameters, lr=0.02)
    for epoch in range(4):
        trainer.model.epoch = epoch
        for batch in trainer.batches:
            torch.manual_seed(epoch)
            info = direct.backward(batch)
            torch.manual_seed(epoch)
            weights = trainer.backward(batch)
            if name == "GradDrop":
                assert weights is None
            else:
                assert isinstance(weights, np.ndarray)
                np.testing.assert_allclose(weights, info.alpha.numpy(), rtol=1e-5)
            got = gradients(trainer.model)
            for part, p in direct.model.named_parameters():
                torch.testing.assert_close(got.pop(part), p.grad, rtol=1e-5, atol=1e-6, msg=part)
            own = direct.parameters[len(list(direct.model.parameters())) :]
            for g, p in zip(got.values(), own, strict=True):
                torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-6)
            trainer.optimizer.step()
            optimizer.step()
            if name == "FAMO":
                with torch.no_grad():
                    direct.method.update(direct.losses(batch)[1])
                    trainer.model.update_w(trainer.losses(batch))
        if name in ("DWA", "STCH"):
            direct.method.end_epoch()


@pytest.mark.cover(1)
@both
@every
def test_training_lowers_the_losses(name, rep_grad):
    if rep_grad and name in PARAMETERS:
        with pytest.raises(ValueError, match="rep_grad: expected False with "):
            trainer_of(name, rep_grad=rep_grad).backward()
        return
    trainer = trainer_of(name, rep_grad=rep_grad)
    weights, sums = trainer.train(epochs=8)
    assert np.isfinite(weights).all()
    assert sums[-1] < sums[0]


@pytest.mark.parametrize("rep_grad", [False, True])
def test_losses_may_be_a_list(rep_grad):
    first, second = trainer_of("UPGrad", rep_grad=rep_grad), trainer_of("UPGrad", rep_grad=rep_grad)
    first.backward()
    predictions = second.model(second.batches[0][0])
    second.model.backward(
        [3.0**t * (predictions[task] - second.batches[0][1][task]).square().mean() for t, task in enumerate(TASKS)],
        **second.weight_args,
    )
    torch.testing.assert_close(gradients(first.model), gradients(second.model))


@both
def test_gradients_are_added(rep_grad):
    trainer = trainer_of("CAGrad", rep_grad=rep_grad)
    trainer.backward()
    once = gradients(trainer.model)
    trainer.model.backward(trainer.losses(trainer.batches[0]), **trainer.weight_args)
    torch.testing.assert_close(gradients(trainer.model), {name: 2 * g for name, g in once.items()})


def test_frozen_shared_parameters_are_left_alone():
    trainer = trainer_of("MGDA")
    trainer.model.encoder[0].weight.requires_grad_(False)
    trainer.backward()
    assert trainer.model.encoder[0].weight.grad is None
    assert trainer.model.encoder[0].bias.grad.any()


# ------------------------------------------------------------------------------------------------ options and state


@every
def test_unknown_options_raise_and_name_the_option(name):
    trainer = trainer_of(name)
    with pytest.raises(TypeError, match="no_such_option"):
        trainer.model.backward(trainer.losses(trainer.batches[0]), no_such_option=1)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0]])
def test_options_have_defaults(name):
    trainer = trainer_of(name)
    trainer.weight_args = {}
    trainer.backward()
    assert all(g.isfinite().all() for g in gradients(trainer.model).values())


def test_every_name_of_libmtl_is_here():
    names = {entry.libmtl for entry in entries() if entry.libmtl}
    assert names <= set(libmtl.__all__)
    assert set(CASES) | {"Weighting", "register", "weighting_of"} == set(libmtl.__all__)


def test_options_that_change_keep_the_state():
    trainer = Trainer(libmtl.GradVac, {"GradVac_beta": 0.5})
    trainer.backward()
    before = trainer.model.method.targets.clone()
    assert before.any()
    trainer.weight_args = {"beta": 0.0}  # the name of earlier versions; with it the targets stay
    trainer.backward()
    assert trainer.model.method.beta == 0.0
    assert torch.equal(trainer.model.method.targets, before)


@pytest.mark.parametrize("name", ["DWA", "STCH", "FAMO", "GradVac", "UW", "IMTL"])
def test_state_is_the_models(name):
    first = trainer_of(name)
    first.train(epochs=3)
    second = trainer_of(name)
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.model.epoch = first.model.epoch
    for trainer in (first, second):
        torch.manual_seed(3)
        trainer.backward()
    torch.testing.assert_close(gradients(first.model), gradients(second.model), rtol=0, atol=0)
    fresh = trainer_of(name)
    fresh.model.encoder.load_state_dict(first.model.encoder.state_dict())
    fresh.model.decoders.load_state_dict(first.model.decoders.state_dict())
    fresh.model.epoch = 0
    torch.manual_seed(3)
    fresh.backward()
    assert any(not torch.equal(g, gradients(fresh.model)[part]) for part, g in gradients(first.model).items())


@both
@pytest.mark.parametrize(("name", "parameter"), [("UW", "method.s"), ("IMTL", "scales.s")])
def test_what_is_learned_is_in_the_optimizer(name, parameter, rep_grad):
    trainer = trainer_of(name, rep_grad=rep_grad)
    s = dict(trainer.model.named_parameters())[parameter]
    before = s.detach().clone()
    trainer.train(epochs=1)
    assert (s != before).all()


def test_a_method_with_parameters_refuses_late_options():
    Late = libmtl.weighting_of(lambda tasks, initial=0.0: scalarization.Uncertainty(tasks, initial=initial))
    trainer = Trainer(Late, {"initial": 1.0})
    with pytest.raises(ValueError, match=r"weight_args.*initial"):
        trainer.backward()


@pytest.mark.parametrize(("rescale", "divisor"), [(0, 1.0), (1, 1 + 0.4**2), (2, 1.4)])
def test_cagrad_rescale(rescale, divisor):
    trainer = Trainer(libmtl.CAGrad, {"calpha": 0.4, "rescale": rescale})
    weights = trainer.backward()
    info = fastmtl.CAGrad(c=0.4, rescale=0).backward(
        list(trainer.losses(trainer.batches[0]).unbind()), shared=trainer.model.encoder.parameters()
    )
    np.testing.assert_allclose(weights * divisor, info.alpha.numpy())


def test_cagrad_of_another_rescale():
    trainer = Trainer(libmtl.CAGrad, {"rescale": 3})
    with pytest.raises(ValueError, match=r"rescale: expected .*3"):
        trainer.backward()


@pytest.mark.parametrize("kind", [1, 2])
def test_grad_vac_by_groups(kind):
    trainer = Trainer(libmtl.GradVac, {"GradVac_group_type": kind}, dtype=F64)
    encoder = trainer.model.encoder
    layers = [list(encoder[0].parameters()), list(encoder[2].parameters())]
    groups = layers if kind == 1 else [[p] for layer in layers for p in layer]
    torch.manual_seed(5)
    weights = trainer.backward()
    got = gradients(trainer.model)
    trainer.optimizer.zero_grad(set_to_none=False)
    torch.manual_seed(5)
    info = fastmtl.GradVac().backward(list(trainer.losses(trainer.batches[0]).unbind()), groups=groups)
    torch.testing.assert_close(got, gradients(trainer.model))
    np.testing.assert_allclose(weights, info.alpha.mean(0).numpy())
    assert trainer.model.method.targets.shape == (len(groups), 2, 2)


@pytest.mark.parametrize(("kind", "rep_grad"), [(3, False), (1, True)])
def test_grad_vac_of_another_group_type(kind, rep_grad):
    trainer = Trainer(libmtl.GradVac, {"GradVac_group_type": kind}, rep_grad)
    with pytest.raises(ValueError, match=rf"GradVac_group_type: expected 0.*{kind}"):
        trainer.backward()


def test_weighting_of():
    def krum(tasks, byzantine=0, selected=1):
        """Krum."""
        return fastmtl.Krum(byzantine=byzantine, selected=selected)

    Krum = libmtl.weighting_of(krum)
    assert (Krum.__name__, Krum.__doc__) == ("krum", "Krum.")
    assert libmtl.weighting_of(krum, "Krum").__name__ == "Krum"
    ones = libmtl.weighting_of(lambda tasks, weights=None: fastmtl.Uniform(weights=weights))
    trainer = Trainer(ones, {"weights": [2.0, 3.0]})
    assert trainer.backward().tolist() == [2.0, 3.0]


# ------------------------------------------------------------------------------------------------ representations


@both
def test_a_failure_leaves_every_gradient(rep_grad, monkeypatch):
    trainer = trainer_of("MGDA", rep_grad=rep_grad)
    trainer.backward()
    before = gradients(trainer.model)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(fastmtl.MGDA, "solve", fail)
    with pytest.raises(MemoryError):
        trainer.model.backward(trainer.losses(trainer.batches[0]), **trainer.weight_args)
    torch.testing.assert_close(gradients(trainer.model), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Aligned_MTL", "MGDA", "FairGrad"])
def test_a_representation_for_each_task(name):
    """With one input per task: the weights come from the representations' gradients, and each goes on by itself."""
    trainer = trainer_of(name, rep_grad=True, multi_input=True, dtype=F64)
    weights = trainer.backward()
    got = [p.grad.clone() for p in trainer.model.encoder.parameters()]
    losses = trainer.losses(trainer.batches[0])
    copies = [trainer.model.rep_tasks[task] for task in TASKS]
    rows = torch.autograd.grad(losses.sum(), copies)
    G = torch.stack([g.sum(0) for g in rows])  # over the batch
    alpha = CASES[name][1]().weighting(G @ G.T, losses=losses.detach())
    np.testing.assert_allclose(weights, alpha.numpy(), rtol=1e-9)
    rep = [trainer.model.rep[task] for task in TASKS]
    cotangents = [a * g for a, g in zip(alpha, rows, strict=True)]
    expected = torch.autograd.grad(rep, list(trainer.model.encoder.parameters()), cotangents)
    torch.testing.assert_close(got, list(expected))


@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_methods_on_losses_with_one_input_per_task(name, rep_grad):
    trainer = trainer_of(name, rep_grad=rep_grad, multi_input=True)
    torch.manual_seed(2)
    weights = trainer.backward()
    plain = Trainer(libmtl.EW, multi_input=True)
    losses = plain.losses(plain.batches[0])
    (losses * torch.as_tensor(weights, dtype=losses.dtype)).sum().backward()
    for part, p in plain.model.named_parameters():
        torch.testing.assert_close(gradients(trainer.model)[part], p.grad, rtol=1e-5, atol=1e-6, msg=part)


@pytest.mark.parametrize("multi_input", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("rep_sum", [True, False])
def test_grad_drop_on_representations(rep_sum, multi_input):
    """One draw a feature, by the purity of gradients times signs; or one an entry. Representations may be several."""
    trainer = trainer_of("GradDrop", rep_grad=True, multi_input=multi_input, dtype=F64)
    trainer.weight_args["rep_sum"] = rep_sum
    torch.manual_seed(4)
    assert trainer.backward() is None
    got = [p.grad.clone() for p in trainer.model.encoder.parameters()]
    losses = trainer.losses(trainer.batches[0])
    rows = torch.autograd.grad(losses.sum(), [trainer.model.rep_tasks[task] for task in TASKS])
    reps = [trainer.model.rep[task] for task in TASKS] if multi_input else [trainer.model.rep] * 2
    votes = torch.stack([
        (g * x.detach().sign()).sum(0) if rep_sum else g for g, x in zip(rows, reps, strict=True)
    ])  # fmt: skip
    torch.manual_seed(4)
    positive = 0.5 * (1 + votes.sum(0) / votes.abs().sum(0)) > torch.rand_like(votes[0])
    kept = [g * (0.25 + 0.75 * (positive == (v > 0))) for g, v in zip(rows, votes, strict=True)]
    if multi_input:
        expected = torch.autograd.grad(reps, list(trainer.model.encoder.parameters()), kept)
    else:
        expected = torch.autograd.grad(reps[0], list(trainer.model.encoder.parameters()), sum(kept))
    torch.testing.assert_close(got, list(expected))


def test_representations_of_different_shapes():
    trainer = trainer_of("PCGrad", rep_grad=True, multi_input=True)
    trainer.weight_args["rep_sum"] = False
    losses = torch.zeros(2)
    for t, task in enumerate(TASKS):
        losses[t] = trainer.model(randn(3 + t, 5), task)[task].square().mean()
    with pytest.raises(ValueError, match=r"rep: expected representations of one shape.*\[\[3, 6\], \[4, 6\]\]"):
        trainer.model.backward(losses, **trainer.weight_args)


@pytest.mark.parametrize("name", ["Aligned_MTL", "MGDA", "CAGrad", "UPGrad"])
def test_weights_of_gradients_summed_over_the_batch(name):
    """LibMTL's reading of `rep_grad=True`, which is the default."""
    trainer = trainer_of(name, rep_grad=True, dtype=F64)
    weights = trainer.backward()
    got = [p.grad.clone() for p in trainer.model.encoder.parameters()]
    losses = trainer.losses(trainer.batches[0])
    rows = torch.autograd.grad(losses.sum(), [trainer.model.rep_tasks[task] for task in TASKS])
    G = torch.stack([g.sum(0) for g in rows])
    alpha = CASES[name][1]().weighting(G @ G.T, losses=losses.detach())
    np.testing.assert_allclose(weights, alpha.numpy(), rtol=1e-9)
    cotangent = sum(a * g for a, g in zip(alpha, rows, strict=True))
    expected = torch.autograd.grad(trainer.model.rep, list(trainer.model.encoder.parameters()), cotangent)
    torch.testing.assert_close(got, list(expected))
    trainer.weight_args["rep_sum"] = 3
    with pytest.raises(TypeError, match="rep_sum: expected True or False"):
        trainer.backward()


mixtures = pytest.mark.parametrize("architecture", [Mixture, Customized])


@mixtures
@pytest.mark.parametrize("multi_input", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("name", ["Aligned_MTL", "GradDrop", "Nash_MTL", "UW"])
def test_mixtures_of_experts_by_representations(name, multi_input, architecture):
    """Every task's cotangent goes through its own gate into the experts, whatever the weighting makes of it."""
    trainer = trainer_of(name, rep_grad=True, multi_input=multi_input, dtype=F64, architecture=architecture)
    torch.manual_seed(4)
    alpha = trainer.backward()
    model, got = trainer.model, gradients(trainer.model)
    losses = trainer.losses(trainer.batches[0])
    heads = list(model.decoders.parameters())
    copies = [model.rep_tasks[task] for task in TASKS]
    rows = torch.autograd.grad(losses.sum(), copies, retain_graph=True)
    if name == "GradDrop":
        votes = torch.stack([(g * model.rep[task].detach().sign()).sum(0) for g, task in zip(rows, TASKS, strict=True)])
        torch.manual_seed(4)
        positive = 0.5 * (1 + votes.sum(0) / votes.abs().sum(0)) > torch.rand_like(votes[0])
        cotangents = [g * (0.25 + 0.75 * (positive == (v > 0))) for g, v in zip(rows, votes, strict=True)]
    else:
        cotangents = [float(a) * g for a, g in zip(alpha, rows, strict=True)]
    weights = torch.as_tensor(alpha) if name == "UW" else torch.ones(2)  # heads of other methods get their own
    trunk = [p for part, p in model.named_parameters() if part.startswith(("experts_shared", "gate"))]
    expected = torch.autograd.grad([model.rep[task] for task in TASKS], trunk, cotangents)
    names = [part for part, _ in model.named_parameters() if part.startswith(("experts_shared", "gate"))]
    torch.testing.assert_close([got[part] for part in names], list(expected))
    own = torch.autograd.grad((weights * losses).sum(), heads)
    torch.testing.assert_close([got[f"decoders.{part}"] for part, _ in model.decoders.named_parameters()], list(own))


@mixtures
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("MoDo", "SDMGrad")])
def test_mixtures_of_experts_by_parameters(name, architecture):
    """Shared are the experts of all; a gate gets what a head gets."""
    trainer = trainer_of(name, dtype=F64, architecture=architecture)
    torch.manual_seed(4)
    alpha = trainer.backward()
    got, model = gradients(trainer.model), trainer.model
    losses = trainer.losses(trainer.batches[0])
    of_heads = torch.ones(2) if name in GRADIENTS or name == "MoCo" else torch.as_tensor(alpha)
    if name == "IMTL":  # the scales are one at first
        assert not model.scales.s.any()
    if name == "DB_MTL":
        of_heads = 1 / (losses.detach() + 1e-8)
    rest = [part for part, _ in model.named_parameters() if part.startswith(("gate", "decoders"))]
    wanted = torch.autograd.grad((of_heads * losses).sum(), [model.get_parameter(part) for part in rest])
    torch.testing.assert_close([got[part] for part in rest], list(wanted), rtol=1e-6, atol=1e-9)
    assert all(got[part].any() for part in got if part.startswith("experts_shared"))


def test_grad_vac_by_layers_of_experts():
    trainer = trainer_of("GradVac", dtype=F64, architecture=Mixture)
    trainer.weight_args = {"GradVac_group_type": 1}
    trainer.backward()
    assert trainer.model.method.targets.shape == (2, 2, 2)  # a layer an expert


# ------------------------------------------------------------------------------------------------ by name


@pytest.fixture
def registry(monkeypatch):
    """A stand-in for `LibMTL.weighting`, with a class of LibMTL's own in it."""
    package, module = types.ModuleType("LibMTL"), types.ModuleType("LibMTL.weighting")
    module.EW = object
    package.weighting = module
    monkeypatch.setitem(sys.modules, "LibMTL", package)
    monkeypatch.setitem(sys.modules, "LibMTL.weighting", module)
    return module


class NamedTrainer(Trainer):
    """As the trainer of the newest version: weightings by name, three batches for two of them, FAMO by its name."""

    def __init__(self, weighting, **options):
        import LibMTL.weighting

        self.name = weighting
        super().__init__(LibMTL.weighting.__dict__[weighting], **options)

    def train(self, epochs=2):
        sums = []
        for epoch in range(epochs):
            self.model.epoch, self.model.epochs = epoch, epochs
            self.model.train()
            for i, batch in enumerate(self.batches):
                samples = 3 if self.name in ("MoDo", "SDMGrad") else 1
                batches = [self.batches[(i + k) % 3] for k in range(samples)]
                losses = torch.stack([self.losses(b) for b in batches]).squeeze(0)
                self.optimizer.zero_grad(set_to_none=False)
                self.model.backward(losses, **self.weight_args)
                self.optimizer.step()
                if self.name == "FAMO":
                    with torch.no_grad():
                        self.model.update_w(self.losses(batch))
            with torch.no_grad():
                sums.append(sum(float(self.losses(batch).sum()) for batch in self.batches))
        return sums


@every
def test_registered_weightings_train(name, registry):
    names = libmtl.register()
    assert name in names
    assert vars(registry)[name] is getattr(libmtl, name)
    sums = NamedTrainer(name, weight_args=CASES[name][0]).train(8)
    assert sums[-1] < sums[0]


def test_register(registry):
    their_own = registry.EW
    names = libmtl.register(prefix="fast_")
    assert registry.EW is their_own
    assert "fast_EW" in names
    assert registry.fast_EW is libmtl.EW
    krum = libmtl.weighting_of(lambda tasks: fastmtl.Uniform(), "Mine")
    assert libmtl.register({"Mine": krum}) == ["Mine"]
    NamedTrainer("Mine").train(1)
    with pytest.raises(TypeError, match=r"weightings\['x'\]: expected a class made by weighting_of, got int"):
        libmtl.register({"x": 3})


def test_without_libmtl():
    if importlib.util.find_spec("LibMTL") is None:
        with pytest.raises(ImportError, match="LibMTL"):
            libmtl.register()


def test_famo_learns_under_any_name(registry):
    libmtl.register(prefix="my")
    trainer = NamedTrainer("myFAMO")
    trainer.train(3)
    assert trainer.model.method.logits.any()
    # What it learns from are the next batch's losses.
    first = trainer_of("FAMO")
    first.backward()
    before = first.losses(first.batches[0]).detach()
    first.optimizer.step()
    after = first.losses(first.batches[1]).detach()
    expected = scalarization.FAMO(2, lr=0.1, weight_decay=0.01)
    expected(before)
    expected.update(after)
    first.backward(first.batches[1])
    assert torch.allclose(first.model.method.logits, expected.logits)


@pytest.mark.parametrize("name", ["MoDo", "SDMGrad"])
def test_three_batches(name):
    """Weights from G₁ G₂ᵀ of two batches, the gradient of a third; heads get the mean of three."""
    trainer = trainer_of(name, dtype=F64)
    losses = torch.stack([trainer.losses(batch) for batch in trainer.batches])
    trainer.optimizer.zero_grad(set_to_none=False)
    weights = trainer.model.backward(losses, **trainer.weight_args)
    got = gradients(trainer.model)
    shared = list(trainer.model.encoder.parameters())

    def matrix(batch):
        rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in trainer.losses(batch)]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])

    G = [matrix(batch) for batch in trainer.batches]
    first, second, last = {"MoDo": (0, 1, 2), "SDMGrad": (1, 2, 0)}[name]
    alpha = CASES[name][1]().weighting(G[first] @ G[second].T)
    np.testing.assert_allclose(weights, alpha.numpy(), rtol=1e-9)
    encoder = torch.cat([got[f"encoder.{part}"].reshape(-1) for part, _ in trainer.model.encoder.named_parameters()])
    torch.testing.assert_close(encoder, alpha @ G[last])
    heads = list(trainer.model.decoders.parameters())
    mean = sum(trainer.losses(batch).sum() for batch in trainer.batches) / 3
    expected = torch.autograd.grad(mean, heads)
    torch.testing.assert_close([p.grad for p in heads], list(expected))
    with pytest.raises(ValueError, match=r"losses: expected shape \[3, 2\] or \[2\], got rows"):
        trainer.model.backward(losses[:2], **trainer.weight_args)


class Naive:
    """LibMTL's formulas, on a matrix, for methods that keep one."""

    def __init__(self):
        self.state, self.w, self.step = 0.0, torch.ones(2, dtype=F64), 0

    def DB_MTL(self, G, losses):
        self.step += 1
        G = G / (losses + 1e-8)[:, None]
        self.state = G + (0.5 / self.step**0.5) * (self.state - G)
        norms = self.state.norm(dim=1)
        return (norms.max() / norms) @ self.state

    def ExcessMTL(self, G, losses):
        self.state = self.state + G.square()
        risk = (G.square() / (self.state + 1e-7).sqrt()).sum(1)
        if not self.step:
            self.initial = risk
        else:
            self.w = self.w * (0.1 * risk / self.initial).exp()
            self.w = 2 * self.w / self.w.sum()
        self.step += 1
        return self.w @ G

    def MoCo(self, G, losses):
        self.step += 1
        if self.step == 1:
            self.w = torch.full((2,), 0.5, dtype=F64)
        G = G / G.norm(dim=1, keepdim=True) * losses[:, None]
        self.state = self.state - 0.4 / self.step**0.5 * (self.state - G)
        M = self.state @ self.state.T + 0.1 * torch.eye(2)
        self.w = (self.w - 0.2 / self.step**0.5 * (M @ self.w)).softmax(0)
        return self.w @ self.state


@pytest.mark.parametrize("name", ["DB_MTL", "ExcessMTL", "MoCo"])
def test_methods_with_a_memory(name):
    trainer, naive = trainer_of(name, dtype=F64), Naive()
    shared = list(trainer.model.encoder.parameters())
    for i in range(5):
        batch = trainer.batches[i % 3]
        losses = trainer.losses(batch)
        rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
        G = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        expected = getattr(naive, name)(G, losses.detach())
        weights = trainer.backward(batch)
        got = torch.cat([p.grad.reshape(-1) for p in shared])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # both add small numbers to denominators
        if name == "ExcessMTL":
            np.testing.assert_allclose(weights, naive.w.numpy(), rtol=1e-5)
        trainer.optimizer.step()

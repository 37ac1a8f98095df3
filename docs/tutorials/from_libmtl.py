# %% [markdown]
# # From LibMTL
#
# LibMTL makes a model from an architecture and a weighting by inheritance, and its trainer calls
# `model.backward(losses)`. This tutorial trains such a model with a weighting of fastmtl under LibMTL's protocol, and
# then the same network in a loop of your own. With LibMTL installed, the architecture is LibMTL's own and its `CAGrad`
# runs beside ours; without it, a stand-in with the same interface takes its place.
# [Migration](../migration.md#from-libmtl) lists every difference.

# %%
import importlib
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fastmtl
from fastmtl.integrations.libmtl import CAGrad

STEPS = 150
SCALES = OrderedDict(depth=1.0, normal=1.0, flow=100.0)
torch.set_num_threads(1)


def data(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch: inputs [64, 8], and a target [64, 1] for each task."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    return x, {"depth": torch.sin(2 * x[:, :1]), "normal": x[:, 1:2] * x[:, 2:3], "flow": x[:, 3:4].abs() - x[:, :1]}


def encoder() -> nn.Module:
    """What LibMTL calls `encoder_class`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh())


def decoders() -> nn.ModuleDict:
    """A head for each task."""
    torch.manual_seed(1)
    return nn.ModuleDict({task: nn.Linear(16, 1) for task in SCALES})


# %% [markdown]
# ## An architecture
#
# LibMTL's hard parameter sharing, `HPS`, or what of it a weighting needs to see:


# %%
class StandIn(nn.Module):
    """Hard parameter sharing, with LibMTL's interface."""

    def __init__(self, task_name: list[str], encoder_class: Any, decoders: Any, rep_grad: bool, *_: Any) -> None:
        super().__init__()
        self.task_name, self.task_num, self.device = task_name, len(task_name), torch.device("cpu")
        self.encoder, self.decoders, self.rep_grad = encoder_class(), decoders, rep_grad

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """A prediction for each task."""
        h = self.encoder(x)
        return {task: self.decoders[task](h) for task in self.task_name}

    def get_share_params(self) -> Any:
        """The parameters that all tasks share."""
        return self.encoder.parameters()

    def zero_grad_share_params(self) -> None:
        """As LibMTL's weightings ask for."""
        self.encoder.zero_grad()


weightings: dict[str, Any] = {"fastmtl's CAGrad": CAGrad}
architecture: Any = StandIn
try:
    architecture = importlib.import_module("LibMTL.architecture").HPS
    weightings["LibMTL's CAGrad"] = importlib.import_module("LibMTL.weighting").CAGrad
    print("LibMTL's own architecture and weighting")
except ImportError as error:
    print(f"the stand-in, since LibMTL cannot be imported ({error})")

# %% [markdown]
# ## LibMTL's way
#
# What LibMTL's `Trainer` does in every step, on the CPU. Only the class of the weighting changes; `weight_args` keep
# LibMTL's names. In a program that uses the trainer, `fastmtl.integrations.libmtl.register()` puts these classes
# where the trainer looks weightings up by name.


# %%
def train(weighting: Any) -> tuple[Tensor, Tensor]:
    """Losses [STEPS, 3] in their own units, and task weights [STEPS, 3]."""

    class MTLModel(architecture, weighting):
        """An architecture and a weighting, by inheritance."""

        def __init__(self) -> None:
            super().__init__(list(SCALES), encoder, decoders(), False, False, torch.device("cpu"))
            self.init_param()

    model = MTLModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history, weights = [], []
    for step in range(STEPS):
        model.epoch = 0
        x, targets = data(step)
        predictions = model(x)
        losses = torch.stack([scale * mse_loss(predictions[t], targets[t]) for t, scale in SCALES.items()])
        optimizer.zero_grad(set_to_none=False)
        weights.append(model.backward(losses, calpha=0.5, rescale=1))
        optimizer.step()
        history.append([float(loss) / scale for loss, scale in zip(losses.detach(), SCALES.values())])
    return torch.tensor(history), torch.from_numpy(np.array(weights))


runs = {name: train(weighting) for name, weighting in weightings.items()}

# %% [markdown]
# ## A loop of your own
#
# Without the inheritance: a method, and one call. `rep_grad=False` in LibMTL is `shared=`; `rep_grad=True` is
# `fan_out`, one ordinary backward.


# %%
def own(method: fastmtl.GramMethod, *, representation: bool) -> tuple[Tensor, Tensor]:
    """The same, from gradients of the parameters or of the representation."""
    body, heads = encoder(), decoders()
    optimizer = torch.optim.Adam([*body.parameters(), *heads.parameters()], lr=3e-3)
    history, weights = [], []
    for step in range(STEPS):
        x, targets = data(step)
        optimizer.zero_grad()
        if representation:
            hs = fastmtl.fan_out(body(x), tasks=list(SCALES), method=method)
            losses = {t: scale * mse_loss(heads[t](hs[t]), targets[t]) for t, scale in SCALES.items()}
            hs.total(losses).backward()
            info = hs.info
        else:
            h = body(x)
            losses = {t: scale * mse_loss(heads[t](h), targets[t]) for t, scale in SCALES.items()}
            info = method.backward(losses, shared=body)
        optimizer.step()
        assert info is not None
        history.append([float(losses[t].detach()) / scale for t, scale in SCALES.items()])
        weights.append(info.alpha)
    return torch.tensor(history), torch.stack(weights)


runs["own loop, CAGrad"] = own(fastmtl.CAGrad(c=0.5, rescale=1), representation=False)
runs["own loop, Aligned-MTL"] = own(fastmtl.AlignedMTL(), representation=False)
runs["own loop, Aligned-MTL-UB"] = own(fastmtl.AlignedMTL(), representation=True)
last = max(STEPS // 10, 1)
print(f"{'':>26}", *(f"{task:>8}" for task in SCALES))
for name, (history, _) in runs.items():
    print(f"{name:>26}", *(f"{x:>8.3f}" for x in history[-last:].mean(0).tolist()))
difference = (runs["own loop, CAGrad"][0] - runs["fastmtl's CAGrad"][0]).abs().max()
print(f"largest difference of a loss between fastmtl's CAGrad in either loop: {float(difference):.0e}")

# %%
figure = Figure(figsize=(12, 3), layout="constrained")
axes = figure.subplots(1, 3)
for name, (history, weights) in runs.items():
    style = ":" if name == "own loop, CAGrad" else "-"
    for t, task in enumerate(("depth", "normal")):
        axes[t].plot(history[:, t], style, label=name, linewidth=1.2)
        axes[t].set(title=f"loss of {task!r}", xlabel="step", yscale="log")
    axes[2].plot(weights[:, 0] / weights.sum(1), style, label=name, linewidth=1.2)
axes[0].legend(fontsize=8)
axes[2].set(title="share of 'depth' in the task weights", xlabel="step")
figure.savefig("from_libmtl.svg")

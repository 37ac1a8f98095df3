# %% [markdown]
# # From TorchJD
#
# A loop written for TorchJD runs here with TorchJD's own aggregator, then with fastmtl's after one changed import,
# and then with one call in place of two. All three take the same steps. This page is a walk-through;
# [Migration](../migration.md#from-torchjd) lists every difference.

# %%
import time
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchjd.aggregation import UPGrad as TheirUPGrad
from torchjd.autojac import jac_to_grad, mtl_backward

import fastmtl
from fastmtl.integrations.torchjd import UPGrad

STEPS = 150
SCALES = (1.0, 3.0, 10.0, 30.0)
torch.set_num_threads(1)

Step = Callable[[nn.Module, Tensor, list[Tensor]], None]


def data(seed: int) -> tuple[Tensor, Tensor]:
    """A batch: inputs [64, 8], targets [4, 64, 1]."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([torch.sin(2 * x[:, :1]), x[:, 1:2] * x[:, 2:3], x[:, 3:4].abs(), -x[:, :1]])


def train(step: Step) -> tuple[Tensor, float]:
    """Losses [STEPS, 4] in their own units, and the median time of a step in milliseconds."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(128, 1) for _ in SCALES)
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=3e-3)
    history, times = [], []
    for k in range(STEPS):
        x, targets = data(k)
        start = time.perf_counter()
        features = encoder(x)
        losses = [scale * mse_loss(head(features), y) for scale, head, y in zip(SCALES, heads, targets)]
        optimizer.zero_grad()
        step(encoder, features, losses)
        optimizer.step()
        times.append(time.perf_counter() - start)
        history.append([float(loss.detach()) / scale for loss, scale in zip(losses, SCALES)])
    return torch.tensor(history), 1e3 * sorted(times)[len(times) // 2]


# %% [markdown]
# ## As it was
#
# `mtl_backward` leaves a Jacobian in `.jac` of the encoder's parameters, and `jac_to_grad` aggregates it.

# %%
theirs = TheirUPGrad()


def before(encoder: nn.Module, features: Tensor, losses: list[Tensor]) -> None:
    """TorchJD alone."""
    mtl_backward(losses, features=features)
    jac_to_grad(encoder.parameters(), theirs)


# %% [markdown]
# ## One import line
#
# `from fastmtl.integrations.torchjd import UPGrad`. Arguments and attributes are TorchJD's, and so is the rest of the
# loop:

# %%
ours = UPGrad()


def imported(encoder: nn.Module, features: Tensor, losses: list[Tensor]) -> None:
    """The same two calls, with this package's aggregator."""
    mtl_backward(losses, features=features)
    jac_to_grad(encoder.parameters(), ours)


# %% [markdown]
# ## One call
#
# `backward` does both and keeps no Jacobian. TorchJD adds 1e-4 to the diagonal of the normalised Gramian by default;
# `ridge=1e-4` does the same here, and without it the projection is exact.

# %%
method = fastmtl.UPGrad(ridge=1e-4)


def called(encoder: nn.Module, features: Tensor, losses: list[Tensor]) -> None:
    """One call, no Jacobian in memory."""
    method.backward(losses, features=features, shared=encoder)


runs = {"TorchJD": train(before), "import from fastmtl": train(imported), "method.backward": train(called)}
print(f"{'':>20} {'ms a step':>10}  last losses")
for name, (history, took) in runs.items():
    print(f"{name:>20} {took:>10.2f} ", *(f"{x:.4f}" for x in history[-1].tolist()))

# %%
figure = Figure(figsize=(11, 3), layout="constrained")
axes = figure.subplots(1, 3)
for name, style in zip(runs, ("-", "--", ":")):
    for t in range(2):
        axes[t].plot(runs[name][0][:, t], style, label=name, linewidth=1.5)
        axes[t].set(title=f"loss of task {t}", xlabel="step", yscale="log")
axes[0].legend()
axes[2].bar(list(runs), [took for _, took in runs.values()])
axes[2].set(title="median step, ms")
axes[2].tick_params(axis="x", labelrotation=12)
figure.savefig("from_torchjd.svg")

# %% [markdown]
# The curves lie on top of each other. A step of this size is mostly Python and dispatch; [the
# benchmarks](../performance.md#training-steps) have larger ones.
#
# ## What does differ
#
# Aligned-MTL drops directions in which the gradients hardly extend. TorchJD decides that relative to the *longest*
# gradient, so a task whose gradient is very long makes the others vanish. Here gradients are compared at unit length:

# %%
from torchjd.aggregation import AlignedMTL as TheirAlignedMTL  # noqa: E402

from fastmtl.integrations.torchjd import AlignedMTL  # noqa: E402

G = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1.0], [1e5]])
for name, aggregator in (
    ("TorchJD", TheirAlignedMTL()),
    ("fastmtl", AlignedMTL()),
    ('fastmtl, rank_rule="gram"', AlignedMTL(rank_rule="gram")),
):
    result = aggregator(G)
    cosines = torch.nn.functional.cosine_similarity(G, result[None])
    print(f"{name:>26}: cosine with each task", *(f"{x:.2f}" for x in cosines.tolist()))

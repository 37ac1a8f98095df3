# %% [markdown]
# # A loss for each example
#
# Each example of a batch has a loss, and each loss has a gradient. `batch_dim=0` tells `backward` that the losses
# belong to single examples. It then computes the exact Gram matrix [B, B] of their gradients from one ordinary backward
# pass, and a second one that checks that the examples do not mix. [How that works, and what it
# costs](../per-example.md).
#
# Two uses of it: aggregating the gradients of examples as if they were tasks, so that rare ones are not outvoted, and
# finding examples with wrong labels.

# %%
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastmtl

STEPS = 200
torch.set_num_threads(1)  # these tensors are too small for more


def moons(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points [N, 2] on two interleaved half circles, and which of the two [N]."""
    generator = torch.Generator().manual_seed(seed)
    angle, y = math.pi * torch.rand(n, generator=generator), torch.arange(n) % 2
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    return torch.where(y[:, None] == 1, lower, upper) + 0.15 * torch.randn(n, 2, generator=generator), y


def network() -> nn.Sequential:
    """Layer norm, not batch norm: with batch statistics, loss b depends on the other examples."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


x_test, y_test = moons(2000, 2)

# %% [markdown]
# ## A rare class
#
# One example in eleven belongs to class 1. What changes in the loop is `reduction="none"` and the call of `backward`.
# `Uniform` is the mean of the gradients, the ordinary step. UPGrad takes no step that raises the loss of any example
# in the batch, to first order.

# %%
x, y = moons(1000, 0)
common = (y == 0) | (torch.arange(len(y)) % 20 == 1)
x, y = x[common], y[common]
print(f"{len(y)} examples, {int(y.sum())} of them of the rare class")


def train(method: fastmtl.GramMethod, x: Tensor, y: Tensor) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The network, its test accuracies [STEPS, 2] by class, and the rare class's share of the weights [STEPS]."""
    net, accuracy, shares = network(), [], []
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(STEPS):
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:64]
        losses = cross_entropy(net(x[rows]), y[rows], reduction="none")  # [B]
        optimizer.zero_grad()
        info = method.backward(losses, batch_dim=0)
        optimizer.step()
        shares.append(float(info.alpha[y[rows] == 1].sum() / info.alpha.sum()))
        with torch.no_grad():
            right = (net(x_test).argmax(1) == y_test).float()
            accuracy.append([float(right[y_test == k].mean()) for k in range(2)])
    return net, torch.tensor(accuracy), torch.tensor(shares)


runs = {
    "mean gradient": train(fastmtl.Uniform(), x, y),
    "UPGrad": train(fastmtl.UPGrad(), x, y),
    'Aligned-MTL, scale="rmse"': train(fastmtl.AlignedMTL(scale="rmse"), x, y),
}
print(f"{'accuracy on the rare class':>26} {'step 10':>8} {'step 25':>8} {'the end':>8}   weight, first ten steps")
for name, (_net, accuracy, shares) in runs.items():
    at = [float(accuracy[min(step, STEPS) - 1, 1]) for step in (10, 25, STEPS)]
    print(f"{name:>26}", *(f"{value:>8.2f}" for value in at), f"  {100 * float(shares[:10].mean()):.0f} %")

# %% [markdown]
# UPGrad gives the rare examples several times their share of the weight, and learns their class earlier. In the end all
# three know it: this network can fit every example.
#
# ## Which labels are wrong?
#
# Now with balanced classes, and with 15 % of the labels flipped. After training on the mean, one more call gives the
# Gram matrix of all gradients. Its diagonal has their squared norms, and the longest gradients belong to the examples
# that the network disagrees with:

# %%
x, truth = moons(256, 0)
flipped = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) < 0.15
y = torch.where(flipped, 1 - truth, truth)
net, *_rest = train(fastmtl.Uniform(), x, y)
info = fastmtl.Uniform().backward(cross_entropy(net(x), y, reduction="none"), batch_dim=0)
norms = fastmtl.diagnostics.norms(info)
for said, chosen in (("right", ~flipped), ("wrong", flipped)):
    print(f"{said} labels: median norm of the gradient {float(norms[chosen].median()):.2f}")
suspects = norms.argsort(descending=True)[: int(flipped.sum())]
print(f"of the {len(suspects)} longest gradients, {int(flipped[suspects].sum())} belong to wrong labels")

# %%
figure = Figure(figsize=(12, 3.4), layout="constrained")
axes = figure.subplots(1, 3)
for name, (_net, accuracy, _shares) in runs.items():
    axes[0].plot(accuracy[:, 1], label=name, linewidth=1)
axes[0].set(title="test accuracy on the rare class", xlabel="step", xscale="log")
axes[0].legend()
for mark, said, chosen in (("o", "right", ~flipped), ("x", "wrong", flipped)):
    axes[1].scatter(x[chosen, 0], x[chosen, 1], c=y[chosen], marker=mark, s=18, cmap="coolwarm", label=f"{said} labels")
axes[1].set(title="data with wrong labels (×)")
least, most = float(norms.min().clamp_min(1e-4)), float(norms.max())
bins = torch.logspace(math.log10(least), math.log10(most), 30).tolist()
axes[2].hist([norms[~flipped].tolist(), norms[flipped].tolist()], bins, stacked=True, label=["right", "wrong"])
axes[2].set(title="norms of the gradients", xscale="log")
axes[2].legend()
figure.savefig("single_examples.svg")

# %% [markdown]
# Methods that give every example a say give wrong labels one, too: look at the norms first. [On
# digits](../per-example.md#wrong-labels) there are numbers for training on wrong labels.

# %% [markdown]
# ## Examples that mix
#
# With batch norm in training mode the loss of one example depends on all others, and there is no gradient of a single
# example to speak of. That is an error, and nothing is written:

# %%
mixing = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
try:
    fastmtl.UPGrad().backward(cross_entropy(mixing(x), y, reduction="none"), batch_dim=0)
except ValueError as error:
    print(error)

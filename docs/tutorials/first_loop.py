# %% [markdown]
# # A first loop
#
# One encoder, three heads, three losses, one of which is a hundred times as large as the others. First with the plain
# sum, then with Aligned-MTL: a few lines change.

# %%
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fastmtl

STEPS = 300
SCALES = (1.0, 1.0, 100.0)


def data(seed: int) -> tuple[Tensor, Tensor]:
    """A batch: inputs [N, 8], and targets [3, N, 1] that depend on them in three ways."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([torch.sin(2 * x[:, :1]), x[:, 1:2] * x[:, 2:3], x[:, 3:4].abs() - x[:, :1]])


def network() -> tuple[nn.Sequential, nn.ModuleList]:
    """The shared encoder, and a head for each task."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh())
    return encoder, nn.ModuleList(nn.Linear(16, 1) for _ in SCALES)


# %% [markdown]
# ## The plain sum
#
# What every loop does. The third loss has by far the longest gradient, and the encoder follows it.

# %%
encoder, heads = network()
optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=3e-3)
plain = []
for step in range(STEPS):
    x, targets = data(step)
    h = encoder(x)
    losses = [scale * mse_loss(head(h), y) for scale, head, y in zip(SCALES, heads, targets)]
    optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    optimizer.step()
    plain.append([float(loss.detach()) / scale for loss, scale in zip(losses, SCALES)])

# %% [markdown]
# ## Aligned
#
# `fan_out` gives each head an alias of the representation, and `hs.total` is the loss to call backward on. It is one
# ordinary backward: on its way through the aliases the three gradients are aligned, and one goes on into the encoder.

# %%
encoder, heads = network()
optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=3e-3)
method = fastmtl.AlignedMTL()
aligned, kappa = [], []
info: fastmtl.Info | None = None
for step in range(STEPS):
    x, targets = data(step)
    hs = fastmtl.fan_out(encoder(x), tasks=3, method=method)
    losses = [scale * mse_loss(head(h), y) for scale, head, h, y in zip(SCALES, heads, hs, targets)]
    optimizer.zero_grad()
    hs.total(losses).backward()
    optimizer.step()
    aligned.append([float(loss.detach()) / scale for loss, scale in zip(losses, SCALES)])
    info = hs.info
    assert info is not None  # set by the backward pass
    kappa.append(float(fastmtl.diagnostics.condition_number(info)))

# %% [markdown]
# ## The result
#
# Means over the last tenth of the steps, every loss in its own unit. The tasks that were drowned out gain, and the one
# that dominated pays.

# %%
last = max(STEPS // 10, 1)
print("task  plain sum  Aligned-MTL")
for t in range(3):
    before, after = (sum(run[k][t] for k in range(-last, 0)) / last for run in (plain, aligned))
    print(f"{t:>4}  {before:>9.3f}  {after:>11.3f}")
print(f"condition number of the task gradients: {min(kappa):.0f} to {max(kappa):.0f}")

# %% [markdown]
# `hs.info` also says how the step was put together: the encoder's gradient is the sum of the tasks' with these
# weights.

# %%
print(info)

# %%
figure = Figure(figsize=(9, 3), layout="constrained")
axes = figure.subplots(1, 3)
for t, ax in enumerate(axes):
    for run, label in ((plain, "plain sum"), (aligned, "Aligned-MTL")):
        ax.plot([row[t] for row in run], label=label, linewidth=1)
    ax.set(title=f"loss of task {t}", xlabel="step", yscale="log")
axes[-1].legend()
figure.savefig("first_loop.svg")

# %% [markdown]
# **With SGD, re-tune the learning rate**: the length of the aligned gradient is set by the smallest singular value of
# the task gradients, and it is usually shorter than the gradient of the sum. Here is by how much, in the first step:

# %%
encoder, heads = network()
x, targets = data(0)
losses = [scale * mse_loss(head(encoder(x)), y) for scale, head, y in zip(SCALES, heads, targets)]
info = method.backward(losses, shared=encoder)
ones = torch.ones(3, dtype=torch.float64)
print(f"{float(fastmtl.diagnostics.total_norm(info, ones) / fastmtl.diagnostics.total_norm(info)):.0f} times")

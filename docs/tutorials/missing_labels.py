# %% [markdown]
# # Missing labels, and weights now and then
#
# Most examples have labels for some tasks only. A task without any label in a batch is *absent* from that step: pass
# None in place of its loss. It gets the weight 0, and the others are aggregated as if it did not exist.

# %%
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fastmtl

STEPS = 150
LABELLED = (0.9, 0.2, 0.02)  # shares of the examples

torch.manual_seed(0)
encoder = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh())
heads = nn.ModuleList(nn.Linear(16, 1) for _ in LABELLED)
optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=3e-3)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [N, 6], targets [3, N, 1], and which of them are known [3, N]."""
    x = torch.randn(32, 6)
    targets = torch.stack([torch.sin(2 * x[:, :1]), x[:, 1:2] * x[:, 2:3], x[:, 3:4].abs()])
    return x, targets, torch.rand(3, 32) < torch.tensor(LABELLED)[:, None]


# %% [markdown]
# The loss of a task is the mean over *its* labelled examples. Dividing the sum by the number of all examples would make
# a task weaker the fewer labels it has, and a multi-task method would then have to undo that.


# %%
def losses_of(hs: list[Tensor], targets: Tensor, known: Tensor) -> list[Tensor | None]:
    """A loss for each task that has a label in this batch."""
    return [
        mse_loss(head(h)[here], y[here]) if here.any() else None for head, h, y, here in zip(heads, hs, targets, known)
    ]


method, info = fastmtl.UPGrad(), fastmtl.Info(3)
absent = 0
for _ in range(STEPS):
    x, targets, known = data()
    losses = losses_of([encoder(x)] * 3, targets, known)
    optimizer.zero_grad()
    info = method.backward(losses, shared=encoder)
    optimizer.step()
    absent += losses[2] is None
print(f"task 2 was absent in {absent} of {STEPS} steps")
print(info)

# %% [markdown]
# The heads of absent tasks get no gradient, and `Adam` leaves them alone. A method with state keeps what it knows
# about the task.
#
# ## Weights in every eighth step
#
# Exact steps take one backward pass per task. Task weights change slowly, so `every=8` computes them only every eighth
# step; in between, a single pass applies the latest weights. A step with a task that was absent when the weights were
# computed computes them, too.

# %%
method = fastmtl.UPGrad()
computed = 0
for _ in range(STEPS):
    x = torch.randn(32, 6)
    targets = torch.stack([torch.sin(2 * x[:, :1]), x[:, 1:2] * x[:, 2:3], x[:, 3:4].abs()])
    h = encoder(x)
    losses = [mse_loss(head(h), y) for head, y in zip(heads, targets)]
    optimizer.zero_grad()
    info = method.backward(losses, shared=encoder, every=8)
    optimizer.step()
    computed += info.age == 0
print(f"weights were computed in {computed} of {STEPS} steps")

# %% [markdown]
# `every="auto"` finds the interval by itself: it doubles while successive weights agree, and halves when they turn.

# %%
method = fastmtl.UPGrad()
ages = []
for _ in range(STEPS):
    x = torch.randn(32, 6)
    targets = torch.stack([torch.sin(2 * x[:, :1]), x[:, 1:2] * x[:, 2:3], x[:, 3:4].abs()])
    h = encoder(x)
    optimizer.zero_grad()
    info = method.backward([mse_loss(head(h), y) for head, y in zip(heads, targets)], shared=encoder, every="auto")
    optimizer.step()
    ages.append(info.age or 0)
print(f"computed {ages.count(0)} times, at most {max(ages)} steps apart")

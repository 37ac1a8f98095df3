# %% [markdown]
# # A method of your own
#
# Most methods are one function: from the Gram matrix M = G Gᵀ of the task gradients to task weights α. You write that
# function, and the rest (passes, groups, missing tasks, data parallelism, loss scalers, diagnostics) is there already.
# Here is one, trained beside two others. [The reference](../your-own-method.md) says what `weigh` receives and must
# return.

# %%
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fastmtl

STEPS = 300
SCALES = (1.0, 10.0, 100.0)

# %% [markdown]
# ## The idea
#
# Give every gradient unit length, then weight each task by how much it *disagrees* with the others: a task whose
# gradient has a small mean cosine with the rest is the one that would lose.


# %%
class Underdog(fastmtl.GramMethod):
    """Unit gradients, weighted by a softmax of minus the mean cosine with the other tasks."""

    def __init__(self, *, temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature

    def weigh(self, M: Tensor) -> Tensor:
        """M [..., T, T], float64 -> α [..., T]."""
        squares = M.diagonal(dim1=-2, dim2=-1)
        inverse = torch.where(squares > 0, squares.rsqrt(), 0.0)  # an absent task has a row of zeros
        cosines = M * inverse[..., :, None] * inverse[..., None, :]
        others = (cosines.sum(-1) - 1) / (M.shape[-1] - 1)
        share = torch.where(squares > 0, -others / self.temperature, -torch.inf).softmax(-1)
        return share * inverse


# %% [markdown]
# ## Try it on numbers
#
# On a matrix, before any training. The third gradient opposes the first two and gets the largest share, and the
# lengths of the gradients do not matter:

# %%
G = torch.tensor([[1.0, 0.1], [1.0, 0.2], [-0.5, 1.0]])
for scales in ((1.0, 1.0, 1.0), (1.0, 100.0, 0.01)):
    rows = G * torch.tensor(scales)[:, None]
    print([round(x, 3) for x in Underdog()(rows).tolist()], "from gradients times", scales)

# %% [markdown]
# What `weigh` returns is checked, and the message says what came:

# %%
try:
    fastmtl.GramMethod.of(lambda M: M.sum(), name="wrong")(G)
except ValueError as error:
    print(error)


# %% [markdown]
# ## Train with it
#
# It is an ordinary method now: exact steps with `shared=`, the upper bound with `fan_out`, `Monitor`, `groups=`, and
# all the rest. Three tasks whose losses have very different units:


# %%
def data(seed: int) -> tuple[Tensor, Tensor]:
    """A batch: inputs [64, 8], targets [3, 64, 1]."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([torch.sin(2 * x[:, :1]), x[:, 1:2] * x[:, 2:3], x[:, 3:4].abs() - x[:, :1]])


def train(method: fastmtl.GramMethod) -> tuple[Tensor, fastmtl.Monitor]:
    """Losses [STEPS, 3], each in its own unit, and the monitor of the run."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(16, 1) for _ in SCALES)
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=3e-3)
    history, monitor = [], fastmtl.Monitor()
    for step in range(STEPS):
        x, targets = data(step)
        hs = fastmtl.fan_out(encoder(x), tasks=len(SCALES), method=method)
        losses = [scale * mse_loss(head(h), y) for scale, head, h, y in zip(SCALES, heads, hs, targets)]
        optimizer.zero_grad()
        hs.total(losses).backward()
        optimizer.step()
        assert hs.info is not None  # set by the backward pass
        monitor(hs.info, losses)
        history.append([float(loss.detach()) / scale for loss, scale in zip(losses, SCALES)])
    return torch.tensor(history), monitor


runs = {
    "plain sum": train(fastmtl.Uniform(weights="sum")),
    "Underdog": train(Underdog()),
    "Aligned-MTL": train(fastmtl.AlignedMTL()),
}
last = max(STEPS // 10, 1)
print(f"{'':>12} {'task 0':>8} {'task 1':>8} {'task 2':>8}")
for name, (history, _) in runs.items():
    print(f"{name:>12}", *(f"{x:>8.3f}" for x in history[-last:].mean(0).tolist()))

# %%
figure = Figure(figsize=(12, 3), layout="constrained")
axes = figure.subplots(1, 3)
for t in range(2):
    for name, (history, _) in runs.items():
        axes[t].plot(history[:, t], label=name, linewidth=1)
    axes[t].set(title=f"loss of task {t}", xlabel="step", yscale="log")
axes[0].legend()
watched = runs["Underdog"][1].history
share = watched["alpha"] * watched["norms"]
for t in range(len(SCALES)):
    axes[2].plot(share[:, t] / share.sum(1), label=f"task {t}", linewidth=1)
axes[2].set(title="Underdog: α · norm, as shares", xlabel="step", ylim=(0, 1))
axes[2].legend()
figure.savefig("own_method.svg")

# %% [markdown]
# A function is enough where there are no options. `fastmtl.GramMethod.of` makes a method of it:

# %%
pinv = fastmtl.GramMethod.of(lambda M: torch.linalg.pinv(M, hermitian=True).sum(-1), name="pinv")
print([round(x, 3) for x in pinv(G).tolist()])

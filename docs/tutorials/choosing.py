# %% [markdown]
# # Choosing a method
#
# Before choosing a method, look at the gradients it would get. `Monitor` records measures of the Gram matrix over a run
# of the plain sum; then a few methods run beside it. [Choosing a method](../choosing.md) has the table that goes with
# these pictures.

# %%
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

import fastmtl
from fastmtl.observe.figures import fig4

STEPS = 200


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs [N, 10], a position, its negative with noise, which conflicts, and a class."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 10, generator=generator)
    position = torch.tanh(x[:, :1] + x[:, 1:2])
    other = -position + 0.3 * torch.randn(64, 1, generator=generator)
    return x, position, other, (x[:, 2:3] * x[:, 3:4] > 0).float()


def losses_of(net: nn.ModuleDict, seed: int) -> dict[str, Tensor]:
    """Three losses: a squared error in a unit a thirtieth as long, one as it is, and a cross entropy."""
    x, position, other, kind = data(seed)
    h = net["encoder"](x)
    both = net["position"](h)  # one head predicts for two tasks that disagree
    return {
        "near": mse_loss(30 * both, 30 * position),
        "far": mse_loss(both, other),
        "kind": binary_cross_entropy_with_logits(net["kind"](h), kind),
    }


def network() -> nn.ModuleDict:
    """Encoder and two heads."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    return nn.ModuleDict({"encoder": encoder, "position": nn.Linear(32, 1), "kind": nn.Linear(32, 1)})


def train(name: str, **options: object) -> fastmtl.Monitor:
    """A run with a method of the catalog, watched."""
    net, monitor = network(), fastmtl.Monitor()
    method = fastmtl.catalog.make(name, tasks=3, **options)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(STEPS):
        losses = losses_of(net, step)
        optimizer.zero_grad()
        monitor(method.backward(losses, shared=net["encoder"]), losses)
        optimizer.step()
    return monitor


# %% [markdown]
# ## Look first
#
# `constant` with `weights="sum"` trains like the plain sum, and lets the `Monitor` see the gradients.

# %%
plain = train("constant", weights="sum")
print(
    plain.frame()[["initial/condition_number", "initial/max_norm_ratio", "initial/conflicts"]]
    .describe()
    .loc[["min", "50%", "max"]]
)

# %% [markdown]
# A condition number far above 1 has two possible causes, which the other columns tell apart: gradients of different
# length (dominance), and pairs with a negative cosine (conflict). Here it is dominance: `near` is in the small unit.

# %%
figure = Figure(figsize=(12, 3.2), layout="constrained")
plain.plot(figure.subplots(1, 3))
figure.savefig("plain.svg")

# %% [markdown]
# The mean cosine of each pair of tasks over the run:

# %%
assert plain.names is not None
assert plain.cosines is not None  # as for every method with a Gram matrix
for name, row in zip(plain.names, plain.cosines):
    print(f"{name:>5}", *(f"{x:6.2f}" for x in row))

# %% [markdown]
# ## Then compare
#
# The same network and batches under four methods. Losses are means over the last tenth of the steps.

# %%
runs = {name: train(name) for name in ("aligned", "nash", "upgrad", "gls")}
last = max(STEPS // 10, 1)
print(f"{'':>10} {'near':>8} {'far':>8} {'kind':>8}")
for name, run in {"sum": plain, **runs}.items():
    print(f"{name:>10}", *(f"{x:8.3f}" for x in run.history["losses"][-last:].mean(0)))

# %%
figure = fig4({"sum": plain, "aligned": runs["aligned"], "nash": runs["nash"]})
figure.savefig("compared.svg")

# %% [markdown]
# `near` and `far` share a head and disagree, so one of them has to lose. The sum, `upgrad` and `gls` follow `near`,
# whose unit makes it large. `nash` ignores units and lands between the two, which costs `near` most, in its small
# unit. `aligned` follows `near` more slowly, and is the one that also learns `kind`. This does not say which
# outcome you want; it says what each method does.
#
# `gls` is a method on losses: there are no gradients to look at, and it costs what the sum costs. If dominance is the
# whole problem, it is often enough. The report of a run is one page of HTML, for a colleague or for later:

# %%
page = runs["aligned"].report("aligned.html", title="Aligned-MTL on three tasks")
print(f"aligned.html: {len(page) / 1e3:.0f} kB")

# %% [markdown]
# # A physics-informed network
#
# A network u(x) is trained to solve u'' = -(4π)² sin(4πx) on [0, 1] with u(0) = u(1) = 0. It has two losses: the
# squared residual of the equation, and the squared values at the boundary. The exact solution is sin(4πx), so we can
# watch the true error.
#
# The residual is made of second derivatives, and its gradient is much longer than the boundary's. With the plain sum
# the network satisfies the equation and ignores the boundary, which solves a different problem.

# %%
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastmtl

STEPS = 600
W = 4 * math.pi
torch.set_num_threads(1)  # these tensors are too small for more


def network() -> nn.Sequential:
    """u: [N, 1] -> [N, 1], float64: residuals of second derivatives need the digits."""
    torch.manual_seed(0)
    layers = (nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    return nn.Sequential(*layers).double()


points = torch.linspace(0, 1, 64, dtype=torch.float64)[:, None].requires_grad_()
ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


def losses_of(u: nn.Module) -> dict[str, Tensor]:
    """The equation's mean squared residual, and the boundary's."""
    value = u(points)
    (first,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), points, create_graph=True)
    residual = second + W**2 * torch.sin(W * points)
    return {"equation": residual.square().mean(), "boundary": u(ends).square().mean()}


def error_of(u: nn.Module) -> float:
    """The relative error of u against the exact solution."""
    with torch.no_grad():
        exact = torch.sin(W * points)
        return float((u(points) - exact).norm() / exact.norm())


# %% [markdown]
# ## Training
#
# There are no heads and no representation to fan out: both losses use the whole network. `shared=u` aligns the
# gradients of its parameters, which works for losses with derivatives of any order.


# %%
def train(method: fastmtl.GramMethod) -> tuple[nn.Module, list[float], fastmtl.Monitor]:
    """A trained network, its error after every step, and what the gradients looked like."""
    u, errors, monitor = network(), [], fastmtl.Monitor()
    optimizer = torch.optim.Adam(u.parameters(), lr=3e-3)
    for _ in range(STEPS):
        losses = losses_of(u)
        optimizer.zero_grad()
        info = method.backward(losses, shared=u)
        optimizer.step()
        monitor(info, losses)
        errors.append(error_of(u))
    return u, errors, monitor


runs = {
    "plain sum": train(fastmtl.Uniform(weights="sum")),
    'Aligned-MTL, scale="min"': train(fastmtl.AlignedMTL()),
    'Aligned-MTL, scale="rmse"': train(fastmtl.AlignedMTL(scale="rmse")),
    "ConFIG": train(fastmtl.ConFIG()),
}
print(f"{'':>26} {'error of u':>10} {'equation':>10} {'boundary':>10}")
for name, (u, errors, _monitor) in runs.items():
    last = {key: float(loss.detach()) for key, loss in losses_of(u).items()}
    print(f"{name:>26} {errors[-1]:>10.1e} {last['equation']:>10.1e} {last['boundary']:>10.1e}")

# %% [markdown]
# The plain sum has the smallest residual and a solution that is wrong everywhere. The default step of Aligned-MTL
# makes the opposite mistake: it takes the size of the *smallest* singular value, the boundary's, and the equation is
# hardly learnt. With `scale="rmse"` both losses fall. ConFIG, which was designed for such problems, does as well.

# %%
figure = Figure(figsize=(11, 3.4), layout="constrained")
solution, progress = figure.subplots(1, 2)
x = points.detach()[:, 0]
solution.plot(x, torch.sin(W * x), color="black", linewidth=4, alpha=0.25, label="exact")
for name, (u, errors, _monitor) in runs.items():
    with torch.no_grad():
        solution.plot(x, u(points)[:, 0], label=name, linewidth=1.2)
    progress.plot(errors, label=name, linewidth=1.2)
solution.set(title="u(x)", xlabel="x", ylim=(-3, 3))
progress.set(title="relative error of u", xlabel="step", yscale="log")
progress.legend()
figure.savefig("physics.svg")

# %% [markdown]
# The `Monitor` shows why: how many times longer one gradient is than the other.

# %%
print(f"{'':>26} {'first step':>12} {'median':>12}")
for name, (_u, _errors, monitor) in runs.items():
    ratio = [float(r) for r in monitor.history["initial/max_norm_ratio"]]
    print(f"{name:>26} {ratio[0]:>12.0f} {sorted(ratio)[len(ratio) // 2]:>12.0f}")

# %% [markdown]
# All start with the same ratio. Where the boundary has been learnt its gradient becomes short, and the ratio grows to
# thousands; the plain sum never gets there.

# %% [markdown]
# ## L-BFGS afterwards
#
# The usual second phase needs a function that does not change during its line search. Compute the weights once a
# step and let the closure return their weighted sum of losses, whose gradient is the aggregated one:

# %%
u, errors, _monitor = runs['Aligned-MTL, scale="rmse"']
method = fastmtl.AlignedMTL(scale="rmse")
lbfgs = torch.optim.LBFGS(u.parameters(), max_iter=20, line_search_fn="strong_wolfe")
for _ in range(max(STEPS // 60, 1)):
    lbfgs.zero_grad()
    alpha = method.backward(losses_of(u), shared=u).alpha

    def closure(alpha: Tensor = alpha) -> float:
        """The weighted sum, with weights that stay."""
        lbfgs.zero_grad()
        total = alpha @ torch.stack(list(losses_of(u).values()))
        total.backward()
        return float(total.detach())

    lbfgs.step(closure)
print(f"error of u: {errors[-1]:.1e} after Adam, {error_of(u):.1e} after L-BFGS")

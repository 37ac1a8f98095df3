"""A physics-informed network: u'' = -π² sin(πx) with u(0) = u(1) = 0, from a residual and two boundary losses.

Losses made of second derivatives leave no representation to align at: `shared=` is exact for them. First Adam, with
weights in every step; then L-BFGS, whose line search needs a function that stays the same: weights are computed once a
step, and its closure returns Σ α_t L_t, of which Σ α_t g_t is the gradient.

    python examples/pinn.py --help
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import fastmtl


def network(width: int = 20) -> nn.Sequential:
    """u: [N, 1] -> [N, 1], float64."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)),
    )
    return layers.double()


def losses_of(u: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The mean squared residual at the points x [N, 1], and the boundary values, squared."""
    x = x.requires_grad_()
    value = u(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    residual = second + math.pi**2 * torch.sin(math.pi * x)
    left, right = u(torch.tensor([[0.0], [1.0]], dtype=x.dtype))
    return {"equation": residual.square().mean(), "left": left.square().mean(), "right": right.square().mean()}


def error_of(u: nn.Module) -> float:
    """The relative error of u, in the 2-norm on a grid."""
    with torch.no_grad():
        x = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
        exact = torch.sin(math.pi * x)
        return float((u(x) - exact).norm() / exact.norm())


def train(adam: int = 500, lbfgs: int = 5, method: fastmtl.GramMethod | None = None) -> tuple[nn.Module, fastmtl.Info]:
    """The network, after so many steps of both, and what the method saw in the last one."""
    method = method or fastmtl.AlignedMTL(scale="rmse")
    u, x = network(), torch.linspace(0, 1, 64, dtype=torch.float64)[:, None]
    first = torch.optim.Adam(u.parameters(), lr=1e-2)
    for _ in range(adam):
        first.zero_grad()
        info = method.backward(losses_of(u, x), shared=u)
        first.step()

    second = torch.optim.LBFGS(u.parameters(), max_iter=20, line_search_fn="strong_wolfe")
    for _ in range(lbfgs):
        second.zero_grad()
        info = method.backward(losses_of(u, x), shared=u)

        def closure(alpha: Tensor = info.alpha) -> float:
            second.zero_grad()
            total = alpha @ torch.stack(list(losses_of(u, x).values()))
            total.backward()
            return float(total.detach())

        second.step(closure)
    return u, info


def main(arguments: list[str] | None = None) -> float:
    """Trains, and prints the error and the last weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adam", type=int, default=500, help="steps of Adam (default: %(default)s)")
    parser.add_argument("--lbfgs", type=int, default=5, help="steps of L-BFGS (default: %(default)s)")
    options = parser.parse_args(arguments)
    u, info = train(options.adam, options.lbfgs)
    error = error_of(u)
    print(f"relative error {error:.1e}, {info}")
    return error


if __name__ == "__main__":
    main()

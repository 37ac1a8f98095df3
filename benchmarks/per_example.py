"""Losses of examples: steps of `backward(losses, batch_dim=0)` beside plain ones and those of TorchJD's autogram."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmtl

__all__ = ["NETWORKS", "Problem"]


class Problem(NamedTuple):
    """A network, and what computes its B losses."""

    network: nn.Module
    losses: Callable[[], Tensor]

    def plain(self) -> None:
        """A step of the mean loss, without optimizer."""
        self.network.zero_grad()
        self.losses().mean().backward()

    def step(self, method: fastmtl.Method) -> fastmtl.Info:
        """A step of the gradients of all losses, the check included."""
        self.network.zero_grad()
        return method.backward(self.losses(), batch_dim=0)

    def autogram(self, weighting: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """The same by TorchJD's engine, whose hooks stay on the modules: for a problem of its own."""
        from torchjd.autogram import Engine

        engine = Engine(self.network, batch_dim=0)

        def step() -> None:
            self.network.zero_grad()
            losses = self.losses()
            losses.backward(weighting(engine.compute_gramian(losses)))

        return step

    def error(self, info: fastmtl.Info) -> float:
        """The largest error of a Gram's entry, relative to the norms of its rows, beside one backward pass a loss."""
        parameters = list(self.network.parameters())
        rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in self.losses()]
        G = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
        norms = G.norm(dim=1)
        assert info.gram is not None
        return float(((info.gram - G @ G.T).abs() / norms / norms[:, None]).max())


def mlp(B: int) -> Problem:
    """64-256-256-1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    x, y = torch.randn(B, 64), torch.randn(B, 1)
    return Problem(net, lambda: (net(x) - y).square().squeeze(1))


def lenet(B: int) -> Problem:
    """LeNet with GroupNorm on images of 28 x 28."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(800, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    x, y = torch.randn(B, 1, 28, 28), torch.randint(10, (B,))
    return Problem(net, lambda: F.cross_entropy(net(x), y, reduction="none"))


class _Read(nn.Module):
    """One number from the mean over the sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.mean(1))
        return y.squeeze(1)


def transformer(B: int) -> Problem:
    """Two blocks of width 64 on sequences of 16."""
    torch.manual_seed(0)
    blocks = (nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True) for _ in range(2))
    net = nn.Sequential(*blocks, _Read(64))
    x, y = torch.randn(B, 16, 64), torch.randn(B)
    return Problem(net, lambda: (net(x) - y).square())


NETWORKS = {"mlp": mlp, "lenet": lenet, "transformer": transformer}

"""Small multi-task models and the upper bound on them in plain autograd, for the tests of the training API."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from helpers import F64, dense, randn
from torch import Tensor, nn


class MLP(nn.Module):
    """An encoder that returns one tensor; task t has a loss of its own size."""

    def __init__(self, tasks: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(tasks))
        self.to(dtype)
        self.x = randn(8, 5, dtype=dtype, seed=1)
        self.y = [randn(8, 2, dtype=dtype, seed=2 + t) for t in range(tasks)]

    def loss(self, t: int, h: Tensor) -> Tensor:
        return 3.0**t * (self.heads[t](h) - self.y[t]).square().mean()


class Stages(nn.Module):
    """Two convolutions; returns the feature maps of both, the second made from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.first(x).tanh()
        return [first, self.second(first).tanh()]


class Attention(nn.Module):
    """One task of an MTAN: masks on the feature maps of every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.down = nn.Conv2d(4, 3, 3, padding=1, stride=2)
        self.second = nn.Conv2d(9, 6, 1)
        self.out = nn.Conv2d(6, 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        a = self.down(self.first(maps[0]).sigmoid() * maps[0]).relu()
        return self.out(self.second(torch.cat([maps[1], a], 1)).sigmoid() * maps[1])


class MTAN(nn.Module):
    """An encoder that returns a list of feature maps, and an attention network for each task."""

    def __init__(self, tasks: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.encoder = Stages()
        self.heads = nn.ModuleList(Attention() for _ in range(tasks))
        self.to(dtype)
        self.x = randn(2, 3, 6, 6, dtype=dtype, seed=1)
        self.y = [randn(2, 1, 3, 3, dtype=dtype, seed=2 + t) for t in range(tasks)]

    def loss(self, t: int, h: list[Tensor]) -> Tensor:
        return 2.0**t * (self.heads[t](h) - self.y[t]).square().mean()


def encoded(model: nn.Module) -> list[Tensor]:
    h = model.encoder(model.x)
    return [h] if isinstance(h, Tensor) else h


def losses_of(model: nn.Module, h: object) -> list[Tensor]:
    return [model.loss(t, h) for t in range(len(model.heads))]


def encoder_gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.encoder.parameters()]


def task_gradients(model: nn.Module) -> list[list[Tensor]]:
    """Z_t, each task's gradient of the representation, from leaves that stand for it."""
    rows = []
    for t in range(len(model.heads)):
        leaves = [x.detach().requires_grad_() for x in encoded(model)]
        loss = model.loss(t, leaves if isinstance(model, MTAN) else leaves[0])
        rows.append(list(torch.autograd.grad(loss, leaves)))
    return rows


def upper_bound(model: nn.Module, aggregate: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The encoder's gradients from the single cotangent `aggregate(Z)`: spec.md, section 2."""
    cotangent = aggregate(dense(task_gradients(model)))
    h = encoded(model)
    parts = cotangent.split([x.numel() for x in h])
    cotangents = [part.reshape(x.shape).to(x.dtype) for part, x in zip(parts, h, strict=True)]
    return list(torch.autograd.grad(h, list(model.encoder.parameters()), cotangents))


def shortest(G: Tensor) -> Tensor:
    """The shortest vector in the convex hull of few rows that are not zero, by trying every face; float64 [P]."""
    G = G.to(F64)
    G = G[G.any(1)]
    best = G[int(G.norm(dim=1).argmin())]
    for size in range(2, G.shape[0] + 1):
        for face in itertools.combinations(range(G.shape[0]), size):
            base, edges = G[face[0]], G[list(face[1:])] - G[face[0]]
            steps = torch.linalg.lstsq(edges.T, -base[:, None], driver="gelsd").solution[:, 0]
            point = base + steps @ edges
            if (steps >= 0).all() and steps.sum() <= 1 and point.norm() < best.norm():
                best = point
    return best

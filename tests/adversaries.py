"""Gradients on which rounding errors do not cancel: few distinct values, long runs, sums that round the same way in
every SIMD lane. Each pattern is a function (T, P, generator) -> float64 [T, P], to be cast to the dtype in question."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import F64
from torch import Tensor

__all__ = ["PATTERNS"]

Pattern = Callable[[int, int, torch.Generator], Tensor]


def _signs(*shape: int, gen: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=gen).to(F64) * 2 - 1


def _in_runs(values: Tensor, P: int) -> Tensor:
    """Each column repeated until there are P of them."""
    return values.repeat_interleave(max(1, -(-P // values.shape[1])), 1)[:, :P]


def hadamard(T: int, P: int, gen: torch.Generator, factor: float) -> Tensor:
    """1 + factor · H without its first row, every column in a run: mutually orthogonal parts on a common offset."""
    H = torch.ones(1, 1, dtype=F64)
    while H.shape[0] <= T:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return _in_runs(1 + factor * H[1 : T + 1], P)


def offset_signs(T: int, P: int, gen: torch.Generator, factor: float) -> Tensor:
    """The same with random signs, new ones in every column."""
    return 1 + factor * _signs(T, P, gen=gen)


def repeated_values(T: int, P: int, gen: torch.Generator) -> Tensor:
    """Rows of three values each, as gradients of a quantised or saturated network."""
    values = torch.randn(T, 3, dtype=F64, generator=gen)
    return values.gather(1, torch.randint(3, (T, P), generator=gen))


def one_hot(T: int, P: int, gen: torch.Generator) -> Tensor:
    """Embedding rows: blocks of columns of which each task touches one, some together."""
    blocks = max(2 * T, 8)
    touched = torch.zeros(T, blocks, dtype=F64)
    touched[torch.arange(T), torch.randperm(blocks, generator=gen)[:T]] = 1
    touched += (torch.rand(T, blocks, generator=gen) < 1 / T).to(F64)
    return _in_runs(touched, P) * (1 + 0.1 * _signs(1, P, gen=gen))


def relu_sparse(T: int, P: int, gen: torch.Generator) -> Tensor:
    """Outer products of sparse activations and cotangents of one sign, flattened."""
    width = max(1, round(P**0.5))
    a = torch.randn(T, width, dtype=F64, generator=gen).sub(0.5).relu()
    c = torch.randn(T, -(-P // width), dtype=F64, generator=gen).abs()
    return (c[:, :, None] * a[:, None, :]).flatten(1)[:, :P]


def bfloat16_values(T: int, P: int, gen: torch.Generator) -> Tensor:
    """What mixed precision leaves in float32: eight bits, products of which are exact and whose sums round alike."""
    return (1 + 0.3 * torch.randn(T, P, dtype=F64, generator=gen)).bfloat16().to(F64)


def constant_blocks(T: int, P: int, gen: torch.Generator) -> Tensor:
    """A constant in every block of columns, as of a bias that is broadcast."""
    return _in_runs(0.7 + 0.2 * torch.randn(T, max(4, 2 * T), dtype=F64, generator=gen), P)


def common_drift(T: int, P: int, gen: torch.Generator) -> Tensor:
    """A large common part that grows along the columns, and small parts of each task's own."""
    return torch.linspace(0.5, 2, max(P, 1), dtype=F64)[:P] + 0.05 * _signs(T, P, gen=gen)


PATTERNS: dict[str, Pattern] = {
    **{f"hadamard {f}": lambda T, P, gen, f=f: hadamard(T, P, gen, f) for f in (1.0, 0.354, 0.1)},
    **{f"offset signs {f}": lambda T, P, gen, f=f: offset_signs(T, P, gen, f) for f in (3.0, 0.5, 0.1)},
    "repeated values": repeated_values,
    "one-hot": one_hot,
    "relu-sparse": relu_sparse,
    "bfloat16 values": bfloat16_values,
    "constant blocks": constant_blocks,
    "common drift": common_drift,
}

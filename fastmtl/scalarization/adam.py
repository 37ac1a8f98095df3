"""Adam for the few numbers that a method learns by itself: state in buffers, no step that is skipped on the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Adam"]


class Adam(nn.Module):
    """Adam (Kingma and Ba, ICLR 2015) on a vector of T numbers, as `torch.optim.Adam` computes it.

    Unlike there, a step can be left out by a condition on the device, for each number, and the state is part of the
    owner's `state_dict()`.

    Args:
        tasks: the length T.
    """

    BETAS = (0.9, 0.999)
    EPS = 1e-8

    mean: Tensor
    square: Tensor
    steps: Tensor

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(tasks, dtype=torch.int64))

    def reset(self) -> None:
        """Forgets all steps."""
        for buffer in self.buffers():
            buffer.zero_()

    def step(self, x: Tensor, gradient: Tensor, when: Tensor, lr: float, weight_decay: float = 0.0) -> Tensor:
        """`x` [T] after one step, where `when` (bool, [] or [T]) is true; else `x`, and no state changes.

        Args:
            x: the numbers.
            gradient: their gradient [T].
            when: of which numbers it is a step.
            lr: learning rate.
            weight_decay: times `x`, added to the gradient.
        """
        gradient = gradient + weight_decay * x
        first, second = self.BETAS
        mean = first * self.mean + (1 - first) * gradient
        square = second * self.square + (1 - second) * gradient.square()
        steps = (self.steps + 1).to(torch.float64)
        size = (square / (1 - second**steps)).sqrt() + self.EPS
        moved = x - lr / (1 - first**steps) * mean / size
        self.mean.copy_(torch.where(when, mean, self.mean))
        self.square.copy_(torch.where(when, square, self.square))
        self.steps.add_(when)
        return torch.where(when, moved, x)

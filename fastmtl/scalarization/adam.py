"""Adam for the few numbers that a method learns itself: state in buffers, steps skipped without asking the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.inputs import has_numbers

__all__ = ["Adam"]


class Adam(nn.Module):
    """Adam (Kingma and Ba, ICLR 2015) on a vector of T numbers, as `torch.optim.Adam` computes it.

    Unlike there, a condition on the device can skip the step of each number, and the state is part of the owner's
    `state_dict()`.

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

    def step(self, x: Tensor, gradient: Tensor, when: Tensor | None, lr: float, weight_decay: float = 0.0) -> Tensor:
        """`x` [T] after one step, where `when` (bool, [] or [T]; None for all) is true; else `x`, and no state changes.

        Args:
            x: the numbers.
            gradient: their gradient [T].
            when: which numbers take a step; None for all.
            lr: learning rate.
            weight_decay: factor of `x` that is added to the gradient.
        """
        gradient = torch.add(gradient, x, alpha=weight_decay)
        first, second = self.BETAS
        done: list[int] = self.steps.tolist() if when is None and has_numbers(self.steps) else []
        if done and min(done) == max(done):
            self.mean.mul_(first).add_(gradient, alpha=1 - first)
            self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            self.steps.add_(1)
            size = (self.square / (1 - second ** (done[0] + 1))).sqrt_().add_(self.EPS)
            return torch.addcdiv(x, self.mean, size, value=-lr / (1 - first ** (done[0] + 1)))
        when = torch.ones((), dtype=torch.bool, device=x.device) if when is None else when
        mean = first * self.mean + (1 - first) * gradient
        square = second * self.square + (1 - second) * gradient.square()
        steps = (self.steps + 1).to(torch.float64)
        size = (square / (1 - second**steps)).sqrt() + self.EPS
        moved = x - lr / (1 - first**steps) * mean / size
        self.mean.copy_(torch.where(when, mean, self.mean))
        self.square.copy_(torch.where(when, square, self.square))
        self.steps.add_(when)
        return torch.where(when, moved, x)

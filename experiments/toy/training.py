"""A run: Adam on all problems at once, which are methods x starts x task weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.harness import Run
from experiments.toy.methods import batched
from experiments.toy.problem import BOUND, INITS, gradients, losses, optimum, task_weights

__all__ = ["LR", "Trajectories", "train"]

LR = 1e-3


class Trajectories(nn.Module):
    """Where every problem is, `x` [methods, B, 2], and where it was: `points` [methods, B, times, 2], NaN until then.

    B are the starts for the first a, then for the second, and so on.
    """

    points: Tensor

    def __init__(self, methods: int, a: int, steps: int, every: int) -> None:
        super().__init__()
        self.every = every
        self.x = nn.Parameter(torch.tensor(INITS).repeat(methods, a, 1))
        self.register_buffer("points", torch.full((steps // every + 1, *self.x.shape), torch.nan))

    def record(self, step: int) -> None:
        """Notes where all are before this step, if it is one of every `every`."""
        if step % self.every == 0:
            self.points[step // self.every] = self.x.detach()


def train(run: Run, track: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> dict[str, Any]:
    """Trains to the end, from a checkpoint if there is one.

    The run's settings: `methods` (names), `a` (numbers), `steps`, `seed` (of the methods that draw), `save_every` and
    `record_every` (steps). The run's folder gets trajectories.npz: `points` [methods, a, starts, times, 2], float32.

    Returns:
        What the run has finished with: `ends`, for every problem its method, start, a, x, losses, and how far L0 is
        from its optimum.
    """
    methods, steps, save_every = (run.settings[k] for k in ("methods", "steps", "save_every"))
    a = torch.tensor(run.settings["a"], dtype=torch.float64)
    weights = task_weights(a).repeat_interleave(len(INITS), 0).float()  # [B, 2]
    problems = Trajectories(len(methods), len(a), steps, run.settings["record_every"])
    x = problems.x
    balancers = {name: batched(name, len(weights), run.settings["seed"]) for name in methods}
    optimizer = torch.optim.Adam([x, *(p for b in balancers.values() for p in b.learned)], LR, fused=True)
    parts = {"problems": problems, "optimizer": optimizer, **{f"method {k}": b for k, b in balancers.items()}}
    target = _optimal(a).repeat_interleave(len(INITS))  # [B]
    for step in track(range(run.restore(**parts), steps)):
        problems.record(step)
        L, G = gradients(x)
        L, G = weights * (L - BOUND), weights[..., None] * G
        x.grad = torch.stack([b(*of) for b, *of in zip(balancers.values(), L, G, strict=True)])
        optimizer.step()
        if (step + 1) % save_every == 0:
            gap = (weights * losses(x.detach().double())).sum(-1) - target
            run.log(step, **{name: gap[m].mean().item() for m, name in enumerate(methods)})
            run.save(step + 1, **parts)
    problems.record(steps)
    _write_points(run, problems.points.reshape(-1, len(methods), len(a), len(INITS), 2).permute(1, 2, 3, 0, 4))
    return run.finish(ends=_ends(methods, a, x.detach().double()))


def _optimal(a: Tensor) -> Tensor:
    """L0* for every a."""
    return (task_weights(a) * losses(optimum(a))).sum(-1)


def _ends(methods: list[str], a: Tensor, x: Tensor) -> list[dict[str, Any]]:
    ends = []
    x = x.reshape(len(methods), len(a), len(INITS), 2)
    L, targets = losses(x), _optimal(a)
    for m, name in enumerate(methods):
        for k, share in enumerate(a.tolist()):
            for i, init in enumerate(INITS):
                l1, l2 = L[m, k, i].tolist()
                l0, target = share * l1 + (1 - share) * l2, targets[k].item()
                x1, x2 = x[m, k, i].tolist()
                end = {"x1": x1, "x2": x2, "L1": l1, "L2": l2, "L0": l0, "L0*": target, "distance": l0 - target}
                ends.append({"method": name, "init": list(init), "a": share, **end})
    return ends


def _write_points(run: Run, points: Tensor) -> None:
    path = run.folder / "trajectories.npz"
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        np.savez_compressed(file, points=points.numpy())
    new.replace(path)

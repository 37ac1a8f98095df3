"""TorchJD's documented example of multi-task learning (autojac, its README), as a function that makes its step.

`variant` gives the same file with one line changed: where `UPGrad` comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, MSELoss, ReLU, Sequential
from torch.optim import SGD
from torchjd.aggregation import UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward

__all__ = ["THEIRS", "training", "variant"]

THEIRS = "from torchjd.aggregation import UPGrad"
OURS = "from fastmtl.integrations.torchjd import UPGrad"


def training(dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """A training from a fixed start: each call is a step on the next of 8 batches, and returns the two losses."""
    torch.manual_seed(0)
    shared = Sequential(Linear(10, 5), ReLU(), Linear(5, 3), ReLU()).to(dtype)
    heads = [Linear(3, 1, dtype=dtype), Linear(3, 1, dtype=dtype)]
    optimizer = SGD([p for module in (shared, *heads) for p in module.parameters()], lr=0.1)
    loss_fn = MSELoss()
    aggregator = UPGrad()
    inputs = torch.randn(8, 16, 10, dtype=dtype)
    targets = torch.randn(2, 8, 16, 1, dtype=dtype)
    steps = 0

    def step() -> Tensor:
        nonlocal steps
        batch, steps = steps % 8, steps + 1
        features = shared(inputs[batch])
        losses = [loss_fn(head(features), target[batch]) for head, target in zip(heads, targets, strict=True)]
        mtl_backward(losses, features=features)
        jac_to_grad(shared.parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).detach()

    return step


def variant(line: str = OURS) -> dict[str, Any]:
    """The names that this file defines with `line` in the place of TorchJD's import."""
    source = Path(__file__).read_text()
    assert source.count(f"\n{THEIRS}\n") == 1
    names: dict[str, Any] = {"__name__": "variant", "__file__": __file__}
    exec(compile(source.replace(f"\n{THEIRS}\n", f"\n{line}\n"), f"{__file__} with {line}", "exec"), names)
    return names

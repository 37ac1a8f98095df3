"""The tasks: what a head has to give, its loss, and its metrics pooled over a data set.

Outputs are float32 [B, C, H, W] (`Task.output` of what a head gives), targets float32 of the same shape, or int64
[B, H, W] for segmentation. Means are over valid pixels alone; a batch without any has loss zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.harness import Metric

__all__ = ["Depth", "Disparity", "Instance", "Meter", "Normals", "Segmentation", "Task"]

NO_INSTANCE = 250.0  # the offset that stands for "no instance here"
WITHIN = (11.25, 22.5, 30.0)  # degrees


class Meter(Protocol):
    """Gathers a task's metrics over batches."""

    def update(self, output: Tensor, target: Tensor) -> None:
        """Takes in one batch."""

    def compute(self) -> dict[str, float]:
        """The metrics by name; NaN where no pixel was valid."""


class Task(ABC):
    """One task.

    Attributes:
        name: also the name of its target in a sample.
        channels: of its head.
        metrics: of its meter, in the order of the paper's tables.
    """

    name: str
    channels: int
    metrics: list[Metric]

    def output(self, raw: Tensor) -> Tensor:
        """The prediction from what the head gives, both [B, C, H, W]."""
        return raw

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar."""

    @abstractmethod
    def meter(self) -> Meter:
        """A new meter."""


class Segmentation(Task):
    """A class for each pixel: negative log-likelihood; mIoU and pixel accuracy in percent.

    Args:
        classes: number of classes.
        ignore: the label of pixels that do not count.
        accuracy: whether the pixel accuracy is reported too.
    """

    name = "segmentation"

    def __init__(self, classes: int, ignore: int, accuracy: bool = True) -> None:
        self.channels, self.ignore = classes, ignore
        names = ["mIoU %", "pixel accuracy %"] if accuracy else ["mIoU %"]
        self.metrics = [Metric(name, True, self.name) for name in names]

    def output(self, raw: Tensor) -> Tensor:
        """Log-probabilities."""
        return F.log_softmax(raw, 1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood, averaged over labelled pixels."""
        total = F.nll_loss(output, target, ignore_index=self.ignore, reduction="sum")
        return total / (target != self.ignore).sum().clamp_min(1)

    def meter(self) -> Meter:
        """A confusion matrix."""
        return _Confusion(self.channels, self.ignore, [metric.name for metric in self.metrics])


class _Confusion:
    def __init__(self, classes: int, ignore: int, names: list[str]) -> None:
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64)  # [target, prediction]
        self.ignore, self.names = ignore, names

    def update(self, output: Tensor, target: Tensor) -> None:
        classes = len(self.matrix)
        counted = target != self.ignore
        pairs = target[counted] * classes + output.argmax(1)[counted]
        self.matrix += torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).cpu()

    def compute(self) -> dict[str, float]:
        matrix = self.matrix.double()
        hits = matrix.diagonal()
        # A class that neither occurs nor is predicted is 0/0, and does not count.
        miou = (hits / (matrix.sum(0) + matrix.sum(1) - hits)).nanmean()
        values = 100 * miou.item(), 100 * (hits.sum() / matrix.sum()).item()
        return dict(zip(self.names, values, strict=False))


class _Means:
    """Means over valid pixels of several quantities."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.sums, self.count = torch.zeros(len(task.metrics), dtype=torch.float64), 0

    def update(self, output: Tensor, target: Tensor) -> None:
        valid = self.task.valid(target)
        errors = self.task.errors(output[valid].double(), target[valid].double())
        self.sums += torch.stack([error.sum() for error in errors]).cpu()
        self.count += int(valid.sum())

    def compute(self) -> dict[str, float]:
        means = (self.sums / self.count).tolist()
        return {metric.name: mean for metric, mean in zip(self.task.metrics, means, strict=True)}


class _Regression(Task):
    """L1 over what is valid."""

    @abstractmethod
    def valid(self, target: Tensor) -> Tensor:
        """Which elements of the target count."""

    @abstractmethod
    def errors(self, output: Tensor, target: Tensor) -> list[Tensor]:
        """Each metric's errors of valid elements [N]."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean absolute error over valid elements."""
        valid = self.valid(target)
        return ((output - target).abs() * valid).sum() / valid.sum().clamp_min(1)

    def meter(self) -> Meter:
        """Means of the errors."""
        return _Means(self)


class Depth(_Regression):
    """Depth or inverse depth, valid where positive: absolute and relative error."""

    name, channels = "depth", 1

    def __init__(self) -> None:
        self.metrics = [Metric("abs error", False, self.name), Metric("rel error", False, self.name)]

    def valid(self, target: Tensor) -> Tensor:
        """Where something was measured."""
        return target > 0

    def errors(self, output: Tensor, target: Tensor) -> list[Tensor]:
        """Absolute and relative."""
        error = (output - target).abs()
        return [error, error / target]


class Disparity(_Regression):
    """Disparity, valid where positive: the loss is L1, the metric the mean squared error."""

    name, channels = "disparity", 1

    def __init__(self) -> None:
        self.metrics = [Metric("disparity MSE", False, self.name)]

    def valid(self, target: Tensor) -> Tensor:
        """Where something was measured."""
        return target > 0

    def errors(self, output: Tensor, target: Tensor) -> list[Tensor]:
        """Squares."""
        return [(output - target).square()]


class Instance(_Regression):
    """Offset (y, x) in pixels from the centroid of the pixel's instance, as in Kendall et al. 2018."""

    name, channels = "instance", 2

    def __init__(self) -> None:
        self.metrics = [Metric("instance L1 [px]", False, self.name)]

    def valid(self, target: Tensor) -> Tensor:
        """Where there is an instance."""
        return target != NO_INSTANCE

    def errors(self, output: Tensor, target: Tensor) -> list[Tensor]:
        """Absolute."""
        return [(output - target).abs()]


class Normals(Task):
    """Unit surface normals, valid where not zero: one minus the mean cosine; angles in degrees."""

    name, channels = "normals", 3

    def __init__(self) -> None:
        self.metrics = [
            Metric("mean angle", False, self.name),
            Metric("median angle", False, self.name),
            *(Metric(f"within {angle:g}° %", True, self.name) for angle in WITHIN),
        ]

    def output(self, raw: Tensor) -> Tensor:
        """Of unit length."""
        return F.normalize(raw, dim=1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """One minus the mean of the dot products."""
        valid = (target != 0).any(1)
        return ((1 - (output * target).sum(1)) * valid).sum() / valid.sum().clamp_min(1)

    def meter(self) -> Meter:
        """All angles: their median is wanted."""
        return _Angles([metric.name for metric in self.metrics])


class _Angles:
    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.angles: list[np.ndarray] = []

    def update(self, output: Tensor, target: Tensor) -> None:
        valid = (target != 0).any(1)
        cosines = (output.double() * target.double()).sum(1)[valid].clamp(-1, 1)
        self.angles.append(cosines.acos().rad2deg().float().cpu().numpy())

    def compute(self) -> dict[str, float]:
        angles = np.concatenate(self.angles)
        if not len(angles):
            return dict.fromkeys(self.names, float("nan"))
        shares = [100 * float((angles < limit).mean()) for limit in WITHIN]
        values = [float(angles.mean(dtype=np.float64)), float(np.median(angles)), *shares]
        return dict(zip(self.names, values, strict=True))

"""The regression problem: splits, network, loss and metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.harness import Metric, Run
from experiments.harness.supervised import Problem, Split, train
from experiments.harness.sweep import Track
from experiments.regression.data import TARGETS, load

__all__ = ["METRICS", "QM9", "train_run"]

METRICS = [Metric(f"{target.name} [{target.unit}]", False, target.name) for target in TARGETS]
CLIP = 5.0  # standard deviations: a distance that few molecules have would be an outlier in all of them


class QM9(Problem):
    """Molecules split 80:10:10, which does not depend on a run's seed; features and targets are standardised.

    Args:
        features: float32 [N, K], in an order drawn at random.
        targets: float64 [N, 11].
        width: of the two hidden layers.
    """

    metrics = METRICS

    def __init__(self, features: np.ndarray, targets: np.ndarray, width: int) -> None:
        tenth = len(features) // 10
        if tenth == 0:
            raise ValueError(f"molecules: expected at least 10, got {len(features)}")
        trained = slice(0, len(features) - 2 * tenth)
        x, y = (torch.from_numpy(part).double() for part in (features, targets))
        x = (_standardised(x, trained)[0]).clamp(-CLIP, CLIP).float()
        y, self.deviations = _standardised(y, trained)
        sizes = [trained.stop, tenth, tenth]
        parts = zip(x.split(sizes), y.float().split(sizes), strict=True)
        self.training, self.validation, self.test = (Split(*part) for part in parts)
        self.width = width

    def encoder(self) -> nn.Module:
        """A trunk of two layers."""
        inputs = self.training.inputs.shape[1]
        return nn.Sequential(nn.Linear(inputs, self.width), nn.ReLU(), nn.Linear(self.width, self.width), nn.ReLU())

    def head(self) -> nn.Module:
        """A linear head."""
        return nn.Linear(self.width, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of the standardised target."""
        return F.mse_loss(outputs[:, 0], targets)

    def score(self, task: int, outputs: Tensor, targets: Tensor) -> float:
        """Mean absolute error in the target's unit."""
        return (outputs[:, 0] - targets).abs().double().mean().item() * self.deviations[task].item()


def train_run(run: Run, track: Track, data: Path, cache: Path) -> dict[str, float]:
    """Trains one run on the files in folder `data`; its settings have `molecules` and `width` too."""
    features, targets = load(data, cache, run.settings["molecules"])
    return train(run, track, QM9(features, targets, run.settings["width"]))


def _standardised(x: Tensor, trained: slice) -> tuple[Tensor, Tensor]:
    """Columns less their mean over their standard deviation, both from the training rows; and the latter."""
    deviation, mean = torch.std_mean(x[trained], 0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)  # a column of one value
    return (x - mean) / deviation, deviation

"""The classification problem: splits, LeNet, loss and metrics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.fashion.data import CLASSES, Garments, Pairs, draw_pairs, read_garments
from experiments.harness import Metric, Run
from experiments.harness.supervised import Problem, Split, train
from experiments.harness.sweep import Track

__all__ = ["METRICS", "Encoder", "OverlaidGarments", "train_run"]

METRICS = [Metric(f"{corner} accuracy %", True, corner) for corner in ("top-left", "bottom-right")]
FEATURES = 50


class Encoder(nn.Sequential):
    """LeNet as Sener and Koltun (NeurIPS 2018) share it: bytes [B, 1, 36, 36] to features [B, 50]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 10, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(10, 20, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20 * 6 * 6, FEATURES),
            nn.ReLU(),
        )
        self.to(memory_format=torch.channels_last)  # takes 0.6 of the time on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Scales the bytes to [0, 1] first: splits are kept as bytes."""
        return super().forward((images.float() / 255).contiguous(memory_format=torch.channels_last))


class OverlaidGarments(Problem):
    """Pairs of garments; those for validation and test are made of garments that are never trained on.

    Args:
        trained: the garments of "train"; the last twelfth (5000 of Fashion-MNIST's) is for validation.
        tested: the garments of "test".
        pairs: how many to train on; an eighth as many to validate, half as many to test.
    """

    metrics = METRICS

    def __init__(self, trained: Garments, tested: Garments, pairs: int) -> None:
        if pairs < 8:
            raise ValueError(f"pairs: expected at least 8, got {pairs}")
        kept = len(trained.labels) - max(1, len(trained.labels) // 12)
        pools = (Garments(*(x[:kept] for x in trained)), Garments(*(x[kept:] for x in trained)), tested)
        counts = (pairs, pairs // 8, pairs // 2)
        self.training, self.validation, self.test = (
            _split(draw_pairs(pool, count, seed)) for seed, (pool, count) in enumerate(zip(pools, counts, strict=True))
        )

    def encoder(self) -> nn.Module:
        """LeNet up to its features."""
        return Encoder()

    def head(self) -> nn.Module:
        """Two layers to the logits of the classes."""
        return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, CLASSES))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(outputs, targets)

    def score(self, task: int, outputs: Tensor, targets: Tensor) -> float:
        """Accuracy in percent."""
        return 100 * (outputs.argmax(1) == targets).double().mean().item()

    @classmethod
    def of(cls, folder: Path, pairs: int) -> OverlaidGarments:
        """The problem of the files in a folder."""
        return cls(read_garments(folder, "train"), read_garments(folder, "test"), pairs)


def train_run(run: Run, track: Track, data: Path) -> dict[str, float]:
    """Trains one run on the garments in folder `data`; its settings have `pairs` too."""
    return train(run, track, OverlaidGarments.of(data, run.settings["pairs"]))


def _split(pairs: Pairs) -> Split:
    return Split(torch.from_numpy(pairs.images), torch.from_numpy(pairs.labels))

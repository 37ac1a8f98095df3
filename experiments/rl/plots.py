"""Success rates over training."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

__all__ = ["curves", "learning_curves"]


def curves(folders: Sequence[Path], column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of the logs of several seeds: steps [N] and values [seeds, N]."""
    logs = []
    for folder in folders:
        with (folder / "log.csv").open(newline="") as file:
            logs.append([(float(row["steps"]), float(row[column])) for row in csv.DictReader(file)])
    table = np.array(logs)
    return table[0, :, 0], table[:, :, 1]


def learning_curves(path: Path, runs: Mapping[str, Sequence[Path]], tasks: Sequence[str]) -> None:
    """Draws the success rate over all tasks and of each, mean ± standard error over seeds, smoothed over 5 evaluations.

    Args:
        path: of the PNG.
        runs: for each kind of run its seeds' folders.
        tasks: names.
    """
    columns = ["success", *(f"success {task}" for task in tasks)]
    wide = min(4, len(columns))
    high = -(-len(columns) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(3 * wide, 2.4 * high), sharex=True, sharey=True, squeeze=False)
    for axis, column in zip(axes.flat, columns, strict=False):
        for label, folders in runs.items():
            steps, values = curves(folders, column)
            values = np.stack([_smoothed(v) for v in values])
            mean = values.mean(0)
            axis.plot(steps, mean, label=label, linewidth=1)
            if len(values) > 1:
                error = values.std(0, ddof=1) / np.sqrt(len(values))
                axis.fill_between(steps, mean - error, mean + error, alpha=0.25, linewidth=0)
        axis.set_title("all tasks" if column == "success" else column.removeprefix("success "), fontsize=9)
        axis.set_ylim(-0.05, 1.05)
    for axis in axes.flat[len(columns) :]:
        axis.axis("off")
    figure.supxlabel("steps of every environment", fontsize=9)
    figure.supylabel("success rate", fontsize=9)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smoothed(values: np.ndarray, window: int = 5) -> np.ndarray:
    """The mean of each value and those before it, at most `window`."""
    total = np.concatenate([[0.0], values.cumsum()])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)

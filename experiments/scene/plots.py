"""The measures of stability over training, in the layout of the paper's Figs. 4 and 7."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

__all__ = ["stability"]

PANELS = (
    ("condition_number", "condition number κ"),
    ("min_magnitude_similarity", "smallest gradient magnitude similarity"),
    ("min_cosine", "smallest cosine"),
)


def stability(runs: Mapping[str, Sequence[Path]], target: Path) -> None:
    """Draws each measure of the shared parameters' gradients: medians over an epoch and the seeds.

    Args:
        runs: the runs' folders by method.
        target: the file.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for method, folders in runs.items():
        rows = [row for folder in folders for row in _rows(folder)]
        epochs = np.array([int(row["epoch"]) for row in rows])
        for ax, (name, _) in zip(axes, PANELS, strict=True):
            values = np.array([float(row[name]) for row in rows])
            ax.plot(np.unique(epochs) + 1, [np.median(values[epochs == e]) for e in np.unique(epochs)], label=method)
    for ax, (_, title) in zip(axes, PANELS, strict=True):
        ax.set(title=title, xlabel="epoch")
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize="small")
    figure.savefig(target, dpi=110)


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))

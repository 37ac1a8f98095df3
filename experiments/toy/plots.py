"""The figures: trajectories over the losses and over the parameters, with starts, ends, Pareto front and optimum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.harness import Job
from experiments.toy.methods import NAMES
from experiments.toy.problem import losses, optimum, pareto_front, task_weights

__all__ = ["write"]

PAPER = ("uniform", "cagrad", "imtl", "nash", "aligned")  # the panels of Figures 1 and 6
RANKS = ("aligned", "aligned-gram", "aligned-tight")
TITLES = {
    "uniform": "Uniform",
    "cagrad": "CAGrad (c = 0.4)",
    "imtl": "IMTL-G",
    "nash": "Nash-MTL",
    "aligned": "Aligned-MTL",
    "aligned-gram": "Aligned-MTL, public rank rule",
    "aligned-tight": "Aligned-MTL, rtol = T·eps",
}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195")  # one for each start, also for the colour-blind
INK = "#222222"
X_RANGE, L_RANGE = (-11.0, 12.0), (-21.0, 11.0)
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


def write(folder: Path, root: Path, jobs: Sequence[Job]) -> list[Path]:
    """Draws trajectories.png, weights.png, methods.png, and ranks.png where there are rank rules to compare.

    Args:
        folder: where to.
        root: the folder of the sweep, with the trajectories of its jobs.
        jobs: what was run.
    """
    shares: list[float] = jobs[0].settings["a"]
    paths: dict[str, np.ndarray] = {}  # by method: [a, start, time, 2]
    for job in jobs:
        with np.load(root / job.name / "trajectories.npz") as file:
            paths.update(zip(job.settings["methods"], file["points"], strict=True))
    paths = {name: paths[name] for name in NAMES if name in paths}
    compared = [name for name in PAPER if name in paths] or list(paths)[: len(PAPER)]
    ranked = [name for name in RANKS if name in paths]
    middle = min(range(len(shares)), key=lambda k: abs(shares[k] - 0.5))
    with matplotlib.rc_context(STYLE):
        written = [
            _save(folder / "trajectories.png", _both_spaces(compared, paths, shares, middle)),
            _save(folder / "weights.png", _grid(compared, paths, shares)),
            _save(folder / "methods.png", _overview(paths, shares, middle)),
        ]
        if len(ranked) > 1:
            written.append(_save(folder / "ranks.png", _grid(ranked, paths, shares, parameters=True)))
    return written


def _both_spaces(names: Sequence[str], paths: dict[str, np.ndarray], shares: Sequence[float], k: int) -> Figure:
    """Figure 1: losses above, parameters below; a column for each method."""
    figure = _figure(2, len(names))
    for column, name in enumerate(names):
        above, below = (figure.axes[row * len(names) + column] for row in range(2))
        _in_losses(above, paths[name][k], shares[k])
        _in_parameters(below, paths[name][k], shares[k])
        above.set_title(TITLES.get(name, name), color=INK)
    _outer_labels(figure, 2, len(names), ["$L_1$", "$x_1$"], ["$L_2$", "$x_2$"])
    _legend(figure, f"$L_0 = {shares[k]:g}\\,L_1 + {1 - shares[k]:g}\\,L_2$")
    return figure


def _grid(
    names: Sequence[str], paths: dict[str, np.ndarray], shares: Sequence[float], parameters: bool = False
) -> Figure:
    """Figure 6: a row for each method, a column for each a."""
    figure = _figure(len(names), len(shares))
    draw = _in_parameters if parameters else _in_losses
    for row, name in enumerate(names):
        for k, a in enumerate(shares):
            draw(figure.axes[row * len(shares) + k], paths[name][k], a)
            if row == 0:
                figure.axes[k].set_title(f"a = {a:g}", color=INK)
    x, y = ("$x_1$", "$x_2$") if parameters else ("$L_1$", "$L_2$")
    left = [f"{TITLES.get(name, name)}\n{y}" for name in names]
    _outer_labels(figure, len(names), len(shares), [""] * (len(names) - 1) + [x], left)
    _legend(figure, "$L_0 = a\\,L_1 + (1-a)\\,L_2$")
    return figure


def _overview(paths: dict[str, np.ndarray], shares: Sequence[float], k: int) -> Figure:
    """Every method over the losses, for one a."""
    columns = min(6, len(paths))
    rows = -(-len(paths) // columns)
    figure = _figure(rows, columns)
    for ax, (name, points) in zip(figure.axes, paths.items(), strict=False):
        _in_losses(ax, points[k], shares[k])
        ax.set_title(name, color=INK)
    for ax in figure.axes[len(paths) :]:
        ax.set_visible(False)
    _outer_labels(figure, rows, columns, [""] * (rows - 1) + ["$L_1$"], ["$L_2$"] * rows)
    _legend(figure, f"$L_0 = {shares[k]:g}\\,L_1 + {1 - shares[k]:g}\\,L_2$")
    return figure


def _figure(rows: int, columns: int) -> Figure:
    figure = Figure(figsize=(1.9 * columns + 0.5, 1.9 * rows + 0.8), layout="constrained")
    figure.subplots(rows, columns, sharex="row", sharey="row", squeeze=False)
    return figure


def _in_losses(ax: Axes, points: np.ndarray, a: float) -> None:
    front = pareto_front()[1].numpy()
    ax.plot(*front.T, color="#b0b0b0", linewidth=4, zorder=1)
    reached = losses(torch.from_numpy(points).double()).numpy()
    _draw_paths(ax, reached, losses(optimum(torch.tensor([a])))[0].numpy())
    ax.set(xlim=L_RANGE, ylim=L_RANGE, xticks=(-20, -10, 0, 10), yticks=(-20, -10, 0, 10), aspect="equal")
    ax.grid(color="#eeeeee", linewidth=0.6)
    ax.set_axisbelow(True)


def _in_parameters(ax: Axes, points: np.ndarray, a: float) -> None:
    axis = torch.linspace(*X_RANGE, 301, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis).reshape(301, 301, 2)
    L0 = (losses(plane) * task_weights(torch.tensor(a, dtype=torch.float64))).sum(-1).T.numpy()
    levels = np.linspace(-20, 8, 15)
    ax.contourf(axis.numpy(), axis.numpy(), L0, levels=levels, cmap="Greys_r", alpha=0.35, extend="both", zorder=0)
    ax.plot(*pareto_front()[0].numpy().T, color="#8c8c8c", linewidth=4, zorder=1)
    _draw_paths(ax, points, optimum(torch.tensor([a]))[0].numpy())
    ax.set(xlim=X_RANGE, ylim=X_RANGE, xticks=(-10, -5, 0, 5, 10), yticks=(-10, -5, 0, 5, 10), aspect="equal")


def _draw_paths(ax: Axes, paths: np.ndarray, best: np.ndarray) -> None:
    """Paths [start, time, 2], their starts and ends, and the optimum."""
    for path, color in zip(paths, COLORS, strict=True):
        path = path[np.isfinite(path).all(-1)]
        ax.plot(*path.T, color=color, linewidth=1.1, zorder=3)
        ax.plot(*path[0], "o", color=INK, markersize=4, markeredgecolor="white", markeredgewidth=0.5, zorder=5)
        ax.plot(*path[-1], "D", color=color, markersize=4.5, markeredgecolor="white", markeredgewidth=0.7, zorder=6)
    ax.plot(*best, "*", color="#ffc20a", markersize=14, markeredgecolor=INK, markeredgewidth=0.6, zorder=4)


def _outer_labels(figure: Figure, rows: int, columns: int, below: Sequence[str], left: Sequence[str]) -> None:
    for row in range(rows):
        for column in range(columns):
            ax = figure.axes[row * columns + column]
            ax.label_outer() if not below[row] else ax.tick_params(labelleft=column == 0)
            ax.set_xlabel(below[row])
            if column == 0:
                ax.set_ylabel(left[row])


def _legend(figure: Figure, title: str) -> None:
    marks = {
        "start": Line2D([], [], marker="o", color=INK, linestyle="", markersize=5),
        "end": Line2D([], [], marker="D", color="#777777", linestyle="", markersize=5),
        "Pareto front": Line2D([], [], color="#a0a0a0", linewidth=4),
        "optimum of $L_0$": Line2D(
            [], [], marker="*", color="#ffc20a", linestyle="", markersize=11, markeredgecolor=INK, markeredgewidth=0.6
        ),
    }
    figure.legend(marks.values(), marks.keys(), title=title, loc="outside lower center", ncols=4, frameon=False)


def _save(path: Path, figure: Figure) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, facecolor="white")
    return path

"""The figures of the paper, from recorded runs."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Protocol

import numpy as np

try:
    from matplotlib.figure import Figure
except ImportError as _error:
    raise ImportError("plots need matplotlib: pip install 'fastmtl-torch[plot]'") from _error

__all__ = ["Recorded", "fig4"]

# Name, title and which end of the groups is the worst, in the order of the paper's panels.
_PANELS = (
    ("condition_number", "(a) Condition number", np.max),
    ("min_magnitude_similarity", "(b) Gradient magnitude similarity", np.min),
    ("min_cosine", "(c) Gradient conflicts (minimal cosine)", np.min),
)


class Recorded(Protocol):
    """A run, as recorded by a `fastmtl.Monitor`."""

    @property
    def history(self) -> Mapping[str, np.ndarray]:
        """Measures by name, one entry per record."""
        ...


def fig4(monitors: Mapping[str, Recorded], target: Any = None, system: str = "initial") -> Figure:
    """Stability of several runs in the layout of the paper's Fig. 4.

    Three panels over the steps: the condition number (logarithmic), the smallest gradient magnitude similarity and the
    smallest cosine between two tasks. If gradients were aggregated in groups, the worst group of each step counts.

    Args:
        monitors: the runs, by their names in the legend.
        target: a file to save to; three axes to draw on; or None.
        system: "initial" for the task gradients, or "aligned" for Aligned-MTL's aligned ones.

    Returns:
        The figure.

    Raises:
        ValueError: an unknown `system`, not exactly three axes, no run, or a run without these measures: nothing was
            recorded, its method has no Gram matrix, or (for "aligned") is not Aligned-MTL.
    """
    if system not in ("initial", "aligned"):
        raise ValueError(f'system: expected "initial" or "aligned", got {system!r}')
    if not monitors:
        raise ValueError("monitors: expected at least one, got none")
    histories = {label: monitor.history for label, monitor in monitors.items()}
    for label, history in histories.items():
        if f"{system}/condition_number" not in history:
            raise ValueError(f"monitors: {label!r} has no record of the {system} system's Gram matrix")
    to_file = isinstance(target, (str, PathLike))
    if target is None or to_file:
        figure = Figure(figsize=(15, 4), layout="constrained")
        axes = figure.subplots(1, len(_PANELS))
    else:
        axes = np.ravel(target)
        if len(axes) != len(_PANELS):
            raise ValueError(f"target: expected a file or {len(_PANELS)} axes, got {len(axes)} axes")
        figure = axes[0].figure
    for ax, (name, title, worst) in zip(axes, _PANELS, strict=True):
        for label, history in histories.items():
            values = history[f"{system}/{name}"]
            ax.plot(history["step"], values if values.ndim == 1 else worst(values, axis=1), label=label, linewidth=1)
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    if any(monitors.keys()):  # not for a single run without a name
        axes[0].legend()
    if to_file:
        figure.savefig(target, dpi=150)
    return figure

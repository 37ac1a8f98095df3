"""A live table of a `Monitor`'s numbers, in the terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

import numpy as np

from fastmtl.observe.report import Run, by_task, overall

try:
    from rich.console import Console
    from rich.live import Live as Screen
    from rich.table import Table
    from rich.text import Text
except ImportError as _error:
    raise ImportError("a live table needs rich: pip install 'fastmtl-torch[live]'") from _error

__all__ = ["Live", "table"]

_BARS = "▁▂▃▄▅▆▇█"
_ROWS = 40  # how many tasks are shown


class _Watched(Run, Protocol):
    _watcher: Live | None


class Live:
    """Shows `table(monitor)` during a run: see `Monitor.live`."""

    def __init__(self, monitor: _Watched, refresh: float, console: Console | None) -> None:
        self._monitor, self._refresh, self._next = monitor, refresh, 0.0
        self._screen = Screen(table(monitor), console=console, auto_refresh=False)

    def __enter__(self) -> Live:
        self._screen.__enter__()
        self._monitor._watcher = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._monitor._watcher = None
        try:
            self._screen.update(table(self._monitor), refresh=True)
        finally:
            self._screen.__exit__(kind, error, trace)

    def tick(self) -> None:
        """Draws again if `refresh` seconds have passed."""
        if (now := time.monotonic()) >= self._next:
            self._screen.update(table(self._monitor), refresh=True)
            self._next = now + self._refresh


def table(run: Run) -> Table:
    """The last record: one row per task, the system's numbers in the title; bars show the latest records."""
    history = run.history
    steps = history["step"]
    of_all = {"κ": "condition_number", "smallest cosine": "min_cosine", "conflicts": "conflicts"}
    said = [
        f"{label} {overall(history, name)[-1]:.3g}" for label, name in of_all.items() if f"initial/{name}" in history
    ]
    title = f"step {steps[-1]}: {', '.join(said)}" if len(steps) else "no record yet"
    shown = Table(title=title.removesuffix(": "))
    shown.add_column("task")
    tasks = {label: by_task(history, name) for label, name in (("loss", "losses"), ("α", "alpha"), ("‖g‖", "norms"))}
    there = {label: values for label, values in tasks.items() if values is not None and len(values)}
    for label in there:
        shown.add_column(label, justify="right")
        shown.add_column("", justify="left", style="dim")
    count = max((values.shape[1] for values in there.values()), default=0)
    for t in range(min(count, _ROWS)):
        cells = [cell for values in there.values() for cell in (f"{values[-1, t]:.3g}", _bars(values[-24:, t]))]
        shown.add_row(Text(run.names[t] if run.names else str(t)), *cells)
    if count > _ROWS:
        shown.caption = f"and {count - _ROWS} tasks more"
    return shown


def _bars(values: np.ndarray) -> str:
    """Heights of the finite values between their least and largest; a gap for others."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    low, span = finite.min(), finite.max() - finite.min() or 1.0
    return "".join(_BARS[int(7 * (x - low) / span)] if np.isfinite(x) else " " for x in values)

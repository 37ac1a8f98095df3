"""One HTML page about a run, from a `Monitor`'s records: loads nothing, no script, any browser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Protocol

import numpy as np

__all__ = ["Run", "by_task", "html", "overall"]

_COLOURS = (
    "#00798c",
    "#d1495b",
    "#edae49",
    "#66a182",
    "#6f42c1",
    "#2e4057",
    "#e07a5f",
    "#8d96a3",
    "#3d8bfd",
    "#b56576",
)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 560, 250, 58, 34, 12
_POINTS = 600  # of a line; if there are more, the least and the largest of each stretch are drawn
_NAMED = 12  # how many lines have a legend
_SQUARES = 24  # up to how many tasks cosines are drawn
# Which group stands for several: the worst.
_WORST: dict[str, Callable[..., np.ndarray]] = {
    "condition_number": np.max,
    "max_norm_ratio": np.max,
    "conflicts": np.max,
    "min_cosine": np.min,
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #656d76; --line: #d0d7de; --page: #fff; --card: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9198a1; --line: #3d444d; --page: #0d1117; --card: #161b22 } }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--page);
  max-width: 1180px; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; margin: .5rem 0 }
h2 { font-size: 1.05rem; margin: 0 } p { margin: .25rem 0; color: var(--faint) }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0 } .numbers div { background: var(--card);
  border-radius: 8px; padding: .5rem .9rem } .numbers b { display: block; font-size: 1.3rem }
.numbers span { color: var(--faint); font-size: .85rem }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem }
section { border: 1px solid var(--line); border-radius: 8px; padding: .75rem } svg { width: 100%; height: auto }
svg text { font-size: 12px; fill: var(--faint) } svg .grid { stroke: var(--line) }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .85rem } .legend i { display: inline-block;
  width: .8em; height: .8em; border-radius: 2px; margin-right: .35em }
table { border-collapse: collapse; font-size: .85rem } td, th { padding: .2rem .5rem; text-align: right }
"""


class Run(Protocol):
    """The run to show: a `fastmtl.Monitor`."""

    @property
    def names(self) -> Sequence[str] | None:
        """The tasks' names."""
        ...

    @property
    def history(self) -> Mapping[str, np.ndarray]:
        """Measures by name, one entry per record."""
        ...

    @property
    def cosines(self) -> np.ndarray | None:
        """The mean cosine of each pair of tasks."""
        ...


def overall(history: Mapping[str, np.ndarray], name: str, system: str = "initial") -> np.ndarray:
    """A measure of the whole system [N]; with groups, the worst group's."""
    values = history[f"{system}/{name}"]
    return values if values.ndim == 1 else _WORST[name](values, axis=1)


def by_task(history: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    """A measure of each task [N, T]; with groups, their mean; None if it was not recorded."""
    values = history.get(name)
    return values if values is None or values.ndim == 2 else values.mean(axis=1)


def html(run: Run, title: str = "Training run") -> str:
    """The page.

    Args:
        run: the run, with at least one record.
        title: its heading.

    Raises:
        ValueError: nothing was recorded.
    """
    history = run.history
    steps = history["step"]
    if not len(steps):
        raise ValueError("monitor: expected at least one record, got none")
    has_gram = "initial/condition_number" in history
    panels = [*(_system(history) if has_gram else ()), *_tasks(run)]
    if has_gram and run.cosines is not None:
        panels.append(_squares(run.cosines, run.names))
    body = "\n".join(f"<section>{panel}</section>" for panel in panels)
    groups = any(name in history and history[name].ndim == 3 for name in ("alpha", "norms"))
    said = (
        " Gradients were aggregated in groups: measures are the worst group's, lines of tasks the mean."
        if groups
        else ""
    )
    when = f"1 record, step {steps[0]}" if len(steps) == 1 else f"{len(steps)} records, steps {steps[0]} to {steps[-1]}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{when}, by fastmtl.Monitor.{said}</p>\n"
        f'<div class="numbers">{_numbers(history)}</div>\n<div class="panels">\n{body}\n</div>\n</body>\n</html>\n'
    )


def _numbers(history: Mapping[str, np.ndarray]) -> str:
    """The numbers that one looks at first."""
    found: list[tuple[str, float]] = []
    if "initial/condition_number" in history:
        found += [
            ("median condition number κ", _median(overall(history, "condition_number"))),
            ("κ at the end", float(overall(history, "condition_number")[-1])),
            ("longest over shortest gradient, median", _median(overall(history, "max_norm_ratio"))),
            ("pairs of tasks in conflict, mean share", _mean(overall(history, "conflicts"))),
        ]
    if "committed/min_cosine" in history:
        values = history["committed/min_cosine"].reshape(len(history["step"]), -1).min(1)
        found.append(("steps that oppose some task, share", _mean(np.where(np.isnan(values), np.nan, values < 0))))
    if "residual" in history:
        found.append(("largest residual of the solver", float(np.max(history["residual"]))))
    return "".join(f"<div><b>{_short(x)}</b><span>{said}</span></div>" for said, x in found)


def _system(history: Mapping[str, np.ndarray]) -> list[str]:
    """Panels of the gradients' system."""
    steps = history["step"]
    kappa = {"task gradients": overall(history, "condition_number")}
    angles = {"two tasks, smallest": overall(history, "min_cosine")}
    if "aligned/condition_number" in history:
        kappa["after the alignment"] = overall(history, "condition_number", "aligned")
    if "committed/min_cosine" in history:
        values = history["committed/min_cosine"]
        angles["the step and a task, smallest"] = values if values.ndim == 1 else values.min(axis=1)
    return [
        _panel("Condition number κ", "1: no task dominates, none conflict.", steps, kappa, log=True),
        _panel("Cosines", "Below 0: a conflict.", steps, angles),
        _panel("Pairs of tasks in conflict", "Share of the pairs.", steps, {"share": overall(history, "conflicts")}),
    ]


def _tasks(run: Run) -> list[str]:
    """Panels with one line per task."""
    history, panels = run.history, []
    for name, heading, note in (
        ("alpha", "Task weights α", "The step is Σ α_t times gradient t."),
        ("norms", "Gradient norms", "Of each task, over the shared parameters."),
        ("losses", "Losses", "As they were recorded."),
    ):
        values = by_task(history, name)
        if values is not None:
            labels = run.names or [f"task {t}" for t in range(values.shape[1])]
            lines = {label: values[:, t] for t, label in enumerate(labels)}
            finite = values[np.isfinite(values)]
            log = name != "alpha" and bool(len(finite)) and bool((finite > 0).all())
            panels.append(_panel(heading, note, history["step"], lines, log))
    return panels


def _panel(heading: str, note: str, steps: np.ndarray, lines: Mapping[str, np.ndarray], log: bool = False) -> str:
    """A chart with its heading and legend."""
    legend = "".join(
        f'<span><i style="background:{_COLOURS[k % len(_COLOURS)]}"></i>{escape(label)}</span>'
        for k, label in enumerate(lines)
        if len(lines) <= _NAMED
    )
    scale = " Logarithmic." if log else ""
    drawn = _chart(steps, list(lines.values()), log, heading)
    return f'<h2>{heading}</h2><p>{note}{scale}</p>{drawn}<div class="legend">{legend}</div>'


def _chart(steps: np.ndarray, lines: Sequence[np.ndarray], log: bool, heading: str) -> str:
    """Lines over the steps; values that are not finite, or not positive on a logarithmic axis, are gaps."""
    shown = [np.where(np.isfinite(y) & ((y > 0) | (not log)), y, np.nan).astype(np.float64) for y in lines]
    shown = [np.log10(y) if log else y for y in shown]
    finite = np.concatenate([y[np.isfinite(y)] for y in shown] or [np.zeros(0)])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    ticks = _decades(low, high) if log else _round_ticks(low, high)
    low, high = min([low, *ticks]), max([high, *ticks])
    first, last = float(steps[0]), float(max(steps[-1], steps[0] + 1))

    def x_of(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 8) * (step - first) / (last - first)

    def y_of(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low or 1.0))

    pieces = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{heading}</title>']
    for tick in ticks:
        y, said = y_of(tick), _short(10**tick if log else tick)
        pieces.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        pieces.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{said}</text>')
    for tick in _round_ticks(first, last):
        if first <= tick <= last:
            pieces.append(f'<text x="{x_of(tick):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{tick:g}</text>')
    for k, line in enumerate(shown):
        colour = _COLOURS[k % len(_COLOURS)]
        for stretch in _stretches(*_thinned(steps.astype(np.float64), line)):
            points = " ".join(f"{x_of(a):.1f},{y_of(b):.1f}" for a, b in stretch)
            if len(stretch) == 1:
                (a, b) = stretch[0]
                pieces.append(f'<circle fill="{colour}" r="2.5" cx="{x_of(a):.1f}" cy="{y_of(b):.1f}"/>')
            else:
                pieces.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{points}"/>')
    return "".join([*pieces, "</svg>"])


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `_POINTS` points that keep every peak: the smallest and largest of each stretch."""
    if len(x) <= _POINTS:
        return x, y
    kept: list[int] = []
    for part in np.array_split(np.arange(len(x)), _POINTS // 2):
        finite = part[np.isfinite(y[part])]
        chosen = {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])} if len(finite) else {int(part[0])}
        kept += sorted(chosen)
    return x[kept], y[kept]


def _stretches(x: np.ndarray, y: np.ndarray) -> list[list[tuple[float, float]]]:
    """The points between two gaps."""
    found: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(b):
            found[-1].append((a, b))
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def _round_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that enclose the range."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 6)
    start = math.floor(low / step)
    return [k * step for k in range(start, max(math.ceil(high / step), start + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Exponents, at most eight, that enclose the range."""
    start, end = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    stride = max(1, math.ceil((end - start) / 7))
    return [float(k) for k in range(start, end + stride, stride)]


def _squares(cosines: np.ndarray, names: Sequence[str] | None) -> str:
    """The mean cosine of each pair of tasks, as coloured squares."""
    heading = "<h2>Mean cosine of each two tasks</h2><p>Over the run; red where they conflict.</p>"
    C = cosines if cosines.ndim == 2 else cosines.mean(axis=0)
    if len(C) > _SQUARES:
        return f"{heading}<p>{len(C)} tasks are too many to be drawn; the smallest is {_short(C.min())}.</p>"
    labels = [escape(name) for name in names] if names else [str(t) for t in range(len(C))]
    head = "".join(f"<th>{label}</th>" for label in labels)
    rows = []
    for label, row in zip(labels, C.tolist(), strict=True):
        cells = []
        for x in row:
            colour = "209, 73, 91" if x < 0 else "0, 121, 140"
            strength = 0.0 if math.isnan(x) else 0.75 * min(abs(x), 1.0)
            cells.append(f'<td style="background: rgba({colour}, {strength:.2f})">{x:.2f}</td>')
        rows.append(f"<tr><th>{label}</th>{''.join(cells)}</tr>")
    return f"{heading}<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.mean(finite)) if len(finite) else math.nan


def _short(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 1e-12 or 1e-3 <= abs(x) < 1e5 else f"{x:.1e}"

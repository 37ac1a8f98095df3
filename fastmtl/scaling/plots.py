"""The plots of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as _error:
    raise ImportError("plots need matplotlib: pip install 'fastmtl-torch[plot]'") from _error

from fastmtl.scaling.study import columns

__all__ = ["draw"]

Row = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart; in print, markers do.
STYLES: dict[str, dict[str, Any]] = {
    "fastmtl": {"label": "fastmtl", "color": "#0072B2", "marker": "o", "linewidth": 2.4, "zorder": 5},
    "pure": {"label": "plain PyTorch", "color": "#D55E00", "marker": "s", "linewidth": 2.4, "zorder": 4},
    "gram": {"label": "stage: Gram", "color": "#009E73", "marker": "^", "linestyle": "--"},
    "weights": {"label": "stage: weights", "color": "#CC79A7", "marker": "v", "linestyle": "--"},
    "combine": {"label": "stage: combine", "color": "#E69F00", "marker": "D", "linestyle": "--"},
    "read": {"label": "reading the gradients once", "color": "#7F7F7F", "linestyle": ":", "marker": "None"},
}
RC: dict[Any, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.titlesize": 12,
    "savefig.dpi": 150,
}
MARKERS = "osD^vP*X<>"
PANELS = 6  # in a figure; of more sizes, an even selection is shown
LINES = 8  # in a panel, likewise
UNSEEN = 0.5  # MiB: the resolution of peak memory on a CPU; less is drawn as half of it
PREFIXES = {"batch": "B", "threads": "t", "kappa": "k"}  # in file names
SYMBOLS = {"tasks": "T", "params": "P", "batch": "B", "kappa": "κ"}


def draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws everything that a sweep has numbers for; returns the files.

    There is a figure for each combination of the settings that vary (batch, dtype, threads, method and condition
    number), which the file's name and the title give.

    Args:
        content: the content of scaling.json.
        folder: where the files go.
    """
    rows = [row for row in map(columns, content["points"]) if "error" not in row]
    machine = content["machine"]
    files = []
    with mpl.rc_context(RC):
        for name, (plot, apart) in FIGURES.items():
            varying = [axis for axis in apart if len({row[axis] for row in rows}) > 1]
            for key, part in _groups(rows, apart):
                figure = plot(part)
                if figure is None:
                    continue
                values = dict(zip(apart, key, strict=True))
                title = figure.get_suptitle() + "\n" + ", ".join(_setting(*item) for item in values.items())
                figure.suptitle(title, x=0.01, ha="left")
                figure.supxlabel(_footer(machine, part), x=0.99, ha="right", fontsize=7.5, color="#777777")
                suffix = "".join(f"-{PREFIXES.get(axis, '')}{_short(values[axis])}" for axis in varying)
                files.append(folder / f"{name}{suffix}.png")
                figure.savefig(files[-1])
    return files


def _time(rows: Sequence[Row]) -> Figure | None:
    """Time against T, a panel for each P."""
    groups = _spread([group for group in _groups(rows, ("params",)) if len(group[1]) > 1], PANELS)
    if not groups:
        return None
    across = min(len(groups), 3)
    down = math.ceil(len(groups) / across)
    figure = _figure(3.3 * across + 2.6, 2.8 * down + 1.4, "How time grows with tasks")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for ax in panels.flat[len(groups) :]:
        ax.set_visible(False)
    for ax, ((params,), part) in zip(panels.flat, groups, strict=False):
        for stage, style in STYLES.items():
            _line(ax, part, "tasks", f"seconds_{stage}", scale=1e3, **style)
        ax.set_title(f"P = {_short(params)} parameters")
        _logarithmic(ax)
    for ax in panels[:, 0]:
        ax.set_ylabel("time of a call, ms")
    for column in panels.T:  # if the last row is not full, the one above has the labels
        lowest = [ax for ax in column if ax.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("tasks T")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _speedup(rows: Sequence[Row]) -> Figure | None:
    """Plain PyTorch's time over fastmtl's against T, a line for each P."""
    rows = [row for row in rows if "speedup" in row]
    if not _varies(rows, "tasks"):
        return None
    figure = _figure(7.2, 4.6, "Speed-up over plain PyTorch")
    ax = figure.subplots()
    ax.axhline(1, color="#555555", linewidth=1)
    for (params,), part, style in _shaded(rows, "params"):
        _line(ax, part, "tasks", "speedup", label=f"P = {_short(params)}", **style)
    _logarithmic(ax, "tasks T")
    _plain_ticks(ax)
    ax.set_ylabel("time of plain PyTorch / time of fastmtl")
    figure.legend(loc="outside right center")
    return figure


def _roofline(rows: Sequence[Row]) -> Figure | None:
    """Flop rate of the Gram against flops per byte, and bytes over time of Gram and combination, under the roofs."""
    if not _varies(rows, "tasks"):
        return None
    figure = _figure(12.5, 5.0, "Gram and combination against what this machine can do")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    roofs = {name: _median(row[f"roof_{name}"] for row in rows) for name in _roof_names(rows)}
    x = [row["gram_intensity"] for row in rows]
    ends = min(x) / 1.5, max(x) * 1.5
    read = roofs.pop("read")
    roof = {"color": "#555555", "linewidth": 1.4, "zorder": 1}
    ridges = {name: min(max(rate / read, ends[0]), ends[1]) for name, rate in roofs.items()}
    for (name, rate), dash in zip(roofs.items(), ("-", "--", "-."), strict=False):
        left.plot([ridges[name], ends[1]], [rate / 1e9] * 2, linestyle=dash, label=f"roof: {name} GEMM", **roof)
    slope = [ends[0], max(ridges.values())]
    left.plot(slope, [read * i / 1e9 for i in slope], linestyle=":", label="roof: memory", **roof)
    for ax in (middle, right):
        ax.axhline(read / 1e9, linestyle=":", **roof)
    for (params,), part, style in _shaded(rows, "params"):
        label = f"P = {_short(params)}"
        _line(left, part, "gram_intensity", "gram_flops", scale=1e-9, label=label, **style)
        _line(middle, part, "tasks", "gram_bytes", scale=1e-9, **style)
        _line(right, part, "tasks", "combine_bytes", scale=1e-9, **style)
    _logarithmic(left, "flops per byte of gradients")
    left.set_title("Gram: arithmetic")
    left.set_ylabel("GFLOP/s")
    for ax, title in ((middle, "Gram: memory"), (right, "Combination: memory")):
        _logarithmic(ax, "tasks T")
        _plain_ticks(ax)
        ax.set_title(title)
        ax.set_ylabel("gradients / time, GB/s (caches: above the roof)")
    figure.legend(loc="outside right center")
    return figure


def _accuracy(rows: Sequence[Row]) -> Figure | None:
    """Relative errors against κ, a colour for each T; of several P, the largest with the most T."""
    rows = [row for row in rows if "error_fastmtl" in row]
    if not _varies(rows, "kappa"):
        return None
    params = max(
        {row["params"] for row in rows}, key=lambda P: (len({r["tasks"] for r in rows if r["params"] == P}), P)
    )
    rows = [row for row in rows if row["params"] == params]
    figure = _figure(10.5, 4.6, f"Accuracy against a float64 singular value decomposition, P = {_short(params)}")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, name in zip(panels, ("fastmtl", "pure"), strict=True):
        for (tasks,), part, style in _shaded(rows, "tasks"):
            _line(ax, part, "kappa", f"error_{name}", label=f"T = {tasks}", **style)
        lost = [row for row in rows if f"error_{name}" in row and row[f"error_{name}"] is None]
        if lost:
            ax.plot([row["kappa"] for row in lost], [0.97] * len(lost), "x", color="#B00000", clip_on=False,
                    transform=ax.get_xaxis_transform())  # fmt: skip
            ax.annotate("× = not finite", (0.02, 0.9), xycoords="axes fraction", color="#B00000", fontsize=8)
        ax.set_title(STYLES[name]["label"])
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("condition number κ of the gradients")
    panels[0].set_ylabel("relative error of the result")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _memory(rows: Sequence[Row]) -> Figure | None:
    """Peak memory beyond gradients and result against T, a colour for each P."""
    rows = [row for row in rows if "memory_fastmtl" in row]
    if not _varies(rows, "tasks"):
        return None
    sides = [name for name in ("fastmtl", "pure") if f"memory_{name}" in rows[0]]
    figure = _figure(4.5 * len(sides) + 1.5, 4.6, "Peak memory beyond the gradients and the result")
    panels = figure.subplots(1, len(sides), sharex=True, sharey=True, squeeze=False)[0]
    for ax, name in zip(panels, sides, strict=True):
        ax.axhspan(UNSEEN / 4, UNSEEN, color="#EEEEEE", zorder=0)
        for (params,), part, style in _shaded(rows, "params"):
            label = f"P = {_short(params)}"
            _line(ax, part, "tasks", f"memory_{name}", scale=2**-20, least=UNSEEN / 2, label=label, **style)
        ax.set_title(STYLES[name]["label"])
        _logarithmic(ax, "tasks T")
        ax.set_ylim(UNSEEN / 4, max(8 * UNSEEN, ax.get_ylim()[1]))
    panels[0].set_ylabel(f"MiB (grey: less than {UNSEEN})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


# File name -> the function that draws it, and the settings that get separate figures.
FIGURES: dict[str, tuple[Callable[[Sequence[Row]], Figure | None], tuple[str, ...]]] = {
    "time": (_time, ("method", "batch", "dtype", "threads", "kappa", "gradients")),
    "speedup": (_speedup, ("method", "batch", "dtype", "threads", "kappa", "gradients")),
    "roofline": (_roofline, ("method", "batch", "dtype", "threads", "kappa", "gradients")),
    "accuracy": (_accuracy, ("method", "batch", "dtype", "threads", "gradients")),
    "memory": (_memory, ("method", "batch", "dtype", "threads", "kappa", "gradients")),
}


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _groups(rows: Iterable[Row], axes: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[axis] for axis in axes)

    return [(values, list(part)) for values, part in itertools.groupby(sorted(rows, key=key), key)]


def _spread(groups: list[Any], most: int) -> list[Any]:
    """At most that many of them, evenly spaced, including the first and the last."""
    if len(groups) <= most:
        return groups
    return [groups[round(i * (len(groups) - 1) / (most - 1))] for i in range(most)]


def _shaded(rows: Sequence[Row], axis: str) -> Iterator[tuple[tuple[Any, ...], list[Row], dict[str, Any]]]:
    """Groups by a size, light to dark."""
    groups = _spread(_groups(rows, (axis,)), LINES)
    shades = mpl.colormaps["viridis_r"]
    for i, (values, part) in enumerate(groups):
        shade = 0.15 + 0.85 * i / max(1, len(groups) - 1)
        yield values, part, {"color": shades(shade), "marker": MARKERS[i]}


def _line(ax: Axes, rows: Sequence[Row], x: str, y: str, scale: float = 1.0, least: float = 0.0, **style: Any) -> None:
    pairs = sorted((row[x], max(least, row[y] * scale)) for row in rows if row.get(y) is not None)
    if pairs:
        ax.plot(*zip(*pairs, strict=True), **style)


def _logarithmic(ax: Axes, label: str = "") -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel(label)


def _plain_ticks(ax: Axes) -> None:
    """For a logarithmic axis of a decade or two: ticks at 1, 2, 5 and 10 as plain numbers; more if it spans less."""
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _varies(rows: Sequence[Row], axis: str) -> bool:
    return len({row[axis] for row in rows}) > 1


def _roof_names(rows: Sequence[Row]) -> list[str]:
    return [name.removeprefix("roof_") for name in rows[0] if name.startswith("roof_")]


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _setting(axis: str, value: Any) -> str:
    if axis in SYMBOLS:
        return f"{SYMBOLS[axis]} = {_short(value)}"
    return f"{value} thread{'s' * (value != 1)}" if axis == "threads" else str(value)


def _short(value: Any) -> str:
    """1000000 as 1e6, 25600 as 25600."""
    if isinstance(value, str):
        return value
    exponent = math.floor(math.log10(value))
    mantissa = value / 10**exponent
    return f"{mantissa:.3g}e{exponent}" if exponent >= 3 and round(mantissa, 2) == mantissa else f"{value:g}"


def _footer(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    commits = ", ".join(name[:10] + "-dirty" * name.endswith("-dirty") for name in machine["commits"])
    where = machine["gpu"] or f"{machine['cpu']}, {machine['isa'] or 'no kernels'}"
    return f"{where}, torch {machine['torch']}, fastmtl {commits}, {rows[0]['date'][:10]}"

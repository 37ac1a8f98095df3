"""Draws the documentation's pictures: the pipeline of the README, what a method makes of two gradients, and results.

    python tools/pictures.py            # writes docs/pictures/*.svg, those of experiments from experiments/results
    python tools/pictures.py --check    # exits 1 where a file is not what this draws

Colours follow the reader's light or dark page.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "pictures"
RESULTS = ROOT / "experiments" / "results"
TASKS = ("#00798c", "#d1495b", "#edae49")
STYLE = """
  .ink { fill: #1f2328 } .faint { fill: #656d76 } .line { stroke: #656d76; stroke-width: 1.5; fill: none }
  .result { fill: #6f42c1; stroke: #6f42c1 } .frame { fill: #ffffff; stroke: #d0d7de } .axis { stroke: #d0d7de }
  @media (prefers-color-scheme: dark) {
    .ink { fill: #e6edf3 } .faint { fill: #9198a1 } .line { stroke: #9198a1 }
    .result { fill: #b392f0; stroke: #b392f0 } .frame { fill: #0d1117; stroke: #3d444d } .axis { stroke: #3d444d }
  }
  text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif }
  .small { font-size: 12px } .big { font-size: 17px; font-weight: 600 }
"""


class Svg:
    """A drawing that is put together piece by piece.

    Args:
        width: in pixels.
        height: in pixels.
        title: what a screen reader says.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.pieces = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="frame" x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="8"/>',
        ]

    def text(self, x: float, y: float, said: str, kind: str = "ink", anchor: str = "middle") -> None:
        """Words, their baseline at y."""
        self.pieces.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>')

    def box(self, x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0) -> None:
        """A filled rectangle; `colour` is a class where it does not begin with #."""
        paint = f'fill="{colour}"' if colour.startswith("#") else f'class="{colour}"'
        self.pieces.append(
            f'<rect {paint} fill-opacity="{opacity:g}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" rx="2"/>'
        )

    def line(self, x: float, y: float, to_x: float, to_y: float, kind: str = "line") -> None:
        """A line."""
        self.pieces.append(f'<line class="{kind}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, colour: str = "faint", width: float = 1.5) -> None:
        """A line with a head; `colour` is a class where it does not begin with #."""
        length = math.hypot(to_x - x, to_y - y)
        if length < 1e-6:
            return
        ux, uy = (to_x - x) / length, (to_y - y) / length
        head = min(4 + 2 * width, length)
        base_x, base_y = to_x - head * ux, to_y - head * uy
        paint = f'style="fill: {colour}; stroke: {colour}"' if colour.startswith("#") else f'class="{colour}"'
        stroke = "" if colour != "faint" else ' style="stroke: currentColor"'
        half = 0.45 * head
        points = (
            f"{to_x:.1f},{to_y:.1f} {base_x - half * uy:.1f},{base_y + half * ux:.1f} "
            f"{base_x + half * uy:.1f},{base_y - half * ux:.1f}"
        )
        if colour == "faint":
            self.line(x, y, base_x, base_y)
        else:
            self.pieces.append(
                f'<line {paint}{stroke} stroke-width="{width:g}" x1="{x:.1f}" y1="{y:.1f}" '
                f'x2="{base_x:.1f}" y2="{base_y:.1f}"/>'
            )
        self.pieces.append(f'<polygon {paint} stroke-width="0" points="{points}"/>')

    def __str__(self) -> str:
        return "\n".join([*self.pieces, "</svg>"]) + "\n"


def pipeline() -> str:
    """Losses, their gradients G, the Gram matrix M, task weights α, and one gradient."""
    svg = Svg(880, 240, "T losses become T gradients, a T by T Gram matrix, T task weights, and one gradient")
    centre, heights = 118.0, (18.0, 18.0, 18.0)
    rows = [centre - 45 + 36 * t for t in range(3)]
    for t, (y, height) in enumerate(zip(rows, heights, strict=True)):
        svg.box(28, y, 34, height, TASKS[t])
        svg.text(45, y + 13.5, f"L{'₁₂₃'[t]}", "ink")
    # Lengths tell the norms apart: one task drowns the others.
    for t, width in enumerate((60.0, 190.0, 34.0)):
        svg.box(130, rows[t], width, heights[t], TASKS[t])
    cells = ((0.3, 0.55, 0.12), (0.55, 1.0, 0.3), (0.12, 0.3, 0.2))
    for i, row in enumerate(cells):
        for j, shade in enumerate(row):
            svg.box(408 + 30 * j, centre - 45 + 30 * i, 28, 28, "result", shade)
    for t, width in enumerate((34.0, 12.0, 58.0)):
        svg.box(590, rows[t], width, heights[t], TASKS[t])
    for t in range(3):
        svg.box(750 + 34 * t, centre - 9, 34, 18, TASKS[t])
    for x, to_x, said in ((72, 120, "backward"), (336, 396, "Gram"), (510, 578, "method"), (664, 740, "combine")):
        svg.arrow(x, centre, to_x, centre)
        svg.text((x + to_x) / 2 - 2, centre - 10, said, "small faint")
    labels = (
        (45, "T losses", "of one network"),
        (225, "G  [T, P]", "T gradients, one drowns the others"),
        (452, "M = G Gᵀ  [T, T]", "norms and conflicts"),
        (618, "α  [T]", "task weights"),
        (797, ".grad = αᵀ G  [P]", "in one backward (UB)"),
    )
    for x, said, below in labels:
        svg.text(max(x, 56), 34, said, "big ink")
        svg.text(max(x, 56), 214, below, "small faint")
    return str(svg)


Vector = Sequence[float]


def combination(gradients: Sequence[Vector], result: Vector, name: str) -> str:
    """Two or three task gradients, their mean, and what a method makes of them, in the plane.

    Args:
        gradients: of the tasks, (x, y) each.
        result: the aggregated one.
        name: of the method.
    """
    size, margin = 320, 34
    mean = [sum(column) / len(gradients) for column in zip(*gradients, strict=True)]
    points = [(0.0, 0.0), *gradients, mean, result]
    low = [min(p[k] for p in points) for k in range(2)]
    high = [max(p[k] for p in points) for k in range(2)]
    scale = (size - 2 * margin) / max(*(b - a for a, b in zip(low, high, strict=True)), 1e-9)
    middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]

    def place(p: Vector) -> tuple[float, float]:
        return size / 2 + scale * (p[0] - middle[0]), size / 2 - scale * (p[1] - middle[1])

    svg = Svg(size, size + 62, f"Task gradients, their mean, and the result of {name}")
    origin = place((0.0, 0.0))
    svg.line(origin[0], 10, origin[0], size - 10, "axis")
    svg.line(10, origin[1], size - 10, origin[1], "axis")
    tasks = [(f"task {t}", g, TASKS[t - 1], 2.5) for t, g in enumerate(gradients, 1)]
    arrows = [*tasks, ("mean", mean, "faint", 1.5), (name, result, "result", 4.0)]
    for k, (said, vector, colour, width) in enumerate(arrows):
        svg.arrow(*origin, *place(vector), colour, width)
        x, y = (20 + 100 * (k % 3), size + 18 + 24 * (k // 3))
        svg.box(x, y - 10, 12, 12, colour)
        svg.text(x + 18, y, said, "small ink", "start")
    return str(svg)


Measured = Sequence[tuple[str, float, float]]


def dots(rows: Measured, title: str, scale: str, marked: Sequence[str] = ("aligned", "aligned-ub")) -> str:
    """A dot a row with its standard error, in the order given.

    Args:
        rows: name, mean and standard error.
        title: what a screen reader says.
        scale: what the horizontal axis shows.
        marked: names in colour.
    """
    left, width, step, top = 150.0, 430.0, 20.0, 16.0
    low = min(0.0, *(mean - error for _, mean, error in rows))
    high = max(0.0, *(mean + error for _, mean, error in rows))
    spread = (high - low) or 1.0
    bottom = top + step * len(rows)
    svg = Svg(left + width + 80, bottom + 44, title)

    def x(value: float) -> float:
        return left + width * (value - low) / spread

    tick = next(t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if spread / t <= 8)
    for k in range(math.ceil(low / tick), math.floor(high / tick) + 1):
        svg.line(x(k * tick), top - 6, x(k * tick), bottom, "axis")
        svg.text(x(k * tick), bottom + 16, f"{k * tick:g}", "small faint")
    svg.text(left + width / 2, bottom + 34, scale, "small faint")
    for k, (name, mean, error) in enumerate(rows):
        y, colour = top + step * (k + 0.5), "result" if name in marked else TASKS[0]
        svg.text(left - 10, y + 4, name, "small ink", "end")
        svg.line(x(mean - error), y, x(mean + error), y)
        svg.box(x(mean) - 4, y - 4, 8, 8, colour)
        svg.text(left + width + 14, y + 4, f"{mean:.{1 if any(e for _, _, e in rows) else 0}f}", "small faint", "start")
    return str(svg)


def of_table(name: str, column: str, factor: float = 1.0) -> list[tuple[str, float, float]]:
    """A column of an experiment's table, the smallest first."""
    rows = json.loads((RESULTS / name / "table.json").read_text(encoding="utf-8"))["rows"]
    found = [(method, *(factor * x for x in row[column])) for method, row in rows.items() if column in row]
    return sorted(found, key=lambda row: row[1])


def reached() -> dict[str, int]:
    """Of the 25 runs of the toy problem, how many of each method end at the optimum, as in its table."""
    ends = json.loads((RESULTS / "toy" / "ends.json").read_text(encoding="utf-8"))["ends"]
    found: dict[str, int] = {}
    for end in ends:
        found[end["method"]] = found.get(end["method"], 0) + (end["distance"] < 1e-3)
    return found


def results() -> dict[str, str]:
    """The pictures of the experiments, by file name; none in a source release, which has no results."""
    if not RESULTS.exists():
        return {}
    delta = "Δm in percent against single-task models: smaller is better"
    said = {
        "regression": "QM9 regression, 11 targets",
        "fashion": "Overlaid Fashion-MNIST, 2 tasks",
        "scene": "Rendered rooms, 3 tasks",
    }
    drawn = {name: dots(of_table(name, "Δm % ↓"), f"{title}: {delta}", delta) for name, title in said.items()}
    toy = sorted(((name, float(count), 0.0) for name, count in reached().items()), key=lambda row: (-row[1], row[0]))
    drawn["toy"] = dots(
        [row for row in toy if row[0] not in ("aligned-gram", "aligned-tight")],
        "Toy problem: runs of 25 that reach the optimum",
        "runs, of 25, that reach the optimum: larger is better",
    )
    drawn["rl"] = dots(
        of_table("rl", "success ↑", 100)[::-1],
        "Meta-World, 3 tasks: success in percent",
        "success in percent, last tenth of training: larger is better",
        ("shared aligned",),
    )
    drawn["every"] = dots(
        of_table("regression-every", "Δm % ↓"),
        f"QM9 regression with older task weights: {delta}",
        delta,
        ("aligned",),
    )
    return {f"experiment-{name}.svg": text for name, text in drawn.items()}


def main(arguments: list[str] | None = None) -> int:
    """Writes the pictures, or compares them; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the file differs")
    check, status = parser.parse_args(arguments).check, 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in {"pipeline.svg": pipeline(), **results()}.items():
        path = FOLDER / name
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path.relative_to(ROOT)}: run python tools/pictures.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())

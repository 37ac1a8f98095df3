"""Where every run ends, as ends.csv, ends.json and table.md."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CLOSE", "merged", "paper", "write"]

CLOSE = 1e-3  # an L0 this near to L0* counts as reached
STEPS = 35_000  # the paper's


def paper(steps: int) -> str:
    """Whether these are the paper's runs."""
    return f"reduced: {steps} steps, the paper has {STEPS}" if steps < STEPS else "the paper's starts, Adam and steps"


def merged(methods: Sequence[str], parts: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The end points of several runs in the order of the methods."""
    return sorted((end for part in parts for end in part), key=lambda end: methods.index(end["method"]))


def write(folder: Path, ends: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Writes the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**end, "init": "{:g} {:g}".format(*end["init"])} for end in ends]
    with (folder / "ends.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    lines = ",\n".join(json.dumps(dict(end)) for end in ends)  # one run a line
    (folder / "ends.json").write_text(f'{{"about": {json.dumps(dict(about), indent=1)},\n"ends": [\n{lines}\n]}}\n')
    (folder / "table.md").write_text(_markdown(ends, about))


def _markdown(ends: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    methods = list(dict.fromkeys(end["method"] for end in ends))
    shares = list(dict.fromkeys(end["a"] for end in ends))
    inits = list(dict.fromkeys(tuple(end["init"]) for end in ends))
    of = {(end["method"], end["a"], tuple(end["init"])): end for end in ends}
    best = {end["a"]: end["L0*"] for end in ends}

    head = ["method", *(f"a = {a:g}" for a in shares), "all", "farthest"]
    lines = [f"Runs that end within {CLOSE:g} of L0* ({about['paper']}), and the largest L0 - L0*.", "", *_head(head)]
    for method in methods:
        reached = [[of[method, a, i]["distance"] <= CLOSE for i in inits] for a in shares]
        farthest = max(of[method, a, i]["distance"] for a in shares for i in inits)
        each = [f"{sum(row)} of {len(row)}" for row in reached]
        total = f"{sum(map(sum, reached))} of {len(shares) * len(inits)}"
        lines.append(_row([method, *each, total, f"{farthest:.2g}"]))
    lines.append(_row(["L0*", *(f"{best[a]:.3f}" for a in shares), "", ""]))
    for a in shares:
        lines += ["", f"x1; L0 at the end, a = {a:g}, from each start.", ""]
        lines += _head(["method", *("({:g}, {:g})".format(*i) for i in inits)])
        for method in methods:
            ended = [of[method, a, i] for i in inits]
            lines.append(_row([method, *(f"{_two(end['x1'])}; {_two(end['L0'])}" for end in ended)]))
    return "\n".join(lines) + "\n"


def _two(x: float) -> str:
    return f"{x + 0.0:.2f}".replace("-0.00", "0.00")


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|" + " --- |" * len(cells)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

#!/usr/bin/env python3
"""Prints what check.py has written with --json as one Markdown table.

python benchmarks/summary.py benchmarks/results/<machine>/bench-check.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["markdown"]

HEAD = ("case", "measure", "reached", "target", "roof", "ms", "verdict")


def markdown(content: Mapping[str, Any]) -> str:
    """The lines of one run, under what they were measured with."""
    machine, verdicts = content["machine"], content["verdicts"]
    counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
    commit = f"{machine['commit']}{' and uncommitted changes' if machine['dirty'] else ''}"
    rows = [row(line, case) for case in content["cases"] for line in case["lines"]]
    table = [HEAD, ("---", "---", "--:", "--:", "--:", "--:", "---"), *rows]
    return "\n".join(
        [
            f"# Speed and memory: {machine['cpu']}",
            "",
            "Written by `python benchmarks/check.py --json ... --summary ...` (again from the JSON alone:",
            "`python benchmarks/summary.py`). Each line is a promise of `benchmarks/bounds.toml`, which says what is",
            "compared with what and what the roof is; `ms` is the time of fastmtl.",
            "",
            f"- processor: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used, kernels "
            f"{machine['isa']}",
            f"- system: {machine['system']}, Python {machine['python']}, PyTorch {machine['torch']}, fastmtl "
            f"{machine['fastmtl']}",
            f"- commit: {commit}",
            f"- date: {machine['date']}",
            f"- verdicts: {counts}",
            "",
            *(f"| {' | '.join(cells)} |" for cells in table),
            "",
        ]
    )


def row(line: Mapping[str, Any], case: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a line."""
    wrong = line["verdict"] == "WRONG"
    return (
        line["name"],
        line["measure"],
        "" if line["verdict"] == "ABSENT" else f"{line['reached']:{'.1e' if wrong else '.2f'}}",
        f"{'≥' if line['sense'] == '>=' else '≤'} {line['target']:g}",
        "" if line["roof"] is None else f"{line['roof']:.2f}",
        f"{1e3 * case['seconds']['fast']:.3f}" if "seconds" in case else "",
        line["verdict"],
    )


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")

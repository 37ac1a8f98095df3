"""Results of methods x seeds as a table: mean ± standard error of each metric, and Δm against single-task baselines."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastmtl

__all__ = ["Metric", "Table", "summarize"]


class Metric(NamedTuple):
    """A column: the key in results, whether higher is better, and the task that it belongs to."""

    name: str
    higher_is_better: bool
    task: str


class Value(NamedTuple):
    """Mean and standard error over seeds (NaN for one seed)."""

    mean: float
    error: float

    def __str__(self) -> str:
        if np.isnan(self.error):
            return f"{self.mean:.4g}"
        digits = 2 if self.error == 0 else max(0, 1 - int(np.floor(np.log10(self.error))))
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"


@dataclass(frozen=True)
class Table:
    """`rows[method][column]` is a `Value`; the last column is Δm in percent, where there are baselines."""

    columns: list[str]
    rows: dict[str, dict[str, Value]]
    seeds: dict[str, int]

    def markdown(self) -> str:
        """The table in Markdown, with the number of seeds."""
        head = ["method", *self.columns, "seeds"]
        lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for name, row in self.rows.items():
            cells = [str(row[c]) if c in row else "" for c in self.columns]
            lines.append(f"| {' | '.join([name, *cells, str(self.seeds[name])])} |")
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Writes table.md, table.csv and table.json (with `about`: settings and environment) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(self.markdown())
        with (folder / "table.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "seeds", *(f"{c}{part}" for c in self.columns for part in ("", " error"))])
            for name, row in self.rows.items():
                values = (row.get(c, Value(np.nan, np.nan)) for c in self.columns)
                writer.writerow([name, self.seeds[name], *(number for value in values for number in value)])
        rows = {name: {c: [_plain(x) for x in v] for c, v in row.items()} for name, row in self.rows.items()}
        content = {"about": dict(about), "columns": self.columns, "seeds": self.seeds, "rows": rows}
        (folder / "table.json").write_text(json.dumps(content, indent=1) + "\n")


def summarize(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    metrics: Sequence[Metric],
    baseline: Sequence[Mapping[str, float]] | None = None,
) -> Table:
    """Means and standard errors over seeds.

    Args:
        results: for each method its seeds' results; each has every metric.
        metrics: the columns.
        baseline: seeds' results of the single-task models (every metric in each): Δm is then computed for each seed
            against their mean, every task with the same weight, and the baselines are the table's first row.
    """
    names = [m.name for m in metrics]
    columns = [f"{m.name} {'↑' if m.higher_is_better else '↓'}" for m in metrics]
    rows: dict[str, dict[str, Value]] = {}
    seeds: dict[str, int] = {}
    reference = None
    if baseline is not None:
        numbers = np.array([[r[n] for n in names] for r in baseline], dtype=np.float64)
        reference = numbers.mean(0)
        rows["single-task"] = dict(zip(columns, _values(numbers), strict=True))
        seeds["single-task"] = len(numbers)
    for method, runs in results.items():
        numbers = np.array([[r[n] for n in names] for r in runs], dtype=np.float64)
        row = dict(zip(columns, _values(numbers), strict=True))
        if reference is not None:
            higher, tasks = [m.higher_is_better for m in metrics], [m.task for m in metrics]
            dm = fastmtl.metrics.delta_m(numbers, reference, higher, tasks)
            row["Δm % ↓"] = _values(np.asarray(dm)[:, None])[0]
        rows[method], seeds[method] = row, len(numbers)
    return Table([*columns, *(["Δm % ↓"] if reference is not None else [])], rows, seeds)


def _values(numbers: np.ndarray) -> list[Value]:
    n = len(numbers)
    errors = numbers.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(numbers.shape[1], np.nan)
    return [Value(float(m), float(e)) for m, e in zip(numbers.mean(0), errors, strict=True)]


def _plain(x: float) -> float | None:
    return None if np.isnan(x) else x

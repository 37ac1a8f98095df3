"""A sweep as a folder: settings, one file per point, and when all are done, everything in one file and as a table.

settings.json     what was asked for, and on which machine; the folder is for this sweep only
points/*.json     one finished point each: measured, or the error it ended with (delete one to measure it again)
scaling.json      all points, machine, commits and dates
scaling.csv       one row per point
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from fastmtl.scaling.machine import commit
from fastmtl.scaling.measure import measure
from fastmtl.scaling.points import DTYPES, Point

__all__ = ["Study", "columns"]

Record = dict[str, Any]


class Study:
    """A sweep in `folder`, new or resumed.

    Args:
        folder: its folder, which is made if it does not exist.
        settings: what the sweep depends on, including the machine; must be JSON.

    Raises:
        ValueError: the folder contains a sweep with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        path = folder / "settings.json"
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            names = sorted(k for k in there.keys() | self.settings.keys() if there.get(k) != self.settings.get(k))
            if names:
                was, now = ({k: s.get(k) for k in names} for s in (there, self.settings))
                raise ValueError(f"{folder}: a sweep with {was} is there, expected {now}; choose another --out")
        (folder / "points").mkdir(parents=True, exist_ok=True)
        _write(path, self.settings)

    def path(self, point: Point) -> Path:
        """The file with a point's record, once it is finished."""
        return self.folder / "points" / f"{point}.json"

    def run(self, points: Sequence[Point], log: TextIO, measured: Callable[..., Record] = measure) -> list[Record]:
        """Measures all unfinished points, with one line of log for each; returns all records."""
        todo = [point for point in points if not self.path(point).exists()]
        if len(todo) < len(points):
            print(f"{len(points) - len(todo)} of {len(points)} points are finished already", file=log)
        start = time.monotonic()
        for i, point in enumerate(todo, 1):
            record: Record = {"point": asdict(point)}
            try:
                record |= measured(point, *(self.settings[name] for name in ("rounds", "seconds", "device")))
            except (ArithmeticError, ValueError, RuntimeError) as error:  # RuntimeError: torch, out of memory
                record["error"] = f"{type(error).__name__}: {error}"
            record |= {"commit": commit(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            _write(self.path(point), record)
            spent = time.monotonic() - start
            print(f"[{i}/{len(todo)}, {spent:.0f} s] {point}: {_outcome(record)}", file=log, flush=True)
        return [json.loads(self.path(point).read_text(encoding="utf-8")) for point in points]

    def write(self, records: Sequence[Record]) -> dict[str, Any]:
        """Writes scaling.json and scaling.csv; returns the content of the former."""
        dates = [record["date"] for record in records]
        about = {
            "commits": sorted({record["commit"] or "unknown" for record in records}),
            "first": min(dates),
            "last": max(dates),
        }
        machine = {**self.settings["machine"], **about}
        settings = {name: value for name, value in self.settings.items() if name != "machine"}
        content = {"machine": machine, "settings": settings, "points": list(records)}
        _write(self.folder / "scaling.json", content)
        rows = [columns(record) for record in records]
        names = dict.fromkeys(name for row in rows for name in row)
        with (self.folder / "scaling.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        return content


def columns(record: Record) -> dict[str, Any]:
    """A record as a row of a table.

    Seconds of a call, peak bytes and relative errors are as measured. Derived from them: the speed-up over plain
    PyTorch; for the Gram the flop rate (T (T + 1) P flops: half of the matrix, a multiply-add being two) and flops per
    byte read; for Gram and combination the bytes of the gradients over the time.
    """
    point = Point(**record["point"])
    row = asdict(point)
    if "error" in record:
        return {**row, "error": record["error"]}
    seconds, memory, accuracy = record["seconds"], record["memory"] or {}, record["accuracy"] or {}
    T = point.tasks
    row |= {f"seconds_{name}": value for name, value in seconds.items()}
    if "pure" in seconds:
        row["speedup"] = seconds["pure"] / seconds["fastmtl"]
    row |= {
        "gram_flops": point.batch * T * (T + 1) * point.params / seconds["gram"],
        "gram_intensity": (T + 1) / DTYPES[point.dtype].itemsize,
        "gram_bytes": point.bytes / seconds["gram"],
        "combine_bytes": point.bytes / seconds["combine"],
    }
    row |= {f"memory_{name}": value for name, value in memory.items()}
    row |= {f"error_{name}": value for name, value in accuracy.items()}
    row |= {f"roof_{name}": value for name, value in record["roofs"].items()}
    return {**row, **{name: record[name] for name in ("rounds", "kept", "others", "commit", "date")}}


def _outcome(record: Record) -> str:
    if "error" in record:
        return str(record["error"]).partition("\n")[0]
    seconds = record["seconds"]
    compared = f", plain PyTorch {seconds['pure'] / seconds['fastmtl']:.2f} times as long" if "pure" in seconds else ""
    return f"{seconds['fastmtl'] * 1e3:.4g} ms{compared}"


def _write(path: Path, content: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(path)

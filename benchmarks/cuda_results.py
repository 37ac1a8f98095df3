"""What `make gpu` has left, as tables for the documentation: the newest run, of whatever card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cuda_model

__all__ = ["LEAD", "Run", "newest"]

# What README shows: groups of benchmarks/test_cuda.py, as a reader calls them.
LEAD = {
    "cuda float32 10x1000000": "10 tasks × 1 million parameters",
    "cuda float32 64x1000000": "64 tasks × 1 million",
    "cuda many 256x100000": "256 tasks × 100 thousand",
    "cuda ragged resnet50 T=8": "8 tasks, a ResNet-50's list of tensors",
}
LEAD_STEPS = ("mlp T=10", "resnet18 T=10", "resnet50 T=10", "transformer T=10")

Ways = dict[tuple[str, str], dict[str, Any]]  # (whose, eager or graph) -> `extra_info`


class Run:
    """The results of a card.

    Args:
        folder: benchmarks/results/<card>, with a gpu.json.

    Raises:
        ValueError: gpu.json is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))

    @property
    def date(self) -> str:
        """Of the last part."""
        return max((part["date"] for part in self.about["parts"].values()), default="")

    @property
    def said(self) -> str:
        """Card, commit, torch and date."""
        of = self.about
        return f"{of['card']}, commit {of['commit']}, torch {of['torch']}, {self.date[:10]}"

    def read(self, name: str) -> dict[str, Any]:
        """One file of results; empty where this run has not left it."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @cached_property
    def groups(self) -> dict[str, Ways]:
        """The timings of ops: group -> way -> what benchmarks/test_cuda.py left in `extra_info`."""
        found: dict[str, Ways] = {}
        for name in ("cuda.json", "cuda-large.json", "cuda-lists.json"):
            for group, ways in cuda_model.grouped(self.read(name)).items():
                found.setdefault(group, {}).update(ways)
        return found

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The cases of benchmarks/cuda_steps.py."""
        return list(self.read("cuda-steps.json").get("cases", []))

    def status(self) -> str:
        """Which parts passed, and which did not."""
        parts = self.about["parts"]
        passed = [name for name, part in parts.items() if part["status"] == "passed"]
        others = [f"{name} ({part['status']})" for name, part in parts.items() if part["status"] != "passed"]
        text = f"{self.said}. Passed: {', '.join(passed) or 'nothing'}."
        return text + (f" Not passed: {', '.join(others)}." if others else "")

    def ops(self) -> str:
        """Matrices, batches and lists beside plain PyTorch and the model."""
        few = {group: ways for group, ways in self.groups.items() if not group.startswith("cuda many")}
        few = {group: ways for group, ways in few.items() if ("fastmtl", "eager") in ways or group == "cuda roof"}
        return cuda_model.table_of(few, self.about["card"]) if len(few.keys() - {"cuda roof"}) else ""

    def large(self) -> str:
        """More than 64 tasks: beside torch's eigh on the device, and beside weights that the host makes."""
        rows = []
        for group, ways in self.groups.items():
            if not group.startswith("cuda many") or ("fastmtl", "eager") not in ways:
                continue
            times = [_time(ways, *way) for way in (("fastmtl", "graph"), ("fastmtl", "eager"))]
            theirs = [_time(ways, who, "eager") for who in ("pure", "host")]
            case = group.removeprefix("cuda many ")
            T, P = map(int, case.rpartition(" ")[2].split("x"))
            model = "" if "uneven" in case else cuda_model.modelled(cuda_model.Case(T, P), self.about["card"])
            rows.append([case, *map(_us, [*times, *theirs]), *(_ratio(x, times[1]) for x in theirs), model])
        head = ["T×P", "µs", "called eagerly", "plain PyTorch", "weights on the host", "× plain", "× host", "model"]
        return _table(head, rows)

    def host_time(self) -> str:
        """What calls on lists take of the host."""
        rows = []
        for benchmark in self.read("cuda-lists.json").get("benchmarks", []):
            if "host_time" in benchmark["name"]:
                case, extra = benchmark["name"].partition("[")[2].rstrip("]"), benchmark["extra_info"]
                theirs = extra.get("_foreach_norm + _foreach_mul_, microseconds")
                rows.append([case, _us(extra["microseconds"]), _us(theirs), f"{extra['ratio']:.2f}"])
        return _table(["list, host time", "µs", "`torch._foreach_norm` + `_mul_`", "ratio"], rows)

    def training(self) -> str:
        """Steps beside the plain one, and what they hold in memory."""
        cases = sorted(self.steps, key=lambda case: (case["case"].split()[0], case["tasks"]))
        ways = list(dict.fromkeys(way for case in cases for way in case["ratios"]))

        def cell(case: Mapping[str, Any], way: str) -> str:
            if way not in case["ratios"]:
                return ""
            return f"{case['ratios'][way]:.2f} ({1e3 * case['seconds'][way]:.3g} ms, {case['peaks'][way] / 1e6:.0f} MB)"

        rows = [[case["case"], *(cell(case, way) for way in ways)] for case in cases]
        absent = sorted({f"{way}: {why}" for case in cases for way, why in case["absent"].items()})
        text = _table(["× the step of the summed losses (time, memory)", *ways], rows)
        return text + "".join(f"\n{line}\n" for line in absent)

    def page(self) -> str:
        """All of it, for docs/performance.md."""
        parts = [self.status() + "\n", self.ops(), self.large(), self.host_time(), self.training()]
        return "\n".join(part for part in parts if part)

    def lead(self) -> str:
        """The few rows of README."""
        rows = []
        for group, name in LEAD.items():
            ways = self.groups.get(group, {})
            ours, plain = _time(ways, "fastmtl", "eager"), _time(ways, "pure", "eager")
            if ours and plain:
                rows.append([name, f"{_us(ours)} µs", f"{_us(plain)} µs", f"{plain / ours:.1f} ×"])
        for case in self.steps:
            if case["case"] in LEAD_STEPS and "UB" in case["ratios"]:
                times = [1e3 * case["seconds"][way] for way in ("UB", "plain")]
                rows.append(
                    [
                        f"a training step, {case['case']}",
                        *(f"{x:.3g} ms" for x in times),
                        f"{case['ratios']['UB']:.2f} × a plain step",
                    ]
                )
        if not rows:
            return ""
        return f"{_table(['on a GPU', 'fastmtl', 'plain PyTorch', ''], rows)}\n{self.said}.\n"


def newest(results: Path) -> Run | None:
    """The newest run under benchmarks/results that is no rehearsal."""
    runs = [Run(path.parent) for path in results.glob("*/gpu.json")]
    runs = [run for run in runs if not run.about["rehearsal"] and run.about["parts"]]
    return max(runs, key=lambda run: run.date, default=None)


def _time(ways: Ways, whose: str, way: str) -> float | None:
    return ways[whose, way]["microseconds"] if (whose, way) in ways else None


def _us(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}"


def _ratio(theirs: float | None, ours: float | None) -> str:
    return "" if theirs is None or ours is None else f"{theirs / ours:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) if rows else ""

#!/usr/bin/env python3
"""Puts every measured number of the documentation there from benchmarks/results, or checks that it is there.

    python tools/docs_numbers.py             # rewrites what stands between marks (make docs-numbers)
    python tools/docs_numbers.py --check     # exits 1, with a diff, where the text is not what the results say

Marks are comments, which a reader of the page does not see. A section is what a function of `SECTIONS` makes:

    <!-- numbers: NAME -->
    ...
    <!-- end -->

and a span is one number in a sentence: <!-- n: CASE / MEASURE / FORMAT / PICK -->1.11<!-- /n -->. CASE is a case of
benchmarks/check.py, as it prints them, or a pattern of several; MEASURE one of its measures ("speed-up", "x 2 reads",
...), or "fast" or "base" with a unit ("fast ms"): the time of fastmtl, or of what it is compared with; FORMAT a Python
format (default .2f); PICK "min" or "max" where there are several. More kinds are

    <!-- n: model / launch µs -->               from the CUDA model
    <!-- n: cuda / CASE / FORMAT -->            plain PyTorch's time over fastmtl's, as measured
    <!-- n: cuda / card -->
    <!-- n: demo / METHOD / FIELD / FORMAT -->  the mean over the seeds of what `make demo` prints, with --json;
                                                METHOD / FIELD may also be "shorter"
    <!-- n: methods -->                         how many there are
    <!-- n: experiment / NAME / METHOD / FORMAT -->

The last is Δm of a method in a table of experiments/results, in percent (of rl success in percent, of toy how many of
25 runs reach the optimum), or with FORMAT "place" its place among all.

Where a case is in several files of a machine's folder, the newest run of it counts.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import cuda_model  # noqa: E402  (from benchmarks)
import cuda_results  # noqa: E402
import exact_split  # noqa: E402
import pictures  # noqa: E402  (from tools)

from fastmtl import catalog  # noqa: E402

__all__ = ["PAGES", "SECTIONS", "Results", "fill", "main"]

_NAMES = ("numerics", "performance", "per-example", "training", "what-to-expect")
PAGES = (
    *(ROOT / "docs" / f"{name}.md" for name in _NAMES),
    ROOT / "README.md",
    ROOT / "experiments" / "README.md",
)
MACHINE = "xeon-2core-avx512"  # whose numbers the pages show, CUDA's apart
SECTION = re.compile(r"(<!-- numbers: (?P<name>[^>]+?) -->\n)(?:(?!<!-- numbers: ).)*?(<!-- end -->)", re.DOTALL)
SPAN = re.compile(r"(<!-- n: (?P<name>[^>]+?) -->)[^<]*(<!-- /n -->)")
MARK = re.compile(r"<!-- (?:numbers: [^>]*|end|n: [^>]*|/n) -->")
UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}
SHOWN = ("mlp T=10", "resnet18 T=10")  # of the cases of engines.py, in the comparison with peers
LARGE = 256  # tasks from which a case is shown among those of large T

Line = Mapping[str, Any]


class Results:
    """The committed results of one machine.

    Args:
        folder: benchmarks/results/<machine>.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def cases(self) -> dict[str, dict[str, Any]]:
        """What check.py measured: name -> lines, seconds and machine of the newest run, in the order of the runs."""
        runs = [self.read(path.name) for path in self.folder.glob("*.json")]
        runs = sorted((run for run in runs if "cases" in run), key=lambda run: run["machine"]["date"])
        found: dict[str, dict[str, Any]] = {}
        for run in runs:
            for case in run["cases"]:
                name = case["case"].replace("_", " ")  # as the first runs wrote it
                found[name] = {**case, "case": name, "machine": run["machine"]}
        return found

    def read(self, name: str) -> dict[str, Any]:
        """One file; empty where there is none."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def named(self, *patterns: str) -> list[dict[str, Any]]:
        """The cases that match, in the order of the patterns."""
        return [case for p in patterns for name, case in self.cases.items() if fnmatch.fnmatchcase(name, p)]

    def values(self, pattern: str, measure: str) -> list[float]:
        """One measure of all cases that match.

        Raises:
            ValueError: there is none.
        """
        who, _, unit = measure.partition(" ")
        if who in ("fast", "base") and unit in UNITS:
            found = [case["seconds"][who] * UNITS[unit] for case in self.named(pattern) if "seconds" in case]
        else:
            lines = (line for case in self.named(pattern) for line in case["lines"])
            found = [line["reached"] for line in lines if line["measure"] == measure]
        if not found:
            raise ValueError(f"{self.folder.name}: no case {pattern!r} with {measure!r}")
        return found

    @cached_property
    def demo(self) -> dict[str, Any]:
        """The newest run of examples/digits.py, on any machine; empty where there is none."""
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in self.folder.parent.glob("*/demo.json")]
        return max(runs, key=lambda run: run["about"]["date"], default={})


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def source(cases: Sequence[Mapping[str, Any]]) -> str:
    """With what the cases were measured: one sentence a run."""
    runs = {case["machine"]["date"]: case["machine"] for case in cases}
    said = (f"commit {of['commit'][:7]}, torch {of['torch']}, {date[:10]}" for date, of in sorted(runs.items()))
    return f"\nMeasured at {'; '.join(dict.fromkeys(said))}.\n"


def absent(command: str) -> str:
    """What stands in the place of results that nobody has measured yet."""
    return f"*Not measured yet. The command: `{command}`.*\n"


def number(x: float) -> str:
    """Three digits, plainly written."""
    return f"{float(f'{x:.3g}'):g}"


def reached(line: Line) -> str:
    """The ratio; `?` where the machine was disturbed."""
    return f"{line['reached']:.2f}{' ?' if line['verdict'] == 'NOISY' else ''}"


def bound(line: Line) -> str:
    """≥ 3."""
    return f"{'≥' if line['sense'] == '>=' else '≤'} {line['target']:g}"


def short(name: str) -> str:
    """A case without its kind, its condition number in the field's letter."""
    return name.removeprefix("flat ").replace("kappa", "κ").replace("_", " ")


def tasks(case: Mapping[str, Any]) -> int:
    """T of a case of kind `flat`."""
    return int(case["case"].split()[1].partition("x")[0])


def flat(results: Results, chosen: Callable[[int], bool]) -> str:
    """Aligned-MTL of a matrix, for those T."""
    cases = [case for case in results.named("flat *x*") if chosen(tasks(case)) and case["case"] != "flat 4x1e3"]
    cases.sort(key=tasks)
    rows = []
    for case in cases:
        lines = {line["measure"]: line for line in case["lines"]}
        pure, floor = lines.get("speed-up"), lines.get("x 2 reads")
        milliseconds = number(1e3 * case["seconds"]["fast"]) if "seconds" in case else ""
        of_pure = ["", "", ""]
        if pure:
            of_pure = [reached(pure), bound(pure), "" if pure["roof"] is None else f"{pure['roof']:.2f}"]
        of_floor = [reached(floor), bound(floor)] if floor else ["", ""]
        rows.append([short(case["case"]), milliseconds, *of_pure, *of_floor])
    if not rows:
        return absent("make bench-check")
    return table(["case", "ms", "× pure", "target", "roof", "× 2 reads", "target"], rows) + source(cases)


def lines(*patterns: str) -> Callable[[Results], str]:
    """A section: every line of these cases, one a row."""

    def section(results: Results) -> str:
        cases = results.named(*patterns)
        if not cases:
            return absent("make bench-check")
        roofs = any(line["roof"] is not None for case in cases for line in case["lines"])
        rows = [
            [short(line["name"]), line["measure"], reached(line), bound(line)]
            + ([] if not roofs else ["" if line["roof"] is None else f"{line['roof']:.2f}"])
            for case in cases
            for line in case["lines"]
        ]
        head = ["case", "measure", "reached", "target", *(["roof"] if roofs else [])]
        return table(head, rows) + source(cases)

    return section


def verdicts(results: Results) -> str:
    """How many targets are reached."""
    cases = list(results.cases.values())
    found = [line["verdict"] for case in cases for line in case["lines"]]
    if not found:
        return absent("make bench-check")
    meaning = {
        "ok": "reached",
        "ROOF": "out of reach of code that reads G twice on this machine",
        "MISSED": "missed",
        "NOISY": "measured on a disturbed machine",
        "ABSENT": "without the library that they compare with",
        "WRONG": "with a wrong result",
    }
    said = ", ".join(f"{found.count(verdict)} {meaning[verdict]}" for verdict in meaning if verdict in found)
    return f"Of {len(found)} targets: {said}.\n{source(cases)}"


def losses(results: Results) -> str:
    """Every line and point that is slower than what it is compared with, and every target that is missed."""
    cases = list(results.cases.values())
    rows = []
    for case in cases:
        for line in case["lines"]:
            slower = line["measure"] == "speed-up" and line["reached"] < 1 and line["verdict"] != "ABSENT"
            if slower or line["verdict"] == "MISSED":
                rows.append([short(line["name"]), line["measure"], f"{line['reached']:.2f}", bound(line)])
    if not cases:
        return absent("make bench-check")
    for record in measured_points(results):
        ratio = record["seconds"].get("pure", math.inf) / record["seconds"]["fastmtl"]
        if ratio < 1:
            rows.append([f"scaling: {of_point(record['point'])}", "speed-up", f"{ratio:.2f}", ""])
    return table(["case", "measure", "reached", "target"], rows) if rows else "Nowhere, in this run.\n"


def float32_blocks(results: Results) -> str:
    """Steps with float32 blocks and their probe beside exact products, on every machine that has measured them."""
    text = []
    for path in sorted(results.folder.parent.glob("*/blocks.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            [
                f"{case['pattern']} {case['T']}x{case['P']:g}",
                number(case["ms"]["exact gram"] + case["ms"]["combine"]),
                number(case["ms"]["step"]),
                f"{case['ratio']:.2f}",
            ]
            for case in run["blocks"]
        ]
        of = run["machine"]
        said = f"{path.parent.name}, commit {of['commit'][:7]}, torch {of['torch']}, {of['date'][:10]}"
        busy = max(case["others"] for case in run["blocks"])
        said += f"; other processes kept up to {busy:.1f} processors busy meanwhile"
        text.append(table(["case", "exact, ms", "step, ms", "×"], rows) + f"\nMeasured on {said}.\n")
    return "\n".join(text) or absent(f"python benchmarks/blocks.py --json benchmarks/results/{MACHINE}/blocks.json")


def everywhere(only: str, *patterns: str, head: str) -> Callable[[Results], str]:
    """A section: every line of these cases, one a row, on every machine that has measured them; `only` selects them."""

    def section(results: Results) -> str:
        text = []
        for folder in sorted(path for path in results.folder.parent.iterdir() if path.is_dir()):
            cases = Results(folder).named(*patterns)
            rows = [
                [
                    line["name"],
                    f"{case['seconds']['fast'] * 1e3:.3g}" if "seconds" in case else "",
                    reached(line),
                    bound(line),
                ]
                for case in cases
                for line in case["lines"]
                if line["verdict"] != "ABSENT"
            ]
            if rows:
                said = source(cases).replace("Measured at", f"Measured on {folder.name},")
                text.append(table(["case", "ms", head, "target"], rows) + said)
        name = only.replace(" ", "-")
        command = (
            f"python benchmarks/check.py --only {shlex.quote(only)} --json benchmarks/results/<machine>/{name}.json"
        )
        return "\n".join(text) or absent(command)

    return section


def engines(results: Results) -> str:
    """Steps by the engines of `backward` beside TorchJD's: ratios to the plain step, and milliseconds."""
    run = results.read("engines/steps.json")
    if not run:
        return absent(f"python benchmarks/engines.py steps --json benchmarks/results/{MACHINE}/engines/steps.json")
    ways = list(dict.fromkeys(way for case in run["cases"] for way in case["seconds"]))

    def cell(case: Mapping[str, Any], way: str) -> str:
        return f"{case['ratios'][way]:.2f} ({number(1e3 * case['seconds'][way])})" if way in case["seconds"] else ""

    rows = [[way, *(cell(case, way) for case in run["cases"])] for way in ways]
    head = ["× the step of the summed losses", *(case["case"] for case in run["cases"])]
    return table(head, rows) + "\n" + targets(run)


def paths(results: Results) -> str:
    """The ways of `backward` beside a plain step, on the models that most readers know."""
    run = results.read("engines/steps.json")
    ways = {
        "full": "`shared=`",
        "gramian": '`engine="gramian"`',
        "auto": '`engine="auto"`',
        "UB": "`representation=`",
    }
    cases = [case for case in run.get("cases", []) if case["case"].startswith(("mlp", "resnet"))]
    if not cases:
        return absent(f"python benchmarks/engines.py steps --json benchmarks/results/{MACHINE}/engines/steps.json")
    rows = [
        [said, *(f"{case['ratios'][way]:.2f} ({case['seconds'][way] * 1e3:.3g})" for case in cases)]
        for way, said in ways.items()
    ]
    return table(["", *(case["case"] for case in cases)], rows) + source([{"machine": run["machine"]}])


def engine_memory(results: Results) -> str:
    """What a backward allocates at its peak."""
    run = results.read("engines/memory.json")
    if not run:
        return absent(f"python benchmarks/engines.py memory --json benchmarks/results/{MACHINE}/engines/memory.json")
    rows = [
        [case["case"], way, f"{case['peaks'][way] / 1e6:.0f} MB", f"{share:.2f}"]
        for case in run["cases"]
        for way, share in case["shares"].items()
    ]
    return table(["case", "way", "peak", "of T · P · 4 bytes"], rows) + "\n" + targets(run)


def engine_choice(results: Results) -> str:
    """How often "auto" is right."""
    run = results.read("engines/grid.json")
    if not run:
        return absent(f"python benchmarks/engines.py grid --json benchmarks/results/{MACHINE}/engines/grid.json")
    gains = [case["seconds"]["full"] / case["seconds"]["gramian"] for case in run["cases"] if case["auto"] == "gramian"]
    worst = max(case["excess"] for case in run["cases"])
    said = f'"auto" takes the gramian engine in {len(gains)} of {len(run["cases"])} cases'
    if gains:
        said += f", where a step takes 1/{max(gains):.1f} to 1/{min(gains):.1f} of the full engine's"
    return f"{said}; at worst it takes {worst:.2f} × the faster one's.\n\n" + targets(run)


def targets(run: Mapping[str, Any]) -> str:
    """The lines of a run of benchmarks/engines.py that have a target."""
    rows = [[of["name"], of["measure"], reached(of), bound(of), of["verdict"]] for of in run["lines"]]
    return table(["case", "measure", "reached", "target", ""], rows) + source([run])


def weighting(results: Results) -> str:
    """Task weights beside TorchJD's."""
    cases = results.named("weighting *")
    if not cases:
        return absent('make bench-check CHECK_ARGS="--only weighting"')
    cells: dict[str, dict[str, str]] = {}
    for case in cases:
        _, method, size = case["case"].split()
        if "seconds" not in case:  # TorchJD was not installed
            continue
        fast, base = case["seconds"]["fast"], case["seconds"]["base"]
        noisy = " ?" if any(line["verdict"] == "NOISY" for line in case["lines"]) else ""
        cell = f"{number(base / fast)} × ({number(1e6 * fast)} µs, {number(1e3 * base)} ms){noisy}"
        cells.setdefault(method, {})[size] = cell
    sizes = list(dict.fromkeys(size for row in cells.values() for size in row))
    head = ["method", *(size.replace("=", " = ") for size in sizes)]
    rows = [[method, *(row.get(size, "") for size in sizes)] for method, row in cells.items()]
    return table(head, rows) + source(cases)


def measured_points(results: Results) -> list[dict[str, Any]]:
    """The points of `python -m fastmtl scaling` that ended well."""
    content = results.read("scaling/scaling.json")
    return [point for point in content.get("points", []) if "error" not in point]


def of_point(point: Mapping[str, Any]) -> str:
    """A point of the study as a case is called."""
    batch = f"{point['batch']}x" if point["batch"] > 1 else ""
    threads = f"{point['threads']} thread{'s' if point['threads'] > 1 else ''}"
    return f"{batch}{point['tasks']}x{point['params']:g} κ={point['kappa']:g} {point['dtype']}, {threads}"


SCALING = f"python -m fastmtl scaling --out benchmarks/results/{MACHINE}/scaling"


def scaling_large(results: Results) -> str:
    """Where the time goes at large T: the stages by themselves, beside plain PyTorch."""
    rows = []
    for record in measured_points(results):
        point, seconds, errors = record["point"], record["seconds"], record["accuracy"] or {}
        if point["tasks"] < LARGE or point["batch"] > 1 or point["method"] != "AlignedMTL" or "pure" not in seconds:
            continue
        name = of_point(point)
        stages = [number(1e3 * seconds[stage]) for stage in ("gram", "weights", "combine", "fastmtl", "pure")]
        ratio = f"{seconds['pure'] / seconds['fastmtl']:.2f}"
        wrong = ["" if errors.get(who) is None else f"{errors[who]:.0e}" for who in ("fastmtl", "pure")]
        rows.append((point["tasks"], [name, *stages, ratio, *wrong]))
    if not rows:
        return absent(SCALING)
    head = ["case", "Gram", "weights", "combine", "whole", "pure", "× pure", "error", "pure's error"]
    return "Milliseconds:\n\n" + table(head, (row for _, row in sorted(rows, key=lambda row: row[0])))


def scaling(results: Results) -> str:
    """The plots, and how time grows."""
    content = results.read("scaling/scaling.json")
    if not content:
        return absent(SCALING)
    from fastmtl.scaling.fit import table as growth
    from fastmtl.scaling.study import columns

    folder = results.folder / "scaling"
    pictures = [
        f"![{path.stem}]({Path(os.path.relpath(path, PAGES[0].parent)).as_posix()})\n"
        for path in sorted(folder.glob("*.png"))
    ]
    fits = growth(columns(point) for point in content["points"])
    of = content["machine"]
    said = f"commits {', '.join(commit[:7] for commit in of['commits'])}, torch {of['torch']}, {of['last'][:10]}"
    return "\n".join([*pictures, f"```text\n{fits}\n```\n", f"Measured at {said}.\n"])


def beside_peers(results: Results) -> str:
    """What fastmtl, TorchJD and LibMTL offer a training loop, and what a step of each takes."""
    run, memory = results.read("engines/steps.json"), results.read("engines/memory.json")
    if not run or not memory:
        return absent("make bench-engines")
    found = list(catalog.entries())
    cases = {case["case"]: case["ratios"] for case in run["cases"]}

    def step(*ways: str) -> str:
        ratios = [min(of[way] for way in ways if way in of) for name, of in cases.items() if name in SHOWN]
        return " / ".join(f"{ratio:.1f} ×" for ratio in ratios)

    (of,) = (case for case in memory["cases"] if case["case"] == "resnet18 T=10")
    beyond = {way: f"{number((of['peaks'][way] - of['peaks']['plain']) / 1e6)} MB" for way in ("gramian", "UB")}
    gradients = f"at least the T gradients, {of['gradients'] / 1e6:.0f} MB"
    bound = results.values("step * T=*", "slow-down")
    there = [f"{sum(map(bool, names))} of these" for names in zip(*((e.torchjd, e.libmtl) for e in found), strict=True)]
    rows = [
        ["methods", str(len(found)), *there],
        ["upper bound (UB) in one ordinary backward", "yes", "–", "in T + 1 (`rep_grad`)"],
        ["exact, without T gradients in memory", "yes", "Gram matrix of whole models (autogram)", "–"],
        ["losses of single examples", "yes, checked", "yes", "–"],
        ["DDP, FSDP2", "yes", "–", "–"],
        ["`torch.compile` of the whole forward", "yes", "–", "–"],
        ["mixed precision with a loss scaler", "yes", "by hand", "–"],
        ["a step of UB (`fan_out`)", f"{min(bound):.2f} to {max(bound):.2f} ×", "–", "not measured"],
        [
            f'a step of the exact method (`engine="gramian"`), {" / ".join(SHOWN)}',
            step("full", "gramian"),
            step("TorchJD mtl_backward", "TorchJD autogram"),
            "not measured",
        ],
        [
            "memory beside a plain step, resnet18 T=10",
            f"{beyond['UB']} (UB), {beyond['gramian']} (exact)",
            f"{gradients} (mtl_backward)",
            gradients,
        ],
    ]
    return table(["", "fastmtl", "TorchJD 0.18", "LibMTL"], rows) + source([run, memory, *results.named("step * T=*")])


EXPERIMENTS = {"regression": "QM9, 11 targets", "fashion": "overlaid garments", "scene": "rooms, 3 tasks"}


def deltas(name: str) -> dict[str, tuple[float, float]]:
    """Δm of every method in the committed table of an experiment, in percent, with its standard error."""
    path = ROOT / "experiments" / "results" / name / "table.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    return {method: tuple(row["Δm % ↓"]) for method, row in rows.items() if "Δm % ↓" in row}


def expected(results: Results) -> str:
    """How every method did in the experiments, the best of the first one first."""
    found = {name: deltas(name) for name in EXPERIMENTS}
    if not any(found.values()):
        return absent("make test-experiments")
    methods = sorted(dict.fromkeys(m for of in found.values() for m in of), key=lambda m: found["regression"][m])

    def cell(of: Mapping[str, tuple[float, float]], method: str) -> str:
        return f"{of[method][0]:.1f} ± {of[method][1]:.1f}" if method in of else ""

    rows = [[f"`{method}`", *(cell(of, method) for of in found.values())] for method in methods]
    return table(["Δm %", *EXPERIMENTS.values()], rows)


def on_gpu(results: Results) -> str:
    """The newest run of `make gpu`."""
    run = cuda_results.newest(results.folder.parent)
    return run.page() if run else absent("make gpu")


def gpu_lead(results: Results) -> str:
    """Its few rows for README, which leads with them as soon as they are there."""
    run = cuda_results.newest(results.folder.parent)
    return run.lead() if run else ""


TIME = "processor, s"  # of one run


def experiment(name: str, *columns: str) -> Callable[[Results], str]:
    """A section: columns of an experiment's table, as it was committed."""

    def section(_: Results) -> str:
        path = ROOT / "experiments" / "results" / name / "table.json"
        if not path.exists():
            return absent("make test-experiments")
        content = json.loads(path.read_text(encoding="utf-8"))
        seconds = content["about"].get("mean processor seconds per run", {})
        rows = {m: {**row, TIME: seconds.get(m.partition("-task")[0])} for m, row in content["rows"].items()}

        def cell(found: Any) -> str:
            return of_two(*found) if isinstance(found, list) else "" if found is None else f"{found:.0f}"

        return table(["", *columns], ([f"`{m}`", *(cell(row.get(c)) for c in columns)] for m, row in rows.items()))

    return section


def of_two(mean: float, error: float) -> str:
    """A mean with its standard error, both to its two digits."""
    digits = 0 if error <= 0 else min(max(1 - math.floor(math.log10(error)), 0), 4)
    return f"{mean:.{digits or 2}f} ± {error:.{digits or 2}f}" if error < 10 else f"{mean:.0f} ± {error:.0f}"


SECTIONS: dict[str, Callable[[Results], str]] = {
    "verdicts": verdicts,
    "flat": lambda results: flat(results, lambda T: T < LARGE),
    "more": lines("flat 4x1e3", "batched *", "eigh *", "resnet50 T=*", "bfloat16 *", "backward *"),
    "large": lambda results: flat(results, lambda T: T >= LARGE),
    "large stages": scaling_large,
    "real": everywhere("real", "real *", head="× plain PyTorch, or eigh"),
    "small": everywhere(
        "batch", "batched *", "batch threads *", "eigh *", "small tensors *", "as rows *", head="reached"
    ),
    "hard": everywhere("hard", "hard *", head="× eigh"),
    "per example": everywhere(
        "per example", *(f"per example {net} *" for net in ("mlp", "lenet", "transformer")), head="× plain step"
    ),
    "per example memory": everywhere("per example", "per example memory *", head="× activations"),
    "per example peers": everywhere(
        "per example", "per example autogram *", "per example upgrad *", head="TorchJD's step / this one"
    ),
    "float32 blocks": float32_blocks,
    "engines": engines,
    "paths": paths,
    "amortised": everywhere(
        "amortised", "amortised *", "between solutions *", "accumulate *", head="× plain steps, or one by one"
    ),
    "engine memory": engine_memory,
    "engine choice": engine_choice,
    "peers": beside_peers,
    "expect": expected,
    "experiment scene": experiment(
        "scene", "mIoU % ↑", "pixel accuracy % ↑", "abs error ↓", "rel error ↓", "mean angle ↓", "Δm % ↓"
    ),
    "experiment rl": experiment(
        "rl", "success ↑", "success reach-v3 ↑", "success drawer-close-v3 ↑", "success window-close-v3 ↑", "return ↑"
    ),
    "experiment regression every": experiment("regression-every", "Δm % ↓", TIME),
    "experiment scene every": experiment("scene-every", "mIoU % ↑", "abs error ↓", "mean angle ↓", "Δm % ↓", TIME),
    "step targets": lines("step mlp *", "step resnet18 *"),
    "weighting": weighting,
    "memory": lines("resnet50 memory *", "step memory *"),
    "cold": lines("import*", "first call *"),
    "threads": lines("threads *"),
    "scaling": scaling,
    "losses": losses,
    "cuda run": on_gpu,
    "cuda lead": gpu_lead,
    "cuda": lambda results: cuda_model.measured(),
    "cuda model": lambda results: cuda_model.tables(),
    "cuda latency": lambda results: cuda_model.latencies(),
    "cuda exact split": lambda results: exact_split.table(),
}


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def demo_mean(results: Results, method: str, field: str = "") -> float:
    """The mean over the seeds of the demo."""
    return statistics.fmean(results.demo["shorter"] if method == "shorter" else results.demo["methods"][method][field])


def experiment_mean(results: Results, name: str, method: str) -> float:
    """Δm of a method, in percent; of rl success in percent, of toy the runs that reach the optimum."""
    if name == "toy":
        return pictures.reached()[method]
    if name == "rl":
        return {row[0]: row[1] for row in pictures.of_table(name, "success ↑", 100)}[method]
    return deltas(name)[method][0]


def of_cuda(name: str, rest: Sequence[str]) -> str:
    """The card of the CUDA table, or how many times as long plain PyTorch takes in one of its rows."""
    found = cuda_model.grouped(json.loads(cuda_model.RESULTS.read_text(encoding="utf-8")))
    if rest == ["card"]:
        card: str = found["cuda roof"]["copy", "eager"]["device"]
        return card.removeprefix("NVIDIA ").partition(" ")[0]
    try:
        ours, plain = (found[f"cuda {rest[0]}"][who, "eager"]["microseconds"] for who in ("fastmtl", "pure"))
    except (KeyError, IndexError):
        raise ValueError(f"n: {name}: not in {cuda_model.RESULTS.name}, or expected 'cuda / CASE / FORMAT'") from None
    return format(plain / ours, *rest[1:])


def place(name: str, method: str) -> int:
    """Which Δm of a table it is, the best being the first."""
    return sorted(deltas(name), key=lambda other: deltas(name)[other][0]).index(method) + 1


def span(name: str, results: Results) -> str:
    """One number.

    Raises:
        ValueError: the results do not have it, or the name is not understood.
    """
    kind, *rest = name.split(" / ")
    pick = min
    if kind == "model":
        if rest != ["launch µs"]:
            raise ValueError(f"n: {name}: expected 'model / launch µs'")
        return f"{1e6 * cuda_model.LAUNCH:g}"
    if kind == "cuda":
        return of_cuda(name, rest)
    if kind == "methods":
        return str(len(catalog.names()))
    if kind in ("demo", "experiment"):
        try:
            if rest[-1:] == ["place"]:
                return str(place(*rest[:-1]))
            return format((demo_mean if kind == "demo" else experiment_mean)(results, *rest[:-1]), rest[-1])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"n: {name}: not in the results of the demo or experiment") from None
    if not 1 <= len(rest) <= 3 or (len(rest) == 3 and rest[2] not in ("min", "max")):
        raise ValueError(f"n: {name}: expected 'CASE / MEASURE / FORMAT / min or max'")
    measure, *form = rest
    values = results.values(kind, measure)
    if len(form) == 2:
        pick = {"min": min, "max": max}[form.pop()]
    elif len(values) > 1:
        raise ValueError(f"n: {name}: expected one value, got {len(values)}; add a format and min or max")
    return format(pick(values), *(form or [".2f"]))


def fill(page: str, results: Results) -> str:
    """The page with what the results say between its marks.

    Raises:
        ValueError: a section or span that is unknown, or a mark without its counterpart.
    """

    def section(match: re.Match[str]) -> str:
        if match["name"] not in SECTIONS:
            raise ValueError(f"numbers: expected one of {', '.join(SECTIONS)}, got {match['name']!r}")
        return f"{match[1]}\n{SECTIONS[match['name']](results)}\n{match[3]}"

    left = MARK.search(SPAN.sub("", SECTION.sub("", page)))
    if left is not None:
        raise ValueError(f"expected a beginning and an end of every mark, got {left[0]} alone")
    page = SECTION.sub(section, page)
    return SPAN.sub(lambda match: f"{match[1]}{span(match['name'], results)}{match[3]}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites the pages, or with --check prints how they differ; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is not up to date")
    check = parser.parse_args(arguments).check
    results, status = Results(ROOT / "benchmarks" / "results" / MACHINE), 0
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        filled = fill(page, results)
        if filled == page:
            continue
        name = path.relative_to(ROOT).as_posix()
        if check:
            before, after = page.splitlines(True), filled.splitlines(True)
            sys.stdout.writelines(difflib.unified_diff(before, after, name, "what the results say", n=1))
            status = 1
        else:
            path.write_text(filled, encoding="utf-8")
            print(f"{name}: written")
    return status


if __name__ == "__main__":
    raise SystemExit(main())

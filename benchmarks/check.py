#!/usr/bin/env python3
"""Measures what fastmtl promises about speed and memory, and exits 1 where a promise is missed.

    python benchmarks/check.py [--only SUBSTRING] [--rounds 15] [--threads 2] [--accept-roof]
                               [--json PATH] [--summary PATH]
    python benchmarks/check.py --ci [--only SUBSTRING] [--repeat N] [--usual]

The promises stand in bounds.toml. They are ratios of interleaved medians against plain PyTorch (pure.py),
against TorchJD (peers.py) and against a streaming read of the same data, and each result is compared with a float64
computation before it is timed (trials.py). A case that fails is measured up to two more times, as a whole: no attempt
is patched with numbers from another.

Verdicts: ok; MISSED; WRONG (the result is not accurate, nothing was timed); ABSENT (TorchJD, or the solver that it
needs, is not installed: the last line says how to); NOISY (most rounds were disturbed, or the
promise was missed while other processes kept the machine busy: run it again on a quiet one); and ROOF, for a ratio that
is missed although the time is within the line's floor bound of what this machine's memory bandwidth and multiply-add
rate permit.

The `roof` column is that limit as a ratio; bounds.toml has the formula. It is a model, not a proof: it counts reads of
the input and the Gram's multiply-adds, at rates measured in the same rounds. It leaves out the write of the result,
which would lower the limit, and what a cache keeps between two passes, which can raise it. So ROOF says that the
promise is out of reach here for code that is at most a floor bound from the limit, not that it is kept: such lines are
counted apart, with the roof beside them. They still fail the check, unless --accept-roof is given: a lesser machine
should say so itself.

With --ci it is the gate against regressions: small cases, one thread, and bounds that leave room for another machine
but not for code that takes twice as long. Each case has two ratios, against plain PyTorch and against a yardstick that
has no fastmtl and no small matrices in it, and is REGRESSED only where both are beyond their bounds: slow memory moves
the one, a better LAPACK the other, slower code moves both. One beyond its bound alone is shown as ALONE and fails
nothing. Times are those of the processor, which stand still while others have it, so that a busy machine passes too.
A case that stays NOISY in every attempt does not fail the gate, but it is shown.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import measure
import peers
import summary
import torch
from trials import FIGURES, TRIALS, Trial

from fastmtl.scaling.timing import Timing, by_clock, interleave, others_busy

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli

BOUNDS = tomllib.loads(Path(__file__).with_name("bounds.toml").read_text(encoding="utf-8"))
ATTEMPTS = 3
NAME = 28  # width of the column
BUSY = 0.2  # processors kept busy by others: beyond that, only a promise that is kept means anything
SAMPLE = 5e-4  # seconds that a sample of the gate takes at least: shorter ones scatter where others run meanwhile
YARDSTICK = 256  # side of the matrix product where that is the yardstick: half a millisecond


@dataclass(frozen=True)
class Line:
    """One demand and what came of it; `roof` is what the machine permits, where the demand has one."""

    name: str
    measure: str
    reached: float
    target: float
    sense: str
    roof: float | None
    verdict: str

    @staticmethod
    def met(reached: float, target: float, sense: str) -> bool:
        """Whether `reached` is on the good side of `target`; NaN is not."""
        return reached >= target if sense == ">=" else reached <= target


@dataclass(frozen=True)
class Case:
    """One problem of a group in bounds.toml; the attributes from `kappa` on are described there."""

    name: str
    kind: str
    arguments: Sequence[Any]
    conditions: Mapping[str, float]
    floor_bound: float = math.nan
    reads: int | None = None
    min_speedup: float | None = None
    max_slowdown: float | None = None
    max_floor: float | None = None
    max_extra_mb: float | None = None
    max_ms: float | None = None
    max_activations: float | None = None
    min_efficiency: float | None = None
    yardstick: str = "read"
    usual: tuple[float, float] | None = None
    slack: float = math.nan

    def prepare(self) -> Trial:
        """The problem, with its result compared with the truth."""
        return TRIALS[self.kind](*self.arguments, **self.conditions)

    def functions(self, trial: Trial) -> dict[str, Callable[[], object]]:
        """What is timed in turn."""
        functions = {"base": trial.base, "fast": trial.fast, "read": trial.read}
        if self.reads is not None:
            functions["gemm"] = measure.gemm(trial.products)
        elif self.yardstick == "gemm":
            functions["gemm"] = measure.gemm(trial.products, YARDSTICK)
        if trial.read_alone is not None:
            functions["read_alone"] = trial.read_alone
        return functions


def cases(bounds: Mapping[str, Any] = BOUNDS) -> Iterator[Case]:
    """The promises of bounds.toml."""
    for group in bounds["group"]:
        floor_bound = group.get("max_floor", bounds["floor_bound"])
        yield from _expand(group, floor_bound=floor_bound)


def ci_cases(isa: str, bounds: Mapping[str, Any] = BOUNDS) -> Iterator[Case]:
    """The cases of the gate, with what is usual for kernels of this instruction set (`portable` where unknown)."""
    ci = bounds["ci"]
    usual = ci["usual"].get(isa, ci["usual"]["portable"])
    for group in ci["group"]:
        for case in _expand(group, slack=ci["slack"]):
            yield replace(case, usual=usual.get(case.name, (math.nan, math.nan)))


def _expand(group: Mapping[str, Any], **common: Any) -> Iterator[Case]:
    """One case per method, shape and conditions."""
    limits = dict(group)
    kind, shapes = limits.pop("kind"), limits.pop("shapes", [[]])
    methods, kappas, spread = limits.pop("methods", [None]), limits.pop("kappas", [1]), limits.pop("spread", 1)
    steps = limits.pop("steps", 0)
    for method, (i, shape), kappa in itertools.product(methods, enumerate(shapes), kappas):
        size = "x".join(map(short, shape)) if len(shape) > 1 else "".join(f"T={T}" for T in shape)
        conditions = {"kappa": kappa} | ({"spread": spread} if spread > 1 else {}) | ({"steps": steps} if steps else {})
        said = [f"{key}={short(value)}" for key, value in conditions.items() if value > 1]
        yield Case(
            " ".join(filter(None, (kind.replace("_", " "), method, size, *said))),
            kind,
            shape if method is None else [method, *shape],
            conditions,
            **common,
            **{key: limit[i] if isinstance(limit, list) else limit for key, limit in limits.items()},
        )


def short(n: float) -> str:
    """1000000 -> 1e6, 2048 -> 2048."""
    mantissa, _, exponent = f"{n:.15e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if len(mantissa) == 1 and n >= 1000 else f"{n:g}"


Judge = Callable[[Case, Trial, Timing], Sequence[Line]]


def against_targets(case: Case, trial: Trial, timing: Timing) -> list[Line]:
    """The demands of a case against one attempt's times."""
    seconds = timing.seconds
    fast, base, read = seconds["fast"], seconds["base"], seconds["read"]
    found = []

    def line(name: str, reached: float, target: float | None, sense: str, roof: float, limited: bool) -> None:
        if target is None:
            return
        if Line.met(reached, target, sense) and timing.steady:
            verdict = "ok"
        elif not timing.steady or timing.others > BUSY:  # a read slowed down by others is no roof
            verdict = "NOISY"
        else:
            verdict = "ROOF" if limited else "MISSED"
        found.append(Line(case.name, name, reached, target, sense, None if math.isnan(roof) else roof, verdict))

    roof_time = math.nan  # compares as never reached
    if case.reads is not None:
        compute = trial.multiply_adds / measure.GEMM**3 * seconds["gemm"]
        roof_time = max(read, compute) + (case.reads - 1) * read
    bound = case.floor_bound
    line("speed-up", base / fast, case.min_speedup, ">=", base / roof_time, fast <= bound * roof_time)
    slowest = base + bound * roof_time
    line("slow-down", fast / base, case.max_slowdown, "<=", (base + roof_time) / base, fast <= slowest)
    line("x 2 reads", fast / (2 * read), case.max_floor, "<=", math.nan, False)
    if case.min_efficiency is not None:
        several, of_read = torch.get_num_threads(), seconds["read_alone"] / read
        efficiency, roof = base / fast / several, of_read / several
        line("efficiency", efficiency, case.min_efficiency, ">=", roof, efficiency * bound >= roof)
    return found


def against_usual(case: Case, trial: Trial, timing: Timing) -> list[Line]:
    """The two ratios of a case of the gate against what is usual: REGRESSED where both are beyond their bounds."""
    assert case.usual is not None
    seconds = timing.seconds
    ratios = (
        ("speed-up", seconds["base"] / seconds["fast"], case.usual[0] * case.slack, ">="),
        (f"x {case.yardstick}", seconds["fast"] / seconds[case.yardstick], case.usual[1] / case.slack, "<="),
    )
    met = [Line.met(reached, target, sense) for _, reached, target, sense in ratios]

    def verdict(kept: bool) -> str:
        if not timing.steady:
            return "NOISY"
        if kept:
            return "ok"
        return "ALONE" if any(met) else "REGRESSED"

    return [Line(case.name, *ratio, None, verdict(kept)) for ratio, kept in zip(ratios, met, strict=True)]


def run(
    case: Case, rounds: int, accept: Sequence[str], judge: Judge, **options: Any
) -> tuple[Sequence[Line], dict[str, Any]]:
    """The case's lines and the data behind them: the first attempt with only `accept` verdicts, or the best one.

    That is the one with the fewest others; among these, one that is not NOISY. `options` are those of
    `interleave`.
    """
    if case.kind in FIGURES:
        return figure(case)
    try:
        trial = case.prepare()
    except ImportError:  # TorchJD, or the solver that a method of it needs
        return [Line(case.name, "speed-up", 0.0, case.min_speedup or 0.0, ">=", None, "ABSENT")], {}
    data: dict[str, Any] = {"error": trial.error, "tolerance": trial.tolerance}
    if not trial.error <= trial.tolerance:
        return [Line(case.name, "error", trial.error, trial.tolerance, "<=", None, "WRONG")], data
    functions = case.functions(trial)
    attempts = []
    for attempt in range(1, ATTEMPTS + 1):
        timing = interleave(functions, math.ceil(trial.rounds * rounds), **options).per_call(trial.calls)
        lines = judge(case, trial, timing)
        verdicts = [line.verdict for line in lines]
        bad = sum(verdict not in accept for verdict in verdicts), verdicts.count("NOISY")
        attempts.append((bad, lines, data | {"attempt": attempt, **timing._asdict()}))
        if bad == (0, 0):
            break
    _, lines, data = min(attempts, key=lambda attempt: attempt[0])
    return lines, data


def figure(case: Case) -> tuple[list[Line], dict[str, Any]]:
    """The line of a case that is no ratio."""
    limits = {"ms": case.max_ms, "extra MB": case.max_extra_mb, "x activations": case.max_activations}
    ((name, target),) = ((name, limit) for name, limit in limits.items() if limit is not None)
    with others_busy() as others:
        reached = FIGURES[case.kind](*case.arguments)
    verdict = "ok" if reached <= target else "NOISY" if name == "ms" and others() > BUSY else "MISSED"
    return [Line(case.name, name, reached, target, "<=", None, verdict)], {"others": others()}


HEAD = f"{'case':{NAME}} {'measure':10} {'reached':>8} {'target':>8} {'roof':>7} {'fast ms':>10}  verdict"


def show(line: Line, data: Mapping[str, Any]) -> str:
    """A row of the printed table."""
    roof = "" if line.roof is None else f"{line.roof:.2f}"
    fast = f"{data['seconds']['fast'] * 1e3:.3f}" if "seconds" in data else ""
    reached = f"{line.reached:.1e}" if line.verdict == "WRONG" else f"{line.reached:.2f}"
    target = f"{line.sense} {line.target:.3g}"
    return f"{line.name:{NAME}} {line.measure:10} {reached:>8} {target:>8} {roof:>7} {fast:>10}  {line.verdict}"


def check(chosen: Sequence[Case], args: argparse.Namespace, machine: Mapping[str, Any]) -> bool:
    """Holds the cases to their targets; whether all are kept."""
    if "_C" not in machine["extensions"]:
        print("The CPU kernels are not built: these are the times of the reference ops.")
    print(HEAD, flush=True)
    accept = ("ok", "ROOF") if args.accept_roof else ("ok",)
    verdicts: Counter[str] = Counter()
    records = []
    for case in chosen:
        result, data = run(case, args.rounds, accept, against_targets)
        for line in result:
            verdicts[line.verdict] += 1
            print(show(line, data), flush=True)
        records.append({"case": case.name, "lines": [asdict(line) for line in result], **data})

    failed = {verdict: n for verdict, n in verdicts.items() if verdict not in ("ok", "ROOF")}
    missed = sum(failed.values())
    detail = "" if set(failed) <= {"MISSED"} else f" ({', '.join(f'{n} {verdict}' for verdict, n in failed.items())})"
    print(
        f"{verdicts['ok']} reached, {verdicts['ROOF']} limited by this machine's memory or multiply-add rate, "
        f"{missed} missed{detail}"
    )
    busy = max((record.get("others", 0.0) for record in records), default=0.0)
    if busy > BUSY:
        print(f"Other processes kept up to {busy:.1f} processors busy meanwhile: do not trust these numbers.")
    if verdicts["ABSENT"]:
        print(f"TorchJD or a solver that it needs is not installed: {peers.INSTALL}")
    options = {"only": args.only, "rounds": args.rounds, "accept_roof": args.accept_roof}
    content = {"machine": machine, "options": options, "verdicts": dict(verdicts), "cases": records}
    for path, text in ((args.json, json.dumps(content, indent=1) + "\n"), (args.summary, summary.markdown(content))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return set(verdicts) <= set(accept)


def gate(chosen: Sequence[Case], args: argparse.Namespace, machine: Mapping[str, Any]) -> bool:
    """Holds the cases to what is usual, up to `args.repeat` times over; whether nothing regressed.

    With `args.usual` nothing is judged, and what is usual here is printed.
    """
    accept = ("ok", "ALONE", "REGRESSED") if args.usual else ("ok", "ALONE")
    sample = by_clock(measure.cpu_clock())
    reached: defaultdict[str, list[list[float]]] = defaultdict(list)
    for number in range(1, args.repeat + 1):
        start, verdicts = time.perf_counter(), Counter[str]()
        if number == 1:
            print(HEAD, flush=True)
        for case in chosen:
            result, data = run(case, args.rounds, accept, against_usual, sample=sample, shortest=SAMPLE)
            for line in result:
                verdicts[line.verdict] += 1
                if number == 1 or line.verdict != "ok":
                    print(show(line, data), flush=True)
            reached[case.name].append([line.reached for line in result])
        passed = set(verdicts) <= {*accept, "NOISY"}
        counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
        seconds = time.perf_counter() - start
        print(
            f"pass {number} of {args.repeat}: {'kept' if passed else 'FAILED'} ({counts}) in {seconds:.0f} s",
            flush=True,
        )
        if not passed:
            return False
    if args.usual:
        print(f"\n[ci.usual.{machine['isa']}]")
        for name, passes in reached.items():
            print(
                f'"{name}" = [{", ".join(f"{statistics.median(ratios):.3g}" for ratios in zip(*passes, strict=True))}]'
            )
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the cases, prints a row per demand, and exits 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, help="interleaved rounds per attempt (default 15, with --ci 61)")
    parser.add_argument("--threads", type=int, help="threads of torch (default 2, with --ci 1)")
    parser.add_argument("--accept-roof", action="store_true", help="do not fail on what this machine's roof forbids")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write results, hardware and commit there")
    parser.add_argument("--summary", type=Path, metavar="PATH", help="write them there as a Markdown table")
    parser.add_argument("--ci", action="store_true", help="the gate: quick cases against looser bounds")
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="with --ci: N passes, up to the first failure"
    )
    parser.add_argument("--usual", action="store_true", help="with --ci: judge nothing, print medians for bounds.toml")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (61 if args.ci else 15)
    torch.set_num_threads(args.threads or (1 if args.ci else 2))
    machine = measure.machine()
    if args.ci and "_C" not in machine["extensions"]:
        print("The CPU kernels are not built: there is nothing whose speed could be gated, and nothing was measured.")
        raise SystemExit(0)
    chosen = [case for case in (ci_cases(machine["isa"]) if args.ci else cases()) if args.only in case.name]
    if not chosen:
        parser.error(f"--only {args.only!r}: no such case")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    raise SystemExit(not (gate if args.ci else check)(chosen, args, machine))


if __name__ == "__main__":
    main()

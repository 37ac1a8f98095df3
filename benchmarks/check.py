#!/usr/bin/env python3
"""Measures what fastmtl promises about speed and memory, and exits 1 where a promise is missed.

    python benchmarks/check.py [--only SUBSTRING] [--rounds 15] [--threads 2] [--accept-roof] [--json PATH]

The promises stand in bounds.toml. They are ratios of interleaved medians (measure.py) against plain PyTorch (pure.py),
against TorchJD (peers.py) and against a streaming read of the same data, and each result is compared with a float64
computation before it is timed. A case that fails is measured up to two more times, as a whole: no attempt is patched
with numbers from another.

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
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
import peers
import pure
import torch
import workloads

import fastmtl

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli

BOUNDS = Path(__file__).with_name("bounds.toml")
ATTEMPTS = 3
NAME = 28  # width of the column
BUSY = 0.2  # processors kept busy by others: beyond that, only a promise that is kept means anything


@dataclass(frozen=True)
class Trial:
    """A prepared case.

    Attributes:
        fast: fastmtl.
        base: what it is compared with.
        read: a streaming read of the input.
        error: how wrong fastmtl's result was.
        tolerance: how wrong it may be.
        multiply_adds: of the Gram's upper triangle.
        products: the cheapest dtype that is accurate enough for them.
        rounds: how many rounds to time for one of the other cases, where the ratio is close to 1 or a call is long.
        calls: how many calls each function makes; times are given for one.
    """

    fast: Callable[[], object]
    base: Callable[[], object]
    read: Callable[[], object]
    error: float
    tolerance: float
    multiply_adds: int = 0
    products: torch.dtype = torch.float32
    rounds: float = 1.0
    calls: int = 1


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


def triangle(T: int, P: int) -> int:
    """Multiply-adds of the upper triangle of a Gram."""
    return T * (T + 1) // 2 * P


def flat(T: int, P: int, kappa: float) -> Trial:
    """A matrix [T, P]."""
    G, out = workloads.matrix(T, P, kappa=kappa), torch.empty(P)
    method, base = fastmtl.AlignedMTL(), pure.Flat(T, P)
    return Trial(
        fast=lambda: method(G, out=out),
        base=lambda: base(G),
        read=lambda: G.sum(),
        error=workloads.error(method(G), workloads.exact(G)),
        tolerance=workloads.tolerance(T),
        multiply_adds=triangle(T, P),
        products=torch.float64 if kappa > 1 else torch.float32,
    )


def batched(B: int, T: int, P: int, kappa: float) -> Trial:
    """A batch [B, T, P]."""
    G, out = workloads.matrix(B, T, P, kappa=kappa), torch.empty(B, P)
    method, base = fastmtl.AlignedMTL(), pure.Batched(B, T, P)
    return Trial(
        fast=lambda: method(G, out=out),
        base=lambda: base(G),
        read=lambda: G.sum(),
        error=workloads.error(method(G), workloads.exact(G)),
        tolerance=workloads.tolerance(T),
        multiply_adds=B * triangle(T, P),
        products=torch.float64 if kappa > 1 else torch.float32,
    )


def bfloat16(T: int, P: int, kappa: float) -> Trial:
    """A bfloat16 matrix against a float32 matrix of the same shape."""
    wide = workloads.matrix(T, P, kappa=kappa)
    half, out, wide_out = wide.bfloat16(), torch.empty(P, dtype=torch.bfloat16), torch.empty(P)
    method = fastmtl.AlignedMTL()
    return Trial(
        fast=lambda: method(half, out=out),
        base=lambda: method(wide, out=wide_out),
        read=lambda: wide.sum(),
        error=workloads.error(method(half), workloads.exact(half)),
        tolerance=workloads.tolerance(T, torch.bfloat16),
    )


def eigh(B: int, T: int, kappa: float) -> Trial:
    """Batched float64 eigendecomposition of [B, T, T] against torch.linalg.eigh."""
    M = workloads.symmetric(B, T)
    return Trial(
        fast=lambda: fastmtl.eigh(M),
        base=lambda: torch.linalg.eigh(M),
        read=lambda: M.sum(),
        error=workloads.eigen_error(M, *fastmtl.eigh(M)),
        tolerance=10.0,
    )


def resnet50(T: int, kappa: float) -> Trial:
    """A ragged list shaped like ResNet-50's parameters against concatenation."""
    shapes = workloads.resnet50()
    rows, base, method = workloads.ragged(T, shapes), pure.Ragged(T, shapes), fastmtl.AlignedMTL()
    matrix = base.flatten(rows)
    return Trial(
        fast=lambda: method(rows),
        base=lambda: base(rows),
        read=lambda: matrix.sum(),
        error=workloads.error(method(rows), workloads.exact(matrix)),
        tolerance=workloads.tolerance(T),
        multiply_adds=triangle(*matrix.shape),
    )


def backward(T: int, kappa: float) -> Trial:
    """`m.backward` of T heads on an MLP against the bare loop of T autograd.grad calls; the graph is kept by both."""
    problem, method = workloads.mlp(T), fastmtl.AlignedMTL()
    losses = problem.losses([problem.forward()] * T)
    loop = pure.autograd_loop(losses, problem.shared, problem.heads)
    matrix = torch.stack([workloads.flatten(row[: len(problem.shared)]) for row in loop])
    del loop

    def fast() -> None:
        problem.zero_grad()
        method.backward(losses, shared=problem.shared, retain_graph=True)

    fast()
    return Trial(
        fast=fast,
        base=lambda: pure.autograd_loop(losses, problem.shared, problem.heads),
        read=lambda: matrix.sum(),
        error=workloads.error(problem.shared_grad(), workloads.exact(matrix)),
        tolerance=workloads.tolerance(T),
        multiply_adds=triangle(*matrix.shape),
    )


def fan_out(problem: workloads.MultiTask) -> Callable[[], object]:
    """A training step through `fan_out`."""
    method = fastmtl.AlignedMTL()
    return lambda: problem.step(lambda h: fastmtl.fan_out(h, problem.tasks, method))


def step(problem: workloads.MultiTask, rounds: float) -> Trial:
    """A training step (without optimizer) through `fan_out` against one of the plain sum of the losses."""
    measure.keep_memory()
    expected, fast = problem.exact_upper_bound(), fan_out(problem)
    fast()
    return Trial(
        fast=fast,
        base=problem.step,
        read=lambda: expected.sum(),
        error=workloads.error(problem.shared_grad(), expected),
        tolerance=workloads.tolerance(problem.tasks),
        rounds=rounds,
    )


def step_mlp(T: int, kappa: float) -> Trial:
    """T heads on an MLP: a step of a few milliseconds."""
    return step(workloads.mlp(T), rounds=10)


def step_resnet18(T: int, kappa: float) -> Trial:
    """T heads on convolutions."""
    return step(workloads.resnet18(T), rounds=1)


def weighting(method: str, T: int, kappa: float) -> Trial:
    """Task weights from a Gram matrix [T, T] against TorchJD's from the same one."""
    grams, peer = workloads.grams(T), peers.PEERS[method]
    fast, base = peer.passes(grams)
    stacked = torch.stack(grams)
    return Trial(
        fast=fast,
        base=base,
        read=lambda: stacked.sum(),
        error=max(peer.error(M) for M in grams),
        tolerance=peer.tolerance,
        rounds=1 if T < 100 else 1 / 3,  # theirs takes up to half a second
        calls=len(grams),
    )


def aggregation(method: str, T: int, P: int, kappa: float) -> Trial:
    """A whole aggregation of [T, P] against Aligned-MTL's."""
    G, out = workloads.conflicting(T, P), torch.empty(P)
    peer, aligned = peers.PEERS[method], fastmtl.AlignedMTL()
    fast = peer.ours()
    return Trial(
        fast=lambda: fast(G, out=out),
        base=lambda: aligned(G, out=out),
        read=lambda: G.sum(),
        error=peer.aggregation_error(G),
        tolerance=peers.AGGREGATION,
    )


def graddrop(T: int, P: int, kappa: float) -> Trial:
    """GradDrop of [T, P] against TorchJD's."""
    G, out = workloads.conflicting(T, P), torch.empty(P)
    method, base = fastmtl.GradDrop(), peers.torchjd().GradDrop()
    return Trial(
        fast=lambda: method(G, out=out),
        base=lambda: base(G),
        read=lambda: G.sum(),
        error=workloads.sign_error(G, method(G)),
        tolerance=workloads.tolerance(T),
    )


def drop_in(T: int, kappa: float) -> Trial:
    """A step of TorchJD's documented example, with our UPGrad in its import line against with theirs."""
    example = importlib.import_module("torchjd_example")
    ours, theirs = (make(torch.float64) for make in (example.variant()["training"], example.training))
    losses = [torch.stack([step() for _ in range(50)]) for step in (ours, theirs)]
    fast, base = (make() for make in (example.variant()["training"], example.training))
    return Trial(
        fast=fast,
        base=base,
        read=lambda: losses[0].sum(),
        error=float((losses[0] - losses[1]).abs().max()),
        tolerance=1e-4,
        rounds=20,
    )


def resnet50_memory(T: int) -> int:
    """Bytes that the aggregation of T ragged rows takes beyond its result."""
    result = 4 * sum(torch.Size(shape).numel() for shape in workloads.resnet50())
    return measure.peak_extra_memory(_resnet50_call, T) - result


def _resnet50_call(T: int) -> tuple[Callable[[], object], Callable[[], object]]:
    method = fastmtl.AlignedMTL()
    small, rows = workloads.ragged(T, [(100, 1000), (1000,)]), workloads.ragged(T, workloads.resnet50())
    return lambda: method(small), lambda: method(rows)


def step_memory(T: int) -> int:
    """Bytes that a step through `fan_out` takes beyond a plain step and the T gradients that are captured."""
    batch, width = 4096, 512  # 8 MiB each: far beyond what the measurement is off by
    peaks = [measure.peak_extra_memory(_step_call, T, batch, aggregated) for aggregated in (False, True)]
    return peaks[1] - peaks[0] - T * batch * width * 4


def _step_call(T: int, batch: int, aggregated: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    problems = workloads.mlp(T), workloads.mlp(T, batch)
    small, large = (fan_out(problem) if aggregated else problem.step for problem in problems)
    return small, large


TRIALS: dict[str, Callable[..., Trial]] = {
    function.__name__: function
    for function in (
        *(flat, batched, bfloat16, eigh, resnet50, backward, step_mlp, step_resnet18),
        *(weighting, aggregation, graddrop, drop_in),
    )
}
MEMORY: dict[str, Callable[..., int]] = {function.__name__: function for function in (resnet50_memory, step_memory)}


@dataclass(frozen=True)
class Case:
    """One problem of a group in bounds.toml; the attributes from `min_speedup` on are described there."""

    name: str
    kind: str
    arguments: Sequence[Any]
    kappa: float
    floor_bound: float
    reads: int | None = None
    min_speedup: float | None = None
    max_slowdown: float | None = None
    max_floor: float | None = None
    max_extra_mb: float | None = None


def cases() -> Iterator[Case]:
    """The cases of bounds.toml."""
    bounds = tomllib.loads(BOUNDS.read_text())
    for group in bounds["group"]:
        kind, shapes, kappas = group.pop("kind"), group.pop("shapes"), group.pop("kappas", [1])
        methods = group.pop("methods", [None])
        floor_bound = group.get("max_floor", bounds["floor_bound"])
        for method, (i, shape), kappa in itertools.product(methods, enumerate(shapes), kappas):
            size = "x".join(map(short, shape)) if len(shape) > 1 else f"T={shape[0]}"
            condition = f" kappa={short(kappa)}" if kappa > 1 else ""
            name = " ".join(filter(None, (kind.replace("_", " "), method, size))) + condition
            arguments = shape if method is None else [method, *shape]
            limits = {key: limit[i] if isinstance(limit, list) else limit for key, limit in group.items()}
            yield Case(name, kind, arguments, kappa, floor_bound, **limits)


def short(n: float) -> str:
    """1000000 -> 1e6, 2048 -> 2048."""
    mantissa, _, exponent = f"{n:.15e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if len(mantissa) == 1 and n >= 1000 else f"{n:g}"


def lines(case: Case, trial: Trial, timing: measure.Timing) -> Iterator[Line]:
    """The demands of a case against one attempt's times."""
    seconds = timing.seconds
    fast, base, read = seconds["fast"], seconds["base"], seconds["read"]

    def line(measure: str, reached: float, target: float, sense: str, roof: float, limited: bool) -> Line:
        met = reached >= target if sense == ">=" else reached <= target
        if met and timing.steady:
            verdict = "ok"
        elif not timing.steady or timing.others > BUSY:  # a read slowed down by others is no roof
            verdict = "NOISY"
        else:
            verdict = "ROOF" if limited else "MISSED"
        return Line(case.name, measure, reached, target, sense, None if math.isnan(roof) else roof, verdict)

    roof_time = math.nan  # compares as never reached
    if case.reads is not None:
        compute = trial.multiply_adds / measure.GEMM**3 * seconds["gemm"]
        roof_time = max(read, compute) + (case.reads - 1) * read
    if case.min_speedup is not None:
        limited = fast <= case.floor_bound * roof_time
        yield line("speed-up", base / fast, case.min_speedup, ">=", base / roof_time, limited)
    if case.max_slowdown is not None:
        limited = fast <= base + case.floor_bound * roof_time
        yield line("slow-down", fast / base, case.max_slowdown, "<=", (base + roof_time) / base, limited)
    if case.max_floor is not None:
        yield line("x 2 reads", fast / (2 * read), case.max_floor, "<=", math.nan, False)


def run(case: Case, rounds: int, accept: Sequence[str]) -> tuple[list[Line], dict[str, Any]]:
    """The case's lines and the data behind them: the first attempt with only `accept` verdicts, or the best one."""
    if case.max_extra_mb is not None:
        extra = MEMORY[case.kind](*case.arguments)
        verdict = "ok" if extra <= case.max_extra_mb * 1e6 else "MISSED"
        return [Line(case.name, "extra MB", extra / 1e6, case.max_extra_mb, "<=", None, verdict)], {
            "extra_bytes": extra
        }

    try:
        trial = TRIALS[case.kind](*case.arguments, kappa=case.kappa)
    except ImportError:  # TorchJD, or the solver that a method of it needs
        return [Line(case.name, "speed-up", 0.0, case.min_speedup or 0.0, ">=", None, "ABSENT")], {}
    data: dict[str, Any] = {"error": trial.error, "tolerance": trial.tolerance}
    if not trial.error <= trial.tolerance:
        return [Line(case.name, "error", trial.error, trial.tolerance, "<=", None, "WRONG")], data
    functions = {"base": trial.base, "fast": trial.fast, "read": trial.read}
    if case.reads is not None:
        functions["gemm"] = measure.gemm(trial.products)
    best: tuple[list[Line], dict[str, Any]] | None = None
    fewest = 0
    for attempt in range(1, ATTEMPTS + 1):
        timing = measure.interleave(functions, math.ceil(trial.rounds * rounds)).per_call(trial.calls)
        result_lines = list(lines(case, trial, timing))
        bad = sum(line.verdict not in accept for line in result_lines)
        if best is None or bad < fewest:
            fewest = bad
            best = result_lines, data | {"attempt": attempt, **timing._asdict()}
        if not bad:
            break
    assert best is not None
    return best


def show(line: Line, data: dict[str, Any]) -> str:
    """A row of the printed table."""
    roof = "" if line.roof is None else f"{line.roof:.2f}"
    fast = f"{data['seconds']['fast'] * 1e3:.3f}" if "seconds" in data else ""
    reached = f"{line.reached:.1e}" if line.verdict == "WRONG" else f"{line.reached:.2f}"
    target = f"{line.sense} {line.target:g}"
    return f"{line.name:{NAME}} {line.measure:10} {reached:>8} {target:>8} {roof:>7} {fast:>10}  {line.verdict}"


def main() -> None:
    """Runs the cases, prints a row per demand, and exits 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per attempt (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--accept-roof", action="store_true", help="do not fail on what this machine's roof forbids")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write results, hardware and commit there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = [case for case in cases() if args.only in case.name]
    if not chosen:
        parser.error(f"--only {args.only!r}: no such case")

    machine = measure.machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if "_C" not in machine["extensions"]:
        print("The CPU kernels are not built: these are the times of the reference ops.")
    print(
        f"{'case':{NAME}} {'measure':10} {'reached':>8} {'target':>8} {'roof':>7} {'fast ms':>10}  verdict", flush=True
    )
    accept = ("ok", "ROOF") if args.accept_roof else ("ok",)
    verdicts: Counter[str] = Counter()
    records = []
    for case in chosen:
        result, data = run(case, args.rounds, accept)
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
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        options = {"only": args.only, "rounds": args.rounds, "accept_roof": args.accept_roof}
        content = {"machine": machine, "options": options, "verdicts": dict(verdicts), "cases": records}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    raise SystemExit(any(verdict not in accept for verdict in verdicts))


if __name__ == "__main__":
    main()

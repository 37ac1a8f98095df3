#!/usr/bin/env python3
"""Measures the engines of `backward(engine=)`: time of a step, memory, and what "auto" chooses.

    python benchmarks/engines.py steps  [--only SUBSTRING] [--seconds 60] [--threads 2] [--json PATH]
    python benchmarks/engines.py memory [--only SUBSTRING]                [--threads 2] [--json PATH]
    python benchmarks/engines.py grid   [--only SUBSTRING] [--seconds 5]  [--threads 2] [--json PATH]

`steps`: times of training steps (`zero_grad`, forward, backward; no optimizer) as ratios of interleaved medians, beside
the step of the summed losses, the upper bound and TorchJD. `memory`: what a backward allocates at its peak, as a share
of the T x P task gradients. `grid`: how often "auto" takes an engine that is at most a tenth slower than the other.
`--seconds` is what the timing of a case may take.

Every gradient is compared with autograd's T gradients, aggregated in float64, before it is timed. The exit status is 1
where a target is missed. Other processes should be idle: the last line says so where they were not.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import measure
import networks
import peers
import torch
import workloads
from check import BUSY, HEAD, Line, show
from torch import Tensor

import fastmtl
from fastmtl.gramian import cost
from fastmtl.gramian.plan import plan
from fastmtl.gramian.survey import survey
from fastmtl.graph import leaves_of
from fastmtl.scaling.timing import Timing, interleave, others_busy

__all__ = [
    "GRID",
    "MEMORY",
    "STEPS",
    "WAYS",
    "Way",
    "allocated",
    "grid",
    "main",
    "memory",
    "picked",
    "planned",
    "steps",
]

Model = Callable[[], workloads.MultiTask]

ROUNDS = 3, 300  # of interleaved timing: at least, at most
SHARE = 0.3  # of the time, for TorchJD: it is slow
WITHIN = 1.1  # "auto" is right up to this factor
TOLERANCE = 1e-4  # relative error of our gradients in float32
THEIR_TOLERANCE = 1e-3  # of TorchJD's, which rounds the Gram matrix to float32


class Way(NamedTuple):
    """One way to make a training step.

    Attributes:
        model: whose forward it runs.
        backward: from the representation [batch, width] and T losses to `.grad`.
        gradient: which gradient of the encoder it makes, a key of `expected_of`.
    """

    model: workloads.MultiTask
    backward: Callable[[Tensor, list[Tensor]], Any]
    gradient: str = "aligned"

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """The representation and the losses, after every `.grad` was dropped."""
        self.model.zero_grad()
        h = self.model.forward()
        return h, self.model.losses([h] * self.model.tasks)

    def step(self) -> Any:
        """A training step without its optimizer."""
        return self.backward(*self.forward())

    def error(self, expected: Mapping[str, Tensor]) -> float:
        """Relative error of the encoder's gradient after a step."""
        self.step()
        return workloads.error(self.model.shared_grad(), expected[self.gradient])


def expected_of(model: workloads.MultiTask) -> dict[str, Tensor]:
    """The encoder's gradient as a vector: of the sum of the losses, of Aligned-MTL and of Aligned-MTL-UB."""
    model.step()
    return {"sum": model.shared_grad().double(), "aligned": model.exact(), "UB": model.exact_upper_bound()}


def plain(model: workloads.MultiTask) -> Way:
    """One backward of the summed losses: no aggregation."""
    return Way(model, lambda h, losses: sum(losses[1:], losses[0]).backward(), "sum")


def engine(name: Literal["full", "gramian", "auto"], model: workloads.MultiTask) -> Way:
    """Aligned-MTL by this engine."""
    method = fastmtl.AlignedMTL()
    return Way(model, lambda h, losses: method.backward(losses, model.encoder, engine=name))


def upper_bound(model: workloads.MultiTask) -> Way:
    """Aligned-MTL-UB: the gradients of the representation are aggregated."""
    method = fastmtl.AlignedMTL()
    return Way(model, lambda h, losses: method.backward(losses, representation=h), "UB")


def mtl_backward(model: workloads.MultiTask) -> Way:
    """TorchJD's Jacobian of the encoder, in one vectorised pass."""
    autojac, aggregator = importlib.import_module("torchjd.autojac"), peers.torchjd().AlignedMTL()

    def backward(h: Tensor, losses: list[Tensor]) -> None:
        autojac.mtl_backward(losses, features=h)
        autojac.jac_to_grad(model.shared, aggregator)

    return Way(model, backward)


def autogram(model: workloads.MultiTask) -> Way:
    """TorchJD's Gram matrix of the encoder's Jacobian, and one backward of the weighted losses.

    It hooks modules, and gets its own, with the same parameters: the other ways have to go without.
    """
    twin = copy.deepcopy(model, {id(p): p for p in model.model.parameters()})
    their = importlib.import_module("torchjd.autogram").Engine(twin.encoder, batch_dim=None)
    weighting = peers.torchjd().AlignedMTLWeighting()

    def backward(h: Tensor, losses: list[Tensor]) -> None:
        stacked = torch.stack(losses)
        stacked.backward(weighting(their.compute_gramian(stacked)))

    return Way(twin, backward)


OURS: dict[str, Callable[[workloads.MultiTask], Way]] = {
    "plain": plain,
    "full": partial(engine, "full"),
    "gramian": partial(engine, "gramian"),
    "auto": partial(engine, "auto"),
    "UB": upper_bound,
}
THEIRS: dict[str, Callable[[workloads.MultiTask], Way]] = {
    "TorchJD mtl_backward": mtl_backward,
    "TorchJD autogram": autogram,
}
WAYS = OURS | THEIRS

STEPS: dict[str, Model] = {
    "mlp T=10": lambda: workloads.mlp(10),
    "mlp T=40": lambda: workloads.mlp(40),
    "resnet18 T=10": lambda: workloads.resnet18(10),
    "transformer 256 T=10": lambda: networks.transformer(10),
    "transformer 512 T=10": lambda: networks.transformer(10, width=512, layers=2, batch=8, length=32),
}
# case -> which way may take at most how many times as long as which other
TARGETS = {
    "mlp T=10": ("gramian", "plain", 2.2),
    "mlp T=40": ("gramian", "plain", 3.0),
    "resnet18 T=10": ("gramian", "full", 1.0),
    "transformer 256 T=10": ("gramian", "full", 1.0),
    "transformer 512 T=10": ("gramian", "full", 1.0),
}
MEMORY: dict[str, Model] = {"resnet18 T=10": STEPS["resnet18 T=10"]}
MEMORY_TARGET = 0.25  # of the T x P task gradients
GRID_TARGET = 0.9  # of the cases


def _grid() -> Iterator[tuple[str, Model]]:
    for width, depth, batch, counts in (
        (64, 2, 16, (2, 10, 40)),
        (128, 8, 32, (10,)),
        (256, 3, 64, (2, 10, 40)),
        (256, 3, 1024, (4, 20)),
        (512, 4, 8, (2, 10, 40)),
        (512, 4, 128, (2, 10, 40)),
        (1024, 2, 32, (3, 20)),
        (1024, 2, 512, (3, 10)),
        (2048, 1, 64, (4, 20)),
    ):
        for T in counts:
            yield f"mlp {width}x{depth} B={batch} T={T}", partial(workloads.mlp, T, batch, (128,) + (width,) * depth)
    for channels, batch, size, counts in (
        ((16, 32, 64), 8, 16, (2, 10, 40)),
        ((16, 32, 64), 16, 64, (2, 10)),
        ((64, 128, 256), 8, 32, (2, 10)),
        ((128, 256, 512, 512), 4, 16, (10,)),
    ):
        for T in counts:
            name = f"conv {'-'.join(map(str, channels))} {size}px B={batch} T={T}"
            yield name, partial(networks.convolutions, T, channels, batch, size)
    for T, batch, size in ((2, 4, 32), (5, 2, 64), (10, 8, 32)):
        yield f"resnet18 {size}px B={batch} T={T}", partial(workloads.resnet18, T, batch, size)
    for width, layers, batch, length, counts in (
        (64, 2, 8, 16, (2, 10, 40)),
        (128, 2, 4, 64, (3, 10)),
        (256, 2, 8, 32, (2, 10)),
        (256, 1, 2, 128, (5,)),
    ):
        for T in counts:
            name = f"transformer {width}x{layers} L={length} B={batch} T={T}"
            yield name, partial(networks.transformer, T, width, layers, batch, length)
    for vocabulary, width, batch, length, counts in ((1000, 64, 32, 16, (2, 10, 40)), (20000, 128, 16, 32, (2, 10))):
        for T in counts:
            name = f"text {vocabulary}x{width} L={length} B={batch} T={T}"
            yield name, partial(networks.text, T, vocabulary, width, batch, length)
    for width, batch, T in ((64, 8, 4), (256, 16, 10)):
        yield f"lstm {width} L=16 B={batch} T={T}", partial(networks.recurrent, T, width, batch, 16)


GRID: dict[str, Model] = dict(_grid())


def picked(info: Any) -> str:
    """The engine that a backward ran with."""
    return "full" if info.explicit is None else "gramian"


def steps(name: str, make: Model, seconds: float) -> dict[str, Any]:
    """Times of a step in every way.

    Returns:
        The record of the case. `ratios`: to the plain step; `errors`: of the gradients. What is not installed or fails
        is missing, and `absent` says why.

    Raises:
        ArithmeticError: a gradient is wrong: nothing was timed.
    """
    model = make()
    expected = expected_of(model)
    ours = {way: build(model) for way, build in OURS.items()}
    errors = {way: _checked(f"{name}, {way}", ours[way], expected, TOLERANCE) for way in ours}
    theirs, absent = {}, {}
    for way, build in THEIRS.items():
        try:  # not installed, or a model that it does not take
            theirs[way] = build(model)
            errors[way] = _checked(f"{name}, {way}", theirs[way], expected, THEIR_TOLERANCE)
        except Exception as error:
            theirs.pop(way, None)
            absent[way] = f"{type(error).__name__}: {error}"
    timings = [_timed({way: ours[way].step for way in ours}, expected["sum"], (1 - SHARE) * seconds)]
    if theirs:  # apart, since a round of them takes longer than one of ours
        functions = {"plain": ours["plain"].step, **{way: theirs[way].step for way in theirs}}
        timings.append(_timed(functions, expected["sum"], SHARE * seconds))
    rows = [(way, t) for t, group in zip(timings, (ours, theirs), strict=False) for way in group]
    return {
        **_described(name, model),
        "ratios": {way: t.seconds[way] / t.seconds["plain"] for way, t in rows},
        "seconds": {way: t.seconds[way] for way, t in rows},
        "errors": errors,
        "absent": absent,
        "auto": picked(ours["auto"].step()),
        "explicit": ours["gramian"].step().explicit,
        "rounds": [t.rounds for t in timings],
        "kept": [t.kept for t in timings],
        "others": max(t.others for t in timings),
    }


def memory(name: str, make: Model) -> dict[str, Any]:
    """What a backward allocates at its peak, in bytes, and as a share of the T x P task gradients."""
    model = make()
    with others_busy() as others:
        peaks = {way: allocated(build(model)) for way, build in OURS.items()}
    record = _described(name, model)
    gradients = 4 * record["tasks"] * record["parameters"]
    shares = {way: peak / gradients for way, peak in peaks.items()}
    return {**record, "gradients": gradients, "peaks": peaks, "shares": shares, "others": others()}


def allocated(way: Way) -> int:
    """Peak bytes of the blocks that a backward takes from torch's allocator and holds at once, `.grad` included.

    See `measure.held`. Activations that the backward frees are not subtracted.
    """
    way.step()  # what is allocated once is there
    h, losses = way.forward()
    return measure.held(lambda: way.backward(h, losses)).peak


def grid(name: str, make: Model, seconds: float) -> dict[str, Any]:
    """Times of a step by both engines, and which one "auto" takes.

    Returns:
        The record of the case. `seconds`: of "forward" (all of a step that is not its backward), of the "plain" step,
        and of both engines; `excess`: the time of the step by the engine that "auto" takes over that of the faster one;
        `excess_backward`: the same without the forward; `plan`: what `planned` returns.

    Raises:
        ArithmeticError: a gradient is wrong: nothing was timed.
    """
    model = make()
    expected = expected_of(model)
    ways = {way: OURS[way](model) for way in ("plain", "full", "gramian")}
    errors = {way: _checked(f"{name}, {way}", ways[way], expected, TOLERANCE) for way in ways}
    choice = picked(OURS["auto"](model).step())
    functions = {"forward": ways["plain"].forward, **{way: ways[way].step for way in ways}}
    timing = _timed(functions, expected["sum"], seconds)
    taken = {way: timing.seconds[way] for way in functions}
    backward = {way: taken[way] - taken["forward"] for way in ways}
    return {
        **_described(name, model),
        "seconds": taken,
        "errors": errors,
        "auto": choice,
        "excess": taken[choice] / min(taken["full"], taken["gramian"]),
        "excess_backward": backward[choice] / min(backward["full"], backward["gramian"]),
        "explicit": ways["gramian"].step().explicit,
        "plan": planned(model),
        "rounds": timing.rounds,
        "kept": timing.kept,
        "others": timing.others,
    }


def planned(model: workloads.MultiTask) -> dict[str, Any]:
    """What the cost model knows of a step, and the rows of its coefficients for both engines."""
    losses = model.losses([model.forward()] * model.tasks)
    owner = leaves_of(losses, []).owner
    work = plan([(p, "") for p in model.shared], survey(losses, owner), owner, model.tasks).work
    return {"work": dataclasses.asdict(work), "features": cost.features(work, model.tasks)}


def _described(name: str, model: workloads.MultiTask) -> dict[str, Any]:
    parameters = sum(p.numel() for p in model.shared)
    return {"case": name, "tasks": model.tasks, "parameters": parameters, "input": list(model.x.shape)}


def _checked(what: str, way: Way, expected: Mapping[str, Tensor], tolerance: float) -> float:
    error = way.error(expected)
    if not error <= tolerance:
        raise ArithmeticError(f"{what}: relative error {error:.2g}, expected at most {tolerance:.2g}")
    return error


def _timed(functions: Mapping[str, Callable[[], object]], read: Tensor, seconds: float) -> Timing:
    """As many interleaved rounds as fit."""
    start = time.perf_counter()
    for function in functions.values():
        function()
    fitting = round(seconds / (time.perf_counter() - start))
    return interleave({**functions, "read": read.sum}, min(max(fitting, ROUNDS[0]), ROUNDS[1]))


def _show_steps(record: Mapping[str, Any]) -> list[Line]:
    name, seconds, ratios = record["case"], record["seconds"], record["ratios"]
    print(f"\n{name}: {record['parameters'] / 1e6:.2f} million parameters, rounds {record['rounds']}")
    print(f"{'way':24} {'x plain':>8} {'x full':>8} {'ms':>9} {'error':>9}")
    for way, ratio in ratios.items():
        note = f"  took {record['auto']}" if way == "auto" else ""
        print(
            f"{way:24} {ratio:8.2f} {ratio / ratios['full']:8.2f} {1e3 * seconds[way]:9.2f} "
            f"{record['errors'][way]:9.1e}{note}"
        )
    for way, why in record["absent"].items():
        print(f"{way:24} absent: {why.splitlines()[0][:160]}")
    if record["explicit"]:
        print(f"T explicit gradients of {', '.join(record['explicit'])}")
    if name not in TARGETS:
        return []
    way, base, target = TARGETS[name]
    return [_line(name, f"{way}/{base}", ratios[way] / ratios[base], target)]


def _show_memory(record: Mapping[str, Any]) -> list[Line]:
    name, shares = record["case"], record["shares"]
    print(f"\n{name}: {record['gradients'] / 1e6:.1f} MB of task gradients")
    print(f"{'way':24} {'peak MB':>9} {'share':>8}")
    for way, share in shares.items():
        print(f"{way:24} {record['peaks'][way] / 1e6:9.1f} {share:8.3f}")
    return [_line(name, "memory", shares["gramian"], MEMORY_TARGET)]


def _show_grid(record: Mapping[str, Any]) -> None:
    taken = record["seconds"]
    print(
        f"{record['case']:44} {taken['full'] / taken['plain']:8.2f} {taken['gramian'] / taken['plain']:8.2f} "
        f"{taken['gramian'] / taken['full']:8.2f}  {record['auto']:8} {record['excess']:7.2f}",
        flush=True,
    )


def _line(name: str, what: str, reached: float, target: float, sense: str = "<=") -> Line:
    return Line(name, what, reached, target, sense, None, "ok" if Line.met(reached, target, sense) else "MISSED")


def _right(records: Sequence[Mapping[str, Any]]) -> list[Line]:
    """In what share of the grid "auto" is right: by whole steps, which is the target, and by backwards alone."""
    right = [sum(record[key] <= WITHIN for record in records) / len(records) for key in ("excess", "excess_backward")]
    print(f"within {WITHIN - 1:.0%} of the faster engine: {right[0]:.0%} of steps, {right[1]:.0%} of backwards alone")
    return [_line(f"grid of {len(records)}", "share", right[0], GRID_TARGET, ">=")]


GRID_HEAD = f"{'case':44} {'full':>8} {'gramian':>8} {'ratio':>8}  {'auto':8} {'excess':>7}   (full, gramian: x plain)"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what was measured, and exits with status 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "memory", "grid"))
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name contains it")
    parser.add_argument("--seconds", type=float, help="timing of a case, about (default 60 for steps, 5 for grid)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write results, hardware and commit there")
    args = parser.parse_args(argv)
    table: dict[str, Model] = {"steps": STEPS, "memory": MEMORY, "grid": GRID}[args.what]
    chosen = {name: make for name, make in table.items() if args.only in name}
    if not chosen:
        parser.error(f"--only {args.only!r}: no such case")
    torch.set_num_threads(args.threads)
    measure.keep_memory()
    machine = measure.machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)

    records, lines = [], []
    if args.what == "grid":
        print(GRID_HEAD)
    for name, make in chosen.items():
        if args.what == "memory":
            record = memory(name, make)
            lines += _show_memory(record)
        elif args.what == "steps":
            record = steps(name, make, args.seconds or 60.0)
            lines += _show_steps(record)
        else:
            record = grid(name, make, args.seconds or 5.0)
            _show_grid(record)
        records.append(record)
    if args.what == "grid":
        lines += _right(records)

    print(f"\n{HEAD}")
    for line in lines:
        print(show(line, {}))
    if (busy := max(record["others"] for record in records)) > BUSY:
        print(f"Other processes kept up to {busy:.1f} processors busy meanwhile: do not trust these numbers.")
    if args.json is not None:
        content = {"machine": machine, "lines": [dataclasses.asdict(line) for line in lines], "cases": records}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(any(line.verdict == "MISSED" for line in lines))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""On a GPU: training steps by every engine beside the plain step and TorchJD's, times and memory (part of make gpu).

    python benchmarks/cuda_steps.py [--only SUBSTRING] [--seconds 3] [--json PATH [--missing]]

A step is `zero_grad`, forward and backward, without optimizer. Its gradient is compared with autograd's T gradients,
aggregated in float64, before it is timed: by events, all ways in turn, medians. The cases go into the file at PATH one
by one, beside what is there of others: a run that is cut off leaves what it has. Exit status 1 where a gradient of ours
is wrong. With FASTMTL_REHEARSAL=1 all of it runs on the CPU, at tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import engines
import measure
import networks
import torch
import workloads
from engines import Way

import fastmtl
from fastmtl.scaling.timing import interleave

__all__ = ["CASES", "EVERY", "WAYS", "case", "main"]

TASKS: tuple[int, ...] = (10, 3, 40)  # the most usual one first
ROUNDS = 100
EVERY = 8  # steps of a cycle of which one computes weights
# Of gradients of ours, and of theirs: other orders of summation on a GPU, at the condition numbers of these models.
TOLERANCE = 1e-2
MODELS: dict[str, Callable[[int], workloads.MultiTask]] = {
    "mlp": partial(workloads.mlp, batch=256, widths=(512, 2048, 2048, 2048, 2048)),
    "resnet18": partial(workloads.resnet18, batch=32),
    "resnet50": networks.resnet50,
    "transformer": partial(networks.transformer, width=512, layers=6, batch=32, length=128),
}
if measure.REHEARSAL:
    TASKS, ROUNDS, EVERY = (3,), 3, 2
    MODELS = {
        "mlp": partial(workloads.mlp, batch=4, widths=(8, 16)),
        "resnet18": partial(workloads.resnet18, batch=4, size=16, width=4),
        "resnet50": partial(networks.resnet50, batch=4, size=16, width=4, stages=(1, 1)),
        "transformer": partial(networks.transformer, width=16, layers=1, batch=4, length=4),
    }
CASES: dict[str, Callable[[], workloads.MultiTask]] = {
    f"{name} T={T}": partial(make, T) for name, make in MODELS.items() for T in TASKS
}


class FanOut(Way):
    """Aligned-MTL-UB in one ordinary backward."""

    def step(self) -> None:
        """One backward of the summed losses."""
        self.model.step(lambda h: fastmtl.fan_out(h, self.model.tasks, self.backward))  # type: ignore[arg-type]


def upper_bound(model: workloads.MultiTask) -> Way:
    """`fan_out`; the method takes the place of a backward."""
    return FanOut(model, fastmtl.AlignedMTL(), "UB")


def amortised(model: workloads.MultiTask) -> Way:
    """The exact method with task weights in every `EVERY`-th step; a cycle of as many is timed."""
    method = fastmtl.AlignedMTL()
    return Way(model, lambda h, losses: method.backward(losses, model.encoder, every=EVERY, engine="auto"))


WAYS: dict[str, Callable[[workloads.MultiTask], Way]] = {
    "plain": engines.OURS["plain"],
    "UB": upper_bound,
    "full": engines.OURS["full"],
    "gramian": engines.OURS["gramian"],
    f"amortised, every={EVERY}": amortised,
    **engines.THEIRS,
}


def case(name: str, make: Callable[[], workloads.MultiTask], seconds: float) -> dict[str, Any]:
    """A model in every way.

    Returns:
        `seconds` of a step and `ratios` to the plain one, `peaks` (bytes that a step holds at once above what was
        there), `errors` of the gradients; `absent`: why a way is missing: TorchJD is not installed, or no memory left.

    Raises:
        ArithmeticError: a gradient of ours is wrong: nothing was timed.
    """
    with torch.device(measure.DEVICE):
        model = make()
        exactly(True)
        expected = engines.expected_of(model)
    ways: dict[str, Way] = {}
    errors: dict[str, float] = {}
    absent: dict[str, str] = {}
    for way, build in WAYS.items():
        try:
            made = build(model)
            errors[way] = made.error(expected)
        except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            if way not in engines.THEIRS and not isinstance(error, torch.OutOfMemoryError):
                raise
            absent[way] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        if errors[way] <= TOLERANCE:
            ways[way] = made
        elif way in engines.THEIRS:
            absent[way] = f"relative error {errors[way]:.2g}"
        else:
            raise ArithmeticError(f"{name}, {way}: relative error {errors[way]:.2g}, expected at most {TOLERANCE:g}")
    exactly(False)
    functions = {way: calls(way, made) for way, made in ways.items()}
    peaks = {way: measure.peak(made.step) for way, made in ways.items()}
    timing = interleave({**functions, "read": expected["sum"].sum}, ROUNDS, measure.sample(), seconds=seconds)
    taken = {way: timing.seconds[way] / (EVERY if "every" in way else 1) for way in ways}
    return {
        "case": name,
        "tasks": model.tasks,
        "parameters": sum(p.numel() for p in model.shared),
        "input": list(model.x.shape),
        "seconds": taken,
        "ratios": {way: s / taken["plain"] for way, s in taken.items()},
        "peaks": peaks,
        "errors": errors,
        "absent": absent,
        "explicit": len(ways["gramian"].step().explicit or ()) if "gramian" in ways else None,
        "rounds": timing.rounds,
        "kept": timing.kept,
    }


def calls(way: str, made: Way) -> Callable[[], object]:
    """A step, or a cycle of them."""

    def cycle() -> None:
        for _ in range(EVERY):
            made.step()

    return cycle if "every" in way else made.step


def exactly(yes: bool) -> None:
    """Float32 in full for the comparison of gradients; torch's defaults, with TF32 in convolutions, for the clock."""
    torch.backends.cudnn.allow_tf32 = not yes


def show(record: Mapping[str, Any]) -> None:
    """A case, for the terminal."""
    print(f"\n{record['case']}: {record['parameters'] / 1e6:.2f} million parameters, {record['rounds']} rounds")
    print(f"{'way':24} {'x plain':>8} {'ms':>9} {'peak MB':>9} {'error':>9}")
    for way, ratio in record["ratios"].items():
        print(
            f"{way:24} {ratio:8.2f} {1e3 * record['seconds'][way]:9.2f} {record['peaks'][way] / 1e6:9.1f} "
            f"{record['errors'][way]:9.1e}"
        )
    for way, why in record["absent"].items():
        print(f"{way:24} absent: {why}")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name contains it")
    parser.add_argument("--seconds", type=float, default=0.1 if measure.REHEARSAL else 3.0, help="of a case, about")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write results, hardware and commit there")
    parser.add_argument("--missing", action="store_true", help="only cases that the file does not have")
    options = parser.parse_args(arguments)
    chosen = {name: make for name, make in CASES.items() if options.only in name}
    if not chosen:
        parser.error(f"--only {options.only!r}: no such case")
    if not (measure.REHEARSAL or torch.cuda.is_available()):
        parser.error("needs an NVIDIA GPU; FASTMTL_REHEARSAL=1 runs it without one")
    machine, said = measure.machine(measure.DEVICE), []
    for name, make in chosen.items():
        there = options.json is not None and options.json.exists()
        kept = json.loads(options.json.read_text(encoding="utf-8"))["cases"] if there else []
        if options.missing and any(of["case"] == name for of in kept):
            continue
        record = case(name, make, options.seconds)
        show(record)
        if options.json is not None:
            cases = [*(of for of in kept if of["case"] != name), record]
            options.json.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"machine": machine, "cases": cases}, indent=1)
            options.json.write_text(content + "\n", encoding="utf-8")
        said.append(f"{name}: {', '.join(f'{way} {ratio:.2f}' for way, ratio in record['ratios'].items())}")
    print(f"\n{'; '.join(said)} x plain")
    return 0


if __name__ == "__main__":
    sys.exit(main())

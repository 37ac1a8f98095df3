#!/usr/bin/env python3
"""Where the time of `m.backward` goes beside the bare loop of T `autograd.grad` calls, on one thread of a CPU.

And that of a step with weights of an earlier one (`every=`) beside a step of the summed losses, with memory kept.

    python benchmarks/backward_parts.py [--tasks 10] [--rounds 16]

Times are those of the processor, which stand still while others have it, medians of interleaved rounds; faults are the
pages that the kernel had to bring in a call. All of it twice: on the heap as glibc keeps it, which gives back what is
free at its end and fetches it again page by page in the next step, and with memory kept (`measure.keep_memory`), as
MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ do for a program that is started with them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import measure
import pure
import torch
import workloads

import fastmtl
from fastmtl.graph import leaves_of
from fastmtl.training.commit import commit


def parts(tasks: int) -> dict[str, Callable[[], object]]:
    """The loop, the step, and the step's parts."""
    problem, method = workloads.mlp(tasks), fastmtl.AlignedMTL()
    losses = problem.losses([problem.forward()] * tasks)
    shared = list(problem.shared)
    kept = [row[: len(shared)] for row in pure.autograd_loop(losses, problem.shared, problem.heads)]

    def rows() -> list[list[torch.Tensor]]:
        return [list(torch.autograd.grad(loss, shared, retain_graph=True)) for loss in losses]

    def step() -> None:
        problem.zero_grad()
        method.backward(losses, shared=problem.shared, retain_graph=True)

    return {
        "loop of autograd.grad": lambda: pure.autograd_loop(losses, problem.shared, problem.heads),
        "m.backward": step,
        "m(rows) of a loop": lambda: method(rows()),
        "m(rows) alone": lambda: method(kept),
        "two reads of the rows": lambda: [g.sum() for _ in range(2) for row in kept for g in row],
    }


def between(tasks: int) -> dict[str, Callable[[], object]]:
    """A plain step, one in between, and parts of that."""
    problem, method = workloads.mlp(tasks), fastmtl.AlignedMTL()
    losses = problem.losses([problem.forward()] * tasks)
    parameters = list(problem.model.parameters())

    def step() -> None:
        problem.zero_grad()
        h = problem.forward()
        method.backward(problem.losses([h] * tasks), shared=problem.shared, every=10**9)

    def committed() -> None:
        problem.zero_grad()
        commit([(p, torch.empty_like(p)) for p in parameters])

    step()
    return {
        "plain step": problem.step,
        "step in between": step,
        "its walk over the graph": lambda: leaves_of(losses, []),
        "its commit, on its own": committed,
    }


def table(functions: dict[str, Callable[[], object]], rounds: int) -> None:
    """One line a part: milliseconds, times the first, faults a call."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    faults: dict[str, list[int]] = {name: [] for name in functions}
    for i in range(rounds + 2):
        for name, function in functions.items():
            before, start = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt, time.thread_time()
            function()
            elapsed, after = time.thread_time() - start, resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            if i >= 2:
                seconds[name].append(elapsed)
                faults[name].append(after - before)
    loop = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median * 1e3:.2f} | {median / loop:.2f} | {statistics.median(faults[name]):.0f} |")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    functions = parts(args.tasks)
    for memory in ("as glibc has it", "kept"):
        if memory == "kept":
            measure.keep_memory()
        print(f"\n| memory {memory} | ms | × loop | page faults |\n|---|---|---|---|")
        table(functions, args.rounds)
    print("\n| between solutions | ms | × plain step | page faults |\n|---|---|---|---|")
    table(between(args.tasks), 10 * args.rounds)


if __name__ == "__main__":
    main()

"""How long calls take: interleaved medians, on a machine that is busy with other things too."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = [
    "LEAST",
    "LONG",
    "SHORTEST",
    "STEADY",
    "Function",
    "Sample",
    "Timing",
    "by_clock",
    "interleave",
    "on_cuda",
    "others_busy",
]

SHORTEST = 1e-4  # seconds that a sample takes at least
LONG = 1.0  # seconds: one call this long is enough warm-up
STEADY = 1.5  # a round counts if the reads around it are within this factor of the usual one
LEAST = 3  # rounds, however little time there is

Function = Callable[[], object]
Sample = Callable[[Function, int], float]  # seconds per call, over that many calls


class Timing(NamedTuple):
    """Medians over the rounds that counted.

    Attributes:
        seconds: time of one call, by name.
        kept: rounds that counted.
        rounds: rounds that were run.
        others: processors that other processes kept busy meanwhile (Linux; elsewhere 0).
    """

    seconds: dict[str, float]
    kept: int
    rounds: int
    others: float

    @property
    def steady(self) -> bool:
        """Whether at least half of the rounds counted."""
        return 2 * self.kept >= self.rounds

    def per_call(self, calls: int) -> Timing:
        """The same timing if every function made `calls` calls."""
        return self._replace(seconds={name: s / calls for name, s in self.seconds.items()})


def by_clock(clock: Callable[[], float] = time.perf_counter) -> Sample:
    """Samples by a clock of the host, a function that returns seconds."""

    def sample(function: Function, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    return sample


def on_cuda(function: Function, calls: int) -> float:
    """A sample by the device's clock, starting from an idle device, so that launch overhead is included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def interleave(
    functions: Mapping[str, Function],
    rounds: int,
    sample: Sample | None = None,
    shortest: float = SHORTEST,
    seconds: float = math.inf,
) -> Timing:
    """Times all functions in turn, `rounds` times over, and takes the median of each.

    Ratios of such medians hold on a noisy machine: whatever slows a round down slows all of its functions. Anything
    that hits only some of them shows in `functions["read"]`, which must be a plain read of the input: a round is
    discarded if this read, timed within the round and within the one before, is off the usual one by more than a factor
    of `STEADY`. The usual one is the lower quartile of all reads, not their median: disturbances make reads slower, and
    if most are disturbed, the median would be too, and the good rounds would be discarded.

    Args:
        functions: what to time, by name.
        rounds: how many rounds, at least 1.
        sample: how to time; default: by the wall clock.
        shortest: a function that takes less is called repeatedly within one sample, for at least this long.
        seconds: how long all rounds together may take: if necessary there are fewer rounds, but at least `LEAST`.
    """
    sample = by_clock() if sample is None else sample
    calls, total = {}, 0.0
    for name, function in functions.items():
        times: list[float] = []
        while len(times) < 3 and sum(times) < LONG:
            times.append(sample(function, 1))
        # Not the fastest: if the host gives the processor to others, a clock may even lag behind for a moment.
        usual = statistics.median(times)
        calls[name] = max(1, round(shortest / max(usual, 1e-6)))
        total += usual * calls[name]
    if seconds < rounds * total:
        rounds = max(min(rounds, LEAST), int(seconds / total))
    with others_busy() as others:
        first = sample(functions["read"], calls["read"])
        samples = [{name: sample(function, calls[name]) for name, function in functions.items()} for _ in range(rounds)]
    reads = [first, *(s["read"] for s in samples)]
    usual = statistics.quantiles(reads, n=4, method="inclusive")[0]
    steady = [usual / STEADY <= read <= usual * STEADY for read in reads]
    kept = [s for s, before, within in zip(samples, steady, steady[1:], strict=False) if before and within]
    medians = {name: statistics.median(s[name] for s in kept or samples) for name in functions}
    return Timing(medians, len(kept), rounds, others())


@contextmanager
def others_busy() -> Iterator[Callable[[], float]]:
    """Gives a function that says how many processors other processes kept busy within (Linux; elsewhere 0)."""
    start, used = time.perf_counter(), _used_by_others()
    busy = 0.0
    yield lambda: busy
    busy = max(0.0, _used_by_others() - used) / (time.perf_counter() - start)


def _used_by_others() -> float:
    """Processor seconds that processes other than this one and its children, or other guests of the same host, used."""
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0].split()[1:9]]
    except OSError:
        return 0.0
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])

"""How things are measured: interleaved medians, peak memory of a call, and the machine it was done on."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import fastmtl

__all__ = [
    "GEMM",
    "Timing",
    "cpu_clock",
    "gemm",
    "interleave",
    "keep_memory",
    "machine",
    "others_busy",
    "peak_extra_memory",
]

SHORTEST = 1e-4  # seconds that a sample takes at least
LONG = 1.0  # seconds: one call is warm-up enough
STEADY = 1.5  # a round counts while the read around it stays within this factor of the usual one
GEMM = 1024  # side of the matrix product that gives the multiply-add rate


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
        """The same where every function made `calls` calls."""
        return self._replace(seconds={name: s / calls for name, s in self.seconds.items()})


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    shortest: float = SHORTEST,
) -> Timing:
    """Times all functions in turn, `rounds` times over, and takes the median of each.

    Ratios of such medians hold on a noisy machine: whatever slows a round down slows all of its functions. What hits
    only some of them shows in `functions["read"]`, which must be a plain read of the input: a round is discarded where
    this read, timed within the round and within the one before, is off the usual one by more than a factor of `STEADY`.
    The usual one is the lower quartile of all of them, not their median: what disturbs a read makes it slower, and if
    it disturbs most of them, the median is one of those and the good rounds would be the ones to go.

    Args:
        functions: what to time, by name.
        rounds: how often, at least 1.
        clock: seconds since some moment.
        shortest: a function that takes less is called repeatedly within one sample, until it has taken so long.
    """
    calls = {}
    for name, function in functions.items():
        times: list[float] = []
        while len(times) < 3 and sum(times) < LONG:
            start = clock()
            function()
            times.append(clock() - start)
        # Not the fastest: where a host gives the processor to others, a clock may even lag behind for a moment.
        calls[name] = max(1, round(shortest / max(statistics.median(times), 1e-6)))

    def sample(name: str) -> float:
        function, n = functions[name], calls[name]
        start = clock()
        for _ in range(n):
            function()
        return (clock() - start) / n

    with others_busy() as others:
        first = sample("read")
        samples = [{name: sample(name) for name in functions} for _ in range(rounds)]
    reads = [first, *(s["read"] for s in samples)]
    usual = statistics.quantiles(reads, n=4, method="inclusive")[0]
    steady = [usual / STEADY <= read <= usual * STEADY for read in reads]
    kept = [s for s, before, within in zip(samples, steady, steady[1:], strict=False) if before and within]
    medians = {name: statistics.median(s[name] for s in kept or samples) for name in functions}
    return Timing(medians, len(kept), rounds, others())


def cpu_clock() -> Callable[[], float]:
    """The clock that stands still while this process does not run, where it is fine enough; else the one on the wall.

    With a single thread nothing but the processor's own speed and its caches is left to disturb what it times.
    """
    fine = time.get_clock_info("process_time").resolution <= 1e-6
    return time.process_time if fine else time.perf_counter


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
        ticks = [int(n) for n in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    except OSError:
        return 0.0
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def gemm(dtype: torch.dtype, side: int = GEMM) -> Callable[[], object]:
    """A square matrix product of `side`³ multiply-adds, for the rate at which this machine does them in `dtype`."""
    a, b, out = (torch.ones(side, side, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def keep_memory() -> None:
    """From now on, freed memory stays with this process (glibc; elsewhere nothing happens).

    Which part of a heap glibc gives back depends on what happens to lie at its end. A step that has to fetch it again,
    page by page, takes up to a tenth longer than the same step a moment later.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 32 << 20)  # the largest that it takes


def peak_extra_memory(prepare: Callable[..., tuple[Callable[[], object], Callable[[], object]]], *args: object) -> int:
    """Peak physical memory, in bytes, that a call needs beyond what exists before it; its result is included.

    `prepare(*args)`, a function at the top level of an importable module, returns two functions: one that warms up
    (loads libraries, starts threads) on a much smaller problem, so that scratch memory kept between calls is not
    missed, and the call itself. They run in a fresh process. The kernel's own high-water mark of the resident set
    (VmHWM, reset through /proc/self/clear_refs) sees whoever allocates: torch, C++ or LAPACK. For freed memory to leave
    the resident set and fresh memory to enter it, glibc is told to map every block of 64 KiB or more on its own and to
    keep nothing. The answer is off by a few hundred KiB: smaller blocks come from an existing heap, and the counters
    are rounded.

    Raises:
        OSError: the system is not Linux.
    """
    environment = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    with mock.patch.dict(os.environ, environment):  # glibc reads them when the process starts
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_peak, torch.get_num_threads(), prepare, *args).result()


def _peak(
    threads: int, prepare: Callable[..., tuple[Callable[[], object], Callable[[], object]]], *args: object
) -> int:
    torch.set_num_threads(threads)
    warm_up, call = prepare(*args)
    for _ in range(2):
        warm_up()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    result = call()
    after = _high_water()
    del result
    return after - before


def _high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def machine() -> dict[str, Any]:
    """What a result depends on: processor, threads, versions, kernels in use, commit and date."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.ops.fastmtl.cpu_isa() if hasattr(torch.ops.fastmtl, "cpu_isa") else None,
        "extensions": [name for name, where in fastmtl.ops.EXTENSIONS.items() if where],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastmtl": fastmtl.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ":/", ":/!benchmarks/results")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

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
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import fastmtl

__all__ = ["GEMM", "Timing", "gemm", "interleave", "keep_memory", "machine", "peak_extra_memory"]

SHORTEST = 1e-4  # seconds: shorter functions are called repeatedly within one sample
STEADY = 1.5  # a round counts while the read around it stays within this factor of its median
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


def interleave(functions: Mapping[str, Callable[[], object]], rounds: int) -> Timing:
    """Times all functions in turn, `rounds` times over, and takes the median of each.

    Ratios of such medians hold on a noisy machine: whatever slows a round down slows all of its functions. What hits
    only some of them shows in `functions["read"]`, which must be a plain read of the input: a round is discarded where
    this read, timed within the round and within the one before, is off its median by more than a factor of `STEADY`.
    """
    calls = {}
    for name, function in functions.items():
        for _ in range(3):
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
        calls[name] = max(1, round(SHORTEST / elapsed))

    def sample(name: str) -> float:
        function, n = functions[name], calls[name]
        start = time.perf_counter()
        for _ in range(n):
            function()
        return (time.perf_counter() - start) / n

    start, others = time.perf_counter(), _others()
    first = sample("read")
    samples = [{name: sample(name) for name in functions} for _ in range(rounds)]
    others = max(0.0, _others() - others) / (time.perf_counter() - start)
    reads = [first, *(s["read"] for s in samples)]
    typical = statistics.median(reads)
    steady = [typical / STEADY <= read <= typical * STEADY for read in reads]
    kept = [s for s, before, within in zip(samples, steady, steady[1:], strict=False) if before and within]
    medians = {name: statistics.median(s[name] for s in kept or samples) for name in functions}
    return Timing(medians, len(kept), rounds, others)


def _others() -> float:
    """Processor seconds that other processes, or other guests of the same host, have used since the machine started."""
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    except OSError:
        return 0.0
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK") - time.process_time()


def gemm(dtype: torch.dtype) -> Callable[[], object]:
    """A square matrix product of `GEMM`³ multiply-adds, for the rate at which this machine does them in `dtype`."""
    a, b, out = (torch.ones(GEMM, GEMM, dtype=dtype) for _ in range(3))
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

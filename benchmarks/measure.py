"""What benchmarks need beside `fastmtl.scaling`'s measuring: yardsticks, clocks, and the machine it was done on."""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmtl.scaling import machine as machines
from fastmtl.scaling.timing import Sample, by_clock, on_cuda

__all__ = [
    "DEVICE",
    "GEMM",
    "REHEARSAL",
    "Held",
    "cpu_clock",
    "device_name",
    "gemm",
    "held",
    "keep_memory",
    "machine",
    "peak",
    "sample",
    "synchronize",
]

GEMM = 1024  # side of the matrix product that gives the multiply-add rate

# The benchmarks of a GPU run on the CPU, at tiny sizes, where `make gpu` is rehearsed: what they print means nothing.
REHEARSAL = bool(os.environ.get("FASTMTL_REHEARSAL"))
DEVICE = "cpu" if REHEARSAL else "cuda"


def cpu_clock() -> Callable[[], float]:
    """The clock that stands still while this process does not run, where it is fine enough; else the one on the wall.

    With a single thread nothing but the processor's own speed and its caches is left to disturb what it times.
    """
    fine = time.get_clock_info("process_time").resolution <= 1e-6
    return time.process_time if fine else time.perf_counter


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


class Held(NamedTuple):
    """Bytes of the blocks that a call has taken from torch's allocator: the most at once, and those not given back."""

    peak: int
    left: int


def held(function: Callable[[], object]) -> Held:
    """What a call holds while its result is kept.

    Exact: the profiler sees every block, also those of the autograd engine and of C++ kernels. It does not see what
    oneDNN and BLAS libraries take from elsewhere.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    del result
    now = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return Held(peak, now)


def device_name() -> str:
    """The GPU, or what stands for it."""
    return "rehearsal" if REHEARSAL else torch.cuda.get_device_name()


def sample() -> Sample:
    """How calls on `DEVICE` are timed."""
    return by_clock() if REHEARSAL else on_cuda


def synchronize() -> None:
    """Waits for `DEVICE`."""
    if not REHEARSAL:
        torch.cuda.synchronize()


def peak(function: Callable[[], object]) -> int:
    """Bytes that a call takes from the GPU's allocator and holds at once, above what was there; 0 in a rehearsal."""
    if REHEARSAL:
        function()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a result depends on: processor, threads, versions, kernels in use, commit and date.

    Where there is no git, as on a machine that is lent, the commit is $FASTMTL_COMMIT.
    """
    return {
        **machines.machine(device),
        "threads": torch.get_num_threads(),
        "commit": os.environ.get("FASTMTL_COMMIT") or machines.git("rev-parse", "HEAD") or None,
        "dirty": bool(machines.git("status", "--porcelain", "--", ":/", ":/!benchmarks/results")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

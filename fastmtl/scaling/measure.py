"""One point of a sweep: checked, then timed in interleaved rounds, with peak memory and the roofs of the machine."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmtl
from fastmtl import ops
from fastmtl.scaling import baseline
from fastmtl.scaling.points import DTYPES, METHODS, Point

__all__ = ["commit", "machine", "measure"]

SHORTEST = 1e-4  # seconds: shorter functions are called repeatedly within one sample
LEAST = 3  # rounds of a median
STEADY = 1.5  # a round counts while its read stays within this factor of the median
SMALL = Point(96, 4096)  # memory: the call that warms up has at most these tasks and parameters

Function = Callable[[], object]


def measure(point: Point, rounds: int, seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Times, peak memory and errors of a point.

    Args:
        point: what.
        rounds: how many, where `seconds` allow; never fewer than `LEAST`.
        seconds: what the rounds may take together.
        device: "cpu" or "cuda".

    Returns:
        `seconds`: medians of one call: "fastmtl"; "pure", plain PyTorch (Aligned-MTL only); "read", a sum over all
        gradients; and the stages "gram", "weights" and "combine" by themselves, whose sum can exceed "fastmtl".
        A stage is called from Python, checks included, which counts where a call takes less than some 50 microseconds.
        `rounds`: how many were run, `kept`: how many counted. `others`: processors that other processes kept busy.
        `memory`: peak bytes of "fastmtl" and "pure" beyond gradients and result, or None where that cannot be measured.
        `accuracy`: relative errors of "fastmtl" and "pure" (None where it is not finite) against an exact answer, or
        None where this would take too long. `roofs`: see `_roofs`.

    Raises:
        ArithmeticError: fastmtl's result is wrong: nothing was timed.
    """
    torch.set_num_threads(point.threads)
    roofs = _roofs(device, point.threads, point.dtype)
    on_cpu = device == "cpu"
    memory = _peaks(point) if on_cpu else None  # before this process has gradients of its own
    G = baseline.gradients(point, device)
    kind = METHODS[point.method]
    errors = _check(G, point)

    method, pure = kind(), baseline.Pure(G) if point.method == "AlignedMTL" else None
    out = G.new_empty((*G.shape[:-2], G.shape[-1]))
    M, words = ops.gram(G), _words(G)
    alpha = kind().weighting(M, G.dtype)
    functions: dict[str, Function] = {"fastmtl": lambda: method(G, out=out)}
    if pure is not None:
        functions["pure"] = lambda: pure(G)
    if not on_cpu:
        memory = {name: _peak_cuda(functions[name]) for name in functions}
    functions["read"] = lambda: words.sum()
    functions["gram"] = lambda: ops.gram(G)
    functions["weights"] = lambda: method.weighting(M, G.dtype)
    functions["combine"] = lambda: ops.combine(G, alpha, out)
    timing = _interleave(functions, rounds, seconds, _sample if on_cpu else _sample_cuda)
    return {**timing, "memory": memory, "accuracy": errors if _has_exact(point) else None, "roofs": roofs}


def _has_exact(point: Point) -> bool:
    return point.method == "AlignedMTL" and baseline.affordable(point)


def _check(G: Tensor, point: Point) -> dict[str, float | None]:
    """Relative errors of fastmtl and plain PyTorch; raises where fastmtl's is too large."""
    torch.manual_seed(0)  # random methods draw the same for both
    alpha = baseline.exact(G, point)
    torch.manual_seed(0)
    error = baseline.error(METHODS[point.method]()(G), alpha, G)
    if not (math.isfinite(error) and error <= baseline.tolerance(point)):
        raise ArithmeticError(f"relative error {error:.2g}, expected at most {baseline.tolerance(point):.2g}")
    errors: dict[str, float | None] = {"fastmtl": error}
    if point.method == "AlignedMTL":
        pure = baseline.error(baseline.Pure(G)(G), alpha, G)
        errors["pure"] = pure if math.isfinite(pure) else None
    return errors


def _interleave(
    functions: Mapping[str, Function], rounds: int, seconds: float, sample: Callable[[Function, int], float]
) -> dict[str, Any]:
    """Times all functions in turn, round after round: what slows a round down slows all of its functions.

    A round in which the read is off its median by more than a factor of `STEADY` is discarded.
    """
    calls, total = {}, 0.0
    for name, function in functions.items():
        sample(function, 1)  # cold
        elapsed = sample(function, 1)
        if elapsed < 100 * SHORTEST:
            elapsed = min(elapsed, sample(function, 1))
        calls[name] = max(1, round(SHORTEST / elapsed))
        total += elapsed * calls[name]
    rounds = max(LEAST, min(rounds, int(seconds / total)))
    start, others = time.perf_counter(), _others()
    samples = [{name: sample(function, calls[name]) for name, function in functions.items()} for _ in range(rounds)]
    others = max(0.0, _others() - others) / (time.perf_counter() - start)
    typical = statistics.median(s["read"] for s in samples)
    kept = [s for s in samples if typical / STEADY <= s["read"] <= typical * STEADY]
    medians = {name: statistics.median(s[name] for s in kept or samples) for name in functions}
    return {"seconds": medians, "rounds": rounds, "kept": len(kept), "others": round(others, 2)}


def _sample(function: Function, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _sample_cuda(function: Function, calls: int) -> float:
    """By the device's clock, from an idle device: waiting for the host to launch is part of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _words(G: Tensor) -> Tensor:
    """The same memory as numbers that are summed as fast as they are read: pairs of halves as float32."""
    if G.itemsize > 2:
        return G
    flat = G.view(-1)
    return flat[: flat.numel() // 2 * 2].view(torch.float32)


def _others() -> float:
    """Processor seconds that other processes, or other guests of the same host, have used since the machine started."""
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0].split()[1:9]]
    except OSError:
        return 0.0
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK") - time.process_time()


@cache
def _roofs(device: str, threads: int, dtype: str) -> dict[str, float]:
    """What this machine reaches with so many threads: "read" in bytes/s, and flop/s of matrix products by dtype."""
    numbers, side = (1 << 26, 1024) if device == "cpu" else (1 << 28, 4096)
    sample = _sample if device == "cpu" else _sample_cuda
    found = {"read": 4 * numbers / _fastest(torch.ones(numbers, device=device).sum, sample)}
    for name in dict.fromkeys(("float32", "float64", dtype)):
        found[name] = 2 * side**3 / _fastest(_product(side, DTYPES[name], device), sample)
    return found


def _product(side: int, dtype: torch.dtype, device: str) -> Function:
    a, b, out = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def _fastest(function: Function, sample: Callable[[Function, int], float]) -> float:
    function()
    return min(sample(function, 1) for _ in range(5))


def _peaks(point: Point) -> dict[str, int] | None:
    """Peak physical memory of fastmtl and plain PyTorch beyond gradients and result; None on other systems than Linux.

    Each runs in a fresh process. The kernel's own high-water mark of the resident set (VmHWM, reset through
    /proc/self/clear_refs) sees whoever allocates: torch, C++ or LAPACK. For freed memory to leave the resident set and
    fresh memory to enter it, glibc is told to map every block of 64 KiB or more on its own and to keep nothing. The
    answer is off by a few hundred KiB: smaller blocks come from an existing heap, and the counters are rounded.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    names = ("fastmtl", "pure") if point.method == "AlignedMTL" else ("fastmtl",)
    return {name: _in_fresh_process(_peak, point, name) for name in names}


def _in_fresh_process(function: Callable[..., int], *arguments: object) -> int:
    # Forked from a server that has loaded torch and used nothing of it: loading takes longer than most points.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    settings = {"ARENA_MAX": "1", "MMAP_THRESHOLD_": "65536", "TOP_PAD_": "0", "TRIM_THRESHOLD_": "0"}
    before = dict(os.environ)
    os.environ.update({f"MALLOC_{name}": value for name, value in settings.items()})  # for glibc in the server
    try:
        # Not a pool: its processes wait for ever once their parent is killed.
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, function, *arguments), daemon=True)
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = RuntimeError("memory: the process in which it is measured has failed")
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send(sender: Connection, function: Callable[..., int], *arguments: object) -> None:
    try:
        sender.send(function(*arguments))
    except (ValueError, RuntimeError) as error:
        sender.send(type(error)(str(error)))  # without what may not survive the journey


def _peak(point: Point, name: str) -> int:
    torch.set_num_threads(point.threads)
    tasks = min(point.tasks, SMALL.tasks)
    small = Point(tasks, min(point.params, SMALL.params), dtype=point.dtype, method=point.method)
    for _ in range(2):  # loads libraries, starts threads
        _call(small, name)()
    call = _call(point, name)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _high_water()
    call()
    return _high_water() - before


def _call(point: Point, name: str) -> Function:
    G = baseline.gradients(point)
    if name == "pure":
        pure = baseline.Pure(G)
        pure.out.zero_()  # physical memory from now on
        return lambda: pure(G)
    method = METHODS[point.method]()
    out = G.new_zeros((*G.shape[:-2], G.shape[-1])).zero_()
    return lambda: method(G, out=out)


def _high_water() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _peak_cuda(call: Function) -> int:
    """Peak of torch's allocator beyond what is allocated now."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine(device: str = "cpu") -> dict[str, Any]:
    """What results depend on: processors, instruction set, versions and kernels in use."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "isa": torch.ops.fastmtl.cpu_isa() if hasattr(torch.ops.fastmtl, "cpu_isa") else None,
        "extensions": [name for name, where in ops.EXTENSIONS.items() if where],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastmtl": fastmtl.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str | None:
    """The commit of a checkout, with "-dirty" where the code differs from it; None for an installed package."""
    if not _git("ls-files", "__init__.py"):  # perhaps within another project's repository
        return None
    changed = _git("status", "--porcelain", "--", ".", "../csrc", "../setup.py")
    return f"{_git('rev-parse', 'HEAD')}{'-dirty' if changed else ''}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(fastmtl.__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""

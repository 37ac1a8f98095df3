"""How much memory a call needs at its peak."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastmtl.scaling.timing import Function

__all__ = ["can_peak", "peak_extra_memory", "peak_on_cuda"]

Prepare = Callable[..., tuple[Function, Function]]

_CLEAR = Path("/proc/self/clear_refs")


def can_peak() -> bool:
    """Whether `peak_extra_memory` works on this system: it does on Linux."""
    return os.access(_CLEAR, os.W_OK)


def peak_extra_memory(prepare: Prepare, *args: object) -> int:
    """Peak physical memory, in bytes, that a call needs beyond what exists before it; its result is included.

    `prepare(*args)`, a function at the top level of an importable module, returns two functions: one that warms up
    (loads libraries, starts threads) on a much smaller problem, so that scratch memory kept between calls still counts,
    and the call itself. They run in a fresh process. The kernel's own high-water mark of the resident set
    (VmHWM, reset through /proc/self/clear_refs) sees whoever allocates: torch, C++ or LAPACK. For freed memory to leave
    the resident set and fresh memory to enter it, glibc is told to map every block of 64 KiB or more on its own and to
    keep nothing. The answer is off by a few hundred KiB: smaller blocks come from an existing heap, and the counters
    are rounded.

    Raises:
        OSError: the system is not Linux.
        RuntimeError: the measuring process failed. The calls' own ValueError or RuntimeError is passed on.
    """
    if not can_peak():
        raise OSError("peak memory is measured on Linux only")
    # Forked from a server that has loaded torch and used nothing of it: loading takes longer than most calls.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    settings = {"ARENA_MAX": "1", "MMAP_THRESHOLD_": "65536", "TOP_PAD_": "0", "TRIM_THRESHOLD_": "0"}
    with mock.patch.dict(os.environ, {f"MALLOC_{name}": value for name, value in settings.items()}):
        # For glibc, which reads them when the server starts. Not a pool, whose processes wait forever once their
        # parent is killed.
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, torch.get_num_threads(), prepare, *args)
        process = context.Process(target=_send, args=arguments, daemon=True)
        process.start()
    sender.close()
    result: int | Exception
    try:
        result = receiver.recv()
    except EOFError:
        result = RuntimeError("memory: the process in which it is measured has failed")
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send(sender: Connection, threads: int, prepare: Prepare, *args: Any) -> None:
    try:
        sender.send(_peak(threads, prepare, *args))
    except (ValueError, RuntimeError) as error:
        sender.send(type(error)(str(error)))  # a plain copy, which can be pickled


def _peak(threads: int, prepare: Prepare, *args: Any) -> int:
    torch.set_num_threads(threads)
    warm_up, call = prepare(*args)
    for _ in range(2):
        warm_up()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5", encoding="utf-8")
    before = _high_water()
    result = call()
    after = _high_water()
    del result
    return after - before


def _high_water() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def peak_on_cuda(call: Function) -> int:
    """Peak of torch's allocator, in bytes, beyond what is allocated now."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

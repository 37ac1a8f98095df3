"""One point of a sweep: checked, then timed in interleaved rounds, with peak memory and the roofs of the machine."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.scaling import baseline, memory
from fastmtl.scaling.points import DTYPES, METHODS, Point
from fastmtl.scaling.timing import Function, Sample, by_clock, interleave, on_cuda

__all__ = ["measure"]

SMALL = Point(96, 4096)  # the most tasks and parameters of the warm-up call before memory is measured


def measure(point: Point, rounds: int, seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Times, peak memory and errors of a point.

    Args:
        point: the point.
        rounds: how many rounds, if `seconds` allow; never fewer than three.
        seconds: how long all rounds together may take.
        device: "cpu" or "cuda".

    Returns:
        `seconds`: medians of one call: "fastmtl"; "pure", plain PyTorch (Aligned-MTL only); "read", a sum over all
        gradients; and the stages "gram", "weights" and "combine" by themselves, whose sum can exceed "fastmtl".
        A stage is called from Python, checks included, which matters if a call takes less than about 50 microseconds.
        `rounds`: how many were run, `kept`: how many counted. `others`: processors that other processes kept busy.
        `memory`: peak bytes of "fastmtl" and "pure" beyond gradients and result, or None if that cannot be measured.
        `accuracy`: relative errors of "fastmtl" and "pure" (None if not finite) against an exact answer, or None if
        that would take too long. `roofs`: see `_roofs`.

    Raises:
        ArithmeticError: fastmtl's result is wrong: nothing was timed.
    """
    torch.set_num_threads(point.threads)
    roofs = _roofs(device, point.threads, point.dtype)
    on_cpu = device == "cpu"
    peaks = _peaks(point) if on_cpu else None  # before this process allocates gradients
    G = baseline.gradients(point, device)
    kind = METHODS[point.method]
    errors = _check(G, point)

    method, pure = kind(), baseline.Pure(G.shape, G.dtype, G.device) if point.method == "AlignedMTL" else None
    out = G.new_empty((*G.shape[:-2], G.shape[-1]))
    M, words = ops.gram(G), _words(G)
    alpha = kind().weighting(M, G.dtype)
    functions: dict[str, Function] = {"fastmtl": lambda: method(G, out=out)}
    if pure is not None:
        functions["pure"] = lambda: pure(G)
    if not on_cpu:
        peaks = {name: memory.peak_on_cuda(functions[name]) for name in functions}
    functions["read"] = lambda: words.sum()
    functions["gram"] = lambda: ops.gram(G)
    functions["weights"] = lambda: method.weighting(M, G.dtype)
    functions["combine"] = lambda: ops.combine(G, alpha, out)
    timing = interleave(functions, rounds, _sampler(device), seconds=seconds)
    return {
        **timing._asdict(),
        "others": round(timing.others, 2),
        "memory": peaks,
        "accuracy": errors if _has_exact(point) else None,
        "roofs": roofs,
    }


def _sampler(device: str) -> Sample:
    return by_clock() if device == "cpu" else on_cuda


def _has_exact(point: Point) -> bool:
    return point.method == "AlignedMTL" and baseline.affordable(point)


def _check(G: Tensor, point: Point) -> dict[str, float | None]:
    """Relative errors of fastmtl and plain PyTorch; raises if fastmtl's is too large."""
    torch.manual_seed(0)  # random methods draw the same for both
    alpha = baseline.exact(G, point)
    torch.manual_seed(0)
    error = baseline.error(METHODS[point.method]()(G), alpha, G)
    if not (math.isfinite(error) and error <= baseline.tolerance(point)):
        raise ArithmeticError(f"relative error {error:.2g}, expected at most {baseline.tolerance(point):.2g}")
    errors: dict[str, float | None] = {"fastmtl": error}
    if point.method == "AlignedMTL":
        pure = baseline.error(baseline.Pure(G.shape, G.dtype, G.device)(G), alpha, G)
        errors["pure"] = pure if math.isfinite(pure) else None
    return errors


def _words(G: Tensor) -> Tensor:
    """The same memory as numbers that are summed as fast as they are read: pairs of 16-bit numbers as float32."""
    if G.itemsize > 2:
        return G
    flat = G.view(-1)
    return flat[: flat.numel() // 2 * 2].view(torch.float32)


@cache
def _roofs(device: str, threads: int, dtype: str) -> dict[str, float]:
    """What this machine reaches with that many threads: "read" in bytes/s, and flop/s of matrix products by dtype."""
    numbers, side = (1 << 26, 1024) if device == "cpu" else (1 << 28, 4096)
    sample = _sampler(device)
    found = {"read": 4 * numbers / _fastest(torch.ones(numbers, device=device).sum, sample)}
    for name in dict.fromkeys(("float32", "float64", dtype)):
        found[name] = 2 * side**3 / _fastest(_product(side, DTYPES[name], device), sample)
    return found


def _product(side: int, dtype: torch.dtype, device: str) -> Function:
    a, b, out = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def _fastest(function: Function, sample: Sample) -> float:
    function()
    return min(sample(function, 1) for _ in range(5))


def _peaks(point: Point) -> dict[str, int] | None:
    """Peak bytes of fastmtl and plain PyTorch beyond gradients and result; None except on Linux."""
    if not memory.can_peak():
        return None
    names = ("fastmtl", "pure") if point.method == "AlignedMTL" else ("fastmtl",)
    return {name: memory.peak_extra_memory(_prepare, point, name) for name in names}


def _prepare(point: Point, name: str) -> tuple[Function, Function]:
    tasks, params = min(point.tasks, SMALL.tasks), min(point.params, SMALL.params)
    small = Point(tasks, params, dtype=point.dtype, method=point.method)
    return lambda: _call(small, name)(), _call(point, name)


def _call(point: Point, name: str) -> Function:
    G = baseline.gradients(point)
    if name == "pure":
        pure = baseline.Pure(G.shape, G.dtype, G.device)
        pure.out.zero_()  # backed by physical memory from now on
        return lambda: pure(G)
    method = METHODS[point.method]()
    out = G.new_zeros((*G.shape[:-2], G.shape[-1])).zero_()
    return lambda: method(G, out=out)

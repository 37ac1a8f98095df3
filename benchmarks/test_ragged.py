"""Gradients as autograd returns them: T rows of one tensor per parameter of ResNet-50; time and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import loops
import pure
import pytest
import torch
import workloads
from torch import Tensor

import fastmtl
from fastmtl.scaling.memory import peak_extra_memory

pytest.importorskip("pytest_benchmark")

T = 8
SHAPES = workloads.resnet50()
RESULT = 4 * sum(torch.Size(shape).numel() for shape in SHAPES)
MEGABYTE = 1_000_000
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def problem() -> tuple[list[list[Tensor]], Tensor]:
    """T rows, and their exact aligned gradient as one vector."""
    rows = workloads.ragged(T, SHAPES)
    return rows, workloads.exact(pure.Ragged(T, SHAPES).flatten(rows))


def fast(shapes: list[tuple[int, ...]]) -> Callable[[list[list[Tensor]]], object]:
    """The library."""
    return fastmtl.AlignedMTL()


def plain(shapes: list[tuple[int, ...]]) -> Callable[[list[list[Tensor]]], object]:
    """Plain PyTorch: concatenate into a preallocated matrix, aggregate, split."""
    return pure.Ragged(T, shapes)


def torchjd(shapes: list[tuple[int, ...]]) -> Callable[[list[list[Tensor]]], object]:
    """TorchJD's aggregator on the concatenation."""
    aggregator = pytest.importorskip("torchjd.aggregation").AlignedMTL()
    flatten = pure.Ragged(T, shapes).flatten
    return lambda rows: [aggregator(flatten(rows))]


def loop(shapes: list[tuple[int, ...]]) -> Callable[[list[list[Tensor]]], object]:
    """A LibMTL-style loop: flatten parameter by parameter, stack, aggregate, write back slice by slice."""
    sizes = [torch.Size(shape) for shape in shapes]
    numbers = [shape.numel() for shape in sizes]
    return lambda rows: loops.slices(loops.aligned(loops.collected(rows, numbers)), sizes)


def prepare(make: Callable[..., Callable[[list[list[Tensor]]], object]]) -> Any:
    """For `peak_extra_memory`: a small call, and the call itself with the buffers that its user must hold."""
    small = [(100, 1000), (1000,)]
    few, rows = workloads.ragged(T, small), workloads.ragged(T, SHAPES)
    return lambda: make(small)(few), lambda: make(SHAPES)(rows)


@pytest.mark.benchmark(max_time=1.0, min_rounds=3, group=f"ragged resnet50 T={T}")
@pytest.mark.parametrize("make", [fast, plain, torchjd, loop], ids=["fastmtl", "pure", "torchjd", "loop"])
def test_ragged(benchmark: Any, problem: tuple[list[list[Tensor]], Tensor], make: Callable[..., Any]) -> None:
    """Time of one aggregation, T rows in, one tensor per parameter out."""
    rows, expected = problem
    run = make(SHAPES)
    assert workloads.error(run(rows), expected) <= (workloads.tolerance(T) if make is fast else 1e-4)
    benchmark(run, rows)


@pytest.mark.benchmark(group=f"ragged resnet50 T={T}, peak memory (see extra_info)")
@pytest.mark.parametrize("make", [fast, plain, loop], ids=["fastmtl", "pure", "loop"])
def test_memory(benchmark: Any, make: Callable[..., Any]) -> None:
    """Peak extra memory of one call beyond its result, in `extra_info`; the time is that of the measurement."""
    peak = benchmark.pedantic(peak_extra_memory, (prepare, make), rounds=1)
    benchmark.extra_info["megabytes beyond the result"] = round((peak - RESULT) / MEGABYTE, 2)
    assert peak >= RESULT
    if make is fast and fastmtl.ops.EXTENSIONS["_C"] is not None:  # the reference ops do copy
        assert peak <= RESULT + MEGABYTE


def host_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The least time that each call keeps the host, in alternation: without the wait for what it has queued."""
    best = [float("inf")] * len(calls)
    for _ in range(100):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return best


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [fastmtl.AlignedMTL, fastmtl.MGDA], ids=["AlignedMTL", "MGDA"])
@pytest.mark.parametrize(("tasks", "tensors"), [(8, len(SHAPES)), (10, 160)])
def test_list_host_time(benchmark: Any, tasks: int, tensors: int, method: Any, device: str) -> None:
    """What a list costs the host, whatever the tensors hold, beside `torch._foreach_norm` and `torch._foreach_mul_`.

    On the CPU those two loop over the tensors, which takes several times as long as what they do on a GPU: there the
    nanoseconds a tensor are what to look at, here the ratio.
    """
    rows = [[torch.rand(4, device=device) for _ in range(tensors)] for _ in range(tasks)]
    out = [torch.empty_like(g) for g in rows[0]]
    flat = [g for row in rows for g in row]
    run = partial(method(), rows, out=out)
    norm, scale = partial(torch._foreach_norm, flat), partial(torch._foreach_mul_, flat, 1.0)
    ours, norms, products = host_seconds([run, norm, scale])
    benchmark.group = f"host time of a list, {device}"
    benchmark.extra_info["microseconds"] = round(1e6 * ours, 1)
    benchmark.extra_info["nanoseconds a tensor"] = round(1e9 * ours / len(flat), 1)
    benchmark.extra_info["_foreach_norm + _foreach_mul_, microseconds"] = round(1e6 * (norms + products), 1)
    benchmark.extra_info["ratio"] = round(ours / (norms + products), 3)
    benchmark.pedantic(run, rounds=20)


def prepare_known() -> Any:
    """Allocates 32 MiB, frees them, and returns 16 MiB."""

    def call() -> Tensor:
        scratch = torch.ones(8 << 20)
        del scratch
        return torch.ones(4 << 20)

    return lambda: torch.ones(1000), call


def test_meter() -> None:
    """The meter sees a peak that is gone when the call returns."""
    peak = peak_extra_memory(prepare_known)
    assert abs(peak - (32 << 20)) < MEGABYTE / 2

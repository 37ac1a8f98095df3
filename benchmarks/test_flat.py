"""One matrix [T, P], from dispatch-bound to compute-bound: fastmtl, plain PyTorch, and TorchJD where installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import workloads
from torch import Tensor

import fastmtl
from fastmtl.scaling.baseline import Pure

pytest.importorskip("pytest_benchmark")

SHAPES = [(4, 1_000), (2, 1_000_000), (10, 1_000_000), (12, 1_000_000), (40, 250_000), (128, 100_000), (512, 20_000)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def problem(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """A well-conditioned gradient matrix and its exact aligned gradient."""
    G = workloads.matrix(*request.param)
    return G, workloads.exact(G)


def fast(G: Tensor) -> Callable[[], Tensor]:
    """The library, writing to a preallocated result."""
    method, out = fastmtl.AlignedMTL(), torch.empty(G.shape[1], dtype=G.dtype)
    return lambda: method(G, out=out)


def plain(G: Tensor) -> Callable[[], Tensor]:
    """Plain PyTorch."""
    T, P = G.shape
    base = Pure((T, P), G.dtype)
    return lambda: base(G)


def torchjd(G: Tensor) -> Callable[[], Tensor]:
    """TorchJD's aggregator."""
    aggregator = pytest.importorskip("torchjd.aggregation").AlignedMTL()
    return lambda: aggregator(G)


@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
@pytest.mark.parametrize("make", [fast, plain, torchjd], ids=["fastmtl", "pure", "torchjd"])
def test_flat(benchmark: Any, problem: tuple[Tensor, Tensor], make: Callable[[Tensor], Callable[[], Tensor]]) -> None:
    """float32, well conditioned, so that a float32 Gram is accurate enough for all of them."""
    G, expected = problem
    run = make(G)
    assert workloads.error(run(), expected) <= (workloads.tolerance(len(G)) if make is fast else 1e-4)
    benchmark.group = f"flat {len(G)}x{G.shape[1]}"
    benchmark(run)


@pytest.mark.benchmark(max_time=0.3, min_rounds=5, group="dtype 10x1000000")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype(benchmark: Any, dtype: torch.dtype) -> None:
    """The library on every dtype it takes: half the bytes must not cost more time."""
    G = workloads.matrix(10, 1_000_000, dtype=dtype)
    run = fast(G)
    assert workloads.error(run(), workloads.exact(G)) <= workloads.tolerance(10, dtype)
    benchmark(run)

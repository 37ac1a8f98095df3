"""Batches: many small matrices [B, T, P], and the eigendecompositions [B, T, T] behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import workloads

import fastmtl
from fastmtl.scaling.baseline import Pure

pytest.importorskip("pytest_benchmark")


@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
@pytest.mark.parametrize("name", ["fastmtl", "pure"])
@pytest.mark.parametrize("shape", [(512, 8, 2048), (4096, 3, 256)], ids=lambda shape: "x".join(map(str, shape)))
def test_batched(benchmark: Any, shape: tuple[int, int, int], name: str) -> None:
    """[B, T, P] against bmm and a batched torch.linalg.eigh."""
    G = workloads.matrix(*shape)
    B, _, P = shape
    method, out, base = fastmtl.AlignedMTL(), torch.empty(B, P), Pure(shape)

    def run() -> torch.Tensor:
        return method(G, out=out) if name == "fastmtl" else base(G)

    assert workloads.error(run(), workloads.exact(G)) <= 1e-5
    benchmark.group = f"batched {'x'.join(map(str, shape))}"
    benchmark(run)


@pytest.mark.benchmark(max_time=0.5, min_rounds=3)
@pytest.mark.parametrize("function", [fastmtl.eigh, torch.linalg.eigh], ids=["fastmtl", "pure"])
@pytest.mark.parametrize(("B", "T"), [(4096, 3), (4096, 8), (1024, 16), (1024, 32)])
def test_eigh(benchmark: Any, B: int, T: int, function: Any) -> None:
    """float64 [B, T, T] against torch.linalg.eigh."""
    M = workloads.symmetric(B, T)
    assert workloads.eigen_error(M, *function(M)) <= 10
    benchmark.group = f"eigh {B}x{T}x{T}"
    benchmark(function, M)

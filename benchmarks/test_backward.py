"""From T losses to `.grad`: an MLP with T heads, against plain PyTorch and the bare loop of autograd.grad calls."""

from __future__ import annotations

from typing import Any

import pure
import pytest
import torch
import workloads

import fastmtl

pytest.importorskip("pytest_benchmark")


@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
@pytest.mark.parametrize("name", ["loop", "fastmtl", "pure"])
@pytest.mark.parametrize("T", [3, 10])
def test_backward(benchmark: Any, T: int, name: str) -> None:
    """T backward passes and the aggregation; "loop" is the passes alone, the least that any method needs."""
    problem, method = workloads.mlp(T), fastmtl.AlignedMTL()
    losses = problem.losses([problem.forward()] * T)
    rows = pure.autograd_loop(losses, problem.shared, problem.heads)
    base = pure.Backward(problem.shared, problem.heads)
    expected = workloads.exact(base.ragged.flatten([row[: len(problem.shared)] for row in rows]))
    del rows

    def run() -> None:
        problem.zero_grad()
        if name == "loop":
            pure.autograd_loop(losses, problem.shared, problem.heads)
        elif name == "fastmtl":
            method.backward(losses, shared=problem.shared, retain_graph=True)
        else:
            base(losses)

    run()
    if name != "loop":
        assert workloads.error(problem.shared_grad(), expected) <= 1e-4
    assert all(torch.isfinite(loss) for loss in losses)
    benchmark.group = f"backward T={T}"
    benchmark(run)

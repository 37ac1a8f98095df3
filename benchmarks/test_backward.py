"""From T losses to `.grad`: an MLP with T heads, against plain PyTorch, TorchJD and LibMTL-style collection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import loops
import pure
import pytest
import torch
import workloads
from torch import Tensor

import fastmtl

pytest.importorskip("pytest_benchmark")


def torchjd(problem: workloads.MultiTask, losses: Sequence[Tensor]) -> Callable[[], object]:
    """TorchJD's Jacobian of the losses, one pass after the other, aggregated; its heads get no gradient."""
    autojac = pytest.importorskip("torchjd.autojac")
    if not hasattr(autojac, "jac_to_grad"):
        pytest.skip("needs a TorchJD with jac_to_grad")
    aggregator = pytest.importorskip("torchjd.aggregation").AlignedMTL()

    def run() -> None:
        autojac.backward(losses, inputs=problem.shared, retain_graph=True, parallel_chunk_size=1)
        autojac.jac_to_grad(problem.shared, aggregator)

    return run


@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
@pytest.mark.parametrize("name", ["passes", "fastmtl", "pure", "torchjd", "loop"])
@pytest.mark.parametrize("T", [3, 10])
def test_backward(benchmark: Any, T: int, name: str) -> None:
    """T backward passes and the aggregation; "passes" are those passes alone, the least that any method needs."""
    problem, method = workloads.mlp(T), fastmtl.AlignedMTL()
    losses = problem.losses([problem.forward()] * T)
    rows = pure.autograd_loop(losses, problem.shared, problem.heads)
    others: dict[str, Callable[[Sequence[Tensor]], object]]
    others = {"pure": pure.Backward(problem.shared, problem.heads), "loop": loops.Loop(problem.shared)}
    theirs = torchjd(problem, losses) if name == "torchjd" else None
    expected = workloads.exact(torch.stack([workloads.flatten(row[: len(problem.shared)]) for row in rows]))
    del rows

    def run() -> None:
        problem.zero_grad()
        if name == "passes":
            pure.autograd_loop(losses, problem.shared, problem.heads)
        elif name == "fastmtl":
            method.backward(losses, shared=problem.shared, retain_graph=True)
        elif theirs is not None:
            theirs()
        else:
            others[name](losses)

    run()
    if name != "passes":
        assert workloads.error(problem.shared_grad(), expected) <= 1e-4
    assert all(torch.isfinite(loss) for loss in losses)
    benchmark.group = f"backward T={T}"
    benchmark(run)

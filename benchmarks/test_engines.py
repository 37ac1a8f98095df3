"""Training steps by every engine of `backward`, on small models of every kind."""

from __future__ import annotations

from typing import Any

import engines
import networks
import peers
import pytest
import torch
import workloads

pytest.importorskip("pytest_benchmark")

CASES = {
    "mlp T=10": lambda: workloads.mlp(10, widths=(128, 256, 256)),
    "convolutions T=5": lambda: networks.convolutions(5, (16, 32, 64), 8, 16),
    "batch norm T=3": lambda: workloads.resnet18(3, 2, 32),
    "transformer T=5": lambda: networks.transformer(5, 64, 2, 4, 16),
    "embedding T=10": lambda: networks.text(10, 1000, 64, 16, 16),
    "lstm T=3": lambda: networks.recurrent(3, 32, 8, 8),
}


@pytest.fixture(scope="module", params=CASES)
def problem(request: pytest.FixtureRequest) -> tuple[str, workloads.MultiTask, dict[str, torch.Tensor]]:
    """A model and its exact gradients."""
    model = CASES[request.param]()
    return request.param, model, engines.expected_of(model)


@pytest.mark.benchmark(max_time=0.3, min_rounds=3)
@pytest.mark.parametrize("way", engines.WAYS)
def test_engine(benchmark: Any, problem: tuple[str, workloads.MultiTask, dict[str, torch.Tensor]], way: str) -> None:
    """One step, compared with its exact gradient and then timed."""
    name, model, expected = problem
    if way in engines.THEIRS:
        pytest.importorskip("torchjd", reason=peers.INSTALL)
    made = engines.WAYS[way](model)
    assert made.error(expected) <= (engines.TOLERANCE if way in engines.OURS else engines.THEIR_TOLERANCE)
    benchmark.group = f"engines {name}"
    if way == "auto":
        benchmark.extra_info["auto"] = engines.picked(made.step())
    benchmark(made.step)

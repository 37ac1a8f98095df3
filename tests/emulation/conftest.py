"""Fixtures of the emulated kernels: tests may choose an order of threads, and the next one starts with the first."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Matrices this small gain nothing from several threads, which wait for each other where a machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(params=harness.ORDERS)
def order(request: pytest.FixtureRequest) -> Iterator[str]:
    harness.module().set_order(request.param, 11)
    yield request.param
    harness.module().set_order(harness.ORDERS[0], 0)

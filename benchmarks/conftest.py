"""pytest-benchmark's results say on which machine, and with which kernels, they were measured."""

from __future__ import annotations

from typing import Any

import measure
import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds what `measure.machine` finds."""
    machine_info["fastmtl"] = measure.machine()

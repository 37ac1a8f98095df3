"""pytest-benchmark's results say where they were measured; the ratios of test_step.py are printed as a table."""

from __future__ import annotations

from typing import Any

import measure
import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds what `measure.machine` finds."""
    machine_info["fastmtl"] = measure.machine()


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table of training steps, in Markdown: a row for each way, a column for each model."""
    reports = terminalreporter.getreports("passed")
    steps = [value for report in reports for key, value in report.user_properties if key == "step"]
    if not steps:
        return
    cells = {(way, model): cell(*measured) for way, model, *measured in steps}
    ways, models = (list(dict.fromkeys(column)) for column in zip(*cells, strict=True))
    rows = [["× the step of the summed losses", *models], ["---"] * (1 + len(models))]
    rows += [[way, *(cells.get((way, model), "") for model in models)] for way in ways]
    terminalreporter.section("training steps: ratio of interleaved medians (milliseconds)")
    for row in rows:
        terminalreporter.write_line(f"| {' | '.join(row)} |")
    busy = max(others for *_, others in steps)
    terminalreporter.write_line(f"Other processes kept up to {busy:.1f} processors busy meanwhile.")


def cell(milliseconds: float, ratio: float, steady: bool, _: float) -> str:
    """An entry of the table; "?" where most rounds were disturbed."""
    return f"{ratio:.2f} ({milliseconds:.3g}){'' if steady else ' ?'}"

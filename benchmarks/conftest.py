"""pytest-benchmark's results say where they were measured; interleaved ratios are printed as tables."""

from __future__ import annotations

from typing import Any

import measure
import pytest

# property of a report -> heading of its table, and of its first column
TABLES = {
    "step": ("training steps: ratio of interleaved medians (milliseconds)", "× the step of the summed losses"),
    "weighting": ("task weights from a Gram matrix: TorchJD's time / ours (ours, theirs)", "method"),
    "aggregation": ("whole aggregations: ratio of interleaved medians", "method"),
    "graddrop": ("on the gradients themselves: TorchJD's time / ours (ours, theirs)", "method"),
}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What `measure.machine` finds, in place of pytest-benchmark's own, which names the host.

    Without commit and date, which the file has elsewhere: a comparison warns where this is not the same.
    """
    machine_info.clear()
    found = measure.machine()
    machine_info["fastmtl"] = {key: found[key] for key in found if key not in ("commit", "dirty", "date")}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Leaves every single time out, unless --benchmark-save-data asks for them: medians are what is committed."""
    if not config.getoption("benchmark_save_data"):
        for benchmark in output_json["benchmarks"]:
            benchmark["stats"].pop("data", None)


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the tables, in Markdown, from properties (row, column, cell, processors that others kept busy)."""
    properties = [pair for report in terminalreporter.getreports("passed") for pair in report.user_properties]
    for table, (heading, corner) in TABLES.items():
        entries = [entry for key, entry in properties if key == table]
        if not entries:
            continue
        cells = {(row, column): cell for row, column, cell, _ in entries}
        names, columns = (list(dict.fromkeys(axis)) for axis in zip(*cells, strict=True))
        rows = [[corner, *columns], ["---"] * (1 + len(columns))]
        rows += [[name, *(cells.get((name, column), "") for column in columns)] for name in names]
        terminalreporter.section(heading)
        for row in rows:
            terminalreporter.write_line(f"| {' | '.join(row)} |")
        busy = max(others for *_, others in entries)
        terminalreporter.write_line(f"Other processes kept up to {busy:.1f} processors busy meanwhile.")

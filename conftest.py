"""`pytest --benchmark`: the benchmarks in place of the tests, and then the gate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).with_name("benchmarks")
GATE = [sys.executable, str(BENCHMARKS / "check.py"), "--ci"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the flag. Here, not in benchmarks/: pytest reads options where it is started."""
    text = "run the benchmarks in place of the tests and, if they pass, benchmarks/check.py --ci"
    parser.addoption("--benchmark", action="store_true", help=text)


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, int | None, int | None]:
    """Around the whole session: what it runs, and what its exit status is."""
    if not config.getoption("--benchmark"):
        return (yield)
    if not config.pluginmanager.has_plugin("benchmark"):
        raise pytest.UsageError("--benchmark: expected pytest-benchmark, which is not installed")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:  # no path was given
        config.args[:] = [str(BENCHMARKS)]
    config.option.benchmark_only = True
    status = yield
    finished = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if not finished or config.getoption("collectonly"):
        return status
    return int(status or subprocess.run(GATE, check=False).returncode)

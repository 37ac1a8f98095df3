"""The benchmarks as a whole: every op has one, and `pytest --benchmark` runs them and then the gate."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastmtl import ops

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the tests run without the source tree")


def run_pytest(where, *arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # Not a worker of the run that this test is part of: pytest-benchmark measures nothing there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def project(tmp_path):
    """The project's flag on a project of one test and one benchmark, with a gate that fails where `broken` lies."""
    pytest.importorskip("pytest_benchmark")
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    for folder, name in (("tests", "test_one"), ("benchmarks", "test_tiny")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text(
            f"import pathlib\ndef {name}({'benchmark' if folder == 'benchmarks' else ''}):\n"
            f"    assert not pathlib.Path('{name}_fails').exists()\n"
            + ("    benchmark(sum, (1, 2))\n" if folder == "benchmarks" else "")
        )
    (tmp_path / "benchmarks" / "check.py").write_text(
        "import pathlib, sys\n"
        "with open('gate', 'a') as file:\n    file.write(' '.join(sys.argv[1:]))\n"
        "sys.exit(pathlib.Path('broken').exists())\n"
    )
    return tmp_path


def gate(project):
    """The arguments that the gate was called with, or None where it was not."""
    file = project / "gate"
    return file.read_text() if file.exists() else None


def test_the_flag_runs_benchmarks_and_the_gate(project):
    run = run_pytest(project, "--benchmark", "-v")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_tiny PASSED" in run.stdout
    assert "test_one" not in run.stdout
    assert gate(project) == "--ci"


def test_a_gate_that_fails_is_the_exit_status(project):
    (project / "broken").touch()
    run = run_pytest(project, "--benchmark")
    assert "1 passed" in run.stdout
    assert run.returncode == 1


def test_a_benchmark_that_fails_is_the_exit_status(project):
    (project / "test_tiny_fails").touch()
    assert run_pytest(project, "--benchmark").returncode == 1
    assert gate(project) is None


@pytest.mark.parametrize(
    "arguments", [(), ("benchmarks", "--benchmark-only"), ("--benchmark", "--collect-only")], ids=str
)
def test_otherwise_there_is_no_gate(project, arguments):
    run = run_pytest(project, *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    assert gate(project) is None


def test_the_flag_takes_paths_and_expressions(project):
    assert run_pytest(project, "--benchmark", "-k", "nothing").returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    run = run_pytest(project, "--benchmark", "tests")  # no benchmark there
    assert "1 skipped" in run.stdout


def test_the_flag_in_this_project():
    pytest.importorskip("pytest_benchmark")
    run = run_pytest(ROOT, "--benchmark", "--collect-only", "-q", "-k", "test_op and gram-10x")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "benchmarks/test_ops.py::test_op[gram-10x1000000-fastmtl]" in run.stdout
    assert "tests/" not in run.stdout


def test_every_op_has_a_group(monkeypatch):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    # Under a name of its own: tests has a test_ops too.
    spec = importlib.util.spec_from_file_location("benchmarks_test_ops", ROOT / "benchmarks" / "test_ops.py")
    benchmarks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmarks)
    parts = {"balance_many", "second_pass"}  # of align on a GPU, T > 64
    assert set(benchmarks.OPS) == set(ops.__all__) - {"EXTENSIONS"} - parts

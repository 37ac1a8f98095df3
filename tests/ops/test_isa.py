"""The kernels of every instruction set this machine has: which one runs is settled when the library is loaded, so each
set gets a process of its own, which runs the parity tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import needs_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RANK = {"portable": 0, "avx2": 1, "avx512": 2}
CAPABILITY = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")

RUN = """
import sys
import pytest, torch
import fastmtl
if fastmtl.ops.EXTENSIONS["_C"] is None:
    print("isa: none", flush=True)
else:
    print("isa:", torch.ops.fastmtl.cpu_isa(), flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


def run(environment, *arguments):
    """Runs pytest in a process where this environment holds; its output, and the instruction set it reported."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *arguments],
        env={**{k: v for k, v in os.environ.items() if k != "FASTMTL_CPU"}, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    output = result.stdout + result.stderr
    assert "isa: " in output, output
    return result.returncode, output, output.partition("isa: ")[2].split()[0]


@needs_extension
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_parity_of_lesser_instruction_sets(isa, pytestconfig):
    if RANK[isa] > RANK[CAPABILITY]:
        pytest.skip(f"this processor has no {isa}")
    if isa == torch.ops.fastmtl.cpu_isa():
        pytest.skip(f"{isa} is what all other tests run on already")
    names, subset, depth = ["test_ops.py", "test_eigh.py"], "not opcheck and not derivative", "--cover=1"
    if pytestconfig.getoption("--slow"):
        names, depth = [*names, "test_adversaries.py"], "--slow"
    files = [str(HERE / name) for name in names]
    status, output, reported = run({"FASTMTL_CPU": isa}, *files, "-k", subset, depth)
    assert reported == isa
    assert status == 0, output[-5000:]
    assert " passed" in output
    assert " skipped" not in output


@needs_extension
def test_the_best_instruction_set_is_chosen():
    if os.environ.get("FASTMTL_CPU"):
        assert torch.ops.fastmtl.cpu_isa() == os.environ["FASTMTL_CPU"]
    else:
        assert torch.ops.fastmtl.cpu_isa() == CAPABILITY


def test_without_the_extension_the_reference_runs():
    """FASTMTL_NO_EXT=1 is what an installation without a compiler is: everything works, slowly."""
    status, output, reported = run(
        {"FASTMTL_NO_EXT": "1"},
        str(ROOT / "tests" / "methods" / "test_aligned.py"),
        "-k",
        "dependent or rows or out or public",
    )
    assert reported == "none"
    assert status == 0, output[-5000:]
    assert " passed" in output

"""Errors of the CUDA runtime are thrown where they come from and taken from the runtime: csrc/cuda/platform.h."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import build

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


def test_a_failed_launch_leaves_no_error_behind() -> None:
    flags = [f"-I{HERE / 'runtime'}", f"-I{CSRC}"]
    done = subprocess.run(build.program("plain", [HERE / "launch_errors.cpp"], flags), capture_output=True, text=True)
    assert done.stdout == "all hold\n", done.stdout + done.stderr
    assert done.returncode == 0


def test_every_call_of_the_runtime_is_checked() -> None:
    """By `check`, which takes the error: or it would be found by whoever looks next."""
    checked, others = set(), set()
    for path in [*CSRC.glob("cuda/*.*"), *CSRC.glob("ops/*cuda*")]:
        for before, call in re.findall(r"(\w+\()?\s*\b(cuda[A-Z]\w*)\(", path.read_text()):
            (checked if before == "check(" else others).add(call)
    assert {"cudaLaunchKernelEx", "cudaFuncSetAttribute", "cudaMemcpyAsync"} <= checked
    assert others == {"cudaGetLastError", "cudaGetErrorString"}  # of `check` itself

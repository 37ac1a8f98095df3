"""What a type checker tells users: misspelt choices are errors, and results have the types that they have."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A line with a comment is the error that it names; every other line is none.
USE = """
import torch
from torch import Tensor

import fastmtl

G = torch.randn(3, 5)
method = fastmtl.AlignedMTL(scale="median", rank_rule="gram")
one: Tensor = method(G)
wrong: int = method(G)  # assignment
several: list[Tensor | None] = method([[G[0], None], [G[1], G[2]]])
info: fastmtl.Info = method.backward([G.sum(), G.sum()])
rank: Tensor | None = info.rank
eigenvalues, eigenvectors = fastmtl.eigh(G @ G.T)
eigenvalues.sum()

fastmtl.AlignedMTL(scale="mni")  # arg-type
fastmtl.AlignedMTL(rank_rule="norm")  # arg-type
fastmtl.AlignedMTL(weigths="mean")  # call-arg
fastmtl.MGDA(normalization="l3")  # arg-type
fastmtl.CAGrad(c="large")  # arg-type
method.backward([G.sum()], engine="fast")  # arg-type
fastmtl.fan_out(G, 3, metod=method)  # call-arg
fastmtl.ops.mgda(G, 1)  # call-arg
"""


def test_a_use_of_the_library(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "use.py").write_text(USE)
    # In the checkout, whose cache has read torch already.
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "use.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"use\.py:(\d+): error: .*\[(\S+)\]$", done.stdout, re.MULTILINE)
    expected = [(str(n), line.partition("  # ")[2]) for n, line in enumerate(USE.splitlines(), 1) if "  # " in line]
    assert found == expected, done.stdout + done.stderr

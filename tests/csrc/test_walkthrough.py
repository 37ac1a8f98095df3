"""CONTRIBUTING.md's walk-through of a new solver does what it says: its lines, in a copy, build and compute."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import HEADERS, NO_HEADERS

ROOT = Path(__file__).resolve().parents[2]
F64 = torch.float64

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").is_dir() or os.environ.get("FASTMTL_NO_EXT", "0") not in ("", "0"),
    reason="nothing is compiled here",
)


def walkthrough():
    """{file: its lines} of the patch."""
    (patch,) = re.findall(r"^```patch\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    files = re.split(r"^\+\+\+ (\S+)\n", patch, flags=re.MULTILINE)[1:]
    return {file: lines.splitlines(keepends=True) for file, lines in zip(files[::2], files[1::2], strict=True)}


def applied(lines, text):
    """`text` with the lines that begin with a plus, beside those that begin with a space; @@ parts such places."""
    for part in re.split(r"^@@\n", "".join(lines), flags=re.MULTILINE):
        before = re.sub(r"^\+.*\n", "", part, flags=re.MULTILINE)
        before, after = (re.sub(r"^.", "", x, flags=re.MULTILINE) for x in (before, part))
        assert text.count(before) == 1, f"no single place like {before!r}"
        text = text.replace(before, after)
    return text


@pytest.fixture
def tree(tmp_path):
    """A copy of what is built, with the lines of the walk-through in it."""
    for folder in ("csrc", "fastmtl", "tests/emulation"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unwanted)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, tmp_path)
    for file, lines in walkthrough().items():
        path = tmp_path / file
        path.write_text(applied(lines, path.read_text()) if path.exists() else "".join(x[1:] for x in lines))
    return tmp_path


def matrices():
    """Gram matrices [4, 5, 5], the last of which is not finite, and their weights by the plain formula."""
    G = torch.randn(4, 5, 20, dtype=F64) * torch.tensor([1.0, 1e-3, 1e3, 1.0], dtype=F64)[:, None, None]
    M = G @ G.mT
    M[3, 1, 2] = torch.nan
    expected = torch.softmax(-M.diagonal(dim1=-2, dim2=-1), -1)
    expected[3] = torch.nan
    return M, expected


def same(alpha, expected):
    return torch.allclose(alpha, expected, rtol=1e-12, atol=1e-300, equal_nan=True)


def test_it_is_short():
    files = walkthrough()
    assert len(files) <= 3
    assert sum(line.startswith("+") for lines in files.values() for line in lines) < 40


DRIVER = r"""
#include <cstdio>
#include "math/solvers.h"
int main() {
  using namespace fastmtl;
  double M[MATRIX], v[TASKS], scratch[10000];
  for (double& x : M) {
    if (scanf("%lf", &x) != 1) return 1;
  }
  for_each_solver([&]<class Method>(std::type_identity<Method>) {
    if constexpr (std::is_same_v<Method, SoftmaxDiagonal>) {
      Method{}(Serial{}, M, TASKS, Problem{0, 0}, v, scratch);
    }
  });
  for (double x : v) printf("%.17g\n", x);
}
"""


def test_for_a_thread(tree):
    """The functor as a CPU runs it, as it is found in the list of solvers."""
    M, expected = matrices()
    (tree / "driver.cpp").write_text(DRIVER)
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-DTASKS=5", "-DMATRIX=25", "-Icsrc", "driver.cpp"]
    subprocess.run(command, cwd=tree, check=True)
    numbers = "\n".join(map(repr, M[1].flatten().tolist()))
    run = subprocess.run([tree / "a.out"], input=numbers, capture_output=True, text=True, check=True)
    assert same(torch.tensor([float(x) for x in run.stdout.split()], dtype=F64), expected[1])


@pytest.mark.skipif(not HEADERS, reason=NO_HEADERS)
def test_for_a_warp(tree):
    """The CUDA kernel of the registered solver, on the host."""
    pytest.importorskip("pybind11")
    spec = importlib.util.spec_from_file_location("build_walkthrough", tree / "tests" / "emulation" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.MODES = {"plain": ["-O0"]}
    program = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import build
module = build.load(sys.argv[2])
M = torch.load(sys.argv[3])
alpha = torch.empty(M.shape[:-1], dtype=torch.float64)
module.softmax_diagonal(module.Session(False, 1 << 16), M.data_ptr(), len(M), M.shape[-1], alpha.data_ptr(), 0)
torch.save(alpha, sys.argv[3])
"""
    M, expected = matrices()
    torch.save(M, tree / "numbers")
    made = build.build("plain", tree / "tests" / "emulation" / "weights.cpp")
    # A process of its own: a module of this name may be loaded here.
    command = [sys.executable, "-c", program, tree / "tests" / "emulation", made, tree / "numbers"]
    subprocess.run(command, check=True)
    assert same(torch.load(tree / "numbers"), expected)


@pytest.mark.slow
def test_as_an_op(tree):
    """All of it, built by setup.py: the op on the CPU, its fake, its errors."""
    environment = {**os.environ, "FASTMTL_CUDA": "0", "PYTHONPATH": str(tree)}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    program = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import fastmtl
op = torch.ops.fastmtl.softmax_diagonal
M = torch.load(sys.argv[1])
assert op(M.to("meta")).shape == M.shape[:-1]
try:
    op(M[0, 0])
except RuntimeError as error:
    assert str(error).startswith("M: expected"), error
else:
    raise AssertionError("no error")
torch.save(op(M), sys.argv[1])
"""
    M, expected = matrices()
    torch.save(M, tree / "numbers")
    command = [sys.executable, "-c", program, tree / "numbers"]
    subprocess.run(command, cwd=tree, env=environment, check=True)
    assert same(torch.load(tree / "numbers"), expected)

"""setup.py says what it builds and why not, and fails with a way out where it cannot build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests run without the source tree")


# With it, `setup.py` is run as on another system; what it imports was already imported here.
ELSEWHERE = """
import runpy, sys
import setuptools, torch.utils.cpp_extension

sys.platform, sys.argv = sys.argv[1], ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def run(*command, path=None, **switches):
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTMTL_") and k not in ("CXX", "CUDA_HOME")}
    env.update(switches)
    if path is not None:
        env["PATH"] = str(path)
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def setup(**switches):
    """`setup.py --version` takes every decision of a build and builds nothing."""
    return run("setup.py", "--version", **switches)


def test_without_kernels_on_request():
    result = setup(FASTMTL_NO_EXT="1")
    assert result.returncode == 0, result.stderr
    assert "no kernels built: FASTMTL_NO_EXT=1" in result.stderr


def test_without_cuda_on_request():
    result = setup(FASTMTL_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "CPU kernels built" in result.stderr
    assert "CUDA kernels not built: FASTMTL_CUDA=0" in result.stderr


def test_auto_says_what_it_decided_about_cuda():
    result = setup(FASTMTL_CUDA="auto")
    assert result.returncode == 0, result.stderr
    assert "CUDA kernels not built: " in result.stderr or "CUDA kernels built with " in result.stderr


def test_cuda_on_demand_fails_where_it_cannot_be_built():
    decided = setup(FASTMTL_CUDA="auto").stderr
    result = setup(FASTMTL_CUDA="1")
    if "CUDA kernels not built: " in decided:
        assert result.returncode != 0
        assert "FASTMTL_CUDA=1, but " in result.stderr
    else:
        assert result.returncode == 0, result.stderr


def test_an_unknown_switch_is_named():
    result = setup(FASTMTL_CUDA="maybe")
    assert result.returncode != 0
    assert "FASTMTL_CUDA: expected 0, 1 or auto, got 'maybe'" in result.stderr


def test_no_compiler_names_the_ways_out(tmp_path):
    result = setup(path=tmp_path, FASTMTL_CUDA="0")
    assert result.returncode != 0
    assert "no C++ compiler found" in result.stderr
    assert "FASTMTL_NO_EXT=1" in result.stderr


def test_no_compiler_is_needed_without_kernels(tmp_path):
    result = setup(path=tmp_path, FASTMTL_NO_EXT="1")
    assert result.returncode == 0, result.stderr


def test_pip_shows_that_there_is_no_compiler(tmp_path):
    """Without its -v too: of all that a build prints, pip shows what a failed one printed."""
    wheel = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT))
    result = run(*wheel, path=tmp_path, FASTMTL_CUDA="0")
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert "no C++ compiler found (looked for 'c++' and 'g++')" in said
    assert "FASTMTL_NO_EXT=1" in said
    assert "Traceback" not in said


def test_no_torch_names_the_ways_out():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['--version']; runpy.run_path('setup.py')"
    result = run("-c", code)
    assert result.returncode != 0
    assert "Building fastmtl needs torch" in result.stderr
    assert "--no-build-isolation" in result.stderr
    assert "FASTMTL_NO_EXT=1" in result.stderr


def test_windows_gets_the_reference():
    result = run("-c", ELSEWHERE, "win32")
    assert result.returncode == 0, result.stderr
    assert "no kernels built: on Windows torch builds with MSVC" in result.stderr
    assert "the ops run on their pure PyTorch reference" in result.stderr


def test_windows_has_no_cuda_kernels_on_demand_either():
    result = run("-c", ELSEWHERE, "win32", FASTMTL_CUDA="1")
    assert result.returncode != 0
    assert "FASTMTL_CUDA=1, but the kernels cannot be built on Windows" in result.stderr


def test_macos_gets_kernels():
    result = run("-c", ELSEWHERE, "darwin", FASTMTL_CUDA="auto")
    assert result.returncode == 0, result.stderr
    assert "fastmtl: CPU kernels built" in result.stderr

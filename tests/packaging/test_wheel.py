"""The wheel as its users get it: built in isolation from the sdist, and tested where nothing else of this project is.

Built with one torch, it runs on an older one. `make wheel` sets two environment variables: FASTMTL_DIST, a folder with
the sdist and the wheel, which are built here without it, and FASTMTL_WHEEL_RUNS_ON, the older torch. `make wheel-cuda`
sets FASTMTL_CUDA_WHEEL, the wheel that has CUDA kernels, too; nothing else builds one, which takes half an hour.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from artefacts import (
    LIBRARIES,
    LIBRARIES_CUDA,
    ROOT,
    build,
    foreign_symbols,
    found,
    libraries,
    modules,
    newest_versions,
    wheel_files,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="wheels are built on Linux only so far"),
]

CUDA_WHEEL = os.environ.get("FASTMTL_CUDA_WHEEL")
OLDER = os.environ.get("FASTMTL_WHEEL_RUNS_ON", "2.13.0")
# All that calls an op.
TESTS = """
    test_aligned test_backward test_closed test_conflicts test_determinism test_eigh test_errors test_fan_out
    test_graddrop test_isa test_mgda test_nash test_ops test_philox test_qp test_reference test_traps
"""
TESTED_WITH = ("pytest", "pytest-xdist", "hypothesis", "scipy", "mpmath")


def clean(**variables):
    """The environment without what could lead to this checkout or change what is built."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("FASTMTL_", "PYTHON", "PYTEST_"))} | variables


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if "FASTMTL_DIST" in os.environ:
        return found(ROOT / os.environ["FASTMTL_DIST"])[1]
    newer = torch.__version__.partition("+")[0]
    assert newer != OLDER, "FASTMTL_WHEEL_RUNS_ON: expected another torch than the one that the wheel is built with"
    folder = tmp_path_factory.mktemp("dist")
    constraint = folder / "constraint.txt"
    constraint.write_text(f"torch=={newer}\n")
    return build(folder, env=clean(FASTMTL_CUDA="0", PIP_CONSTRAINT=str(constraint)))[1]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `python` of an environment with the older torch, the wheel and what its tests import."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", f"torch=={OLDER}", wheel, *TESTED_WITH]
    subprocess.run(command, cwd=folder, env=clean(), check=True)
    yield python
    shutil.rmtree(folder)  # pytest would keep it: a gigabyte, of a CUDA build five


def run(python, *arguments, cwd):
    return subprocess.run([python, *arguments], cwd=cwd, env=clean(), capture_output=True, text=True, check=False)


def test_the_name_says_where_it_runs(wheel):
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"-cp310-abi3-{platform}.whl")


def test_its_files(wheel):
    files = wheel_files(wheel)
    kernels = files["fastmtl/_C.so"]
    print(f"\n{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB; unpacked, the kernels are {kernels / 1e6:.2f} MB")
    assert {name for name in files if ".dist-info/" not in name} == modules() | {"fastmtl/py.typed", "fastmtl/_C.so"}
    assert {"LICENSE", "NOTICE"} == {Path(name).name for name in files if "/licenses/" in name}
    assert wheel.stat().st_size < 2_000_000


def test_what_is_loaded_is_the_wheel_on_the_older_torch(installed, tmp_path):
    done = run(installed, "-m", "fastmtl", "info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    print("", done.stdout, sep="\n")
    said = dict(line.split(maxsplit=1) for line in done.stdout.replace("CPU ", "CPU-").splitlines())
    assert said["torch"].partition("+")[0] == OLDER
    site = installed.parents[1] / "lib"
    assert str(site) in said["fastmtl"]
    assert said["CPU-kernels"].startswith(str(site))
    assert "reference" not in said["CPU-ISA"]


def test_its_kernels_need_only_the_stable_abi(installed):
    (binary,) = installed.parents[1].rglob("fastmtl/_C.so")
    print("", newest_versions(binary))
    assert foreign_symbols(binary) == []
    assert libraries(binary) <= LIBRARIES


def test_the_op_tests_pass_on_the_older_torch(installed, tmp_path):
    copy = tmp_path / "tests"
    shutil.copytree(ROOT / "tests", copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)  # pytest's settings
    files = [str(path) for name in TESTS.split() for path in copy.rglob(f"{name}.py")]
    assert len(files) == len(TESTS.split())
    parallel = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
    done = run(installed, "-m", "pytest", "-q", "-rs", *parallel, *files, cwd=tmp_path)
    print("", done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout
    assert "the extension is not built" not in done.stdout


@pytest.mark.skipif(CUDA_WHEEL is None, reason="make wheel-cuda builds it and runs this")
def test_the_wheel_with_cuda_kernels(tmp_path):
    (wheel,) = ROOT.glob(str(CUDA_WHEEL))
    major = str(torch.version.cuda).partition(".")[0]
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"+cu{major}-cp310-abi3-{platform}.whl")
    files = wheel_files(wheel)
    kernels = {name: files[f"fastmtl/{name}.so"] for name in ("_C", "_C_cuda")}
    print(f"\n{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB; unpacked, the kernels are {kernels}")
    library = {name for name in files if ".dist-info/" not in name}
    assert library == modules() | {"fastmtl/py.typed", *(f"fastmtl/{name}.so" for name in kernels)}
    # Before this checkout on the path, and with its torch: a second one would take five gigabytes.
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(install, env=clean(), check=True)
    code = "import fastmtl, sys; print(fastmtl.ops.EXTENSIONS['_C_cuda']); print(fastmtl.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=clean(PYTHONPATH=str(site)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [str(site / "fastmtl" / "_C_cuda.so"), str(site / "fastmtl" / "__init__.py")]
    assert foreign_symbols(site / "fastmtl" / "_C_cuda.so") == []
    assert libraries(site / "fastmtl" / "_C_cuda.so") <= LIBRARIES | LIBRARIES_CUDA

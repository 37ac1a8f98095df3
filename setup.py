"""Builds csrc/ with torch's extension tools; see README.md for the switches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

CPU_SOURCES = sorted(str(p) for p in Path("csrc").rglob("*.cpp"))
CUDA_SOURCES = sorted(str(p) for p in Path("csrc").rglob("*.cu"))
# The oldest torch whose stable ABI has what the ops use: the object then runs on it and on every later one.
TARGET = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Every architecture of the kernels' design, for build machines without a GPU (torch would look for one).
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def say(message: str) -> None:
    """Goes past setuptools' own logging: what was decided is always seen."""
    print(f"fastmtl: {message}", file=sys.stderr, flush=True)


def find_toolkit() -> None:
    """Sets CUDA_HOME where it is not: torch takes the folder above the `nvcc` on PATH, which may be a wrapper."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc") is None:
        return
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    if top := re.search(r"TOP=(.*)", said):
        os.environ["CUDA_HOME"] = str(Path(top[1].strip()).resolve())


def wants_cuda() -> bool:
    """FASTMTL_CUDA=0|1|auto: auto builds where torch is a CUDA build and there is a toolkit (a GPU is not needed)."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = os.environ.get("FASTMTL_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"FASTMTL_CUDA: expected 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        say("CUDA kernels not built: FASTMTL_CUDA=0")
        return False
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is not a CUDA build")
    if CUDA_HOME is None:
        missing.append("no CUDA toolkit found (set CUDA_HOME)")
    if not missing:
        say(f"CUDA kernels built with {CUDA_HOME} for torch's CUDA {torch.version.cuda}")
        return True
    if wanted == "1":
        raise SystemExit(f"FASTMTL_CUDA=1, but {'; '.join(missing)}")
    say(f"CUDA kernels not built: {'; '.join(missing)}")
    return False


def without_kernels() -> str | None:
    """Why this is an installation without compiled objects, None where they are built."""
    if os.environ.get("FASTMTL_NO_EXT", "0") not in ("", "0"):
        return "FASTMTL_NO_EXT=1"
    if sys.platform == "win32":
        if os.environ.get("FASTMTL_CUDA") == "1":
            raise SystemExit("FASTMTL_CUDA=1, but the kernels cannot be built on Windows")
        return "on Windows torch builds with MSVC, and they need the vector types of GCC and Clang"
    return None


def extensions() -> dict:
    """The arguments of `setup` that build the compiled objects, empty where none are."""
    if reason := without_kernels():
        say(f"no kernels built: {reason}; the ops run on their pure PyTorch reference, slowly")
        return {}
    find_toolkit()
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            f"Building fastmtl needs torch ({error}): pip install torch, then pip install --no-build-isolation . "
            "Or set FASTMTL_NO_EXT=1 to install without kernels."
        ) from error
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None and shutil.which("g++") is None:
        raise SystemExit(
            f"fastmtl: no C++ compiler found (looked for {compiler!r} and 'g++'): install GCC or Clang, point CXX "
            "at one, or set FASTMTL_NO_EXT=1 to install without kernels (the ops then run on their pure PyTorch "
            "reference, slowly)."
        )
    flags = ["-O3", "-std=c++20", "-g0", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized", *TARGET]
    modules = [CppExtension("fastmtl._C", CPU_SOURCES, extra_compile_args={"cxx": flags}, py_limited_api=True)]
    say("CPU kernels built: AVX-512, AVX2 (on x86-64) and portable code, chosen at run time")
    if wants_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        nvcc = ["-O3", "-std=c++20", "-DUSE_CUDA", *TARGET]
        modules.append(
            CUDAExtension(
                "fastmtl._C_cuda", CUDA_SOURCES, extra_compile_args={"cxx": flags, "nvcc": nvcc}, py_limited_api=True
            )
        )
    build = BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=True)
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    if local := os.environ.get("FASTMTL_LOCAL_VERSION"):  # 0.2.0+cu13: beside the wheel without CUDA kernels
        options["egg_info"] = {"tag_build": f"+{local}"}
    return {"ext_modules": modules, "cmdclass": {"build_ext": build}, "options": options}


setup(**extensions())

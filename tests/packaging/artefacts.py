"""What several tests ask of a wheel or a compiled object."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Beside the C++ and C libraries and libtorch itself, which is loaded before: no Python, no OpenMP, no BLAS of our own.
LIBRARIES = {"libc10", "libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}
LIBRARIES_CUDA = {"libtorch_cuda", "libcudart"}
# What a symbol may be versioned by: libraries that keep old versions for good; CUDA's runtime does for a major release.
VERSIONED = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|@libcudart\.so\.\d+$")
# PyTorch's stable C functions, which every later release keeps; weak ones that linkers add; and the C++ library's.
STABLE = re.compile(r"(aoti_torch_|torch_)\w+$|_ITM_\w+$|__gmon_start__$|__cxa_finalize$|std::")


def foreign_symbols(binary: Path) -> list[str]:
    """What the object takes from elsewhere though no release promises to keep it, such as libtorch's C++ functions."""
    listed = subprocess.run(["nm", "-DC", "--undefined-only", binary], capture_output=True, text=True, check=True)
    names = [line.split(maxsplit=1)[1] for line in listed.stdout.splitlines()]
    assert names, f"nm lists no symbol of {binary}"
    return [name for name in names if not VERSIONED.search(name) and not STABLE.match(name)]


def libraries(binary: Path) -> set[str]:
    """What it is linked to: libc10.so -> libc10."""
    listed = subprocess.run(["readelf", "-d", binary], capture_output=True, text=True, check=True).stdout
    return {name.partition(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", listed)}


def newest_versions(binary: Path) -> dict[str, str]:
    """The newest symbol version that it needs of each system library, which decides where it runs: GLIBC -> 2.34."""
    listed = subprocess.run(["readelf", "-V", binary], capture_output=True, text=True, check=True).stdout
    newest: dict[str, tuple[int, ...]] = {}
    for name, version in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", listed):
        newest[name] = max(newest.get(name, ()), tuple(int(part) for part in version.split(".")))
    return {name: ".".join(map(str, version)) for name, version in sorted(newest.items())}


def wheel_files(wheel: Path) -> dict[str, int]:
    """Path: size in bytes."""
    with zipfile.ZipFile(wheel) as opened:
        return {entry.filename: entry.file_size for entry in opened.infolist() if not entry.is_dir()}


def sdist_files(sdist: Path) -> dict[str, int]:
    """Path below the archive's one folder: size in bytes."""
    with tarfile.open(sdist) as opened:
        return {entry.name.partition("/")[2]: entry.size for entry in opened.getmembers() if entry.isfile()}


def modules() -> set[str]:
    """The library's Python files, as paths in a wheel."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / "fastmtl").rglob("*.py")}


def build(out: Path, *arguments: str, env: dict[str, str]) -> tuple[Path, Path]:
    """The sdist of this tree, and the wheel built from that sdist."""
    # Not in the checkout, whose *.egg-info would add what an earlier build saw there.
    tree = out / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    )
    done = subprocess.run(
        [sys.executable, "-m", "build", *arguments, "--outdir", out, tree],
        cwd=out,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return found(out)


def found(folder: Path) -> tuple[Path, Path]:
    """The one sdist and the one wheel in a folder."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel

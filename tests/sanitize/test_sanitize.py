"""The CPU kernels and solvers under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, in driver.cpp."""

from __future__ import annotations

import functools
import re
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "emulation"))

import build  # noqa: E402

CPU = ROOT / "csrc" / "cpu"
COMMON = [HERE / "driver.cpp", HERE / "dispatch.cpp"]
COMMON += sorted({*CPU.glob("*.cpp")} - {CPU / "dispatch.cpp"})
PORTABLE = [CPU / "isa" / "portable.cpp", HERE / "only_portable.cpp"]
EVERY = [CPU / "isa" / f"{name}.cpp" for name in ("avx512", "avx2", "portable")]
# Sums in float64 as in the plain loops; the warnings are about the compiler's own headers, as in setup.py.
FLAGS = ["-ffp-contract=off", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
# Checks for null take half of the compile time, and AddressSanitizer reports what they would.
FLAGS += ["-fno-sanitize=null", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
ISAS = ["portable", "avx2", "avx512"]

# An access that begins within the buffer is an "unknown-crash".
OUTSIDE = "AddressSanitizer: (use-after-poison|unknown-crash).*"
# A store past the cache is not instrumented, but for the portable kernels, which have none.
DEFECTS = {
    "short row in gram": ("address", f"{OUTSIDE}gram.h"),
    "short row in packed gram": ("address", f"{OUTSIDE}gram.h"),
    "short row in sign_drop": ("address", f"{OUTSIDE}sign_drop.h"),
    "short result of combine": ("address", f"{OUTSIDE}combine.h"),
    "short result of combine past the cache": ("address", f"written 252 bytes from the start|{OUTSIDE}combine.h"),
    "short scratch": ("address", f"{OUTSIDE}eigh.h"),
    "scratch within scratch": ("address", f"{OUTSIDE}driver.cpp"),
    "misaligned scratch": ("address", "eigh.h.*misaligned address"),
    "scratch of all threads": ("thread", "ThreadSanitizer: data race.*gram.h"),
    "one result for all threads": ("thread", "ThreadSanitizer: data race.*combine.h"),
}


@functools.cache
def driver(mode: str, portable: bool) -> Path:
    if shutil.which(build.COMPILER) is None:
        raise RuntimeError(f"the sanitized kernels need a C++20 compiler: {build.COMPILER} not found")
    if portable:  # in half of the time: without the checks for undefined behaviour
        return build.program(mode, COMMON + PORTABLE, [*FLAGS, "-fno-sanitize=undefined"])
    return build.program(mode, COMMON + EVERY, FLAGS)


def run(mode: str, isa: str, *arguments: str, portable: bool = False) -> CompletedProcess[str]:
    path = driver(mode, portable)
    named = build.run_program(mode, path, ["name"], "name", FASTMTL_CPU=isa)
    assert named.returncode == 0, named.stdout + named.stderr
    if named.stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}: it runs {named.stdout.strip()}")
    return build.run_program(mode, path, arguments, "name", timeout=1800, FASTMTL_CPU=isa)


def check_clean(result: CompletedProcess[str], isa: str, cases: int) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    held = re.fullmatch(rf"{isa}: (\d+) cases hold\n", result.stdout)
    assert held, result.stdout
    assert int(held[1]) >= cases


def test_portable_kernels() -> None:
    """What a run of all tests can afford: few cases and one instruction set under AddressSanitizer."""
    check_clean(run("address", "portable", "quick", portable=True), "portable", 1000)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_every_case(mode: str, isa: str) -> None:
    """Every instruction set that this processor has, with 1, 2 and 8 threads."""
    check_clean(run(mode, isa, "full"), isa, 5000)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name: str, isa: str) -> None:
    mode, report = DEFECTS[name]
    result = run(mode, isa, "defect", name)
    assert result.returncode, result.stdout
    assert re.search(report, result.stdout + result.stderr, re.DOTALL), result.stdout + result.stderr

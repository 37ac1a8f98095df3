"""Compile a C++ file that includes host_cuda.h into a Python module, or files into a program, and run it sanitized."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "emulation"
COMPILER = os.environ.get("CXX", "g++")

FLAGS = ["-x", "c++", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
# Without contraction a result does not depend on the mode; kernels ask for fma where they want it.
FLAGS += ["-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-DFASTMTL_EMULATE"]
# Lines of reports are all that debug information is for: -g takes a third longer.
MODES = {
    "plain": ["-O2"],
    "address": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}
# What a sanitizer needs at run time. Libraries that were there before Python started, or the sanitizer misses calls;
# the C++ one because the sanitizers look up its functions for exceptions at the start.
PRELOAD = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}
OPTIONS = {
    # Python itself leaks on purpose, and allocates from pools of its own unless told otherwise.
    "PYTHONMALLOC": "malloc",
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def include_dirs() -> tuple[list[Path], list[Path]]:
    """The project's include directories, and those of others."""
    import pybind11

    torch = importlib.util.find_spec("torch")  # found, not imported: that takes seconds
    assert torch is not None
    assert torch.origin is not None
    others = [Path(pybind11.get_include()), Path(sysconfig.get_path("include")), Path(torch.origin).parent / "include"]
    return [ROOT / "csrc", HERE], others


@functools.cache
def _key(command: tuple[str, ...]) -> str:
    """A hash of all that the module is made from: the project's files that it includes, the command and versions."""
    versions = [sys.version, *(importlib.metadata.version(name) for name in ("pybind11", "torch"))]
    versions.append(subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout)
    digest = hashlib.sha256("\0".join([*command, *versions]).encode())
    # Objects, which are linked, have the hash of what they are made from in their names.
    rule = "" if command[-1].endswith(".o") else _compile([*command, "-MM"])
    for path in rule.replace("\\\n", " ").partition(":")[2].split():  # target: file file ...
        digest.update(f"\0{path}\0".encode() + Path(path).read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\nfailed:\n{result.stdout}{result.stderr}")
    return result.stdout


def build(mode: str, source: str | Path = HERE / "toys.cpp", defines: Iterable[str] = ()) -> Path:
    """Compile `source`, unless that was done before, and return the path of the Python module.

    Args:
        mode: "plain", "address" (with the undefined-behaviour sanitizer) or "thread".
        source: a file with PYBIND11_MODULE(name, ...), where name is the file's without its suffix.
        defines: macros to define, as NAME or NAME=VALUE.
    """
    source = Path(source).resolve()
    ours, others = include_dirs()
    command = [COMPILER, *FLAGS, *MODES[mode], *(f"-D{define}" for define in defines)]
    command += [f"-I{path}" for path in ours]
    for path in others:
        command += ["-isystem", str(path)]
    return _made([*command, str(source)], mode, source.stem, sysconfig.get_config_var("EXT_SUFFIX"))


def _made(command: Sequence[str], mode: str, stem: str, suffix: str) -> Path:
    """What `command` writes, which names its inputs last; from an earlier run if none of them has changed."""
    folder = CACHE / f"{stem}-{mode}-{_key(tuple(command))}"
    made = folder / f"{stem}{suffix}"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who wants the same waits for it, as files of tests do that run side by side
        if not made.exists():
            output = Path(scratch) / made.name
            _compile([*command, "-o", str(output)])
            output.replace(made)
    return made


def program(mode: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """Compile `sources`, two at a time, unless that was done before, and return the path of the program.

    Args:
        mode: as for `build`.
        sources: C++ files, the first of which names the program.
        flags: of the compiler, on top of the mode's.
    """
    command = [COMPILER, "-std=c++20", "-Wall", *MODES[mode], *flags]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        objects = pool.map(lambda source: _made([*command, "-c", str(source)], mode, source.stem, ".o"), sources)
        inputs = [str(path) for path in objects]
    return _made([COMPILER, *MODES[mode], "-pthread", *inputs], mode, sources[0].stem, "")


def load(path: str | Path) -> ModuleType:
    """Import the module that `build` returned; one built for a sanitizer only inside of `run`."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _prefix(mode: str) -> tuple[str, ...]:
    """The command that starts Python with the sanitizer of `mode`."""
    if mode == "plain":
        return ()
    libraries = []
    for name in PRELOAD[mode]:
        found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = found.stdout.strip()
        if not os.path.isabs(path):
            raise RuntimeError(f"{COMPILER} has no {name}")
        libraries.append(os.path.realpath(path))
    return _starting(mode, ("env", f"LD_PRELOAD={' '.join(libraries)}"), (sys.executable, "-c", ""))


def _starting(mode: str, prefix: tuple[str, ...], program: tuple[str, ...]) -> tuple[str, ...]:
    """`prefix`, with more before it where `program` does not start without, which does nothing more than that."""
    # A sanitizer wants parts of the address space that a kernel may give to others at random.
    fixed = ("setarch", platform.machine(), "-R", *prefix)
    output = ""
    for attempt in (prefix, fixed) if shutil.which("setarch") else (prefix,):
        command, environment = [*attempt, *program], {**os.environ, **OPTIONS}
        # Three times: it is a matter of chance.
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(3)]
        if not any(run.returncode for run in runs):
            return attempt
        output += "".join(run.stderr for run in runs)
    raise RuntimeError(f"{program[0]} does not start under the {mode} sanitizer:\n{output}")


@functools.cache
def _program_prefix(mode: str, path: Path, idle: str) -> tuple[str, ...]:
    return _starting(mode, (), (str(path), idle))


def run(mode: str, script_args: Sequence[str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run Python with the arguments `script_args` under the sanitizer of `mode`.

    There, too, `from emulation import build` finds `load`. The process ends with code 66 on a report.
    """
    path = os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))
    command = [*_prefix(mode), sys.executable, *script_args]
    environment = {**os.environ, **OPTIONS, "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def run_program(
    mode: str, path: Path, arguments: Sequence[str], idle: str, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the program at `path` that was built for `mode`; with the argument `idle` it does nothing of importance."""
    command = [*_program_prefix(mode, path, idle), str(path), *arguments]
    everything = {**os.environ, **OPTIONS, **environment}
    return subprocess.run(command, env=everything, capture_output=True, text=True, timeout=timeout)

"""Command line: `python -m fastmtl info` says what is built, `methods` what there is, `scaling` how it grows."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fastmtl
from fastmtl import catalog
from fastmtl.scaling import command as scaling

__all__ = ["info", "main"]

_FOLDER = Path(fastmtl.__file__).parent


def info() -> dict[str, str]:
    """Versions, machine, and which kernels are in use, or why not; needs torch only."""
    return {
        "fastmtl": f"{fastmtl.__version__} ({_FOLDER})",
        "torch": torch.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "CPU ISA": _isa(),
        "CPU kernels": _kernels("_C", "not built: pip install . needs GCC or Clang, and FASTMTL_NO_EXT unset"),
        "CUDA": _cuda(),
        "CUDA kernels": _kernels(
            "_C_cuda",
            "not built, or switched off by FASTMTL_CUDA=0: FASTMTL_CUDA=1 pip install . builds them or says what is "
            "missing",
        ),
    }


def _isa() -> str:
    if fastmtl.ops.EXTENSIONS["_C"] is None or not hasattr(torch.ops.fastmtl, "cpu_isa"):
        return "reference (pure PyTorch)"
    forced = os.environ.get("FASTMTL_CPU")
    return str(torch.ops.fastmtl.cpu_isa()) + (f" (FASTMTL_CPU={forced})" if forced else "")


def _kernels(name: str, otherwise: str) -> str:
    loaded = fastmtl.ops.EXTENSIONS[name]
    if loaded is not None:
        return loaded
    switch = os.environ.get("FASTMTL_NO_EXT", "0")
    if switch not in ("", "0"):
        return f"not loaded: FASTMTL_NO_EXT={switch}"
    if name == "_C_cuda" and torch.version.cuda is None:
        return "not loaded: torch is not a CUDA build"
    if name == "_C" and _FOLDER.with_name("setup.py").exists():
        return "not built in this checkout, whose fastmtl/ hides an installed one: start Python in another folder"
    return otherwise


def _cuda() -> str:
    if torch.version.cuda is None:
        return "none: torch is not a CUDA build"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU visible"
    return f"torch built for CUDA {torch.version.cuda}, {device}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastmtl", description=fastmtl.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, instruction set and kernels in use")
    listed = commands.add_parser("methods", help="list every method: paper, needs, state, options, names elsewhere")
    listed.add_argument("--markdown", action="store_true", help="as the table of docs/methods.md")
    swept = commands.add_parser("scaling", help="how time, memory and accuracy grow with tasks and parameters")
    scaling.add_options(swept)
    options = parser.parse_args(arguments)
    if options.command == "info":
        for name, value in info().items():
            print(f"{name:<13}{value}")
        return 0
    if options.command == "methods":
        print(catalog.table(options.markdown))
        return 0
    return scaling.run(options, swept.error)


if __name__ == "__main__":
    raise SystemExit(main())

"""What results depend on: the machine and the code."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastmtl
from fastmtl import ops

__all__ = ["commit", "git", "machine"]


def machine(device: str = "cpu") -> dict[str, Any]:
    """What results depend on: processors, instruction set, versions and kernels in use."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "isa": torch.ops.fastmtl.cpu_isa() if hasattr(torch.ops.fastmtl, "cpu_isa") else None,
        "extensions": [name for name, where in ops.EXTENSIONS.items() if where],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastmtl": fastmtl.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str | None:
    """The commit of a checkout, with "-dirty" if the code differs from it; None for an installed package."""
    if not git("ls-files", "__init__.py"):  # perhaps within another project's repository
        return None
    changed = git("status", "--porcelain", "--", ".", "../csrc", "../setup.py")
    return f"{git('rev-parse', 'HEAD')}{'-dirty' if changed else ''}"


def git(*arguments: str) -> str:
    """Git's output in the package's folder; empty if it fails."""
    command = ["git", "-C", str(Path(fastmtl.__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""

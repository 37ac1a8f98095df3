"""The op layer: what each op computes and accepts, its derivative, and the kernels where they are built.

Every op has one contract (`fastmtl.ops.contracts`, which is also its fake) and three implementations:
`fastmtl.ops.reference` (registered for every device, so that the library works where nothing is compiled), the CPU
kernels of `csrc/cpu`, and the CUDA kernels of `csrc/cuda`. The compiled objects only add implementations for their
device, so loading them is all it takes.

All implementations check their arguments alike and raise RuntimeError. Only `gram` has a derivative; arguments that are
written to are marked so for autograd.
"""

from __future__ import annotations

from fastmtl.ops import contracts, derivatives
from fastmtl.ops.contracts import *  # noqa: F403
from fastmtl.ops.registry import load_kernels

__all__ = ["EXTENSIONS", *contracts.__all__]

derivatives.register()
EXTENSIONS: dict[str, str | None] = load_kernels()

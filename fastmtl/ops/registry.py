"""How ops are registered with torch, and where their kernels come from."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import library

from fastmtl.ops import reference

__all__ = ["CONTRACTS", "define", "load_kernels"]

Contract = TypeVar("Contract", bound=Callable[..., Any])

CONTRACTS: dict[str, Callable[..., Any]] = {}

_library = library.Library("fastmtl", "DEF")


def define(schema: str) -> Callable[[Contract], Contract]:
    """Defines an op by its contract: a function that checks the arguments and returns empty results.

    Tracing runs the contract. The function of the same name in `fastmtl.ops.reference` is the default implementation,
    behind the same checks; the compiled objects register kernels for their device.

    Args:
        schema: arguments and results in torch's notation, without the name.

    Returns:
        A decorator that turns a contract into the op `torch.ops.fastmtl.….default`, with the same signature.
    """

    def register(contract: Contract) -> Contract:
        name = contract.__name__
        run = getattr(reference, name, None)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        if run is not None:  # every exported op has one; a solver under development has only kernels

            @functools.wraps(run)
            def checked(*args: Any) -> Any:
                contract(*args)
                return run(*args)

            # Not "CPU"/"CUDA": a kernel registered there by a compiled object must win over this one.
            _library.impl(name, checked, "CompositeExplicitAutograd")
        library.register_fake(f"fastmtl::{name}", contract)
        CONTRACTS[name] = contract
        op: Contract = getattr(torch.ops.fastmtl, name).default
        return op

    return register


def load_kernels() -> dict[str, str | None]:
    """Loads the compiled objects and returns the path of each, None for one that is not built or not wanted."""
    found: dict[str, str | None] = {"_C": None, "_C_cuda": None}
    if os.environ.get("FASTMTL_NO_EXT", "0") not in ("", "0"):
        return found
    for name in found:
        spec = importlib.util.find_spec(f"fastmtl.{name}")
        if spec is None or spec.origin is None or (name == "_C_cuda" and torch.version.cuda is None):
            continue
        torch.ops.load_library(spec.origin)
        found[name] = spec.origin
    return found

"""Which tensors a step is about: the shared parameters, their groups, the tensors of a representation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmtl.inputs import DTYPES, describe
from fastmtl.structure import tensors_of

__all__ = [
    "Heads",
    "Parameters",
    "are_plain",
    "check_plain",
    "checked_cut",
    "checked_groups",
    "checked_heads",
    "checked_parameters",
    "names_in",
]

Parameters: TypeAlias = "torch.nn.Module | Iterable[Tensor]"
Heads: TypeAlias = "bool | Iterable[Parameters]"
_PLAIN = (Tensor, torch.nn.Parameter)


def checked_parameters(given: Parameters, name: str = "shared") -> list[Tensor]:
    """The parameters of a module or an iterable that require grad, each once; frozen ones are skipped.

    Raises:
        TypeError: not an iterable, or an entry that is not a floating tensor.
        ValueError: an entry that is not a leaf, or none that requires grad.
    """
    if isinstance(given, torch.nn.Module):
        given = given.parameters()
    elif isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected a module or an iterable of parameters, got {describe(given)}")
    parameters: dict[int, Tensor] = {}  # some models list tied parameters twice
    frozen = 0
    for i, p in enumerate(given):
        if not isinstance(p, Tensor):
            hint = "; pass the module itself, or its parameters()" if isinstance(p, tuple) else ""
            raise TypeError(f"{name}[{i}]: expected a parameter (tensor), got {describe(p)}{hint}")
        if not p.is_leaf:
            raise ValueError(f"{name}[{i}]: expected a leaf tensor (a parameter), got an intermediate {describe(p)}")
        if not p.requires_grad:
            frozen += 1
            continue
        if p.dtype not in DTYPES:
            raise TypeError(f"{name}[{i}]: expected float32, float64, bfloat16 or float16, got {describe(p)}")
        parameters[id(p)] = p
    if not parameters:
        got = f"{frozen} frozen" if frozen else "none"
        raise ValueError(f"{name}: expected at least one parameter that requires grad, got {got}")
    return list(parameters.values())


def checked_groups(groups: Sequence[Parameters]) -> list[list[Tensor]]:
    """The parameters of each group.

    Raises:
        TypeError: not a sequence, or a group that `checked_parameters` refuses.
        ValueError: no group, one without parameters, or a parameter in two groups.
    """
    if isinstance(groups, Tensor) or not isinstance(groups, (list, tuple)):
        raise TypeError(f"groups: expected a sequence of groups of parameters, got {describe(groups)}")
    if not groups:
        raise ValueError("groups: expected at least one group, got none")
    parts = [checked_parameters(group, f"groups[{n}]") for n, group in enumerate(groups)]
    seen: dict[int, int] = {}
    for n, part in enumerate(parts):
        for p in part:
            if id(p) in seen:
                raise ValueError(
                    f"groups[{n}]: expected parameters of no other group, got one of groups[{seen[id(p)]}]"
                )
            seen[id(p)] = n
    return parts


def checked_heads(heads: Heads, T: int) -> tuple[bool, list[list[Tensor]] | None]:
    """Whether heads' gradients are multiplied by their task weights, and the heads' parameters, if given.

    Raises:
        TypeError: neither a bool nor heads, or a head that `checked_parameters` refuses.
        ValueError: not T heads, or one without parameters.
    """
    if isinstance(heads, bool):
        return heads, None
    if isinstance(heads, Tensor) or not isinstance(heads, Iterable):
        raise TypeError(f"scale_heads: expected a bool, or a head for each task, got {describe(heads)}")
    parts = [checked_parameters(head, f"scale_heads[{t}]") for t, head in enumerate(heads)]
    if len(parts) != T:
        raise ValueError(f"scale_heads: expected a head for each of the {T} tasks, got {len(parts)}")
    return True, parts


def checked_cut(structure: Any, name: str) -> list[Tensor]:
    """The tensors of a representation that gradients pass through, each once.

    Raises:
        TypeError: one of them is not a floating tensor.
        ValueError: none requires grad.
    """
    cut: dict[int, Tensor] = {}
    for x in tensors_of(structure):
        if x.requires_grad:
            if x.dtype not in DTYPES:
                raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16 tensors, got {describe(x)}")
            cut[id(x)] = x
    if not cut:
        raise ValueError(
            f"{name}: expected a tensor (or a nested structure) that requires grad, got {describe(structure)}"
        )
    return list(cut.values())


def names_in(shared: object) -> dict[int, str]:
    """The parameters' names by id, if they come as a module."""
    return {id(p): name for name, p in shared.named_parameters()} if isinstance(shared, torch.nn.Module) else {}


def are_plain(parameters: Iterable[Tensor]) -> bool:
    """Whether none of them is of a tensor subclass, such as the shards of `fully_shard`."""
    return all(type(p) in _PLAIN for p in parameters)


def check_plain(parameters: Iterable[Tensor], option: str) -> None:
    """Raises ValueError if one of them is of a tensor subclass, which `option` does not support."""
    for p in parameters:
        if type(p) not in _PLAIN:
            raise ValueError(f"shared: expected plain parameters with {option}, got a {type(p).__name__}")

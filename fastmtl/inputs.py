"""What a user may pass as task gradients, checked in one place: messages name argument, expectation and what came."""

from __future__ import annotations

import bisect
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

__all__ = [
    "DTYPES",
    "EPS",
    "Row",
    "Rows",
    "check_apart",
    "check_gradient",
    "check_matrix",
    "check_outs",
    "check_rows",
    "check_tangent",
    "checked_out",
    "describe",
    "has_numbers",
    "nothing_for",
    "repeats",
    "requires_grad_outside",
    "transforming",
    "wrong_kind",
]

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
# How errors say what a gradient has to be; the kernels use the same words.
FLOATING = "expected float32, float64, bfloat16 or float16"
DENSE = "expected a dense (strided) tensor"

_REQUIRES_GRAD, _LAYOUT = operator.attrgetter("requires_grad"), operator.attrgetter("layout")
_IS_THERE = functools.partial(operator.is_not, None)

# The gradients of one task: K tensors, None where it has none.
Row: TypeAlias = "list[Tensor | None]"
# What users may give for T of them.
Rows: TypeAlias = "Sequence[Tensor | Sequence[Tensor | None] | None]"


def describe(value: object) -> str:
    """A value as error messages show it: a tensor by dtype, shape and device, anything else by its type."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f" {str(value.layout)[6:]}"
        return f"{str(value.dtype)[6:]}{layout} tensor of shape {list(value.shape)} on {value.device}"
    return type(value).__name__


def check_gradient(g: Tensor, name: str) -> None:
    """Raises unless `g` is a detached gradient that the kernels can read."""
    if (wrong := wrong_kind(g)) is not None:
        raise TypeError(f"{name}: {wrong}")
    _check_detached(g, name)


def _check_detached(g: Tensor, name: str) -> None:
    if g.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: has requires_grad=True, but the aggregation has no derivative; pass it detached")
    if transforming():
        _check_transformed(g, name)


def _check_overwritten(out: object, name: str) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(out)}")
    if out.layout is not torch.strided:
        raise TypeError(f"{name}: {DENSE}, got {describe(out)}")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: has requires_grad=True and would be overwritten without a derivative; detach it")


def wrong_kind(g: Tensor) -> str | None:
    """Why the kernels cannot read `g` as a gradient, for an error message; None if they can."""
    if g.layout is not torch.strided:
        return f"{DENSE}, got {describe(g)}; call .to_dense() first, or make the layer with sparse=False"
    return None if g.dtype in DTYPES else f"{FLOATING}, got {describe(g)}"


def transforming() -> bool:
    """Whether forward-mode derivatives or a transform of `torch.func` may have wrapped tensors."""
    if torch.compiler.is_compiling():  # the compiler itself refuses what it cannot trace
        return False
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


def has_numbers(x: Tensor) -> bool:
    """Whether the host can read these numbers at once: a plain CPU tensor, outside any trace or transform."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not transforming() and torch._C._len_torch_dispatch_stack() == 0


def check_tangent(x: Tensor, name: str, what: str) -> None:
    """Raises ValueError if `x` has a forward-mode tangent, which would be lost."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(f"{name}: has a forward-mode tangent, but {what} no derivative; pass it detached")


def _check_transformed(g: Tensor, name: str) -> None:
    check_tangent(g, name, "the aggregation has")
    wrappers = {"vmap": _functorch.is_batchedtensor, "functionalize": _functorch.is_functionaltensor}
    for transform, wraps in wrappers.items():
        if wraps(g):
            raise NotImplementedError(
                f"{name}: the aggregation does not work inside torch.func.{transform}, got {describe(g)}; "
                "a batch of gradients [B, T, P] is one call without it"
            )


def requires_grad_outside(x: Tensor) -> bool:
    """Whether `x` requires grad outside the current transform of `torch.func`, although inside it says no."""
    inner = x
    while _functorch.is_functorch_wrapped_tensor(inner):
        inner = _functorch.get_unwrapped(inner)
    return inner.requires_grad and not x.requires_grad


def check_matrix(G: Tensor) -> None:
    """Accepts [T, P] and [B, T, P] with T >= 1.

    Raises:
        TypeError: `G` is sparse or not of a floating dtype that the kernels read.
        ValueError: `G` has another number of dimensions, no task, requires grad or has a tangent.
        NotImplementedError: within `torch.func.vmap` or `functionalize`.
    """
    if transforming() or G.requires_grad or G.dtype not in DTYPES or G.layout is not torch.strided:
        check_gradient(G, "G")
    shape = G.shape
    if not 2 <= len(shape) <= 3:
        raise ValueError(f"G: expected shape [T, P] or [B, T, P], got {describe(G)}")
    if shape[-2] == 0:
        raise ValueError(f"G: expected at least one task (T >= 1), got {describe(G)}")


def repeats(x: Tensor) -> bool:
    """Whether elements share memory. Also true for strides so interleaved that it is hard to tell."""
    extent = 1
    for stride, n in sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride < extent:
            return bool(x.numel())
        extent += (n - 1) * stride
    return False


def check_apart(outs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Raises ValueError if a result overlaps a gradient or another result: one would overwrite the other."""
    if torch.compiler.is_compiling() or any(out.device.type == "meta" for out in outs):
        return
    for out in outs:
        out.data_ptr()  # asks for writable memory, which materialises a copy-on-write tensor
    results = [_extent(out) for out in outs]
    spans = sorted(_extent(g) for g in grads if g.numel())
    starts = [start for start, _ in spans]
    ends = list(itertools.accumulate((end for _, end in spans), max))  # the furthest end so far
    for k, (out, (start, end)) in enumerate(zip(outs, results, strict=True)):
        before = bisect.bisect_left(starts, end)
        if out.numel() and before and ends[before - 1] > start:
            name = "out" if len(outs) == 1 else f"out[{k}]"
            raise ValueError(f"{name}: expected memory that does not overlap the gradients, got {describe(out)} within")
    taken = sorted((*span, k) for k, span in enumerate(results) if outs[k].numel())
    for (_, end, j), (start, _, k) in itertools.pairwise(taken):
        if start < end:
            raise ValueError(f"out[{k}]: expected memory that does not overlap other results, got that of out[{j}]")


def _extent(x: Tensor) -> tuple[int, int]:
    """Where a tensor begins and ends in memory; data_ptr() would materialise a copy-on-write tensor."""
    begin = torch._C._data_address(x) + x.storage_offset() * x.element_size()  # type: ignore[attr-defined]
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (last + 1) * x.element_size()


def checked_out(G: Tensor, out: Tensor | None) -> Tensor:
    """The result's tensor for G [T, P] or [B, T, P]: `out` if it fits, a new one if there is none."""
    check_matrix(G)
    shape = torch.Size((*G.shape[:-2], G.shape[-1]))
    if out is None:
        return G.new_empty(shape)
    _check_overwritten(out, "out")
    if out.shape != shape or out.dtype is not G.dtype or out.device != G.device:
        expected = f"{str(G.dtype)[6:]} tensor of shape {list(shape)} on {G.device}"
        raise ValueError(f"out: expected a {expected}, got {describe(out)}")
    if not out.is_contiguous() and repeats(out):
        raise ValueError(f"out: expected a tensor without repeated elements, got strides {list(out.stride())}")
    check_apart([out], [G])
    return out


def check_rows(rows: Rows) -> tuple[list[Tensor | None], int]:
    """Flattens T rows of K gradients to the ops' list (entry t·K + k).

    The op that reads the gradients checks that they fit together; this checks what an op cannot see.

    Returns:
        The list of T·K tensors or Nones, and K.

    Raises:
        TypeError: rows or an entry of another kind.
        ValueError: no row, rows of different length, a gradient that requires grad or has a tangent.
        NotImplementedError: within `torch.func.vmap` or `functionalize`.
    """
    if not isinstance(rows, (list, tuple)):
        raise TypeError(f"rows: expected a [T, P] tensor or a sequence of T rows, got {describe(rows)}")
    if not rows:
        raise ValueError("rows: expected at least one task (T >= 1), got an empty sequence")
    lengths = {}
    for t, row in enumerate(rows):
        if isinstance(row, Tensor):
            lengths[t] = 1
        elif isinstance(row, (list, tuple)):
            lengths[t] = len(row)
        elif row is not None:
            raise TypeError(f"rows[{t}]: expected a tensor, a sequence of tensors or None, got {describe(row)}")
    first = next(iter(lengths), None)
    if first is None:
        raise ValueError(f"rows: expected a gradient in at least one of the {len(rows)} rows, got only None")
    K = lengths[first]
    for t, length in lengths.items():
        if length != K:
            raise ValueError(f"rows[{t}]: expected {K} tensors as in rows[{first}], got {length}")
    grads: list[Tensor | None] = []
    for row in rows:
        grads.extend((None,) * K if row is None else (row,) if isinstance(row, Tensor) else row)
    if transforming() or not _are_detached(grads, type(None)):
        for i, g in enumerate(grads):
            name = f"rows[{i // K}][{i % K}]"
            if isinstance(g, Tensor):
                _check_detached(g, name)
            elif g is not None:
                raise TypeError(f"{name}: expected a tensor or None, got {describe(g)}")
    return grads, K


def check_outs(out: Any, like: Sequence[Tensor | None]) -> list[Tensor]:
    """Where the results of K columns go; `like` has a gradient of each. Again this checks what an op cannot see.

    An entry for a column without any gradient is ignored: the op gets a tensor without elements.
    """
    if not isinstance(out, (list, tuple)) or len(out) != len(like):
        got = f"{len(out)} entries" if isinstance(out, (list, tuple)) else describe(out)
        raise ValueError(f"out: expected a sequence of {len(like)} tensors, got {got}")
    targets = [nothing_for(like) if g is None else target for target, g in zip(out, like, strict=True)]
    if not _are_detached(targets) or set(map(_LAYOUT, targets)) != {torch.strided}:
        for k, target in enumerate(targets):
            _check_overwritten(target, f"out[{k}]")
    return targets


def nothing_for(like: Sequence[Tensor | None]) -> Tensor:
    """A tensor without elements, on the gradients' device."""
    return torch.empty(0, device=next(g.device for g in like if g is not None))


def _are_detached(entries: Sequence[Any], *others: type) -> bool:
    """Whether all are tensors or of `others`, and none requires grad in grad mode; without a loop in Python."""
    if torch.compiler.is_compiling():
        return False
    kinds = set(map(type, entries))
    there = filter(_IS_THERE, entries) if type(None) in kinds else entries
    fit = all(issubclass(kind, (Tensor, *others)) for kind in kinds)
    return fit and not (torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, there)))

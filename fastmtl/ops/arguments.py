"""The checks that contracts are made of. Each raises a RuntimeError that says what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastmtl.inputs import DENSE, DTYPES, FLOATING, check_apart, describe, repeats, wrong_kind

__all__ = [
    "Gradients",
    "any_of",
    "apart",
    "argument_error",
    "fail",
    "is_vector",
    "matrix",
    "not_negative",
    "optional",
    "policy",
    "result",
    "rows",
    "seed",
    "square",
    "vector",
]

Gradients = Sequence[Tensor | None]

_OF_ARGUMENT = re.compile(r"(rows|out|grads|tasks)(\[\d+\])*: ")


def fail(name: str, expected: str, got: object) -> NoReturn:
    """Raises the RuntimeError of a failed check."""
    if isinstance(got, Tensor):
        contiguous = got.layout is not torch.strided or got.is_contiguous()
        got = describe(got) if contiguous else f"{describe(got)}, not contiguous"
    raise RuntimeError(f"{name}: expected {expected}, got {got}")


def _is_gradient(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.layout is torch.strided


def is_vector(x: Tensor, shape: Sequence[int], like: Tensor) -> bool:
    """Whether `x` is a contiguous float64 tensor of this shape, on the device of `like`."""
    return (
        x.dtype is torch.float64
        and x.layout is torch.strided
        and x.shape == torch.Size(shape)
        and x.is_contiguous()
        and x.device == like.device
    )


def vector(name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raises unless `is_vector`."""
    if not is_vector(x, shape, like):
        fail(name, f"a contiguous float64 tensor of shape {list(shape)} on {like.device}", x)


def optional(name: str, x: Tensor | None, length: int, like: Tensor) -> None:
    """A vector [length], or None."""
    if x is not None:
        vector(name, x, (length,), like)


def not_negative(name: str, x: float) -> None:
    """A finite number, at least 0."""
    if not (x >= 0.0 and math.isfinite(x)):
        fail(name, "a finite number >= 0", x)


def matrix(G: Tensor) -> None:
    """A matrix of gradients [T, P] or a batch of them."""
    if not (_is_gradient(G) and 2 <= G.ndim <= 3 and G.shape[-2] >= 1):
        fail("G", "float32, float64, bfloat16 or float16 of shape [T, P] or [B, T, P] with T >= 1", G)


def square(M: Tensor, least: int = 1) -> None:
    """A Gram matrix [..., T, T] with T >= `least`."""
    fits = M.dtype in (torch.float32, torch.float64) and M.layout is torch.strided and M.ndim >= 2
    if not (fits and M.shape[-1] == M.shape[-2] and M.shape[-1] >= least):
        fail("M", f"float32 or float64 of shape [..., T, T]{' with T >= 1' if least else ''}", M)


def policy(like: Tensor, T: int, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str) -> None:
    """The options of `balance` for T gradients."""
    optional("weights", weights, T, like)
    if scale not in ("min", "median", "rmse"):
        fail("scale", "min, median or rmse", scale)
    not_negative("rtol", rtol)
    not_negative("zero", zero)
    if rank_rule not in ("normalized", "gram"):
        fail("rank_rule", "normalized or gram", rank_rule)


def seed(x: Tensor, like: Tensor) -> None:
    """One int64 number on the device of `like`."""
    if x.dtype is not torch.int64 or x.numel() != 1 or x.device != like.device:
        fail("seed", f"one int64 number on {like.device}", x)


def result(G: Tensor, out: Tensor) -> None:
    """A tensor that the aggregation of G can be written to."""
    shape = torch.Size((*G.shape[:-2], G.shape[-1]))
    if out.dtype is not G.dtype or out.layout is not torch.strided or out.shape != shape or out.device != G.device:
        fail("out", f"the dtype and device of G and shape {list(shape)} for G, a {describe(G)}", out)
    apart("out", [out], [G])


def any_of(grads: Gradients) -> Tensor:
    """The first gradient that is not missing."""
    first = next((g for g in grads if g is not None), None)
    if first is None:
        fail("grads", "at least one tensor", f"none in {len(grads)} entries")
    return first


def rows(grads: Gradients, tasks: int, out: Sequence[Tensor] | None = None) -> None:
    """T rows of K gradients that fit together, and to `out`."""
    if tasks < 1:
        fail("tasks", "at least one", tasks)
    if len(grads) % tasks:
        fail("grads", f"a multiple of {tasks} tensors", len(grads))
    K = len(grads) // tasks
    if out is not None and len(out) != K:
        fail("out", f"{K} tensors", len(out))
    device = next((g.device for g in (*grads, *(out or ())) if g is not None), None)
    for k in range(K):
        like: Tensor | None = None
        for t, g in enumerate(grads[k::K]):
            if g is None:
                continue
            name = f"rows[{t}][{k}]"
            if (wrong := wrong_kind(g)) is not None:
                raise RuntimeError(f"{name}: {wrong}")
            if like is not None and (g.dtype is not like.dtype or g.shape != like.shape or g.device != like.device):
                fail(name, f"the other tasks' {describe(like)}", describe(g))
            if g.device != device:
                fail(name, f"all gradients on {device}", describe(g))
            like = g
        if out is not None:
            _fits(out[k], like, f"out[{k}]", device)
    if out is not None:
        apart("out", out, [g for g in grads if g is not None])


def _fits(out: Tensor, like: Tensor | None, name: str, device: torch.device | None) -> None:
    """A result for gradients like this, or for a column without any."""
    if like is None:
        if (wrong := wrong_kind(out)) is not None:
            raise RuntimeError(f"{name}: {wrong}")
        if out.device != device:
            fail(name, f"all results on {device}", describe(out))
    elif (
        out.dtype is not like.dtype
        or out.layout is not torch.strided
        or out.shape != like.shape
        or out.device != like.device
    ):
        fail(name, f"a {describe(like)}", describe(out))


def apart(name: str, written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """Tensors that are written overlap neither those that are read nor each other, where they have memory."""
    if any(x.untyped_storage().device.type == "meta" for x in (*written, *read)):  # also of fake tensors
        return
    for k, x in enumerate(written):
        if not x.is_contiguous() and repeats(x):
            which = name if len(written) == 1 else f"{name}[{k}]"
            fail(which, "a tensor without repeated elements", f"strides {list(x.stride())}")
    try:
        check_apart(written, read)
    except ValueError as error:
        raise RuntimeError(str(error).replace("out", name, 1)) from None


def argument_error(error: RuntimeError) -> Exception:
    """An op's error about its arguments as a method raises it: a TypeError or ValueError with the same text.

    Any other error is returned as it is.
    """
    text = str(error)
    if not _OF_ARGUMENT.match(text):
        return error
    return TypeError(text) if any(words in text for words in (DENSE, FLOATING)) else ValueError(text)

"""The checks that contracts are made of. Each raises RuntimeError with what is expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastmtl.inputs import DTYPES, check_apart, describe, repeats

__all__ = [
    "Gradients",
    "any_of",
    "apart",
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


def fail(name: str, expected: str, got: object) -> NoReturn:
    """Raises RuntimeError."""
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
    """Raises where `x` is not what `is_vector` says."""
    if not is_vector(x, shape, like):
        fail(name, f"a contiguous float64 tensor of shape {list(shape)} on {like.device}", x)


def optional(name: str, x: Tensor | None, length: int, like: Tensor) -> None:
    """The same for [length], or None."""
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
    """A Gram matrix [..., T, T], T being at `least` so much."""
    fits = M.dtype in (torch.float32, torch.float64) and M.layout is torch.strided and M.ndim >= 2
    if not (fits and M.shape[-1] == M.shape[-2] and M.shape[-1] >= least):
        fail("M", f"float32 or float64 of shape [..., T, T]{' with T >= 1' if least else ''}", M)


def policy(like: Tensor, T: int, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str) -> None:
    """How `balance` decides on T gradients."""
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
    """Where the aggregation of G is written."""
    shape = torch.Size((*G.shape[:-2], G.shape[-1]))
    if out.dtype is not G.dtype or out.layout is not torch.strided or out.shape != shape or out.device != G.device:
        fail("out", f"the dtype and device of G and shape {list(shape)} for G, a {describe(G)}", out)
    apart("out", [out], [G])


def any_of(grads: Gradients) -> Tensor:
    """The first gradient there is."""
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
    device = None
    for k in range(K):
        like = next((g for g in grads[k::K] if g is not None), None)
        if like is not None and not _is_gradient(like):
            fail(f"grads: tensor {k} of a row", "float32, float64, bfloat16 or float16", like)
        for t, g in enumerate(grads[k::K]):
            if g is None or like is None:
                continue
            if g.dtype is not like.dtype or g.shape != like.shape or g.layout is not torch.strided:
                fail(f"grads: row {t}, tensor {k}", f"dtype and shape of the others, a {describe(like)}", g)
            device = g.device if device is None else device
            if g.device != device:
                fail(f"grads: row {t}, tensor {k}", f"all tensors of a call on one device, {device}", g)
        if out is not None:
            target = out[k]
            like = target if like is None else like
            if not _is_gradient(target) or target.dtype is not like.dtype or target.shape != like.shape:
                fail(f"out: tensor {k}", f"dtype, shape and device of its gradients, a {describe(like)}", target)
            device = target.device if device is None else device
            if target.device != device:
                fail(f"out: tensor {k}", f"all tensors of a call on one device, {device}", target)
    if out is not None:
        apart("out", out, [g for g in grads if g is not None])


def apart(name: str, written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """What is written lies apart from what is read, and from each other, where there is memory."""
    if any(x.untyped_storage().device.type == "meta" for x in (*written, *read)):  # of fake tensors, too
        return
    for x in written:
        if not x.is_contiguous() and repeats(x):
            fail(name, "memory of its own, no element of it twice", x)
    try:
        check_apart(written, read)
    except ValueError as error:
        raise RuntimeError(str(error).replace("out", name, 1)) from None

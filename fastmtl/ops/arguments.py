"""What the ops accept: the checks of the reference and of the fakes, one function an op, with the arguments of the op.

The kernels make the same ones in csrc/tensors.h and csrc/weighing.h, with the same error. A call with a tensor on the
meta device ends up in a fake, wherever its other tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastmtl.inputs import DTYPES, check_apart, describe, repeats

Gradients = Sequence[Tensor | None]


def gram(G: Tensor) -> None:
    _matrix(G)


def gram_rows(grads: Gradients, tasks: int) -> None:
    _rows(grads, tasks)  # without any gradient the result is zero, and no kernel is asked


def balance(M: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str) -> None:
    _square(M)
    _policy(M, M.shape[-1], weights, scale, rtol, zero, rank_rule)


def combine(G: Tensor, alpha: Tensor, out: Tensor) -> None:
    _matrix(G)
    _result(G, out)
    if not _vector(alpha, G.shape[:-1], G):
        _fail("alpha", f"a contiguous float64 tensor of shape {list(G.shape[:-1])} on {G.device}", alpha)
    _apart("out", [out], [alpha])


def combine_rows(grads: Gradients, alpha: Tensor, out: Sequence[Tensor]) -> None:
    T = len(grads) // len(out) if len(out) else alpha.numel()
    _optional("alpha", alpha, T, out[0] if len(out) else alpha)
    _rows(grads, T, out)
    _apart("out", out, [alpha])


def sign_drop(G: Tensor, seed: Tensor, leak: Tensor | None, out: Tensor) -> None:
    _matrix(G)
    _result(G, out)
    _seed(seed, G)
    _optional("leak", leak, G.shape[-2], G)


def sign_drop_rows(grads: Gradients, tasks: int, seed: Tensor, leak: Tensor | None, out: Sequence[Tensor]) -> None:
    _rows(grads, tasks, out)
    like = _any_of(grads)
    _seed(seed, like)
    _optional("leak", leak, tasks, like)


def align(G: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str, out: Tensor) -> None:
    _matrix(G)
    _result(G, out)
    _policy(G, G.shape[-2], weights, scale, rtol, zero, rank_rule)


def align_rows(
    grads: Gradients,
    tasks: int,
    weights: Tensor | None,
    scale: str,
    rtol: float,
    zero: float,
    rank_rule: str,
    out: Sequence[Tensor],
) -> None:
    _rows(grads, tasks, out)
    _policy(_any_of(grads), tasks, weights, scale, rtol, zero, rank_rule)


def eigh(M: Tensor) -> None:
    _square(M, 0)


def mgda(M: Tensor) -> None:
    _square(M)


def dual_cone(M: Tensor, weights: Tensor | None, each: bool) -> None:
    _square(M)
    _optional("weights", weights, M.shape[-1], M)


def cagrad(M: Tensor, c: float) -> None:
    _not_negative("c", c)
    _square(M)


def nash(M: Tensor, power: float) -> None:
    if not (power > 0.0 and math.isfinite(power)):
        _fail("power", "a finite number > 0", power)
    _square(M)


def unit_solve(M: Tensor, weights: Tensor | None, rtol: float) -> None:
    _not_negative("rtol", rtol)
    _square(M)
    _optional("weights", weights, M.shape[-1], M)


def constant(M: Tensor, weights: Tensor | None) -> None:
    _square(M)
    if weights is not None and not (_vector(weights, M.shape[-1:], M) or _vector(weights, M.shape[:-1], M)):
        _fail("weights", f"a contiguous float64 tensor of shape [T] or [..., T] for M, a {describe(M)}", weights)


def pcgrad(M: Tensor, seed: Tensor, per_task: bool) -> None:
    _square(M)
    _seed(seed, M)


def gradvac(M: Tensor, seed: Tensor, beta: float, targets: Tensor) -> None:
    _square(M)
    _seed(seed, M)
    if not 0.0 <= beta <= 1.0:
        _fail("beta", "a number in [0, 1]", beta)
    if not _vector(targets, M.shape, M):
        _fail("targets", f"a contiguous float64 tensor of shape {list(M.shape)} on {M.device}", targets)
    _apart("targets", [targets], [M])


# ------------------------------------------------------------------------------------------------ arguments


def _fail(name: str, expected: str, got: object) -> NoReturn:
    if isinstance(got, Tensor):
        contiguous = got.layout is not torch.strided or got.is_contiguous()
        got = describe(got) if contiguous else f"{describe(got)}, not contiguous"
    raise RuntimeError(f"{name}: expected {expected}, got {got}")


def _is_gradient(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.layout is torch.strided


def _vector(x: Tensor, shape: Sequence[int], like: Tensor) -> bool:
    return (
        x.dtype is torch.float64
        and x.layout is torch.strided
        and x.shape == torch.Size(shape)
        and x.is_contiguous()
        and x.device == like.device
    )


def _optional(name: str, x: Tensor | None, length: int, like: Tensor) -> None:
    if x is not None and not _vector(x, (length,), like):
        _fail(name, f"a contiguous float64 tensor of shape [{length}] on {like.device}", x)


def _not_negative(name: str, x: float) -> None:
    if not (x >= 0.0 and math.isfinite(x)):
        _fail(name, "a finite number >= 0", x)


def _matrix(G: Tensor) -> None:
    if not (_is_gradient(G) and 2 <= G.ndim <= 3 and G.shape[-2] >= 1):
        _fail("G", "float32, float64, bfloat16 or float16 of shape [T, P] or [B, T, P] with T >= 1", G)


def _square(M: Tensor, least: int = 1) -> None:
    fits = M.dtype in (torch.float32, torch.float64) and M.layout is torch.strided and M.ndim >= 2
    if not (fits and M.shape[-1] == M.shape[-2] and M.shape[-1] >= least):
        _fail("M", f"float32 or float64 of shape [..., T, T]{' with T >= 1' if least else ''}", M)


def _policy(like: Tensor, T: int, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str) -> None:
    _optional("weights", weights, T, like)
    if scale not in ("min", "median", "rmse"):
        _fail("scale", "min, median or rmse", scale)
    _not_negative("rtol", rtol)
    _not_negative("zero", zero)
    if rank_rule not in ("normalized", "gram"):
        _fail("rank_rule", "normalized or gram", rank_rule)


def _seed(seed: Tensor, like: Tensor) -> None:
    if seed.dtype is not torch.int64 or seed.numel() != 1 or seed.device != like.device:
        _fail("seed", f"one int64 number on {like.device}", seed)


def _result(G: Tensor, out: Tensor) -> None:
    shape = torch.Size((*G.shape[:-2], G.shape[-1]))
    if out.dtype is not G.dtype or out.layout is not torch.strided or out.shape != shape or out.device != G.device:
        _fail("out", f"the dtype and device of G and shape {list(shape)} for G, a {describe(G)}", out)
    _apart("out", [out], [G])


def _any_of(grads: Gradients) -> Tensor:
    first = next((g for g in grads if g is not None), None)
    if first is None:
        _fail("grads", "at least one tensor", f"none in {len(grads)} entries")
    return first


def _rows(grads: Gradients, tasks: int, out: Sequence[Tensor] | None = None) -> None:
    if tasks < 1:
        _fail("tasks", "at least one", tasks)
    if len(grads) % tasks:
        _fail("grads", f"a multiple of {tasks} tensors", len(grads))
    K = len(grads) // tasks
    if out is not None and len(out) != K:
        _fail("out", f"{K} tensors", len(out))
    device = None
    for k in range(K):
        like = next((g for g in grads[k::K] if g is not None), None)
        if like is not None and not _is_gradient(like):
            _fail(f"grads: tensor {k} of a row", "float32, float64, bfloat16 or float16", like)
        for t, g in enumerate(grads[k::K]):
            if g is None or like is None:
                continue
            if g.dtype is not like.dtype or g.shape != like.shape or g.layout is not torch.strided:
                _fail(f"grads: row {t}, tensor {k}", f"dtype and shape of the others, a {describe(like)}", g)
            device = g.device if device is None else device
            if g.device != device:
                _fail(f"grads: row {t}, tensor {k}", f"all tensors of a call on one device, {device}", g)
        if out is not None:
            target = out[k]
            like = target if like is None else like
            if not _is_gradient(target) or target.dtype is not like.dtype or target.shape != like.shape:
                _fail(f"out: tensor {k}", f"dtype, shape and device of its gradients, a {describe(like)}", target)
            device = target.device if device is None else device
            if target.device != device:
                _fail(f"out: tensor {k}", f"all tensors of a call on one device, {device}", target)
    if out is not None:
        _apart("out", out, [g for g in grads if g is not None])


def _apart(name: str, written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """What is written lies apart from what is read, and from each other, where there is memory."""
    if any(x.untyped_storage().device.type == "meta" for x in (*written, *read)):  # of fake tensors, too
        return
    for x in written:
        if not x.is_contiguous() and repeats(x):
            _fail(name, "memory of its own, no element of it twice", x)
    try:
        check_apart(written, read)
    except ValueError as error:
        raise RuntimeError(str(error).replace("out", name, 1)) from None

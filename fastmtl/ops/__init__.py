"""The op layer: schemas, fakes, the reference as default implementation, and the compiled kernels where they are built.

Every op has one contract and four implementations: `fastmtl.ops.reference` (registered for every device, so that the
library works where nothing is compiled), the CPU kernels of `csrc/cpu`, the CUDA kernels of `csrc/cuda`, and the fakes
below. The compiled objects only add implementations for their device: loading them is all that it takes.

All implementations check their arguments alike and raise RuntimeError. Only `gram` has a derivative; what is written is
marked so for autograd.

`grads` is a ragged gradient matrix: T rows of K tensors, entry t·K + k being tensor k of row t and None a missing
gradient.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from fastmtl.ops import arguments, reference
from fastmtl.ops.reference.rounding import rounded

__all__ = [
    "EXTENSIONS",
    "align",
    "align_rows",
    "balance",
    "cagrad",
    "combine",
    "combine_rows",
    "constant",
    "dual_cone",
    "eigh",
    "gradvac",
    "gram",
    "gram_rows",
    "mgda",
    "nash",
    "pcgrad",
    "sign_drop",
    "sign_drop_rows",
    "unit_solve",
]

_POLICY = "Tensor? weights, str scale, float rtol, float zero, str rank_rule"
_SCHEMAS = (
    "gram(Tensor G) -> Tensor",
    "gram_rows(Tensor?[] grads, int tasks) -> Tensor",
    f"balance(Tensor M, {_POLICY}) -> (Tensor alpha, Tensor eigenvalues, Tensor rank)",
    "combine(Tensor G, Tensor alpha, Tensor(a!) out) -> ()",
    "combine_rows(Tensor?[] grads, Tensor alpha, Tensor(a!)[] out) -> ()",
    f"align(Tensor G, {_POLICY}, Tensor(a!) out) -> ()",
    f"align_rows(Tensor?[] grads, int tasks, {_POLICY}, Tensor(a!)[] out)"
    " -> (Tensor gram, Tensor alpha, Tensor eigenvalues, Tensor rank)",
    "eigh(Tensor M) -> (Tensor eigenvalues, Tensor eigenvectors)",
    "mgda(Tensor M) -> (Tensor alpha, Tensor residual)",
    "dual_cone(Tensor M, Tensor? weights, bool each) -> (Tensor alpha, Tensor residual)",
    "cagrad(Tensor M, float c) -> (Tensor alpha, Tensor residual)",
    "nash(Tensor M, float power) -> (Tensor alpha, Tensor residual)",
    "unit_solve(Tensor M, Tensor? weights, float rtol) -> (Tensor alpha, Tensor cosines)",
    "constant(Tensor M, Tensor? weights) -> Tensor alpha",
    "pcgrad(Tensor M, Tensor seed, bool per_task) -> Tensor alpha",
    "gradvac(Tensor M, Tensor seed, float beta, Tensor(a!) targets) -> Tensor alpha",
    "sign_drop(Tensor G, Tensor seed, Tensor? leak, Tensor(a!) out) -> ()",
    "sign_drop_rows(Tensor?[] grads, int tasks, Tensor seed, Tensor? leak, Tensor(a!)[] out) -> ()",
)


def _checked(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, once the arguments are known to be those of this op."""
    check = getattr(arguments, name)

    @functools.wraps(run)
    def call(*args):
        check(*args)
        return run(*args)

    return call


_library = library.Library("fastmtl", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _name = _schema.partition("(")[0]
    # Not "CPU"/"CUDA": a kernel registered there by a compiled object must win over this one.
    _library.impl(_name, _checked(_name, getattr(reference, _name)), "CompositeExplicitAutograd")


def _load() -> dict[str, str | None]:
    """Loads the compiled objects: where each lies, or None where it is not built or not wanted."""
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


EXTENSIONS = _load()

gram = torch.ops.fastmtl.gram.default
gram_rows = torch.ops.fastmtl.gram_rows.default
balance = torch.ops.fastmtl.balance.default
combine = torch.ops.fastmtl.combine.default
combine_rows = torch.ops.fastmtl.combine_rows.default
align = torch.ops.fastmtl.align.default
align_rows = torch.ops.fastmtl.align_rows.default
eigh = torch.ops.fastmtl.eigh.default
mgda = torch.ops.fastmtl.mgda.default
dual_cone = torch.ops.fastmtl.dual_cone.default
cagrad = torch.ops.fastmtl.cagrad.default
nash = torch.ops.fastmtl.nash.default
unit_solve = torch.ops.fastmtl.unit_solve.default
constant = torch.ops.fastmtl.constant.default
pcgrad = torch.ops.fastmtl.pcgrad.default
gradvac = torch.ops.fastmtl.gradvac.default
sign_drop = torch.ops.fastmtl.sign_drop.default
sign_drop_rows = torch.ops.fastmtl.sign_drop_rows.default


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what an op returns to tracing."""
    return lambda run: library.register_fake(f"fastmtl::{name}", _checked(name, run))


def _device(grads: Sequence[Tensor | None]) -> torch.device:
    return next((g.device for g in grads if g is not None), torch.device("cpu"))


@_fake("gram")
def _(G: Tensor) -> Tensor:
    return G.new_empty((*G.shape[:-1], G.shape[-2]), dtype=torch.float64)


@_fake("gram_rows")
def _(grads: Sequence[Tensor | None], tasks: int) -> Tensor:
    return torch.empty(tasks, tasks, dtype=torch.float64, device=_device(grads))


@_fake("balance")
def _(M: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str) -> tuple[Tensor, ...]:
    return (
        M.new_empty(M.shape[:-1], dtype=torch.float64),
        M.new_empty(M.shape[:-1], dtype=torch.float64),
        M.new_empty(M.shape[:-2], dtype=torch.int64),
    )


@_fake("combine")
def _(G: Tensor, alpha: Tensor, out: Tensor) -> None:
    return None


@_fake("combine_rows")
def _(grads: Sequence[Tensor | None], alpha: Tensor, out: Sequence[Tensor]) -> None:
    return None


@_fake("align")
def _(G: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str, out: Tensor) -> None:
    return None


@_fake("align_rows")
def _(
    grads: Sequence[Tensor | None],
    tasks: int,
    weights: Tensor | None,
    scale: str,
    rtol: float,
    zero: float,
    rank_rule: str,
    out: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    M = torch.empty(tasks, tasks, dtype=torch.float64, device=_device(grads))
    return M, M.new_empty(tasks), M.new_empty(tasks), M.new_empty((), dtype=torch.int64)


@_fake("eigh")
def _(M: Tensor) -> tuple[Tensor, Tensor]:
    return M.new_empty(M.shape[:-1]), M.new_empty(M.shape)


def _weights_of(M: Tensor) -> Tensor:
    return M.new_empty(M.shape[:-1], dtype=torch.float64)


def _solution_of(M: Tensor) -> tuple[Tensor, Tensor]:
    return _weights_of(M), M.new_empty(M.shape[:-2], dtype=torch.float64)


@_fake("mgda")
def _(M: Tensor) -> tuple[Tensor, Tensor]:
    return _solution_of(M)


@_fake("dual_cone")
def _(M: Tensor, weights: Tensor | None, each: bool) -> tuple[Tensor, Tensor]:
    return _solution_of(M)


@_fake("cagrad")
def _(M: Tensor, c: float) -> tuple[Tensor, Tensor]:
    return _solution_of(M)


@_fake("nash")
def _(M: Tensor, power: float) -> tuple[Tensor, Tensor]:
    return _solution_of(M)


@_fake("unit_solve")
def _(M: Tensor, weights: Tensor | None, rtol: float) -> tuple[Tensor, Tensor]:
    return _weights_of(M), _weights_of(M)


@_fake("constant")
def _(M: Tensor, weights: Tensor | None) -> Tensor:
    return _weights_of(M)


@_fake("pcgrad")
def _(M: Tensor, seed: Tensor, per_task: bool) -> Tensor:
    return _weights_of(M)


@_fake("gradvac")
def _(M: Tensor, seed: Tensor, beta: float, targets: Tensor) -> Tensor:
    return _weights_of(M)


@_fake("sign_drop")
def _(G: Tensor, seed: Tensor, leak: Tensor | None, out: Tensor) -> None:
    return None


@_fake("sign_drop_rows")
def _(grads: Sequence[Tensor | None], tasks: int, seed: Tensor, leak: Tensor | None, out: Sequence[Tensor]) -> None:
    return None


def _gram_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _gram_backward(ctx, grad: Tensor) -> Tensor:
    """d(G Gᵀ): (Ṁ + Ṁᵀ) G."""
    (G,) = ctx.saved_tensors
    return rounded((grad + grad.mT) @ G.to(grad.dtype), G.dtype)


library.register_autograd("fastmtl::gram", _gram_backward, setup_context=_gram_setup)


def _refuse(name: str):
    def backward(ctx, *grads):
        raise NotImplementedError(f"fastmtl::{name} has no derivative: detach its inputs")

    return backward


# Without a formula the results would silently claim to require grad. It costs five microseconds of Python a call: the
# ops on a Gram matrix go without, and `weighting` looks in their stead.
for _name in ("gram_rows", "balance", "eigh"):
    library.register_autograd(f"fastmtl::{_name}", _refuse(_name))

"""The ops: what each one computes, what it accepts and what it returns.

This module defines contracts: functions that check the arguments and return empty results of the right shape and dtype.
A contract is the fake of its op and runs before the reference; after the decorator, its name is the op. The kernels
make the same checks in csrc/ops, with the same errors, and no caller makes them earlier: so the errors call entry
t·K + k of `grads` rows[t][k], as users of a method know it. A call with a tensor on the meta device ends up in a
contract, wherever its other tensors are.

G [T, P] or [B, T, P] is a gradient matrix in float32, float64, bfloat16 or float16; M [..., T, T] a Gram matrix in
float32 or float64. `grads` is a ragged gradient matrix: T rows of K tensors, entry t·K + k being tensor k of row t and
None a missing gradient. Task weights α [..., T] are float64. docs/numerics.md says how accurate results are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.inputs import describe
from fastmtl.ops import arguments
from fastmtl.ops.arguments import Gradients
from fastmtl.ops.registry import define

__all__ = [
    "align",
    "align_gram",
    "align_rows",
    "balance",
    "balance_many",
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
    "second_pass",
    "sign_drop",
    "sign_drop_rows",
    "unit_solve",
]

_POLICY = "Tensor? weights, str scale, float rtol, float zero, str rank_rule"


# ------------------------------------------------------------------------------------------------ gradients


@define("(Tensor G) -> Tensor")
def gram(G: Tensor) -> Tensor:
    """M = G Gᵀ, float64 [..., T, T]."""
    arguments.matrix(G)
    return G.new_empty((*G.shape[:-1], G.shape[-2]), dtype=torch.float64)


@define("(Tensor?[] grads, int tasks, Tensor[]? out=None) -> Tensor")
def gram_rows(grads: Gradients, tasks: int, out: Sequence[Tensor] | None = None) -> Tensor:
    """M = G Gᵀ of rows, float64 [T, T]; `out` is only checked, for a `combine_rows` that is to write there."""
    arguments.rows(grads, tasks, out)
    if out is not None:
        arguments.any_of(grads)  # without `out`, M of no gradient is zero, and no kernel runs
    device = next((g.device for g in grads if g is not None), torch.device("cpu"))
    return torch.empty(tasks, tasks, dtype=torch.float64, device=device)


@define("(Tensor G, Tensor alpha, Tensor(a!) out) -> ()")
def combine(G: Tensor, alpha: Tensor, out: Tensor) -> None:
    """Writes αᵀ G into `out` [..., P]."""
    arguments.matrix(G)
    arguments.result(G, out)
    arguments.vector("alpha", alpha, G.shape[:-1], G)
    arguments.apart("out", [out], [alpha])


@define("(Tensor?[] grads, Tensor alpha, Tensor(a!)[] out) -> ()")
def combine_rows(grads: Gradients, alpha: Tensor, out: Sequence[Tensor]) -> None:
    """Writes αᵀ G of rows into K tensors; α is [T]."""
    T = len(grads) // len(out) if len(out) else alpha.numel()
    arguments.vector("alpha", alpha, (T,), out[0] if len(out) else alpha)
    arguments.rows(grads, T, out)
    arguments.apart("out", out, [alpha])


@define(f"(Tensor G, {_POLICY}, Tensor(a!) out) -> ()")
def align(G: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str, out: Tensor) -> None:
    """Writes the aligned gradient of G into `out` [..., P]: `gram`, `align_gram` and `combine` in one."""
    arguments.matrix(G)
    arguments.result(G, out)
    arguments.policy(G, G.shape[-2], weights, scale, rtol, zero, rank_rule)


@define(f"(Tensor?[] grads, int tasks, {_POLICY}, Tensor(a!)[] out) -> (Tensor gram, Tensor alpha, Tensor rank)")
def align_rows(
    grads: Gradients,
    tasks: int,
    weights: Tensor | None,
    scale: str,
    rtol: float,
    zero: float,
    rank_rule: str,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes the aligned gradient of rows into K tensors; returns M and what `align_gram` returns."""
    arguments.rows(grads, tasks, out)
    some = arguments.any_of(grads)
    arguments.policy(some, tasks, weights, scale, rtol, zero, rank_rule)
    M = torch.empty(tasks, tasks, dtype=torch.float64, device=some.device)
    return M, M.new_empty(tasks), M.new_empty((), dtype=torch.int64)


@define("(Tensor G, Tensor seed, Tensor? leak, Tensor(a!) out) -> ()")
def sign_drop(G: Tensor, seed: Tensor, leak: Tensor | None, out: Tensor) -> None:
    """Writes GradDrop's gradient into `out` [..., P]: each column's entries of one sign, drawn by sign purity."""
    arguments.matrix(G)
    arguments.result(G, out)
    arguments.seed(seed, G)
    arguments.optional("leak", leak, G.shape[-2], G)


@define("(Tensor?[] grads, int tasks, Tensor seed, Tensor? leak, Tensor(a!)[] out) -> ()")
def sign_drop_rows(grads: Gradients, tasks: int, seed: Tensor, leak: Tensor | None, out: Sequence[Tensor]) -> None:
    """Writes GradDrop's gradient of rows into K tensors."""
    arguments.rows(grads, tasks, out)
    like = arguments.any_of(grads)
    arguments.seed(seed, like)
    arguments.optional("leak", leak, tasks, like)


# ------------------------------------------------------------------------------------------------ weights from M


def _weights_of(M: Tensor) -> Tensor:
    return M.new_empty(M.shape[:-1], dtype=torch.float64)


def _solution_of(M: Tensor) -> tuple[Tensor, Tensor]:
    return _weights_of(M), M.new_empty(M.shape[:-2], dtype=torch.float64)


@define("(Tensor M) -> (Tensor eigenvalues, Tensor eigenvectors)")
def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., T], ascending, and eigenvectors [..., T, T] in columns, in the dtype of M."""
    arguments.square(M, 0)
    return M.new_empty(M.shape[:-1]), M.new_empty(M.shape)


def _balanced(
    M: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    arguments.square(M)
    arguments.policy(M, M.shape[-1], weights, scale, rtol, zero, rank_rule)
    return _weights_of(M), _weights_of(M), M.new_empty(M.shape[:-2], dtype=torch.int64)


@define(f"(Tensor M, {_POLICY}) -> (Tensor alpha, Tensor eigenvalues, Tensor rank)")
def balance(
    M: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Aligned-MTL's weights, the eigenvalues [..., T], descending, and how many are kept, int64 [...]."""
    return _balanced(M, weights, scale, rtol, zero, rank_rule)


@define(f"(Tensor M, {_POLICY}) -> (Tensor alpha, Tensor rank)")
def align_gram(
    M: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str
) -> tuple[Tensor, Tensor]:
    """`balance` without the eigenvalues, which cost more than the weights where tasks are many."""
    arguments.square(M)
    arguments.policy(M, M.shape[-1], weights, scale, rtol, zero, rank_rule)
    return _weights_of(M), M.new_empty(M.shape[:-2], dtype=torch.int64)


@define(f"(Tensor M, {_POLICY}) -> (Tensor alpha, Tensor eigenvalues, Tensor rank)")
def balance_many(
    M: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`balance` as a GPU computes it for many tasks, by matrix products alone. No kernel: one version for all."""
    return _balanced(M, weights, scale, rtol, zero, rank_rule)


@define("(Tensor M, Tensor bound, bool blocks) -> Tensor verdict")
def second_pass(M: Tensor, bound: Tensor, blocks: bool) -> Tensor:
    """Whether a GPU with many tasks has to read G again, and two factors to scale it by, float64 [..., 3]."""
    arguments.square(M)
    arguments.vector("bound", bound, M.shape[:-2], M)
    return M.new_empty((*M.shape[:-2], 3), dtype=torch.float64)


@define("(Tensor M) -> (Tensor alpha, Tensor residual)")
def mgda(M: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the shortest vector in the convex hull of the gradients, and the residual [...] of the solution."""
    arguments.square(M)
    return _solution_of(M)


@define("(Tensor M, Tensor? weights, bool each) -> (Tensor alpha, Tensor residual)")
def dual_cone(M: Tensor, weights: Tensor | None, each: bool) -> tuple[Tensor, Tensor]:
    """Projection of the weighted sum (DualProj), or of `each` gradient (UPGrad), onto the dual cone."""
    arguments.square(M)
    arguments.optional("weights", weights, M.shape[-1], M)
    return _solution_of(M)


@define("(Tensor M, float c) -> (Tensor alpha, Tensor residual)")
def cagrad(M: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """CAGrad's weights; c is the radius of its ball relative to the norm of the mean gradient."""
    arguments.not_negative("c", c)
    arguments.square(M)
    return _solution_of(M)


@define("(Tensor M, float power) -> (Tensor alpha, Tensor residual)")
def nash(M: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """The α > 0 with M α = α^-power: that of NashMTL (power 1) and FairGrad."""
    if not (power > 0.0 and math.isfinite(power)):
        arguments.fail("power", "a finite number > 0", power)
    arguments.square(M)
    return _solution_of(M)


@define("(Tensor M, Tensor? weights, float rtol) -> (Tensor alpha, Tensor cosines)")
def unit_solve(M: Tensor, weights: Tensor | None, rtol: float) -> tuple[Tensor, Tensor]:
    """Weights of the direction whose cosines with the gradients are in the ratio of `weights`, and these cosines."""
    arguments.not_negative("rtol", rtol)
    arguments.square(M)
    arguments.optional("weights", weights, M.shape[-1], M)
    return _weights_of(M), _weights_of(M)


@define("(Tensor M, Tensor? weights) -> Tensor alpha")
def constant(M: Tensor, weights: Tensor | None) -> Tensor:
    """`weights` [T] or [..., T], or 1/T each: 0 for zero gradients, NaN where one is not finite."""
    arguments.square(M)
    if weights is not None:
        fits = any(arguments.is_vector(weights, shape, M) for shape in (M.shape[-1:], M.shape[:-1]))
        if not fits:
            expected = f"a contiguous float64 tensor of shape [T] or [..., T] for M, a {describe(M)}"
            arguments.fail("weights", expected, weights)
    return _weights_of(M)


@define("(Tensor M, Tensor seed, bool per_task) -> Tensor alpha")
def pcgrad(M: Tensor, seed: Tensor, per_task: bool) -> Tensor:
    """PCGrad's weights; the order of the projections is drawn once, or `per_task`."""
    arguments.square(M)
    arguments.seed(seed, M)
    return _weights_of(M)


@define("(Tensor M, Tensor seed, float beta, Tensor(a!) targets) -> Tensor alpha")
def gradvac(M: Tensor, seed: Tensor, beta: float, targets: Tensor) -> Tensor:
    """GradVac's weights; updates the target cosines [..., T, T]."""
    arguments.square(M)
    arguments.seed(seed, M)
    if not 0.0 <= beta <= 1.0:
        arguments.fail("beta", "a number in [0, 1]", beta)
    arguments.vector("targets", targets, M.shape, M)
    arguments.apart("targets", [targets], [M])
    return _weights_of(M)

"""Aligned-MTL: Independent Component Alignment for Multi-Task Learning (Senushkin et al., CVPR 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl._inputs import DTYPES, Rows, check_apart, check_matrix, check_out, check_rows, describe
from fastmtl.backward import Info, backward

__all__ = ["AlignedMTL"]

_SCALES = ("min", "median", "rmse")
_RANK_RULES = ("normalized", "gram")
_EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
_EPS32, _EPS64 = _EPS[torch.float32], _EPS[torch.float64]
_HAS_KERNELS = ops.EXTENSIONS["_C"] is not None
_PLAIN = (Tensor, torch.nn.Parameter)


class AlignedMTL:
    """Aligned-MTL (paper, Algorithm 1): align the principal components of the task gradients, then sum them weighted.

    The gradient matrix G [T, P] is replaced by the nearest one with condition number 1 (Eq. 4 and 5), scaled by s, and
    its rows are summed with the task weights w:

        λ, V = eigh(G Gᵀ)        α = sqrt(s) · V_R diag(λ_R^-1/2) V_Rᵀ w        g = αᵀ G

    An instance holds only these options (and a copy of the weights for each device that it met): it is safe to share
    between threads and models.

    Args:
        weights: task weights w: None or "mean" for 1/T each (the paper's), "sum" for ones (the public code's), or T
            numbers (a tensor [T], list or tuple).
        scale: s, from the kept eigenvalues: "min" (the paper's; the step has the size of the smallest kept singular
            value), "median" (the lower median) or "rmse" (the mean).
        rtol: singular values of the (row-normalised) gradient matrix at most `rtol` times the largest are treated as
            zero. Default sqrt(T · eps) with eps of the gradients' dtype for float32 and float64, max(sqrt(T · eps32),
            eps(dtype)) for bfloat16 and float16.
        rank_rule: what `rtol` is applied to: "normalized", the Gram of the gradients scaled to unit norm, so that a
            large task is not mistaken for dependent ones; or "gram", the Gram itself, as in the public codes.

    Raises:
        ValueError: unknown `scale` or `rank_rule`, a negative or non-finite `rtol`, weights that are not
            one-dimensional or not finite.
        TypeError: `weights` of another kind.
    """

    def __init__(
        self,
        weights: Tensor | Sequence[float] | str | None = None,
        scale: str = "min",
        rtol: float | None = None,
        rank_rule: str = "normalized",
    ) -> None:
        if scale not in _SCALES:
            raise ValueError(f"scale: expected one of {_SCALES}, got {scale!r}")
        if rank_rule not in _RANK_RULES:
            raise ValueError(f"rank_rule: expected one of {_RANK_RULES}, got {rank_rule!r}")
        if rtol is not None and not (isinstance(rtol, (int, float)) and 0.0 <= rtol < math.inf):
            raise ValueError(f"rtol: expected a finite number >= 0 or None, got {rtol!r}")
        self.weights: Tensor | str = _checked_weights(weights)
        self._placed: dict[tuple[Tensor | str, int, torch.device], Tensor] = {}
        self.scale = scale
        self.rtol = None if rtol is None else float(rtol)
        self.rank_rule = rank_rule

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_placed": {}}  # pickles and copies hold the options alone

    def __repr__(self) -> str:
        weights = repr(self.weights) if isinstance(self.weights, str) else str(self.weights.tolist())
        return f"AlignedMTL(weights={weights}, scale={self.scale!r}, rtol={self.rtol!r}, rank_rule={self.rank_rule!r})"

    @overload
    def __call__(self, gradients: Tensor, out: Tensor | None = None) -> Tensor: ...
    @overload
    def __call__(self, gradients: Rows, out: Sequence[Tensor | None] | None = None) -> list[Tensor | None]: ...
    def __call__(self, gradients, out=None):
        """The aligned gradient αᵀ G, accumulated in float64 and rounded once to the gradients' dtype.

        Args:
            gradients: G [T, P] or a batch [B, T, P] (float32, float64, bfloat16 or float16; rows of any stride); or T
                rows, each a tensor, a sequence of K tensors, or None, where a tensor may be None too: a missing
                gradient counts as zeros. Between tasks, tensors k must agree in shape and dtype.
            out: where to write: [P], [B, P], or K tensors of the parameters' shapes. It must not overlap the gradients.

        Returns:
            [P] or [B, P] for a matrix; for rows a list of K tensors (None where no task has a gradient). A non-finite
            gradient makes the whole result non-finite, without raising.

        Raises:
            TypeError: integer, complex or sparse gradients, or something that is no tensor.
            ValueError: wrong number of dimensions, no task, rows that differ in length, shape, dtype or device,
                gradients that require grad, weights of another length than T, an `out` that does not fit or overlaps an
                input.
        """
        if not isinstance(gradients, Tensor):
            return self._align_rows(gradients, out)[0]
        G = gradients
        if not isinstance(out, Tensor) or out.requires_grad or not out.is_cpu or G.requires_grad or not _HAS_KERNELS:
            out = _checked_out(G, out)
        # A small problem takes the kernel a microsecond or two: its own checks stand in for ours, which would take as
        # long, and ours are asked only for what to say.
        try:
            ops.align(G, *self._policy(G.shape[-2], G.dtype, G), out)
        except Exception:
            _checked_out(G, out)
            raise
        _mark_written(out)
        return out

    def weighting(self, M: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Task weights α from a Gram matrix: the middle of the pipeline, for those who have M = G Gᵀ already.

        Args:
            M: Gram matrix [T, T] or a batch [B, T, T], float32 or float64.
            dtype: dtype of the gradients behind `M`, which sets the default `rtol`; default: that of `M`.

        Returns:
            α, float64, [T] or [B, T].

        Raises:
            TypeError: `M` is no float32 or float64 tensor.
            ValueError: `M` is not square.
        """
        if not isinstance(M, Tensor) or M.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"M: expected a float32 or float64 tensor, got {describe(M)}")
        if M.ndim not in (2, 3) or M.shape[-1] != M.shape[-2] or M.shape[-1] == 0:
            raise ValueError(f"M: expected shape [T, T] or [B, T, T] with T >= 1, got {describe(M)}")
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype!r}")
        return ops.balance(M, *self._policy(M.shape[-1], dtype or M.dtype, M))[0]

    def backward(
        self,
        losses: Sequence[Tensor],
        shared: Iterable[Tensor],
        scale_heads: bool = False,
        retain_graph: bool = False,
    ) -> Info:
        """T backward passes, then one commit: the aligned gradient is added to `.grad` of the shared parameters.

        Every other parameter that a loss reaches gets the gradient of its own loss (of their sum, where several reach
        it). Gradients are committed once through autograd, so that hooks fire; whatever fails before leaves every
        `.grad` as it was.

        Args:
            losses: T scalar losses.
            shared: the shared parameters; one that no loss reaches is left untouched.
            scale_heads: multiply the gradients of head t by α_t.
            retain_graph: keep the graph for another backward.

        Returns:
            What the alignment saw and did: `alpha`, `gram`, `eigenvalues`, `rank`.

        Raises:
            TypeError: a loss or a shared parameter is not a floating tensor, or a gradient is sparse.
            ValueError: a loss that is not a scalar or does not require grad, no loss, an empty `shared`, a shared
                tensor that is no leaf requiring grad, weights of another length than T.
        """
        return backward(self, losses, shared, scale_heads=scale_heads, retain_graph=retain_graph)

    def _check_tasks(self, T: int) -> None:
        if isinstance(self.weights, Tensor) and self.weights.shape[0] != T:
            raise ValueError(f"weights: expected length {T} (the number of tasks), got {self.weights.shape[0]}")

    def _align_rows(self, rows: Rows, out: Sequence[Tensor | None] | None = None) -> tuple[list[Tensor | None], Info]:
        """The pipeline on a ragged list: results per parameter (None where no task has a gradient) and the info."""
        grads, K = check_rows(rows)
        T = len(rows)
        # Columns without any gradient have no shape: they stay None.
        like: dict[int, Tensor] = {}
        for k in range(K):
            first = next((g for g in grads[k::K] if g is not None), None)
            if first is not None:
                like[k] = first
        if not like:
            raise ValueError(f"rows: expected at least one gradient, got none in {T} rows of {K}")
        if len(like) < K:
            grads = [grads[t * K + k] for t in range(T) for k in like]
        if out is None:
            targets = [torch.empty_like(g) for g in like.values()]
        elif not isinstance(out, (list, tuple)) or len(out) != K:
            got = f"{len(out)} entries" if isinstance(out, (list, tuple)) else describe(out)
            raise ValueError(f"out: expected a sequence of {K} tensors, got {got}")
        else:
            targets = [check_out(out[k], g, g.shape, f"out[{k}]") for k, g in like.items()]
            check_apart(targets, [g for g in grads if g is not None])
        coarsest = max((g.dtype for g in like.values()), key=_EPS.__getitem__)
        policy = self._policy(T, coarsest, targets[0])
        gram, alpha, eigenvalues, rank = ops.align_rows(grads, T, *policy, targets)
        _mark_written(targets)
        results: list[Tensor | None] = [None] * K
        for k, target in zip(like, targets, strict=True):
            results[k] = target
        return results, Info(alpha, gram, eigenvalues, rank)

    def _policy(self, T: int, dtype: torch.dtype, like: Tensor) -> tuple[Tensor | None, str, float, float, str]:
        """The numerical decisions as the ops take them."""
        weights: Tensor | None = None
        if isinstance(self.weights, str):
            if self.weights != "mean":
                weights = self._weights_on(T, like)
        else:
            self._check_tasks(T)
            weights = self.weights if self.weights.device == like.device else self._weights_on(T, like)
        default, zero = _tolerances(T, dtype)
        return weights, self.scale, default if self.rtol is None else self.rtol, zero, self.rank_rule

    def _weights_on(self, T: int, like: Tensor) -> Tensor:
        """The weights [T] where the gradients are. A copy is kept: to make one, the host waits for the device."""
        # What a compiled or captured graph allocates is its own, and a fake tensor has no numbers.
        if torch.compiler.is_compiling() or type(like) not in _PLAIN:
            return self._new_weights(T, like)
        weights = self.weights
        key = (weights, T, like.device)
        placed = self._placed.get(key)
        if placed is None:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._new_weights(T, like)
            with torch.inference_mode(False):
                host = torch.ones(T, dtype=torch.float64, device="cpu") if isinstance(weights, str) else weights.cpu()
                placed = host.to(like.device)  # from the host: complete for every stream when it returns
            if type(placed) is Tensor:
                self._placed[key] = placed
        return placed

    def _new_weights(self, T: int, like: Tensor) -> Tensor:
        if isinstance(self.weights, str):
            return like.new_ones(T, dtype=torch.float64)
        return self.weights.to(like.device)


def _checked_out(G: Tensor, out: Tensor | None) -> Tensor:
    """The result's tensor for G [T, P] or [B, T, P]: `out` if it fits, a new one if there is none."""
    check_matrix(G)
    *batch, _, P = G.shape
    if out is None:
        return G.new_empty((*batch, P))
    check_out(out, G, (*batch, P))
    check_apart([out], [G])
    return out


def _tolerances(T: int, dtype: torch.dtype) -> tuple[float, float]:
    """Default rtol of T gradients of this dtype, and the relative row norm below which a row is rounding noise."""
    if dtype is torch.float32:
        return math.sqrt(T * _EPS32), _EPS32
    if dtype is torch.float64:
        return math.sqrt(T * _EPS64), _EPS64
    return max(math.sqrt(T * _EPS32), _EPS[dtype]), _EPS32


def _checked_weights(weights: Tensor | Sequence[float] | str | None) -> Tensor | str:
    if weights is None:
        return "mean"
    if isinstance(weights, str):
        if weights not in ("mean", "sum"):
            raise ValueError(f'weights: expected None, "mean", "sum" or T numbers, got {weights!r}')
        return weights
    if not isinstance(weights, (Tensor, list, tuple)):
        raise TypeError(f'weights: expected None, "mean", "sum" or T numbers, got {describe(weights)}')
    try:
        w = torch.as_tensor(weights, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f'weights: expected None, "mean", "sum" or T numbers, got {weights!r}') from error
    if w.ndim != 1 or w.shape[0] == 0:
        raise ValueError(f"weights: expected shape [T], got {list(w.shape)}")
    if not bool(w.isfinite().all()):
        raise ValueError(f"weights: expected finite numbers, got {w.tolist()}")
    return w


def _mark_written(out: Tensor | list[Tensor]) -> None:
    # Stable-ABI ops do not do it: without this, autograd would not notice a saved tensor overwritten through `out`.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)

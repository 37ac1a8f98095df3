"""Measures of a system of task gradients, all from its Gram matrix: condition number, conflict, dominance.

Every function takes M = G Gᵀ, float64 or float32 [T, T] or a batch [B, T, T], or the `Info` of a step, from which it
reads the Gram (and any eigenvalues, rank and task weights). Results are float64, on the Gram's device, and the host
does not wait for them. Conventions:

* Only singular values, norms and `aligned_gram` depend on the scale of the gradients.
* A task whose norm is zero (M_tt <= 0) is orthogonal to all others: its cosines are 0.
* If there is no pair to take a minimum or maximum over (T = 1), it is that of the gradient with itself.
* A matrix with a non-finite entry gives NaN everywhere.

Sources: "the paper" is Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023; PCGrad is
Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info, tolerances
from fastmtl.inputs import DTYPES, describe
from fastmtl.observe import formulas

__all__ = [
    "aligned_gram",
    "condition_number",
    "conflicts",
    "cosines",
    "curvature_bound",
    "gradient_diversity",
    "magnitude_similarity",
    "max_curvature_bound",
    "max_norm_ratio",
    "min_cosine",
    "min_magnitude_similarity",
    "noise_scale",
    "norms",
    "rank",
    "singular_values",
    "stable_rank",
    "summary",
    "total_cosines",
    "total_norm",
]

_SCALES = ("min", "median", "rmse")


# ------------------------------------------------------------------------------------------------ the spectrum


def singular_values(x: Tensor | Info) -> Tensor:
    """Singular values of the gradient matrix, σ = sqrt(λ(M)).

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        σ [T] or [B, T], descending: all T, including those that the rank rule drops. Values that should be zero are
        rounding noise of up to about 1e-7 of the largest, since M holds their squares.

    Raises:
        TypeError: `x` is neither a float32 or float64 tensor nor an info.
        ValueError: `x` is not square, or an info without a Gram matrix. Every function here raises these.
    """
    return _spectrum(x, None)[0].sqrt()


def rank(x: Tensor | Info, dtype: torch.dtype | None = None) -> Tensor:
    """The number R of independent task gradients.

    The step's own rank if `x` is an info that has one; else under Aligned-MTL's default rule (`AlignedMTL`, `rtol`).

    Args:
        x: M [T, T] or [B, T, T], or an info.
        dtype: dtype of the gradients behind M, which sets the tolerance; default: that of M (an info's is float64).

    Returns:
        R, int64, [] or [B]; 0 for a non-finite matrix.

    Raises:
        TypeError: `dtype` is not float32, float64, bfloat16 or float16.
    """
    return _spectrum(x, dtype)[1]


def condition_number(x: Tensor | Info, dtype: torch.dtype | None = None) -> Tensor:
    """κ(G) = σ_max / σ_min over the R kept singular values: the paper's stability criterion (Eq. 2).

    1 for orthogonal gradients of equal norm, at least `max_norm_ratio` if none is dropped, and 1 if all are zero.

    Args:
        x: M [T, T] or [B, T, T], or an info.
        dtype: as in `rank`.

    Returns:
        κ, [] or [B].
    """
    return formulas.condition_number(*_spectrum(x, dtype))


def stable_rank(x: Tensor | Info) -> Tensor:
    """‖G‖_F² / σ_max², between 1 (one direction dominates) and the rank (all singular values alike).

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        [] or [B]; 0 if all gradients are zero.
    """
    return formulas.stable_rank(_spectrum(x, None)[0])


def aligned_gram(x: Tensor | Info, scale: str = "min", dtype: torch.dtype | None = None) -> Tensor:
    """Gram matrix of the aligned system Ĝ = Bᵀ G, M̂ = Bᵀ M B = s · V_R V_Rᵀ (paper, Eq. 5 and Algorithm 1).

    B = sqrt(s) V_R diag(λ_R^-1/2) V_Rᵀ over the R kept eigenvalues. If the gradients are independent, M̂ is s·I, with
    condition number 1, no conflict and no dominance; otherwise it is s times a projector. Comparing its measures with
    those of M shows what aligning would change, whichever method made the step.

    Args:
        x: M [T, T] or [B, T, T], or an info.
        scale: s, as in `AlignedMTL`: "min", "median" or "rmse" of the kept eigenvalues.
        dtype: as in `rank`.

    Returns:
        M̂, of M's shape.

    Raises:
        ValueError: unknown `scale`.
    """
    if scale not in _SCALES:
        raise ValueError(f"scale: expected one of {_SCALES}, got {scale!r}")
    eigenvalues, kept = _spectrum(x, dtype)
    return formulas.aligned_gram(_gram(x), eigenvalues, kept, scale)


# ------------------------------------------------------------------------------------------------ conflict


def cosines(x: Tensor | Info) -> Tensor:
    """cos(g_i, g_j) = M_ij / (‖g_i‖ ‖g_j‖): negative where two tasks conflict (PCGrad, definition 1).

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        [T, T] or [B, T, T], in [-1, 1]; the diagonal is 1, and 0 for zero gradients.
    """
    M = _gram(x)
    return formulas.cosines(M, formulas.norms(M))


def min_cosine(x: Tensor | Info) -> Tensor:
    """The worst conflict, min_{i≠j} cos(g_i, g_j) (paper, Fig. 4c).

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        [] or [B].
    """
    return cosines(x).amin((-1, -2))  # the diagonal never is the smallest alone


def conflicts(x: Tensor | Info) -> Tensor:
    """The share of pairs of gradients in conflict, cos(g_i, g_j) < 0.

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        [] or [B], in [0, 1]; 0 if there is no pair.
    """
    return formulas.conflicts(cosines(x))


def curvature_bound(x: Tensor | Info) -> Tensor:
    """ξ(g_i, g_j) = (1 - cos²) ‖g_i - g_j‖² / ‖g_i + g_j‖², PCGrad's multi-task curvature bounding measure.

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        [T, T] or [B, T, T], in [0, 4], with diagonal 0. If g_i = -g_j (to rounding) the formula is 0/0, and the
        result is 4, its limit for gradients of equal norm; with a zero gradient it is 1.
    """
    M = _gram(x)
    lengths = formulas.norms(M)
    return formulas.curvature_bound(formulas.cosines(M, lengths), lengths)


def max_curvature_bound(x: Tensor | Info) -> Tensor:
    """max_{i≠j} ξ(g_i, g_j): see `curvature_bound`.

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        [] or [B]; 0 for T = 1.
    """
    return curvature_bound(x).amax((-1, -2))


# ------------------------------------------------------------------------------------------------ dominance


def norms(x: Tensor | Info) -> Tensor:
    """Norms of the task gradients, ‖g_t‖ = sqrt(M_tt).

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        [T] or [B, T].
    """
    return formulas.norms(_gram(x))


def magnitude_similarity(x: Tensor | Info) -> Tensor:
    """2 ‖g_i‖ ‖g_j‖ / (‖g_i‖² + ‖g_j‖²), PCGrad's gradient magnitude similarity (definition 2; paper, section 4).

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        [T, T] or [B, T, T], in [0, 1]: 1 for equal norms (two zeros too), 0 where only one gradient is zero.
    """
    return formulas.similarity(formulas.pairs(norms(x)))


def min_magnitude_similarity(x: Tensor | Info) -> Tensor:
    """min_{i≠j} of `magnitude_similarity` (paper, Fig. 4b).

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        [] or [B].
    """
    return formulas.similarity(1 / max_norm_ratio(x))


def max_norm_ratio(x: Tensor | Info) -> Tensor:
    """max_{i≠j} ‖g_i‖ / ‖g_j‖, the most intuitive measure of dominance (paper, Fig. 4).

    Args:
        x: M [T, T] or [B, T, T], or an info.

    Returns:
        [] or [B]; infinite if some, but not all gradients are zero.
    """
    return formulas.max_norm_ratio(norms(x))


# ------------------------------------------------------------------------------------------------ of examples


def gradient_diversity(x: Tensor | Info) -> Tensor:
    """Σ_b ‖g_b‖² / ‖Σ_b g_b‖² of B gradients (Yin et al., 2018): 1/B if all agree, 1 if all are orthogonal.

    Args:
        x: M [B, B] or [N, B, B], or an info of a step with `batch_dim`.

    Returns:
        [] or [N]; ∞ if the gradients cancel, NaN if all are zero.
    """
    return (M := _gram(x)).diagonal(dim1=-2, dim2=-1).sum(-1) / M.sum((-1, -2)).clamp_min(0)


def noise_scale(x: Tensor | Info) -> Tensor:
    """The gradient noise scale tr Σ / ‖ḡ‖² (McCandlish et al., 2018, appendix A): batches beyond it gain little.

    Unbiased estimates from B gradients: Σ_b ‖g_b - ḡ‖² / (B - 1) for tr Σ, ‖ḡ‖² minus tr Σ / B for the denominator.

    Args:
        x: M [B, B] or [N, B, B], or an info of a step with `batch_dim`.

    Returns:
        [] or [N]; ∞ if noise hides the mean gradient, NaN for one example.
    """
    M = _gram(x)
    B, mean = M.shape[-1], M.mean((-1, -2))  # ‖ḡ‖²
    noise = (M.diagonal(dim1=-2, dim2=-1).mean(-1) - mean).clamp_min(0) * (B / (B - 1) if B > 1 else torch.nan)
    return torch.where((square := mean - noise / B) <= 0, torch.inf, noise / square)


# ------------------------------------------------------------------------------------------------ the committed one


def total_norm(x: Tensor | Info, weights: Tensor | None = None) -> Tensor:
    """Norm of the aggregated gradient, ‖αᵀ G‖ = sqrt(αᵀ M α).

    Args:
        x: M [T, T] or [B, T, T], or an info.
        weights: α [T] or [B, T]; default: the info's, or 1/T each if it has none (‖g_0‖ of the paper).

    Returns:
        [] or [B]. A norm below about 1e-8 of Σ |α_t| ‖g_t‖ is rounding noise.
    """
    return formulas.total(M := _gram(x), _weights(x, M, weights))[1]


def total_cosines(x: Tensor | Info, weights: Tensor | None = None) -> Tensor:
    """cos(αᵀ G, g_t) of the aggregated gradient with each task's: negative if the step conflicts with task t.

    Args:
        x: M [T, T] or [B, T, T], or an info.
        weights: as in `total_norm`.

    Returns:
        [T] or [B, T], in [-1, 1]; 0 if either gradient is zero.
    """
    M = _gram(x)
    return formulas.total_cosines(formulas.norms(M), *formulas.total(M, _weights(x, M, weights)))


def summary(x: Tensor | Info, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All measures with a single number per system, from one eigendecomposition.

    Args:
        x: M [T, T] or [B, T, T], or an info.
        dtype: as in `rank`.

    Returns:
        Float64 tensors [] or [B]: `condition_number`, `max_singular_value`, `min_singular_value` (the smallest kept,
        0 if all gradients are zero), `rank`, `stable_rank`, `min_cosine`, `max_curvature_bound`,
        `min_magnitude_similarity`, `max_norm_ratio`, `max_norm`, `min_norm`, `total_norm` and `min_total_cosine`, the
        last two with the default weights of `total_norm`.
    """
    M = _gram(x)
    eigenvalues, kept = _spectrum(x, dtype)
    lengths = formulas.norms(M)
    cosine = formulas.cosines(M, lengths)
    ratio = formulas.max_norm_ratio(lengths)
    products, total = formulas.total(M, _weights(x, M, None))
    finite = 0 * lengths[..., 0]  # an int64 rank cannot be NaN
    return {
        "condition_number": formulas.condition_number(eigenvalues, kept),
        "max_singular_value": eigenvalues[..., 0].sqrt(),
        "min_singular_value": formulas.smallest_kept(eigenvalues, kept).sqrt(),
        "rank": kept + finite,
        "stable_rank": formulas.stable_rank(eigenvalues),
        "min_cosine": cosine.amin((-1, -2)),
        "max_curvature_bound": formulas.curvature_bound(cosine, lengths).amax((-1, -2)),
        "min_magnitude_similarity": formulas.similarity(1 / ratio),
        "max_norm_ratio": ratio,
        "max_norm": lengths.amax(-1),
        "min_norm": lengths.amin(-1),
        "total_norm": total,
        "min_total_cosine": formulas.total_cosines(lengths, products, total).amin(-1),
    }


# ------------------------------------------------------------------------------------------------ what is measured


def _gram(x: Tensor | Info) -> Tensor:
    """M in float64 and symmetric to the bit, which a product G Gᵀ need not be; NaN where an entry is not finite."""
    if isinstance(x, Info):
        if x.gram is None:
            raise ValueError("info: expected one with a Gram matrix, got one of older weights, or of a method without")
        M = x.gram
    else:
        M = x
        if not isinstance(M, Tensor) or M.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"M: expected an Info, or a float32 or float64 tensor, got {describe(M)}")
        if M.ndim not in (2, 3) or M.shape[-1] != M.shape[-2] or M.shape[-1] == 0:
            raise ValueError(f"M: expected shape [T, T] or [B, T, T] with T >= 1, got {describe(M)}")
    M = M.detach().to(torch.float64)
    M = 0.5 * M + 0.5 * M.mT
    return torch.where(M.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), M, torch.nan)


def _spectrum(x: Tensor | Info, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., T], descending and at least 0, and the rank [...]; those of the info as far as it has them."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype!r}")
    M = _gram(x)
    eigenvalues, kept = (x.eigenvalues, x.rank) if isinstance(x, Info) else (None, None)
    if eigenvalues is None or kept is None:
        given = M.dtype if isinstance(x, Info) else x.dtype
        rtol, zero = tolerances(M.shape[-1], dtype or given)
        _, own, rank = ops.balance(M, None, "min", rtol, zero, "normalized")
        eigenvalues = own if eigenvalues is None else eigenvalues
        kept = rank if kept is None else kept
    return eigenvalues, kept


def _weights(x: Tensor | Info, M: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None and isinstance(x, Info):
        weights = x.alpha
    if weights is None:
        return M.new_full(M.shape[:-1], 1 / M.shape[-1])
    if not isinstance(weights, Tensor) or not weights.shape or weights.shape[-1] != M.shape[-1]:
        raise ValueError(f"weights: expected a tensor [..., {M.shape[-1]}], got {describe(weights)}")
    return weights.to(M).expand(M.shape[:-1])

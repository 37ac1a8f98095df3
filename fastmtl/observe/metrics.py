"""How much a multi-task model gains or loses against single-task baselines: Δm (paper, section 6)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from fastmtl.inputs import describe

__all__ = ["delta_m"]


@overload
def delta_m(
    metrics: Tensor, baseline: Any, higher_is_better: Sequence[bool], tasks: Sequence[Hashable] | None = None
) -> Tensor: ...
@overload
def delta_m(
    metrics: Any, baseline: Any, higher_is_better: Sequence[bool], tasks: Sequence[Hashable] | None = None
) -> Any: ...
def delta_m(
    metrics: Any, baseline: Any, higher_is_better: Sequence[bool], tasks: Sequence[Hashable] | None = None
) -> Any:
    """Δm, the mean relative drop of a model's metrics against single-task baselines, in percent: negative is better.

        metric-weighted    Δm = 100 · mean_k d_k                     d_k = (-1)^σ_k (M_k - B_k) / B_k
        task-weighted      Δm = 100 · mean_t mean_{k in task t} d_k  (`tasks` given)

    with σ_k = 1 if a higher metric is better, else 0 (Maninis et al. 2019; paper, section 6, whose task-weighted
    formula lacks the 1/n_t that its numbers have). If all tasks have equally many metrics, both agree.

    Args:
        metrics: M [K], or [..., K] for several runs: a tensor, an array or (nested) sequences of numbers.
        baseline: B [K], the same metrics of the single-task models, positive.
        higher_is_better: for each of the K metrics, whether a higher value is better.
        tasks: the task of each of the K metrics, by name or number; None weights every metric alike.

    Returns:
        Δm in percent [...], float64: a tensor for a tensor, else a numpy scalar or array. A NaN metric gives NaN.

    Raises:
        TypeError: metrics or baselines that are not real numbers, `higher_is_better` with entries that are not bools.
        ValueError: no metric, lengths that differ, a baseline that is not one-dimensional or not positive and finite
            (dividing by zero or by a negative number gives no drop).
    """
    M = _numbers(metrics, "metrics")
    B = _numbers(baseline, "baseline").to(M.device)
    if B.ndim != 1 or not len(B):
        raise ValueError(f"baseline: expected shape [K] with K >= 1, got {list(B.shape)}")
    K = len(B)
    if not M.ndim or M.shape[-1] != K:
        raise ValueError(f"metrics: expected shape [..., {K}] (the number of baselines), got {list(M.shape)}")
    if not bool(((B > 0) & B.isfinite()).all()):
        raise ValueError(f"baseline: expected positive, finite numbers, got {B.tolist()}")
    higher = list(higher_is_better)
    if len(higher) != K:
        raise ValueError(f"higher_is_better: expected {K} entries (the number of metrics), got {len(higher)}")
    if not all(isinstance(up, (bool, np.bool_)) for up in higher):
        raise TypeError(f"higher_is_better: expected bools, got {higher}")
    signs = M.new_tensor([-1.0 if up else 1.0 for up in higher])
    drops = signs * (M - B) / B
    result = 100 * (drops * M.new_tensor(_shares(K, tasks))).sum(-1)
    return result if isinstance(metrics, Tensor) else result.numpy()[()]


def _shares(K: int, tasks: Sequence[Hashable] | None) -> list[float]:
    """The weight of each metric; they sum to 1."""
    if tasks is None:
        return [1 / K] * K
    if isinstance(tasks, Tensor):
        tasks = tasks.tolist()
    names = list(tasks)
    if len(names) != K:
        raise ValueError(f"tasks: expected {K} entries (the number of metrics), got {len(names)}")
    return [1 / (len(set(names)) * names.count(name)) for name in names]


def _numbers(values: Any, name: str) -> Tensor:
    if isinstance(values, Tensor):
        if values.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {describe(values)}")
        return values.detach().to(torch.float64)
    try:
        array = np.asarray(values)
        if array.dtype.kind in "biuf":
            return torch.from_numpy(array.astype(np.float64))
    except (TypeError, ValueError):  # ragged sequences
        pass
    raise TypeError(f"{name}: expected a tensor, an array or sequences of numbers, got {values!r}")

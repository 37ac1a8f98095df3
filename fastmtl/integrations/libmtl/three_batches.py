"""Weightings for which LibMTL's trainer takes three batches per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.graph import leaves_of
from fastmtl.integrations.libmtl.weighting import Weighting, one_by_one
from fastmtl.training.commit import commit, pairs
from fastmtl.training.passes import without_tensor_hooks

__all__ = ["ThreeBatches"]


class ThreeBatches(Weighting):
    """Weights from the product G₁ G₂ᵀ of the gradients of two batches, an unbiased estimate of the full gradients' one.

    The trainer passes losses [3, T] if the weighting is named MoDo or SDMGrad; with losses [T] the product is that of
    one batch, G Gᵀ. The other parameters get the mean of their gradients over the batches, as in LibMTL's MoDo (its
    SDMGrad adds them up). `rep_grad` has to be False.
    """

    _order: ClassVar[tuple[int, int, int]]  # the two batches for the weights, and the one for the gradients

    def backward(self, losses: Tensor | Sequence[Tensor], **kwargs: Any) -> np.ndarray | None:
        """See `Weighting.backward`; `losses` are [3, T] or [T]."""
        self._configure(kwargs)
        if self.rep_grad:
            raise ValueError(f"rep_grad: expected False with {type(self).__name__}, got True")
        batches = list(losses)
        if not batches[0].ndim:
            return self._step(one_by_one(losses))
        if len(batches) != 3 or any(batch.shape != (self.task_num,) for batch in batches):
            shapes = [list(batch.shape) for batch in batches]
            raise ValueError(f"losses: expected shape [3, {self.task_num}] or [{self.task_num}], got rows {shapes}")
        shared = [p for p in self.get_share_params() if p.requires_grad]
        ids = {id(p) for p in shared}
        T, K = self.task_num, len(shared)
        rows: list[list[Tensor | None]] = []
        own: dict[int, tuple[Tensor, Tensor]] = {}
        for batch in batches:
            flat: list[Tensor | None] = []
            for loss in one_by_one(batch):
                heads = [leaf for leaf in leaves_of([loss], []).all() if id(leaf) not in ids]
                with without_tensor_hooks([*shared, *heads]):
                    grads = torch.autograd.grad(loss, [*shared, *heads], retain_graph=True, allow_unused=True)
                flat += grads[:K]
                for leaf, g in zip(heads, grads[K:], strict=True):
                    if g is not None:
                        before = own.get(id(leaf))
                        own[id(leaf)] = leaf, g / 3 if before is None else before[1] + g / 3
            rows.append(flat)
        first, second, last = (rows[i] for i in self._order)
        both = ops.gram_rows([*first, *second], 2 * T)
        alpha = self.method.weighting(both[:T, T:].contiguous(), dtype=shared[0].dtype)
        reached = [k for k in range(K) if any(g is not None for g in last[k::K])]
        updates = [torch.empty_like(shared[k]) for k in reached]
        ops.combine_rows([last[t * K + k] for t in range(T) for k in reached], alpha, updates)
        targets = [shared[k] for k in reached]
        commit(pairs([*targets, *(leaf for leaf, _ in own.values())], [*updates, *(g for _, g in own.values())]))
        weights: np.ndarray = alpha.cpu().numpy()
        return weights

"""LibMTL's weightings that look at gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import fastmtl
from fastmtl import scalarization
from fastmtl.info import Info
from fastmtl.integrations.libmtl.three_batches import ThreeBatches
from fastmtl.integrations.libmtl.weighting import Weighting, one_by_one
from fastmtl.methods.aligned import RankRule, Scale
from fastmtl.methods.base import Method
from fastmtl.methods.mgda import Normalization
from fastmtl.rule import NOTHING, Context

__all__ = [
    "DB_MTL",
    "IMTL",
    "MGDA",
    "RGW",
    "Aligned_MTL",
    "CAGrad",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "MoCo",
    "MoDo",
    "Nash_MTL",
    "PCGrad",
    "SDMGrad",
    "UPGrad",
]


class Aligned_MTL(Weighting):
    """`fastmtl.AlignedMTL` with task weights one, as LibMTL has it; `rank_rule="gram"` is LibMTL's rank rule."""

    @staticmethod
    def make(tasks: int, scale: Scale = "min", rank_rule: RankRule = "normalized") -> Method:
        """See the class."""
        return fastmtl.AlignedMTL(weights="sum", scale=scale, rank_rule=rank_rule)


class MGDA(Weighting):
    """`fastmtl.MGDA`; `mgda_gn` is its normalization. The weights are applied to the gradients as they are."""

    @staticmethod
    def make(tasks: int, mgda_gn: Normalization = "none") -> Method:
        """See the class."""
        return fastmtl.MGDA(normalization=mgda_gn)


class PCGrad(Weighting):
    """`fastmtl.PCGrad`."""

    @staticmethod
    def make(tasks: int) -> Method:
        """See the class."""
        return fastmtl.PCGrad()


class GradVac(Weighting):
    """`fastmtl.GradVac`; `beta` is called `GradVac_beta` in earlier versions of LibMTL.

    `GradVac_group_type`: 0, the whole model; 1, every layer of shared parameters has targets of its own; 2, every
    tensor of them. With `rep_grad=True` it has to be 0.
    """

    @staticmethod
    def make(tasks: int, GradVac_beta: float = 0.5, beta: float | None = None) -> Method:
        """See the class."""
        return fastmtl.GradVac(beta=GradVac_beta if beta is None else beta)

    def backward(self, losses: Tensor | Sequence[Tensor], GradVac_group_type: int = 0, **kwargs: Any) -> Any:
        """See `Weighting.backward`."""
        if GradVac_group_type not in (0, 1, 2) or (GradVac_group_type and self.rep_grad):
            expected = "0 with rep_grad=True" if self.rep_grad else "0, 1 or 2"
            raise ValueError(f"GradVac_group_type: expected {expected}, got {GradVac_group_type!r}")
        self._configure(kwargs)
        groups = self._groups(by_layer=GradVac_group_type == 1) if GradVac_group_type else None
        return self._step(one_by_one(losses), groups)

    def _groups(self, by_layer: bool) -> list[list[Tensor]]:
        shared = {id(p): p for p in self.get_share_params() if p.requires_grad}
        groups: list[list[Tensor]] = []
        if by_layer:
            for layer in self.modules():
                groups.append([p for p in layer.parameters(recurse=False) if shared.pop(id(p), None) is not None])
        return [*(group for group in groups if group), *([p] for p in shared.values())]


class CAGrad(Weighting):
    """`fastmtl.CAGrad`; `calpha` is its c. LibMTL's third `rescale`, 2, divides by 1 + c."""

    @staticmethod
    def make(tasks: int, calpha: float = 0.5, rescale: Literal[0, 1, 2] = 1) -> Method:
        """See the class."""
        return _LinearlyRescaled(c=calpha, rescale=0) if rescale == 2 else fastmtl.CAGrad(c=calpha, rescale=rescale)


class _LinearlyRescaled(fastmtl.CAGrad):
    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        info = super().solve(M, dtype, context)
        info.alpha = info.alpha / (1 + self.c)
        return info


class IMTL(Weighting):
    """`fastmtl.IMTL` on losses scaled by `fastmtl.scalarization.IMTLL`: both halves of the method."""

    @staticmethod
    def make(tasks: int) -> Method:
        """See the class."""
        return fastmtl.IMTL()

    def init_param(self) -> None:
        """See `Weighting.init_param`."""
        super().init_param()
        self.scales: scalarization.IMTLL = scalarization.IMTLL(self.task_num)

    def backward(self, losses: Tensor | Sequence[Tensor], **kwargs: Any) -> np.ndarray | None:
        """See `Weighting.backward`; the weights are those of the scaled losses."""
        self._configure(kwargs)
        return self._step(self.scales.scaled(one_by_one(losses)))  # type: ignore[arg-type]


class Nash_MTL(Weighting):
    """`fastmtl.NashMTL`; heads get their own gradients unweighted. `optim_niter` has no effect: α is exact."""

    @staticmethod
    def make(tasks: int, update_weights_every: int = 1, optim_niter: int = 20, max_norm: float = 1.0) -> Method:
        """See the class."""
        return fastmtl.NashMTL(max_norm=max_norm, every=update_weights_every)


class GradDrop(Weighting):
    """`fastmtl.GradDrop`; returns no task weights.

    With `rep_grad=True` the sign is drawn once for each feature, as in LibMTL and the paper's section 3: by the purity
    of the gradients times the sign of the representation, summed over the batch. With `rep_sum=False`, and with
    `rep_grad=False`, it is drawn in every coordinate, by the gradients as they are. Tasks may have representations of
    their own, of one shape.
    """

    @staticmethod
    def make(tasks: int, leak: float = 0.0) -> Method:
        """See the class."""
        return fastmtl.GradDrop(leak=leak)

    def _on_rows(
        self, rows: Sequence[Tensor | None], losses: list[Tensor], several: bool
    ) -> tuple[Sequence[Tensor | None], Info]:
        reps = [self.rep[task] for task in self.task_name] if several else [self.rep] * len(rows)
        signed = [
            None if g is None else g * x.detach().sign() if self._rep_sum else g
            for g, x in zip(rows, reps, strict=True)
        ]
        votes, present = self._summed(signed)
        total = torch.stack(present)
        magnitude = total.abs().sum(0)
        purity = torch.where(magnitude > 0, 0.5 * (1 + total.sum(0) / magnitude), 0.5)
        drawn = purity > torch.rand_like(purity)
        leak: float = self.method.leak
        kept: list[Tensor | None] = []
        for g, vote in zip(rows, votes, strict=True):
            if g is None or vote is None:
                kept.append(None)
            else:
                kept.append(g * torch.where(drawn, vote > 0, vote < 0).to(g.dtype).mul_(1 - leak).add_(leak))
        if not several:
            kept = [torch.stack([g for g in kept if g is not None]).sum(0)]
        return kept, Info.of()


class RGW(Weighting):
    """`fastmtl.RLW`."""

    @staticmethod
    def make(tasks: int) -> Method:
        """See the class."""
        return fastmtl.RLW()


class UPGrad(Weighting):
    """`fastmtl.UPGrad`; `UPGrad_reg_eps` is its ridge. `UPGrad_norm_eps` has no effect: no gradient is too short."""

    @staticmethod
    def make(tasks: int, UPGrad_norm_eps: float = 0.0, UPGrad_reg_eps: float = 0.0) -> Method:
        """See the class."""
        return fastmtl.UPGrad(ridge=UPGrad_reg_eps)


class MoCo(Weighting):
    """`fastmtl.MoCo`; `rep_grad` has to be False."""

    @staticmethod
    def make(
        tasks: int,
        MoCo_beta: float = 0.5,
        MoCo_beta_sigma: float = 0.5,
        MoCo_gamma: float = 0.1,
        MoCo_gamma_sigma: float = 0.5,
        MoCo_rho: float = 0.0,
    ) -> Method:
        """See the class."""
        return fastmtl.MoCo(
            beta=MoCo_beta, beta_decay=MoCo_beta_sigma, gamma=MoCo_gamma, gamma_decay=MoCo_gamma_sigma, rho=MoCo_rho
        )


class DB_MTL(Weighting):
    """`fastmtl.DBMTL` on the losses' logarithms, heads too; `rep_grad` has to be False."""

    @staticmethod
    def make(tasks: int, DB_beta: float = 0.9, DB_beta_sigma: float = 0.0) -> Method:
        """See the class."""
        return fastmtl.DBMTL(beta=DB_beta, beta_decay=DB_beta_sigma, log=False)

    def backward(self, losses: Tensor | Sequence[Tensor], **kwargs: Any) -> np.ndarray | None:
        """See `Weighting.backward`."""
        self._configure(kwargs)
        return self._step([(loss + 1e-8).log() for loss in one_by_one(losses)])


class ExcessMTL(Weighting):
    """`fastmtl.ExcessMTL` with weights that sum to T, heads too; `rep_grad` has to be False.

    As in LibMTL the first step has weights one.
    """

    @staticmethod
    def make(tasks: int, robust_step_size: float = 1e-2) -> Method:
        """See the class."""
        return fastmtl.ExcessMTL(step_size=robust_step_size, warmup=1)

    def backward(self, losses: Tensor | Sequence[Tensor], **kwargs: Any) -> np.ndarray | None:
        """See `Weighting.backward`."""
        self._configure(kwargs)
        T = self.task_num
        alpha = self._step([T * loss for loss in one_by_one(losses)], scale_heads=True)
        return None if alpha is None else T * alpha


class MoDo(ThreeBatches):
    """`fastmtl.MoDo`: the trainer gives the losses of three batches, two of them for the weights."""

    _order = (0, 1, 2)

    @staticmethod
    def make(tasks: int, MoDo_gamma: float = 1e-3, MoDo_rho: float = 0.1) -> Method:
        """See the class."""
        return fastmtl.MoDo(gamma=MoDo_gamma, rho=MoDo_rho)


class SDMGrad(ThreeBatches):
    """`fastmtl.SDMGrad`: the trainer gives the losses of three batches, two of them for the weights."""

    _order = (1, 2, 0)

    @staticmethod
    def make(tasks: int, SDMGrad_lamda: float = 0.3, SDMGrad_niter: int = 20) -> Method:
        """See the class."""
        return fastmtl.SDMGrad(lam=SDMGrad_lamda, iterations=SDMGrad_niter, lr=5.0)


class FairGrad(Weighting):
    """`fastmtl.FairGrad`; heads get their own gradients unweighted."""

    @staticmethod
    def make(tasks: int, FairGrad_alpha: float = 1.0) -> Method:
        """See the class."""
        return fastmtl.FairGrad(fairness=FairGrad_alpha)

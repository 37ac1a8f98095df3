"""Weightings for LibMTL's trainer, under LibMTL's names, with the methods of this package behind them.

    from LibMTL import Trainer
    from fastmtl.integrations.libmtl import Aligned_MTL  # instead of: from LibMTL.weighting import Aligned_MTL

    Trainer(..., weighting=Aligned_MTL, ...)

LibMTL is not imported: its trainer accepts any class that follows the protocol of its `AbsWeighting`, and so do these.
The protocol: the trainer makes a model of an architecture and a weighting, `class MTLmodel(architecture, weighting)`,
calls `init_param()` once and `backward(losses, **weight_args)` in every step, after `optimizer.zero_grad`, and records
the task weights [T] that it returns. The architecture provides `task_num`, `task_name`, `device`, `rep_grad`,
`get_share_params()` and, with `rep_grad=True`, the representation `rep` and the detached copies `rep_tasks` of it that
the heads read; the trainer sets `epoch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import ops, scalarization
from fastmtl.graph import edge_of, leaves_of, trunk_of
from fastmtl.info import Info
from fastmtl.methods.aligned import RankRule, Scale
from fastmtl.methods.base import Method
from fastmtl.methods.mgda import Normalization
from fastmtl.pipeline import aggregate_rows
from fastmtl.rule import NOTHING, Context, context_of
from fastmtl.scalarization import Scalarization
from fastmtl.training.backward import _commit, _pairs, _pass, _without_tensor_hooks

__all__ = [
    "DWA",
    "EW",
    "FAMO",
    "GLS",
    "IMTL",
    "MGDA",
    "RGW",
    "RLW",
    "STCH",
    "UW",
    "Aligned_MTL",
    "CAGrad",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "Nash_MTL",
    "PCGrad",
    "UPGrad",
    "Weighting",
    "weighting_of",
]


class Weighting(nn.Module):
    """A weighting strategy for LibMTL's trainer; subclasses say by `make` which method stands behind it.

    Shared parameters get the aggregated gradient, all others the gradient of their own loss (methods on losses: of the
    weighted sum). With `rep_grad=False` the task gradients are those of the shared parameters, by T backward passes;
    with `rep_grad=True` those of the representation, by one pass through the heads and one through the encoder. Every
    method accepts both. Gradients are added to `.grad`, at once and only when everything else has succeeded.

    `weight_args` are the arguments of `make`; unknown ones raise. The method is part of the model: what it has learned
    or remembers is in `model.state_dict()`, and its parameters, if any, in `model.parameters()`, so that the trainer's
    optimizer learns them (those of LibMTL's UW and IMTL stay at their first values: no optimizer sees them).
    """

    method: Any
    # What the architecture and the trainer provide.
    task_num: int
    task_name: Sequence[str]
    device: Any
    rep_grad: bool
    rep: Any
    rep_tasks: dict[str, Tensor]
    get_share_params: Callable[[], Iterable[Tensor]]

    _counts_epochs = False

    @staticmethod
    def make(tasks: int) -> Method | Scalarization:
        """The method for so many tasks; further arguments, all with defaults, are the options in `weight_args`."""
        raise NotImplementedError

    def init_param(self) -> None:
        """Makes the method with its defaults: before the optimizer, which takes its parameters."""
        self.method = self.make(self.task_num)
        self._options: dict[str, Any] = {}
        self._epoch: int | None = None

    def backward(self, losses: Tensor | Sequence[Tensor], **kwargs: Any) -> np.ndarray | None:
        """From T losses to `.grad`.

        Args:
            losses: a tensor [T], as LibMTL's trainer makes it (each of the T passes then goes through all heads, as in
                LibMTL: its entries have one graph), or a sequence of T scalars.
            **kwargs: the options.

        Returns:
            The task weights, float64 [T]; None for a method that has none (`GradDrop`).

        Raises:
            TypeError: an option that the method does not have.
            ValueError: an option out of range; with `rep_grad=True`, a representation for each task where these differ
                in shape or the method has no task weights.
        """
        self._configure(kwargs)
        return self._step(_one_by_one(losses))

    def _configure(self, options: dict[str, Any]) -> None:
        """Takes over the options; the state, which may have been loaded, stays."""
        if options == self._options:
            return
        method = self.make(self.task_num, **options)
        if isinstance(method, nn.Module):
            if next(method.parameters(), None) is not None:
                raise ValueError(f"{type(self).__name__}: expected no options in weight_args, got {sorted(options)}")
            method.load_state_dict(self.method.state_dict())
            method.to(self.device).train(self.training)
        self.method, self._options = method, dict(options)

    def _step(self, losses: list[Tensor], groups: list[list[Tensor]] | None = None) -> np.ndarray | None:
        if self._counts_epochs:
            self._end_epochs()
        if self.rep_grad:
            info = self._through_representation(losses)
        elif isinstance(self.method, Scalarization):
            info = self.method.backward(losses)
        else:
            shared = None if groups is not None else [p for p in self.get_share_params() if p.requires_grad]
            info = self.method.backward(losses, shared, groups=groups)
        if info.alpha is None:
            return None
        alpha = info.alpha if info.alpha.ndim == 1 else info.alpha.mean(0)  # over groups of parameters
        return alpha.cpu().numpy()

    def _end_epochs(self) -> None:
        """Tells the method of the epochs that have ended since the last step."""
        now = getattr(self, "epoch", 0)
        for _ in range(0 if self._epoch is None else now - self._epoch):
            self.method.end_epoch()
        self._epoch = now

    def _through_representation(self, losses: list[Tensor]) -> Info:
        """The upper bound. The heads read copies of the representation, so that one pass brings all T gradients."""
        on_losses = isinstance(self.method, Scalarization)
        total = self.method(losses) if on_losses else sum(losses[1:], losses[0])
        copies = [self.rep_tasks[task] for task in self.task_name]
        several = isinstance(self.rep, dict)
        rep = [self.rep[task] for task in self.task_name] if several else [self.rep]
        ids = {id(x) for x in copies}
        heads = [leaf for leaf in leaves_of([total], []).all() if id(leaf) not in ids]
        trunk = trunk_of(edge_of(x) for x in rep).leaves
        with _without_tensor_hooks([*heads, *trunk]):
            grads = torch.autograd.grad(total, [*copies, *heads], allow_unused=True)
            rows, own = grads[: len(copies)], grads[len(copies) :]
            cotangents, info = self._on_losses(rows, several) if on_losses else self._on_rows(rows, losses, several)
            updates = _pass(rep, cotangents, trunk)
        _commit(_pairs([*trunk, *heads], [*updates, *own]))
        return info

    def _on_losses(self, rows: Sequence[Tensor | None], several: bool) -> tuple[Sequence[Tensor | None], Info]:
        """Cotangents of the representation where the gradients are those of weighted losses."""
        info = self.method.info
        if several:
            return rows, info
        reached = [g for g in rows if g is not None]
        return [torch.stack(reached).sum(0) if reached else None], info

    def _on_rows(
        self, rows: Sequence[Tensor | None], losses: list[Tensor], several: bool
    ) -> tuple[Sequence[Tensor | None], Info]:
        """The same where they are to be aggregated."""
        method: Method = self.method
        T = len(losses)
        context = context_of(method, losses, T)
        if not several:
            return aggregate_rows(method, [[g] for g in rows], None, context)
        if not method.on_gram:
            raise ValueError(f"rep: expected one representation for all tasks, which {method!r} needs, got {T}")
        present = [g for g in rows if g is not None]
        if len({g.shape for g in present}) != 1:
            shapes = [list(g.shape) for g in present]
            raise ValueError(f"rep: expected representations of one shape that losses reach, got {shapes}")
        method.check_tasks(T)
        info = method.solve(ops.gram_rows(rows, T), present[0].dtype, context)
        return [None if g is None else g * info.alpha[t].to(g.dtype) for t, g in enumerate(rows)], info


def weighting_of(make: Callable[..., Method | Scalarization], name: str | None = None) -> type[Weighting]:
    """A weighting class for any method, for `Trainer(weighting=...)`.

        Krum = weighting_of(lambda tasks, byzantine=0: fastmtl.Krum(byzantine=byzantine))

    Args:
        make: called with the number of tasks and with `weight_args` as keywords; all of these need defaults.
        name: of the class; default: that of `make`.
    """
    namespace = {"make": staticmethod(make), "__doc__": make.__doc__, "__module__": __name__}
    return type(name or str(getattr(make, "__name__", "Weighting")), (Weighting,), namespace)


def _one_by_one(losses: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return list(losses.unbind()) if isinstance(losses, Tensor) else list(losses)


# ------------------------------------------------------------------------------------------------ methods on gradients


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
    """`fastmtl.GradVac`; `beta` is what earlier versions of LibMTL call `GradVac_beta`.

    `GradVac_group_type`: 0, the whole model; 1, every layer of `encoder` has targets of its own; 2, every tensor of the
    shared parameters. With `rep_grad=True` it has to be 0.
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
        return self._step(_one_by_one(losses), groups)

    def _groups(self, by_layer: bool) -> list[list[Tensor]]:
        shared = {id(p): p for p in self.get_share_params() if p.requires_grad}
        groups: list[list[Tensor]] = []
        if by_layer:
            encoder: Any = self.encoder
            for layer in encoder.modules():
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
        self.scales = scalarization.IMTLL(self.task_num)

    def backward(self, losses: Tensor | Sequence[Tensor], **kwargs: Any) -> np.ndarray | None:
        """See `Weighting.backward`; the weights are those of the scaled losses."""
        self._configure(kwargs)
        return self._step(self.scales.scaled(_one_by_one(losses)))  # type: ignore[arg-type]


class Nash_MTL(Weighting):
    """`fastmtl.NashMTL`; heads get their own gradients unweighted. `optim_niter` has no effect: α is exact."""

    @staticmethod
    def make(tasks: int, update_weights_every: int = 1, optim_niter: int = 20, max_norm: float = 1.0) -> Method:
        """See the class."""
        return fastmtl.NashMTL(max_norm=max_norm, every=update_weights_every)


class GradDrop(Weighting):
    """`fastmtl.GradDrop`, coordinate by coordinate on the gradients as they are; returns no task weights."""

    @staticmethod
    def make(tasks: int, leak: float = 0.0) -> Method:
        """See the class."""
        return fastmtl.GradDrop(leak=leak)


class RGW(Weighting):
    """`fastmtl.RLW`."""

    @staticmethod
    def make(tasks: int) -> Method:
        """See the class."""
        return fastmtl.RLW()


class UPGrad(Weighting):
    """`fastmtl.UPGrad`. `UPGrad_norm_eps` and `UPGrad_reg_eps` have no effect: nothing has to be regularized."""

    @staticmethod
    def make(tasks: int, UPGrad_norm_eps: float = 0.0, UPGrad_reg_eps: float = 0.0) -> Method:
        """See the class."""
        return fastmtl.UPGrad()


class FairGrad(Weighting):
    """`fastmtl.FairGrad`; heads get their own gradients unweighted."""

    @staticmethod
    def make(tasks: int, FairGrad_alpha: float = 1.0) -> Method:
        """See the class."""
        return fastmtl.FairGrad(fairness=FairGrad_alpha)


# ------------------------------------------------------------------------------------------------ methods on losses


class EW(Weighting):
    """The plain sum of the losses: `fastmtl.scalarization.LS`."""

    @staticmethod
    def make(tasks: int) -> Scalarization:
        """See the class."""
        return scalarization.LS(weights="sum")


class RLW(Weighting):
    """`fastmtl.scalarization.RLW`; `dist` has LibMTL's names ("Normal", "Uniform", …) or this package's."""

    @staticmethod
    def make(tasks: int, dist: str = "Normal") -> Scalarization:
        """See the class."""
        return scalarization.RLW(distribution=dist.lower())  # type: ignore[arg-type]  # which checks it


class DWA(Weighting):
    """`fastmtl.scalarization.DWA` over the trainer's epochs; `T` is the temperature."""

    _counts_epochs = True

    @staticmethod
    def make(tasks: int, T: float = 2.0) -> Scalarization:
        """See the class."""
        return scalarization.DWA(tasks, temperature=T)


class UW(Weighting):
    """`fastmtl.scalarization.Uncertainty`, starting at LibMTL's -0.5."""

    @staticmethod
    def make(tasks: int) -> Scalarization:
        """See the class."""
        return scalarization.Uncertainty(tasks, initial=-0.5)


class GLS(Weighting):
    """`fastmtl.scalarization.GLS`."""

    @staticmethod
    def make(tasks: int) -> Scalarization:
        """See the class."""
        return scalarization.GLS(tasks)


class STCH(Weighting):
    """`fastmtl.scalarization.STCH` with the authors' warm-up, in the trainer's epochs."""

    _counts_epochs = True

    @staticmethod
    def make(tasks: int, STCH_mu: float = 1.0, STCH_warmup_epoch: int = 4) -> Scalarization:
        """See the class."""
        return scalarization.STCH(mu=STCH_mu, warmup=STCH_warmup_epoch, tasks=tasks)


class FAMO(Weighting):
    """`fastmtl.scalarization.FAMO`; the trainer calls `update_w` with the losses after the optimizer's step."""

    @staticmethod
    def make(tasks: int, FAMO_w_lr: float = 0.025, FAMO_w_gamma: float = 1e-3) -> Scalarization:
        """See the class."""
        return scalarization.FAMO(tasks, lr=FAMO_w_lr, weight_decay=FAMO_w_gamma)

    def update_w(self, curr_losses: Tensor) -> None:
        """Learns from the losses [T] of the same batch after the step."""
        self.method.update(curr_losses)

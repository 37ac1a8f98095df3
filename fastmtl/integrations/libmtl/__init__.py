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

from fastmtl.integrations.libmtl.on_gradients import (
    IMTL,
    MGDA,
    RGW,
    Aligned_MTL,
    CAGrad,
    FairGrad,
    GradDrop,
    GradVac,
    Nash_MTL,
    PCGrad,
    UPGrad,
)
from fastmtl.integrations.libmtl.on_losses import DWA, EW, FAMO, GLS, RLW, STCH, UW
from fastmtl.integrations.libmtl.weighting import Weighting, weighting_of

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

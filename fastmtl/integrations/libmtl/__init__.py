"""Weightings for LibMTL's trainer, under LibMTL's names, backed by the methods of this package.

    import fastmtl.integrations.libmtl

    fastmtl.integrations.libmtl.register()  # the trainer of the repository looks weightings up by name
    Trainer(..., weighting="Aligned_MTL", ...)

    from fastmtl.integrations.libmtl import Aligned_MTL  # older trainers take the class

    Trainer(..., weighting=Aligned_MTL, ...)

Only `register` imports LibMTL: its trainer accepts any class that follows the protocol of its `AbsWeighting`, as these
do. The protocol: the trainer makes a model of an architecture and a weighting, `class
MTLmodel(architecture, weighting)`, calls `init_param()` once and `backward(losses, **weight_args)` in every step,
after `optimizer.zero_grad`, and records the task weights [T] that it returns. Losses are [T], or [3, T] where the
weighting is named MoDo or SDMGrad; where it is named FAMO, `update_w(losses)` follows the optimizer's step. The
architecture provides `task_num`, `task_name`, `device`, `rep_grad`, `get_share_params()` and, with `rep_grad=True`,
the representation `rep` (a dict by task, where tasks have representations of their own) and the detached copies
`rep_tasks` of it that the heads read; the trainer sets `epoch`.
"""

from fastmtl.integrations.libmtl.on_gradients import (
    DB_MTL,
    IMTL,
    MGDA,
    RGW,
    Aligned_MTL,
    CAGrad,
    ExcessMTL,
    FairGrad,
    GradDrop,
    GradVac,
    MoCo,
    MoDo,
    Nash_MTL,
    PCGrad,
    SDMGrad,
    UPGrad,
)
from fastmtl.integrations.libmtl.on_losses import DWA, EW, FAMO, GLS, RLW, STCH, UW, GradNorm
from fastmtl.integrations.libmtl.registration import register
from fastmtl.integrations.libmtl.weighting import Weighting, weighting_of

__all__ = [
    "DB_MTL",
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
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "MoCo",
    "MoDo",
    "Nash_MTL",
    "PCGrad",
    "SDMGrad",
    "UPGrad",
    "Weighting",
    "register",
    "weighting_of",
]

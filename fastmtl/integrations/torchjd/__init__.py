"""TorchJD's aggregators and weightings, computed by fastmtl: only an import line changes.

    from torchjd.aggregation import UPGrad
    from fastmtl.integrations.torchjd import UPGrad

Every class has the name, the arguments and the attributes of TorchJD's, and is of TorchJD's kind: an aggregator for
`torchjd.autojac.jac_to_grad` (also with `optimize_gramian_computation`) or a weighting for the Gramians of
`torchjd.autogram.Engine`. Most are backed by a method of `fastmtl`: the weighting's, or the aggregator's, `method`.

`Engine` replaces `torchjd.autogram.Engine`, and wraps nothing.

An aggregator that needs the Gramian of the Jacobian [m, n] computes it and the weights [m] in float64, and rounds once,
when the result [n] is written; hooks see the weights in the Jacobian's dtype. A weighting returns weights in the dtype
of its Gramian [m, m].

Problems are solved to rounding, at every scale of the gradients: arguments that steer an iterative solver or guard its
divisions are accepted and have no effect. A non-finite gradient makes the weights NaN. Weights have no derivative:
where TorchJD's class detaches inputs that require grad, so does this one; where TorchJD's has a derivative
(`AlignedMTL`, `MGDA`, `Krum`), a matrix that requires grad is a ValueError. `Mean`, `Sum`, `Constant` and `Random` are
differentiable as in TorchJD.
"""

try:
    import torchjd.linalg  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "fastmtl.integrations.torchjd needs torchjd >= 0.18: pip install 'fastmtl-torch[torchjd]'"
    ) from _error

from fastmtl.integrations.torchjd.aggregators import (
    IMTLG,
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    ExcessMTL,
    FairGrad,
    GradDrop,
    GradVac,
    Krum,
    NashMTL,
    PCGrad,
    TrimmedMean,
    UPGrad,
)
from fastmtl.integrations.torchjd.engine import Engine
from fastmtl.integrations.torchjd.on_matrices import (
    CRMOGMWeighting,
    ExcessMTLWeighting,
    MoDoWeighting,
    SDMGradWeighting,
)
from fastmtl.integrations.torchjd.tasks import (
    Constant,
    ConstantWeighting,
    Mean,
    MeanWeighting,
    Random,
    RandomWeighting,
    Sum,
    SumWeighting,
)
from fastmtl.integrations.torchjd.weightings import (
    AlignedMTLWeighting,
    CAGradWeighting,
    ConFIGWeighting,
    DualProjWeighting,
    FairGradWeighting,
    GradVacWeighting,
    IMTLGWeighting,
    KrumWeighting,
    MGDAWeighting,
    NashMTLWeighting,
    PCDWeighting,
    PCGradWeighting,
    UPGradWeighting,
)

__all__ = [
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "AlignedMTLWeighting",
    "CAGrad",
    "CAGradWeighting",
    "CRMOGMWeighting",
    "ConFIG",
    "ConFIGWeighting",
    "Constant",
    "ConstantWeighting",
    "DualProj",
    "DualProjWeighting",
    "Engine",
    "ExcessMTL",
    "ExcessMTLWeighting",
    "FairGrad",
    "FairGradWeighting",
    "GradDrop",
    "GradVac",
    "GradVacWeighting",
    "IMTLGWeighting",
    "Krum",
    "KrumWeighting",
    "MGDAWeighting",
    "Mean",
    "MeanWeighting",
    "MoDoWeighting",
    "NashMTL",
    "NashMTLWeighting",
    "PCDWeighting",
    "PCGrad",
    "PCGradWeighting",
    "Random",
    "RandomWeighting",
    "SDMGradWeighting",
    "Sum",
    "SumWeighting",
    "TrimmedMean",
    "UPGrad",
    "UPGradWeighting",
]

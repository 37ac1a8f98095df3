"""fastmtl: fast, accurate multi-task gradient aggregation for PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from fastmtl import catalog, ops, scalarization
from fastmtl.info import Info
from fastmtl.methods import (
    CRMOGM,
    DBMTL,
    IMTL,
    MGDA,
    PCD,
    RLW,
    AlignedMTL,
    Bloop,
    CAGrad,
    ConFIG,
    DualProj,
    ExcessMTL,
    FairGrad,
    GradDrop,
    GradVac,
    Krum,
    MConFIG,
    MoCo,
    MoDo,
    NashMTL,
    PCGrad,
    SDMGrad,
    TrimmedMean,
    Uniform,
    UPGrad,
)
from fastmtl.methods.base import GramMethod, Method
from fastmtl.observe import diagnostics, metrics
from fastmtl.observe.monitor import Monitor
from fastmtl.ops.eigen import eigh
from fastmtl.training.accumulate import Accumulator
from fastmtl.training.attach import Attached, attach
from fastmtl.training.fan_out import FanOut, fan_out

__all__ = [
    "CRMOGM",
    "DBMTL",
    "IMTL",
    "MGDA",
    "PCD",
    "RLW",
    "Accumulator",
    "AlignedMTL",
    "Attached",
    "Bloop",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "FanOut",
    "GradDrop",
    "GradVac",
    "GramMethod",
    "Info",
    "Krum",
    "MConFIG",
    "Method",
    "MoCo",
    "MoDo",
    "Monitor",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "TrimmedMean",
    "UPGrad",
    "Uniform",
    "__version__",
    "attach",
    "catalog",
    "diagnostics",
    "eigh",
    "fan_out",
    "metrics",
    "ops",
    "scalarization",
]

try:
    __version__ = version("fastmtl-torch")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

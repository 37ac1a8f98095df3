"""fastmtl: fast, accurate multi-task gradient aggregation for PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from fastmtl import catalog, ops, scalarization
from fastmtl.info import Info
from fastmtl.methods import (
    IMTL,
    MGDA,
    RLW,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradDrop,
    GradVac,
    Krum,
    NashMTL,
    PCGrad,
    Uniform,
    UPGrad,
)
from fastmtl.methods.base import GramMethod, Method
from fastmtl.observe import diagnostics, metrics
from fastmtl.observe.monitor import Monitor
from fastmtl.ops.eigen import eigh
from fastmtl.training.attach import Attached, attach
from fastmtl.training.fan_out import FanOut, fan_out

__all__ = [
    "IMTL",
    "MGDA",
    "RLW",
    "AlignedMTL",
    "Attached",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "FanOut",
    "GradDrop",
    "GradVac",
    "GramMethod",
    "Info",
    "Krum",
    "Method",
    "Monitor",
    "NashMTL",
    "PCGrad",
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

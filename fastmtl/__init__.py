"""fastmtl: fast, accurate multi-task gradient aggregation for PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from fastmtl import ops
from fastmtl.attach import attach
from fastmtl.eigen import eigh
from fastmtl.hooks import FanOut, fan_out
from fastmtl.info import Info
from fastmtl.weighting import MGDA, AlignedMTL, GradDrop

__all__ = ["MGDA", "AlignedMTL", "FanOut", "GradDrop", "Info", "__version__", "attach", "eigh", "fan_out", "ops"]

try:
    __version__ = version("fastmtl-torch")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

"""fastmtl: fast, accurate multi-task gradient aggregation for PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from fastmtl import ops
from fastmtl.backward import Info
from fastmtl.eigen import eigh
from fastmtl.weighting import AlignedMTL

__all__ = ["AlignedMTL", "Info", "__version__", "eigh", "ops"]

try:
    __version__ = version("fastmtl-torch")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

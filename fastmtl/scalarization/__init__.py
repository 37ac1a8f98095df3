"""Methods that look at the losses alone (and GradNorm, at gradient norms): one scalar from T losses; one a file."""

from fastmtl.scalarization.base import Scalarization
from fastmtl.scalarization.dwa import DWA
from fastmtl.scalarization.famo import FAMO
from fastmtl.scalarization.gls import GLS
from fastmtl.scalarization.gradnorm import GradNorm
from fastmtl.scalarization.imtl_l import IMTLL
from fastmtl.scalarization.ls import LS
from fastmtl.scalarization.rlw import RLW
from fastmtl.scalarization.stch import STCH
from fastmtl.scalarization.uncertainty import Uncertainty

__all__ = ["DWA", "FAMO", "GLS", "IMTLL", "LS", "RLW", "STCH", "GradNorm", "Scalarization", "Uncertainty"]

"""The methods: most map a Gram matrix to task weights; one method a file."""

from fastmtl.weighting.aligned import AlignedMTL
from fastmtl.weighting.cagrad import CAGrad
from fastmtl.weighting.config import ConFIG
from fastmtl.weighting.dualproj import DualProj
from fastmtl.weighting.fairgrad import FairGrad
from fastmtl.weighting.graddrop import GradDrop
from fastmtl.weighting.gradvac import GradVac
from fastmtl.weighting.imtl import IMTL
from fastmtl.weighting.krum import Krum
from fastmtl.weighting.mgda import MGDA
from fastmtl.weighting.nash import NashMTL
from fastmtl.weighting.pcgrad import PCGrad
from fastmtl.weighting.rlw import RLW
from fastmtl.weighting.uniform import Uniform
from fastmtl.weighting.upgrad import UPGrad

__all__ = [
    "IMTL",
    "MGDA",
    "RLW",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "Krum",
    "NashMTL",
    "PCGrad",
    "UPGrad",
    "Uniform",
]

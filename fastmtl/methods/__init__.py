"""The methods: most map a Gram matrix to task weights; one method a file."""

from fastmtl.methods.aligned import AlignedMTL
from fastmtl.methods.cagrad import CAGrad
from fastmtl.methods.config import ConFIG
from fastmtl.methods.dualproj import DualProj
from fastmtl.methods.fairgrad import FairGrad
from fastmtl.methods.graddrop import GradDrop
from fastmtl.methods.gradvac import GradVac
from fastmtl.methods.imtl import IMTL
from fastmtl.methods.krum import Krum
from fastmtl.methods.mgda import MGDA
from fastmtl.methods.nash import NashMTL
from fastmtl.methods.pcgrad import PCGrad
from fastmtl.methods.rlw import RLW
from fastmtl.methods.uniform import Uniform
from fastmtl.methods.upgrad import UPGrad

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

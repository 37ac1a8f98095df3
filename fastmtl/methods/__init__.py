"""The methods, one per file; most map a Gram matrix to task weights."""

from fastmtl.methods.aligned import AlignedMTL
from fastmtl.methods.bloop import Bloop
from fastmtl.methods.cagrad import CAGrad
from fastmtl.methods.config import ConFIG
from fastmtl.methods.crmogm import CRMOGM
from fastmtl.methods.db_mtl import DBMTL
from fastmtl.methods.dualproj import DualProj
from fastmtl.methods.excess_mtl import ExcessMTL
from fastmtl.methods.fairgrad import FairGrad
from fastmtl.methods.graddrop import GradDrop
from fastmtl.methods.gradvac import GradVac
from fastmtl.methods.imtl import IMTL
from fastmtl.methods.krum import Krum
from fastmtl.methods.mconfig import MConFIG
from fastmtl.methods.mgda import MGDA
from fastmtl.methods.moco import MoCo
from fastmtl.methods.modo import MoDo
from fastmtl.methods.nash import NashMTL
from fastmtl.methods.pcd import PCD
from fastmtl.methods.pcgrad import PCGrad
from fastmtl.methods.rlw import RLW
from fastmtl.methods.sdmgrad import SDMGrad
from fastmtl.methods.trimmed_mean import TrimmedMean
from fastmtl.methods.uniform import Uniform
from fastmtl.methods.upgrad import UPGrad

__all__ = [
    "CRMOGM",
    "DBMTL",
    "IMTL",
    "MGDA",
    "PCD",
    "RLW",
    "AlignedMTL",
    "Bloop",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "Krum",
    "MConFIG",
    "MoCo",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "TrimmedMean",
    "UPGrad",
    "Uniform",
]

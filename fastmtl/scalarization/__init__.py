"""Methods that use only the losses (GradNorm also gradient norms): one scalar from T losses. One method per file."""

from fastmtl.scalarization.base import Scalarization
from fastmtl.scalarization.cosmos import COSMOS
from fastmtl.scalarization.dwa import DWA
from fastmtl.scalarization.famo import FAMO
from fastmtl.scalarization.gls import GLS
from fastmtl.scalarization.go4align import GO4Align
from fastmtl.scalarization.gradnorm import GradNorm
from fastmtl.scalarization.imtl_l import IMTLL
from fastmtl.scalarization.ls import LS
from fastmtl.scalarization.ntk import NTK
from fastmtl.scalarization.pbi import PBI
from fastmtl.scalarization.pike import PiKE
from fastmtl.scalarization.relobralo import ReLoBRaLo
from fastmtl.scalarization.rlw import RLW
from fastmtl.scalarization.softadapt import SoftAdapt
from fastmtl.scalarization.stch import STCH
from fastmtl.scalarization.uncertainty import Uncertainty

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "GLS",
    "IMTLL",
    "LS",
    "NTK",
    "PBI",
    "RLW",
    "STCH",
    "GO4Align",
    "GradNorm",
    "PiKE",
    "ReLoBRaLo",
    "Scalarization",
    "SoftAdapt",
    "Uncertainty",
]

"""TorchJD's counterpart of every method on the Gram matrix, and what the weights of both have to satisfy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import workloads
from torch import Tensor

import fastmtl
from fastmtl.methods.base import GramMethod
from fastmtl.ops import reference
from fastmtl.rule import NOTHING, draw_seed

__all__ = ["AGGREGATION", "INSTALL", "PEERS", "Peer", "torchjd"]

INSTALL = "pip install 'torchjd[cagrad,fairgrad,nash-mtl,quadprog-projector]>=0.18'"
SEED = 0
AGGREGATION = 1e-5  # relative error of a whole float32 aggregation, whose Gram matrix is rounded

Weigh = Callable[[Tensor], Tensor]
Judge = Callable[[Tensor, Tensor, Any], float]


def torchjd() -> Any:
    """TorchJD's aggregators.

    Raises:
        ImportError: it is not installed; so do its classes where a solver is not.
    """
    return importlib.import_module("torchjd.aggregation")


def as_theirs(theirs: Callable[[Any, int], Weigh]) -> Judge:
    """How far αᵀ G is from theirs, relative."""

    def judge(M: Tensor, alpha: Tensor, their: Any) -> float:
        torch.manual_seed(SEED)
        return difference(M, alpha, theirs(their, M.shape[-1])(M))

    return judge


def as_reference(weigh: Callable[[Tensor, Tensor], Tensor]) -> Judge:
    """How far αᵀ G is from a slow reference that draws the same numbers: theirs draws others."""

    def judge(M: Tensor, alpha: Tensor, their: Any) -> float:
        torch.manual_seed(SEED)
        return difference(M, alpha, weigh(M, draw_seed(M, None, NOTHING)))

    return judge


def not_shortest(M: Tensor, alpha: Tensor, their: Any) -> float:
    """How far α is from MGDA's optimum (theirs stops before): <g, g_t> >= ‖g‖² for all t, relative, on the simplex."""
    products = M @ alpha
    violation = (alpha @ products - products.min()) / M.diagonal().max()
    return float(torch.stack([violation, (alpha.sum() - 1).abs(), -alpha.min()]).max())


def unequal(M: Tensor, alpha: Tensor, their: Any) -> float:
    """How far α is from M α ∝ 1/α, α > 0 (theirs stops before)."""
    gains = alpha * (M @ alpha)
    return float((gains.max() - gains.min()) / gains.mean()) if alpha.min() > 0 else torch.inf


def difference(M: Tensor, alpha: Tensor, expected: Tensor) -> float:
    """‖αᵀG - βᵀG‖ / ‖βᵀG‖."""
    wrong = alpha - expected
    return float(((wrong @ M @ wrong).clamp_min(0) / (expected @ M @ expected)).sqrt())


def nearly_exact(their: Any) -> Any:
    """A projector without the 1e-4 that theirs adds to the diagonal by default."""
    return importlib.import_module("torchjd.linalg").QuadprogProjector(norm_eps=0.0, reg_eps=1e-10)


def direction(their: Any, T: int) -> Weigh:
    """ConFIG of the triangular factor L of M = L Lᵀ, as weights of its rows; a matrix is what theirs takes."""

    def weigh(M: Tensor) -> Tensor:
        L = torch.linalg.cholesky(M)
        return torch.linalg.solve_triangular(L.mT, their.ConFIG()(L)[:, None], upper=True)[:, 0]

    return weigh


class Peer(NamedTuple):
    """A method in both libraries, with the same options.

    Attributes:
        ours: makes fastmtl's.
        theirs: makes TorchJD's for T tasks.
        judge: the error of our weights: from the Gram, the weights and TorchJD's module.
        tolerance: how large it may be.
        factor: theirs takes gradients, not their Gram matrix: it gets the fewest that have this Gram.
    """

    ours: Callable[[], GramMethod]
    theirs: Callable[[Any, int], Weigh]
    judge: Judge
    tolerance: float = 1e-6
    factor: bool = False

    def passes(self, grams: list[Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
        """Ours and theirs on all of these Gram matrices [T, T] in turn, as in as many steps of a training."""
        method, peer = self.ours(), self.theirs(torchjd(), grams[0].shape[-1])
        inputs = [torch.linalg.cholesky(M) for M in grams] if self.factor else grams

        def ours() -> None:
            for M in grams:
                method.weighting(M)

        def theirs() -> None:
            for M in inputs:
                peer(M)

        return ours, theirs

    def error(self, M: Tensor) -> float:
        """How wrong our weights of M are."""
        torch.manual_seed(SEED)
        return self.judge(M, self.ours().weighting(M), torchjd())

    def aggregation_error(self, G: Tensor) -> float:
        """How far our aggregation of G [T, P] is from the same weights of its Gram matrix in float64, relative."""
        wide = G.double()
        torch.manual_seed(SEED)
        result = self.ours()(G)
        torch.manual_seed(SEED)
        return workloads.error(result, self.ours().weighting(wide @ wide.mT, G.dtype) @ wide)


def peer(name: str, *options: Any) -> Callable[[Any, int], Weigh]:
    """`torchjd.aggregation.<name>(*options)`."""
    return lambda their, T: getattr(their, name)(*options)


PEERS: dict[str, Peer] = {
    "PCGrad": Peer(
        fastmtl.PCGrad, peer("PCGradWeighting"), as_reference(lambda M, seed: reference.pcgrad(M, seed, True))
    ),
    "GradVac": Peer(
        fastmtl.GradVac,
        peer("GradVacWeighting"),
        as_reference(lambda M, seed: reference.gradvac(M, seed, 0.5, torch.zeros_like(M))),
    ),
    "CAGrad": Peer(
        lambda: fastmtl.CAGrad(c=0.5, rescale=0),
        peer("CAGradWeighting", 0.5),
        as_theirs(peer("CAGradWeighting", 0.5, 0.0)),
        1e-3,  # of their solver
    ),
    "MGDA": Peer(fastmtl.MGDA, peer("MGDAWeighting"), not_shortest),
    "UPGrad": Peer(
        fastmtl.UPGrad,
        peer("UPGradWeighting"),
        as_theirs(lambda their, T: their.UPGradWeighting(projector=nearly_exact(their))),
    ),
    "NashMTL": Peer(fastmtl.NashMTL, lambda their, T: their.NashMTL(T).weighting, unequal, factor=True),
    "DualProj": Peer(
        fastmtl.DualProj,
        peer("DualProjWeighting"),
        as_theirs(lambda their, T: their.DualProjWeighting(projector=nearly_exact(their))),
    ),
    "FairGrad": Peer(fastmtl.FairGrad, peer("FairGradWeighting", 1.0), unequal),
    "AlignedMTL": Peer(fastmtl.AlignedMTL, peer("AlignedMTLWeighting"), as_theirs(peer("AlignedMTLWeighting"))),
    "IMTL": Peer(fastmtl.IMTL, peer("IMTLGWeighting"), as_theirs(peer("IMTLGWeighting"))),
    "ConFIG": Peer(fastmtl.ConFIG, peer("ConFIG"), as_theirs(direction), factor=True),
    "Krum": Peer(
        lambda: fastmtl.Krum(byzantine=1, squared=False), peer("KrumWeighting", 1), as_theirs(peer("KrumWeighting", 1))
    ),
    "PCD": Peer(lambda: fastmtl.PCD(tau=0.1), peer("PCDWeighting", 0.1), as_theirs(peer("PCDWeighting", 0.1))),
    "SDMGrad": Peer(fastmtl.SDMGrad, peer("SDMGradWeighting"), as_theirs(peer("SDMGradWeighting"))),
    "MoDo": Peer(fastmtl.MoDo, peer("MoDoWeighting"), as_theirs(peer("MoDoWeighting"))),
    "CRMOGM": Peer(fastmtl.CRMOGM, lambda their, T: their.CRMOGMWeighting(their.MGDAWeighting()), not_shortest),
    "RLW": Peer(fastmtl.RLW, peer("RandomWeighting"), as_theirs(peer("RandomWeighting"))),
    "Uniform": Peer(fastmtl.Uniform, peer("MeanWeighting"), as_theirs(peer("MeanWeighting"))),
}

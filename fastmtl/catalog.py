"""Which methods there are: `python -m fastmtl methods`, and the table of the README.

What a method needs, keeps and takes as options is read from its class; what its peers call it stands here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import NamedTuple

from fastmtl import methods, scalarization
from fastmtl.methods.base import GramMethod
from fastmtl.methods.state import StatefulMethod

__all__ = ["Entry", "entries", "table"]

# What TorchJD 0.18, LibMTL and the official code of Aligned-MTL call it.
_PEERS: dict[type, tuple[str, str, str]] = {
    methods.AlignedMTL: ("AlignedMTL", "Aligned_MTL", "amtl, amtlub"),
    methods.MGDA: ("MGDA", "MGDA", "mgda, mgdaub"),
    methods.PCGrad: ("PCGrad", "PCGrad", "pcgrad"),
    methods.GradVac: ("GradVac", "GradVac", "gradvac"),
    methods.CAGrad: ("CAGrad", "CAGrad", "cagrad"),
    methods.IMTL: ("IMTLG", "IMTL", "imtl"),
    methods.NashMTL: ("NashMTL", "Nash_MTL", "nash"),
    methods.GradDrop: ("GradDrop", "GradDrop", "graddrop"),
    methods.Uniform: ("Mean, Sum, Constant", "EW", "ls"),
    methods.RLW: ("Random", "RGW", ""),
    methods.UPGrad: ("UPGrad", "UPGrad", ""),
    methods.DualProj: ("DualProj", "", ""),
    methods.FairGrad: ("FairGrad", "FairGrad", ""),
    methods.ConFIG: ("ConFIG", "", ""),
    methods.Krum: ("Krum", "", ""),
    scalarization.LS: ("Mean, Sum, Constant", "EW", "ls"),
    scalarization.RLW: ("Random", "RLW", "rlw"),
    scalarization.DWA: ("DWA", "DWA", "dwa"),
    scalarization.Uncertainty: ("UW", "UW", "uncertainty"),
    scalarization.IMTLL: ("IMTLL", "IMTL", ""),
    scalarization.GradNorm: ("", "GradNorm", "gradnorm"),
    scalarization.GLS: ("GeometricMean", "GLS", ""),
    scalarization.STCH: ("STCH", "STCH", ""),
    scalarization.FAMO: ("FAMO", "FAMO", ""),
}
_HEADINGS = ("method", "paper", "needs", "state", "options", "TorchJD", "LibMTL", "official")


class Entry(NamedTuple):
    """A method as users look for it.

    Attributes:
        name: under `fastmtl`.
        paper: where it comes from.
        needs: what it looks at.
        state: what it remembers from step to step; empty for most.
        options: arguments of its constructor with their defaults.
        torchjd: its name in TorchJD, as the following in LibMTL and in the official code; empty where it is not there.
    """

    name: str
    paper: str
    needs: str
    state: str
    options: str
    torchjd: str
    libmtl: str
    official: str


def entries() -> Iterator[Entry]:
    """Every method: those on gradients first, then those on losses."""
    for kind, peers in _PEERS.items():
        module = kind.__module__.rpartition(".")[0]
        prefix = "scalarization." if module == "fastmtl.scalarization" else ""
        yield Entry(prefix + kind.__name__, _paper(kind), _needs(kind), _state(kind), _options(kind), *peers)


def table(markdown: bool = False) -> str:
    """The methods as lines of text, or as a table in Markdown."""
    rows = [_HEADINGS, *entries()]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|---" * len(_HEADINGS) + "|", *lines[1:]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _paper(kind: type) -> str:
    """Authors, venue and year: in parentheses at the end of the first line of the file's docstring."""
    summary = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]
    return summary.rpartition("(")[2].removesuffix(".").removesuffix(")") if "(" in summary else ""


def _needs(kind: type) -> str:
    if kind is scalarization.GradNorm:
        return "losses, gradients of a layer"
    if issubclass(kind, scalarization.Scalarization):
        return "losses"
    if kind is methods.MGDA:
        return "Gram (losses to normalize by them)"
    return "Gram" if issubclass(kind, GramMethod) else "gradients"


def _state(kind: type) -> str:
    if issubclass(kind, StatefulMethod):
        return ", ".join(kind()._buffers)
    if issubclass(kind, scalarization.Scalarization):
        takes_tasks = "tasks" in inspect.signature(kind).parameters
        return ", ".join(name for name in (kind(2) if takes_tasks else kind()).state_dict() if name[0] != "_")
    return ""


def _options(kind: type) -> str:
    parameters = inspect.signature(kind).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)

"""Which methods there are: `make` makes one by its name, `python -m fastmtl methods` and docs/methods.md list them.

What a method needs, keeps and takes as options is read from its class; its names stand here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

from fastmtl import methods, scalarization
from fastmtl.methods.base import GramMethod, Method
from fastmtl.methods.state import Remembering
from fastmtl.scalarization import Scalarization

__all__ = ["Entry", "entries", "make", "names", "table"]

_Kind: TypeAlias = type[Method] | type[Scalarization]

# The name for `make`, and what TorchJD 0.18, LibMTL and the official code of Aligned-MTL call it.
_NAMES: dict[_Kind, tuple[str, str, str, str]] = {
    methods.AlignedMTL: ("aligned", "AlignedMTL", "Aligned_MTL", "amtl, amtlub"),
    methods.MGDA: ("mgda", "MGDA", "MGDA", "mgda, mgdaub"),
    methods.PCGrad: ("pcgrad", "PCGrad", "PCGrad", "pcgrad"),
    methods.GradVac: ("gradvac", "GradVac", "GradVac", "gradvac"),
    methods.CAGrad: ("cagrad", "CAGrad", "CAGrad", "cagrad"),
    methods.IMTL: ("imtl", "IMTLG", "IMTL", "imtl"),
    methods.NashMTL: ("nash", "NashMTL", "Nash_MTL", "nash"),
    methods.GradDrop: ("graddrop", "GradDrop", "GradDrop", "graddrop"),
    methods.Uniform: ("constant", "Mean, Sum, Constant", "EW", "ls"),
    methods.RLW: ("rgw", "Random", "RGW", ""),
    methods.UPGrad: ("upgrad", "UPGrad", "UPGrad", ""),
    methods.DualProj: ("dualproj", "DualProj", "", ""),
    methods.FairGrad: ("fairgrad", "FairGrad", "FairGrad", ""),
    methods.ConFIG: ("config", "ConFIG", "", ""),
    methods.Krum: ("krum", "Krum", "", ""),
    methods.TrimmedMean: ("trimmed-mean", "TrimmedMean", "", ""),
    methods.PCD: ("pcd", "PCD", "", ""),
    methods.SDMGrad: ("sdmgrad", "SDMGradWeighting", "SDMGrad", ""),
    methods.MoDo: ("modo", "MoDoWeighting", "MoDo", ""),
    methods.CRMOGM: ("cr-mogm", "CRMOGMWeighting", "", ""),
    methods.ExcessMTL: ("excess-mtl", "ExcessMTL", "ExcessMTL", ""),
    methods.MoCo: ("moco", "", "MoCo", ""),
    methods.DBMTL: ("db-mtl", "", "DB_MTL", ""),
    methods.MConFIG: ("m-config", "", "", ""),
    methods.Bloop: ("bloop", "", "", ""),
    scalarization.LS: ("uniform", "Mean, Sum, Constant", "EW", "ls"),
    scalarization.RLW: ("rlw", "Random", "RLW", "rlw"),
    scalarization.DWA: ("dwa", "DWA", "DWA", "dwa"),
    scalarization.Uncertainty: ("uncertainty", "UW", "UW", "uncertainty"),
    scalarization.IMTLL: ("imtl-l", "IMTLL", "IMTL", ""),
    scalarization.GradNorm: ("gradnorm", "", "GradNorm", "gradnorm"),
    scalarization.GLS: ("gls", "GeometricMean", "GLS", ""),
    scalarization.STCH: ("stch", "STCH", "STCH", ""),
    scalarization.FAMO: ("famo", "FAMO", "FAMO", ""),
    scalarization.COSMOS: ("cosmos", "COSMOS", "", ""),
    scalarization.PBI: ("pbi", "PBI", "", ""),
    scalarization.GO4Align: ("go4align", "", "", ""),
    scalarization.SoftAdapt: ("softadapt", "", "", ""),
    scalarization.ReLoBRaLo: ("relobralo", "", "", ""),
    scalarization.NTK: ("ntk", "", "", ""),
    scalarization.PiKE: ("pike", "", "", ""),
}
_HEADINGS = ("method", "make", "paper", "needs", "state", "memory", "options", "TorchJD", "LibMTL", "official")


class Entry(NamedTuple):
    """A method as users look for it.

    Attributes:
        name: of the class, under `fastmtl`.
        make: its name for `make`.
        paper: where it comes from.
        needs: what it looks at.
        state: what it remembers from step to step; empty for most.
        memory: what the state takes where it grows with the number of parameters P, and not with that of tasks T alone.
        options: arguments of its constructor with their defaults.
        torchjd: its name in TorchJD, as the following in LibMTL and in the official code; empty where it is not there.
    """

    name: str
    make: str
    paper: str
    needs: str
    state: str
    memory: str
    options: str
    torchjd: str
    libmtl: str
    official: str


def entries() -> Iterator[Entry]:
    """Every method: those on gradients first, then those on losses."""
    for kind, (name, *peers) in _NAMES.items():
        module = kind.__module__.rpartition(".")[0]
        prefix = "scalarization." if module == "fastmtl.scalarization" else ""
        about = (_paper(kind), _needs(kind), _state(kind), getattr(kind, "memory", ""), _options(kind))
        yield Entry(prefix + kind.__name__, name, *about, *peers)


def names() -> tuple[str, ...]:
    """What `make` takes, in the order of `entries`: "aligned", "mgda", ... and last the names of methods on losses."""
    return tuple(name for name, *_ in _NAMES.values())


def make(name: str, *, tasks: int | None = None, **options: Any) -> Method | Scalarization:
    """A method by its name, whether it works on gradients or on losses.

        method = fastmtl.catalog.make("cagrad", tasks=3, c=0.4)
        method.backward(losses, shared=model.encoder)

    Args:
        name: one of `names()`, which `python -m fastmtl methods` explains ("uniform" is the plain mean of the losses,
            "rlw" draws weights of the losses), or that of a class; upper and lower case, hyphens and underscores make
            no difference.
        tasks: number of tasks T. Some methods on losses need it; for the others it is checked that T tasks go with
            their options.
        options: of the method's constructor.

    Raises:
        ValueError: no method of this name, options that do not go with T tasks or with each other, no `tasks` where
            they are needed.
        TypeError: an option that the method does not have, or of another kind.
    """
    kinds = {_plain(kind.__name__): kind for kind in _NAMES} | {_plain(key): kind for kind, (key, *_) in _NAMES.items()}
    if not isinstance(name, str) or _plain(name) not in kinds:
        raise ValueError(f"name: expected one of {', '.join(names())}, got {name!r}")
    kind = kinds[_plain(name)]
    parameters = inspect.signature(kind).parameters
    for option in options:
        if option not in parameters:
            there = ", ".join(p for p in parameters if p != "tasks") or "no options"
            raise TypeError(f"{option}: expected an option of {kind.__name__} ({there}), got another")
    if "tasks" in parameters:
        if tasks is None and parameters["tasks"].default is inspect.Parameter.empty:
            raise ValueError(f"tasks: expected the number of tasks, which {kind.__name__} needs, got None")
        options["tasks"] = tasks
    method: Method | Scalarization = kind(**options)
    if tasks is not None:
        method.check_tasks(tasks)
    return method


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


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


def _needs(kind: _Kind) -> str:
    if kind is scalarization.GradNorm:
        return "losses, gradients of a layer"
    if kind is scalarization.NTK:
        return "losses, gradients of residuals"
    if kind is scalarization.PiKE:
        return "losses, gradients of examples"
    if issubclass(kind, Scalarization):
        return "losses"
    if kind is methods.MGDA:
        return "Gram (losses to normalize by them)"
    if kind in (methods.MoCo, methods.DBMTL):
        return "gradients, losses"
    return "Gram" if issubclass(kind, GramMethod) else "gradients"


def _state(kind: _Kind) -> str:
    method = make(_NAMES[kind][0], tasks=4)
    if issubclass(kind, Remembering):
        return ", ".join(method._buffers)
    return ", ".join(name for name in method.state_dict() if name[0] != "_")


def _options(kind: type) -> str:
    parameters = inspect.signature(kind).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)

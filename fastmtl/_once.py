"""Warnings about misuse: once for each kind and place in the user's code, and as if they came from there."""

from __future__ import annotations

import sys
import warnings
from typing import Any, NamedTuple

import torch

__all__ = ["Site", "caller", "first", "forget", "warn", "warn_alone"]

_PACKAGE = __name__.partition(".")[0]
_seen: set[tuple[str, str, int]] = set()


class Site(NamedTuple):
    """A line of the user's code.

    Attributes:
        file: its file.
        line: its number.
        scope: the globals there.
    """

    file: str
    line: int
    scope: dict[str, Any]


def caller() -> Site:
    """The line outside of this package that led here."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame = frame.f_back
    return Site(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)


def first(kind: str, site: Site) -> bool:
    """Whether this is the first time at this site; later ones are not."""
    key = (kind, site.file, site.line)
    if key in _seen:
        return False
    _seen.add(key)
    return True


def warn(kind: str, site: Site, message: str) -> None:
    """A UserWarning, the first time at this site, whatever the filters: a training loop is not flooded.

    From within a backward pass no frame leads to the user's code, which is why the site is given.
    """
    if not first(kind, site):
        return
    module = site.scope.get("__name__", "<unknown>")
    try:
        warnings.warn_explicit(
            message, UserWarning, site.file, site.line, module, site.scope.setdefault("__warningregistry__", {})
        )
    except UserWarning:  # made an error by a filter: then each time
        _seen.discard((kind, site.file, site.line))
        raise


def forget() -> None:
    """Every warning may come again."""
    _seen.clear()


def warn_alone(site: Site, option: str, where: str) -> None:
    """Warns where several processes train and nobody has said whether they are to aggregate together."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    warn(
        option,
        site,
        f"{where}: {distributed.get_world_size()} processes train, and each aggregates the gradients of its own part of "
        f"the batch, which is another direction than that of the whole batch. {option}=True aggregates those of the whole "
        f"batch; {option}=False says that each process is meant to go by itself",
    )

"""Warnings about misuse: once for each kind and place in the user's code, and as if they came from there."""

from __future__ import annotations

import sys
import warnings
from typing import Any, NamedTuple

import torch

__all__ = ["Site", "caller", "first", "forget", "warn", "warn_alone"]

_PACKAGE = __name__.partition(".")[0]
_MOST = 4  # different texts of one kind at one site: which aliases are meant may change from step to step
_seen: dict[tuple[str, str, int], set[str]] = {}


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
    return _is_new(kind, site, "", 1)


def warn(kind: str, site: Site, message: str, most: int = _MOST) -> None:
    """A UserWarning, the first time that it is due at this site, whatever the filters: a training loop is not flooded.

    From within a backward pass no frame leads to the user's code, which is why the site is given.

    Args:
        kind: what it is about.
        site: where it belongs.
        message: what it says.
        most: how many different messages of this kind there may be at this site.
    """
    if not _is_new(kind, site, message, most):
        return
    module = site.scope.get("__name__", "<unknown>")
    try:
        warnings.warn_explicit(
            message, UserWarning, site.file, site.line, module, site.scope.setdefault("__warningregistry__", {})
        )
    except UserWarning:  # made an error by a filter: then it comes each time
        for key in [key for key in _seen if key[1:] == (site.file, site.line)]:
            del _seen[key]
        raise


def _is_new(kind: str, site: Site, text: str, most: int) -> bool:
    texts = _seen.setdefault((kind, site.file, site.line), set())
    if text in texts or len(texts) >= most:
        return False
    texts.add(text)
    return True


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
        f"{where}: {distributed.get_world_size()} processes train, and each aggregates the gradients of its own part "
        "of the batch, which gives another direction than those of the whole batch. "
        f"{option}=True aggregates these; {option}=False says that each process is meant to go by itself",
    )

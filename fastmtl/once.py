"""Warnings about misuse: once for each kind and place in the user's code, and as if they came from there."""

from __future__ import annotations

import sys
import warnings
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

__all__ = ["Site", "caller", "due", "first", "forget", "site_of", "warn", "warn_alone"]

_INSIDE = frozenset({__name__.partition(".")[0], "torch"})  # packages that no user's code is in
_MOST = 4  # different texts of one kind at one site: which aliases are meant may change from step to step
_EACH = 8  # steps of a site that are all looked at
_Key = tuple[str, str, int, int]
_seen: dict[_Key, set[str]] = {}
_counts: dict[_Key, int] = {}


class Site(NamedTuple):
    """A call in the user's code.

    Attributes:
        code: the code that it is in.
        at: where in it.
        scope: the globals there.
    """

    code: CodeType
    at: int
    scope: dict[str, Any]

    def key(self, kind: str) -> _Key:
        """What stands for this site and a kind of warning."""
        return kind, self.code.co_filename, self.code.co_firstlineno, self.at

    def line(self) -> int:
        """The number of the line."""
        lines = (line for start, end, line in self.code.co_lines() if start <= self.at < end)
        return next(lines, None) or self.code.co_firstlineno


def site_of(frame: FrameType) -> Site:
    """Where a frame is."""
    return Site(frame.f_code, frame.f_lasti, frame.f_globals)


def caller() -> Site:
    """The call outside of this package, and of torch, that led here."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame = frame.f_back
    return site_of(frame)


def first(kind: str, site: Site) -> bool:
    """Whether this is the first time at this site."""
    return _is_new(site.key(kind), "", 1)


def due(kind: str, site: Site) -> bool:
    """Whether it is worth a look at this site: the first times, and then ever more rarely."""
    key = site.key(kind)
    count = _counts.get(key, 0)
    _counts[key] = count + 1
    return count < _EACH or count & (count - 1) == 0


def warn(kind: str, site: Site, message: str, most: int = _MOST) -> None:
    """A UserWarning, the first time that it is due at this site, whatever the filters: a training loop is not flooded.

    From within a backward pass no frame leads to the user's code, which is why the site is given.

    Args:
        kind: what it is about.
        site: where it belongs.
        message: what it says.
        most: how many different messages of this kind there may be at this site.
    """
    key = site.key(kind)
    if not _is_new(key, message, most):
        return
    module = site.scope.get("__name__", "<unknown>")
    registry = site.scope.setdefault("__warningregistry__", {})
    try:
        warnings.warn_explicit(message, UserWarning, site.code.co_filename, site.line(), module, registry)
    except UserWarning:  # made an error by a filter: then it comes each time
        for known in [known for known in _seen if known[1:] == key[1:]]:
            del _seen[known]
        raise


def _is_new(key: _Key, text: str, most: int) -> bool:
    texts = _seen.setdefault(key, set())
    if text in texts or len(texts) >= most:
        return False
    texts.add(text)
    return True


def forget() -> None:
    """Every warning may come again."""
    _seen.clear()
    _counts.clear()


def warn_alone(site: Site | None, option: str, where: str) -> None:
    """Warns, at the caller if at no other site, where several processes train and nobody says whether together."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    warn(
        option,
        site or caller(),
        f"{where}: {distributed.get_world_size()} processes train, and each aggregates the gradients of its own part "
        "of the batch, which gives another direction than those of the whole batch. "
        f"{option}=True aggregates these; {option}=False says that each process is meant to work on its own",
    )

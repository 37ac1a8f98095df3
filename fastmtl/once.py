"""Warnings about misuse: once for each kind and place in the user's code, and attributed to that place."""

from __future__ import annotations

import sys
import warnings
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

__all__ = ["Site", "caller", "due", "first", "forget", "site_of", "warn", "warn_alone"]

_INSIDE = frozenset({__name__.partition(".")[0], "torch"})  # packages that contain no user code
_MOST = 4  # different texts of one kind at one site: which aliases they name may change from step to step
_EACH = 8  # the first steps of a site, all of which are examined
_Key = tuple[str, str, int, int]
_seen: dict[_Key, set[str]] = {}
_counts: dict[_Key, int] = {}


class Site(NamedTuple):
    """A call in the user's code.

    Attributes:
        code: the code object of the call.
        at: the offset of its instruction.
        scope: its globals.
    """

    code: CodeType
    at: int
    scope: dict[str, Any]

    def key(self, kind: str) -> _Key:
        """The key of this site and a kind of warning."""
        return kind, self.code.co_filename, self.code.co_firstlineno, self.at

    def line(self) -> int:
        """The line number."""
        lines = (line for start, end, line in self.code.co_lines() if start <= self.at < end)
        return next(lines, None) or self.code.co_firstlineno


def site_of(frame: FrameType) -> Site:
    """The call that a frame is at."""
    return Site(frame.f_code, frame.f_lasti, frame.f_globals)


def caller() -> Site:
    """The call in user code, outside this package and torch, that led here."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame = frame.f_back
    return site_of(frame)


def first(kind: str, site: Site) -> bool:
    """Whether this is the first time at this site."""
    return _is_new(site.key(kind), "", 1)


def due(kind: str, site: Site) -> bool:
    """Whether to look at this site now: the first times, and then ever more rarely."""
    key = site.key(kind)
    count = _counts.get(key, 0)
    _counts[key] = count + 1
    return count < _EACH or count & (count - 1) == 0


def warn(kind: str, site: Site, message: str, most: int = _MOST) -> None:
    """Issues a UserWarning, once per message and site whatever the filters, so that it cannot flood a training loop.

    The site is an argument because within a backward pass no frame leads to the user's code.

    Args:
        kind: the kind of warning.
        site: the call that it is attributed to.
        message: its text.
        most: how many different messages of this kind one site may get.
    """
    key = site.key(kind)
    if not _is_new(key, message, most):
        return
    module = site.scope.get("__name__", "<unknown>")
    registry = site.scope.setdefault("__warningregistry__", {})
    try:
        warnings.warn_explicit(message, UserWarning, site.code.co_filename, site.line(), module, registry)
    except UserWarning:  # a filter made it an error: then it is raised every time
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
    """Forgets all warnings, so that each may be issued again."""
    _seen.clear()
    _counts.clear()


def warn_alone(site: Site | None, option: str, where: str) -> None:
    """Warns, at `site` or else the caller, if several processes train and no option says whether together."""
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

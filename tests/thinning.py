"""The short suite: of a test over a product of parameters, as many cases as show every pair of values once.

Faults of numeric code need one value or two that meet (a dtype and a size), hardly ever three. `--slow` runs the whole
product.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

import pytest

Case = Sequence[str]
_SHAPE = re.compile(r"\d+(x\d+)+")


def covering(cases: Sequence[Case], strength: int) -> list[int]:
    """Positions of few cases in which every `strength` values occur together that do in any of them; greedy.

    Args:
        cases: each the ids of its values, one a `parametrize`.
        strength: 1 for every value once, 2 for every pair. All cases, where there are no more parameters than that.
    """
    width = len(cases[0])
    if width <= strength:
        return list(range(len(cases)))
    chosen = list(itertools.combinations(range(width), strength))
    shows = [{(columns, *(case[c] for c in columns)) for columns in chosen} for case in cases]
    missing = set().union(*shows)
    # Among equals in the order of a hash, or the third parameter would go with the first one's order.
    left = sorted(range(len(cases)), key=lambda k: zlib.crc32("-".join(cases[k]).encode()))
    taken = []
    while missing:
        best = max(left, key=lambda k: len(shows[k] & missing))
        missing -= shows[best]
        left = [k for k in left if shows[k] & missing]
        taken.append(best)
    return sorted(taken)


def split(cases: Sequence[Sequence[str]]) -> list[list[str]]:
    """The cases, a shape such as 33x300 being two values, where all cases have as many."""

    def values(value: str) -> list[str]:
        return value.split("x") if _SHAPE.fullmatch(value) else [value]

    parts = [[part for value in case for part in values(value)] for case in cases]
    return parts if len({len(case) for case in parts}) == 1 else [list(case) for case in cases]


def thinned(items: Sequence[pytest.Item], strength: int, slow: bool = False) -> list[pytest.Item]:
    """The items of the short suite, in order: see `covering`. `@pytest.mark.cover(1)` is less for one test, but for
    `slow`, where those marked so are cases like others."""
    tests = defaultdict(list)
    for item in items:
        tests[getattr(item, "originalname", None), item.parent].append(item)
    kept = set()
    for group in tests.values():
        if not hasattr(group[0], "callspec"):
            kept.update(group)
            continue
        # What the mark of a value skips shows nothing.
        left_out = ("skip",) if slow else ("skip", "slow")
        shown = [item for item in group if not any(map(item.get_closest_marker, left_out))]
        kept.update(set(group) - set(shown))
        cover = None if slow else group[0].get_closest_marker("cover")
        cases = split([item.callspec._idlist for item in shown])  # pytest has no public name for it
        if shown:
            kept.update(shown[k] for k in covering(cases, min(strength, cover.args[0]) if cover else strength))
    return [item for item in items if item in kept]

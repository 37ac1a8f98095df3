"""Which rows of a cotangent belong to which example, found and checked by a second pass.

Loss b should depend on example b alone. Then the cotangent of Σ_b L_b at any use of a parameter is, in the rows of
example b, that of L_b, and nothing else. A pass from the losses times powers of two w_b must bring the same rows, each
times its example's w_b: bit for bit, since powers of two commute with rounding. A row in which two examples meet comes
back times something else. The factors also tell which row belongs to which example: if there are more examples than
factors, by the digits of their numbers, one pass for each digit.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "draw", "find", "find_scattered", "is_sure"]

# Exponents of the factors are -30 ... 30, or -8 ... 0 if there is float16, which a loss scaler has brought near its
# largest numbers. That many examples have factors of their own; more have to share them.
_RANGE, _HALF = 30, 4
_DRAWS = 32  # draws that are kept for batches of one size
# What may differ, in eps of an example's own rows: rounding on a CPU, and atomics on a GPU.
_ROUNDING = {"cpu": 1.0}
_ATOMICS = 100.0
_PREVIEW = 4  # how many columns are enough to rule out most layouts
_ENTRIES = 1 << 16  # entries of a cotangent that are compared at a time


class Layout(NamedTuple):
    """Which of N rows belong to which example: [pre, B, N / pre / B], or in any order.

    Attributes:
        pre: how many rows precede the dimension of the batch.
        owner: for each row its example, int64 [N], if there is no such dimension; rows of zeros may belong to any.
    """

    pre: int = 1
    owner: Tensor | None = None

    def owners(self, lead: int, B: int, device: torch.device) -> Tensor:
        """For each of `lead` rows its example."""
        if self.owner is not None:
            return self.owner
        return torch.arange(lead, device=device) // (lead // self.pre // B) % B

    def by_example(self, x: Tensor, B: int) -> Tensor:
        """[n, N, k] as [n, B, S, k], each example's rows one after the other; padded with zeros if others have more."""
        n, N, k = x.shape
        if self.owner is None and self.pre == 1:
            return x.reshape(n, B, N // B, k)
        if self.owner is None:
            return x.reshape(n, self.pre, B, N // B // self.pre, k).transpose(1, 2).reshape(n, B, N // B, k)
        place, S = _places(self.owner, B)
        out = x.new_zeros(n, B * S, k)
        out[:, place] = x
        return out.view(n, B, S, k)

    def times(self, x: Tensor, weights: Tensor, outer: int) -> Tensor:
        """Rows times their example's weight: x [c, outer · N · inner] in any shape, weights [c, B]."""
        c, B = weights.shape
        if self.owner is None and outer * self.pre == 1:
            return (x.reshape(c, B, -1) * weights[..., None]).view(x.shape)
        if self.owner is None:
            rows = x.reshape(c, outer * self.pre, B, -1)
            return (rows * weights[:, None, :, None]).reshape(x.shape)
        rows = x.reshape(c, outer, len(self.owner), -1)
        return (rows * weights[:, None, self.owner, None]).reshape(x.shape)


def _places(owner: Tensor, B: int) -> tuple[Tensor, int]:
    """Where each row goes among B · S rows, and S, the most rows of any example."""
    counts = torch.bincount(owner, minlength=B)
    S = int(counts.max())
    order = torch.argsort(owner, stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(owner)
    place[order] = torch.arange(len(owner), device=owner.device) - starts[owner[order]]
    return owner * S + place, S


def draw(B: int, dtype: torch.dtype, device: torch.device, half: bool = False) -> Tensor:
    """Factors [n, B], powers of two, as different as possible, n so that all columns differ: one of several draws."""
    draws = _draws(B, dtype, device, half or dtype is torch.float16)
    return draws[_CHOICE.randrange(len(draws))]


_CHOICE = random.Random(22)  # not torch's generator, whose state is the user's


@functools.lru_cache(maxsize=16)
def _draws(B: int, dtype: torch.dtype, device: torch.device, half: bool) -> tuple[Tensor, ...]:
    symbols = 2 * (_HALF if half else _RANGE) + 1
    generator = torch.Generator("cpu").manual_seed(_CHOICE.randrange(2**32))
    numbers = (torch.randperm(max(B, symbols), generator=generator, device="cpu")[:B] for _ in range(_DRAWS))
    powers = [1]
    while powers[-1] * symbols < B:
        powers.append(powers[-1] * symbols)
    ones = torch.ones(B, dtype=dtype, device="cpu")
    least = symbols - 1 if half else _RANGE
    return tuple(
        torch.stack([torch.ldexp(ones, n // power % symbols - least) for power in powers]).to(device) for n in numbers
    )


def find(
    before: Tensor, after: Tensor, w: Tensor, outer: int, lead: int, shape: Sequence[int] = (), *, first: int = 1
) -> Layout | None:
    """The layout of a cotangent, from it and from that of the losses times w [B]; None if rows mix examples.

    Args:
        before: the cotangent of Σ_b L_b, which is [outer, lead, inner] in memory.
        after: that of Σ_b w_b L_b.
        w: powers of two.
        outer: how many times `lead` rows there are, all in the same layout.
        lead: how many rows.
        shape: dimensions whose product is `lead`, if only their boundaries can be those of the batch.
        first: how many rows may precede the batch, tried before all others.
    """
    B = len(w)
    if B == 1:
        return Layout()
    c, got = (_real(x).reshape(outer, lead, -1) for x in (before, after))
    if lead % B == 0:
        if lead // B % first == 0 and _are_same(c, got, first, w):
            return Layout(first)
        pre = next(_fitting(c, got, w, shape), None)
        if pre is not None:
            return Layout(pre)
    return find_scattered(before, [after], w[None], outer, lead)


def find_scattered(before: Tensor, afters: Sequence[Tensor], ws: Tensor, outer: int, lead: int) -> Layout | None:
    """The layout where rows are in any order; None where rows mix examples, or the factors do not tell.

    Args:
        before: as in `find`.
        afters: what came for the losses times each of `ws`.
        ws: powers of two [n, B].
        outer: as in `find`.
        lead: as in `find`.
    """
    c, *gots = (_real(x).reshape(outer, lead, -1) for x in (before, *afters))
    if not c.shape[0] * c.shape[2] or ws.unique(dim=1).shape[1] < ws.shape[1]:
        return None
    same = torch.stack([_came_back(c, got, w) for got, w in zip(gots, ws, strict=True)]).all(0)
    if not same.any(1).all():
        return None
    owner = same.to(torch.int64).argmax(1)
    factors = [w[owner].to(c.dtype)[None, :, None] for w in ws]
    agree = all(_agree(c * factor, got, factor) for factor, got in zip(factors, gots, strict=True))
    return Layout(owner=owner) if agree else None


def _real(x: Tensor) -> Tensor:
    """What is complex, as numbers that lie one after the other: powers of two multiply them each by itself."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def is_sure(before: Tensor, after: Tensor, w: Tensor, outer: int, lead: int, shape: Sequence[int] = ()) -> bool:
    """Whether only one layout fits: if cotangents are zero, all do."""
    if len(w) == 1:
        return True
    c, got = (_real(x).reshape(outer, lead, -1) for x in (before, after))
    return lead % len(w) == 0 and len(list(_fitting(c, got, w, shape))) == 1


def _fitting(c: Tensor, got: Tensor, w: Tensor, shape: Sequence[int]) -> Iterator[int]:
    """The numbers of rows before the batch that fit."""
    preview = c[:1, :, :_PREVIEW].contiguous(), got[:1, :, :_PREVIEW].contiguous()
    for pre in _candidates(c.shape[1] // len(w), shape):
        if _fits(*preview, pre, w) and _fits(c, got, pre, w):
            yield pre


def _candidates(S: int, shape: Sequence[int]) -> Iterator[int]:
    """Numbers of rows that may precede the batch: batch first, batch last, then all others."""
    if shape:
        ways, product = [1], 1
        for n in shape:
            product *= n
            ways.append(product)
        ways = [pre for pre in dict.fromkeys(ways) if S % pre == 0]
    else:
        ways = [pre for pre in range(1, S + 1) if S % pre == 0]
    yield from sorted(ways, key=lambda pre: (pre != 1, pre != S, pre))


def _parted(c: Tensor, got: Tensor, pre: int, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both cotangents as [outer · pre, B, rest], and the factors."""
    outer, lead, inner = c.shape
    shape = (outer * pre, len(w), lead // len(w) // pre * inner)
    return c.reshape(shape), got.reshape(shape), w.to(c.dtype)[:, None]


def _are_same(c: Tensor, got: Tensor, pre: int, w: Tensor) -> bool:
    """Whether they are known to fit bit for bit; the parts that are compared at a time stay in the cache."""
    c, got, factor = _parted(c, got, pre, w)
    step = max(1, len(w) * _ENTRIES // max(1, c.numel()))
    if step >= len(w) or c.device.type != "cpu":
        return _is_zero(torch.addcmul(got, c, factor, value=-1))
    parts = (slice(b, b + step) for b in range(0, len(w), step))
    return all(_is_zero(torch.addcmul(got[:, b], c[:, b], factor[b], value=-1)) for b in parts)


def _is_zero(x: Tensor) -> bool:
    """Whether all entries are zero, none NaN: a sum of absolute values takes a third of the time of `torch.equal`."""
    return x.abs_().sum().item() == 0


def _fits(c: Tensor, got: Tensor, pre: int, w: Tensor) -> bool:
    c, got, factor = _parted(c, got, pre, w)
    return _agree(c * factor, got, factor[None])


def _agree(expected: Tensor, got: Tensor, factor: Tensor) -> bool:
    """Whether they are the same, bit for bit, or up to what may differ, each row with others of its factor."""
    if torch.equal(expected, got):
        return True
    size = torch.where(expected.isfinite(), expected / factor, 0).double()
    error = torch.where(expected.isfinite() | got.isfinite(), (got - expected) / factor, 0).double()
    dims = tuple(d for d in range(size.ndim) if factor.shape[d] == 1)
    about = torch.finfo(expected.dtype)
    allowed = _ROUNDING.get(expected.device.type, _ATOMICS) * about.eps
    # Below the smallest normal number, powers of two do not commute with rounding; losses near 0 have such gradients.
    # float16 has so few numbers above it that what a mixture adds may lie below.
    least = 0.0 if expected.dtype is torch.float16 else about.tiny
    floor = (least + least / factor).double().square().expand_as(size).sum(dims)  # in either pass
    return bool((error.square().sum(dims) <= allowed**2 * size.square().sum(dims) + floor).all())


def _came_back(c: Tensor, got: Tensor, w: Tensor) -> Tensor:
    """For each row, whose factor of w [B] it came back with: [lead, B]; all, where it is zero."""
    by_row, after = c.transpose(0, 1).flatten(1), got.transpose(0, 1).flatten(1)
    size, at = by_row.abs().max(1)
    zero = (size == 0) & (after == 0).all(1)
    ratio = (after.gather(1, at[:, None]) / by_row.gather(1, at[:, None]))[:, 0]
    return (ratio[:, None] == w.to(c.dtype)) | zero[:, None]

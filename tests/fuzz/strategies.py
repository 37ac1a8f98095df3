"""Gradients from a recipe: a few words and numbers, one line of JSON, that hypothesis can draw and shrink."""

from __future__ import annotations

import dataclasses
import math

import torch
from adversaries import PATTERNS
from helpers import BF16, EPS, F16, F32, F64, dense
from hypothesis import strategies as st
from torch import Tensor

DTYPES = {"float32": F32, "float64": F64, "bfloat16": BF16, "float16": F16}
MIXED = "mixed"  # of a ragged list: every parameter has a dtype, every gradient a layout of its own

# What becomes of normal numbers [..., T, P], float64. Rows are drawn with the generator.
BENIGN = ("alike", "opposed parts", "decaying columns", "sparse", "integers", "spread", *PATTERNS)
DEPENDENT = ("duplicate", "opposed", "nearly equal", "nearly opposed", "zero row", "zeros", "low rank")
SIZES = ("tiny", "large", "subnormal", "huge")
BROKEN = ("nan", "inf", "-inf")
VALUES = (*BENIGN, *DEPENDENT, *SIZES, *BROKEN)

# How a matrix lies in memory. What lies between its elements is NaN: a kernel that reads it is caught.
LAYOUTS = (
    "contiguous",
    "unaligned",
    "gaps",
    "transposed",
    "every other row",
    "every other column",
    "batch innermost",
    "expanded rows",
    "expanded columns",
)
ROW_LAYOUTS = ("contiguous", "unaligned", "permuted", "sliced", "expanded")


@dataclasses.dataclass
class Gradients:
    """A gradient matrix [T, P], or [B, T, P], or with `columns` a ragged list of T rows of tensors of these shapes."""

    T: int
    P: int = 1
    B: int | None = None
    columns: list[list[int]] | None = None
    missing: float = 0.0
    dtype: str = "float32"
    layout: str = "contiguous"
    values: list[str] = dataclasses.field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.columns is not None:
            self.P = sum(math.prod(shape) for shape in self.columns)

    def recipe(self) -> dict[str, object]:
        """The fields that are not the defaults."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.columns is not None:
            del given["P"]  # follows from them
        defaults = dataclasses.asdict(Gradients(self.T))
        return {name: value for name, value in given.items() if name == "T" or value != defaults[name]}

    def has(self, *values: str) -> bool:
        return any(value in values for value in self.values)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def exact(self) -> Tensor:
        """[T, P] or [B, T, P] in float64, with all numbers that every dtype of the recipe holds alike."""
        gen = self.generator()
        X = torch.randn(self.B or 1, self.T, self.P, dtype=F64, generator=gen)
        dtypes = DTYPES.values() if self.dtype == MIXED else [DTYPES[self.dtype]]
        for b in range(len(X)):
            for value in self.values:
                X[b] = _changed(X[b], value, dtypes, gen)
        return X[: self.B] if self.B is not None else X[0]

    def matrix(self) -> Tensor:
        """The gradients as one tensor."""
        return _laid_out(self.exact().to(DTYPES[self.dtype]), self.layout)

    def rows(self) -> list[list[Tensor | None]]:
        """The gradients as a ragged list: no column is missing entirely."""
        assert self.columns is not None
        X, gen = self.exact(), self.generator()
        names = list(DTYPES)
        grads: list[list[Tensor | None]] = [[] for _ in range(self.T)]
        start = 0
        for shape in self.columns:
            n = math.prod(shape)
            pick = int(torch.randint(len(names), (), generator=gen))
            dtype = DTYPES[names[pick] if self.dtype == MIXED else self.dtype]
            kept = int(torch.randint(self.T, (), generator=gen))
            absent = (torch.rand(self.T, generator=gen) < self.missing).tolist()
            for t in range(self.T):
                pick = int(torch.randint(len(ROW_LAYOUTS), (), generator=gen))
                g = X[t, start : start + n].to(dtype).reshape(shape)
                layout = ROW_LAYOUTS[pick] if self.layout == MIXED else self.layout
                grads[t].append(None if absent[t] and t != kept else _laid_out_row(g, layout))
            start += n
        return grads

    def dense(self) -> Tensor:
        """What `rows` hold, as one matrix [T, P]: float64 unless all tensors share a dtype."""
        return dense(self.rows())

    def coarsest(self) -> torch.dtype:
        if self.dtype == MIXED:
            return max((g.dtype for row in self.rows() for g in row if g is not None), key=EPS.__getitem__)
        return DTYPES[self.dtype]


def _changed(X: Tensor, value: str, dtypes, gen: torch.Generator) -> Tensor:
    T, P = X.shape
    i, j = torch.randint(T, (2,), generator=gen).tolist()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=gen)

    if value in PATTERNS:
        return PATTERNS[value](T, P, gen)
    if value == "alike":
        return X + 2 * normal(P)
    if value == "opposed parts":
        return X + 2 * normal(P) * normal(T, 1).sign()
    if value == "decaying columns":
        return X * torch.logspace(0, -5, max(P, 1), dtype=F64)[:P]
    if value == "sparse":
        return X * (torch.rand(T, P, generator=gen) < 0.3)
    if value == "integers":
        return X.round()
    if value == "spread":
        return X * 10 ** (6 * torch.rand(T, 1, dtype=F64, generator=gen) - 3)
    if value == "zeros":
        return torch.zeros_like(X)
    if value == "low rank":
        rank = 1 + int(torch.randint(max(1, T // 2), (), generator=gen))
        return normal(T, rank) @ normal(rank, P)
    if value == "subnormal":
        return X * min(torch.finfo(dtype).tiny for dtype in dtypes) / 4
    if value == "huge":  # four times a normal number is infinite
        return X * (min(torch.finfo(dtype).max for dtype in dtypes) / 4)
    if value in ("tiny", "large"):
        return X * (1e-25 if value == "tiny" else 1e25)
    X = X.clone()
    if value == "zero row":
        X[i] = 0
    elif value == "duplicate":
        X[i] = X[j]
    elif value == "opposed":
        X[i] = -X[j]
    elif value == "nearly equal":
        X[i] = X[j] * (1 + 1e-7 * normal(P))
    elif value == "nearly opposed":
        X[i] = -X[j] * (1 + 1e-4 * normal(P))
    elif P:
        X[i, int(torch.randint(P, (), generator=gen))] = float(value)
    return X


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def _unaligned(X: Tensor) -> Tensor:
    buffer = _poisoned((X.numel() + 2,), X.dtype)
    view = buffer[1:-1].view(X.shape)
    view.copy_(X)
    return view


def _laid_out(X: Tensor, layout: str) -> Tensor:
    *batch, T, P = X.shape
    if layout == "unaligned":
        return _unaligned(X)
    if layout == "transposed":
        return X.mT.contiguous().mT
    if layout == "batch innermost":
        return X.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "expanded rows":
        return X[..., :1, :].expand(X.shape)
    if layout == "expanded columns":
        return X[..., :1].expand(X.shape) if P else X
    if layout == "contiguous":
        return X
    if layout == "gaps":
        wide = _poisoned((*batch, T + 1, P + 3), X.dtype)[..., :T, 1 : P + 1]
    elif layout == "every other row":
        wide = _poisoned((*batch, 2 * T, P), X.dtype)[..., ::2, :]
    else:
        wide = _poisoned((*batch, T, 2 * P), X.dtype)[..., ::2]
    wide.copy_(X)
    return wide


def _laid_out_row(g: Tensor, layout: str) -> Tensor:
    if layout == "unaligned":
        return _unaligned(g)
    if layout == "permuted" and g.ndim:
        return g.permute(*reversed(range(g.ndim))).contiguous().permute(*reversed(range(g.ndim)))
    if layout == "sliced" and g.ndim:
        wide = _poisoned((*g.shape[:-1], 2 * g.shape[-1]), g.dtype)[..., ::2]
        wide.copy_(g)
        return wide
    if layout == "expanded" and g.ndim and g.shape[0]:
        return g[:1].expand(g.shape)
    return g


# ------------------------------------------------------------------------------------------------ strategies


tasks = st.one_of(st.integers(1, 8), st.integers(1, 40), st.sampled_from([9, 12, 13, 16, 17, 33]))
many_tasks = st.one_of(tasks, tasks, tasks, tasks, tasks, tasks, tasks, st.sampled_from([48, 64, 65, 70]))
sizes = st.one_of(
    st.integers(0, 40),
    st.sampled_from([0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 255, 257, 1000, 1025, 2047, 2049, 4097]),
    st.integers(0, 5000),
)
seeds = st.integers(0, 2**31 - 1)


def values(*kinds: str):
    return st.lists(st.sampled_from(kinds), max_size=3, unique=True)


@st.composite
def matrices(draw, tasks=many_tasks, sizes=sizes, batches=True, dtypes=tuple(DTYPES), kinds=VALUES, layouts=LAYOUTS):
    B = draw(st.one_of(st.none(), st.none(), st.integers(0, 9), st.sampled_from([17, 40]))) if batches else None
    T, P = draw(tasks), draw(sizes)
    if B is not None and B * T * P > 100_000:
        P = 100_000 // (B * T)
    return Gradients(
        T=T,
        P=P,
        B=B,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from([name for name in layouts if B is not None or name != "batch innermost"])),
        values=draw(values(*kinds)),
        seed=draw(seeds),
    )


shapes = st.one_of(
    st.sampled_from([[], [0], [1], [2, 0, 3], [17], [3, 4], [2, 6, 5, 4], [64, 3]]),
    st.lists(st.integers(0, 9), max_size=4),
    st.integers(0, 2500).map(lambda n: [n]),
)


@st.composite
def ragged(draw, tasks=tasks, kinds=VALUES, dtypes=(*DTYPES, MIXED)):
    return Gradients(
        T=draw(tasks),
        columns=draw(st.lists(shapes, min_size=1, max_size=6)),
        missing=draw(st.sampled_from([0.0, 0.0, 0.2, 0.9])),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from([*ROW_LAYOUTS[:4], MIXED])),
        values=draw(values(*kinds)),
        seed=draw(seeds),
    )

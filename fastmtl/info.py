"""What a method saw and did in one step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.inputs import EPS, describe, has_numbers

__all__ = ["Info", "condition_number", "smallest_kept", "tolerances"]

_EPS32, _EPS64 = EPS[torch.float32], EPS[torch.float64]
_SHOWN = 8  # weights in a repr
_ANY_RULE = (0.0, 0.0, "gram")  # eigenvalues are the same under every rank rule


class Info:
    """What a method saw and did in one step: tensors on the gradients' device, for which the host does not wait.

    `Info(T)` makes buffers for `fan_out(..., info=...)`, NaN until a backward has filled them. With `groups=` or `per=`
    every field has a leading dimension, one entry a group. A field that a method does not fill is None.
    `logger.log(info.as_dict())` logs it.

    Args:
        tasks: number of tasks T.
        device: where the buffers lie: the gradients' device.

    Attributes:
        alpha: task weights α, float64 [T]: the committed gradient is αᵀ G. (None for `GradDrop`, which has none.)
        gram: Gram matrix of the task gradients, float64 [T, T].
        eigenvalues: its eigenvalues, float64 [T], descending; the first `rank` are kept. No step needs them: they are
            computed from `gram` when they are first read.
        rank: number of independent task gradients under the method's rank rule, int64 [].
        residual: how far α is from satisfying the method's own optimality conditions, relative, float64 []: infinite
            where these have no solution, NaN where the gradients are not finite. None for methods that solve nothing.
        explicit: names of the shared parameters whose T gradients `engine="gramian"`, or `batch_dim`, formed because it
            knows no closed form for their use; None without these.
        age: how many steps ago the weights were computed, with `every=`; None without.
        lasting: the weights before what depends on this step's gradients alone, as the norm that `NashMTL` shortens
            them to; None where these are `alpha`.
        names: of the tasks, where they have names: `backward({"seg": ..., "depth": ...})`.
    """

    SOLVED = 1e-8  # a residual up to this counts as converged

    alpha: Tensor  # None for one method only: typed so that users of all others need not test for it
    gram: Tensor | None
    rank: Tensor | None
    residual: Tensor | None
    explicit: tuple[str, ...] | None = None
    age: int | None = None
    lasting: Tensor | None = None
    names: tuple[str, ...] | None = None
    _eigenvalues: Tensor | None
    _spectrum = False  # whether eigenvalues can still be computed

    def __init__(self, tasks: int, device: torch.device | str | None = None) -> None:
        self.alpha = torch.full((tasks,), math.nan, dtype=torch.float64, device=device)
        self.gram = torch.full((tasks, tasks), math.nan, dtype=torch.float64, device=device)
        self._eigenvalues = torch.full((tasks,), math.nan, dtype=torch.float64, device=device)
        self.rank = torch.zeros((), dtype=torch.int64, device=device)
        self.residual = torch.full((), math.nan, dtype=torch.float64, device=device)

    @classmethod
    def of(
        cls,
        alpha: Tensor | None = None,
        gram: Tensor | None = None,
        eigenvalues: Tensor | None = None,
        rank: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        spectrum: bool = False,
    ) -> Info:
        """An info that holds these very tensors; with `spectrum`, eigenvalues are computed from `gram` when read."""
        info = cls.__new__(cls)
        info.alpha = alpha  # type: ignore[assignment]
        info.gram, info._eigenvalues, info.rank, info.residual = gram, eigenvalues, rank, residual
        info._spectrum = spectrum
        return info

    @property
    def eigenvalues(self) -> Tensor | None:
        """See the attributes."""
        if self._eigenvalues is None and self._spectrum and self.gram is not None:
            self._eigenvalues = ops.balance(self.gram, None, "min", *_ANY_RULE)[1]
        return self._eigenvalues

    @property
    def converged(self) -> Tensor | None:
        """Whether `residual` is at most `SOLVED`, bool []; None for methods that solve nothing."""
        return None if self.residual is None else self.residual <= self.SOLVED

    @property
    def condition_number(self) -> Tensor | None:
        """κ = σ_max / σ_min over the kept singular values of the task gradients, float64 []; None without a Gram.

        Which are kept is the method's own rank rule, or Aligned-MTL's default for a method without one: see
        `fastmtl.diagnostics.condition_number`.
        """
        if self.gram is None:
            return None
        if self.eigenvalues is not None and self.rank is not None:
            return condition_number(self.eigenvalues, self.rank)
        rtol, zero = tolerances(self.gram.shape[-1], self.gram.dtype)
        return condition_number(*ops.balance(self.gram, None, "min", rtol, zero, "normalized")[1:])

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for a logger; reading them makes the host wait for the device.

        `alpha/…` and `norm/…` (of the gradient) of every task by name, or by number where tasks have no names; `rank`,
        `condition_number` and `residual`, as far as the method has them. With `groups=` the group's number comes first
        in the last part, as in `alpha/0/depth` and `rank/0`.
        """
        norms = None if self.gram is None else self.gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        numbers: dict[str, float] = {}
        for field, value in (("alpha", self.alpha), ("norm", norms)):
            if value is not None:
                for index, x in _entries(value):
                    task = index[-1] if self.names is None else self.names[index[-1]]
                    numbers["/".join((field, *map(str, index[:-1]), str(task)))] = x
        fields = {"rank": self.rank, "condition_number": self.condition_number, "residual": self.residual}
        for field, value in fields.items():
            if value is not None:
                numbers |= {"/".join((field, *map(str, index))): x for index, x in _entries(value)}
        return numbers

    def copy_(self, other: Info) -> Info:
        """Overwrites the buffers with those of `other`; fields that it does not have keep their content."""
        for mine, its in zip(self._fields(), other._fields(), strict=True):
            if mine is not None and its is not None:
                mine.copy_(its)
        if other.names is not None:
            self.names = other.names
        return self

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.alpha, self.gram, self.eigenvalues, self.rank, self.residual

    def __repr__(self) -> str:
        fields = {"alpha": self.alpha, "rank": self.rank, "residual": self.residual}
        return f"Info({', '.join(f'{k}={self._shown(v)}' for k, v in fields.items() if v is not None)})"

    def _shown(self, value: Tensor) -> str:
        if value.is_meta or value.ndim > 1 or (value.device.type == "cpu" and not has_numbers(value)):
            return f"<{describe(value)}>"
        if not value.ndim:
            return f"{value.item():.3g}"
        names = self.names or ("",) * len(value)
        shown = [f"{name}: {x:.3g}" if name else f"{x:.3g}" for name, x in zip(names, value.tolist(), strict=True)]
        return f"[{', '.join(shown[:_SHOWN])}{', …' if len(shown) > _SHOWN else ''}]"


def _entries(value: Tensor) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every number of a tensor, after its indices."""
    numbers = value.detach().to("cpu", torch.float64)
    yield from zip(itertools.product(*map(range, value.shape)), numbers.reshape(-1).tolist(), strict=True)


def condition_number(eigenvalues: Tensor, rank: Tensor) -> Tensor:
    """κ [...] from the eigenvalues [..., T] of a Gram matrix, descending, of which the first `rank` [...] are kept."""
    largest = eigenvalues[..., 0]
    return torch.where(largest == 0, 1.0, largest / smallest_kept(eigenvalues, rank)).sqrt()


def smallest_kept(eigenvalues: Tensor, rank: Tensor) -> Tensor:
    """The smallest kept eigenvalue [...]; if none is kept, the largest, which then is 0 or NaN."""
    return eigenvalues.gather(-1, (rank - 1).clamp_min(0)[..., None])[..., 0]


def tolerances(T: int, dtype: torch.dtype) -> tuple[float, float]:
    """Aligned-MTL's default tolerances for T gradients of this dtype.

    Returns:
        `rtol`, and the norm relative to the largest up to which a row counts as rounding noise.
    """
    if dtype is torch.float32:
        return math.sqrt(T * _EPS32), _EPS32
    if dtype is torch.float64:
        return math.sqrt(T * _EPS64), _EPS64
    return max(math.sqrt(T * _EPS32), EPS[dtype]), _EPS32

"""What several test files need: a float64 SVD as the truth, generators of gradient matrices, and error measures."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sysconfig
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmtl import ops

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
EPS32, EPS64 = torch.finfo(F32).eps, torch.finfo(F64).eps
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
GUARD = 64  # elements before and after a result

BUILT = ops.EXTENSIONS["_C"] is not None
# Debian has them in a package of their own, which neither fastmtl nor its kernels need.
HEADERS = Path(sysconfig.get_path("include"), "Python.h").is_file()
NO_HEADERS = "Python's headers are not installed (python3-dev)"
needs_ecos = pytest.mark.skipif(
    importlib.util.find_spec("ecos") is None,
    reason="ecos, which TorchJD's NashMTL solves with, is not installed: it has no wheel for Python 3.13",
)
needs_extension = pytest.mark.skipif(not BUILT, reason="the extension is not built")


def dtype_id(value: object) -> str | None:
    """Test ids: torch.float32 -> float32."""
    return str(value)[6:] if isinstance(value, torch.dtype) else None


# ------------------------------------------------------------------------------------------------ gradient matrices


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """Standard normal entries drawn in float64, so that every dtype holds the same matrix up to rounding."""
    return torch.randn(shape, dtype=F64, generator=generator(seed)).to(dtype)


def conditioned(T: int, P: int, kappa: float, spread: float = 1.0, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """[T, P] with about this condition number and equal row norms, the rows then spread by factors 1..`spread`."""
    gen = generator(seed)
    V, _ = torch.linalg.qr(torch.randn(P, T, dtype=F64, generator=gen))
    U, _ = torch.linalg.qr(torch.randn(T, T, dtype=F64, generator=gen))
    G = (U * torch.logspace(0, -math.log10(kappa), T, dtype=F64)) @ V.T
    G = G / G.norm(dim=1, keepdim=True)
    factors = torch.logspace(0, math.log10(spread), T, dtype=F64)[torch.randperm(T, generator=gen)]
    return (G * factors[:, None]).to(dtype)


def guarded(shape: Sequence[int], dtype: torch.dtype, offset: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """An output of NaN in the middle of a larger buffer of sevens: finds unwritten and foreign elements."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 2 * GUARD + offset,), 7.0, dtype=dtype, device=device)
    out = buffer[GUARD + offset : GUARD + offset + size].view(shape)
    out.fill_(torch.nan)
    return buffer, out


def check_guard(buffer: Tensor, size: int, offset: int = 0) -> None:
    assert (buffer[: GUARD + offset] == 7.0).all()
    assert (buffer[GUARD + offset + size :] == 7.0).all()


def _with_row(row: Callable[[Tensor], Tensor]) -> Callable[[torch.dtype], Tensor]:
    def make(dtype: torch.dtype) -> Tensor:
        G = randn(5, 1501, dtype=dtype, seed=3)
        return torch.cat([G[:2], row(G)[None].to(dtype), G[2:]])

    return make


# Exactly or nearly dependent tasks: dtype -> G.
DEPENDENT: dict[str, Callable[[torch.dtype], Tensor]] = {
    "duplicate": _with_row(lambda G: G[0]),
    "opposed": _with_row(lambda G: -G[0]),
    "doubled": _with_row(lambda G: 2 * G[0]),
    "zero row": _with_row(lambda G: 0 * G[0]),
    "sum of others": _with_row(lambda G: G.to(F64).sum(0)),
    "all equal": lambda dtype: randn(1, 900, dtype=dtype, seed=4).expand(6, 900),
    "T > P": lambda dtype: randn(20, 7, dtype=dtype, seed=5),
    "P = 1": lambda dtype: randn(6, 1, dtype=dtype, seed=6),
}


# ------------------------------------------------------------------------------------------------ the truth


def default_rtol(T: int, dtype: torch.dtype) -> float:
    if dtype is F64:
        return math.sqrt(T * EPS64)
    return max(math.sqrt(T * EPS32), 0.0 if dtype is F32 else EPS[dtype])


def _prescaled(G: Tensor) -> tuple[Tensor, int]:
    """G in float64 with its largest entry near one, and the exponent taken out: no norm over- or underflows."""
    G = G.detach().to(F64)
    exponent = int(torch.frexp(G.abs().max()).exponent) if G.numel() else 0
    return torch.ldexp(G, torch.tensor(-exponent)), exponent


def _normalised(G: Tensor, dtype: torch.dtype) -> Tensor:
    norms = G.norm(dim=1, keepdim=True)
    floor = norms.max() * (EPS64 if dtype is F64 else EPS32)
    return torch.where(norms > floor, G / norms, 0.0)


def svd_rank(G: Tensor, rtol: float | None = None, rank_rule: str = "normalized") -> int:
    """The number of independent tasks under the rank rule, from singular values in float64."""
    rtol = default_rtol(G.shape[0], G.dtype) if rtol is None else rtol
    X, _ = _prescaled(G)
    if not X.numel():
        return 0
    s = torch.linalg.svdvals(_normalised(X, G.dtype) if rank_rule == "normalized" else X)
    return int((s > s.max() * rtol).sum())


def svd_truth(
    G: Tensor,
    weights: Tensor | None = None,
    scale: str = "min",
    rtol: float | None = None,
    rank_rule: str = "normalized",
) -> tuple[Tensor, int, float]:
    """Aligned-MTL by a float64 SVD: c · (polar factor of the R kept components of G)ᵀ w, float64 [P]; R; the κ of C."""
    T, P = G.shape
    rtol = default_rtol(T, G.dtype) if rtol is None else rtol
    X, exponent = _prescaled(G)
    if not X.any():
        return torch.zeros(P, dtype=F64), 0, 1.0
    Q, L = torch.linalg.qr(X.mT)  # the rows of Lᵀ are as accurate as those of X, each by itself
    L = L.mT
    own = torch.linalg.svdvals(_normalised(L, G.dtype))
    kappa = float(own[0] / own[own > own[0] * rtol][-1])
    U, s, Vh = torch.linalg.svd(L, full_matrices=False)
    ranked = own if rank_rule == "normalized" else s
    R = int((ranked > ranked[0] * rtol).sum())
    w = torch.full((T,), 1 / T, dtype=F64) if weights is None else weights.to(F64)
    c = {"min": s[R - 1], "median": s[:R].flip(0)[(R - 1) // 2], "rmse": s[:R].square().mean().sqrt()}[scale]
    direction = Q @ ((w @ U[:, :R]) @ Vh[:R])
    return torch.ldexp(c * direction, torch.tensor(exponent)), R, kappa


def svd_align(G: Tensor, *args, **options) -> Tensor:
    return svd_truth(G, *args, **options)[0]


def condition(G: Tensor, rtol: float | None = None) -> float:
    """Condition number of the row-normalised G on the kept space."""
    X, _ = _prescaled(G)
    s = torch.linalg.svdvals(_normalised(X, G.dtype))
    R = svd_rank(G, rtol)
    return float(s[0] / s[R - 1]) if R else 1.0


def contract(T: int, kappa: float, dtype: torch.dtype = F32) -> float:
    """The relative error of the aligned gradient that docs/numerics.md promises, plus the rounding of the result."""
    if dtype is F64:
        return max(1e-13, 1e-15 * T * kappa**2)
    limit = 2e-6 if T <= 40 and kappa <= 1e4 else 1e-4 if kappa <= 1e5 else 1e-2
    return limit + (0.0 if dtype is F32 else EPS[dtype])


# ------------------------------------------------------------------------------------------------ error measures


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖ in float64 without over- or underflow; absolute where expected is zero."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if not expected.numel():
        return 0.0
    expected, exponent = _prescaled(expected)
    got = torch.ldexp(got.detach().to(F64), torch.tensor(-exponent))
    error, size = (got - expected).norm().item(), expected.norm().item()
    error = error if size == 0.0 else error / size
    return error if error == error else math.inf


def gram_error(got: Tensor, G: Tensor) -> float:
    """Largest error of a Gram entry relative to the norms of its two rows. G [..., T, P]."""
    X = G.to(F64)
    assert got.shape == (*G.shape[:-1], G.shape[-2])
    assert got.dtype is F64
    norms = X.norm(dim=-1)
    size = norms[..., :, None] * norms[..., None, :]
    error = (got - X @ X.mT).abs()
    error = torch.where(size > 0, error / size.clamp_min(torch.finfo(F64).tiny), error)
    return float(error.nan_to_num(math.inf).max()) if error.numel() else 0.0


def gram_limit(dtype: torch.dtype, T: int = 1) -> float:
    """Float64 products are exact to a few eps; `align` sums those of many benign rows in float32 blocks."""
    return 1e-12 if dtype is F64 or T <= 16 else 2e-6


def dense(rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """The [T, P] matrix behind a ragged list, missing entries as zeros; float64 unless all tensors share a dtype."""
    columns = []
    for column in zip(*rows, strict=True):
        like = next((g for g in column if g is not None), None)
        if like is not None:
            columns.append(
                torch.stack([torch.zeros(like.numel()).to(like) if g is None else g.reshape(-1) for g in column])
            )
    if len({c.dtype for c in columns}) > 1:
        columns = [c.to(F64) for c in columns]
    return torch.cat(columns, 1)


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    """A ragged result as one float64 vector, parameters without any gradient left out, as `dense` leaves them out."""
    return torch.cat([t.reshape(-1).to(F64) for t in tensors if t is not None])


def rounded(got: Tensor, expected: Tensor, slack: Tensor | float = 0.0) -> bool:
    """Whether `got` is `expected` (float64) rounded to got's dtype, subnormals too; `slack` is what sums may be off."""
    info = torch.finfo(got.dtype)
    limit = 0.502 * info.eps * expected.abs().clamp_min(info.tiny) + slack
    return bool(((got.to(F64) - expected).abs() <= limit).all())


def nearest(x: float, dtype: torch.dtype) -> float:
    """`x` rounded once to a 16-bit dtype, ties to even, by exact arithmetic: conversions of torch round twice."""
    if not math.isfinite(x) or x == 0.0:
        return x
    info = torch.finfo(dtype)
    binade = max(math.frexp(x)[1] - 1, math.frexp(info.tiny)[1] - 1)
    place = Fraction(2) ** binade * Fraction(info.eps)
    y = abs(round(Fraction(x) / place) * place)
    return math.copysign(math.inf if y > Fraction(info.max) else float(y), x)


def hard_to_round(dtype: torch.dtype) -> Tensor:
    """Float64 numbers that are nearly or exactly halfway between two of a 16-bit dtype, through all exponents.

    Subnormal ones and those around the largest too; zero, infinities and NaN.
    """
    info = torch.finfo(dtype)
    lowest, highest = math.frexp(info.tiny * info.eps)[1] - 1, math.frexp(info.max)[1]
    offsets = [0.0, *(s * 2.0**-k for s in (-1, 1) for k in (12, 24, 25, 30, 51))]
    odd, even = 1 + info.eps, 1 + 2 * info.eps
    numbers = {math.inf, math.nan, 5e-324, 2.0**-150, 2.0**-140, 1e300}
    for e in (*range(lowest - 3, lowest + 14), *range(-9, 10), highest - 2, highest - 1, highest):
        # In the normal range the place beyond the last is eps / 2; among subnormal numbers it is the leading one.
        for leading, offset in itertools.product((1.0, odd, even, 1.5, 2.0), offsets):
            for half in (0.0, info.eps / 2):
                numbers.add((leading + half + offset * info.eps) * 2.0**e)
    numbers |= {k * 2.0 ** (lowest - 1) * (1 + offset) for k in range(1, 40) for offset in offsets}
    return torch.tensor([0.0, *(s * x for x in sorted(numbers, key=str) for s in (1, -1))], dtype=F64)


def same_numbers(got: Tensor, expected: Sequence[float]) -> bool:
    """To the bit, signs of zeros too; any NaN for NaN."""
    got, want = got.to(F64), torch.tensor(expected, dtype=F64)
    return bool((got.isnan() & want.isnan() | (got == want) & (got.signbit() == want.signbit())).all())


def residuals(M: Tensor, lam: Tensor, V: Tensor) -> tuple[float, float]:
    """LAPACK's test ratios, worst of the batch: ‖MV - VΛ‖ / (‖M‖ T eps) and ‖VᵀV - I‖ / (T eps), in the 1-norm."""
    T, eps = M.shape[-1], torch.finfo(M.dtype).eps
    M, lam, V = M.to(F64), lam.to(F64), V.to(F64)

    def norm(X: Tensor) -> Tensor:
        return X.abs().sum(-2).amax(-1)

    size = norm(M)
    residual = norm(M @ V - V * lam[..., None, :])
    first = torch.where(size > 0, residual / (size * T * eps), residual)
    second = norm(V.mT @ V - torch.eye(T, dtype=F64)) / (T * eps)
    return first.max().item(), second.max().item()


class Fail(torch.autograd.Function):
    """Fails in its backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise ArithmeticError("this loss cannot be differentiated")

"""The emulated CUDA kernels on torch tensors: what the CUDA half of fastmtl.ops would compute."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import build
import torch
from helpers import EPS32, EPS64, F64, default_rtol
from torch import Tensor

# Shared memory that a block can have: compute capability 7.5, where the eigenvectors of many tasks do not fit, and 9.0.
SMALL_SHARED, LARGE_SHARED = 65536, 232448
GUARD = 64
KERNELS = Path(__file__).with_name("kernels.cpp")


def require_tools() -> None:
    """What is missing to compile the kernels is an error, not a reason to skip."""
    if shutil.which(build.COMPILER) is None:
        raise RuntimeError(f"the emulated CUDA tests need a C++20 compiler: {build.COMPILER} not found")
    if importlib.util.find_spec("pybind11") is None:
        raise RuntimeError("the emulated CUDA tests need pybind11: pip install pybind11")


def built(mode: str = "plain", defines: Sequence[str] = ()) -> Path:
    """The path of the compiled module."""
    require_tools()
    return build.build(mode, KERNELS, defines)


@functools.cache
def module() -> ModuleType:
    return build.load(built())


def guarded(shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> tuple[Tensor, Tensor]:
    """An output of NaN in the middle of a larger buffer of sevens: finds unwritten and foreign elements."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 2 * GUARD + offset,), 7.0, dtype=dtype)
    out = buffer[GUARD + offset : GUARD + offset + size].view(*shape)
    out.fill_(torch.nan)
    return buffer, out


def check_guard(buffer: Tensor, size: int, offset: int = 0) -> None:
    assert (buffer[: GUARD + offset] == 7.0).all()
    assert (buffer[GUARD + offset + size :] == 7.0).all()


def settings(
    T: int,
    dtype: torch.dtype,
    weights: Tensor | None = None,
    scale: str = "min",
    rtol: float | None = None,
    rank_rule: str = "normalized",
) -> dict:
    weights = None if weights is None else weights.to(F64).contiguous()
    return {
        "keep": weights,  # alive while the kernels read it
        "weights": 0 if weights is None else weights.data_ptr(),
        "scale": scale,
        "rank_rule": rank_rule,
        "rtol": default_rtol(T, dtype) if rtol is None else rtol,
        "zero": EPS64 if dtype is F64 else EPS32,
    }


@dataclass
class Aligned:
    out: Tensor | list[Tensor]
    M: Tensor
    alpha: Tensor
    lam: Tensor
    rank: Tensor
    launches: list[str]

    def bits(self) -> list[Tensor]:
        """All of it for comparisons in which NaN equals NaN."""
        outs = self.out if isinstance(self.out, list) else [self.out]
        every = [*outs, self.M, self.alpha, self.lam, self.rank]
        return [x.contiguous().view(torch.uint8) if x.ndim else x for x in every]


class Device:
    """A device whose float64 is slow or not, with this much shared memory."""

    def __init__(self, slow: bool = False, limit: int = LARGE_SHARED):
        self.slow, self.limit = slow, limit

    def session(self):
        module().set_shared_limit(self.limit)
        module().reset_launches()
        return module().Session(self.slow, self.limit)

    @staticmethod
    def launches() -> list[str]:
        """The kernels that ran since the last call of a method, without their template parameters."""
        return [name.partition("<")[0] for name in module().launches()]

    @staticmethod
    def _input(G: Tensor, out: Tensor | None = None):
        assert G.shape[-1] < 2 or G.stride(-1) == 1
        x, size = module().Input(), G.element_size()
        x.B, x.T, x.P = (G.shape[0] if G.ndim == 3 else 1), G.shape[-2], G.shape[-1]
        x.base, x.dtype = G.data_ptr(), str(G.dtype)[6:]
        x.next_row, x.next_matrix = G.stride(-2) * size, (G.stride(0) if G.ndim == 3 else 0) * size
        if out is not None:
            assert out.dtype is G.dtype
            x.out, x.next_out = out.data_ptr(), (out.stride(0) if G.ndim == 3 else 0) * size
        return x

    @staticmethod
    def _rows(grads: Sequence[Tensor | None], T: int, outs: Sequence[Tensor] | None = None):
        K = len(grads) // T
        x = module().Input()
        x.T, x.ragged, segments = T, True, []
        for k in range(K):
            column = grads[k::K]
            like = next(g for g in column if g is not None)
            assert all(g is None or g.is_contiguous() for g in column)
            addresses = [0 if g is None else g.data_ptr() for g in column]
            segments.append((addresses, 0 if outs is None else outs[k].data_ptr(), like.numel(), str(like.dtype)[6:]))
        x.segments = segments
        return x

    def gram(self, G: Tensor, exact: bool = True) -> tuple[Tensor, list[float]]:
        """M, and where it was computed in float32 blocks what they need as λ_min(C), for each matrix."""
        B, T = (G.shape[0] if G.ndim == 3 else 1), G.shape[-2]
        buffer, M = guarded((B, T, T), F64)
        bounds = module().gram(self.session(), self._input(G), exact, M.data_ptr())
        check_guard(buffer, M.numel())
        return M.view(*G.shape[:-1], T), bounds

    def gram_rows(self, grads: Sequence[Tensor | None], T: int, exact: bool = True) -> tuple[Tensor, list[float]]:
        buffer, M = guarded((T, T), F64)
        bounds = module().gram(self.session(), self._rows(grads, T), exact, M.data_ptr())
        check_guard(buffer, T * T)
        return M, bounds

    def combine(self, G: Tensor, alpha: Tensor, offset: int = 0) -> Tensor:
        buffer, out = guarded((*G.shape[:-2], G.shape[-1]), G.dtype, offset)
        alpha = alpha.contiguous()  # to be kept as long as its address is in use
        module().combine(self.session(), self._input(G, out), alpha.data_ptr())
        check_guard(buffer, out.numel(), offset)
        return out

    def combine_rows(self, grads: Sequence[Tensor | None], alpha: Tensor) -> list[Tensor]:
        buffers, outs = self._outs(grads, alpha.shape[0])
        module().combine(self.session(), self._rows(grads, alpha.shape[0], outs), alpha.data_ptr())
        for buffer, out in zip(buffers, outs, strict=True):
            check_guard(buffer, out.numel())
        return outs

    def sign_drop(self, G: Tensor, seed: Tensor, leak: Tensor | None = None, offset: int = 0) -> Tensor:
        buffer, out = guarded((*G.shape[:-2], G.shape[-1]), G.dtype, offset)
        address = 0 if leak is None else leak.data_ptr()
        module().sign_drop(self.session(), self._input(G, out), seed.data_ptr(), address)
        check_guard(buffer, out.numel(), offset)
        return out

    def sign_drop_rows(
        self, grads: Sequence[Tensor | None], T: int, seed: Tensor, leak: Tensor | None = None
    ) -> list[Tensor]:
        buffers, outs = self._outs(grads, T)
        address = 0 if leak is None else leak.data_ptr()
        module().sign_drop(self.session(), self._rows(grads, T, outs), seed.data_ptr(), address)
        for buffer, out in zip(buffers, outs, strict=True):
            check_guard(buffer, out.numel())
        return outs

    @staticmethod
    def _outs(grads: Sequence[Tensor | None], T: int) -> tuple[list[Tensor], list[Tensor]]:
        K = len(grads) // T
        like = [next(g for g in grads[k::K] if g is not None) for k in range(K)]
        both = [guarded(g.shape, g.dtype) for g in like]
        return [b for b, _ in both], [o for _, o in both]

    def _align(self, x, B: int, T: int, policy: dict, wanted: bool):
        shapes = [((B, T, T), F64), ((B, T), F64), ((B, T), F64)]
        buffers, results = zip(*(guarded(*s) for s in shapes), strict=True)
        rank = torch.full((B,), -1, dtype=torch.int64)
        addresses = [r.data_ptr() for r in (*results, rank)] if wanted else [0] * 4
        module().align(self.session(), x, policy, *addresses)
        for buffer, result in zip(buffers, results, strict=True):
            check_guard(buffer, result.numel())
        return *results, rank

    def align(self, G: Tensor, offset: int = 0, wanted: bool = True, **options) -> Aligned:
        B, T = (G.shape[0] if G.ndim == 3 else 1), G.shape[-2]
        buffer, out = guarded((*G.shape[:-2], G.shape[-1]), G.dtype, offset)
        results = self._align(self._input(G, out), B, T, settings(T, G.dtype, **options), wanted)
        check_guard(buffer, out.numel(), offset)
        if G.ndim == 2:
            results = [r[0] for r in results]
        return Aligned(out, *results, self.launches())

    def align_rows(self, grads: Sequence[Tensor | None], T: int, dtype: torch.dtype, **options) -> Aligned:
        """`dtype` is the one that decides on tolerances."""
        buffers, outs = self._outs(grads, T)
        results = self._align(self._rows(grads, T, outs), 1, T, settings(T, dtype, **options), True)
        for buffer, out in zip(buffers, outs, strict=True):
            check_guard(buffer, out.numel())
        return Aligned(outs, *[r[0] for r in results], self.launches())

    def balance(self, M: Tensor, dtype: torch.dtype = F64, **options) -> tuple[Tensor, Tensor, Tensor]:
        T = M.shape[-1]
        B = M.shape[0] if M.ndim == 3 else 1
        (ab, alpha), (lb, lam) = guarded((B, T), F64), guarded((B, T), F64)
        rank = torch.full((B,), -1, dtype=torch.int64)
        policy = settings(T, dtype, **options)
        addresses = [alpha.data_ptr(), lam.data_ptr(), rank.data_ptr()]
        M = M.contiguous()
        module().balance(self.session(), M.data_ptr(), B, T, policy, *addresses)
        check_guard(ab, alpha.numel())
        check_guard(lb, lam.numel())
        return alpha.view(M.shape[:-1]), lam.view(M.shape[:-1]), rank.view(M.shape[:-2])

    def eigh(self, M: Tensor) -> tuple[Tensor, Tensor]:
        T = M.shape[-1]
        B = M.shape[0] if M.ndim == 3 else 1
        (lb, lam), (vb, V) = guarded((B, T), F64), guarded((B, T, T), F64)
        M = M.contiguous()
        module().eigh(self.session(), M.data_ptr(), B, T, lam.data_ptr(), V.data_ptr())
        check_guard(lb, lam.numel())
        check_guard(vb, V.numel())
        return lam.view(M.shape[:-1]), V.view(M.shape)

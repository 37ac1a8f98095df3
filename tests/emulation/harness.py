"""The emulated CUDA kernels on torch tensors: what the CUDA half of fastmtl.ops would compute."""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import build
import pytest
import torch
from helpers import F32, F64, HEADERS, NO_HEADERS, check_guard, guarded
from parity import Aligned, policy
from torch import Tensor

# Shared memory that a block can have: compute capability 7.5, where the eigenvectors of many tasks do not fit, 8.0, and
# 9.0.
SMALL_SHARED, MIDDLE_SHARED, LARGE_SHARED = 65536, 166912, 232448
ORDERS = ("sequential", "reversed", "shuffled")  # of threads
KERNELS = Path(__file__).with_name("kernels.cpp")


def require_tools() -> None:
    """What is missing to compile the kernels is an error, no reason to skip, but for what pip cannot install."""
    if shutil.which(build.COMPILER) is None:
        raise RuntimeError(f"the emulated CUDA tests need a C++20 compiler: {build.COMPILER} not found")
    if importlib.util.find_spec("pybind11") is None:
        raise RuntimeError("the emulated CUDA tests need pybind11: pip install pybind11")
    if not HEADERS:
        pytest.skip(f"the emulated CUDA tests: {NO_HEADERS}")


def built(mode: str = "plain", defines: Sequence[str] = ()) -> Path:
    """The path of the compiled module."""
    require_tools()
    return build.build(mode, KERNELS, defines)


@functools.cache
def module() -> ModuleType:
    return build.load(built())


def settings(T: int, dtype: torch.dtype, **options) -> dict:
    weights, scale, rtol, zero, rank_rule = policy(T, dtype, **options)
    weights = None if weights is None else weights.to(F64).contiguous()
    address = 0 if weights is None else weights.data_ptr()
    chosen = {"weights": address, "scale": scale, "rank_rule": rank_rule, "rtol": rtol, "zero": zero}
    return {**chosen, "keep": weights}  # alive while the kernels read it


class Device:
    """A device whose float64 is slow or not, with this much shared memory: a backend of tests/parity.py."""

    any_strides = False  # others are copied before a kernel sees them

    def __init__(self, slow: bool = False, limit: int = LARGE_SHARED):
        self.slow, self.limit = slow, limit

    def takes(self, *shape: int) -> bool:
        """An emulated thread takes its time."""
        return math.prod(shape) <= 42_000

    def takes_spectra(self, T: int) -> bool:
        """Beyond, torch's own kernels solve the eigenproblem."""
        needed = 8 * (T * (T | 1) + 13 * T + 32)
        return T <= 128 and needed <= self.limit

    def blocks(self, T: int, dtype: torch.dtype) -> bool:
        """Whether a Gram need not be exact where blocks in float32 will do."""
        return dtype is not F64 and (8 if self.slow else 64) < T

    def grams(self, G: Tensor) -> list[tuple[Tensor, float]]:
        blocks = G.shape[-1] > 0 and self.blocks(G.shape[-2], G.dtype)
        return self._grams(lambda exact: self.gram(G, exact), blocks, G.shape[:-2].numel())

    def grams_of_rows(self, grads: Sequence[Tensor | None], T: int) -> list[tuple[Tensor, float]]:
        kinds = {g.dtype for g in grads if g is not None and g.numel()}
        blocks = bool(kinds) and F64 not in kinds and self.blocks(T, F32)
        return self._grams(lambda exact: self.gram_rows(grads, T, exact), blocks, 1)

    @staticmethod
    def _grams(gram: Callable, blocks: bool, matrices: int) -> list[tuple[Tensor, float]]:
        """The exact one, and where the sums of 128 products are float32's, good to some 3e-7 of the row norms."""
        (exact, none), (M, bounds) = gram(True), gram(False)
        assert not none
        assert len(bounds) == blocks * matrices
        return [(exact, 1e-12), (M, 6e-7 if blocks else 1e-12)]

    def aligned_gram_limit(self, T: int, dtype: torch.dtype) -> float:
        return 6e-7 if self.blocks(T, dtype) else 1e-12

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
        """M, alpha, eigenvalues (as `Info` computes them from M when they are read), rank, launches."""
        buffers, (M, alpha) = zip(*(guarded(shape, F64) for shape in ((B, T, T), (B, T))), strict=True)
        rank = torch.full((B,), -1, dtype=torch.int64)
        addresses = [M.data_ptr(), alpha.data_ptr(), rank.data_ptr()] if wanted else [0] * 3
        module().align(self.session(), x, policy, *addresses)
        for buffer, result in zip(buffers, (M, alpha), strict=True):
            check_guard(buffer, result.numel())
        launches = self.launches()
        lam = self._balance(M, policy, True)[1] if wanted else torch.empty(B, T, dtype=F64)
        return M, alpha, lam, rank, launches

    def align(self, G: Tensor, offset: int = 0, wanted: bool = True, **options) -> Aligned:
        B, T = (G.shape[0] if G.ndim == 3 else 1), G.shape[-2]
        buffer, out = guarded((*G.shape[:-2], G.shape[-1]), G.dtype, offset)
        *results, launches = self._align(self._input(G, out), B, T, settings(T, G.dtype, **options), wanted)
        check_guard(buffer, out.numel(), offset)
        if G.ndim == 2:
            results = [r[0] for r in results]
        return Aligned(out, *results, launches)

    def align_rows(self, grads: Sequence[Tensor | None], T: int, dtype: torch.dtype, **options) -> Aligned:
        """`dtype` is the one that decides on tolerances."""
        buffers, outs = self._outs(grads, T)
        *results, launches = self._align(self._rows(grads, T, outs), 1, T, settings(T, dtype, **options), True)
        for buffer, out in zip(buffers, outs, strict=True):
            check_guard(buffer, out.numel())
        return Aligned(outs, *[r[0] for r in results], launches)

    def _balance(self, M: Tensor, policy: dict, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
        """With eigenvalues, by Jacobi's rotations, or (NaN) without: by a tridiagonal matrix where that is accurate."""
        B, T = M.shape[:2]
        (ab, alpha), (lb, lam) = guarded((B, T), F64), guarded((B, T), F64)
        rank = torch.full((B,), -1, dtype=torch.int64)
        addresses = [alpha.data_ptr(), lam.data_ptr() if wanted else 0, rank.data_ptr()]
        module().balance(self.session(), M.data_ptr(), B, T, policy, *addresses)
        check_guard(ab, alpha.numel())
        check_guard(lb, lam.numel())
        return alpha, lam, rank

    def balance(
        self, M: Tensor, dtype: torch.dtype = F64, wanted: bool = True, **options
    ) -> tuple[Tensor, Tensor, Tensor]:
        T = M.shape[-1]
        results = self._balance(M.contiguous().view(-1, T, T), settings(T, dtype, **options), wanted)
        alpha, lam, rank = results
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

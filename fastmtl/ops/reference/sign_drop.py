"""GradDrop, elementwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastmtl.ops.reference.philox import philox
from fastmtl.ops.reference.rounding import rounded

__all__ = ["sign_drop", "sign_drop_rows"]


def sign_drop(G: Tensor, seed: Tensor, leak: Tensor | None, out: Tensor) -> None:
    """Writes into `out` [P] or [B, P] the sum of one sign's entries in every coordinate of `G` [T, P] or [B, T, P].

        p = Σ_t max(g_t, 0)    q = Σ_t min(g_t, 0)    u: word n % 4 of Philox4x32-10 with key `seed`, counter n // 4
        positive where u·(-q) < (2³² - u)·p, that is with probability p / (p - q)
        out = p + Σ_t leak_t min(g_t, 0)    or    q + Σ_t leak_t max(g_t, 0)

    (Chen et al. 2020, Algorithm 1), n = b·P + column. Summed in float64 over t in order and rounded once. `seed` is one
    int64 number, `leak` float64 [T] or None for zeros. Where an entry is not finite the result is not either.
    """
    index = torch.arange(out.numel(), device=out.device).view(out.shape)
    out.copy_(rounded(_drop(enumerate(G.unbind(-2)), seed, leak, index), out.dtype))


def sign_drop_rows(
    grads: Sequence[Tensor | None], tasks: int, seed: Tensor, leak: Tensor | None, out: Sequence[Tensor]
) -> None:
    """`sign_drop` for K tensors per row (entry t·K + k), with None for zeros.

    n counts the elements of the K tensors one after another: each in the memory order of its first gradient, if that
    fills one stretch of memory.
    """
    K, first = len(out), 0
    for k, target in enumerate(out):
        present = [(t, g) for t, g in enumerate(grads[k::K]) if g is not None]
        like = present[0][1] if present else target
        index = torch.arange(first, first + target.numel(), device=target.device)
        dense = torch.empty_like(like).stride() == like.stride()
        index = index.as_strided(like.shape, like.stride()) if dense else index.view(like.shape)
        target.copy_(rounded(_drop(present, seed, leak, index), target.dtype))
        first += target.numel()


def _drop(rows: Iterable[tuple[int, Tensor]], seed: Tensor, leak: Tensor | None, index: Tensor) -> Tensor:
    """The sums of one sign, float64; `index` is the number of each coordinate's random number."""
    p, q, leaked_p, leaked_q = (torch.zeros(index.shape, dtype=torch.float64, device=index.device) for _ in range(4))
    for t, g in rows:
        above = torch.where(g > 0, g, 0).to(torch.float64)
        below = torch.where(g > 0, 0, g).to(torch.float64)  # NaN too
        p += above
        q += below
        if leak is not None:
            leaked_p += leak[t] * above
            leaked_q += leak[t] * below
    u = _words(seed, index).to(torch.float64)
    return torch.where(u * -q < (2**32 - u) * p, p + 0 * q + leaked_q, q + 0 * p + leaked_p)


def _words(seed: Tensor, index: Tensor) -> Tensor:
    """Random number n in [0, 2³²) for each n in `index`."""
    block = index >> 2
    counter = torch.stack((block & 0xFFFFFFFF, block >> 32, torch.zeros_like(block), torch.zeros_like(block)), -1)
    return philox(seed, counter).gather(-1, (index & 3)[..., None])[..., 0]

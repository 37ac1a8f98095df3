"""Counter-based random numbers, and permutations drawn from them: the same numbers as csrc/math/philox.h."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["permutations", "philox"]

_LOW = 0xFFFFFFFF


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        seed: the key, int64 [] or [1], its two's complement bits.
        counter: [..., 4] int64 words in [0, 2³²).

    Returns:
        [..., 4] int64 words in [0, 2³²), uniform.
    """
    key = seed.reshape(())
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    c0, c1, c2, c3 = counter.unbind(-1)
    for _ in range(10):
        left_high, left_low = _product(0xD2511F53, c0)
        right_high, right_low = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = right_high ^ c1 ^ k0, right_low, left_high ^ c3 ^ k1, left_low
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), -1)


def permutations(seed: Tensor, matrices: int, tasks: int, T: int) -> Tensor:
    """Uniform permutations of T (Fisher–Yates) for tasks 0..`tasks` - 1 of every matrix, int64 [matrices, tasks, T].

    Draw d is word d % 4 of counter (d // 4, task, matrix), brought below n by a multiplication (a bias of n / 2³²).
    """
    index = [torch.arange(n, device=seed.device) for n in (matrices, tasks, (T + 2) // 4)]
    matrix, task, block = torch.meshgrid(*index, indexing="ij")
    words = philox(seed, torch.stack((block, task, matrix & _LOW, matrix >> 32), -1)).flatten(2)
    order = torch.arange(T, device=seed.device).expand(matrices, tasks, T).clone()
    for d in range(T - 1):
        last = T - 1 - d
        chosen = (words[..., d : d + 1] * (last + 1)) >> 32
        kept = order.gather(-1, chosen)
        order.scatter_(-1, chosen, order[..., last:].narrow(-1, 0, 1).clone())
        order[..., last] = kept[..., 0]
    return order


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of two 32-bit words; int64 has a sign, so b goes in halves."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)

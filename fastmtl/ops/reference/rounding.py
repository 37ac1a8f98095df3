"""From float64 to the gradients' dtype with one rounding."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rounded"]

# Significant bits of the types that torch rounds to through float32, and so twice.
BITS = {torch.bfloat16: 8, torch.float16: 11}


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (float64) rounded to the nearest number of `dtype`, ties to even.

    For the 16-bit types, all but two more bits than they have are cut off, and the last bit is set if anything was cut:
    rounded to odd, which no later rounding can tell from the number itself (Boldo and Melquiond 2008). So few bits are
    exact in float32 on the way.
    """
    if dtype in BITS:
        below = (1 << (51 - BITS[dtype])) - 1
        bits = x.view(torch.int64)
        x = ((bits | ((bits & below) + below)) & ~below).view(torch.float64)
    return x.to(dtype)

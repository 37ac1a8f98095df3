"""Pure PyTorch reference of every op: readable, device-independent, and the specification the kernels are held to.

These functions run in float64 wherever no kernel is built (see `fastmtl.ops`). They follow the same accuracy policy as
the kernels and draw the same random numbers.
"""

from fastmtl.ops.reference.align import (
    align,
    align_gram,
    align_rows,
    balance,
    balance_many,
    combine,
    combine_rows,
    eigh,
    gram,
    gram_rows,
    second_pass,
)
from fastmtl.ops.reference.closed import constant, unit_solve
from fastmtl.ops.reference.conflicts import gradvac, pcgrad
from fastmtl.ops.reference.nash import nash
from fastmtl.ops.reference.qp import cagrad, dual_cone, mgda
from fastmtl.ops.reference.sign_drop import sign_drop, sign_drop_rows

__all__ = [
    "align",
    "align_gram",
    "align_rows",
    "balance",
    "balance_many",
    "cagrad",
    "combine",
    "combine_rows",
    "constant",
    "dual_cone",
    "eigh",
    "gradvac",
    "gram",
    "gram_rows",
    "mgda",
    "nash",
    "pcgrad",
    "second_pass",
    "sign_drop",
    "sign_drop_rows",
    "unit_solve",
]

#!/usr/bin/env python3
"""What float32 blocks and the probe of their errors cost, beside exact products.

    python benchmarks/blocks.py [--seconds 10] [--threads 2] [--json PATH]

A step beside the same step made of two ops, the exact Gram matrix and the recombination (the weights take a small
part of it). For gradients whose float32 Gram is believed (random), and for those where the probe refuses it, so that an
exact pass follows (a Hadamard pattern, whose sums all round the same way).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor

import fastmtl
from fastmtl import ops
from fastmtl.scaling.timing import interleave

__all__ = ["SHAPES", "main", "timed"]

SHAPES = ((48, 600_000), (64, 500_000), (96, 400_000), (128, 300_000), (192, 200_000), (300, 200_000))
ROUNDS = 5, 200  # of interleaved timing: at least, at most


def random(T: int, P: int) -> Tensor:
    """Rows without structure [T, P]."""
    return torch.randn(T, P, generator=torch.Generator().manual_seed(0))


def hadamard(T: int, P: int) -> Tensor:
    """1.1 + 0.3 · rows of a Hadamard matrix, every column in a run [T, P]."""
    H = torch.ones(1, 1)
    while H.shape[0] <= T:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return 1.1 + 0.3 * H[1 : T + 1].repeat_interleave(-(-P // H.shape[1]), 1)[:, :P].contiguous()


def timed(make: Callable[[int, int], Tensor], T: int, P: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of each part for one matrix, from interleaved medians."""
    G = make(T, P)
    method = fastmtl.AlignedMTL()
    alpha, out = torch.full((T,), 1 / T, dtype=torch.float64), torch.empty(P)
    parts: dict[str, Callable[[], object]] = {
        "read": lambda: G.sum(),
        "step": lambda: method(G),
        "exact gram": lambda: ops.gram(G),
        "combine": lambda: ops.combine(G, alpha, out),
    }
    once = interleave(parts, 1)
    rounds = int(min(max(seconds / sum(once.seconds.values()), ROUNDS[0]), ROUNDS[1]))
    timing = interleave(parts, rounds)
    ms = {name: 1e3 * s for name, s in timing.seconds.items()}
    ratio = ms["step"] / (ms["exact gram"] + ms["combine"])
    print(
        f"{make.__name__:10} {T:4} x {P:7}  exact Gram {ms['exact gram']:7.1f} ms, combine {ms['combine']:6.1f} ms, "
        f"step {ms['step']:7.1f} ms: {ratio:.2f} x",
        flush=True,
    )
    return {"pattern": make.__name__, "T": T, "P": P, "ms": ms, "ratio": ratio, "others": timing.others}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it where that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="timing of a case, about (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write results, hardware and commit there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    measure.keep_memory()
    machine = measure.machine()
    cases = [timed(make, T, P, args.seconds) for make in (random, hadamard) for T, P in SHAPES]
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, "blocks": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

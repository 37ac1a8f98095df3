"""A study, not a kernel: Gram matrices of float32 gradients from exact products of integers on a consumer card.

    python benchmarks/exact_split.py     # prints both tables, as Markdown; needs no GPU

Where float64 has a 64th of float32's rate, `gram_tiles` multiplies in float32, `gram_probe` reads G once more to
measure what that costs, and an exact pass in float64 follows where it costs too much. Instead (Ozaki et al. 2012)
entries could be cut into digits of 7 bits, with one exponent for a row's stretch of columns; the int8 tensor cores have
their products and sums exactly, in int32. Of d digits, d (d + 1) / 2 products count. TF32 and bfloat16 have exact
products too, but round their sums to float32: no better than the blocks there are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from cuda_model import DEVICES, LAUNCH, SWEEPS, Case, Kernel, align
from torch import Tensor

from fastmtl.scaling.digits import per_example

__all__ = ["digits", "model", "split_gram", "table"]

CARD = DEVICES[-1]
INT8 = 330.3e12  # multiply-adds a second of an RTX 4090's tensor cores, dense, as the vendor states
BITS = 7  # of a digit: from -64 to 64
STRETCH = 2048  # columns with one exponent a row; their sums are below 2^23
DIGITS = 6  # whose error leaves 2e-6 of a result where λ_min(C) is 1e-5: see the table of errors
TRUTH = 12  # digits that hold every bit of these rows
SPLITTING = 3  # operations a digit: scale, round, subtract
TRIDIAGONAL = 0.05  # of Jacobi's work in float64, what an eigenproblem through a tridiagonal matrix takes
ROWS = {10: 16, 32: 32, 64: 64}  # of tasks, as the kernels take them


def digits(G: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` digits of every entry [count, T, P], integers in float64, and the exponents [T, stretches]."""
    T, P = G.shape
    padded = torch.nn.functional.pad(G.double(), (0, -P % STRETCH)).view(T, -1, STRETCH)
    exponents = torch.frexp(padded.abs().amax(-1)).exponent + 1  # entries over 2^exponent are at most a half
    rest = torch.ldexp(padded, -exponents[..., None])
    found = []
    for _ in range(count):
        rest = rest * 2.0**BITS
        found.append(rest.round())
        rest = rest - found[-1]
    return torch.stack(found), exponents


def split_gram(G: Tensor, count: int) -> Tensor:
    """M [T, T] of the products that count, each exact, added in float64."""
    parts, exponents = digits(G, count)
    M = G.new_zeros(len(G), len(G), dtype=torch.float64)
    for k in range(exponents.shape[1]):
        scale = torch.ldexp(torch.ones_like(M[0]), exponents[:, k])
        for level in range(count):
            x = sum(parts[i, :, k] @ parts[level - i, :, k].T for i in range(level + 1))
            M += x * scale[:, None] * scale * 2.0 ** (-BITS * (level + 2))
    return M


def blocks(G: Tensor) -> Tensor:
    """What there is: float32 sums of 64 columns, added with 48 bits."""
    T, P = G.shape
    padded = torch.nn.functional.pad(G, (0, -P % 64)).view(T, -1, 64).transpose(0, 1)
    return (padded @ padded.mT).double().sum(0)


def model() -> Iterable[tuple[int, float, float, float]]:
    """T, and microseconds of a step on 1e6 columns: today, today where the exact pass is needed, and by digits.

    Eigenproblems count as a tridiagonal path's in all three.
    """
    for T, rows in ROWS.items():
        case = Case(T, 1_000_000)
        kernels = align(case, CARD)
        weights = Kernel("weights", 1, fma64=TRIDIAGONAL * 4.0 * SWEEPS * T**3).seconds(CARD)
        others = [k for k in kernels if k.name != "balance"]
        today = sum(k.seconds(CARD) for k in others) + weights
        groups = rows // 8
        exact = Kernel("gram_groups", 512, case.entries, mma64=(groups + 1) // 2 * (groups // 2 + 1) * 128 * case.P)
        products = (groups + 1) // 2 * (groups // 2 + 1) * 128 * DIGITS * (DIGITS + 1) / 2 * case.P
        splitting = 2 * SPLITTING * DIGITS * rows * case.P / CARD.float32
        sums = Kernel("sums", 512, fma64=rows * (rows + 1) / 2 * DIGITS * case.P / STRETCH).seconds(CARD) - LAUNCH
        gram = max(case.entries / CARD.bandwidth, products / INT8) + splitting + sums + LAUNCH
        rest = [k for k in others if k.name in ("gram_reduce", "combine") and k.bytes]
        split = gram + sum(k.seconds(CARD) for k in rest) + weights
        yield T, 1e6 * today, 1e6 * (today + exact.seconds(CARD) + weights), 1e6 * split


def table() -> str:
    """The model, as it stands in the documentation."""
    text = "| T×P | today, µs | with the exact pass, µs | by digits, µs | × | × |\n" + "|---" * 6 + "|\n"
    for T, today, again, split in model():
        text += f"| {T}×1e6 | {today:.0f} | {again:.0f} | {split:.0f} | {today / split:.1f} | {again / split:.1f} |\n"
    return text


def _rows(T: int, P: int) -> Iterable[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(T, P, generator=generator)
    yield "random", noise
    yield "examples of a network in training", per_example(T, P).float()
    yield "entries over 12 orders of magnitude", noise * 10 ** (12 * torch.rand(T, P, generator=generator) - 6)
    yield "nearly parallel", noise[:1] + 1e-4 * noise


def _error(M: Tensor, exact: Tensor) -> float:
    """The largest entry of D^-1/2 (M - G Gᵀ) D^-1/2."""
    norms = exact.diagonal().sqrt()
    return float(((M - exact) / norms / norms[:, None]).abs().max())


def main() -> None:
    """Prints both tables."""
    counts = (3, 4, 5, 6)
    names = ["float32 blocks", *(f"{n} digits" for n in counts), "float64"]
    text = table() + f"\n| rows 10×40000 | {' | '.join(names)} |\n" + "|---" * (1 + len(names)) + "|\n"
    for name, G in _rows(10, 40_000):
        exact = split_gram(G, TRUTH)
        found = [blocks(G), *(split_gram(G, n) for n in counts), G.double() @ G.double().T]
        text += f"| {name} | {' | '.join(f'{_error(M, exact):.1e}' for M in found)} |\n"
    sys.stdout.write(text)


if __name__ == "__main__":
    main()

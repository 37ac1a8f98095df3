"""A model: what bytes, operations and launches alone would take on three GPUs. And what was measured, beside it.

    python benchmarks/cuda_model.py     # prints the tables, as Markdown; needs no GPU

tools/docs_numbers.py (make docs-numbers) puts them into docs/performance.md. What was measured is read from
benchmarks/results, where pytest benchmarks/test_cuda.py has left it.

Every kernel of csrc/cuda is counted as it is launched for well-conditioned gradients: bytes from and to memory,
multiply-adds (those on zero rows included: tiles are padded), and launches. A kernel takes the longer of bytes /
bandwidth and multiply-adds / rate, `LAUNCH` for each launch, and where one block solves a matrix the `cycles` of its
chain of dependent operations, as estimated from the source by `LATENCY`. A kernel of fewer blocks than the GPU has
multiprocessors has that share of the rate.

More tasks than one block can solve are weighed by torch's own kernels: their launches and products are counted by
calling the ops without numbers.

Left out, hence a lower bound: other latency (many tasks' `steps` depend on each other), conversions to float64, shared
memory, occupancy, blocks that end late, and the host. Caches are left out as well: that makes a
matrix that fits the second-level cache, and partial sums, look slower than they are.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import workloads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastmtl.ops import reference

__all__ = [
    "CASES",
    "CONSTANTS",
    "DEVICES",
    "THRESHOLDS",
    "Case",
    "Device",
    "Kernel",
    "align",
    "grouped",
    "latencies",
    "measured",
    "modelled",
    "plain",
    "table_of",
    "tables",
]

RESULTS = Path(__file__).parent / "results" / "h100-sxm" / "cuda.json"

# The numbers that csrc/cuda decides by, each with its own name there: tests/cuda/test_cuda_model.py compares them.
CONSTANTS = {
    "kTileColumns": 512,  # source.cuh
    "kFewWords": 440,
    "kManyWords": 4080,
    "kGroupRows": 64,  # gram.cuh
    "kMaxJacobiTasks": 128,  # eigh.cuh
    "kNodes": 32,  # tridiagonal.cuh
    "kMaxEigenShifts": 256,
    "kMaxSmallTasks": 32,  # align_small.cuh
    "kCombineThreads": 256,  # combine.cuh
    "kReduceValues": 32,  # gram_reduce.cu
    "kReduceThreads": 1024,
    "kProbes": 4,  # probe.cuh
    "kSmallEntries": 1 << 15,  # pipeline.cu
    "kSmallEntriesInBatch": 1 << 20,
    "kManyMatrices": 64,
    "kPartialBytes": 32 << 20,
    "slow float64, tasks in float64": 8,  # plan_of
    "slow float64, least ratio": 4,  # ops/cuda_call.h
    "blocks, stream": 256,  # blocks_of
    "blocks, tiles": 512,
    "blocks, at most": 1024,
    "tiles of a block": 4,
}
# The same of thresholds.h, and of tridiagonal.cuh.
THRESHOLDS = {"kLeastEigenvalue": 1e-8, "kSmallestWidth": 1e-13, "kNodesPerLog": 1.5}
SWEEPS = 8  # of a Jacobi eigenproblem, 6 to 9
# Seconds of a step of Jacobi's rotations up to so many tasks, on an H100: what a second eigenproblem (κ=1e3) has added
# to 10 and 32 tasks, and what was left at 64 beside Gram, reduction and recombination. At 128 as many threads have four
# times the entries: a guess.
JACOBI_STEP = {16: 0.72e-6, 32: 1.26e-6, 64: 1.38e-6, 128: 4 * 1.38e-6}
# Cycles of what the weights of one matrix wait for (csrc/cuda/tridiagonal.cuh), from the latencies of the parts: 8 a
# multiply-add, 33 a shuffle and the sum behind it, 30 a load from shared memory, 35 a barrier, 50 a division or root.
LATENCY = {
    "reflection": 600,  # a norm of five shuffles, a root, a division; products, an update, and two barriers
    "entry beyond": 9 / 64,  # of more than 64 rows: products and the update at 64 operations a cycle
    "back": 200,  # two products, five shuffles, an update
    "minor": 18,  # of a Sturm sequence: a multiply-add and its share of the rescaling
    "round": 80,  # of multisection: the shift, and a barrier that counts
    "node": 1600,  # of the partial fractions: means, trigonometric functions, and the sum in the end
    "pivot": 91,  # a division and two multiply-adds on the way there, and two back
    "entry": 30,  # of the diagonal, read one by one, twice
    "pivot of L": 500,  # five shuffles of two numbers, a division, an update, and two barriers
    "entry of L": 1 / 4,  # three reads and a write of 8 bytes, of the 128 that shared memory moves in a cycle
    "product": 1 / 8,  # of Lᵀ L: two reads
    "entry of x": 90,  # of L⁻ᵀ z: a shuffle, a multiply-add, and a read
    "begin": 2000,  # M is read twice from the second-level cache, and instructions once
}
LAUNCH = 2.5e-6  # seconds
PROBE_WORK = 20  # operations of gram_probe for an entry and probe: two sums of two numbers each, and three products
PLAIN_WEIGHTS = 6  # launches of baseline.task_weights beside its eigh


@dataclass(frozen=True)
class Device:
    """What the vendor states: bytes a second, operations a second (two a multiply-add)."""

    name: str
    bandwidth: float
    float32: float
    float64: float
    matrix64: float  # float64 in the tensor cores, where it is faster there
    processors: int
    clock: float = 1.7e9  # cycles a second
    shared: int = 232_448  # bytes that a block can have

    @property
    def slow_float64(self) -> bool:
        """`Context::slow_float64`."""
        return self.float32 / self.float64 > CONSTANTS["slow float64, least ratio"]


DEVICES = (
    Device("H100 SXM", 3.35e12, 66.9e12, 33.5e12, 66.9e12, 132, 1.755e9),
    Device("A100 80 GB SXM", 2.04e12, 19.5e12, 9.7e12, 19.5e12, 108, 1.41e9, 166_912),
    Device("RTX 4090", 1.008e12, 82.6e12, 1.29e12, 1.29e12, 128, 2.52e9, 101_376),
)


@dataclass(frozen=True)
class Kernel:
    """One kind of launch in a step.

    Attributes:
        name: of the kernel, with what tells its instances apart.
        blocks: that work at once, at most.
        bytes: moved from and to memory.
        fma32: multiply-adds in float32.
        fma64: multiply-adds in float64.
        mma64: multiply-adds of float64 matrix products.
        steps: that follow each other.
        cycles: that these take; none where they are in no time.
        launches: of this kernel.
    """

    name: str
    blocks: int
    bytes: float = 0
    fma32: float = 0
    fma64: float = 0
    mma64: float = 0
    steps: int = 0
    cycles: float = 0
    launches: int = 1

    def seconds(self, device: Device) -> float:
        """The roofline, and what one thing after the other takes."""
        share = min(1.0, self.blocks / device.processors)
        work = self.fma32 / device.float32 + self.fma64 / device.float64 + self.mma64 / device.matrix64
        operations = 2 * work / share
        return max(self.bytes / device.bandwidth, operations) + self.launches * LAUNCH + self.cycles / device.clock


@dataclass(frozen=True)
class Case:
    """B matrices [T, P], or one of tensors of `sizes`."""

    T: int
    P: int
    dtype: torch.dtype = torch.float32
    B: int = 1
    sizes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """How the tables call it."""
        if self.sizes:
            return f"{self.T}×{self.P / 1e6:.1f}e6 in {len(self.sizes)} tensors"
        batch = f"{self.B}×" if self.B > 1 else ""
        columns = f"{self.P:.0e}".replace("e+0", "e") if self.P >= 100_000 else str(self.P)
        return f"{batch}{self.T}×{columns}" + ("" if self.dtype is torch.float32 else f" {str(self.dtype)[6:]}")

    @property
    def tiles(self) -> int:
        """Tiles of a matrix: the columns of every tensor are cut on their own."""
        return sum(_up(n, CONSTANTS["kTileColumns"]) for n in self.sizes or (self.P,))

    @property
    def entries(self) -> int:
        """Bytes of all rows."""
        return self.B * self.T * self.P * self.dtype.itemsize


CASES = (
    Case(2, 1_000_000),
    Case(10, 1_000_000),
    Case(10, 10_000_000),
    Case(10, 1_000_000, torch.bfloat16),
    Case(32, 1_000_000),
    Case(33, 1_000_000),
    Case(64, 1_000_000),
    Case(128, 100_000),
    Case(256, 100_000),
    Case(1024, 100_000),
    Case(8, 2048, B=512),
    Case(8, 25_557_032, sizes=tuple(torch.Size(shape).numel() for shape in workloads.resnet50())),
)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


@dataclass(frozen=True)
class Plan:
    """`GramPlan`."""

    rows: int
    blocks: bool
    groups: int

    @property
    def pairs(self) -> int:
        """Blocks of M above its diagonal."""
        return _triangle(self.groups - 1)

    @property
    def values(self) -> int:
        """`Layout::values`: the sums that a block leaves."""
        return _triangle(self.rows // 4) * 16 if self.blocks else _triangle(self.rows)

    @property
    def work(self) -> int:
        """Multiply-adds a column."""
        return self.values if self.blocks or self.rows <= 8 else _groups(self.rows)


def _groups(rows: int) -> int:
    """`Groups`: tiles of 16 x 8 entries, those on and above the diagonal."""
    groups = rows // 8
    return (groups + 1) // 2 * (groups // 2 + 1) * 16 * 8


PAIR_VALUES = (CONSTANTS["kGroupRows"] // 4) ** 2 * 16


def _plan(case: Case, exact: bool, device: Device) -> Plan:
    T = case.T
    most = CONSTANTS["slow float64, tasks in float64" if device.slow_float64 else "kGroupRows"]
    blocks = not exact and case.dtype is not torch.float64 and most < T
    wide = [rows for rows in (2, 4, 8) if rows >= T and not blocks]
    tiled = [rows for rows in ((16, 32) if blocks else (16, 24, 32, 40, 48)) if rows >= T]
    return Plan(next(iter([*wide, *tiled, 64])), blocks, _up(T, CONSTANTS["kGroupRows"]))


def _gram(case: Case, plan: Plan, again: bool) -> Iterable[Kernel]:
    """The partial sums and their reduction; where `again`, the launches of a second pass that finds nothing to do."""
    slot, pair_slot = plan.values + 1, PAIR_VALUES + 1
    partial = case.B * 8 * (plan.groups * slot + plan.pairs * pair_slot)
    enough = CONSTANTS["blocks, stream" if plan.rows <= 8 else "blocks, tiles"]
    wanted = enough
    if plan.rows <= 16:
        wanted = min(max(case.tiles // CONSTANTS["tiles of a block"], enough), CONSTANTS["blocks, at most"])
    blocks = max(1, min(case.tiles, wanted // case.B, CONSTANTS["kPartialBytes"] // partial))
    name = "tiles<float, " if plan.blocks else "stream<" if plan.rows <= 8 else "groups<"
    parts = [(f"gram_{name}{plan.rows}>", plan.groups, plan.work, slot, case.entries)]
    if plan.pairs:  # each reads two groups of rows
        name = f"gram_tiles<{'float' if plan.blocks else 'double'}, 128>"
        parts.append((name, plan.pairs, PAIR_VALUES, pair_slot, case.entries * (plan.groups - 1)))
    if again:
        yield from (Kernel(name, 1) for name, *_ in parts)
        yield from (Kernel("gram_reduce", 1) for _ in parts)
        return
    for name, groups, each, part_slot, read in parts:
        work = float(case.B) * groups * each * case.P
        moved = read + case.B * groups * blocks * part_slot * 8
        fma32, mma64 = work * plan.blocks, work * ("groups" in name)
        fma64 = work - fma32 - mma64
        yield Kernel(name, case.B * blocks * groups, moved, fma32, fma64, mma64)
    for _, groups, _, part_slot, _ in parts:
        sums = case.B * groups * blocks * part_slot
        columns = _up(part_slot, CONSTANTS["kReduceValues"])
        yield Kernel("gram_reduce", case.B * columns * groups, 8 * (sums + case.B * case.T**2))
    if plan.blocks:  # the tiles are read twice, the second time from a cache
        T, probes = case.T, CONSTANTS["kProbes"]
        slots = case.B * T * probes
        yield Kernel("probe_vectors", _up(slots, CONSTANTS["kReduceThreads"]), 4 * slots)
        work = float(slots) * case.P * PROBE_WORK / 2
        yield Kernel("gram_probe", case.B * blocks, case.entries + 8 * slots * blocks, fma32=work)
        yield Kernel("probe_bound", case.B, 8 * slots * (blocks + T), fma64=slots * T)


def _jacobi(T: int) -> int:
    """Steps of a solution by rotations."""
    return SWEEPS * (T + T % 2 - 1)


def _threads(T: int) -> int:
    """`jacobi_threads`."""
    return 64 if T <= 16 else 256 if T <= 32 else 512


def _rounds(threads: int) -> int:
    """`eigenvalue`: of multisection, by factors first."""
    shifts = min(threads, CONSTANTS["kMaxEigenShifts"])
    width = 1 - THRESHOLDS["kLeastEigenvalue"] ** (1 / shifts)
    return 1 + math.ceil(math.log(width / THRESHOLDS["kSmallestWidth"]) / math.log(shifts + 1))


def _weights(T: int, threads: int) -> tuple[float, int, dict[str, float]]:
    """Multiply-adds, steps, and cycles by part of the weights of a matrix of full rank; of Jacobi below T = 3."""
    if T < 3:
        return 4.0 * SWEEPS * T**3, _jacobi(T), {"jacobi": _jacobi(T) * 1000.0}
    rounds, nodes = _rounds(threads), CONSTANTS["kNodes"]
    beyond = sum(max(0, rows**2 - CONSTANTS["kGroupRows"] ** 2) for rows in range(2, T))
    cycles = {
        "reduction": (T - 2) * LATENCY["reflection"] + beyond * LATENCY["entry beyond"],
        "λ_min": rounds * (T * LATENCY["minor"] + LATENCY["round"]),
        "inverse root": LATENCY["node"] + T * LATENCY["pivot"],
        "back": (T - 2) * LATENCY["back"],
        "rest": LATENCY["begin"] + T * LATENCY["entry"],
    }
    # An entry of the reduction: a product, the same two vectors' entries again, and an update of two.
    work = 2.0 * T**3 + 3.0 * rounds * T * min(threads, CONSTANTS["kMaxEigenShifts"]) + 20.0 * T * nodes
    return work, 2 * (T - 2) + rounds + 2 * T, {part: float(n) for part, n in cycles.items()}


def _uneven(T: int, threads: int) -> float:
    """Cycles of the weights of a matrix of full rank whose rows are uneven (csrc/cuda/uneven.cuh), κ(M) about 1e20."""
    if T < 3:
        return _weights(T, threads)[2]["jacobi"]
    cycles = _weights(T, threads)[2]
    factor = T * LATENCY["pivot of L"] + T**3 / 3 * LATENCY["entry of L"] + T**3 / 6 * LATENCY["product"]
    twice = cycles["reduction"] + cycles["λ_min"]  # of C and of Lᵀ L
    turns = int(THRESHOLDS["kNodesPerLog"] * math.log(16e20) / CONSTANTS["kNodes"]) + 1
    once = cycles["back"] + T * LATENCY["entry of x"] + cycles["rest"]
    return 2 * twice + factor + turns * cycles["inverse root"] + once


def _balance(case: Case) -> Kernel:
    work, steps, cycles = _weights(case.T, _threads(case.T))
    moved = case.B * (case.T**2 + case.T + 1) * 8
    return Kernel("balance", case.B, moved, fma64=case.B * work, steps=steps, cycles=sum(cycles.values()))


def _combine(case: Case) -> Kernel:
    run = CONSTANTS["kCombineThreads"] * (16 // case.dtype.itemsize) // CONSTANTS["kTileColumns"]
    moved = case.entries + case.entries // case.T
    work = float(case.B) * case.T * case.P
    return Kernel("combine", case.B * _up(case.tiles, max(run, 1)), moved, fma64=work)


def _one_block(tasks: int, device: Device) -> bool:
    """`in_one_block`."""
    doubles = tasks * (tasks | 1) + 13 * tasks + 32
    return tasks <= CONSTANTS["kMaxJacobiTasks"] and 8 * doubles <= device.shared


def _small(matrices: int, tasks: int, columns: int) -> bool:
    """`is_small`."""
    many = matrices >= CONSTANTS["kManyMatrices"]
    entries = CONSTANTS["kSmallEntriesInBatch" if many else "kSmallEntries"]
    return tasks <= CONSTANTS["kMaxSmallTasks"] and max(tasks, 8) * columns <= entries


def align(case: Case, device: Device) -> list[Kernel]:
    """The launches of a step on well-conditioned gradients, in order."""
    kernels: list[Kernel] = []
    if case.sizes:
        words = len(case.sizes) * (5 + case.T)
        kernels.append(Kernel("upload", 4, 2 * words * 8, launches=_up(words, CONSTANTS["kManyWords"])))
    if _small(case.B, case.T, case.P):
        rows = 8 if case.T <= 8 else 16 if case.T <= 16 else 32
        work, steps, parts = _weights(case.T, 128 if rows == 8 else 256)
        cycles = sum(parts.values())
        moved = case.entries + case.entries // case.T
        stream, products = (_triangle(8), 0.0) if rows == 8 else (0, float(_groups(rows) * case.P))
        each = (stream + case.T) * case.P + work
        name = f"align_small<{rows}>"
        work64, mma64 = case.B * each, case.B * products
        return [*kernels, Kernel(name, case.B, moved, fma64=work64, mma64=mma64, steps=steps, cycles=cycles)]
    first = _plan(case, False, device)
    kernels += _gram(case, first, False)
    judged = first.blocks or case.dtype is torch.float64
    if not _one_block(case.T, device):
        if judged:
            kernels.append(_products("second_pass", case.B, case.T, True))
            kernels += _gram(case, _plan(case, True, device), True)
        policy = (None, "min", 1e-3, 1e-7, "normalized")
        return [*kernels, _products("balance_many", case.B, case.T, *policy), _combine(case)]
    kernels.append(_balance(case))
    if judged:
        kernels += _gram(case, _plan(case, True, device), True)
        kernels.append(Kernel("balance", 1))
    return [*kernels, _combine(case)]


class _Calls(TorchDispatchMode):
    """Counts the calls of torch's ops that compute something, and the columns of Cholesky factors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.columns = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not view and "empty" not in func._schema.name
        if "cholesky" in func._schema.name:
            self.columns += args[0].shape[-1]
        return func(*args, **(kwargs or {}))


@cache
def _products(op: str, B: int, T: int, *rest: Any) -> Kernel:
    """An op that torch's own kernels do, a launch a call at least. M is read, the rest stays in a cache."""
    M = torch.empty(B, T, T, dtype=torch.float64, device="meta")
    bound = (M.new_empty(B),) if op == "second_pass" else ()
    with FlopCounterMode(display=False) as flops, _Calls() as calls:
        getattr(reference, op)(M, *bound, *rest)
    work = flops.get_total_flops() / 2
    tiles = 2 * B * _up(T, CONSTANTS["kGroupRows"]) ** 2
    return Kernel(op, tiles, 8 * B * T * T, mma64=work, steps=calls.columns, launches=calls.count)


def plain(case: Case) -> list[Kernel] | None:
    """`G @ G.T`, torch.linalg.eigh without its time, torch.mv; None where eigh does not take the dtype."""
    if case.dtype is not torch.float32:
        return None
    T, P, B = case.T, case.P, case.B
    many = 1 << 10
    kernels = []
    if case.sizes:  # concatenated first, a launch for each task
        kernels.append(Kernel("cat", many, 2 * case.entries, launches=T))
    kernels.append(Kernel("G @ G.T", many, case.entries + B * T * T * 4, fma32=float(B) * T * T * P))
    kernels.append(Kernel("weights without eigh", many, launches=PLAIN_WEIGHTS))
    kernels.append(Kernel("mv", many, case.entries + case.entries // T, fma32=float(B) * T * P))
    return kernels


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def _number(x: float) -> str:
    """Three digits, plainly written."""
    if x == 0:
        return "0"
    digits = max(0, 2 - len(str(int(x))) + 1) if x >= 1 else 2
    return f"{x:.{digits}f}"


def _microseconds(kernels: Sequence[Kernel], device: Device) -> str:
    return _number(1e6 * sum(kernel.seconds(device) for kernel in kernels))


def _merged(kernels: Sequence[Kernel]) -> dict[str, list[Kernel]]:
    """Kernels by what a row shows: those that do nothing make one row."""
    merged: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        idle = not (kernel.bytes or kernel.fma32 or kernel.fma64 or kernel.mma64)
        merged.setdefault("second pass, not needed" if idle else kernel.name, []).append(kernel)
    return merged


def _totals() -> str:
    names = [device.name for device in DEVICES]
    text = _row(["T×P", "launches", *names, *(f"plain: {name}" for name in names)])
    text += "|---" * (2 + 2 * len(names)) + "|\n"
    for case in CASES:
        ours = [align(case, device) for device in DEVICES]
        theirs = plain(case)
        launches = sorted({sum(kernel.launches for kernel in kernels) for kernels in ours})
        base = ["" if theirs is None else _microseconds(theirs, device) for device in DEVICES]
        times = [_microseconds(kernels, device) for kernels, device in zip(ours, DEVICES, strict=True)]
        text += _row([case.name, " or ".join(map(str, launches)), *times, *base])
    return text


def _place(name: str) -> int:
    """Where a row of the second table stands among those of its case."""
    order = (
        "upload",
        "align",
        "gram_stream",
        "gram_groups",
        "gram_tiles",
        "gram_probe",
        "gram_reduce",
        "probe_",
        "second_pass",
        "balance",
        "second",
        "combine",
    )
    return next(i for i, start in enumerate(order) if name.startswith(start))


def _kernels() -> str:
    names = [device.name for device in DEVICES]
    text = _row(
        ["T×P", "kernel", "launches", "MB", "10⁶ FMA32", "10⁶ FMA64", "10⁶ MMA64", "steps", "10³ cycles", *names]
    )
    text += "|---" * (9 + len(names)) + "|\n"
    for case in CASES:
        runs = [_merged(align(case, device)) for device in DEVICES]
        # Devices may take different kernels: a row for each, in the order of the launches.
        order = sorted({name: None for run in runs for name in run}, key=_place)
        first = True
        for name in order:
            seen: list[list[Kernel]] = []
            for run in runs:
                if name in run and run[name] not in seen:
                    seen.append(run[name])
            for kernels in seen:
                kernel_name = name if name.startswith("second pass") else f"`{name}`"
                cells: list[object] = [case.name if first else "", kernel_name]
                first = False
                cells.append(sum(kernel.launches for kernel in kernels))
                cells.append(_number(sum(kernel.bytes for kernel in kernels) / 1e6))
                cells.append(_number(sum(kernel.fma32 for kernel in kernels) / 1e6))
                cells.append(_number(sum(kernel.fma64 for kernel in kernels) / 1e6))
                cells.append(_number(sum(kernel.mma64 for kernel in kernels) / 1e6))
                cells.append(max(kernel.steps for kernel in kernels) or "")
                cycles = max(kernel.cycles for kernel in kernels)
                cells.append(f"{cycles / 1e3:.1f}" if cycles else "")
                for run, device in zip(runs, DEVICES, strict=True):
                    cells.append(_microseconds(kernels, device) if run.get(name) == kernels else "")
                text += _row(cells)
    return text


def tables() -> str:
    """Both tables, as they stand in the documentation."""
    return (
        "Modelled microseconds of a step: fastmtl, then plain PyTorch without its `eigh`, which is not modelled.\n\n"
        f"{_totals()}\nThe kernels behind fastmtl's columns, modelled microseconds on the right:\n\n{_kernels()}"
    )


def latencies() -> str:
    """The table of what the weights of one matrix wait for on the first device, by Jacobi's rotations and now."""
    clock = DEVICES[0].clock
    parts = list(_weights(3, 64)[2])
    head = ["T", "Jacobi: steps", "µs", "now: steps", "µs", "uneven rows, µs"]
    text = _row([*head, *(f"{part}, 10³ cycles" for part in parts)])
    text += "|---" * (len(head) + len(parts)) + "|\n"
    for T in (3, 8, 10, 16, 32, 64, 128):
        _, steps, cycles = _weights(T, _threads(T))
        before = _jacobi(T) * next(step for most, step in JACOBI_STEP.items() if most >= T)
        totals = [sum(cycles.values()), _uneven(T, _threads(T))]
        cells = [T, _jacobi(T), _number(1e6 * before), steps, *(_number(1e6 * n / clock) for n in totals)]
        text += _row([*cells, *(f"{n / 1e3:.1f}" for n in cycles.values())])
    return text


def grouped(results: dict[str, Any]) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """What benchmarks/test_cuda.py measured: group -> (whose, eager or graph) -> `extra_info`."""
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for benchmark in results.get("benchmarks", []):
        params = benchmark["params"] or {}
        if "GB/s" in benchmark["extra_info"]:  # a time of the device
            way = params.get("name", "fastmtl"), params.get("way", "eager")
            found.setdefault(benchmark["group"], {})[way] = benchmark["extra_info"]
    return found


def modelled(case: Case, card: str) -> str:
    """The model of a step on this card, in microseconds; empty where its rates are not known."""
    device = next((device for device in DEVICES if device.name.split()[0] in card), None)
    return _microseconds(align(case, device), device) if device else ""


def table_of(found: dict[str, dict[tuple[str, str], dict[str, Any]]], card: str) -> str:
    """Steps in microseconds, and as multiples of what they are compared with; the memory's rates first."""
    roof, text = found.get("cuda roof", {}), ""
    copy = roof["copy", "eager"]["GB/s"] if ("copy", "eager") in roof else None
    if copy and ("sum", "eager") in roof:
        read = roof["sum", "eager"]["GB/s"]
        text = f"A copy moves {copy / 1e3:.2f} TB/s (read and written), `sum` reads {read / 1e3:.2f} TB/s.\n\n"
    text += (
        _row(["case", "µs", "called eagerly", "plain PyTorch", "× plain", "× the reads", "model"]) + "|---" * 7 + "|\n"
    )
    models = {_group(case): case for case in CASES}
    for group, ways in found.items():
        graph, eager, plain = (ways.get(w) for w in (("fastmtl", "graph"), ("fastmtl", "eager"), ("pure", "eager")))
        if eager is None:
            continue
        best = graph or eager
        cells = [f"{x['microseconds']:.1f}" if x else "" for x in (graph, eager, plain)]
        cells.append(f"{plain['microseconds'] / eager['microseconds']:.1f}" if plain else "")
        cells.append(f"{copy / best['GB/s']:.2f}" if copy and "eigh" not in group else "")
        cells.append(modelled(models[group], card) if group in models else "")
        text += _row([group.removeprefix("cuda "), *cells])
    return text


def measured() -> str:
    """The table of what was measured: of a step in microseconds, and as multiples of what it is compared with."""
    results = json.loads(RESULTS.read_text())
    found = grouped(results)
    card = found["cuda roof"]["copy", "eager"]["device"]
    machine = results["machine_info"]["fastmtl"]
    commit = results["commit_info"]["id"] if "commit_info" in results else machine["commit"]
    said = f"{card}, torch {machine['torch']}, commit {commit[:7]}, {results['datetime'][:10]}"
    return f"{said}. {table_of(found, card)}"


def _group(case: Case) -> str:
    """What benchmarks/test_cuda.py calls the case."""
    if case.sizes:
        return f"cuda ragged resnet50 T={case.T}"
    return f"cuda batched {case.B}x{case.T}x{case.P}" if case.B > 1 else f"cuda {str(case.dtype)[6:]} {case.T}x{case.P}"


if __name__ == "__main__":
    sys.stdout.write(f"{measured()}\n{latencies()}\n{tables()}")

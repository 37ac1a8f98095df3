"""What the compiler made of every CUDA kernel, found without a GPU: `make cuda-report`.

Compiles csrc/cuda/*.cu for each architecture and prints, for every kernel, its registers, spills, memory,
theoretical occupancy, and how wide the global loads and stores of its loops are. Exits with 1 and a list of what is
wrong if a kernel spills, if a streaming kernel's hot loop does not load (or store) 16 bytes at a time, or if it cannot
be judged; with 2 where a tool is missing or a file does not compile.

How loops are found: the SASS of a kernel is cut into basic blocks; a loop is a strongly connected component of the
flow graph, and the loops inside it are the components left when the edges back to its entry are cut. A loop's own
accesses are those outside the loops inside it. Its bytes are those of the heaviest path once round it; the hot loop is
the one with the most. It is wide if some path that carries as many bytes has 16-byte accesses only: the paths beside
it (tails, unaligned rows) may be narrow.

Two kinds of access are counted apart, since they are not the stream: loads of addresses that other accesses go to (a
table of rows), and accesses whose address does not depend on the thread (one transaction a warp, as for weights). Both
are found by following values through the registers.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
WIDE = 128  # bits

# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read off the compiled kernels: the table to keep in step with csrc/cuda.


@dataclass(frozen=True)
class Expected:
    """What is known of a kernel from its source, by its name without template arguments.

    Attributes:
        loads: its hot loop must load 16 bytes at a time (a streaming kernel), and it may not touch local memory.
        stores: the same for its stores.
        shared: bytes of dynamic shared memory as the host code computes them: a constant expression of C++ after
            `PROLOGUE`, {0}, {1}, ... being the template arguments; at its largest where it depends on more than those.
    """

    loads: bool = False
    stores: bool = False
    shared: str = "0"


PROLOGUE = '#include "align_small.cuh"\n#include "solve.cuh"\nusing namespace fastmtl::cuda;\n'  # of csrc/cuda

KERNELS = {
    "gram_stream": Expected(loads=True, shared="kStreamShared<{1}>"),
    "gram_groups": Expected(loads=True, shared="Groups<{1}>::kShared"),
    "gram_tiles": Expected(loads=True, shared="Tiling<{1}, {2}>::kShared"),
    "gram_reduce": Expected(shared="1024 * sizeof(double)"),
    # Reads two rows where an entry of theirs is not finite.
    "mend": Expected(shared="256 / 32 * sizeof(double)"),
    # One block a matrix; fewer threads and less memory the smaller it is: this is T = 64.
    "balance": Expected(shared="balance_shared(64, true)"),
    "eigh": Expected(shared="jacobi_shared(64, true)"),
    "combine": Expected(loads=True, stores=True),
    "sign_drop": Expected(loads=True, stores=True),
    "align_small": Expected(shared="Small<{1}>::shared({1})"),
    "upload": Expected(),
    # A column a thread: what is fetched at once is a line, and the arithmetic takes longer.
    "gram_probe": Expected(shared="kProbeShared"),
    "probe_vectors": Expected(),
    "probe_bound": Expected(),
    # One warp a problem, scratch in shared memory where it fits: this is T = 64.
    "solve": Expected(shared="solve_shared<{0}>(64)"),
    "sum_tasks": Expected(),
}


# ---------------------------------------------------------------------------------------------------------------------
# Occupancy


@dataclass(frozen=True)
class Device:
    """The limits of one multiprocessor."""

    shared: int
    shared_of_block: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


DEVICES = {80: Device(164 << 10, 163 << 10), 90: Device(228 << 10, 227 << 10)}
SHARED_RESERVED = 1 << 10  # of every block, by the system


@dataclass(frozen=True)
class Occupancy:
    """Resident warps of a multiprocessor, and which resource allows no more."""

    warps: int
    limit: str


def _up(x: int, step: int) -> int:
    return -(-x // step) * step


def occupancy(device: Device, threads: int, registers: int, shared: int) -> Occupancy:
    """Resident warps with blocks of `threads` threads and `shared` bytes of shared memory, static and dynamic.

    Registers are given out to a warp 256 at a time, from the quarter of the file that its scheduler has.
    """
    warps = -(-threads // 32)
    of_warp = _up(max(registers, 1) * 32, 256)
    blocks = {
        "warps": device.warps // warps,
        "blocks": device.blocks,
        "registers": device.registers // 4 // of_warp * 4 // warps,
        "shared memory": device.shared // _up(shared + SHARED_RESERVED, 128),
    }
    if shared > device.shared_of_block:
        blocks["shared memory"] = 0
    limit = min(blocks, key=lambda name: blocks[name])
    return Occupancy(blocks[limit] * warps, limit)


# ---------------------------------------------------------------------------------------------------------------------
# What ptxas and nvdisasm print


@dataclass
class Resources:
    """What ptxas says of a kernel, in bytes; those of functions that it calls are added."""

    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0


def parse_ptxas(text: str) -> dict[str, Resources]:
    """Kernels by mangled name, from what `nvcc -Xptxas -v` prints."""
    found: dict[str, Resources] = {}
    now = Resources()
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            now = found[match[1]] = Resources()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            now.stack += int(match[1])
            now.spill_stores += int(match[2])
            now.spill_loads += int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            now.registers = int(match[1])
            if match := re.search(r"(\d+) bytes smem", line):
                now.shared = int(match[1])
    return found


@dataclass
class Access:
    """A load or store of global memory."""

    kind: Literal["load", "store"]
    bits: int
    generic: bool  # LD or ST: the compiler does not know that the address is global
    at: list[str]  # the registers that hold the address
    role: Literal["data", "address", "uniform"] = "data"  # found by `follow`

    @property
    def label(self) -> str:
        """The width, and a `g` if the address is generic."""
        return f"{self.bits}{'g' if self.generic else ''}"


@dataclass
class Instruction:
    """A line of SASS: what it does and where it may lead."""

    address: int
    name: str = ""
    guard: str = ""  # predicate register that it depends on, `!` before it if on its opposite
    reads: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    per_thread: bool = False  # it writes what differs between threads
    access: Access | None = None
    targets: list[str] = field(default_factory=list)  # labels that it may jump to
    callee: str = ""
    falls_through: bool = True


@dataclass
class Code:
    """The SASS of one kernel."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction that follows
    threads: int | None = None  # of its __launch_bounds__


def _registers(text: str) -> list[str]:
    """General, uniform and predicate registers that are named; both of a pair."""
    found = []
    for name, number, pair in re.findall(r"\b(U?[RP])(\d+)(\.64)?", text):
        found += [f"{name}{int(number) + i}" for i in range(2 if pair else 1)]
    return found


def _written(name: str, modifiers: list[str], operands: list[str]) -> tuple[list[str], int]:
    """The registers that an instruction writes, and how many of its operands name them."""
    if not operands or name.startswith(("ST", "RED", "BAR", "BRA", "BRX", "JM", "RET", "CALL", "DEPBAR", "LDGSTS")):
        return [], 0
    predicate = [re.fullmatch(r"U?P[\dT]+", x) is not None for x in operands]
    count = 1
    if predicate[0]:
        # Two predicates, or one and a register, or (FCHK) one alone.
        if len(operands) > 1 and (predicate[1] or name in ("SHFL", "LOP3", "ULOP3", "ATOM", "ATOMG", "ATOMS")):
            count = 2
    elif name.startswith(("VOTE", "MATCH")):
        count = 2 if predicate[1:2] == [True] else 1
    else:  # carries, up to two
        while count < min(3, len(operands)) and predicate[count]:
            count += 1
    width = 1
    if name in ("LDG", "LD", "LDS", "LDL", "LDC", "ULDC"):
        width = _bits(modifiers) // 32 or 1
    elif re.fullmatch(r"[DIH]MMA", name):
        width = 4
    else:
        first = modifiers[0] if modifiers else ""
        double = name in ("DADD", "DMUL", "DFMA", "DMNMX") or not {"WIDE", "64"}.isdisjoint(modifiers)
        double = double or (name == "CS2R" and first != "32") or (name in ("F2F", "I2F") and first == "F64")
        width = 2 if double or (name == "F2I" and not {"U64", "S64"}.isdisjoint(modifiers)) else 1
    written: list[str] = []
    for operand in operands[:count]:
        for register in _registers(operand):
            prefix = register.rstrip("0123456789")
            step = width if prefix.endswith("R") else 1
            written += [f"{prefix}{int(register[len(prefix) :]) + i}" for i in range(step)]
    return written, count


def _bits(modifiers: Iterable[str]) -> int:
    widths = [int(m[1]) for m in (re.fullmatch(r"[US]?(8|16|32|64|128|256)", x) for x in modifiers) if m]
    return widths[-1] if widths else 32


def parse_instruction(address: int, text: str) -> Instruction:
    """One instruction without its address and its semicolon, as nvdisasm prints it."""
    match = re.match(r"(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*)", text, re.DOTALL)
    if match is None:
        return Instruction(address)
    guard, (name, *modifiers), rest = match[1] or "", match[2].split("."), match[3]
    operands = [x.strip() for x in rest.split(",")]  # brackets hold no commas
    result = Instruction(address, name, guard)
    result.writes, count = _written(name, modifiers, operands)
    result.reads = _registers(",".join(operands[count:]))
    result.per_thread = name == "LDL" or (name in ("S2R", "CS2R") and re.search(r"SR_(TID|LANEID)", rest) is not None)
    if name in ("LDG", "LD", "LDGSTS", "STG", "ST"):
        # The last address: LDGSTS has that in shared memory first. Within it, a descriptor may come first.
        brackets = re.findall(r"\[([^\]]*)\]", rest)
        kind: Literal["load", "store"] = "store" if name in ("STG", "ST") else "load"
        at = _registers(brackets[-1]) if brackets else []
        result.access = Access(kind, _bits(modifiers), name in ("LD", "ST"), at)
    elif name in ("BRA", "JMP", "BRX", "JMX") or (name == "CALL" and "`(.L_" in rest):
        # A CALL of a label within the kernel is a jump: what it leads to never returns.
        result.targets = re.findall(r"\.L_\w+", rest)
        # `BRA P1, (L)`, `BRA.DIV UR4, (L)`: a condition among the operands.
        alone = name in ("BRX", "JMX") or rest.lstrip("`(").startswith(".L_")
        result.falls_through = bool(guard) or not alone
    elif name == "CALL":
        result.callee = rest.strip("`()")
    elif name in ("EXIT", "RET", "KILL"):
        result.falls_through = bool(guard)
    # A CALL comes back to what follows it; BSYNC goes to what follows it.
    return result


def parse_sass(text: str) -> dict[str, Code]:
    """Code by mangled name, from what nvdisasm prints of a cubin."""
    found: dict[str, Code] = {}
    section, bounds = "", -1  # words of EIATTR_MAX_THREADS read, -1 outside
    for line in text.splitlines():
        if match := re.match(r'\s*\.section\s+([^,"\s]+)', line):
            section, bounds = match[1], -1
        elif section.startswith(".nv.info."):
            if "nvinfo :" in line:
                bounds = 0 if "EIATTR_MAX_THREADS" in line else -1
            elif bounds >= 0 and (match := re.search(r"\.word\s+(0x[0-9a-f]+)", line)):
                code = found.setdefault(section.removeprefix(".nv.info."), Code())
                code.threads = int(match[1], 16) * (code.threads if bounds and code.threads else 1)
                bounds = bounds + 1 if bounds < 2 else -1
        elif section.startswith(".text."):
            code = found.setdefault(section.removeprefix(".text."), Code())
            if match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
                code.instructions.append(parse_instruction(int(match[1], 16), match[2]))
            elif match := re.match(r"([.$\w]+):\s*$", line):
                code.labels[match[1]] = len(code.instructions)
    return {name: code for name, code in found.items() if code.instructions}


# ---------------------------------------------------------------------------------------------------------------------
# Flow of control and of values


def _blocks(code: Code) -> tuple[list[list[Instruction]], dict[int, list[int]]]:
    """Basic blocks in order, and the indices of the blocks that each leads to."""
    starts = {0, *code.labels.values()}
    starts.update(i + 1 for i, x in enumerate(code.instructions) if x.targets or not x.falls_through)
    cuts = sorted(s for s in starts if s < len(code.instructions))
    block_of = {start: block for block, start in enumerate(cuts)}
    blocks = [code.instructions[a:b] for a, b in zip(cuts, [*cuts[1:], len(code.instructions)], strict=True)]
    edges: dict[int, list[int]] = {}
    for i, block in enumerate(blocks):
        last = block[-1]
        # Labels of other functions (a call's way back) are not of this graph.
        there = [block_of[code.labels[t]] for t in last.targets if code.labels.get(t) in block_of]
        if last.falls_through and i + 1 < len(blocks):
            there.append(i + 1)
        edges[i] = sorted(set(there))
    return blocks, edges


# Arithmetic on numbers: what it reads is no address.
_ARITHMETIC = re.compile(r"[DFH](ADD|MUL|FMA|SETP|MNMX)2?|MUFU|F2FP?|F2I")


class _Values:
    """What is known of the registers at a point of a block.

    A value is a set of bits: bit 0 where it may differ between threads, bit i + 1 where it comes from the i-th 64-bit
    load. What was written under a predicate is kept apart until the predicate is written: registers are used again
    under other predicates.
    """

    def __init__(self, at_entry: dict[str, int]) -> None:
        self.always = dict(at_entry)
        self.under: dict[str, tuple[str, int]] = {}

    def read(self, registers: Iterable[str], guard: str = "") -> int:
        value = 0
        for r in registers:
            there, kept = self.under.get(r, ("", 0))
            if there and there == guard:
                value |= kept
            else:
                value |= self.always.get(r, 0) | (0 if guard and there == _opposite(guard) else kept)
        return value

    def write(self, registers: Iterable[str], value: int, guard: str = "") -> None:
        for r in registers:
            if "P" in r:
                for held in [held for held, (there, _) in self.under.items() if there.lstrip("!") == r]:
                    self.join(held)
        if guard.lstrip("!") in registers:
            guard = "?"  # it no longer is what it was written under
        for r in registers:
            # A uniform register does not depend on the thread, and a condition is nobody's address.
            new = value & (1 if "P" in r else ~0) & (~1 if r.startswith("U") else ~0)
            if not guard or self.under.get(r, ("",))[0] == _opposite(guard):
                self.always[r] = new
                if not guard:
                    self.under.pop(r, None)
            else:
                if self.under.get(r, (guard,))[0] != guard:
                    self.join(r)
                self.under[r] = guard, new
                if guard == "?":
                    self.join(r)

    def join(self, register: str) -> None:
        _, value = self.under.pop(register)
        self.always[register] = self.always.get(register, 0) | value

    def at_exit(self) -> dict[str, int]:
        for register in list(self.under):
            self.join(register)
        return self.always


def _opposite(guard: str) -> str:
    return guard[1:] if guard.startswith("!") else f"!{guard}"


def follow(code: Code) -> None:
    """Tells what each access is for: sets its role, by following values forward through the registers.

    Of branches only where they lead is followed, not what their choice depends on.
    """
    blocks, edges = _blocks(code)
    loads = [x for x in code.instructions if x.access and x.access.kind == "load" and x.access.bits == 64]
    tag = {x.address: 2 << i for i, x in enumerate(loads)}
    starts = {block[0].address: i for i, block in enumerate(blocks)}
    every = {r for x in code.instructions for r in [*x.reads, *x.writes]}
    addresses = numbers = 0  # tags that an address was made of, and those that were computed with
    uniform: dict[int, bool] = {}

    @functools.cache
    def callee(label: str) -> tuple[set[str], set[str]]:
        """Registers that a called function reads and writes."""
        inside: set[int] = set()
        todo = [starts[code.instructions[code.labels[label]].address]] if label in code.labels else []
        while todo:
            i = todo.pop()
            if i not in inside:
                inside.add(i)
                todo += edges[i]
        reads: set[str] = set()
        writes: set[str] = set()
        for x in (x for i in sorted(inside) for x in blocks[i]):
            reads.update(r for r in x.reads if r not in writes)
            writes.update(x.writes)
        return reads, writes

    def step(x: Instruction, values: _Values) -> None:
        nonlocal addresses, numbers
        if x.callee:
            reads, writes = callee(x.callee)
            values.write(writes, values.read(reads))
            return
        value = values.read(x.reads, x.guard) | x.per_thread
        if _ARITHMETIC.fullmatch(x.name):
            numbers |= value
        if x.access:
            at = values.read(x.access.at, x.guard)
            addresses |= at
            uniform[x.address] = not at & 1
            value = at & 1 | tag.get(x.address, 0)
        elif x.name in ("LDS", "LDC", "ULDC", "PRMT"):
            # PRMT takes halves of a word apart: what it puts them beside is cut off later.
            value &= 1
        if x.guard:
            value |= values.read([x.guard.lstrip("!")]) & 1
        values.write(x.writes, value, x.guard)

    # Of what a called function is given nothing is known.
    entered = {j for there in edges.values() for j in there}
    before = [{} if i == 0 or i in entered else dict.fromkeys(every, 1) for i in edges]
    todo = set(edges)
    while todo:
        i = min(todo)
        todo.remove(i)
        values = _Values(before[i])
        for x in blocks[i]:
            step(x, values)
        after = values.at_exit()
        for j in edges[i]:
            there = before[j]
            changed = {r: v | there.get(r, 0) for r, v in after.items() if v & ~there.get(r, 0)}
            if changed:
                there.update(changed)
                todo.add(j)
    for x in code.instructions:
        if x.access:
            is_address = tag.get(x.address, 0) & addresses & ~numbers
            x.access.role = "address" if is_address else "uniform" if uniform[x.address] else "data"


# ---------------------------------------------------------------------------------------------------------------------
# Loops


def components(nodes: Iterable[int], edges: dict[int, list[int]]) -> list[list[int]]:
    """Strongly connected components (Tarjan), each after those that it leads to."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    waiting: set[int] = set()
    found: list[list[int]] = []
    for root in nodes:
        if root in order:
            continue
        work: list[tuple[int, Iterator[int]]] = []
        enter: int | None = root
        while enter is not None or work:
            if enter is not None:
                order[enter] = low[enter] = len(order)
                stack.append(enter)
                waiting.add(enter)
                work.append((enter, iter(edges[enter])))
                enter = None
            node, rest = work[-1]
            for successor in rest:
                if successor not in order:
                    enter = successor
                    break
                if successor in waiting:
                    low[node] = min(low[node], order[successor])
            if enter is not None:
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == order[node]:
                at = stack.index(node)
                found.append(stack[at:])
                waiting.difference_update(stack[at:])
                del stack[at:]
    return found


@dataclass
class Traffic:
    """Global loads, or stores, of one loop outside the loops inside it."""

    counts: dict[str, int]  # accesses to data by width in bits (`g`: generic), over all paths
    beside: dict[str, int]  # addresses, and accesses that do not depend on the thread
    bytes: int  # of data on the heaviest path once round
    wide_bytes: int  # of the heaviest path on which data are accessed 16 bytes at a time only

    @property
    def wide(self) -> bool:
        """Whether the loop can carry its full load 16 bytes at a time."""
        return 0 < self.bytes == self.wide_bytes

    def __str__(self) -> str:
        parts: dict[bool, list[str]] = {True: [], False: []}
        for label, n in sorted(self.counts.items(), key=lambda x: -int(x[0].rstrip("g"))):
            parts[int(label.rstrip("g")) >= WIDE].append(f"{n}x{label}")
        wide, narrow = "+".join(parts[True]), "+".join(parts[False])
        another_path = self.wide and narrow
        text = f"{wide} ({narrow})" if another_path else "+".join(filter(None, [wide, narrow]))
        beside = ", ".join(f"{n}x{label}" for label, n in sorted(self.beside.items()))
        return f"{text} [{beside}]".strip() if beside else text


@dataclass
class Loop:
    """A loop; depth 0 is the code outside all loops."""

    address: int
    depth: int
    innermost: bool
    loads: Traffic
    stores: Traffic
    in_flight: int  # loads of data at most under way at once, as the code is ordered; 16-byte ones if there are any


def _in_flight(instructions: list[Instruction], least_bits: int) -> int:
    """Loads issued before one of their results is read, twice round; copies to shared memory end at a DEPBAR."""
    waiting: dict[int, list[str]] = {}
    most = 0
    for x in instructions * 2:
        used = {*x.reads, *(x.access.at if x.access else ())}
        waiting = {i: r for i, r in waiting.items() if used.isdisjoint(r) and (r or x.name != "DEPBAR")}
        if x.access and x.access.kind == "load" and x.access.role == "data" and x.access.bits >= least_bits:
            waiting[x.address] = x.writes
            most = max(most, len(waiting))
    return most


def find_loops(code: Code) -> list[Loop]:
    """The code outside all loops, then every loop, an outer one before those inside it. First `follow`."""
    blocks, edges = _blocks(code)
    enters: dict[int, set[int]] = {i: set() for i in edges}
    for i, there in edges.items():
        for j in there:
            enters[j].add(i)

    def traffic(kind: str, parts: list[list[int]], own: set[int], heads: set[int], depth: int) -> Traffic:
        found = [(b, x.access) for b in own for x in blocks[b] if x.access and x.access.kind == kind]
        data: dict[int, list[int]] = {b: [] for b in own}
        for b, access in found:
            if access.role == "data":
                data[b].append(access.bits)

        def heaviest(wide_only: bool) -> int:
            most = 0
            reached: dict[int, int] = {}  # bytes of the heaviest path up to and with a block
            for part in reversed(parts):
                bits = data[part[0]] if part[0] in own else []
                if wide_only and min(bits, default=WIDE) < WIDE:
                    continue
                before = [reached[p] for b in part for p in enters[b] if p in reached and p not in part]
                if heads.intersection(part):
                    before.append(0)
                if before:
                    total = max(before) + sum(bits) // 8
                    reached.update((b, total) for b in part)
                    if depth == 0 or any(heads.intersection(edges[b]) for b in part):
                        most = max(most, total)
            return most

        counts = Counter(x.label for _, x in found if x.role == "data")
        beside = Counter(f"{x.label} {x.role}" for _, x in found if x.role != "data")
        return Traffic(dict(counts), dict(beside), heaviest(False), heaviest(True))

    def walk(nodes: list[int], heads: set[int], depth: int) -> Iterator[Loop]:
        back = heads if depth else set()
        inside = set(nodes)
        kept = {b: [s for s in edges[b] if s in inside and s not in back] for b in nodes}
        parts = components(sorted(nodes), kept)
        loops = [part for part in parts if len(part) > 1 or part[0] in kept[part[0]]]
        own = inside.difference(*loops)
        address = min(blocks[b][0].address for b in heads)
        loads, stores = (traffic(kind, parts, own, heads, depth) for kind in ("load", "store"))
        in_flight = _in_flight([x for b in sorted(own) for x in blocks[b]], WIDE if loads.wide else 0)
        yield Loop(address, depth, not loops, loads, stores, in_flight)
        for part in loops:
            entries = {b for b in part if enters[b].difference(part)} or {min(part)}
            yield from walk(part, entries, depth + 1)

    return list(walk(list(edges), {0}, 0))


def hot(loops: Iterable[Loop], kind: Literal["loads", "stores"]) -> Loop | None:
    """The loop that moves the most; of equal ones a wide one, then the innermost. None if nothing is moved.

    The code outside all loops counts only where no loop moves anything.
    """

    def weight(loop: Loop) -> tuple[bool, int, bool, int]:
        traffic: Traffic = getattr(loop, kind)
        return loop.depth > 0, traffic.bytes, traffic.wide, loop.depth

    return max((loop for loop in loops if getattr(loop, kind).counts), key=weight, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# The verdict


@dataclass
class Report:
    """All that is known of one kernel on one architecture."""

    kernel: str
    arch: int
    source: str
    resources: Resources
    dynamic_shared: int | None
    threads: int | None
    occupancy: Occupancy | None
    local_accesses: int
    loops: list[Loop]
    hot_loads: Loop | None
    hot_stores: Loop | None
    streaming: bool
    failures: list[str]


def kernel_name(demangled: str) -> str:
    """`space::kernel<arguments>` without return type and parameters."""
    text = re.sub(r"\(anonymous namespace\)::|<unnamed>::|_(?:GLOBAL__N__|INTERNAL)\w*::", "", demangled)
    text = re.sub(r"\([\w: ]+\)(?=-?\d)", "", text)  # (int)4
    depth, start = 0, 0
    for i, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if depth == 0 and character == " ":
            start = i + 1
        if depth == 0 and character == "(":
            return text[start:i]
    return text[start:]


def short_name(name: str) -> str:
    """Without namespaces."""
    return re.sub(r"\b\w+::", "", name)


def split_name(name: str) -> tuple[str, list[str]]:
    """The name without namespaces, and the template arguments as they are."""
    base, _, rest = name.partition("<")
    arguments, depth = [""], 0
    for character in rest.removesuffix(">"):
        depth += (character == "<") - (character == ">")
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return short_name(base), [x.strip() for x in arguments if x.strip()]


@dataclass
class Compiled:
    """A kernel as the tools show it."""

    name: str  # of `kernel_name`
    arch: int
    source: str
    resources: Resources
    code: Code


def shared_expression(name: str, table: dict[str, Expected]) -> str:
    """The expression of the dynamic shared memory of a kernel."""
    base, arguments = split_name(name)
    return table[base].shared.format(*arguments) if base in table else "0"


def judge(kernel: Compiled, table: dict[str, Expected], shared: dict[str, int]) -> Report:
    """Puts together what is known of a kernel and what is wrong with it; `shared` has the values of expressions."""
    code, resources = kernel.code, kernel.resources
    expected = table.get(split_name(kernel.name)[0])
    failures: list[str] = []
    if expected is None:
        failures.append("not in the table KERNELS of tools/cuda_report.py: nothing is known of its loads")
        expected = Expected()
    expression = shared_expression(kernel.name, table)
    dynamic = shared.get(expression)
    if dynamic is None:
        failures.append(f"KERNELS: its dynamic shared memory is not a constant expression: {expression}")
    full = None
    if code.threads is None:
        failures.append("no __launch_bounds__: its block size is not known")
    else:
        all_shared = resources.shared + (dynamic or 0)
        full = occupancy(DEVICES[kernel.arch], code.threads, resources.registers, all_shared)
        if full.warps == 0:
            failures.append(f"a block does not fit a multiprocessor: {full.limit}")
    if resources.spill_stores or resources.spill_loads:
        failures.append(f"spills: {resources.spill_stores} bytes stored, {resources.spill_loads} loaded")
    follow(code)
    loops = find_loops(code)
    local = sum(x.name in ("LDL", "STL") for x in code.instructions)
    streaming = expected.loads or expected.stores
    if streaming and local:
        failures.append(f"{local} accesses to local memory in a streaming kernel")
    kinds: list[Literal["loads", "stores"]] = []
    kinds += ["loads"] if expected.loads else []
    kinds += ["stores"] if expected.stores else []
    for kind in kinds:
        loop = hot(loops, kind)
        if loop is None:
            failures.append(f"no global {kind} in a streaming kernel")
            continue
        traffic: Traffic = getattr(loop, kind)
        if not traffic.wide:
            failures.append(f"narrow {kind} in the hot loop at {loop.address:#06x}: {traffic}")
    return Report(
        kernel=short_name(kernel.name),
        arch=kernel.arch,
        source=kernel.source,
        resources=resources,
        dynamic_shared=dynamic,
        threads=code.threads,
        occupancy=full,
        local_accesses=local,
        loops=loops,
        hot_loads=hot(loops, "loads"),
        hot_stores=hot(loops, "stores"),
        streaming=streaming,
        failures=failures,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tools


class MissingTool(Exception):
    """A tool that is not there, with what to install."""


@dataclass(frozen=True)
class Tools:
    """Paths of the programs, and nvcc's flags."""

    nvcc: str
    nvdisasm: str
    demangle: str
    flags: tuple[str, ...]


def find_tools() -> Tools:
    """The toolkit that torch's extension tools would use.

    Raises:
        MissingTool: with what to install.
    """
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise MissingTool(f"torch is needed for its headers ({error}): pip install torch") from error
    home = Path(cpp_extension.CUDA_HOME) / "bin" if cpp_extension.CUDA_HOME else None
    nvcc = shutil.which("nvcc", path=str(home)) if home else None
    if nvcc is None:
        raise MissingTool(f"no nvcc in {home or 'any known place'}: install the CUDA toolkit and set CUDA_HOME to it")
    triton = importlib.util.find_spec("triton")
    folders = [str(home)]
    folders += [f"{folder}/backends/nvidia/bin" for folder in (triton and triton.submodule_search_locations) or []]
    path = os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)])
    nvdisasm = shutil.which("nvdisasm", path=path)
    if nvdisasm is None:
        raise MissingTool("no nvdisasm: it is part of the full CUDA toolkit, and of triton (pip install triton)")
    demangle = shutil.which("c++filt", path=path) or shutil.which("cu++filt", path=path)
    if demangle is None:
        raise MissingTool("neither c++filt (binutils) nor cu++filt (CUDA toolkit) found: install one")
    flags = ["-O3", "-std=c++20", "-Xptxas", "-v", "-DUSE_CUDA", *getattr(cpp_extension, "COMMON_NVCC_FLAGS", [])]
    flags += [f"-I{folder}" for folder in [ROOT / "csrc" / "cuda", *cpp_extension.include_paths()]]
    return Tools(nvcc, nvdisasm, demangle, tuple(flags))


def _run(command: Sequence[str], stdin: str | None = None) -> tuple[str, str]:
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout, result.stderr


def _compile(tools: Tools, source: str, arch: int, folder: str) -> tuple[str, str]:
    """What ptxas says, and the cubin."""
    cubin = str(Path(folder, "kernels.cubin"))
    return _run([tools.nvcc, "-cubin", f"-arch=sm_{arch}", *tools.flags, "-o", cubin, source])[1], cubin


def compile_kernels(tools: Tools, source: Path, arch: int) -> list[Compiled]:
    """All kernels of a file for one architecture.

    Raises:
        RuntimeError: with what a tool printed, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, cubin = _compile(tools, str(source), arch, folder)
        sass, _ = _run([tools.nvdisasm, cubin])
    resources, codes = parse_ptxas(log), parse_sass(sass)
    if not resources.keys() <= codes.keys():
        raise RuntimeError(f"{source}: nvdisasm does not show {', '.join(resources.keys() - codes.keys())}")
    demangled = _run([tools.demangle], "\n".join(resources) + "\n")[0].splitlines() if resources else []
    names = [kernel_name(line) for line in demangled]
    return [Compiled(name, arch, source.name, resources[x], codes[x]) for x, name in zip(resources, names, strict=True)]


def evaluate(tools: Tools, expressions: Iterable[str], prologue: str) -> dict[str, int]:
    """Values of constant expressions of C++, read off the names of kernels that have them as template arguments.

    What does not compile is left out.
    """
    wanted = sorted(set(expressions))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "values.cu")
        text = [prologue, "template <int kIndex, unsigned long long kValue> __global__ void value_of() {}"]
        text += [f"template __global__ void value_of<{i}, ({x})>();" for i, x in enumerate(wanted)]
        source.write_text("\n".join(text))
        try:
            log, _ = _compile(tools, str(source), min(DEVICES), folder)
        except RuntimeError:
            if len(wanted) <= 1:
                return {}
            half = len(wanted) // 2
            return {x: v for part in (wanted[:half], wanted[half:]) for x, v in evaluate(tools, part, prologue).items()}
    return {wanted[int(i)]: int(value) for i, value in re.findall(r"entry function '\w*value_ofILi(\d+)ELy(\d+)E", log)}


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _order(report: Report) -> tuple[list[str | int], int]:
    """By name, numbers in it as numbers."""
    parts = re.split(r"(\d+)", report.kernel)
    return [int(x) if i % 2 else x for i, x in enumerate(parts)], report.arch


def _traffic(loops: list[Loop], first: Loop | None, kind: Literal["loads", "stores"]) -> str:
    rest = [loop for loop in loops if loop is not first and loop.depth and getattr(loop, kind).counts]
    counted = Counter(str(getattr(loop, kind)) for loop in rest)
    texts = [str(getattr(first, kind)) if first else "-"]
    texts += [text if n == 1 else f"{n} loops {text}" for text, n in counted.items()]
    return ", ".join(texts)


def table_of(reports: Iterable[Report]) -> str:
    """Aligned text, a line for every kernel and architecture."""
    head = "kernel|sm|ok|regs|spill st/ld|stack|shared|+dynamic|threads|warps|limited by|in flight|stores|loads"
    rows = [head.split("|")]
    for r in reports:
        x = r.resources
        name = ("» " if r.streaming else "  ") + r.kernel
        warps, limit = (f"{r.occupancy.warps}/{DEVICES[r.arch].warps}", r.occupancy.limit) if r.occupancy else "??"
        row = [name, r.arch, "FAIL" if r.failures else "ok", x.registers, f"{x.spill_stores}/{x.spill_loads}", x.stack]
        row += [x.shared, "?" if r.dynamic_shared is None else r.dynamic_shared, r.threads or "?", warps, limit]
        row += [r.hot_loads.in_flight if r.hot_loads else "-"]
        rows.append(
            [*map(str, row), _traffic(r.loops, r.hot_stores, "stores"), _traffic(r.loops, r.hot_loads, "loads")]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, 2, 10, 12, 13}
    lines = (
        "  ".join(x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


LEGEND = """\
» streaming: its hot loop must move 16 bytes at a time.
warps: resident warps of the multiprocessor's, by registers, shared memory (bytes, static + dynamic) and block size.
in flight: loads of the hot loop that are issued before the result of one of them is needed, as the code is ordered.
stores, loads: of the hot loop, then of the others. 8x128: eight instructions of 128 bits; (on another path round the
same loop); [addresses, and what does not depend on the thread]; g: the address is not known to be of global memory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: csrc/cuda/*.cu")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(DEVICES), default=sorted(DEVICES))
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there, every loop included")
    arguments = parser.parse_args(argv)
    sources = arguments.sources or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    try:
        if not sources:
            raise MissingTool("no csrc/cuda/*.cu")
        tools = find_tools()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(compile_kernels, tools, s, arch) for s in sources for arch in arguments.arch]
            kernels = [kernel for job in jobs for kernel in job.result()]
        shared = evaluate(tools, (shared_expression(x.name, KERNELS) for x in kernels), PROLOGUE)
        reports = sorted((judge(x, KERNELS, shared) for x in kernels), key=_order)
    except (MissingTool, RuntimeError) as error:
        print(f"cuda-report: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    print(f"{table_of(reports)}\n\n{LEGEND}")
    failures = [f"{r.kernel} sm_{r.arch}: {failure}" for r in reports for failure in r.failures]
    if failures:
        print(f"\n{len(failures)} wrong:", *failures, sep="\n  ")
    else:
        print(f"\n{len(reports)} kernels: no spills, every streaming loop moves 16 bytes at a time.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

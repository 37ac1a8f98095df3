"""Faults seeded into kernels, engines and hooks: which test finds each, and whether the short suite finds them all.

    python tools/mutants.py [NAME ...]     # those without a result yet, or these; writes docs/mutants.md

Each mutant is one small replacement in a copy of the tree in build/mutants (C++ is rebuilt there), on which the files
of tests that concern it run as in the short suite, up to the first failure. That test must pass on the tree without the
fault, or it has found something else. What they let pass is put before them with --slow. Results are kept in
build/mutants/results.json until the fault is another; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutants"
TREE, RESULTS = WORK / "tree", WORK / "results.json"
TABLE = ROOT / "docs" / "mutants.md"
LIMIT = {"short": 1800, "long": 7200}  # seconds; a mutant that hangs is found, too


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        name: what is wrong.
        file: where.
        old: a snippet that occurs there once.
        new: what stands there in its place.
        tests: the files or folders under tests/ that concern it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    # CPU kernels and the solvers
    Mutant(
        "Gram: one last column is not summed",
        "csrc/cpu/isa/gram.h",
        "__builtin_memcpy(tail[r], rows[r] + k, size_t(n - k) * sizeof(E));",
        "__builtin_memcpy(tail[r], rows[r] + k, size_t(n - k - 1) * sizeof(E));",
        "ops/test_ops.py ops/test_raw_ops.py methods",
    ),
    Mutant(
        "combine: half a vector of the wrong columns",
        "csrc/cpu/isa/combine.h",
        "total.b += weight[r] * g.b;",
        "total.b += weight[r] * g.a;",
        "ops/test_ops.py ops/test_raw_ops.py methods",
    ),
    Mutant(
        "Aligned-MTL: the upper median eigenvalue",
        "csrc/math/balance.h",
        "return eigenvalues[rank / 2];",
        "return eigenvalues[(rank - 1) / 2];",
        "ops/test_ops.py methods/test_aligned.py",
    ),
    Mutant(
        "MGDA: weights of unit rows, not of the gradients",
        "csrc/math/mgda.h",
        "alpha[t] = b[t] * x[t] / along;",
        "alpha[t] = x[t] / along;",
        "ops/test_mgda.py methods",
    ),
    Mutant(
        "PCGrad: projects where there is no conflict",
        "csrc/math/conflicts.h",
        "product >= 0.0 ||",
        "product > 0.1 * square ||",
        "ops/test_conflicts.py methods",
    ),
    Mutant(
        "GradVac: the new target forgets the old one",
        "csrc/math/conflicts.h",
        "(1.0 - beta) * target + beta * cosine",
        "(1.0 - beta) * cosine + beta * target",
        "ops/test_conflicts.py methods",
    ),
    # CUDA kernels, by the host emulation
    Mutant(
        "CUDA combine: a last column is not written",
        "csrc/cuda/combine.cuh",
        "if (at + i * kThreads < end) {",
        "if (at + i * kThreads + 1 < end) {",
        "emulation/test_kernels.py",
    ),
    Mutant(
        "CUDA Gram: a product of a tile is left out",
        "csrc/cuda/gram.cuh",
        "k < Shape::kTiles * 4; k +=",
        "k < Shape::kTiles * 4 - 1; k +=",
        "emulation/test_kernels.py",
    ),
    Mutant(
        "CUDA sign drop: a draw of an even chance",
        "csrc/cuda/sign_drop.cuh",
        "u * -q < (0x1p32 - u) * p",
        "u * -q < (0x1p32 - u) * -q",
        "emulation/test_sign_drop.py",
    ),
    Mutant(
        "CUDA block_max: the last warp is not asked",
        "csrc/cuda/reduce.cuh",
        "for (int w = 1; w < kThreads / 32; ++w) {\n    x = fmax",
        "for (int w = 1; w + 1 < kThreads / 32; ++w) {\n    x = fmax",
        "emulation/test_kernels.py",
    ),
    # The pipeline, the engines of backward, processes
    Mutant(
        "pipeline: the finest dtype sets the rank's tolerance",
        "fastmtl/pipeline.py",
        "if EPS.get(dtype, 0.0) > EPS[found]:",
        "if EPS.get(dtype, 9.0) < EPS[found]:",
        "methods/test_aligned.py ops/test_ops.py training/test_backward.py",
    ),
    Mutant(
        "Gramian engine: blocks beside the diagonal count once",
        "fastmtl/gramian/contraction.py",
        "M += X if last == end else X + X.T",
        "M += X",
        "gramian",
    ),
    Mutant(
        "Gramian engine: a weight transposed twice is read as once",
        "fastmtl/gramian/views.py",
        "for step in reversed(self.nodes):",
        "for step in self.nodes[-1:]:",
        "gramian",
    ),
    Mutant(
        "losses of examples: what mixes is taken for rounding",
        "fastmtl/gramian/examples/layout.py",
        "allowed**2 * size.square()",
        "size.square()",
        "gramian/test_examples.py",
    ),
    Mutant(
        "Gramian engine: uses on both sides have no products with each other",
        "fastmtl/gramian/contraction.py",
        "M += X + X.T\n    return M / scale",
        "M += X\n    return M / scale",
        "gramian",
    ),
    Mutant(
        "averaged gradients: the processes' sum of Grams is divided once",
        "fastmtl/distributed/collectives.py",
        "dist.get_world_size(group) ** 2",
        "dist.get_world_size(group)",
        "distributed",
    ),
    # Hooks, fan_out, attach, methods, options
    Mutant(
        "fan_out: a tensor that occurs twice is two columns",
        "fastmtl/training/fan_out.py",
        "if not x.requires_grad or any(x is y for y in sources):",
        "if not x.requires_grad:",
        "training/test_fan_out.py training/test_attach.py",
    ),
    Mutant(
        "attach: every tensor of a structure becomes the first alias",
        "fastmtl/training/attach.py",
        "return x if i is None else alias[i]",
        "return x if i is None else alias[0]",
        "training/test_attach.py training/test_stacks.py",
    ),
    Mutant(
        "backward: hooks of a parameter run on every task's gradient",
        "fastmtl/training/passes.py",
        "for hooks, _ in silenced:\n        hooks.clear()",
        "for hooks, _ in silenced[1:]:\n        hooks.clear()",
        "training/test_backward.py training/test_traps.py",
    ),
    Mutant(
        "NashMTL: an absent task's weight is not kept",
        "fastmtl/methods/nash.py",
        "(self._solvable(M) & now)[..., None] & there, alpha,",
        "(self._solvable(M) & now)[..., None], alpha,",
        "methods/test_absent.py ops/test_nash.py methods/test_catalog.py",
    ),
    Mutant(
        "options: a bound that is excluded is allowed",
        "fastmtl/options.py",
        "above < x < below",
        "above <= x < below",
        "methods/test_options.py scalarization",
    ),
]


def sync() -> None:
    """Brings the copy of the tree up to date; what has not changed keeps its time, for ninja."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        source, copy = ROOT / name, TREE / name
        if source.is_file() and not (copy.is_file() and copy.read_bytes() == source.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    for path in TREE.rglob("*.py"):
        if str(path.relative_to(TREE)) not in set(listed):
            path.unlink()


def build_kernels() -> None:
    """The CPU kernels of the copy."""
    (TREE / "fastmtl" / "_C.so").unlink(missing_ok=True)  # setuptools keeps what is newer than what it has built
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "FASTMTL_CUDA": "0"}
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a mutant has to compile:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def run(tree: Path, limit: int, *arguments: str) -> tuple[str | None, str]:
    """The first test that fails, or None, and what pytest said."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "(hangs)", ""
    said = done.stdout + done.stderr
    found = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - |$)", said, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode == 1) != bool(found):
        if done.returncode < 0:
            return f"(signal {-done.returncode})", said
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{said[-3000:]}")
    return (found[1] if found else None), said


def check(mutant: Mutant) -> dict[str, Any]:
    """Seeds the fault, looks for it, and takes it out again."""
    path = TREE / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    begin = time.monotonic()
    compiled = mutant.file.startswith(("csrc/cpu", "csrc/math"))
    try:
        if compiled:
            build_kernels()
        else:
            shutil.copyfile(ROOT / "fastmtl" / "_C.so", TREE / "fastmtl" / "_C.so")
        folders = [f"tests/{name}" for name in mutant.tests.split()]
        result: dict[str, Any] = {"short": run(TREE, LIMIT["short"], *folders)[0]}
        if result["short"] is None:
            result["long"] = run(TREE, LIMIT["long"], "--slow", *folders)[0]
    finally:
        path.write_text(text)
    found = result["short"] or result["long"]
    if found and found.startswith("tests/") and (without := run(ROOT, 1800, "--slow", found)[0]):
        raise SystemExit(f"{mutant.name}: {without} fails without the fault, too")
    return {**result, "seconds": round(time.monotonic() - begin), "fault": list(mutant)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """docs/mutants.md."""
    known = [(mutant, results[mutant.name]) for mutant in MUTANTS if mutant.name in results]
    short = sum(result["short"] is not None for _, result in known)
    either = sum((result["short"] or result["long"]) is not None for _, result in known)
    lines = [
        "# Seeded faults, and the tests that find them",
        "",
        "`python tools/mutants.py` seeds one fault after the other and runs the short suite (`make test`) of the",
        "files that concern it up to the first failure; on what it lets pass, the long one (`make test-all`).",
        f"{len(known)} of {len(MUTANTS)} faults were tried: the short suite finds {short}, the long one {either}.",
        "",
        "| fault | file | found by |",
        "|---|---|---|",
    ]
    for mutant, result in known:
        found = f"`{result['short']}`" if result["short"] else "nothing"
        if not result["short"] and result["long"]:
            found = f"the long suite: `{result['long']}`"
        lines.append(f"| {mutant.name} | {mutant.file} | {found.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Checks the mutants that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a mutant's name or file; done anew")
    asked = parser.parse_args().names
    for mutant in MUTANTS:
        count = (ROOT / mutant.file).read_text().count(mutant.old)
        if count != 1:
            raise SystemExit(f"{mutant.name}: {mutant.file} has {count} places like {mutant.old!r}, expected one")
    WORK.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = {name: result for name, result in results.items() if result["fault"] in [list(m) for m in MUTANTS]}
    sync()
    for mutant in MUTANTS:
        if mutant.name in results if not asked else not any(a in f"{mutant.name} {mutant.file}" for a in asked):
            continue
        print(f"{mutant.name} ...", flush=True)
        results[mutant.name] = check(mutant)
        print(f"  {results[mutant.name]['short'] or 'not found by the short suite'}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1))
        TABLE.write_text(table(results))
    if missed := [name for name, result in results.items() if result["short"] is None]:
        raise SystemExit(f"the short suite does not find: {'; '.join(missed)}")


if __name__ == "__main__":
    main()

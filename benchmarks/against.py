#!/usr/bin/env python3
"""Whether this tree is slower than another commit: both built side by side, their samples interleaved.

    python benchmarks/against.py COMMIT [--only SUBSTRING] [--rounds 61] [--json PATH]

COMMIT is checked out and built in build/against. A process of each tree prepares the same case of the gate (check.py
--ci), by its own benchmarks/trials.py, and the two take turns: a sample of processor time of the one, a sample of the
other. A case takes the median of the rounds' ratios, new over old. Exits 1 where a case is more than `--bound` slower:
it is measured twice more before that is believed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TREES = ROOT / "build" / "against"
ATTEMPTS = 3
SAMPLE = 2e-3  # seconds that a sample takes at least

# What runs in a process of each tree, on its own benchmarks and its own fastmtl. A line in, a line out.
WORKER = """
import json, sys
import torch
import check, measure

torch.set_num_threads(1)
isa = measure.machine()["isa"]
cases = {case.name: case for case in check.ci_cases(isa)}
clock, out = measure.cpu_clock(), sys.stdout
sys.stdout = sys.stderr
print(json.dumps([isa, list(cases)]), file=out, flush=True)
for line in sys.stdin:
    what, argument = json.loads(line)
    if what == "prepare":
        trial = cases[argument].prepare()
        answer = trial.error <= trial.tolerance
    else:
        begin = clock()
        for _ in range(argument):
            trial.fast()
        answer = (clock() - begin) / argument
    print(json.dumps(answer), file=out, flush=True)
"""


class Tree:
    """The benchmarks of one checkout, in a process of their own."""

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "benchmarks")))},
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.isa, self.cases = self._answer()

    def ask(self, what: str, argument: Any) -> Any:
        """Sends a line, and waits for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, argument]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a tree's process ended: see above")
        return json.loads(line)


def checkout(commit: str) -> Path:
    """The tree of a commit, with its CPU kernels built."""
    sha = subprocess.run(
        ["git", "rev-parse", "--verify", f"{commit}^{{commit}}"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    tree = TREES / sha[:12]
    if not tree.exists():
        subprocess.run(["git", "clone", "-q", "--no-checkout", str(ROOT), str(tree)], check=True)
        subprocess.run(["git", "checkout", "-q", sha], cwd=tree, check=True)
    if not list((tree / "fastmtl").glob("_C*.so")):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tree, check=True, env={**os.environ, "FASTMTL_CUDA": "0"})
    return tree


def compared(trees: tuple[Tree, Tree], case: str, rounds: int) -> dict[str, float]:
    """Milliseconds of the old and the new tree, and the median of the rounds' ratios."""
    for tree in trees:
        if not tree.ask("prepare", case):
            raise SystemExit(f"{case}: wrong result")
        tree.ask("run", 3)
    calls = max(1, int(SAMPLE / max(tree.ask("run", 3) for tree in trees)))
    samples = [[tree.ask("run", calls) for tree in trees] for _ in range(rounds)]
    old, new = (1e3 * statistics.median(column) for column in zip(*samples, strict=True))
    return {"old": old, "new": new, "ratio": statistics.median(new / old for old, new in samples)}


def main() -> None:
    """Compares, prints a row a case, and exits 1 where one is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--bound", type=float, default=1.05, help="how much slower counts (default 1.05)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write results, hardware and commits there")
    args = parser.parse_args()
    old = checkout(args.commit)
    trees = Tree(old), Tree(ROOT)
    cases = [case for case in trees[0].cases if case in trees[1].cases and args.only in case]
    print(f"{'case':28} {'old ms':>9} {'new ms':>9} {'new / old':>9}")
    found: dict[str, dict[str, float]] = {}
    slower = []
    for case in cases:
        attempts = [compared(trees, case, args.rounds)]
        while attempts[-1]["ratio"] > args.bound and len(attempts) < ATTEMPTS:
            attempts.append(compared(trees, case, args.rounds))
        best = found[case] = min(attempts, key=lambda attempt: attempt["ratio"])
        if best["ratio"] > args.bound:
            slower.append(case)
        print(
            f"{case:28} {best['old']:9.4f} {best['new']:9.4f} {best['ratio']:9.3f}{' slower' * (case in slower)}",
            flush=True,
        )
    ratios = [entry["ratio"] for entry in found.values()]
    print(f"{len(cases)} cases, {len(slower)} slower; median {statistics.median(ratios):.3f}, worst {max(ratios):.3f}")
    if args.json is not None:
        import measure  # here: the parent needs no torch without it

        content = {"machine": measure.machine(), "old": old.name, "ratios": found}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(bool(slower))


if __name__ == "__main__":
    main()

"""What wants a GPU, in nine minutes: a build for this card, tests, sanitizers, benchmarks (make gpu).

    python tools/gpu.py                 # the parts that this commit still lacks on this card, as far as they fit
    python tools/gpu.py --list          # what they are, and how long they take
    python tools/gpu.py --rehearse      # without a GPU: every command is tried as far as it goes

What never ran on a GPU comes first. After each part the results are written to benchmarks/results/<card>/gpu.json, with
card, commit and torch: a run that is cut off leaves what it has, and the next one goes on from there. Prints what is
missing; exit status 1 where something is, or failed. Standard library and torch only.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["BUDGET", "PARTS", "Card", "Part", "main", "present", "run", "stub", "table"]

ROOT = Path(__file__).parents[1]
BUDGET = 540.0  # seconds
SPARE = 2.0  # a part may take so many times what it usually does
KEPT = 4000  # characters of a part's output


class Card(NamedTuple):
    """A device: how it is called, and the compute capability that the kernels are built for."""

    name: str
    capability: str


class Part(NamedTuple):
    """One command.

    Attributes:
        name: under which its result is kept.
        seconds: it usually takes.
        what: it shows.
        command: its words.
        rehearsal: what stands for it where there is no GPU.
        tool: a program it needs, beside Python.
    """

    name: str
    seconds: float
    what: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    tool: str = ""


def _python(name: str, seconds: float, what: str, command: str, rehearsal: str, tool: str = "") -> Part:
    before = (tool, *_SANITIZER[name]) if tool else ()
    return Part(
        name, seconds, what, (*before, sys.executable, *command.split()), (sys.executable, *rehearsal.split()), tool
    )


def _pytest(name: str, seconds: float, what: str, files: str, select: str, *options: str) -> Part:
    chosen = ("-m", "pytest", *files.split(), "-m", "cuda", "-q", "-p", "no:cacheprovider", "-k", select)
    return Part(
        name,
        seconds,
        what,
        (sys.executable, *chosen, *options),
        (sys.executable, *chosen, "--collect-only", "--no-header"),
    )


_SANITIZER = {
    name: ("--tool", name, "--error-exitcode", "9", "--target-processes", "all") for name in ("memcheck", "racecheck")
}
PARTS = (
    _python("build", 150, "the kernels for this card alone", "setup.py build_ext --inplace", "setup.py --version"),
    _pytest(
        "many tasks",
        40,
        "T > 64: to the contract, no waiting, in a graph",
        "tests/cuda/test_cuda.py",
        "many_tasks or nothing_waits or do_not_wait",
    ),
    _pytest(
        "solvers",
        70,
        "every solver against the CPU's, no waiting, graphs",
        "tests/cuda/test_cuda_weights.py",
        "as_on_the_cpu or nothing_waits or graph",
    ),
    _pytest("GradDrop", 20, "signs and leaks, on lists and in a graph", "tests/cuda/test_cuda.py", "drop"),
    _pytest("training", 50, "backward, fan_out, the engines", "tests/cuda/test_cuda_training.py", "test"),
    _python(
        "memcheck",
        40,
        "no access out of bounds",
        "tools/gpu.py --work cuda",
        "tools/gpu.py --work cpu",
        "compute-sanitizer",
    ),
    _python(
        "racecheck",
        60,
        "no race in shared memory",
        "tools/gpu.py --work cuda",
        "tools/gpu.py --work cpu",
        "compute-sanitizer",
    ),
    _pytest(
        "benchmarks",
        90,
        "float32 matrices beside plain PyTorch",
        "benchmarks/test_cuda.py",
        "(roof or flat and float32) and not (pure and graph)",
        "--benchmark-only",
        "--benchmark-json=gpu-benchmarks.json",
    ),
)


def present() -> Card | None:
    """The current GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Card(torch.cuda.get_device_name(), f"{major}.{minor}")


def stub() -> Card:
    """A card for rehearsals."""
    return Card("stub", "9.0")


def table() -> str:
    """The parts, as they stand in benchmarks/README.md."""
    rows = [f"| {part.name} | {part.seconds:.0f} | {part.what} |\n" for part in PARTS]
    total = sum(part.seconds for part in PARTS)
    return (
        f"| part | seconds | what it shows |\n|---|---|---|\n{''.join(rows)}| all | {total:.0f} of {BUDGET:.0f} | |\n"
    )


def run(
    card: Card,
    results: Path,
    budget: float,
    parts: Sequence[Part] = PARTS,
    *,
    rehearse: bool = False,
    say: Callable[[str], Any] = print,
) -> bool:
    """Runs what is not there yet and fits, and writes after each part; whether all parts passed."""
    about = {"card": card.name, "torch": torch.__version__, "commit": _commit(), "rehearsal": rehearse}
    kept = json.loads(results.read_text()) if results.is_file() else {}
    done = kept["parts"] if {key: kept.get(key) for key in about} == about else {}
    end = time.monotonic() + budget
    environment = {**os.environ, "FASTMTL_CUDA": "1", "TORCH_CUDA_ARCH_LIST": card.capability}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for part in parts:
        left = end - time.monotonic()
        if part.name in done or left < part.seconds:
            continue
        if part.tool and not rehearse and shutil.which(part.tool) is None:
            say(f"{part.name}: {part.tool} is not on PATH")
            continue
        say(f"{part.name}: {part.what}; about {part.seconds:.0f} of {left:.0f} s")
        done[part.name] = _result(
            part.rehearsal if rehearse else part.command, environment, min(left, SPARE * part.seconds)
        )
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps({**about, "parts": done}, indent=1))
        say(f"{part.name}: {done[part.name]['status']} in {done[part.name]['seconds']} s")
        if part is parts[0] and done[part.name]["status"] != "passed":
            say(done[part.name]["output"])
            break  # nothing of the rest would be of this commit
    missing = [part.name for part in parts if part.name not in done]
    failed = [part.name for part in parts if part.name in done and done[part.name]["status"] != "passed"]
    for what, names in (("missing", missing), ("not passed", failed)):
        if names:
            say(f"{what}: {', '.join(names)}")
    return not missing and not failed


def _result(command: Sequence[str], environment: dict[str, str], limit: float) -> dict[str, Any]:
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
        status, output = ("passed" if done.returncode == 0 else f"failed ({done.returncode})"), done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        status = f"cut off after {limit:.0f} s"
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "output": output[-KEPT:]}


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def work(device: str) -> None:
    """A few small shapes of every kind of kernel, for the sanitizers."""
    import fastmtl

    generator = torch.Generator().manual_seed(0)
    for T, P in ((3, 700), (12, 5000), (40, 2100), (64, 1500), (70, 900)):
        G = torch.randn(T, P + 1, generator=generator).to(device)[:, 1:]
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert fastmtl.AlignedMTL()(G.to(dtype)).isfinite().all()
        for name in ("MGDA", "UPGrad", "CAGrad", "NashMTL", "PCGrad", "GradVac", "GradDrop", "IMTL"):
            getattr(fastmtl, name)()(list(G))
    fastmtl.AlignedMTL()(torch.randn(5, 3, 40, generator=generator).to(device))
    fastmtl.eigh(torch.eye(9, dtype=torch.float64, device=device))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="What wants a GPU, in nine minutes.")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds")
    parser.add_argument("--results", type=Path, help="a JSON file; default benchmarks/results/<card>/gpu.json")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--list", action="store_true", help="print the parts")
    parser.add_argument("--work", metavar="DEVICE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        sys.stdout.write(table())
        return 0
    if options.work:
        work(options.work)
        return 0
    card = stub() if options.rehearse else present()
    if card is None:
        sys.stderr.write("no GPU that torch can use; --rehearse tries the commands without one\n")
        return 1
    folder = re.sub(r"[^a-z0-9]+", "-", card.name.lower()).strip("-")
    results = options.results or ROOT / "benchmarks" / "results" / folder / "gpu.json"
    return 0 if run(card, results, options.budget, rehearse=options.rehearse) else 1


if __name__ == "__main__":
    sys.exit(main())

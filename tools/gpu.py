"""What wants a GPU, in nine minutes: a build for this card, tests, sanitizers, benchmarks (make gpu).

    python tools/gpu.py                 # the parts that this commit still lacks on this card, as far as they fit
    python tools/gpu.py --list          # what they are, and how long they take
    python tools/gpu.py --rehearse      # without a GPU: benchmarks run on the CPU, at tiny sizes; tests are collected

What never ran on a GPU comes first. After each part the results are written to benchmarks/results/<card>/gpu.json,
with card, commit and torch: a run that is cut off leaves what it has, and the next one goes on from there. Benchmarks
leave their numbers beside it, where `make docs-numbers` finds them. Prints what is measured and what is missing; exit
status 1 where something is missing or failed. Standard library and torch only; a program or package that a part needs
and that is not there costs that part alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["BUDGET", "PARTS", "Card", "Part", "folder_of", "main", "present", "run", "stub", "table"]

ROOT = Path(__file__).parents[1]
BUDGET = 540.0  # seconds
SPARE = 2.0  # a part may take so many times what it usually does
GRACE = 8.0  # seconds that a part has to put down what it has, when its time is over
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
        command: its words after "python"; {folder} is where results go.
        rehearsal: those of what stands for it where there is no GPU; by default the same, with FASTMTL_REHEARSAL set.
        under: words before "python", the first of which is a program.
        needs: packages beside torch.
        writes: a file of results in that folder; parts that follow each other may share one.
    """

    name: str
    seconds: float
    what: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    writes: str = ""


def _tests(name: str, seconds: float, what: str, file: str, select: str) -> Part:
    chosen = ("-m", "pytest", f"tests/cuda/{file}", "-m", "cuda", "-q", "-p", "no:cacheprovider", "-k", select)
    return Part(name, seconds, what, chosen, (*chosen, "--collect-only", "--no-header"), needs=("pytest", "numpy"))


def _sanitized(tool: str, seconds: float, what: str) -> Part:
    under = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
    return Part(tool, seconds, what, ("tools/gpu.py", "--work", "cuda"), ("tools/gpu.py", "--work", "cpu"), under)


def _ops(name: str, seconds: float, what: str, writes: str, select: str, *files: str) -> Part:
    options = ("--benchmark-only", "--benchmark-columns=median", f"--benchmark-json={{folder}}/{writes}", "-k", select)
    command = ("-m", "pytest", "benchmarks/test_cuda.py", *files, "-q", "-p", "no:cacheprovider", *options)
    return Part(name, seconds, what, command, needs=("pytest", "pytest_benchmark"), writes=writes)


def _steps(model: str, seconds: float, said: str) -> Part:
    every = ("benchmarks/cuda_steps.py", "--missing", "--json", "{folder}/cuda-steps.json")
    what = f"{said}, T = 3, 10, 40: plain, UB, full, gramian, amortised, TorchJD; memory"
    return Part(f"steps: {model}", seconds, what, (*every, "--only", f"{model} "), every, writes="cuda-steps.json")


PARTS = (
    Part(
        "build",
        120,
        "the kernels for this card alone",
        ("setup.py", "build_ext", "--inplace"),
        ("setup.py", "--version"),
        needs=("setuptools",),
    ),
    _tests(
        "many tasks",
        25,
        "T > 64: to the contract, no waiting, in a graph",
        "test_cuda.py",
        "many_tasks or nothing_waits or do_not_wait",
    ),
    _tests(
        "solvers",
        55,
        "every solver against the CPU's, no waiting, graphs",
        "test_cuda_weights.py",
        "as_on_the_cpu or nothing_waits or graph",
    ),
    _tests("GradDrop", 15, "signs and leaks, on lists and in a graph", "test_cuda.py", "drop"),
    _tests(
        "training", 35, "backward, fan_out, the gramian engine, losses of examples", "test_cuda_training.py", "test"
    ),
    _sanitized("memcheck", 30, "no access out of bounds"),
    _sanitized("racecheck", 40, "no race in shared memory"),
    _ops(
        "ops",
        40,
        "float32 matrices beside plain PyTorch, eager and as graphs",
        "cuda.json",
        "(roof or flat and float32 or ill_conditioned or batched) and not (pure and graph)",
    ),
    _ops(
        "large T",
        33,
        "65 to 1024 tasks beside PyTorch's eigh, and beside the host's weights; rows as uneven as single examples'",
        "cuda-large.json",
        "many",
    ),
    _ops(
        "lists",
        20,
        "parameter lists: device time; what a call takes the host beside torch._foreach_norm and torch._foreach_mul_",
        "cuda-lists.json",
        "ragged and eager or ragged and fastmtl and graph or host_time",
        "benchmarks/test_ragged.py",
    ),
    _steps("mlp", 15, "an MLP"),
    _steps("resnet18", 25, "ResNet-18"),
    _steps("transformer", 25, "a transformer"),
    _steps("resnet50", 60, "ResNet-50"),
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


def folder_of(card: Card) -> str:
    """The name of a card's folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", card.name.lower()).strip("-") or "gpu"


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
    commit: str = "",
    rehearse: bool = False,
    say: Callable[[str], Any] = print,
) -> bool:
    """Runs what is not there yet and fits, and writes after each part; whether all parts passed."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, as its children would be
        signal.signal(signal.SIGINT, signal.default_int_handler)
    commit = commit or _commit()
    about = {"card": card.name, "torch": torch.__version__, "commit": commit, "rehearsal": rehearse}
    kept = _read(results, say)
    done = kept["parts"] if {key: kept.get(key) for key in about} == about else {}
    end = time.monotonic() + budget
    environment = {**os.environ, "FASTMTL_CUDA": "1", "TORCH_CUDA_ARCH_LIST": card.capability}
    environment |= {"FASTMTL_COMMIT": commit, "FASTMTL_REHEARSAL": "1" if rehearse else ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    results.parent.mkdir(parents=True, exist_ok=True)
    rehearsed: dict[tuple[str, ...], dict[str, Any]] = {}  # what stands for several parts is tried once
    for part in parts:
        left = end - time.monotonic()
        if (part.name in done and not _came_late(part, done[part.name])) or left < part.seconds:
            continue
        if lacking := _lacking(part, rehearse):
            say(f"{part.name}: needs {lacking}")
            continue
        say(f"{part.name}: {part.what}; about {part.seconds:.0f} of {left:.0f} s")
        if part.writes and not any(other.writes == part.writes and other.name in done for other in parts):
            (results.parent / part.writes).unlink(missing_ok=True)  # of another commit
        done[part.name] = rehearsed.get(part.rehearsal) or _result(
            part, results.parent, environment, left if rehearse else min(left, SPARE * part.seconds), rehearse
        )
        if rehearse and part.rehearsal:
            rehearsed[part.rehearsal] = done[part.name]
        _write(results, {**about, "parts": done})
        say(f"{part.name}: {done[part.name]['status']} in {done[part.name]['seconds']} s. {done[part.name]['said']}")
        if part is parts[0] and done[part.name]["status"] != "passed":
            say(done[part.name]["output"])
            break  # nothing of the rest would be of this commit
    for line in _summary(parts, done, results.parent):
        say(line)
    missing = [part.name for part in parts if part.name not in done]
    failed = [part.name for part in parts if part.name in done and done[part.name]["status"] != "passed"]
    for what, names in (("missing", missing), ("not passed", failed)):
        if names:
            say(f"{what}: {', '.join(names)}")
    return not missing and not failed


def _came_late(part: Part, result: dict[str, Any]) -> bool:
    """Whether a part was cut off because so little was left of the run: it gets another chance in the next one."""
    return result["status"].startswith("cut off") and result.get("limit", BUDGET) < SPARE * part.seconds


def _read(results: Path, say: Callable[[str], Any]) -> dict[str, Any]:
    """What an earlier run has left; a file that is none of ours is put aside."""
    if not results.is_file():
        return {}
    try:
        kept = json.loads(results.read_text(encoding="utf-8"))
        if isinstance(kept, dict) and all(isinstance(of["status"], str) for of in kept["parts"].values()):
            return kept
        why = "no results of parts"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error) or type(error).__name__
    aside = results.replace(results.with_suffix(".broken"))
    say(f"{results}: not readable ({why}); now {aside.name}, and everything is done anew")
    return {}


def _write(results: Path, content: dict[str, Any]) -> None:
    """In one go: whoever is killed meanwhile leaves the file as it was."""
    new = results.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(results)


def _lacking(part: Part, rehearse: bool) -> str:
    """What a part needs and does not find."""
    programs = [name for name in part.under[:1] if not rehearse and _program(name) is None]
    return ", ".join([*programs, *(name for name in part.needs if importlib.util.find_spec(name) is None)])


def _program(name: str) -> str | None:
    """Where a program is: on PATH, or among those of the CUDA toolkit."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", os.defpath), *(os.path.join(home, "bin") for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(folders))


def _result(part: Part, folder: Path, environment: dict[str, str], limit: float, rehearse: bool) -> dict[str, Any]:
    """A part's status, its last words and the end of what it printed."""
    words = part.rehearsal or part.command if rehearse else part.command
    under = [] if rehearse or not part.under else [_program(part.under[0]) or part.under[0], *part.under[1:]]
    command = [*under, sys.executable, *(word.replace("{folder}", str(folder)) for word in words)]
    start = time.monotonic()
    # Not a pipe: processes that outlive the command would keep it open.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            status = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = f"cut off after {limit:.0f} s"
        finally:
            _end(process)
        output.seek(0)
        printed = output.read().decode(errors="replace")
    said = next((line for line in reversed(printed.splitlines()) if line.strip()), "").strip("= ")
    # Tests that find no GPU are skipped, one and all, which pytest takes for success.
    if status == "passed" and not rehearse and "pytest" in part.command and not re.search(r"\b[1-9]\d* passed", said):
        status = "nothing ran"
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    seconds = round(time.monotonic() - start, 1)
    found = {"status": status, "seconds": seconds, "limit": limit, "date": date}
    return {**found, "said": said[-200:], "output": printed[-KEPT:]}


def _end(process: subprocess.Popen[bytes]) -> None:
    """As at a terminal, so that pytest writes what it has measured; then for good, with all that it started."""
    for number, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        if process.poll() is not None and number == signal.SIGINT:
            continue
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue


def _summary(parts: Sequence[Part], done: dict[str, Any], folder: Path) -> Iterator[str]:
    """What is measured: a line for each part that ran, and for each file of results."""
    for part in parts:
        if part.name in done:
            of = done[part.name]
            yield f"  {part.name:18} {of['status']:16} {of['seconds']:6.1f} s  {of['said']}"
    for name in dict.fromkeys(part.writes for part in parts if part.writes):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            cases = content["cases"] if "cases" in content else content["benchmarks"]
            yield f"  {name}: {len(cases)} {'models' if 'cases' in content else 'timings'}"
        except (OSError, ValueError, KeyError):
            yield f"  {name}: no results"


def _commit() -> str:
    """The last commit that changed more than results and documentation, and whether the code differs from it.

    Results are written while parts run: with them, every part would be of another commit than the one before.
    """
    others = (".", ":!benchmarks/results", ":!docs", ":!*.md")
    commit, changed = (
        subprocess.run(["git", *words, "--", *others], cwd=ROOT, capture_output=True, text=True, check=False).stdout
        for words in (("log", "-1", "--format=%h"), ("status", "--porcelain", "--untracked-files=no"))
    )
    return f"{commit.strip()}{'-dirty' if changed.strip() else ''}" if commit.strip() else "unknown"


def work(device: str) -> None:
    """A few small shapes of every kind of kernel, for the sanitizers."""
    # Every tensor is an allocation of its own, at whose end memcheck sees a kernel go on.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
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
    print("every kind of kernel ran")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="What wants a GPU, in nine minutes.")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds")
    parser.add_argument("--results", type=Path, help="a JSON file; default benchmarks/results/<card>/gpu.json")
    parser.add_argument("--commit", default="", help="what the code is called where there is no git")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU; results go to build/rehearsal")
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
    where = ROOT / "build" / "rehearsal" if options.rehearse else ROOT / "benchmarks" / "results" / folder_of(card)
    results = (options.results or where / "gpu.json").absolute()
    done = run(card, results, options.budget, commit=options.commit, rehearse=options.rehearse)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())

"""`python -m fastmtl scaling`: its options, and what it does with them."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from fastmtl.scaling.points import DTYPES, METHODS, Grid, names, numbers

__all__ = ["add_options", "run"]

DESCRIPTION = """\
Measures fastmtl beside plain PyTorch over a grid of sizes and settings, every result checked before it is timed.
Writes scaling.json, scaling.csv and plots into DIR, and prints how time grows beside theory.
"""
EPILOG = """\
A LIST is 2,3,5 or a range: 2:1024 is a, a·f, a·f², ... and b, where f is 2 for tasks, batch and threads, 10 for params
and kappa, and otherwise said in a:b:f. Points whose gradients do not fit --max-bytes, or that have fewer parameters
than tasks, are left out. A sweep that was killed goes on with the same command; a finished one is only drawn again.
"""


class _Option(NamedTuple):
    reader: Callable[[str], Any]
    default: str
    quick: str
    metavar: str
    help: str


def _above(least: float, kind: type = float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            raise ArgumentTypeError(
                f"expected {'an integer' if kind is int else 'a number'} >= {least:g}, got {text!r}"
            )
        return value

    return read


_AXES = {
    "tasks": _Option(numbers(2), "2:1024", "4:256:4", "LIST", "numbers of tasks T"),
    "params": _Option(numbers(10), "1e3:1e8", "1e3:1e5", "LIST", "numbers of parameters P"),
    "batch": _Option(numbers(2), "1", "1", "LIST", "matrices at once, B"),
    "dtype": _Option(names(*DTYPES), "float32", "float32", "LIST", f"of the gradients: {', '.join(DTYPES)}"),
    "threads": _Option(numbers(2), str(torch.get_num_threads()), str(torch.get_num_threads()), "LIST", "of the host"),
    "method": _Option(names(*METHODS), "AlignedMTL", "AlignedMTL", "LIST", f"methods: {', '.join(METHODS)}"),
    "kappa": _Option(numbers(10, whole=False), "1", "1,1e2,1e4", "LIST", "condition numbers of the gradients"),
    "gradients": _Option(
        names("random", "real"), "random", "random", "LIST", "random ones, or real ones of single examples (digits)"
    ),
}
_LIMITS = {
    "max_bytes": _Option(_above(1), "2e9", "1e8", "N", "what the gradients of a point may take"),
    "rounds": _Option(_above(3, int), "7", "5", "N", "rounds a point, at least 3"),
    "seconds": _Option(_above(0), "5", "0.5", "S", "what the rounds of a point may take, if that is enough for 3"),
}


def add_options(parser: ArgumentParser) -> None:
    """Gives the parser what the command understands."""
    parser.description, parser.epilog, parser.formatter_class = DESCRIPTION, EPILOG, RawDescriptionHelpFormatter
    for name, option in (_AXES | _LIMITS).items():
        text = f"{option.help} (default: {option.default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=option.reader, metavar=option.metavar, help=text)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for numbers and plots")
    parser.add_argument("--quick", action="store_true", help="small defaults: less than a minute on two slow cores")
    parser.add_argument("--redraw", action="store_true", help="only table and plots again, from DIR/scaling.json")


def run(options: Namespace, fail: Callable[[str], NoReturn]) -> int:
    """Runs the command.

    Args:
        options: as parsed.
        fail: ends the program with what is wrong with them.

    Returns:
        The exit status: 1 where a point ended with an error.

    Raises:
        ImportError: matplotlib is missing.
    """
    from fastmtl.scaling import plots  # first: without it, nothing is worth measuring
    from fastmtl.scaling.fit import table
    from fastmtl.scaling.machine import machine
    from fastmtl.scaling.study import Study, columns

    if options.redraw:
        path = options.out / "scaling.json"
        if not path.exists():
            fail(f"--redraw: expected {path}, which a finished sweep leaves")
        content = json.loads(path.read_text(encoding="utf-8"))
    else:
        if options.device == "cuda" and not torch.cuda.is_available():
            fail("--device: cuda asked for, but torch sees no GPU")
        settings = {}
        for name, option in (_AXES | _LIMITS).items():
            given = getattr(options, name)
            settings[name] = (
                option.reader(option.quick if options.quick else option.default) if given is None else given
            )
        grid = Grid.product(settings["max_bytes"], **{name: settings[name] for name in _AXES})
        print(
            f"{len(grid.points)} points; left out: {grid.large} that do not fit --max-bytes, "
            f"{grid.wide} with fewer parameters than tasks",
            file=sys.stderr,
        )
        if not grid.points:
            fail("no point is left")
        try:
            study = Study(options.out, {**settings, "device": options.device, "machine": machine(options.device)})
        except (ValueError, OSError) as error:
            fail(str(error))
        threads = torch.get_num_threads()
        try:
            content = study.write(study.run(grid.points, sys.stderr))
        except KeyboardInterrupt:
            print("interrupted: the same command goes on from here", file=sys.stderr)
            return 130
        finally:
            torch.set_num_threads(threads)
    print(table(map(columns, content["points"])) or "too few points to fit how time grows", flush=True)
    for file in plots.draw(content, options.out):
        print(f"wrote {file}", file=sys.stderr)
    wrong = [record for record in content["points"] if "error" in record]
    if wrong:
        print(
            f"{len(wrong)} of {len(content['points'])} points ended with an error; without their files "
            f"in {options.out / 'points'} they are measured again",
            file=sys.stderr,
        )
    return bool(wrong)

"""Runs a tutorial, a script in cells, and makes a page of it: prose, code, what each cell printed and drew.

    python tools/tutorials.py docs/tutorials/first_loop.py OUT    # writes OUT/first_loop.md and its pictures

A cell begins with `# %%`. One that begins with `# %% [markdown]` is prose: comments, without their `# `. Code runs cell
by cell in one namespace, in the folder OUT; figures that it saves there are shown below it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "tutorials"
PICTURES = (".svg", ".png")

__all__ = ["FOLDER", "Cell", "cells", "page", "run"]


class Cell(NamedTuple):
    """A piece of a tutorial.

    Attributes:
        source: its lines; of prose as Markdown.
        prose: whether it is prose.
        line: the number of its first line in the file.
        printed: what running it printed.
        pictures: names of the figures that it saved.
    """

    source: str
    prose: bool
    line: int
    printed: str = ""
    pictures: tuple[str, ...] = ()


def cells(text: str) -> Iterator[Cell]:
    """The cells of a script, not run; what stands before the first mark is one of code.

    Raises:
        ValueError: a line of prose that is no comment.
    """
    begins, prose, lines = 1, False, []
    for number, line in enumerate([*text.splitlines(), "# %%"], 1):
        if not line.startswith("# %%"):
            lines.append(line)
            continue
        source = "\n".join(lines).strip("\n")
        if source:
            if prose and (wrong := [part for part in lines if part and not part.startswith("#")]):
                raise ValueError(f"line {begins}: expected prose in comments, got {wrong[0]!r}")
            shown = re.sub(r"^# ?", "", source, flags=re.MULTILINE) if prose else source
            skipped = next(k for k, part in enumerate(lines) if part)
            yield Cell(shown, prose, begins + skipped)
        begins, prose, lines = number + 1, "[markdown]" in line, []


def run(path: Path, folder: Path, steps: int | None = None) -> list[Cell]:
    """Every cell of a tutorial, run in `folder`.

    Args:
        path: the script.
        folder: where it runs and saves its figures; there already.
        steps: takes the place of the script's `STEPS = ...`, for a short run.
    """
    text = path.read_text(encoding="utf-8")
    if steps is not None:
        text = re.sub(r"^STEPS = \d+", f"STEPS = {steps}", text, flags=re.MULTILINE)
    namespace: dict[str, object] = {"__name__": path.stem, "__file__": str(path)}
    done, seen, here = [], set(os.listdir(folder)), os.getcwd()
    os.chdir(folder)
    try:
        for cell in cells(text):
            if not cell.prose:
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    # Leading newlines make a traceback show the line of the script.
                    exec(compile("\n" * (cell.line - 1) + cell.source, path, "exec"), namespace)
                new = sorted(name for name in set(os.listdir(folder)) - seen if name.endswith(PICTURES))
                seen.update(new)
                cell = cell._replace(printed=said.getvalue(), pictures=tuple(new))
            done.append(cell)
    finally:
        os.chdir(here)
    return done


def page(done: list[Cell]) -> str:
    """The tutorial in Markdown."""
    pieces = []
    for cell in done:
        if cell.prose:
            pieces.append(cell.source)
            continue
        pieces.append(f"```python\n{cell.source}\n```")
        if cell.printed:
            pieces.append(f"```text\n{cell.printed.rstrip()}\n```")
        pieces += [f"![What the code above draws]({name})" for name in cell.pictures]
    return "\n\n".join(pieces) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Runs one tutorial and writes its page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("script", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    done = run(options.script.resolve(), options.out.resolve())
    (options.out / f"{options.script.stem}.md").write_text(page(done), encoding="utf-8")


if __name__ == "__main__":
    main()

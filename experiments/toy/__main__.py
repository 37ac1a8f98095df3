"""`python -m experiments.toy`: all methods from all starts for all task weights, a table of end points, the figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import torch

try:
    import typer
    from rich.console import Console
    from rich.markdown import Markdown

    from experiments.harness import Job, environment, sweep
    from experiments.toy import plots, report
except ImportError as error:
    raise ImportError(f"{error}: pip install 'fastmtl-torch[experiments]'") from error

from experiments.toy.methods import NAMES
from experiments.toy.training import train

T = TypeVar("T")
PAPER = (0.1, 0.25, 0.5, 0.75, 0.9)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    methods: Annotated[
        list[str] | None, typer.Option("--method", help=f"Repeat for several. Default: all of {', '.join(NAMES)}.")
    ] = None,
    a: Annotated[
        list[float] | None, typer.Option("--a", help="L0 = a L1 + (1-a) L2. Repeat for several. Default: the paper's.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam.")] = 35_000,
    seed: Annotated[int, typer.Option(help="Of the methods that draw.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 1000,
    record_every: Annotated[int, typer.Option(min=1, help="Steps from one point of a trajectory to the next.")] = 10,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each, that share the methods.")] = 2,
    out: Annotated[Path, typer.Option(help="Where runs lie, finished or to be resumed.")] = Path("runs/toy"),
    results: Annotated[Path | None, typer.Option(help="Where table and figures go. Default: --out.")] = None,
) -> None:
    """The toy problem of the paper (Appendix C): Figures 1 and 6, and where every run ends.

    Five starts, all methods and all task weights are one batch of problems: a step is one step of them all. A killed
    command goes on from its checkpoints when it is given again. In --results: ends.csv (one row a run), ends.json (the
    same, with settings and environment), table.md, trajectories.png (Figure 1), weights.png (Figure 6), ranks.png
    (Aligned-MTL under three rank rules) and methods.png.
    """
    names = _distinct(methods or NAMES)
    for name in names:
        if name not in NAMES:
            raise typer.BadParameter(f"expected one of {', '.join(NAMES)}, got {name!r}", param_hint="--method")
    shares = _distinct(a or PAPER)
    for share in shares:
        if not 0 <= share <= 1:
            raise typer.BadParameter(f"expected a number in [0, 1], got {share}", param_hint="--a")
    torch.set_num_threads(1)  # tensors of some hundred numbers
    common = {"a": shares, "steps": steps, "seed": seed, "save_every": save_every, "record_every": record_every}
    workers = min(workers, len(names))
    jobs = [
        Job(f"part-{part + 1}-of-{workers}", {"methods": names[part::workers], **common}) for part in range(workers)
    ]
    try:
        finished = sweep(out, jobs, train, workers=workers)
    except ValueError as error:  # --out has a run of other settings
        raise typer.BadParameter(str(error), param_hint="--out") from error
    ends = report.merged(names, [result["ends"] for result in finished.values()])
    target = results or out
    about = {"steps": steps, "seed": seed, "paper": report.paper(steps), "environment": environment()}
    report.write(target, ends, about)
    plots.write(target, out, jobs)
    Console().print(Markdown((target / "table.md").read_text()))


def _distinct(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    app(prog_name="python -m experiments.toy")

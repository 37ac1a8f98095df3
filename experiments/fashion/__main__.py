"""The command: `python -m experiments.fashion --help`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

try:
    import typer

    from experiments.harness import CHOICE, METHODS, supervised
except ImportError as error:
    raise ImportError(f"the experiments need {error.name}: pip install 'fastmtl-torch[experiments]'") from error
from experiments.fashion.data import FOLDER
from experiments.fashion.training import METRICS, OverlaidGarments, train_run

__all__ = ["app"]


@dataclass(frozen=True)
class Protocol:
    """What all runs of a sweep have in common."""

    pairs: int
    epochs: int
    batch: int
    lr: float


# The learning rate: of 1e-3, 3e-3 and 1e-2 the best for `uniform` (quick) on the validation split; all methods have it.
FULL = Protocol(pairs=120_000, epochs=40, batch=256, lr=1e-2)
QUICK = Protocol(pairs=20_000, epochs=8, batch=256, lr=1e-2)
ABOUT = (
    "Two Fashion-MNIST garments overlaid on 36x36 pixels, LeNet, accuracy in percent on the test pairs after the last "
    "epoch; no tuning of the learning rate by method. Not an experiment of the Aligned-MTL paper; the setting is Lin "
    "et al.'s (NeurIPS 2019), pairs and schedule are our own."
)
HELP = "20 000 training pairs, 8 epochs (full: 120 000, 40)"

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help=HELP)] = False,
    method: Annotated[list[str] | None, typer.Option(help=f"{CHOICE}; may be repeated.", show_default="all")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, …")] = 3,
    baselines: Annotated[bool, typer.Option(help="Train every garment alone too, which Δm needs.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Processes; with several, each has one thread.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Where the runs are, and continue.", show_default="runs/fashion/quick or …/full")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Another folder for table.md, table.csv, table.json.")] = None,
    data: Annotated[
        Path, typer.Option(help="Folder with the four idx files; Debian: apt-get install dataset-fashion-mnist.")
    ] = FOLDER,
    forecast: Annotated[bool, typer.Option("--forecast", help="Only time some steps of each method.")] = False,
    pairs: Annotated[int | None, typer.Option(min=8, help="Training pairs, instead of the protocol's.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the protocol's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Instead of the protocol's.")] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Adam's, instead of the protocol's.")] = None,
) -> None:
    """Two overlaid garments, each to be named: every method, each garment alone, Δm.

    Runs that are there already are not repeated, and a killed one continues from its last epoch: repeat the command.
    """
    given: dict[str, Any] = {"pairs": pairs, "epochs": epochs, "batch": batch, "lr": lr}
    protocol = replace(QUICK if quick else FULL, **{name: value for name, value in given.items() if value is not None})
    out = out or Path("runs/fashion") / ("quick" if quick else "full")
    settings = asdict(protocol)
    try:
        alone = [metric.task for metric in METRICS] if baselines else []
        planned = supervised.jobs(method or list(METHODS), alone, seeds, settings)
        problem = OverlaidGarments.of(data, protocol.pairs)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    about = {"experiment": ABOUT, "reduced": supervised.reduced(settings, asdict(FULL)), "settings": settings}
    supervised.conduct(
        problem,
        partial(train_run, data=data),
        planned,
        about,
        out=out,
        results=results,
        workers=workers,
        only_forecast=forecast,
    )


if __name__ == "__main__":
    app()

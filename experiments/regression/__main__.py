"""The command: `python -m experiments.regression --help`."""

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
from experiments.regression.data import TARGETS, default_folder, load
from experiments.regression.training import QM9, train_run

__all__ = ["app"]


@dataclass(frozen=True)
class Protocol:
    """What all runs of a sweep have in common; `molecules` None for all."""

    molecules: int | None
    epochs: int
    batch: int
    lr: float
    width: int


# The learning rate: of 1e-3, 3e-3 and 1e-2 the best for `uniform` (quick) on the validation split; all methods have it.
FULL = Protocol(molecules=None, epochs=100, batch=256, lr=3e-3, width=512)
QUICK = Protocol(molecules=20_000, epochs=40, batch=256, lr=3e-3, width=256)
# Not in the paper: there is no number of its to be compared with.
ABOUT = (
    "QM9, 11 targets, split 80:10:10; an MLP on fixed features of the geometry (not a message-passing network, and no "
    "tuning of the learning rate by method), mean absolute errors on the test split after the last epoch. Not an "
    "experiment of the Aligned-MTL paper, and not comparable with published QM9 numbers of message-passing networks."
)
HELP = "20 000 of 130 831 molecules, 40 epochs, width 256 (full: all, 100, 512)"

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help=HELP)] = False,
    method: Annotated[list[str] | None, typer.Option(help=f"{CHOICE}; may be repeated.", show_default="all")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, …")] = 3,
    baselines: Annotated[bool, typer.Option(help="Train every target alone too, which Δm needs.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Processes; with several, each has one thread.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the runs are, and continue.", show_default="runs/regression/quick or …/full"),
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Another folder for table.md, table.csv, table.json.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with qm9_part*.csv.", show_default="that of the package qm9pack")
    ] = None,
    forecast: Annotated[bool, typer.Option("--forecast", help="Only time some steps of each method.")] = False,
    molecules: Annotated[int | None, typer.Option(min=10, help="Instead of the protocol's.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the protocol's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Instead of the protocol's.")] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Adam's, instead of the protocol's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the hidden layers, instead of the protocol's.")] = None,
) -> None:
    """Eleven properties of QM9's molecules from their geometry: every method, every target alone, Δm.

    Runs that are there already are not repeated, and a killed one continues from its last epoch: repeat the command.
    """
    protocol = QUICK if quick else FULL
    given: dict[str, Any] = {"molecules": molecules, "epochs": epochs, "batch": batch, "lr": lr, "width": width}
    protocol = replace(protocol, **{name: value for name, value in given.items() if value is not None})
    out = out or Path("runs/regression") / ("quick" if quick else "full")
    settings = asdict(protocol)
    try:
        alone = [target.name for target in TARGETS] if baselines else []
        planned = supervised.jobs(method or list(METHODS), alone, seeds, settings)
        folder = data or default_folder()
        problem = QM9(*load(folder, out / "cache", protocol.molecules), protocol.width)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    about = {"experiment": ABOUT, "reduced": supervised.reduced(settings, asdict(FULL)), "settings": settings}
    supervised.conduct(
        problem,
        partial(train_run, data=folder, cache=out / "cache"),
        planned,
        about,
        out=out,
        results=results,
        workers=workers,
        only_forecast=forecast,
    )


if __name__ == "__main__":
    app()

"""Command line: `render` writes scenes in a data set's layout, `run` trains on them or on the real data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table as Screen

    from experiments.scene.plots import stability
    from experiments.scene.rooms import LAYOUTS, write
except ImportError as error:
    raise ImportError("experiments need more packages: pip install 'fastmtl-torch[experiments]'") from error

from experiments.harness import CHOICE, METHODS, sweep
from experiments.harness.supervised import SINGLE, jobs, report
from experiments.scene.benchmarks import BENCHMARKS, Benchmark
from experiments.scene.models import MODELS
from experiments.scene.training import costs, train

__all__ = ["app"]

# So that three seeds of five methods and of each task alone take about three quarters of an hour on two cores.
QUICK = {"width": 0.25, "epochs": 6, "halve_at": 4, "average": 2, "lr": 1e-3}


def _listed(protocol: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in protocol.items())


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="""Scene understanding (paper, section 6.2): NYUv2 with three tasks, Cityscapes with two and with three, or
    rooms that are rendered into the same files.""",
)


@app.command("render")
def render_command(
    out: Annotated[Path, typer.Option(help="The data set's root, as `run --data` takes it.")],
    layout: Annotated[str, typer.Option(help=f"One of {', '.join(LAYOUTS)}.")] = "nyuv2",
    train: Annotated[int, typer.Option(min=1, help="Scenes to train on.")] = 300,
    val: Annotated[int, typer.Option(min=1, help="Scenes to validate on.")] = 80,
    size: Annotated[str, typer.Option(help="Height x width.")] = "64x96",
    seed: Annotated[int, typer.Option(min=0, help="Other seeds make other rooms.")] = 0,
    labels: Annotated[str, typer.Option(help="cityscapes2: label_7, label (7 classes) or label_19.")] = "label_7",
) -> None:
    """Render furnished rooms into the files of a data set."""
    with _as_usage():
        write(out, layout, {"train": train, "val": val}, _size(size), seed, labels)


@app.command("run")
def run_command(
    data: Annotated[Path, typer.Option(help="The data set's root.")],
    benchmark: Annotated[str, typer.Option(help=f"One of {', '.join(BENCHMARKS)}.")] = "nyuv2",
    quick: Annotated[bool, typer.Option("--quick", help=f"For rendered rooms of 64x96: {_listed(QUICK)}.")] = False,
    method: Annotated[list[str] | None, typer.Option(help=f"{CHOICE}; may be repeated.", show_default="all")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, …")] = 3,
    baselines: Annotated[bool, typer.Option(help="Train every task alone too, which Δm needs.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time; with several, each has one thread.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Where the runs are, and continue.", show_default="runs/scene/<benchmark>")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Another folder for the table and the figure.")] = None,
    forecast: Annotated[bool, typer.Option("--forecast", help="Only time some steps of each method.")] = False,
    model: Annotated[str | None, typer.Option(help=f"{' or '.join(MODELS)}.", show_default="the paper's")] = None,
    width: Annotated[float | None, typer.Option(min=0.01, help="MTAN: factor on the number of filters.")] = None,
    weights: Annotated[Path | None, typer.Option(help="PSPNet: a file of torchvision's ResNet-50 weights.")] = None,
    classes: Annotated[int | None, typer.Option(help="cityscapes2: 7 or 19.", show_default="7")] = None,
    size: Annotated[str | None, typer.Option(help="cityscapes3: of images.", show_default="256x512")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Instead of the protocol's.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the protocol's.")] = None,
    halve_at: Annotated[
        int | None, typer.Option(min=0, help="Epochs before the learning rate is halved; 0: never.")
    ] = None,
    average: Annotated[int | None, typer.Option(min=1, help="Metrics are means over so many last epochs.")] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Adam's, instead of the protocol's.")] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between rows of log.csv.")] = 25,
    evaluate_every: Annotated[
        int, typer.Option(min=0, help="Epochs between evaluations; 0: only those reported.")
    ] = 10,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    loaders: Annotated[int, typer.Option(min=0, help="Processes that load samples; results do not depend on it.")] = 0,
) -> None:
    """Train every method, and each task alone; write metrics with Δm, and how stable the gradients were.

    Runs that are there already are not repeated, and a killed one continues from its last epoch: repeat the command.
    """
    console = Console()
    with _as_usage():
        if benchmark not in BENCHMARKS:
            raise ValueError(f"benchmark: expected one of {', '.join(BENCHMARKS)}, got {benchmark!r}")
        chosen = BENCHMARKS[benchmark]
        asked = {"batch": batch, "epochs": epochs, "halve_at": halve_at, "average": average, "lr": lr, "width": width}
        protocol = {
            **chosen.protocol,
            **(QUICK if quick else {}),
            **{name: value for name, value in asked.items() if value is not None},
        }
        if protocol["average"] > protocol["epochs"]:
            raise ValueError(f"average: expected at most the {protocol['epochs']} epochs, got {protocol['average']}")
        settings: dict[str, Any] = {
            "benchmark": benchmark,
            "classes": classes or chosen.classes[0],
            "size": _size(size) if size else chosen.sizes[0],
            "model": model or chosen.models[0],
            "weights": None if weights is None else str(weights),
            **protocol,
            "log_every": log_every,
            "evaluate_every": evaluate_every,
            "device": device,
        }
        tasks = chosen.tasks(settings["classes"])
        # What is missing had better be known before the first run.
        splits = {s: chosen.data(data, s, settings["classes"], settings["size"]) for s in ("train", "val")}
        planned = jobs(method or list(METHODS), [task.name for task in tasks] if baselines else [], seeds, settings)
    if forecast:
        _show(console, costs(planned, data), workers)
        return
    out = out or Path("runs/scene") / ("quick" if quick else benchmark)
    out.mkdir(parents=True, exist_ok=True)
    ended = sweep(out, planned, partial(train, data=data, loaders=loaders), workers=workers)
    folders = [out, *([results] if results else [])]
    metrics = [metric for task in tasks for metric in task.metrics]
    rendered = json.loads(file.read_text()) if (file := data / "rendered.json").exists() else None
    about = {
        "reduced": _reduced(chosen, settings, splits, rendered is not None),
        "settings": {name: value for name, value in settings.items() if name != "weights"},
        "rendered": rendered,
    }
    table = report(out, ended, planned, metrics, about, folders)
    runs: dict[str, list[Path]] = {}
    for job in planned:
        if job.settings["method"] != SINGLE:
            runs.setdefault(job.settings["method"], []).append(out / job.name)
    for folder in folders:
        stability(runs, folder / "stability.png")
    console.print(table.markdown(), soft_wrap=True)


@contextmanager
def _as_usage() -> Iterator[None]:
    """What is wrong with options or files, without a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise ValueError(f"size: expected HEIGHTxWIDTH, got {text!r}")
    return int(height), int(width)


def _reduced(benchmark: Benchmark, settings: Mapping[str, Any], splits: Mapping[str, Any], rendered: bool) -> list[str]:
    """In what the runs are not those of the paper."""
    reduced = [f"rendered rooms instead of {settings['benchmark']}"] if rendered else []
    size = next(iter(splits.values())).size
    if size not in benchmark.sizes:
        reduced.append(f"images of {size[0]}x{size[1]} instead of {benchmark.sizes[0][0]}x{benchmark.sizes[0][1]}")
    for split, samples in benchmark.samples.items():
        if len(splits[split]) != samples:
            reduced.append(f"{split} {len(splits[split])} instead of {samples}")
    for name, value in {**benchmark.protocol, "classes": benchmark.classes[0]}.items():
        if settings[name] != value:
            reduced.append(f"{name} {settings[name]} instead of {value}")
    if settings["model"] not in benchmark.models:
        reduced.append(f"{settings['model']} instead of {' or '.join(benchmark.models)}")
    if settings["model"] == "pspnet" and settings["weights"] is None:
        reduced.append("backbone not pretrained")
    return reduced


def _show(console: Console, rows: list[tuple[str, float, int, float]], workers: int) -> None:
    screen = Screen("runs of", "ms a step", "runs", "seconds each")
    for name, milliseconds, runs, seconds in rows:
        screen.add_row(name, f"{milliseconds:.0f}", str(runs), f"{seconds:.0f}")
    total = sum(runs * seconds for _, _, runs, seconds in rows) / 60
    console.print(screen)
    console.print(f"{total:.0f} minutes of one thread, {total / workers:.0f} with {workers} workers")


if __name__ == "__main__":
    app(prog_name="python -m experiments.scene")

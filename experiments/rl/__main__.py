"""The command: `python -m experiments.rl --help`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    from experiments.harness import Job, Metric, environment, summarize, sweep
    from experiments.rl import plots
except ImportError as error:
    raise ImportError(f"the experiments need {error.name}: pip install 'fastmtl-torch[rl]'") from error
from experiments.rl.environments import check_tasks
from experiments.rl.networks import NETWORKS
from experiments.rl.sac import METHODS, SINGLE, check
from experiments.rl.settings import PROTOCOLS, SUITES, Settings, reductions
from experiments.rl.training import measure, train

__all__ = ["app"]

QUICK = PROTOCOLS["quick"]
app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


def _setting(name: str, help: str) -> Any:
    """An option that replaces a number of the protocol."""
    full, quick = (getattr(PROTOCOLS[key], name) for key in ("full", "quick"))
    return typer.Option(help=help, show_default=f"{full}" if full == quick else f"{full}, with --quick {quick}")


@app.command()
def main(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"The reduced protocol: {', '.join(QUICK.tasks)}, {QUICK.steps} steps, 3×{QUICK.width} networks, "
            f"{QUICK.batch} transitions of each task in a batch.",
        ),
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(help=f"Tasks by name of the suite: {', '.join(SUITES)}.", show_default="the protocol's"),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Meta-World tasks instead, with commas between.", show_default="the protocol's")
    ] = None,
    network: Annotated[
        list[str] | None, typer.Option(help=f"Some of {', '.join(NETWORKS)}; may be repeated.", show_default="shared")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Some of {', '.join(METHODS)}; may be repeated. The network {SINGLE!r} is only trained as it is.",
            show_default="uniform and aligned",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, … (the paper: 10).")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes; with several, each has one thread.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Where the runs are, and continue.", show_default="runs/rl/quick or …/full")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Another folder for table.md, table.csv, table.json, success.png.")
    ] = None,
    forecast: Annotated[bool, typer.Option("--forecast", help="Only time some steps of each.")] = False,
    steps: Annotated[int | None, _setting("steps", "Of every environment; rounded up to whole episodes.")] = None,
    horizon: Annotated[int | None, _setting("horizon", "Steps of an episode.")] = None,
    init_steps: Annotated[int | None, _setting("init_steps", "Of random actions, before the first update.")] = None,
    goals: Annotated[
        int | None, _setting("goals", "Of each task, drawn from the seed. Meta-World's own benchmark has 50.")
    ] = None,
    width: Annotated[int | None, _setting("width", "Of hidden layers.")] = None,
    depth: Annotated[int | None, _setting("depth", "Number of hidden layers.")] = None,
    batch: Annotated[int | None, _setting("batch", "Transitions of each task in an update.")] = None,
    capacity: Annotated[int | None, _setting("capacity", "Transitions of each task that the replay holds.")] = None,
    lr: Annotated[float | None, _setting("lr", "Adam's, for critics, actor and temperatures.")] = None,
    discount: Annotated[float | None, _setting("discount", "Of future rewards, γ.")] = None,
    tau: Annotated[float | None, _setting("tau", "Share of the critics that goes into their targets, τ.")] = None,
    update_every: Annotated[
        int | None, _setting("update_every", "Steps of every environment from one update to the next.")
    ] = None,
    temperature: Annotated[str | None, _setting("temperature", "per-task, or shared: one for all tasks.")] = None,
    evaluate_every: Annotated[
        int | None,
        _setting(
            "evaluate_every", "Steps from one evaluation, with a checkpoint, to the next; rounded up to whole episodes."
        ),
    ] = None,
    evaluation_episodes: Annotated[
        int | None,
        _setting(
            "evaluation_episodes", "Of each task, at most --goals: the policy's mean acts, others would be repetitions."
        ),
    ] = None,
) -> None:
    """Multi-task soft actor-critic on Meta-World, Table 5 of the paper: networks × methods × seeds.

    The protocol is the paper's (MT10, 2 million steps of every environment: days of a processor for each run, see
    --forecast) unless --quick or single options reduce it. The methods balance critic, actor and temperature losses,
    each on its own; `-ub` methods need the network multi-head. Runs that are there already are not repeated, and a
    killed one continues from its last evaluation with the same numbers: repeat the command.
    """
    given: dict[str, Any] = {
        "steps": steps,
        "horizon": horizon,
        "init_steps": init_steps,
        "goals": goals,
        "width": width,
        "depth": depth,
        "batch": batch,
        "capacity": capacity,
        "lr": lr,
        "discount": discount,
        "tau": tau,
        "update_every": update_every,
        "temperature": temperature,
        "evaluate_every": evaluate_every,
        "evaluation_episodes": evaluation_episodes,
    }
    if suite is not None:
        if suite not in SUITES or tasks is not None:
            raise typer.BadParameter(f"suite: expected one of {', '.join(SUITES)}, and no --tasks, got {suite!r}")
        given["tasks"] = SUITES[suite]
    if tasks is not None:
        given["tasks"] = tuple(name.strip() for name in tasks.split(","))
    try:
        protocol = PROTOCOLS["quick" if quick else "full"]
        settings = replace(protocol, **{name: value for name, value in given.items() if value is not None})
        check_tasks(settings.tasks)
        kinds = _kinds(network or ["shared"], method or ["uniform", "aligned"], settings)
        jobs = {name: [_job(name, kind, seed) for seed in range(seeds)] for name, kind in kinds.items()}
        if forecast:
            _forecast(jobs)
            return
        out = out or Path("runs/rl") / ("quick" if quick else "full")
        finished = sweep(out, [job for same in jobs.values() for job in same], train, workers=workers)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _report(settings, jobs, finished, out, [out] if results is None else [out, results])


def _kinds(networks: list[str], methods: list[str], settings: Settings) -> dict[str, dict[str, Any]]:
    """What is trained with every seed, by the name of its row."""
    kinds: dict[str, dict[str, Any]] = {}
    for network in dict.fromkeys(networks):
        for method in dict.fromkeys(["uniform"] if network == SINGLE else methods):
            check(network, method)
            name = "single-task" if network == SINGLE else f"{network} {method}"
            kinds[name] = {**asdict(settings), "network": network, "method": method}
    return kinds


def _job(name: str, kind: dict[str, Any], seed: int) -> Job:
    return Job(f"{name.replace(' ', '-')}/seed-{seed}", {**kind, "seed": seed})


def _forecast(jobs: dict[str, list[Job]]) -> None:
    columns = ["environments ms", "policy ms", "update ms", "hours of a run", "runs", "hours together"]
    table = Table("", *columns, title="processor time of one thread")
    for name, same in jobs.items():
        cost = measure(same[0].settings)
        hours = cost["run"] / 3600
        parts = [f"{cost[part]:.2f}" for part in ("environments", "policy", "update")]
        table.add_row(name, *parts, f"{hours:.2f}", str(len(same)), f"{hours * len(same):.2f}")
    Console().print(table)


def _report(
    settings: Settings, jobs: dict[str, list[Job]], finished: dict[str, dict[str, Any]], out: Path, folders: list[Path]
) -> None:
    columns = ["success", "best", *(f"success {name}" for name in settings.tasks), "return"]
    table = summarize(
        {name: [finished[job.name] for job in same] for name, same in jobs.items()},
        [Metric(column, True, column) for column in columns],
    )
    about = {
        "experiment": "Multi-task SAC on Meta-World. success: share of evaluation episodes that succeed at any step, "
        "over the last tenth of training; best: that of the best evaluation; mean ± standard error over seeds.",
        "reduced": reductions(settings, {name: len(same) for name, same in jobs.items()}),
        "settings": asdict(settings),
        "environment": environment(),
    }
    for folder in folders:
        table.write(folder, about)
        runs = {name: [out / job.name for job in same] for name, same in jobs.items()}
        plots.learning_curves(folder / "success.png", runs, settings.tasks)
    Console().print(Markdown(table.markdown()))
    Console().print(f"reduced: {about['reduced']}\n{', '.join(str(folder) for folder in folders)}", soft_wrap=True)


if __name__ == "__main__":
    app()

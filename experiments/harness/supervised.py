"""Supervised experiments on data that fit into memory: a shared trunk, a head for each task, trained epoch by epoch.

An experiment says what its data, networks, losses and metrics are (`Problem`); here are the training of one run
(`train`), the runs of an experiment (`jobs`), their table (`report`), a forecast of what they cost (`forecast`), and
all of these in a row (`conduct`).

A run trains with Adam and a cosine schedule, which ends at zero, so that the last epoch is the one that counts: its
network is scored on the test split. The validation split is scored and logged after every epoch, and chooses nothing.
Runs of the same seed start from the same trunk and see the same batches, whatever the method, unless it draws from the
same generator (GradDrop, GradVac, PCGrad, RLW, …).
"""

from __future__ import annotations

import csv
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich
import rich.table
import torch
from torch import Tensor, nn

import fastmtl
from experiments.harness.balancing import Balancer, check_name
from experiments.harness.run import Run, environment
from experiments.harness.sweep import Job, Track, sweep
from experiments.harness.tables import Metric, Table, summarize

__all__ = ["SINGLE", "Problem", "SharedTrunk", "Split", "conduct", "forecast", "jobs", "reduced", "report", "train"]

SINGLE = "single"  # the method of a run that trains one task alone, `settings["task"]`


class Split(NamedTuple):
    """Inputs [N, ...] and targets [N, T], column t for task t."""

    inputs: Tensor
    targets: Tensor


class Problem(ABC):
    """T tasks on the same inputs.

    Attributes:
        metrics: one for each task, in the order of the targets' columns.
        training: what is trained on.
        validation: what is scored after every epoch.
        test: what the result is scored on.
    """

    metrics: Sequence[Metric]
    training: Split
    validation: Split
    test: Split

    @abstractmethod
    def encoder(self) -> nn.Module:
        """A new trunk: inputs [B, ...] to a representation [B, H]."""

    @abstractmethod
    def head(self) -> nn.Module:
        """A new head: a representation [B, H] to outputs [B, ...]."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a task, a scalar, from a head's outputs [B, ...] and targets [B]."""

    @abstractmethod
    def score(self, task: int, outputs: Tensor, targets: Tensor) -> float:
        """The metric of a task from outputs [N, ...] and targets [N]."""


class SharedTrunk(nn.Module):
    """A trunk and heads of a problem, one for each of `tasks` (indices)."""

    def __init__(self, problem: Problem, tasks: Sequence[int]) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.encoder = problem.encoder()
        self.heads = nn.ModuleList(problem.head() for _ in tasks)

    def forward(self, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Outputs of each head, and the representation they come from."""
        representation = self.encoder(inputs)
        return [head(representation) for head in self.heads], representation


class _Training:
    """The parts of one run, made from its settings: `method`, `task`, `seed`, `epochs`, `batch`, `lr`."""

    def __init__(self, problem: Problem, settings: Mapping[str, Any]) -> None:
        torch.manual_seed(settings["seed"])
        self.problem, self.batch = problem, settings["batch"]
        names = [metric.task for metric in problem.metrics]
        single = settings["method"] == SINGLE
        self.model = SharedTrunk(problem, [names.index(settings["task"])] if single else range(len(names)))
        self.balancer = Balancer("uniform" if single else settings["method"], len(self.model.tasks))
        parameters = [*self.model.parameters(), *self.balancer.parameters()]
        self.optimizer = torch.optim.Adam(parameters, settings["lr"])
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, settings["epochs"])

    @property
    def parts(self) -> dict[str, Any]:
        """All that a checkpoint has to hold."""
        return {
            "model": self.model,
            "balancer": self.balancer,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }

    def batches(self) -> Iterator[Tensor]:
        """Indices of one epoch's batches, in a new order."""
        yield from torch.randperm(len(self.problem.training.inputs)).split(self.batch)

    def step(self, rows: Tensor) -> tuple[list[Tensor], fastmtl.Info | None]:
        """One step of the optimizer: the losses before it, and what the method saw."""
        inputs, targets = (part[rows] for part in self.problem.training)

        def losses(outputs: Sequence[Tensor]) -> list[Tensor]:
            return [self.problem.loss(out, targets[:, t]) for t, out in zip(self.model.tasks, outputs, strict=True)]

        outputs, representation = self.model(inputs)
        before = losses(outputs)
        self.optimizer.zero_grad()
        info = self.balancer.backward(before, self.model.encoder.parameters(), representation)
        self.optimizer.step()

        @torch.no_grad()
        def again() -> list[Tensor]:
            return losses(self.model(inputs)[0])

        self.balancer.after_step(again)
        return [loss.detach() for loss in before], info

    def epoch(self) -> dict[str, float]:
        """One epoch; what there is to log about it."""
        self.model.train()
        # Nothing of the last epoch is kept: the monitor is no part of the checkpoint.
        seen, monitor = [], fastmtl.Monitor()
        for rows in self.batches():
            losses, info = self.step(rows)
            seen.append(torch.stack(losses))
            if info is not None and info.gram is not None:
                monitor.record(info)
        self.schedule.step()
        self.balancer.end_epoch()
        mean = torch.stack(seen).mean(0).tolist()
        names = [self.problem.metrics[t].task for t in self.model.tasks]
        numbers = {f"{name} loss": loss for name, loss in zip(names, mean, strict=True)}
        history = monitor.history
        if "initial/condition_number" in history:  # else the method saw no Gram matrix
            numbers["median condition number"] = statistics.median(history["initial/condition_number"].tolist())
            numbers["mean min cosine"] = statistics.fmean(history["initial/min_cosine"].tolist())
        return numbers

    @torch.no_grad()
    def scores(self, split: Split) -> dict[str, float]:
        """Metrics of the tasks by name."""
        self.model.eval()
        chunks = [self.model(inputs)[0] for inputs in split.inputs.split(1000)]
        outputs = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
        return {
            self.problem.metrics[t].name: self.problem.score(t, out, split.targets[:, t])
            for t, out in zip(self.model.tasks, outputs, strict=True)
        }


def reduced(settings: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, str]:
    """What stands beside a table about the settings that are not those of the full protocol; None means all."""

    def name(value: Any) -> str:
        return "all" if value is None else str(value)

    return {key: f"{name(settings[key])} (full: {name(full[key])})" for key in full if settings[key] != full[key]}


def conduct(
    problem: Problem,
    train_run: Callable[[Run, Track], dict[str, Any]],
    planned: Sequence[Job],
    about: Mapping[str, Any],
    *,
    out: Path,
    results: Path | None,
    workers: int,
    only_forecast: bool,
) -> None:
    """An experiment from its runs to its table, which is printed and written; or only what that will cost.

    Args:
        problem: the data and networks.
        train_run: trains one run; a function of a module, or a `functools.partial` of one.
        planned: the runs.
        about: what to say beside the table.
        out: the folder of the runs, and of the table.
        results: another folder for the table.
        workers: processes, see `sweep`.
        only_forecast: prints `forecast` and trains nothing.
    """
    if only_forecast:
        table = rich.table.Table("method", "ms a step", "runs", "s a run", title="forecast on one thread")
        costs = forecast(problem, planned)
        for name, step, runs, seconds in costs:
            table.add_row(name, f"{step:.2f}", str(runs), f"{seconds:.0f}")
        rich.print(table)
        total = sum(runs * seconds for _, _, runs, seconds in costs)
        print(f"all runs: {total / 60:.0f} minutes on one thread, {total / workers / 60:.0f} with {workers} worker(s)")
        return
    done = sweep(out, planned, train_run, workers=workers)
    folders = [out] if results is None else [out, results]
    print(report(out, done, planned, problem.metrics, about, folders).markdown())


def train(run: Run, track: Track, problem: Problem) -> dict[str, float]:
    """Trains one run, from its last complete epoch where there is one, to its metrics on the test split.

    Args:
        run: with settings `method` (that a `Balancer` takes, or "single" with `task`, the name of the task that is
            trained alone), `seed`, `epochs`, `batch` and `lr`; others are the problem's.
        track: wraps the loop over epochs, to show how far it is.
        problem: the data and networks.

    Returns:
        What it gave `run.finish`: the test metrics of the tasks by name.
    """
    training = _Training(problem, run.settings)
    for epoch in track(range(run.restore(**training.parts), run.settings["epochs"])):
        start, processor = time.perf_counter(), time.process_time()
        numbers = training.epoch()
        scores = {f"validation {name}": score for name, score in training.scores(problem.validation).items()}
        took = {"processor": time.process_time() - processor, "seconds": time.perf_counter() - start}
        run.log(epoch, **numbers, **scores, **took)
        run.save(epoch + 1, **training.parts)
    return run.finish(**training.scores(problem.test))


def jobs(methods: Sequence[str], tasks: Sequence[str], seeds: int, settings: Mapping[str, Any]) -> list[Job]:
    """The runs of an experiment: every task alone, then every method, each with seeds 0, 1, ….

    Args:
        methods: names that a `Balancer` takes.
        tasks: names of the tasks to be trained alone.
        seeds: how many.
        settings: the other settings of every run.

    Raises:
        ValueError: a method that there is not.
    """
    for method in methods:
        check_name(method)
    kinds: list[tuple[str, dict[str, Any]]] = [(f"{SINGLE}-{task}", {"method": SINGLE, "task": task}) for task in tasks]
    kinds += [(method, {"method": method, "task": None}) for method in methods]
    return [
        Job(f"{name}/seed-{seed}", {**settings, **kind, "seed": seed}) for name, kind in kinds for seed in range(seeds)
    ]


def report(
    root: Path,
    results: Mapping[str, Mapping[str, float]],
    done: Sequence[Job],
    metrics: Sequence[Metric],
    about: Mapping[str, Any],
    folders: Sequence[Path],
) -> Table:
    """The table of a sweep, with Δm where every task was trained alone too.

    Args:
        root: the folder of the sweep.
        results: what `sweep` returned.
        done: its jobs.
        metrics: one for each task.
        about: what else to say beside the table; the environment is added, and how long runs took, by the clock and of
            processor time.
        folders: where table.md, table.csv and table.json are written.
    """
    by_method: dict[str, list[Mapping[str, float]]] = {}
    alone: dict[int, dict[str, float]] = {}
    columns = "seconds", "processor"
    times: dict[str, dict[str, list[float]]] = {column: {} for column in columns}
    for job in done:
        method, seed = job.settings["method"], job.settings["seed"]
        for column in columns:
            times[column].setdefault(method, []).append(_total(root / job.name, column))
        if method == SINGLE:
            alone.setdefault(seed, {}).update(results[job.name])
        else:
            by_method.setdefault(method, []).append(results[job.name])
    table = summarize(by_method, metrics, list(alone.values()) or None)
    wall, processor = (
        {method: round(statistics.fmean(each), 1) for method, each in times[column].items()} for column in columns
    )
    took = {"mean seconds per run": wall, "mean processor seconds per run": processor}
    for folder in folders:
        table.write(folder, {**about, **took, "environment": environment()})
    return table


def forecast(problem: Problem, planned: Sequence[Job], steps: int = 8) -> list[tuple[str, float, int, float]]:
    """What each kind of run will cost on one thread, from a few steps of each. Reads no run and writes none.

    Args:
        problem: the data and networks.
        planned: the runs.
        steps: how many steps are timed, after two that are not.

    Returns:
        For each method (single-task runs of all tasks together): its name, milliseconds per step, how many runs are
        planned, and the processor seconds of one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kinds: dict[str, list[Job]] = {}
        for job in planned:
            kinds.setdefault(job.settings["method"], []).append(job)
        return [(name, *_cost(problem, same[0].settings, steps, len(same))) for name, same in kinds.items()]
    finally:
        torch.set_num_threads(threads)


def _cost(problem: Problem, settings: Mapping[str, Any], steps: int, runs: int) -> tuple[float, int, float]:
    training = _Training(problem, settings)
    batches = list(training.batches())
    for rows in batches[:2]:
        training.step(rows)
    # Processor time: that of one thread, whatever else the machine does.
    start = time.process_time()
    for n in range(steps):
        training.step(batches[n % len(batches)])
    step = (time.process_time() - start) / steps
    start = time.process_time()
    training.scores(problem.validation)
    epoch = step * len(batches) + time.process_time() - start
    return 1e3 * step, runs, epoch * settings["epochs"]


def _total(folder: Path, column: str) -> float:
    with (folder / "log.csv").open(newline="") as file:
        return sum(float(row[column]) for row in csv.DictReader(file))

"""Many runs: methods x seeds, one after the other or in several processes. Finished runs are not repeated."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.harness.run import Run

__all__ = ["Job", "Track", "sweep"]

Track = Callable[[Iterable[Any]], Iterable[Any]]  # shows how far a loop is: `for step in track(range(start, steps))`
Train = Callable[[Run, Track], dict[str, Any]]  # reads `run.settings`, trains, and returns what it gave `run.finish`


@dataclass(frozen=True)
class Job:
    """A run to be done: its folder under the sweep's and its settings (JSON, with all that `train` has to know)."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


def sweep(root: Path, jobs: Sequence[Job], train: Train, *, workers: int = 1) -> dict[str, dict[str, Any]]:
    """Does every job that is not finished, in order, and shows progress.

    Args:
        root: a folder for the sweep; each job has a folder of its name in it.
        jobs: what to do.
        train: a function of a module (not a closure, where there are several workers): trains a run to its result.
        workers: processes; with more than one, each has one thread.

    Returns:
        The results by job name.
    """
    results: dict[str, dict[str, Any]] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        total = progress.add_task("runs", total=len(jobs))
        for name, result in _each(root, jobs, train, workers, progress):
            results[name] = result
            progress.advance(total)
    return {job.name: results[job.name] for job in jobs}


def _each(root: Path, jobs: Sequence[Job], train: Train, workers: int, progress: Progress):
    if workers == 1:
        for job in jobs:
            shown = progress.add_task(job.name, total=None)

            def track(loop: Iterable[Any], shown: Any = shown) -> Iterable[Any]:
                return progress.track(loop, task_id=shown)

            yield job.name, _do(root, job, train, track)
            progress.remove_task(shown)
        return
    # Spawned: a forked process would inherit threads that do not survive the fork.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker) as pool:
        futures = {pool.submit(_do, root, job, train, iter): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future].name, future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A killed parent cannot stop its workers, and the next sweep would find them at work in its folders.
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _do(root: Path, job: Job, train: Train, track: Track) -> dict[str, Any]:
    run = Run(root / job.name, job.settings)
    return run.result if run.result is not None else train(run, track)

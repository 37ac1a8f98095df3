"""One training run: schedule, diagnostics, checkpoints, metrics.

A checkpoint is written after each epoch. The order of samples and their augmentation depend on the seed and the number
of the epoch alone: runs of the same seed see the same batches, whatever their method, and a resumed one those that it
would have seen.

Every `log_every` steps, and at the end of an epoch, log.csv has the mean losses since the row before, and of that step
the condition number, the smallest gradient magnitude similarity and the smallest cosine of the tasks' gradients of the
*shared parameters*. These are measured by T more backward passes, for every method: the upper bounds aggregate other
gradients, and methods on losses none.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastmtl
from experiments.harness import Balancer, Job, Run
from experiments.harness.supervised import SINGLE
from experiments.harness.sweep import Track
from experiments.scene.benchmarks import BENCHMARKS
from experiments.scene.data import batches
from experiments.scene.models import make

__all__ = ["Training", "costs", "train"]

MEASURES = ("condition_number", "min_magnitude_similarity", "min_cosine", "max_norm_ratio")


class Training:
    """The parts of one run, made from its settings.

    Args:
        settings: `benchmark`, `classes`, `size`; `model`, `width`, `weights`; `method`, `task` (the one
            that the method "single" trains alone), `seed`; `batch`, `epochs`, `halve_at`, `average`, `lr`; `log_every`,
            `evaluate_every`; `device`.
        data: the data set's root.
        loaders: processes that load samples, which changes no result.
    """

    def __init__(self, settings: Mapping[str, Any], data: Path, loaders: int = 0) -> None:
        torch.manual_seed(settings["seed"])
        self.settings, self.loaders = settings, loaders
        benchmark = BENCHMARKS[settings["benchmark"]]
        single = settings["method"] == SINGLE
        self.tasks = [t for t in benchmark.tasks(settings["classes"]) if not single or t.name == settings["task"]]
        self.train_data, self.val_data = (
            benchmark.data(data, split, settings["classes"], tuple(settings["size"])) for split in ("train", "val")
        )
        self.steps = len(self.train_data) // settings["batch"]
        weights = settings["weights"]
        model = make(
            settings["model"],
            [task.channels for task in self.tasks],
            settings["width"],
            None if weights is None else Path(weights),
        )
        self.device = torch.device(settings["device"])
        # What oneDNN's convolutions work in, so that nothing is reordered.
        self.format = torch.channels_last if self.device.type == "cpu" else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=self.format)
        self.shared = self.model.shared()
        self.balancer = Balancer("uniform" if single else settings["method"], len(self.tasks)).to(self.device)
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *self.balancer.parameters()], settings["lr"])
        self.history = _History()

    @property
    def parts(self) -> dict[str, Any]:
        """All that a checkpoint has to hold."""
        return {
            "model": self.model,
            "balancer": self.balancer,
            "optimizer": self.optimizer,
            "history": self.history,
        }

    def epoch(self, epoch: int, run: Run) -> None:
        """One epoch of training, logged, with an evaluation where one is due."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s["lr"] / 2 if 0 < s["halve_at"] <= epoch else s["lr"]
        self.model.train()
        start, processor = time.perf_counter(), time.process_time()
        seen: list[Tensor] = []
        samples = batches(self.train_data, s["batch"], 1_000_003 * s["seed"] + epoch, self.loaders)
        for n, batch in enumerate(samples, 1):
            last = n == self.steps
            due = last or n % s["log_every"] == 0
            losses, measures = self.step(batch, due)
            seen.append(losses)
            if last:
                self.balancer.end_epoch()
                self._evaluate(epoch)
            if due:
                now, then = time.perf_counter(), time.process_time()
                means = dict(
                    zip((f"{t.name} loss" for t in self.tasks), torch.stack(seen).mean(0).tolist(), strict=True)
                )
                took = {"processor": then - processor, "seconds": now - start}
                run.log(epoch * self.steps + n - 1, epoch=epoch, **means, **measures, **took)
                start, processor, seen = now, then, []

    def step(self, batch: Mapping[str, Tensor], measure: bool = False) -> tuple[Tensor, dict[str, float]]:
        """One step of the optimizer: the losses before it [T], and with `measure` the diagnostics."""
        batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
        outputs, representation = self.outputs(batch)
        losses = self._losses(outputs, batch)
        measures = self._measure(losses) if measure else {}
        self.optimizer.zero_grad()
        self.balancer.backward(losses, self.shared, representation)
        self.optimizer.step()
        self.balancer.after_step(lambda: self._again(batch))
        return torch.stack(losses).detach(), measures

    def outputs(self, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], Any]:
        """Each task's output, of its target's size, and the representation."""
        raws, representation = self.model(batch["image"].contiguous(memory_format=self.format))
        outputs = []
        for task, raw in zip(self.tasks, raws, strict=True):
            size = batch[task.name].shape[-2:]
            if raw.shape[-2:] != size:
                raw = F.interpolate(raw, size, mode="bilinear")
            outputs.append(task.output(raw))
        return outputs, representation

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Metrics over the validation split by name."""
        self.model.eval()
        meters = [task.meter() for task in self.tasks]
        for batch in batches(self.val_data, 2 * self.settings["batch"], workers=self.loaders):
            batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
            for task, meter, output in zip(self.tasks, meters, self.outputs(batch)[0], strict=True):
                meter.update(output, batch[task.name])
        self.model.train()
        return {name: value for meter in meters for name, value in meter.compute().items()}

    def _losses(self, outputs: Sequence[Tensor], batch: Mapping[str, Tensor]) -> list[Tensor]:
        return [task.loss(out, batch[task.name]) for task, out in zip(self.tasks, outputs, strict=True)]

    @torch.no_grad()
    def _again(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        return self._losses(self.outputs(batch)[0], batch)

    def _measure(self, losses: Sequence[Tensor]) -> dict[str, float]:
        rows = [torch.autograd.grad(loss, self.shared, retain_graph=True, allow_unused=True) for loss in losses]
        gram = fastmtl.ops.gram_rows([g for row in rows for g in row], len(losses))
        summary = fastmtl.diagnostics.summary(gram, torch.float32)
        return {name: summary[name].item() for name in MEASURES}

    def _evaluate(self, epoch: int) -> None:
        s = self.settings
        done = epoch + 1
        if done > s["epochs"] - s["average"] or (s["evaluate_every"] and done % s["evaluate_every"] == 0):
            self.history.rows.append({"epoch": epoch, **self.scores()})


def train(run: Run, track: Track, data: Path, loaders: int = 0) -> dict[str, Any]:
    """Trains one run, from its last complete epoch where there is one.

    Args:
        run: its settings are those of `Training`.
        track: wraps the loop over epochs, to show how far it is.
        data: as in `Training`.
        loaders: as in `Training`.

    Returns:
        What it gave `run.finish`: the metrics, averaged over the last `average` epochs, and as `validation` those of
        every epoch that was evaluated.
    """
    training = Training(run.settings, data, loaders)
    done = run.restore(**training.parts) // training.steps
    for epoch in track(range(done, run.settings["epochs"])):
        training.epoch(epoch, run)
        run.save((epoch + 1) * training.steps, **training.parts)
    last = training.history.rows[-run.settings["average"] :]
    metrics = [metric.name for task in training.tasks for metric in task.metrics]
    means = {name: sum(row[name] for row in last) / len(last) for name in metrics}
    return run.finish(**means, validation=training.history.rows)


def costs(jobs: Sequence[Job], data: Path, steps: int = 6) -> list[tuple[str, float, int, float]]:
    """What each kind of run costs in processor time of one thread, from a few steps of each. Writes no run.

    Args:
        jobs: the runs.
        data: the data set's root.
        steps: how many steps are timed, after two that are not.

    Returns:
        For each kind: its name, milliseconds a step, the number of runs, and the seconds of one, evaluations included.
    """
    kinds: dict[str, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(job.name.partition("/")[0], []).append(job)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [(name, *_cost(same[0].settings, data, steps, len(same))) for name, same in kinds.items()]
    finally:
        torch.set_num_threads(threads)


def _cost(settings: Mapping[str, Any], data: Path, steps: int, runs: int) -> tuple[float, int, float]:
    training = Training(settings, data)
    training.model.train()
    start = time.process_time()
    loaded = list(itertools.islice(batches(training.train_data, settings["batch"], 0), steps))
    load = (time.process_time() - start) / len(loaded)
    for n in range(2 + steps):
        if n == 2:
            start = time.process_time()
        training.step(loaded[n % len(loaded)])
    step = (time.process_time() - start) / steps + load
    start = time.process_time()
    training.step(loaded[0], measure=True)
    measure = max(time.process_time() - start - step, 0)
    start = time.process_time()
    training.scores()
    scores = time.process_time() - start
    epochs, every, evaluate = settings["epochs"], settings["log_every"], settings["evaluate_every"]
    evaluations = settings["average"] + (epochs // evaluate if evaluate else 0)
    epoch = training.steps * step + -(-training.steps // every) * measure
    return 1e3 * step, runs, epochs * epoch + evaluations * scores


class _History:
    """The metrics of epochs that were evaluated, as a part of a checkpoint."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> list[dict[str, float]]:
        return self.rows

    def load_state_dict(self, state: list[dict[str, float]]) -> None:
        self.rows = list(state)

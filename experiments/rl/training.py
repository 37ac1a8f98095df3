"""A run: episodes of all environments side by side, an update after each step, evaluations in between."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import fastmtl
from experiments.harness import Run
from experiments.harness.sweep import Track
from experiments.rl.environments import Environments, MetaWorld, seeds
from experiments.rl.replay import Replay
from experiments.rl.sac import Agent, Update
from experiments.rl.settings import Settings

__all__ = ["Factory", "Training", "measure", "train"]

Factory = Callable[[Sequence[str]], Environments]  # from the names of the tasks


class Training:
    """The parts of one run, made from its settings: those of `Settings`, and `network`, `method` and `seed`."""

    def __init__(self, run: dict[str, Any], make: Factory) -> None:
        self.settings, self.seed = Settings.of(run), run["seed"]
        torch.manual_seed(self.seed)
        s = self.settings
        self.environments = make(s.tasks)
        shape = self.environments.observations, self.environments.actions
        self.agent = Agent(run["network"], run["method"], s, *shape)
        self.replay = Replay(len(s.tasks), s.horizon, s.capacity, *shape)
        self.last: Update | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """All that a checkpoint has to hold."""
        return {**self.agent.parts, "replay": self.replay}

    def episode(self, number: int) -> np.ndarray:
        """One training episode: the return of each task [T]."""
        s, T = self.settings, len(self.settings.tasks)
        goals = np.random.default_rng((self.seed, number)).integers(s.goals, size=T).tolist()
        observations = self.environments.reset(seeds(self.seed, T, goals))
        self.replay.begin(observations)
        returns = np.zeros(T)
        for step in range(number * s.horizon, (number + 1) * s.horizon):
            if step < s.init_steps:
                actions = torch.empty(T, self.environments.actions).uniform_(-1, 1)
            else:
                actions = self.agent.act(torch.from_numpy(observations).float(), sample=True)
            observations, rewards, _ = self.environments.step(actions.numpy())
            self.replay.add(actions.numpy(), rewards, observations)
            returns += rewards
            if step >= s.init_steps and step % s.update_every == 0:
                self.last = self.agent.update(self.replay.sample(s.batch))
        return returns

    def evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        """Episodes of the policy's mean: the share that succeeds at any step, and the mean return, [T] each."""
        s, T = self.settings, len(self.settings.tasks)
        successes, returns = np.zeros(T), np.zeros(T)
        for goal in range(s.evaluation_episodes):
            observations = self.environments.reset(seeds(self.seed, T, [goal] * T))
            succeeded = np.zeros(T, bool)
            for _ in range(s.horizon):
                actions = self.agent.act(torch.from_numpy(observations).float(), sample=False)
                observations, rewards, now = self.environments.step(actions.numpy())
                succeeded |= now
                returns += rewards
            successes += succeeded
        return successes / s.evaluation_episodes, returns / s.evaluation_episodes

    def numbers(self, trained: np.ndarray) -> dict[str, float]:
        """An evaluation, what the last training episode returned, and what the last update saw."""
        names = self.settings.tasks
        success, returns = self.evaluate()
        row = {"success": success.mean(), "return": returns.mean(), "training return": trained.mean()}
        for label, values in {"success": success, "return": returns}.items():
            row |= {f"{label} {name}": value for name, value in zip(names, values, strict=True)}
        temperatures = self.agent.alpha.detach().flatten().tolist()
        row |= {f"temperature {name}": value for name, value in zip(names, temperatures, strict=True)}
        for part in ("critic", "actor"):
            row[f"{part} loss"] = math.nan if self.last is None else getattr(self.last, part).mean().item()
            info = None if self.last is None else self.last.infos[part]
            gram = None if info is None else info.gram  # GradDrop has none
            condition = math.nan if gram is None else fastmtl.diagnostics.condition_number(gram).item()
            row[f"{part} condition number"] = condition
        return {name: float(value) for name, value in row.items()}


def train(run: Run, track: Track = iter, make: Factory = MetaWorld) -> dict[str, float]:
    """Trains one run, from its checkpoint where there is one. Checkpoints are made with evaluations, between episodes.

    Args:
        run: with the settings that `Training` reads.
        track: wraps the loop over episodes, to show how far it is.
        make: makes the environments.

    Returns:
        What it gave `run.finish`: success rates and returns of the evaluations in the last tenth of training, averaged,
        of each task and over tasks; and `best`, the highest success rate over tasks of any evaluation.
    """
    training = Training(run.settings, make)
    settings, every = training.settings, training.settings.episodes_between_evaluations
    for number in track(range(run.restore(**training.parts), settings.episodes)):
        returns = training.episode(number)
        if (number + 1) % every == 0 or number + 1 == settings.episodes:
            # Rows are numbered by episodes, as checkpoints are.
            run.log(number, steps=(number + 1) * settings.horizon, **training.numbers(returns))
            run.save(number + 1, **training.parts)
    return run.finish(**_result(run, settings))


def measure(run: dict[str, Any], steps: int = 20, make: Factory = MetaWorld) -> dict[str, float]:
    """What a run costs on one thread, from a few steps. Reads no run and writes none.

    Returns:
        Processor milliseconds of a step of all environments (`environments`), of the policy (`policy`) and of an
        update (`update`), and processor seconds of the whole run (`run`).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training = Training(run, make)
        s, T = training.settings, len(training.settings.tasks)
        observations = torch.zeros(T, training.environments.observations)
        actions = torch.empty(T, training.environments.actions)

        def environments() -> None:
            if training.replay.step == s.horizon:
                training.replay.begin(training.environments.reset(seeds(0, T, [0] * T)))
            action = actions.uniform_(-1, 1).numpy()
            following, rewards, _ = training.environments.step(action)
            training.replay.add(action, rewards, following)

        def policy() -> None:
            training.agent.act(observations, sample=True)

        def update() -> None:
            training.agent.update(training.replay.sample(s.batch))

        cost = {f.__name__: 1e3 * _seconds(f, steps) for f in (environments, policy, update)}
    finally:
        torch.set_num_threads(threads)
    trained = s.episodes * s.horizon
    evaluated = s.episodes // s.episodes_between_evaluations * s.evaluation_episodes * s.horizon
    acted = (trained + evaluated) * (cost["environments"] + cost["policy"])
    updated = max(0, trained - s.init_steps) / s.update_every * cost["update"]
    return {**cost, "run": (acted + updated) / 1e3}


def _seconds(function: Callable[[], None], times: int) -> float:
    # Processor time: that of one thread, whatever else the machine does.
    for _ in range(3):
        function()
    start = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - start) / times


def _result(run: Run, settings: Settings) -> dict[str, float]:
    """From the log, which goes through kills whole."""
    with (run.folder / "log.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    last = [row for row in rows if row["steps"] > 0.9 * settings.episodes * settings.horizon]
    names = [name for name in rows[0] if name in ("success", "return") or name.startswith(("success ", "return "))]
    return {name: sum(row[name] for row in last) / len(last) for name in names} | {
        "best": max(row["success"] for row in rows)
    }

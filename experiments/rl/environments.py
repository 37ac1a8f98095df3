"""Environments that step together, one for each task, and the seeds of their episodes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

__all__ = ["Environments", "MetaWorld", "Transition", "check_tasks", "seeds"]

Transition = tuple[np.ndarray, np.ndarray, np.ndarray]


class Environments(Protocol):
    """T environments of the same observations (O numbers) and actions (A numbers in [-1, 1]).

    They have to be functions of their episode's seed and actions: that is what makes a resumed run go on as the killed
    one would have.
    """

    observations: int
    actions: int

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Starts an episode in each; the first observations [T, O]."""
        ...

    def step(self, actions: np.ndarray) -> Transition:
        """Actions [T, A] to observations [T, O], rewards [T] and whether each succeeds now [T]."""
        ...


def seeds(seed: int, tasks: int, goals: Sequence[int]) -> list[int]:
    """Seeds of an episode: that of task t is a function of the run's seed, t and the number of its goal."""
    return [int(np.random.SeedSequence((seed, t, goals[t])).generate_state(1)[0]) for t in range(tasks)]


def check_tasks(names: Sequence[str]) -> None:
    """Builds nothing.

    Raises:
        ImportError: metaworld is not installed.
        ValueError: Meta-World has no task of one of these names.
    """
    known = _classes()
    for name in names:
        if name not in known:
            raise ValueError(f"tasks: expected some of {', '.join(known)}, got {name!r}")


class MetaWorld:
    """Meta-World's tasks of these names in a vector environment. The goal is observed, and is what a seed decides.

    Args:
        names: for example "reach-v3".

    Raises:
        ImportError, ValueError: see `check_tasks`.
    """

    observations, actions = 39, 4

    def __init__(self, names: Sequence[str]) -> None:
        classes = _classes()
        check_tasks(names)
        import gymnasium

        # Each task has bounds of its own, which a vector environment would not take.
        space = gymnasium.spaces.Box(-np.inf, np.inf, (self.observations,), np.float64)

        class Seeded(gymnasium.Wrapper):
            """Draws its goal from the episode's seed."""

            def __init__(self, name: str) -> None:
                env = classes[name]()
                # Drawn at every reset, and from the environment's own generator instead of numpy's global one.
                env._freeze_rand_vec, env.seeded_rand_vec = False, True
                super().__init__(env)
                self.task = env
                self.observation_space = space

            def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
                if seed is not None:
                    self.task.seed(seed)
                return self.env.reset()

        self._envs = gymnasium.vector.SyncVectorEnv(
            [partial(Seeded, name) for name in names],
            autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED,
            copy=False,
        )

    def close(self) -> None:
        """Frees them."""
        self._envs.close()

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Starts an episode in each; the first observations [T, 39]."""
        return self._envs.reset(seed=list(seeds))[0].copy()

    def step(self, actions: np.ndarray) -> Transition:
        """Actions [T, 4] to observations [T, 39], rewards [T] in [0, 10] and whether each succeeds now [T]."""
        observations, rewards, _, _, info = self._envs.step(actions)
        return observations.copy(), rewards.copy(), info["success"] > 0


def _classes() -> dict[str, Any]:
    """Meta-World's tasks by name, with the goal in the observation."""
    # Nothing is rendered, and without this MuJoCo is not imported where there are no graphics libraries.
    os.environ.setdefault("MUJOCO_GL", "disabled")
    try:
        from metaworld import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as classes
    except ImportError as error:
        raise ImportError(f"the tasks need metaworld ({error}): pip install 'fastmtl-torch[rl]'") from error
    return {name.removesuffix("-goal-observable"): kind for name, kind in classes.items()}

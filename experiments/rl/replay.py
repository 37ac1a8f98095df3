"""What the environments did, in preallocated tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "Replay"]


class Batch(NamedTuple):
    """Transitions arranged by task: observations, and those after, [T, B, O]; actions [T, B, A]; rewards [T, B, 1]."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    following: Tensor


class Replay:
    """The last transitions of T environments that step together, in episodes of one length.

    Whole episodes are stored, so that the observation after a step is that before the next, and not stored twice. The
    oldest episode is forgotten when a new one begins in its place. What is drawn comes from torch's generator.

    Args:
        tasks: T.
        horizon: steps of an episode.
        capacity: transitions of each task.
        observations: O.
        actions: A.
    """

    def __init__(self, tasks: int, horizon: int, capacity: int, observations: int, actions: int) -> None:
        self.horizon, self.tasks = horizon, tasks
        self.slots = capacity // horizon
        self.episode = -1  # the one that runs
        self.step = horizon  # how many steps it has
        self._observations = torch.zeros(self.slots, horizon + 1, tasks, observations)
        self._actions = torch.zeros(self.slots, horizon, tasks, actions)
        self._rewards = torch.zeros(self.slots, horizon, tasks, 1)

    def __len__(self) -> int:
        """Transitions of each task that can be drawn."""
        return max(0, min(self.episode, self.slots - 1)) * self.horizon + (self.step if self.episode >= 0 else 0)

    def begin(self, observations: np.ndarray) -> None:
        """An episode begins: observations [T, O].

        Raises:
            RuntimeError: the one before has not ended.
        """
        if self.step != self.horizon:
            raise RuntimeError(f"begin: expected an episode of {self.horizon} steps before, got one of {self.step}")
        self.episode, self.step = self.episode + 1, 0
        self._observations[self.episode % self.slots, 0] = torch.from_numpy(observations)

    def add(self, actions: np.ndarray, rewards: np.ndarray, observations: np.ndarray) -> None:
        """A step: actions [T, A], rewards [T] and the observations after it [T, O]."""
        slot, step = self.episode % self.slots, self.step
        self._actions[slot, step] = torch.from_numpy(actions)
        self._rewards[slot, step, :, 0] = torch.from_numpy(rewards)
        self._observations[slot, step + 1] = torch.from_numpy(observations)
        self.step += 1

    def sample(self, batch: int) -> Batch:
        """Draws `batch` transitions of each task, independently of the other tasks'."""
        # Counted backwards: 0 is the latest, so that the slots in use need not be told apart.
        back = torch.randint(len(self), (self.tasks, batch))
        number = self.episode * self.horizon + self.step - 1 - back
        slot = number.div(self.horizon, rounding_mode="floor") % self.slots
        step, task = number % self.horizon, torch.arange(self.tasks)[:, None]
        return Batch(
            self._observations[slot, step, task],
            self._actions[slot, step, task],
            self._rewards[slot, step, task],
            self._observations[slot, step + 1, task],
        )

    def state_dict(self) -> dict[str, Any]:
        """The episodes that there are, between two of them.

        Raises:
            RuntimeError: within an episode.
        """
        if self.step != self.horizon:
            raise RuntimeError(f"state_dict: expected the end of an episode, got step {self.step} of {self.horizon}")
        used = min(self.episode + 1, self.slots)
        # Copies: torch.save would write the whole memory behind a slice.
        parts = [part[:used].clone() for part in (self._observations, self._actions, self._rewards)]
        return {"episode": self.episode, "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.episode, self.step = state["episode"], self.horizon
        for part, saved in zip((self._observations, self._actions, self._rewards), state["parts"], strict=True):
            part[: len(saved)] = saved

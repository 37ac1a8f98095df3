"""What a run depends on, and the two protocols: the paper's and a reduced one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = ["PROTOCOLS", "SUITES", "Settings", "reductions"]

SUITES = {
    "mt10": (
        "reach-v3",
        "push-v3",
        "pick-place-v3",
        "door-open-v3",
        "drawer-open-v3",
        "drawer-close-v3",
        "button-press-topdown-v3",
        "peg-insert-side-v3",
        "window-open-v3",
        "window-close-v3",
    ),
    "mt3": ("reach-v3", "drawer-close-v3", "window-close-v3"),  # easy ones of MT10
}


@dataclass(frozen=True)
class Settings:
    """The protocol of the paper, which has it from CAGrad and MTRL, where nothing else is said.

    Raises:
        ValueError: a number out of its range, no task, or one twice.
    """

    tasks: tuple[str, ...] = SUITES["mt10"]
    steps: int = 2_000_000  # of every environment, rounded up to whole episodes
    horizon: int = 150
    init_steps: int = 1500  # uniformly random actions, no updates
    goals: int = 1  # for each task, drawn from the seed; Meta-World's own benchmark has 50
    width: int = 400
    depth: int = 3
    batch: int = 128  # for each task
    capacity: int = 100_000  # transitions of each task that the replay holds
    lr: float = 3e-4
    discount: float = 0.99
    tau: float = 0.005  # share of the critic that goes into the target critic
    update_every: int = 1  # steps of every environment between two updates
    temperature: str = "per-task"  # or "shared"
    evaluate_every: int = 10_000  # steps, rounded up to whole episodes
    evaluation_episodes: int = 1  # of each task; with one goal all are alike, since the policy's mean acts

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks: expected at least one and none twice, got {', '.join(self.tasks) or 'none'}")
        least = {"init_steps": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < least.get(field.name, 1):
                raise ValueError(f"{field.name}: expected at least {least.get(field.name, 1)}, got {value}")
            if field.type == "float" and not 0 < value <= 1:
                raise ValueError(f"{field.name}: expected a number above 0 and at most 1, got {value}")
        if self.temperature not in ("per-task", "shared"):
            raise ValueError(f"temperature: expected 'per-task' or 'shared', got {self.temperature!r}")
        if self.evaluation_episodes > self.goals:
            raise ValueError(
                f"evaluation_episodes: expected at most one for each of {self.goals} goals (the policy's mean acts, so "
                f"others would be repetitions), got {self.evaluation_episodes}"
            )
        if self.capacity < 2 * self.horizon:
            raise ValueError(f"capacity: expected at least two episodes of {self.horizon} steps, got {self.capacity}")

    @property
    def episodes(self) -> int:
        """Training episodes of every environment."""
        return -(-self.steps // self.horizon)

    @property
    def episodes_between_evaluations(self) -> int:
        """Training episodes from one evaluation to the next."""
        return -(-self.evaluate_every // self.horizon)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Settings:
        """Those among the settings of a run."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})


PROTOCOLS = {
    "full": Settings(),
    "quick": replace(
        Settings(),
        tasks=SUITES["mt3"],
        steps=40_000,
        width=128,
        batch=64,
        capacity=40_000,
        lr=1e-3,
        evaluate_every=1500,
    ),
}


def reductions(settings: Settings, seeds: Mapping[str, int]) -> str:
    """What is not as in the paper, to stand beside results.

    Args:
        settings: of the runs.
        seeds: how many runs of each row.
    """
    ours, full = asdict(settings), asdict(PROTOCOLS["full"])
    changed = [
        f"{name} {_words(ours[name])} instead of {_words(full[name])}" for name in full if ours[name] != full[name]
    ]
    if any(n != 10 for n in seeds.values()):
        changed.append(f"{', '.join(sorted({str(n) for n in seeds.values()}))} seeds instead of 10")
    always = (
        "metaworld 3's tasks (v3) and rewards as they are, where the paper's implementation (MTRL) has v1's, normalised"
    )
    return "; ".join([always, *changed]) + ". Not the paper's numbers."


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)

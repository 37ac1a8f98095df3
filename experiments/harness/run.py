"""A training run as a folder: settings, checkpoint, log, result. Killed at any moment, it goes on from its checkpoint.

settings.json     what was asked for; the folder serves no other
checkpoint.pt     the latest state, written whole or not at all
log.csv           one row of numbers for each logged step, cut back to the checkpoint on resuming
result.json       written last: the run is finished
"""

from __future__ import annotations

import csv
import json
import os
import platform
import random
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

import fastmtl

__all__ = ["Run", "environment"]


class HasState(Protocol):
    """Anything with `state_dict` and `load_state_dict`: a module, an optimizer, a scheduler, a sampler."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class Run:
    """A run in `folder`, new or resumed.

        run = Run(folder, settings)
        start = run.restore(model=model, optimizer=optimizer)
        for step in range(start, steps):
            ...
            run.log(step, loss=loss.item())
            if (step + 1) % every == 0:
                run.save(step + 1, model=model, optimizer=optimizer)
        run.finish(accuracy=accuracy)

    Args:
        folder: where; made if it is not there.
        settings: what the run depends on, as JSON.

    Raises:
        ValueError: the folder has a run of other settings.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = json.loads(json.dumps(dict(settings)))
        path = self.folder / "settings.json"
        if path.exists():
            there = json.loads(path.read_text())
            if there != self.settings:
                names = sorted(k for k in there.keys() | self.settings.keys() if there.get(k) != self.settings.get(k))
                was, now = ({k: s.get(k) for k in names} for s in (there, self.settings))
                raise ValueError(f"{self.folder}: a run with {was} is there, expected {now}; choose another folder")
        else:
            _write(path, self.settings)
        self._log = self.folder / "log.csv"

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` was given; None for a run that is not finished."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def restore(self, **parts: HasState) -> int:
        """Loads the checkpoint into these parts, and the random generators (torch's and Python's).

        Returns:
            The step to go on with: 0 where there is no checkpoint.
        """
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            self._log.unlink(missing_ok=True)
            return 0
        state = torch.load(path, weights_only=True)
        if state["parts"].keys() != parts.keys():
            raise ValueError(f"{path}: expected the state of {sorted(parts)}, got that of {sorted(state['parts'])}")
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        _set_generators(state["generators"])
        self._cut_log(state["step"])
        return state["step"]

    def save(self, step: int, **parts: HasState) -> None:
        """Writes a checkpoint: `step` steps are done."""
        state = {
            "step": step,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "generators": _generators(),
        }
        path = self.folder / "checkpoint.pt"
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def log(self, step: int, **numbers: float) -> None:
        """Adds a row to log.csv; every row of a run has the same columns."""
        new = not self._log.exists()
        with self._log.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *numbers])
            writer.writerow([step, *numbers.values()])

    def finish(self, **result: Any) -> dict[str, Any]:
        """Writes the result and drops the checkpoint."""
        _write(self.folder / "result.json", result)
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        return result

    def _cut_log(self, step: int) -> None:
        if not self._log.exists():
            return
        with self._log.open(newline="") as file:
            rows = list(csv.reader(file))
        kept = [rows[0], *(row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) < step)]
        new = self._log.with_suffix(".new")
        with new.open("w", newline="") as file:
            csv.writer(file).writerows(kept)
        new.replace(self._log)


def environment() -> dict[str, str]:
    """Hardware, versions and commit, to stand beside results."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        commit = described.stdout.strip()
    except OSError:
        commit = ""
    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastmtl": fastmtl.__version__,
        "commit": commit,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _write(path: Path, content: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)


def _generators() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

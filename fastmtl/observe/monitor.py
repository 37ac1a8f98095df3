"""Records a run's gradients, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.inputs import describe
from fastmtl.losses import Losses
from fastmtl.observe import diagnostics, export, formulas
from fastmtl.rule import checked_losses

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import Console

    from fastmtl.observe.live import Live

__all__ = ["Monitor"]

_FIELDS = ("gram", "rank", "alpha", "residual")  # eigenvalues are those of the Grams, of all records at once
# What a step with weights of an earlier one has not found out.
_BETWEEN = frozenset({"gram", "rank", "residual"})
# Not what depends on the aligned system's scale, which an info does not tell.
_ALIGNED = (
    "condition_number",
    "rank",
    "stable_rank",
    "min_cosine",
    "max_curvature_bound",
    "min_magnitude_similarity",
    "max_norm_ratio",
)


class Monitor:
    """Records the diagnostics of a run from the `Info` of each step, without an extra pass over the gradients.

        monitor = Monitor(writer=SummaryWriter())
        for ...:
            info = method.backward(losses)        # or hs.info after a backward through fan_out
            monitor(info, losses)
        monitor.report("run.html")                # plot("fig4.png"), frame(), to_json("run.json")

    A step costs one copy of the info's tensors, on their device. The diagnostics of `buffer` steps are computed as one
    batch and moved to the host: the host waits once every `buffer` records, or when `history` is read. With a loss
    scaler, norms and singular values are those of the scaled gradients; other measures do not depend on it.

    Args:
        writer: receives scalars once every `buffer` records and on `flush`: a `torch.utils.tensorboard.SummaryWriter`
            or anything with `add_scalar(tag, value, step)`, with `log_metrics(dict, step=)` like Lightning's loggers,
            or with `log(dict)`, which gets `step=` if it accepts that, else "step" among the numbers.
        every: record only every n-th call, starting with the first.
        prefix: start of the tags, as in "fastmtl/initial/condition_number".
        buffer: how many records wait on the device: (T² + 4T) numbers each.
        dtype: dtype of the gradients, which sets the rank tolerance for methods whose info has no rank.

    Attributes:
        names: the tasks' names, if the first record's info has them; used in tags and columns.

    Raises:
        TypeError: a writer without any of these methods.
        ValueError: `every` or `buffer` below 1.
    """

    def __init__(
        self,
        writer: Any = None,
        every: int = 1,
        prefix: str = "fastmtl",
        buffer: int = 100,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._send = None if writer is None else export.sender(writer)
        for name, value in (("every", every), ("buffer", buffer)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        self.writer = writer
        self.every = every
        self.prefix = prefix
        self.buffer = buffer
        self.dtype = dtype
        self.names: tuple[str, ...] | None = None
        self._watcher: Live | None = None
        self._angles: tuple[Tensor, Tensor] | None = None  # sums of cosines, and how many were summed
        self._calls = 0
        self._shapes: dict[str, list[int]] | None = None  # of one record's fields; those of the first hold for all
        self._partial = False  # whether those of the first were not all, and the next may bring more
        self._steps: list[int] = []
        self._waiting: list[Tensor] = []
        self._history: list[dict[str, np.ndarray]] = []
        self._written = 0

    def record(self, info: Info, losses: Losses | None = None, step: int | None = None) -> None:
        """Records one step. Only every `buffer`-th record reads values, and waits for the device.

        Args:
            info: the step's info; with `groups=` its diagnostics have a leading dimension, one entry per group. Fields
                that it lacks are not recorded: a method without a Gram matrix leaves only α and the losses. A step with
                the weights of an earlier one (`every=`) is a gap in the diagnostics: NaN.
            losses: the T losses, to be recorded too; by name if the info has names.
            step: the number of the step; default: the number of earlier calls.

        Raises:
            TypeError: `info` is not an info, or losses are not tensors.
            ValueError: an info whose fields or number of tasks differ from the first record's.
        """
        if not isinstance(info, Info):
            raise TypeError(f"info: expected an Info, got {describe(info)}")
        call = self._calls
        self._calls += 1
        if call % self.every:
            return
        fields = {name: value for name in _FIELDS if (value := getattr(info, name)) is not None}
        if losses is not None:
            like = info.gram if info.alpha is None else info.alpha
            fields["losses"] = checked_losses(losses, len(losses) if like is None else like.shape[-1], info.names)
        shapes = {name: list(value.shape) for name, value in fields.items()}
        device = next((value.device for value in fields.values()), None)
        between = _BETWEEN - fields.keys() if info.age else frozenset()
        if self._shapes is None:
            self._shapes, self.names = shapes, info.names
            self._partial = bool(between)
        elif self._partial and not between and shapes.items() >= self._shapes.items():
            self._drain()
            self._shapes, self._partial = shapes, False
        elif {name: shape for name, shape in self._shapes.items() if name not in between} != shapes:
            raise ValueError(f"info: expected the fields of the first record, {self._shapes}, got {shapes}")
        for name in between & self._shapes.keys():
            fields[name] = torch.full(self._shapes[name], torch.nan, device=device)
        fields = {name: fields[name] for name in self._shapes}
        parts = [value.detach().reshape(-1).to(device, torch.float64) for value in fields.values()]
        # One copy: the info's buffers may be written to again before it is read.
        self._waiting.append(torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64))
        self._steps.append(call if step is None else int(step))
        if len(self._waiting) >= self.buffer:
            self._drain()
            if self._send is not None:
                self.flush()
        if self._watcher is not None:
            self._watcher.tick()

    __call__ = record

    @property
    def history(self) -> dict[str, np.ndarray]:
        """Everything recorded so far, as arrays whose first dimension is N, the number of records.

        `step` [N]; `initial/…`, `diagnostics.summary` of the task gradients with weights 1/T, and `initial/conflicts`,
        the share of task pairs with a negative cosine; `aligned/…`, for Aligned-MTL, the scale-free measures of the
        aligned system; `committed/norm` and `committed/min_cosine`, the norm of αᵀG and its smallest cosine with a
        task; `norms`, `alpha` and `losses` [N, T]; `residual` [N]. With groups there is one more dimension,
        [N, B] and [N, B, T].
        """
        self._drain()
        if not self._history:
            return {"step": np.zeros(0, dtype=np.int64)}
        if len(self._history) > 1:
            likes = {name: values for part in self._history for name, values in part.items()}
            self._history = [
                {
                    name: np.concatenate([_column(part, name, like) for part in self._history])
                    for name, like in likes.items()
                }
            ]
        return dict(self._history[0])

    @property
    def cosines(self) -> np.ndarray | None:
        """The mean cosine of each pair of tasks' gradients over the finite records, [T, T], with groups [B, T, T]."""
        self._drain()
        if self._angles is None:
            return None
        total, count = self._angles
        return (total / count).cpu().numpy()

    def flush(self) -> None:
        """Sends pending records to the writer, if there is one."""
        columns = export.columns(self.history, self.names)
        steps = columns.pop("step")
        if self._send is not None:
            for n in range(self._written, len(steps)):
                numbers = {f"{self.prefix}/{name}": float(values[n]) for name, values in columns.items()}
                self._send(numbers, int(steps[n]))
        self._written = len(steps)

    def frame(self) -> pd.DataFrame:
        """The history as a pandas data frame: one row per record, indexed by step, with columns such as "alpha/depth".

        Raises:
            ImportError: pandas is not installed.
        """
        return export.frame(self.history, self.names)

    def to_json(self, path: str | Path | None = None) -> str:
        """The history as JSON, `{"tasks": names or null, "columns": {"step": [...], ...}}`.

        Args:
            path: a file to write it to.

        Returns:
            The text, in which NaN is null and infinity the string "Infinity".
        """
        text = export.as_json(self.history, self.names)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def report(self, path: str | Path | None = None, title: str = "Training run") -> str:
        """A self-contained HTML page about the run: κ, cosines, conflicts, task weights, norms and losses.

        Args:
            path: a file to write it to.
            title: its heading.

        Returns:
            The page.

        Raises:
            ValueError: nothing was recorded.
        """
        from fastmtl.observe.report import html

        page = html(self, title)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def live(self, refresh: float = 1.0, console: Console | None = None) -> Live:
        """A table in the terminal during a `with` block, redrawn as records arrive.

            with monitor.live():
                for ...:
                    monitor(info, losses)

        Args:
            refresh: seconds between redraws; for each of them the host waits for the device.
            console: a rich console; default: the terminal's.

        Raises:
            ImportError: rich is not installed (`pip install 'fastmtl-torch[live]'`).
        """
        from fastmtl.observe.live import Live  # an optional extra

        return Live(self, refresh, console)

    def state_dict(self) -> dict[str, Any]:
        """All records, for `load_state_dict`; flushes to the writer first, so that it gets nothing twice."""
        self.flush()
        history = {name: torch.from_numpy(values.copy()) for name, values in self.history.items()}
        state = {"calls": self._calls, "shapes": self._shapes, "history": history, "names": self.names}
        return state | {"cosines": self._angles, "partial": self._partial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from where `state_dict` was taken; this monitor's own records are dropped."""
        history = {name: values.cpu().numpy().copy() for name, values in state["history"].items()}
        self._calls, self._shapes, self.names = state["calls"], state["shapes"], state.get("names")
        self._partial = state.get("partial", False)
        self._angles = state.get("cosines")
        self._steps, self._waiting = [], []
        self._written = len(history["step"])
        self._history = [history] if self._written else []

    def plot(self, target: Any = None, label: str = "", system: str = "initial") -> Figure:
        """Condition number, gradient magnitude similarity and minimal cosine over the steps: see `figures.fig4`.

        Args:
            target: a file to save to, or three axes to draw on.
            label: the name in the legend.
            system: "initial" or "aligned".

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed (`pip install 'fastmtl-torch[plot]'`).
        """
        from fastmtl.observe.figures import fig4  # an optional extra

        return fig4({label: self}, target, system)

    def _drain(self) -> None:
        """Computes the diagnostics of all pending records as one batch, and moves them to the host."""
        if not self._waiting:
            return
        assert self._shapes is not None
        # A model may have moved to another device between two records.
        raw = torch.stack([row.to(self._waiting[-1].device) for row in self._waiting])
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        fields = {
            name: part.reshape(len(raw), *shape)
            for (name, shape), part in zip(self._shapes.items(), raw.split(sizes, 1), strict=True)
        }
        results = self._diagnose(fields)
        flat = torch.cat([value.reshape(len(raw), -1) for value in results.values()], 1) if results else raw
        split = flat.cpu().split([value[0].numel() for value in results.values()], 1)
        self._history.append(
            {"step": np.array(self._steps, dtype=np.int64)}
            | {
                name: part.reshape(value.shape).numpy()
                for (name, value), part in zip(results.items(), split, strict=True)
            }
        )
        self._waiting, self._steps = [], []

    def _diagnose(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of N records: fields [N, ...] or, with groups, [N, B, ...]."""
        kept: dict[str, Tensor] = {name: fields[name] for name in ("alpha", "losses", "residual") if name in fields}
        if "gram" not in fields:
            return kept
        gram = fields["gram"]
        leading, M = gram.shape[:-2], gram.flatten(0, -3)
        rank = fields["rank"].nan_to_num().to(torch.int64).flatten() if "rank" in fields else None
        initial = Info.of(gram=M, rank=rank, spectrum=rank is not None)
        results = {f"initial/{name}": value for name, value in diagnostics.summary(initial, self.dtype).items()}
        if rank is not None:
            aligned = diagnostics.summary(Info.of(gram=diagnostics.aligned_gram(initial), rank=rank))
            results |= {f"aligned/{name}": aligned[name] for name in _ALIGNED}
        if "alpha" in fields:
            alpha = fields["alpha"].flatten(0, -2)
            results["committed/norm"] = diagnostics.total_norm(M, alpha)
            results["committed/min_cosine"] = diagnostics.total_cosines(M, alpha).amin(-1)
        results["norms"] = diagnostics.norms(M)
        results["initial/conflicts"] = self._see_conflicts(diagnostics.cosines(M), leading)
        return {name: value.reshape(*leading, *value.shape[1:]) for name, value in results.items()} | kept

    def _see_conflicts(self, C: Tensor, leading: torch.Size) -> Tensor:
        """The share of pairs in conflict, for cosines [..., T, T] of all records, which are added to the run's."""
        finite = C.isfinite()
        shape = (*leading, *C.shape[-2:])
        total, count = (x.reshape(shape).sum(0) for x in (torch.where(finite, C, 0.0), finite.to(C.dtype)))
        if self._angles is not None:
            total, count = total + self._angles[0].to(total.device), count + self._angles[1].to(count.device)
        self._angles = total, count
        return formulas.conflicts(C)


def _column(part: Mapping[str, np.ndarray], name: str, like: np.ndarray) -> np.ndarray:
    """Some records' values, NaN where they have none."""
    return part[name] if name in part else np.full((len(part["step"]), *like.shape[1:]), np.nan)

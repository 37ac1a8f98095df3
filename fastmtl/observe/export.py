"""A `Monitor`'s records for other programs: columns, pandas, JSON, loggers."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmtl.inputs import describe

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["as_json", "columns", "frame", "sender"]

_BY_TASK = ("alpha", "norms", "losses")  # measures whose last dimension is that of the tasks
Sender = Callable[[Mapping[str, float], int], None]


def columns(history: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The history with one column [N] per number: "alpha/depth" or "alpha/0", "initial/condition_number"."""
    found = {}
    for name, values in history.items():
        for index in np.ndindex(values.shape[1:]):
            parts = [str(k) for k in index]
            if names is not None and name in _BY_TASK:
                parts[-1] = names[index[-1]]
            of_all = (slice(None), *index)
            found["/".join((name, *parts))] = values[of_all]
    return found


def frame(history: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> pd.DataFrame:
    """A data frame with one row per record and the step as its index.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a data frame needs pandas: pip install pandas") from error
    return pandas.DataFrame(columns(history, names)).set_index("step")


def as_json(history: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> str:
    """`{"tasks": names or null, "columns": {...}}`; NaN, which JSON lacks, becomes null, and infinity a string."""
    content = {name: [_plain(x) for x in values.tolist()] for name, values in columns(history, names).items()}
    return json.dumps({"tasks": None if names is None else list(names), "columns": content}, allow_nan=False)


def _plain(x: float) -> float | str | None:
    if math.isnan(x):
        return None
    return x if math.isfinite(x) else ("Infinity" if x > 0 else "-Infinity")


def sender(writer: Any) -> Sender:
    """A function that sends a step's numbers to a writer: by `add_scalar`, `log_metrics` or `log`, the first it has.

    Raises:
        TypeError: the writer has none of them.
    """
    if callable(add := getattr(writer, "add_scalar", None)):  # TensorBoard

        def one_by_one(numbers: Mapping[str, float], step: int) -> None:
            for name, x in numbers.items():
                add(name, x, step)

        return one_by_one
    if callable(metrics := getattr(writer, "log_metrics", None)):  # Lightning's loggers, MLflow
        return lambda numbers, step: metrics(dict(numbers), step=step)
    if callable(log := getattr(writer, "log", None)):  # Weights & Biases, and whatever has `log(dict)`
        if _takes_step(log):
            return lambda numbers, step: log(dict(numbers), step=step)
        return lambda numbers, step: log({**numbers, "step": step})
    raise TypeError(f"writer: expected None or an object with add_scalar, log_metrics or log, got {describe(writer)}")


def _takes_step(log: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(log).parameters.values()
    except ValueError:  # a builtin without a signature
        return False
    return any(p.name == "step" or p.kind is p.VAR_KEYWORD for p in parameters)

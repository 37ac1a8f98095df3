"""Registers our weightings where LibMTL's trainer looks them up by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

from fastmtl.inputs import describe
from fastmtl.integrations.libmtl import on_gradients, on_losses
from fastmtl.integrations.libmtl.weighting import Weighting

__all__ = ["register"]


def register(
    weightings: Mapping[str, type[Weighting]] | None = None, *, prefix: str = "", module: ModuleType | None = None
) -> list[str]:
    """Puts weightings into `LibMTL.weighting`, where the trainer of LibMTL's repository looks for `weighting="MGDA"`.

        fastmtl.integrations.libmtl.register()
        Trainer(..., weighting="MGDA", ...)

        register(prefix="fast_")                                # beside LibMTL's own
        Trainer(..., weighting="fast_MGDA", ...)

        register({"Krum": weighting_of(lambda tasks: fastmtl.Krum())})

    By the names MoDo and SDMGrad the trainer knows that a step takes three batches, and by FAMO that it has to evaluate
    the losses again: under other names, these three make do with one batch.

    Args:
        weightings: classes by name; default: all of this package under LibMTL's names, replacing LibMTL's.
        prefix: of the names.
        module: where to put them; default: `LibMTL.weighting`, which is then imported.

    Returns:
        The names under which they can now be found.

    Raises:
        ImportError: LibMTL is not installed.
        TypeError: a value of `weightings` is not a weighting class.
    """
    if weightings is None:
        names = [*on_gradients.__all__, *on_losses.__all__]
        weightings = {name: getattr(on_gradients, name, None) or getattr(on_losses, name) for name in names}
    for name, kind in weightings.items():
        if not (isinstance(kind, type) and issubclass(kind, Weighting)):
            raise TypeError(f"weightings[{name!r}]: expected a class made by weighting_of, got {describe(kind)}")
    target = importlib.import_module("LibMTL.weighting") if module is None else module
    for name, kind in weightings.items():
        setattr(target, prefix + name, kind)
    return [prefix + name for name in weightings]

"""PyTorch Lightning: a callback that runs a method's steps on what `training_step` returns.

    class Model(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            x, targets = batch
            return {"losses": {"seg": ..., "depth": ...}}  # a dict, list, tuple or tensor [T], None for an absent task

    trainer = pl.Trainer(callbacks=[MultiTask(fastmtl.AlignedMTL(), shared="encoder")])

Everything else is automatic optimization as usual. Needs `pip install 'fastmtl-torch[lightning]'`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fastmtl.info import Info
from fastmtl.inputs import describe
from fastmtl.integrations.steps import Groups, Shared, Steps
from fastmtl.methods.base import Method
from fastmtl.scalarization.base import Scalarization

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    try:  # whichever of the two packages the user has imported: their classes are not interchangeable
        if "lightning.pytorch" in sys.modules:
            from lightning import pytorch as pl
        else:
            import pytorch_lightning as pl
    except ImportError as error:
        raise ImportError(
            "fastmtl.integrations.lightning needs PyTorch Lightning: pip install 'fastmtl-torch[lightning]'"
        ) from error

__all__ = ["MultiTask"]

# Strategies whose engines run the backward themselves, or replace the module's parameters for it.
_OWN_BACKWARD = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


class MultiTask(pl.Callback):
    """Runs a method's steps in automatic optimization, from a `training_step` that returns `{"losses": ...}`.

    * `{"losses": ...}`: exact steps, `method.backward(losses, shared)`;
    * `{"losses": ..., "representation": h}`: the upper bound, T passes through the heads and one through the encoder;
    * `{"losses": ..., "features": h}`: exact by way of features, heads first.

    Other entries are left alone; `loss`, for the progress bar and other callbacks, is the sum of the losses. Clipping,
    precision plugins (a loss scaler's factor is found and passed on as `grad_scale`), data parallelism and callbacks
    work as usual. With `accumulate_grad_batches`, micro-batches are summed and aggregated once (`method.accumulate`).

    The method's state is saved in Lightning's checkpoints and restored from them.

    Args:
        method: any method of this package, on gradients or on losses.
        shared: the shared parameters: names of one or several submodules, what `Method.backward` takes, or a function
            of the module that returns that. Default: parameters that at least two losses reach, or those behind
            `representation` or `features`.
        groups: parts of the shared parameters that are aggregated separately, each given like `shared`, or a function
            of the module that returns them; `shared` then has to be None.
        every: as in `Method.backward`; not with `accumulate_grad_batches`.
        engine: as in `Method.backward`; "full" with `accumulate_grad_batches`.
        scale_heads: as in `Method.backward`.
        process_group: as in `Method.backward`; default: True if there are several processes, so that they aggregate the
            gradients of the whole batch.
        accumulate: whether `accumulate_grad_batches` sums the micro-batches' gradients before aggregation; otherwise
            each micro-batch is aggregated separately.
        log: whether to log, in the steps that Lightning logs, `alpha/…` and `norm/…` of each task,
            `condition_number`, `rank`, `residual` (see `Info.as_dict`) and `conflicts`, the share of task pairs whose
            gradients have a negative cosine. Nothing is computed for it in other steps.
        prefix: of the logged names.

    Raises:
        TypeError: `method` is not a method.
    """

    def __init__(
        self,
        method: Method | Scalarization,
        shared: Shared = None,
        *,
        groups: Groups = None,
        every: int | Literal["auto"] = 1,
        engine: Literal["full", "gramian", "auto"] = "full",
        scale_heads: bool = False,
        process_group: Any = None,
        accumulate: bool = True,
        log: bool = True,
        prefix: str = "mtl/",
    ) -> None:
        options = {"every": every, "engine": engine, "scale_heads": scale_heads}
        self._steps = Steps(method, shared, groups, options, process_group, accumulate)
        self._log = log
        self._prefix = prefix
        self._index = 0
        self._wrapped: dict[str, Any] = {}

    @property
    def method(self) -> Method | Scalarization:
        """The method."""
        return self._steps.method

    @property
    def info(self) -> Info | None:
        """What the method saw and did in the last step."""
        return self._steps.info

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts itself between the module and the trainer, only for `fit`."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "MultiTask: expected automatic optimization; in manual optimization call method.backward(losses, ...) "
                "in training_step"
            )
        if type(trainer.strategy).__name__ in _OWN_BACKWARD or trainer.strategy.handles_gradient_accumulation:
            raise NotImplementedError(
                "MultiTask: expected a strategy that leaves the backward to the module, got "
                f"{describe(trainer.strategy)}"
            )
        self._unwrap(pl_module)
        self._steps.reset()
        self._wrap(pl_module, "training_step", self._training_step)
        self._wrap(pl_module, "backward", functools.partial(self._backward, trainer, pl_module))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves the method to the model's device."""
        self.method.to(pl_module.device)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        self._unwrap(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As `teardown`."""
        self._unwrap(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts batches."""
        self._index = batch_idx

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs what the method saw and did."""
        each = getattr(trainer, "log_every_n_steps", 1) if self._log else 0
        # Lightning logs after the step, when it is already counted.
        if each and not self._is_within(trainer) and (trainer.global_step + 1) % each == 0:
            pl_module.log_dict(self._steps.numbers(self._prefix))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """For methods that count epochs."""
        self.method.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The method's state."""
        return {"method": self.method.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        self.method.load_state_dict(state_dict["method"])

    def _wrap(self, pl_module: pl.LightningModule, name: str, by: Callable[..., Any]) -> None:
        original = getattr(pl_module, name)
        self._wrapped[name] = vars(pl_module).get(name)  # where a compiled one is stored
        setattr(pl_module, name, functools.wraps(original)(functools.partial(by, original)))

    def _unwrap(self, pl_module: pl.LightningModule) -> None:
        for name, before in self._wrapped.items():
            vars(pl_module).pop(name, None)
            if before is not None:
                setattr(pl_module, name, before)
        self._wrapped = {}

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's own, with the sum of the losses for Lightning."""
        output = original(*args, **kwargs)
        return None if output is None else {**output, "loss": self._steps.total(output, "training_step")}

    def _backward(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        original: Callable[..., Any],
        loss: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if not self._steps.pending:
            original(loss, *args, **kwargs)
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._steps.backward(
            loss,
            pl_module,
            grad_scale=None if scaler is None else scaler.scale(loss.new_ones((), dtype=loss.dtype)).detach(),
            within=self._is_within(trainer),
            pieces=trainer.accumulate_grad_batches,
            several=trainer.world_size > 1,
        )

    def _is_within(self, trainer: pl.Trainer) -> bool:
        """Whether this step has more micro-batches to come."""
        after = self._index + 1
        return bool(after % trainer.accumulate_grad_batches) and not (
            trainer.is_last_batch or after == trainer.num_training_batches
        )

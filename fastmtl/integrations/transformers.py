"""Hugging Face transformers: a `Trainer` that runs a method's steps on what `compute_losses` returns.

    class MyTrainer(MultiTaskTrainer):
        def compute_losses(self, model, inputs):
            outputs = model(**inputs)
            return {"losses": {"answer": ..., "evidence": ...}}  # None for a task that the batch lacks

    trainer = MyTrainer(model=model, args=args, train_dataset=..., method=fastmtl.AlignedMTL(), shared="bert")

Everything else is `transformers.Trainer`. Needs `pip install 'fastmtl-torch[transformers]'`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmtl.info import Info
from fastmtl.integrations.steps import Groups, Shared, Steps
from fastmtl.methods.base import Method
from fastmtl.scalarization.base import Scalarization

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        f"fastmtl.integrations.transformers needs {error.name or 'transformers'}: "
        "pip install 'fastmtl-torch[transformers]'"
    ) from error

__all__ = ["MultiTaskTrainer"]

_STATE = "fastmtl.pt"  # the file in a checkpoint's folder with the method's state


class MultiTaskTrainer(Trainer):
    """`transformers.Trainer` that runs a method's steps, from a `compute_losses` that returns `{"losses": ...}`.

    * `{"losses": ...}`: exact steps, `method.backward(losses, shared)`;
    * `{"losses": ..., "representation": h}`: the upper bound, T passes through the heads and one through the encoder;
    * `{"losses": ..., "features": h}`: exact by way of features, heads first.

    An entry `outputs` is what `compute_loss` returns along with the loss in evaluation. Gradient accumulation
    (micro-batches are summed and aggregated once), mixed precision, clipping and data parallelism are the trainer's.
    The method's state is in its checkpoints and is restored by `resume_from_checkpoint`. Logs contain `mtl/alpha/…` and
    `mtl/norm/…` of each task, `mtl/condition_number` and `mtl/conflicts`, the share of task pairs whose gradients have
    a negative cosine.

    Losses are means over the micro-batch, and the trainer divides by the number of micro-batches; it does not count
    tokens over them (`num_items_in_batch`).

    Args:
        *args: of `transformers.Trainer`.
        method: any method of this package, on gradients or on losses.
        shared: the shared parameters: names of one or several submodules, what `Method.backward` takes, or a function
            of the model that returns that. Default: parameters that at least two losses reach, or those behind
            `representation` or `features`.
        groups: parts of the shared parameters that are aggregated separately, each given like `shared`, or a function
            of the model that returns them; `shared` then has to be None.
        every: as in `Method.backward`; not with gradient accumulation.
        engine: as in `Method.backward`; "full" with gradient accumulation.
        scale_heads: as in `Method.backward`.
        process_group: as in `Method.backward`; default: True if there are several processes.
        accumulate: whether micro-batches are summed before aggregation; otherwise each is aggregated separately.
        **kwargs: of `transformers.Trainer`.

    Raises:
        TypeError: `method` is not a method.
        ValueError: a `compute_loss_func`, which `compute_losses` replaces.
        NotImplementedError: DeepSpeed, FSDP, or several GPUs in one process.
    """

    def __init__(
        self,
        *args: Any,
        method: Method | Scalarization,
        shared: Shared = None,
        groups: Groups = None,
        every: int | Literal["auto"] = 1,
        engine: Literal["full", "gramian", "auto"] = "full",
        scale_heads: bool = False,
        process_group: Any = None,
        accumulate: bool = True,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func: expected None, got a function: compute_losses is where losses come from"
            )
        options = {"every": every, "engine": engine, "scale_heads": scale_heads}
        self._steps = Steps(method, shared, groups, options, process_group, accumulate)
        super().__init__(*args, **kwargs)
        for name, used in (
            ("DeepSpeed", self.is_deepspeed_enabled),
            ("FSDP", self.is_fsdp_enabled),
            (f"{self.args.n_gpu} GPUs in one process", self.args.n_gpu > 1),
        ):
            if used:
                raise NotImplementedError(f"MultiTaskTrainer: expected one process for each GPU (DDP), got {name}")
        self.model_accepts_loss_kwargs = False  # the model has not divided the sum of the losses by tokens
        method.to(self.args.device)

    @property
    def method(self) -> Method | Scalarization:
        """The method."""
        return self._steps.method

    @property
    def info(self) -> Info | None:
        """What the method saw and did in the last step."""
        return self._steps.info

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Mapping[str, Any]:
        """For a subclass to define.

        Args:
            model: the model, wrapped as in training.
            inputs: a batch.

        Returns:
            `{"losses": ...}`: T losses, a dict by name, list, tuple or tensor [T], None for an absent task; optionally
            with `representation`, `features` or `outputs`.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected it to define compute_losses(self, model, inputs)")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """The sum of the losses; see `Trainer`."""
        output = self.compute_losses(model, inputs)
        total = self._steps.total(output, "compute_losses")
        return (total, output.get("outputs", {})) if return_outputs else total

    def create_accelerator_and_postprocess(self) -> None:
        """The trainer's own, with the method's backward pass."""
        super().create_accelerator_and_postprocess()
        self.accelerator.backward = self._backward

    def _backward(self, loss: Tensor, **kwargs: Any) -> None:
        accelerator = self.accelerator
        if not self._steps.pending:
            type(accelerator).backward(accelerator, loss, **kwargs)
            return
        scaled = loss / accelerator.gradient_accumulation_steps
        grad_scale = None
        if accelerator.scaler is not None:
            scaled = accelerator.scaler.scale(scaled)
            grad_scale = accelerator.scaler.scale(torch.ones_like(loss)).detach()
        self._steps.backward(
            scaled,
            accelerator.unwrap_model(self.model),
            grad_scale=grad_scale,
            within=not accelerator.sync_gradients,
            pieces=self.args.gradient_accumulation_steps,
            several=self.args.world_size > 1,
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, extended by what the method saw and did in the last step."""
        if "loss" in logs:
            logs = logs | self._steps.numbers("mtl/")
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.method.state_dict(), Path(output_dir) / _STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / _STATE).exists():
            self.method.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))

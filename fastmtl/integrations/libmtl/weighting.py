"""What LibMTL's trainer requires of a weighting, for any method of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.graph import edge_of, leaves_of, trunk_of, vjp
from fastmtl.info import Info
from fastmtl.methods.base import Method
from fastmtl.options import flag
from fastmtl.rule import context_of
from fastmtl.scalarization import Scalarization
from fastmtl.training.commit import commit, pairs
from fastmtl.training.passes import without_tensor_hooks

__all__ = ["Weighting", "one_by_one", "weighting_of"]


class Weighting(nn.Module):
    """A weighting strategy for LibMTL's trainer; a subclass's `make` makes the method behind it.

    Shared parameters get the aggregated gradient, all others the gradient of their own loss (methods on losses: of the
    weighted sum). With `rep_grad=False` the task gradients are those of the shared parameters, by T backward passes;
    with `rep_grad=True` those of the representation, by one pass through the heads and one through the encoder.
    Gradients are added to `.grad` all at once, and only when everything else has succeeded.

    With `rep_grad=True` the task weights are those of gradients summed over the batch, as in LibMTL: row t of G has the
    size of one example's representation. `rep_sum=False` in `weight_args` takes the gradients of all examples, side by
    side, which is the upper bound of the Aligned-MTL and MGDA-UB papers.

    `weight_args` are the arguments of `make`, and `rep_sum`; unknown ones raise. The method is part of the model: what
    it learns or remembers is in `model.state_dict()`, and its parameters, if any, are in `model.parameters()`, so that
    the trainer's optimizer trains them.
    """

    method: Any
    # What the architecture and the trainer provide.
    task_num: int
    task_name: Sequence[str]
    device: Any
    rep_grad: bool
    rep: Any
    rep_tasks: dict[str, Tensor]
    get_share_params: Callable[[], Iterable[Tensor]]

    _counts_epochs = False

    @staticmethod
    def make(tasks: int) -> Method | Scalarization:
        """The method for that many tasks; further arguments, all with defaults, are the options in `weight_args`."""
        raise NotImplementedError

    def init_param(self) -> None:
        """Makes the method with its defaults, before the optimizer is made, which takes its parameters."""
        self.method = self.make(self.task_num)
        self._options: dict[str, Any] = {}
        self._rep_sum = True
        self._epoch: int | None = None

    def backward(self, losses: Tensor | Sequence[Tensor], **kwargs: Any) -> np.ndarray | None:
        """From T losses to `.grad`.

        Args:
            losses: a tensor [T], as LibMTL's trainer makes it (each of the T passes then goes through all heads, as in
                LibMTL: its entries have one graph), or a sequence of T scalars.
            **kwargs: the options.

        Returns:
            The task weights, float64 [T]; None for a method that has none (`GradDrop`).

        Raises:
            TypeError: an option that the method does not have.
            ValueError: an option out of range; with `rep_grad=True`, representations that differ in shape, or a method
                that needs the gradients of parameters.
        """
        self._configure(kwargs)
        return self._step(one_by_one(losses))

    def _configure(self, options: dict[str, Any]) -> None:
        """Applies the options; the state, which may have been loaded, is kept."""
        options = dict(options)
        self._rep_sum = flag(options.pop("rep_sum", True), "rep_sum")
        if options == self._options:
            return
        method = self.make(self.task_num, **options)
        if next(method.parameters(), None) is not None:
            raise ValueError(f"{type(self).__name__}: expected no options in weight_args, got {sorted(options)}")
        method.load_state_dict(self.method.state_dict())
        method.to(self.device).train(self.training)
        self.method, self._options = method, options

    def _step(
        self, losses: list[Tensor], groups: list[list[Tensor]] | None = None, scale_heads: bool = False
    ) -> np.ndarray | None:
        if self._counts_epochs:
            self._end_epochs()
        if self.rep_grad:
            info = self._through_representation(losses)
        elif isinstance(self.method, Scalarization):
            info = self.method.backward(losses, self.get_share_params())
        else:
            shared = None if groups is not None else self.get_share_params()
            info = self.method.backward(losses, shared, groups=groups, scale_heads=scale_heads)
        if info.alpha is None:
            return None
        alpha = info.alpha if info.alpha.ndim == 1 else info.alpha.mean(0)  # over groups of parameters
        return alpha.cpu().numpy()

    def _end_epochs(self) -> None:
        """Tells the method of the epochs that have ended since the last step."""
        now = getattr(self, "epoch", 0)
        for _ in range(0 if self._epoch is None else now - self._epoch):
            self.method.end_epoch()
        self._epoch = now

    def _through_representation(self, losses: list[Tensor]) -> Info:
        """The upper bound. The heads read copies of the representation, so that one pass brings all T gradients."""
        on_losses = isinstance(self.method, Scalarization)
        copies = [self.rep_tasks[task] for task in self.task_name]
        total = self._total(losses, copies) if on_losses else sum(losses[1:], losses[0])
        several = isinstance(self.rep, dict)
        rep = [self.rep[task] for task in self.task_name] if several else [self.rep]
        ids = {id(x) for x in copies}
        heads = [leaf for leaf in leaves_of([total], []).all() if id(leaf) not in ids]
        trunk = trunk_of(edge_of(x) for x in rep).leaves
        with without_tensor_hooks([*heads, *trunk]):
            grads = torch.autograd.grad(total, [*copies, *heads], allow_unused=True)
            rows, own = grads[: len(copies)], grads[len(copies) :]
            cotangents, info = self._on_losses(rows, several) if on_losses else self._on_rows(rows, losses, several)
            updates = vjp(rep, cotangents, trunk)
        commit(pairs([*trunk, *heads], [*updates, *own]))
        return info

    def _total(self, losses: list[Tensor], copies: list[Tensor]) -> Tensor:
        """The scalar of a method on losses; each head reads one of the copies of the representation."""
        total: Tensor = self.method(losses)
        return total

    def _on_losses(self, rows: Sequence[Tensor | None], several: bool) -> tuple[Sequence[Tensor | None], Info]:
        """Cotangents of the representation for gradients of weighted losses."""
        info: Info = self.method.info
        if several:
            return rows, info
        reached = [g for g in rows if g is not None]
        return [torch.stack(reached).sum(0) if reached else None], info

    def _on_rows(
        self, rows: Sequence[Tensor | None], losses: list[Tensor], several: bool
    ) -> tuple[Sequence[Tensor | None], Info]:
        """Cotangents of the representation for gradients that are to be aggregated."""
        method: Method = self.method
        T = len(losses)
        if not method.on_gram:
            raise ValueError(
                f"rep_grad: expected False with {method!r}, which needs the gradients of parameters, got True"
            )
        summed, present = self._summed(rows)
        method.check_tasks(T)
        info = method.solve(ops.gram_rows(summed, T), present[0].dtype, context_of(method, losses, T))
        if several:
            return [None if g is None else g * info.alpha[t].to(g.dtype) for t, g in enumerate(rows)], info
        combined = torch.empty_like(next(g for g in rows if g is not None))
        ops.combine_rows(rows, info.alpha, [combined])
        return [combined], info

    def _summed(self, rows: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor]]:
        """The gradients that the weights are made for, summed over the batch or as they are; and those there are."""
        summed = [g if g is None or g.ndim < 2 or not self._rep_sum else g.sum(0) for g in rows]
        present = [g for g in summed if g is not None]
        if len({g.shape for g in present}) != 1:
            shapes = [list(g.shape) for g in present]
            raise ValueError(f"rep: expected representations of one shape that losses reach, got {shapes}")
        return summed, present


def weighting_of(make: Callable[..., Method | Scalarization], name: str | None = None) -> type[Weighting]:
    """A weighting class for any method, for `Trainer(weighting=...)`.

        Krum = weighting_of(lambda tasks, byzantine=0: fastmtl.Krum(byzantine=byzantine))

    Args:
        make: called with the number of tasks, and `weight_args` as keywords, which all need defaults.
        name: of the class; default: that of `make`.
    """
    namespace = {"make": staticmethod(make), "__doc__": make.__doc__, "__module__": __name__}
    return type(name or str(getattr(make, "__name__", "Weighting")), (Weighting,), namespace)


def one_by_one(losses: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A list of the T losses."""
    return list(losses.unbind()) if isinstance(losses, Tensor) else list(losses)

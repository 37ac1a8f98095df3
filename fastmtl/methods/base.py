"""What all methods share: how they are called, and the pipeline gradients → Gram → weights → combine behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.inputs import DTYPES, Rows, checked_out
from fastmtl.losses import Losses
from fastmtl.methods.checks import check_gram, checked_weights
from fastmtl.ops.derivatives import detached
from fastmtl.pipeline import aggregate_rows
from fastmtl.rule import NOTHING, Context, MethodModule, context_of, solved
from fastmtl.training.accumulate import Accumulator
from fastmtl.training.backward import backward
from fastmtl.training.parameters import Heads, Parameters

__all__ = ["GradScale", "GramMethod", "Method"]

GradScale: TypeAlias = Tensor | float | None  # None for 1


class Method(MethodModule):
    """One direction from T task gradients.

    Most methods work on the Gram matrix: they derive from `GramMethod` and define `weigh`. A method that needs the
    gradients themselves defines `aggregate_matrix` and `aggregate_list`.

    A method is a module: `parameters()` has what it learns, `state_dict()` what it remembers, and `.to(device)`
    moves both; options are plain attributes. State changes only in training mode, not under `.eval()`. A
    method without state has an empty `state_dict()`, and threads and models can share it.

    Attributes:
        on_gram: whether it needs only the Gram matrix of the gradients.
        needs_losses: whether it needs the T losses.
        remembers: whether a step depends on earlier ones. Such a method cannot be used inside `torch.compile`.
        names: the tasks' names, in the order of weights and state; None until losses have been passed by name.
    """

    on_gram: bool = False
    needs_losses: bool = False
    remembers: bool = False
    on_losses: bool = False  # as a scalarization is

    @overload
    def __call__(
        self,
        gradients: Tensor,
        out: Tensor | None = None,
        *,
        losses: Losses | None = None,
        grad_scale: GradScale = None,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        gradients: Rows,
        out: Sequence[Tensor | None] | None = None,
        *,
        losses: Losses | None = None,
        grad_scale: GradScale = None,
    ) -> list[Tensor | None]: ...
    def __call__(
        self, gradients: Any, out: Any = None, *, losses: Losses | None = None, grad_scale: GradScale = None
    ) -> Any:
        """The aggregated gradient αᵀ G, accumulated in float64 and rounded once to the gradients' dtype.

        Args:
            gradients: G [T, P] or a batch [B, T, P] (float32, float64, bfloat16 or float16; rows of any stride); or T
                rows, each a tensor, a sequence of K tensors, or None. A tensor in a sequence may be None too. Missing
                gradients count as zeros. The k-th tensors of all tasks must agree in shape and dtype.
            out: where to write: [P], [B, P], or K tensors of the parameters' shapes. It must not overlap the gradients
                or itself.
            losses: the T task losses, for methods that need them; others ignore them.
            grad_scale: the factor S (a float or a tensor []) by which a loss scaler has multiplied losses and
                gradients. Only methods that are not homogeneous use it: they compute the weights of the unscaled
                gradients, and the result is S times the unscaled one.

        Returns:
            [P] or [B, P] for a matrix; for rows a list of K tensors (None where no task has a gradient). A non-finite
            gradient makes the whole result non-finite, without raising.

        Raises:
            TypeError: integer, complex or sparse gradients, something that is not a tensor, or a `grad_scale` that is
                not a real number.
            ValueError: wrong number of dimensions, no task, rows that differ in length, shape, dtype or device,
                gradients that require grad or have a forward-mode tangent, weights of another length than T, an `out`
                that does not fit or overlaps an input or itself, losses that are missing or not T of them.
            NotImplementedError: within `torch.func.vmap` or `functionalize`.
        """
        if not isinstance(gradients, Tensor):
            rows = isinstance(gradients, (list, tuple))
            context = context_of(self, losses, len(gradients), grad_scale) if rows else NOTHING
            return aggregate_rows(self, gradients, out, context)[0]
        out = checked_out(gradients, out)
        T = gradients.shape[-2]
        self.check_tasks(T)
        self.aggregate_matrix(gradients, out, context_of(self, losses, T, grad_scale))
        return out

    def backward(
        self,
        losses: Losses,
        shared: Parameters | None = None,
        *,
        representation: Any = None,
        features: Any = None,
        batched: bool = False,
        groups: Sequence[Parameters] | None = None,
        scale_heads: Heads = False,
        retain_graph: bool = False,
        process_group: Any = None,
        grad_scale: GradScale = None,
        engine: Literal["full", "gramian", "auto"] = "full",
        every: int | Literal["auto"] = 1,
        batch_dim: int | None = None,
        per: Literal["all", "example", "task"] = "all",
        check: bool = True,
    ) -> Info:
        """From T losses to `.grad`: the gradients of all tasks, aggregated once and written once.

        The shared parameters get the aggregated gradient, in one of two ways:

        * exactly: T backward passes give each task's gradient of the shared parameters, and these are aggregated;
        * through a shared representation (`representation=h`, the upper bound of the paper, section 5.2): T backward
          passes through the heads give each task's gradient of h, these are aggregated, and the result goes through the
          encoder in a single backward pass.

        Every other parameter that a loss reaches gets the gradient of that loss (or of the sum of the losses that reach
        it). Gradients are committed once, through autograd, so hooks fire. A failure before that leaves every
        `.grad` as it was.

        Args:
            losses: T scalar losses in the order of the tasks, a list, a tuple or a tensor [T]; or a dict of them by
                name, in any order: `info.names` has the order of the first step, which later lists have to follow.
                A task is absent if its loss is None or requires no grad, or if its gradient is zero: its row of
                G is missing, its α is 0, and its head is left alone.
            shared: the shared parameters: a module or an iterable of parameters. Those that require no grad are
                ignored, and those that no loss reaches are left untouched. Default: the parameters that at least two
                losses reach, except where each loss reads entries of its own, as of learned loss scales s[t].
            representation: what the encoder returned, a tensor or a nested structure of tensors. The shared parameters
                are then those behind it, and `shared` has to be None. Warns if a loss does not depend on it, or
                reaches the encoder by a way around it; gradients that bypass it are added unweighted.
            features: like `representation`, but exact: the heads' backward passes run first, down to the features, then
                T passes from there to `shared` (default: all parameters behind the features).
            batched: with `features`, send the T cotangents through the encoder in one vectorised pass. All operations
                of the encoder need a batching rule; on a CPU this speeds up an MLP, but not convolutions.
            groups: parts of the shared parameters, each as `shared`, aggregated separately, for example one per layer;
                all their T × T problems are solved as one batch. `shared` then has to be None.
            scale_heads: multiply the gradients of head t (all parameters that only loss t reaches) by α_t. With
                `fully_shard` the heads have to be given, T modules or iterables of parameters; elsewhere they may be.
            retain_graph: keep the graph for another backward.
            process_group: data parallelism: aggregate the gradients *averaged over the processes* of this group (True:
                all processes). Every process has to call; one that lacks losses passes None for them and names the
                shared parameters. The other parameters' gradients stay local; DistributedDataParallel averages them.
                None means False, each process by itself, but warns if there are several processes.
            grad_scale: the factor S by which a loss scaler has multiplied the losses (`scaler.get_scale()`), for
                methods that are not homogeneous: see `__call__`.
            engine: how exact gradients are computed. "full": T backward passes down to the parameters. "gramian":
                the Gram matrix from activations and T cotangents of the operations' outputs, then one gradient per
                weight, for methods that need only the Gram matrix; as accurate as float32 products allow, without
                memory for T gradients (docs/methods.md). "auto": whichever a cost model expects to be faster.
            every: compute task weights in every k-th step. In between, one pass brings Σ α_t g_t with the last weights
                (kept in `state_dict()`; for examples, by position); heads get their own gradients. "auto": k grows
                while the weights hold.
            batch_dim: the losses are per-example losses [B], or those of T tasks and B examples, [T, B] or [B, T]; this
                is the examples' dimension. Loss b must depend on example b alone: one backward pass brings the Gram
                matrix of all B gradients (docs/methods.md), whichever `engine`. All parameters are shared by default.
            per: for T tasks and B examples, what is aggregated together: "all", α [T·B] in the order of [T, B];
                "example", the tasks of each, α [B, T]; "task", the examples of each, α [T, B]. Results are summed.
            check: verify by a second pass that no loss depends on another's example: in each step (on a GPU the host
                waits for it), or only in the first step of each kind of graph.

        Returns:
            What the method saw and did.

        Raises:
            TypeError: a loss, a shared parameter or a part of the representation is not a floating tensor, or a
                gradient is sparse.
            ValueError: a loss that is not a scalar, no loss or no shared parameter that requires grad, a shared
                parameter that is not a leaf, an unknown engine, options that exclude each other, weights whose length
                is not T.
        """
        return backward(
            self,
            losses,
            shared,
            representation=representation,
            features=features,
            batched=batched,
            groups=groups,
            scale_heads=scale_heads,
            retain_graph=retain_graph,
            process_group=process_group,
            grad_scale=grad_scale,
            engine=engine,
            every=every,
            batch_dim=batch_dim,
            per=per,
            check=check,
        )

    def accumulate(
        self,
        shared: Parameters | None = None,
        *,
        groups: Sequence[Parameters] | None = None,
        scale_heads: bool = False,
        process_group: Any = None,
    ) -> Accumulator:
        """For micro-batches: their T gradients are summed and aggregated once. Arguments are those of `backward`."""
        return Accumulator(self, shared, groups, scale_heads, process_group)

    def after_step(self, losses: Callable[[], Losses]) -> None:
        """To call after the optimizer's step, for methods that learn from its effect; most ignore it.

        Args:
            losses: computes the T losses of the same batch again; only methods that need them call it.
        """

    def end_epoch(self) -> None:
        """To call at the end of an epoch, for methods that count epochs; most ignore it."""

    def reset(self) -> None:
        """Returns to the state of a new instance: buffers become None, as before the first step."""
        super().reset()
        self._buffers.update(dict.fromkeys(self._buffers))

    def check_tasks(self, T: int) -> None:
        """Raises ValueError where the options do not fit T tasks."""

    def aggregate_matrix(self, G: Tensor, out: Tensor, context: Context) -> None:
        """Writes the aggregation of G [T, P] or [B, T, P] into `out` [P] or [B, P]; both are checked."""
        raise NotImplementedError(_missing(self, "aggregate_matrix(self, G, out, context)"))

    def aggregate_list(
        self, grads: Sequence[Tensor | None], T: int, dtype: torch.dtype, out: list[Tensor], context: Context
    ) -> Info:
        """Writes the aggregation of a ragged list (entry t·K + k) into K tensors, empty where no task has a gradient.

        `dtype` is the coarsest among the gradients.
        """
        raise NotImplementedError(_missing(self, "aggregate_list(self, grads, T, dtype, out, context)"))

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        """Task weights from M [T, T] or [B, T, T], the Gram matrix of gradients of this dtype, and other findings.

        For methods on the Gram matrix only.
        """
        raise NotImplementedError(_missing(self, "solve(self, M, dtype, context)"))

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Keys that are present are the state, of any shape; missing ones were None.
        for name in self._buffers.keys() - self._non_persistent_buffers_set:
            value = state_dict.get(prefix + name)
            setattr(self, name, None if value is None else value.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args)


class GramMethod(Method):
    """A method that needs only the Gram matrix M = G Gᵀ of the gradients: a map M → α.

    A method of your own only has to define `weigh` (docs/your-own-method.md):

        class Inverse(fastmtl.GramMethod):
            def weigh(self, M):
                norms = M.diagonal(dim1=-2, dim2=-1).sqrt()
                return 1 / norms

    It then works like every other method: on a matrix, a batch or rows; with every option of `backward`; with
    `fan_out` and `attach`; in several processes; within `torch.compile`, if torch can compile `weigh`.

    A method with state keeps it in buffers that are None until the first step (`register_buffer(name, None)`) and sets
    `remembers`; `weigh` changes the state only if `self.training`.
    """

    on_gram = True

    @staticmethod
    def of(f: Callable[[Tensor], Tensor], name: str | None = None) -> GramMethod:
        """Makes a method of a function M → α: see `weigh` for what it receives and returns.

            method = fastmtl.GramMethod.of(lambda M: torch.linalg.pinv(M).sum(-1))

        Args:
            f: the function. If it is a module, it becomes part of the method, with its parameters and state.
            name: for `repr`; default: the function's.

        Raises:
            TypeError: `f` is not a function.
        """
        return _OfFunction(f, name)

    def weigh(self, M: Tensor) -> Tensor:
        """Task weights α from a Gram matrix: what a method of your own defines.

        Args:
            M: [T, T], or [B, T, T] for B groups of parameters or matrices: float64, on the gradients' device, symmetric
                and positive semidefinite up to rounding. It is a copy that `weigh` may overwrite. If a task is absent
                in this step (no gradient, or a zero one), its row and column are zero.

        Returns:
            α of shape M.shape[:-1], on M's device, of a floating dtype, detached. Entries of absent tasks are replaced
            by 0; the others' weights are up to the method. If M is not finite, all weights become NaN.
        """
        raise NotImplementedError(_missing(self, "weigh(self, M), which returns α [..., T] for M [..., T, T]"))

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        """Task weights from M, and other findings: the hook beneath `weigh`, for methods that need more.

        A method that overrides it has to follow the conventions itself: accept M in float64 or float32 and leave it
        unchanged; 0 for an absent task; NaN if M is not finite.

        Args:
            M: [T, T] or [B, T, T], the Gram matrix.
            dtype: the coarsest dtype among the gradients behind it, which sets tolerances.
            context: the losses (with `needs_losses`), a loss scaler's factor, and how processes agree on random draws.

        Returns:
            An info with `alpha`, float64 [..., T], and `gram`.
        """
        alpha = checked_weights(self, self.weigh(M.to(torch.float64, copy=True)), M)
        return Info.of(ops.constant(M, alpha), M)

    def weighting(
        self,
        M: Tensor,
        dtype: torch.dtype | None = None,
        *,
        losses: Losses | None = None,
        grad_scale: GradScale = None,
    ) -> Tensor:
        """Task weights α from a Gram matrix: the middle of the pipeline, for callers who have M = G Gᵀ already.

        For a method with state this is a step: it changes the state.

        Args:
            M: Gram matrix [T, T] or a batch [B, T, T], float32 or float64.
            dtype: dtype of the gradients behind `M`, which sets default tolerances; default: that of `M`.
            losses: as in `__call__`.
            grad_scale: as in `__call__`.

        Returns:
            α, float64, [T] or [B, T].

        Raises:
            TypeError: `M` is not a dense float32 or float64 tensor.
            ValueError: `M` is not square, requires grad or has a forward-mode tangent, weights or losses of another
                length than T, losses that are missing.
        """
        check_gram(M)
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype!r}")
        T = M.shape[-1]
        self.check_tasks(T)
        return solved(self, M, dtype or M.dtype, context_of(self, losses, T, grad_scale)).alpha

    def aggregate_matrix(self, G: Tensor, out: Tensor, context: Context) -> None:
        ops.combine(G, solved(self, ops.gram(G), G.dtype, context).alpha, out)

    def aggregate_list(
        self, grads: Sequence[Tensor | None], T: int, dtype: torch.dtype, out: list[Tensor], context: Context
    ) -> Info:
        # Everything is checked before any state changes.
        info = solved(self, detached(ops.gram_rows, grads, T, out), dtype, context)
        ops.combine_rows(grads, info.alpha, out)
        return info


class _OfFunction(GramMethod):
    """What `GramMethod.of` returns."""

    def __init__(self, f: Callable[[Tensor], Tensor], name: str | None) -> None:
        if not callable(f) or isinstance(f, (type, Method)) or getattr(f, "on_losses", False):
            raise TypeError(f"f: expected a function of a Gram matrix, got {f!r}")
        super().__init__()
        self.f = f
        self.name = name or getattr(f, "__name__", None) or type(f).__name__

    def weigh(self, M: Tensor) -> Tensor:
        return self.f(M)

    def __repr__(self) -> str:
        return f"GramMethod.of({self.name})"


def _missing(method: Method, what: str) -> str:
    return f"{type(method).__name__}: expected it to define {what}"

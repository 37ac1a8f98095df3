"""Every method of the harness on B problems of two tasks at once.

The parameters x are shared by both tasks and are their own representation, so some methods are the same here:

* `mgda-ub` is `mgda` and `aligned-ub` is `aligned`: they are not listed a second time;
* `imtl`, `nash`, `config` and `fairgrad` have one direction for two tasks, that of g_1/‖g_1‖ + g_2/‖g_2‖, and differ in
  its length, which Adam forgets only where it stays the same;
* `pcgrad` and `upgrad` have one direction for two tasks, and differ by a factor 2; the order in `pcgrad` plays no part.
  Their ends still differ where rounding decides: in the valleys of f, which Adam crosses to and fro;
* `rlw` and `rgw` follow one law, with other draws;
* `dwa`, whose epoch is one step here, since a step sees everything there is, stays close to `uniform`.

Methods on losses get L_t + 20, times the task's weight, which is positive, as ratios and logarithms ask for; a constant
changes no gradient.

`aligned` has the weights "sum" (the losses come weighted), and has two companions: `aligned-gram`, the public codes'
rank rule, and `aligned-tight`, a tolerance of rounding errors' size, T · eps of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fastmtl
from experiments.harness import METHODS, method_of
from fastmtl import scalarization

__all__ = ["NAMES", "OnGradients", "OnLosses", "batched"]

TASKS = 2

_ALIGNED: dict[str, dict[str, Any]] = {
    "aligned": {},
    "aligned-gram": {"rank_rule": "gram"},
    "aligned-tight": {"rtol": TASKS * torch.finfo(torch.float32).eps},
}
NAMES = tuple(dict.fromkeys([name for name in METHODS if not name.endswith("-ub")] + list(_ALIGNED)))


class OnGradients:
    """A method on gradients: the library takes a batch of matrices.

    Args:
        method: which; one that draws takes its numbers from `generator`.
        generator: of this method alone, so that it draws the same whatever runs beside it.
    """

    learned: Sequence[nn.Parameter] = ()

    def __init__(self, method: Any, generator: torch.Generator) -> None:
        self.method, self.generator = method, generator
        if hasattr(method, "generator"):
            method.generator = generator

    def __call__(self, L: Tensor, G: Tensor) -> Tensor:
        """Aggregated gradients [B, 2] for losses L [B, 2] and their gradients G [B, 2, 2]."""
        return self.method(G)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {"method": dict(self.method.state_dict()), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it."""
        self.method.load_state_dict(state["method"])
        self.generator.set_state(state["generator"])


class OnLosses:
    """A method on losses: one for each problem, whose states are stacked, under `torch.func.vmap`.

    On tensors this small, transforms cost many times what they compute, so a step is traced once by `make_fx`; what
    runs are the plain operations that are left.

    Args:
        method: which; one that draws takes its numbers from `generator`.
        generator: as in `OnGradients`.
        problems: B.

    Attributes:
        learned: parameters that the optimizer has to learn; a call sets their `.grad`.
    """

    def __init__(self, method: scalarization.Scalarization, generator: torch.Generator, problems: int) -> None:
        self.generator = generator
        if isinstance(method, scalarization.RLW):
            method.generator = generator
        one = _Step(method)
        self._learned = {k: nn.Parameter(_repeated(p, problems)) for k, p in one.named_parameters()}
        self._buffers = {k: _repeated(b, problems) for k, b in one.named_buffers()}
        self.learned: Sequence[nn.Parameter] = list(self._learned.values())
        # Tracing is a step too: it draws, and changes the state it is given.
        drawn = generator.get_state()
        state = {k: b.clone() for k, b in self._buffers.items()}
        example = torch.ones(problems, TASKS), torch.ones(problems, TASKS, 2)
        self._traced = make_fx(_vectorised(one))(self._learned, state, *example)
        generator.set_state(drawn)

    def __call__(self, L: Tensor, G: Tensor) -> Tensor:
        """Aggregated gradients [B, 2] for losses L [B, 2] and their gradients G [B, 2, 2]."""
        with torch.no_grad():  # the derivatives are in the trace
            aggregated, grads = self._traced(self._learned, self._buffers, L, G)
        for p, grad in zip(self.learned, grads, strict=True):
            p.grad = grad
        return aggregated

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {
            "learned": {k: p.detach() for k, p in self._learned.items()},
            "buffers": self._buffers,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it."""
        with torch.no_grad():
            for k, p in self._learned.items():
                p.copy_(state["learned"][k])
        for k, b in self._buffers.items():
            b.copy_(state["buffers"][k])
        self.generator.set_state(state["generator"])


class _Step(nn.Module):
    """What is called for one problem in one step: losses [2] and gradients [2, 2] to the scalar and its weights [2]."""

    def __init__(self, method: scalarization.Scalarization) -> None:
        super().__init__()
        self.method = method

    def forward(self, L: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        self.method.after_step(lambda: L)  # the problem has no batches: these are the losses after the step before
        value = self._norms(L, G) if isinstance(self.method, scalarization.GradNorm) else self.method(L)
        self.method.end_epoch()
        assert self.method.last_weights is not None  # set by the call
        return value, self.method.last_weights

    def _norms(self, L: Tensor, G: Tensor) -> Tensor:
        """GradNorm wants a graph from the losses to x: that of the linear functions with these values and gradients."""
        state = dict(self.method.named_buffers())

        def at(x: Tensor) -> tuple[Tensor, Any]:
            inner = {k: b.clone() for k, b in state.items()}  # a derivative allows no writing to what is outside of it
            value = functional_call(self.method, inner, ((L + G @ x).unbind(), x))
            return value, (value.detach(), self.method.last_weights, inner)

        result: Any = vjp(at, torch.zeros_like(L), has_aux=True)
        value, self.method.last_weights, inner = result[-1]
        for k, b in state.items():
            b.copy_(inner[k])
        return value


def _vectorised(one: _Step) -> Callable[..., Any]:
    """A step of B problems: aggregated gradients [B, 2], and the derivatives of what is learned."""

    def problem(learned: Any, buffers: Any, L: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(one, (learned, buffers), (L, G))

    def step(learned: dict[str, Tensor], buffers: dict[str, Tensor], L: Tensor, G: Tensor) -> Any:
        values, weights = vmap(problem, randomness="different")(learned, buffers, L, G)
        grads = torch.autograd.grad(values.sum(), list(learned.values())) if learned else ()
        return (weights.detach()[:, None, :] @ G).squeeze(1), grads

    return step


def _repeated(x: Tensor, problems: int) -> Tensor:
    return x.detach().expand(problems, *x.shape).clone()


def batched(name: str, problems: int, seed: int) -> OnGradients | OnLosses:
    """The method of this name, one of `NAMES`, for B problems.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"method: expected one of {', '.join(NAMES)}, got {name!r}")
    options = _ALIGNED.get(name)
    method: Any = method_of(name, TASKS) if options is None else fastmtl.AlignedMTL(weights="sum", **options)
    generator = torch.Generator().manual_seed(seed)
    if method.on_losses:
        return OnLosses(method, generator, problems)
    return OnGradients(method, generator)

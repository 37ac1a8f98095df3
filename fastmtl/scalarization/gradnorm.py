"""GradNorm: Gradient Normalization for Adaptive Loss Balancing (Chen et al., ICML 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastmtl.inputs import describe
from fastmtl.losses import Losses
from fastmtl.options import Numbers, integer, number, numbers, option
from fastmtl.rule import checked_scale
from fastmtl.scalarization.adam import Adam
from fastmtl.scalarization.base import Scalarization, divided, masked

__all__ = ["GradNorm"]


def _checked_initial(value: object, name: str) -> Tensor | None:
    if value is None:
        return None
    x = numbers(value, name)
    if not bool((x > 0).all()):
        raise ValueError(f"{name}: expected finite positive numbers, got {x.tolist()}")
    return x


class GradNorm(Scalarization):
    """GradNorm: Σ_t w_t L_t, with w learned so that gradient norms are similar and all tasks train at similar rates.

    At the weights W of the last shared layer, with G_t = ‖w_t ∇_W L_t‖, w takes one Adam step on

        Σ_t |G_t - mean(G) · r_t^α|        r_t = (L_t / L_t(0)) / mean(L / L(0))

    in which the targets mean(G) · r_t^α are constants, and is then rescaled to Σ_t w_t = T. As in the paper's
    Algorithm 1, the result uses the w from before the step; w starts at ones. The gradients take T backward passes
    through the heads, down to W and no further. The losses must not be negative. Absent tasks keep their w, and do not
    enter the means.

        gradnorm.backward(losses, model.encoder); optimizer.step()

    In `backward` W is the last shared parameter with more than one dimension; use `shared=[W]` to name another.
    It cannot be used with `fan_out`, whose `total` knows no layer.

    Source: Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
    Multitask Networks", ICML 2018, Algorithm 1.

    Args:
        tasks: number of tasks T.
        alpha: α, how strongly tasks that train slowly are favoured; the authors use 1.5 on NYUv2 (0.12 for very
            similar tasks); 0 asks for equal norms.
        lr: Adam's learning rate for w.
        initial_losses: L(0), T positive numbers, such as log C for the cross entropy of C classes; default: the losses
            of the first step (the first at which all are finite and positive).

    Raises:
        TypeError: `tasks` is not an int, another option is not a number.
        ValueError: `tasks` is less than 1, `alpha` or `lr` is negative, `initial_losses` are not positive or not of
            shape [T].
    """

    w: Tensor
    initial: Tensor  # L(0), NaN where there is none yet
    tasks: int = option(integer(1), fixed=True)
    alpha: float = option(number(low=0))
    lr: float = option(number(low=0))
    initial_losses: Tensor | None = option(_checked_initial, fixed=True)

    _positive = False

    def __init__(
        self,
        tasks: int,
        *,
        alpha: float = 1.5,
        lr: float = 0.025,
        initial_losses: Numbers | None = None,
    ) -> None:
        super().__init__(tasks)
        self.alpha = alpha
        self.lr = lr
        if initial_losses is not None:
            initial_losses = numbers(initial_losses, "initial_losses", tasks=self.tasks)
        self.initial_losses = initial_losses
        self.register_buffer("initial", torch.empty(self.tasks, dtype=torch.float64))
        self.register_buffer("w", torch.ones(self.tasks, dtype=torch.float64))
        self.adam: Adam = Adam(self.tasks)
        self.reset()

    def reset(self) -> None:
        """Returns to weights 1 and the given initial losses; forgets Adam's state."""
        super().reset()
        self.w.fill_(1.0)
        if self.initial_losses is None:
            self.initial.fill_(math.nan)
        else:
            self.initial.copy_(self.initial_losses)
        self.adam.reset()

    def forward(
        self,
        losses: Losses,
        layer: Tensor | Iterable[Tensor] | None = None,
        *,
        grad_scale: Tensor | float | None = None,
    ) -> Tensor:
        """The weighted sum Σ_t w_t L_t; in training mode w then takes its step.

        Args:
            losses: T scalar tensors, None for absent tasks, or a tensor [T], with a graph that leads to `layer`.
            layer: W, the weight of the last shared layer, or several tensors; needed in training mode. A task that
                does not reach it has norm 0.
            grad_scale: the factor S by which the losses are scaled.

        Returns:
            A scalar tensor [], float64 for float64 losses, else float32.

        Raises:
            TypeError: as `Scalarization.forward`; `layer` is neither a tensor nor a collection of tensors.
            ValueError: as `Scalarization.forward`; in training mode `layer` is missing, or it or the losses do not
                require grad.
        """
        if not self.training:
            return super().forward(losses, grad_scale=grad_scale)
        W = _tensors(layer)
        result = super().forward(losses, grad_scale=grad_scale)
        if not result.requires_grad:
            raise ValueError("losses: expected losses that require grad (for their norms), got constants")
        S, parts = checked_scale(grad_scale), self._parts(losses)
        L, here = self._stacked(losses)
        here = torch.ones_like(L, dtype=torch.bool) if here is None else here
        self._learn(divided(L.detach(), S), divided(_norms(parts, W), S), here)
        return result

    def _value(
        self, losses: Losses, shared: nn.Module | Iterable[Tensor] | None, grad_scale: Tensor | float | None
    ) -> Tensor:
        result: Tensor = self(losses, _last_layer(shared) if self.training else None, grad_scale=grad_scale)
        return result

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[None, Tensor]:
        return None, masked(self.w.to(L.dtype, copy=True), here)  # a copy: w changes before the backward pass

    @torch.no_grad()
    def _learn(self, L: Tensor, norms: Tensor, here: Tensor) -> None:
        """One step of w for losses [T] and gradient norms [T], float64, both unscaled."""
        L = L.to(torch.float64)
        first = self.initial.isnan() & here & (L.isfinite() & (L > 0)).all()
        self.initial.copy_(torch.where(first, L, self.initial))
        ratio = torch.where(here, L / self.initial, 0.0)
        G = torch.where(here, self.w.abs() * norms, 0.0)
        target = G.sum() / here.sum() * (ratio * here.sum() / ratio.sum()).pow(self.alpha)
        gradient = torch.where(here, (G - target).sign() * norms * self.w.sign(), 0.0)
        finite = L.isfinite().all() & target.isfinite().all() & gradient.isfinite().all()
        moved = self.adam.step(self.w, gradient, finite & here, self.lr)
        rest = torch.where(here, 0.0, self.w).sum()  # the sum of all stays T
        moved = torch.where(here, moved * ((self.tasks - rest) / torch.where(here, moved, 0.0).sum()), moved)
        self.w.copy_(torch.where(finite, moved, self.w))

    def _needs(self, t: int) -> str:
        return "a loss >= 0, since GradNorm compares it with the initial one"

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        initial = None if self.initial_losses is None else self.initial_losses.tolist()
        return f"tasks={self.tasks}, alpha={self.alpha}, lr={self.lr}, initial_losses={initial}"


def _last_layer(shared: nn.Module | Iterable[Tensor] | None) -> Tensor:
    """The weight of the last shared layer."""
    parameters = [] if shared is None else list(shared.parameters() if isinstance(shared, nn.Module) else shared)
    weights = [p for p in parameters if isinstance(p, Tensor) and p.ndim > 1 and p.requires_grad]
    if not weights:
        raise ValueError(
            "shared: expected the shared parameters in training mode, the last weight of which is the layer that "
            f"GradNorm looks at, got {'None' if shared is None else f'{len(parameters)} parameters without a weight'}"
        )
    return weights[-1]


def _tensors(layer: object) -> list[Tensor]:
    if layer is None:
        raise ValueError(
            "layer: expected the weight of the last shared layer in training mode, got None; "
            "backward(losses, shared=…) takes it from the shared parameters, a fan_out does not know it"
        )
    if not isinstance(layer, (Tensor, Iterable)):
        raise TypeError(f"layer: expected a tensor or an iterable of tensors, got {describe(layer)}")
    W = [layer] if isinstance(layer, Tensor) else list(layer)
    if not W:
        raise ValueError("layer: expected at least one tensor, got none")
    for k, x in enumerate(W):
        if not isinstance(x, Tensor):
            raise TypeError(f"layer[{k}]: expected a tensor, got {describe(x)}")
        if not x.requires_grad:
            raise ValueError(f"layer[{k}]: expected a tensor that requires grad, got a constant {describe(x)}")
    return W


def _norms(losses: Sequence[Tensor | None], W: list[Tensor]) -> Tensor:
    """‖∇_W L_t‖ for each task, 0 for absent ones, float64 [T]."""
    norms = []
    for loss in losses:
        squares = W[0].new_zeros((), dtype=torch.float64)
        if loss is not None and loss.requires_grad:
            for g in torch.autograd.grad(loss.reshape(()), W, retain_graph=True, allow_unused=True):
                if g is not None:
                    squares = squares + g.to(torch.float64).square().sum()
        norms.append(squares.sqrt())
    return torch.stack(norms)

"""GradNorm: Gradient Normalization for Adaptive Loss Balancing (Chen et al., ICML 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastmtl._inputs import describe
from fastmtl.scalarization._adam import Adam
from fastmtl.scalarization._scalarization import Losses, Scalarization, check_number, check_numbers, divided

__all__ = ["GradNorm"]


class GradNorm(Scalarization):
    """GradNorm: Σ_t w_t L_t with learned w, under which all tasks have gradients of like norm and train at like rates.

    At the weights W of the last shared layer, with G_t = ‖w_t ∇_W L_t‖, w takes one Adam step on

        Σ_t |G_t - mean(G) · r_t^α|        r_t = (L_t / L_t(0)) / mean(L / L(0))

    in which the targets mean(G) · r_t^α are constants, and is then rescaled to Σ_t w_t = T. As in the paper's
    Algorithm 1 the result has the w from before the step; w starts at ones. The gradients take T backward passes
    through the heads, down to W and no further.

        gradnorm.backward(losses, model.encoder.last.weight); optimizer.step()

    Source: Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
    Multitask Networks", ICML 2018, Algorithm 1.

    Args:
        tasks: number of tasks T.
        alpha: α, how strongly tasks that train slowly are favoured: 1.5 as the authors have on NYUv2 (0.12 for tasks
            much alike); 0 asks for equal norms.
        lr: Adam's learning rate for w.
        initial_losses: L(0), T positive numbers, such as log C for the cross entropy of C classes; default: the losses
            of the first step (the first at which all are finite and positive).

    Raises:
        TypeError: `tasks` is not an int, another option is no number.
        ValueError: `tasks` is less than 1, `alpha` or `lr` is negative, `initial_losses` are not positive or not of
            shape [T].
    """

    w: Tensor
    initial: Tensor
    tasks: int

    def __init__(
        self,
        tasks: int,
        alpha: float = 1.5,
        lr: float = 0.025,
        initial_losses: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__(tasks)
        self.alpha, self.lr = check_number(alpha, "alpha"), check_number(lr, "lr")
        self.initial_losses: list[float] | None = None
        if initial_losses is not None:
            self.initial_losses = check_numbers(initial_losses, "initial_losses", tasks, positive=True).tolist()
        given = self.initial_losses or [math.nan] * tasks
        self.register_buffer("initial", torch.tensor(given, dtype=torch.float64))
        self.register_buffer("w", torch.ones(tasks, dtype=torch.float64))
        self.adam = Adam(tasks, self.lr)

    def reset(self) -> None:
        """Back to weights 1 and the given initial losses; forgets Adam's state."""
        self.w.fill_(1.0)
        self.initial.copy_(torch.tensor(self.initial_losses or [math.nan] * self.tasks, dtype=torch.float64))
        self.adam.reset()

    def forward(
        self, losses: Losses, layer: Tensor | Iterable[Tensor] | None = None, *, grad_scale: Tensor | float = 1.0
    ) -> Tensor:
        """The weighted sum Σ_t w_t L_t; in training mode w then takes its step.

        Args:
            losses: T scalar tensors or a tensor [T], with a graph that leads to `layer`.
            layer: W, the weight of the last shared layer or several tensors; needed in training mode. A task that does
                not reach it has norm 0.
            grad_scale: the factor S by which the losses come scaled.

        Returns:
            A scalar tensor [], float64 for float64 losses, else float32.

        Raises:
            TypeError: as `Scalarization.forward`; `layer` is no tensor and no tensors.
            ValueError: as `Scalarization.forward`; no `layer` in training mode, one that does not require grad, or
                losses that do not.
        """
        if not self.training:
            return super().forward(losses, grad_scale=grad_scale)
        W = _tensors(layer)
        result = super().forward(losses, grad_scale=grad_scale)
        if not result.requires_grad:
            raise ValueError("losses: expected losses that require grad (for their norms), got constants")
        L = self._stacked(losses).detach()
        self._learn(divided(L, grad_scale), divided(_norms(losses, W), grad_scale))
        return result

    def _scalarize(self, L: Tensor) -> tuple[Tensor, Tensor]:
        w = self.w.to(L.dtype, copy=True)  # of its own: the buffer changes before the backward pass
        return (w * L).sum(), w

    @torch.no_grad()
    def _learn(self, L: Tensor, norms: Tensor) -> None:
        """One step of w for losses [T] and gradient norms [T], float64, both unscaled."""
        L = L.to(torch.float64)
        new = self.initial.isnan().any() & (L.isfinite() & (L > 0)).all()
        self.initial.copy_(torch.where(new, L, self.initial))
        ratio = L / self.initial
        G = self.w.abs() * norms
        target = G.mean() * (ratio / ratio.mean()).pow(self.alpha)
        gradient = (G - target).sign() * norms * self.w.sign()
        finite = L.isfinite().all() & target.isfinite().all() & gradient.isfinite().all()
        moved = self.adam.step(self.w, gradient, finite)
        self.w.copy_(torch.where(finite, moved * (self.tasks / moved.sum()), self.w))

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tasks={self.tasks}, alpha={self.alpha}, lr={self.lr}, initial_losses={self.initial_losses}"


def _tensors(layer: object) -> list[Tensor]:
    if layer is None:
        raise ValueError("layer: expected the weight of the last shared layer in training mode, got None")
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


def _norms(losses: Losses, W: list[Tensor]) -> Tensor:
    """‖∇_W L_t‖ for each task, float64 [T]."""
    norms = []
    for loss in losses:
        squares = W[0].new_zeros((), dtype=torch.float64)
        if loss.requires_grad:
            for g in torch.autograd.grad(loss.reshape(()), W, retain_graph=True, allow_unused=True):
                if g is not None:
                    squares = squares + g.to(torch.float64).square().sum()
        norms.append(squares.sqrt())
    return torch.stack(norms)

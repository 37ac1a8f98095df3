"""M-ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks (Liu et al., 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.methods.config import ConFIG, Length
from fastmtl.methods.memory import GradientMemory, Pieces, move, present
from fastmtl.options import Weights, number, option
from fastmtl.rule import Context

__all__ = ["MConFIG"]

_EPS = 1e-8  # added to the root of the second moment, as the authors and Adam do


class MConFIG(GradientMemory):
    """M-ConFIG: an Adam step from ConFIG on the tasks' momenta, of which a step may update as few as one.

        m_t ← β₁ m_t + (1 - β₁) g_t for the tasks of this step        c = ConFIG(m̂_1, …, m̂_T)
        f ← c (1 - β₁^k)    s ← β₂ s + (1 - β₂) ((f - β₁ f_before) / (1 - β₁))²        g = c / (sqrt(ŝ) + 1e-8)

    m̂ and ŝ are bias-corrected, as in Adam. s is the second moment of gradients whose momentum would be c. g is a
    complete step, like Adam's: use it with SGD at Adam's learning rates, without further momentum.

    If the losses alternate, with None for the others, a step costs one backward pass:

        losses = [None] * T; losses[k % T] = ...; method.backward(losses, shared=model)

    So here an absent task takes part with its momentum. Until every task has had a gradient, g is zero. With a loss
    scaler pass `grad_scale=`: g does not depend on the gradients' size, but a scaler expects S g.

    `info` has `gram`, the Gram matrix of this step's gradients, and `alpha`, ConFIG's weights of the momenta.

    Source: Liu, Chu, Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", 2024,
    Algorithm 1, and the authors' code.

    Args:
        beta1: β₁, the decay of the momenta.
        beta2: β₂, the decay of the second moment.
        weights: as in `ConFIG`.
        length: as in `ConFIG`.
        rtol: as in `ConFIG`.

    Raises:
        TypeError: an option of another kind.
        ValueError: `beta1` or `beta2` is not in [0, 1), weights that are not one-dimensional or not finite, a negative
            or non-finite `rtol`; (in a step) gradients whose sizes differ from the first step's.
    """

    memory: ClassVar[str] = "(T + 2)·P"
    momenta: Tensor  # m, [T, P] or [B, T, P]
    counts: Tensor  # how many gradients each has, int64 [T] or [B, T]
    fake: Tensor  # f, [P] or [B, P]
    second: Tensor  # s, [P] or [B, P]
    steps: Tensor  # k, int64 [] or [B]

    beta1: float = option(number(low=0, below=1))
    beta2: float = option(number(low=0, below=1))

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weights: Weights = None,
        length: Length = "projection",
        rtol: float | None = None,
    ) -> None:
        super().__init__("momenta", "counts", "fake", "second", "steps")
        self._config = ConFIG(weights=weights, length=length, rtol=rtol)
        self.beta1 = beta1
        self.beta2 = beta2

    @property
    def weights(self) -> Tensor | str:
        """The ratio of the cosines."""
        return self._config.weights

    @weights.setter
    def weights(self, value: Weights) -> None:
        self._config.weights = value  # type: ignore[assignment]

    @property
    def length(self) -> Length:
        """The length model."""
        return self._config.length

    @length.setter
    def length(self, value: Length) -> None:
        self._config.length = value

    @property
    def rtol(self) -> float | None:
        """The threshold for singular values."""
        return self._config.rtol

    @rtol.setter
    def rtol(self, value: float | None) -> None:
        self._config.rtol = value

    def check_tasks(self, T: int) -> None:
        self._config.check_tasks(T)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"beta1={self.beta1}, beta2={self.beta2}, {self._config.extra_repr()}"

    def _aggregate(self, G: Pieces, context: Context) -> Info:
        M = G.gram()
        there, finite = present(M)
        batch, T, P, device = G.batch, G.T, G.P, M.device
        m = self._kept("momenta", (*batch, T, P), G.kept, device)
        counts = self._kept("counts", (*batch, T), torch.int64, device)
        fake = self._kept("fake", (*batch, P), G.kept, device)
        second = self._kept("second", (*batch, P), G.kept, device)
        steps = self._kept("steps", batch, torch.int64, device)
        scale: Tensor | float = 1.0 if context.grad_scale is None else context.grad_scale
        factor = torch.ones(M.shape[:-1], dtype=torch.float64, device=device) / scale
        move(m, G, there & finite, 1 - self.beta1, factor)
        counts += there & finite
        started = (counts > 0).all(-1, keepdim=True)
        going = started & finite
        steps += going[..., 0]
        k = steps.clamp_min(1).to(torch.float64)[..., None]
        inverse = 1 / (1 - self.beta1 ** counts.clamp_min(1).to(torch.float64))
        N = ops.gram(m) * inverse[..., :, None] * inverse[..., None, :]
        weights = self._config.solve(N, G.dtype).alpha
        alpha = torch.where(started, weights, 0.0)
        c = m.new_empty((*batch, P))
        ops.combine(m, alpha * inverse, c)
        first, other = (1 - self.beta1**k).to(c.dtype), (1 - self.beta2**k).to(c.dtype)
        for begin, end in G.blocks(0, P):
            part, f, s = (x[..., begin:end] for x in (c, fake, second))
            new = part * first
            gradient = (new - self.beta1 * f) / (1 - self.beta1)
            moment = self.beta2 * s + (1 - self.beta2) * gradient.square()
            f.copy_(torch.where(going, new, f))
            s.copy_(torch.where(going, moment, s))
            step = part / ((moment / other).sqrt() + _EPS)
            part.copy_(torch.where(finite, torch.where(started, step, 0.0) * scale, torch.nan))
        G.write(c)
        return Info.of(torch.where(finite, alpha, torch.nan), M)

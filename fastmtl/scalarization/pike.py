"""PiKE: Adaptive Data Mixing for Large-Scale Multi-Task Learning (Li et al., NeurIPS 2025)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmtl import options
from fastmtl.gramian import examples
from fastmtl.inputs import describe
from fastmtl.options import Weights, integer, number, option
from fastmtl.scalarization.base import Scalarization, masked
from fastmtl.scalarization.updates import in_order, trainable

__all__ = ["PiKE"]


def _checked_weights(value: object, name: str) -> Tensor | str:
    x = options.weights(value, name)
    wrong = x == "sum" if isinstance(x, str) else x.device.type == "cpu" and not bool((x > 0).all())
    if wrong:
        raise ValueError(f"{name}: expected None, 'mean' or T positive numbers, got {options.show_weights(x)}")
    return x


def _check_examples(losses: Sequence[Tensor | None]) -> None:
    for t, part in enumerate(losses):
        if part is None:
            continue
        if not (isinstance(part, Tensor) and part.is_floating_point()):
            raise TypeError(f"losses[{t}]: expected a floating tensor or None, got {describe(part)}")
        if part.ndim != 1 or len(part) < 2 or not part.requires_grad:
            raise ValueError(
                f"losses[{t}]: expected the losses [n] of n >= 2 examples, which require grad, got {describe(part)}"
            )


class PiKE(Scalarization):
    """PiKE: divides the batch among tasks that hardly conflict, by the squared norm and variance of their gradients.

        w_t ∝ w_t exp(ζ₁ ‖∇L_t‖² - ζ₂ / (2 b) σ_t²)        Σ_t w_t L_t

    with σ_t² the variance of a single example's gradient, E ‖∇ℓ - ∇L_t‖², and b the batch size. A task gets a larger
    share the more there is to gain, and a smaller one the noisier its gradient is. Call `update` now and then; it
    estimates both numbers from the losses of some examples of every task, by one backward pass per task:

        if step % 100 == 0:
            pike.update([losses_of_examples(t) for t in range(T)], model)
        n = pike.sizes(256)                                     # how many examples of each task to draw
        pike.backward([mean_loss(t, n[t]) for t in range(T)])   # Σ_t w_t L_t

    The gradient of Σ w_t L_t is that of a batch mixed by these sizes (Eq. 2), up to their rounding; with fixed batch
    sizes, w are simply loss weights. `tau` gives Balanced-PiKE, which keeps tasks from being left behind:
    losses are multiplied by y_t = τ softmax(τ L)_t, with the losses of the last update.

    The logarithms of w are the state. A task without examples in an update keeps its share; a task without a loss in a
    step has weight 0, and the others share the rest.

    Source: Li, Deng, Zhong, Razaviyayn, Mirrokni, "PiKE: Adaptive Data Mixing for Large-Scale Multi-Task Learning Under
    Low Gradient Conflicts", NeurIPS 2025, Algorithm 1 and Lemma 3.6. The authors tune ζ₁ and ζ₂ for every run and name
    no defaults; the defaults here are ours. Estimates are unbiased, but at least 0.

    Args:
        tasks: number of tasks T.
        zeta1: ζ₁, how much the squared norm of the gradient counts.
        zeta2: ζ₂, how much its variance counts.
        batch_size: b, over all tasks together.
        tau: τ > 0 of Balanced-PiKE; the larger, the more the largest loss counts (the paper: 1 to 5). None for PiKE.
        weights: initial w: None or "mean" for 1/T each, or T positive numbers, which are scaled to sum to 1.

    Raises:
        TypeError: an option of another kind.
        ValueError: an option out of its range.
    """

    logits: Tensor  # log w, float64 [T]
    squares: Tensor  # ‖∇L_t‖² as in the last update, float64 [T]; infinite before one
    variances: Tensor  # σ_t² likewise
    tilt: Tensor  # y, ones without `tau`

    tasks: int = option(integer(1), fixed=True)
    zeta1: float = option(number(low=0))
    zeta2: float = option(number(low=0))
    batch_size: int = option(integer(1))
    tau: float | None = option(number(above=0, optional=True))
    weights: Tensor | str = option(_checked_weights, fixed=True)

    def __init__(
        self,
        tasks: int,
        *,
        zeta1: float = 0.1,
        zeta2: float = 0.1,
        batch_size: int = 256,
        tau: float | None = None,
        weights: Weights = None,
    ) -> None:
        super().__init__(tasks)
        self.zeta1 = zeta1
        self.zeta2 = zeta2
        self.batch_size = batch_size
        self.tau = tau
        self.weights = weights  # type: ignore[assignment]
        options.check_weights(self.weights, self.tasks)
        for name in ("logits", "squares", "variances", "tilt"):
            self.register_buffer(name, torch.empty(self.tasks, dtype=torch.float64))
        self.reset()

    def reset(self) -> None:
        """Returns to the initial weights."""
        super().reset()
        if isinstance(self.weights, Tensor):
            self.logits.copy_(self.weights.log().log_softmax(0))
        else:
            self.logits.fill_(-math.log(self.tasks))
        self.squares.fill_(torch.inf)
        self.variances.fill_(torch.inf)
        self.tilt.fill_(1)

    def update(
        self,
        losses: Sequence[Tensor | None] | Mapping[str, Tensor | None],
        parameters: nn.Module | Iterable[Tensor],
    ) -> None:
        """Estimates gradient statistics from per-example losses and moves w; leaves every `.grad` as it is.

        Args:
            losses: for every task the losses [n] of n >= 2 of its examples, with their graph, which is kept; None for a
                task that keeps its share. No example may depend on another.
            parameters: whose gradients count: a module or parameters.

        Raises:
            TypeError: losses that are not floating tensors.
            ValueError: the number of entries is not T, an entry is not a vector of at least 2 losses or requires no
                grad, no parameter requires grad, or an example depends on another.
        """
        parts = in_order(self, losses, "losses")
        _check_examples(parts)
        trained = trainable(parameters)
        squares, variances = self.squares.clone(), self.variances.clone()
        means = torch.full_like(squares, -torch.inf)
        for t, part in enumerate(parts):
            if part is not None:
                n = len(part)
                M = examples.gram(part[None], trained).to(squares.device)
                of_mean = M.sum() / n**2  # ‖ḡ‖², which is too large by σ² / n
                variances[t] = ((M.trace() - n * of_mean) / (n - 1)).clamp_min(0)
                squares[t] = (of_mean - variances[t] / n).clamp_min(0)
                means[t] = part.detach().to(torch.float64).mean()
        self._move(squares, variances, means)

    def _move(self, squares: Tensor, variances: Tensor, means: Tensor) -> None:
        here = ~means.isneginf()
        tilt = self.tilt if self.tau is None else torch.where(here, self.tau * (self.tau * means).softmax(0), self.tilt)
        step = tilt.square() * (self.zeta1 * squares - self.zeta2 / (2 * self.batch_size) * variances)
        before = torch.where(here, self.logits, -torch.inf)
        # Those that are there share what they had together.
        after = (before + torch.where(here, step, 0.0)).log_softmax(0) + before.logsumexp(0)
        good = (step.isfinite() & tilt.isfinite() | ~here).all()
        moved = ((self.logits, after), (self.squares, squares), (self.variances, variances), (self.tilt, tilt))
        for buffer, value in moved:
            buffer.copy_(torch.where(good & here, value, buffer))

    def sizes(self, batch_size: int | None = None) -> list[int]:
        """How many examples of each task a batch should have: w times its size, rounded; the host waits for w.

        Args:
            batch_size: the sum of the sizes; default: the option.

        Raises:
            TypeError: not an int.
            ValueError: less than 1.
        """
        b = self.batch_size if batch_size is None else integer(1)(batch_size, "batch_size")
        wanted = [b * w for w in self.logits.exp().tolist()]
        sizes = [math.floor(x) for x in wanted]
        by_rest = sorted(range(self.tasks), key=lambda t: sizes[t] - wanted[t])
        for t in by_rest[: b - sum(sizes)]:
            sizes[t] += 1
        return sizes

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[None, Tensor]:
        return None, (masked(self.logits, here, -torch.inf).softmax(0) * self.tilt).to(L.dtype)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"tasks={self.tasks}, zeta1={self.zeta1}, zeta2={self.zeta2}, batch_size={self.batch_size}, "
            f"tau={self.tau}, weights={options.show_weights(self.weights)}"
        )

"""Random loss weighting (Lin et al., TMLR 2022)."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastmtl import options
from fastmtl.options import choice, option
from fastmtl.scalarization.base import Scalarization, masked

__all__ = ["RLW"]

Distribution: TypeAlias = Literal["normal", "uniform", "dirichlet", "bernoulli", "constrained_bernoulli"]


class RLW(Scalarization):
    """Random loss weighting: Σ_t w_t L_t with new random w at every call, independent of the losses.

    Source: Lin, Ye, Zhang, Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
    Learning", TMLR 2022, and its authors' LibMTL.

    Args:
        distribution: the distribution of w:

            * "normal" (the paper's): the softmax of T draws from N(0, 1);
            * "uniform": the softmax of T draws from U(0, 1);
            * "dirichlet": uniform on the simplex, Dirichlet(1, …, 1) (LibMTL applies another softmax to it);
            * "bernoulli": every w_t is 0 or 1 with probability ½, given that not all are 0;
            * "constrained_bernoulli": one task, drawn uniformly, has weight 1, the rest 0.
        generator: source of randomness, on the losses' device; its state is then part of `state_dict()`. Default:
            torch's global one, whose state (`torch.get_rng_state`) you have to save in checkpoints yourself.

    Raises:
        TypeError: `generator` is not a `torch.Generator`.
        ValueError: an unknown `distribution`; a state dict with a generator's state for an instance without a
            generator, or the reverse.
    """

    distribution: Distribution = option(choice(*get_args(Distribution)))
    generator: torch.Generator | None = option(options.generator)

    def __init__(self, *, distribution: Distribution = "normal", generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.distribution = distribution
        self.generator = generator

    def get_extra_state(self) -> Tensor:
        """The generator's state; empty without a generator."""
        return torch.empty(0, dtype=torch.uint8, device="cpu") if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the generator's state."""
        if (self.generator is None) != (state.numel() == 0):
            has, expected = ("no", "with one") if self.generator is None else ("a", "without one")
            raise ValueError(f"generator: this RLW has {has} generator, but the state is of an RLW {expected}")
        if self.generator is not None:
            self.generator.set_state(state.cpu())

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[None, Tensor]:
        return None, masked(self._drawn(L.detach()), here)

    def _drawn(self, L: Tensor) -> Tensor:
        """Random weights [T] with the dtype and device of L [T]."""
        T, generator = L.shape[0], self.generator
        if self.distribution == "normal":
            return torch.randn(T, dtype=L.dtype, device=L.device, generator=generator).softmax(0)
        if self.distribution == "uniform":
            return torch.rand(T, dtype=L.dtype, device=L.device, generator=generator).softmax(0)
        if self.distribution == "dirichlet":
            w = torch.empty_like(L).exponential_(generator=generator)
            return w / w.sum()
        tasks = torch.arange(T, device=L.device)
        if self.distribution == "constrained_bernoulli":
            return (tasks == torch.randint(T, (1,), device=L.device, generator=generator)).to(L.dtype)
        # Drawing again until some w_t is 1 would make the host wait. The first 1 comes after k zeros with probability
        # 2^-(k+1) / (1 - 2^-T), which is inverted; what follows it is free.
        u = torch.rand(T + 1, dtype=torch.float64, device=L.device, generator=generator)
        first = torch.log2(1 - u[T] * (1 - 0.5**T)).neg().floor().clamp_max(T - 1)
        return ((tasks == first) | ((tasks > first) & (u[:T] < 0.5))).to(L.dtype)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"distribution={self.distribution!r}"

"""Task weights as an option of a method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl._inputs import describe

__all__ = ["Weighted"]

_PLAIN = (Tensor, torch.nn.Parameter)


class Weighted:
    """A method with task weights w: "mean" (1/T each), "sum" (ones), or T numbers.

    Attributes:
        weights: "mean", "sum" or a float64 tensor [T].
    """

    def __init__(self, weights: Tensor | Sequence[float] | str | None) -> None:
        self.weights: Tensor | str = _checked_weights(weights)
        self._placed: dict[tuple[Tensor | str, int, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_placed": {}}  # pickles and copies hold the options alone

    def _weights_repr(self) -> str:
        return repr(self.weights) if isinstance(self.weights, str) else str(self.weights.tolist())

    def _check_tasks(self, T: int) -> None:
        if isinstance(self.weights, Tensor) and self.weights.shape[0] != T:
            raise ValueError(f"weights: expected length {T} (the number of tasks), got {self.weights.shape[0]}")

    def _task_weights(self, T: int, like: Tensor) -> Tensor | None:
        """The weights [T] for the ops, where `like` is; None for 1/T each."""
        if isinstance(self.weights, str):
            return None if self.weights == "mean" else self._weights_on(T, like)
        self._check_tasks(T)
        return self.weights if self.weights.device == like.device else self._weights_on(T, like)

    def _weights_on(self, T: int, like: Tensor) -> Tensor:
        """The weights [T] where the gradients are. A copy is kept: to make one, the host waits for the device."""
        # What a compiled or captured graph allocates is its own, and a fake tensor has no numbers.
        if torch.compiler.is_compiling() or type(like) not in _PLAIN:
            return self._new_weights(T, like)
        weights = self.weights
        key = (weights, T, like.device)
        placed = self._placed.get(key)
        if placed is None:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._new_weights(T, like)
            with torch.inference_mode(False):
                host = torch.ones(T, dtype=torch.float64, device="cpu") if isinstance(weights, str) else weights.cpu()
                placed = host.to(like.device)  # from the host: complete for every stream when it returns
            if type(placed) is Tensor:
                self._placed[key] = placed
        return placed

    def _new_weights(self, T: int, like: Tensor) -> Tensor:
        if isinstance(self.weights, str):
            return like.new_ones(T, dtype=torch.float64)
        return self.weights.to(like.device)


def _checked_weights(weights: Tensor | Sequence[float] | str | None) -> Tensor | str:
    if weights is None:
        return "mean"
    if isinstance(weights, str):
        if weights not in ("mean", "sum"):
            raise ValueError(f'weights: expected None, "mean", "sum" or T numbers, got {weights!r}')
        return weights
    if not isinstance(weights, (Tensor, list, tuple)):
        raise TypeError(f'weights: expected None, "mean", "sum" or T numbers, got {describe(weights)}')
    try:
        w = torch.as_tensor(weights, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f'weights: expected None, "mean", "sum" or T numbers, got {weights!r}') from error
    if w.ndim != 1 or w.shape[0] == 0:
        raise ValueError(f"weights: expected shape [T], got {list(w.shape)}")
    if not bool(w.isfinite().all()):
        raise ValueError(f"weights: expected finite numbers, got {w.tolist()}")
    return w

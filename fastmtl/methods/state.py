"""Methods with state: what they remember from step to step is saved and restored with a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.methods.base import GramMethod

__all__ = ["StatefulMethod"]


class StatefulMethod(GramMethod):
    """A method on the Gram matrix that remembers something.

    Its buffers are the whole state. They are None until the first step, which knows the number of tasks and the device,
    and again after `reset`; `load_state_dict` accepts either. Under `.eval()`, and by a step on a non-finite Gram
    matrix, they stay as they are, without waiting for the device to say so.
    """

    def __init__(self, *state: str) -> None:
        super().__init__()
        for name in state:
            self.register_buffer(name, None)

    def _state(self, shape: Sequence[int], device: torch.device) -> list[Tensor]:
        """The state for Gram matrices of this shape, on this device, for a step to change: in evaluation a copy."""
        state: list[Tensor] = []
        for name, (wanted, dtype, *initial) in self._state_of(shape).items():
            value = self._buffers[name]
            if value is None:
                with torch.inference_mode(False):  # later steps may be outside of it
                    value = torch.full(wanted, initial[0] if initial else 0, dtype=dtype, device=device)
            elif value.shape != torch.Size(wanted):
                raise ValueError(
                    f"{type(self).__name__}: expected Gram matrices as in the first step, for a state of shape "
                    f"{list(value.shape)}, got them of shape {list(shape)}. Pass None for a task that is absent, so "
                    "that the others keep their places; reset() begins anew"
                )
            else:
                value = value.to(device, dtype)  # as it was loaded
            if self.training:
                self._buffers[name] = value
            state.append(value if self.training else value.clone())
        return state

    def _state_of(self, shape: Sequence[int]) -> dict[str, Any]:
        """Shape, dtype and, if not 0, initial value of each buffer that is needed, for Gram matrices [..., T, T]."""
        raise NotImplementedError

"""Methods with state, which is saved and restored with a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.methods.base import GramMethod

__all__ = ["StatefulMethod"]


class StatefulMethod(GramMethod):
    """A method on the Gram matrix that remembers something.

    Its buffers are the whole state. They are None until the first step, which sets the number of tasks and the device,
    and again after `reset`; `load_state_dict` accepts either. They do not change under `.eval()`, nor in a step on a
    non-finite Gram matrix, and the host does not wait for the device to find out.
    """

    def __init__(self, *state: str) -> None:
        super().__init__()
        for name in state:
            self.register_buffer(name, None)

    def _state(self, shape: Sequence[int], device: torch.device) -> list[Tensor]:
        """The state for Gram matrices of this shape, on this device, for a step to change; in evaluation, a copy."""
        state: list[Tensor] = []
        for name, (wanted, dtype, *initial) in self._state_of(shape).items():
            value = self._buffers[name]
            if value is None:
                with torch.inference_mode(False):  # later steps may run outside it
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

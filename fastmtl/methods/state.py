"""Methods with state, which is saved and restored with a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.methods.base import GramMethod, Method

__all__ = ["Remembering", "StatefulMethod"]


class Remembering(Method):
    """A method that remembers something.

    Its buffers are the whole state. They are None until the first step, which sets the number of tasks and the device,
    and again after `reset`; `load_state_dict` accepts either. They do not change under `.eval()`, nor in a step on
    gradients that are not finite, and the host does not wait for the device to find out.
    """

    def __init__(self, *state: str) -> None:
        super().__init__()
        for name in state:
            self.register_buffer(name, None)

    def _kept(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, fill: float = 0
    ) -> Tensor:
        """The buffer of this name, for a step to change; in evaluation, a copy."""
        value = self._buffers[name]
        if value is None:
            with torch.inference_mode(False):  # later steps may run outside it
                value = torch.full(tuple(shape), fill, dtype=dtype, device=device)
        elif value.shape != torch.Size(shape):
            what = "Gram matrices" if self.on_gram else "gradients"
            raise ValueError(
                f"{type(self).__name__}: expected {what} as in the first step, for {name} of shape "
                f"{list(value.shape)}, got them for shape {list(shape)}. Pass None for a task that is absent, so that "
                "the others keep their places; reset() begins anew"
            )
        else:
            value = value.to(device, dtype)  # as it was loaded
        if self.training:
            self._buffers[name] = value
        return value if self.training else value.clone()


class StatefulMethod(Remembering, GramMethod):
    """A method on the Gram matrix that remembers something."""

"""Methods with state: what they remember from step to step is saved and restored with a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastmtl.methods.base import GramMethod

__all__ = ["StatefulMethod"]


class StatefulMethod(GramMethod, nn.Module):
    """A method on the Gram matrix that remembers something: an `nn.Module` without parameters.

    Its buffers are the whole state. They are None until the first step, which knows the number of tasks and the device,
    and again after `reset`; `load_state_dict` accepts either. A step on a non-finite Gram matrix leaves them as they
    were, without waiting for the device to say so.
    """

    def __init__(self, *state: str) -> None:
        super().__init__()
        for name in state:
            self.register_buffer(name, None)

    def reset(self) -> None:
        """Forgets everything: the next step is the first."""
        for name in self._buffers:
            setattr(self, name, None)

    def _prepare(self, shape: Sequence[int], device: torch.device) -> None:
        """Makes the state for Gram matrices of this shape, or brings it to their device; steps change it in place."""
        for name, (wanted, dtype) in self._state_of(shape).items():
            value = self._buffers[name]
            if value is None:
                with torch.inference_mode(False):  # later steps may be outside of it
                    setattr(self, name, torch.zeros(wanted, dtype=dtype, device=device))
            elif value.shape != torch.Size(wanted):
                raise ValueError(
                    f"{type(self).__name__}: expected Gram matrices as in the first step, for a state of shape "
                    f"{list(value.shape)}, got them of shape {list(shape)}. Pass None for a task that is absent, so "
                    "that the others keep their places; reset() begins anew"
                )
            elif value.device != device or value.dtype is not dtype:  # a `model.half()` reaches these buffers too
                setattr(self, name, value.to(device, dtype))

    def _state_of(self, shape: Sequence[int]) -> dict[str, tuple[Sequence[int], torch.dtype]]:
        """Shape and dtype of each buffer that the options need, for Gram matrices [..., T, T]."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Whatever is there is the state, of any shape; what is not there was None.
        for name in self._buffers:
            value = state_dict.get(prefix + name)
            setattr(self, name, None if value is None else value.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args)

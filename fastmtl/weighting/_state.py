"""Methods with state: what they remember from step to step is saved and restored with a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastmtl.weighting._method import GramMethod

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

    def _place(self, M: Tensor) -> None:
        """Brings the state to where M is, in float64 (a `model.half()` reaches these buffers too)."""
        for name, value in self._state():
            wanted = M.dtype if value.is_floating_point() else value.dtype
            if value.device != M.device or value.dtype is not wanted:
                setattr(self, name, value.to(M.device, wanted))

    def _check_shape(self, value: Tensor, shape: Any) -> None:
        if value.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: expected Gram matrices for a state of shape {list(value.shape)} as in the "
                f"first step, got one for {list(shape)}; reset() begins anew"
            )

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self._buffers.items() if value is not None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Whatever is there is the state, of any shape; what is not there was None.
        for name in self._buffers:
            value = state_dict.get(prefix + name)
            setattr(self, name, None if value is None else value.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args)

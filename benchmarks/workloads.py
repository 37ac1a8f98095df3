"""The problems that are timed, and their answers in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["MultiTask", "eigen_error", "error", "exact", "matrix", "ragged", "resnet50", "symmetric", "tolerance"]

CHUNK = 1 << 20  # columns that are converted to float64 at a time


def matrix(*shape: int, kappa: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random gradients [..., T, P] of condition number about `kappa`, every row a mixture of all directions."""
    torch.manual_seed(0)
    G = torch.randn(shape)
    if kappa > 1:
        T = shape[-2]
        G = (torch.linalg.qr(torch.randn(T, T)).Q * kappa ** -torch.linspace(0, 1, T)) @ G
    return G.to(dtype)


def symmetric(B: int, T: int) -> Tensor:
    """Random symmetric float64 matrices [B, T, T]."""
    torch.manual_seed(0)
    A = torch.randn(B, T, T, dtype=torch.float64)
    return A + A.mT


def resnet50(classes: int = 1000) -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 161 parameters (25.557 million numbers), in the order of `parameters()`."""
    shapes: list[tuple[int, ...]] = []

    def convolution(inputs: int, outputs: int, kernel: int) -> None:  # and the batch norm that follows each of them
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    convolution(3, 64, 7)
    inputs = 64
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        outputs = 4 * width
        for block in range(blocks):
            convolution(inputs, width, 1)
            convolution(width, width, 3)
            convolution(width, outputs, 1)
            if block == 0:
                convolution(inputs, outputs, 1)
            inputs = outputs
    return [*shapes, (classes, inputs), (classes,)]


def ragged(T: int, shapes: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """T rows of random gradients, each tensor an allocation of its own as autograd returns them."""
    torch.manual_seed(0)
    return [[torch.randn(*shape) for shape in shapes] for _ in range(T)]


class MultiTask:
    """Losses of T linear heads on a ReLU MLP, and the parameters behind them; the graph can be walked repeatedly."""

    def __init__(self, tasks: int, widths: Sequence[int] = (128, 512, 512, 512, 512), batch: int = 32) -> None:
        """Builds the network and runs it forward once."""
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in itertools.pairwise(widths)]
        trunk, heads = nn.Sequential(*layers), [nn.Linear(widths[-1], 1) for _ in range(tasks)]
        h = trunk(torch.randn(batch, widths[0]))
        self.losses = [nn.functional.mse_loss(head(h), torch.randn(batch, 1)) for head in heads]
        self.shared: list[Tensor] = list(trunk.parameters())
        self.heads: list[list[Tensor]] = [list(head.parameters()) for head in heads]

    def zero_grad(self) -> None:
        """Drops every `.grad`, as an optimizer's `zero_grad` does before each step."""
        for parameters in (self.shared, *self.heads):
            for parameter in parameters:
                parameter.grad = None

    def shared_grad(self) -> Tensor:
        """The shared parameters' `.grad` as one vector."""
        return torch.cat([p.grad.reshape(-1) for p in self.shared if p.grad is not None])


def exact(G: Tensor) -> Tensor:
    """The aligned gradient of `G` [..., T, P], weights 1/T and the default rank rule, in float64."""
    T = G.shape[-2]
    chunks = G.split(CHUNK, dim=-1)
    M = torch.zeros(*G.shape[:-1], T, dtype=torch.float64)
    for chunk in chunks:
        wide = chunk.double()
        M += wide @ wide.mT
    lam, V = torch.linalg.eigh(M)
    norm = M.diagonal(dim1=-2, dim2=-1).sqrt()
    judged = torch.linalg.eigvalsh(M / norm[..., :, None] / norm[..., None, :])  # of the row-normalised Gram
    eps = torch.finfo(G.dtype).eps
    rtol = max(math.sqrt(T * min(eps, torch.finfo(torch.float32).eps)), eps)
    dropped = (judged <= judged[..., -1:] * rtol**2).sum(-1, keepdim=True)
    kept = torch.arange(T) >= dropped
    inverse = torch.where(kept, (lam.gather(-1, dropped) / lam).sqrt(), 0.0) * V.mean(-2)  # Vᵀw: the mean of V's rows
    alpha = (V @ inverse[..., None]).mT
    return torch.cat([(alpha @ chunk.double())[..., 0, :] for chunk in chunks], dim=-1)


def error(result: Tensor | Sequence[Tensor | None], expected: Tensor) -> float:
    """Relative error in the 2-norm of a result (a tensor, or a list that is flattened)."""
    if not isinstance(result, Tensor):
        result = torch.cat([g.reshape(-1) for g in result if g is not None])
    difference = (result.double() - expected).norm() / expected.norm()
    return float(difference) if math.isfinite(difference) else math.inf


def tolerance(T: int, dtype: torch.dtype = torch.float32) -> float:
    """The relative error that fastmtl promises up to a condition number of 1e4, and rounding of the result."""
    return max(2e-6 if T <= 40 else 1e-4, torch.finfo(dtype).eps)


def eigen_error(M: Tensor, lam: Tensor, V: Tensor) -> float:
    """LAPACK's test ratios, the larger of |MV - VΛ| / (|M| T eps) and |VᵀV - I| / (T eps): good below 10."""
    unit = M.shape[-1] * torch.finfo(M.dtype).eps
    residual = torch.linalg.matrix_norm(M @ V - V * lam[:, None, :]) / torch.linalg.matrix_norm(M)
    orthogonality = torch.linalg.matrix_norm(V.mT @ V - torch.eye(M.shape[-1], dtype=M.dtype))
    return float(torch.maximum(residual, orthogonality).max() / unit)

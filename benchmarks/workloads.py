"""The problems that are timed, and their answers in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MultiTask",
    "conflicting",
    "convolution",
    "eigen_error",
    "error",
    "exact",
    "flatten",
    "grams",
    "matrix",
    "mlp",
    "ragged",
    "resnet18",
    "resnet50",
    "sign_error",
    "symmetric",
    "tolerance",
]

GRAMS = {10: 8, 40: 8, 128: 2}  # tasks -> how many Gram matrices: fewer where a solver takes long
CHUNK = 1 << 20  # columns that are converted to float64 at a time


def matrix(*shape: int, kappa: float = 1.0, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random gradients [..., T, P] of condition number about `kappa`, every row a mixture of all directions.

    Their norms then spread over a factor `spread`.
    """
    torch.manual_seed(0)
    G = torch.randn(shape)
    if kappa > 1:
        T = shape[-2]
        G = (torch.linalg.qr(torch.randn(T, T)).Q * kappa ** -torch.linspace(0, 1, T)) @ G
    if spread > 1:
        G *= spread ** -torch.linspace(0, 1, shape[-2])[:, None]
    return G.to(dtype)


def conflicting(T: int, P: int, seed: int = 0) -> Tensor:
    """Gradients [T, P] as in a hard but ordinary step: half of the pairs conflict.

    Noise, and in it four directions that the tasks want to go with random strengths and signs: about half of each
    gradient, so that most cosines are between -0.5 and 0.5. The gradients are linearly independent, and their norms are
    alike: where those differ too, TorchJD's Nash-MTL takes many times as long and misses the solution.
    """
    torch.manual_seed(seed)
    return torch.randn(T, P) + 0.5 * torch.randn(T, 4) @ torch.randn(4, P)


def grams(T: int) -> list[Tensor]:
    """Float64 Gram matrices of T `conflicting` gradients, a different one for each step: solvers may remember."""
    gradients = (conflicting(T, 10_000, seed).double() for seed in range(GRAMS[T]))
    return [G @ G.mT for G in gradients]


def symmetric(B: int, T: int) -> Tensor:
    """Random symmetric float64 matrices [B, T, T]."""
    torch.manual_seed(0)
    A = torch.randn(B, T, T, dtype=torch.float64)
    return A + A.mT


def resnet50(classes: int = 1000) -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 161 parameters (25.557 million numbers), in the order of `parameters()`."""
    shapes: list[tuple[int, ...]] = []

    def layer(inputs: int, outputs: int, kernel: int) -> None:  # a convolution, and the batch norm that follows it
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    layer(3, 64, 7)
    inputs = 64
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        outputs = 4 * width
        for block in range(blocks):
            layer(inputs, width, 1)
            layer(width, width, 3)
            layer(width, outputs, 1)
            if block == 0:
                layer(inputs, outputs, 1)
            inputs = outputs
    return [*shapes, (classes, inputs), (classes,)]


def ragged(T: int, shapes: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """T rows of random gradients, each tensor an allocation of its own as autograd returns them."""
    torch.manual_seed(0)
    return [[torch.randn(*shape) for shape in shapes] for _ in range(T)]


class MultiTask:
    """T linear heads on an encoder, with a batch and a target for each head."""

    def __init__(self, tasks: int, encoder: nn.Module, x: Tensor) -> None:
        """`encoder(x)` is the representation [batch, width]."""
        with torch.no_grad():
            batch, width = encoder(x).shape
        self.tasks, self.encoder, self.x = tasks, encoder, x
        self.model = nn.ModuleList([encoder, *(nn.Linear(width, 1) for _ in range(tasks))])
        self.targets = [torch.randn(batch, 1) for _ in range(tasks)]

    @property
    def shared(self) -> list[Tensor]:
        """The encoder's parameters."""
        return list(self.encoder.parameters())

    @property
    def layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters, layer by layer."""
        own = (list(layer.parameters(recurse=False)) for layer in self.encoder.modules())
        return [parameters for parameters in own if parameters]

    @property
    def heads(self) -> list[list[Tensor]]:
        """The parameters of each head."""
        return [list(head.parameters()) for head in self.model[1:]]

    def forward(self) -> Tensor:
        """The representation [batch, width]."""
        return self.encoder(self.x)

    def losses(self, hs: Sequence[Tensor]) -> list[Tensor]:
        """A loss for each head, from its own alias of the representation."""
        return [nn.functional.mse_loss(head(h), y) for head, h, y in zip(self.model[1:], hs, self.targets, strict=True)]

    def step(self, aliases: Callable[[Tensor], Sequence[Tensor]] | None = None) -> None:
        """A training step without its optimizer: drop every `.grad`, forward, one backward of the summed losses.

        Args:
            aliases: turns the representation into one for each head; default: all of them get itself.
        """
        self.zero_grad()
        h = self.forward()
        hs = [h] * self.tasks if aliases is None else aliases(h)
        losses = self.losses(hs)
        total: Any = hs.total(losses) if hasattr(hs, "total") else sum(losses[1:], losses[0])
        total.backward()

    def zero_grad(self) -> None:
        """Drops every `.grad`, as an optimizer's `zero_grad` does before each step."""
        self.model.zero_grad(set_to_none=True)

    def shared_grad(self) -> Tensor:
        """The shared parameters' `.grad` as one vector."""
        return flatten([p.grad for p in self.shared if p.grad is not None])

    def exact(self, groups: Sequence[Sequence[Tensor]] | None = None) -> Tensor:
        """Aligned-MTL's gradient of the encoder as one vector: autograd's T gradients, aggregated in float64.

        Args:
            groups: the encoder's parameters in order, in parts that are aggregated on their own; default: in one.
        """
        h = self.forward()
        rows = [torch.autograd.grad(loss, self.shared, retain_graph=True) for loss in self.losses([h] * self.tasks)]
        G = torch.stack([flatten(row) for row in rows])
        if groups is None:
            return exact(G)
        sizes = [sum(p.numel() for p in group) for group in groups]
        return torch.cat([exact(part) for part in G.split(sizes, dim=1)])

    def exact_upper_bound(self) -> Tensor:
        """The same of Aligned-MTL-UB: the T gradients of the representation aggregated, then one pass behind it."""
        h = self.forward()
        rows = [torch.autograd.grad(loss, h, retain_graph=True) for loss in self.losses([h] * self.tasks)]
        cotangent = exact(torch.stack([flatten(row) for row in rows])).to(h.dtype).view_as(h)
        return flatten(torch.autograd.grad(h, self.shared, cotangent)).double()


def mlp(tasks: int, batch: int = 32, widths: Sequence[int] = (128, 512, 512, 512, 512)) -> MultiTask:
    """T heads on a ReLU MLP."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in itertools.pairwise(widths)]
    return MultiTask(tasks, nn.Sequential(*layers), torch.randn(batch, widths[0]))


def resnet18(tasks: int, batch: int = 16, size: int = 64, width: int = 64) -> MultiTask:
    """T heads on the convolutions of ResNet-18 (11.2 million parameters), for images of `size` x `size`."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        blocks += [_Residual(inputs, outputs, stride), _Residual(outputs, outputs, 1)]
        inputs = outputs
    stem = [*convolution(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    encoder = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MultiTask(tasks, encoder, torch.randn(batch, 3, size, size))


class _Residual(nn.Module):
    """Two 3x3 convolutions and a way around them: the block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first, second = convolution(inputs, outputs, 3, stride), convolution(outputs, outputs, 3, 1)
        self.body = nn.Sequential(*first, nn.ReLU(inplace=True), *second)
        same = inputs == outputs and stride == 1
        self.around = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.around(x), inplace=True)


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    """Without bias, and the batch norm that follows it."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of any shapes as one vector."""
    return torch.cat([x.reshape(-1) for x in tensors])


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
        result = flatten([g for g in result if g is not None])
    difference = (result.double() - expected).norm() / expected.norm()
    return float(difference) if math.isfinite(difference) else math.inf


def sign_error(G: Tensor, result: Tensor) -> float:
    """Relative error of GradDrop: how far each coordinate is from the nearer of its positive and its negative sum."""
    sums = torch.stack([G.double().clamp_min(0).sum(0), G.double().clamp_max(0).sum(0)])
    nearer = (result - sums).abs().argmin(0)
    return error(result, sums.gather(0, nearer[None])[0])


def tolerance(T: int, dtype: torch.dtype = torch.float32) -> float:
    """The relative error that fastmtl promises up to a condition number of 1e4, and rounding of the result."""
    return max(2e-6 if T <= 40 else 1e-4, torch.finfo(dtype).eps)


def eigen_error(M: Tensor, lam: Tensor, V: Tensor) -> float:
    """LAPACK's test ratios, the larger of |MV - VΛ| / (|M| T eps) and |VᵀV - I| / (T eps): good below 10."""
    unit = M.shape[-1] * torch.finfo(M.dtype).eps
    residual = torch.linalg.matrix_norm(M @ V - V * lam[:, None, :]) / torch.linalg.matrix_norm(M)
    orthogonality = torch.linalg.matrix_norm(V.mT @ V - torch.eye(M.shape[-1], dtype=M.dtype))
    return float(torch.maximum(residual, orthogonality).max() / unit)

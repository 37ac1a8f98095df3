"""Models for the tests of `engine="gramian"`: those of practice, small, and trunks that use parameters in one way each.

Every model is a `Multitask`: `losses()` runs it on its own data, `shared()` are the parameters to aggregate.
`build(make, dtype)` gives the same model each time, whatever was drawn before, so that a second one can be held to it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from helpers import randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from experiments.scene.models import MTAN

__all__ = ["LAYERS", "MODELS", "LanguageModel", "Multitask", "build", "mlp", "resnet18", "vit"]


class Multitask(nn.Module):
    """A trunk, a head and targets for each task; task t has a loss of its own size.

    Args:
        trunk: from x to features [B, ...].
        x: what it runs on.
        tasks: number of tasks T.
        hidden: width of the heads' hidden layer.
    """

    def __init__(self, trunk: nn.Module, x: Tensor, tasks: int = 3, hidden: int = 6) -> None:
        super().__init__()
        self.trunk = trunk
        with torch.no_grad():
            features = copy.deepcopy(trunk)(x).flatten(1)  # a copy: a BatchNorm counts what it sees
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Flatten(), nn.Linear(features.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, 2))
            for _ in range(tasks)
        )
        self.register_buffer("x", x)
        self.register_buffer("y", randn(tasks, len(features), 2, seed=100))

    def shared(self) -> list[Tensor]:
        """The trunk's parameters that require grad."""
        return [p for p in self.trunk.parameters() if p.requires_grad]

    def losses(self) -> list[Tensor]:
        """T scalars from one forward pass."""
        h = self.trunk(self.x)
        return [2.0**t * (head(h) - self.y[t]).square().mean() for t, head in enumerate(self.heads)]


def build(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    """What `make` makes, from the same seed every time, in this dtype."""
    torch.manual_seed(1)
    return make().to(dtype)


# ------------------------------------------------------------------------------------------------ those of practice


def mlp(inputs: int = 12, width: int = 16, depth: int = 3) -> nn.Sequential:
    """`depth` layers of this width."""
    widths = [inputs, *[width] * depth]
    layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.first(x)), inplace=True)
        return F.relu(self.norms[1](self.second(h)) + self.shortcut(x), inplace=True)


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18 without its last layer: images [B, 3, H, W] to features [B, 8 · width]."""
    blocks, inputs = [], width
    for stage in range(4):
        outputs = width * 2**stage
        blocks += [BasicBlock(inputs, outputs, 2 if stage else 1), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ViT(nn.Module):
    """Patches, a class token and positions that are free parameters, and blocks of attention; features [B, dim]."""

    def __init__(self, size: int, patch: int, dim: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.token = nn.Parameter(0.5 * torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.5 * torch.randn(1, 1 + (size // patch) ** 2, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.position
        return self.blocks(h)[:, 0]


def vit(
    size: int = 16, patch: int = 4, dim: int = 24, depth: int = 2, heads: int = 3, dropout: float = 0.0
) -> nn.Module:
    """A vision transformer for images [B, 3, size, size]."""
    return ViT(size, patch, dim, depth, heads, dropout)


class LanguageModel(nn.Module):
    """A causal transformer whose output layer is its embedding; task t predicts the token t + 1 places on.

    Args:
        tasks: number of tasks T.
        adapters: a layer of its own for each task before the output layer. Without, all tasks share the whole network,
            which then is the output layer too, and task t is the t-th part of the batch.
    """

    def __init__(self, tasks: int = 3, adapters: bool = True, vocabulary: int = 13, dim: int = 16) -> None:
        super().__init__()
        self.tasks = tasks
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.randn(7, dim))
        layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.heads = nn.ModuleList(nn.Linear(dim, dim) for _ in range(tasks if adapters else 0))
        self.out = nn.Linear(dim, vocabulary, bias=False)
        self.out.weight = self.embedding.weight
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("tokens", torch.randint(vocabulary, (2 * tasks, 7 + tasks), generator=generator))

    def shared(self) -> list[Tensor]:
        """All but the adapters."""
        own = {id(p) for p in self.heads.parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def losses(self) -> list[Tensor]:
        """T scalars from one forward pass."""
        mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=self.position.dtype)
        h = self.blocks(self.embedding(self.tokens[:, :7]) + self.position, mask, is_causal=True)
        if self.heads:
            return [
                F.cross_entropy(self.out(head(h)).flatten(0, 1), self.tokens[:, t + 1 : t + 8].flatten())
                for t, head in enumerate(self.heads)
            ]
        parts = zip(self.out(h).chunk(self.tasks), self.tokens[:, 1:8].chunk(self.tasks), strict=True)
        return [F.cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits, targets in parts]


class Recurrent(nn.Module):
    """A recurrent network; features [B, N, H]."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(5, 6, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Scenes(nn.Module):
    """MTAN on SegNet: each task's attention hangs at every stage, on maps that are made from each other."""

    def __init__(self, tasks: int = 3) -> None:
        super().__init__()
        self.tasks = tasks
        self.network = MTAN([2] * tasks, width=1 / 16)
        self.register_buffer("x", randn(4, 3, 32, 32, seed=1))
        self.register_buffer("y", randn(tasks, 4, 2, 32, 32, seed=2))

    def shared(self) -> list[Tensor]:
        """SegNet and the convolutions between the tasks' stages."""
        return self.network.shared()

    def losses(self) -> list[Tensor]:
        """T scalars from one forward pass."""
        outputs, _ = self.network(self.x)
        return [2.0**t * (out - y).square().mean() for t, (out, y) in enumerate(zip(outputs, self.y, strict=True))]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Multitask(mlp(), randn(8, 12, seed=1), tasks=6),
    "mlp, wide": lambda: Multitask(mlp(12, 96, 2), randn(4, 12, seed=1), tasks=4),
    "mlp, long batch": lambda: Multitask(mlp(4, 5, 2), randn(300, 4, seed=1), tasks=4),
    "resnet18": lambda: Multitask(resnet18(8), randn(4, 3, 64, 64, seed=1)),
    "resnet18 in eval mode": lambda: Multitask(resnet18(8), randn(4, 3, 64, 64, seed=1)).eval(),
    "vit": lambda: Multitask(vit(), randn(4, 3, 16, 16, seed=1), tasks=4),
    "language model": lambda: LanguageModel(),
    "language model without adapters": lambda: LanguageModel(adapters=False),
    "lstm": lambda: Multitask(Recurrent(nn.LSTM, num_layers=2), randn(4, 6, 5, seed=1)),
    "gru": lambda: Multitask(Recurrent(nn.GRU, bidirectional=True), randn(4, 6, 5, seed=1)),
    "rnn": lambda: Multitask(Recurrent(nn.RNN), randn(4, 6, 5, seed=1)),
    "mtan": lambda: Scenes(),
}


# ------------------------------------------------------------------------------------------------ one use each


class Through(nn.Module):
    """A function of x and of parameters that belong to no layer: `Through(f, w=(2, 3))` gives f(self, x)."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parameters: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(0.5 * torch.randn(shape)))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Uses(nn.Module):
    """A function of x and of layers."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


class Numeric(torch.autograd.Function):
    """A matrix product whose backward runs in numpy, where no batched tensor gets in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = (saved.detach().numpy() for saved in ctx.saved_tensors)
        return torch.from_numpy(g.numpy() @ weight), torch.from_numpy(g.numpy().T @ x)


def _between(*layers: nn.Module, inputs: int = 3, outputs: int = 4) -> nn.Sequential:
    """Behind a 1×1 convolution, so that the layers' inputs require grad, and before something that is not linear."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), *layers, nn.Tanh())


def _dense(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), *layers, nn.Tanh())


def _frozen(model: Multitask, *names: str) -> Multitask:
    for name in names:
        model.trunk.get_parameter(name).requires_grad_(False)
    return model


def _image(*shape: int) -> Tensor:
    return randn(*(shape or (4, 3, 7, 6)), seed=1)


def _rows(*shape: int) -> Tensor:
    return randn(*(shape or (7, 5)), seed=1)


def _ids() -> Tensor:
    return torch.tensor([[0, 3, 3, 1], [2, 3, 0, 0], [5, 5, 5, 5], [4, 1, 0, 2], [1, 1, 3, 4]])


def _attention(x: Tensor, layer: nn.Module, queries: nn.Module, values: nn.Module) -> Tensor:
    return layer(queries(x), x, values(x), need_weights=False)[0]


LAYERS: dict[str, Callable[[], Multitask]] = {
    # Linear
    "linear without bias": lambda: Multitask(_dense(nn.Linear(6, 4, bias=False)), _rows()),
    "linear on 3-d": lambda: Multitask(_dense(nn.Linear(6, 4)), _rows(4, 3, 5)),
    "linear on 4-d": lambda: Multitask(_dense(nn.Linear(6, 4)), _rows(3, 2, 4, 5)),
    "linear on transposed": lambda: Multitask(
        Uses(lambda x, a, b: b(a(x.mT).tanh().mT), nn.Linear(4, 3), nn.Linear(5, 2)), _rows(3, 4, 5)
    ),
    "linear on vectors": lambda: Multitask(
        Uses(lambda x, a: torch.stack([a(row) for row in x]).tanh(), nn.Linear(5, 4)), _rows()
    ),
    "linear with one output": lambda: Multitask(_dense(nn.Linear(6, 1)), _rows(4, 3, 5)),
    "linear on a batch of one": lambda: Multitask(_dense(nn.Linear(6, 40)), _rows(1, 5)),
    "bilinear": lambda: Multitask(
        Uses(lambda x, a, b: b(a(x), x).tanh(), nn.Linear(5, 3), nn.Bilinear(3, 5, 4)), _rows()
    ),
    # Convolutions
    "conv1d": lambda: Multitask(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 5, 3, 2, 1), nn.Tanh()), _rows(4, 3, 9)),
    "conv3d": lambda: Multitask(
        nn.Sequential(nn.Conv3d(2, 4, 1), nn.Conv3d(4, 3, 2, (1, 2, 1), (1, 0, 1), groups=1), nn.Tanh()),
        _rows(3, 2, 3, 4, 5),
    ),
    "conv, strided and padded": lambda: Multitask(_between(nn.Conv2d(4, 5, (3, 2), (2, 1), (1, 2))), _image()),
    "conv, stride leaves a rest": lambda: Multitask(_between(nn.Conv2d(4, 5, 2, 3)), _image(4, 3, 7, 9)),
    "conv, dilated": lambda: Multitask(_between(nn.Conv2d(4, 5, 3, padding=2, dilation=2, bias=False)), _image()),
    "conv, grouped": lambda: Multitask(_between(nn.Conv2d(4, 6, 3, groups=2)), _image()),
    "conv, grouped, all at once": lambda: Multitask(
        _between(nn.Conv2d(6, 9, (3, 2), (2, 1), (2, 1), (1, 2), groups=3), outputs=6), _image()
    ),
    "conv, depthwise": lambda: Multitask(_between(nn.Conv2d(4, 8, 3, padding=1, groups=4)), _image()),
    "conv1d, depthwise and dilated": lambda: Multitask(
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=4), nn.Tanh()),
        _rows(4, 3, 9),
    ),
    "conv, pointwise": lambda: Multitask(_between(nn.Conv2d(4, 40, 1)), _image(4, 3, 3, 2)),
    "conv, as large as its input": lambda: Multitask(_between(nn.Conv2d(4, 9, (7, 6))), _image()),
    "conv, same": lambda: Multitask(_between(nn.Conv2d(4, 3, (2, 3), padding="same")), _image()),
    "conv, reflected": lambda: Multitask(_between(nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")), _image()),
    "conv, circular": lambda: Multitask(_between(nn.Conv2d(4, 3, 3, padding=2, padding_mode="circular")), _image()),
    "conv, channels last": lambda: Multitask(
        Uses(
            lambda x, a, b: b(a(x.contiguous(memory_format=torch.channels_last))).tanh(),
            nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
            nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last),
        ),
        _image(),
    ),
    "conv on slices": lambda: Multitask(
        Uses(lambda x, a, b: b(a(x[1:, 1:])[:, 1:, ::2, 1:]).tanh(), nn.Conv2d(2, 4, 2), nn.Conv2d(3, 4, 2)), _image()
    ),
    "conv without a batch": lambda: Multitask(
        Uses(lambda x, a: torch.stack([a(image) for image in x]).tanh(), nn.Conv2d(3, 4, 3)), _image()
    ),
    "transposed conv": lambda: Multitask(_between(nn.ConvTranspose2d(4, 5, 3, 2, 1, output_padding=1)), _image()),
    "transposed conv, grouped": lambda: Multitask(_between(nn.ConvTranspose2d(4, 6, 2, groups=2)), _image()),
    "transposed conv1d": lambda: Multitask(
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.ConvTranspose1d(4, 3, 3, 2), nn.Tanh()), _rows(4, 3, 5)
    ),
    # Embeddings
    "embedding": lambda: Multitask(nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 4), nn.Tanh()), _ids()),
    "embedding, padded": lambda: Multitask(nn.Embedding(6, 5, padding_idx=0), _ids()),
    "embedding, padded from the end": lambda: Multitask(nn.Embedding(6, 5, padding_idx=-3), _ids()),
    "embedding, by frequency": lambda: Multitask(nn.Embedding(6, 5, scale_grad_by_freq=True), _ids()),
    "embedding, by frequency and padded": lambda: Multitask(
        nn.Embedding(6, 5, padding_idx=3, scale_grad_by_freq=True), _ids()
    ),
    "embedding, two of different rules": lambda: Multitask(
        Through(
            lambda m, ids: (
                F.embedding(ids, m.w, padding_idx=1).tanh() * F.embedding(ids.flip(0), m.w, scale_grad_by_freq=True)
            ),
            w=(6, 4),
        ),
        _ids(),
    ),
    "embedding of int32": lambda: Multitask(nn.Embedding(6, 5, padding_idx=2), _ids().int()),
    "embedding bag": lambda: Multitask(nn.Sequential(nn.EmbeddingBag(6, 5, mode="mean"), nn.Tanh()), _ids()),
    "indexed": lambda: Multitask(Through(lambda m, ids: m.w[ids].tanh(), w=(6, 4)), _ids()),
    # Normalisation
    "layer norm": lambda: Multitask(_dense(nn.LayerNorm(6)), _rows()),
    "layer norm over two": lambda: Multitask(_dense(nn.LayerNorm((3, 6), bias=False)), _rows(4, 3, 5)),
    "group norm": lambda: Multitask(_between(nn.GroupNorm(2, 4)), _image()),
    "instance norm": lambda: Multitask(_between(nn.InstanceNorm2d(4, affine=True)), _image()),
    "rms norm": lambda: Multitask(_dense(nn.RMSNorm(6), nn.Linear(6, 6)), _rows(4, 3, 5)),
    "batch norm": lambda: Multitask(_between(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)), _image()),
    "batch norm in eval mode": lambda: Multitask(_between(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)), _image()).eval(),
    "batch norm of features": lambda: Multitask(_dense(nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)), _rows()),
    "weight norm": lambda: Multitask(_dense(parametrizations.weight_norm(nn.Linear(6, 4))), _rows()),
    "spectral norm": lambda: Multitask(_dense(parametrizations.spectral_norm(nn.Linear(6, 4))), _rows()),
    "standardised weight": lambda: Multitask(
        Through(
            lambda m, x: F.conv2d(x, (m.w - m.w.mean((1, 2, 3), True)) / m.w.std((1, 2, 3), keepdim=True)).tanh(),
            w=(4, 3, 3, 3),
        ),
        _image(),
    ),
    # Attention and recurrence
    "attention": lambda: Multitask(
        Uses(lambda x, a: a(x, x, x, need_weights=False)[0], nn.MultiheadAttention(6, 2, batch_first=True)),
        _rows(4, 3, 6),
    ),
    "attention with weights": lambda: Multitask(
        Uses(
            lambda x, a: torch.cat(a(x, x, x), -1),
            nn.MultiheadAttention(6, 3, batch_first=True, bias=False, add_bias_kv=True),
        ),
        _rows(4, 3, 6),
    ),
    "attention across": lambda: Multitask(
        Uses(_attention, nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6), nn.Linear(6, 6)),
        _rows(4, 3, 6),
    ),
    "attention across widths": lambda: Multitask(
        Uses(
            _attention, nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True), nn.Linear(6, 8), nn.Linear(6, 5)
        ),
        _rows(4, 3, 6),
    ),
    "lstm with a projection": lambda: Multitask(Recurrent(nn.LSTM, proj_size=3), _rows(4, 3, 5)),
    "gru cell": lambda: Multitask(
        Uses(lambda x, a: a(x[:, 2], a(x[:, 1], a(x[:, 0]))), nn.GRUCell(5, 4)), _rows(6, 3, 5)
    ),
    "lstm cell": lambda: Multitask(
        Uses(lambda x, a: torch.cat(a(x[:, 1], a(x[:, 0])), 1), nn.LSTMCell(5, 4)), _rows(6, 2, 5)
    ),
    # Free parameters
    "x @ w": lambda: Multitask(Through(lambda m, x: (x @ m.w).tanh(), w=(5, 4)), _rows()),
    "x @ w of 3-d": lambda: Multitask(Through(lambda m, x: (x @ m.w + m.b).tanh(), w=(5, 4), b=(4,)), _rows(4, 3, 5)),
    "w @ x": lambda: Multitask(Through(lambda m, x: (m.w @ x.T).tanh().T, w=(4, 5)), _rows()),
    "w @ x of 3-d": lambda: Multitask(Through(lambda m, x: (m.w @ x).tanh(), w=(4, 3)), _rows(4, 3, 5)),
    "w on both sides": lambda: Multitask(
        Through(lambda m, x: (m.a @ x @ m.b).tanh() @ m.b.T, a=(4, 3), b=(5, 2)), _rows(4, 3, 5)
    ),
    "x @ vector": lambda: Multitask(Through(lambda m, x: (x @ m.w).tanh() * x[..., 0], w=(5,)), _rows(4, 3, 5)),
    "vector @ x": lambda: Multitask(Through(lambda m, x: (m.w @ x.tanh()).sin(), w=(3,)), _rows(4, 3, 5)),
    "outer": lambda: Multitask(Through(lambda m, x: torch.outer(x[:, 0].exp(), m.w).tanh(), w=(4,)), _rows()),
    "einsum": lambda: Multitask(
        Through(lambda m, x: torch.einsum("bni,oi->bno", x, m.w).tanh(), w=(4, 5)), _rows(4, 3, 5)
    ),
    "einsum over heads": lambda: Multitask(
        Through(lambda m, x: torch.einsum("bni,hio->bhno", x, m.w).tanh(), w=(2, 5, 3)), _rows(4, 3, 5)
    ),
    "bmm": lambda: Multitask(Through(lambda m, x: torch.bmm(x, m.w).tanh(), w=(4, 5, 3)), _rows(4, 3, 5)),
    "bmm, expanded": lambda: Multitask(
        Through(lambda m, x: torch.bmm(x, m.w.expand(4, -1, -1)).tanh(), w=(5, 3)), _rows(4, 3, 5)
    ),
    "addmm with factors": lambda: Multitask(
        Through(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=3.0).tanh(), w=(5, 4), b=(4,)), _rows()
    ),
    "addmm onto a matrix": lambda: Multitask(
        Through(lambda m, x: torch.addmm(m.b, x, m.w).tanh(), w=(5, 4), b=(7, 4)), _rows()
    ),
    "addbmm": lambda: Multitask(
        Through(lambda m, x: torch.baddbmm(m.b, x, m.w, alpha=-2.0).tanh(), w=(4, 5, 3), b=(4, 1, 3)), _rows(4, 3, 5)
    ),
    "scaled and shifted": lambda: Multitask(
        Through(lambda m, x: (x @ m.w * m.scale).tanh() + m.shift, w=(5, 4), scale=(4,), shift=(7, 1)), _rows()
    ),
    "a number": lambda: Multitask(Through(lambda m, x: (x @ m.w * m.n.exp()).tanh(), w=(5, 4), n=()), _rows()),
    "prelu": lambda: Multitask(_dense(nn.PReLU(6), nn.Linear(6, 4)), _rows()),
    "low rank": lambda: Multitask(Through(lambda m, x: (x @ (m.a @ m.b)).tanh(), a=(5, 2), b=(2, 4)), _rows()),
    "masked": lambda: Multitask(
        Through(lambda m, x: F.linear(x, m.w * (m.w > 0), m.b).tanh(), w=(4, 5), b=(4,)), _rows()
    ),
    "in parts": lambda: Multitask(
        Through(lambda m, x: F.linear(F.linear(x, m.w[:5]).tanh(), m.w[5:], m.b[2:]), w=(8, 5), b=(5,)), _rows()
    ),
    "split": lambda: Multitask(
        Through(lambda m, x: torch.cat([F.linear(x, w).sin() for w in m.w.chunk(3)], 1), w=(9, 5)), _rows()
    ),
    "reshaped": lambda: Multitask(
        Through(lambda m, x: F.conv2d(x, m.w.view(4, 3, 2, 2).flip(-1)).tanh(), w=(4, 12)), _image()
    ),
    "stacked": lambda: Multitask(
        Through(lambda m, x: F.linear(x, torch.stack([m.a, m.b, m.a])).tanh(), a=(5,), b=(5,)), _rows()
    ),
    "squared": lambda: Multitask(Through(lambda m, x: (x @ (m.w @ m.w)).tanh(), w=(5, 5)), _rows()),
    "gram of itself": lambda: Multitask(Through(lambda m, x: (x @ (m.w @ m.w.T)).tanh(), w=(5, 3)), _rows()),
    "cast": lambda: Multitask(
        Uses(lambda x, a, b: b.double()(a(x).double()).tanh().to(x.dtype), nn.Linear(5, 4), nn.Linear(4, 3)), _rows()
    ),
    # Reuse
    "linear twice": lambda: Multitask(Uses(lambda x, a: a(a(x).tanh()).tanh(), nn.Linear(5, 5)), _rows()),
    "linear twice, of different batches": lambda: Multitask(
        Uses(lambda x, a: a(x).tanh() + a(x[:2].sin()).tanh().sum(0), nn.Linear(5, 4)), _rows()
    ),
    "linear and its transpose": lambda: Multitask(
        Through(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.T), w=(4, 5)), _rows()
    ),
    "conv twice": lambda: Multitask(
        Uses(lambda x, a: a(a(x).tanh()).tanh(), nn.Conv2d(3, 3, 3, padding=1, stride=1)), _image()
    ),
    "conv twice, of different sizes": lambda: Multitask(
        Uses(
            lambda x, a: torch.cat([a(x).tanh().flatten(1), a(F.avg_pool2d(x, 2)).tanh().flatten(1)], 1),
            nn.Conv2d(3, 4, 3),
        ),
        _image(4, 3, 8, 6),
    ),
    "conv twice, of different strides": lambda: Multitask(
        Through(
            lambda m, x: F.conv2d(F.conv2d(x, m.w, padding=1).tanh(), m.w, m.b, stride=2, dilation=2),
            w=(3, 3, 3, 3),
            b=(3,),
        ),
        _image(4, 3, 8, 7),
    ),
    "conv and transposed conv": lambda: Multitask(
        Through(
            lambda m, x: F.conv_transpose2d(F.conv2d(x, m.w, stride=2).tanh(), m.w, stride=2).tanh(), w=(4, 3, 3, 3)
        ),
        _image(),
    ),
    "conv and linear": lambda: Multitask(
        Through(
            lambda m, x: F.linear(F.conv2d(x, m.w[..., None, None]).tanh().mean((2, 3)) + x[:, :, 0, 0], m.w).sin(),
            w=(3, 3),
        ),
        _image(),
    ),
    "embedding twice": lambda: Multitask(
        Uses(lambda ids, e, a: a(e(ids)).tanh() * e(ids.flip(1)), nn.Embedding(6, 4), nn.Linear(4, 4)), _ids()
    ),
    "embedding and output": lambda: Multitask(
        Through(lambda m, ids: F.linear(F.embedding(ids, m.w).tanh(), m.w, m.b), w=(6, 4), b=(6,)), _ids()
    ),
    "bias of two layers": lambda: Multitask(
        Through(lambda m, x: F.linear(F.linear(x, m.a, m.b).tanh(), m.c, m.b), a=(5, 5), b=(5,), c=(5, 5)), _rows()
    ),
    "bias elsewhere too": lambda: Multitask(
        Through(lambda m, x: F.linear(x * m.b.exp(), m.a, m.b).tanh(), a=(5, 5), b=(5,)), _rows()
    ),
    "weight elsewhere too": lambda: Multitask(
        Through(lambda m, x: F.linear(x, m.w).tanh() + m.w.square().mean(1), w=(4, 5)), _rows()
    ),
    # The rest of the graph
    "frozen first": lambda: _frozen(Multitask(mlp(5), _rows()), "0.weight", "0.bias"),
    "frozen between": lambda: _frozen(Multitask(mlp(5), _rows()), "2.weight", "2.bias"),
    "frozen weight": lambda: _frozen(Multitask(mlp(5), _rows()), "2.weight"),
    "frozen bias": lambda: _frozen(Multitask(mlp(5), _rows()), "2.bias", "4.bias"),
    "frozen table": lambda: _frozen(Multitask(nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 4)), _ids()), "0.weight"),
    "dropout": lambda: Multitask(nn.Sequential(mlp(5), nn.Dropout(0.3), nn.Linear(16, 5)), _rows()),
    "in place": lambda: Multitask(
        Uses(lambda x, a, b: b(a(x).mul_(2.0).relu_()).add_(x.new_ones(4)).sin_(), nn.Linear(5, 6), nn.Linear(6, 4)),
        _rows(),
    ),
    "written into": lambda: Multitask(
        Uses(lambda x, a, b: _write(a(x), b(x)), nn.Linear(5, 6), nn.Linear(5, 3)), _rows()
    ),
    "fourier": lambda: Multitask(
        Uses(lambda x, a, b: b(torch.fft.rfft(a(x)).abs()), nn.Linear(5, 6), nn.Linear(4, 4)), _rows()
    ),
    "checkpointed": lambda: Multitask(
        Uses(
            lambda x, a, b: b(checkpoint(a, checkpoint(a, x, use_reentrant=False), use_reentrant=False)),
            nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)),
            nn.Linear(5, 4),
        ),
        _rows(),
    ),
    "checkpointed with dropout and convolutions": lambda: Multitask(
        Uses(
            lambda x, a: checkpoint(a, x, use_reentrant=False),
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 3, 3)),
        ),
        _image(),
    ),
    "function in numpy": lambda: Multitask(
        Uses(lambda x, a, b, c: c(Numeric.apply(a(x), b.weight)).tanh(), *(nn.Linear(5, 5) for _ in range(3))), _rows()
    ),
}


def _write(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4] = y
    x[:, 5] *= y[:, 0]
    return x

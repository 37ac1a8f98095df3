"""Encoders for the engines of `backward` beside the ones of workloads.py: attention, convolutions, embeddings, LSTM."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from workloads import MultiTask, convolution

__all__ = ["convolutions", "recurrent", "resnet50", "text", "transformer"]


def transformer(tasks: int, width: int = 256, layers: int = 4, batch: int = 8, length: int = 64) -> MultiTask:
    """T heads on the mean over the sequence of a stack of Transformer blocks without dropout, heads of 64 numbers."""
    torch.manual_seed(0)
    blocks = [
        nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True)
        for _ in range(layers)
    ]
    return MultiTask(tasks, nn.Sequential(*blocks, _Mean()), torch.randn(batch, length, width))


def convolutions(tasks: int, channels: Sequence[int], batch: int, size: int, kernel: int = 3) -> MultiTask:
    """T heads on convolutions with stride 2 (the first has 1) of images of `size` x `size`, without batch norm."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, *channels)):
        layers += [nn.Conv2d(inputs, outputs, kernel, 2 if layers else 1, kernel // 2), nn.ReLU()]
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MultiTask(tasks, encoder, torch.randn(batch, 3, size, size))


def resnet50(
    tasks: int, batch: int = 32, size: int = 64, width: int = 64, stages: Sequence[int] = (3, 4, 6, 3)
) -> MultiTask:
    """T heads on the convolutions of ResNet-50 (23.5 million parameters), for images of `size` x `size`."""
    torch.manual_seed(0)
    inputs = width
    blocks: list[nn.Module] = []
    for stage, count in enumerate(stages):
        inner = width << stage
        for block in range(count):
            blocks.append(_Bottleneck(inputs, inner, 2 if stage > 0 and block == 0 else 1))
            inputs = 4 * inner
    stem = [*convolution(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    encoder = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MultiTask(tasks, encoder, torch.randn(batch, 3, size, size))


def text(tasks: int, vocabulary: int, width: int, batch: int, length: int) -> MultiTask:
    """T heads on the mean over the sequence of embedded tokens, behind two linear layers."""
    torch.manual_seed(0)
    layers = [nn.Embedding(vocabulary, width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
    return MultiTask(tasks, nn.Sequential(*layers, _Mean()), torch.randint(vocabulary, (batch, length)))


def recurrent(tasks: int, width: int, batch: int, length: int) -> MultiTask:
    """T heads on the mean over the sequence of an LSTM's outputs."""
    torch.manual_seed(0)
    encoder = nn.Sequential(_Outputs(nn.LSTM(width, width, batch_first=True)), _Mean())
    return MultiTask(tasks, encoder, torch.randn(batch, length, width))


class _Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 and a way around them: the block of ResNet-50."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * inner
        first, second = convolution(inputs, inner, 1, 1), convolution(inner, inner, 3, stride)
        relu = nn.ReLU(inplace=True)
        self.body = nn.Sequential(*first, relu, *second, relu, *convolution(inner, outputs, 1, 1))
        same = inputs == outputs and stride == 1
        self.around = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.around(x), inplace=True)


class _Mean(nn.Module):
    """[batch, length, width] -> [batch, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class _Outputs(nn.Module):
    """The outputs of a recurrent network, without its last state."""

    def __init__(self, network: nn.RNNBase) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]

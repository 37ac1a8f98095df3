"""The paper's two networks. Both give what their heads give for each task, and the representation behind it.

`shared()` are the parameters whose gradients are aggregated. The representation is what takes their place in the upper
bound: with PSPNet the features of the backbone, with MTAN all feature maps that the attention modules read. These are
made from each other; `backward(..., representation=...)` counts what one sends on to another once, as the later one's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MODELS", "MTAN", "PSPNet", "make"]

BINS = (1, 2, 3, 6)  # of the pyramid
FILTERS = (64, 128, 256, 512, 512)  # of SegNet's five stages
DEPTHS = (2, 2, 3, 3, 3)  # convolutions of each


class PSPNet(nn.Module):
    """ResNet-50 dilated to stride 8, and a pyramid for each task (Zhao et al. 2017).

    Args:
        channels: of each task's output.
        weights: a file with torchvision's state of a ResNet-50, for the backbone.

    Raises:
        ValueError: a file that has something else.
    """

    def __init__(self, channels: Sequence[int], weights: Path | None = None) -> None:
        super().__init__()
        try:
            from torchvision.models import resnet50
        except ImportError as error:
            raise ImportError("PSPNet needs torchvision: pip install 'fastmtl-torch[experiments]'") from error
        resnet = resnet50(replace_stride_with_dilation=[False, True, True])
        if weights is not None:
            try:
                resnet.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
            except FileNotFoundError:
                raise
            except Exception as error:  # a file may be broken in any way
                raise ValueError(f"{weights}: expected the state of torchvision's resnet50, got {error}") from error
        layers = OrderedDict((name, layer) for name, layer in resnet.named_children() if name not in ("avgpool", "fc"))
        self.encoder = nn.Sequential(layers)
        self.heads = nn.ModuleList(_Pyramid(resnet.fc.in_features, n) for n in channels)

    def shared(self) -> list[Tensor]:
        """The backbone's parameters."""
        return list(self.encoder.parameters())

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Outputs [B, C_t, H/8, W/8] for each task, and the features [B, 2048, H/8, W/8] they come from."""
        features = self.encoder(image)
        return [head(features) for head in self.heads], features


class _Pyramid(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        quarter = inputs // len(BINS)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), *_convolution(inputs, quarter, 1)) for n in BINS
        )
        self.out = nn.Sequential(
            *_convolution(inputs + quarter * len(BINS), quarter, 3), nn.Conv2d(quarter, outputs, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        levels = [F.interpolate(level(x), x.shape[-2:], mode="bilinear") for level in self.levels]
        return self.out(torch.cat([x, *levels], 1))


class MTAN(nn.Module):
    """SegNet, and for each task masks on the feature maps of its every stage (Liu et al. 2019).

    Between two stages an attended map goes through a convolution that the tasks share, as in the authors' code. It is
    among the shared parameters, but no feature map comes from it: the upper bound gives it the sum of the tasks'
    gradients.

    Args:
        channels: of each task's output.
        width: factor on the number of filters.
    """

    def __init__(self, channels: Sequence[int], width: float = 1.0) -> None:
        super().__init__()
        filters = [max(1, round(n * width)) for n in FILTERS]
        self.encoder = _SegNet(filters)
        self.down = nn.ModuleList(
            nn.Sequential(*_convolution(n, below, 3), nn.MaxPool2d(2, ceil_mode=True))
            for n, below in zip(filters, [*filters[1:], filters[-1]], strict=True)
        )
        self.up = nn.ModuleList(
            nn.Sequential(*_convolution(n, above, 3)) for n, above in zip(filters[::-1], _above(filters), strict=True)
        )
        self.heads = nn.ModuleList(_Attention(filters, n) for n in channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)

    def shared(self) -> list[Tensor]:
        """The parameters of SegNet and of the convolutions between stages; the last is one of SegNet's last layer."""
        return [p for part in (self.down, self.up, self.encoder) for p in part.parameters()]

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Outputs [B, C_t, H, W] for each task, and the feature maps: two of each of SegNet's ten stages."""
        stages = self.encoder(image)
        return [head(stages, self.down, self.up) for head in self.heads], stages


class _SegNet(nn.Module):
    """VGG-16 down and up again, by max pooling and its inverse: the first and last maps of each stage.

    On the way up the first one is what the unpooling gives.
    """

    def __init__(self, filters: Sequence[int]) -> None:
        super().__init__()
        self.first, self.rest, self.back = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = [3, *filters[:-1]]
        for inputs, n, depth in zip(before, filters, DEPTHS, strict=True):
            self.first.append(nn.Sequential(*_convolution(inputs, n, 3)))
            self.rest.append(nn.Sequential(*(layer for _ in range(depth - 1) for layer in _convolution(n, n, 3))))
        for n, above, depth in zip(filters[::-1], _above(filters), DEPTHS[::-1], strict=True):
            rest = (layer for _ in range(depth - 1) for layer in _convolution(above, above, 3))
            self.back.append(nn.Sequential(*_convolution(n, above, 3), *rest))

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        stages, pooled = [], []
        for first, rest in zip(self.first, self.rest, strict=True):
            early = first(x)
            late = rest(early)
            stages.append((early, late))
            x, places = F.max_pool2d(late, 2, ceil_mode=True, return_indices=True)
            pooled.append((places, late.shape[-2:]))
        for back, (places, size) in zip(self.back, reversed(pooled), strict=True):
            early = F.max_unpool2d(x, places, [2, 2], output_size=size)
            x = back(early)
            stages.append((early, x))
        return stages


class _Attention(nn.Module):
    """One task's masks and head."""

    def __init__(self, filters: Sequence[int], outputs: int) -> None:
        super().__init__()
        # What reaches a stage from the one before; nothing reaches the first.
        self.masks = nn.ModuleList(_mask(2 * n if i else n, n) for i, n in enumerate(filters))
        self.back = nn.ModuleList(
            _mask(n + above, above) for n, above in zip(filters[::-1], _above(filters), strict=True)
        )
        self.out = nn.Sequential(nn.Conv2d(filters[0], filters[0], 3, padding=1), nn.Conv2d(filters[0], outputs, 1))

    def forward(self, stages: list[tuple[Tensor, Tensor]], down: nn.ModuleList, up: nn.ModuleList) -> Tensor:
        levels = len(self.masks)
        x: Any = None
        for mask, between, (early, late) in zip(self.masks, down, stages[:levels], strict=True):
            seen = early if x is None else torch.cat([early, x], 1)
            x = between(mask(seen) * late)
        for mask, between, (early, late) in zip(self.back, up, stages[levels:], strict=True):
            x = between(F.interpolate(x, early.shape[-2:], mode="bilinear", align_corners=True))
            x = mask(torch.cat([early, x], 1)) * late
        return self.out(x)


def _above(filters: Sequence[int]) -> list[int]:
    """What the stages on the way up end with: the filters of the one above each."""
    return [*filters[-2::-1], filters[0]]


def _mask(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *_convolution(inputs, outputs, 1),
        nn.Conv2d(outputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.Sigmoid(),
    )


def _convolution(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    """Without a bias, which the normalisation would take away."""
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


MODELS = ("mtan", "pspnet")


def make(name: str, channels: Sequence[int], width: float, weights: Path | None) -> MTAN | PSPNet:
    """The network of this name.

    Raises:
        ValueError: an unknown name, or an option that the network does not have.
    """
    if name == "mtan":
        if weights is not None:
            raise ValueError(f"weights: expected none for mtan, got {weights}")
        return MTAN(channels, width)
    if name == "pspnet":
        if width != 1:
            raise ValueError(f"width: expected 1 for pspnet, got {width}")
        return PSPNet(channels, weights)
    raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")

"""Random changes of training samples, each drawn from a generator that is given."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

__all__ = ["flip", "nearest", "rotate", "scale_crop"]

SCALES = (1.0, 1.2, 1.5)
SMOOTH = ("image", "normals")  # interpolated; everything else takes its nearest neighbour
DEGREES = 10.0

Sample = dict[str, Tensor]  # an image [3, H, W] and targets [C, H, W], or [H, W] for classes


def nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes the last two dimensions; element i of n comes from element ⌊i m / n⌋ of m."""
    rows, columns = (torch.arange(n) * m // n for n, m in zip(size, x.shape[-2:], strict=True))
    return x[..., rows[:, None], columns]


def scale_crop(sample: Sample, generator: torch.Generator) -> Sample:
    """Zooms into a random part, by a scale of 1, 1.2 or 1.5; what is seen nearer has a smaller depth.

    The public codes divide inverse depth by the scale too, where it would have to grow: published numbers come from
    that, so it is done here.
    """
    height, width = sample["image"].shape[-2:]
    scale = SCALES[_below(len(SCALES), generator)]
    h, w = int(height / scale), int(width / scale)
    top, left = _below(height - h + 1, generator), _below(width - w + 1, generator)
    zoomed = {}
    for name, x in sample.items():
        part = x[..., top : top + h, left : left + w]
        if name in SMOOTH:
            part = F.interpolate(part[None], (height, width), mode="bilinear", align_corners=True)[0]
        else:
            part = nearest(part, (height, width))
        zoomed[name] = part / scale if name == "depth" else part
    return zoomed


def flip(sample: Sample, generator: torch.Generator) -> Sample:
    """Mirrors left and right with probability ½; the horizontal component of normals changes its sign."""
    if _uniform(generator) >= 0.5:
        return sample
    mirrored = {name: x.flip(-1) for name, x in sample.items()}
    if "normals" in mirrored:
        mirrored["normals"] = mirrored["normals"] * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    return mirrored


def rotate(images: dict[str, Image.Image], generator: torch.Generator) -> dict[str, Image.Image]:
    """Turns by an angle within ±10° and mirrors with probability ½; the corners become 0, which is valid nowhere."""
    angle = DEGREES * (2 * _uniform(generator) - 1)
    mirror = _uniform(generator) < 0.5
    turned = {}
    for name, image in images.items():
        smooth = Image.Resampling.BILINEAR if name in SMOOTH else Image.Resampling.NEAREST
        image = image.rotate(angle, smooth)
        turned[name] = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image
    return turned


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))

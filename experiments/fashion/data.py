"""Fashion-MNIST's idx files, and pairs of garments overlaid to one image.

Fashion-MNIST (Xiao et al., 2017) has 60 000 garments to train on and 10 000 to test on, 28x28 bytes, ten classes, in
the idx format of MNIST: a magic number (two zero bytes, the type of the entries, the number of dimensions), the
dimensions as big-endian 32-bit integers, and the entries, row by row. Any other data set of that shape and those four
file names will do, gzipped or not.

A pair is made as in MultiMNIST (Sabour et al., NeurIPS 2017) and its Fashion-MNIST variant (Lin et al., Pareto
Multi-Task Learning, NeurIPS 2019): one garment in the top left and one in the bottom right corner of a 36x36 canvas,
the brighter of both where they overlap.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["CANVAS", "CLASSES", "FOLDER", "Garments", "Pairs", "draw_pairs", "read_garments", "read_idx"]

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
FILES = {"train": "train", "test": "t10k"}
CLASSES, SIDE, CANVAS = 10, 28, 36
UNSIGNED_BYTE = 0x08


class Garments(NamedTuple):
    """Images, uint8 [N, 28, 28], and their classes, uint8 [N]."""

    images: np.ndarray
    labels: np.ndarray


class Pairs(NamedTuple):
    """Overlaid images, uint8 [N, 1, 36, 36], and the classes of top-left and bottom-right garments, int64 [N, 2]."""

    images: np.ndarray
    labels: np.ndarray


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array in an idx file of bytes, gzipped where the name ends in .gz.

    Args:
        path: the file.
        dimensions: how many it has to have.

    Returns:
        uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a broken gzip stream, another magic number, fewer or more bytes than the header says.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: expected a gzip file, got one that does not unpack: {error}") from error
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise ValueError(
            f"{path}: expected an idx file of unsigned bytes with {dimensions} dimension(s), which starts with "
            f"{magic.hex(' ')}, got {content[:4].hex(' ') or 'an empty file'}"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{path}: expected a header of {start} bytes, got a file of {len(content)}")
    shape = [int(n) for n in np.frombuffer(content, ">u4", dimensions, offset=4)]
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} entries for shape {shape}, got {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_garments(folder: Path, part: str) -> Garments:
    """The garments of "train" or "test".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that is no idx file, or images and labels that do not fit.
    """
    paths = [_find(folder, f"{FILES[part]}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
    garments = Garments(read_idx(paths[0], 3), read_idx(paths[1], 1))
    images, labels = garments
    if images.shape[1:] != (SIDE, SIDE) or not len(images):
        raise ValueError(f"{paths[0]}: expected images of {SIDE}x{SIDE}, got shape {list(images.shape)}")
    if len(labels) != len(images):
        raise ValueError(f"{paths[1]}: expected {len(images)} labels, one for each image, got {len(labels)}")
    if labels.max() >= CLASSES:
        raise ValueError(f"{paths[1]}: expected labels 0 to {CLASSES - 1}, got {labels.max()}")
    return garments


def draw_pairs(garments: Garments, count: int, seed: int) -> Pairs:
    """Pairs drawn at random, garments with replacement."""
    chosen = np.random.default_rng(seed).integers(len(garments.labels), size=(count, 2))
    canvas = np.zeros((count, 1, CANVAS, CANVAS), np.uint8)
    canvas[:, 0, :SIDE, :SIDE] = garments.images[chosen[:, 0]]
    corner = canvas[:, 0, -SIDE:, -SIDE:]
    np.maximum(corner, garments.images[chosen[:, 1]], out=corner)
    return Pairs(canvas, garments.labels[chosen].astype(np.int64))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    names = ", ".join(f"{part}-{kind}-ubyte" for part in FILES.values() for kind in ("images-idx3", "labels-idx1"))
    raise FileNotFoundError(
        f"{folder}: expected {name} or {name}.gz, found neither. Debian and Ubuntu have the data as a package (apt-get "
        f"install dataset-fashion-mnist, in {FOLDER}); else download the four files of Fashion-MNIST ({names}; gzipped "
        "or not) and give their folder (--data)"
    )

"""Data sets in the layouts that users have on disk. What does not fit is reported with the name of its file.

`NumpyScenes` is the layout of Liu et al. (MTAN) for NYUv2 and for Cityscapes with two tasks, `RawCityscapes` that of
the Cityscapes download. A sample is a dict: `image` [3, H, W] and one target for each task, by its name. `dataset[i]`
is sample i as it is, `dataset[i, seed]` the same with the augmentation that this seed gives: it depends neither on the
number of workers that load nor on what was loaded before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.scene.augment import Sample, flip, nearest, rotate, scale_crop
from experiments.scene.tasks import NO_INSTANCE

__all__ = ["CITYSCAPES_IDS", "DISPARITY_UNIT", "VOID", "NumpyScenes", "RawCityscapes", "batches"]

# The labelIds of Cityscapes' 19 classes, in their order; from THINGS on, classes have instances.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
THINGS = 24
VOID = 250
DISPARITY_UNIT = 2729.068  # the standard deviation of raw disparities
# In the order in which the public codes subtract it, though the image is BGR.
MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)
STRIDE = 8  # of the targets in the image


class NumpyScenes(Dataset[Sample]):
    """`root/{train,val}/{image,label,depth,normal}/{i}.npy`: NYUv2, and without `normal` Cityscapes with two tasks.

    image   floating [H, W, 3] in [0, 1]
    label   integral [H, W], whatever the dtype; -1 does not count
    depth   floating [H, W, 1], or inverse depth; 0 where nothing was measured
    normal  floating [H, W, 3]; 0 where nothing was measured

    Args:
        root: the folder.
        split: "train" or "val".
        classes: number of classes.
        labels: names that the folder of labels may have; the first that is there is taken.
        normals: whether there are normals.

    Raises:
        FileNotFoundError: a folder or a file that is not there.
        ValueError: a file that does not hold what it should. Both also when samples are read.
    """

    def __init__(
        self, root: Path, split: str, classes: int, labels: Sequence[str] = ("label",), normals: bool = True
    ) -> None:
        self.folder, self.classes, self.normals = Path(root) / split, classes, normals
        self.indices = sorted(int(path.stem) for path in (self.folder / "image").glob("*.npy") if path.stem.isdigit())
        if not self.indices:
            raise FileNotFoundError(f"{self.folder / 'image'}: expected files 0.npy, 1.npy, …, found none")
        there = [name for name in labels if (self.folder / name).is_dir()]
        if not there:
            raise FileNotFoundError(f"{self.folder}: expected a folder {' or '.join(labels)}, found none")
        self.labels = there[0]
        first = self._path("image", 0)
        shape = _array(first).shape
        if len(shape) != 3 or shape[2] != 3:
            raise ValueError(f"{first}: expected shape [H, W, 3], got {list(shape)}")
        self.size = shape[:2]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, None)
        sample = {
            "image": self._floats("image", index, 3),
            "segmentation": self._classes(index),
            "depth": self._floats("depth", index, 1),
        }
        if self.normals:
            sample["normals"] = self._floats("normal", index, 3)
        if seed is None:
            return sample
        generator = torch.Generator().manual_seed(seed)
        return flip(scale_crop(sample, generator), generator)

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / kind / f"{self.indices[index]}.npy"

    def _floats(self, kind: str, index: int, channels: int) -> Tensor:
        path = self._path(kind, index)
        array = _array(path)
        _check(path, array, (*self.size, channels), "f", "floating")
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: expected finite numbers, got {int((~np.isfinite(array)).sum())} NaN or infinite")
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))

    def _classes(self, index: int) -> Tensor:
        path = self._path(self.labels, index)
        array = _array(path)
        _check(path, array, self.size, "fiu", "floating or integer")
        wrong = ~np.isin(array, np.arange(-1, self.classes))
        if wrong.any():
            raise ValueError(f"{path}: expected classes 0 to {self.classes - 1} or -1, got {array[wrong][0]}")
        return torch.from_numpy(array.astype(np.int64))


class RawCityscapes(Dataset[Sample]):
    """Cityscapes as downloaded: segmentation, instance offsets and disparity.

    `root/{leftImg8bit,gtFine,disparity}/{train,val}/<city>/<stem>_{leftImg8bit,gtFine_labelIds,gtFine_instanceIds,
    disparity}.png`. The image becomes BGR, less its mean, over 255. Targets have one pixel in 8 × 8: the class of 19,
    or 250; the offset (y, x) from the centroid of the instance, in pixels of the file, or 250; the raw disparity over
    2729.068, 0 where there is none. As in Sener and Koltun's code a group of things is one instance.

    Args:
        root: the folder.
        split: "train" or "val".
        size: height and width of the image, multiples of 8.

    Raises:
        FileNotFoundError: a folder or a file that is not there.
        ValueError: a size that is no multiple of 8; a file that does not hold what it should. Both also when samples
            are read.
    """

    def __init__(self, root: Path, split: str, size: tuple[int, int] = (256, 512)) -> None:
        if any(n < STRIDE or n % STRIDE for n in size):
            raise ValueError(f"size: expected multiples of {STRIDE}, got {size[0]}x{size[1]}")
        self.root, self.split, self.size = Path(root), split, size
        folder = self.root / "leftImg8bit" / split
        self.stems = sorted(
            f"{path.parent.name}/{path.name.removesuffix('_leftImg8bit.png')}"
            for path in folder.glob("*/*_leftImg8bit.png")
        )
        if not self.stems:
            raise FileNotFoundError(f"{folder}: expected files <city>/<stem>_leftImg8bit.png, found none")
        classes = np.full(256, VOID, dtype=np.uint8)
        classes[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
        self.class_of_id = classes

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, None)
        image = self._image("leftImg8bit", "leftImg8bit", index, ("RGB",))
        shape = image.size
        disparity = self._image("disparity", "disparity", index, ("I;16", "I"), shape)
        files = {
            "image": image,
            "labels": self._image("gtFine", "gtFine_labelIds", index, ("L",), shape),
            # Pillow turns neither 16-bit images nor their dtype.
            "instances": self._image("gtFine", "gtFine_instanceIds", index, ("I;16", "I"), shape).convert("I"),
            "disparity": disparity.convert("I").convert("F"),
        }
        if seed is not None:
            files = rotate(files, torch.Generator().manual_seed(seed))
        return self._sample(**{name: np.array(file) for name, file in files.items()})

    def _sample(self, image: np.ndarray, labels: np.ndarray, instances: np.ndarray, disparity: np.ndarray) -> Sample:
        classes = self.class_of_id[labels]
        blue_first = torch.from_numpy(image[..., ::-1].astype(np.float32) - MEAN).permute(2, 0, 1)
        resized = torch.nn.functional.interpolate(blue_first[None], self.size, mode="bilinear")[0]
        small = self.size[0] // STRIDE, self.size[1] // STRIDE
        return {
            "image": resized / 255,
            "segmentation": nearest(torch.from_numpy(classes.astype(np.int64)), small),
            "instance": nearest(torch.from_numpy(_offsets(classes, instances)), small),
            "disparity": nearest(torch.from_numpy(disparity / np.float32(DISPARITY_UNIT)), small)[None],
        }

    def _image(
        self, kind: str, suffix: str, index: int, modes: tuple[str, ...], size: tuple[int, int] | None = None
    ) -> Image.Image:
        path = self.root / kind / self.split / f"{self.stems[index]}_{suffix}.png"
        try:
            image = Image.open(path)
            image.load()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: expected a file beside {self.stems[index]}_leftImg8bit.png") from None
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path}: expected a PNG image, got one that cannot be read ({error})") from error
        if image.mode not in modes:
            raise ValueError(f"{path}: expected an image of mode {' or '.join(modes)}, got {image.mode}")
        if size is not None and image.size != size:
            raise ValueError(
                f"{path}: expected the image's size {size[0]}x{size[1]}, got {image.size[0]}x{image.size[1]}"
            )
        return image


def batches(
    dataset: NumpyScenes | RawCityscapes, batch: int, seed: int | None = None, workers: int = 0
) -> Iterator[Sample]:
    """One pass over a data set, in batches.

    Args:
        dataset: the samples.
        batch: how many samples a batch has.
        seed: of the order and the augmentation of an epoch of training; what is left over after whole batches waits for
            another epoch. None: every sample, as it is, in order.
        workers: processes that load; the batches do not depend on it.
    """
    keys: list[list]
    if seed is None:
        keys = [list(range(i, min(i + batch, len(dataset)))) for i in range(0, len(dataset), batch)]
    else:
        if len(dataset) < batch:
            raise ValueError(f"batch: expected at most the number of samples {len(dataset)}, got {batch}")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(dataset), generator=generator).tolist()
        seeds = torch.randint(2**62, (len(order),), generator=generator).tolist()
        shuffled = list(zip(order, seeds, strict=True))
        keys = [shuffled[i : i + batch] for i in range(0, len(shuffled) - batch + 1, batch)]
    # Its own generator: the loader draws from it what nothing here uses, and torch's stays as it is.
    yield from DataLoader(dataset, batch_sampler=keys, num_workers=workers, generator=torch.Generator())


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected a file for each one in {path.parent.parent / 'image'}") from None
    except (OSError, ValueError, EOFError, SyntaxError, BadZipFile) as error:
        raise ValueError(f"{path}: expected an array of numbers, got a file that cannot be read ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: expected one array, got an archive of several")
    return array


def _check(path: Path, array: np.ndarray, shape: tuple[int, ...], kinds: str, expected: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{path}: expected shape {list(shape)}, got {list(array.shape)}")
    if array.dtype.kind not in kinds:
        raise ValueError(f"{path}: expected a {expected} dtype, got {array.dtype}")


def _offsets(classes: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Each pixel's place (y, x) less the mean over its instance; float32 [2, H, W]."""
    # An instance's id is its labelId, or 1000 times that and a number.
    labels = np.where(instances >= 1000, instances // 1000, instances)
    there = (labels >= THINGS) & (classes != VOID)
    offsets = np.full((2, *instances.shape), NO_INSTANCE, dtype=np.float32)
    ids = instances[there]
    count = np.bincount(ids)
    for axis, place in enumerate(np.nonzero(there)):
        with np.errstate(invalid="ignore"):  # 0 / 0 for ids that do not occur
            centroid = np.bincount(ids, weights=place) / count
        offsets[axis][there] = place - centroid[ids]
    return offsets

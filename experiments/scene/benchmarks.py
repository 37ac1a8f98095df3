"""The paper's three benchmarks: data, tasks and schedule of each (section 6.2 and appendix D)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.scene.data import VOID, NumpyScenes, RawCityscapes
from experiments.scene.tasks import Depth, Disparity, Instance, Normals, Segmentation, Task

__all__ = ["BENCHMARKS", "Benchmark"]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, as in the paper.

    Attributes:
        layout: of its files.
        classes: the numbers of classes that there can be; the first is the paper's.
        models: the networks that the paper trains; the first is the default.
        samples: of each split.
        sizes: that the images have in the copies that there are; where files are resized, to the first.
        protocol: `batch`, `epochs`, `halve_at` (the epochs after which the learning rate is halved; 0: never),
            `average` (over how many last epochs metrics are averaged), `lr` (Adam's) and `width`.
    """

    layout: str
    classes: tuple[int, ...]
    models: tuple[str, ...]
    samples: Mapping[str, int]
    sizes: tuple[tuple[int, int], ...]
    protocol: Mapping[str, float]

    def tasks(self, classes: int) -> list[Task]:
        """The tasks, in the order of the paper's tables."""
        if classes not in self.classes:
            raise ValueError(f"classes: expected {' or '.join(map(str, self.classes))}, got {classes}")
        if self.layout == "cityscapes3":
            return [Segmentation(classes, VOID, accuracy=False), Instance(), Disparity()]
        tasks: list[Task] = [Segmentation(classes, -1), Depth()]
        return [*tasks, Normals()] if self.layout == "nyuv2" else tasks

    def data(self, root: Path, split: str, classes: int, size: tuple[int, int]) -> NumpyScenes | RawCityscapes:
        """The samples of a split, "train" or "val"; `size` is that to which raw files are resized."""
        if self.layout == "cityscapes3":
            return RawCityscapes(root, split, size)
        if self.layout == "nyuv2":
            return NumpyScenes(root, split, classes)
        # Some copies call the folder by its number of classes, some do not.
        return NumpyScenes(root, split, classes, (f"label_{classes}", "label"), normals=False)


_COMMON = {"lr": 1e-4, "width": 1.0}
BENCHMARKS = {
    "nyuv2": Benchmark(
        layout="nyuv2",
        classes=(13,),
        models=("mtan", "pspnet"),
        samples={"train": 795, "val": 654},
        sizes=((288, 384),),
        protocol={"batch": 2, "epochs": 200, "halve_at": 100, "average": 1, **_COMMON},
    ),
    "cityscapes2": Benchmark(
        layout="cityscapes2",
        classes=(7, 19),
        models=("mtan",),
        samples={"train": 2975, "val": 500},
        sizes=((128, 256), (256, 512)),
        protocol={"batch": 8, "epochs": 200, "halve_at": 100, "average": 10, **_COMMON},
    ),
    "cityscapes3": Benchmark(
        layout="cityscapes3",
        classes=(19,),
        models=("pspnet",),
        samples={"train": 2975, "val": 500},
        sizes=((256, 512),),
        protocol={"batch": 8, "epochs": 100, "halve_at": 0, "average": 1, **_COMMON},
    ),
}

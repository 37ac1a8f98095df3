"""Furnished rooms from a seed, and files of them in the layouts of the data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.scene.data import CITYSCAPES_IDS, THINGS
from experiments.scene.raycast import Box, Camera, Look, Room, Sphere, View, render

__all__ = ["KINDS", "LAYOUTS", "furnish", "write"]

# What there is in a room, in the order of Cityscapes' classes: its 11 of stuff, then its 8 of things.
KINDS = (
    "floor",
    "rug",
    "wall",
    "door",
    "window",
    "lamp",
    "picture",
    "carton",
    "plant",
    "cushion",
    "ceiling",
    "chair",
    "sofa",
    "bed",
    "table",
    "tv",
    "books",
    "object",
    "shelf",
)
# Their class among NYUv2's 13: bed, books, ceiling, chair, floor, furniture, objects, picture, sofa, table, tv, wall,
# window.
NYU = np.array([4, 4, 11, 11, 12, 6, 7, 6, 6, 6, 2, 3, 8, 0, 9, 10, 1, 6, 5])
# And among Cityscapes' 7 categories: flat, construction, object, nature, sky, human, vehicle.
CATEGORIES = np.array([0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6, 6, 6, 6])
COLOURS = np.array(
    [
        [0.55, 0.42, 0.30],
        [0.60, 0.25, 0.25],
        [0.80, 0.78, 0.70],
        [0.50, 0.35, 0.22],
        [0.65, 0.80, 0.95],
        [0.95, 0.90, 0.60],
        [0.45, 0.50, 0.65],
        [0.70, 0.55, 0.35],
        [0.25, 0.50, 0.25],
        [0.70, 0.45, 0.55],
        [0.92, 0.92, 0.90],
        [0.40, 0.30, 0.25],
        [0.35, 0.40, 0.55],
        [0.80, 0.75, 0.80],
        [0.60, 0.45, 0.30],
        [0.10, 0.10, 0.12],
        [0.60, 0.30, 0.30],
        [0.50, 0.60, 0.40],
        [0.55, 0.45, 0.38],
    ]
)
BLIND = ("window", "tv")  # glass, on which depth sensors measure nothing
LAYOUTS = ("nyuv2", "cityscapes2", "cityscapes3")
FOCAL_BASELINE = 100.0  # metres × pixels: disparity = this / depth; in files 256 × that, plus 1


# Of a piece of furniture: kind, middle and half sizes.
Part = tuple[str, Sequence[float], Sequence[float]]


class _Builder:
    """Things so far, where they stand, and a generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.size = np.array([rng.uniform(3.6, 6.0), rng.uniform(3.6, 6.0), rng.uniform(2.4, 3.0)])
        self.things: list[Box | Sphere] = []
        self.taken: list[np.ndarray] = []  # rectangles on the floor: their least and greatest x, y
        self.instances = 0

    def look(self, kind: str, contrast: float = 0.0) -> Look:
        colour = COLOURS[KINDS.index(kind)] * self.rng.uniform(0.75, 1.2) + self.rng.uniform(-0.12, 0.12, 3)
        return Look(np.clip(colour, 0.02, 1), self.rng.uniform(-30, 30, 3), contrast)

    def free(self, x: float, y: float, reach: Sequence[float]) -> bool:
        """Takes a rectangle on the floor, where it is free."""
        low, high = np.array([x, y]) - reach, np.array([x, y]) + reach
        if (np.abs([low, high]) > self.size[:2] / 2).any():
            return False
        if any((low < other[1]).all() and (high > other[0]).all() for other in self.taken):
            return False
        self.taken.append(np.stack([low, high]))
        return True

    def piece(self, x: float, y: float, yaw: float, parts: Iterable[Part]) -> None:
        """One piece of furniture at (x, y): boxes, turned together; one instance a kind."""
        c, s = np.cos(yaw), np.sin(yaw)
        looks: dict[str, tuple[int, Look]] = {}
        for kind, (u, v, z), half in parts:
            if kind not in looks:
                self.instances += 1
                looks[kind] = self.instances, self.look(kind, 0.1)
            instance, look = looks[kind]
            centre = np.array([x + c * u - s * v, y + s * u + c * v, z])
            self.things.append(Box(centre, np.array(half, float), yaw, KINDS.index(kind), instance, look))

    def ball(self, kind: str, centre: Sequence[float], radius: float, joined: bool = False) -> None:
        """A sphere; `joined` to the last piece, or an instance of its own."""
        self.instances += not joined
        self.things.append(
            Sphere(np.array(centre, float), radius, KINDS.index(kind), self.instances, self.look(kind, 0.1))
        )

    def against(self, half: Sequence[float]) -> tuple[float, float, float] | None:
        """A free place (x, y, yaw) with the back (its side of positive y) to a wall; None where none was found."""
        for _ in range(12):
            wall = self.rng.integers(4)
            yaw = wall * np.pi / 2
            along, across = (0, 1) if wall % 2 == 0 else (1, 0)
            room = self.size / 2
            place = np.zeros(2)
            place[along] = self.rng.uniform(-1, 1) * max(room[along] - half[0], 0)
            # Turned by yaw, positive y becomes (-sin, cos).
            place[across] = (room[across] - half[1] - 0.02) * (1 if wall in (0, 3) else -1)
            reach = np.zeros(2)
            reach[along], reach[across] = half[0], half[1]
            x, y = place.tolist()
            if self.free(x, y, reach.tolist()):
                return x, y, yaw
        return None

    def anywhere(self, reach: float) -> tuple[float, float, float] | None:
        """A free place of any direction."""
        for _ in range(12):
            x, y = self.rng.uniform(-0.5, 0.5, 2) * (self.size[:2] - 2 * reach)
            if self.free(x, y, (reach, reach)):
                return float(x), float(y), float(self.rng.uniform(0, 2 * np.pi))
        return None

    def on_wall(self, kind: str, half: Sequence[float], height: float) -> None:
        """A thin box on a wall."""
        wall = self.rng.integers(4)
        along, across = (0, 1) if wall % 2 == 0 else (1, 0)
        place = np.zeros(2)
        place[along] = self.rng.uniform(-1, 1) * (self.size[along] / 2 - half[0] - 0.1)
        place[across] = self.size[across] / 2 * (1 if wall in (0, 3) else -1)
        self.piece(place[0], place[1], wall * np.pi / 2, [(kind, (0, 0, height), half)])


def furnish(seed: int | Sequence[int]) -> Room:
    """A room, its furniture, a light and a camera."""
    rng = np.random.default_rng(seed)
    b = _Builder(rng)
    corner = rng.choice([-1.0, 1.0], 2)
    eye = np.array([*(corner * (b.size[:2] / 2 - rng.uniform(0.35, 0.8, 2))), rng.uniform(1.1, 1.9)])
    b.taken.append(np.stack([eye[:2] - 0.8, eye[:2] + 0.8]))  # nothing right before the camera
    target = rng.uniform(-0.2, 0.2, 2) * b.size[:2] - eye[:2]
    camera = Camera(eye, float(np.arctan2(target[1], target[0])), rng.uniform(-0.4, -0.05), rng.uniform(1.0, 1.4))

    for kind, half, height in (
        ("door", (0.45, 0.03, 1.0), 1.0),
        ("window", (rng.uniform(0.4, 0.9), 0.03, rng.uniform(0.4, 0.6)), 1.5),
        ("window", (rng.uniform(0.4, 0.9), 0.03, rng.uniform(0.4, 0.6)), 1.5),
        ("picture", (rng.uniform(0.2, 0.6), 0.02, rng.uniform(0.2, 0.4)), rng.uniform(1.4, 1.8)),
        ("picture", (rng.uniform(0.2, 0.6), 0.02, rng.uniform(0.2, 0.4)), rng.uniform(1.4, 1.8)),
    ):
        b.on_wall(kind, half, height)
    x, y, w, d = *rng.uniform(-0.6, 0.6, 2), *rng.uniform(0.5, 1.2, 2)
    b.piece(x, y, rng.uniform(0, np.pi), [("rug", (0, 0, 0.005), (w, d, 0.005))])
    for build in rng.permutation(np.array([_bed, _sofa, _shelf, _tv, _table, _table, _plant, _lamp, _carton, _shelf])):
        if rng.random() < 0.8:
            build(b)
    for _ in range(rng.integers(0, 4)):
        radius = rng.uniform(0.08, 0.25)
        if place := b.anywhere(radius):
            b.ball("object", (*place[:2], radius), radius)

    centre = np.array([0.0, 0.0, b.size[2] / 2])
    looks = b.look("floor", 0.12), b.look("ceiling"), b.look("wall", 0.04)
    kinds = KINDS.index("floor"), KINDS.index("ceiling"), KINDS.index("wall")
    shell = Box(centre, b.size / 2, 0.0, kinds[2], 0, looks[2])
    light = np.array([*(rng.uniform(-0.25, 0.25, 2) * b.size[:2]), b.size[2] - 0.1])
    return Room(shell, kinds, looks, b.things, light, camera)


def _bed(b: _Builder) -> None:
    w, d, h = b.rng.uniform(0.5, 0.9), 1.0, b.rng.uniform(0.2, 0.3)
    if place := b.against((w, d)):
        pillows = [("cushion", (x * w / 2, d - 0.3, 2 * h + 0.07), (0.2, 0.15, 0.07)) for x in (-1, 1)]
        b.piece(*place, [("bed", (0, 0, h), (w, d, h)), ("bed", (0, d - 0.04, h + 0.3), (w, 0.04, h + 0.3)), *pillows])


def _sofa(b: _Builder) -> None:
    w, d = b.rng.uniform(0.7, 1.1), 0.42
    if place := b.against((w, d)):
        parts = [
            ("sofa", (0, 0, 0.2), (w, d, 0.2)),
            ("sofa", (0, d - 0.1, 0.4), (w, 0.1, 0.4)),
            *(("sofa", (x * (w - 0.09), 0, 0.3), (0.09, d, 0.3)) for x in (-1, 1)),
            ("cushion", (b.rng.uniform(-0.5, 0.5) * w, d - 0.28, 0.55), (0.2, 0.07, 0.15)),
        ]
        b.piece(*place, parts)


def _shelf(b: _Builder) -> None:
    w, d, h = b.rng.uniform(0.35, 0.6), 0.18, b.rng.uniform(0.5, 1.0)
    if place := b.against((w, d)):
        parts: list[Part] = [("shelf", (0, 0, h), (w, d, h))]
        for z in np.arange(0.3, 2 * h - 0.25, 0.38):
            width = b.rng.uniform(0.3, 0.9) * w
            parts.append(("books", (b.rng.uniform(-1, 1) * (w - width), -d, z + 0.12), (width, 0.05, 0.12)))
        b.piece(*place, parts)


def _tv(b: _Builder) -> None:
    w = b.rng.uniform(0.4, 0.7)
    if place := b.against((w, 0.22)):
        parts = [("shelf", (0, 0, 0.25), (w, 0.22, 0.25)), ("tv", (0, 0, 0.52 + 0.55 * w), (0.9 * w, 0.03, 0.5 * w))]
        b.piece(*place, parts)


def _table(b: _Builder) -> None:
    w, d, h = b.rng.uniform(0.4, 0.8), b.rng.uniform(0.35, 0.5), b.rng.uniform(0.4, 0.75)
    if not (place := b.anywhere(max(np.hypot(w, d), d + 0.4))):  # with its chairs
        return
    x, y, yaw = place
    legs = [("table", (u * (w - 0.05), v * (d - 0.05), h / 2), (0.03, 0.03, h / 2)) for u in (-1, 1) for v in (-1, 1)]
    b.piece(x, y, yaw, [("table", (0, 0, h), (w, d, 0.025)), *legs])
    for _ in range(b.rng.integers(1, 4)):
        u, v, radius = b.rng.uniform(-0.7, 0.7) * w, b.rng.uniform(-0.7, 0.7) * d, b.rng.uniform(0.05, 0.12)
        px, py = x + np.cos(yaw) * u - np.sin(yaw) * v, y + np.sin(yaw) * u + np.cos(yaw) * v
        if b.rng.random() < 0.5:
            b.ball("object", (px, py, h + 0.025 + radius), radius)
        else:
            b.piece(px, py, b.rng.uniform(0, np.pi), [("books", (0, 0, h + 0.065), (0.12, 0.09, 0.04))])
    for side in (-1, 1):
        if b.rng.random() < 0.75:
            v = side * (d + 0.15)
            _chair(b, x - np.sin(yaw) * v, y + np.cos(yaw) * v, yaw + (0 if side > 0 else np.pi))


def _chair(b: _Builder, x: float, y: float, yaw: float) -> None:
    legs = [("chair", (u * 0.18, v * 0.18, 0.22), (0.02, 0.02, 0.22)) for u in (-1, 1) for v in (-1, 1)]
    b.piece(
        x, y, yaw, [("chair", (0, 0, 0.45), (0.2, 0.2, 0.025)), ("chair", (0, 0.19, 0.7), (0.2, 0.02, 0.25)), *legs]
    )


def _plant(b: _Builder) -> None:
    if place := b.anywhere(0.25):
        x, y, yaw = place
        b.piece(x, y, yaw, [("plant", (0, 0, 0.15), (0.13, 0.13, 0.15))])
        for z, radius in ((0.45, 0.2), (0.7, 0.16)):
            b.ball("plant", (x, y, z), radius, joined=True)


def _lamp(b: _Builder) -> None:
    if place := b.anywhere(0.2):
        x, y, yaw = place
        b.piece(x, y, yaw, [("lamp", (0, 0, 0.02), (0.15, 0.15, 0.02)), ("lamp", (0, 0, 0.7), (0.02, 0.02, 0.7))])
        b.ball("lamp", (x, y, 1.45), 0.18, joined=True)


def _carton(b: _Builder) -> None:
    half = b.rng.uniform(0.12, 0.3, 3)
    if place := b.anywhere(float(np.hypot(half[0], half[1]))):
        b.piece(*place, [("carton", (0, 0, half[2]), half.tolist())])


def write(
    out: Path, layout: str, counts: dict[str, int], size: tuple[int, int], seed: int = 0, labels: str = "label_7"
) -> None:
    """Renders rooms into files of a data set's layout. Room i of a split is the same in every layout.

    Floating arrays are float32, labels too, as in the files that users have; images have a little noise, all else is
    exact. Glass has no depth and normals, and the edges of things no class: the loaders' "not measured" and "ignore".

    Args:
        out: the root; rendered.json, which says what is in it, is written last.
        layout: "nyuv2", "cityscapes2" or "cityscapes3".
        counts: how many for each split, "train" and "val".
        size: height and width.
        seed: of everything.
        labels: the folder of the labels of cityscapes2: "label_7" or "label" (7 classes), or "label_19".

    Raises:
        ValueError: an unknown layout or folder of labels.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if labels not in ("label_7", "label", "label_19"):
        raise ValueError(f"labels: expected label_7, label or label_19, got {labels!r}")
    for split, count in counts.items():
        for i in range(count):
            key = [seed, ("train", "val").index(split), i]
            view = render(furnish(key), *size)
            noise = np.random.default_rng([*key, 1]).normal(0, 0.01, view.image.shape)
            view = view._replace(image=np.clip(view.image + noise, 0, 1))
            if layout == "cityscapes3":
                _write_raw(out, split, i, view)
            else:
                _write_arrays(out / split, i, view, layout == "nyuv2", labels)
    about = {"layout": layout, **counts, "size": list(size), "seed": seed}
    if layout == "cityscapes2":
        about["labels"] = labels
    (out / "rendered.json").write_text(json.dumps(about) + "\n")


def _write_arrays(folder: Path, i: int, view: View, nyu: bool, labels: str) -> None:
    measured = ~np.isin(view.kind, [KINDS.index(kind) for kind in BLIND])
    of_kind = NYU if nyu else np.arange(len(KINDS)) if labels == "label_19" else CATEGORIES
    arrays = {
        "image": view.image,
        "label" if nyu else labels: np.where(_edges(view), -1, of_kind[view.kind]),
        "depth": (np.where(measured, view.depth if nyu else 1 / view.depth, 0))[..., None],
    }
    if nyu:
        arrays["normal"] = np.where(measured[..., None], view.normal, 0)
    for name, array in arrays.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / name / f"{i}.npy", array.astype(np.float32))


def _write_raw(out: Path, split: str, i: int, view: View) -> None:
    ids = np.array(CITYSCAPES_IDS)[view.kind]
    edges = _edges(view)
    blind = np.isin(view.kind, [KINDS.index(kind) for kind in BLIND])
    disparity = np.where(blind, 0, np.minimum(np.round(256 * FOCAL_BASELINE / view.depth) + 1, 65535))
    files: dict[str, np.ndarray] = {
        "leftImg8bit/{}_leftImg8bit": np.round(255 * view.image).astype(np.uint8),
        "gtFine/{}_gtFine_labelIds": np.where(edges, 0, ids).astype(np.uint8),
        "gtFine/{}_gtFine_instanceIds": np.where(edges, 0, _instance_ids(ids, view.instance)).astype(np.uint16),
        "disparity/{}_disparity": disparity.astype(np.uint16),
    }
    for name, array in files.items():
        path = out / (name.format(f"{split}/room/room_{i:06d}_000000") + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def _instance_ids(ids: np.ndarray, instance: np.ndarray) -> np.ndarray:
    """1000 times the id and a number for things, the id for stuff."""
    numbered = ids.astype(np.int64)
    for thing in np.unique(ids[ids >= THINGS]):
        here = ids == thing
        numbered[here] = 1000 * thing + np.unique(instance[here], return_inverse=True)[1]
    return numbered


def _edges(view: View) -> np.ndarray:
    """Pixels whose left neighbour belongs to something else."""
    edges = np.zeros(view.kind.shape, dtype=bool)
    edges[:, 1:] = (view.instance[:, 1:] != view.instance[:, :-1]) | (view.kind[:, 1:] != view.kind[:, :-1])
    return edges

"""Scenes: the ray-caster, files in each layout and what may be wrong with them, metrics, networks, runs."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("typer", reason="the experiments need typer and rich: pip install 'fastmtl-torch[experiments]'")
pytest.importorskip("matplotlib", reason="the figure needs it: pip install 'fastmtl-torch[experiments]'")
pytest.importorskip(
    "torchvision", reason="PSPNet's backbone and images need it: pip install 'fastmtl-torch[experiments]'"
)
from PIL import Image
from processes import kill_in, start
from typer.testing import CliRunner

import fastmtl
from experiments.harness import Balancer, Run
from experiments.scene import augment
from experiments.scene.__main__ import app
from experiments.scene.benchmarks import BENCHMARKS
from experiments.scene.data import CITYSCAPES_IDS, VOID, NumpyScenes, RawCityscapes, batches
from experiments.scene.models import MTAN, PSPNet, make
from experiments.scene.raycast import Box, Camera, Look, Room, Sphere, cast, render
from experiments.scene.rooms import CATEGORIES, KINDS, NYU, furnish, write
from experiments.scene.tasks import Depth, Disparity, Instance, Normals, Segmentation
from experiments.scene.training import Training, train

SIZE = 32, 48
COUNTS = {"train": 4, "val": 3}
TINY = ("--width", "0.0625", "--batch", "2")
PLAIN = Look(np.array([0.5, 0.5, 0.5]), np.zeros(3), 0.0)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """The root of tiny scenes in a layout; each is rendered once."""
    done = {}

    def root(layout, labels="label_7"):
        if (layout, labels) not in done:
            done[layout, labels] = tmp_path_factory.mktemp(f"{layout}-{labels}")
            write(done[layout, labels], layout, COUNTS, SIZE, seed=0, labels=labels)
        return done[layout, labels]

    return root


@pytest.fixture
def own(rooms, tmp_path):
    """A copy of scenes that a test may break: hard links, so that files have to be replaced, not changed."""

    def root(layout):
        source, target = rooms(layout), tmp_path / layout
        for path in source.rglob("*.*"):
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target / path.relative_to(source))
        return target

    return root


def settings(benchmark="nyuv2", **changes):
    return {
        "benchmark": benchmark,
        "classes": BENCHMARKS[benchmark].classes[0],
        "size": SIZE,
        "model": "mtan",
        "width": 1 / 16,
        "weights": None,
        "method": "uniform",
        "task": None,
        "seed": 0,
        "batch": 2,
        "epochs": 2,
        "halve_at": 1,
        "average": 1,
        "lr": 1e-3,
        "log_every": 1,
        "evaluate_every": 1,
        "device": "cpu",
        **changes,
    }


# ---------------------------------------------------------------------------------------------- geometry


def empty_room(things=(), pitch=0.0):
    """4 x 6 x 3 metres around the origin of the floor; the camera 2 metres from the wall that it looks at."""
    shell = Box(np.array([0.0, 0.0, 1.5]), np.array([2.0, 3.0, 1.5]), 0.0, 2, 0, PLAIN)
    camera = Camera(np.array([0.0, 0.0, 1.5]), 0.0, pitch, np.pi / 2)
    return Room(shell, (0, 10, 2), (PLAIN,) * 3, things, np.array([0.0, 0.0, 2.9]), camera)


def test_a_wall_straight_ahead():
    view = render(empty_room(), 9, 17)
    assert np.allclose(view.depth, 2, rtol=1e-12)  # that along the axis, not that along the ray
    assert np.allclose(view.normal, [0, 0, 1], atol=1e-12)
    assert (view.kind == 2).all()
    assert (view.thing == -1).all()


def test_a_floor_seen_from_above():
    """Where the plane's own equation puts it: 1.5 metres below the camera, which looks down by 45°."""
    room = empty_room(pitch=-np.pi / 4)
    view = render(room, 20, 30)
    y = (20 / 2 - np.arange(20) - 0.5) / 15  # the focal length is half the width, for 90°
    down = 1.5 / ((1 - y) * np.sqrt(0.5))
    floor = view.kind == KINDS.index("floor")
    assert floor[-1].all()
    assert np.allclose(view.depth[floor], np.broadcast_to(down[:, None], (20, 30))[floor], rtol=1e-12)
    assert np.allclose(view.normal[floor], [0, np.sqrt(0.5), np.sqrt(0.5)], atol=1e-12)


def test_a_sphere_ahead_and_its_shadow():
    ball = Sphere(np.array([1.2, 0.0, 1.5]), 0.4, KINDS.index("object"), 3, PLAIN)
    view = render(empty_room([ball]), 33, 33)
    assert view.depth[16, 16] == pytest.approx(0.8, abs=1e-12)
    assert np.allclose(view.normal[16, 16], [0, 0, 1], atol=1e-12)
    assert view.instance[16, 16] == 3
    assert view.depth[16, 0] == pytest.approx(2, abs=1e-12)
    # A silhouette at an angle of asin(r / d), where the tangent is r / sqrt(d² - r²).
    assert (view.thing[16] == 0).sum() == pytest.approx(33 * 0.4 / np.sqrt(1.2**2 - 0.4**2), abs=1)
    # Below the ball on the wall there is a shadow of the light at the ceiling: ambient light alone.
    unlit = np.isclose(view.image[..., 0], 0.5 * 0.35) & (view.thing < 0)
    assert 0 < unlit.sum() < unlit.size / 2
    assert not np.isclose(render(empty_room(), 33, 33).image[..., 0], 0.5 * 0.35).any()


@pytest.mark.parametrize("seed", range(4))
def test_points_lie_on_what_they_are_said_to_be(seed):
    room = furnish(seed)
    view = render(room, *SIZE)
    axes = room.camera.axes()
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-14)
    points = room.camera.position + view.depth[..., None] * room.camera.rays(*SIZE).reshape(*SIZE, 3)
    normals = view.normal @ axes.T
    assert np.allclose(np.linalg.norm(view.normal, axis=-1), 1, atol=1e-12)
    towards = room.camera.position - points
    assert ((normals * towards).sum(-1) > 0).all()
    for i in np.unique(view.thing):
        here = view.thing == i
        thing = room.things[i] if i >= 0 else room.shell
        p, n = points[here] - thing.centre, normals[here]
        if isinstance(thing, Sphere):
            assert np.allclose(p, thing.radius * n, atol=1e-9)
            continue
        c, s = np.cos(thing.yaw), np.sin(thing.yaw)
        turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        p, n = (x @ turn / (thing.half if x is p else 1) for x in (p, n))
        face = np.abs(n).argmax(1)
        rows = np.arange(len(p))
        assert np.abs(p).max() <= 1 + 1e-9
        assert np.allclose(p[rows, face], np.sign(n[rows, face]) * (1 if i >= 0 else -1), atol=1e-9)
        assert np.allclose(np.abs(n[rows, face]), 1, atol=1e-12)
    assert set(np.unique(view.thing)) - {-1}  # some furniture is seen


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_on_a_plane_differ_at_right_angles_to_its_normal(seed):
    """Depth and normals agree, from nothing but what a file has and the focal length."""
    room = furnish(seed)
    view = render(room, *SIZE)
    height, width = SIZE
    focal = width / 2 / np.tan(room.camera.view / 2)
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, height / 2 - np.arange(height) - 0.5)
    points = view.depth[..., None] * np.stack([x / focal, y / focal, -np.ones(SIZE)], -1)
    curved = np.array([isinstance(t, Sphere) for t in room.things] + [False])[view.thing]
    same = (view.thing[:, 1:] == view.thing[:, :-1]) & ~curved[:, 1:]
    same &= np.isclose(view.normal[:, 1:], view.normal[:, :-1], atol=1e-9).all(-1)
    off = ((points[:, 1:] - points[:, :-1]) * view.normal[:, 1:]).sum(-1)
    assert same.mean() > 0.5
    assert np.abs(off[same]).max() < 1e-9


@pytest.mark.parametrize("seed", range(2))
def test_nothing_lies_before_what_is_seen(seed):
    room = furnish(seed)
    rng = np.random.default_rng(0)
    rays = room.camera.rays(*SIZE)
    picked = rng.choice(len(rays), 100, replace=False)
    depth = render(room, *SIZE).depth.ravel()[picked]
    at = np.linspace(0.001, 0.999, 200)[:, None] * depth
    points = room.camera.position + at[..., None] * rays[picked]
    assert (np.abs(points - room.shell.centre) <= room.shell.half).all()
    for thing in room.things:
        p = points - thing.centre
        if isinstance(thing, Sphere):
            assert (np.linalg.norm(p, axis=-1) >= thing.radius).all()
        else:
            c, s = np.cos(thing.yaw), np.sin(thing.yaw)
            local = p @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
            assert (np.abs(local) >= thing.half).any(-1).all()


def test_rays_parallel_to_faces():
    box = Box(np.zeros(3), np.ones(3), 0.0, 0, 0, PLAIN)
    origin = np.array([[-3.0, 0.5, 0.0], [-3.0, 1.5, 0.0], [3.0, 0.0, 0.0]])
    t, normal, which = cast([box], origin, np.broadcast_to([1.0, 0.0, 0.0], (3, 3)))
    assert t.tolist() == [2, np.inf, np.inf]  # into it, past it, away from it
    assert normal[0].tolist() == [-1, 0, 0]
    assert which.tolist() == [0, -1, -1]


# ---------------------------------------------------------------------------------------------- files


def test_rendering_is_deterministic(rooms, tmp_path):
    def contents(root):
        return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.*"))}

    for layout, files in (("nyuv2", 4), ("cityscapes3", 4)):
        write(tmp_path / layout, layout, COUNTS, SIZE, seed=0)
        assert contents(tmp_path / layout) == contents(rooms(layout))
        assert len(contents(tmp_path / layout)) == files * 7 + 1
    write(tmp_path / "other", "nyuv2", {"train": 1, "val": 1}, SIZE, seed=1)
    first = {name: x for name, x in contents(rooms("nyuv2")).items() if name.parts[1:] == ("image", "0.npy")}
    others = {name: (tmp_path / "other" / name).read_bytes() for name in first}
    assert len({*first.values(), *others.values()}) == 4  # splits differ, and seeds
    with pytest.raises(ValueError, match="layout: expected one of nyuv2, cityscapes2, cityscapes3, got 'kitti'"):
        write(tmp_path, "kitti", COUNTS, SIZE)
    with pytest.raises(ValueError, match="labels: expected label_7, label or label_19, got 'labels'"):
        write(tmp_path, "cityscapes2", COUNTS, SIZE, labels="labels")


def rendered(split, i):
    return render(furnish([0, split, i]), *SIZE)


def glass(view):
    return np.isin(view.kind, [KINDS.index("window"), KINDS.index("tv")])


def test_nyuv2(rooms):
    data = NumpyScenes(rooms("nyuv2"), "val", 13)
    assert len(data) == 3
    for i in range(3):
        view, sample = rendered(1, i), data[i]
        assert {name: (list(x.shape), x.dtype) for name, x in sample.items()} == {
            "image": ([3, *SIZE], torch.float32),
            "segmentation": (list(SIZE), torch.int64),
            "depth": ([1, *SIZE], torch.float32),
            "normals": ([3, *SIZE], torch.float32),
        }
        assert np.abs(sample["image"].numpy().transpose(1, 2, 0) - view.image).mean() < 0.02  # the noise
        classes, known = sample["segmentation"].numpy(), sample["segmentation"].numpy() >= 0
        assert (classes[known] == NYU[view.kind][known]).all()
        assert 0.5 < known.mean() < 1
        assert np.allclose(sample["depth"][0], np.where(glass(view), 0, view.depth), rtol=1e-6)
        assert np.allclose(
            sample["normals"].permute(1, 2, 0), np.where(glass(view)[..., None], 0, view.normal), atol=1e-6
        )
    stored = np.load(rooms("nyuv2") / "val" / "label" / "0.npy")
    assert stored.dtype == np.float32


@pytest.mark.parametrize(
    ("folder", "classes"), [("label_7", 7), ("label", 7), ("label_19", 19)], ids=["label_7", "label", "label_19"]
)
def test_cityscapes_with_two_tasks(rooms, folder, classes):
    root = rooms("cityscapes2", folder)
    assert sorted(path.name for path in (root / "train").iterdir()) == sorted(["image", "depth", folder])
    data = BENCHMARKS["cityscapes2"].data(root, "train", classes, SIZE)
    view, sample = rendered(0, 2), data[2]
    assert sorted(sample) == ["depth", "image", "segmentation"]
    expected = CATEGORIES[view.kind] if classes == 7 else view.kind
    known = sample["segmentation"].numpy() >= 0
    assert (sample["segmentation"].numpy() == expected)[known].all()
    assert np.allclose(sample["depth"][0], np.where(glass(view), 0, 1 / view.depth), rtol=1e-6)
    if folder == "label_19":
        with pytest.raises(FileNotFoundError, match=r"expected a folder label_7 or label, found none"):
            BENCHMARKS["cityscapes2"].data(root, "train", 7, SIZE)


def test_labels_of_other_dtypes_and_gaps_in_the_numbers(own):
    root = own("nyuv2") / "train"
    before = [NumpyScenes(root.parent, "train", 13)[i]["segmentation"] for i in range(4)]
    for i, dtype in ((0, np.int8), (1, np.float64), (3, np.int64)):
        path = root / "label" / f"{i}.npy"
        array = np.load(path)
        path.unlink()
        np.save(path, array.astype(dtype))
    for folder in root.iterdir():
        (folder / "2.npy").rename(folder / "12.npy")  # comes last, not before 3
    data = NumpyScenes(root.parent, "train", 13)
    for i, was in enumerate([0, 1, 3, 2]):
        assert torch.equal(data[i]["segmentation"], before[was])


def test_raw_cityscapes(rooms):
    root = rooms("cityscapes3")
    data = RawCityscapes(root, "train", SIZE)
    assert len(data) == 4
    seen = 0
    for i in range(4):
        view, sample = rendered(0, i), data[i]
        rgb = np.array(Image.open(root / f"leftImg8bit/train/room/room_{i:06d}_000000_leftImg8bit.png"))
        bgr = (rgb[..., ::-1].astype(np.float64) - [123.675, 116.28, 103.53]) / 255
        assert np.allclose(sample["image"].permute(1, 2, 0), bgr, atol=1e-5)  # not resized at this size
        stride = np.s_[::8, ::8]
        classes, known = sample["segmentation"].numpy(), sample["segmentation"].numpy() != VOID
        assert (classes == view.kind[stride])[known].all()
        assert 0.5 < known.mean() < 1
        ids = np.array(Image.open(root / f"gtFine/train/room/room_{i:06d}_000000_gtFine_instanceIds.png")).astype(int)
        expected = np.full((2, *SIZE), 250.0)
        for number in np.unique(ids[ids >= 1000]):
            rows, columns = np.nonzero(ids == number)
            expected[:, rows, columns] = rows - rows.mean(), columns - columns.mean()
        assert np.allclose(sample["instance"], expected[(..., *stride)], atol=1e-4)
        seen += (expected[(0, *stride)] != 250).sum()
        raw = np.array(Image.open(root / f"disparity/train/room/room_{i:06d}_000000_disparity.png")).astype(float)
        assert np.allclose(sample["disparity"][0], raw[stride] / 2729.068, rtol=1e-6)
        assert np.allclose(raw, np.where(glass(view), 0, np.minimum(25600 / view.depth + 1, 65535)), atol=0.51)
        assert ((ids >= 1000) == np.isin(ids // 1000, CITYSCAPES_IDS[11:])).all()
    assert seen


def test_raw_cityscapes_resizes(rooms):
    sample = RawCityscapes(rooms("cityscapes3"), "val", (16, 24))[0]
    assert {name: list(x.shape) for name, x in sample.items()} == {
        "image": [3, 16, 24],
        "segmentation": [2, 3],
        "instance": [2, 2, 3],
        "disparity": [1, 2, 3],
    }
    whole = RawCityscapes(rooms("cityscapes3"), "val", SIZE)[0]
    assert torch.equal(sample["segmentation"], whole["segmentation"][::2, ::2])
    assert torch.equal(sample["instance"], whole["instance"][:, ::2, ::2])  # still in pixels of the file
    assert torch.allclose(sample["image"], F.avg_pool2d(whole["image"], 2), atol=1e-5)
    with pytest.raises(ValueError, match="size: expected multiples of 8, got 20x24"):
        RawCityscapes(rooms("cityscapes3"), "val", (20, 24))


def spoil(change):
    """Replaces an array by what `change` makes of it."""

    def replace(path):
        array = change(np.load(path))
        path.unlink()
        np.save(path, array)

    return replace


def overwrite(content):
    """Replaces a file by bytes, or by what a function makes of its bytes."""

    def replace(path):
        data = content(path.read_bytes()) if callable(content) else content
        path.unlink()
        path.write_bytes(data)

    return replace


def archive(path):
    path.unlink()
    np.savez(path.with_suffix(".npz"), a=np.zeros(3))
    path.with_suffix(".npz").rename(path)


def with_value(value):
    def change(array):
        array[3, 4] = value
        return array

    return spoil(change)


@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        ("label/2.npy", Path.unlink, "expected a file for each one in .*image"),
        ("normal/2.npy", Path.unlink, "expected a file for each one in .*image"),
        ("image/2.npy", overwrite(b""), "a file that cannot be read"),
        ("image/2.npy", overwrite(b"no array at all"), "a file that cannot be read"),
        ("depth/2.npy", overwrite(lambda data: data[:-100]), "a file that cannot be read"),
        ("depth/2.npy", overwrite(lambda data: data[:60]), "a file that cannot be read"),
        ("label/2.npy", spoil(lambda x: x.astype(object)), "a file that cannot be read .*allow_pickle"),
        ("label/2.npy", archive, "expected one array, got an archive"),
        ("depth/2.npy", with_value(np.nan), "expected finite numbers, got 1 NaN or infinite"),
        ("normal/2.npy", with_value(np.inf), "expected finite numbers, got 3 NaN or infinite"),
        ("depth/2.npy", spoil(lambda x: x[..., 0]), r"expected shape \[32, 48, 1\], got \[32, 48\]"),
        ("normal/2.npy", spoil(lambda x: x[..., :2]), r"expected shape \[32, 48, 3\], got \[32, 48, 2\]"),
        ("image/2.npy", spoil(lambda x: x[1:]), r"expected shape \[32, 48, 3\], got \[31, 48, 3\]"),
        ("label/2.npy", spoil(lambda x: x.T), r"expected shape \[32, 48\], got \[48, 32\]"),
        ("image/2.npy", spoil(lambda x: (255 * x).astype(np.uint8)), "expected a floating dtype, got uint8"),
        ("label/2.npy", spoil(lambda x: x.astype(complex)), "expected a floating or integer dtype, got complex128"),
        ("label/2.npy", with_value(13), "expected classes 0 to 12 or -1, got 13"),
        ("label/2.npy", with_value(1.5), "expected classes 0 to 12 or -1, got 1.5"),
        ("label/2.npy", with_value(np.nan), "expected classes 0 to 12 or -1, got nan"),
    ],
)
def test_wrong_arrays_are_named(own, file, how, message):
    root = own("nyuv2")
    how(root / "val" / file)
    data = NumpyScenes(root, "val", 13)
    data[0]
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{re.escape(str(root / 'val' / file))}: .*{message}"):
        data[2]


def test_missing_folders_are_named(own):
    root = own("nyuv2")
    with pytest.raises(FileNotFoundError, match=rf"{root}/test/image: expected files 0.npy, 1.npy, …, found none"):
        NumpyScenes(root, "test", 13)
    (root / "val" / "label").rename(root / "val" / "labels")
    with pytest.raises(FileNotFoundError, match=rf"{root}/val: expected a folder label, found none"):
        NumpyScenes(root, "val", 13)
    spoil(lambda x: x[..., 0])(root / "train" / "image" / "0.npy")
    with pytest.raises(ValueError, match=r"train/image/0.npy: expected shape \[H, W, 3\], got \[32, 48\]"):
        NumpyScenes(root, "train", 13)
    with pytest.raises(FileNotFoundError, match=rf"{root}/leftImg8bit/train: expected files <city>/<stem>_left"):
        RawCityscapes(root, "train")


def reduce(path):
    Image.open(path).convert("L" if "disparity" in path.name else "RGB").save(path.with_suffix(".new"), "png")
    path.with_suffix(".new").replace(path)


def crop(path):
    Image.open(path).crop((0, 0, 40, 32)).save(path.with_suffix(".new"), "png")
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        ("disparity/val/room/{}_disparity.png", Path.unlink, "expected a file beside room/{}_leftImg8bit.png"),
        ("gtFine/val/room/{}_gtFine_labelIds.png", Path.unlink, "expected a file beside room/{}_leftImg8bit.png"),
        ("leftImg8bit/val/room/{}_leftImg8bit.png", overwrite(b"no image"), "got one that cannot be read"),
        ("gtFine/val/room/{}_gtFine_instanceIds.png", overwrite(lambda x: x[:90]), "got one that cannot be read"),
        ("leftImg8bit/val/room/{}_leftImg8bit.png", overwrite(lambda x: x[:-900]), "got one that cannot be read"),
        ("disparity/val/room/{}_disparity.png", reduce, "expected an image of mode I;16 or I, got L"),
        ("gtFine/val/room/{}_gtFine_labelIds.png", reduce, "expected an image of mode L, got RGB"),
        ("gtFine/val/room/{}_gtFine_labelIds.png", crop, "expected the image's size 48x32, got 40x32"),
    ],
)
def test_wrong_images_are_named(own, file, how, message):
    root = own("cityscapes3")
    stem = "room_000001_000000"
    how(root / file.format(stem))
    data = RawCityscapes(root, "val", SIZE)
    data[0]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(root / file.format(stem)))) as raised:
        data[1]
    assert message.format(stem) in str(raised.value)


# ---------------------------------------------------------------------------------------------- augmentation


def draws(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_scale_crop(rooms):
    sample = NumpyScenes(rooms("nyuv2"), "train", 13)[0]
    ratios = set()
    for generator in draws(12):
        zoomed = augment.scale_crop(sample, generator)
        assert {name: (x.shape, x.dtype) for name, x in zoomed.items()} == {
            name: (x.shape, x.dtype) for name, x in sample.items()
        }
        assert set(zoomed["segmentation"].unique().tolist()) <= set(sample["segmentation"].unique().tolist())
        # Depth is that of some pixel, over the scale.
        found = [s for s in (1.0, 1.2, 1.5) if torch.isin(zoomed["depth"], sample["depth"] / s).all()]
        assert len(found) == 1
        ratios.add(found[0])
        if found[0] == 1:
            assert all(torch.allclose(zoomed[name], sample[name], atol=1e-6) for name in sample)
    assert ratios == {1.0, 1.2, 1.5}


def test_scale_crop_keeps_everything_in_place():
    """An image that says where its pixels are: targets have to be those of the same place."""
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    sample = {"image": torch.stack([y, x, x]), "segmentation": (100 * y + x).long(), "depth": (100 * y + x)[None] + 1}
    for generator in draws(6):
        zoomed = augment.scale_crop(sample, generator)
        where = torch.stack([zoomed["segmentation"] // 100, zoomed["segmentation"] % 100])
        assert (where - zoomed["image"][:2]).abs().max() <= 1
        scale = (zoomed["segmentation"] + 1) / zoomed["depth"][0]
        assert scale.max() - scale.min() < 1e-4


@pytest.mark.parametrize("size", [(5, 7), (13, 20), (24, 40), (36, 60)])
def test_nearest_is_that_of_the_public_codes(size):
    x = torch.arange(24.0 * 40).reshape(1, 24, 40)
    assert torch.equal(augment.nearest(x, size), F.interpolate(x[None], size, mode="nearest")[0])


def test_flip(rooms):
    sample = NumpyScenes(rooms("nyuv2"), "train", 13)[1]
    flipped = 0
    for generator in draws(40):
        mirrored = augment.flip(sample, generator)
        if all(torch.equal(mirrored[name], sample[name]) for name in sample):
            continue
        flipped += 1
        for name in ("image", "segmentation", "depth"):
            assert torch.equal(mirrored[name], sample[name].flip(-1))
        assert torch.equal(mirrored["normals"][0], -sample["normals"][0].flip(-1))
        assert torch.equal(mirrored["normals"][1:], sample["normals"][1:].flip(-1))
    assert 10 < flipped < 30


def test_mirroring_a_room_mirrors_its_normals():
    """The convention of the renderer is the one that `flip` assumes: a mirrored camera sees mirrored normals."""
    ball = Sphere(np.array([1.2, 0.3, 1.4]), 0.4, 17, 1, PLAIN)
    mirrored = Sphere(np.array([1.2, -0.3, 1.4]), 0.4, 17, 1, PLAIN)
    a, b = (render(empty_room([thing]), 16, 24) for thing in (ball, mirrored))
    assert np.allclose(a.depth, b.depth[:, ::-1], atol=1e-12)
    assert np.allclose(a.normal, b.normal[:, ::-1] * [-1, 1, 1], atol=1e-12)


def test_rotation_turns_everything_alike(rooms):
    data = RawCityscapes(rooms("cityscapes3"), "train", SIZE)
    plain = data[0]
    turned = [data[0, seed] for seed in range(8)]
    for sample in turned:
        assert {name: (x.shape, x.dtype) for name, x in sample.items()} == {
            name: (x.shape, x.dtype) for name, x in plain.items()
        }
        labels = sample["segmentation"]
        assert ((labels < 19) | (labels == VOID)).all()
        assert torch.isin(sample["disparity"], _all_disparities(rooms("cityscapes3"))).all()
        # An instance is where its class is.
        assert (labels[sample["instance"][0] != 250] >= 11).all()
    assert len({float(sample["image"].sum()) for sample in turned}) == 8
    images = {"image": Image.new("RGB", (60, 40), "white"), "labels": Image.new("L", (60, 40), 7)}
    angles = [augment.rotate(dict(images), generator)["labels"] for generator in draws(20)]
    empty = [float((np.array(image) == 0).mean()) for image in angles]
    assert 0 < max(empty) < 0.15  # what 10° leave of the corners
    assert min(empty) < 0.05


def _all_disparities(root):
    raw = np.array(Image.open(root / "disparity/train/room/room_000000_000000_disparity.png")).astype(np.float32)
    return torch.from_numpy(np.unique(np.append(raw.ravel(), np.float32(0))) / np.float32(2729.068))


@pytest.mark.parametrize("layout", ["nyuv2", "cityscapes3"])
def test_the_same_seed_gives_the_same_batches(rooms, layout):
    root = rooms(layout)
    data = NumpyScenes(root, "train", 13) if layout == "nyuv2" else RawCityscapes(root, "train", SIZE)
    torch.manual_seed(5)
    one = list(batches(data, 2, seed=3))
    torch.manual_seed(6)
    state = torch.get_rng_state()
    two = list(batches(data, 2, seed=3, workers=1))
    assert torch.equal(state, torch.get_rng_state())
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    other = list(batches(data, 2, seed=4))
    assert any(not torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))


def test_batches_cover_the_data(rooms):
    data = NumpyScenes(rooms("nyuv2"), "train", 13)
    assert [len(batch["image"]) for batch in batches(data, 3)] == [3, 1]
    assert torch.equal(
        torch.cat([b["depth"] for b in batches(data, 3)]), torch.stack([data[i]["depth"] for i in range(4)])
    )
    assert [len(batch["image"]) for batch in batches(data, 3, seed=0)] == [3]
    with pytest.raises(ValueError, match="batch: expected at most the number of samples 4, got 5"):
        list(batches(data, 5, seed=0))


# ---------------------------------------------------------------------------------------------- losses and metrics


def in_batches(task, output, target):
    """The task's metrics from two batches of unequal size."""
    meter = task.meter()
    for part in (slice(0, 1), slice(1, None)):
        meter.update(output[part], target[part])
    return meter.compute()


def test_segmentation():
    task = Segmentation(4, -1)
    raw = torch.randn(3, 4, 5, 6)
    target = torch.randint(-1, 3, (3, 5, 6))  # class 3 does not occur
    raw[:, 3] = -100  # and is not predicted
    output = task.output(raw)
    assert torch.allclose(task.loss(output, target), F.cross_entropy(raw, target, ignore_index=-1))
    found = raw.argmax(1)[target >= 0]
    wanted = target[target >= 0]
    ious = []
    for c in range(3):
        hits = int(((found == c) & (wanted == c)).sum())
        ious.append(hits / int(((found == c) | (wanted == c)).sum()))
    accuracy = 100 * (found == wanted).double().mean().item()
    expected = {"mIoU %": 100 * sum(ious) / 3, "pixel accuracy %": accuracy}
    assert in_batches(task, output, target) == pytest.approx(expected)
    assert list(in_batches(Segmentation(4, 250, accuracy=False), output, target.where(target >= 0, 250))) == ["mIoU %"]


def test_depth():
    task = Depth()
    output, target = torch.rand(3, 1, 5, 6), torch.rand(3, 1, 5, 6) + 0.1
    target[:2, :, :3] = 0
    pairs = [(o, t) for o, t in zip(output.flatten().tolist(), target.flatten().tolist(), strict=True) if t > 0]
    absolute = sum(abs(o - t) for o, t in pairs) / len(pairs)
    relative = sum(abs(o - t) / t for o, t in pairs) / len(pairs)
    assert task.loss(output, target).item() == pytest.approx(absolute)
    assert in_batches(task, output, target) == pytest.approx({"abs error": absolute, "rel error": relative})


def test_normals():
    task = Normals()
    raw = torch.randn(3, 3, 5, 6)
    target = F.normalize(raw + 0.3 * torch.randn(3, 3, 5, 6), dim=1)
    target[0, :, :2] = 0
    target[1, :, 0, 0] = torch.tensor([0.6, -0.6, 0.0])  # its components add up to 0, and yet it is one
    output = task.output(raw)
    angles, dots = [], []
    for b, y, x in np.ndindex(3, 5, 6):
        n, m = output[b, :, y, x].double(), target[b, :, y, x].double()
        if m.any():
            dots.append(float(n @ m))
            angles.append(np.degrees(np.arccos(np.clip(dots[-1], -1, 1))))
    assert task.loss(output, target).item() == pytest.approx(1 - np.mean(dots), abs=1e-6)
    expected = [np.mean(angles), np.median(angles), *(100 * np.mean(np.array(angles) < a) for a in (11.25, 22.5, 30))]
    metrics = in_batches(task, output, target)
    assert list(metrics.values()) == pytest.approx(expected, rel=1e-5)
    assert list(metrics) == ["mean angle", "median angle", "within 11.25° %", "within 22.5° %", "within 30° %"]
    assert torch.allclose(output.norm(dim=1), torch.ones(3, 5, 6))


def test_instances_and_disparity():
    offsets, target = 10 * torch.randn(3, 2, 5, 6), 10 * torch.randn(3, 2, 5, 6)
    target[:, :, :2] = 250
    error = (offsets - target)[target != 250].abs().mean().item()
    assert Instance().loss(offsets, target).item() == pytest.approx(error)
    assert in_batches(Instance(), offsets, target) == pytest.approx({"instance L1 [px]": error})
    output, target = torch.rand(3, 1, 5, 6), torch.rand(3, 1, 5, 6) + 0.1
    target[:, :, :2] = 0
    difference = (output - target)[target > 0]
    assert Disparity().loss(output, target).item() == pytest.approx(difference.abs().mean().item())
    expected = {"disparity MSE": difference.square().mean().item()}
    assert in_batches(Disparity(), output, target) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("task", "target"),
    [
        (Segmentation(4, -1), torch.full((2, 5, 6), -1)),
        (Depth(), torch.zeros(2, 1, 5, 6)),
        (Normals(), torch.zeros(2, 3, 5, 6)),
        (Instance(), torch.full((2, 2, 5, 6), 250.0)),
        (Disparity(), torch.zeros(2, 1, 5, 6)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_without_a_valid_pixel(task, target):
    raw = torch.randn(2, task.channels, 5, 6, requires_grad=True)
    loss = task.loss(task.output(raw), target)
    loss.backward()
    assert loss.item() == 0
    assert not raw.grad.any()
    meter = task.meter()
    meter.update(task.output(raw).detach(), target)
    assert all(np.isnan(value) for value in meter.compute().values())


def test_metrics_follow_the_paper():
    """Tables 1, 2 and 4: which metrics, in which order, of which task, and where more is better."""

    def columns(name):
        return [
            (m.name, m.task, m.higher_is_better)
            for t in BENCHMARKS[name].tasks(BENCHMARKS[name].classes[0])
            for m in t.metrics
        ]

    two = [
        ("mIoU %", "segmentation", True),
        ("pixel accuracy %", "segmentation", True),
        ("abs error", "depth", False),
        ("rel error", "depth", False),
    ]
    angles = [("mean angle", "normals", False), ("median angle", "normals", False)]
    within = [(f"within {a}° %", "normals", True) for a in ("11.25", "22.5", "30")]
    assert columns("cityscapes2") == two
    assert columns("nyuv2") == two + angles + within
    assert columns("cityscapes3") == [
        ("mIoU %", "segmentation", True),
        ("instance L1 [px]", "instance", False),
        ("disparity MSE", "disparity", False),
    ]
    schedules = {
        name: [b.protocol[k] for k in ("batch", "epochs", "halve_at", "average", "lr")]
        for name, b in BENCHMARKS.items()
    }
    assert schedules == {
        "nyuv2": [2, 200, 100, 1, 1e-4],
        "cityscapes2": [8, 200, 100, 10, 1e-4],
        "cityscapes3": [8, 100, 0, 1, 1e-4],
    }
    with pytest.raises(ValueError, match="classes: expected 7 or 19, got 13"):
        BENCHMARKS["cityscapes2"].tasks(13)


# ---------------------------------------------------------------------------------------------- networks


def test_mtan():
    model = MTAN([13, 1, 3], 1 / 16)
    for size in (SIZE, (33, 50)):  # also what five halvings do not divide
        outputs, stages = model(torch.randn(2, 3, *size))
        assert [list(x.shape) for x in outputs] == [[2, n, *size] for n in (13, 1, 3)]
        assert [late.shape[1] for _, late in stages] == [4, 8, 16, 32, 32, 32, 16, 8, 4, 4]
        assert all(early.shape[-2:] == late.shape[-2:] for early, late in stages)
    with torch.device("meta"):
        full = MTAN([13, 1, 3])
    assert [late.shape[1] for _, late in full(torch.zeros(1, 3, 32, 32, device="meta"))[1]][:5] == [
        64,
        128,
        256,
        512,
        512,
    ]
    heads = {id(p) for head in model.heads for p in head.parameters()}
    assert {id(p) for p in model.shared()} == {id(p) for p in model.parameters()} - heads
    assert all(model.encoder.back[-1][3].weight is not p for p in model.shared()[:-3])  # what GradNorm looks at
    assert len(MTAN([7, 1], 1 / 16).heads) == 2


def test_mtan_attends_to_its_own_masks_and_no_others():
    model = MTAN([2, 2], 1 / 16)
    x = torch.randn(2, 3, *SIZE)
    before = model(x)[0]
    with torch.no_grad():
        for mask in model.heads[0].masks:
            mask[-2].bias.fill_(-50.0)  # closed
    after = model(x)[0]
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_the_upper_bound_counts_what_stages_send_on_once():
    """MTAN's feature maps are made from each other: each task's gradient of one is that with the others held fixed."""
    model = MTAN([13, 1, 3], 1 / 16)
    x, targets = torch.randn(2, 3, *SIZE), [torch.randn(2, n, *SIZE) for n in (13, 1, 3)]

    def losses(outputs):
        return [(out - y).square().mean() for out, y in zip(outputs, targets, strict=True)]

    outputs, stages = model(x)
    info = Balancer("aligned-ub", 3).backward(losses(outputs), model.shared(), stages)
    leaves = [tuple(part.detach().requires_grad_() for part in stage) for stage in stages]
    flat = [part for stage in leaves for part in stage]
    apart = losses([head(leaves, model.down, model.up) for head in model.heads])
    rows = [torch.autograd.grad(loss, flat, retain_graph=True) for loss in apart]
    Z = torch.stack([torch.cat([g.flatten() for g in row]).double() for row in rows])
    assert torch.allclose(info.gram, Z @ Z.T, rtol=1e-4)
    aligned = fastmtl.AlignedMTL()(Z).float()
    cotangents = [part.reshape(x.shape) for part, x in zip(aligned.split([x.numel() for x in flat]), flat, strict=True)]
    trunk = list(model.encoder.parameters())
    through = [part for stage in model(x)[1] for part in stage]
    for p, expected in zip(trunk, torch.autograd.grad(through, trunk, cotangents), strict=True):
        assert torch.allclose(p.grad, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item() + 1e-7)


def test_open_masks_let_feature_maps_through():
    model = MTAN([2, 3], 1 / 16)
    head = model.heads[1]
    with torch.no_grad():
        for mask in [*head.masks, *head.back]:
            mask[-2].bias.fill_(50.0)  # sigmoid(50) is 1
    stages = model.encoder(torch.randn(2, 3, *SIZE))
    seen = []
    for between in model.down:
        between.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output = head(stages, model.down, model.up)
    assert all(torch.equal(x, late) for x, (_, late) in zip(seen, stages[:5], strict=True))
    assert torch.equal(output, head.out(stages[-1][1]))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file of ResNet-50 weights; filling them at random takes longer than anything else here."""
    from torchvision.models import resnet50

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(resnet50().state_dict(), path)
    return path


def test_pspnet_on_every_variant(rooms, backbone):
    """Stride 8, weights from a file, and a step of the full method and of its upper bound."""
    training = Training(
        settings("cityscapes3", model="pspnet", width=1, weights=str(backbone), method="aligned"), rooms("cityscapes3")
    )
    model = training.model
    state = torch.load(backbone, weights_only=True)
    assert torch.equal(model.encoder.layer3[2].conv2.weight, state["layer3.2.conv2.weight"])
    assert model.encoder.layer4[1].conv2.dilation == (4, 4)
    with torch.no_grad():
        outputs, features = model(torch.randn(2, 3, 64, 64))
    assert list(features.shape) == [2, 2048, 8, 8]
    assert [list(x.shape) for x in outputs] == [[2, n, 8, 8] for n in (19, 2, 1)]
    head = model.heads[0]
    assert [level[0].output_size for level in head.levels] == [1, 2, 3, 6]
    assert [list(level[1].weight.shape) for level in head.levels] == [[512, 2048, 1, 1]] * 4
    assert list(head.out[0].weight.shape) == [512, 4096, 3, 3]
    assert {id(p) for p in model.shared()} == {id(p) for p in model.encoder.parameters()}
    (batch,) = list(batches(training.train_data, 2, 0))[:1]
    for method in ("aligned", "aligned-ub"):
        training.balancer = Balancer(method, 3)
        losses, measures = training.step(batch, measure=method == "aligned")
        assert losses.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert method == "aligned-ub" or measures["condition_number"] >= 1


def test_weights_that_do_not_fit(tmp_path):
    with torch.device("meta"):
        torch.save({"conv1.weight": torch.zeros(1, device="cpu")}, tmp_path / "other.pth")
        (tmp_path / "broken.pth").write_bytes(b"no weights")
        for name in ("other.pth", "broken.pth"):
            with pytest.raises(ValueError, match=rf"{name}: expected the state of torchvision's resnet50"):
                PSPNet([1], tmp_path / name)
        with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
            PSPNet([1], tmp_path / "missing.pth")
    for given, message in (
        (("mtan", [1], 1.0, tmp_path), "weights: expected none for mtan"),
        (("pspnet", [1], 0.5, None), "width: expected 1 for pspnet, got 0.5"),
        (("unet", [1], 1.0, None), "model: expected one of mtan, pspnet, got 'unet'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*given)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes2", "cityscapes3"])
@pytest.mark.parametrize("method", ["uniform", "aligned", "aligned-ub", "gradnorm", "famo", "graddrop"])
def test_a_step_of_mtan(rooms, name, method):
    training = Training(settings(name, method=method), rooms(name))
    assert len(training.tasks) == (2 if name == "cityscapes2" else 3)
    batch = next(batches(training.train_data, 2, 0))
    before = [p.detach().clone() for p in training.model.parameters()]
    losses, measures = training.step(batch, measure=True)
    assert losses.isfinite().all()
    assert measures["condition_number"] >= 1
    assert 0 <= measures["min_magnitude_similarity"] <= 1
    assert -1 <= measures["min_cosine"] <= 1
    moved = [not torch.equal(p, was) for p, was in zip(training.model.parameters(), before, strict=True)]
    assert all(moved)


def test_measures_are_those_of_the_shared_parameters(rooms):
    training = Training(settings(method="aligned"), rooms("nyuv2"))
    outputs, representation = training.outputs(batch := next(batches(training.train_data, 2, 0)))
    losses = training._losses(outputs, batch)
    measures = training._measure(losses)
    info = training.balancer.backward(losses, training.shared, representation)
    assert measures["condition_number"] == pytest.approx(fastmtl.diagnostics.condition_number(info).item(), rel=1e-4)
    assert measures["min_cosine"] == pytest.approx(fastmtl.diagnostics.min_cosine(info).item(), abs=1e-5)


def test_a_task_alone_has_its_own_encoder_and_head(rooms, tmp_path):
    made = Training(settings(method="single", task="depth"), rooms("nyuv2"))
    assert [task.name for task in made.tasks] == ["depth"]
    assert len(made.model.heads) == 1
    result = train(Run(tmp_path, settings(method="single", task="depth")), iter, rooms("nyuv2"))
    assert sorted(result) == ["abs error", "rel error", "validation"]


def test_schedule_log_and_average(rooms, tmp_path):
    chosen = settings(epochs=4, halve_at=2, average=2, evaluate_every=0)
    run, rates = Run(tmp_path, chosen), []
    training = Training(chosen, rooms("nyuv2"))
    for epoch in range(4):
        training.epoch(epoch, run)
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == [1e-3, 1e-3, 5e-4, 5e-4]
    assert [row["epoch"] for row in training.history.rows] == [2, 3]  # those that count, and no others
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [(int(row["step"]), int(row["epoch"])) for row in rows] == [(n, n // 2) for n in range(8)]
    assert all(float(row["condition_number"]) >= 1 for row in rows)
    result = train(Run(tmp_path / "again", chosen), iter, rooms("nyuv2"), loaders=1)
    assert result["validation"] == training.history.rows
    for name, value in result.items():
        if name != "validation":
            assert value == sum(row[name] for row in result["validation"]) / 2


def test_training_learns(rooms, tmp_path):
    chosen = settings(method="aligned", epochs=12, halve_at=0, lr=5e-3, log_every=2, evaluate_every=0)
    train(Run(tmp_path, chosen), iter, rooms("nyuv2"))
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    for task in ("segmentation", "depth", "normals"):
        assert float(rows[-1][f"{task} loss"]) < 0.9 * float(rows[0][f"{task} loss"])


# ---------------------------------------------------------------------------------------------- the command


def command(*arguments):
    result = CliRunner().invoke(
        app, [str(a) for a in arguments], env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s*│?\s*\n\s*│?\s*", " ", result.output)


def test_help():
    for arguments, words in (
        ([], ["render", "run"]),
        (["render"], ["--layout", "--size", "--train", "nyuv2, cityscapes2, cityscapes3"]),
        (["run"], ["--data", "--quick", "--method", "--weights", "--results", "width 0.25", "aligned-ub"]),
    ):
        code, output = command(*arguments, "--help")
        assert code == 0
        assert all(word in output for word in words), output


def test_wrong_options(rooms, tmp_path):
    root = rooms("nyuv2")
    for arguments, message in (
        (["--data", tmp_path / "none"], "none/train/image: expected files"),
        (["--data", root, "--benchmark", "kitti"], "benchmark: expected one of nyuv2"),
        (["--data", root, "--method", "nosuch"], "expected one of uniform"),
        (["--data", root, "--classes", "7"], "classes: expected 13, got 7"),
        (["--data", root, "--epochs", "2", "--average", "3"], "average: expected at most the 2 epochs, got 3"),
        (["--data", root, "--benchmark", "cityscapes3", "--size", "32"], "size: expected HEIGHTxWIDTH, got '32'"),
    ):
        code, output = command("run", *arguments, "--out", tmp_path / "runs")
        assert code == 2, output
        assert message in output
    code, output = command("render", "--out", tmp_path, "--layout", "kitti")
    assert code == 2
    assert "layout: expected one of" in output
    assert not (tmp_path / "runs").exists()


def test_forecast(rooms, tmp_path):
    code, output = command(
        "run",
        "--data",
        rooms("nyuv2"),
        *TINY,
        "--method",
        "aligned",
        "--seeds",
        2,
        "--forecast",
        "--out",
        tmp_path / "runs",
    )
    assert code == 0, output
    assert re.search(r"aligned\W+\d+\W+2\W+\d+", output)
    assert "single-normals" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.smoke
def test_from_nothing_to_a_table(tmp_path):
    """Renders, trains two methods and each task alone, and writes what is committed."""
    data, out, results = tmp_path / "rooms", tmp_path / "runs", tmp_path / "results"
    code, output = command("render", "--out", data, "--train", 4, "--val", 2, "--size", "32x48")
    assert code == 0, output
    chosen = ("--epochs", 6, "--lr", 0.005, "--seeds", 1, "--method", "uniform", "--method", "aligned-ub")
    code, output = command("run", "--data", data, "--quick", *TINY, *chosen, "--out", out, "--results", results)
    assert code == 0, output
    table = json.loads((results / "table.json").read_text())
    assert list(table["rows"]) == ["single-task", "uniform", "aligned-ub"]
    assert table["columns"][-1] == "Δm % ↓"
    assert all(np.isfinite(value[0]) for row in table["rows"].values() for value in row.values())
    assert table["seeds"] == {"single-task": 1, "uniform": 1, "aligned-ub": 1}
    about = table["about"]
    assert {"rendered rooms instead of nyuv2", "epochs 6 instead of 200", "width 0.0625 instead of 1.0"} <= set(
        about["reduced"]
    )
    assert {"train 4 instead of 795", "val 2 instead of 654", "images of 32x48 instead of 288x384"} <= set(
        about["reduced"]
    )
    assert str(tmp_path) not in (results / "table.json").read_text()
    assert 1000 < (results / "stability.png").stat().st_size < 300_000
    assert (results / "table.md").read_text() == (out / "table.md").read_text()


@pytest.mark.smoke
def test_a_killed_run_ends_with_the_same_numbers(rooms, tmp_path):
    """GradVac draws from the generator and remembers cosines: a wrong state of either would show."""

    def arguments(out):
        chosen = ("--method", "gradvac", "--seeds", 1, "--epochs", 15, "--average", 5, "--evaluate-every", 1)
        options = ["run", "--data", rooms("nyuv2"), *TINY, *chosen, "--no-baselines", "--out", out]
        return [str(option) for option in options]

    folder = tmp_path / "killed" / "gradvac" / "seed-0"
    kill_in(start("scene", arguments(tmp_path / "killed")), folder)
    for name in ("killed", "whole"):
        code, output = command(*arguments(tmp_path / name))
        assert code == 0, output
    killed, whole = (json.loads((tmp_path / n / "gradvac/seed-0/result.json").read_text()) for n in ("killed", "whole"))
    assert killed == whole
    assert [row["epoch"] for row in whole["validation"]] == list(range(15))
    logs = []
    for name in ("killed", "whole"):
        rows = csv.DictReader((tmp_path / name / "gradvac/seed-0/log.csv").read_text().splitlines())
        logs.append([{k: v for k, v in row.items() if k not in ("processor", "seconds")} for row in rows])
    assert logs[0] == logs[1]

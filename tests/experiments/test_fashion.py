"""Overlaid garments: idx files, pairs, and the command from files to a table, killed and resumed."""

import csv
import gzip
import json
import math
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="the experiments need typer and rich: pip install 'fastmtl-torch[experiments]'")
from processes import kill_in, start
from typer.testing import CliRunner

from experiments.fashion.__main__ import app
from experiments.fashion.data import FOLDER, Garments, draw_pairs, read_garments, read_idx
from experiments.fashion.training import METRICS, OverlaidGarments
from experiments.harness import METHODS, Run, supervised

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # what these networks run fastest on


def idx(array):
    """An idx file of bytes."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Synthetic garments: a class is where two stripes lie. The test files are gzipped, those to train on are not."""
    folder = tmp_path_factory.mktemp("garments")
    rng = np.random.default_rng(0)
    for part, count in (("train", 240), ("t10k", 60)):
        labels = rng.integers(10, size=count)
        images = rng.integers(60, size=(count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 + 5 * (label % 5) :][:4] += 120
            image[:, 4 if label < 5 else 20 :][:, :5] += 60
        for name, array in ((IMAGES, images), (LABELS, labels)):
            if part == "train":
                (folder / f"{part}-{name}").write_bytes(idx(array))
            else:
                (folder / f"{part}-{name}.gz").write_bytes(gzip.compress(idx(array)))
    return folder


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read(tmp_path, suffix):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(idx(array)) if suffix else idx(array))
    assert np.array_equal(read_idx(path, 3), array)
    assert read_idx(path, 3).dtype == np.uint8


GOOD = idx(np.ones((2, 3, 4)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an idx file of unsigned bytes with 3 dimension.* 00 00 08 03, got an empty file"),
        (b"\x89PNG" + GOOD[4:], "00 00 08 03, got 89 50 4e 47"),
        (idx(np.ones(5)), "00 00 08 03, got 00 00 08 01"),
        (b"\0\0\x0d\x03" + GOOD[4:], "00 00 08 03, got 00 00 0d 03"),  # floats
        (GOOD[:9], "expected a header of 16 bytes, got a file of 9"),
        (GOOD[:-1], r"expected 24 entries for shape \[2, 3, 4\], got 23"),
        (GOOD + b"\0", r"expected 24 entries for shape \[2, 3, 4\], got 25"),
        (b"\0\0\x08\x03" + b"\xff" * 12, r"expected \d{29} entries"),  # does not fit into 64 bits
    ],
)
def test_bad_idx_files_are_named(tmp_path, content, message):
    for path, written in ((tmp_path / "x", content), (tmp_path / "x.gz", gzip.compress(content))):
        path.write_bytes(written)
        with pytest.raises(ValueError, match=rf"{path.name}: .*{message}"):
            read_idx(path, 3)


@pytest.mark.parametrize(
    "content",
    [gzip.compress(GOOD)[:-9], GOOD, gzip.compress(GOOD)[:12] + b"\xff" * 20],
    ids=["cut off", "not compressed", "broken"],  # what is compressed has the time in it
)
def test_broken_gzip_files_are_named(tmp_path, content):
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.gz: expected a gzip file, got one that does not unpack"):
        read_idx(tmp_path / "x.gz", 3)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (IMAGES, np.ones((3, 28, 27)), rf"train-{IMAGES}: expected images of 28x28, got shape \[3, 28, 27\]"),
        (IMAGES, np.ones((0, 28, 28)), rf"train-{IMAGES}: expected images of 28x28, got shape \[0, 28, 28\]"),
        (LABELS, np.ones(4), rf"train-{LABELS}: expected 3 labels, one for each image, got 4"),
        (LABELS, np.array([0, 10, 1]), rf"train-{LABELS}: expected labels 0 to 9, got 10"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, name, array, message):
    files = {IMAGES: np.ones((3, 28, 28)), LABELS: np.arange(3)} | {name: array}
    for file, content in files.items():
        (tmp_path / f"train-{file}").write_bytes(idx(content))
    with pytest.raises(ValueError, match=message):
        read_garments(tmp_path, "train")


def test_missing_files_are_explained(folder, tmp_path):
    (tmp_path / f"train-{IMAGES}").write_bytes((folder / f"train-{IMAGES}").read_bytes())
    message = (
        rf"expected train-{LABELS} or train-{LABELS}\.gz, found neither.*apt-get install dataset-fashion-mnist"
        rf".*train-{IMAGES}, train-{LABELS}, t10k-{IMAGES}, t10k-{LABELS}"
    )
    with pytest.raises(FileNotFoundError, match=message):
        read_garments(tmp_path, "train")


# ---------------------------------------------------------------------------------------------- pairs


def test_pairs_are_overlaid():
    images = np.stack([np.full((28, 28), value, np.uint8) for value in (50, 200)])
    pairs = draw_pairs(Garments(images, np.array([3, 7], np.uint8)), 40, seed=0)
    assert pairs.images.shape == (40, 1, 36, 36)
    assert {tuple(labels) for labels in pairs.labels.tolist()} == {(3, 3), (3, 7), (7, 3), (7, 7)}
    value = {3: 50, 7: 200}
    for (image,), (first, second) in zip(pairs.images, pairs.labels, strict=True):
        expected = np.zeros((36, 36))
        expected[:28, :28] = value[first]
        expected[8:, 8:] = value[second]
        expected[8:28, 8:28] = max(value[first], value[second])
        assert np.array_equal(image, expected)


def test_nothing_is_trained_on_that_is_tested():
    """Every garment has a brightness of its own, which the corner of a pair shows."""
    trained, tested = (
        Garments(np.broadcast_to(np.arange(*span, dtype=np.uint8)[:, None, None], (60, 28, 28)), np.zeros(60, np.uint8))
        for span in ((0, 60), (100, 160))
    )
    problem = OverlaidGarments(trained, tested, 400)
    shown = [set(split.inputs[:, 0, 0, 0].tolist()) for split in (problem.training, problem.validation, problem.test)]
    assert [len(split.targets) for split in (problem.training, problem.validation, problem.test)] == [400, 50, 200]
    assert shown[0] <= set(range(55))
    assert shown[1] <= set(range(55, 60))
    assert shown[2] <= set(range(100, 160))


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", ["single", "aligned"])
def test_training_beats_the_constant_predictor(folder, tmp_path, method):
    problem = OverlaidGarments.of(folder, 240)
    task = "top-left" if method == "single" else None
    settings = {"method": method, "task": task, "seed": 0, "epochs": 8, "batch": 24, "lr": 5e-3}
    result = supervised.train(Run(tmp_path, settings), iter, problem)
    assert list(result) == [metric.name for metric in METRICS][: 1 if task else 2]
    for t, score in enumerate(result.values()):
        constant = 100 * problem.test.targets[:, t].bincount().max().item() / len(problem.test.targets)
        assert 100 >= score > 2 * constant
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert float(rows[-1]["top-left loss"]) < 0.5 * float(rows[0]["top-left loss"])
    assert ("median condition number" in rows[0]) == (method == "aligned")


# ---------------------------------------------------------------------------------------------- the command

TINY = ["--quick", "--pairs=16", "--batch=8", "--epochs=1"]  # two steps


def test_every_method_and_its_table(folder, tmp_path):
    command = [
        *TINY,
        f"--data={folder}",
        f"--out={tmp_path / 'runs'}",
        f"--results={tmp_path / 'results'}",
        "--seeds=2",
    ]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    content = json.loads((tmp_path / "results" / "table.json").read_text())
    assert list(content["rows"]) == ["single-task", *METHODS]
    assert set(content["seeds"].values()) == {2}
    for name, row in content["rows"].items():
        assert all(math.isfinite(mean) and math.isfinite(error) for mean, error in row.values()), name
        assert ("Δm % ↓" in row) == (name != "single-task")
    assert content["about"]["reduced"]["pairs"] == "16 (full: 120000)"
    assert content["about"]["settings"] == {"pairs": 16, "epochs": 1, "batch": 8, "lr": 1e-2}
    assert str(tmp_path) not in json.dumps(content)
    assert (tmp_path / "results" / "table.md").read_text() in result.output


def test_missing_data_is_explained_by_the_command(tmp_path):
    options = {"COLUMNS": "10000", "TERMINAL_WIDTH": "10000"}
    result = CliRunner().invoke(app, [*TINY, f"--data={tmp_path}", f"--out={tmp_path}"], env=options)
    assert result.exit_code == 2
    assert "apt-get install dataset-fashion-mnist" in result.output


def _start(out, folder):
    options = ["--pairs=64", "--batch=16", "--epochs=30", "--seeds=1", "--method=graddrop", "--method=famo"]
    return start("fashion", [*options, "--no-baselines", f"--data={folder}", f"--out={out}"])


@pytest.mark.smoke
def test_a_killed_run_ends_with_the_same_numbers(folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _start(whole, folder).wait(300) == 0
    first = killed / "graddrop" / "seed-0"
    kill_in(_start(killed, folder), first)
    before = (first / "log.csv").read_text().splitlines()[:2]
    assert _start(killed, folder).wait(300) == 0
    # The first epoch was not done again: its row has the same seconds.
    assert (first / "log.csv").read_text().splitlines()[:2] == before
    for name in ("graddrop", "famo"):
        results = [json.loads((out / name / "seed-0" / "result.json").read_text()) for out in (whole, killed)]
        assert results[0] == results[1]
        logs = [(out / name / "seed-0" / "log.csv").read_text().splitlines() for out in (whole, killed)]
        rows = [[row.rsplit(",", 2)[0] for row in log] for log in logs]  # all but the times
        assert len(rows[0]) == 31
        assert rows[0] == rows[1]
    assert (whole / "table.md").read_text() == (killed / "table.md").read_text()


# ---------------------------------------------------------------------------------------------- the real files


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the data: apt-get install dataset-fashion-mnist")
def test_the_real_files():
    for part, count in (("train", 60_000), ("test", 10_000)):
        images, labels = read_garments(FOLDER, part)
        assert images.shape == (count, 28, 28)
        assert np.bincount(labels).tolist() == [count // 10] * 10
        assert 60 < images.mean() < 80

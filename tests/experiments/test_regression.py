"""QM9: the CSV files, the features, and the command from files to a table, killed and resumed."""

import csv
import importlib.util
import json
import math
import os
from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="the experiments need typer and rich: pip install 'fastmtl-torch[experiments]'")
from processes import kill_in, start
from typer.testing import CliRunner

from experiments.harness import METHODS, Run, supervised
from experiments.regression.__main__ import app
from experiments.regression.data import (
    BOHR,
    COLUMNS,
    DISTANCES,
    ELEMENTS,
    MEV,
    PAIRS,
    TARGETS,
    default_folder,
    features,
    load,
    read,
)
from experiments.regression.training import METRICS, QM9

installed = pytest.mark.skipif(
    importlib.util.find_spec("qm9pack") is None, reason="needs the data: pip install qm9pack"
)
NAMES = [target.name for target in TARGETS]
METHANE = {
    "N_atoms": "5",
    "Elements": "['C','H','H','H','H']",
    "XYZ_Ang": "[[0,0.,-0.],[0.63,0.63,0.63],[-0.63,-0.63,0.63],[0.63,-0.63,-0.63],[-0.63,0.63,-0.63]]",
    **{target.column: "1.5" for target in TARGETS},
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # what these networks run fastest on


def write_csv(path, rows, columns=(*COLUMNS, "SMILES")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([row.get(column, "C") for column in columns] for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 random clusters of atoms in two files, whose properties follow from what they are made of."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        names = rng.choice(list(ELEMENTS), size=rng.integers(3, 12))
        x = rng.normal(size=(len(names), 3)).cumsum(0).round(6)
        spread = float(np.linalg.norm(x - x.mean(0)))
        mass = sum(ELEMENTS[name] for name in names)
        values = {
            target.column: sum(target.atoms[list(ELEMENTS).index(name)] for name in names)
            + (0.01 * (n + 1) * mass + 0.1 * spread + 0.02 * rng.normal())
            for n, target in enumerate(TARGETS)
        }
        elements = "[" + ",".join(f"'{name}'" for name in names) + "]"
        rows.append({"N_atoms": len(names), "Elements": elements, "XYZ_Ang": json.dumps(x.tolist()), **values})
    folder = tmp_path_factory.mktemp("qm9")
    write_csv(folder / "qm9_part1.csv", rows[:120])
    write_csv(folder / "qm9_part2.csv", rows[120:])
    return folder


# ---------------------------------------------------------------------------------------------- files


def test_a_molecule_is_read(tmp_path):
    # Columns in another order than the package has, and one that is not ours.
    write_csv(tmp_path / "qm9_part1.csv", [METHANE], ["SMILES", *reversed(COLUMNS)])
    numbers, positions, targets = read(tmp_path)
    assert numbers[0, :6].tolist() == [6, 1, 1, 1, 1, 0]
    assert positions[0, 2].tolist() == [-0.63, -0.63, 0.63]
    assert positions[0, 5:].any() == False  # noqa: E712
    assert targets.shape == (1, 11)
    assert targets[0, NAMES.index("mu")] == 1.5
    assert targets[0, NAMES.index("HOMO")] == pytest.approx(1.5 * MEV)
    assert targets[0, NAMES.index("U0")] == pytest.approx((1.5 + 37.846772 + 4 * 0.500273) * MEV)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Dipole_debye": "nan"}, r"Dipole_debye: expected a finite number, got 'nan'"),
        ({"HOMO_au": "-inf"}, r"HOMO_au: expected a finite number, got '-inf'"),
        ({"LUMO_au": ""}, r"LUMO_au: expected a finite number, got ''"),
        ({"Elements": "['C','H','H','H']"}, r"Elements: expected 5 \(N_atoms, up to 29\) of H, C, N, O, F, got"),
        ({"Elements": "['C','H','H','H','X']"}, r"Elements: expected 5 .* got \['C','H','H','H','X'\]"),
        ({"N_atoms": "30", "Elements": str(["H"] * 30)}, r"Elements: expected 30 \(N_atoms, up to 29\)"),
        ({"XYZ_Ang": "[[0,0,0],[1,0,0]]"}, r"XYZ_Ang: expected 5 \(N_atoms\) positions of three finite numbers, got"),
        ({"XYZ_Ang": METHANE["XYZ_Ang"].replace("[0,0.,-0.]", "[0,0,NaN]")}, r"XYZ_Ang: expected 5 "),
        ({"XYZ_Ang": METHANE["XYZ_Ang"].replace("[0,0.,-0.]", "[0,0]")}, r"XYZ_Ang: expected 5 "),
        ({"XYZ_Ang": METHANE["XYZ_Ang"][:40]}, r"XYZ_Ang: expected 5 "),
    ],
)
def test_bad_cells_are_named(tmp_path, change, message):
    write_csv(tmp_path / "qm9_part1.csv", [METHANE])
    write_csv(tmp_path / "qm9_part2.csv", [METHANE, {**METHANE, **change}])
    with pytest.raises(ValueError, match=rf"qm9_part2\.csv, line 3: {message}"):
        read(tmp_path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected qm9_part1\.csv, .* of the package qm9pack, found none"):
        read(tmp_path)
    path = tmp_path / "qm9_part1.csv"
    path.write_text("")
    with pytest.raises(ValueError, match=r"qm9_part1\.csv: expected columns N_atoms, .* not among \[\]"):
        read(tmp_path)
    write_csv(path, [METHANE], [column for column in COLUMNS if column != "R2_bohr2"])
    with pytest.raises(ValueError, match=r"qm9_part1\.csv: expected columns .*, R2_bohr2 not among \['N_atoms'"):
        read(tmp_path)
    write_csv(path, [METHANE, METHANE])
    path.write_text(path.read_text()[:-40])  # a download that broke off
    with pytest.raises(ValueError, match=r"qm9_part1\.csv, line 3: expected 15 cells, got [1-9]$"):
        read(tmp_path)
    write_csv(path, [METHANE])
    for molecules in (0, 2):
        with pytest.raises(ValueError, match=rf"molecules: expected 1 to 1 \(what .* has\), got {molecules}"):
            read(tmp_path, molecules)


def test_the_order_is_drawn_once_for_all_sizes(folder):
    every = read(folder)
    some = read(folder, 50)
    assert np.array_equal(some.targets, every.targets[:50])
    assert len(np.unique(every.targets[:, 0])) == 200
    assert not np.array_equal(read(folder, seed=1).targets, every.targets)


def test_features_are_kept(folder, tmp_path, monkeypatch):
    first = load(folder, tmp_path, 30)
    assert np.array_equal(first[0], features(*read(folder, 30)[:2]))
    with monkeypatch.context() as patched:
        patched.setattr("experiments.regression.data.read", lambda *_: pytest.fail("read again"))
        again = load(folder, tmp_path, 30)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(load(folder, tmp_path, 31)[0]) == 31
    path = folder / "qm9_part1.csv"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # perhaps another file
    with monkeypatch.context() as patched:
        patched.setattr("experiments.regression.data.read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load(folder, tmp_path, 30)


# ---------------------------------------------------------------------------------------------- features


def test_features_do_not_depend_on_order_and_orientation(folder):
    numbers, positions, _ = read(folder, 20)
    expected = features(numbers, positions)
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    np.testing.assert_allclose(features(numbers, positions @ rotation + 3.0), expected, rtol=1e-4, atol=1e-4)
    order = rng.permutation(numbers.shape[1])
    np.testing.assert_allclose(features(numbers[:, order], positions[:, order]), expected, rtol=1e-4, atol=1e-4)
    moved = positions.copy()
    moved[:, 1] += 0.1
    assert np.abs(features(numbers, moved) - expected).max(1).min() > 0.01


def test_features_of_two_atoms():
    r = DISTANCES[5]
    numbers, positions = np.zeros((1, 29), np.uint8), np.zeros((1, 29, 3))
    numbers[0, :2] = 8, 6
    positions[0, 1, 2] = r
    counts, spectrum, distances = np.split(features(numbers, positions)[0], [5, 34])
    assert counts.tolist() == [0, 1, 0, 1, 0]
    a, b, c = 0.5 * 8**2.4, 0.5 * 6**2.4, 48 * BOHR / r
    half = math.hypot((a - b) / 2, c)
    np.testing.assert_allclose(spectrum[:3], [(a + b) / 2 + half, (a + b) / 2 - half, 0], rtol=1e-5, atol=1e-12)
    distances = distances.reshape(len(PAIRS), len(DISTANCES))
    assert np.flatnonzero(distances.any(1)).tolist() == [PAIRS.index((6, 8))]
    row = distances[PAIRS.index((6, 8))]
    np.testing.assert_allclose(row[[4, 5, 6]], [math.exp(-0.5), 1, math.exp(-0.5)], rtol=1e-4)


# ---------------------------------------------------------------------------------------------- training


def test_splits_are_disjoint_and_standardised(folder):
    x, y = features(*read(folder)[:2]), read(folder).targets
    problem = QM9(x, y, 8)
    parts = (problem.training, problem.validation, problem.test)
    assert [len(part.targets) for part in parts] == [160, 20, 20]
    back = torch.cat([part.targets for part in parts]).double() * problem.deviations + torch.tensor(y[:160].mean(0))
    np.testing.assert_allclose(back.numpy(), y, rtol=1e-4, atol=1e-3)
    assert problem.training.targets.mean(0).abs().max() < 1e-5
    assert problem.training.inputs.isfinite().all()
    outputs = problem.test.targets[:, 4:5] + 0.5
    assert problem.score(4, outputs, problem.test.targets[:, 4]) == pytest.approx(0.5 * y[:160, 4].std(), rel=1e-5)


@pytest.mark.parametrize("method", ["single", "uniform", "aligned"])
def test_training_beats_the_constant_predictor(folder, tmp_path, method):
    found = read(folder)
    problem = QM9(features(found.numbers, found.positions), found.targets, 32)
    settings = {"method": method, "task": "alpha", "seed": 0, "epochs": 30, "batch": 32, "lr": 3e-3}
    result = supervised.train(Run(tmp_path, settings), iter, problem)
    names = ["alpha"] if method == "single" else NAMES
    assert list(result) == [metric.name for metric in METRICS if metric.task in names]
    for t, metric in enumerate(METRICS):
        if metric.name in result:
            constant = torch.zeros(len(problem.test.targets), 1)
            assert result[metric.name] < 0.5 * problem.score(t, constant, problem.test.targets[:, t])
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert float(rows[-1]["alpha loss"]) < 0.5 * float(rows[0]["alpha loss"])
    assert float(rows[-1]["validation alpha [a₀³]"]) < float(rows[0]["validation alpha [a₀³]"])
    if method == "aligned":
        assert all(float(row["median condition number"]) > 1 for row in rows)
        assert all(-1 <= float(row["mean min cosine"]) <= 1 for row in rows)


def test_what_is_planned():
    planned = supervised.jobs(["aligned"], ["mu", "U0"], 2, {"lr": 1.0})
    assert [job.name for job in planned] == [
        f"{name}/seed-{seed}" for name in ("single-mu", "single-U0", "aligned") for seed in (0, 1)
    ]
    assert planned[3].settings == {"lr": 1.0, "method": "single", "task": "U0", "seed": 1}
    with pytest.raises(ValueError, match=r"method: expected one of uniform, .*, got 'nosuch'"):
        supervised.jobs(["nosuch"], [], 1, {})


# ---------------------------------------------------------------------------------------------- the command

TINY = ["--quick", "--molecules=40", "--batch=16", "--width=8", "--epochs=1"]  # two steps


def test_every_method_and_its_table(folder, tmp_path):
    command = [
        *TINY,
        f"--data={folder}",
        f"--out={tmp_path / 'runs'}",
        f"--results={tmp_path / 'results'}",
        "--seeds=1",
    ]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    content = json.loads((tmp_path / "results" / "table.json").read_text())
    assert list(content["rows"]) == ["single-task", *METHODS]
    for name, row in content["rows"].items():
        assert all(math.isfinite(mean) for mean, _ in row.values()), name
        assert ("Δm % ↓" in row) == (name != "single-task")
    assert "not comparable" in content["about"]["experiment"]
    assert content["about"]["reduced"]["molecules"] == "40 (full: all)"
    assert "lr" not in content["about"]["reduced"]
    assert content["about"]["settings"]["molecules"] == 40
    for took in ("mean seconds per run", "mean processor seconds per run"):
        assert content["about"][took].keys() == {"single", *METHODS}
    assert str(tmp_path) not in json.dumps(content)
    table = (tmp_path / "results" / "table.md").read_text()
    assert table in result.output
    before = (tmp_path / "runs" / "aligned" / "seed-0" / "result.json").stat().st_mtime_ns
    CliRunner().invoke(app, command, catch_exceptions=False)
    assert (tmp_path / "runs" / "aligned" / "seed-0" / "result.json").stat().st_mtime_ns == before
    assert (tmp_path / "results" / "table.md").read_text() == table


def test_forecast_runs_nothing(folder, tmp_path):
    command = [*TINY, f"--data={folder}", f"--out={tmp_path}", "--forecast", "--method=aligned", "--workers=2"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "with 2 worker(s)" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("option", "message"), [("--method=nosuch", "got 'nosuch'"), ("--data=nowhere", "nowhere: expected qm9_part1.csv")]
)
def test_wrong_options_are_named(folder, tmp_path, option, message):
    command = [*TINY, f"--data={folder}", f"--out={tmp_path}", option]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "10000", "TERMINAL_WIDTH": "10000"})
    assert result.exit_code == 2
    assert message in result.output


def _start(out, folder):
    options = [
        "--molecules=200",
        "--batch=16",
        "--width=16",
        "--epochs=40",
        "--seeds=1",
        "--method=gradvac",
        "--method=dwa",
    ]
    return start("regression", [*options, "--no-baselines", f"--data={folder}", f"--out={out}"])


@pytest.mark.smoke
def test_a_killed_run_ends_with_the_same_numbers(folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _start(whole, folder).wait(300) == 0
    first = killed / "gradvac" / "seed-0"
    kill_in(_start(killed, folder), first)
    before = (first / "log.csv").read_text().splitlines()[:2]
    assert _start(killed, folder).wait(300) == 0
    # The first epoch was not done again: its row has the same seconds.
    assert (first / "log.csv").read_text().splitlines()[:2] == before
    for name in ("gradvac", "dwa"):
        results = [json.loads((out / name / "seed-0" / "result.json").read_text()) for out in (whole, killed)]
        assert results[0] == results[1]
        logs = [(out / name / "seed-0" / "log.csv").read_text().splitlines() for out in (whole, killed)]
        rows = [[row.rsplit(",", 2)[0] for row in log] for log in logs]  # all but the times
        assert len(rows[0]) == 41
        assert rows[0] == rows[1]
    assert (whole / "table.md").read_text() == (killed / "table.md").read_text()


# ---------------------------------------------------------------------------------------------- the real files


@installed
def test_the_first_of_the_real_files(tmp_path):
    for path in default_folder().glob("qm9_part*.csv"):
        with path.open(encoding="utf-8") as file:
            (tmp_path / path.name).write_text("".join(islice(file, 301)), encoding="utf-8")
    numbers, positions, targets = read(tmp_path)
    assert len(numbers) == 900
    (methane,) = np.flatnonzero((np.sort(numbers, 1)[:, -5:] == [1, 1, 1, 1, 6]).all(1) & ((numbers > 0).sum(1) == 5))
    of = dict(zip(NAMES, targets[methane], strict=True))
    assert of["mu"] == 0
    assert of["alpha"] == 13.21
    assert of["HOMO"] == pytest.approx(-10549.9, abs=0.1)
    assert of["U0"] == pytest.approx(-17172.2, abs=0.1)
    assert of["G"] == pytest.approx(-16151.0, abs=2)
    # Bound molecules: atoms not on one another, and less energy than apart.
    x = features(numbers, positions)
    assert np.isfinite(x).all()
    assert (x[:, :5].sum(1) == (numbers > 0).sum(1)).all()
    assert (x[:, 1:5].sum(1) <= 9).all()
    for name in ("U0", "U", "H", "G", "HOMO"):
        assert (targets[:, NAMES.index(name)] < 0).all()
    for name in ("alpha", "R2", "ZPVE", "Cv"):
        assert (targets[:, NAMES.index(name)] > 0).all()
    assert (targets[:, NAMES.index("U")] < targets[:, NAMES.index("U0")]).all()  # atoms move less when bound
    assert np.corrcoef(targets[:, NAMES.index("U0")], targets[:, NAMES.index("G")])[0, 1] > 0.999


@installed
@pytest.mark.slow
def test_all_of_the_real_files():
    numbers, _, targets = read(default_folder())
    assert len(numbers) == 130_831
    assert (numbers > 0).sum(1).max() == 29
    assert np.isfinite(targets).all()

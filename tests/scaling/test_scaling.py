"""`python -m fastmtl scaling`: ranges, references, timing, growth, resumption, and a sweep from end to end."""

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

import fastmtl
from fastmtl import __main__ as cli
from fastmtl.scaling import baseline, command, fit, measure, memory, plots, points, study
from fastmtl.scaling.points import Grid, Point, names, numbers

TINY = ["--params", "100,1000", "--threads", "1", "--rounds", "3", "--seconds", "0", "--quick"]


@pytest.mark.parametrize(
    ("factor", "text", "expected"),
    [
        (2, "3", [3]),
        (2, "2:16", [2, 4, 8, 16]),
        (2, "2:10", [2, 4, 8, 10]),
        (10, "1e3:1e6", [1000, 10_000, 100_000, 1_000_000]),
        (2, "10:20:1.2", [10, 12, 14, 17, 20]),
        (2, "64,2:8,4", [2, 4, 8, 64]),
        (2, "5:5", [5]),
        (2, "1:3:1.1", [1, 2, 3]),
    ],
)
def test_ranges(factor, text, expected):
    found = numbers(factor)(text)
    assert found == expected
    assert all(type(number) is int for number in found)


def test_ranges_of_condition_numbers_are_fractional():
    assert numbers(10, whole=False)("1:1e4,2.5") == [1, 2.5, 10, 100, 1000, 10_000]


@pytest.mark.parametrize("text", ["", "a", "2:4:2:2", "2:nan", "0", "8:2", "2:8:1", "2.5", "2:8:-2", "1e999"])
def test_wrong_ranges(text):
    with pytest.raises(ArgumentTypeError, match="expected"):
        numbers(2)(text)


def test_names_are_those_that_there_are():
    read = names(*points.METHODS)
    assert read("MGDA,AlignedMTL,MGDA") == ["MGDA", "AlignedMTL"]
    with pytest.raises(ArgumentTypeError, match=r"AlignedMTL.*'GradDrop'"):
        read("GradDrop")  # needs more than the Gram matrix


def test_the_grid_leaves_out_what_does_not_fit():
    axes = {"batch": [1, 2], "threads": [1], "method": ["AlignedMTL"], "kappa": [1.0]}
    grid = Grid.product(4000, tasks=[10, 20], params=[10, 100], dtype=["float32", "float64"], **axes)
    shapes = {(p.tasks, p.params, p.batch, p.dtype) for p in grid.points}
    assert shapes == {
        (10, 10, 1, "float32"),
        (10, 10, 1, "float64"),
        (10, 10, 2, "float32"),
        (10, 10, 2, "float64"),
        (10, 100, 1, "float32"),
    }
    assert (grid.large, grid.wide) == (7, 4)
    assert len({str(p) for p in grid.points}) == len(grid.points)


def test_growth_recovers_a_power_law_above_a_fixed_cost():
    x = [2**i for i in range(1, 12)]
    found = fit.growth(x, [1e-3 + 1e-6 * n**2.5 for n in x])
    assert found.exponent == pytest.approx(2.5, abs=0.02)
    assert (found.low, found.high) == (64, 2048)  # above the geometric middle, 2^6
    exact = fit.growth([1, 10, 100], [5, 50, 500])
    assert exact.exponent == pytest.approx(1)
    assert exact.error == pytest.approx(0, abs=1e-9)
    assert exact.points == 3
    assert fit.growth([1, 2], [1, 2]) is None


def test_growth_knows_its_error():
    noise = torch.randn(200, 9, dtype=torch.float64).mul(0.1).exp()
    x = torch.logspace(0, 4, 9, dtype=torch.float64)
    fits = [fit.growth(x.tolist(), (x**2 * row).tolist()) for row in noise]
    off = torch.tensor([(f.exponent - 2) / f.error for f in fits])
    assert 0.6 < (off.abs() < 1.2).double().mean() < 0.85  # Student's t with three degrees of freedom: 0.68


def record(**point):
    point = {"batch": 1, "dtype": "float32", "threads": 1, "method": "AlignedMTL", "kappa": 1.0, **point}
    T, P = point["tasks"], point["params"]
    seconds = {"fastmtl": T**2 * P * 1e-9, "pure": T**3 * P * 1e-9, "gram": T**2 * P * 1e-9}
    seconds |= {"weights": T**3 * 1e-9, "combine": T * P * 1e-9, "read": T * P * 1e-10}
    return {
        "point": point,
        "seconds": seconds,
        "memory": {"fastmtl": 8 * T * T, "pure": 16 * T * T},
        "accuracy": {"fastmtl": 1e-7, "pure": None},
        "roofs": {"read": 1e10, "float32": 1e11, "float64": 5e10},
        **{"rounds": 3, "kept": 3, "others": 0.0, "commit": None, "date": "2026-01-01T00:00:00Z"},
    }


def test_the_table_has_exponents_beside_theory():
    records = [record(tasks=T, params=P) for P in (1000, 4000, 16000) for T in (2, 4, 8, 16)]
    records.append({"point": {**records[0]["point"], "tasks": 32}, "error": "ArithmeticError: wrong"})
    text = fit.table(map(study.columns, records))
    tasks, params = text.split("time ~ P^x")
    line = next(line for line in tasks.splitlines() if line.strip().startswith("4,000"))
    assert line.replace(" ± 0.00", "").split() == ["4,000", "4..16", "2.00", "3.00", "1.00", "2.00", "3.00"]
    assert [line.split()[1:4] for line in tasks.splitlines() if "theory" in line] == [["2", "3", "1"]]
    assert params.count("1,000..16,000") == 4
    assert fit.table(map(study.columns, records[:2])) == ""


@pytest.mark.parametrize("affordable", [True, False])
@pytest.mark.parametrize("point", [Point(6, 500, kappa=1e3), Point(40, 500), Point(5, 300, batch=3, kappa=10.0)])
def test_the_reference_is_the_definition(point, affordable, monkeypatch):
    if not affordable:
        monkeypatch.setattr(baseline, "AFFORDABLE", 0)
    monkeypatch.setattr(baseline, "CHUNK", 1000)  # several pieces
    G = baseline.gradients(point)
    U, sigma, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    if point.kappa > 1:
        reached = sigma[..., 0] / sigma[..., -1] / point.kappa
        assert (reached > 0.5).all()
        assert (reached < 2).all()
    expected = sigma[..., -1:] * (U @ Vh).mean(-2)
    found = (baseline.exact(G, point)[..., None, :] @ G.double())[..., 0, :]
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-7, atol=1e-9)
    assert baseline.error(expected.reshape(found.shape), baseline.exact(G, point), G) < 1e-7
    assert baseline.error(2 * found, baseline.exact(G, point), G) == pytest.approx(1)
    pure = baseline.Pure(G.shape)(G)
    assert baseline.error(pure, baseline.exact(G, point), G) < (1e-4 if point.kappa <= 10 else 1)


def test_dependent_gradients_are_cut_as_fastmtl_cuts_them():
    G = torch.randn(5, 400)
    G[4] = G[3]
    alpha = baseline.exact(G, Point(5, 400))
    assert baseline.error(fastmtl.AlignedMTL()(G), alpha, G) < 2e-6


@pytest.fixture
def _without_memory(monkeypatch):
    monkeypatch.setattr(measure, "_peaks", lambda point: None)
    monkeypatch.setattr(measure, "_roofs", lambda *arguments: {"read": 1.0, "float32": 1.0, "float64": 1.0})


@pytest.mark.usefixtures("_without_memory")
@pytest.mark.parametrize("method", points.METHODS)
def test_every_method_is_measured(method):
    for dtype, batch in (("float32", 1), ("bfloat16", 2)):
        found = measure.measure(Point(6, 200, batch, dtype, 1, method), 3, 0.0)
        stages = {"fastmtl", "read", "gram", "weights", "combine"}
        assert found["seconds"].keys() == stages | ({"pure"} if method == "AlignedMTL" else set())
        assert all(0 < seconds < 1 for seconds in found["seconds"].values())
        assert (found["accuracy"] is not None) == (method == "AlignedMTL")


@pytest.mark.usefixtures("_without_memory")
def test_real_gradients_are_of_examples(tmp_path, capsys):
    """A figure of their own, of the same shape whatever P, and no condition numbers."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    arguments = ["scaling", "--out", str(tmp_path), "--tasks", "4,40", *TINY, "--kappa", "1,100"]
    assert cli.main([*arguments, "--gradients", "random,real"]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())["points"]
    real = [record for record in found if record["point"]["gradients"] == "real"]
    assert len(real) == 4
    assert len(found) == 12
    assert all(record["accuracy"]["fastmtl"] <= 1e-5 for record in real)
    assert (tmp_path / "speedup-k1-real.png").exists()
    G = baseline.gradients(Point(40, 26_000, gradients="real"))
    norms = G.norm(dim=1)
    assert G.shape == (40, 26_000)
    assert norms.max() > 30 * norms.min()
    with pytest.raises(ValueError, match="at most 1797 examples of digits, got 2000"):
        baseline.gradients(Point(2000, 3000, gradients="real"))


@pytest.mark.usefixtures("_without_memory")
def test_accuracy_is_null_where_it_is_not_affordable(monkeypatch):
    monkeypatch.setattr(baseline, "AFFORDABLE", 0)
    assert measure.measure(Point(4, 100), 3, 0.0)["accuracy"] is None


class Wrong(fastmtl.AlignedMTL):
    """A thousandth too long."""

    def aggregate_matrix(self, G, out, context):
        super().aggregate_matrix(G, out, context)
        out.mul_(1.001)


@pytest.mark.usefixtures("_without_memory")
def test_a_wrong_result_is_recorded_and_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(points.METHODS, "AlignedMTL", Wrong)
    monkeypatch.setattr(measure, "interleave", None)
    swept = study.Study(tmp_path, {"rounds": 3, "seconds": 0.0, "device": "cpu", "machine": {}})
    (found,) = swept.run([Point(4, 100)], sys.stderr)
    assert found["error"] == "ArithmeticError: relative error 0.001, expected at most 2e-06"
    assert "seconds" not in found
    assert found["error"] in capsys.readouterr().err


def test_memory_of_a_call_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="memory: the process in which it is measured has failed"):
        memory.peak_extra_memory(os._exit, 1)
    with pytest.raises(ValueError, match="expected at least 3 tasks, got 2"):
        memory.peak_extra_memory(measure._prepare, Point(2, 100, method="Krum"), "fastmtl")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_peak_memory_is_what_plain_torch_must_allocate():
    T = 500
    found = measure._peaks(Point(T, 600, dtype="float64"))
    matrix = 8 * T * T
    assert 2 * matrix < found["pure"] < 12 * matrix  # at least the Gram and its eigenvectors
    assert 0 < found["fastmtl"] < 12 * matrix
    assert measure._peaks(Point(2, 1000)).keys() == {"fastmtl", "pure"}
    assert "MALLOC_ARENA_MAX" not in os.environ


def scaling(*arguments):
    return cli.main(["scaling", *map(str, arguments)])


def measure_peaks(monkeypatch, only):
    """Of this point alone: each takes a process of its own, which imports torch. The others get what it has."""
    peaks = measure._peaks
    found = {"fastmtl": 4096, "pure": 8192} if memory.can_peak() else None
    monkeypatch.setattr(measure, "_peaks", lambda point: peaks(point) if point == only else found)


def test_a_sweep_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "_roofs", lambda *a: {"read": 1e10, "float32": 1e11, "float64": 5e10})
    monkeypatch.setitem(plots.RC, "savefig.dpi", 50)
    measure_peaks(monkeypatch, Point(8, 100, threads=1))
    arguments = [*TINY, "--tasks", "2,4,8", "--kappa", "1,100", "--out", tmp_path]
    with monkeypatch.context() as patched:
        patched.setattr(plots, "draw", lambda content, folder: [folder / "later.png"])
        assert scaling(*arguments) == 0
        printed = capsys.readouterr()
        assert "12 points; left out: 0" in printed.err
        assert "[12/12" in printed.err
        assert "later.png" in printed.err
        assert "time ~ T^x" in printed.out

        # Finished: the same command measures nothing, and another one is refused.
        patched.setattr(study, "measure", None)
        assert scaling(*arguments) == 0
        assert "12 of 12 points are finished already" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            scaling(*arguments, "--rounds", "4")
        refused = capsys.readouterr().err
        assert "a sweep with {'rounds': 3} is there, expected {'rounds': 4}; choose another --out" in refused

    content = json.loads((tmp_path / "scaling.json").read_text())
    assert content["settings"]["tasks"] == [2, 4, 8]
    assert content["machine"]["torch"] == torch.__version__
    assert content["machine"]["commits"]
    with (tmp_path / "scaling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["points"]) == 12
    for row, point in zip(rows, content["points"], strict=True):
        assert float(row["speedup"]) == pytest.approx(point["seconds"]["pure"] / point["seconds"]["fastmtl"])
        gram = 2 * sum(range(int(row["tasks"]) + 1)) * int(row["params"])  # flops
        assert float(row["gram_flops"]) == pytest.approx(gram / point["seconds"]["gram"])
        assert float(row["error_fastmtl"]) < 2e-6

    assert scaling("--redraw", "--out", tmp_path) == 0
    expected = {f"{name}-k{kappa}.png" for name in ("time", "speedup", "roofline", "memory") for kappa in (1, 100)}
    if content["points"][0]["memory"] is None:
        expected -= {"memory-k1.png", "memory-k100.png"}
    drawn = list(tmp_path.glob("*.png"))
    assert {path.name for path in drawn} == expected | {"accuracy.png"}
    for path in drawn:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5_000


def _running(group):
    """Processes of a group but for zombies, which wait for an init that some containers lack (Linux; elsewhere 0)."""
    running = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            running += int(its_group) == group and state != "Z"
    return running


def test_a_killed_sweep_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep"
    arguments = [*TINY, "--tasks", "2:16", "--kappa", "1", "--rounds", "9999", "--seconds", "0.2", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastmtl.__file__).parents[1])}
    command = [sys.executable, "-m", "fastmtl", "scaling", *arguments]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        end = time.monotonic() + 300
        while len(list(out.glob("points/*.json"))) < 2:
            assert process.poll() is None, "ended before its second point"
            assert time.monotonic() < end, "no point"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    end = time.monotonic() + 60
    while _running(process.pid):
        assert time.monotonic() < end, "a process of the sweep is left"
        time.sleep(0.01)
    assert not (out / "scaling.json").exists()
    before = {path: path.read_bytes() for path in out.glob("points/*.json")}
    assert 2 <= len(before) < 8

    monkeypatch.setattr(plots, "draw", lambda content, folder: [])
    measure_peaks(monkeypatch, None)
    assert cli.main(command[3:]) == 0
    assert f"{len(before)} of 8 points are finished already" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())
    found = json.loads((out / "scaling.json").read_text())["points"]
    assert {(p["point"]["tasks"], p["point"]["params"]) for p in found} == {
        (T, P) for T in (2, 4, 8, 16) for P in (100, 1000)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "2:x"], "argument --tasks: expected numbers and ranges as in 2:64,100, got '2:x'"),
        (["--dtype", "int8"], "argument --dtype: expected some of float32, float64, bfloat16, float16, got 'int8'"),
        (["--method", "FAMO"], "argument --method: expected some of"),
        (["--kappa", "0.5"], "argument --kappa: expected 1 <= a <= b"),
        (["--rounds", "2"], "argument --rounds: expected an integer >= 3, got '2'"),
        (["--seconds", "nan"], "argument --seconds: expected a number >= 0, got 'nan'"),
        (["--device", "tpu"], "argument --device: invalid choice"),
        (["--tasks", "8", "--params", "4"], "no point is left"),
        (["--redraw"], "--redraw: expected"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        scaling("--quick", "--out", tmp_path, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scaling("--device", "cuda", "--out", tmp_path)
    assert "--device: cuda asked for, but torch sees no GPU" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fastmtl.scaling.plots", raising=False)
    monkeypatch.delattr("fastmtl.scaling.plots", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'fastmtl-torch\[plot\]'"):
        scaling("--quick", "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_defaults_are_values_of_the_options():
    for option in (command._AXES | command._LIMITS).values():
        assert option.reader(option.default)
        assert option.reader(option.quick)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_point_on_a_gpu():
    T, P = 64, 100_000
    found = measure.measure(Point(T, P), 3, 0.1, "cuda")
    assert found["accuracy"]["fastmtl"] < 1e-4
    assert all(0 < seconds < 1 for seconds in found["seconds"].values())
    assert 8 * T * T <= found["memory"]["fastmtl"] < 4 * T * P
    assert math.isclose(found["roofs"]["read"], 4 * T * P / found["seconds"]["read"], rel_tol=20)

"""benchmarks/engines.py at tiny size: what it writes, how it judges, and that its memory is counted exactly."""

import importlib
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the tests run without the source tree")


@pytest.fixture
def engines(monkeypatch):
    """The module, with one tiny case in each of its tables."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    engines, workloads = importlib.import_module("engines"), importlib.import_module("workloads")
    for table in (engines.STEPS, engines.MEMORY, engines.GRID):
        monkeypatch.setitem(table, "tiny", partial(workloads.mlp, 3, 4, (6, 8, 8)))
    monkeypatch.setattr(engines.measure, "keep_memory", lambda: None)  # for the rest of this process
    return engines


def run(engines, what, path):
    """The exit status and the content of the file."""
    threads = torch.get_num_threads()
    arguments = [what, "--only", "tiny", "--threads", "1", "--seconds", "0.02", "--json", str(path)]
    try:
        with pytest.raises(SystemExit) as done:
            engines.main(arguments)
    finally:
        torch.set_num_threads(threads)
    return int(done.value.code), json.loads(path.read_text())


def test_steps(engines, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(engines.TARGETS, "tiny", ("gramian", "plain", math.inf))
    status, content = run(engines, "steps", tmp_path / "steps.json")
    assert status == 0
    (case,), (line,) = content["cases"], content["lines"]
    assert (case["case"], case["tasks"], case["parameters"]) == ("tiny", 3, 6 * 8 + 8 + 8 * 8 + 8)
    assert set(case["ratios"]) | set(case["absent"]) == set(engines.WAYS)
    assert set(engines.OURS) <= set(case["ratios"]) == set(case["seconds"]) == set(case["errors"])
    assert case["ratios"]["plain"] == 1
    assert all(ratio > 0 for ratio in case["ratios"].values())
    assert case["auto"] in ("full", "gramian")
    assert case["explicit"] == []  # linear layers have a closed form
    assert line["reached"] == case["ratios"]["gramian"]
    assert line["verdict"] == "ok"
    assert content["machine"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert all(way in printed for way in engines.WAYS)


def test_a_missed_target_is_the_exit_status(engines, tmp_path, monkeypatch):
    monkeypatch.setitem(engines.TARGETS, "tiny", ("gramian", "plain", 0.0))
    monkeypatch.setattr(engines, "THEIRS", {})
    status, content = run(engines, "steps", tmp_path / "steps.json")
    assert status == 1
    assert content["lines"][0]["verdict"] == "MISSED"


def test_a_wrong_gradient_is_not_timed(engines, monkeypatch):
    plain = engines.OURS["plain"]
    monkeypatch.setitem(engines.OURS, "gramian", lambda model: plain(model)._replace(gradient="aligned"))
    with pytest.raises(ArithmeticError, match="tiny, gramian: relative error"):
        engines.main(["steps", "--only", "tiny"])


def test_memory(engines, tmp_path):
    status, content = run(engines, "memory", tmp_path / "memory.json")
    case = content["cases"][0]
    P = case["parameters"]
    assert case["gradients"] == 4 * 3 * P
    assert case["peaks"]["full"] >= (3 + 1) * 4 * P  # T gradients and the aggregated one
    assert case["shares"] == {way: peak / case["gradients"] for way, peak in case["peaks"].items()}
    assert status == (case["shares"]["gramian"] > engines.MEMORY_TARGET)


def test_memory_is_exact(engines):
    workloads = importlib.import_module("workloads")
    model = workloads.mlp(2, 4, (6, 8))

    def backward(h, losses):
        held = torch.zeros(1000)
        del held
        held = [torch.zeros(250), torch.zeros(250)]
        del held[0]
        held.append(torch.zeros(600))

    kibi = 64  # what an allocator rounds up to
    assert 4000 <= engines.allocated(engines.Way(model, backward)) < 4000 + kibi


def test_grid(engines, tmp_path):
    status, content = run(engines, "grid", tmp_path / "grid.json")
    case = content["cases"][0]
    taken = case["seconds"]
    assert set(taken) == {"forward", "plain", "full", "gramian"}
    assert case["excess"] == taken[case["auto"]] / min(taken["full"], taken["gramian"]) >= 1
    assert status == (case["excess"] > engines.WITHIN)
    assert content["lines"][0]["reached"] == (case["excess"] <= engines.WITHIN)


def test_the_grid_is_wide(engines):
    assert len(engines.GRID) >= 40
    assert {name.split()[0] for name in engines.GRID} >= {"mlp", "conv", "transformer", "text", "lstm"}
    assert {int(name.rpartition("T=")[2]) for name in engines.GRID if "T=" in name} >= {2, 10, 40}

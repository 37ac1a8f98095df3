"""tools/gpu.py, the command for a GPU that is lent for minutes: rehearsed here, and cut off."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="the tests run without the source tree")


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("gpu")
    finally:
        sys.path.pop(0)


def part(gpu, name, code, seconds=0.5):
    return gpu.Part(name, seconds, "", (sys.executable, "-c", code), (sys.executable, "-c", "pass"))


def test_it_fits_the_budget_and_is_documented(gpu):
    assert sum(p.seconds for p in gpu.PARTS) <= gpu.BUDGET
    assert len({p.name for p in gpu.PARTS}) == len(gpu.PARTS)
    assert gpu.table() in (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("name", ["many tasks", "memcheck"])
def test_rehearsal(gpu, tmp_path, name):
    """Selections that find tests, and what the sanitizers watch, with the device that is there."""
    told = []
    parts = [p for p in gpu.PARTS if p.name == name]
    assert gpu.run(gpu.stub(), tmp_path / "gpu.json", 300, parts, rehearse=True, say=told.append), told
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][name]["status"] == "passed"


def test_every_selection_finds_tests(gpu):
    """By the names in the files: pytest itself takes a second for each."""
    for p in gpu.PARTS:
        if "pytest" in p.command:
            text = "".join((ROOT / word).read_text() for word in p.command if word.endswith(".py"))
            chosen = p.command[p.command.index("-k") + 1].split(" and not ")[0]
            for word in chosen.replace("(", " ").replace(")", " ").split():
                assert word in ("or", "and") or word in text, (p.name, word)


def test_a_run_that_is_cut_off_goes_on(gpu, tmp_path):
    results, told = tmp_path / "card" / "gpu.json", []
    log = tmp_path / "log"
    parts = [
        part(gpu, "build", f"open({str(log)!r}, 'a').write('build ')"),
        part(gpu, "fails", f"open({str(log)!r}, 'a').write('fails '); raise SystemExit('broken')"),
        part(gpu, "hangs", "print('begun', flush=True); import time; time.sleep(60)"),
        part(gpu, "long", "pass", seconds=1000),
        part(gpu, "last", f"open({str(log)!r}, 'a').write('last ')"),
    ]
    assert not gpu.run(gpu.stub(), results, 20, parts, say=told.append)
    kept = json.loads(results.read_text())
    assert kept["card"] == "stub"
    assert {name: p["status"].split()[0] for name, p in kept["parts"].items()} == {
        "build": "passed",
        "fails": "failed",
        "hangs": "cut",
        "last": "passed",
    }
    assert "broken" in kept["parts"]["fails"]["output"]
    assert "begun" in kept["parts"]["hangs"]["output"]
    assert told[-2:] == ["missing: long", "not passed: fails, hangs"]
    assert not gpu.run(gpu.stub(), results, 20, parts, say=told.append)
    assert log.read_text() == "build fails last ", "what is there was done again"
    # Another card begins anew, and without a build there is nothing to test.
    broken = [part(gpu, "build", "raise SystemExit('no compiler')"), parts[-1]]
    assert not gpu.run(gpu.Card("other", "8.0"), results, 20, broken, say=told.append)
    assert list(json.loads(results.read_text())["parts"]) == ["build"]
    assert "no compiler" in "".join(told)


def test_the_build_is_for_this_card(gpu, tmp_path):
    code = "import os; assert os.environ['TORCH_CUDA_ARCH_LIST'] == '8.6' and os.environ['FASTMTL_CUDA'] == '1'"
    assert gpu.run(gpu.Card("a card", "8.6"), tmp_path / "gpu.json", 60, [part(gpu, "build", code)])


def test_without_a_gpu_it_says_so(gpu, capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--rehearse" in capsys.readouterr().err

"""tools/gpu.py, the command for a GPU that is lent for minutes: rehearsed here, and cut off."""

import importlib
import json
import os
import re
import subprocess
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


def part(gpu, name, code, seconds=0.5, **options):
    return gpu.Part(name, seconds, "", ("-c", code), **options)


def test_it_fits_the_budget_and_is_documented(gpu):
    assert sum(p.seconds for p in gpu.PARTS) <= gpu.BUDGET
    assert len({p.name for p in gpu.PARTS}) == len(gpu.PARTS)
    assert gpu.table() in (ROOT / "benchmarks" / "README.md").read_text()


def test_rehearsal(gpu, tmp_path):
    """All of it on the CPU: killed after some parts, resumed, and then there is nothing left to do."""
    results = tmp_path / "gpu.json"
    command = [
        sys.executable,
        str(ROOT / "tools" / "gpu.py"),
        "--rehearse",
        "--budget",
        "1500",
        "--results",
        str(results),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        for line in first.stdout:
            if line.startswith("many tasks: passed"):
                first.kill()
    before = json.loads(results.read_text())["parts"]
    assert {"build", "many tasks"} <= set(before) != {p.name for p in gpu.PARTS}

    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "many tasks: passed" not in second.stdout, "what is there was done again"
    content = json.loads(results.read_text())
    assert (content["card"], content["rehearsal"]) == ("stub", True)
    assert {name: of["status"] for name, of in content["parts"].items()} == {p.name: "passed" for p in gpu.PARTS}
    for p in gpu.PARTS:
        if p.name in before:
            assert content["parts"][p.name] == before[p.name]
        if p.rehearsal and "pytest" in p.command:  # a selection that finds no tests exits with status 5
            assert re.search(r"\d tests collected", content["parts"][p.name]["said"]), p.name
    # What the benchmarks leave is what `make docs-numbers` reads.
    found = {name: json.loads((tmp_path / name).read_text()) for name in {p.writes for p in gpu.PARTS if p.writes}}
    for name in ("cuda.json", "cuda-large.json", "cuda-lists.json"):
        for benchmark in found[name]["benchmarks"]:
            assert benchmark["extra_info"]["microseconds"] > 0
            if benchmark["group"].startswith("cuda "):
                assert benchmark["extra_info"]["device"] == "rehearsal"
    models = {case["case"].split()[0]: case for case in found["cuda-steps.json"]["cases"]}
    assert {p.command[-1] for p in gpu.PARTS if p.name.startswith("steps")} == {f"{model} " for model in models}
    for case in models.values():
        assert {"plain", "UB", "full", "gramian"} < set(case["ratios"])
        assert case["ratios"]["plain"] == 1
        assert all(error < 1e-4 for way, error in case["errors"].items() if "TorchJD" not in way)


def test_a_run_that_is_cut_off_goes_on(gpu, tmp_path, monkeypatch):
    results, told = tmp_path / "card" / "gpu.json", []
    log = tmp_path / "log"
    hangs = """
import subprocess, sys, time
ignores = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", ignores])  # holds the output open
print("begun", child.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("put down", flush=True)
    time.sleep(60)
"""
    parts = [
        part(gpu, "build", f"open({str(log)!r}, 'a').write('build ')"),
        part(gpu, "fails", f"open({str(log)!r}, 'a').write('fails '); raise SystemExit('broken')"),
        part(gpu, "hangs", hangs),
        part(gpu, "long", "pass", seconds=1000),
        part(gpu, "sanitized", "pass", under=("no-such-program",)),
        part(gpu, "peer", "pass", needs=("no_such_package",)),
        part(gpu, "last", f"open({str(log)!r}, 'a').write('last ')"),
    ]
    monkeypatch.setattr(gpu, "GRACE", 1.0)
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
    begun, *rest = kept["parts"]["hangs"]["output"].splitlines()
    assert "put down" in rest, "it is asked before it is killed"
    state = Path("/proc", begun.split()[1], "status")  # of what it had started
    assert not state.exists() or "zombie" in state.read_text()
    assert {"sanitized: needs no-such-program", "peer: needs no_such_package"} <= set(told)
    assert told[-2:] == ["missing: long, sanitized, peer", "not passed: fails, hangs"]
    assert not gpu.run(gpu.stub(), results, 20, parts, say=told.append)
    assert log.read_text() == "build fails last ", "what is there was done again"
    # Another card or commit begins anew, and without a build there is nothing to test.
    broken = [part(gpu, "build", "raise SystemExit('no compiler')"), parts[-1]]
    for card, commit in ((gpu.Card("other", "8.0"), ""), (gpu.stub(), "abc")):
        assert not gpu.run(card, results, 20, broken, commit=commit, say=told.append)
        assert list(json.loads(results.read_text())["parts"]) == ["build"]
    assert json.loads(results.read_text())["commit"] == "abc"
    assert "no compiler" in "".join(told)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"parts": []}', '{"parts": {"build": 1}}'])
def test_a_file_that_cannot_be_read_is_put_aside(gpu, tmp_path, text):
    results, told = tmp_path / "gpu.json", []
    results.write_text(text)
    assert gpu.run(gpu.stub(), results, 20, [part(gpu, "build", "pass")], say=told.append)
    assert "not readable" in told[0]
    assert (tmp_path / "gpu.broken").read_text() == text
    assert json.loads(results.read_text())["parts"]["build"]["status"] == "passed"


def test_what_came_late_gets_another_chance(gpu, tmp_path, monkeypatch):
    """A part that the end of a run cut off, not one that hangs."""
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    log = tmp_path / "log"
    code = (
        f"import time; open({str(log)!r}, 'a').write('x'); time.sleep(3 if len(open({str(log)!r}).read()) < 2 else 0)"
    )
    late = [part(gpu, "late", code, seconds=1.0)]
    for budget, status in ((1.4, "cut off after 1 s"), (20, "passed"), (20, "passed")):
        gpu.run(gpu.stub(), tmp_path / "gpu.json", budget, late, commit="a", say=lambda _: None)
        assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["late"]["status"] == status
    assert log.read_text() == "xx"


def test_numbers_of_another_commit_do_not_stay(gpu, tmp_path):
    """Parts that share a file add to it; the first of a new run finds none."""
    code = "import pathlib, sys; open(sys.argv[1], 'a').write('x')"
    parts = [gpu.Part(name, 1, "", ("-c", code, "{folder}/numbers"), writes="numbers") for name in ("one", "two")]
    for commit in ("a", "b"):
        assert gpu.run(gpu.stub(), tmp_path / "gpu.json", 20, parts, commit=commit, say=lambda _: None)
        assert (tmp_path / "numbers").read_text() == "xx"


def test_tests_that_are_all_skipped_show_nothing(gpu, tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text("import pytest\n\n@pytest.mark.skip(reason='no GPU')\ndef test_it(): pass\n")
    skipped = gpu.Part("skipped", 30, "", ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)))
    assert not gpu.run(gpu.stub(), tmp_path / "gpu.json", 60, [skipped], say=lambda _: None)
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["skipped"]["status"] == "nothing ran"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100 80GB PCIe / MIG 1g.10gb", "nvidia-a100-80gb-pcie-mig-1g-10gb"),
        ("显卡", "gpu"),
        ("../..", "gpu"),
    ],
)
def test_whatever_the_card_is_called(gpu, name, folder):
    assert gpu.folder_of(gpu.Card(name, "9.0")) == folder


def test_results_are_no_change_of_the_code(gpu, tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "code.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    commit = gpu._commit()
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    numbers = tmp_path / "benchmarks" / "results" / "card" / "gpu.json"
    numbers.parent.mkdir(parents=True)
    numbers.write_text("{}")
    git("add", ".")
    git("commit", "-q", "-m", "two")
    numbers.write_text("{} ")
    assert gpu._commit() == commit
    (tmp_path / "code.py").write_text("2")
    assert gpu._commit() == f"{commit}-dirty"


def test_programs_of_the_toolkit_are_found(gpu, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho sanitized; shift; exec "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    watched = part(gpu, "memcheck", "print('ran')", seconds=5, under=("compute-sanitizer", "--tool"))
    assert gpu.run(gpu.stub(), tmp_path / "gpu.json", 20, [watched], say=lambda _: None)
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["memcheck"]["output"] == "sanitized\nran\n"


def test_the_build_is_for_this_card(gpu, tmp_path):
    code = "import os; assert os.environ['TORCH_CUDA_ARCH_LIST'] == '8.6' and os.environ['FASTMTL_CUDA'] == '1'"
    assert gpu.run(gpu.Card("a card", "8.6"), tmp_path / "gpu.json", 60, [part(gpu, "build", code)])


def test_without_a_gpu_it_says_so(gpu, capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--rehearse" in capsys.readouterr().err

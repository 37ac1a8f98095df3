"""tools/docs_numbers.py: what the pages say is what the committed results say, and what it makes of results."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "docs_numbers.py"
PAGE = ROOT / "docs" / "performance.md"

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="the tests run without the source tree")


@pytest.fixture(scope="module")
def tool():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("docs_numbers", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


MACHINE = {"commit": "0123456789", "torch": "2.14.1", "date": "2026-01-02T03:04:05Z"}


def line(name, measure, reached, target, verdict="ok", roof=None, sense=">="):
    names = ("name", "measure", "reached", "target", "verdict", "roof", "sense")
    return dict(zip(names, (name, measure, reached, target, verdict, roof, sense), strict=True))


def case(name, *lines, fast=2e-3, base=6e-3):
    return {"case": name, "lines": list(lines), "seconds": {"fast": fast, "base": base}}


@pytest.fixture
def results(tool, tmp_path):
    """Two runs: the later one measured a case of the first again."""

    def write(name, date, cases):
        (tmp_path / name).write_text(json.dumps({"machine": MACHINE | {"date": date}, "cases": cases}))

    flat = line("flat 3x1e6", "speed-up", 3.456, 3.0, roof=4.0)
    floor = line("flat 3x1e6", "x 2 reads", 1.2, 1.35, sense="<=")
    old, new = (line("flat 512x2e4", "speed-up", x, 2.5, "MISSED") for x in (0.5, 0.75))
    weighing = [
        case("weighting RLW T=10", line("weighting RLW T=10", "speed-up", 0.6, 1.0, "NOISY"), base=2e-6, fast=4e-6)
    ]
    write("a.json", "2026-01-02T00:00:00Z", [case("flat 3x1e6", flat, floor), case("flat 512x2e4", old), *weighing])
    write("b.json", "2026-01-03T00:00:00Z", [case("flat 512x2e4", new)])
    return tool.Results(tmp_path)


@pytest.mark.skipif(not (ROOT / "benchmarks" / "results").exists(), reason="a source release has no results")
def test_the_pages_are_what_the_results_say(tool, capsys):
    status = tool.main(["--check"])
    assert status == 0, f"make docs-numbers\n{capsys.readouterr().out}"


def test_every_section_is_on_the_page(tool):
    text = "".join(page.read_text() for page in tool.PAGES)
    assert sorted(match["name"] for match in tool.SECTION.finditer(text)) == sorted(tool.SECTIONS)


def test_no_measured_number_is_typed_by_hand(tool):
    """Outside of the marks there is no time, rate, percentage or ratio."""
    prose = tool.SPAN.sub("", tool.SECTION.sub("", PAGE.read_text()))
    assert not re.findall(r"\d[\d.]*\s*(?:µs|ms|seconds?|[GT]B/s|GFLOP|%)|\d+\.\d+\s*×|\d+\.\d+ times", prose)


def test_the_newest_run_counts(results):
    assert results.values("flat 512x2e4", "speed-up") == [0.75]
    assert results.values("flat *", "speed-up") == [3.456, 0.75]


def test_spans(tool, results):
    page = (
        "it is <!-- n: flat 3x1e6 / speed-up -->old<!-- /n --> times, "
        "<!-- n: flat 3x1e6 / fast ms / .1f --><!-- /n --> ms, "
        "at most <!-- n: flat * / speed-up / .0f / max --><!-- /n -->; "
        "a launch <!-- n: model / launch µs --><!-- /n -->"
    )
    filled = tool.fill(page, results)
    assert re.sub("<!--.*?-->", "", filled) == "it is 3.46 times, 2.0 ms, at most 3; a launch 2.5"
    assert tool.fill(filled, results) == filled


def test_spans_of_the_demo_and_of_experiments(tool, tmp_path):
    for name, date, left in (("one", "2026-01-02", 1.0), ("two", "2026-01-03", 3.0)):
        (tmp_path / name).mkdir()
        run = {"about": {"date": date}, "methods": {"fastmtl": {"left": [left, left + 1]}}, "shorter": [2.0, 4.0]}
        (tmp_path / name / "demo.json").write_text(json.dumps(run))
    results = tool.Results(tmp_path / "one")
    page = (
        "<!-- n: demo / fastmtl / left / .1f --><!-- /n --> <!-- n: demo / shorter / .0f --><!-- /n --> "
        "<!-- n: methods --><!-- /n -->"
    )
    assert re.sub("<!--.*?-->", "", tool.fill(page, results)) == "3.5 3 41"  # of the newest run, whose ever it is
    for wrong in ("demo / fastmtl / right / .1f", "demo / pure / left / .1f", "experiment / regression / none / .0f"):
        with pytest.raises(ValueError, match="not in the results of the demo or experiment"):
            tool.fill(f"<!-- n: {wrong} --><!-- /n -->", results)


def test_spans_of_experiments_are_their_tables(tool):
    """Of toy, counted from the ends of its runs: as its table counts them; and places."""
    folder = ROOT / "experiments" / "results"
    if not folder.exists():
        pytest.skip("a source release, which has no results")
    rows = re.findall(r"^\| ([a-z-]+) \|.*\| (\d+) of 25 \|", (folder / "toy" / "table.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for method, count in rows:
        assert tool.span(f"experiment / toy / {method} / .0f", None) == count
    table = json.loads((folder / "scene" / "table.json").read_text())["rows"]
    best = min((row for row in table if "Δm % ↓" in table[row]), key=lambda row: table[row]["Δm % ↓"])
    assert tool.span(f"experiment / scene / {best} / place", None) == "1"
    assert tool.span("experiment / rl / shared aligned / .0f", None) == "70"


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("<!-- n: flat 9x9 / speed-up --><!-- /n -->", "no case 'flat 9x9'"),
        ("<!-- n: flat 3x1e6 / speed --><!-- /n -->", "with 'speed'"),
        ("<!-- n: flat * / speed-up --><!-- /n -->", "expected one value, got 2"),
        ("<!-- n: flat * / speed-up / .2f / mean --><!-- /n -->", "min or max"),
        ("<!-- n: flat 3x1e6 --><!-- /n -->", "expected 'CASE"),
        ("<!-- n: cuda / float32 9x9 / .1f --><!-- /n -->", "expected 'cuda / CASE / FORMAT'"),
        ("<!-- numbers: unknown -->\n<!-- end -->", "expected one of verdicts, flat"),
        ("<!-- numbers: flat -->\n", "expected a beginning and an end"),
        ("<!-- numbers: flat -->\n<!-- numbers: more -->\n<!-- end -->", "expected a beginning and an end"),
        ("<!-- n: flat 3x1e6 / speed-up -->1.2", "expected a beginning and an end"),
    ],
)
def test_what_cannot_be_filled(tool, results, mark, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tool.fill(mark, results)


def test_sections(tool, results):
    page = tool.fill(
        "a\n<!-- numbers: flat -->\nold\n<!-- end -->\nb <!-- n: flat 3x1e6 / speed-up --><!-- /n -->\n", results
    )
    assert "| 3x1e6 | 2 | 3.46 | ≥ 3 | 4.00 | 1.20 | ≤ 1.35 |" in page
    assert "old" not in page
    assert "512x2e4" not in page
    assert "Measured at commit 0123456, torch 2.14.1, 2026-01-02." in page
    assert "| 512x2e4 | 2 | 0.75 | ≥ 2.5 |" in tool.SECTIONS["large"](results)
    assert "| RLW | 0.5 × (4 µs, 0.002 ms) ? |" in tool.SECTIONS["weighting"](results)


def test_losses_are_what_is_slower_or_missed(tool, results):
    section = tool.SECTIONS["losses"](results)
    assert "| 512x2e4 | speed-up | 0.75 | ≥ 2.5 |" in section
    assert "| weighting RLW T=10 | speed-up | 0.60 | ≥ 1 |" in section
    assert "3x1e6" not in section
    assert tool.SECTIONS["verdicts"](results).startswith(
        "Of 4 targets: 2 reached, 1 missed, 1 measured on a disturbed machine."
    )


def point(tasks, pure, **others):
    at = {
        "tasks": tasks,
        "params": 10000,
        "batch": 1,
        "dtype": "float32",
        "threads": 2,
        "method": "AlignedMTL",
        "kappa": 1.0,
    }
    seconds = {"fastmtl": 2e-2, "pure": pure, "read": 1e-3, "gram": 1e-2, "weights": 8e-3, "combine": 1e-3}
    about = {
        "memory": None,
        "accuracy": {"fastmtl": 3e-8, "pure": None},
        "roofs": {},
        "rounds": 3,
        "kept": 3,
        "others": 0,
    }
    return {"point": at | others, "seconds": seconds, "commit": "abc", "date": "2026-01-02"} | about


def test_scaling(tool, tmp_path):
    folder = tmp_path / "scaling"
    folder.mkdir()
    points = [
        point(512, 4e-2),
        point(256, 1e-2),
        point(1024, 1.6e-1),
        point(8, 1.0),
        point(4096, 1.0) | {"error": "no memory"},
    ]
    machine = {"commits": ["0123456789"], "torch": "2.14.1", "last": "2026-01-02T03:04:05Z"}
    (folder / "scaling.json").write_text(json.dumps({"machine": machine, "points": points}))
    (folder / "time.png").touch()
    (tmp_path / "a.json").write_text(json.dumps({"machine": MACHINE, "cases": []}))
    results = tool.Results(tmp_path)
    stages = tool.SECTIONS["large stages"](results).splitlines()
    assert stages[4] == "| 256x10000 κ=1 float32, 2 threads | 10 | 8 | 1 | 20 | 10 | 0.50 | 3e-08 |  |"
    assert len(stages) == 7
    section = tool.SECTIONS["scaling"](results)
    assert re.search(r"^!\[time\]\(.*scaling/time.png\)$", section, re.MULTILINE)
    assert "commits 0123456, torch 2.14.1, 2026-01-02" in section


def test_what_nobody_has_measured_is_said(tool, tmp_path):
    (tmp_path / "cpu").mkdir()
    empty = tool.Results(tmp_path / "cpu")  # whose neighbours count, too
    for name, section in tool.SECTIONS.items():
        if not name.startswith(("expect", "experiment", "cuda", "exact split")):  # which are no machine's
            assert "Not measured yet" in section(empty), name
    assert "Not measured yet. The command: `make gpu`" in tool.SECTIONS["cuda run"](empty)
    assert tool.SECTIONS["cuda lead"](empty) == ""


def timing(test, group, microseconds, **params):
    extra = {"device": "NVIDIA H100", "microseconds": microseconds, "GB/s": 1e6 / microseconds}
    stats = {"median": microseconds * 1e-6}
    return {"name": test, "group": group, "params": params, "extra_info": extra, "stats": stats}


def test_a_run_of_make_gpu(tool, tmp_path):
    """What a card left, as tables in docs/performance.md, and its few rows in README; a rehearsal is none."""
    part = {"status": "passed", "seconds": 1.0, "date": "2026-02-03T04:05:06Z", "said": "", "output": ""}
    about = {"card": "NVIDIA H100", "torch": "2.15.0", "commit": "abc1234", "rehearsal": False}
    parts = {"build": part, "ops": part, "memcheck": part | {"status": "failed (9)"}}
    folders = [tmp_path / name for name in ("cpu", "nvidia-h100", "old", "rehearsal")]
    for folder in folders:
        folder.mkdir()
    for folder, changes in zip(folders[1:], ({}, {}, {"rehearsal": True}), strict=True):
        older = {name: of | {"date": "2026-01-01T00:00:00Z"} for name, of in parts.items()}
        (folder / "gpu.json").write_text(
            json.dumps(about | changes | {"parts": older if folder.name == "old" else parts})
        )
    results = tool.Results(folders[0])
    assert "commit abc1234, torch 2.15.0, 2026-02-03. Passed: build, ops. Not passed: memcheck (failed (9))." in (
        tool.SECTIONS["cuda run"](results)
    )
    assert tool.SECTIONS["cuda lead"](results) == "", "nothing is measured yet"

    flat, many = "cuda float32 10x1000000", "cuda many 256x100000"
    ways = [("fastmtl", "eager", 50.0), ("fastmtl", "graph", 40.0), ("pure", "eager", 300.0)]
    roof = [timing(f"test_roof[{name}]", "cuda roof", 1.0, name=name) for name in ("copy", "sum")]
    timings = [timing("test_flat", flat, us, name=name, way=way) for name, way, us in ways]
    large = [timing("test_many", many, us, name=name, way=way) for name, way, us in [*ways, ("host", "eager", 900.0)]]
    lists = [{"name": "test_list_host_time[8-161-AlignedMTL-cuda]", "group": "host", "params": {"device": "cuda"}}]
    lists[0]["extra_info"] = {
        "microseconds": 120.0,
        "_foreach_norm + _foreach_mul_, microseconds": 480.0,
        "ratio": 0.25,
    }
    step = {
        "case": "resnet18 T=10",
        "tasks": 10,
        "ratios": {"plain": 1.0, "UB": 1.25},
        "peaks": {"plain": 1e6, "UB": 2e6},
    }
    step |= {"seconds": {"plain": 0.008, "UB": 0.01}, "absent": {"TorchJD autogram": "ImportError: torchjd"}}
    for name, content in {
        "cuda.json": {"benchmarks": [*roof, *timings]},
        "cuda-large.json": {"benchmarks": large},
        "cuda-lists.json": {"benchmarks": lists},
        "cuda-steps.json": {"cases": [step]},
    }.items():
        (folders[1] / name).write_text(json.dumps(content))
    page = tool.SECTIONS["cuda run"](results)
    assert re.search(
        r"^\| float32 10x1000000 \| 40.0 \| 50.0 \| 300.0 \| 6.0 \| [\d.]+ \| [\d.]+ \|$", page, re.MULTILINE
    )
    assert re.search(r"^\| 256x100000 \| 40.0 \| 50.0 \| 300.0 \| 900.0 \| 6.0 \| 18.0 \| \d+ \|$", page, re.MULTILINE)
    assert "| 8-161-AlignedMTL-cuda | 120.0 | 480.0 | 0.25 |" in page
    assert "| resnet18 T=10 | 1.00 (8 ms, 1 MB) | 1.25 (10 ms, 2 MB) |" in page
    assert "\nTorchJD autogram: ImportError: torchjd\n" in page
    lead = tool.SECTIONS["cuda lead"](results)
    assert "| 10 tasks × 1 million parameters | 50.0 µs | 300.0 µs | 6.0 × |" in lead
    assert "| a training step, resnet18 T=10 | 10 ms | 8 ms | 1.25 × a plain step |" in lead
    assert lead.endswith("\nNVIDIA H100, commit abc1234, torch 2.15.0, 2026-02-03.\n")


def test_a_page_that_differs(tool, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- n: model / launch µs -->2.4<!-- /n --> µs\n")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "PAGES", (page,))
    assert tool.main(["--check"]) == 1
    assert "+<!-- n: model / launch µs -->2.5<!-- /n --> µs" in capsys.readouterr().out
    assert "2.4" in page.read_text()
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0

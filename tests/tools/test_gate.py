"""benchmarks/check.py: verdicts on made-up times, and the gate, which must fail on code that takes twice as long."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import needs_extension

import fastmtl
from fastmtl import ops

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the tests run without the source tree")


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return {name: importlib.import_module(name) for name in ("check", "measure", "summary", "trials")}
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def check(modules):
    return modules["check"]


@pytest.fixture
def Timing(modules):
    return modules["check"].Timing


@pytest.fixture
def Trial(modules):
    return modules["trials"].Trial


def gate(check, *arguments):
    """The exit status of the gate, run as from the command line."""
    with pytest.raises(SystemExit) as done:
        check.main(["--ci", *arguments])
    return int(done.value.code)


# ------------------------------------------------------------------------------------------------ a planted slowdown


def twice(function):
    """Honest work, done twice."""

    def slowed(*arguments, **options):
        function(*arguments, **options)
        return function(*arguments, **options)

    return slowed


# Case of the gate, and what is slowed in it.
PLANTED = {
    "solver mgda": (ops, "mgda"),
    "solver dual_cone": (ops, "dual_cone"),
    "flat 4x1e3": (fastmtl.AlignedMTL, "__call__"),
}


def usual_here(check, capsys, only):
    """The two ratios of a case on this machine as it is now: those of bounds.toml are of another one."""
    assert gate(check, "--usual", "--only", only, "--repeat", "3") == 0
    printed = capsys.readouterr().out
    (measured,) = check.tomllib.loads(printed[printed.index("[ci.usual.") :])["ci"]["usual"].values()
    assert len(measured) == 1
    return measured


@needs_extension
@pytest.mark.parametrize("only", PLANTED)
def test_the_gate_passes_and_fails_where_the_same_is_done_twice(check, monkeypatch, capsys, only):
    owner, name = PLANTED[only]
    for _ in range(3):  # other tests come and go meanwhile: what was usual a second ago may not be
        monkeypatch.setitem(check.BOUNDS["ci"], "usual", {"portable": usual_here(check, capsys, only)})
        assert gate(check, "--only", only) == 0
        output = capsys.readouterr().out
        assert "kept" in output
        assert "REGRESSED" not in output
        with monkeypatch.context() as planted:
            planted.setattr(owner, name, twice(getattr(owner, name)))
            status = gate(check, "--only", only)
        output = capsys.readouterr().out
        if status:
            break
    assert status == 1, output
    assert "FAILED" in output
    assert output.count("REGRESSED") == 3  # both ratios, and the count


@needs_extension
@pytest.mark.parametrize("only", PLANTED)
def test_the_gate_passes_here_with_the_committed_bounds(check, capsys, only):
    assert gate(check, "--only", only) == 0
    assert "pass 1 of 1: kept" in capsys.readouterr().out


@needs_extension
def test_a_wrong_result_fails_the_gate(check, monkeypatch, capsys):
    mgda = ops.mgda
    monkeypatch.setattr(ops, "mgda", lambda M: (1.01 * mgda(M)[0], None))
    assert gate(check, "--only", "solver mgda") == 1
    assert "WRONG" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ how often, and where


def stub(check, monkeypatch, verdicts):
    """Replaces the measurement: every case gets the next verdict."""
    remaining = iter(verdicts)

    def run(case, *_, **options):
        return [check.Line(case.name, "speed-up", 1.0, 1.0, ">=", None, next(remaining))], {}

    monkeypatch.setattr(check, "run", run)
    machine = {"extensions": ["_C"], "isa": "portable"}
    monkeypatch.setattr(check.measure, "machine", lambda: machine)
    return machine


def test_repeat_stops_at_the_first_failure(check, monkeypatch, capsys):
    stub(check, monkeypatch, ["ok", "ok", "REGRESSED", "ok"])
    assert gate(check, "--only", "flat 4x1e3", "--repeat", "10") == 1
    passes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pass")]
    assert [line.split(" (")[0] for line in passes] == [
        "pass 1 of 10: kept",
        "pass 2 of 10: kept",
        "pass 3 of 10: FAILED",
    ]


@pytest.mark.parametrize(("verdict", "status"), [("ok", 0), ("ALONE", 0), ("NOISY", 0), ("REGRESSED", 1), ("WRONG", 1)])
def test_what_fails_the_gate(check, monkeypatch, capsys, verdict, status):
    stub(check, monkeypatch, [verdict])
    assert gate(check, "--only", "flat 4x1e3") == status
    assert verdict in capsys.readouterr().out


def test_without_kernels_there_is_nothing_to_gate(check, monkeypatch, capsys):
    machine = stub(check, monkeypatch, [])
    machine["extensions"] = []
    assert gate(check) == 0
    assert "not built" in capsys.readouterr().out


def test_an_unknown_instruction_set_gets_the_portable_bounds(check):
    assert list(check.ci_cases("neon")) == list(check.ci_cases("portable")) != list(check.ci_cases("avx512"))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_case_of_the_gate_has_its_usual_ratios(check, isa):
    cases = list(check.ci_cases(isa))
    assert {case.name for case in cases} == set(check.BOUNDS["ci"]["usual"][isa])
    assert len({case.name for case in cases}) == len(cases)
    assert all(ratio > 0 for case in cases for ratio in case.usual)
    assert all(case.kind in check.TRIALS for case in cases)


def test_every_promise_has_a_problem(check):
    cases = list(check.cases())
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.kind in check.TRIALS or case.kind in check.FIGURES for case in cases)
    figures = [case for case in cases if case.kind in check.FIGURES]
    limits = [(case.max_extra_mb, case.max_ms, case.max_activations) for case in figures]
    assert all(sum(limit is not None for limit in of_case) == 1 for of_case in limits)


# ------------------------------------------------------------------------------------------------ verdicts of the gate


@pytest.fixture
def judged(check, Timing):
    """The verdicts of a case whose usual ratios are 4 and 2, with a slack of 0.5: from the times of its functions."""

    def verdicts(base, fast, read, kept=15, others=0.0):
        case = check.Case("case", "kind", [], {}, usual=(4.0, 2.0), slack=0.5)
        lines = check.against_usual(case, None, Timing({"base": base, "fast": fast, "read": read}, kept, 15, others))
        assert [line.target for line in lines] == [2.0, 4.0]
        return [line.verdict for line in lines]

    return verdicts


def test_regressed_only_where_both_ratios_are_beyond_their_bounds(judged):
    assert judged(base=4.0, fast=1.0, read=0.5) == ["ok", "ok"]
    assert judged(base=4.0, fast=1.9, read=0.5) == ["ok", "ok"]
    assert judged(base=4.0, fast=2.1, read=0.5) == ["REGRESSED", "REGRESSED"]
    assert judged(base=1.9, fast=1.0, read=0.5) == ["ALONE", "ok"]  # a better LAPACK
    assert judged(base=4.0, fast=1.0, read=0.2) == ["ok", "ALONE"]  # memory that is faster than the processor
    assert judged(base=math.nan, fast=1.0, read=math.nan) == ["REGRESSED", "REGRESSED"]


def test_nothing_is_said_of_rounds_that_were_disturbed(judged):
    assert judged(base=4.0, fast=1.0, read=0.5, kept=7) == ["NOISY", "NOISY"]
    assert judged(base=4.0, fast=9.0, read=0.5, kept=7) == ["NOISY", "NOISY"]
    assert judged(base=4.0, fast=9.0, read=0.5, kept=8) == ["REGRESSED", "REGRESSED"]


def test_others_on_the_machine_excuse_nothing_under_the_processor_clock(judged):
    assert judged(base=4.0, fast=9.0, read=0.5, others=2.0) == ["REGRESSED", "REGRESSED"]


# ------------------------------------------------------------------------------------------------ verdicts on targets


@pytest.fixture
def lines(check, Timing, Trial):
    """The lines of a case of 1024 multiply-adds and these limits, from the times of its functions."""

    def judge(seconds, kept=15, others=0.0, **limits):
        trial = Trial(None, None, None, 0.0, 1.0, multiply_adds=check.measure.GEMM**3)
        case = check.Case("case", "kind", [], {}, floor_bound=1.35, **limits)
        return check.against_targets(case, trial, Timing(seconds, kept, 15, others))

    return judge


def times(fast, base=8.0, read=1.0, gemm=0.5, **more):
    return {"fast": fast, "base": base, "read": read, "gemm": gemm, **more}


@pytest.mark.parametrize(
    ("fast", "verdict"),
    [(2.0, "ok"), (2.1, "ROOF"), (2.69, "ROOF"), (2.71, "MISSED")],  # target 4; the roof time is 2 reads
)
def test_a_speed_up(lines, fast, verdict):
    (line,) = lines(times(fast), reads=2, min_speedup=4.0)
    assert (line.measure, line.verdict, line.roof) == ("speed-up", verdict, 4.0)
    assert line.reached == pytest.approx(8.0 / fast)


def test_the_multiply_adds_raise_the_roof_time(lines):
    (line,) = lines(times(5.0, gemm=3.0), reads=2, min_speedup=4.0)  # 3 for the products, 1 for the second read
    assert (line.roof, line.verdict) == (2.0, "ROOF")


def test_without_reads_there_is_no_roof(lines):
    (line,) = lines(times(2.1), min_speedup=4.0)
    assert (line.roof, line.verdict) == (None, "MISSED")


@pytest.mark.parametrize(("fast", "verdict"), [(8.8, "ok"), (10.0, "ROOF"), (11.0, "MISSED")])
def test_a_slow_down(lines, fast, verdict):
    (line,) = lines(times(fast), reads=2, max_slowdown=1.1)
    assert (line.measure, line.verdict, line.roof) == ("slow-down", verdict, 1.25)


@pytest.mark.parametrize(("fast", "verdict"), [(2.6, "ok"), (2.8, "MISSED")])
def test_a_floor_has_no_roof(lines, fast, verdict):
    (line,) = lines(times(fast), reads=2, max_floor=1.35)
    assert (line.measure, line.verdict, line.roof) == ("x 2 reads", verdict, None)


@pytest.mark.parametrize(
    ("fast", "read_alone", "verdict", "roof"),
    [(4.4, 2.0, "ok", 1.0), (5.0, 2.0, "ROOF", 1.0), (6.0, 2.0, "MISSED", 1.0), (6.0, 1.2, "ROOF", 0.6)],
)
def test_an_efficiency(lines, fast, read_alone, verdict, roof):
    """Two threads against one; the reads say what two threads can gain."""
    torch.set_num_threads(2)
    (line,) = lines(times(fast, read_alone=read_alone), min_efficiency=0.9)
    assert (line.measure, line.verdict, line.roof) == ("efficiency", verdict, roof)
    assert line.reached == pytest.approx(4.0 / fast)


@pytest.mark.parametrize(
    ("fast", "kept", "others", "verdict"),
    [
        (1.0, 7, 0.0, "NOISY"),  # reached, but in few rounds
        (1.0, 8, 0.0, "ok"),
        (1.0, 15, 2.0, "ok"),  # in spite of others
        (9.0, 15, 2.0, "NOISY"),  # perhaps because of them
        (2.1, 15, 2.0, "NOISY"),
        (9.0, 15, 0.1, "MISSED"),
    ],
)
def test_a_noisy_machine(lines, fast, kept, others, verdict):
    (line,) = lines(times(fast), kept, others, reads=2, min_speedup=4.0)
    assert line.verdict == verdict


def test_every_limit_is_a_line(lines):
    found = lines(times(1.0), reads=2, min_speedup=4.0, max_slowdown=1.0, max_floor=1.0)
    assert [line.measure for line in found] == ["speed-up", "slow-down", "x 2 reads"]


# ------------------------------------------------------------------------------------------------ attempts


@pytest.fixture
def attempts(check, monkeypatch, Timing, Trial):
    """Runs a case (base 4, read 1; target 4, usual 4 and 1) whose attempts take these times and keep these rounds."""

    def run(sequence, judge="against_targets", accept=("ok",), **trial):
        remaining = iter(sequence)
        defaults = {"fast": None, "base": None, "read": None, "error": 0.0, "tolerance": 1.0}

        def interleave(functions, rounds):
            fast, kept = next(remaining)
            return Timing({"fast": fast, "base": 4.0, "read": 1.0}, kept, 15, 0.0)

        monkeypatch.setattr(check, "interleave", interleave)
        monkeypatch.setitem(check.TRIALS, "synthetic", lambda: Trial(**defaults | trial))
        case = check.Case("case", "synthetic", [], {}, min_speedup=4.0, usual=(4.0, 1.0), slack=0.65)
        found, data = check.run(case, 15, accept, getattr(check, judge))
        return [line.verdict for line in found], data, list(remaining)

    return run


def test_the_first_attempt_that_is_kept_is_the_last(attempts):
    verdicts, data, remaining = attempts([(2.0, 15), (1.0, 15), (3.0, 15)])
    assert (verdicts, data["attempt"], remaining) == (["ok"], 2, [(3.0, 15)])


def test_three_misses_are_a_miss(attempts):
    verdicts, data, remaining = attempts([(2.0, 15), (2.1, 15), (2.2, 15), (1.0, 15)])
    assert (verdicts, data["attempt"], remaining) == (["MISSED"], 1, [(1.0, 15)])


@pytest.mark.parametrize(("judge", "bad"), [("against_targets", ["MISSED"]), ("against_usual", ["REGRESSED"] * 2)])
def test_what_was_measured_well_counts_more_than_noise(attempts, judge, bad):
    verdicts, data, _ = attempts([(2.0, 3), (2.0, 15), (2.0, 3)], judge)
    assert (verdicts, data["attempt"]) == (bad, 2)


def test_noise_in_every_attempt_is_noise(attempts):
    verdicts, data, _ = attempts([(9.0, 3)] * 3, "against_usual")
    assert (verdicts, data["kept"]) == (["NOISY"] * 2, 3)


def test_a_wrong_result_is_not_timed(attempts):
    verdicts, data, remaining = attempts([(1.0, 15)], error=2.0)
    assert (verdicts, remaining) == (["WRONG"], [(1.0, 15)])
    assert "seconds" not in data
    assert attempts([(1.0, 15)], error=math.nan)[0] == ["WRONG"]


def test_a_peer_that_is_not_installed_is_absent(check, monkeypatch):
    def missing():
        raise ImportError("torchjd")

    monkeypatch.setitem(check.TRIALS, "synthetic", missing)
    (line,), data = check.run(check.Case("case", "synthetic", [], {}, min_speedup=4.0), 15, ("ok",), None)
    assert (line.verdict, line.target, data) == ("ABSENT", 4.0, {})


@pytest.mark.parametrize(("value", "verdict"), [(19.0, "ok"), (21.0, "MISSED")])
@pytest.mark.parametrize(
    ("limit", "measure"), [("max_ms", "ms"), ("max_extra_mb", "extra MB"), ("max_activations", "x activations")]
)
def test_a_figure(check, monkeypatch, value, verdict, limit, measure):
    monkeypatch.setitem(check.FIGURES, "synthetic", lambda: value)
    monkeypatch.setattr(check, "BUSY", math.inf)  # the machine of this test is busy
    (line,), _ = check.run(check.Case("case", "synthetic", [], {}, **{limit: 20.0}), 15, ("ok",), None)
    assert (line.measure, line.reached, line.target, line.verdict) == (measure, value, 20.0, verdict)


def test_a_time_on_a_busy_machine_is_noisy_and_its_memory_is_not(check, monkeypatch):
    monkeypatch.setitem(check.FIGURES, "synthetic", lambda: 21.0)
    monkeypatch.setattr(check, "BUSY", -1.0)
    found = [check.figure(check.Case("case", "synthetic", [], {}, **{x: 20.0})) for x in ("max_ms", "max_extra_mb")]
    assert [line.verdict for (line,), _ in found] == ["NOISY", "MISSED"]


# ------------------------------------------------------------------------------------------------ what is written


def test_the_summary_is_made_from_the_json(check, modules, tmp_path, capsys):
    paths = tmp_path / "here" / "check.json", tmp_path / "summary.md"
    with pytest.raises(SystemExit):
        check.main(["--only", "flat 4x1e3", "--json", str(paths[0]), "--summary", str(paths[1])])
    content, page = json.loads(paths[0].read_text()), paths[1].read_text(encoding="utf-8")
    assert modules["summary"].markdown(content) == page
    (line,) = content["cases"][0]["lines"]
    cells = f"| {line['name']} | {line['measure']} | {line['reached']:.2f} | ≥ {line['target']:g} |"
    assert page.count(cells) == 1
    assert f"{line['reached']:.2f}" in capsys.readouterr().out
    assert all(str(content["machine"][key]) in page for key in ("cpu", "torch", "commit", "date"))


def test_the_summary_has_every_line(modules):
    machine = dict.fromkeys(("cpu", "cores", "threads", "isa", "system", "python", "torch", "fastmtl", "date"), "?")
    machine |= {"commit": "abc", "dirty": True}
    common = {"sense": ">=", "target": 3.0, "roof": None}
    found = [
        {"name": "a", "measure": "speed-up", "reached": 2.5, "verdict": "ROOF"} | common | {"roof": 2.75},
        {"name": "b", "measure": "error", "reached": 0.00123, "verdict": "WRONG"} | common | {"sense": "<="},
        {"name": "c", "measure": "speed-up", "reached": 0.0, "verdict": "ABSENT"} | common,
    ]
    content = {
        "machine": machine,
        "verdicts": {"ROOF": 1},
        "cases": [{"lines": found[:1], "seconds": {"fast": 0.0123}}],
    }
    content["cases"].append({"lines": found[1:]})
    page = modules["summary"].markdown(content)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "| a | speed-up | 2.50 | ≥ 3 | 2.75 | 12.300 | ROOF |",
        "| b | error | 1.2e-03 | ≤ 3 |  |  | WRONG |",
        "| c | speed-up |  | ≥ 3 |  |  | ABSENT |",
    ]
    assert "abc and uncommitted changes" in page

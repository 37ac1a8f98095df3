"""Runs on disk, sweeps, tables, and every method behind one call."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import harness
from experiments.harness import METHODS, Balancer, Job, Metric, Run
from fastmtl import scalarization

STEPS = 12


def train(run, track=iter, stop=None):
    """A tiny training that draws from every generator; `stop` ends it as a kill would."""
    torch.manual_seed(run.settings["seed"])
    random.seed(run.settings["seed"])
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    start = run.restore(model=model, optimizer=optimizer)
    for step in track(range(start, STEPS)):
        if step == stop:
            return {}
        loss = (model(torch.randn(8, 3)) * random.random()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(step, loss=loss.item())
        if (step + 1) % 4 == 0:
            run.save(step + 1, model=model, optimizer=optimizer)
    return run.finish(weight=model.weight.tolist())


@pytest.mark.parametrize("stop", [2, 4, 7, 11])
def test_a_stopped_run_ends_like_one_that_was_not(tmp_path, stop):
    whole = train(Run(tmp_path / "whole", {"seed": 3}))
    assert train(Run(tmp_path / "stopped", {"seed": 3}), stop=stop) == {}
    assert Run(tmp_path / "stopped", {"seed": 3}).result is None
    assert train(Run(tmp_path / "stopped", {"seed": 3})) == whole
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert [int(row["step"]) for row in csv.DictReader(logs[0].splitlines())] == list(range(STEPS))
    assert train(Run(tmp_path / "other", {"seed": 4})) != whole


def test_a_folder_serves_one_run(tmp_path):
    Run(tmp_path, {"seed": 1, "lr": 0.1})
    Run(tmp_path, {"lr": 0.1, "seed": 1})
    with pytest.raises(ValueError, match=r"a run with \{'seed': 1\} is there, expected \{'seed': 2\}"):
        Run(tmp_path, {"seed": 2, "lr": 0.1})


def test_a_checkpoint_of_other_parts_is_named(tmp_path):
    model = nn.Linear(2, 2)
    Run(tmp_path, {}).save(1, model=model)
    with pytest.raises(ValueError, match=r"expected the state of \['encoder'\], got that of \['model'\]"):
        Run(tmp_path, {}).restore(encoder=model)


def test_a_half_written_row_is_dropped(tmp_path):
    run = Run(tmp_path, {})
    for step in range(3):
        run.log(step, a=step, b=1)
    run.save(3)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("3,7")
    assert run.restore() == 3
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,a,b", "0,0,1", "1,1,1", "2,2,1"]


@pytest.mark.parametrize("workers", [1, 2])
def test_sweep_does_what_is_not_done(tmp_path, workers):
    jobs = [Job(f"run-{seed}", {"seed": seed}) for seed in range(3)]
    done = train(Run(tmp_path / "run-1", {"seed": 1}))
    train(Run(tmp_path / "run-2", {"seed": 2}), stop=6)
    before = (tmp_path / "run-1" / "result.json").stat().st_mtime_ns
    results = harness.sweep(tmp_path, jobs, train, workers=workers)
    assert list(results) == ["run-0", "run-1", "run-2"]
    assert results["run-1"] == done
    assert (tmp_path / "run-1" / "result.json").stat().st_mtime_ns == before
    for seed in (0, 2):
        assert results[f"run-{seed}"] == train(Run(tmp_path / f"again-{seed}", {"seed": seed}))


SLEEPERS = """
import os, sys, time
from pathlib import Path
from experiments.harness import Job, sweep

def sleeper(run, track):
    (run.folder / "pid").write_text(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    sweep(Path(sys.argv[1]), [Job("a"), Job("b")], sleeper, workers=2)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed otherwise on this system")
def test_workers_end_with_a_killed_sweep(tmp_path):
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, script, tmp_path], env=env, stdout=subprocess.DEVNULL)
    pids = [tmp_path / name / "pid" for name in "ab"]
    try:
        assert eventually(lambda: all(path.exists() and path.read_text() for path in pids), 100)
    finally:
        parent.kill()
        parent.wait()
    for path in pids:
        assert eventually(lambda path=path: not running(int(path.read_text())), 30)


def eventually(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def running(pid):
    """A process that nobody waits for stays in the table as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_table(tmp_path):
    metrics = [Metric("accuracy", True, "a"), Metric("error", False, "b")]
    single = [{"accuracy": 0.8, "error": 2.0}, {"accuracy": 1.2, "error": 2.0}]
    table = harness.summarize(
        {"x": [{"accuracy": 0.5, "error": 1.0}, {"accuracy": 0.5, "error": 3.0}]}, metrics, single
    )
    row = table.rows["x"]
    assert row["accuracy ↑"] == (0.5, 0.0)
    assert row["error ↓"] == pytest.approx((2.0, 1.0))
    assert row["Δm % ↓"] == pytest.approx((25.0, 25.0))  # (50 - 50) / 2 and (50 + 50) / 2
    assert table.rows["single-task"]["accuracy ↑"] == pytest.approx((1.0, 0.2))
    table.write(tmp_path, {"quick": True})
    assert "| x | 0.50 ± 0.00 | 2.0 ± 1.0 | 25 ± 25 | 2 |" in (tmp_path / "table.md").read_text()
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["about"] == {"quick": True}
    assert content["rows"]["x"]["Δm % ↓"] == pytest.approx([25.0, 25.0])
    rows = list(csv.reader((tmp_path / "table.csv").read_text().splitlines()))
    assert rows[0] == ["method", "seeds", *(c + e for c in table.columns for e in ("", " error"))]
    assert float(rows[2][6]) == pytest.approx(25.0)
    assert str(harness.summarize({"x": single[:1]}, metrics).rows["x"]["error ↓"]) == "2"


@pytest.mark.parametrize("name", [*METHODS, "aligned@4", "nash@auto"])
def test_every_method_trains(name):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(3))
    balancer = Balancer(name, 3)
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters(), *balancer.parameters()], 0.02)
    x = torch.randn(64, 4)
    ys = [x[:, :1] * x[:, 1:2], x[:, 2:3].square(), x.sum(1, keepdim=True).sin()]

    def losses(h=None):
        h = encoder(x) if h is None else h
        return [(head(h) - y).square().mean() for head, y in zip(heads, ys, strict=True)]

    first = sum(losses()).item()
    for step in range(200):
        h = encoder(x)
        optimizer.zero_grad()
        info = balancer.backward(losses(h), encoder.parameters(), h)
        assert all(p.grad is not None for p in [*encoder.parameters(), *heads.parameters()])
        optimizer.step()
        balancer.after_step(lambda: [loss.detach() for loss in losses()])
        if step % 50 == 49:
            balancer.end_epoch()
    assert sum(losses()).item() < 0.7 * first
    without = isinstance(balancer.method, scalarization.Scalarization) or name == "graddrop" or bool(info.age)
    assert (info.gram is None) == without
    assert (info.age is None) == ("@" not in name)
    Balancer(name, 3).load_state_dict(balancer.state_dict())


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method: expected one of uniform, .*, got 'nosuch'"):
        Balancer("nosuch", 2)
    for name in ("aligned@", "aligned@often", "aligned@-1"):
        with pytest.raises(
            ValueError, match="method: expected aligned, aligned@K with a whole number K, or aligned@auto"
        ):
            Balancer(name, 2)

"""The toy problem: its formulas, methods in batches, the run and what was committed from it."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmtl

for package in ("typer", "rich", "matplotlib", "PIL"):
    pytest.importorskip(package, reason="needs the experiments extra: pip install 'fastmtl-torch[experiments]'")

from PIL import Image  # noqa: E402
from processes import kill_in, start  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from experiments.harness import METHODS, method_of  # noqa: E402
from experiments.toy import INITS, NAMES, losses, optimum, pareto_front  # noqa: E402
from experiments.toy.__main__ import app  # noqa: E402
from experiments.toy.methods import batched  # noqa: E402
from experiments.toy.problem import BOUND, gradients, task_weights  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "toy"
PAPER_A = (0.1, 0.25, 0.5, 0.75, 0.9)
LOSSES = [name for name in METHODS if method_of(name, 2).on_losses]


def toy(*arguments, check=True):
    """The command within this process, which has imported torch already."""
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    done = runner.invoke(app, [*map(str, arguments)], prog_name="python -m experiments.toy")
    assert not check or done.exit_code == 0, done.output
    return done


def points(count, seed=0):
    return torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 22 - 11


# The problem.


def by_hand(x1, x2):
    """The formulas of the module's docstring, one by one."""
    f1 = math.log(max(abs(0.5 * (-x1 - 7) - math.tanh(-x2)), 5e-6)) + 6
    f2 = math.log(max(abs(0.5 * (-x1 + 3) + math.tanh(-x2) + 2), 5e-6)) + 6
    g1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    g2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    c1, c2 = max(math.tanh(x2 / 2), 0), max(math.tanh(-x2 / 2), 0)
    return c1 * f1 + c2 * g1, c1 * f2 + c2 * g2


def test_losses_are_the_formulas():
    x = torch.cat([points(200), torch.tensor(INITS, dtype=torch.float64)])
    expected = torch.tensor([by_hand(*p) for p in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(losses(x), expected, rtol=1e-12, atol=1e-12)
    assert losses(torch.zeros(2)).tolist() == [0, 0]
    assert bool((losses(x) > BOUND).all())
    assert losses(x.float().reshape(5, 41, 2)).shape == (5, 41, 2)
    assert losses(x.float()).dtype == torch.float32


def test_the_bottom_of_a_valley_is_flat():
    x2 = torch.tensor([0.5, 2.0, 6.0], dtype=torch.float64)
    x = torch.stack([-7 + 2 * torch.tanh(x2), x2], -1)  # where |...| of f1 is zero
    L, G = gradients(x)
    torch.testing.assert_close(L[:, 0], torch.tanh(x2 / 2) * (math.log(5e-6) + 6))
    assert G[:, 0, 0].tolist() == [0, 0, 0]
    assert bool((G[:, 1, 0] != 0).all())


def test_gradients_are_differences():
    x, h = points(300, seed=1), 1e-6
    x = x[(x[:, 1].abs() > 0.1) & ((x[:, 0].abs() - 7).abs() > 2.5)]  # away from kinks and valleys
    assert len(x) > 100
    L, G = gradients(x)
    assert torch.equal(L, losses(x))
    assert not L.requires_grad
    for p in range(2):
        step = h * torch.eye(2, dtype=torch.float64)[p]
        numeric = (losses(x + step) - losses(x - step)) / (2 * h)
        torch.testing.assert_close(G[..., p], numeric, rtol=1e-6, atol=1e-7)
    assert gradients(x.float().reshape(-1, 1, 2))[1].shape == (len(x), 1, 2, 2)


def test_a_gradient_leads_away_from_the_origin():
    # The subgradient of `clamp` at its bound is 0 since torch 2.14: all would stay where it is.
    _, G = gradients(torch.zeros(2, dtype=torch.float64))
    f, g = math.log(3.5) + 6, (49 + 6.4) / 10 - 20
    expected = torch.tensor([[0.0, (f - g) / 2], [0.0, (f - g) / 2]], dtype=torch.float64)
    torch.testing.assert_close(G, expected)


def test_optimum():
    a = torch.tensor([0.0, *PAPER_A, 1.0], dtype=torch.float64)
    x = optimum(a)
    torch.testing.assert_close(x[:, 0], 7 * (2 * a - 1), rtol=0, atol=1e-6)
    L0 = (task_weights(a) * losses(x)).sum(-1)
    assert L0[3].item() == pytest.approx(-15.092, abs=5e-4)
    assert x[3, 1].item() == pytest.approx(-8.355, abs=5e-4)
    _, G = gradients(x)
    slope = (task_weights(a)[..., None] * G).sum(-2)
    assert slope.abs().max() < 1e-7  # with a curvature of 0.02 and more: L0 to far less than 1e-6
    axis = torch.linspace(-15, 15, 601, dtype=torch.float64)
    everywhere = losses(torch.cartesian_prod(axis, axis)) @ task_weights(a).T
    assert bool((everywhere.min(0).values >= L0 - 1e-12).all())


def test_pareto_front():
    x, L = pareto_front(201)
    torch.testing.assert_close(x[[0, -1], 0], torch.tensor([-7.0, 7.0], dtype=torch.float64), rtol=0, atol=1e-6)
    assert bool((L[1:, 0] < L[:-1, 0]).all())
    assert bool((L[1:, 1] > L[:-1, 1]).all())
    slopes = L.diff(dim=0)
    assert bool(((slopes[:, 1] / slopes[:, 0]).diff() < 0).all())  # convex: a reaches all of it
    axis = torch.linspace(-12, 12, 241, dtype=torch.float64)
    everywhere = losses(torch.cartesian_prod(axis, axis))
    dominates = (everywhere[:, None] <= L - 1e-9).all(-1)
    assert not dominates.any()


# The methods.


def problems(count=7, seed=0):
    """Losses as the methods get them, and gradients in conflict and out of it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, generator=generator) * 20, torch.randn(count, 2, 2, generator=generator)


def test_names():
    assert set(METHODS) - set(NAMES) == {"mgda-ub", "aligned-ub"}
    assert set(NAMES) - set(METHODS) == {"aligned-gram", "aligned-tight"}
    with pytest.raises(ValueError, match=r"method: expected one of uniform, .*, got 'mgda-ub'"):
        batched("mgda-ub", 3, 0)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in (*LOSSES, "rgw", "graddrop")])
def test_a_batch_is_its_problems_one_by_one(name):
    whole, single = batched(name, 7, seed=0), [batched(name, 1, seed=0) for _ in range(7)]
    for step in range(6):
        L, G = problems(seed=step)
        got = whole(L, G)
        for b, method in enumerate(single):
            torch.testing.assert_close(got[b], method(L[b, None], G[b, None])[0], rtol=1e-5, atol=1e-6)
    assert got.shape == (7, 2)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_balanced_as_by_an_instance_a_problem(name):
    """The trace of stacked states against the plain use of the library's modules."""
    whole, instances = batched(name, 4, seed=5), [method_of(name, 2) for _ in range(4)]
    for step in range(6):
        L, G = problems(4, seed=step)
        got = whole(L, G)
        if name == "rlw":  # drawn: a convex combination, another one for each problem
            alpha = torch.linalg.solve(G.mT.double(), got.double())
            torch.testing.assert_close(alpha.sum(-1), torch.ones(4, dtype=torch.float64), rtol=1e-4, atol=1e-4)
            assert bool((alpha > 0).all())
            assert len({round(x, 4) for x in alpha[:, 0].tolist()}) == 4
            continue
        for b, method in enumerate(instances):
            x = torch.zeros(2, requires_grad=True)
            both = (L[b] + G[b] @ x).unbind()
            method.after_step(lambda x=L[b]: x)
            method.zero_grad()
            if name == "gradnorm":
                method(both, x).backward()  # a layer of one dimension
            else:
                method.backward(both)
            method.end_epoch()
            torch.testing.assert_close(got[b], x.grad, rtol=1e-5, atol=1e-6)
            for all_of_them, p in zip(whole.learned, method.parameters(), strict=True):
                torch.testing.assert_close(all_of_them.grad[b], p.grad)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_goes_on_from_its_state(name):
    method, other = batched(name, 7, seed=3), batched(name, 7, seed=4)
    for step in range(4):
        method(*problems(seed=step))
    other.load_state_dict(method.state_dict())
    for step in range(4, 7):
        assert torch.equal(method(*problems(seed=step)), other(*problems(seed=step)))


def test_methods_that_agree_on_two_tasks():
    """What the docstring of `methods` says."""
    L, G = problems(50)
    names = ("imtl", "nash", "config", "fairgrad", "aligned")
    unit = {n: torch.nn.functional.normalize(batched(n, 50, 0)(L, G).double(), dim=-1) for n in names}
    for name in names[1:4]:
        torch.testing.assert_close(unit[name], unit["imtl"], rtol=0, atol=1e-4)
    pcgrad, upgrad = batched("pcgrad", 50, 0)(L, G), batched("upgrad", 50, 0)(L, G)
    torch.testing.assert_close(pcgrad, 2 * upgrad, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unit["aligned"], unit["imtl"], atol=1e-2)
    torch.testing.assert_close(batched("aligned", 50, 0)(L, G), fastmtl.AlignedMTL(weights=[1, 1])(G))


# The run.


def table_of(folder):
    with (folder / "ends.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check_the_paper(ends):
    """25 of 25 for Aligned-MTL; the end points of the uniform sum at a = 0.5."""
    aligned = [end for end in ends if end["method"] == "aligned"]
    assert {(tuple(end["init"]), end["a"]) for end in aligned} == {(init, a) for init in INITS for a in PAPER_A}
    assert len(aligned) == 25
    for end in aligned:
        assert -1e-9 < end["distance"] <= 1e-3, end
        assert end["x1"] == pytest.approx(7 * (2 * end["a"] - 1), abs=0.1)
    found = [(end["x1"], end["L0"]) for end in ends if end["method"] == "uniform" and end["a"] == 0.5]
    assert [x1 for x1, _ in found] == pytest.approx([-5.02, 0, 5.01, 0, 0], abs=0.05)
    assert [L0 for _, L0 in found[1::2]] == pytest.approx([-15.092] * 2, abs=1e-3)
    assert found[4][1] == pytest.approx(-15.092, abs=1e-3)
    # The first and third stay in a valley of f, where L0 after a step is anything above its bottom.
    assert all(0 < found[k][1] < 7 for k in (0, 2))


def check_consistent(ends):
    for end in ends:
        L1, L2 = by_hand(end["x1"], end["x2"])
        assert [end["L1"], end["L2"]] == pytest.approx([L1, L2], rel=1e-9, abs=1e-9)
        assert end["L0"] == pytest.approx(end["a"] * L1 + (1 - end["a"]) * L2, abs=1e-9)
        assert end["distance"] == pytest.approx(end["L0"] - end["L0*"], abs=1e-9)
        assert end["distance"] > -1e-9


@pytest.mark.skipif(not RESULTS.exists(), reason="a source release has no results")
def test_committed_results():
    content = json.loads((RESULTS / "ends.json").read_text())
    ends, about = content["ends"], content["about"]
    for end in ends:
        end["init"] = tuple(end["init"])
    assert about["steps"] == 35_000
    assert about["environment"]["torch"]
    runs = [(name, a, init) for name in NAMES for a in PAPER_A for init in INITS]
    assert [(end["method"], end["a"], end["init"]) for end in ends] == runs
    check_consistent(ends)
    check_the_paper(ends)
    table = (RESULTS / "table.md").read_text()
    assert "| aligned | 5 of 5 | 5 of 5 | 5 of 5 | 5 of 5 | 5 of 5 | 25 of 25 |" in table
    reached = {n: sum(e["distance"] <= 1e-3 for e in ends if e["method"] == n) for n in NAMES}
    assert all(f"| {n} |" in table and f"| {count} of 25 |" in table for n, count in reached.items())
    assert reached["aligned-tight"] < reached["aligned-gram"] < 25  # what the default rank rule is for
    assert max(reached, key=reached.get) == "aligned"
    rows = table_of(RESULTS)
    assert [float(row["L0"]) for row in rows] == pytest.approx([e["L0"] for e in ends], rel=1e-5)
    for name in ("trajectories", "weights", "ranks", "methods"):
        path = RESULTS / f"{name}.png"
        assert path.stat().st_size < 300_000
        with Image.open(path) as image:
            assert min(image.size) > 400


@pytest.mark.slow
def test_the_full_run_of_the_paper(tmp_path):
    """All 35 000 steps of Aligned-MTL and the uniform sum."""
    toy("--method", "aligned", "--method", "uniform", "--workers", 1, "--save-every", 5000, "--out", tmp_path)
    ends = json.loads((tmp_path / "ends.json").read_text())["ends"]
    for end in ends:
        end["init"] = tuple(end["init"])
    check_consistent(ends)
    check_the_paper(ends)
    assert "| aligned | 5 of 5 | 5 of 5 | 5 of 5 | 5 of 5 | 5 of 5 | 25 of 25 |" in (tmp_path / "table.md").read_text()


SMALL = ["--a", 0.3, "--a", 0.5, "--steps", 600, "--save-every", 50, "--workers", 1]
MIXED = [
    word for name in ("uncertainty", "famo", "gradvac", "rlw", "graddrop", "aligned") for word in ("--method", name)
]


@pytest.mark.smoke
def test_a_killed_run_ends_like_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    toy(*SMALL, *MIXED, "--out", whole, "--results", whole / "results")
    part = killed / "part-1-of-1"
    kill_in(start("toy", [*SMALL, *MIXED, "--out", killed]), part)
    toy(*SMALL, *MIXED, "--out", killed, "--results", killed / "results")
    for name in ("result.json", "log.csv"):
        assert (part / name).read_text() == (whole / "part-1-of-1" / name).read_text()
    with np.load(part / "trajectories.npz") as a, np.load(whole / "part-1-of-1" / "trajectories.npz") as b:
        assert a["points"].shape == (6, 2, 5, 61, 2)
        assert np.isfinite(a["points"]).all()
        np.testing.assert_array_equal(a["points"], b["points"])
    written = {p.name for p in (killed / "results").iterdir()}
    assert written == {"ends.csv", "ends.json", "table.md", "trajectories.png", "weights.png", "methods.png"}
    for name in ("ends.csv", "table.md"):
        assert (killed / "results" / name).read_text() == (whole / "results" / name).read_text()
    assert "reduced: 600 steps, the paper has 35000" in (killed / "results" / "table.md").read_text()
    rows = table_of(killed / "results")
    assert len(rows) == 6 * 2 * 5
    assert all(float(row["distance"]) > 0 for row in rows)


def test_what_is_drawn_does_not_depend_on_the_company(tmp_path):
    # Bits may differ: how a sum is rounded depends on where in a batch it stands.
    arguments = ["--a", 0.5, "--steps", 200, "--out"]
    toy("--method", "rlw", "--method", "rgw", "--method", "graddrop", "--workers", 2, *arguments, tmp_path / "two")
    toy("--method", "rgw", "--method", "rlw", "--workers", 1, *arguments, tmp_path / "one")
    two, one = ({(r["method"], r["init"]): r for r in table_of(tmp_path / name)} for name in ("two", "one"))
    assert len(one) == 10
    for key, row in one.items():
        for column in ("x1", "x2", "L0"):
            assert float(row[column]) == pytest.approx(float(two[key][column]), abs=1e-4)
    toy("--method", "rgw", "--method", "rlw", "--workers", 1, "--seed", 1, *arguments, tmp_path / "seed")
    assert [r["x1"] for r in table_of(tmp_path / "seed")] != [r["x1"] for r in table_of(tmp_path / "one")]


# The command.


def test_help():
    text = toy("--help").stdout
    for option in ("--method", "--a ", "--steps", "--seed", "--save-every", "--record-every", "--workers", "--out"):
        assert option in text
    assert "--results" in text
    assert "Figures 1 and 6" in text
    assert "35000" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nosuch"], "expected one of uniform, "),
        (["--method", "aligned-ub"], "got 'aligned-ub'"),
        (["--a", "1.5"], "expected a number in [0, 1], got 1.5"),
        (["--a", "nan"], "expected a number in [0, 1], got nan"),
        (["--a", "half"], "Invalid value for '--a'"),
        (["--steps", "0"], "Invalid value for '--steps'"),
        (["--workers", "0"], "Invalid value for '--workers'"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    done = toy(*arguments, "--out", tmp_path / "out", check=False)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings(tmp_path):
    toy("--method", "aligned", "--a", 0.5, "--steps", 5, "--out", tmp_path)
    done = toy("--method", "aligned", "--a", 0.5, "--steps", 6, "--out", tmp_path, check=False)
    assert done.exit_code == 2
    text = " ".join(done.output.replace("│", " ").split())
    assert "a run with {'steps': 5} is there, expected {'steps': 6}; choose another folder" in text

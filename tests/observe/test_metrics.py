"""Δm by hand, and every Δm that the paper prints, from the paper's own tables."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import F32, F64

from fastmtl.observe.metrics import delta_m

TABLES = json.loads((Path(__file__).parent / "data" / "paper_tables.json").read_text(encoding="utf-8"))["tables"]
PRINTED = [
    (table, method, weighting)
    for table, content in TABLES.items()
    for method, row in content["methods"].items()
    for weighting in row["delta_m"]
]
# The printed Δm that do not come out of the printed metrics and baselines, and what comes out of these: the paper
# computed them before it rounded. MSE 0.33 (Table 1), 0.28 and 0.68 (Table 2) and 0.0125 (Table 4) have two or three
# digits, so that Δm is known to about 1 percentage point in Table 1, 0.8 in Table 2 and 0.2 in Table 4.
ROUNDED = {
    ("1", "Uniform", "metric"): 14.003,
    ("1", "RLW", "metric"): 14.861,
    ("1", "DWA", "metric"): 12.812,
    ("1", "Uncertainty", "metric"): 1.153,
    ("1", "MGDA", "metric"): 20.447,
    ("1", "MGDA-UB", "metric"): 24.699,
    ("1", "GradNorm", "metric"): 5.939,
    ("1", "GradDrop", "metric"): 12.486,
    ("1", "PCGrad", "metric"): 9.357,
    ("1", "GradVac", "metric"): 12.889,
    ("1", "CAGrad", "metric"): 0.945,
    ("1", "IMTL", "metric"): 3.043,
    ("1", "Nash-MTL", "metric"): 9.250,
    ("1", "Aligned-MTL", "metric"): 0.088,
    ("1", "Aligned-MTL-UB", "metric"): -0.712,
    ("2", "Uniform", "metric"): 5.622,
    ("2", "Uniform", "task"): -0.829,
    ("2", "GradNorm", "metric"): 7.209,
    ("2", "GradNorm", "task"): 11.503,
    ("2", "GradVac", "metric"): 5.631,
    ("2", "GradVac", "task"): 0.294,
    ("2", "Nash-MTL", "metric"): -3.989,
    ("2", "Aligned-MTL", "metric"): -4.891,
    ("2", "Aligned-MTL", "task"): -8.344,
    ("2", "Aligned-MTL-UB", "metric"): -3.604,
    ("2", "Aligned-MTL-UB", "task"): -8.016,
    ("4", "Uniform", "metric"): 22.621,
    ("4", "GradNorm", "metric"): 5.638,
    ("4", "Aligned-MTL-UB", "metric"): 6.359,
}


def half_ulp(printed):
    """How far a printed number may be from the one that was rounded."""
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])


def column(table, name):
    return [metric[name] for metric in TABLES[table]["metrics"]]


def numbers(printed):
    return np.array([float(text) for text in printed]), np.array([half_ulp(text) for text in printed])


def tasks_for(table, weighting):
    return column(table, "task") if weighting == "task" else None


# ------------------------------------------------------------------------------------------------ the paper's tables


def test_the_tables_are_complete():
    assert {key: len(table["methods"]) for key, table in TABLES.items()} == {"1": 15, "2": 14, "3": 14, "4": 13}
    assert len(PRINTED) == 15 + 2 * 14 + 2 * 14 + 13
    for table in TABLES.values():
        rows = [table["single_task"], *(row["metrics"] for row in table["methods"].values())]
        assert {len(row) for row in rows} == {len(table["metrics"])}
        for digits in zip(*([len(text.partition(".")[2]) for text in row] for row in rows), strict=True):
            assert len(set(digits)) == 1  # a column is printed to as many digits throughout


@pytest.mark.parametrize(("table", "method", "weighting"), PRINTED)
def test_every_printed_delta_m(table, method, weighting):
    """Within the interval that the rounding of metrics, baselines and the printed Δm leaves open."""
    row, higher, tasks = (
        TABLES[table]["methods"][method],
        column(table, "higher_is_better"),
        tasks_for(table, weighting),
    )
    m, dm = numbers(row["metrics"])
    b, db = numbers(TABLES[table]["single_task"])
    printed, slack = float(row["delta_m"][weighting]), half_ulp(row["delta_m"][weighting])
    # Δm falls with m/b where higher is better and grows with it elsewhere: the ends of the interval are its corners.
    sign = np.where(higher, -1, 1)
    low = delta_m(m - sign * dm, b + sign * db, higher, tasks)
    high = delta_m(m + sign * dm, b - sign * db, higher, tasks)
    assert low <= delta_m(m, b, higher, tasks) <= high
    assert low - slack <= printed <= high + slack
    # Without the help of the intervals: most come out to the last digit, and the others are known.
    expected, limit = ROUNDED.get((table, method, weighting), printed), 0.005 + 1e-9
    if (table, method, weighting) in ROUNDED:
        limit = 0.0005 + 1e-9
        assert abs(expected - printed) > slack
    assert abs(delta_m(m, b, higher, tasks) - expected) <= limit


@pytest.mark.parametrize("table", TABLES)
def test_one_baseline_explains_a_whole_table(table):
    """Every row has the same single-task model behind it: some baseline that rounds to the printed one fits them all.

    In u = 1/B every bound is linear: 100 Σ_k s_k w_k ((m_k ± δ_k) u_k - 1) has to reach the printed interval.
    """
    from scipy.optimize import linprog

    higher = column(table, "higher_is_better")
    sign = np.where(higher, -1.0, 1.0)
    b, db = numbers(TABLES[table]["single_task"])
    K = len(b)
    rows, limits = [], []
    for method, weighting in ((m, w) for t, m, w in PRINTED if t == table):
        row = TABLES[table]["methods"][method]
        m, dm = numbers(row["metrics"])
        printed, slack = float(row["delta_m"][weighting]), half_ulp(row["delta_m"][weighting])
        # The weight of metric k, from delta_m itself: double it alone.
        tasks = tasks_for(table, weighting)
        share = np.abs([delta_m(np.where(np.arange(K) == k, 2.0, 1.0), np.ones(K), higher, tasks) for k in range(K)])
        constant = (share * sign).sum()
        rows += [share * (sign * m - dm), -share * (sign * m + dm)]
        limits += [printed + slack + constant, slack - printed - constant]
    bounds = list(zip(1 / (b + db), 1 / (b - db), strict=True))
    found = linprog(np.zeros(K), A_ub=np.array(rows), b_ub=np.array(limits), bounds=bounds)
    assert found.status == 0, found.message


def test_mgda_in_table_2():
    """From the printed baselines, and from those that CAGrad published with more digits."""
    m, _ = numbers(TABLES["2"]["methods"]["MGDA"]["metrics"])
    b, _ = numbers(TABLES["2"]["single_task"])
    higher, tasks = column("2", "higher_is_better"), column("2", "task")
    assert round(float(delta_m(m, b, higher)), 2) == 1.47
    assert round(float(delta_m(m, b, higher, tasks)), 2) == 1.79
    b[2:4] = 0.6754, 0.2780
    assert round(float(delta_m(m, b, higher)), 2) == 1.61
    assert round(float(delta_m(m, b, higher, tasks)), 2) == 2.00


@pytest.mark.parametrize("table", ["1", "4"])
def test_both_weightings_agree_where_tasks_have_as_many_metrics(table):
    b, _ = numbers(TABLES[table]["single_task"])
    higher, tasks = column(table, "higher_is_better"), column(table, "task")
    for row in TABLES[table]["methods"].values():
        m, _ = numbers(row["metrics"])
        assert delta_m(m, b, higher, tasks) == pytest.approx(delta_m(m, b, higher), rel=1e-12)


# ------------------------------------------------------------------------------------------------ by hand


def test_signs_and_weights():
    b = [10.0, 20.0, 5.0]
    assert delta_m([11.0, 20.0, 5.0], b, [True, True, True]) == pytest.approx(-10 / 3)
    assert delta_m([11.0, 20.0, 5.0], b, [False, True, True]) == pytest.approx(10 / 3)
    assert delta_m([11.0, 18.0, 5.0], b, [True, True, False], ["a", "b", "b"]) == pytest.approx((-10 + 10 / 2) / 2)
    assert delta_m([11.0, 18.0, 5.0], b, [True, True, False], [7, 7, 3]) == pytest.approx(0.0, abs=1e-12)
    assert delta_m([11.0, 18.0, 6.0], b, [True, True, False], torch.tensor([1, 0, 0])) == pytest.approx(
        (-10 + (10 + 20) / 2) / 2
    )
    assert delta_m(b, b, [True, False, True]) == 0.0


def test_a_batch_of_runs_of_any_kind():
    rows, b, higher = [[1.0, 4.0], [2.0, 2.0], [1.5, 3.0]], [2.0, 2.0], [True, False]
    expected = [75.0, 0.0, 37.5]
    for kind in (list, np.array, lambda x: np.array(x, dtype=np.float32)):
        got = delta_m(kind(rows), b, higher)
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float64
        assert got.tolist() == expected
    for dtype in (F32, F64):
        got = delta_m(torch.tensor(rows, dtype=dtype, requires_grad=True), torch.tensor(b), higher)
        assert got.dtype is F64
        assert not got.requires_grad
        assert got.tolist() == expected
    assert delta_m(np.array([rows, rows]), np.array(b), np.array(higher)).tolist() == [expected, expected]
    assert isinstance(delta_m([1, 4], [2, 2], higher), float)  # integers too
    assert delta_m(torch.tensor([1, 4]), b, higher).item() == 75.0
    assert math.isnan(delta_m([math.nan, 1.0], b, higher))


def test_refusals():
    m, b, higher = [1.0, 2.0], [1.0, 2.0], [True, False]
    with pytest.raises(ValueError, match=r"metrics: expected shape \[..., 2\] \(the number of baselines\), got \[3\]"):
        delta_m([1.0, 2.0, 3.0], b, higher)
    with pytest.raises(ValueError, match=r"metrics: expected shape \[..., 2\]"):
        delta_m(1.0, b, higher)
    for bad in ([], 3.0, [[1.0, 2.0]]):
        with pytest.raises(ValueError, match=r"baseline: expected shape \[K\] with K >= 1, got"):
            delta_m(m, bad, higher)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="baseline: expected positive, finite numbers, got"):
            delta_m(m, [1.0, bad], higher)
    with pytest.raises(ValueError, match=r"higher_is_better: expected 2 entries \(the number of metrics\), got 1"):
        delta_m(m, b, [True])
    with pytest.raises(TypeError, match="higher_is_better: expected bools, got"):
        delta_m(m, b, [1, -1])
    with pytest.raises(ValueError, match=r"tasks: expected 2 entries \(the number of metrics\), got 3"):
        delta_m(m, b, higher, ["a", "b", "c"])
    for bad in (["1", "2"], [[1.0], [1.0, 2.0]], None, torch.ones(2, dtype=torch.complex64), [1j, 2.0]):
        with pytest.raises(TypeError, match="metrics: expected"):
            delta_m(bad, b, higher)

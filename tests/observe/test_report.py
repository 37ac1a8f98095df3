"""What a Monitor gives to others: loggers, pandas, JSON, a live table, and a page in HTML."""

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import F64, randn

import fastmtl
from fastmtl import AlignedMTL, Info, diagnostics
from fastmtl.observe.monitor import Monitor
from fastmtl.observe.report import _POINTS, _thinned

TASKS = ("seg", "depth", "<normals>")


def trained(steps=6, **options):
    """A real run of named tasks, the third of which opposes the first."""
    torch.manual_seed(0)
    monitor, trunk = Monitor(**options), torch.nn.Linear(6, 5)
    for step in range(steps):
        h = trunk(randn(8, 6, seed=step))
        losses = {"seg": h.square().mean(), "depth": 50 * h[:, 0].square().mean(), "<normals>": (3 - h).square().mean()}
        info = AlignedMTL().backward(losses, shared=trunk)
        monitor(info, losses, step=10 * step)
    return monitor


# ------------------------------------------------------------------------------------------------ conflicts


def test_conflicts_and_mean_cosines():
    monitor, seen = Monitor(buffer=2), []
    for step in range(5):
        G = randn(4, 3, dtype=F64, seed=step)
        seen.append(diagnostics.cosines(G @ G.T).numpy())
        monitor(Info.of(gram=G @ G.T))
    np.testing.assert_allclose(monitor.cosines, np.mean(seen, 0), rtol=1e-12)
    np.testing.assert_allclose(monitor.history["initial/conflicts"], [(C < 0).sum() / 12 for C in seen], rtol=1e-12)
    again = Monitor()
    again.load_state_dict(monitor.state_dict())
    again(Info.of(gram=torch.full((4, 4), math.nan, dtype=F64)))  # counts for nothing
    np.testing.assert_allclose(again.cosines, monitor.cosines, rtol=1e-12)
    assert math.isnan(again.history["initial/conflicts"][-1])


def test_without_a_gram_there_are_no_cosines():
    monitor = Monitor()
    monitor(Info.of(alpha=torch.ones(2, dtype=F64)))
    assert monitor.cosines is None
    assert "initial/conflicts" not in monitor.history


# ------------------------------------------------------------------------------------------------ loggers


class WithStep:
    """As Weights & Biases."""

    def __init__(self):
        self.seen = []

    def log(self, data, step=None, commit=True):
        self.seen.append((step, data))


class WithoutStep(WithStep):
    def log(self, data):
        self.seen.append((data.pop("step"), data))


class Metrics(WithStep):
    """As Lightning's loggers, which have a `log` of another kind as well."""

    def log(self, name, value):
        raise AssertionError

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, metrics))


@pytest.mark.parametrize("kind", [WithStep, WithoutStep, Metrics])
def test_a_logger_gets_every_step_once(kind):
    logger = kind()
    monitor = trained(5, writer=logger, buffer=3, prefix="run")
    monitor.flush()
    monitor.flush()
    assert [step for step, _ in logger.seen] == [0, 10, 20, 30, 40]
    history = monitor.history
    for n, (_, numbers) in enumerate(logger.seen):
        assert all(type(x) is float for x in numbers.values())
        assert numbers["run/alpha/depth"] == history["alpha"][n, 1]
        assert numbers["run/initial/condition_number"] == history["initial/condition_number"][n]
    assert len(logger.seen[0][1]) == sum(values[0].size for name, values in history.items() if name != "step")


def test_no_logger():
    with pytest.raises(
        TypeError, match="writer: expected None or an object with add_scalar, log_metrics or log, got str"
    ):
        Monitor("runs/1")


# ------------------------------------------------------------------------------------------------ pandas and JSON


def test_a_data_frame():
    pytest.importorskip("pandas", reason="pandas is not installed")
    monitor = trained()
    frame = monitor.frame()
    assert frame.index.name == "step"
    assert frame.index.tolist() == [0, 10, 20, 30, 40, 50]
    assert {"alpha/seg", "losses/<normals>", "initial/min_cosine"} <= set(frame.columns)
    np.testing.assert_array_equal(frame["norms/depth"], monitor.history["norms"][:, 1])


def test_json(tmp_path):
    monitor = trained(4)
    text = monitor.to_json(tmp_path / "run.json")
    assert (tmp_path / "run.json").read_text() == text
    content = json.loads(text)
    assert content["tasks"] == list(TASKS)
    assert content["columns"]["step"] == [0, 10, 20, 30]
    assert content["columns"]["alpha/depth"] == monitor.history["alpha"][:, 1].tolist()


def test_json_of_gaps_and_groups():
    monitor = Monitor()
    for M in (torch.diag(torch.tensor([1.0, 0.0])), torch.full((2, 2), math.nan)):
        monitor(Info.of(gram=torch.stack([M.to(F64), torch.eye(2, dtype=F64)])))
    columns = json.loads(monitor.to_json())["columns"]
    assert columns["initial/max_norm_ratio/0"] == ["Infinity", None]
    assert columns["norms/1/1"] == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------ the page


class Page(HTMLParser):
    """Raises where tags are not closed in turn; keeps text, tags, and whatever would be loaded."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words, self.loaded = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_complete_in_itself(tmp_path):
    text = trained().report(tmp_path / "run.html", title="A & B")
    assert (tmp_path / "run.html").read_text() == text
    page = Page(text)
    assert page.loaded == []
    assert "script" not in page.tags
    assert "url(" not in text
    words = " ".join(page.words)
    for expected in (
        "A & B",
        "Condition number κ",
        "Task weights α",
        "Gradient norms",
        "Losses",
        "<normals>",
        "Mean cosine",
    ):
        assert expected in words
    assert page.tags.count("svg") == 6
    assert (
        page.tags.count("polyline") == 2 + 2 + 1 + 3 + 3 + 3
    )  # κ and cosines before and after, conflicts, a line a task


def test_the_numbers_at_the_top_are_those_of_the_run():
    monitor = trained()
    kappa = monitor.history["initial/condition_number"]
    text = monitor.report()
    assert f"<b>{np.median(kappa):.3g}</b><span>median condition number κ</span>" in text
    assert f"<b>{kappa[-1]:.3g}</b><span>κ at the end</span>" in text
    assert "<p>6 records, steps 0 to 50, by fastmtl.Monitor.</p>" in text
    assert "<p>1 record, step 0, by fastmtl.Monitor.</p>" in trained(steps=1).report()


def test_a_line_is_where_the_numbers_are():
    """The first chart, κ on a logarithmic axis: heights are affine in log κ, and κ after the alignment lies at 1."""
    monitor = trained()
    chart = monitor.report().partition("</svg>")[0]
    before, after = (
        np.array([[float(x) for x in point.split(",")] for point in points.split()])
        for points in re.findall(r'points="([^"]*)"', chart)
    )
    logs = np.log10(monitor.history["initial/condition_number"])
    slope, at_one = np.polyfit(logs, before[:, 1], 1)
    assert slope < 0
    np.testing.assert_allclose(before[:, 1], slope * logs + at_one, atol=0.1)
    np.testing.assert_allclose(after[:, 1], at_one, atol=0.2)
    assert (np.diff(before[:, 0]) > 0).all()


def test_gaps_groups_and_methods_without_a_gram():
    gaps = Monitor()
    for M in (torch.eye(2), torch.full((2, 2), math.nan), torch.eye(2), torch.eye(2)):
        gaps(Info.of(gram=M.to(F64)))
    chart = Page(gaps.report().partition("</svg>")[0].partition("<svg")[2].partition(">")[2])
    assert (chart.tags.count("circle"), chart.tags.count("polyline")) == (1, 1)  # a point before the gap, a line after
    groups = Monitor()
    M = torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, 100.0]))]).to(F64)
    for _ in range(2):
        groups(AlignedMTL().solve(M, torch.float32))
    assert "<b>10</b><span>median condition number κ</span>" in groups.report()
    plain = Monitor()
    plain(Info.of(alpha=torch.ones(2, dtype=F64)), [torch.tensor(1.0), torch.tensor(-2.0)])
    assert Page(plain.report()).tags.count("svg") == 2
    with pytest.raises(ValueError, match="monitor: expected at least one record, got none"):
        Monitor().report()


def test_many_tasks_and_steps_stay_small():
    monitor = Monitor(buffer=500)
    for step in range(3000):
        monitor(Info.of(alpha=torch.full((40,), step % 7 + 1.0, dtype=F64)))
    assert len(monitor.report()) < 800_000


def test_peaks_survive():
    x, y = np.arange(10_000.0), np.ones(10_000)
    y[4321], y[777] = 50, np.nan
    points, heights = _thinned(x, y)
    assert len(points) <= 2 * _POINTS
    assert heights.max() == 50
    assert (np.diff(points) > 0).all()


# ------------------------------------------------------------------------------------------------ the live table


def test_a_live_table():
    rich = pytest.importorskip("rich.console", reason="rich is not installed")
    screen = io.StringIO()
    console = rich.Console(file=screen, force_terminal=True, width=120)
    monitor, trunk = Monitor(), torch.nn.Linear(6, 5)
    with monitor.live(refresh=0, console=console):
        for step in range(4):
            h = trunk(randn(8, 6, seed=step))
            losses = {"[red]near": h.square().mean(), "far": (9 * h).square().mean() + h.mean()}
            monitor(fastmtl.UPGrad().backward(losses, shared=trunk), losses)
    shown = screen.getvalue()
    assert all(f"step {step}:" in shown for step in range(4))
    assert "[red]near" in shown
    assert f"κ {monitor.history['initial/condition_number'][-1]:.3g}" in shown
    many = Monitor()
    many(Info.of(alpha=torch.ones(100, dtype=F64)))
    with many.live(console=console):
        pass
    assert "and 60 tasks" in screen.getvalue()  # two lines, in a table as narrow
    before = len(screen.getvalue())
    losses = [trunk(randn(8, 6)).square().mean() * k for k in (1, 2)]
    monitor(fastmtl.UPGrad().backward(losses, shared=trunk), losses)
    assert len(screen.getvalue()) == before  # nobody looks any more


def test_without_rich_and_pandas():
    code = (
        "import sys; sys.modules['rich'] = sys.modules['rich.console'] = sys.modules['pandas'] = None\n"
        "from fastmtl.observe.monitor import Monitor\n"
        "for call in (Monitor().live, Monitor().frame):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "a live table needs rich: pip install 'fastmtl-torch[live]'",
        "a data frame needs pandas: pip install pandas",
    ]

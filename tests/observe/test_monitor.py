"""Monitor: what it keeps of a run, what it gives a writer, how a run goes on, and the paper's Fig. 4."""

import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from helpers import F32, F64, randn
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode

import fastmtl
from fastmtl import AlignedMTL, Info, diagnostics
from fastmtl.observe.figures import fig4
from fastmtl.observe.monitor import Monitor

matplotlib.use("agg")

ALIGNED = (
    "condition_number",
    "rank",
    "stable_rank",
    "min_cosine",
    "max_curvature_bound",
    "min_magnitude_similarity",
    "max_norm_ratio",
)


def gradients(step, T=4):
    """A system that changes from step to step; every third has dependent rows."""
    G = randn(T, 20, dtype=F64, seed=step) * torch.linspace(1, 5 + step, T, dtype=F64)[:, None] + 0.3
    if step % 3 == 2:
        G[0] = -G[1]
    return G


def aligned_info(step, T=4):
    G = gradients(step, T)
    return AlignedMTL().solve(G @ G.T, F32)


def other_info(step, T=4):
    """Of a method that has no rank, but a residual."""
    G = gradients(step, T)
    return Info.of(alpha=torch.linspace(1, 2, T, dtype=F64), gram=G @ G.T, residual=torch.tensor(1e-12 * step))


def losses(step, T=4):
    return list(randn(T, seed=100 + step))


def recorded(steps=7, info=aligned_info, **options):
    monitor = Monitor(**options)
    for step in range(steps):
        monitor.record(info(step), losses(step))
    return monitor


class Writer:
    """Keeps what it is given."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        assert type(value) is float
        assert type(step) is int
        self.scalars.append((tag, value, step))


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("buffer", [1, 3, 100])
@pytest.mark.parametrize("info", [aligned_info, other_info])
def test_history_is_the_diagnostics_of_every_step(info, buffer):
    history = recorded(info=info, buffer=buffer).history
    assert history["step"].tolist() == list(range(7))
    expected_keys = {"step", "norms", "alpha", "losses", "committed/norm", "committed/min_cosine"}
    for step in range(7):
        seen = info(step)
        bare = Info.of(gram=seen.gram, eigenvalues=seen.eigenvalues, rank=seen.rank)
        summary = diagnostics.summary(bare, F32)
        expected = {f"initial/{name}": value for name, value in summary.items()}
        expected["initial/conflicts"] = (diagnostics.cosines(seen) < 0).double().sum() / 12
        if info is aligned_info:
            aligned = diagnostics.summary(Info.of(gram=diagnostics.aligned_gram(seen), rank=seen.rank))
            expected |= {f"aligned/{name}": aligned[name] for name in ALIGNED}
        else:
            expected["residual"] = seen.residual
        expected |= {"norms": diagnostics.norms(seen), "alpha": seen.alpha, "losses": torch.stack(losses(step))}
        g = seen.alpha @ gradients(step)
        cosine = torch.nn.functional.cosine_similarity(gradients(step), g[None], dim=1).min()
        expected |= {"committed/norm": g.norm(), "committed/min_cosine": cosine}
        expected_keys |= expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(history[name][step], value.numpy(), rtol=1e-9, atol=1e-9, err_msg=name)
    assert history.keys() == expected_keys
    assert all(values.dtype == (np.int64 if name == "step" else np.float64) for name, values in history.items())


def test_the_aligned_system_is_stable_at_every_step():
    history = recorded().history
    assert (history["initial/condition_number"] > 1.5).all()
    np.testing.assert_allclose(history["aligned/condition_number"], 1.0, atol=1e-9)
    full = history["initial/rank"] == 4
    assert full.tolist() == [step % 3 != 2 for step in range(7)]
    np.testing.assert_allclose(history["aligned/min_cosine"][full], 0.0, atol=1e-9)
    np.testing.assert_allclose(history["aligned/max_norm_ratio"][full], 1.0, atol=1e-9)
    np.testing.assert_allclose(history["aligned/stable_rank"], history["initial/rank"], rtol=1e-9)


def test_every_and_steps():
    monitor = Monitor(every=3)
    for call in range(8):
        monitor(aligned_info(call), step=10 * call + 1)
    assert monitor.history["step"].tolist() == [1, 31, 61]
    assert recorded(8, every=3).history["step"].tolist() == [0, 3, 6]
    expected = [float(diagnostics.condition_number(aligned_info(call))) for call in (0, 3, 6)]
    np.testing.assert_allclose(monitor.history["initial/condition_number"], expected, rtol=1e-12)


def test_the_dtype_decides_the_rank_where_the_method_did_not():
    G = torch.stack([randn(30, dtype=F64), randn(30, dtype=F64) + 1e-5 * randn(30, dtype=F64, seed=1)])
    for dtype, expected in ((F32, 1), (F64, 2)):
        monitor = Monitor(dtype=dtype)
        monitor(Info.of(gram=G @ G.T))
        assert monitor.history["initial/rank"].tolist() == [expected]


def test_history_before_and_between_records():
    monitor = Monitor()
    assert {name: values.tolist() for name, values in monitor.history.items()} == {"step": []}
    for step in range(5):
        monitor(aligned_info(step), losses(step))
        assert len(monitor.history["step"]) == step + 1
    whole = recorded(5).history
    assert monitor.history.keys() == whole.keys()
    for name, values in monitor.history.items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-10, atol=1e-10)
    monitor.history["step"] = None  # a dict of its own
    assert monitor.history["step"].tolist() == list(range(5))


def test_buffers_that_are_written_to_again():
    """`fan_out(..., info=...)` overwrites one info at every step."""
    buffers, monitor = Info(4), Monitor()
    values = torch.zeros(4, dtype=F64)
    for step in range(4):
        seen = aligned_info(step)
        buffers.copy_(seen)
        values.fill_(step)
        monitor(buffers, values)
    assert monitor.history["losses"].tolist() == [[step] * 4 for step in range(4)]
    expected = np.stack([aligned_info(step).alpha.numpy() for step in range(4)])
    np.testing.assert_array_equal(monitor.history["alpha"], expected)


def test_non_finite_steps_are_gaps():
    monitor = Monitor()
    for step in range(3):
        M = aligned_info(step).gram
        if step == 1:
            M = M * torch.nan
        monitor(AlignedMTL().solve(M, F32))
    for name, values in monitor.history.items():
        gaps = np.isnan(values.reshape(3, -1)).all(1)
        assert gaps.tolist() == [False, name != "step", False], name


def test_a_real_run_through_backward_and_fan_out():
    monitors = Monitor(), Monitor()
    trunk, heads = torch.nn.Linear(6, 5), torch.nn.ModuleList(torch.nn.Linear(5, 1) for _ in range(3))
    for step in range(3):
        x = randn(8, 6, seed=step)
        task_losses = [head(trunk(x)).square().mean() * 10.0**t for t, head in enumerate(heads)]
        info = AlignedMTL().backward(task_losses, trunk.parameters())
        monitors[0](info, task_losses)
        hs = fastmtl.fan_out(trunk(x), tasks=3, method=AlignedMTL())
        task_losses = [head(h).square().mean() * 10.0**t for t, (head, h) in enumerate(zip(heads, hs, strict=True))]
        sum(task_losses).backward()
        monitors[1].record(hs.info, task_losses)
    for monitor in monitors:
        assert monitor.history["losses"].shape == (3, 3)
        assert (monitor.history["initial/max_norm_ratio"] > 10).all()
    np.testing.assert_allclose(monitors[0].history["losses"], monitors[1].history["losses"], rtol=1e-5)


@pytest.mark.parametrize("buffer", [1, 4, 100])
@pytest.mark.parametrize(("method", "first"), [(AlignedMTL, 0), (AlignedMTL, 2), (fastmtl.NashMTL, 0)])
def test_steps_between_two_solutions_are_gaps(method, first, buffer):
    """They have weights and losses; the run may begin with some, where another has ended."""
    monitor, method = Monitor(buffer=buffer), method()
    trunk, heads = torch.nn.Linear(6, 5), torch.nn.ModuleList(torch.nn.Linear(5, 1) for _ in range(3))
    alphas = []
    for step in range(7):
        h = trunk(randn(8, 6, seed=step))
        task_losses = [head(h).square().mean() for head in heads]
        info = method.backward(task_losses, trunk.parameters(), every=3)
        if step >= first:
            monitor(info, task_losses)
            alphas.append(info.alpha.numpy())
    history = monitor.history
    for name in history.keys() - {"step", "losses", "alpha"}:
        gaps = np.isnan(history[name].reshape(7 - first, -1)).all(1)
        assert gaps.tolist() == [step % 3 > 0 for step in range(first, 7)], name
    assert {"initial/condition_number", "committed/norm", "norms"} <= history.keys()
    assert np.isfinite(history["losses"]).all()
    np.testing.assert_array_equal(history["alpha"], np.stack(alphas))
    other = Monitor()
    other.load_state_dict(monitor.state_dict())
    other(info, task_losses)
    assert len(other.history["norms"]) == 8 - first
    assert "condition" in monitor.report()
    info = method.backward([head(trunk(randn(8, 6))).square().mean() for head in heads], trunk.parameters(), every=3)
    with pytest.raises(ValueError, match="got one of older weights"):
        fastmtl.diagnostics.condition_number(info)


def test_groups_add_a_dimension():
    M = torch.stack([aligned_info(0).gram, aligned_info(1).gram])
    monitor = Monitor()
    for _ in range(3):
        monitor(AlignedMTL().solve(M, F32), losses(0))
    history = monitor.history
    assert history["initial/condition_number"].shape == (3, 2)
    assert history["aligned/min_cosine"].shape == (3, 2)
    assert history["alpha"].shape == history["norms"].shape == (3, 2, 4)
    assert history["losses"].shape == (3, 4)
    for b in range(2):
        expected = float(diagnostics.condition_number(aligned_info(b)))
        np.testing.assert_allclose(history["initial/condition_number"][:, b], expected, rtol=1e-12)


def test_methods_without_a_gram_leave_what_they_have():
    monitor = Monitor()
    monitor(Info.of(alpha=torch.tensor([0.3, 0.7], dtype=F64)), [torch.tensor(1.0), torch.tensor(2.0)])
    assert {name: values.tolist() for name, values in monitor.history.items()} == {
        "step": [0],
        "alpha": [[0.3, 0.7]],
        "losses": [[1.0, 2.0]],
    }
    nothing = Monitor()
    nothing(Info.of())
    nothing(Info.of())
    assert {name: values.tolist() for name, values in nothing.history.items()} == {"step": [0, 1]}


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_recording_reads_no_value():
    writer = Writer()
    monitor = Monitor(writer, buffer=10)
    infos = [aligned_info(step) for step in range(10)]
    with _NoReads():
        for step, info in enumerate(infos[:9]):
            monitor(info, losses(step))
    assert writer.scalars == []
    monitor(infos[9], losses(9))
    assert {step for _, _, step in writer.scalars} == set(range(10))


# ------------------------------------------------------------------------------------------------ writers


def test_scalars_reach_the_writer_once():
    writer = Writer()
    monitor = recorded(7, writer=writer, buffer=3, prefix="run")
    assert {step for _, _, step in writer.scalars} == set(range(6))
    monitor.flush()
    monitor.flush()
    history = monitor.history
    expected = {("run/initial/condition_number", step): history["initial/condition_number"][step] for step in range(7)}
    expected |= {(f"run/losses/{t}", step): history["losses"][step, t] for t in range(4) for step in range(7)}
    got = {(tag, step): value for tag, value, step in writer.scalars}
    assert len(got) == len(writer.scalars)
    assert expected.items() <= got.items()
    assert len(got) == 7 * sum(values[0].size for name, values in history.items() if name != "step")


def test_reading_the_history_does_not_take_from_the_writer():
    writer = Writer()
    monitor = recorded(4, writer=writer)
    assert len(monitor.history["step"]) == 4
    assert writer.scalars == []
    monitor.flush()
    assert {step for _, _, step in writer.scalars} == set(range(4))


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        monitor = recorded(5, writer=writer)
        M = torch.stack([aligned_info(0).gram, aligned_info(1).gram])
        groups = Monitor(writer, prefix="groups")
        groups(AlignedMTL().solve(M, F32), step=9)
        monitor.flush()
        groups.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("initial/condition_number", "initial/min_cosine", "aligned/condition_number", "committed/norm"):
        scalars = events.Scalars(f"fastmtl/{name}")
        assert [scalar.step for scalar in scalars] == list(range(5))
        np.testing.assert_allclose([scalar.value for scalar in scalars], monitor.history[name], rtol=1e-6)
    np.testing.assert_allclose(
        [scalar.value for scalar in events.Scalars("fastmtl/losses/2")], monitor.history["losses"][:, 2], rtol=1e-6
    )
    (scalar,) = events.Scalars("groups/alpha/1/3")
    assert scalar.step == 9
    assert scalar.value == pytest.approx(groups.history["alpha"][0, 1, 3], rel=1e-6)


# ------------------------------------------------------------------------------------------------ going on


def test_a_run_that_was_stopped_goes_on(tmp_path):
    whole = recorded(9, every=2, buffer=4)
    writer = Writer()
    first = Monitor(writer, every=2, buffer=4)
    for step in range(5):
        first(aligned_info(step), losses(step))
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    assert {step for _, _, step in writer.scalars} == {0, 2, 4}
    again = Writer()
    second = Monitor(again, every=2, buffer=4)
    second.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    for step in range(5, 9):
        second(aligned_info(step), losses(step))
    second.flush()
    assert {step for _, _, step in again.scalars} == {6, 8}
    assert second.history.keys() == whole.history.keys()
    for name, values in second.history.items():
        np.testing.assert_allclose(values, whole.history[name], rtol=1e-10, atol=1e-10)
    same(first.history, {name: values[:3] for name, values in second.history.items()})


def test_loading_drops_what_was_recorded_and_shares_nothing():
    source, target = recorded(3), recorded(5, info=other_info)
    state = source.state_dict()
    target.load_state_dict(state)
    same(target.history, source.history)
    state["history"]["losses"].fill_(7)
    same(target.history, source.history)
    target(aligned_info(3), losses(3))
    assert target.history["step"].tolist() == [0, 1, 2, 3]
    assert source.history["step"].tolist() == [0, 1, 2]
    fresh = Monitor()
    fresh.load_state_dict(Monitor().state_dict())
    fresh(aligned_info(0))
    assert fresh.history["step"].tolist() == [0]


# ------------------------------------------------------------------------------------------------ the figure


def test_fig4_has_three_panels_with_a_line_a_run(tmp_path):
    monitors = {"Aligned-MTL": recorded(6), "other": recorded(9, info=other_info, every=2)}
    figure = fig4(monitors, tmp_path / "fig4.png")
    assert (tmp_path / "fig4.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(figure.axes) == 3
    names = ("condition_number", "min_magnitude_similarity", "min_cosine")
    for ax, name in zip(figure.axes, names, strict=True):
        assert [line.get_label() for line in ax.lines] == list(monitors)
        for line, monitor in zip(ax.lines, monitors.values(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), monitor.history["step"])
            np.testing.assert_array_equal(line.get_ydata(), monitor.history[f"initial/{name}"])
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "linear", "linear"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(monitors)


def test_plot_saves_returns_or_draws(tmp_path):
    monitor = recorded(4)
    assert isinstance(monitor.plot(), Figure)
    assert monitor.plot().axes[0].get_legend() is None
    monitor.plot(str(tmp_path / "one.svg"), label="run")
    assert "<svg" in (tmp_path / "one.svg").read_text()
    figure = Figure()
    axes = figure.subplots(3, 1)
    assert monitor.plot(axes, system="aligned") is figure
    assert [len(ax.lines) for ax in axes] == [1, 1, 1]
    np.testing.assert_array_equal(axes[2].lines[0].get_ydata(), monitor.history["aligned/min_cosine"])


def test_the_worst_group_is_drawn():
    M = torch.stack([aligned_info(0).gram, aligned_info(1).gram])
    monitor = Monitor()
    monitor(AlignedMTL().solve(M, F32))
    axes = monitor.plot().axes
    assert axes[0].lines[0].get_ydata() == monitor.history["initial/condition_number"].max(1)
    assert axes[1].lines[0].get_ydata() == monitor.history["initial/min_magnitude_similarity"].min(1)
    assert axes[2].lines[0].get_ydata() == monitor.history["initial/min_cosine"].min(1)


def test_gaps_and_infinities_can_be_drawn(tmp_path):
    monitor = Monitor()
    for M in (torch.eye(2), torch.zeros(2, 2), torch.full((2, 2), math.nan), torch.diag(torch.tensor([1.0, 0.0]))):
        monitor(Info.of(gram=M.to(F64)))
    monitor.plot(tmp_path / "gaps.png")
    assert monitor.history["initial/max_norm_ratio"].tolist()[3] == math.inf


def test_without_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from fastmtl.observe.monitor import Monitor\n"
        "try: Monitor().plot()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "plots need matplotlib: pip install 'fastmtl-torch[plot]'"


# ------------------------------------------------------------------------------------------------ refusals


def test_bad_options():
    for name in ("every", "buffer"):
        for value in (0, -1, 1.5, None):
            with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1, got {value}"):
                Monitor(**{name: value})


def test_bad_records():
    monitor = recorded(2)
    for bad in (None, torch.eye(3), {"gram": torch.eye(3)}):
        with pytest.raises(TypeError, match="info: expected an Info, got"):
            monitor(bad)
    for bad in (losses(0)[:3], torch.ones(5)):
        with pytest.raises(ValueError, match=r"losses: expected 4"):
            monitor(aligned_info(0), bad)
    for bad in ([1.0, 2.0, 3.0, 4.0], 3.0):
        with pytest.raises(TypeError, match=r"losses(\[0\])?: expected a"):
            monitor(aligned_info(0), bad)
    for info, given in ((aligned_info(0), None), (other_info(0), losses(0)), (aligned_info(0, 5), losses(0, 5))):
        with pytest.raises(ValueError, match=r"info: expected the fields of the first record, .*, got"):
            monitor(info, given)
    assert monitor.history["step"].tolist() == [0, 1]  # nothing of these is left


def test_bad_figures():
    with pytest.raises(ValueError, match='system: expected "initial" or "aligned", got \'last\''):
        recorded(2).plot(system="last")
    with pytest.raises(ValueError, match="monitors: expected at least one, got none"):
        fig4({})
    for monitor, system in ((Monitor(), "initial"), (recorded(2, info=other_info), "aligned")):
        with pytest.raises(ValueError, match=f"monitors: 'a' has no record of the {system} system's Gram matrix"):
            fig4({"a": monitor}, None, system)
    with pytest.raises(ValueError, match="target: expected a file or 3 axes, got 2 axes"):
        recorded(2).plot(Figure().subplots(1, 2))

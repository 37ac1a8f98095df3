"""fastmtl.integrations.torchjd: TorchJD's interfaces, TorchJD's results where TorchJD's are accurate."""

import copy
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    BF16,
    DTYPES,
    EPS,
    F32,
    F64,
    conditioned,
    contract,
    dtype_id,
    needs_ecos,
    randn,
    relative,
    svd_align,
)
from torch import nn

import fastmtl

theirs = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
for solver in ("clarabel", "cvxpy", "quadprog", "scipy"):
    pytest.importorskip(solver, reason=f"{solver}, which torchjd solves with, is not installed")
ours = importlib.import_module("fastmtl.integrations.torchjd")
our_scalars = importlib.import_module("fastmtl.integrations.torchjd.scalarization")
their_scalars = importlib.import_module("torchjd.scalarization")

from torchjd import Stateful  # noqa: E402
from torchjd.autogram import Engine  # noqa: E402
from torchjd.autojac import backward, jac_to_grad, mtl_backward  # noqa: E402
from torchjd.linalg import QuadprogProjector  # noqa: E402

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
T = 4
PREFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
# As close to exact as their solver goes.
SHARP = QuadprogProjector(norm_eps=0.0, reg_eps=1e-13)
# Aggregator, arguments, and the fastmtl method that it is.
METHODS = {
    "AlignedMTL": ((), fastmtl.AlignedMTL()),
    "AlignedMTL gram": (
        {"scale_mode": "rmse", "rank_rule": "gram"},
        fastmtl.AlignedMTL(weights=None, scale="rmse", rtol=None, rank_rule="gram"),
    ),
    "AlignedMTL preference": ((PREFERENCE, "median"), fastmtl.AlignedMTL(weights=PREFERENCE, scale="median")),
    "CAGrad": ((0.4,), fastmtl.CAGrad(c=0.4, rescale=0)),
    "ConFIG": ((PREFERENCE,), fastmtl.ConFIG(weights=PREFERENCE)),
    "Constant": ((PREFERENCE,), fastmtl.Uniform(weights=PREFERENCE)),
    "DualProj": ((PREFERENCE,), fastmtl.DualProj(weights=PREFERENCE, ridge=1e-4)),
    "FairGrad": ((2.0,), fastmtl.FairGrad(fairness=2.0)),
    "ExcessMTL": ((0.5, 1), fastmtl.ExcessMTL(step_size=0.5, warmup=1)),
    "GradDrop": ({"leak": PREFERENCE}, fastmtl.GradDrop(leak=PREFERENCE)),
    "GradVac": ((0.3,), fastmtl.GradVac(beta=0.3)),
    "IMTLG": ((), fastmtl.IMTL()),
    "Krum": ((1, 2), fastmtl.Krum(byzantine=1, selected=2, squared=False)),
    "MGDA": ((), fastmtl.MGDA()),
    "Mean": ((), fastmtl.Uniform()),
    "NashMTL": ((T, 0.7), fastmtl.NashMTL(max_norm=0.7)),
    "PCD": ((0.1,), fastmtl.PCD(tau=0.1)),
    "PCGrad": ((), fastmtl.PCGrad()),
    "Random": ((), fastmtl.RLW()),
    "Sum": ((), fastmtl.Uniform(weights="sum")),
    "TrimmedMean": ((1,), fastmtl.TrimmedMean(trim=1)),
    "UPGrad": ((), fastmtl.UPGrad(ridge=1e-4)),
}
RANDOM = ("GradDrop", "GradVac", "PCGrad", "Random")
NO_WEIGHTS = ("GradDrop", "TrimmedMean")
ALL_ROWS = ("ExcessMTL",)  # whose weighting takes the Jacobian
# What is TorchJD's alone: what its aggregators, weightings and scalarizers are derived from, as ours are.
BASES = {"Aggregator", "GramianWeightedAggregator", "Scalarizer", "WeightedAggregator", "Weighting"}
AGGREGATORS = [name for name in ours.__all__ if not name.endswith("Weighting") and name != "Engine"]
methods = pytest.mark.parametrize("name", METHODS)


def make(name, module=ours, suffix=""):
    options = METHODS[name][0]
    kind = getattr(module, name.partition(" ")[0] + suffix)
    return kind(**options) if isinstance(options, dict) else kind(*options)


def opposed(T, P, seed=0, dtype=F64):
    """Gradients some of which are in conflict, as in the tests of the solvers."""
    G = randn(T, P, dtype=dtype, seed=seed) + 0.1
    G[::3] -= 0.4
    return G


# ------------------------------------------------------------------------------------------------ the interface


@pytest.mark.parametrize("name", [name for name in ours.__all__ if hasattr(theirs, name)])
def test_the_same_arguments(name):
    mine, its = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
    mine = dict(mine)
    if name.startswith("AlignedMTL"):
        assert mine.pop("rank_rule").kind is inspect.Parameter.KEYWORD_ONLY
    assert list(mine) == list(its)
    for argument in mine:
        assert mine[argument].kind == its[argument].kind
        if argument != "f":
            assert mine[argument].default == its[argument].default


def test_which_classes_there_are():
    extra = {"ConFIGWeighting", "NashMTLWeighting", "Engine"}
    assert {name for name in ours.__all__ if not hasattr(theirs, name)} == extra
    assert {name.partition(" ")[0] for name in METHODS} == set(AGGREGATORS)
    assert set(theirs.__all__) - BASES == set(ours.__all__) - extra
    assert set(their_scalars.__all__) - BASES == set(our_scalars.__all__)


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_ecos if n == "NashMTL" else ()) for n in METHODS])
def test_kinds(name):
    mine = make(name)
    its = getattr(theirs, name.partition(" ")[0])
    for kind in (theirs.Aggregator, theirs.WeightedAggregator, theirs.GramianWeightedAggregator, Stateful):
        assert isinstance(mine, kind) >= issubclass(its, kind)
    if isinstance(mine, theirs.WeightedAggregator):
        assert isinstance(make(name, suffix="Weighting"), theirs.Weighting)
    assert type(mine).__name__ == name.partition(" ")[0]
    if name != "AlignedMTL gram":  # which TorchJD's is not
        its = make(name, theirs)
        assert str(mine) == str(its)
        if name != "GradDrop":  # whose default `f` is TorchJD's own function
            assert repr(mine).replace("ActiveSetProjector", "QuadprogProjector") == repr(its)
    copied = copy.deepcopy(mine)
    G = randn(T, 9, dtype=F64)
    torch.manual_seed(1)
    one = mine(G)
    torch.manual_seed(1)
    assert torch.equal(one, copied(G))


def test_options_are_attributes():
    mine = ours.AlignedMTL(scale_mode="median")
    assert mine.pref_vector is None
    assert repr(mine) == "AlignedMTL(pref_vector=None, scale_mode='median')"
    assert repr(ours.AlignedMTL(rank_rule="gram")).endswith(", rank_rule='gram')")
    mine.pref_vector = PREFERENCE
    assert mine.gramian_weighting.pref_vector is PREFERENCE
    G = randn(T, 20, dtype=F64)
    assert relative(mine(G), fastmtl.AlignedMTL(weights=PREFERENCE, scale="median")(G)) <= 1e-14
    with pytest.raises(ValueError, match="scale_mode"):
        mine.scale_mode = "max"
    assert mine.scale_mode == "median"
    mean = ours.Constant(PREFERENCE)
    mean.weights = torch.ones(T)
    assert torch.allclose(mean(G), G.sum(0))
    assert repr(ours.CAGrad(0.5)) == repr(theirs.CAGrad(0.5)) == "CAGrad(c=0.5, norm_eps=0.0001)"
    assert repr(ours.KrumWeighting(1)) == "KrumWeighting(n_byzantine=1, n_selected=1)"
    drop = ours.GradDrop()
    drop.leak = torch.ones(T)
    assert torch.allclose(drop(G), G.sum(0))


@methods
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_is_the_method_of_fastmtl(name, dtype):
    G = conditioned(T, 40, 30.0, dtype=dtype, seed=2)
    mine, method = make(name), METHODS[name][1]
    torch.manual_seed(3)
    got = mine(G)
    if name in RANDOM:
        torch.manual_seed(3)
    if hasattr(method, "reset"):
        method.reset()
    assert got.dtype is dtype
    assert relative(got, method(G).to(F64)) <= (1e-12 if dtype is F64 else 2e-6 if dtype is F32 else 2 * EPS[dtype])


@pytest.mark.parametrize("name", [name for name in METHODS if name not in (*NO_WEIGHTS, *ALL_ROWS)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)
def test_weights(name, dtype):
    G = conditioned(T, 40, 10.0, dtype=dtype, seed=4)
    torch.manual_seed(3)
    weights = make(name, suffix="Weighting")(G @ G.T)
    torch.manual_seed(3)
    aggregated = make(name)(G)
    assert weights.dtype is dtype
    assert weights.shape == (T,)
    assert relative(weights @ G, aggregated.to(F64)) <= (1e-11 if dtype is F64 else 1e-4)


def test_rounds_once():
    """The weights in float32, which is how hooks and `jac_to_grad` get them, would miss what is promised."""
    G = conditioned(3, 3000, 1e3)
    mine, exact = ours.AlignedMTL(), svd_align(G)
    assert relative(mine(G), exact) <= 1e-7
    weights = mine.weighting(G)
    assert weights.dtype is F32
    assert relative(weights.double() @ G.double(), exact) > contract(3, 1e3)
    mine.weighting.register_forward_hook(lambda _module, _inputs, weights: 2 * weights)
    assert relative(mine(G), 2 * exact) <= 1e-4
    assert relative(ours.AlignedMTL()(G), exact) <= 1e-7


def test_hooks_see_what_they_see_at_torchjd():
    seen = []
    mine = ours.UPGrad()
    mine.gramian_weighting.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs))
    mine.register_forward_hook(lambda _module, inputs, output: seen.append((*inputs, output)))
    G = randn(T, 5)
    g = mine(G)
    ((M,), (matrix, output)) = seen
    assert torch.allclose(M, G.double() @ G.double().T)
    assert matrix is G
    assert output is g


# ------------------------------------------------------------------------------------------------ the same results

CLOSED = (
    "AlignedMTL gram",
    "ConFIG",
    "Constant",
    "ExcessMTL",
    "Krum",
    "Mean",
    "Random",
    "Sum",
    "TrimmedMean",
)


def their_version(name):
    if name == "AlignedMTL gram":
        return theirs.AlignedMTL(scale_mode="rmse")
    return make(name, theirs)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("scale", [0.0, 1e-10, 1.0, 1e10, 1e15])
@pytest.mark.parametrize("P", [1, 3, 60])
def test_closed_forms(name, scale, P):
    for rank in (1, 2, T):
        G = scale * (randn(T, rank, dtype=F64, seed=P) @ randn(rank, P, dtype=F64, seed=rank))
        torch.manual_seed(7)
        got = make(name)(G)
        torch.manual_seed(7)
        assert relative(got, their_version(name)(G)) <= 1e-8, rank


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("shape", [(2, 2), (4, 60), (9, 30)])
def test_imtl(scale, shape):
    """Independent gradients: with others the pseudo-inverses are of different matrices."""
    G = scale * randn(*shape, dtype=F64, seed=shape[0])
    assert relative(ours.IMTLG()(G), theirs.IMTLG()(G)) <= 1e-9


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(("m", "n", "rank"), [(2, 3, 2), (5, 200, 5), (6, 40, 3), (12, 5, 5), (3, 20, 1)])
def test_projections(scale, m, n, rank):
    G = scale * (randn(m, rank, dtype=F64, seed=m) @ randn(rank, n, dtype=F64, seed=n)) / rank
    w = torch.linspace(0.5, 1.5, m, dtype=F64)
    for name in ("UPGrad", "DualProj"):
        mine, its = getattr(ours, name), getattr(theirs, name)
        for preference in (None, w):
            for projector in (QuadprogProjector(norm_eps=0.0), SHARP):
                got, expected = mine(preference, projector)(G), its(preference, projector)(G)
                assert (got - expected).norm() <= 1e-5 * G.norm(), name
        exact = mine(None, QuadprogProjector(reg_eps=0.0))(G)
        assert (exact - mine(None, SHARP)(G)).norm() <= 1e-5 * G.norm()
        assert torch.equal(exact, getattr(fastmtl, name)()(G))


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(("m", "n"), [(2, 3), (5, 200), (10, 200)])
@pytest.mark.parametrize("c", [0.0, 0.5, 2.0])
def test_cagrad(scale, m, n, c):
    G = scale * opposed(m, n, seed=m)
    got, expected = ours.CAGrad(c)(G), theirs.CAGrad(c, norm_eps=0.0)(G)
    # Its tolerance; what both maximise is flat there.
    assert relative(got, expected) <= 2e-3
    worst = ((G @ got).min() - (G @ expected).min()) / G.square().sum(1).max()
    assert -1e-9 <= worst <= 1e-5


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(("m", "n"), [(2, 3), (4, 30), (10, 20)])
def test_mgda(scale, m, n):
    """Their steps end before the minimum: never shorter, and near."""
    G = scale * (randn(m, n, dtype=F64, seed=m) + 0.5)
    got, expected = ours.MGDA()(G), theirs.MGDA(epsilon=1e-7, max_iters=5000)(G)
    assert got.norm() <= expected.norm() * (1 + 1e-12)
    assert relative(got, expected) <= 0.05


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_fairgrad(alpha):
    for seed in range(3):
        G = randn(5, 20, dtype=F64, seed=seed) / 20**0.5
        assert relative(ours.FairGrad(alpha)(G), theirs.FairGrad(alpha)(G)) <= 1e-4


@needs_ecos
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_nash(max_norm, seed):
    """Near scale one, and before its solver starts from an earlier solution, theirs is accurate."""
    mine, its = (module.NashMTL(T, max_norm, 2) for module in (ours, theirs))
    G, other = randn(2, T, 20, dtype=F64, seed=seed)
    assert relative(mine(G), its(G)) <= 1e-6
    assert relative(mine(other), its(other)) <= 1e-6  # the same weights once more
    assert relative(mine(other), ours.NashMTL(T, max_norm)(other)) <= 1e-14
    assert relative(mine(G), ours.NashMTL(T, max_norm)(G)) > 1e-3
    mine.reset()
    assert relative(mine(G), ours.NashMTL(T, max_norm)(G)) <= 1e-14


# What TorchJD makes of rows that are zero: arguments, and whether its weights of these rows are defined.
ZERO_ROWS = {
    "AlignedMTL": ((), True),
    "CAGrad": ((0.5,), True),
    "CAGrad 0": ((0.0,), True),
    "ConFIG": ((), False),  # it has no weights
    "Constant": ((torch.linspace(0.1, 0.5, 5, dtype=F64),), True),
    "DualProj": ((), True),
    "DualProj preference": ((torch.linspace(0.1, 0.5, 5, dtype=F64),), True),
    "FairGrad": ((1.0,), False),  # wherever its solver ends
    "FairGrad 2": ((2.0,), False),
    "FairGrad 0": ((0.0,), True),
    "GradVac": ((), True),
    "IMTLG": ((), True),
    "Krum": ((1,), True),
    "Krum 2": ((0, 2), True),
    "MGDA": ((), True),
    "Mean": ((), True),
    "PCGrad": ((), True),
    "Sum": ((), True),
    "UPGrad": ((), True),
    "UPGrad preference": ((torch.linspace(0.1, 0.5, 5, dtype=F64),), True),
}


@pytest.mark.parametrize("zero", [(1,), (0, 3), (0, 1, 2, 4), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", ZERO_ROWS)
def test_zero_rows(name, zero):
    """To fastmtl such a task is absent; here it is what it is to TorchJD, down to its weight."""
    arguments, has_weights = ZERO_ROWS[name]
    kind = name.partition(" ")[0]
    if kind in ("PCGrad", "GradVac"):
        zero = tuple({*zero, *((2, 4) if len(zero) < 3 else ())})  # of two other rows there is one order
    mine, its = getattr(ours, kind)(*arguments), getattr(theirs, kind)(*arguments)
    weights = {}
    for who, aggregator in (("mine", mine), ("its", its)):
        aggregator.weighting.register_forward_hook(lambda m, i, o, who=who: weights.setdefault(who, o))
    for seed in range(2):
        G = randn(5, 20, dtype=F64, seed=seed)
        G[list(zero)] = 0
        weights.clear()
        expected = its(G)
        assert relative(mine(G), expected) <= 1e-5
        if has_weights and not (kind == "AlignedMTL" and len(zero) == 5):  # the mean of nothing, or nothing
            torch.testing.assert_close(weights["mine"], weights["its"], rtol=1e-5, atol=1e-6)
    broken = torch.where(torch.arange(5)[:, None] == 3, torch.nan, G)
    assert mine(broken).isnan().all()


@needs_ecos
@pytest.mark.filterwarnings("ignore")
def test_zero_rows_of_nash():
    """They leave the weights as they were, at first all alike: TorchJD's solver fails on them."""
    mine, its = ours.NashMTL(5), theirs.NashMTL(5)
    for seed, zero in enumerate((True, False, True, True)):
        G = randn(5, 20, dtype=F64, seed=seed)
        if zero:
            G[seed % 5] = 0
        assert relative(mine(G), its(G)) <= 1e-6
    first = ours.NashMTL(5)(torch.where(torch.arange(5)[:, None] == 1, 0, G))
    G[1] = 0
    assert relative(first, G.sum(0) / G.sum(0).norm()) <= 1e-12
    assert not ours.NashMTL(5)(torch.zeros(5, 9)).any()


def test_two_tasks_in_conflict():
    """PCGrad and GradVac draw their own orders: of two tasks there is one."""
    mine, its = ours.GradVac(0.3), theirs.GradVac(0.3, eps=0.0)
    for seed in range(6):
        G = randn(2, 4, dtype=F64, seed=seed)
        assert relative(mine(G), its(G)) <= 1e-12
        assert relative(ours.PCGrad()(G), theirs.PCGrad()(G)) <= 1e-12


@pytest.mark.parametrize("leak", [None, PREFERENCE])
def test_graddrop_draws_as_often(leak):
    columns = 4000
    G = randn(T, 5, dtype=F64, seed=3)
    wide = G.repeat(1, columns)
    means = [module.GradDrop(leak=leak)(wide).reshape(columns, 5) for module in (ours, theirs)]
    # Both take the same two values in every coordinate ...
    for mine, its in zip(*(x.T for x in means), strict=True):
        assert torch.allclose(mine.unique(), mine.unique()[[0, -1]])
        assert torch.allclose(mine.aminmax().min, its.aminmax().min)
        assert torch.allclose(mine.aminmax().max, its.aminmax().max)
    # ... as often.
    error = (sum(x.var(0) for x in means) / columns).sqrt()
    assert ((means[0].mean(0) - means[1].mean(0)).abs() <= 4 * error + 1e-12).all()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in RANDOM])
def test_order_of_tasks(name):
    if name == "PCD":  # whose first row is another than the rest
        return
    if name in ("AlignedMTL preference", "ConFIG", "Constant", "DualProj"):
        kind, order = getattr(ours, name.partition(" ")[0]), torch.tensor([2, 0, 3, 1])
        one, other = kind(PREFERENCE), kind(PREFERENCE[order])
    else:
        one, other, order = make(name), make(name), torch.tensor([2, 0, 3, 1])
    G = opposed(T, 30, seed=8)
    assert relative(one(G), other(G[order])) <= 1e-10


@pytest.mark.parametrize("name", ["UPGrad", "Mean", "Sum", "Constant"])
def test_linear_under_scaling(name):
    """TorchJD's property: A(diag(c) G) is linear in c > 0 (to its `reg_eps`, hence none)."""
    G = opposed(T, 30, seed=9)
    mine = ours.UPGrad(projector=QuadprogProjector(reg_eps=0.0)) if name == "UPGrad" else make(name)
    c, d = torch.rand(2, T, 1, dtype=F64) + 0.1
    assert relative(2 * mine(c * G) + mine(d * G), mine((2 * c + d) * G)) <= 1e-10


def test_rank_rules():
    """One task is 1e9 times the others: for TorchJD's rule they vanish."""
    G = conditioned(T, 30, 2.0, dtype=F64)
    G[1] *= 1e9
    assert relative(ours.AlignedMTL(rank_rule="gram")(G), theirs.AlignedMTL()(G)) <= 1e-8
    assert relative(ours.AlignedMTL()(G), svd_align(G)) <= 1e-7
    assert relative(ours.AlignedMTL()(G), theirs.AlignedMTL()(G)) > 0.9


def test_small_gradients():
    """What docs/migration.md says of TorchJD's thresholds, and that there are none here."""
    G = opposed(T, 30, seed=8)
    small = G * (5e-3 / G.norm())
    assert relative(theirs.UPGrad()(small), small.mean(0)) <= 1e-12
    assert not theirs.CAGrad(0.5)(small).any()
    for mine in (ours.UPGrad(), ours.CAGrad(0.5)):
        assert relative(mine(small) * (G.norm() / 5e-3), mine(G)) <= 1e-12
    assert relative(ours.UPGrad()(small), small.mean(0)) > 0.02


# ------------------------------------------------------------------------------------------------ state


def test_state_is_saved():
    mine, other = ours.GradVac(0.3), ours.GradVac(0.3)
    for step in range(3):
        mine(opposed(T, 6, seed=step))
    other.load_state_dict(mine.state_dict())
    G = opposed(T, 6, seed=9)
    results = []
    for aggregator in (mine, other, ours.GradVac(0.3)):
        torch.manual_seed(1)
        results.append(aggregator(G))
    assert torch.equal(results[0], results[1])
    assert relative(results[0], results[2]) > 1e-3
    mine.beta = 1.0  # forgets nothing
    targets = mine.gramian_weighting.method.targets
    assert torch.equal(targets, other.gramian_weighting.method.targets)
    mine(opposed(3, 6))
    assert mine.gramian_weighting.method.targets.shape == (3, 3)
    mine.reset()
    assert mine.state_dict() == {}
    nash = ours.NashMTL(T, update_weights_every=3)
    nash(G)
    copied = ours.NashMTL(T, update_weights_every=3)
    copied.load_state_dict(nash.state_dict())
    assert torch.equal(copied(opposed(T, 6)), nash(opposed(T, 6)))


# ------------------------------------------------------------------------------------------------ training

TRAINED = {
    "UPGrad": ((), {}),
    "AlignedMTL": ((), {}),
    "CAGrad": ((0.5,), {}),
    "ConFIG": ((), {}),
}


def model_and_data():
    gen = torch.Generator().manual_seed(11)
    torch.manual_seed(11)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double()
    heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3)).double()
    x = torch.randn(10, 6, dtype=F64, generator=gen)
    ys = [k * torch.randn(10, 1, dtype=F64, generator=gen) for k in (0.5, 1.0, 3.0)]
    return encoder, heads, x, ys


def run(step):
    """The losses of 50 steps; `step` leaves gradients and returns the losses."""
    encoder, heads, x, ys = model_and_data()
    optimizer = torch.optim.SGD([*encoder.parameters(), *heads.parameters()], lr=0.05)
    trace = []
    for _ in range(50):
        optimizer.zero_grad()
        trace.append(step(encoder, heads, x, ys).detach())
        optimizer.step()
    assert trace[-1].sum() < 0.99 * trace[0].sum()
    return torch.stack(trace)


def losses_of(features, heads, ys):
    return [nn.functional.mse_loss(head(features), y) for head, y in zip(heads, ys, strict=True)]


def by_backward(aggregator, **options):
    def step(encoder, heads, x, ys):
        losses = losses_of(encoder(x), heads, ys)
        backward(losses)
        jac_to_grad([*encoder.parameters(), *heads.parameters()], aggregator, **options)
        return torch.stack(losses)

    return step


def by_mtl_backward(aggregator, **options):
    def step(encoder, heads, x, ys):
        features = encoder(x)
        losses = losses_of(features, heads, ys)
        mtl_backward(losses, features=features)
        weights = jac_to_grad(encoder.parameters(), aggregator, **options)
        assert weights is None or (weights.shape, weights.dtype) == ((3,), F64)
        return torch.stack(losses)

    return step


@pytest.mark.cover(1)
@pytest.mark.parametrize("step", [by_backward, by_mtl_backward])
@pytest.mark.parametrize("name", TRAINED)
def test_trains_alike(name, step):
    mine, its = (run(step(getattr(module, name)(*TRAINED[name][0]))) for module in (ours, theirs))
    assert (mine - its).abs().max() <= 1e-4 * its.max()


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the tests run without the source tree")
def test_the_documented_example(monkeypatch):
    """One line of TorchJD's own example changes, and the losses of 50 steps stay; the mean's would not."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    torchjd_example = importlib.import_module("torchjd_example")

    def losses(names):
        step = names["training"](F64)
        return torch.stack([step() for _ in range(50)])

    its = losses(vars(torchjd_example))
    assert (losses(torchjd_example.variant()) - its).abs().max() <= 1e-6
    mean = losses(torchjd_example.variant("from torchjd.aggregation import Mean as UPGrad"))
    assert (mean - its).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["UPGrad", "AlignedMTL"])
def test_trains_alike_without_concatenation(name):
    aggregator = getattr(ours, name)
    mine = run(by_mtl_backward(aggregator(), optimize_gramian_computation=True))
    assert (mine - run(by_mtl_backward(aggregator()))).abs().max() <= 1e-8


@pytest.mark.parametrize("name", ["UPGrad", "AlignedMTL"])
def test_trains_alike_on_gramians(name):
    """Instance-wise: one loss per sample, weights from the engine's Gramian [10, 10]."""

    def by_engine(weighting):
        engines = {}

        def step(encoder, heads, x, ys):
            if not engines:
                engines[0] = Engine(encoder, heads[0], batch_dim=0)
            losses = (heads[0](encoder(x)) - ys[0]).square().mean(1)
            weights = weighting(engines[0].compute_gramian(losses))
            assert not weights.requires_grad
            losses.backward(weights)
            return losses

        return step

    arguments = TRAINED[name][0]
    mine, its = (run(by_engine(getattr(module, name + "Weighting")(*arguments))) for module in (ours, theirs))
    assert (mine - its).abs().max() <= 1e-4 * its.max()


@pytest.mark.parametrize("batch_dim", [0, 1, -1, None])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_engines_gramian(batch_dim, dtype):
    """TorchJD's, entry by entry, whatever the dimensions of the output."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6)
    net = nn.Sequential(*layers, nn.Linear(6, 3)).to(dtype)
    other, x = copy.deepcopy(net), randn(5, 1, 6, 6, seed=1, dtype=dtype)

    def output(model):
        y = model(x).sin()
        return y if batch_dim in (0, None) else y.T

    its_engine = Engine(other, batch_dim=batch_dim)  # its hooks have to be there before the forward
    expected = its_engine.compute_gramian(output(other))
    found = output(net)
    M = ours.Engine(net, batch_dim=batch_dim).compute_gramian(found)
    assert M.dtype is dtype
    torch.testing.assert_close(M, expected, rtol=1e-4 if dtype is F32 else 1e-9, atol=1e-5 if dtype is F32 else 1e-12)
    found.backward(torch.ones_like(found))  # the graph is there still


def test_the_engine_takes_what_torchjds_does_not():
    """Recurrent networks, and weights that another module uses; batch norm is refused by the step, not the class."""
    lstm, x = nn.LSTM(3, 4).double(), randn(6, 5, 3, dtype=F64)
    losses = lstm(x)[0].square().mean((0, 2))
    M = ours.Engine(lstm, batch_dim=0).compute_gramian(losses)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(one, list(lstm.parameters()), retain_graph=True)])
        for one in losses
    ]
    torch.testing.assert_close(M, torch.stack(rows) @ torch.stack(rows).T)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    engine = ours.Engine(net, batch_dim=0)
    with pytest.raises(ValueError, match="NativeBatchNormBackward0 with statistics of the batch"):
        engine.compute_gramian(net(x[0]).squeeze(1))
    net.eval()
    assert engine.compute_gramian(net(x[0]).squeeze(1)).shape == (5, 5)
    with pytest.raises(ValueError, match="output: expected a tensor that requires grad"):
        engine.compute_gramian(x)
    with pytest.raises(TypeError, match="output: expected a floating tensor"):
        engine.compute_gramian(torch.arange(3))
    with pytest.raises(ValueError, match="modules: expected at least one parameter"):
        ours.Engine(nn.ReLU(), batch_dim=0)


def test_jac_to_grad_returns_weights_in_the_jacobians_dtype():
    parameter = torch.tensor([1.0, 2.0], requires_grad=True)
    for aggregator in (ours.UPGrad(), theirs.UPGrad()):
        parameter.grad = None
        backward([torch.tensor([-1.0, 1.0]) @ parameter, parameter.square().sum()])
        weights = jac_to_grad([parameter], aggregator)
        assert weights.dtype is F32
        assert torch.allclose(weights, torch.tensor([0.5, 0.5]))
        assert torch.allclose(parameter.grad, torch.tensor([0.5, 2.5]))


# ------------------------------------------------------------------------------------------------ gradients and errors


@methods
def test_what_requires_grad(name):
    """Detached where TorchJD detaches, an error where its derivative would be lost, else the derivative."""
    G = randn(T, 12, dtype=F64)
    J = G.clone().requires_grad_()
    mine = make(name)
    kind = name.partition(" ")[0]
    if kind in ("Mean", "Sum", "Constant", "Random"):
        torch.manual_seed(1)
        mine(J).sum().backward()
        torch.manual_seed(1)
        assert torch.allclose(J.grad, mine.weighting(G)[:, None].expand(T, 12))
    elif kind in ("AlignedMTL", "Krum", "MGDA"):
        with pytest.raises(ValueError, match="requires_grad"):
            mine(J)
        with pytest.raises(ValueError, match="requires_grad"):
            mine.gramian_weighting(J @ J.T)
        with torch.no_grad():
            assert torch.equal(mine(J), mine(G))
    else:
        assert not mine(J).requires_grad
        if hasattr(mine, "gramian_weighting"):
            assert not mine.gramian_weighting(J @ J.T).requires_grad


def test_errors():
    two = PREFERENCE[:2]
    for make_it, kind, message in (
        (lambda: ours.AlignedMTL(scale_mode="max"), ValueError, r"^scale_mode: expected one of"),
        (lambda: ours.AlignedMTL(rank_rule="mine"), ValueError, r"^rank_rule: "),
        (lambda: ours.UPGrad(torch.ones(2, 2)), ValueError, r"^pref_vector: expected shape \[T\]"),
        (lambda: ours.UPGradWeighting(3), TypeError, r"^pref_vector: "),
        (lambda: ours.DualProj(None, 1e-4), TypeError, r"^projector: expected a torchjd.linalg.DualConeProjector"),
        (lambda: ours.CAGrad(-1.0), ValueError, r"^c: expected a finite number >= 0"),
        (lambda: ours.CAGrad(), TypeError, "c"),
        (lambda: ours.CAGrad(0.5, radius=1), TypeError, "radius"),
        (lambda: ours.FairGrad(-1.0), ValueError, r"^alpha: "),
        (lambda: ours.GradVac(2.0), ValueError, r"^beta: "),
        (lambda: ours.Krum(-1), ValueError, r"^n_byzantine: "),
        (lambda: ours.Krum(0, 0), ValueError, r"^n_selected: "),
        (lambda: ours.NashMTL(0), ValueError, r"^n_tasks: "),
        (lambda: ours.NashMTL(2, -1.0), ValueError, r"^max_norm: "),
        (lambda: ours.NashMTL(2, update_weights_every=0), ValueError, r"^update_weights_every: "),
        (lambda: ours.GradDrop(lambda P: P.square()), ValueError, r"^f: expected the identity"),
        (lambda: ours.GradDrop(leak=torch.tensor([2.0])), ValueError, r"^leak: "),
        (lambda: ours.Constant(torch.ones(2, 2)), ValueError, r"^weights: "),
        (lambda: ours.UPGrad(two)(randn(3, 5)), ValueError, r"^pref_vector: expected length 3"),
        (lambda: ours.Constant(two)(randn(3, 5)), ValueError, r"^weights: expected length 3"),
        (lambda: ours.NashMTL(2)(randn(3, 5)), ValueError, r"^n_tasks: expected 2 tasks, got 3"),
        (lambda: ours.Krum(1)(randn(3, 5)), ValueError, "expected at least 4 tasks"),
        (lambda: ours.UPGrad()(randn(2, 3, 5)), ValueError, "dimension 2"),
        (lambda: ours.UPGradWeighting()(randn(3, 5)), ValueError, r"^M: expected shape"),
        (lambda: ours.UPGrad()(torch.ones(3, 5, dtype=torch.int64)), TypeError, "int64"),
    ):
        with pytest.raises(kind, match=message):
            make_it()
    ours.GradDrop(lambda P: P)
    ours.GradDrop(inspect.signature(theirs.GradDrop).parameters["f"].default)


@methods
def test_non_finite_gradients(name):
    G = randn(T, 12)
    G[1, 3] = torch.nan
    g = make(name)(G)
    assert g[3].isnan()
    if hasattr(make(name), "gramian_weighting"):
        assert g.isnan().all()
        assert make(name).gramian_weighting(G @ G.T).isnan().all()


def test_half_precision_gramian():
    M = conditioned(T, 20, 3.0, dtype=BF16)
    M = M @ M.T
    weights = ours.UPGradWeighting()(M)
    assert weights.dtype is BF16
    assert torch.equal(weights, fastmtl.UPGrad().weighting(M.double(), BF16).to(BF16))


@pytest.mark.parametrize("missing", ["torchjd", "torchjd.linalg"])
def test_without_torchjd(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "fastmtl.integrations.torchjd")
    with pytest.raises(ImportError, match=r"fastmtl-torch\[torchjd\]"):
        importlib.import_module("fastmtl.integrations.torchjd")

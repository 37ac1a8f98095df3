"""What TorchJD's documentation promises, and what its users do with its objects, tried with ours."""

import importlib
import inspect

import numpy as np
import pytest
import torch
from helpers import F32, F64, dtype_id, randn, relative
from torch import nn

theirs = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
for solver in ("clarabel", "cvxpy", "quadprog", "scipy"):
    pytest.importorskip(solver, reason=f"{solver}, which torchjd solves with, is not installed")
ours = importlib.import_module("fastmtl.integrations.torchjd")
scalars = importlib.import_module("fastmtl.integrations.torchjd.scalarization")
their_scalars = importlib.import_module("torchjd.scalarization")

from torchjd.linalg import QuadprogProjector  # noqa: E402

from fastmtl.integrations.torchjd.linalg import ActiveSetProjector  # noqa: E402

# Aggregator: what makes one for m rows.
EVERY = {
    "AlignedMTL": lambda m: ours.AlignedMTL(),
    "CAGrad": lambda m: ours.CAGrad(0.5),
    "ConFIG": lambda m: ours.ConFIG(),
    "Constant": lambda m: ours.Constant(torch.linspace(0.5, 1.5, m)),
    "DualProj": lambda m: ours.DualProj(),
    "ExcessMTL": lambda m: ours.ExcessMTL(),
    "FairGrad": lambda m: ours.FairGrad(1.0),
    "GradDrop": lambda m: ours.GradDrop(),
    "GradVac": lambda m: ours.GradVac(),
    "IMTLG": lambda m: ours.IMTLG(),
    "Krum": lambda m: ours.Krum(0, 1),
    "MGDA": lambda m: ours.MGDA(),
    "Mean": lambda m: ours.Mean(),
    "NashMTL": lambda m: ours.NashMTL(m),
    "PCD": lambda m: ours.PCD(eps=0.0),
    "PCGrad": lambda m: ours.PCGrad(),
    "Random": lambda m: ours.Random(),
    "Sum": lambda m: ours.Sum(),
    "TrimmedMean": lambda m: ours.TrimmedMean((m - 1) // 2),
    "UPGrad": lambda m: ours.UPGrad(),
}
SMALLEST = {"Krum": 3}
# What TorchJD's documentation promises of them.
NON_CONFLICTING = ("DualProj", "MGDA", "UPGrad", "CAGrad", "ConFIG")
LINEAR = ("UPGrad", "Mean", "Sum", "Constant")
STRONGLY_STATIONARY = ("UPGrad",)
ORDERED = ("Constant", "PCD")
DRAWN = ("GradDrop", "GradVac", "PCGrad", "Random")
dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)
every = pytest.mark.parametrize("name", EVERY)


def of_rank(m, n, rank, dtype, seed=0):
    """A matrix [m, n] of this rank with singular values between 1 and 10."""
    if not rank:
        return torch.zeros(m, n, dtype=dtype)
    U = torch.linalg.qr(randn(m, rank, dtype=F64, seed=seed))[0]
    V = torch.linalg.qr(randn(n, rank, dtype=F64, seed=seed + 1))[0]
    return (U * torch.linspace(1, 10, rank, dtype=F64) @ V.T).to(dtype)


SHAPES = [(1, 1, 1), (4, 3, 1), (4, 3, 2), (4, 3, 3), (9, 11, 5), (9, 11, 9), (4, 3, 0), (9, 11, 0), (20, 100, 19)]


def test_every_aggregator_is_tried():
    assert set(EVERY) == {name for name in ours.__all__ if not name.endswith("Weighting") and name != "Engine"}


@every
@dtypes
@pytest.mark.parametrize("scale", [0.0, 1e-10, 1.0, 1e3, 1e10, 1e15])
def test_the_expected_structure(name, dtype, scale):
    for m, n, rank in SHAPES:
        if m < SMALLEST.get(name, 1):
            continue
        G = scale * of_rank(m, n, rank, dtype, seed=m)
        g = EVERY[name](m)(G)
        assert g.shape == (n,)
        assert g.dtype is dtype
        assert g.isfinite().all(), (m, n, rank)


def weighting_for(name, m):
    if name == "CRMOGMWeighting":
        return ours.CRMOGMWeighting(ours.UPGradWeighting())
    kind = getattr(ours, name)
    of = {
        "CAGrad": (0.5,),
        "Constant": (torch.linspace(0.5, 1.5, m),),
        "FairGrad": (1.0,),
        "Krum": (0,),
        "NashMTL": (m,),
    }
    return kind(*of.get(name.removesuffix("Weighting"), ()))


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name.endswith("Weighting")])
@dtypes
@pytest.mark.parametrize("scale", [0.0, 1e-10, 1.0, 1e15])
def test_the_expected_structure_of_weights(name, dtype, scale):
    for m, n, rank in SHAPES:
        if m < SMALLEST.get(name.removesuffix("Weighting"), 1):
            continue
        G = scale * of_rank(m, n, rank, dtype, seed=m)
        weights = weighting_for(name, m)(G if name == "ExcessMTLWeighting" else G @ G.T)
        assert weights.shape == (m,)
        assert weights.dtype is dtype
        assert weights.isfinite().all(), (m, n, rank)


@every
@dtypes
def test_permutations(name, dtype):
    if name in DRAWN or name in ORDERED:
        return
    for m, n, rank in SHAPES:
        if m < SMALLEST.get(name, 1) or (name == "Krum" and rank < m):  # where scores are tied
            continue
        G = of_rank(m, n, rank, dtype, seed=m + 3)
        order = torch.randperm(m, generator=torch.Generator().manual_seed(m))
        g, other = EVERY[name](m)(G), EVERY[name](m)(G[order])
        assert (g - other).norm() <= (1e-9 if dtype is F64 else 1e-4) * (1 + g.norm()), (m, n, rank)


@pytest.mark.parametrize("name", NON_CONFLICTING)
@dtypes
def test_no_conflict(name, dtype):
    """<g_i, g> >= 0 for every row. (CAGrad from c = 1 on; ConFIG where the rows are independent.)"""
    for m, n, rank in SHAPES:
        if name == "ConFIG" and rank < m:
            continue
        G = of_rank(m, n, rank, dtype, seed=m + 5)
        aggregator = ours.CAGrad(1.0) if name == "CAGrad" else EVERY[name](m)
        if name in ("UPGrad", "DualProj"):
            aggregator.projector = ActiveSetProjector(reg_eps=0.0)
        products = G @ aggregator(G)
        assert products.min() >= -(1e-9 if dtype is F64 else 1e-4) * G.norm() ** 2, (m, n, rank)


@pytest.mark.parametrize("name", LINEAR)
@dtypes
def test_linear_under_scaling(name, dtype):
    for m, n, rank in SHAPES:
        G = of_rank(m, n, rank, dtype, seed=m + 7)
        aggregator = EVERY[name](m)
        if name == "UPGrad":
            aggregator.projector = ActiveSetProjector(reg_eps=0.0)
        c, d = torch.rand(2, m, 1, generator=torch.Generator().manual_seed(m)).to(dtype) + 0.1
        got, expected = aggregator((2 * c + 3 * d) * G), 2 * aggregator(c * G) + 3 * aggregator(d * G)
        assert (got - expected).norm() <= (1e-8 if dtype is F64 else 1e-3) * (1 + expected.norm()), (m, n, rank)


@pytest.mark.parametrize("name", STRONGLY_STATIONARY)
@dtypes
@pytest.mark.parametrize("shape", [(20, 10, 10), (20, 10, 5), (20, 10, 1), (20, 100, 1), (20, 100, 19)])
def test_strongly_stationary(name, dtype, shape):
    """Where no w > 0 has wᵀ G = 0, the result is not zero."""
    m, n, _ = shape
    x = torch.nn.functional.normalize(randn(n, dtype=F64, seed=1), dim=0)
    G = randn(m, n, dtype=F64, seed=2)
    G = G - (G @ x)[:, None] * x
    products = torch.zeros(m, dtype=F64)
    products[3] = 1.0  # <g_3, x> > 0 and the others' 0: w_3 would have to be 0
    G = (G + products[:, None] * x).to(dtype)
    assert EVERY[name](m)(G).norm() > 5e-3


# ------------------------------------------------------------------------------------------------ what is new


def pairs(kind, *arguments, **options):
    return getattr(ours, kind)(*arguments, **options), getattr(theirs, kind)(*arguments, **options)


@pytest.mark.parametrize("m", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.3, 1.0])
def test_pcd(m, tau):
    mine, its = pairs("PCD", tau, 0.9)
    for step in range(7):
        G = randn(m, 6 if step % 2 else 50, dtype=F64, seed=step)
        if m > 2:
            if step == 3:
                G[2] = G[1]
            if step == 4:
                G[2] = -G[1]
            if step == 5:
                G[2] = 0
            if step == 6:
                G[0] = 0
        g, expected = mine(G), its(G)
        assert (g - expected).norm() <= 1e-7 * G.norm(), step


def test_pcd_with_a_tau_for_each():
    taus = torch.tensor([0.1, 0.9, 0.0])
    mine, its = pairs("PCD", taus)
    G = randn(4, 9, dtype=F64)
    assert relative(mine(G), its(G)) <= 1e-9
    with pytest.raises(ValueError, match="tau: expected length 2"):
        mine(G[:3])


@pytest.mark.parametrize("warmup", [0, 2])
@dtypes
def test_excess_mtl(warmup, dtype):
    mine, its = pairs("ExcessMTL", 0.7, warmup)
    for step in range(5):
        G = randn(4, 30, dtype=dtype, seed=step)
        G[1] *= step > 2  # a zero row is a task like others
        assert relative(mine(G), its(G)) <= (1e-12 if dtype is F64 else 1e-5)
        assert relative(mine.weighting(G), its.weighting(G)) <= (1e-12 if dtype is F64 else 1e-5)
    mine.robust_step_size = its.robust_step_size = 0.1
    assert relative(mine(G), its(G)) <= (1e-12 if dtype is F64 else 1e-5)


@pytest.mark.parametrize(("m", "trim"), [(1, 0), (3, 0), (3, 1), (8, 2), (21, 10)])
@dtypes
def test_trimmed_mean(m, trim, dtype):
    mine, its = pairs("TrimmedMean", trim)
    G = randn(m, 40_000 if m == 8 else 50, dtype=dtype, seed=m)
    assert relative(mine(G), its(G)) <= (1e-15 if dtype is F64 else 1e-6)
    with pytest.raises(ValueError, match=f"expected at least {2 * trim + 3} tasks"):
        ours.TrimmedMean(trim + 1)(G[: 2 * trim + 1])


@pytest.mark.parametrize("kind", ["MoDoWeighting", "SDMGradWeighting"])
def test_weights_from_two_batches(kind):
    mine, its = pairs(kind)
    for step in range(6):
        m = 4 if step < 4 else 5  # another number begins anew
        J = randn(m, 30, dtype=F64, seed=step)
        N = J @ (J + 0.5 * randn(m, 30, dtype=F64, seed=step + 50)).T
        assert relative(mine(N), its(N)) <= 1e-6  # TorchJD adds 1e-8 to the scale
    assert mine.state_dict().keys() == its.state_dict().keys()


def test_sdmgrad_options():
    w = torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    mine, its = pairs("SDMGradWeighting", 5.0, 0.1, 7, 0.9, w)
    N = randn(3, 9, dtype=F64) @ randn(3, 9, dtype=F64).T
    assert relative(mine(N), its(N)) <= 1e-6
    w[0] = 3.0
    assert relative(mine(N), its(N)) <= 1e-6


@pytest.mark.parametrize("start", [None, torch.tensor([0.5, 0.2, 0.3], dtype=F64)])
def test_cr_mogm(start):
    mine = theirs.GramianWeightedAggregator(ours.CRMOGMWeighting(ours.MGDAWeighting(), 0.6, start))
    its = theirs.GramianWeightedAggregator(theirs.CRMOGMWeighting(theirs.MGDAWeighting(1e-9, 10_000), 0.6, start))
    for step in range(4):
        G = randn(3, 20, dtype=F64, seed=step) + 0.4
        assert relative(mine(G), its(G)) <= 1e-5
    assert set(mine.state_dict()) == set(its.state_dict()) | {key for key in mine.state_dict() if "method" in key}
    broken = torch.where(torch.arange(20) == 3, torch.nan, G)
    before = mine.gramian_weighting._lambda.clone()
    assert mine(broken).isnan().all()
    assert torch.equal(mine.gramian_weighting._lambda, before)
    mine.gramian_weighting.reset()
    assert (
        relative(mine(G), ours.MGDA()(G) if start is None else (0.6 * start + 0.4 * ours.MGDAWeighting()(G @ G.T)) @ G)
        < 1e-6
    )


# ------------------------------------------------------------------------------------------------ what users do


def test_options_changed_in_place():
    G = randn(4, 9, dtype=F64) - 0.3
    projector = QuadprogProjector()
    mine = ours.UPGrad(projector=projector)
    before = mine(G)
    projector.reg_eps = 0.3
    assert relative(mine(G), ours.UPGrad(projector=QuadprogProjector(reg_eps=0.3))(G)) <= 1e-15
    assert relative(mine(G), before) > 1e-3
    mine.projector.reg_eps = 0.0
    assert relative(mine(G), ours.UPGrad(projector=QuadprogProjector(reg_eps=0.0))(G)) <= 1e-15
    w = torch.ones(4, dtype=F64)
    for kind in (ours.UPGrad, ours.DualProj, ours.AlignedMTL, ours.ConFIG, ours.Constant):
        w.fill_(1.0)
        mine = kind(w)
        mine(G)
        w[1] = 5.0
        assert torch.equal(mine(G), kind(w.clone())(G)), kind
    leak = torch.zeros(4, dtype=F64)
    drop = ours.GradDrop(leak=leak)
    drop(G)
    leak.fill_(1.0)
    assert relative(drop(G), G.sum(0)) <= 1e-12


def test_the_projector_is_there():
    for mine in (ours.UPGrad(), ours.DualProjWeighting()):
        assert (mine.projector.norm_eps, mine.projector.reg_eps) == (1e-4, 1e-4)
        mine.projector = None
        assert mine.projector.reg_eps == 1e-4


class Halves(ActiveSetProjector):
    """A projector of somebody else's."""

    def __call__(self, U, G):
        return super().__call__(U, G) / 2


def test_a_projector_of_ones_own():
    G = randn(4, 9, dtype=F64) - 0.3
    for kind in ("UPGrad", "DualProj"):
        plain, mine = getattr(ours, kind)(), getattr(ours, kind)(projector=Halves())
        assert relative(2 * mine(G), plain(G)) <= 1e-6


@pytest.mark.parametrize("m", [1, 3, 12])
@pytest.mark.parametrize("eps", [0.0, 1e-4, 1e-2])
def test_projector_for_torchjd(m, eps):
    G = randn(m, 2 * m, dtype=F64, seed=m) - 0.2
    mine = ActiveSetProjector(norm_eps=0.0, reg_eps=eps)
    its = QuadprogProjector(norm_eps=0.0, reg_eps=eps or 1e-13)
    for U in (torch.eye(m, dtype=F64), randn(m, dtype=F64, seed=1), randn(2, 3, m, dtype=F64, seed=2)):
        w, expected = mine(U, G @ G.T), its(U, G @ G.T)
        assert w.shape == U.shape
        assert ((w - expected) @ G).norm() <= 1e-5 * (1 + (expected @ G).norm())
    for kind in (theirs.UPGrad, theirs.DualProj):
        assert relative(kind(projector=mine)(G), kind(projector=its)(G)) <= 1e-5
    with pytest.raises(ValueError, match="U: expected shape"):
        mine(torch.ones(m + 1), G @ G.T)
    with pytest.raises(ValueError, match="reg_eps: expected a finite number >= 0"):
        mine.reg_eps = -1
    assert repr(mine) == repr(its).replace("Quadprog", "ActiveSet").replace("1e-13", "0.0")


def test_derivatives_of_constant_weights():
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    G = randn(3, 5)
    ours.Constant(w)(G).sum().backward()
    assert torch.allclose(w.grad, G.sum(1))
    learned = ours.Constant(nn.Parameter(torch.ones(3)))
    assert [p.shape for p in learned.parameters()] == [(3,)]


def test_subclasses_with_torchjds_signature():
    class Doubled(ours.UPGradWeighting):
        def forward(self, gramian, /):
            return 2 * super().forward(gramian)

    class Tripled(ours.UPGrad):
        def forward(self, matrix, /):
            return 3 * super().forward(matrix)

    G = randn(3, 7)
    assert torch.allclose(theirs.GramianWeightedAggregator(Doubled())(G), 2 * ours.UPGrad()(G), rtol=1e-4)
    assert torch.allclose(Tripled()(G), 3 * ours.UPGrad()(G))


def test_numbers_of_numpy():
    G = randn(4, 9)
    for mine, its in (
        (ours.NashMTL(np.int64(4), np.float32(0.5)), ours.NashMTL(4, 0.5)),
        (ours.Krum(np.int32(1), np.int64(2)), ours.Krum(1, 2)),
        (ours.CAGrad(np.float64(0.5)), ours.CAGrad(0.5)),
        (ours.UPGrad(np.ones(4)), ours.UPGrad(torch.ones(4, dtype=F64))),
        (ours.Constant(np.arange(4.0)), ours.Constant(torch.arange(4.0, dtype=F64))),
        (ours.TrimmedMean(np.int64(1)), ours.TrimmedMean(1)),
    ):
        assert torch.equal(mine(G), its(G))
        assert repr(mine) == repr(its)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("Krum", "NashMTL", "TrimmedMean", "Constant")])
def test_no_rows(name):
    assert torch.equal(EVERY[name](0)(torch.zeros(0, 5)), torch.zeros(5))
    assert torch.equal(ours.Constant(torch.zeros(0))(torch.zeros(0, 5)), torch.zeros(5))
    assert torch.equal(ours.GradDrop(leak=torch.zeros(0))(torch.zeros(0, 5)), torch.zeros(5))
    with pytest.raises(ValueError, match="leak: expected length 2"):
        ours.GradDrop(leak=torch.zeros(0))(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="expected at least 3"):
        ours.Krum(0)(torch.zeros(0, 5))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ours.CAGrad(0.5, norm_eps=-1.0), "norm_eps"),
        (lambda: ours.MGDA(epsilon=0.0), "epsilon"),
        (lambda: ours.MGDA(max_iters=0), "max_iters"),
        (lambda: ours.NashMTL(3, optim_niter=0), "optim_niter"),
        (lambda: ours.GradVac(eps=-1.0), "eps"),
        (lambda: ours.FairGrad(1.0, max_iters=0), "max_iters"),
        (lambda: ours.PCD(beta=1.0), "beta"),
        (lambda: ours.PCD(2.0), "tau"),
        (lambda: ours.ExcessMTL(0.0), "robust_step_size"),
        (lambda: ours.ExcessMTL(1.0, -1), "n_warmup_steps"),
        (lambda: ours.TrimmedMean(-1), "trim_number"),
        (lambda: ours.SDMGradWeighting(lambda_=-1.0), "lambda_"),
        (lambda: ours.SDMGradWeighting(n_iter=0), "n_iter"),
        (lambda: ours.MoDoWeighting(gamma=0.0), "gamma"),
        (lambda: ours.CRMOGMWeighting(ours.MGDAWeighting(), 1.5), "alpha"),
    ],
)
def test_arguments_without_effect_are_checked_too(make, name):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        make()


def test_states_have_torchjds_names():
    mine, its = pairs("GradVac")
    G = randn(3, 7)
    mine(G), its(G)
    assert set(mine.state_dict()) == set(its.state_dict())
    key = "gramian_weighting._phi_t"
    other = ours.GradVac()
    other.load_state_dict(
        {
            **mine.state_dict(),
            key: torch.full((3, 3), 0.25),
            f"weighting.weighting.{'_phi_t'}": torch.full((3, 3), 0.25),
        }
    )
    assert (other.gramian_weighting.method.targets == 0.25).all()


def test_a_state_of_torchjds_pcd():
    """Theirs goes on here as it does there."""
    mine, its = pairs("PCD", 0.3, 0.9)
    for step in range(3):
        its(randn(4, 9, dtype=F64, seed=step))
    assert not mine.load_state_dict(its.state_dict()).missing_keys
    G = randn(4, 9, dtype=F64, seed=9)
    assert relative(mine(G), its(G)) <= 1e-9
    assert relative(mine(G), ours.PCD(0.3, 0.9)(G)) > 1e-3
    other = ours.PCD(0.3, 0.9)
    other.load_state_dict(mine.state_dict())
    assert torch.equal(other(G), mine(G))


def test_the_weighting_of_a_preference():
    w = torch.tensor([1.0, 2.0])
    for kind in ("UPGrad", "DualProj", "AlignedMTL"):
        for preference in (None, w):
            mine, its = pairs(kind, preference)
            one, other = (x.gramian_weighting.weighting for x in (mine, its))
            assert type(one).__name__ == type(other).__name__
            assert torch.equal(one(torch.eye(2)), other(torch.eye(2)))


@pytest.mark.parametrize("name", [*theirs.__all__])
def test_signatures_are_in_the_classes(name):
    """Where type checkers see them, not only `inspect`."""
    mine = getattr(ours, name, None)
    if mine is None or not hasattr(theirs, name) or "__init__" not in vars(getattr(theirs, name)):
        return
    its = inspect.signature(getattr(theirs, name).__init__).parameters
    own = dict(inspect.signature(mine.__init__).parameters)
    own.pop("rank_rule", None)
    assert list(own) == list(its)


# ------------------------------------------------------------------------------------------------ scalarizers

w23 = torch.tensor([[0.3, 0.2, 0.5], [1.0, 0.1, 0.4]], dtype=F64)
SCALARS = {
    "COSMOS": (2.0, w23),
    "Constant": (w23,),
    "DWA": (1.5,),
    "FAMO": ((2, 3), 0.1 * w23, 0.1, 0.01),
    "GeometricMean": (),
    "IMTLL": ((2, 3),),
    "Mean": (),
    "PBI": (3.0, w23, -w23),
    "Random": (),
    "STCH": (0.1, w23, -w23),
    "Sum": (),
    "UW": ((2, 3),),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalarizers(name):
    mine, its = (getattr(module, name)(*SCALARS[name]) for module in (scalars, their_scalars))
    assert isinstance(mine, their_scalars.Scalarizer)
    assert (repr(mine), str(mine)) == (repr(its), str(its))
    assert list(inspect.signature(type(mine)).parameters) == list(inspect.signature(type(its)).parameters)
    parameters = [dict(x.named_parameters()) for x in (mine, its)]
    if name != "FAMO":
        assert parameters[0].keys() == parameters[1].keys()
    for step in range(8):
        x = (torch.rand(2, 3, dtype=F64, generator=torch.Generator().manual_seed(step)) + 0.3).requires_grad_()
        values = []
        for scalarizer in (mine, its):
            torch.manual_seed(step)
            values.append(scalarizer(x))
        assert values[0].dtype is F64
        assert values[0].item() == pytest.approx(values[1].item(), abs=1e-6)  # the state of TorchJD's is float32
        slopes = [torch.autograd.grad(value, x)[0] for value in values]
        assert relative(*slopes) <= 1e-6
        if name == "FAMO":
            for scalarizer in (mine, its):
                scalarizer.update(x.detach() * 0.9 + 0.05)
        if name == "DWA" and step % 2:
            mine.step(), its.step()
    if hasattr(its, "reset"):
        mine.reset(), its.reset()
        assert mine(x).item() == pytest.approx(its(x).item(), abs=1e-6)


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("scale", [0.0, 1e-10, 1.0, 1e15])
@dtypes
def test_scalarizers_at_every_scale(name, scale, dtype):
    x = (scale * (torch.rand(2, 3, dtype=dtype, generator=torch.Generator().manual_seed(1)) + 0.3)).requires_grad_()
    if name == "GeometricMean" and not scale:
        return  # it has no derivative there, and says so
    options = ((2, 3),) if name == "FAMO" else SCALARS[name]
    scalarizer = getattr(scalars, name)(*(o.to(dtype) if isinstance(o, torch.Tensor) else o for o in options))
    value = scalarizer(x)
    assert value.shape == ()
    assert value.dtype is dtype
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scalarizers_do_not_hide_what_is_not_finite(name, bad):
    """Whatever the formula makes of it: a loss scaler sees it in the value, and in the gradient."""
    x = torch.rand(2, 3, dtype=F64, generator=torch.Generator().manual_seed(1)) + 0.3
    x[1, 2] = bad
    x.requires_grad_()
    value = getattr(scalars, name)(*SCALARS[name])(x)
    assert not value.isfinite()
    (slope,) = torch.autograd.grad(value, x)
    linear = ("Constant", "Mean", "Random", "Sum", "UW", "IMTLL", "GeometricMean")
    assert name in linear or not slope.isfinite().all()


def test_scalarizers_with_state_resume():
    for name in ("DWA", "FAMO"):
        mine, other = (getattr(scalars, name)(*SCALARS[name]) for _ in range(2))
        for step in range(6):
            x = torch.rand(2, 3, generator=torch.Generator().manual_seed(step)) + 0.3
            mine(x)
            mine.update(x * 0.9 + 0.1) if name == "FAMO" else mine.step()
        other.load_state_dict(mine.state_dict())
        assert torch.equal(other(x), mine(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scalars.COSMOS(-1.0, w23), "lambda_: expected a finite number >= 0"),
        (lambda: scalars.PBI(-1.0, w23), "theta: expected a finite number >= 0"),
        (lambda: scalars.STCH(0.0), "mu: expected a finite number > 0"),
        (lambda: scalars.DWA(0.0), "temperature: expected a finite number > 0"),
        (lambda: scalars.FAMO(3, lr=-1.0), "lr: expected a finite number >= 0"),
        (lambda: scalars.FAMO(3, torch.zeros(2)), "min_losses: expected shape"),
        (lambda: scalars.FAMO(3).update(torch.ones(3)), "update: expected a call of the scalarizer before"),
        (lambda: scalars.UW(3)(torch.ones(2)), r"values: expected shape \[3\], that of the parameters"),
        (lambda: scalars.Constant(w23)(torch.ones(3)), r"values: expected shape \[2, 3\], that of the weights"),
        (lambda: scalars.GeometricMean()(-torch.ones(2)), r"losses\[0\]: expected a loss > 0"),
    ],
)
def test_scalarizers_check(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_weights_that_a_hook_changes():
    """In place or not: what is combined is what the hook leaves; else the weights from before their rounding."""
    G = randn(4, 30, dtype=F32) + 0.2
    exact = ours.UPGrad()
    alpha = exact.gramian_weighting(G.double() @ G.double().T)
    assert relative(exact(G), alpha @ G.double()) <= 1e-7
    for change in (lambda m, i, o: 2 * o, lambda m, i, o: o.mul_(2)):
        changed = ours.UPGrad()
        changed.weighting.register_forward_hook(change)
        assert relative(changed(G), 2 * alpha @ G.double()) <= 1e-6
    with torch.inference_mode():
        assert relative(exact(G), alpha @ G.double()) <= 1e-6

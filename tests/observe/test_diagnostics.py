"""Diagnostics of a Gram matrix, against their definitions on G itself and in closed form."""

import itertools
import math

import pytest
import torch
from helpers import BF16, DEPENDENT, EPS64, F32, F64, conditioned, dtype_id, generator, randn, relative, svd_rank
from torch.utils._python_dispatch import TorchDispatchMode

import fastmtl
from fastmtl import AlignedMTL, Info, diagnostics

# Two tasks with norms 3 and 4 at 60°, one of norm 5 at 120° from the first: G [3, 2].
ANGLES, NORMS = (0.0, math.pi / 3, 2 * math.pi / 3), (3.0, 4.0, 5.0)
FAN = torch.tensor([[n * math.cos(a), n * math.sin(a)] for n, a in zip(NORMS, ANGLES, strict=True)], dtype=F64)

SYSTEMS = {
    "random": lambda: randn(5, 40, dtype=F64),
    "fan": lambda: FAN,
    "conflict": lambda: randn(6, 2, dtype=F64),
    "ill-conditioned": lambda: conditioned(4, 60, 1e4, dtype=F64),
    "dominated": lambda: conditioned(4, 60, 10.0, spread=1e5, dtype=F64),
    "one task": lambda: randn(1, 9, dtype=F64),
    "T > P": lambda: randn(9, 4, dtype=F64),
    "zero row": lambda: torch.cat([randn(3, 9, dtype=F64), torch.zeros(1, 9)]),
    "opposed": lambda: torch.cat([randn(2, 9, dtype=F64), -2 * randn(1, 9, dtype=F64)]),
    "many": lambda: randn(50, 400, dtype=F64),
}
SCALARS = (
    "condition_number",
    "max_singular_value",
    "min_singular_value",
    "rank",
    "stable_rank",
    "min_cosine",
    "max_curvature_bound",
    "min_magnitude_similarity",
    "max_norm_ratio",
    "max_norm",
    "min_norm",
    "total_norm",
    "min_total_cosine",
)
PAIRWISE = (diagnostics.cosines, diagnostics.magnitude_similarity, diagnostics.curvature_bound)
VECTORS = (diagnostics.singular_values, diagnostics.norms, diagnostics.total_cosines)
SINGLES = (
    diagnostics.condition_number,
    diagnostics.stable_rank,
    diagnostics.min_cosine,
    diagnostics.min_magnitude_similarity,
    diagnostics.max_norm_ratio,
    diagnostics.max_curvature_bound,
    diagnostics.total_norm,
)
EVERY = (*PAIRWISE, *VECTORS, *SINGLES, diagnostics.aligned_gram)


def gram(G):
    return G @ G.T


def by_definition(G):
    """The pairwise measures straight from the rows of G: three functions of i and j."""

    def cosine(i, j):
        size = G[i].norm() * G[j].norm()
        return float(G[i] @ G[j] / size) if size > 0 else 0.0

    def similarity(i, j):
        return float(2 * G[i].norm() * G[j].norm() / (G[i] @ G[i] + G[j] @ G[j]))

    def curvature(i, j):
        return float((1 - cosine(i, j) ** 2) * (G[i] - G[j]).square().sum() / (G[i] + G[j]).square().sum())

    return cosine, similarity, curvature


# ------------------------------------------------------------------------------------------------ definitions


@pytest.mark.parametrize("name", SYSTEMS)
def test_pairs_equal_their_definition_on_the_gradients(name):
    G = SYSTEMS[name]()
    for measure, definition in zip(PAIRWISE, by_definition(G), strict=True):
        got = measure(gram(G))
        assert got.dtype is F64
        assert got.shape == (len(G), len(G))
        assert torch.equal(got, got.T)
        for i, j in itertools.permutations(range(len(G)), 2):
            assert got[i, j].item() == pytest.approx(definition(i, j), rel=1e-9, abs=1e-12), measure.__name__


@pytest.mark.parametrize("measure", [*PAIRWISE, diagnostics.aligned_gram], ids=lambda f: f.__name__)
@pytest.mark.parametrize("T", [5, 40, 300])
def test_pairs_are_symmetric_to_the_bit(T, measure):
    """Also where M is not: a product G Gᵀ, and how it is rounded, is the processor's own."""
    M = gram(randn(T, 2 * T, dtype=F64))
    M = M * (1 + (torch.rand(T, T, dtype=F64, generator=generator(1)) - 0.5) * 8 * EPS64)
    assert not torch.equal(M, M.T)
    got = measure(torch.stack([M, M.T]))
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("name", SYSTEMS)
def test_extremes_are_those_over_pairs(name):
    G = SYSTEMS[name]()
    T, M = len(G), gram(G)
    pairs = list(itertools.permutations(range(T), 2))
    cosine, similarity, curvature = by_definition(G)
    close = {"rel": 1e-9, "abs": 1e-12}
    assert float(diagnostics.min_cosine(M)) == pytest.approx(min((cosine(*p) for p in pairs), default=1.0), **close)
    expected = min((similarity(*p) for p in pairs), default=1.0)
    assert float(diagnostics.min_magnitude_similarity(M)) == pytest.approx(expected, **close)
    expected = max((curvature(*p) for p in pairs), default=0.0)
    assert float(diagnostics.max_curvature_bound(M)) == pytest.approx(expected, **close)
    n = G.norm(dim=1)
    expected = max((float(n[i] / n[j]) for i, j in pairs), default=1.0)
    assert float(diagnostics.max_norm_ratio(M)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_spectrum_is_that_of_the_gradients(name):
    G = SYSTEMS[name]()
    M, R = gram(G), svd_rank(G)
    s = torch.zeros(len(G), dtype=F64)
    s[: min(G.shape)] = torch.linalg.svdvals(G)
    got = diagnostics.singular_values(M)
    assert got.shape == s.shape
    assert (got[:R] - s[:R]).abs().max() <= 1e-7 * s[R - 1]
    assert (got[R:] <= 1e-7 * s[0]).all()  # of a zero eigenvalue its rounding, eps λ_max, is left
    assert int(diagnostics.rank(M)) == R
    assert float(diagnostics.condition_number(M)) == pytest.approx(float(s[0] / s[R - 1]), rel=1e-7)
    assert float(diagnostics.stable_rank(M)) == pytest.approx(float(G.square().sum() / s[0] ** 2), rel=1e-9)
    assert torch.allclose(diagnostics.norms(M), G.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_aligned_gram_is_that_of_the_aligned_gradients(name, scale):
    """Row t of Ĝ is what Aligned-MTL gives for the task weights e_t."""
    G = SYSTEMS[name]()
    A = torch.stack([AlignedMTL(weights=e, scale=scale)(G) for e in torch.eye(len(G))])
    got = diagnostics.aligned_gram(gram(G), scale)
    assert relative(got, A @ A.T) <= 1e-7


@pytest.mark.parametrize("name", SYSTEMS)
def test_aligning_makes_every_measure_the_best(name):
    G = SYSTEMS[name]()
    R = svd_rank(G)
    aligned = Info.of(gram=diagnostics.aligned_gram(gram(G)), rank=torch.tensor(R))
    assert float(diagnostics.condition_number(aligned)) == pytest.approx(1.0, abs=1e-9)
    assert float(diagnostics.stable_rank(aligned)) == pytest.approx(R, rel=1e-9)
    if R == len(G) > 1:  # no task depends on the others: all orthogonal, all of one norm
        assert float(diagnostics.min_cosine(aligned)) == pytest.approx(0.0, abs=1e-9)
        assert float(diagnostics.min_magnitude_similarity(aligned)) == pytest.approx(1.0, abs=1e-9)
        assert float(diagnostics.max_norm_ratio(aligned)) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_committed_gradient(name):
    G = SYSTEMS[name]()
    for alpha in (torch.linspace(0.5, 2, len(G), dtype=F64), randn(len(G), dtype=F64, seed=5)):
        g = alpha @ G
        assert float(diagnostics.total_norm(gram(G), alpha)) == pytest.approx(float(g.norm()), rel=1e-7)
        expected = torch.nn.functional.cosine_similarity(G, g[None], dim=1, eps=0).nan_to_num(0.0)
        assert torch.allclose(diagnostics.total_cosines(gram(G), alpha), expected, rtol=0, atol=1e-7)
    # Without weights: the mean gradient, or what the step committed.
    assert float(diagnostics.total_norm(gram(G))) == pytest.approx(float(G.mean(0).norm()), rel=1e-7)
    info = Info.of(alpha=torch.linspace(3, 1, len(G), dtype=F64), gram=gram(G))
    assert float(diagnostics.total_norm(info)) == pytest.approx(float((info.alpha @ G).norm()), rel=1e-7)
    assert diagnostics.total_norm(info, torch.ones(len(G))) == diagnostics.total_norm(gram(G), torch.ones(len(G)))


# ------------------------------------------------------------------------------------------------ closed forms


def test_a_fan_of_three():
    M = gram(FAN)
    half = torch.tensor([[1, 0.5, -0.5], [0.5, 1, 0.5], [-0.5, 0.5, 1]], dtype=F64)
    assert torch.allclose(diagnostics.cosines(M), half, rtol=0, atol=1e-14)
    assert float(diagnostics.min_cosine(M)) == pytest.approx(-0.5)
    assert float(diagnostics.max_norm_ratio(M)) == pytest.approx(5 / 3)
    assert float(diagnostics.min_magnitude_similarity(M)) == pytest.approx(30 / 34)
    # ‖g_1 ∓ g_2‖² = 9 + 16 ∓ 12, and so on; the largest is that of the pair in conflict.
    bound = diagnostics.curvature_bound(M)
    assert float(bound[0, 1]) == pytest.approx(0.75 * 13 / 37)
    assert float(bound[1, 2]) == pytest.approx(0.75 * 21 / 61)
    assert float(bound[0, 2]) == pytest.approx(0.75 * 49 / 19)
    assert float(diagnostics.max_curvature_bound(M)) == pytest.approx(0.75 * 49 / 19)


def test_two_tasks_of_one_norm():
    """λ = 1 ± cos: κ² = (1 + |c|) / (1 - |c|), the stable rank 2 / (1 + |c|), ξ = (1 - c)²."""
    for c in (-0.99, -0.3, 0.0, 0.5, 0.999):
        M = torch.tensor([[1, c], [c, 1]], dtype=F64)
        assert float(diagnostics.condition_number(M)) == pytest.approx(math.sqrt((1 + abs(c)) / (1 - abs(c))))
        assert float(diagnostics.stable_rank(M)) == pytest.approx(2 / (1 + abs(c)))
        assert float(diagnostics.max_curvature_bound(M)) == pytest.approx((1 - c) ** 2)


def test_orthogonal_tasks():
    """Where nothing conflicts the condition number is the largest ratio of norms (paper, Fig. 4)."""
    M = torch.diag(torch.tensor([4.0, 9.0, 2500.0], dtype=F64))
    assert float(diagnostics.condition_number(M)) == pytest.approx(25.0, rel=1e-14)
    assert float(diagnostics.max_norm_ratio(M)) == pytest.approx(25.0, rel=1e-14)
    assert float(diagnostics.min_cosine(M)) == 0.0
    assert torch.allclose(diagnostics.aligned_gram(M), 4 * torch.eye(3, dtype=F64), rtol=1e-14, atol=1e-13)
    assert torch.allclose(diagnostics.aligned_gram(M, "median"), 9 * torch.eye(3, dtype=F64), rtol=1e-14, atol=1e-13)
    mean = diagnostics.aligned_gram(M, "rmse")
    assert torch.allclose(mean, 2513 / 3 * torch.eye(3, dtype=F64), rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-6])
def test_nearly_opposed_gradients_have_a_curvature_bound(gap):
    """ξ = (1 - c)² at equal norms: 4 in the limit, where both squares cancel."""
    M = torch.tensor([[1, gap - 1], [gap - 1, 1]], dtype=F64)
    assert float(diagnostics.max_curvature_bound(M)) == pytest.approx((2 - gap) ** 2, rel=1e-9)
    unequal = torch.tensor([[4, 2 * (gap - 1)], [2 * (gap - 1), 1]], dtype=F64)
    expected = (1 - (gap - 1) ** 2) * 9 if gap >= 1e-6 else 0.0
    assert float(diagnostics.max_curvature_bound(unequal)) == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_opposed_gradients_whose_norms_differ_by_rounding():
    # Opposed to the last bit, but two roundings longer: the bare formula would be 0.
    n = 1 + 4e-16
    M = torch.tensor([[1, -n], [-n, n * n]], dtype=F64)
    assert float(diagnostics.max_curvature_bound(M)) == 4.0


def test_what_a_zero_gradient_is_to_the_others():
    M = gram(torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 6.0], [0.0, 0.0]], dtype=F64))
    eye = torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=F64))
    assert torch.equal(diagnostics.cosines(M), eye)
    similarity = diagnostics.magnitude_similarity(M)
    assert similarity[1].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert float(similarity[0, 2]) == pytest.approx(0.8)
    assert diagnostics.curvature_bound(M)[1].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert diagnostics.max_norm_ratio(M).item() == math.inf
    assert diagnostics.min_magnitude_similarity(M).item() == 0.0
    assert diagnostics.rank(M).item() == 2
    assert diagnostics.condition_number(M).item() == pytest.approx(2.0)
    assert torch.allclose(diagnostics.aligned_gram(M), 9 * eye)
    assert diagnostics.total_cosines(M)[1].item() == 0.0
    # What rounding leaves of a zero row counts as zero too.
    M[1, 1] = -1e-30
    assert diagnostics.norms(M)[1].item() == 0.0
    assert torch.equal(diagnostics.cosines(M), eye)


def test_nothing_but_zeros():
    got = {name: float(value) for name, value in diagnostics.summary(torch.zeros(3, 3)).items()}
    ones = ("condition_number", "max_curvature_bound", "min_magnitude_similarity", "max_norm_ratio")
    assert got == {name: 1.0 if name in ones else 0.0 for name in SCALARS}
    assert torch.equal(diagnostics.aligned_gram(torch.zeros(3, 3)), torch.zeros(3, 3, dtype=F64))


def test_one_task():
    got = {name: float(value) for name, value in diagnostics.summary(torch.tensor([[9.0]])).items()}
    threes = ("max_singular_value", "min_singular_value", "max_norm", "min_norm", "total_norm")
    expected = dict.fromkeys(SCALARS, 1.0) | dict.fromkeys(threes, 3.0) | {"max_curvature_bound": 0.0}
    assert got == pytest.approx(expected, rel=1e-15)
    assert got["min_cosine"] == 1.0


# ------------------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("exponent", [-25, 25])
def test_scale(name, exponent):
    G = SYSTEMS[name]()
    plain, scaled = diagnostics.summary(gram(G)), diagnostics.summary(gram(G * 10.0**exponent))
    for key, value in plain.items():
        sized = key.endswith("_norm") or key.endswith("singular_value")
        expected = float(value) * 10.0 ** (exponent if sized else 0)
        # What is left of a difference that cancels is rounding, and so is the σ of a pair that is nearly dependent.
        slack = 1e-7 * (float(plain["max_norm"]) * 10.0**exponent if sized else 1.0)
        assert float(scaled[key]) == pytest.approx(expected, rel=1e-6, abs=slack), key
    aligned = diagnostics.aligned_gram(gram(G * 10.0**exponent))
    assert relative(aligned, diagnostics.aligned_gram(gram(G)) * 100.0**exponent) <= 1e-6


@pytest.mark.parametrize("measure", EVERY, ids=lambda f: f.__name__)
def test_a_batch_is_its_entries(measure):
    G = torch.stack([randn(4, 30, dtype=F64, seed=s) + s % 3 for s in range(5)])
    G[1, 2], G[2, 3], G[3, 1] = 0, G[2, 0], -G[3, 0]
    M = G @ G.mT
    M[4, 0, 1] = torch.nan
    got = measure(M)
    assert got.shape[0] == 5
    for b in range(5):
        # Eigensolver and products work in another order on a batch; what is orthogonal leaves rounding noise.
        slack = 1e-14 * float(M[b].nan_to_num().abs().max())
        one, many = measure(M[b]), got[b]
        if measure is diagnostics.singular_values:  # the noise is that of the eigenvalues
            one, many = one**2, many**2
        assert torch.allclose(many, one, rtol=1e-12, atol=slack, equal_nan=True)
    assert got[:4].isfinite().all() or measure is diagnostics.max_norm_ratio
    assert got[4].isnan().all()
    assert measure(M[:0]).shape == (0, *got.shape[1:])


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("measure", EVERY, ids=lambda f: f.__name__)
def test_non_finite_in_nan_out(measure, value, T):
    M = gram(randn(T, 9, dtype=F64))
    M[T - 1, 0] = M[0, T - 1] = value
    assert measure(M).isnan().all()
    assert measure(AlignedMTL().solve(M, F32)).isnan().all()
    assert all(value.isnan() for value in diagnostics.summary(M).values())
    assert diagnostics.rank(M).item() == 0


def test_summary_has_what_the_functions_say():
    for G in (FAN, randn(5, 3, dtype=F64), torch.cat([FAN, torch.zeros(1, 2)])):
        info = AlignedMTL().solve(gram(G), F32)
        for x, dtype in ((gram(G), None), (gram(G), F32), (gram(G).to(F32), None), (info, None)):
            got = diagnostics.summary(x, dtype)
            assert tuple(got) == SCALARS
            sigma, n = diagnostics.singular_values(x), diagnostics.norms(x)
            R = int(diagnostics.rank(x, dtype))
            expected = {measure.__name__: measure(x) for measure in SINGLES} | {
                "condition_number": diagnostics.condition_number(x, dtype),
                "max_singular_value": sigma[0],
                "min_singular_value": sigma[R - 1],
                "rank": torch.tensor(R, dtype=F64),
                "max_norm": n.max(),
                "min_norm": n.min(),
                "min_total_cosine": diagnostics.total_cosines(x).min(),
            }
            assert expected.keys() == got.keys()
            for name, value in got.items():
                assert value.dtype is F64
                assert value.shape == ()
                assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=dtype_id)
@pytest.mark.parametrize("name", DEPENDENT)
def test_the_rank_is_that_of_the_method(name, dtype):
    G = DEPENDENT[name](dtype)
    M = fastmtl.ops.gram(G)
    assert int(diagnostics.rank(M, dtype)) == svd_rank(G)
    s = torch.linalg.svdvals(G.to(F64))
    kappa = float(s[0] / s[svd_rank(G) - 1])
    assert float(diagnostics.condition_number(M, dtype)) == pytest.approx(kappa, rel=1e-4)


def test_an_info_decides_by_what_it_has():
    G = torch.stack([randn(30, dtype=F64), randn(30, dtype=F64) + 1e-5 * randn(30, dtype=F64, seed=1)])
    M = gram(G)
    kept, dropped = AlignedMTL().solve(M, F64), AlignedMTL().solve(M, F32)
    assert diagnostics.condition_number(kept) > 1e5
    assert float(diagnostics.condition_number(dropped)) == 1.0
    # Neither eigenvalues nor rank, as with other methods: the Gram's own, by the tolerance of `dtype`.
    bare = Info.of(gram=M)
    assert float(diagnostics.condition_number(bare)) == pytest.approx(float(diagnostics.condition_number(kept)))
    assert float(diagnostics.condition_number(bare, F32)) == 1.0
    # A rank alone, a spectrum alone.
    assert int(diagnostics.rank(Info.of(gram=M, rank=torch.tensor(1)))) == 1
    assert diagnostics.singular_values(Info.of(gram=M, eigenvalues=torch.tensor([16.0, 9.0]))).tolist() == [4, 3]


def test_groups():
    a, b = torch.nn.Parameter(randn(6)), torch.nn.Parameter(randn(4))
    losses = [(a * randn(6, seed=t)).sum() + (b * randn(4, seed=9 + t)).sum() for t in range(3)]
    info = AlignedMTL().backward(losses, groups=[[a], [b]])
    got = diagnostics.summary(info)
    assert all(value.shape == (2,) for value in got.values())
    norms = torch.stack([a.grad.norm(), b.grad.norm()])
    assert torch.allclose(got["total_norm"], norms.to(F64), rtol=1e-5)


def test_a_gram_that_requires_grad_is_only_looked_at():
    M = gram(FAN).requires_grad_()
    assert not any(value.requires_grad for value in diagnostics.summary(M).values())
    assert not diagnostics.aligned_gram(M).requires_grad


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(fastmtl.ops.EXTENSIONS["_C"] is None, reason="the reference eigensolver reads values")
def test_nothing_reads_a_value():
    M = torch.stack([gram(randn(4, 9, dtype=F64)), torch.zeros(4, 4, dtype=F64)])
    info = AlignedMTL().solve(M, F32)
    with _NoReads():
        for x in (M, info):
            diagnostics.summary(x)
            for measure in EVERY:
                measure(x)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            bool(M[0, 0, 0])


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("measure", [*EVERY, diagnostics.rank, diagnostics.summary], ids=lambda f: f.__name__)
def test_bad_input(measure):
    for bad in (3.0, [[1.0]], torch.eye(2, dtype=torch.int64), torch.eye(2).half(), None):
        with pytest.raises(TypeError, match="M: expected an Info, or a float32 or float64 tensor, got"):
            measure(bad)
    for bad in (torch.zeros(2, 3), torch.zeros(4), torch.zeros(0, 0), torch.zeros(1, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"M: expected shape \[T, T\] or \[B, T, T\] with T >= 1, got"):
            measure(bad)
    with pytest.raises(ValueError, match="info: expected one with a Gram matrix"):
        measure(Info.of(alpha=torch.ones(3)))


def test_bad_options():
    M = gram(FAN)
    for measure in (diagnostics.rank, diagnostics.condition_number, diagnostics.summary):
        with pytest.raises(TypeError, match=r"dtype: expected float32, .* or float16, got torch\.int64"):
            measure(M, torch.int64)
    with pytest.raises(ValueError, match=r"scale: expected one of .*, got 'max'"):
        diagnostics.aligned_gram(M, "max")
    for bad in (torch.ones(2), torch.ones(()), [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match=r"weights: expected a tensor \[..., 3\], got"):
            diagnostics.total_norm(M, bad)


@pytest.mark.parametrize("B", [1, 2, 9])
def test_measures_of_examples(B):
    G = randn(B, 12, dtype=F64, seed=B) + 0.3
    M = G @ G.mT
    mean = G.mean(0)
    close = {"rel": 1e-10}
    assert float(diagnostics.gradient_diversity(M)) == pytest.approx(
        float(G.square().sum() / G.sum(0).square().sum()), **close
    )
    cos = torch.nn.functional.cosine_similarity(G[:, None], G[None], dim=-1)
    negative = [float(cos[i, j] < 0) for i in range(B) for j in range(B) if i != j]
    assert float(diagnostics.conflicts(M)) == pytest.approx(sum(negative) / max(len(negative), 1), **close)
    noise = diagnostics.noise_scale(M)
    if B == 1:
        assert noise.isnan()
        return
    trace = (G - mean).square().sum() / (B - 1)
    square = mean.square().sum() - trace / B
    assert float(noise) == pytest.approx(float(trace / square) if square > 0 else math.inf, **close)
    assert float(diagnostics.noise_scale(torch.eye(B))) == torch.inf
    assert float(diagnostics.noise_scale(torch.ones(B, B))) == 0
    assert float(diagnostics.gradient_diversity(torch.ones(B, B))) == pytest.approx(1 / B)
    assert float(diagnostics.gradient_diversity(torch.eye(B))) == pytest.approx(1)
    both = torch.stack([M, torch.eye(B, dtype=F64)])
    assert torch.equal(diagnostics.conflicts(both), torch.stack([diagnostics.conflicts(x) for x in both]))
    M[0, 0] = torch.nan
    for measure in (diagnostics.gradient_diversity, diagnostics.noise_scale, diagnostics.conflicts):
        assert measure(M).isnan()


def test_the_noise_scale_has_no_bias():
    """Of gradients with mean 1 in 4 directions and variance 9 in each of 400: 3600 / 4."""
    means = []
    for k in range(60):
        G = 3 * randn(64, 400, dtype=F64, seed=k) + (torch.arange(400) < 4)
        means.append(
            1 / diagnostics.noise_scale(G @ G.mT)
        )  # of which the mean is that of ‖ḡ‖², up to the trace's noise
    assert float(torch.stack(means).mean()) == pytest.approx(4 / 3600, rel=0.25)

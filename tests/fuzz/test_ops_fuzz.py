"""Every op on gradients from random recipes: against its definition or reference, and what must not change a bit."""

from __future__ import annotations

import math

import torch
from fuzzing import fuzz
from helpers import (
    EPS,
    EPS32,
    EPS64,
    F32,
    F64,
    _normalised,
    condition,
    contract,
    default_rtol,
    gram_error,
    gram_limit,
    needs_extension,
    randn,
    relative,
    residuals,
    rounded,
    svd_align,
    svd_rank,
)
from hypothesis import strategies as st
from strategies import (
    BENIGN,
    BROKEN,
    DEPENDENT,
    SIZES,
    Gradients,
    many_tasks,
    matrices,
    ragged,
)
from test_nash import backward_error
from test_ops import OP_CASES
from test_qp import CERTIFIED, ROUNDING, check_conflict_averse, check_shortest, present
from torch import Tensor

from fastmtl import Info, ops
from fastmtl.ops import reference

pytestmark = needs_extension

seeds = st.integers(-(2**63), 2**63 - 1)
FINITE = (*BENIGN, *DEPENDENT)
SOLVED = Info.SOLVED


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, NaN being equal to NaN."""
    return x.dtype is y.dtype and x.shape == y.shape and torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5))


def with_threads(count, call):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def guarded(like: Tensor, shape=None):
    """An output in the middle of a larger, poisoned buffer, at an address that is not aligned."""
    shape = like.shape if shape is None else torch.Size(shape)
    buffer = torch.full((shape.numel() + 9,), 7.0, dtype=like.dtype)
    out = buffer[5 : 5 + shape.numel()].view(shape)
    out.fill_(math.nan)
    return buffer, out


def check_guard(buffer, count):
    assert (buffer[:5] == 7.0).all()
    assert (buffer[5 + count :] == 7.0).all()


def check_invariant(compute, G: Tensor, exactly: bool = True):
    """The same bits for two threads and from another place in memory; returns them."""
    before = G.clone()
    got = compute(G)
    assert same(with_threads(2, lambda: compute(G)), got), "two threads"
    dense = G.clone(memory_format=torch.contiguous_format)
    assert same(compute(dense), got), "another place in memory"
    assert same(G, before), "the gradients were changed"
    return got


def doubled(G: Tensor, k: int) -> Tensor | None:
    """2^k G, or None where that rounds or overflows."""
    scaled = G * 2.0**k
    return scaled if same(scaled / 2.0**k, G) and bool((scaled.isfinite() == G.isfinite()).all()) else None


def same_but_scaled(scaled: Tensor, got: Tensor, k: int) -> bool:
    """Whether `scaled` is 2^k `got`, wherever neither is subnormal or infinite, which has other digits."""
    least, most = torch.finfo(got.dtype).tiny, torch.finfo(got.dtype).max
    size = got.to(F64).abs()
    inside = (size.clamp_max(size * 2.0**k) > least) & (size.clamp_min(size * 2.0**k) <= most)
    inside |= ~got.isfinite()
    return same(scaled[inside], (got * 2.0**k)[inside])


def products_fit(G: Tensor) -> bool:
    """Whether products of gradients are float64 numbers of full precision, or zero."""
    X = G.to(F64).abs()
    X = X[X.isfinite() & (X > 0)]
    return not X.numel() or (X.max().item() < 1e140 and X.min().item() > 1e-140)


# ------------------------------------------------------------------------------------------------ matrices


@fuzz(60, G=matrices(), k=st.integers(-20, 20))
def test_gram(G: Gradients, k: int) -> None:
    X = G.matrix()
    M = check_invariant(ops.gram, X)
    assert M.dtype is F64
    assert M.shape == (*X.shape[:-1], G.T)
    assert same(M, M.mT)
    broken = ~X.isfinite().all(-1)
    broken = broken[..., :, None] | broken[..., None, :]
    if not products_fit(X):
        return
    assert torch.equal(~M.isfinite(), broken)
    whole = torch.where(X.isfinite().all(-1, keepdim=True), X, 0)
    assert gram_error(torch.where(broken, 0, M), whole) <= gram_limit(X.dtype)
    scaled = doubled(X, k)
    if scaled is not None:
        assert same(ops.gram(scaled), M * 4.0**k), "a power of two changed the digits"


ALPHAS = ("normal", "zeros", "wide", "nan", "inf")


def alpha_of(kind: str, shape, seed: int) -> Tensor:
    alpha = randn(*shape, dtype=F64, seed=seed)
    if kind == "zeros":
        return alpha * (alpha > 0.5)
    if kind == "wide":
        return alpha * 10 ** (4 * randn(*shape, dtype=F64, seed=seed + 1)).clamp(-20, 20)
    if kind in ("nan", "inf") and alpha.numel():
        alpha.view(-1)[seed % alpha.numel()] = float(kind)
    return alpha


def check_combined(G: Tensor, alpha: Tensor, out: Tensor) -> None:
    """Accumulated in float64 and rounded once; what is not finite makes its column so, a weight all columns."""
    X = G.to(F64)
    good = X.isfinite().all(-2) & alpha.isfinite().all(-1, keepdim=True)
    assert not out[~good].isfinite().any()
    finite = torch.where(X.isfinite(), X, 0)
    weights = torch.where(alpha.isfinite(), alpha, 0)
    expected = (weights[..., None, :] @ finite).squeeze(-2)
    largest = (weights.abs()[..., None, :] @ finite.abs()).squeeze(-2)
    with_limits = good & (largest < torch.finfo(out.dtype).max / 2)
    assert rounded(out[with_limits], expected[with_limits], 1e-13 * largest[with_limits])


@fuzz(60, G=matrices(), kind=st.sampled_from(ALPHAS), seed=st.integers(0, 10**6))
def test_combine(G: Gradients, kind: str, seed: int) -> None:
    X = G.matrix()
    alpha = alpha_of(kind, X.shape[:-1], seed)

    def compute(X):
        buffer, out = guarded(X, (*X.shape[:-2], X.shape[-1]))
        ops.combine(X, alpha, out)
        check_guard(buffer, out.numel())
        return out

    check_combined(X, alpha, check_invariant(compute, X))


policies = {
    "scale": st.sampled_from(["min", "median", "rmse"]),
    "rule": st.sampled_from(["normalized", "gram"]),
    "rtol": st.sampled_from([None, None, 0.0, 1e-6, 1e-3, 0.3]),
    "weighted": st.booleans(),
}


def policy_of(T: int, dtype, scale: str, rule: str, rtol: float | None, weighted: bool):
    w = torch.rand(T, dtype=F64, generator=torch.Generator().manual_seed(T)) + 0.1 if weighted else None
    return w, scale, default_rtol(T, dtype) if rtol is None else rtol, EPS64 if dtype is F64 else EPS32, rule


def rank_is_clear(X: Tensor, dtype, rtol: float, rule: str) -> bool:
    """No singular value so near to the cut, nor kept one so small, that rounding of the Gram decides."""
    X = X.to(F64) / X.abs().max().to(F64)
    T = X.shape[0]
    noise = 64 * T * EPS64 + (1e-6 if dtype is not F64 and T > 16 else 0)  # of an eigenvalue, relative to the largest
    judged = torch.linalg.svdvals(_normalised(X, dtype) if rule == "normalized" else X)
    if not judged[0] > 0:
        return True
    squares, cut = torch.zeros(T, dtype=F64), rtol**2
    squares[: len(judged)] = (judged / judged[0]).square()
    near = (squares - cut).abs() <= noise + 1e-6 * cut
    rank = int((squares > cut).sum())
    sizes = torch.linalg.svdvals(X).square()
    rank = min(rank, len(sizes))
    dropped = rank < T and bool(sizes[rank - 1] < 1e6 * noise * sizes[0])
    # The reference has smaller errors than promised up to here only.
    return not bool(near.any()) and not dropped and bool(squares[rank - 1] > 1e3 * noise)


def check_aligned(G: Tensor, policy, out: Tensor) -> None:
    w, scale, rtol, _, rule = policy
    if not G.isfinite().all():
        assert not out.isfinite().any()
        return
    assert out.isfinite().all() or G.abs().max() > torch.finfo(G.dtype).max / 1e4
    if not G.any():
        assert not out.any()
        return
    norms = (G.to(F64) / G.abs().max().to(F64)).norm(dim=1)
    norms = norms[norms > 0]
    if not (norms.max() / norms.min() < 1e7 and rank_is_clear(G, G.dtype, rtol, rule) and out.isfinite().all()):
        return
    kappa, T = condition(G, rtol) if rule == "normalized" else math.inf, G.shape[0]
    if rule == "gram":
        s = torch.linalg.svdvals(_normalised(G.to(F64) / G.abs().max().to(F64), G.dtype))
        kappa = float(s[0] / s[s > 1e-7 * s[0]][-1])
    if kappa * T * EPS32 > 0.3 or kappa > 1e5:
        return
    exponent = -torch.frexp(G.abs().max().to(F64)).exponent
    X, got = torch.ldexp(G.to(F64), exponent), torch.ldexp(out.to(F64), exponent)
    expected, rank = torch.ldexp(svd_align(G, w, scale, rtol, rule), exponent), svd_rank(G, rtol, rule)
    # The weights can nearly cancel on the space that is kept: nothing is promised relative to what is left.
    s = torch.linalg.svdvals(X)
    size = max(expected.norm(), 1e-3 * s[rank - 1] / T)
    coarse = torch.ldexp(torch.tensor(torch.finfo(G.dtype).tiny * EPS[G.dtype] * len(out), dtype=F64), exponent)
    error = (got - expected).norm()
    truth = 16 * EPS64 * s[0]  # that is how well the decomposition itself knows small singular values
    assert error <= contract(T, kappa, G.dtype) * size + coarse + truth, (error, size, kappa)


@fuzz(60, G=matrices(), k=st.integers(-20, 20), **policies)
def test_align(G: Gradients, k: int, scale: str, rule: str, rtol: float | None, weighted: bool) -> None:
    X = G.matrix()
    policy = policy_of(G.T, X.dtype, scale, rule, rtol, weighted)

    def compute(X):
        buffer, out = guarded(X, (*X.shape[:-2], X.shape[-1]))
        ops.align(X, *policy, out)
        check_guard(buffer, out.numel())
        return out

    out = check_invariant(compute, X) if G.T <= 64 else compute(X)
    for one, got in [(X, out)] if X.ndim == 2 else zip(X, out, strict=True):
        check_aligned(one, policy, got)
    scaled = doubled(X, k)
    if scaled is not None and not G.has(*SIZES) and G.T <= 64:
        assert same_but_scaled(compute(scaled), out, k), "a power of two changed the digits"


LEAKS = st.sampled_from([None, "some", "all"])


def leak_of(kind: str | None, T: int) -> Tensor | None:
    return None if kind is None else torch.ones(T, dtype=F64) if kind == "all" else torch.linspace(0, 1, T, dtype=F64)


@fuzz(60, G=matrices(), seed=seeds, leak=LEAKS)
def test_sign_drop(G: Gradients, seed: int, leak: str | None) -> None:
    X, key, leaks = G.matrix(), torch.tensor(seed), leak_of(leak, G.T)

    def compute(X):
        buffer, out = guarded(X, (*X.shape[:-2], X.shape[-1]))
        ops.sign_drop(X, key, leaks, out)
        check_guard(buffer, out.numel())
        return out

    out, expected = check_invariant(compute, X), torch.empty((*X.shape[:-2], X.shape[-1]), dtype=F64)
    reference.sign_drop(X, key, leaks, expected)
    good = X.isfinite().all(-2)
    assert not out[~good].isfinite().any()
    largest = torch.where(good, X.to(F64).abs().sum(-2), 0)
    good &= largest < torch.finfo(X.dtype).max / 2
    assert rounded(out[good], expected[good], 1e-15 * largest[good] + G.T * 5e-324 if leak else 0.0)


# ------------------------------------------------------------------------------------------------ ragged lists


def flat(rows):
    return [g for row in rows for g in row]


def outs_like(rows):
    like = [next(g for g in column if g is not None) for column in zip(*rows, strict=True)]
    return zip(*(guarded(g) for g in like), strict=True)


def check_guards(buffers, outs):
    for buffer, out in zip(buffers, outs, strict=True):
        check_guard(buffer, out.numel())


@fuzz(45, G=ragged())
def test_gram_rows(G: Gradients) -> None:
    rows = G.rows()
    M, X = ops.gram_rows(flat(rows), G.T), G.dense()
    assert same(with_threads(2, lambda: ops.gram_rows(flat(rows), G.T)), M)
    assert same(M, M.mT)
    broken = ~X.isfinite().all(-1)
    assert torch.equal(~M.diagonal().isfinite(), broken) or not products_fit(X)
    broken = broken[:, None] | broken[None]
    if products_fit(X):
        assert M[~broken].isfinite().all()
        whole = torch.where(X.isfinite().all(-1, keepdim=True), X, 0)
        assert gram_error(torch.where(broken, 0, M), whole) <= gram_limit(X.dtype)


@fuzz(45, G=ragged(), kind=st.sampled_from(ALPHAS), seed=st.integers(0, 10**6))
def test_combine_rows(G: Gradients, kind: str, seed: int) -> None:
    rows, alpha = G.rows(), alpha_of(kind, (G.T,), seed)
    buffers, outs = outs_like(rows)
    ops.combine_rows(flat(rows), alpha, list(outs))
    check_guards(buffers, outs)
    X = torch.zeros(G.T, 0, dtype=F64)
    for k, out in enumerate(outs):
        X = torch.stack([torch.zeros_like(out).view(-1) if row[k] is None else row[k].reshape(-1) for row in rows])
        check_combined(X, alpha, out.view(-1))
    _, again = outs_like(rows)
    with_threads(2, lambda: ops.combine_rows(flat(rows), alpha, list(again)))
    assert all(same(x, y) for x, y in zip(outs, again, strict=True))


@fuzz(45, G=ragged(kinds=(*FINITE, *BROKEN)), **policies)
def test_align_rows(G: Gradients, scale: str, rule: str, rtol: float | None, weighted: bool) -> None:
    rows, dtype = G.rows(), G.coarsest()
    policy = policy_of(G.T, dtype, scale, rule, rtol, weighted)
    buffers, outs = outs_like(rows)
    M, alpha, rank = ops.align_rows(flat(rows), G.T, *policy, list(outs))
    check_guards(buffers, outs)
    X = G.dense()
    if not X.isfinite().all():
        assert alpha.isnan().all()
        assert rank == 0
        assert all(not out.isfinite().any() for out in outs)
        return
    # Whatever the weights, the result is theirs; and the weights are those of this Gram matrix.
    for k, out in enumerate(outs):
        column = torch.stack([torch.zeros_like(out).view(-1) if r[k] is None else r[k].reshape(-1) for r in rows])
        check_combined(column, alpha, out.view(-1))
    assert gram_error(M, X) <= gram_limit(dtype, G.T)
    if X.any() and rank_is_clear(X, dtype, policy[2], rule):
        assert rank == ops.balance(M, *policy)[2]
        if dtype is F64 or G.T <= 16:
            assert relative(alpha, ops.align_gram(M, *policy)[0]) <= 1e-12
            assert relative(alpha, ops.balance(M, *policy)[0]) <= 1e-9  # which may come another way


@fuzz(45, G=ragged(), seed=seeds, leak=LEAKS)
def test_sign_drop_rows(G: Gradients, seed: int, leak: str | None) -> None:
    rows, key, leaks = G.rows(), torch.tensor(seed), leak_of(leak, G.T)
    buffers, outs = outs_like(rows)
    ops.sign_drop_rows(flat(rows), G.T, key, leaks, list(outs))
    check_guards(buffers, outs)
    expected = [torch.empty(out.shape, dtype=F64) for out in outs]
    reference.sign_drop_rows(flat(rows), G.T, key, leaks, expected)
    for k, (out, want) in enumerate(zip(outs, expected, strict=True)):
        X = torch.stack([torch.zeros_like(out) if row[k] is None else row[k] for row in rows]).to(F64)
        good = X.isfinite().all(0)
        assert not out[~good].isfinite().any()
        largest = torch.where(good, X.abs().sum(0), 0)
        good &= largest < torch.finfo(out.dtype).max / 2
        assert rounded(out[good], want[good], 1e-15 * largest[good] + G.T * 5e-324 if leak else 0.0)


# ------------------------------------------------------------------------------------------------ Gram matrices

# A Gram matrix is that of a recipe, in float64.
grams = {
    "G": matrices(
        tasks=many_tasks, sizes=st.integers(0, 60), dtypes=("float64",), kinds=(*FINITE, "tiny", "large", *BROKEN),
        layouts=("contiguous", "transposed", "every other column"),
    ),
    "k": st.integers(-60, 60),
}  # fmt: skip


def gram_of(G: Gradients) -> Tensor:
    X = G.exact()
    M = X @ X.mT
    M = M.triu() + M.triu(1).mT
    if G.layout == "transposed":
        return M.mT.contiguous().mT
    if G.layout == "every other column":
        return torch.stack([M, torch.full_like(M, math.nan)], -1)[..., 0]
    return M


def entries(M: Tensor, *results: Tensor):
    """The matrices of a batch, each with its own results."""
    return [(M, *results)] if M.ndim == 2 else list(zip(M, *results, strict=True))


def check_solver(solve, M: Tensor, k: int, homogeneous: bool = True):
    """What every op on Gram matrices keeps; returns the matrices that are finite, with their results."""
    before, got = M.clone(), solve(M)
    assert all(same(x, y) for x, y in zip(with_threads(2, lambda: solve(M)), got, strict=True)), "two threads"
    assert same(M, before)
    if homogeneous:
        scaled = solve(M * 4.0**k)
        assert all(same(x, y) for x, y in zip(scaled, got, strict=True)), "a power of two changed the digits"
    finite = []
    for one in entries(M, *got):
        if one[0].isfinite().all():
            assert all(same(x, y) for x, y in zip(solve(one[0]), one[1:], strict=True)), "an entry alone"
            finite.append(one)
        else:
            assert all(x.isnan().all() for x in one[1:])
    return finite


def is_certified(residual: Tensor) -> bool:
    """Every problem is solved; nearly all so well that the conditions hold to the limits of the checks in test_qp."""
    assert residual <= SOLVED
    return bool(residual <= CERTIFIED)


@fuzz(40, **grams)
def test_mgda(G: Gradients, k: int) -> None:
    for M, alpha, residual in check_solver(ops.mgda, gram_of(G), k):
        if is_certified(residual):
            check_shortest(*unit(M), alpha, residual)


def unit(M: Tensor):
    """M with its largest entry near one."""
    exponent = torch.frexp(M.abs().max()).exponent if M.any() else torch.tensor(0)
    return (torch.ldexp(M, -exponent),)


@fuzz(40, **grams, weights=st.sampled_from(["mean", "signed", "zeros"]), each=st.booleans())
def test_dual_cone(G: Gradients, k: int, weights: str, each: bool) -> None:
    w = None if weights == "mean" else randn(G.T, dtype=F64, seed=1) * (weights == "signed")
    w = w.abs() if each and w is not None else w
    for M, alpha, residual in check_solver(lambda M: ops.dual_cone(M, w, each), gram_of(G), k):
        u = torch.full((G.T,), 1 / G.T, dtype=F64) if w is None else w
        u = torch.where(M.diagonal() > 0, u, 0.0)
        if not each:
            assert residual <= SOLVED
            # As in test_qp; and of nearly opposed gradients v is large, and M v off by the rounding of its terms.
            lengths = M.diagonal().clamp_min(0).sqrt()
            rounding = (residual + ROUNDING) * (alpha.abs() @ lengths)
            products, slack = M @ alpha, G.T * lengths * (1e-12 * (u.abs() @ lengths) + rounding)
            assert (alpha >= u).all()
            assert (products >= -slack).all()
            assert ((alpha <= u) | (products <= slack)).all()
            continue
        total = torch.zeros_like(u)
        for row in torch.diag(u):
            v, r = ops.dual_cone(M, row, False)
            total += v
            assert residual >= r * (1 - 1e-6) - ROUNDING
        # Of many tasks, each starts from another's support: the same projections, to rounding, of weights that are
        # others where tasks depend on each other.
        lengths = M.diagonal().clamp_min(0).sqrt()
        if not torch.equal(total, alpha):
            assert G.T > 64
            assert ((M @ (total - alpha)).abs() <= 1e-13 * lengths * (total @ lengths)).all()
            C = M / lengths[:, None] / lengths
            independent = C.isfinite().all() and torch.linalg.eigvalsh(C)[0] > 1e-6
            assert not independent or (total - alpha).abs() @ lengths <= 1e-13 * total @ lengths
        assert residual <= SOLVED


@fuzz(40, **grams, c=st.sampled_from([0.0, 0.01, 0.4, 0.5, 1.0, 2.0, 10.0]))
def test_cagrad(G: Gradients, k: int, c: float) -> None:
    for M, alpha, residual in check_solver(lambda M: ops.cagrad(M, c), gram_of(G), k):
        if is_certified(residual):
            check_conflict_averse(*unit(M), c, alpha, residual)


@fuzz(40, **grams, power=st.sampled_from([0.1, 0.5, 1.0, 2.0, 10.0]))
def test_nash(G: Gradients, k: int, power: float) -> None:
    for M, alpha, residual in check_solver(lambda M: ops.nash(M, power), gram_of(G), k, homogeneous=False):
        M, alpha = present(M, alpha)
        lengths = M.diagonal().sqrt()
        if not residual <= 1e-8:  # only where some combination of unit gradients vanishes to rounding errors
            assert residual < math.inf or not alpha.any()
            C = M / lengths[:, None] / lengths
            hull = ops.mgda(C)[0]
            assert hull @ C @ hull <= 256 * len(M) * EPS64
            continue
        if not len(M):
            assert residual == 0
            continue
        assert (alpha > 0).all()
        assert backward_error(M, alpha, power) <= 64


@fuzz(40, **grams, weighted=st.booleans(), rtol=st.sampled_from([0.0, 1e-6, 1e-3, 0.1]))
def test_unit_solve(G: Gradients, k: int, weighted: bool, rtol: float) -> None:
    w = randn(G.T, dtype=F64, seed=3) if weighted else None
    for M, alpha, cosines in check_solver(lambda M: ops.unit_solve(M, w, rtol), gram_of(G), k, homogeneous=False):
        lengths = M.diagonal().clamp_min(0).sqrt()
        b = torch.where(lengths > 0, 1 / lengths, 0)
        lam, V = torch.linalg.eigh(M * b[:, None] * b)
        cut = max(rtol**2, 4 * G.T * EPS64) * lam[-1]
        assert alpha.isfinite().all()
        assert not alpha[lengths == 0].any()
        if ((lam - cut).abs() <= 64 * G.T * EPS64 * lam[-1]).any():
            continue
        kept = lam > cut
        kappa = float((lam[-1] / lam[kept].min()).sqrt()) if kept.any() and lam[-1] > 0 else 1.0
        wanted = (lengths > 0).to(F64) * (1 if w is None else w)
        reached, least = (wanted @ V[:, kept]).norm(), max(rtol, 16 * G.T * EPS64) * wanted.norm()
        if (reached - least).abs() <= 1e-12 * G.T * kappa * wanted.norm():
            continue
        if reached < least:
            assert not alpha.any()
            assert not cosines.any()
            continue
        x = V[:, kept] @ ((wanted @ V[:, kept]) / lam[kept])
        limit = 1e-13 * G.T * kappa**2
        assert (alpha * lengths - x).norm() <= limit * (x.norm() + wanted.norm() / lam[-1].clamp_min(1e-300))
        assert (cosines - V[:, kept] @ (wanted @ V[:, kept])).norm() <= limit * wanted.norm()


@fuzz(20, **grams, weights=st.sampled_from(["mean", "own", "each"]))
def test_constant(G: Gradients, k: int, weights: str) -> None:
    M = gram_of(G)
    w = None if weights == "mean" else randn(*(M.shape[:-1] if weights == "each" else (G.T,)), dtype=F64)
    alpha = ops.constant(M, w)
    expected = torch.full(M.shape[:-1], 1 / G.T, dtype=F64) if w is None else w.expand(M.shape[:-1])
    expected = torch.where(M.diagonal(dim1=-2, dim2=-1) > 0, expected, 0.0)
    assert same(alpha, torch.where(M.isfinite().all(-1).all(-1, keepdim=True), expected, math.nan))


@fuzz(30, **grams, seed=seeds, per_task=st.booleans())
def test_pcgrad(G: Gradients, k: int, seed: int, per_task: bool) -> None:
    M, key = gram_of(G), torch.tensor(seed)
    alpha = ops.pcgrad(M, key, per_task)
    assert same(with_threads(2, lambda: ops.pcgrad(M, key, per_task)), alpha)
    assert same(ops.pcgrad(M * 4.0**k, key, per_task), alpha)
    expected = reference.pcgrad(M, key, per_task)
    assert torch.equal(alpha.isnan(), expected.isnan())
    for one, got, want in entries(M, alpha, expected):
        if one.isfinite().all():
            lengths = one.diagonal().clamp_min(0).sqrt()
            assert ((got - want) * lengths).norm() <= 1e-9 * (want.abs() @ lengths)


@fuzz(
    30, **grams, seed=seeds, beta=st.sampled_from([0.0, 0.01, 0.5, 1.0]), start=st.sampled_from([0.0, 0.5, 0.99, 1.0])
)
def test_gradvac(G: Gradients, k: int, seed: int, beta: float, start: float) -> None:
    M, key = gram_of(G), torch.tensor(seed)
    before = start * randn(*M.shape, dtype=F64, seed=5).tanh()

    def step(M, op=ops.gradvac):
        targets = before.clone()
        return op(M, key, beta, targets), targets

    alpha, targets = step(M)
    for other in (with_threads(2, lambda: step(M)), step(M * 4.0**k)):
        assert same(other[0], alpha)
        assert same(other[1], targets)
    expected, wanted = step(M, reference.gradvac)
    assert torch.equal(alpha.isnan(), expected.isnan())
    assert targets.isfinite().all()
    assert (targets.abs() <= 1 + 1e-12).all()
    for one, got, want, now, then, first in entries(M, alpha, expected, targets, wanted, before):
        if not one.isfinite().all():
            assert got.isnan().all()
            assert torch.equal(now, first)
        elif not G.has(*DEPENDENT) and G.P > G.T:  # else rounding can decide about a branch
            lengths = one.diagonal().clamp_min(0).sqrt()
            assert ((got - want) * lengths).norm() <= 1e-8 * (want.abs() @ lengths)
            assert (now - then).abs().max() <= 1e-8


@fuzz(40, **grams, **policies)
def test_balance(G: Gradients, k: int, scale: str, rule: str, rtol: float | None, weighted: bool) -> None:
    policy = policy_of(G.T, F32, scale, rule, rtol, weighted)

    def solve(M):
        return ops.balance(M, *policy)

    M = gram_of(G)
    got = solve(M)
    assert all(same(x, y) for x, y in zip(with_threads(2, lambda: solve(M)), got, strict=True))
    alpha, lam, rank = solve(M * 4.0**k)
    assert same(alpha, got[0])
    assert same(lam, got[1] * 4.0**k)
    assert same(rank, got[2])
    for one, alpha, lam, rank in entries(M, *got):
        if not one.isfinite().all():
            assert alpha.isnan().all()
            assert lam.isnan().all()
            assert rank == 0
            continue
        assert alpha.isfinite().all()
        assert (lam >= 0).all()
        assert (lam[:-1] >= lam[1:]).all()
        assert 0 <= rank <= G.T
        true = torch.linalg.eigvalsh(one).flip(0).clamp_min(0)
        assert (lam - true).abs().max() <= 20 * G.T * EPS64 * true[0]
        if rank:
            s = {"min": lam[rank - 1], "median": lam[rank // 2], "rmse": lam[:rank].mean()}[scale]
            w = torch.full((G.T,), 1 / G.T, dtype=F64) if policy[0] is None else policy[0]
            # αᵀ M α = s ‖V_Rᵀ w‖²
            assert alpha @ one @ alpha <= s * (w @ w) * (1 + 1e-6) + 100 * G.T * EPS64 * lam[0] * (alpha @ alpha)


@fuzz(40, G=grams["G"], shift=st.sampled_from([0.0, 0.5, 1.0]), single=st.booleans())
def test_eigh(G: Gradients, shift: float, single: bool) -> None:
    """Symmetric matrices, definite or not."""
    M = gram_of(G)
    M = M - shift * torch.eye(G.T, dtype=F64) * M.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    M = M.to(F32) if single else M
    lam, V = ops.eigh(M)
    assert lam.dtype is V.dtype is M.dtype
    for one, values, vectors in entries(M, lam, V):
        if not one.isfinite().all():
            assert values.isnan().all()
            assert vectors.isnan().all()
            continue
        assert (values[1:] >= values[:-1]).all()
        size = one.abs().max()
        if not size or size < 1e-30:  # in float32 eigenvalues may be subnormal
            continue
        assert max(residuals(one, values, vectors)) < 10


# ------------------------------------------------------------------------------------------------ memory


def error_of(call) -> str | None:
    """What a call complains about, if it does, by the errors that are promised."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:  # NotImplementedError too
        return str(error)
    return None


def addresses(x: Tensor) -> list[int]:
    """Where every element lies, in elements from the beginning of its storage."""
    index = torch.full(x.shape, x.storage_offset())
    for d, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True)):
        index += (torch.arange(n) * s).view([-1 if i == d else 1 for i in range(x.ndim)])
    return index.reshape(-1).tolist()


writers = {
    "align": lambda G, out: ops.align(G, *policy_of(len(G), G.dtype, "min", "normalized", None, False), out),
    "combine": lambda G, out: ops.combine(G, torch.ones(len(G), dtype=F64), out),
    "sign_drop": lambda G, out: ops.sign_drop(G, torch.tensor(1), None, out),
    "align_rows": lambda G, out: ops.align_rows(
        list(G), len(G), *policy_of(len(G), G.dtype, "min", "normalized", None, False), [out]
    ),
    "combine_rows": lambda G, out: ops.combine_rows(list(G), torch.ones(len(G), dtype=F64), [out]),
    "sign_drop_rows": lambda G, out: ops.sign_drop_rows(list(G), len(G), torch.tensor(1), None, [out]),
}


@fuzz(
    45,
    op=st.sampled_from(sorted(writers)),
    T=st.integers(1, 6),
    P=st.integers(0, 40),
    begin=st.integers(0, 400),
    step=st.integers(0, 5),
    out_begin=st.integers(0, 400),
    out_step=st.integers(0, 5),
    dtype=st.sampled_from(["float32", "float64", "bfloat16"]),
)
def test_memory(op, T, P, begin, step, out_begin, out_step, dtype) -> None:
    """`out` anywhere in the memory of G: a result, where no element is shared or repeated, or an error and no write."""
    memory = randn(2000, dtype=getattr(torch, dtype))
    G = memory.as_strided((T, P), (P * max(step, 1) + 1, step), begin)
    out = memory.as_strided((P,), (out_step,), out_begin)
    before, expected = memory.clone(), torch.empty(P, dtype=memory.dtype)
    writers[op](G.clone(), expected)
    written = addresses(out)
    harmful = len(set(written)) < len(written) or bool(set(written) & set(addresses(G)))
    message = error_of(lambda: writers[op](G, out))
    if message is not None:
        assert "out" in message
        assert torch.equal(memory, before)
        return
    assert not harmful, "overlapping memory was written"
    assert torch.equal(out, expected)
    untouched = torch.ones(2000, dtype=torch.bool)
    untouched[written] = False
    assert torch.equal(memory[untouched], before[untouched])


# ------------------------------------------------------------------------------------------------ wrong arguments


def wrong_tensors(g: Tensor) -> dict[str, object]:
    """What can be wrong with a tensor. (Sparse ones go to the reference, which writes as it goes.)"""
    return {
        "integers": g.to(torch.int32),
        "complex": g.to(torch.complex64),
        "bool": g > 0,
        "float8": g.to(torch.float8_e5m2),
        "requires grad": g.to(F64).requires_grad_(),
        "another dimension": g[None, None],
        "no dimension": torch.ones((), dtype=g.dtype),
        "longer": torch.cat([g, g], -1) if g.ndim else g[None].repeat(2),
        "empty": g[..., :0] if g.ndim else g[None][:0],
        "strided": torch.stack([g, g], -1)[..., 0],
        "meta": g.to("meta"),
        "another dtype": g.to(F32 if g.dtype is F64 else F64),
        "a list": g.tolist(),
        "a number": 3.0,
        "a word": "three",
        "NaN": math.nan,
        "negative": -1,
    }


WRONG = tuple(wrong_tensors(torch.ones(2)))


def mutated(argument: object, wrong: str, which: int) -> object:
    if isinstance(argument, list):
        return [mutated(x, wrong, 0) if i == which % len(argument) else x for i, x in enumerate(argument)]
    if argument is None or not isinstance(argument, Tensor):
        return wrong_tensors(torch.ones(3))[wrong]
    return wrong_tensors(argument)[wrong]


def copied(argument: object) -> object:
    return (
        argument.clone()
        if isinstance(argument, Tensor)
        else list(map(copied, argument))
        if isinstance(argument, list)
        else argument
    )


@fuzz(
    120,
    case=st.integers(0, len(OP_CASES) - 1),
    which=st.integers(0, 9),
    wrong=st.sampled_from(WRONG),
    part=st.integers(0, 3),
)
def test_wrong_arguments_of_ops(case: int, which: int, wrong: str, part: int) -> None:
    """A valid call with one argument exchanged ends, in a result or in an error: and then nothing was written."""
    name, args, kwargs = OP_CASES[case]
    args = [copied(x) for x in (*args, *kwargs.values())]
    which %= len(args)
    args[which] = mutated(args[which], wrong, part)
    before = copied(args)
    try:
        getattr(ops, name)(*args)
    except Exception as error:
        failed = str(error)
    else:
        return
    assert failed
    for x, y in zip(args, before, strict=True):
        for now, then in zip(x, y, strict=True) if isinstance(x, list) else [(x, y)]:
            if (
                isinstance(now, Tensor)
                and now.device.type == "cpu"
                and not now.is_sparse
                and not now.is_complex()
                and now.dtype in EPS
            ):
                assert same(now.detach(), then.detach()), "an argument was written"

"""More than 64 tasks: weights of a definite Gram without its eigenvectors, where they are certified, else from its
tridiagonal form, and Grams from panels that all threads share (more than 128 tasks)."""

import math

import pytest
import torch
from helpers import (
    BF16,
    DTYPES,
    EPS,
    EPS32,
    F16,
    F32,
    F64,
    conditioned,
    dense,
    dtype_id,
    flat,
    generator,
    gram_error,
    needs_extension,
    randn,
    relative,
    svd_align,
    svd_rank,
)
from test_isa import CAPABILITY, RANK, run

import fastmtl
from fastmtl import ops

SCALES = ("min", "median", "rmse")
# What docs/numerics.md promises of few tasks; the result is rounded to the dtype.
LIMIT = {F32: 2e-6, F64: 1e-9, BF16: EPS[BF16], F16: EPS[F16]}
POLICY = (None, "min", 1e-3, EPS32, "normalized")


def uneven(T, seed=100):
    return torch.rand(T, generator=generator(seed), dtype=F64) + 0.1


def by_rows(method, G):
    """The result for a list of rows."""
    (got,) = method(list(G))
    return got


def orthonormal(T, P, seed=0):
    Q, _ = torch.linalg.qr(randn(P, T, dtype=F64, seed=seed))
    return Q.T


# ------------------------------------------------------------------------------------------------ against the SVD


# P / T settles the way: float32 blocks from 4 on; at 2 an exact Gram, still certified; at 1.05 a tridiagonalisation but
# for the fewest tasks.
@pytest.mark.parametrize("ratio", [5.5, 2.0, 1.05])
@pytest.mark.parametrize("T", [65, 100, 129, 200, 300])
def test_benign_gradients(T, ratio):
    w = uneven(T)
    for dtype in (F32, F64, BF16):
        G = randn(T, int(ratio * T) + 1, dtype=dtype, seed=T)
        for options in ({}, {"weights": w, "scale": "rmse"}, {"weights": w, "scale": "median", "rank_rule": "gram"}):
            method = fastmtl.AlignedMTL(**options)
            got, expected = method(G), svd_align(G, **options)
            assert got.dtype is dtype
            assert relative(got, expected) <= LIMIT[dtype], (dtype, options)
            assert relative(by_rows(method, G), expected) <= LIMIT[dtype], (dtype, options)


@pytest.mark.parametrize("rank_rule", ["normalized", "gram"])
@pytest.mark.parametrize("scale", SCALES)
def test_options(scale, rank_rule):
    """Signed weights, every scale and both rules, for norms within and beyond the ratio that is certified."""
    T = 100
    w = uneven(T) * torch.where(torch.arange(T) % 3 == 0, -1.0, 1.0)
    method = fastmtl.AlignedMTL(weights=w, scale=scale, rtol=1e-4, rank_rule=rank_rule)
    for spread in (1.0, 5.0, 30.0):
        G = randn(T, 450, dtype=F64) * torch.logspace(0, math.log10(spread), T, dtype=F64)[:, None]
        expected = svd_align(G, w, scale, 1e-4, rank_rule)
        assert relative(method(G), expected) <= 1e-9
        assert relative(method(G.float()), svd_align(G.float(), w, scale, 1e-4, rank_rule)) <= 2e-6
        assert relative(method(G), by_rows(method, G)) <= 1e-9


def test_six_hundred_tasks():
    G = randn(600, 2500)
    assert relative(fastmtl.AlignedMTL()(G), svd_align(G)) <= 2e-6
    assert relative(fastmtl.AlignedMTL()(G), by_rows(fastmtl.AlignedMTL(), G)) <= 1e-6


@needs_extension
def test_weights_and_eigenvalues_come_in_two_ways():
    """Or comparing the two would say nothing: equal bits mean that the weights came by the same way."""
    for T in (130, 300):
        M = ops.gram(randn(T, 4 * T, dtype=F64))
        for scale in SCALES:
            alpha, _, rank = ops.balance(M, None, scale, 1e-4, 1e-16, "normalized")
            method = fastmtl.AlignedMTL(scale=scale, rtol=1e-4)
            found = method.weighting(M, F64)
            assert rank == T
            assert relative(found, alpha) <= 1e-9
            assert torch.equal(found, alpha) == (scale == "median")  # which needs all eigenvalues


def test_batch_of_many_tasks():
    G = torch.stack([randn(130, 600), randn(130, 600, seed=1) * 1e3, torch.zeros(130, 600)])
    got = fastmtl.AlignedMTL()(G)
    assert relative(got[0], svd_align(G[0])) <= 2e-6
    assert relative(got[1], svd_align(G[1])) <= 2e-6
    assert not got[2].any()


@pytest.mark.parametrize("T", [100, 130, 200])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(F32, (1e-18, 1e-20, 1e-21, 1e-22, 1e-25, 1e18, 1e25)), (BF16, (1e-21, 1e-22, 1e25)), (F64, (1e-200, 1e200))],
    ids=dtype_id,
)
def test_extreme_scales(T, dtype, sizes):
    """Float32 squares that over- or underflow, be it in part: the direction stays."""
    G = randn(T, 5 * T, dtype=dtype)
    for size in sizes:
        scaled = G * size
        assert relative(fastmtl.AlignedMTL()(scaled), svd_align(scaled)) <= LIMIT[dtype], size


@pytest.mark.parametrize("T", [100, 130])
def test_one_task_whose_squares_nearly_underflow(T):
    """Its square is subnormal in float32, those of the others are not; it is no empty one beside them."""
    G = randn(T, 5 * T) * 1e-16
    G[3] *= 1e-5
    for scale in ("min", "rmse"):
        assert relative(fastmtl.AlignedMTL(scale=scale)(G), svd_align(G, scale=scale)) <= 2e-6


# ------------------------------------------------------------------------------------------------ special spectra


@pytest.mark.parametrize("T", [65, 130, 300])
def test_orthonormal_rows(T):
    """All eigenvalues are equal: a Krylov space of one dimension. A = I, whatever is asked for."""
    w = uneven(T)
    for G in (torch.eye(T, 5 * T, dtype=F64), orthonormal(T, 5 * T)):
        for scale in SCALES:
            method = fastmtl.AlignedMTL(weights=w, scale=scale)
            assert relative(method(G), w @ G) <= 1e-9
            assert relative(method(G.float()), w @ G.float().to(F64)) <= 2e-6


@pytest.mark.parametrize(("own", "common"), [(2.0, 0.5), (1.0, 2.0), (1.0, 16.0)])
@pytest.mark.parametrize("T", [65, 129, 300])
def test_equal_weights_are_an_eigenvector(T, own, common):
    """M = a I + b 11ᵀ: nothing of λ_min = a is in the Krylov space of w, whose M^-1/2 w is w / sqrt(a + b T)."""
    a, b = own**2, common**2
    G = torch.zeros(T, 4 * T + 1)
    G[:, :T] = own * torch.eye(T)
    G[:, -1] = common
    mean = G.to(F64).mean(0)
    for dtype in (F32, F64):
        for scale, square in (("min", a), ("median", a), ("rmse", a + b)):
            expected = mean * math.sqrt(square / (a + b * T))
            method = fastmtl.AlignedMTL(scale=scale, rtol=1e-4)
            assert relative(method(G.to(dtype)), expected) <= LIMIT[dtype]


@pytest.mark.parametrize("smallest", [0.3, 0.05, 1e-3, 0.0])
@pytest.mark.parametrize("T", [65, 130, 200])
def test_the_weights_hide_the_smallest_eigenvalue(T, smallest):
    """w is a sum of three eigenvectors of others; where σ_min is below the cut, no Krylov space of w shows it."""
    U, V = orthonormal(T, T, seed=1), orthonormal(T, 4 * T, seed=2)
    s = torch.linspace(2.0, 1.0, T, dtype=F64)
    s[-1] = smallest
    G = (U * s) @ V
    w = U[:, 0] + U[:, 7] + 2 * U[:, T // 2]
    for scale in SCALES:
        for rtol, rank in ((1e-4, T if smallest else T - 1), (1e-2, T if smallest > 1e-2 else T - 1)):
            assert svd_rank(G, rtol) == rank
            got = fastmtl.AlignedMTL(weights=w, scale=scale, rtol=rtol)(G)
            assert relative(got, svd_align(G, w, scale, rtol)) <= 1e-9, (scale, rtol)


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-9, 1e-7, 3e-7, 1e-6, 1e-4])
@pytest.mark.parametrize("T", [65, 130])
def test_nearly_equal_smallest_eigenvalues(T, gap):
    """Which of them inverse iteration has found shows in c, as far as λ_min is certified; c of rmse needs none."""
    s = torch.linspace(3.0, 2.0, T, dtype=F64)
    s[-3:] = 1 + gap * torch.arange(3, dtype=F64)
    U = orthonormal(T, T, seed=1)
    G = (U * s) @ orthonormal(T, 4 * T, seed=2)
    for w in (uneven(T), U[:, 0], U[:, -1], U[:, -2]):
        for scale, limit in (("min", 5e-7), ("rmse", 1e-12)):
            got = fastmtl.AlignedMTL(weights=w, scale=scale, rtol=1e-4)(G)
            assert relative(got, svd_align(G, w, scale, 1e-4)) <= limit, scale


@pytest.mark.parametrize("smallest", [0.3, 0.05, 1e-3, 0.0, 1.0 - 1e-7])
def test_as_many_as_krylov_spaces_are_for(smallest):
    """Beyond 640 tasks: w is a sum of eigenvectors of others, or of all. The SVD is known."""
    T = 700
    U, V = orthonormal(T, T, seed=1), orthonormal(T, 2 * T, seed=2)
    s = torch.linspace(2.0, 1.0, T, dtype=F64)
    s[-1] = smallest
    rank = T if smallest else T - 1
    for w in (U[:, 0] + U[:, 7] + 2 * U[:, T // 2], uneven(T)):
        for scale, size in (("min", s[rank - 1]), ("rmse", s[:rank].square().mean().sqrt())):
            got = fastmtl.AlignedMTL(weights=w, scale=scale, rtol=1e-4)((U * s) @ V)
            assert relative(got, size * (w @ U)[:rank] @ V[:rank]) <= 5e-7, scale


def duplicated(T):
    G = randn(T, 5 * T)
    return torch.cat([G[: T - 3], G[:3]])


def with_empty_row(T):
    G = randn(T, 5 * T)
    G[T // 2] = 0
    return G


DEPENDENT = {
    "duplicates": duplicated,
    "last opposed": lambda T: torch.cat([randn(T, 5 * T)[:-1], -randn(T, 5 * T)[:1]]),
    "zero row": with_empty_row,
    "all equal": lambda T: randn(1, 5 * T, seed=4).expand(T, -1),
    "T > P": lambda T: randn(T, T // 2),
    "T > P by one": lambda T: orthonormal(T - 1, T, seed=3).T.float(),
    "P = 1": lambda T: randn(T, 1),
    "sum of others": lambda T: torch.cat([randn(T - 1, 5 * T), randn(T - 1, 5 * T, dtype=F64).mean(0)[None].float()]),
}


@pytest.mark.parametrize("name", DEPENDENT)
@pytest.mark.parametrize("T", [65, 130, 200])
def test_dependent_tasks(T, name):
    G = DEPENDENT[name](T)
    assert svd_rank(G) < T
    for dtype in (F32, F64):
        for scale, w in (("min", None), ("rmse", uneven(T))):
            method, given = fastmtl.AlignedMTL(weights="mean" if w is None else w, scale=scale), G.to(dtype)
            assert relative(method(given), svd_align(given, w, scale)) <= 2e-6, (dtype, scale)


@pytest.mark.parametrize("T", [65, 130, 200])
def test_ill_conditioned(T):
    w = uneven(T)
    for kappa in (30.0, 1e3, 1e4):
        G = conditioned(T, 5 * T, kappa)
        for scale in SCALES:
            got = fastmtl.AlignedMTL(weights=w, scale=scale, rtol=T * EPS32)(G)
            assert relative(got, svd_align(G, w, scale, T * EPS32)) <= 2e-6, (kappa, scale)
    G = conditioned(T, 5 * T, 1e4)
    assert 1 < svd_rank(G) < T  # the default tolerance cuts through the spectrum
    assert relative(fastmtl.AlignedMTL(weights=w)(G), svd_align(G, w)) <= 2e-6


@pytest.mark.parametrize("T", [65, 129, 300])
def test_weights_with_zeros(T):
    G = randn(T, 5 * T)
    w = uneven(T)
    w[::2] = 0
    one = torch.zeros(T)
    one[-1] = 3.0
    for given in (w, one):
        for scale in ("min", "rmse"):
            assert relative(fastmtl.AlignedMTL(weights=given, scale=scale)(G), svd_align(G, given, scale)) <= 2e-6
    nothing = fastmtl.AlignedMTL(weights=torch.zeros(T))
    for dtype in DTYPES:
        assert torch.equal(nothing(G.to(dtype)), torch.zeros(5 * T, dtype=dtype))
    assert not by_rows(nothing, G).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_zero_gradients(dtype):
    for T in (65, 129, 300):
        for P in (1, 4 * T):
            for scale in SCALES:
                assert not fastmtl.AlignedMTL(scale=scale)(torch.zeros(T, P, dtype=dtype)).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_non_finite_gradients(dtype, bad):
    """Wherever it is, in the columns and tasks that are judged first or not, all of the result shows it."""
    for T, P in ((65, 300), (129, 600), (300, 1500), (300, 100)):
        G = randn(T, P, dtype=dtype)
        for t, p in ((0, 0), (T - 1, P - 1), (T - 1, 0), (0, P - 1), (T // 2, P // 2)):
            before = G[t, p].clone()
            G[t, p] = bad
            assert not fastmtl.AlignedMTL()(G).isfinite().any(), (T, P, t, p)
            G[t, p] = before
        assert fastmtl.AlignedMTL()(G).isfinite().all()


# ------------------------------------------------------------------------------------------------ rows of all sizes


@pytest.mark.parametrize("T", [70, 150, 300])
def test_graded_rows(T):
    """Directions as independent as random ones are, norms over six decades in any order."""
    factors = torch.logspace(-6, 0, T, dtype=F64)
    order = torch.randperm(T, generator=generator(T))
    w = uneven(T)
    for dtype in (F32, F64):
        G = (randn(T, 5 * T, dtype=F64, seed=T) * factors[:, None]).to(dtype)
        for scale in SCALES:
            expected = svd_align(G, w, scale, 1e-4)
            got = fastmtl.AlignedMTL(weights=w[order], scale=scale, rtol=1e-4)(G[order])
            assert relative(got, expected) <= 1e-6, (dtype, scale)
            assert (
                relative(by_rows(fastmtl.AlignedMTL(weights=w[order], scale=scale, rtol=1e-4), G[order]), expected)
                <= 1e-6
            )
    empty = G.clone()
    empty[T // 3] = 0
    got = fastmtl.AlignedMTL(weights=w[order], rtol=1e-4)(empty[order])
    assert relative(got, svd_align(empty, w, rtol=1e-4)) <= 1e-6


# ------------------------------------------------------------------------------------------------ the Gram


SIZES = (1, 7, 63, 1000, 2049, 5000)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [129, 200, 300])
def test_gram(T, dtype):
    for P in SIZES:
        buffer = randn(T, P + 19, dtype=dtype, seed=P)
        unaligned = buffer.reshape(-1)[1 : T * P + 1].view(T, P)
        views = {
            "dense": buffer[:, :P].contiguous(),
            "strided": buffer[:, 3 : P + 3],
            "unaligned": unaligned,
            "transposed": buffer.reshape(-1)[: T * P].view(P, T).T,
            "same rows": buffer[:1, :P].expand(T, P),
        }
        for name, G in views.items():
            M = ops.gram(G)
            assert gram_error(M, G) <= 1e-13, (P, name)
            assert torch.equal(M, M.T), (P, name)


@pytest.mark.parametrize("T", [129, 200, 300])
def test_gram_of_uneven_rows(T):
    """Every entry is right on the scale of its own two rows."""
    G = randn(T, 700, dtype=F64) * torch.logspace(-30, 30, T, dtype=F64)[:, None]
    assert gram_error(ops.gram(G), G) <= 1e-13
    empty = G.clone()
    empty[::3] = 0
    M = ops.gram(empty)
    assert gram_error(M, empty) <= 1e-13
    assert not M[::3].any()


@pytest.mark.parametrize(
    "dtypes", [(F32,), (F64,), (BF16,), (F16,), (F32, BF16, F64, F16)], ids=["f32", "f64", "bf16", "f16", "mixed"]
)
@pytest.mark.parametrize("T", [129, 200, 300])
def test_gram_of_ragged_rows(T, dtypes):
    sizes = (1, 7, 0, 63, 1000, 2049, 2, 1881)

    def part(t, k, n):
        if (t + 2 * k) % 7 == 3 or t == 5 or (t < 40 and k == 4):
            return None
        x = randn(n + 1, dtype=dtypes[k % len(dtypes)], seed=100 * t + k)
        return x[1:] if k % 2 else x[:n]

    rows = [[part(t, k, n) for k, n in enumerate(sizes)] for t in range(T)]
    G, M = dense(rows), ops.gram_rows([g for row in rows for g in row], T)
    assert gram_error(M, G) <= 1e-13
    assert not M[5].any()
    if T == 129:
        got = flat(fastmtl.AlignedMTL(rtol=1e-3)(rows))
        assert relative(got, svd_align(G, rtol=1e-3)) <= max(2e-6, *(LIMIT[d] for d in dtypes))


@needs_extension
@pytest.mark.parametrize("T", [129, 200, 300])
def test_gram_from_float32_blocks(T):
    """As csrc/math/balance.h states its error; what it is for is seen in that it is no exact one."""
    for P in (4 * T, 2049, 5000):
        for dtype in (F32, BF16):
            G = randn(T, P, dtype=dtype)
            M, _, rank = ops.align_rows(list(G), T, *POLICY, [torch.empty(P, dtype=dtype)])
            assert 1e-12 < gram_error(M, G) <= 5e-7
            assert rank == T
            assert relative(ops.balance(M, *POLICY)[1], torch.linalg.svdvals(G.to(F64)).square()) <= 1e-6


# ------------------------------------------------------------------------------------------------ threads


def same_on_all_threads(call):
    expected = None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        got = call()
        expected = got if expected is None else expected
        assert torch.equal(got, expected), f"{threads} threads"


@needs_extension
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=dtype_id)
@pytest.mark.parametrize(("T", "P"), [(129, 5001), (200, 4097), (300, 63), (300, 2049)])
def test_the_same_gram_for_any_number_of_threads(T, P, dtype):
    G = randn(T, P, dtype=dtype)
    same_on_all_threads(lambda: ops.gram(G))
    grads = [g for t, row in enumerate(G) for g in (row[:50], None if t % 3 else row[50:])]
    same_on_all_threads(lambda: ops.gram_rows(grads, T))


@needs_extension
@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)
@pytest.mark.parametrize("T", [65, 130, 300, pytest.param(800, id="products shared by threads")])
def test_the_same_result_for_any_number_of_threads(T, dtype):
    G = randn(T, 5 * T if T < 500 else 4 * T, dtype=dtype)
    for scale in ("min", "rmse") if T < 500 else ("min",):
        same_on_all_threads(lambda scale=scale: fastmtl.AlignedMTL(scale=scale)(G))
    if T < 500:
        same_on_all_threads(lambda: by_rows(fastmtl.AlignedMTL(), G))
        hard = conditioned(T, 2 * T, 1e4, dtype=dtype)
        same_on_all_threads(lambda: fastmtl.AlignedMTL(rtol=1e-5)(hard))


@needs_extension
@pytest.mark.parametrize(("B", "T"), [(2, 33), (7, 48), (5, 100), (9, 129), (3, 300)])
def test_a_batch_is_what_its_matrices_are_for_any_number_of_threads(B, T):
    """Whether its matrices are shared out or solved one after the other, on all threads."""
    G = torch.stack([conditioned(T, 2 * T, 10.0 ** (1 + b % 3), seed=b) for b in range(B)])
    M, seed = ops.gram(G), torch.tensor(3)
    for solve in (
        lambda M: ops.align_gram(M, *POLICY)[0],
        lambda M: ops.balance(M, *POLICY)[0],
        lambda M: ops.balance(M, *POLICY)[1],
        lambda M: ops.unit_solve(M, None, 1e-6)[0],
        lambda M: ops.mgda(M)[0],
    ):
        same_on_all_threads(lambda solve=solve: solve(M))
        assert torch.equal(solve(M), torch.stack([solve(one) for one in M]))
    for threads in (1, 2):  # LAPACK's, whose bits are its own
        torch.set_num_threads(threads)
        lam, V = ops.eigh(M)
        assert relative(V @ (lam[..., None] * V.mT), M) <= 1e-13
    for call in (
        lambda G, out: out.copy_(ops.gram(G)[..., 0, :1]),
        lambda G, out: ops.align(G, *POLICY, out),
        lambda G, out: ops.combine(G, torch.ones(G.shape[:-1], dtype=F64), out),
    ):

        def result(G=G, call=call):
            out = torch.empty(*G.shape[:-2], G.shape[-1])
            call(G, out)
            return out

        same_on_all_threads(result)
        assert torch.equal(result(), torch.stack([result(one) for one in G]))

    def dropped():
        out = torch.empty(B, G.shape[-1])
        ops.sign_drop(G, seed, None, out)
        return out

    same_on_all_threads(dropped)


@needs_extension
def test_eigh_of_a_batch_that_requires_grad():
    """Threads have a grad mode of their own; nothing of it may reach the result, or stay behind."""
    M = ops.gram(randn(6, 40, 90, dtype=F64)).requires_grad_()
    torch.set_num_threads(2)
    lam, V = ops.eigh(M)
    assert lam.grad_fn.name() == V.grad_fn.name()  # that of the op, which refuses
    assert relative(lam.detach(), torch.linalg.eigvalsh(M.detach())) <= 1e-12
    assert (torch.ones(3, requires_grad=True) * 2).requires_grad


# ------------------------------------------------------------------------------------------------ instruction sets


@needs_extension
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_lesser_instruction_sets(isa):
    if RANK[isa] > RANK[CAPABILITY]:
        pytest.skip(f"this processor has no {isa}")
    if isa == torch.ops.fastmtl.cpu_isa():
        pytest.skip(f"{isa} is what all other tests run on already")
    subset = "(gram and 129) or (eigenvector and 129) or (hide and 130) or (benign and 200) or (two_ways)"
    status, output, reported = run({"FASTMTL_CPU": isa}, __file__, "-k", subset)
    assert reported == isa
    assert status == 0, output[-5000:]
    assert " passed" in output
    assert " skipped" not in output

"""The solvers as CUDA kernels, a warp each, on the host against the CPU ops: every method, all kinds of matrices."""

import functools

import build
import harness
import pytest
import torch
from harness import LARGE_SHARED, ORDERS, SMALL_SHARED
from helpers import F64, check_guard, conditioned, generator, guarded, randn

from fastmtl import ops

SOURCE = harness.KERNELS.with_name("weights.cpp")
TASKS = (1, 2, 3, 5, 8, 17, 33, 64)
NOT_SHARED = 0  # no memory: scratch comes from the allocator
SEED = torch.tensor(123456789 << 20)

# By name: the op, and its arguments after M for T tasks.
METHODS = {
    "mgda": ("mgda", lambda T: ()),
    "dual cone": ("dual_cone", lambda T: (None, False)),
    "weighted dual cone": ("dual_cone", lambda T: (weights(T), False)),
    "UPGrad": ("dual_cone", lambda T: (None, True)),
    "weighted UPGrad": ("dual_cone", lambda T: (weights(T), True)),
    "cagrad": ("cagrad", lambda T: (0.4,)),
    "wide cagrad": ("cagrad", lambda T: (1.5,)),
    "nash": ("nash", lambda T: (1.0,)),
    "fair": ("nash", lambda T: (0.5,)),
    "pcgrad": ("pcgrad", lambda T: (SEED, True)),
    "pcgrad in one order": ("pcgrad", lambda T: (SEED, False)),
    "gradvac": ("gradvac", lambda T: (SEED, 0.3)),
}
methods = pytest.mark.parametrize("method", METHODS)
MANY = [method for method in METHODS if method.startswith(("pcgrad", "gradvac"))]  # the CPU's ops take the others


def weights(T):
    w = torch.rand(T, dtype=F64, generator=generator(T)) + 0.1
    w[1::3] *= -1
    return w


@functools.cache
def module():
    harness.require_tools()
    return build.load(build.build("plain", SOURCE))


@pytest.fixture(autouse=True)
def _first_order():
    yield
    module().set_order("sequential", 0)


def run(method, M, limit=LARGE_SHARED, targets=None):
    """(alpha, residual, targets) of the kernels on M [B, T, T]; residual and targets None where there are none."""
    name, arguments = METHODS[method]
    B, T, _ = M.shape
    (alphas, alpha), (residuals, residual) = guarded((B, T), F64), guarded((B,), F64)
    module().set_shared_limit(limit)
    module().reset_launches()
    rest = list(arguments(T))
    if name == "gradvac":
        targets = torch.zeros(B, T, T, dtype=F64) if targets is None else targets.clone()
        rest.append(targets)
    given = [0 if x is None else x.data_ptr() if isinstance(x, torch.Tensor) else x for x in rest]
    M = M.contiguous()
    session = module().Session(False, limit)
    getattr(module(), name)(session, M.data_ptr(), B, T, alpha.data_ptr(), residual.data_ptr(), *given)
    check_guard(alphas, alpha.numel())
    check_guard(residuals, B)
    return alpha, None if name in ("pcgrad", "gradvac") else residual, targets


def on_cpu(method, M, targets=None):
    name, arguments = METHODS[method]
    rest = list(arguments(M.shape[-1]))
    if name == "gradvac":
        targets = torch.zeros_like(M) if targets is None else targets.clone()
        return ops.gradvac(M, *rest, targets), None, targets
    result = getattr(ops, name)(M, *rest)
    return (result, None, None) if name == "pcgrad" else (*result, None)


def same_bits(a, b):
    return all(x is y or torch.equal(x.view(torch.int64), y.view(torch.int64)) for x, y in zip(a, b, strict=True))


def well_posed(T):
    """Gradients [B, T, P] whose solutions are accurate, whatever the method."""
    P = 4 * T + 8
    return torch.stack(
        [
            randn(T, P, dtype=F64, seed=T),
            randn(T, P, dtype=F64, seed=T + 1) + 0.3 * randn(P, dtype=F64, seed=1),  # few conflicts
            conditioned(T, P, 10.0, 1e3, dtype=F64, seed=T),
        ]
    )


def degenerate(T):
    """Gradients [B, T, P] that depend on each other, up to zero."""
    P = 4 * T + 8
    G = randn(T, P, dtype=F64, seed=T)
    other = G.roll(1, 0)
    first = (torch.arange(T) < (T + 1) // 2)[:, None]
    low = randn(T, T // 2 + 1, dtype=F64, seed=2) @ randn(T // 2 + 1, P, dtype=F64, seed=3)
    return {
        "duplicates": torch.where(first, G[:1], G),
        "opposed": torch.where(first, other, -G),
        "opposed pair": torch.where(torch.arange(T)[:, None] == T - 1, -G[:1], G),
        "a zero row": torch.where(torch.arange(T)[:, None] == T // 2, 0.0, G),
        "low rank": low,
        "low rank, few conflicts": low + 3.0,
        "all equal": G[:1].expand(T, P),
        "nothing": torch.zeros(T, P, dtype=F64),
        "spread": low * torch.logspace(0, 6, T, dtype=F64)[:, None],
        "tiny": G * 1e-25,
        "huge": G * 1e25,
    }


def gram(G):
    M = G @ G.mT
    return (M + M.mT) / 2


def distance(G, a, b):
    """‖Gᵀ(a - b)‖ relative to what the sums are made of."""
    size = torch.maximum(a.abs(), b.abs()) @ G.norm(dim=-1) if G.ndim == 2 else None
    if size is None:
        return max(distance(*x) for x in zip(G, a, b, strict=True))
    return float((G.mT @ (a - b)).norm() / size) if size > 0 else float((a - b).abs().max())


@pytest.mark.cover(1)
@methods
@pytest.mark.parametrize("T", TASKS)
def test_well_posed(T, method):
    """As the CPU computes it; the same bits in every order of threads, wherever the scratch is."""
    G = well_posed(T)
    M = gram(G)
    results = []
    for name, limit in zip(ORDERS, (LARGE_SHARED, NOT_SHARED, SMALL_SHARED), strict=True):
        module().set_order(name, T)
        results.append(run(method, M, limit))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])
    alpha, residual, targets = results[0]
    want, expected, wanted_targets = on_cpu(method, M)
    if residual is None:
        assert torch.allclose(alpha, want, rtol=1e-11, atol=1e-12)
    else:
        assert distance(G, alpha, want) <= 1e-9
        assert max(residual.max(), expected.max()) <= 1e-10
    if targets is not None:
        assert torch.allclose(targets, wanted_targets, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", MANY)
def test_more_than_64_tasks(method):
    test_well_posed(70, method)


@pytest.mark.cover(1)
@methods
@pytest.mark.parametrize("T", [2, 3, 8, 17, 33])
def test_degenerate(T, method):
    cases = degenerate(T)
    for (case, G), name in zip(cases.items(), ORDERS * 4, strict=False):
        M = gram(G)[None]
        module().set_order(name, T)
        got = run(method, M, NOT_SHARED if T == 8 else LARGE_SHARED)
        module().set_order("shuffled", T + 1)
        assert same_bits(got, run(method, M)), case
        alpha, residual, _ = got
        want, expected, _ = on_cpu(method, M)
        if residual is not None and residual.isfinite():
            assert residual <= 1e-8, case
        if residual is not None:
            assert residual.isinf().equal(expected.isinf()), case
        # The square of the distance is what M decides.
        assert distance(G[None] / max(G.norm(), 1e-300), alpha, want) <= 1e-7, case


@methods
@pytest.mark.parametrize("T", [2, 5, 33, 64])
def test_absent_tasks(T, method):
    """Weights of zero, and for the others what the CPU has; in every order of threads."""
    G = well_posed(T)
    there = torch.rand(3, T, generator=generator(T)) > 0.5
    there[0] = torch.arange(T) == T - 1
    there[2] = False
    G = torch.where(there[..., None], G, 0.0)
    M = gram(G)
    targets = torch.full_like(M, 0.25)
    results = []
    for name, limit in zip(ORDERS, (LARGE_SHARED, NOT_SHARED, SMALL_SHARED), strict=True):
        module().set_order(name, T)
        results.append(run(method, M, limit, targets))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])
    alpha, residual, after = results[0]
    want, expected, wanted_targets = on_cpu(method, M, targets)
    assert (alpha[~there] == 0).all()
    if residual is None:
        assert torch.allclose(alpha, want, rtol=1e-11, atol=1e-12)
    else:
        assert distance(G, alpha, want) <= 1e-9
        assert max(residual.max(), expected.max()) <= 1e-10
        assert residual[2] == 0
    if METHODS[method][0] == "gradvac":
        assert torch.allclose(after, wanted_targets, rtol=0, atol=1e-12)
        assert (after[~there] == 0.25).all()
        assert (after.mT[~there] == 0.25).all()


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("pcgrad", "pcgrad in one order", "gradvac")]
)
def test_no_nan_is_lost(method):
    """Where weights leave the range of numbers the residual says so, as on the CPU."""
    C = torch.tensor([[1.0, -0.9, 0.1], [-0.9, 1.0, -0.5], [0.1, -0.5, 1.0]], dtype=F64)
    sizes = torch.tensor([1e-320, 1e-300, 1e-10, 1.0, 1e150, 1e307], dtype=F64)
    spread = torch.tensor([1.0, 1.0, 1e-150], dtype=F64)
    M = torch.cat([sizes[:, None, None] * C, sizes[:, None, None] * (C * spread * spread[:, None])])
    alpha, residual, _ = run(method, M)
    assert not (residual <= 1e-8)[~alpha.isfinite().all(-1)].any()
    _, expected, _ = on_cpu(method, M)
    assert torch.equal(residual <= 1e-8, expected <= 1e-8)
    assert (residual <= 1e-8).sum() > 5


@methods
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("T", [1, 3, 11])
def test_a_matrix_that_is_not_finite_spares_the_others(T, bad, method):
    M = gram(well_posed(T))
    targets = torch.rand(M.shape, dtype=F64, generator=generator(1))
    good = run(method, M, targets=targets)
    broken = M.clone()
    broken[1, T - 1, 0] = bad
    alpha, residual, after = run(method, broken, targets=targets)
    assert alpha[1].isnan().all()
    assert torch.equal(alpha[[0, 2]], good[0][[0, 2]])
    if residual is not None:
        assert residual[1].isnan()
        assert torch.equal(residual[[0, 2]], good[1][[0, 2]])
    if METHODS[method][0] == "gradvac":
        assert torch.equal(after[1], targets[1])
        assert torch.equal(after[[0, 2]], good[2][[0, 2]])


def test_targets_follow_from_call_to_call():
    M = gram(well_posed(8))
    before = torch.rand(M.shape, dtype=F64, generator=generator(1)) - 0.5
    for _ in range(3):
        alpha, _, after = run("gradvac", M, targets=before)
        want, _, expected = on_cpu("gradvac", M, targets=before)
        assert torch.allclose(alpha, want, rtol=0, atol=1e-12)
        assert torch.allclose(after, expected, rtol=0, atol=1e-12)
        assert not torch.equal(after, before)
        before = after


@methods
@pytest.mark.parametrize("T", [1, 5, 40])
def test_a_batch_is_its_matrices(T, method):
    """But for the random numbers, which belong to the matrix's place."""
    M = gram(well_posed(T)).repeat(4, 1, 1)
    alpha, residual, _ = run(method, M)
    assert run(method, M[:0])[0].shape == (0, T)
    assert module().launches() == []
    if residual is None:
        return
    for b in range(3):
        one, its_residual, _ = run(method, M[b : b + 1])
        for k in range(b, 12, 3):
            assert torch.equal(one[0], alpha[k])
            assert torch.equal(its_residual[0], residual[k])


@pytest.mark.parametrize("method", ["mgda", "weighted UPGrad", "gradvac"])
def test_more_problems_than_workspaces(method):
    """A block then has several of them, in the same scratch."""
    M = gram(randn(1050, 3, 5, dtype=F64)[torch.arange(1050) % 7])
    M[1026, 0, 0] = torch.nan
    assert same_bits(run(method, M, NOT_SHARED), run(method, M))


@methods
def test_launches(method):
    """One kernel, and one for the sum over tasks; scratch in shared memory while that suffices."""
    M = gram(well_posed(64)[:1])
    name = METHODS[method][0]
    sums = name in ("pcgrad", "gradvac") or "UPGrad" in method
    for T, limit, shared in ((3, SMALL_SHARED, True), (64, LARGE_SHARED, True), (64, 1024, False), (1, 0, False)):
        run(method, M[:, :T, :T], limit)
        launches = module().launches()
        assert [kernel.partition("<")[0] for kernel, _ in launches] == ["solve", "sum_tasks"][: 1 + (sums and T > 1)]
        assert (launches[0][1] > 0) == shared
    run(method, M, SMALL_SHARED)
    assert (module().launches()[0][1] > 0) == (name in ("pcgrad", "gradvac"))

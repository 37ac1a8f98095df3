"""A task that is not there: every method solves the problem of the others; the oracle is the method without the row."""

import math

import pytest
import torch
from helpers import BF16, F16, F32, F64, dtype_id, generator, randn, relative

import fastmtl
from fastmtl import ops
from fastmtl.ops import reference
from fastmtl.ops.reference.philox import permutations

SIZES = [2, 3, 5, 17, 33, 40, 65, 130]

# name: (make(weights), whether its weights are 1/T by default, so that n of T tasks get n/T of what n alone get)
METHODS = {
    "AlignedMTL": (lambda w: fastmtl.AlignedMTL(rtol=1e-6), True),
    "AlignedMTL weights": (lambda w: fastmtl.AlignedMTL(weights=w, scale="rmse", rtol=1e-6), False),
    "AlignedMTL gram": (
        lambda w: fastmtl.AlignedMTL(weights="sum", rtol=1e-6, scale="median", rank_rule="gram"),
        False,
    ),
    "MGDA": (lambda w: fastmtl.MGDA(), False),
    "MGDA l2": (lambda w: fastmtl.MGDA(normalization="l2"), False),
    "CAGrad": (lambda w: fastmtl.CAGrad(), True),
    "CAGrad wide": (lambda w: fastmtl.CAGrad(c=2.0, rescale=0), True),
    "IMTL": (lambda w: fastmtl.IMTL(rtol=1e-6), False),
    "NashMTL": (lambda w: fastmtl.NashMTL(), False),
    "NashMTL every 2": (lambda w: fastmtl.NashMTL(max_norm=0, every=2), False),
    "Uniform": (lambda w: fastmtl.Uniform(), True),
    "Uniform sum": (lambda w: fastmtl.Uniform(weights="sum"), False),
    "Uniform weights": (lambda w: fastmtl.Uniform(weights=w), False),
    "UPGrad": (lambda w: fastmtl.UPGrad(), True),
    "UPGrad weights": (lambda w: fastmtl.UPGrad(weights=w), False),
    "UPGrad ridge": (lambda w: fastmtl.UPGrad(weights=w, ridge=1e-3), False),
    "DualProj": (lambda w: fastmtl.DualProj(), True),
    "DualProj weights": (lambda w: fastmtl.DualProj(weights=w, ridge=1e-3), False),
    "FairGrad": (lambda w: fastmtl.FairGrad(), False),
    "FairGrad 2": (lambda w: fastmtl.FairGrad(fairness=2.0), False),
    "FairGrad 0": (lambda w: fastmtl.FairGrad(fairness=0), True),
    "ConFIG": (lambda w: fastmtl.ConFIG(rtol=1e-6), False),
    "ConFIG weights": (lambda w: fastmtl.ConFIG(weights=w, rtol=1e-6), False),
    "Krum": (lambda w: fastmtl.Krum(), False),
    "Krum 2": (lambda w: fastmtl.Krum(byzantine=0, selected=2, squared=False), False),
}
DRAWING = {
    "PCGrad": lambda: fastmtl.PCGrad(generator=generator(3)),
    "PCGrad step": lambda: fastmtl.PCGrad(order="step", reduction="mean", generator=generator(3)),
    "GradVac": lambda: fastmtl.GradVac(generator=generator(3)),
    "RLW": lambda: fastmtl.RLW(generator=generator(3)),
}


def problem(T, seed=0, dtype=F64):
    """G [T, P] with rows of zeros and which are no zeros: at least three, or all but one of fewer."""
    there = torch.rand(T, generator=generator(seed + T)) > 0.4
    there[: min(3, T - 1)] = True
    there[T - 1] = False
    there = there[torch.randperm(T, generator=generator(seed))]
    G = randn(T, 2 * T + 30, dtype=F64, seed=seed) * torch.logspace(0, 1, T, dtype=F64)[:, None] + 0.2
    return (torch.where(there[:, None], G, 0.0)).to(dtype), there


def task_weights(T):
    return torch.linspace(0.5, 1.5, T, dtype=F64)


def expected(name, G, there, weigh):
    """α [T] from `weigh(method, G of the others)`."""
    T, n = len(there), int(there.sum())
    make, mean = METHODS[name]
    alpha = torch.zeros(T, dtype=F64)
    alpha[there] = weigh(make(task_weights(T)[there]), G[there]) * (n / T if mean else 1)
    return alpha


def check(alpha, wanted, there, limit):
    assert (alpha[~there] == 0).all()
    assert alpha.isfinite().all()
    assert relative(alpha, wanted) <= limit


def krum_has_enough(name, there):
    return not name.startswith("Krum") or int(there.sum()) >= 3


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_weighting(name, T):
    """A Gram matrix alone, and among others in a batch."""
    Ms, all_there = [], []
    for seed in range(3 if T < 100 else 1):
        G, there = problem(T, seed)
        Ms.append(G @ G.T)
        all_there.append(there)
        if not krum_has_enough(name, there):
            return
        method = METHODS[name][0](task_weights(T))
        wanted = expected(name, G, there, lambda m, X: m.weighting(X @ X.T))
        check(method.weighting(Ms[-1]), wanted, there, 1e-8)
    full = randn(T, 2 * T, dtype=F64, seed=9)
    batch = torch.stack([*Ms, full @ full.T, torch.zeros(T, T, dtype=F64)])
    alphas = METHODS[name][0](task_weights(T)).weighting(batch)
    for b, (M, there) in enumerate(zip(Ms, all_there, strict=True)):
        check(alphas[b], METHODS[name][0](task_weights(T)).weighting(M), there, 1e-12)
    assert relative(alphas[-2], METHODS[name][0](task_weights(T)).weighting(batch[-2])) <= 1e-12
    assert (alphas[-1] == 0).all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("T", [2, 5, 40])
@pytest.mark.parametrize("name", METHODS)
def test_gradients(name, T, dtype):
    """As a matrix, as rows of zeros, and as rows that are missing: the same, and that of the others."""
    G, there = problem(T, 1, dtype)
    if not krum_has_enough(name, there):
        return
    make, mean = METHODS[name]
    factor = int(there.sum()) / T if mean else 1
    wanted = factor * make(task_weights(T)[there])(G[there].to(F64)).to(F64)
    rounding = {F64: 1e-10, F32: 1e-5, BF16: 2e-2, F16: 2e-3}[dtype]
    as_matrix = make(task_weights(T))(G)
    assert relative(as_matrix.to(F64), wanted) <= rounding
    batch = make(task_weights(T))(torch.stack([G, G.flip(0), G]))
    assert relative(batch[2].to(F64), wanted) <= rounding
    parts = [G.shape[1] - 9, 9]
    zeros = [list(g.split(parts)) for g in G]
    missing = [row if here else None for row, here in zip(zeros, there, strict=True)]
    partly = [row if here else [None, row[1]] for row, here in zip(zeros, there, strict=True)]
    for rows in (zeros, missing, partly):
        got = torch.cat(make(task_weights(T))(rows))
        assert relative(got.to(F64), wanted) <= rounding


def conflicts(G, order, reduce):
    """PCGrad by its text: rows G, for each the others in an order of its own."""
    result = torch.zeros_like(G[0])
    for i, g in enumerate(G):
        current = g.clone()
        for j in order[i]:
            if j != i and current @ G[j] < 0:
                current -= (current @ G[j]) / (G[j] @ G[j]) * G[j]
        result += current
    return result * reduce


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("per_task", [True, False])
def test_pcgrad(per_task, T):
    """The authors' loop over the others, in the order in which they are drawn among all."""
    G, there = problem(T, 2)
    G = torch.where(there[:, None], G - 0.5, 0.0)
    seed = torch.tensor(1 << 40)
    order = permutations(seed, 1, T if per_task else 1, T)[0].expand(T, T)
    place = there.cumsum(0) - 1
    among = [[int(place[j]) for j in order[i] if there[j]] for i in there.nonzero()[:, 0]]
    wanted = conflicts(G[there], among, 1)
    for op in (ops.pcgrad, reference.pcgrad):
        alpha = op(G @ G.T, seed, per_task)
        assert (alpha[~there] == 0).all()
        assert relative(alpha @ G, wanted) <= 1e-9


@pytest.mark.parametrize("T", SIZES)
def test_gradvac(T):
    """Targets of the others move, those of a task that is absent stay; and the others are turned as without it."""
    G, there = problem(T, 3)
    targets = torch.full((T, T), 0.5, dtype=F64)
    seed = torch.tensor(5 << 33)
    order = permutations(seed, 1, T, T)[0]
    wanted = torch.zeros(G.shape[1], dtype=F64)
    moved = targets.clone()
    for i in there.nonzero()[:, 0].tolist():
        current = G[i].clone()
        for j in order[i].tolist():
            if j != i and there[j]:
                cosine = torch.cosine_similarity(current, G[j], 0)
                if cosine < 0.5:
                    current += (
                        current.norm()
                        * (0.5 * (1 - cosine**2).sqrt() - cosine * math.sqrt(0.75))
                        / (G[j].norm() * math.sqrt(0.75))
                        * G[j]
                    )
                moved[i, j] = 0.75 * 0.5 + 0.25 * cosine
        wanted += current
    for op in (ops.gradvac, reference.gradvac):
        state = targets.clone()
        alpha = op(G @ G.T, seed, 0.25, state)
        assert (alpha[~there] == 0).all()
        assert relative(alpha @ G, wanted) <= 1e-9
        assert torch.allclose(state, moved, rtol=1e-9)
        assert (state[~there] == 0.5).all()
        assert (state[:, ~there] == 0.5).all()


@pytest.mark.parametrize("T", SIZES)
def test_rlw(T):
    """What is drawn for the others does not depend on who is there."""
    G, there = problem(T, 4)
    alpha = DRAWING["RLW"]().weighting(G @ G.T)
    drawn = torch.randn(T, dtype=F64, generator=generator(3)).softmax(0)
    assert torch.equal(alpha, torch.where(there, drawn, 0.0))


@pytest.mark.parametrize("leak", [None, "each"])
@pytest.mark.parametrize("T", SIZES)
def test_graddrop(leak, T):
    """A row of zeros adds nothing, and what is drawn belongs to the coordinates."""
    G, there = problem(T, 5)

    def drop(X, leaks):
        return fastmtl.GradDrop(leak=leaks, generator=generator(3))(X)

    leaks = None if leak is None else torch.linspace(0, 1, T, dtype=F64)
    wanted = drop(G[there], None if leak is None else leaks[there])
    assert torch.equal(drop(G, leaks), wanted)
    missing = [g if here else None for g, here in zip(G, there, strict=True)]
    assert torch.equal(drop(missing, leaks)[0], wanted)
    if not leak:
        assert not drop(0 * G, None).any()


@pytest.mark.parametrize("name", [*METHODS, *DRAWING])
def test_nobody_is_there(name):
    """α = 0, solved; `backward` with zero gradients moves nothing."""
    for T in (1, 4, 70):
        make = DRAWING[name] if name in DRAWING else lambda T=T: METHODS[name][0](task_weights(T))
        if name.startswith("Krum") and T == 1:
            continue
        info = make().solve(torch.zeros(T, T, dtype=F64), F64)
        assert (info.alpha == 0).all()
        assert info.residual is None or info.residual == 0
        assert info.converged is None or info.converged
        assert not make()(torch.zeros(T, 9)).any()


@pytest.mark.parametrize("name", [*METHODS, *DRAWING])
def test_a_nan_is_no_absence(name):
    """A row of NaN beside a zero row, and one that is zero but for a NaN: all is NaN, and state stays."""
    T = 5
    G, there = problem(T, 0)
    make = DRAWING[name] if name in DRAWING else lambda: METHODS[name][0](task_weights(T))
    method = make()
    method.weighting(G @ G.T)
    before = {k: v.clone() for k, v in method.state_dict().items()} if hasattr(method, "state_dict") else {}
    for bad in (math.nan, math.inf):
        for row in (int(there.nonzero()[0]), int((~there).nonzero()[0])):
            X = G.clone()
            X[row, 3] = bad
            assert method(X).isnan().all()
            rows = [x if here or t == row else None for t, (x, here) in enumerate(zip(X, there, strict=True))]
            assert method(rows)[0].isnan().all()
    after = method.state_dict() if before else {}
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("name", [*METHODS, *DRAWING])
def test_infos_of_a_training_step(name):
    """`backward` with a task whose gradient is exactly zero: α is 0 there, the solution is one, the others move."""
    T, x = 4, torch.randn(6, 5)
    torch.manual_seed(0)
    encoder = torch.nn.Linear(5, 8)
    heads = [torch.nn.Linear(8, 1) for _ in range(T)]
    h = encoder(x)
    losses = [head(h).square().mean() * (t != 1) for t, head in enumerate(heads)]
    method = DRAWING[name]() if name in DRAWING else METHODS[name][0](task_weights(T))
    info = method.backward(losses, shared=encoder)
    assert info.alpha[1] == 0
    assert info.converged is None or info.converged
    assert encoder.weight.grad.norm() > 0
    assert heads[0].weight.grad.norm() > 0


@pytest.mark.parametrize("name", METHODS)
def test_compiled(name):
    torch.compiler.reset()
    G, there = problem(5, 1)
    wanted = METHODS[name][0](task_weights(5)).weighting(G @ G.T)
    method = METHODS[name][0](task_weights(5))
    if "every" in name:
        for buffer, shape, dtype in (("solution", (5,), torch.float64), ("steps", (), torch.int64)):
            method._kept(buffer, shape, dtype, torch.device("cpu"))  # a compiled step finds its state
    got = torch.compile(method.weighting, backend="aot_eager", fullgraph=True)(G @ G.T)
    check(got, wanted, there, 1e-12)


# ------------------------------------------------------------------------------------------------ the ops

OPS = {
    "mgda": (lambda impl, M, w: impl.mgda(M), False),
    "upgrad": (lambda impl, M, w: impl.dual_cone(M, None, True), True),
    "upgrad weights": (lambda impl, M, w: impl.dual_cone(M, w, True), False),
    "dualproj": (lambda impl, M, w: impl.dual_cone(M, None, False), True),
    "dualproj weights": (lambda impl, M, w: impl.dual_cone(M, (9 * w).sin(), False), False),
    "cagrad": (lambda impl, M, w: impl.cagrad(M, 0.4), True),
    "nash": (lambda impl, M, w: impl.nash(M, 1.0), False),
    "fair": (lambda impl, M, w: impl.nash(M, 0.3), False),
    "unit_solve": (lambda impl, M, w: impl.unit_solve(M, w, 1e-7), False),
}


@pytest.mark.parametrize("implementation", [ops, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("T", [2, 3, 7, 33, 70])
@pytest.mark.parametrize("name", OPS)
def test_every_implementation(name, T, implementation):
    call, mean = OPS[name]
    for seed in range(3 if T < 30 else 1):
        G, there = problem(T, seed)
        M, w = G @ G.T, task_weights(T)
        alpha, residual = call(implementation, M, w)
        wanted, its = call(implementation, M[there][:, there].contiguous(), w[there].contiguous())
        assert (alpha[~there] == 0).all()
        assert relative(alpha[there], wanted * (int(there.sum()) / T if mean else 1)) <= 1e-9
        if name != "unit_solve":
            assert residual <= 1e-9
            assert its <= 1e-9
    alpha, residual = call(implementation, torch.zeros(T, T, dtype=F64), w)
    assert not alpha.any()
    assert not residual.any()


@pytest.mark.parametrize("T", [2, 5, 40])
def test_negative_squares_count_as_zero(T):
    """Of products in float32 a gradient that is nearly zero may get one."""
    G, there = problem(T, 0)
    M = G @ G.T
    for name, (call, _) in OPS.items():
        expected, _ = call(ops, M, task_weights(T))
        X = M - 1e-30 * torch.diag((~there).to(F64))
        for implementation in (ops, reference):
            got, _ = call(implementation, X, task_weights(T))
            assert relative(got, expected) <= 1e-9, name


# ------------------------------------------------------------------------------------------------ Nash-MTL, every k


def test_nash_between_solutions():
    """Weights of a task that is absent when it is solved stay; where it has none yet, a step in between solves."""
    T, P = 4, 30
    Gs = [randn(T, P, dtype=F64, seed=s) + 0.3 for s in range(8)]
    method, plain = fastmtl.NashMTL(max_norm=0, every=4), fastmtl.NashMTL(max_norm=0)

    def without(G, *tasks):
        G = G.clone()
        G[list(tasks)] = 0
        return G @ G.T

    first = method.weighting(without(Gs[0], 2))
    assert torch.equal(first, plain.weighting(without(Gs[0], 2)))
    assert torch.equal(method.weighting(without(Gs[1], 2)), first)  # in between
    returned = method.weighting(without(Gs[2]))  # task 2 has no weight yet
    assert torch.equal(returned, plain.weighting(without(Gs[2])))
    away = method.weighting(without(Gs[3], 0))
    assert away[0] == 0
    assert torch.equal(away[1:], returned[1:])
    again = method.weighting(without(Gs[4], 1))  # the fourth step after the first: solved, without task 1
    assert torch.equal(again, plain.weighting(without(Gs[4], 1)))
    assert method.solution[1] == returned[1]
    back = method.weighting(without(Gs[5]))  # which has its old weight
    assert back[1] == returned[1]
    assert torch.equal(back[[0, 2, 3]], again[[0, 2, 3]])
    assert method.steps == 6


# ------------------------------------------------------------------------------------------------ another T


def test_another_number_of_tasks():
    """Without state and weights of their own methods take any; the others say how tasks keep their places."""
    sizes = (3, 2, 5, 3)
    for make in (
        fastmtl.AlignedMTL,
        fastmtl.MGDA,
        fastmtl.PCGrad,
        fastmtl.NashMTL,
        fastmtl.UPGrad,
        fastmtl.IMTL,
        fastmtl.RLW,
    ):
        method = make()
        assert all(method(randn(T, 20)).isfinite().all() for T in sizes)
    for make in (lambda: fastmtl.NashMTL(every=2), fastmtl.GradVac):
        method = make()
        first = method(randn(3, 20))
        state = {key: value.clone() for key, value in method.state_dict().items()}
        with pytest.raises(ValueError, match=r"expected Gram matrices as in the first step.* Pass None .*reset\(\)"):
            method(randn(2, 20))
        assert all(torch.equal(method.state_dict()[key], value) for key, value in state.items())
        rows = list(randn(3, 20))
        rows[1] = None
        assert method(rows)[0].isfinite().all()
        method.reset()
        method(randn(2, 20))
        method.reset()
        assert torch.equal(method(randn(3, 20)), first) or isinstance(method, fastmtl.GradVac)  # which draws
    for make in (fastmtl.AlignedMTL, fastmtl.UPGrad, fastmtl.DualProj, fastmtl.ConFIG, fastmtl.Uniform):
        with pytest.raises(ValueError, match=r"weights: expected length 2 .*, got 3; pass None for a task"):
            make(weights=[0.5, 0.3, 0.2])(randn(2, 20))
    with pytest.raises(ValueError, match=r"leak: expected length 2 .*, got 3; pass None for a task that is absent"):
        fastmtl.GradDrop(leak=[0.5, 0.3, 0.2])(randn(2, 20))


# ------------------------------------------------------------------------------------------------ Krum


def test_krum_of_too_few():
    """Fewer than it was made for: one neighbour, and a share of 1 / selected each."""
    G = torch.zeros(6, 4, dtype=F64)
    G[1], G[4] = torch.ones(4), 2 * torch.ones(4)
    M = G @ G.T
    assert fastmtl.Krum(byzantine=2, selected=3).weighting(M).tolist() == [0, 1 / 3, 0, 0, 1 / 3, 0]
    G[4] = 0
    assert fastmtl.Krum(byzantine=2, selected=3).weighting(G @ G.T).tolist() == [0, 1 / 3, 0, 0, 0, 0]
    assert fastmtl.Krum(byzantine=2).weighting(G @ G.T).tolist() == [0, 1, 0, 0, 0, 0]


def test_krum_takes_no_zero_for_a_neighbour():
    """Zeros would be close to the short gradient, which is the outlier."""
    G = torch.tensor([[5.0, 5.0], [5.1, 5.0], [5.0, 5.3], [0.01, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=F64)
    assert fastmtl.Krum().weighting(G @ G.T).tolist() == [1, 0, 0, 0, 0, 0]
    assert fastmtl.Krum().weighting(G[:4] @ G[:4].T).tolist() == [1, 0, 0, 0]


# ------------------------------------------------------------------------------------------------ MGDA by losses


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
def test_mgda_by_losses(normalization):
    """A loss of zero is the limit of small ones: its gradient is infinitely long, and gets no weight."""
    G = randn(4, 20, dtype=F64)
    method = fastmtl.MGDA(normalization=normalization)
    losses = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=F64)
    alpha = method.weighting(G @ G.T, losses=losses)
    tiny = method.weighting(G @ G.T, losses=losses.clamp_min(1e-12))
    assert alpha[1] == 0
    assert torch.allclose(alpha, tiny, atol=1e-9)
    X = G.clone()
    X[2] = 0
    alpha = method.weighting(X @ X.T, losses=[losses[0], losses[3], None, losses[2]])
    assert torch.equal(alpha, method.weighting(X @ X.T, losses=torch.tensor([1.0, 0.5, math.nan, 2.0], dtype=F64)))
    with pytest.raises(ValueError, match=r"losses\[1\]: expected a loss >= 0, by which MGDA.* divides, got -0.5"):
        method(G, losses=torch.tensor([1.0, -0.5, 2.0, 1.0]))
    for bad in (math.nan, math.inf):
        assert method(G, losses=torch.tensor([1.0, bad, 2.0, 1.0])).isnan().all()


# ------------------------------------------------------------------------------------------------ the Gram matrix


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("T", [2, 3, 6, 16, 17, 64, 100, 128, 129, 150, 200])
def test_a_missing_row_is_not_multiplied(T, dtype):
    """Whatever stands beside it: its products are none where another row has NaN or infinity."""
    for length in (13, 1500):
        for bad in (math.nan, math.inf, -math.inf):
            rows = [[randn(length, dtype=dtype, seed=3 * t + k) for k in range(3)] for t in range(T)]
            rows[0] = [None] * 3 if T > 2 else [None, rows[0][1], None]
            rows[T - 1][2][length // 2] = bad
            if T > 2:
                rows[T - 1][1] = None
            grads = [g for row in rows for g in row]
            expected = torch.zeros(T, T, dtype=F64)
            for k in range(3):
                there = [t for t in range(T) if rows[t][k] is not None]
                X = torch.stack([rows[t][k].to(F64) for t in there])
                index = torch.tensor(there)
                expected[index[:, None], index] += X @ X.T
            for M in (ops.gram_rows(grads, T), reference.gram_rows(grads, T)):
                assert torch.equal(M.isnan(), expected.isnan())
                assert torch.equal(M.isposinf(), expected.isposinf())
                assert torch.equal(M.isneginf(), expected.isneginf())
                finite = expected.isfinite()
                assert relative(M[finite], expected[finite]) <= 1e-12
            assert fastmtl.AlignedMTL()(rows)[0].isnan().all()


# ------------------------------------------------------------------------------------------------ NaN is never lost

WEIGHTED = ("dual cone", "dual cone each")
SOLVERS = {
    "mgda": lambda impl, M, w: impl.mgda(M),
    "dual cone": lambda impl, M, w: impl.dual_cone(M, w, False),
    "dual cone each": lambda impl, M, w: impl.dual_cone(M, w, True),
    "cagrad": lambda impl, M, w: impl.cagrad(M, 0.5),
    "cagrad wide": lambda impl, M, w: impl.cagrad(M, 1e150),
    "nash": lambda impl, M, w: impl.nash(M, 1.0),
    "fair": lambda impl, M, w: impl.nash(M, 1e-3),
    "fair, nearly equal": lambda impl, M, w: impl.nash(M, 1e3),
}


@pytest.mark.parametrize("implementation", [ops, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", SOLVERS)
def test_where_weights_are_not_finite_the_residual_is_not(name, implementation):
    """Over the range of float64, of the Gram matrix and of the task weights."""
    solve = SOLVERS[name]
    opposed = torch.tensor([[1.0, -0.9, 0.1], [-0.9, 1.0, -0.5], [0.1, -0.5, 1.0]], dtype=F64)
    solved = 0
    for C in (torch.eye(3, dtype=F64) + 0.5, opposed, torch.full((3, 3), 1.0, dtype=F64)):
        for size in (1e-320, 1e-300, 1e-150, 1.0, 1e150, 1e300, 1e307):
            for spread in (1.0, 1e-4, 1e-100, 1e-150):
                d = torch.tensor([1.0, 1.0, spread], dtype=F64)
                M = size * (C * d * d[:, None])
                for weight in (1e-300, 1.0, 1e200, 1e308) if name in WEIGHTED else (1.0,):
                    w = torch.tensor([1.0, -0.5, 1.0], dtype=F64) * weight
                    alpha, residual = solve(implementation, M, w)
                    assert not residual.isnan() or alpha.isnan().any()
                    if not alpha.isfinite().all():
                        assert not residual <= 1e-8
                    solved += bool(residual <= 1e-8)
    assert solved > 25


@pytest.mark.parametrize("kind", [fastmtl.UPGrad, fastmtl.DualProj, fastmtl.ConFIG, fastmtl.AlignedMTL])
@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e200, 1e300])
def test_large_and_small_task_weights(kind, size):
    """Solutions scale with the weights: by a power of two, to the bit."""
    G = randn(4, 20, dtype=F64) - 0.3
    w = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=F64)
    unit = 2.0 ** round(math.log2(size))
    alpha, scaled = kind(weights=w).weighting(G @ G.T), kind(weights=w * unit).weighting(G @ G.T)
    assert scaled.isfinite().all()
    assert torch.equal(scaled, alpha if kind is fastmtl.ConFIG else alpha * unit)
    G32 = G.to(F32)
    g = kind(weights=w * min(unit, 2.0**100))(G32)
    assert g.isfinite().all()


def test_sums_of_weights_that_leave_the_range():
    """Each projection is finite, their sum is not."""
    M = torch.tensor([[1.0, -0.99], [-0.99, 1.0]], dtype=F64)
    for implementation in (ops, reference):
        alpha, residual = implementation.dual_cone(M, torch.full((2,), 1.2e308, dtype=F64), True)
        assert not residual <= 1e-8
        alpha, residual = implementation.dual_cone(M, torch.full((2,), 1e307, dtype=F64), True)
        assert alpha.isfinite().all()
        assert residual <= 1e-8


# ------------------------------------------------------------------------------------------------ 0 / 0


@pytest.mark.parametrize("T", [2, 4, 10, 34, 80])
@pytest.mark.parametrize("lengths", [1.0, 1000.0])
def test_opposed_gradients_have_no_direction_of_equal_cosines(T, lengths):
    """ConFIG's and IMTL's systems have no part in what the gradients reach: zero, however it rounds."""
    for seed in range(30):
        half = randn(T // 2, 3 * T, dtype=F64, seed=seed)
        G = torch.cat([half, -half * lengths])
        G = G[torch.randperm(T, generator=generator(seed))]
        turned = G @ torch.linalg.qr(randn(3 * T, 3 * T, dtype=F64, seed=1))[0]
        # Rounded to float32, rows of other lengths are opposed to that precision.
        for X, dtypes in ((G, (F32, F64)), (turned, (F32, F64)), (G.float().double(), (F32,))):
            M = X @ X.T
            for dtype in dtypes:
                assert not fastmtl.ConFIG().weighting(M, dtype=dtype).any()
                info = fastmtl.IMTL().solve(M, dtype)
                assert not info.alpha.any()
                assert info.residual == math.inf
                assert not info.converged
            x, cosines = reference.unit_solve(M, None, 1e-6)
            assert not x.any()
            assert not cosines.any()


def test_config_of_opposed_gradients_with_other_weights():
    """Cosines 1 and -2 have a part that they reach, 1.5 and -1.5: there the direction is one."""
    g = randn(20, dtype=F64)
    G = torch.stack([g, -3 * g])
    u = fastmtl.ConFIG(weights=[1.0, -2.0])(G)
    assert relative(u, (g.norm() - 3 * g.norm()) * g / g.norm()) <= 1e-12
    assert not fastmtl.ConFIG(weights=[2.0, 2.0])(G).any()
    assert not fastmtl.ConFIG(weights=[0.0, 0.0])(G).any()


def test_nearly_opposed_gradients_still_have_a_direction():
    for angle in (1e-1, 1e-3, 1e-5):
        G = torch.tensor([[1.0, angle], [-1.0, angle]], dtype=F64)
        g = fastmtl.ConFIG()(G)
        assert relative(g, torch.tensor([0.0, 2 * angle], dtype=F64)) <= 1e-8
        alpha = fastmtl.IMTL().weighting(G @ G.T)
        assert torch.allclose(alpha, torch.full((2,), 0.5, dtype=F64), rtol=1e-6)

"""Every method on gradients from random recipes: as a call, step by step, and while training."""

from __future__ import annotations

import copy
import io
import itertools

import torch
from fuzzing import fuzz
from helpers import EPS, F32, F64, needs_extension, randn, relative
from hypothesis import strategies as st
from strategies import BENIGN, DEPENDENT, SIZES, Gradients, matrices, ragged
from test_ops_fuzz import addresses, check_invariant, doubled, error_of, flat, same, same_but_scaled, with_threads
from torch import Tensor, nn

import fastmtl

pytestmark = needs_extension

# name -> a new instance for T tasks
METHODS = {
    "AlignedMTL": lambda T: fastmtl.AlignedMTL(),
    "AlignedMTL weights": lambda T: fastmtl.AlignedMTL(
        weights=torch.arange(1.0, T + 1), scale="median", rank_rule="gram"
    ),
    "AlignedMTL rmse": lambda T: fastmtl.AlignedMTL(weights="sum", scale="rmse", rtol=1e-3),
    "MGDA": lambda T: fastmtl.MGDA(),
    "MGDA loss+": lambda T: fastmtl.MGDA(normalization="loss+"),
    "PCGrad": lambda T: fastmtl.PCGrad(),
    "PCGrad step": lambda T: fastmtl.PCGrad(order="step", reduction="mean"),
    "GradVac": lambda T: fastmtl.GradVac(),
    "CAGrad": lambda T: fastmtl.CAGrad(),
    "CAGrad 2": lambda T: fastmtl.CAGrad(c=2.0, rescale=0),
    "IMTL": lambda T: fastmtl.IMTL(),
    "NashMTL": lambda T: fastmtl.NashMTL(),
    "NashMTL every 2": lambda T: fastmtl.NashMTL(max_norm=0, every=2),
    "Uniform": lambda T: fastmtl.Uniform(),
    "Uniform weights": lambda T: fastmtl.Uniform(weights=torch.arange(1.0, T + 1)),
    "RLW": lambda T: fastmtl.RLW(),
    "UPGrad": lambda T: fastmtl.UPGrad(),
    "UPGrad weights": lambda T: fastmtl.UPGrad(weights=torch.arange(1.0, T + 1)),
    "DualProj": lambda T: fastmtl.DualProj(),
    "FairGrad": lambda T: fastmtl.FairGrad(),
    "FairGrad 2": lambda T: fastmtl.FairGrad(fairness=2.0),
    "ConFIG": lambda T: fastmtl.ConFIG(),
    "Krum": lambda T: fastmtl.Krum(byzantine=1 if T >= 4 else 0, selected=1 + T // 3),
    "GradDrop": lambda T: fastmtl.GradDrop(),
    "GradDrop leak": lambda T: fastmtl.GradDrop(leak=torch.linspace(0, 1, T)),
}
DRAWS = {"PCGrad", "PCGrad step", "GradVac", "RLW", "GradDrop", "GradDrop leak"}
methods = st.sampled_from(sorted(METHODS))
few_tasks = st.one_of(st.integers(3, 8), st.integers(3, 20))  # Krum needs three
more_tasks = st.one_of(few_tasks, few_tasks, few_tasks, st.sampled_from([33, 40]))
few_columns = st.one_of(st.integers(0, 40), st.integers(0, 600))
WELL_KNOWN = ("alike", "sparse", "integers")  # weights are continuous near these


def step_options(name: str, T: int, k: int = 0) -> dict[str, object]:
    """The losses for those that need them, and a loss scaler's factor 2^k."""
    losses = {"losses": torch.linspace(0.5, 2.0, T, dtype=F64) * 2.0**k} if "loss" in name else {}
    return {**losses, "grad_scale": 2.0**k} if k else losses


def call(name: str, G, k: int = 0, out=None, seed: int = 1):
    T = G.shape[-2] if isinstance(G, Tensor) else len(G)
    torch.manual_seed(seed)
    return METHODS[name](T)(G, out, **step_options(name, T, k))


def check_finiteness(G: Gradients, name: str, X: Tensor, result: Tensor) -> None:
    """Not finite in, not finite out, in every entry of the result; finite in, finite out."""
    for one, got in [(X, result)] if X.ndim == 2 else zip(X, result, strict=True):
        if one.isfinite().all():
            if not G.has(*SIZES):
                assert got.isfinite().all()
        elif "Drop" in name:
            assert not got[~one.isfinite().all(0)].isfinite().any()
        else:
            assert not got.isfinite().any()


@fuzz(100, name=methods, G=matrices(tasks=more_tasks, sizes=few_columns), k=st.integers(-12, 12))
def test_method_on_a_matrix(name: str, G: Gradients, k: int) -> None:
    X = G.matrix()
    got = check_invariant(lambda X: call(name, X), X)
    assert got.dtype is X.dtype
    assert got.shape == (*X.shape[:-2], X.shape[-1])
    check_finiteness(G, name, X, got)
    out = torch.full_like(got, 7.0)
    assert call(name, X, out=out) is out
    assert same(out, got)
    scaled = doubled(X, k)
    if scaled is not None and not G.has(*SIZES):
        assert same_but_scaled(call(name, scaled, k), got, k), "grad_scale makes every method homogeneous"
    if X.ndim == 3 or G.P < 2 * G.T or any(value not in WELL_KNOWN for value in G.values) or not X.isfinite().all():
        return
    if G.layout in ("expanded rows", "expanded columns"):
        return
    limit = 1e-4 + 4 * EPS[X.dtype]
    (rows,) = call(name, [[g] for g in X])
    assert relative(rows, got) <= limit, "a list of rows is the matrix"
    if name not in DRAWS and "weights" not in name and "loss" not in name and "sparse" not in G.values:
        order = torch.randperm(G.T, generator=G.generator())
        assert relative(call(name, X[order]), got) <= limit, "the order of tasks"


@fuzz(60, name=methods, G=ragged(tasks=few_tasks))
def test_method_on_rows(name: str, G: Gradients) -> None:
    rows, X = G.rows(), G.dense()
    before = [None if g is None else g.clone() for g in flat(rows)]
    got = call(name, rows)
    for k, result in enumerate(got):
        like = next(row[k] for row in rows if row[k] is not None)
        assert result.dtype is like.dtype
        assert result.shape == like.shape
    check_finiteness(G, name, X, torch.cat([g.reshape(-1).to(F64) for g in got]))
    outs = [torch.full_like(g, 7.0) for g in got]
    again = with_threads(2, lambda: call(name, rows, out=outs))
    assert all(same(x, y) and x is z for x, y, z in zip(again, got, outs, strict=True))
    assert all(x is y is None or same(x, y) for x, y in zip(flat(rows), before, strict=True))


@fuzz(
    80,
    name=st.sampled_from([name for name in sorted(METHODS) if "Drop" not in name]),
    G=matrices(tasks=few_tasks, sizes=st.integers(0, 60)),
    single=st.booleans(),
)
def test_weighting(name: str, G: Gradients, single: bool) -> None:
    X = G.exact()
    M = X @ X.mT
    M = M.to(F32) if single else M

    def weigh(M):
        torch.manual_seed(1)
        return METHODS[name](G.T).weighting(M, **step_options(name, G.T))

    before = M.clone()
    alpha = weigh(M)
    assert same(with_threads(2, lambda: weigh(M)), alpha)
    assert same(weigh(torch.stack([M, M], -1)[..., 0]), alpha)
    assert same(M, before)
    assert alpha.dtype is F64
    assert alpha.shape == M.shape[:-1]
    for one, got in [(M, alpha)] if M.ndim == 2 else zip(M, alpha, strict=True):
        if not one.isfinite().all():
            assert not got.isfinite().any()
        elif one.diagonal().max() < 1e30:  # a float32 Gram of larger numbers is infinite soon
            assert got.isfinite().all()


# ------------------------------------------------------------------------------------------------ step by step

ACTIONS = ("step", "step", "step", "nan", "inf", "save", "copy", "reset", "double", "inference")


@fuzz(
    45,
    name=methods,
    G=matrices(tasks=st.integers(3, 8), sizes=st.integers(1, 40), kinds=(*BENIGN, *DEPENDENT), dtypes=("float64",)),
    actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=12),
)
def test_steps(name: str, G: Gradients, actions: list[str]) -> None:
    """A run with steps that must not count and with breaks in between is the run without them."""
    run, twin = METHODS[name](G.T), METHODS[name](G.T)
    options = step_options(name, G.T)
    for i, action in enumerate(actions):
        X = Gradients(**{**G.recipe(), "seed": G.seed + i}).matrix()
        if action in ("nan", "inf") and X.numel():
            broken = X.clone(memory_format=torch.contiguous_format)
            broken[..., i % G.T, i % G.P] = float(action)  # in all of a batch: others would make their step
            assert not run(broken, **options)[..., i % G.P].isfinite().any()
        elif action == "save" and isinstance(run, nn.Module):
            file = io.BytesIO()
            torch.save(run.state_dict(), file)
            run = METHODS[name](G.T)
            run.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        elif action == "copy":
            run = copy.deepcopy(run)
        elif action == "reset" and isinstance(run, nn.Module):
            run.reset()
            twin = METHODS[name](G.T)
        elif action == "double" and isinstance(run, nn.Module):
            run.double()
        torch.manual_seed(i)
        with torch.inference_mode(action == "inference"):
            got = run(X.clone(), **options)
        torch.manual_seed(i)
        assert same(got.clone(), twin(X, **options)), (i, action)


# ------------------------------------------------------------------------------------------------ training

WAYS = ("shared", "representation", "node", "hooks")


@fuzz(60, name=methods, way=st.sampled_from(WAYS), G=ragged(tasks=few_tasks), before=st.booleans())
def test_training(name: str, way: str, G: Gradients, before: bool) -> None:
    """Losses whose gradients are those of the recipe: what is committed is the method's result on them, bit for bit."""
    rows = [[None if g is None else g.contiguous() for g in row] for row in G.rows()]
    like = [next(g for g in column if g is not None) for column in zip(*rows, strict=True)]
    # A task without any gradient counts as zeros where it is heard of at all: its first one is made so.
    rows = [[torch.zeros_like(like[0]), *row[1:]] if all(g is None for g in row) else row for row in rows]
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in like]
    heads = [nn.Parameter(torch.zeros(())) for _ in rows]
    method = METHODS[name](G.T)

    def losses(at):
        """Σ <g, p> and the head: the gradients are g, and one."""
        for t, row in enumerate(rows):
            terms = [(p * g).to(F64).sum() for p, g in zip(at[t], row, strict=True) if g is not None]
            yield sum(terms, heads[t].to(F64)) + (t + 1.0)

    start = [torch.ones_like(p) if before else None for p in parameters]
    for p, g in zip(parameters, start, strict=True):
        p.grad = None if g is None else g.clone()
    torch.manual_seed(1)
    info = None
    if way == "shared":
        info = method.backward(list(losses([parameters] * G.T)), shared=parameters)
    else:
        h = [p * 1 for p in parameters]
        if way == "representation":
            info = method.backward(list(losses([h] * G.T)), representation=h)
        else:
            hs = fastmtl.fan_out(h, G.T, method, via=way)
            hs.total(list(losses(hs))).backward()
            info = hs.info
    torch.manual_seed(1)
    finite = all(g is None or g.isfinite().all() for g in flat(rows))
    values = {"losses": torch.stack([x.detach() for x in losses([parameters] * G.T)])} if "loss" in name else {}
    expected = METHODS[name](G.T)(rows, **values)
    for p, want, g in zip(parameters, expected, start, strict=True):
        total = want if g is None else g + want
        assert p.grad is not None
        assert same(p.grad, total) or (not finite and not p.grad.isfinite().any() and not total.isfinite().any())
    for head in heads:
        assert head.grad is not None
        assert (head.grad == 1).all()
    if finite and info is not None and info.alpha is not None and not G.has(*SIZES) and G.dtype != "mixed":
        X = G.dense() if way in ("shared", "representation") and name != "MGDA loss+" else None
        if X is not None:
            want = info.alpha @ X.to(F64)
            slack = (EPS[G.coarsest()] + G.T * EPS[F64]) * (info.alpha.abs() @ X.to(F64).abs())  # two orders of a sum
            got = torch.cat([g.reshape(-1) for g in expected]).to(F64)
            assert ((got - want).abs() <= slack + torch.finfo(G.coarsest()).tiny).all(), "info.alpha"


# ------------------------------------------------------------------------------------------------ memory


@fuzz(
    80,
    name=st.sampled_from(["AlignedMTL", "Uniform", "CAGrad", "GradDrop", "PCGrad"]),
    B=st.one_of(st.none(), st.integers(0, 3)),
    T=st.integers(1, 4),
    P=st.integers(0, 12),
    begin=st.integers(0, 60),
    steps=st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(0, 4)),
    out_begin=st.integers(0, 200),
    out_steps=st.tuples(st.integers(0, 14), st.integers(0, 4)),
    parts=st.integers(0, 3),
)
def test_memory_of_methods(name, B, T, P, begin, steps, out_begin, out_steps, parts) -> None:
    """`out` anywhere in the gradients' memory, and in its own: the right result, or an error and nothing written."""
    memory = randn(600)
    shape = (T, P) if B is None else (B, T, P)
    G = memory.as_strided(shape, tuple(steps)[-len(shape) :], begin)
    out = memory.as_strided((*shape[:-2], P), tuple(out_steps)[-(len(shape) - 1) :], out_begin)
    rows = bool(parts) and B is None
    written = addresses(out)
    if rows:  # several results, at places that may overlap
        cuts = list(itertools.pairwise(P * i // parts for i in range(parts + 1)))
        G = [[g[a:b] for a, b in cuts] for g in G]
        step = out_steps[1]
        out = [memory.as_strided((b - a,), (step,), out_begin + i * out_steps[0]) for i, (a, b) in enumerate(cuts)]
        written = [i for x in out for i in addresses(x)]
    read = {i for g in flat(G) for i in addresses(g)} if rows else set(addresses(G))
    before = memory.clone()
    torch.manual_seed(1)
    expected = METHODS[name](T)([[g.clone() for g in row] for row in G] if rows else G.clone())
    torch.manual_seed(1)
    message = error_of(lambda: METHODS[name](T)(G, out))
    if message is not None:
        assert message.startswith("out"), message
        assert torch.equal(memory, before)
        return
    assert len(set(written)) == len(written), "an element was written twice"
    assert not read & set(written), "overlapping memory was written"
    assert all(map(same, out, expected)) if rows else same(out.clone(), expected)
    untouched = torch.ones(600, dtype=torch.bool)
    untouched[written] = False
    assert torch.equal(memory[untouched], before[untouched])


# ------------------------------------------------------------------------------------------------ wrong arguments


def wrong_tensors(g: Tensor) -> dict[str, object]:
    """What can be wrong with a tensor."""
    return {
        "integers": g.to(torch.int64),
        "complex": g.to(torch.complex64),
        "bool": g > 0,
        "float8": g.to(torch.float8_e5m2),
        "sparse": g.detach().to_sparse(),
        "requires grad": g.clone().requires_grad_(),
        "another dimension": g[None, None],
        "no dimension": torch.ones((), dtype=g.dtype),
        "longer": torch.cat([g, g], -1) if g.ndim else g[None],
        "meta": g.to("meta"),
        "another dtype": g.to(F64 if g.dtype is not F64 else F32),
        "a list": g.tolist(),
        "a number": 3.0,
        "a word": "three",
        "None": None,
    }


WRONG = tuple(wrong_tensors(torch.ones(2)))


@fuzz(
    100,
    name=methods,
    where=st.sampled_from(["G", "rows", "out", "out of rows", "losses", "M", "grad_scale"]),
    wrong=st.sampled_from(WRONG),
    batch=st.booleans(),
)
def test_wrong_arguments(name: str, where: str, wrong: str, batch: bool) -> None:
    T, P = 3, 5
    G = randn(2, T, P) if batch else randn(T, P)
    rows = [list(g.split([2, 3])) for g in (G[0] if batch else G)]
    outs = [torch.full((2,), 7.0), torch.full((3,), 7.0)]
    out = torch.full((2, P) if batch else (P,), 7.0)
    method, options = METHODS[name](T), step_options(name, T)
    if where == "G":
        bad = wrong_tensors(G)[wrong]
        if wrong in ("another dtype", "longer", "meta"):
            return  # they are right
        # A batch as a list is rows of another number of tasks than there are losses.
        names, attempt = ("G", "rows", "losses"), lambda: method(bad, **options)
    elif where == "rows":
        if wrong in ("None",):
            return
        rows[1][1] = wrong_tensors(rows[1][1])[wrong]
        names, attempt = ("rows",), lambda: method(rows, **options)
    elif where == "out":
        bad = wrong_tensors(out)[wrong]
        if bad is None:
            return
        names, attempt = ("out",), lambda: method(G, bad, **options)
    elif where == "out of rows":
        bad = [outs[0], wrong_tensors(outs[1])[wrong]]
        names, attempt = ("out",), lambda: method(rows, bad, **options)
    elif where == "losses":
        if "loss" not in name:
            return
        bad = wrong_tensors(torch.ones(T))[wrong]
        if wrong in ("requires grad", "another dtype", "meta", "integers", "bool", "float8"):
            return
        names, attempt = ("losses",), lambda: method(G, losses=bad)
    elif where == "grad_scale":
        bad = wrong_tensors(torch.ones(()))[wrong]
        if name not in ("NashMTL", "FairGrad") or wrong not in ("a word", "complex"):
            return  # others take no notice; a number as a list is a number
        names, attempt = ("grad_scale",), lambda: method(G, **{**options, "grad_scale": bad})
    else:
        if "Drop" in name:
            return
        M = G @ G.mT
        bad = wrong_tensors(M)[wrong]
        if wrong in ("another dtype", "meta"):
            return
        names, attempt = ("M",), lambda: method.weighting(bad, **options)
    message = error_of(attempt)
    assert message is not None, "no error"
    assert message.startswith(names), message
    assert (out == 7.0).all()
    assert all((x == 7.0).all() for x in outs)

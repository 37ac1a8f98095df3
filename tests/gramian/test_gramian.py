"""`engine="gramian"` gives what the full engine gives: on models of practice, and for every way to use a parameter."""

import copy
import math

import pytest
import torch
from gramian_models import LAYERS, MODELS, LanguageModel, Multitask, build, mlp, resnet18, vit
from helpers import BF16, EPS, F16, F32, F64, dtype_id, flat, generator, randn, relative, svd_align
from torch import nn

import fastmtl
from fastmtl.gramian import contraction, cost
from fastmtl.ops import reference

# What the gramian engine promises of gradients and, relative to the norms of its two rows, of an entry of the Gram.
LIMIT = {F32: 1e-4, F64: 1e-9}
GRAM = {F32: 1e-5, F64: 1e-12}
# The error of g is that of the Gram over the least eigenvalue of the cosines: the models are to be no worse than this.
SPREAD = 2e-2

dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)


def step(model, engine, method=None, shared=None, **options):
    """One forward and one backward; the same random numbers for every engine."""
    torch.manual_seed(3)
    losses = model.losses()
    shared = model.shared() if shared is None else shared
    return (method or fastmtl.AlignedMTL()).backward(losses, shared, engine=engine, **options)


def gram_difference(got, expected):
    """The largest error of an entry relative to the norms of its two rows."""
    assert got.dtype is expected.dtype is F64
    norms = expected.diagonal().sqrt()
    size = norms[:, None] * norms
    error = (got - expected).abs()
    return torch.where(size > 0, error / size, error).nan_to_num(math.inf).max().item()


def cosines(M):
    norms = M.diagonal().sqrt()
    return M / (norms[:, None] * norms)


def same_gradients(model, other, limit):
    """Of the shared parameters and of the others together; of each one up to the rounding of its neighbours."""
    shared = {id(p) for p in model.shared()}
    parts = [], []
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert p.grad.dtype is p.dtype
            assert p.grad.stride() == q.grad.stride(), name
            parts[id(p) not in shared].append((name, p.grad.to(F64), q.grad.to(F64)))
    for part in parts:
        size = math.hypot(*(g.norm().item() for _, _, g in part))
        errors = {name: (p - q).norm().item() for name, p, q in part}
        assert math.hypot(*errors.values()) <= limit * size, errors
        for name, _, q in part:
            # A bias before a normalisation has a gradient of pure rounding.
            assert errors[name] <= 100 * limit * q.norm().item() + limit / 50 * size, name


def agree(make, dtype, method=fastmtl.AlignedMTL, limit=None, gram=None, **options):
    """Both engines on the same model; returns what the gramian one saw."""
    full, model = build(make, dtype), build(make, dtype)
    expected = step(full, "full", method(), **options)
    info = step(model, "gramian", method(), **options)
    assert expected.explicit is None
    assert isinstance(info.explicit, tuple)
    assert gram_difference(info.gram, expected.gram) <= (gram or GRAM[dtype])
    same_gradients(model, full, limit or LIMIT[dtype])
    for (name, x), y in zip(model.named_buffers(), full.buffers(), strict=True):
        assert torch.equal(x, y), f"{name}: a forward of its own"
    return info


@dtypes
@pytest.mark.parametrize("name", MODELS)
def test_models_of_practice(name, dtype):
    info = agree(MODELS[name], dtype)
    assert torch.linalg.eigvalsh(cosines(info.gram))[0] >= SPREAD, "too near to dependent tasks to be a test"


@pytest.mark.cover(1)
@dtypes
@pytest.mark.parametrize("name", LAYERS)
def test_uses_of_parameters(name, dtype):
    info = agree(LAYERS[name], dtype)
    assert torch.linalg.eigvalsh(cosines(info.gram))[0] >= SPREAD, "too near to dependent tasks to be a test"


@pytest.mark.cover(1)
@dtypes
@pytest.mark.parametrize("name", [*MODELS, *LAYERS])
def test_closed_forms_also_where_they_cost_more(name, dtype, monkeypatch):
    """At these sizes T explicit gradients would mostly be cheaper, and one block would hold all rows."""
    monkeypatch.setattr(cost, "is_cheaper_explicit", lambda *_: False)
    monkeypatch.setattr(contraction, "BLOCK", 5 if name in LAYERS else 50)
    agree({**MODELS, **LAYERS}[name], dtype)


@pytest.mark.parametrize(
    "name", ["mlp", "vit", "language model", "lstm", "mtan", "function in numpy", "embedding and output"]
)
@pytest.mark.parametrize("at_once", [False, True])
def test_one_task_after_the_other_or_all_at_once(name, at_once, monkeypatch):
    """Whichever the sizes suggest; where an operation cannot be vectorised, one after the other."""
    monkeypatch.setattr(cost, "goes_at_once", lambda *_: at_once)
    agree({**MODELS, **LAYERS}[name], F64)


MANY = [pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "language model")]  # parameters


@pytest.mark.parametrize("name", [*LAYERS, *MANY, "lstm", "gru", "mlp"])
def test_each_parameter_alone(name):
    """No contribution hides behind a larger one; the rest of the trunk gets the gradient of the sum of the losses."""
    make = {**MODELS, **LAYERS}[name]
    for k in range(len(build(make).shared())):
        full, model = build(make, F64), build(make, F64)
        ours, theirs = model.shared()[k], full.shared()[k]
        torch.manual_seed(3)
        losses = full.losses()
        if torch.autograd.grad(sum(losses), theirs, retain_graph=True, allow_unused=True)[0] is None:
            continue
        expected = fastmtl.Uniform().backward(losses, [theirs], engine="full")
        info = step(model, "gramian", fastmtl.Uniform(), [ours])
        # Where the gradient itself is rounding (see `same_gradients`) there is nothing to compare.
        if expected.gram.diagonal().min() > 1e-24:
            assert gram_difference(info.gram, expected.gram) <= GRAM[F64]
        same_gradients(model, full, LIMIT[F64])


# ------------------------------------------------------------------------------------------------ plain autograd


def oracle(model):
    """T passes of plain autograd: G [T, P] of the shared parameters, and each other parameter's own gradient."""
    torch.manual_seed(3)
    losses, shared = model.losses(), model.shared()
    known = {id(p) for p in shared}
    others = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    rows, own = [], [torch.zeros_like(p) for p in others]
    for loss in losses:
        grads = torch.autograd.grad(loss, [*shared, *others], retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, [*shared, *others], strict=True)]
        rows.append(flat(filled[: len(shared)]))
        own = [a + b for a, b in zip(own, filled[len(shared) :], strict=True)]
    return torch.stack(rows), others, own


@pytest.mark.parametrize(
    "name", ["mlp", "mlp, wide", "vit", "language model", "language model without adapters", "lstm", "resnet18", "mtan"]
)
def test_plain_autograd(name):
    """Not engine against engine: T passes, their Gram, and the reference of Aligned-MTL as well as an SVD."""
    G, _, own = oracle(build(MODELS[name], F64))
    M = reference.gram(G)
    model = build(MODELS[name], F64)
    info = step(model, "gramian")
    eps = torch.finfo(F64).eps
    alpha, _, rank = reference.balance(M, None, "min", math.sqrt(len(G) * eps), eps, "normalized")
    assert rank == info.rank == len(G)
    assert gram_difference(info.gram, M) <= GRAM[F64]
    assert relative(info.alpha, alpha) <= LIMIT[F64]
    got = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in model.shared()])
    assert relative(got, alpha @ G) <= LIMIT[F64]
    assert relative(got, svd_align(G)) <= LIMIT[F64]
    known = {id(p) for p in model.shared()}
    for p, g in zip((p for p in model.parameters() if id(p) not in known), own, strict=True):
        assert relative(p.grad, g) <= LIMIT[F64]


@pytest.mark.parametrize("name", ["mlp", "vit", "resnet18", "lstm"])
def test_float32_is_near_the_truth_and_not_only_near_the_other_engine(name):
    G, _, _ = oracle(build(MODELS[name], F64))
    model = build(MODELS[name], F32)
    info = step(model, "gramian")
    assert gram_difference(info.gram, reference.gram(G)) <= 10 * GRAM[F32]  # the forward's own rounding
    assert relative(flat([p.grad for p in model.shared()]), svd_align(G)) <= LIMIT[F32]


# ------------------------------------------------------------------------------------------------ methods, options

METHODS = {
    "aligned": fastmtl.AlignedMTL,
    "aligned, rmse": lambda: fastmtl.AlignedMTL(weights="sum", scale="rmse"),
    "mgda": fastmtl.MGDA,
    "mgda by losses": lambda: fastmtl.MGDA(normalization="loss"),
    "cagrad": fastmtl.CAGrad,
    "pcgrad": lambda: fastmtl.PCGrad(generator=generator(7)),
    "gradvac": lambda: fastmtl.GradVac(generator=generator(7)),
    "nash": fastmtl.NashMTL,
    "imtl": fastmtl.IMTL,
    "upgrad": fastmtl.UPGrad,
    "dualproj": fastmtl.DualProj,
    "fairgrad": fastmtl.FairGrad,
    "config": fastmtl.ConFIG,
    "krum": lambda: fastmtl.Krum(selected=2),
    "rlw": lambda: fastmtl.RLW(generator=generator(7)),
    "uniform": fastmtl.Uniform,
}


def trunk_of_all_kinds():
    """Linear twice, a convolution, a free parameter and a normalisation."""
    layers = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(32, 9), nn.Tanh(), nn.PReLU(9)
    return Multitask(nn.Sequential(*layers, nn.Linear(9, 6)), randn(8, 3, 6, 4, seed=1), tasks=4)


@dtypes
@pytest.mark.parametrize("name", METHODS)
def test_methods(name, dtype):
    agree(trunk_of_all_kinds, dtype, METHODS[name])


def test_a_method_with_a_state_goes_on_from_step_to_step():
    full, model = build(trunk_of_all_kinds, F64), build(trunk_of_all_kinds, F64)
    ours, theirs = fastmtl.NashMTL(every=2), fastmtl.NashMTL(every=2)
    for _ in range(3):
        expected, info = step(full, "full", theirs), step(model, "gramian", ours)
        assert relative(info.alpha, expected.alpha) <= LIMIT[F64]
        same_gradients(model, full, LIMIT[F64])
        for m in (full, model):
            torch.optim.SGD(m.parameters(), lr=0.1).step()
            m.zero_grad()


@dtypes
@pytest.mark.parametrize("name", ["mlp", "vit", "language model", "mtan"])
def test_scale_heads(name, dtype):
    agree(MODELS[name], dtype, scale_heads=True)


@pytest.mark.parametrize("method", [fastmtl.NashMTL, fastmtl.FairGrad, fastmtl.AlignedMTL])
def test_grad_scale(method):
    """The losses as a scaler sends them: the result is the scaled one of the unscaled."""
    plain = build(trunk_of_all_kinds)
    expected = step(plain, "gramian", method())
    for engine in ("full", "gramian"):
        model = build(trunk_of_all_kinds)
        losses = [2.0**10 * loss for loss in model.losses()]
        info = method().backward(losses, model.shared(), engine=engine, grad_scale=2.0**10)
        assert relative(info.alpha, expected.alpha) <= LIMIT[F32]
        assert gram_difference(info.gram, 2.0**20 * expected.gram) <= GRAM[F32]
        for p in model.parameters():
            p.grad /= 2.0**10
        same_gradients(model, plain, LIMIT[F32])


@dtypes
def test_gradients_accumulate(dtype):
    full, model = build(trunk_of_all_kinds, dtype), build(trunk_of_all_kinds, dtype)
    buffers = []
    for k in range(3):
        for m in (full, model):
            m.x.copy_(randn(*m.x.shape, dtype=dtype, seed=20 + k))
        step(full, "full")
        step(model, "gramian")
        buffers.append([p.grad for p in model.parameters()])
    same_gradients(model, full, LIMIT[dtype])
    assert all(a is b for a, b in zip(buffers[0], buffers[-1], strict=True))  # in place, as `loss.backward()` does


@pytest.mark.parametrize("name", ["mlp", "vit", "language model", "lstm", "mtan"])
def test_retain_graph(name, monkeypatch):
    # What is so small that all cotangents pass it at once is not freed before the losses go.
    monkeypatch.setattr(cost, "goes_at_once", lambda *_: False)
    model = build(MODELS[name], F64)
    losses, method = model.losses(), fastmtl.AlignedMTL()
    first = method.backward(losses, model.shared(), engine="gramian", retain_graph=True)
    once = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    others = method.backward(losses, model.shared(), engine="full", retain_graph=True)
    last = method.backward(losses, model.shared(), engine="gramian")
    for info in (others, last):
        assert gram_difference(info.gram, first.gram) <= GRAM[F64]
    triple = flat([3 * g for g in once if g is not None])
    assert relative(flat([p.grad for p in model.parameters()]), triple) <= LIMIT[F64]
    with pytest.raises(RuntimeError, match="second time"):
        method.backward(losses, model.shared(), engine="gramian")
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(losses[-1], model.shared(), allow_unused=True)
    assert relative(flat([p.grad for p in model.parameters()]), triple) <= LIMIT[F64]


def test_a_training_run():
    """Both engines take the same way, over steps that build on each other."""
    full, model = build(MODELS["mlp"], F64), build(MODELS["mlp"], F64)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (full, model)]
    before = [loss.item() for loss in model.losses()]
    for _ in range(20):
        step(full, "full")
        step(model, "gramian")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        assert relative(p, q) <= 1e-7
    assert all(loss.item() < then for loss, then in zip(model.losses(), before, strict=True))


# ------------------------------------------------------------------------------------------------ adversaries


def _hadamard(*shape):
    rows, columns = torch.arange(shape[0])[:, None], torch.arange(math.prod(shape[1:]))
    bits = sum(((rows & columns) >> k) & 1 for k in range(16))
    return (1.0 - 2.0 * (bits % 2)).reshape(shape)


# Numbers whose sums round alike, or that are far from zero next to what they differ by.
PATTERNS = {
    "normal": lambda *s: randn(*s, seed=5),
    "offset": lambda *s: randn(*s, seed=5) + 10,
    "far offset": lambda *s: randn(*s, seed=5) + 1000,
    "hadamard": lambda *s: _hadamard(*s) + 0.3,
    "hadamard, offset": lambda *s: _hadamard(*s) + 7.1,
    "signs": lambda *s: 0.1 * randn(*s, seed=5).sign(),
    "relu": lambda *s: randn(*s, seed=5).relu(),
    "one-hot": lambda *s: (randn(*s, seed=5) > 2).float() + 0.01 * (randn(*s, seed=6) > 2.5),
    "of bfloat16": lambda *s: randn(*s, seed=5).bfloat16().float(),
    "repeated": lambda *s: torch.tensor([0.1, 0.3, 0.7])[torch.randint(3, s, generator=generator(5))],
    "constant": lambda *s: torch.full(s, 0.1),
    "tiny": lambda *s: 1e-25 * randn(*s, seed=5),
    "huge": lambda *s: 1e20 * randn(*s, seed=5),
}
# Linear in its parameters, so that the cotangents are what the losses multiply by: layer, inputs.
LINEAR = {
    "linear": (lambda: nn.Linear(200, 24), (64, 200)),
    "linear, many rows": (lambda: nn.Linear(48, 8), (1100, 48)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), (4, 3, 14, 14)),
    "conv, grouped": (lambda: nn.Conv1d(6, 8, 3, groups=2), (4, 6, 100)),
}


def _exact(layer, inputs, outputs, cotangents):
    """M in float64 from float64 gradients."""
    double = copy.deepcopy(layer).double()
    y = double(inputs.double())
    assert y.shape == outputs
    rows = [
        torch.autograd.grad((y * c.double()).sum(), list(double.parameters()), retain_graph=True) for c in cotangents
    ]
    G = torch.stack([flat(row) for row in rows])
    return G @ G.T


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", LINEAR)
def test_the_gram_of_adversaries(name, pattern, centred, monkeypatch):
    """A few eps, or some ten, of the rows' norms: whatever the inputs, and where cotangents add up to nothing.

    As in front of a batch norm: then the gradient is made of the inputs' differences, and K = A Aᵀ is about the square
    of their mean.
    """
    monkeypatch.setattr(cost, "is_cheaper_explicit", lambda *_: False)
    make, shape = LINEAR[name]
    torch.manual_seed(1)
    layer, inputs = make(), PATTERNS[pattern](*shape)
    outputs = layer(inputs).shape
    cotangents = [
        PATTERNS["hadamard" if t % 2 else "normal"](*outputs) + 0.1 * randn(*outputs, seed=t) for t in range(4)
    ]
    if centred:
        if pattern == "constant":
            return  # no gradient at all
        cotangents = [torch.cat([c[: len(c) // 2], -c[: len(c) // 2]]) for c in cotangents]
    expected = _exact(layer, inputs, outputs, cotangents)
    y = layer(inputs)
    losses = [(y * c).sum() for c in cotangents]
    info = fastmtl.Uniform().backward(losses, layer, engine="gramian")
    assert info.explicit == ()
    assert gram_difference(info.gram, expected) <= 5e-6


@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("name", LINEAR)
def test_the_gram_of_half_precision_is_that_of_the_very_numbers(name, dtype, monkeypatch):
    """Products and sums are float32 and float64, whatever the dtype of inputs and cotangents."""
    monkeypatch.setattr(cost, "is_cheaper_explicit", lambda *_: False)
    make, shape = LINEAR[name]
    torch.manual_seed(1)
    layer, inputs = make().to(dtype), randn(*shape, dtype=dtype, seed=5)
    y = layer(inputs)
    # Up to the smallest of their numbers.
    cotangents = [2.0**-scale * randn(*y.shape, seed=scale) for scale in (0, 6, 12)]
    cotangents = [c.to(dtype) for c in cotangents]
    info = fastmtl.Uniform().backward([(y * c).sum() for c in cotangents], layer, engine="gramian")
    assert info.explicit == ()
    assert gram_difference(info.gram, _exact(layer, inputs, y.shape, cotangents)) <= 5e-6


@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_inputs_far_from_zero_before_a_batch_norm(offset):
    """As accurate as explicit gradients are there."""
    make = lambda: Multitask(  # noqa: E731
        nn.Sequential(nn.Linear(60, 40), nn.BatchNorm1d(40), nn.Tanh()), randn(50, 60, seed=1) + offset, tasks=4
    )
    truth, full, model = build(make, F64), build(make), build(make)
    truth.load_state_dict(model.state_dict())
    truth.x.copy_(model.x)
    expected = step(truth, "full").gram
    ours, theirs = (
        gram_difference(step(m, engine).gram, expected) for m, engine in ((model, "gramian"), (full, "full"))
    )
    assert ours <= 3 * theirs + 1e-6


# ------------------------------------------------------------------------------------------------ low precision


def _lstm_runs_in_bfloat16():
    """oneDNN has such a primitive on some processors, and PyTorch no other way."""
    try:
        with torch.autocast("cpu", BF16):
            nn.LSTM(2, 3)(torch.zeros(1, 1, 2))
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("name", ["mlp", "resnet18", "vit", "lstm"])
def test_autocast(name):
    """Each task's gradient of a weight is a bfloat16 tensor in the full engine and is never formed in the other.

    The full one therefore has an error of half a rounding (eps / 2) on every entry that the other does not have, and
    the cotangents of a combined pass are rounded otherwise than those of T: a few eps, over the least eigenvalue of
    the cosines, which lies above 0.1 here.
    """
    if name == "lstm" and not _lstm_runs_in_bfloat16():
        pytest.skip("oneDNN has no bfloat16 LSTM on this processor")
    full, model = build(MODELS[name]), build(MODELS[name])
    torch.manual_seed(3)
    infos = []
    for m, engine in ((full, "full"), (model, "gramian")):
        with torch.autocast("cpu", BF16):
            losses = m.losses()
        infos.append(fastmtl.AlignedMTL().backward(losses, m.shared(), engine=engine))
    assert gram_difference(infos[1].gram, infos[0].gram) <= 2 * EPS[BF16]
    same_gradients(model, full, 4 * EPS[BF16])


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_a_model_in_bfloat16(name):
    """As under autocast."""
    agree(MODELS[name], BF16, limit=4 * EPS[BF16], gram=2 * EPS[BF16])


def test_parts_of_a_model_in_another_dtype():
    def make():
        model = Multitask(mlp(5), randn(7, 5, seed=1))
        model.trunk = Mixed(model.trunk)
        return model

    class Mixed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.outer = inner, nn.Linear(16, 16).double()

        def forward(self, x):
            return self.outer(self.inner(x).double()).tanh().float()

    class Same:
        """A model that is not cast."""

        def __init__(self, module):
            self.module = module

        def to(self, _):
            return self.module

    agree(lambda: Same(make()), F32)


# ------------------------------------------------------------------------------------------------ naming, choosing


@dtypes
@pytest.mark.parametrize("engine", ["full", "gramian", "auto"])
def test_shared_as_a_module_is_its_parameters(engine, dtype):
    for name in ("mlp", "vit"):
        listed, whole = build(MODELS[name], dtype), build(MODELS[name], dtype)
        expected = step(listed, engine)
        info = step(whole, engine, shared=whole.trunk)
        assert torch.equal(info.gram, expected.gram)
        assert torch.equal(info.alpha, expected.alpha)
        for p, q in zip(whole.parameters(), listed.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("engine", ["full", "gramian", "auto"])
def test_a_module_may_have_frozen_parameters(engine):
    model, listed = build(LAYERS["frozen weight"]), build(LAYERS["frozen weight"])
    step(model, engine, shared=model.trunk)
    step(listed, engine)
    assert model.trunk[2].weight.grad is None
    for p, q in zip(model.shared(), listed.shared(), strict=True):
        assert torch.equal(p.grad, q.grad)
    model.trunk.requires_grad_(False)
    with pytest.raises(ValueError, match="shared"):
        step(model, engine, shared=model.trunk)


@pytest.mark.parametrize("engine", ["full", "gramian", "auto"])
def test_shared_by_default_is_what_two_losses_reach(engine):
    model, named = build(MODELS["mlp"], F64), build(MODELS["mlp"], F64)
    fastmtl.AlignedMTL().backward(model.losses(), engine=engine)
    step(named, "full")
    same_gradients(model, named, LIMIT[F64])


@pytest.mark.parametrize(
    "name",
    ["mlp", "mlp, wide", "mlp, long batch", "resnet18", "vit", "language model", "language model without adapters"],
)
def test_every_layer_with_a_closed_form_is_recognised(name):
    """What is formed for its size or its cost is not listed, so that the rest of these models leaves nothing."""
    model = build(MODELS[name])
    info = step(model, "gramian", shared=model.shared())
    # Positions, whose use is elementwise, and a table that each loss's own head uses too.
    others = {
        f"shared[{k}]" for k, p in enumerate(model.shared()) if p.dim() == 3 or p is getattr(model, "position", 0)
    }
    if name == "language model":
        others |= {f"shared[{k}]" for k, p in enumerate(model.shared()) if p is model.embedding.weight}
    assert set(info.explicit) <= others


# All they use is a Linear, a product with a matrix, a convolution or an embedding, besides what is small.
_CLOSED = ("linear", "conv", "embedding", "attention", "x @ w", "w @ x", "frozen", "dropout", "in place", "layer norm")
_OTHERS = (
    "weights",
    "transposed conv",
    "conv and linear",
    "vectors",
    "embedding bag",
    "of different rules",
    "and its transpose",
)


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if name.startswith(_CLOSED) and not any(other in name for other in _OTHERS)]
)
def test_layers_with_a_closed_form_are_recognised(name):
    assert step(build(LAYERS[name]), "gramian").explicit == ()


class Cubed(torch.autograd.Function):
    """(x Wᵀ)³: nothing that an engine could know."""

    @staticmethod
    def forward(ctx, x, weight):
        y = x @ weight.T
        ctx.save_for_backward(x, weight, y)
        return y**3

    @staticmethod
    def backward(ctx, g):
        x, weight, y = ctx.saved_tensors
        g = g * 3 * y.square()
        return g @ weight, g.mT @ x


class Cube(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x):
        return Cubed.apply(x, self.weight)


@dtypes
def test_names_of_what_is_not_recognised(dtype):
    def make():
        return Multitask(nn.Sequential(mlp(5, 40, 1), Cube(40), nn.Linear(40, 40)), randn(3, 5, seed=1))

    assert agree(make, dtype).explicit == ("shared[2]",)
    model = build(make, dtype)
    assert step(model, "gramian", shared=model.trunk).explicit == ("1.weight",)
    assert step(model, "gramian", shared=reversed(model.shared())).explicit == ("shared[2]",)
    assert step(model, "gramian", shared=model).explicit == ("trunk.1.weight",)


def test_names_of_recurrent_layers():
    """One call for the whole sequence, in float32 on a CPU."""
    model = build(MODELS["lstm"])
    explicit = step(model, "gramian", shared=model.trunk).explicit
    assert set(explicit) <= {name for name, _ in model.trunk.named_parameters()}


@pytest.mark.parametrize("name", [*MODELS, "conv, grouped", "embedding, padded", "function in numpy"])
def test_auto_is_one_of_them(name):
    make = {**MODELS, **LAYERS}[name]
    full, model = build(make), build(make)
    expected, info = step(full, "full"), step(model, "auto")
    assert info.explicit is None or isinstance(info.explicit, tuple)
    assert gram_difference(info.gram, expected.gram) <= GRAM[F32]
    same_gradients(model, full, LIMIT[F32])


@pytest.mark.parametrize("engine", ["gramian", "auto"])
def test_one_task_is_left_to_the_full_engine(engine):
    def make():
        return Multitask(mlp(5), randn(7, 5, seed=1), tasks=1)

    full, model = build(make), build(make)
    step(full, "full")
    info = step(model, engine)
    assert info.explicit is None
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("make", [lambda: vit(64, 16), lambda: resnet18(8)], ids=["vit", "resnet18"])
def test_many_tasks(make):
    """More of them than one chunk of cotangents may hold."""
    agree(lambda: Multitask(make(), randn(4, 3, 64, 64, seed=1), tasks=20), F64, fastmtl.Uniform)


def test_the_same_result_every_time():
    """No sum whose order depends on the run."""
    results = []
    for _ in range(3):
        model = build(lambda: LanguageModel())
        info = step(model, "gramian")
        results.append([info.gram, *(p.grad for p in model.parameters())])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))

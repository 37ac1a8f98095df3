"""`fan_out`: the upper bound inside one ordinary backward, by a node and by hooks."""

import copy
import dataclasses
import io
import pickle
import re
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from helpers import BF16, EPS, F16, F64, dense, dtype_id, flat, generator, randn, relative, svd_align
from models import MLP, MTAN, encoded, encoder_gradients, losses_of, shortest, task_gradients, upper_bound
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl import AlignedMTL, GradDrop, fan_out

F32 = torch.float32
both = pytest.mark.parametrize("via", ["node", "hooks"])

# name: (number of tasks -> method, the same aggregation in float64)
METHODS = {
    "aligned": (lambda T: AlignedMTL(), svd_align),
    "aligned sum median": (
        lambda T: AlignedMTL(weights="sum", scale="median"),
        lambda G: svd_align(G, torch.ones(G.shape[0]), "median"),
    ),
    "aligned numbers rmse": (
        lambda T: AlignedMTL(weights=list(range(1, T + 1)), scale="rmse"),
        lambda G: svd_align(G, torch.arange(1.0, G.shape[0] + 1), "rmse"),
    ),
    "mgda": (lambda T: fastmtl.MGDA(), shortest),
}
MODELS = {
    "mlp 2": lambda dtype: MLP(2, dtype),
    "mlp 1": lambda dtype: MLP(1, dtype),
    "mlp 4": lambda dtype: MLP(4, dtype),
    "mtan": lambda dtype: MTAN(3, dtype),
}


def train_step(model, method, via, **options):
    """One ordinary backward through a fan-out."""
    hs = fan_out(model.encoder(model.x), len(model.heads), method, via=via, **options)
    sum(model.loss(t, h) for t, h in enumerate(hs)).backward()
    return hs


class Linear:
    """Sources a, b of a trunk, and losses ⟨w_t, h⟩ that bring known gradients w_t."""

    def __init__(self, tasks=3, dtype=F32, n=20):
        self.weight = nn.Parameter(randn(n, dtype=dtype, seed=1))
        self.G = randn(tasks, n, dtype=dtype, seed=2)

    def h(self):
        return self.weight * 1

    def losses(self, hs):
        return [(h * g).sum() for h, g in zip(hs, self.G, strict=True)]

    def aligned(self, tasks=None):
        """What the trunk has to receive where only these tasks reach h."""
        G = self.G.clone()
        if tasks is not None:
            G[[t for t in range(len(G)) if t not in tasks]] = 0
        return svd_align(G)


class Fail(torch.autograd.Function):
    """Fails in its backward while `armed`."""

    armed = True

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if Fail.armed:
            raise ArithmeticError("this loss cannot be differentiated")
        return g


@pytest.fixture(autouse=True)
def _armed():
    Fail.armed = True


# ------------------------------------------------------------------------------------------------ the upper bound


@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_plain_autograd(name, method, dtype):
    make, reference = METHODS[method]
    expected = upper_bound(MODELS[name](dtype), reference)
    Z = task_gradients(MODELS[name](dtype))
    G = dense(Z).to(F64)
    grads = {}
    for via in ("node", "hooks"):
        model = MODELS[name](dtype)
        hs = train_step(model, make(len(Z)), via)
        grads[via] = encoder_gradients(model)
        assert relative(flat(grads[via]), flat(expected)) <= (1e-9 if dtype is F64 else 1e-5)
        assert relative(hs.info.gram, G @ G.T) <= (1e-12 if dtype is F64 else 1e-6)
        for t, head in enumerate(model.heads):
            parameters = list(head.parameters())
            own = torch.autograd.grad(model.loss(t, model.encoder(model.x)), parameters)
            for p, g in zip(parameters, own, strict=True):
                assert relative(p.grad, g.to(F64)) <= EPS[dtype] * 8
    for a, b in zip(grads["node"], grads["hooks"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_backward_through_the_representation_is_the_same(name, method):
    one, other = MODELS[name](F32), MODELS[name](F32)
    make = METHODS[method][0]
    hs = train_step(one, make(len(one.heads)), "node")
    h = other.encoder(other.x)
    info = make(len(one.heads)).backward(losses_of(other, h), representation=h)
    assert relative(info.gram, hs.info.gram) <= 1e-6
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert relative(q.grad, p.grad.to(F64)) <= 1e-6


@both
@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_low_precision(dtype, via):
    expected = upper_bound(MLP(3, dtype), svd_align)
    model = MLP(3, dtype)
    hs = train_step(model, AlignedMTL(), via)
    assert all(g.dtype is dtype for g in encoder_gradients(model))
    assert hs.info.alpha.dtype is F64
    assert relative(flat(encoder_gradients(model)), flat(expected)) <= 4 * EPS[dtype]


@both
def test_tensors_of_different_dtypes_are_one_row(via):
    weight = nn.Parameter(randn(12, seed=1))
    a, b = randn(2, 12, seed=2), randn(2, 12, seed=3)
    hs = fan_out([weight * 1, weight.to(BF16)], 2, AlignedMTL(), via=via)
    sum((h[0] * a[t]).sum() + (h[1].float() * b[t]).sum() for t, h in enumerate(hs)).backward()
    both_parts = torch.cat([a, b.to(BF16).float()], 1)
    aligned = svd_align(both_parts, rtol=EPS[BF16])
    assert relative(weight.grad, aligned[:12] + aligned[12:]) <= 2 * EPS[BF16]


@both
def test_gradients_are_those_of_autograd(via):
    model = MTAN()
    hs = train_step(model, AlignedMTL(), via)
    assert len(hs.gradients) == 3
    for captured, expected in zip(hs.gradients, task_gradients(model), strict=True):
        assert type(captured) is list
        for g, e in zip(captured, expected, strict=True):
            assert torch.equal(g, e)


@both
def test_grad_drop_with_the_same_generator(via):
    expected = GradDrop(generator=generator(7))(task_gradients(MTAN()))
    model = MTAN()
    hs = train_step(model, GradDrop(generator=generator(7)), via)
    plain = MTAN()
    own = torch.autograd.grad(encoded(plain), list(plain.encoder.parameters()), expected)
    for g, e in zip(encoder_gradients(model), own, strict=True):
        assert torch.equal(g, e)
    assert hs.info.alpha is None
    assert hs.info.gram is None


# ------------------------------------------------------------------------------------------------ structures


class Pair(NamedTuple):
    low: Any
    high: Any


@dataclasses.dataclass(frozen=True)
class Output:
    low: Any
    high: Any
    size: int = 3


MASK = torch.tensor([1, 0, 1])
STRUCTURES = {
    "list": (lambda a, b: [a, b], lambda h: h),
    "tuple": (lambda a, b: (a, b), lambda h: h),
    "named tuple": (Pair, lambda h: (h.low, h.high)),
    "dict": (lambda a, b: {"low": a, "high": b}, lambda h: (h["low"], h["high"])),
    "ordered dict": (lambda a, b: OrderedDict(low=a, high=b), lambda h: (h["low"], h["high"])),
    "dataclass": (Output, lambda h: (h.low, h.high)),
    "nested": (
        lambda a, b: {"maps": [(a,), Output(None, Pair(b, "x"))]},
        lambda h: (h["maps"][0][0], h["maps"][1].high.low),
    ),
    "mask": (lambda a, b: (a, MASK, b, None, 2.5), lambda h: (h[0], h[2])),
    "constant": (lambda a, b: (a, torch.ones(3), b), lambda h: (h[0], h[2])),
}


@both
@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name, via):
    build, parts = STRUCTURES[name]
    weight = nn.Parameter(randn(12, seed=1))
    A, B = randn(3, 12, seed=2), randn(3, 12, seed=3)
    h = build(weight * 2, weight.sin())
    hs = fan_out(h, 3, AlignedMTL(), via=via)
    assert len(hs) == 3
    assert all(type(alias) is type(h) for alias in hs)
    losses = []
    for t, alias in enumerate(hs):
        a, b = parts(alias)
        assert torch.equal(a, weight * 2)
        assert torch.equal(b, weight.sin())
        losses.append((a * A[t]).sum() + (b * B[t]).sum())
    sum(losses).backward()
    aligned = svd_align(torch.cat([A, B], 1))
    assert relative(weight.grad, 2 * aligned[:12] + weight.cos() * aligned[12:]) <= 2e-6
    for t, captured in enumerate(hs.gradients):
        assert type(captured) is type(h)
        a, b = parts(captured)
        assert torch.equal(a, A[t])
        assert torch.equal(b, B[t])


@both
def test_what_is_no_tensor_with_a_gradient_is_passed_on(via):
    constant = torch.ones(3)
    h = {"x": randn(3).requires_grad_() * 2, "mask": MASK, "shape": (3, "s"), "none": None, "constant": constant}
    hs = fan_out(h, 2, AlignedMTL(), via=via)
    for alias in hs:
        assert alias["mask"] is MASK
        assert alias["constant"] is constant
        assert alias["shape"] == (3, "s")
        assert alias["none"] is None
        assert alias["x"] is not h["x"]
        assert alias["x"].data_ptr() == h["x"].data_ptr()
    (hs[0]["x"].sum() + hs[1]["x"].sum()).backward()
    assert hs.gradients[0]["mask"] is None
    assert hs.gradients[0]["constant"] is None
    assert hs.gradients[0]["shape"] == (3, "s")


@both
def test_a_tensor_that_occurs_twice_is_one_column(via):
    """Hugging Face's `last_hidden_state` is also the last of `hidden_states`."""
    case = Linear()
    x = case.h()
    hs = fan_out({"last": x, "all": [x]}, 3, AlignedMTL(), via=via)
    assert all(h["last"] is h["all"][0] for h in hs)
    sum((h["last"] * g / 2 + h["all"][0] * g / 2).sum() for h, g in zip(hs, case.G, strict=True)).backward()
    assert relative(case.weight.grad, case.aligned()) <= 2e-6
    for t, captured in enumerate(hs.gradients):
        assert captured["last"] is captured["all"][0]
        assert torch.equal(captured["last"], case.G[t])


def test_the_aliases_are_a_sequence():
    hs = fan_out(randn(4, 3).requires_grad_(), 3, AlignedMTL())
    assert len(hs) == len(list(hs)) == 3
    assert hs[0] is next(iter(hs))
    assert hs[-1] is hs[2]
    assert [x is y for x, y in zip(hs[1:], (hs[1], hs[2]), strict=True)] == [True, True]
    assert "FanOut(3 x float32 tensor of shape [4, 3]" in repr(hs)
    assert hs.info is None
    assert hs.gradients is None
    losses = [h.sum() for h in hs]
    assert torch.equal(hs.total(losses), sum(losses))
    with pytest.raises(ValueError, match="losses: expected at least one loss"):
        hs.total([])


# ------------------------------------------------------------------------------------------------ who reaches what


@both
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("reaching", [[0, 2], [1], [0, 1]])
def test_a_task_that_misses_h_is_a_zero_row(reaching, said, via):
    case, zeros = Linear(), Linear()
    hs = fan_out(case.h(), 3, AlignedMTL(), via=via)
    losses = case.losses(hs)
    if said:
        hs.total([losses[t] if t in reaching else None for t in range(3)]).backward()
    else:
        missing = ", ".join(f"hs[{t}]" for t in range(3) if t not in reaching)
        with pytest.warns(UserWarning, match=rf"fan_out: {re.escape(missing)} of 3 aliases ha.* got no gradient"):
            sum(losses[t] for t in reaching).backward()
    hz = fan_out(zeros.h(), 3, AlignedMTL(), via=via)
    sum(loss if t in reaching else 0 * loss for t, loss in enumerate(zeros.losses(hz))).backward()
    assert torch.equal(case.weight.grad, zeros.weight.grad)
    assert relative(case.weight.grad, case.aligned(reaching)) <= 2e-6
    assert hs.info.rank == len(reaching)
    for t in range(3):
        assert (hs.gradients[t] is not None) == (t in reaching)
        assert torch.equal(hs.info.gram[t], hz.info.gram[t])
        if t not in reaching:
            assert (hs.info.gram[t] == 0).all()
            assert hs.info.alpha[t] == 0


@both
def test_no_task_reaches_h(via):
    case = Linear()
    h = case.h()
    hs = fan_out(h, 3, AlignedMTL(), via=via)
    (hs[0].detach().sum() * case.weight.sum()).backward()
    assert hs.info is None
    expected = case.weight.grad.clone()
    case.weight.grad = None
    (h.detach().sum() * case.weight.sum()).backward()
    assert torch.equal(case.weight.grad, expected)


@both
def test_an_alias_used_twice_is_summed(via):
    case = Linear()
    hs = fan_out(case.h(), 3, AlignedMTL(), via=via)
    sum(loss for _ in range(2) for loss in case.losses(hs)).backward()
    assert relative(case.weight.grad, 2 * case.aligned()) <= 2e-6
    for t in range(3):
        assert torch.equal(hs.gradients[t], 2 * case.G[t])


@both
def test_a_tensor_that_one_task_or_no_task_uses(via):
    case = Linear()
    a, b, c = case.weight * 1, case.weight * 2, case.weight.exp()
    hs = fan_out([a, b, c], 2, AlignedMTL(), via=via)
    ((hs[0][0] * case.G[0]).sum() + (hs[1][0] * case.G[1]).sum() + (hs[1][1] * case.G[2]).sum()).backward()
    Z = torch.stack([torch.cat([case.G[0], 0 * case.G[2]]), torch.cat([case.G[1], case.G[2]])])
    aligned = svd_align(Z)
    assert relative(case.weight.grad, aligned[:20] + 2 * aligned[20:]) <= 2e-6
    assert hs.gradients[0][1] is None
    assert hs.gradients[0][2] is None
    assert hs.gradients[1][2] is None
    assert torch.equal(hs.gradients[1][1], case.G[2])


@both
def test_other_uses_of_h_are_added_plainly(via):
    case = Linear()
    h = case.h()
    hs = fan_out(h, 3, AlignedMTL(), via=via)
    with pytest.warns(UserWarning, match=r"fan_out: .* beside the aliases hs\[0\] ... hs\[2\].* added plainly"):
        (sum(case.losses(hs)) + h.square().sum()).backward()
    assert relative(case.weight.grad, case.aligned() + 2 * case.weight) <= 2e-6


@both
def test_hooks_of_the_user_on_an_alias_come_first(via):
    case = Linear()
    hs = fan_out(case.h(), 3, AlignedMTL(), via=via)
    hs[1].register_hook(lambda g: 100 * g)
    sum(case.losses(hs)).backward()
    case.G[1] *= 100
    assert relative(case.weight.grad, case.aligned()) <= 2e-6
    assert torch.equal(hs.gradients[1], case.G[1])


@both
def test_retained_gradients(via):
    case = Linear()
    h = case.h()
    h.retain_grad()
    hs = fan_out(h, 3, AlignedMTL(), via=via)
    hs[2].retain_grad()
    sum(case.losses(hs)).backward()
    assert torch.equal(hs[2].grad, case.G[2])
    assert relative(h.grad, case.aligned()) <= 2e-6


@both
def test_gradients_of_any_stride(via):
    weight = nn.Parameter(randn(2, 3, 4, 4))
    a = randn(2, 3, 4, 4, seed=1).contiguous(memory_format=torch.channels_last)
    b = randn(2, 4, 4, 3, seed=2)
    hs = fan_out(weight * 1, 3, AlignedMTL(), via=via)
    (hs[0].sum() + (hs[1] * a).sum() + (hs[2].transpose(1, 3) * b).sum()).backward()
    Z = torch.stack([torch.ones(96), a.reshape(-1), b.transpose(1, 3).reshape(-1)])
    assert relative(weight.grad.reshape(-1), svd_align(Z)) <= 2e-6


@both
def test_h_of_no_dimension(via):
    weight = nn.Parameter(torch.tensor(3.0))
    hs = fan_out(weight * 1, 2, AlignedMTL(), via=via)
    (hs[0] + 2 * hs[1]).backward()
    assert weight.grad.item() == pytest.approx(svd_align(torch.tensor([[1.0], [2.0]])).item(), rel=1e-6)


@both
@pytest.mark.parametrize("loss", [lambda h: (h * h).sum(), lambda h: h.sum()], ids=["dense", "expanded"])
def test_an_empty_batch(loss, via):
    layer = nn.Linear(3, 5)
    hs = fan_out(layer(torch.ones(0, 3)), 2, AlignedMTL(), via=via)
    sum(loss(h) for h in hs).backward()
    assert (layer.weight.grad == 0).all()
    assert (hs.info.gram == 0).all()
    assert hs.info.rank == 0


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, via):
    case = Linear()

    def head(h, g):
        return (h * g).sum()

    def everything(weight):
        return sum(case.losses(fan_out(weight * 1, 3, AlignedMTL(), via=via)))

    hs = fan_out(case.h(), 3, AlignedMTL(), via=via)
    sum(checkpoint(head, h, g, use_reentrant=reentrant) for h, g in zip(hs, case.G, strict=True)).backward()
    assert relative(case.weight.grad, case.aligned()) <= 2e-6
    case.weight.grad = None
    checkpoint(everything, case.weight, use_reentrant=reentrant).backward()
    assert relative(case.weight.grad, case.aligned()) <= 2e-6


@both
def test_h_may_be_a_leaf(via):
    case = Linear()
    hs = fan_out(case.weight, 3, AlignedMTL(), via=via)
    sum(case.losses(hs)).backward()
    assert relative(case.weight.grad, case.aligned()) <= 2e-6


@both
def test_a_fan_out_of_an_alias(via):
    """Two groups of tasks, each with a trunk of its own: the outer alignment sees what the inner one lets through."""
    case = Linear(4)
    outer = fan_out(case.h(), 2, AlignedMTL(), via=via)
    inner = [fan_out(h * 2, 2, AlignedMTL(), via=via) for h in outer]
    sum(case.losses([*inner[0], *inner[1]])).backward()
    rows = torch.stack([2 * svd_align(case.G[:2]), 2 * svd_align(case.G[2:])]).float()
    assert relative(case.weight.grad, svd_align(rows)) <= 2e-6


@both
def test_without_gradients_the_aliases_are_h(via):
    model = MTAN().eval()
    with torch.no_grad():
        h = model.encoder(model.x)
        hs = fan_out(h, 3, AlignedMTL(), via=via)
    assert all(alias is h for alias in hs)
    assert hs.info is hs.gradients is None
    constant = randn(3)
    hs = fan_out(constant, 2, AlignedMTL(), via=via)
    assert all(alias is constant for alias in hs)
    weight = nn.Parameter(randn(3))
    with torch.no_grad():
        assert fan_out(weight, 2, AlignedMTL(), via=via)[1] is weight
    with torch.inference_mode():
        assert fan_out(weight * 2, 2, AlignedMTL(), via=via)[1].is_inference()


@both
def test_an_alias_is_not_written_in_place(via):
    for T in (1, 2):
        hs = fan_out(Linear().h(), T, AlignedMTL(), via=via)
        with pytest.raises(RuntimeError, match="inplace"):
            hs[0].mul_(2)
        pair = fan_out([Linear().h(), Linear().h()], T, AlignedMTL(), via=via)
        with pytest.raises(RuntimeError, match="inplace"):
            pair[T - 1][1].relu_()


@both
def test_non_finite_gradients_reach_the_encoder(via):
    """A loss scaler finds the overflow in `.grad` and skips the step."""
    case = Linear()
    hs = fan_out(case.h(), 3, AlignedMTL(), via=via)
    losses = case.losses(hs)
    (losses[0] + torch.inf * losses[1] + losses[2]).backward()
    assert not case.weight.grad.isfinite().any()


@both
def test_grad_scaler_in_an_ordinary_loop(via):
    plain, scaled = MLP(3), MLP(3)
    train_step(plain, AlignedMTL(), via)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    hs = fan_out(scaled.encoder(scaled.x), 3, AlignedMTL(), via=via)
    scaler.scale(sum(losses_of_aliases(scaled, hs))).backward()
    scaler.unscale_(optimizer)
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert relative(p.grad, q.grad.to(F64)) <= 1e-6


def losses_of_aliases(model, hs):
    return [model.loss(t, h) for t, h in enumerate(hs)]


@both
def test_gradients_accumulate_over_steps(via):
    model = MLP(3)
    train_step(model, AlignedMTL(), via)
    once = [g.clone() for g in encoder_gradients(model)]
    train_step(model, AlignedMTL(), via)
    for g, o in zip(encoder_gradients(model), once, strict=True):
        assert torch.equal(g, 2 * o)


# ------------------------------------------------------------------------------------------------ info


@both
@pytest.mark.parametrize("method", [AlignedMTL(), fastmtl.MGDA()], ids=["aligned", "mgda"])
def test_given_buffers_are_filled(method, via):
    buffers = fastmtl.Info(3)
    alpha, gram, eigenvalues, rank = buffers.alpha, buffers.gram, buffers.eigenvalues, buffers.rank
    assert alpha.isnan().all()
    own = train_step(MLP(3), method, via)
    hs = train_step(MLP(3), method, via, info=buffers)
    assert hs.info is buffers
    assert buffers.alpha is alpha
    assert torch.equal(alpha, own.info.alpha)
    assert torch.equal(gram, own.info.gram)
    if isinstance(method, AlignedMTL):
        assert torch.equal(eigenvalues, own.info.eigenvalues)
        assert rank == own.info.rank == 3


@both
def test_info(via):
    model = MLP(3)
    Z = dense(task_gradients(model)).to(F64)
    info = train_step(model, AlignedMTL(), via).info
    assert relative(info.alpha @ Z, svd_align(Z.float())) <= 2e-6
    assert relative(info.eigenvalues, torch.linalg.svdvals(Z).square()) <= 1e-6
    assert info.rank == 3
    assert not any(x.requires_grad for x in vars(info).values() if isinstance(x, torch.Tensor))


# ------------------------------------------------------------------------------------------------ backward again


@both
def test_a_second_backward_over_a_retained_graph(via):
    case = Linear()
    hs = fan_out(case.h(), 3, AlignedMTL(), via=via)
    loss = sum(case.losses(hs))
    loss.backward(retain_graph=True)
    once = case.weight.grad.clone()
    loss.backward()
    assert torch.equal(case.weight.grad, 2 * once)


@both
@pytest.mark.parametrize("retain", [True, False])
def test_loss_by_loss_raises(retain, via):
    model = MLP(3)
    hs = fan_out(model.encoder(model.x), 3, AlignedMTL(), via=via)
    losses = losses_of_aliases(model, hs)
    with pytest.warns(UserWarning, match=r"hs\[1\], hs\[2\] of 3 aliases have got no gradient"):
        losses[0].backward(retain_graph=retain)
    before = [g.clone() for g in encoder_gradients(model)]
    with pytest.raises(RuntimeError, match=r"fan_out: expected gradients of tasks \[0\].*got those of tasks \[1\]"):
        losses[1].backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match=r"tasks \[0\].*tasks \[1, 2\].*backward once"):
        (model.loss(1, hs[1]) + losses[2]).backward()
    for g, b in zip(encoder_gradients(model), before, strict=True):
        assert torch.equal(g, b)


def raise_while_armed(_):
    if Fail.armed:
        raise ArithmeticError


@both
@pytest.mark.parametrize("where", ["head", "hook"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_backward_leaves_nothing_behind(failing, where, via):
    """What other tasks had brought before one failed does not turn up in the next backward."""
    case = Linear()
    hs = fan_out(case.h(), 3, AlignedMTL(), via=via)
    losses = case.losses(hs)
    if where == "head":
        losses[failing] = Fail.apply(losses[failing])
    else:  # on the alias itself: by then the hooks of those that were made later have run
        hs[failing].register_hook(raise_while_armed)
    with pytest.raises(ArithmeticError):
        sum(losses).backward(retain_graph=True)
    assert case.weight.grad is None
    assert hs.gradients is hs.info is None
    Fail.armed = False
    hs.total([losses[t] if t == failing else None for t in range(3)]).backward(retain_graph=True)
    assert [t for t in range(3) if hs.gradients[t] is not None] == [failing]
    assert relative(case.weight.grad, case.aligned([failing])) <= 2e-6


@both
def test_a_failed_backward_can_be_repeated(via):
    case = Linear()
    hs = fan_out(case.h(), 3, AlignedMTL(), via=via)
    losses = case.losses(hs)
    losses[1] = Fail.apply(losses[1])
    with pytest.raises(ArithmeticError):
        sum(losses).backward(retain_graph=True)
    Fail.armed = False
    sum(losses).backward()
    assert relative(case.weight.grad, case.aligned()) <= 2e-6


@both
def test_an_encoder_that_fails_in_its_backward(via):
    case = Linear()
    hs = fan_out(Fail.apply(case.h()), 3, AlignedMTL(), via=via)
    with pytest.raises(ArithmeticError):
        sum(case.losses(hs)).backward(retain_graph=True)
    assert case.weight.grad is None
    Fail.armed = False
    sum(case.losses(hs)).backward()
    assert relative(case.weight.grad, case.aligned()) <= 2e-6


@both
def test_create_graph_gives_the_same_gradient(via):
    model, plain = MLP(3), MLP(3)
    train_step(plain, AlignedMTL(), via)
    hs = fan_out(model.encoder(model.x), 3, AlignedMTL(), via=via)
    grads = torch.autograd.grad(sum(losses_of_aliases(model, hs)), list(model.encoder.parameters()), create_graph=True)
    for g, e in zip(grads, encoder_gradients(plain), strict=True):
        assert torch.equal(g, e)
    assert not any(g.requires_grad for g in hs.gradients)
    assert not hs.info.alpha.requires_grad


@both
def test_double_backward_raises(via):
    model = MLP(3)
    hs = fan_out(model.encoder(model.x), 3, AlignedMTL(), via=via)
    weight = model.encoder[0].weight
    (g,) = torch.autograd.grad(sum(losses_of_aliases(model, hs)), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="fan_out: the aggregated gradient has no derivative"):
        g.square().sum().backward()
    assert weight.grad is None


@both
def test_double_backward_of_losses_that_are_linear(via):
    """Their gradients are constants, and so is what comes of them."""
    case = Linear()
    hs = fan_out(case.weight.square(), 3, AlignedMTL(), via=via)
    (g,) = torch.autograd.grad(sum(case.losses(hs)), case.weight, create_graph=True)
    g.sum().backward()
    assert relative(g, 2 * case.weight * case.aligned()) <= 2e-6
    assert relative(case.weight.grad, 2 * case.aligned()) <= 2e-6


# ------------------------------------------------------------------------------------------------ copies


class Keeper(nn.Module):
    """A module that keeps its last fan-out, as a LightningModule may for its log."""

    def __init__(self):
        super().__init__()
        self.model = MLP(3)
        self.hs = None

    def forward(self, via="node"):
        self.hs = fan_out(self.model.encoder(self.model.x), 3, AlignedMTL(), via=via)
        return self.hs.total(losses_of_aliases(self.model, self.hs))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@both
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_a_copy_holds_nothing(copied, via):
    """Whatever keeps a fan-out can be copied and saved, before and after its backward."""
    keeper = Keeper()
    loss = keeper(via)
    for _ in range(2):
        other = copied(keeper)
        assert list(other.hs) == [None] * 3
        assert other.hs.info is other.hs.gradients is None
        assert "FanOut(3" in repr(other.hs)
        other().backward()
        assert other.hs.info.rank == 3
        loss.backward(retain_graph=True)
    assert keeper.hs.info.rank == 3


# ------------------------------------------------------------------------------------------------ memory


class Token:
    """Something a graph node holds: it goes when the node does."""


class Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


@both
@pytest.mark.parametrize("structure", ["tensor", "list"])
@pytest.mark.parametrize("passes", ["none", "one", "create_graph"])
def test_no_reference_cycle(passes, structure, via, no_collector):
    """All goes with the fan-out and the losses, without the collector's help."""
    case = Linear(2)
    token = Token()
    x = Hold.apply(case.h(), token)
    h = x if structure == "tensor" else [x, x * 2]
    hs = fan_out(h, 2, AlignedMTL(), via=via)
    aliases = [alias if structure == "tensor" else alias[0] * alias[1] for alias in hs]
    losses = case.losses(aliases)
    if passes == "create_graph":
        torch.autograd.grad(sum(losses), case.weight, create_graph=True)
    elif passes == "one":
        sum(losses).backward(retain_graph=True)
    kept = [weakref.ref(token), weakref.ref(x), weakref.ref(hs), weakref.ref(hs._capture)]
    if passes in ("one", "create_graph"):
        captured = hs.gradients[0] if structure == "tensor" else hs.gradients[0][0]
        kept.append(weakref.ref(captured))
        del captured
    del token, x, h, hs, aliases
    assert kept[0]() is not None  # the losses hold the graph
    del losses
    assert [ref() for ref in kept] == [None] * len(kept)


@both
def test_the_gradients_go_with_the_fan_out(via, no_collector):
    """They do not wait for the encoder's graph: after `del hs` and the losses nothing of them is left."""
    case = Linear()
    h = case.h()
    hs = fan_out(h, 3, AlignedMTL(), via=via)
    sum(case.losses(hs)).backward()
    kept = weakref.ref(hs._capture)
    del hs
    assert kept() is None
    assert h.requires_grad

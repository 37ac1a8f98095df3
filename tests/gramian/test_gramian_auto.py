"""`engine="auto"` runs, and is right, wherever "full" does; `engine="gramian"` too, or says in its own words why not.

Each graph is held to plain autograd: T passes, their Gram matrix and their weighted sum.
"""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from helpers import BF16, F16, F32, F64, randn, relative
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl import gramian
from fastmtl.gramian import cost, engine, hooks

WEIGHTS = (0.2, -1.0, 0.7, 0.4)
LIMIT = {F64: 1e-9, F32: 2e-5, BF16: 3e-2, F16: 3e-3}

GRAPHS = {}


class Parameters:
    """Parameters by name, each from a seed of its own."""

    def __init__(self, dtype, shapes):
        for k, (name, shape) in enumerate(shapes.items()):
            setattr(self, name, nn.Parameter(0.5 * randn(*shape, dtype=dtype, seed=10 + k)))
        self.all = [getattr(self, name) for name in shapes]


def graph(rest="", dtype=F64, **shapes):
    """Registers losses made from parameters of these shapes; those in `rest` are not shared."""

    def register(losses):
        GRAPHS[losses.__name__] = losses, rest.split(), dtype, shapes
        return losses

    return register


def x(*shape, seed=1, dtype=F64):
    return randn(*shape, dtype=dtype, seed=seed)


def heads(h, tasks=4):
    """T losses of features [B, ...], one row of random numbers in each."""
    h = h.flatten(1)
    return [(h * x(*h.shape[1:], seed=50 + t, dtype=h.dtype)).sum(1).sin().sum() for t in range(tasks)]


# ------------------------------------------------------------------------------------------------ dtypes, layouts


@graph(w=(6, 4))
def complex_activations(p):
    return heads(torch.fft.fft(F.linear(x(7, 4), p.w)).abs())


@graph(w=(6, 4))
def complex_features(p):
    z = torch.fft.fft(F.linear(x(7, 4), p.w))
    return [(z * x(6, seed=t)).abs().sum() + t * z.imag.sin().sum() for t in range(4)]


@graph("u", u=(4, 4), w=(6, 4))
def complex_features_and_a_parameter_that_is_not_shared(p):
    return complex_features_of(F.linear(x(7, 4) @ p.u, p.w))


def complex_features_of(h):
    z = torch.fft.fft(h)
    return [(z * x(6, seed=t)).abs().sum() + t * z.imag.sin().sum() for t in range(4)]


@graph(w=(4, 6))
def a_weight_cast_to_complex(p):
    return heads((x(7, 4).to(torch.complex128) @ p.w.to(torch.complex128)).abs())


@graph(w=(4, 6), v=(6, 6))
def an_input_with_the_negative_bit(p):
    return heads((torch.complex(x(7, 4) @ p.w, x(7, 4, seed=3) @ p.w).conj().imag @ p.v).tanh())


@graph(w=(3, 2, 3, 3), v=(3, 3, 3, 3))
def images_with_the_negative_bit(p):
    z = torch.complex(F.conv2d(x(2, 2, 8, 8), p.w), F.conv2d(x(2, 2, 8, 8, seed=3), p.w)).conj()
    return heads(F.conv2d(z.imag, p.v, padding=1).tanh())


@graph(w=(6, 4), v=(5, 6))
def nested_in_the_trunk(p):
    h = x(7, 4) @ p.w.t()
    nested = torch.nested.as_nested_tensor([h[:3].tanh(), h[3:].sin()])
    return heads(F.linear(nested, p.v).to_padded_tensor(0.0))


@graph("v", w=(6, 4), v=(5, 6))
def nested_features(p):
    nested = torch.nested.nested_tensor_from_jagged(x(7, 4) @ p.w.t(), torch.tensor([0, 3, 7]))
    y = F.linear(nested.tanh(), p.v)
    return [(y.values().sin() * x(7, 5, seed=t)).sum() for t in range(4)]


@graph(w=(4, 6))
def sparse_cotangents(p):
    h = x(7, 4) @ p.w
    return [
        torch.gather(h, 1, torch.arange(7).sub(t).clamp(0, 5)[:, None], sparse_grad=True).sin().sum() for t in range(4)
    ]


@graph(w=(4, 6), v=(6, 6))
def sparse_inputs(p):
    a = x(7, 4) * (x(7, 4) > 0)
    return heads(((a.to_sparse() @ p.w).tanh() @ p.v) * (a.to_sparse_csr() @ p.w).tanh())


@graph(dtype=F32, w=(3, 2, 3, 3), v=(5, 3))
def mkldnn_tensors(p):
    h = F.conv2d(x(2, 2, 6, 6, dtype=F32).to_mkldnn(), p.w).to_dense().mean((2, 3))
    h = F.linear(h, p.v).to_mkldnn()
    return [(h.to_dense().sin() * x(2, 5, seed=t, dtype=F32)).sum() for t in range(4)]


@graph(dtype=F32, w=(6, 4), v=(5, 6))
def weights_cast_up(p):
    return heads(F.linear(F.linear(x(7, 4), p.w.double()).tanh(), p.v.double()).tanh())


@graph(w=(6, 4), v=(5, 6))
def weights_cast_down_and_up(p):
    return heads(F.linear(F.linear(x(7, 4), p.w.float().double()).tanh(), p.v).tanh())


@graph(dtype=F32, w=(6, 4), v=(5, 6))
def weights_cast_to_bfloat16(p):
    h = F.linear(x(7, 4, dtype=BF16), p.w.bfloat16()).float().tanh()
    return heads(F.linear(h, p.v))


@graph(dtype=F32, w=(6, 4), v=(5, 6))
def quantised_weights(p):
    fake = torch.fake_quantize_per_tensor_affine(p.w, 0.1, 0, -128, 127)
    return heads(F.linear(F.linear(x(7, 4, dtype=F32), fake).tanh(), p.v).tanh())


class Labelled(torch.Tensor):
    """A subclass that does nothing."""


@graph(u=(4, 6), w=(6, 6))
def activations_of_a_subclass(p):
    return heads(F.linear((x(7, 4).as_subclass(Labelled) @ p.u).tanh(), p.w).tanh())


# ------------------------------------------------------------------------------------------------ uses of weights


@graph(w=(4, 6), b=(6,), c=(7, 6))
def sums_with_factors(p):
    h = torch.addmm(p.b, x(7, 4), p.w, beta=0.25) + torch.addmm(p.b, x(7, 4, seed=5), p.w, beta=0)
    return heads((h + torch.addmm(p.c, x(7, 4, seed=4), p.w, alpha=-2.0)).tanh())


@graph(w=(4, 6), b=(6,))
def a_bias_with_a_factor(p):
    return heads(torch.addmm(p.b, x(7, 4), p.w, beta=0.25).tanh())


@graph(w=(4, 6), b=(6,))
def a_product_with_a_factor(p):
    return heads(torch.addmm(p.b, x(7, 4), p.w, alpha=0.25).tanh())


@graph(w=(4, 4), a=(4,), b=(1, 4), c=(4, 1), d=())
def biases_of_all_shapes(p):
    """On square matrices, where every shape goes with every other."""
    h = x(4, 4)
    for bias in (p.a, p.b, p.c, p.d):
        h = torch.addmm(bias, h, p.w).tanh()
    return heads(torch.addmm(p.a, p.w, h).tanh())


@graph(w=(3, 4, 5), v=(4, 2), b=(3,))
def other_products(p):
    h = torch.baddbmm(p.b[:, None, None], x(3, 7, 4), p.w, beta=0.5, alpha=2.0)
    h = h.sum(0) + torch.addbmm(x(7, 5), x(3, 7, 4, seed=3), p.w, beta=2.0, alpha=0.5)
    y = torch.addmv(p.b[0], h @ x(5, 4), p.v[:, 0], alpha=3.0)[:, None] * torch.addr(h, x(7), p.w[0, 0], beta=0.5)
    return heads(torch.einsum("bo,nio->bin", y, p.w).tanh() + torch.einsum("bo,hio->bih", h, p.w))


@graph(w=(4, 4), v=(4, 4))
def transposes_that_turn_nothing(p):
    return heads(F.linear((x(7, 4) @ p.w.transpose(1, 1)).tanh(), p.v.transpose(-1, 0)).tanh())


@graph(w=(6, 6))
def a_weight_times_itself(p):
    return heads(F.linear((x(7, 6) @ p.w) @ (p.w @ p.w), p.w.t() @ p.w).tanh())


@graph(w=(3, 2, 3, 3), b=(3,))
def one_number_for_all_dimensions(p):
    return heads(torch.convolution(x(2, 2, 6, 6), p.w, p.b, [1], [1], [1], False, [0], 1).tanh())


@graph(w=(6, 4, 3, 3))
def a_kernel_in_parts(p):
    a, b = p.w.chunk(2)
    c, d = p.w.split([1, 3], 1)
    y = F.conv2d(x(2, 4, 6, 6), a) * F.conv2d(x(2, 4, 6, 6, seed=2), b)
    return heads(torch.cat([y, F.conv2d(x(2, 1, 6, 6), c) + F.conv2d(x(2, 3, 6, 6), d)], 1).tanh())


@graph(w=(6, 4))
def a_part_of_a_weight_in_a_head(p):
    a, b = p.w.split(3)
    h = F.linear(x(5, 4), a).tanh()
    return [h[:, 0].sum() + F.linear(x(5, 4), b).square().sum(), h.exp().mean(), h[:, 1].square().sum()]


@graph(w=(6, 4))
def a_weight_in_parts_and_whole_in_a_head(p):
    a, b = p.w.split(3)
    h = (F.linear(x(5, 4), a) + F.linear(x(5, 4, seed=3), b)).tanh()
    return [h[:, 0].sum() + F.linear(x(5, 4), p.w).square().sum(), h.exp().mean(), h[:, 1].square().sum()]


@graph(dtype=F32, w=(6, 4))
def a_cast_weight_in_a_head(p):
    cast = p.w.double()
    h = F.linear(x(5, 4), cast).tanh()
    return [h[:, 0].sum() + cast.square().sum(), h.exp().mean(), h[:, 1].square().sum()]


@graph(w=(4, 6))
def a_weight_written_into_a_buffer(p):
    buffer = torch.zeros(5, 6, dtype=F64)
    buffer[:4] = p.w
    buffer[4] = p.w[0]
    return heads((x(7, 5) @ buffer).tanh())


@graph(w=(6, 4), v=(5, 6, 3, 3))
def inputs_without_memory_of_their_own(p):
    h = F.linear(x(1, 4).expand(7, 4), p.w).tanh()
    return heads(F.conv2d(h[:, :, None, None].expand(7, 6, 5, 5), p.v).tanh())


@graph(w=(6, 6))
def an_embedding_that_is_both_layers_too(p):
    ids = torch.tensor([[0, 3, 3], [1, 4, 0]])
    h = F.embedding(ids, p.w, padding_idx=3, scale_grad_by_freq=True).tanh()
    return heads(F.linear(F.linear(h, p.w).tanh(), p.w.t()).tanh())


@graph(dtype=F32, w=(6, 6))
def an_embedding_and_the_output_layer_in_two_dtypes(p):
    h = F.embedding(torch.tensor([[0, 3, 3], [1, 4, 0]]), p.w).double().tanh()
    return heads(F.linear(h, p.w.double()).tanh())


@graph(w=(4, 6), n=(), e=(0, 6))
def parameters_of_no_and_of_zero_dimensions(p):
    return heads((x(7, 4) @ torch.cat([p.w, p.e]) * p.n).tanh())


@graph(w=(4, 6), k=(3, 2, 3, 3), e=(5, 3))
def an_empty_batch(p):
    h = F.linear(x(0, 4), p.w.t()).tanh().sum() + F.conv2d(x(0, 2, 5, 5), p.k).tanh().sum()
    h = h + F.embedding(torch.zeros(0, dtype=torch.long), p.e).sum()
    return [t * h + (p.w * x(4, 6, seed=t)).sum() for t in range(1, 5)]


# ------------------------------------------------------------------------------------------------ graphs


@graph(u=(4, 6), w=(6, 6))
def written_in_place(p):
    h = x(7, 4) @ p.u
    h[:, 0] *= 2
    h[1:3].sin_()
    y = torch.zeros(7, 6, dtype=F64)
    y[:, 2:5] = h[:, :3] @ p.w[:3, :3]
    y[0] = (h @ p.w)[1]
    return heads(y.tanh_())


class Clipped(torch.autograd.Function):
    """The identity, with a backward that is not linear."""

    @staticmethod
    def forward(ctx, h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.01, 0.01)


@graph(u=(4, 6), w=(5, 6))
def a_backward_that_is_not_linear(p):
    return heads(F.linear(Clipped.apply(x(7, 4) @ p.u).tanh(), p.w).tanh())


@graph("u", u=(4, 6), w=(5, 6))
def a_backward_that_is_not_linear_before_what_is_not_shared(p):
    return a_backward_that_is_not_linear(p)


@graph("u", u=(4, 6), w=(5, 6))
def a_hook_that_is_not_linear_before_what_is_not_shared(p):
    h = x(7, 4) @ p.u
    h.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return heads(F.linear(h.tanh(), p.w).tanh())


@graph(u=(4, 6), w=(5, 6))
def a_hook_that_is_not_linear_and_small_losses(p):
    """The sizes that a hook sees are those of the losses."""
    h = x(7, 4) @ p.u
    h.register_hook(lambda g: g.clamp(-1e-12, 1e-12))
    return [1e-9 * loss for loss in heads(F.linear(h.tanh(), p.w).tanh())]


class Summed(torch.autograd.Function):
    """Σ over rows, with a gradient of more dimensions than it should have: autograd adds them up."""

    @staticmethod
    def forward(ctx, h):
        ctx.shape = h.shape
        return h.sum(0, keepdim=True)

    @staticmethod
    def backward(ctx, g):
        return g.expand(9, *ctx.shape).contiguous()


class Rounded(torch.autograd.Function):
    """2 h, with a gradient of another dtype: autograd casts it."""

    @staticmethod
    def forward(ctx, h):
        return 2 * h

    @staticmethod
    def backward(ctx, g):
        return (2 * g).float()


@graph(w=(4, 6))
def functions_that_return_what_autograd_mends(p):
    h = (x(7, 4) @ p.w).tanh()
    return [
        Summed.apply(h).sin().sum(),
        Rounded.apply(h).cos().sum(),
        (Rounded.apply(h) * Summed.apply(h)).sum(),
        h.exp().sum(),
    ]


class Nothing(torch.autograd.Function):
    """The identity without a gradient."""

    @staticmethod
    def forward(ctx, h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, g):
        return None


@graph(u=(4, 6), w=(5, 6), v=(6, 4))
def a_function_without_a_gradient(p):
    h = Nothing.apply(F.linear(x(7, 4), p.v)).tanh() + (x(7, 4) @ p.u).tanh()
    return heads(F.linear(h, p.w).tanh())


@graph(u=(4, 6), w=(6, 6), v=(6, 6))
def checkpointed(p):
    torch.manual_seed(5)
    inner = lambda h: checkpoint(lambda h: F.dropout(F.linear(h, p.w), 0.3).tanh(), h, use_reentrant=False)  # noqa: E731
    return heads(checkpoint(lambda h: (inner(F.dropout(h, 0.3) @ p.u) @ p.v).tanh(), x(7, 4), use_reentrant=False))


@graph(u=(4, 6), w=(6, 6), v=(6, 6))
def checkpointed_in_the_middle(p):
    torch.manual_seed(5)
    h = x(7, 4) @ p.u
    h = checkpoint(lambda h: F.dropout(F.linear(F.dropout(h, 0.3), p.w).tanh() @ p.v, 0.3), h, use_reentrant=False)
    return heads(h)


@graph(u=(4, 6), w=(6, 6))
def saved_elsewhere(p):
    with torch.autograd.graph.save_on_cpu():
        return heads(F.linear((x(7, 4) @ p.u).tanh(), p.w).tanh())


@graph(u=(4, 6), w=(6, 6))
def vmapped(p):
    return heads(torch.func.vmap(lambda row: (p.w @ (row @ p.u).tanh()).tanh())(x(7, 4)))


@graph(u=(4, 6), w=(6, 6))
def gradients_by_torch_func(p):
    slopes = torch.func.vmap(torch.func.grad(lambda row: ((row @ p.u).tanh() @ p.w).sin().sum()))
    return heads(slopes(x(7, 4)))


@graph(u=(4, 6), w=(6, 6))
def penalties_on_gradients(p):
    inputs = x(7, 4).requires_grad_()
    h = ((inputs @ p.u).tanh() @ p.w).tanh()
    slopes = torch.autograd.grad(h.square().sum(), [inputs, p.u, p.w], create_graph=True)
    return [h.sum(), slopes[0].square().sum(), sum(g.square().sum() for g in slopes[1:]), h.exp().mean()]


@graph(n=(), w=(6, 4))
def a_loss_that_is_a_parameter(p):
    return [p.n, *(loss.expand(1, 1) for loss in heads(F.linear(x(7, 4), p.w).tanh() * p.n, 3))]


@graph(w=(6, 4))
def losses_that_are_absent(p):
    losses = heads(F.linear(x(7, 4), p.w).tanh())
    return [None, losses[1], losses[2].detach(), losses[3]]


@graph("u", u=(4, 4), w=(6, 4))
def losses_that_are_absent_before_what_is_not_shared(p):
    return [*heads(F.linear(x(7, 4) @ p.u, p.w).tanh(), 3), None]


# ------------------------------------------------------------------------------------------------ hooks


@graph(w=(6, 4), v=(6, 6), k=(5, 6))
def hooks_of_weights_as_they_are_read(p):
    wt, part, cast = p.w.t(), p.v.split(3)[0], p.k.float()
    wt.register_hook(lambda g: 3 * g)
    part.register_hook(lambda g: g.square())
    cast.register_hook(lambda g: g.relu())
    h = F.linear((x(5, 4) @ wt).tanh(), part).tanh()
    return heads(F.linear(torch.cat([h, h], 1).float(), cast).double())


@graph(w=(6, 4), b=(6,))
def a_hook_of_a_bias_as_it_is_read(p):
    bias = p.b.float()
    bias.register_hook(lambda g: 2 * g)
    return heads(F.linear(x(5, 4, dtype=F32), p.w.float(), bias).double().tanh())


@graph(w=(6, 4), v=(6, 6))
def hooks_of_what_linear_layers_return(p):
    h = F.linear(x(5, 4), p.w)
    h.register_hook(lambda g: 2 * g)
    y = F.linear(h.tanh(), p.v)
    y.register_hook(lambda g: g.square())
    return heads(y.tanh())


@graph(w=(6, 4), v=(6, 6), t=(6, 6))
def hooks_of_nodes(p):
    h = F.linear(x(5, 4), p.w)
    h.grad_fn.register_hook(lambda ins, _: tuple(None if g is None else 2 * g for g in ins))
    y = F.linear(h.tanh(), p.v)
    y.grad_fn.register_prehook(lambda outs: (3 * outs[0],))
    turned = p.t.t()
    turned.grad_fn.register_prehook(lambda outs: (outs[0].square(),))
    return heads((y.tanh() @ turned).tanh())


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("engine", ["gramian", "auto"])
def test_as_plain_autograd(engine, name, closed, at_once, monkeypatch):
    """With closed forms where they pay and wherever there are some; one task after the other and all at once."""
    make, rest, dtype, shapes = GRAPHS[name]
    p = Parameters(dtype, shapes)
    rows = [
        [torch.zeros_like(q) for q in p.all]
        if loss is None or not loss.requires_grad
        else [
            torch.zeros_like(q) if g is None else g
            for g, q in zip(torch.autograd.grad(loss, p.all, retain_graph=True, allow_unused=True), p.all, strict=True)
        ]
        for loss in make(p)
    ]
    w = WEIGHTS[: len(rows)]
    shared = [getattr(p, name) for name in shapes if name not in rest]
    own = [k for k, q in enumerate(p.all) if any(q is s for s in shared)]
    G = torch.stack([torch.cat([row[k].reshape(-1).to(F64) for k in own]) for row in rows])

    monkeypatch.setattr(cost, "goes_at_once", lambda *_: at_once)
    monkeypatch.setattr(cost, "prefers_full", lambda *_: False)
    if closed:
        monkeypatch.setattr(cost, "is_cheaper_explicit", lambda *_: False)
    info = fastmtl.Uniform(weights=w).backward(make(p), shared, engine=engine)
    assert isinstance(info.explicit, tuple), "left to the full engine"
    limit = LIMIT[dtype]
    if name == "weights_cast_to_bfloat16":
        limit = LIMIT[BF16]
    if name in ("weights_cast_down_and_up", "hooks_of_weights_as_they_are_read", "a_hook_of_a_bias_as_it_is_read"):
        limit = LIMIT[F32]
    lengths = G.norm(dim=1)
    assert ((info.gram - G @ G.T).abs() <= limit * lengths[:, None] * lengths).all()
    for k, q in enumerate(p.all):
        factors = w if k in own else [1.0] * len(rows)
        expected = sum(f * row[k] for f, row in zip(factors, rows, strict=True))
        if q.grad is None:
            assert not expected.any()
        else:
            assert relative(q.grad, expected.to(F64)) <= limit


# ------------------------------------------------------------------------------------------------ refused, left alone


def strided_nested(p):
    """Autograd takes no cotangents of such tensors but from an operation."""
    h = x(7, 4) @ p.w.t()
    y = F.linear(torch.nested.as_nested_tensor([h[:3].tanh(), h[3:].sin()]), p.v)
    return [(y.to_padded_tensor(float(t)).sin() * x(4, 5, seed=t)).sum() for t in range(4)]


def _of(losses, engine, p, **options):
    return fastmtl.AlignedMTL().backward(losses, p.all, engine=engine, **options)


def test_what_the_engine_cannot_read():
    """In its own words, before anything has happened; "auto" is "full", to the bit."""
    full, p = (Parameters(F64, {"w": (6, 4), "v": (5, 6)}) for _ in range(2))
    expected = _of(strided_nested(full), "full", full)
    losses = strided_nested(p)
    with pytest.raises(NotImplementedError, match=r"engine: .*nested.*LinearBackward0.*jagged"):
        _of(losses, "gramian", p)
    assert all(q.grad is None for q in p.all)
    info = _of(losses, "auto", p)
    assert info.explicit is None
    assert torch.equal(info.gram, expected.gram)
    assert all(torch.equal(q.grad, r.grad) for q, r in zip(p.all, full.all, strict=True))


@pytest.mark.parametrize("stage", ["survey", "plan", "settled", "is_hooked"])
@pytest.mark.parametrize("error", [AttributeError, RuntimeError, KeyError, TypeError])
def test_whatever_fails_before_the_first_pass_is_left_to_the_full_engine(stage, error, monkeypatch):
    """A torch of the future, say. Nothing has been used up: graph, `.grad`, hooks, random numbers."""
    make, _, dtype, shapes = GRAPHS["checkpointed_in_the_middle"]
    full, p = Parameters(dtype, shapes), Parameters(dtype, shapes)
    calls = []
    losses = make(full)
    _of(losses, "full", full)

    def fail(*_, **__):
        raise error("something that nobody expected")

    monkeypatch.setattr(engine, stage, fail)
    monkeypatch.setattr(cost, "prefers_full", lambda *_: False)
    monkeypatch.setattr(cost, "goes_at_once", lambda *_: True)
    losses = make(p)
    for q in p.all:
        q.register_hook(lambda g: calls.append(g))
    state = torch.get_rng_state()
    for expected in (error, NotImplementedError):
        if stage in ("survey", "plan") and expected is NotImplementedError:
            with pytest.raises(NotImplementedError, match=r"engine: .*nobody expected"):
                _of(losses, "gramian", p)
        elif stage not in ("survey", "plan") and expected is error:
            with pytest.raises(error, match="nobody expected"):
                _of(losses, "gramian", p)
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls
    assert all(q.grad is None for q in p.all)
    info = _of(losses, "auto", p)
    assert info.explicit is None
    assert len(calls) == len(p.all)
    assert all(torch.equal(q.grad, r.grad) for q, r in zip(p.all, full.all, strict=True))


def test_where_full_is_cheaper_nothing_is_touched(monkeypatch):
    """Not even hooks are asked, nor what is saved unpacked."""
    monkeypatch.setattr(cost, "prefers_full", lambda *_: True)
    p = Parameters(F64, {"w": (6, 4), "v": (5, 6)})
    seen, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: (unpacked.append(1), saved)[1]):
        wt = p.w.t()
        wt.register_hook(seen.append)
        h = (x(7, 4) @ wt).tanh()
        losses = heads(F.linear(h, p.v))
    monkeypatch.setattr(gramian.engine, "settled", None)
    monkeypatch.setattr(gramian.engine, "_heads", None)
    assert _of(losses, "auto", p).explicit is None
    assert len(seen) == len(losses)


@pytest.mark.parametrize("engine", ["full", "gramian", "auto"])
def test_a_graph_that_was_used_up(engine, monkeypatch):
    """Torch's own error, from every engine, and no `.grad` written."""
    monkeypatch.setattr(cost, "prefers_full", lambda *_: False)
    monkeypatch.setattr(cost, "is_cheaper_explicit", lambda *_: False)
    p = Parameters(F64, {"w": (6, 4), "v": (5, 6)})
    losses = heads(F.linear(F.linear(x(7, 4), p.w).tanh(), p.v).tanh())
    torch.autograd.grad(sum(losses), p.all)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        _of(losses, engine, p)
    assert all(q.grad is None for q in p.all)


@pytest.mark.parametrize("engine", ["full", "gramian", "auto"])
def test_an_input_that_was_overwritten(engine, monkeypatch):
    monkeypatch.setattr(cost, "prefers_full", lambda *_: False)
    monkeypatch.setattr(cost, "is_cheaper_explicit", lambda *_: False)
    p = Parameters(F64, {"w": (6, 4), "v": (5, 6)})
    h = F.linear(x(7, 4), p.w).tanh()
    losses = heads(F.linear(h + 0, p.v).tanh())
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _of(losses, engine, p)
    assert all(q.grad is None for q in p.all)


@pytest.mark.parametrize("engine", ["full", "gramian", "auto"])
def test_a_reentrant_checkpoint(engine, monkeypatch):
    """Which autograd takes no inputs for: its own words, and no `.grad` written."""
    monkeypatch.setattr(cost, "prefers_full", lambda *_: False)
    p = Parameters(F64, {"w": (6, 4), "v": (5, 6)})
    h = F.linear(x(7, 4), p.w)
    losses = heads(checkpoint(lambda h: F.linear(h.tanh(), p.v).tanh(), h, use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        _of(losses, engine, p)
    # Around all of the shared parameters, which the graph then does not show.
    inputs = x(7, 4).requires_grad_()
    losses = heads(checkpoint(lambda h: F.linear(F.linear(h, p.w).tanh(), p.v), inputs, use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        _of(losses, engine, p)
    assert all(q.grad is None for q in p.all)


@pytest.mark.parametrize("engine", ["full", "gramian", "auto"])
def test_a_sparse_gradient_of_one_loss_alone(engine, monkeypatch):
    monkeypatch.setattr(cost, "prefers_full", lambda *_: False)
    monkeypatch.setattr(cost, "goes_at_once", lambda *_: False)
    p = Parameters(F64, {"w": (6, 4), "v": (5, 6)})
    losses = [F.linear(p.v, p.w.t()).sum(), F.embedding(torch.tensor([0, 1, 1]), p.w, sparse=True).square().sum()]
    with pytest.raises(TypeError, match="dense"):
        fastmtl.AlignedMTL().backward(losses, [p.w], engine=engine)
    losses = [p.w.sum(), F.embedding(torch.tensor([0, 1, 1]), p.v, sparse=True).square().sum()]
    with pytest.raises(TypeError, match="dense"):
        fastmtl.AlignedMTL().backward(losses, p.all, engine=engine)
    assert all(q.grad is None for q in p.all)


# ------------------------------------------------------------------------------------------------ what hooks see


def looked_at(engine, at_once, look):
    """Three layers; `look` gets their tensors and returns what is to be compared."""
    p = Parameters(F64, {"u": (4, 6), "w": (6, 6), "v": (5, 6)})
    wt = p.w.t()
    h = (x(7, 4) @ p.u).tanh()
    y = h @ wt
    z = F.linear(y.tanh(), p.v)
    found = look({"wt": wt, "h": h, "y": y, "z": z})
    fastmtl.Uniform().backward([(z * x(7, 5, seed=t)).sin().sum() for t in range(4)], p.all, engine=engine)
    return found()


def retained(tensors):
    for tensor in tensors.values():
        tensor.retain_grad()
    return lambda: {name: tensor.grad for name, tensor in tensors.items()}


def recorded(tensors):
    """The sum of what hooks have seen: zeros may be among it."""
    seen = {name: [] for name in tensors}
    for name, tensor in tensors.items():
        tensor.register_hook(seen[name].append)
    return lambda: {name: sum(g.clone() for g in each) for name, each in seen.items()}


@pytest.mark.parametrize("look", [retained, recorded])
@pytest.mark.parametrize("at_once", [False, True])
def test_what_hooks_of_activations_see(look, at_once, monkeypatch):
    """Plain tensors of every task, as T backward passes bring them."""
    monkeypatch.setattr(cost, "goes_at_once", lambda *_: at_once)
    monkeypatch.setattr(cost, "is_cheaper_explicit", lambda *_: False)
    expected, found = (looked_at(engine, at_once, look) for engine in ("full", "gramian"))
    for name, g in expected.items():
        assert type(found[name]) is torch.Tensor
        assert relative(found[name], g) <= 1e-12, name


@pytest.mark.parametrize("place", ["in the trunk", "at its end"])
def test_hooks_of_nodes_see_no_batch(place, monkeypatch):
    monkeypatch.setattr(cost, "goes_at_once", lambda *_: True)
    p = Parameters(F64, {"w": (6, 4), "v": (5, 6)})
    h = F.linear(x(7, 4), p.w).tanh()
    y = F.linear(h, p.v).tanh()
    seen = []
    (h if place == "in the trunk" else y).grad_fn.register_hook(lambda _, grads: seen.append(grads[0]))
    _of([(y * x(7, 5, seed=t)).sin().sum() for t in range(4)], "gramian", p)
    assert len(seen) == 4
    assert [g.isfinite().all().item() for g in seen] == [True] * 4


HOOKS = {
    "scales": lambda t: t.register_hook(lambda g: 2 * g),
    "looks": lambda t: t.register_hook(lambda g: print(g.norm())),
    "keeps": lambda t: t.register_hook([].append),
    "raises": lambda t: t.register_hook(lambda _: 1 / 0),
    "writes": lambda t: t.register_hook(lambda g: g.add_(1)),
    "retains": lambda t: t.retain_grad(),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_tensors_are_noticed(kind):
    """Of this tensor, and of no other; what is saved behind it does not run."""
    h = (nn.Parameter(randn(3, 3)) * 2).exp()
    before, after = h.t(), h.t().t().sin()
    edges = [(y.grad_fn, 0) for y in (h, before, after)]
    assert not hooks.seen_by_hooks(edges)
    HOOKS[kind](h)
    assert hooks.seen_by_hooks(edges) == edges[:1]
    assert hooks.seen_by_hooks([*edges, *edges], first=True) == edges[:1]


def test_hooks_of_nodes_are_noticed():
    node = (nn.Parameter(randn(3)) * 2).grad_fn
    for register in (node.register_hook, node.register_prehook):
        assert not hooks.has_hooks(node)
        handle = register(lambda *_: None)
        assert hooks.has_hooks(node)
        handle.remove()
    assert not hooks.has_hooks(node)


def test_no_weight_of_a_common_model_is_taken_for_hooked(monkeypatch):
    """On any thread, and within autocast, where weights are cast and then transposed."""
    monkeypatch.setattr(cost, "is_cheaper_explicit", lambda *_: False)
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
    found = []

    def step(context):
        with context:
            h = trunk(x(7, 4, dtype=F32))
        found.append(fastmtl.AlignedMTL().backward(heads(h.float()), trunk, engine="gramian").explicit)

    step(contextlib.nullcontext())
    step(torch.autocast("cpu", BF16))
    thread = threading.Thread(target=step, args=(contextlib.nullcontext(),))
    thread.start()
    thread.join()
    assert found == [()] * 3


@pytest.mark.parametrize("hooked", [False, True])
def test_all_cotangents_go_at_once_where_nobody_looks(hooked, monkeypatch):
    monkeypatch.setattr(cost, "goes_at_once", lambda *_: True)
    ways = []
    for way in ("_at_once", "_gradients"):
        run = getattr(engine, way)
        monkeypatch.setattr(engine, way, lambda *a, run=run, way=way, **k: (ways.append(way), run(*a, **k))[1])
    p = Parameters(F64, {"w": (6, 4), "v": (5, 6)})
    h = F.linear(x(7, 4), p.w).tanh()
    if hooked:
        h.retain_grad()
    _of(heads(F.linear(h, p.v).tanh()), "gramian", p)
    assert ways == (["_gradients"] * 4 if hooked else ["_at_once"])


# ------------------------------------------------------------------------------------------------ compiled, absent


@pytest.mark.parametrize("engine", ["gramian", "auto"])
@pytest.mark.parametrize("part", ["trunk", "head"])
def test_a_compiled_part(engine, part, monkeypatch):
    monkeypatch.setattr(cost, "prefers_full", lambda *_: False)

    def make():
        torch.manual_seed(2)
        trunk, head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double(), nn.Linear(6, 2).double()
        modules = {"trunk": trunk, "head": head}
        modules[part].compile(backend="aot_eager")
        return trunk, head

    grads = []
    for name in ("full", engine):
        trunk, head = make()
        h = trunk(x(7, 4))
        losses = [head(h).square().sum(), h.exp().sum(), h[:, 0].sin().sum()]
        info = fastmtl.AlignedMTL().backward(losses, trunk, engine=name)
        grads.append([info.gram, *(q.grad for q in (*trunk.parameters(), *head.parameters()))])
    for a, b in zip(*grads, strict=True):
        assert relative(a, b) <= 1e-9


@pytest.mark.parametrize("engine", ["full", "gramian", "auto"])
@pytest.mark.parametrize("absent", ["none", "constant", "not reached", "zero"])
@pytest.mark.parametrize("at_once", [False, True])
def test_an_absent_task_is_a_zero_row(engine, absent, at_once, monkeypatch):
    """The problem is that of the others; the weights stay 1 / T."""
    monkeypatch.setattr(cost, "prefers_full", lambda *_: False)
    monkeypatch.setattr(cost, "goes_at_once", lambda *_: at_once)
    monkeypatch.setattr(cost, "is_cheaper_explicit", lambda *_: False)

    def losses(p):
        own = nn.Parameter(torch.ones(2, dtype=F64))
        three = heads(F.linear(F.linear(x(7, 4), p.w).tanh(), p.v).tanh(), 3)
        other = {"none": None, "constant": torch.zeros(()), "not reached": own.sum(), "zero": 0 * three[0]}
        return [three[0], three[1], other[absent], three[2]]

    p, others = Parameters(F64, {"w": (6, 4), "v": (5, 6)}), Parameters(F64, {"w": (6, 4), "v": (5, 6)})
    info = _of(losses(p), engine, p)
    there = [0, 1, 3]
    expected = fastmtl.AlignedMTL(weights=[1 / 4] * 3).backward([losses(others)[t] for t in there], others.all)
    assert not info.gram[2].any()
    assert not info.gram[:, 2].any()
    assert info.alpha[2] == 0
    assert relative(info.alpha[there], expected.alpha) <= 1e-9
    assert all(relative(q.grad, r.grad) <= 1e-9 for q, r in zip(p.all, others.all, strict=True))


@pytest.mark.parametrize("engine", ["gramian", "auto"])
def test_the_graph_is_freed_where_the_last_task_is_absent(engine, monkeypatch):
    monkeypatch.setattr(cost, "prefers_full", lambda *_: False)
    p = Parameters(F64, {"w": (6, 4), "v": (5, 6)})
    losses = heads(F.linear(F.linear(x(7, 4), p.w).tanh(), p.v).tanh(), 3)
    monkeypatch.setattr(cost, "goes_at_once", lambda *_: False)
    _of([*losses, None], engine, p)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(losses[0], p.all)

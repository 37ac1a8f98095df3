"""`engine="gramian"` on every operation that PyTorch tests, and what its forms declare of autograd's nodes."""

from __future__ import annotations

import functools
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from helpers import F64, randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fastmtl
from fastmtl.gramian import cost, forms, survey, views
from fastmtl.gramian.saved import Saved, attributes
from fastmtl.gramian.survey import Consumer
from fastmtl.graph import edge_of, is_leaf

# ------------------------------------------------------------------------------------------------ declarations

DECLARED = {
    **{key: form.saved for key, form in forms.FORMS.items()},
    **{key: bias.saved for key, bias in forms.BIASES.items()},
    **{key: saved for key, (saved, *_) in forms.ENTRYWISE.items() if key not in forms.BIASES},
    **{(name, 0): saved for name, saved in survey.SPLITS.items()},
    **{(name, 0): kind.saved for name, kind in views.KINDS.items()},
}
NODES = [name for name in dir(torch._C._functions) if name[0] != "_"]


@pytest.mark.parametrize("key", DECLARED, ids=lambda key: f"{key[0]}-{key[1]}")
def test_every_attribute_of_a_node_is_declared(key):
    """What this torch saves is what the form knows: nothing else, or the form would never be used."""
    kind, saved = getattr(torch._C._functions, key[0]), DECLARED[key]
    assert set(attributes(kind)) == saved.read | set(saved.neutral)
    assert not saved.read & set(saved.neutral)


def test_every_node_of_this_torch_goes_through_the_rule():
    """A form, or explicit; what is not known by name has no form, whichever operand."""
    assert len(NODES) > 500
    known = {name for name, _ in DECLARED}
    assert known <= set(NODES)
    for name in NODES:
        node = Node(name)
        for operand in range(4):
            consumer = Consumer(node, operand, False, ())
            if (name, operand) not in forms.FORMS:
                assert forms.use_of(consumer, torch.device("cpu")) is None
            assert forms.is_bias(consumer) <= ((name, operand) in forms.BIASES)
        if name not in known:
            assert views.View((node, 0)).through(node) is None


class Node:
    """Stands for a node of this name that saves these attributes."""

    def __init__(self, name: str, like: Any = None, **saved: Any) -> None:
        self._name, self._like = name, like
        for attribute, value in saved.items():
            setattr(self, f"_saved_{attribute}", value)

    def name(self) -> str:
        return self._name

    def __getattr__(self, name: str) -> Any:
        if self._like is None:
            raise AttributeError(name)
        return getattr(self._like, name)


def _like(node, **saved):
    """A node like this one, but for what it saves."""
    known = {f"_saved_{name}": property(lambda _: None) for name in attributes(type(node)) if name not in saved}
    kind = type("Other", (Node,), {name: property(lambda self, n=name: getattr(self._like, n)) for name in known})
    return type("Again", (kind,), {f"_saved_{k}": v for k, v in saved.items()})(node.name(), node)


def _nodes():
    """A node of each operation with a closed form: name, node, operands."""
    w, b, kernel = nn.Parameter(randn(4, 5)), nn.Parameter(randn(5)), nn.Parameter(randn(3, 2, 3, 3))
    x = randn(6, 4)
    return {
        "mm": ((x @ w).grad_fn, (1,)),
        "mm from the left": ((w @ randn(5, 2)).grad_fn, (0,)),
        "addmm": (torch.addmm(b, x, w).grad_fn, (0, 2)),
        "addmm from the left": (torch.addmm(b[:2], w, randn(5, 2)).grad_fn, (0, 1)),
        "bmm": (torch.bmm(randn(2, 3, 4), nn.Parameter(randn(2, 4, 5))).grad_fn, (1,)),
        "bmm from the left": (torch.bmm(nn.Parameter(randn(2, 3, 4)), randn(2, 4, 5)).grad_fn, (0,)),
        "convolution": (F.conv2d(randn(2, 2, 5, 5), kernel, b[:3]).grad_fn, (1, 2)),
        "embedding bag": (F.embedding_bag(torch.tensor([[0, 2]]), w).grad_fn, (0,)),
        "embedding": (F.embedding(torch.tensor([0, 2]), w).grad_fn, (0,)),
    }


@pytest.mark.parametrize("name", _nodes())
def test_an_attribute_that_nobody_knows_makes_the_use_explicit(name):
    """A torch of the future that saves one more."""

    def recognised(node, operand):
        consumer = Consumer(node, operand, False, ())
        return forms.is_bias(consumer) or forms.use_of(consumer, torch.device("cpu")) is not None

    node, operands = _nodes()[name]
    for operand in operands:
        assert recognised(node, operand)
        assert recognised(_like(node), operand)
        assert not recognised(_like(node, new=1), operand)
        saved = DECLARED[node.name(), operand]
        for attribute, neutral in saved.neutral.items():
            assert recognised(_like(node, **{attribute: neutral}), operand)
            assert not recognised(_like(node, **{attribute: 1 if neutral is False else 2}), operand)


def way_of(x):
    """How a parameter comes to be `x`; None where an operation does more than hand it on."""
    nodes = [x.grad_fn]
    while not is_leaf(behind := nodes[-1].next_functions[0][0]):
        nodes.append(behind)
    view = views.View((behind, 0))
    for node in reversed(nodes):
        view = None if view is None else view.through(node)
    return view


def test_what_passes_a_parameter_on_is_declared_too():
    p, q = nn.Parameter(randn(4, 4)), nn.Parameter(randn(2, 3, 4))
    for x, flipped in (
        (p.t(), True),
        (p.T, True),
        (p.mT, True),
        (p.permute(1, 0), True),
        (p.transpose(-2, 1), True),
        (p.transpose(0, 1).contiguous(), True),
        (p.t().t(), False),
        (p.transpose(0, 0), False),
        (p.transpose(-1, 1), False),
        (p.double(), False),
        (p.view(2, 8), False),
        (q.mT, True),
        (q.mT[None], True),
        (q.permute(-3, -1, -2), True),
        (q.flatten(1), False),
        (q.transpose(0, 1), None),  # in an order of its own
        (p.t().reshape(2, 8), None),
    ):
        view = way_of(x)
        if flipped is None:
            assert view.order()[1] is not None
        else:
            assert view.order() == (flipped, None)
        # And back: a gradient of what is read, in the parameter's order.
        g = randn(*x.shape).to(x.dtype)
        (expected,) = torch.autograd.grad(x, p if x.shape.numel() == 16 else q, g, retain_graph=True)
        for node in view.nodes:
            g = node(g)
        torch.testing.assert_close(g, expected)
    for x in (p.tanh(), p[0], p.t()[:2], p.expand(2, 4, 4)):
        assert way_of(x) is None
    assert views.View(edge_of(p)).through(_like(p.t().grad_fn, new=0)) is None
    split = p.split(2)[0].grad_fn
    assert survey.SPLITS[split.name()].covers(split)
    assert not survey.SPLITS[split.name()].covers(_like(split, new=0))


def test_neutral_values_are_compared():
    assert Saved("self", alpha=1).covers(Node("any", _saved_self=0)) is True
    node = torch.addmm(randn(3), randn(2, 4), nn.Parameter(randn(4, 3)), alpha=2).grad_fn
    assert not forms.FORMS["AddmmBackward0", 2].saved.covers(node)
    assert forms.FORMS["AddmmBackward0", 2].saved.read >= {"beta", "mat1"}


# ------------------------------------------------------------------------------------------------ PyTorch's own samples

TASKS = 3
WEIGHTS = [0.2, -1.0, 0.7]
LARGEST = 20_000  # entries of a sample's parameters
# Those with a closed form, their relatives, what makes complex, sparse or oddly laid out activations, some others.
CLOSE = """
mm matmul addmm addmm.decomposed addbmm addmv addr baddbmm bmm mv inner outer einsum tensordot __rmatmul__
linalg.multi_dot linalg.matrix_power F.linear F.bilinear F.embedding F.embedding_bag F.conv1d F.conv2d
F.conv3d F.conv_transpose1d F.conv_transpose2d F.layer_norm F.group_norm F.batch_norm F.rms_norm
F.scaled_dot_product_attention F.prelu F.pad F.unfold F.fold split split_with_sizes chunk t transpose permute
unsafe_split tensor_split unbind to float cdouble complex view_as_complex view_as_real real imag polar fft.fft
fft.rfft stft linalg.eigvals gather index_select index_put scatter as_strided expand unfold diagonal flip roll
cat stack where cumprod logsumexp sparse.mm to_sparse linalg.qr linalg.svd linalg.solve cholesky_solve norm
var_mean max topk
""".replace("F.", "nn.functional.").split()


@functools.cache
def operations() -> list[Any]:
    """PyTorch's descriptions of its operations, with sample inputs for each."""
    # Their module wants a package for writing expectations, of which nothing here makes use.
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # type: ignore[arg-type]
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if op.supports_autograd and F64 in op.supported_dtypes("cpu")]


class Case(NamedTuple):
    """Losses behind an operation.

    Attributes:
        name: operation, number of the sample, place of the parameters.
        losses: a forward pass.
        parameters: all parameters of it.
    """

    name: str
    losses: Callable[[], list[Tensor]]
    parameters: list[nn.Parameter]


def _parameter(x: Tensor, place: str) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    """A parameter from which `x` is made: itself, or the right factor of a product."""
    if place != "behind a product":
        p = nn.Parameter(x.detach().clone())
        return p, lambda: p
    left = randn(1, 2, dtype=x.dtype if not x.is_complex() else F64, seed=3).to(x.dtype)
    p = nn.Parameter((torch.linalg.pinv(left) @ x.detach().reshape(1, -1)).contiguous())
    return p, lambda: (left @ p).reshape(x.shape)


def _real(y: Any) -> list[Tensor]:
    """The tensors of a result that have a gradient, as real ones."""
    found = []
    for x in pytree.tree_leaves(y):
        if isinstance(x, Tensor) and x.requires_grad:
            x = x if x.layout is torch.strided else x.to_dense()
            found += [x.real, x.imag] if x.is_complex() else [x]
    return found


def _linear(y: Any, head: nn.Parameter | None) -> list[Tensor]:
    """T random linear losses of a result, or of its product with a parameter."""
    losses = []
    for t in range(TASKS):
        terms = []
        for k, x in enumerate(_real(y)):
            if head is not None and x.dim() >= 2:
                x = F.linear(x, head[:, : x.shape[-1]].to(x.dtype)).tanh()
            terms.append((x * randn(*x.shape, dtype=x.dtype, seed=100 * t + k)).sum())
        losses.append(sum(terms[1:], terms[0]) if terms else torch.zeros(()))
    return losses


def cases(op: Any, samples: int) -> Iterator[Case]:
    """Losses behind an operation, for its first samples: on parameters, behind a product with one, before one."""
    for number, sample in enumerate(op.sample_inputs("cpu", F64, requires_grad=True)):
        if number == samples:
            return
        leaves, tree = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        own = [k for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if not own or sum(leaves[k].numel() for k in own) > LARGEST:
            continue
        for place in ("as parameters", "behind a product", "before a product"):
            plain = all(leaves[k].numel() and leaves[k].layout is torch.strided for k in own)
            if place == "behind a product" and not plain:
                continue
            made = {k: _parameter(leaves[k], place) for k in own}
            head = nn.Parameter(randn(3, 64, dtype=F64, seed=4)) if place == "before a product" else None

            def losses(made=made, leaves=leaves, tree=tree, sample=sample, head=head) -> list[Tensor]:
                inputs = [made[k][1]() if k in made else x for k, x in enumerate(leaves)]
                first, args, kwargs = pytree.tree_unflatten(inputs, tree)
                torch.manual_seed(11)
                y = op(first, *args, **kwargs)
                return _linear(sample.output_process_fn_grad(y), head)

            parameters = [p for p, _ in made.values()]
            yield Case(f"{op.full_name}[{number}] {place}", losses, parameters if head is None else [*parameters, head])


def _rows(case: Case) -> Tensor:
    """G [T, P] by plain autograd."""
    rows = []
    for loss in case.losses():
        grads = torch.autograd.grad(loss, case.parameters, retain_graph=True, allow_unused=True)
        each = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, case.parameters, strict=True)]
        rows.append(torch.cat([g.to_dense().reshape(-1).to(F64) for g in each]))
    return torch.stack(rows)


def _step(case: Case, engine: str) -> tuple[Tensor, Tensor]:
    """M and what lies in `.grad`."""
    for p in case.parameters:
        p.grad = None
    info = fastmtl.Uniform(weights=WEIGHTS).backward(case.losses(), case.parameters, engine=engine)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in case.parameters]
    return info.gram, torch.cat([g.reshape(-1).to(F64) for g in grads])


def _fault(case: Case, monkeypatch: Any) -> str | None:
    """What is wrong with the gramian engine on this case; "none" where the full engine does not run either."""
    try:
        G = _rows(case)
        _step(case, "full")
    except Exception:
        return "none"
    if not G.isfinite().all():
        return "none"
    M, w = G @ G.T, torch.tensor(WEIGHTS, dtype=F64)
    limit = 1e-9 if all(p.dtype in (F64, torch.complex128) for p in case.parameters) else 1e-5
    norms = M.diagonal().sqrt()
    for engine, at_once in (("gramian", False), ("gramian", True), ("auto", True)):
        monkeypatch.setattr(cost, "goes_at_once", lambda *_, at_once=at_once: at_once)
        try:
            gram, g = _step(case, engine)
        except (NotImplementedError, ValueError) as error:
            if engine == "gramian" and str(error).startswith("engine:"):
                continue
            return f"{engine}, at once: {at_once}: {error!r}"
        except Exception as error:
            return f"{engine}, at once: {at_once}: {error!r}"
        if ((gram - M).abs() > limit * norms[:, None] * norms).any():
            return f"{engine}, at once: {at_once}: Gram off by {(gram - M).abs().max():.1e} of {M.abs().max():.1e}"
        if (g - w @ G).norm() > limit * (w.abs() @ G.abs()).norm():
            return f"{engine}, at once: {at_once}: gradient off by {(g - w @ G).norm():.1e} of {(w @ G).norm():.1e}"
    return None


def _sweep(names: set[str] | None, samples: int, part: slice, monkeypatch: Any) -> int:
    """Runs all cases of these operations, with closed forms wherever there are some; how many there were."""
    monkeypatch.setattr(cost, "is_cheaper_explicit", lambda *_: False)
    monkeypatch.setattr(cost, "prefers_full", lambda *_: False)
    faults, done = [], 0
    for op in [op for op in operations() if names is None or op.full_name in names][part]:
        for case in cases(op, samples):
            fault = _fault(case, monkeypatch)
            done += fault != "none"
            if fault not in (None, "none"):
                faults.append(f"{case.name}: {fault}")
    assert not faults, "\n".join(faults)
    return done


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_operations(part, monkeypatch):
    """A parameter passes through the operation, T random linear losses follow: as T passes of plain autograd."""
    known = {op.full_name for op in operations()}
    assert len(known & set(CLOSE)) >= 70
    assert _sweep(set(CLOSE), 1, slice(part, None, 4), monkeypatch) >= 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(16))
def test_all_operations(part, monkeypatch):
    assert _sweep(None, 12, slice(part, None, 16), monkeypatch) >= 300

"""Wrong arguments: a ValueError or TypeError that names argument, expectation and what came; `.grad` as it was."""

import re

import pytest
import torch
from helpers import F16, F64, Fail, randn
from torch import nn

import fastmtl

M = fastmtl.AlignedMTL
G = randn(3, 10)


def rows(*shapes):
    return [[randn(*shape) for shape in shapes] for _ in range(3)]


def replaced(t, k, value, *shapes):
    result = rows(*(shapes or ((4,), (2, 3))))
    result[t][k] = value
    return result


def sparse(*shape):
    return torch.eye(*shape).to_sparse()


# name: (call, error, what the message must contain, in this order)
CALLS = {
    "G of one dimension": (lambda: M()(torch.ones(3)), ValueError, ("G", "[T, P]", "[3]")),
    "G of four dimensions": (lambda: M()(torch.ones(1, 2, 3, 4)), ValueError, ("G", "[T, P]", "[1, 2, 3, 4]")),
    "G a scalar": (lambda: M()(torch.ones(())), ValueError, ("G", "[T, P]", "[]")),
    "no task": (lambda: M()(torch.ones(0, 5)), ValueError, ("G", "task", "[0, 5]")),
    "no task in a batch": (lambda: M()(torch.ones(2, 0, 5)), ValueError, ("G", "task", "[2, 0, 5]")),
    "integer G": (lambda: M()(torch.ones(3, 5, dtype=torch.int64)), TypeError, ("G", "float32", "int64", "[3, 5]")),
    "complex G": (lambda: M()(torch.ones(3, 5, dtype=torch.complex64)), TypeError, ("G", "float32", "complex64")),
    "bool G": (lambda: M()(torch.ones(3, 5) > 0), TypeError, ("G", "float32", "bool")),
    "float8 G": (lambda: M()(torch.ones(3, 5).to(torch.float8_e5m2)), TypeError, ("G", "float32", "float8")),
    "M sparse": (lambda: M().weighting(sparse(3)), TypeError, ("M", "dense", "sparse")),
    "outs overlap": (lambda: (lambda o: M()([[o + 1, o + 1]], out=[o, o]))(torch.empty(4)), ValueError, ("out[1]",)),
    "grad_scale a word": (lambda: M()(G, grad_scale="x"), TypeError, ("grad_scale", "number", "str")),
    "sparse G": (lambda: M()(sparse(3)), TypeError, ("G", "dense", "sparse")),
    "G requires grad": (lambda: M()(randn(3, 5).requires_grad_()), ValueError, ("G", "requires_grad")),
    "G is None": (lambda: M()(None), TypeError, ("rows", "sequence", "NoneType")),
    "G is a number": (lambda: M()(3.0), TypeError, ("rows", "sequence", "float")),
    "weights too short": (lambda: M(weights=[1.0, 2.0])(G), ValueError, ("weights", "length 3", "2")),
    "weights too long": (lambda: M(weights=torch.ones(4))(G), ValueError, ("weights", "length 3", "4")),
    "weights too long for rows": (
        lambda: M(weights=torch.ones(4))(rows((2,))),
        ValueError,
        ("weights", "length 3", "4"),
    ),
    "weights too long for a Gram": (
        lambda: M(weights=torch.ones(4)).weighting(G @ G.T),
        ValueError,
        ("weights", "length 3", "4"),
    ),
    "weights non-finite": (lambda: M(weights=[1.0, float("nan"), 2.0]), ValueError, ("weights", "finite", "nan")),
    "weights infinite": (
        lambda: M(weights=torch.tensor([1.0, float("inf")])),
        ValueError,
        ("weights", "finite", "inf"),
    ),
    "weights of two dimensions": (lambda: M(weights=torch.ones(2, 2)), ValueError, ("weights", "[T]", "[2, 2]")),
    "weights a scalar": (lambda: M(weights=torch.tensor(1.0)), ValueError, ("weights", "[T]", "[]")),
    "weights empty": (lambda: M(weights=[]), ValueError, ("weights", "[T]", "[0]")),
    "weights unknown": (lambda: M(weights="median"), ValueError, ("weights", "mean", "'median'")),
    "weights a number": (lambda: M(weights=1.0), TypeError, ("weights", "mean", "float")),
    "weights of strings": (lambda: M(weights=["a", "b"]), (TypeError, ValueError), ("weights",)),
    "unknown scale": (lambda: M(scale="max"), ValueError, ("scale", "min", "median", "rmse", "'max'")),
    "scale a number": (lambda: M(scale=1), ValueError, ("scale", "min", "1")),
    "unknown rank rule": (lambda: M(rank_rule="rank"), ValueError, ("rank_rule", "normalized", "gram", "'rank'")),
    "negative rtol": (lambda: M(rtol=-1e-3), ValueError, ("rtol", ">= 0", "-0.001")),
    "rtol NaN": (lambda: M(rtol=float("nan")), ValueError, ("rtol", "finite", "nan")),
    "rtol infinite": (lambda: M(rtol=float("inf")), ValueError, ("rtol", "finite", "inf")),
    "rtol of another kind": (lambda: M(rtol="small"), (TypeError, ValueError), ("rtol",)),
    "no rows": (lambda: M()([]), ValueError, ("rows", "T >= 1", "empty")),
    "rows all missing": (lambda: M()([None, None]), ValueError, ("rows", "at least one", "None")),
    "rows of nothing": (lambda: M()([[None], [None]]), ValueError, ("rows", "at least one", "none")),
    "rows of no tensors": (lambda: M()([[], []]), ValueError, ("rows", "at least one", "0")),
    "rows a dict": (lambda: M()({"a": G}), TypeError, ("rows", "sequence", "dict")),
    "a row of another kind": (lambda: M()([randn(3), 1.0]), TypeError, ("rows[1]", "tensor", "float")),
    "rows of different length": (
        lambda: M()([[randn(3)], [randn(3), randn(2)]]),
        ValueError,
        ("rows[1]", "1 tensors", "2"),
    ),
    "rows of different shape": (
        lambda: M()(replaced(2, 1, randn(3, 2))),
        ValueError,
        ("rows[2][1]", "[2, 3]", "[3, 2]"),
    ),
    "rows of different size": (lambda: M()([randn(3), randn(4)]), ValueError, ("rows[1][0]", "[3]", "[4]")),
    "dtypes differ between tasks": (
        lambda: M()(replaced(1, 0, randn(4, dtype=F64))),
        ValueError,
        ("rows[1][0]", "float32", "float64"),
    ),
    "half against float": (
        lambda: M()([randn(3), randn(3, dtype=F16)]),
        ValueError,
        ("rows[1][0]", "float32", "float16"),
    ),
    "devices differ between tasks": (
        lambda: M()(replaced(1, 0, torch.empty(4, device="meta"))),
        ValueError,
        ("rows[1][0]", "cpu", "meta"),
    ),
    "devices differ between parameters": (
        lambda: M()([[randn(3), torch.empty(2, device="meta")]] * 2),
        ValueError,
        ("[1]", "cpu", "meta"),
    ),
    "integer gradient": (
        lambda: M()([[randn(3), torch.ones(2, dtype=torch.int32)]] * 2),
        TypeError,
        ("[1]", "float32", "int32"),
    ),
    "sparse gradient": (lambda: M()([[sparse(3)]] * 2), TypeError, ("[0]", "dense", "sparse")),
    "sparse gradient of one task": (
        lambda: M()(replaced(1, 0, sparse(3), (3, 3))),
        (TypeError, ValueError),
        ("rows", "dense", "sparse"),
    ),
    "gradient requires grad": (
        lambda: M()(replaced(1, 0, randn(4).requires_grad_())),
        ValueError,
        ("rows", "requires_grad"),
    ),
    "gradient of another kind": (lambda: M()([[1.0], [2.0]]), TypeError, ("rows", "tensor", "float")),
    "one gradient of another kind": (
        lambda: M()([[randn(2)], [2.0]]),
        (TypeError, ValueError),
        ("rows", "[0]", "tensor", "float"),
    ),
    "out of another shape": (lambda: M()(G, out=torch.empty(9)), ValueError, ("out", "[10]", "[9]")),
    "out of another rank": (lambda: M()(G[None], out=torch.empty(10)), ValueError, ("out", "[1, 10]", "[10]")),
    "out of another dtype": (lambda: M()(G, out=torch.empty(10, dtype=F64)), ValueError, ("out", "float32", "float64")),
    "out on another device": (lambda: M()(G, out=torch.empty(10, device="meta")), ValueError, ("out", "cpu", "meta")),
    "out is no tensor": (lambda: M()(G, out=[0.0] * 10), TypeError, ("out", "tensor", "list")),
    "out requires grad": (
        lambda: M()(G, out=torch.empty(10, requires_grad=True)),
        ValueError,
        ("out", "requires_grad"),
    ),
    "out with repeated elements": (lambda: M()(G, out=torch.empty(1).expand(10)), ValueError, ("out", "repeated")),
    "out is a row of G": (lambda: M()(G, out=G[0]), ValueError, ("out", "overlap")),
    "out is part of G": (lambda: M()(G[:, 1:], out=G.view(-1)[5:14]), ValueError, ("out", "overlap")),
    "out is a row of G by another storage": (
        lambda: M()(G, out=torch.from_numpy(G.numpy()[1])),
        ValueError,
        ("out", "overlap"),
    ),
    "out within a batch": (lambda: M()(G.expand(2, 3, 10), out=G[:2]), ValueError, ("out", "overlap")),
    "out of rows is one tensor": (
        lambda: M()(rows((4,)), out=torch.empty(4)),
        (TypeError, ValueError),
        ("out", "1 tensors", "tensor"),
    ),
    "out of rows too short": (
        lambda: M()(rows((4,), (2,)), out=[torch.empty(4)]),
        ValueError,
        ("out", "2 tensors", "1"),
    ),
    "out of rows of another shape": (
        lambda: M()(rows((4,), (2,)), out=[torch.empty(4), torch.empty(3)]),
        ValueError,
        ("out[1]", "[2]", "[3]"),
    ),
    "out of rows missing": (lambda: M()(rows((4,)), out=[None]), TypeError, ("out[0]", "tensor", "NoneType")),
    "out of rows overlaps": (
        lambda: (lambda r: M()(r, out=[torch.empty(4), r[2][1]]))(rows((4,), (2,))),
        ValueError,
        ("out[1]", "overlap"),
    ),
    "M of one dimension": (lambda: M().weighting(torch.ones(3)), ValueError, ("M", "[T, T]", "[3]")),
    "M not square": (lambda: M().weighting(torch.ones(3, 4)), ValueError, ("M", "[T, T]", "[3, 4]")),
    "M empty": (lambda: M().weighting(torch.ones(0, 0)), ValueError, ("M", "[T, T]", "[0, 0]")),
    "M half": (lambda: M().weighting(torch.ones(3, 3, dtype=F16)), TypeError, ("M", "float64", "float16")),
    "M no tensor": (lambda: M().weighting([[1.0]]), TypeError, ("M", "tensor", "list")),
    "dtype unknown": (lambda: M().weighting(G @ G.T, dtype=torch.int64), TypeError, ("dtype", "float32", "int64")),
    "eigh not square": (lambda: fastmtl.eigh(torch.ones(2, 3, 4)), ValueError, ("M", "[..., T, T]", "[2, 3, 4]")),
    "eigh of a vector": (lambda: fastmtl.eigh(torch.ones(3)), ValueError, ("M", "[..., T, T]", "[3]")),
    "eigh of integers": (
        lambda: fastmtl.eigh(torch.ones(3, 3, dtype=torch.int64)),
        TypeError,
        ("M", "float64", "int64"),
    ),
    "eigh requires grad": (lambda: fastmtl.eigh(torch.eye(3).requires_grad_()), ValueError, ("M", "requires_grad")),
}


def check_message(error, parts):
    message, at = str(error), 0
    for part in parts:
        found = message.find(part, at)
        assert found >= 0, f"{part!r} not found (in this order) in: {message}"
        at = found + 1


@pytest.mark.parametrize("name", CALLS)
def test_call(name):
    call, kind, parts = CALLS[name]
    with pytest.raises(kind) as caught:
        call()
    check_message(caught.value, parts)


def test_an_error_leaves_out_alone():
    out = torch.full((10,), 7.0)
    for call in (
        lambda: M(weights=[1.0, 2.0])(G, out=out),
        lambda: M()(G.to(F64), out=out),
        lambda: M()([[G[0]], [G[1, :9]]], out=[out]),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
        assert (out == 7.0).all()


# ------------------------------------------------------------------------------------------------ backward


@pytest.fixture
def parts():
    """A trunk, two heads, their losses, everything with a gradient already there (one parameter without)."""
    torch.manual_seed(3)
    trunk, heads = nn.Linear(4, 4), [nn.Linear(4, 1) for _ in range(2)]
    table = nn.Embedding(5, 4, sparse=True)
    h = trunk(randn(6, 4)).tanh()
    losses = [head(h).square().mean() for head in heads]
    parameters = [*trunk.parameters(), *heads[0].parameters(), *heads[1].parameters()]
    for i, p in enumerate(parameters[1:]):
        p.grad = torch.full_like(p, float(i))
    return trunk, heads, losses, parameters, h, table


# name: (arguments from the parts, error, parts of the message)
BACKWARD = {
    "no loss": (
        lambda trunk, heads, losses, h, table: ([], trunk.parameters()),
        ValueError,
        ("losses", "T >= 1", "empty"),
    ),
    "losses a matrix": (
        lambda trunk, heads, losses, h, table: (torch.stack(losses)[None], trunk.parameters()),
        ValueError,
        ("losses", "shape [T]", "tensor of shape [1, 2]"),
    ),
    "a name that is no string": (
        lambda trunk, heads, losses, h, table: (dict(enumerate(losses)), trunk.parameters()),
        TypeError,
        ("losses", "names of tasks", "int"),
    ),
    "losses of a dict": (
        lambda trunk, heads, losses, h, table: (dict(enumerate(losses)).values(), trunk),
        TypeError,
        ("losses", "sequence", "dict_values", "pass the dict itself"),
    ),
    "losses a generator": (
        lambda trunk, heads, losses, h, table: ((x for x in losses), trunk.parameters()),
        TypeError,
        ("losses", "sequence", "generator"),
    ),
    "a loss that is a number": (
        lambda trunk, heads, losses, h, table: ([losses[0], 1.0], trunk.parameters()),
        TypeError,
        ("losses[1]", "tensor", "float"),
    ),
    "losses that are all None": (
        lambda trunk, heads, losses, h, table: ([None, None], trunk.parameters()),
        ValueError,
        ("losses", "at least one", "none among 2"),
    ),
    "an integer loss": (
        lambda trunk, heads, losses, h, table: ([losses[0], torch.tensor(1)], trunk.parameters()),
        TypeError,
        ("losses[1]", "floating", "int64"),
    ),
    "a loss that is no scalar": (
        lambda trunk, heads, losses, h, table: ([losses[0], h], trunk.parameters()),
        ValueError,
        ("losses[1]", "scalar", "[6, 4]"),
    ),
    "an empty loss": (
        lambda trunk, heads, losses, h, table: ([h[:0], losses[1]], trunk.parameters()),
        ValueError,
        ("losses[0]", "scalar", "[0, 4]"),
    ),
    "losses without a graph": (
        lambda trunk, heads, losses, h, table: ([None, losses[1].detach()], trunk.parameters()),
        ValueError,
        ("losses", "requires grad", "none among 2"),
    ),
    "no shared parameter": (
        lambda trunk, heads, losses, h, table: (losses, []),
        ValueError,
        ("shared", "at least one", "none"),
    ),
    "shared an exhausted generator": (
        lambda trunk, heads, losses, h, table: (losses, (p for p in [])),
        ValueError,
        ("shared", "at least one", "none"),
    ),
    "shared a tensor": (
        lambda trunk, heads, losses, h, table: (losses, trunk.weight),
        TypeError,
        ("shared", "iterable", "tensor of shape [4, 4]"),
    ),
    "shared None": (
        lambda trunk, heads, losses, h, table: (losses[:1], None),
        ValueError,
        ("shared", "two losses", "none"),
    ),
    "named parameters": (
        lambda trunk, heads, losses, h, table: (losses, trunk.named_parameters()),
        TypeError,
        ("shared[0]", "tensor", "tuple", "parameters()"),
    ),
    "a shared intermediate": (
        lambda trunk, heads, losses, h, table: (losses, [trunk.weight, h]),
        ValueError,
        ("shared[1]", "leaf", "[6, 4]"),
    ),
    "only frozen shared parameters": (
        lambda trunk, heads, losses, h, table: (losses, [torch.ones(3), torch.ones(2)]),
        ValueError,
        ("shared", "requires grad", "2 frozen"),
    ),
    "a frozen module": (
        lambda trunk, heads, losses, h, table: (losses, nn.Linear(2, 2).requires_grad_(False)),
        ValueError,
        ("shared", "requires grad", "2 frozen"),
    ),
    "a shared parameter no loss reaches": (
        lambda trunk, heads, losses, h, table: (losses, table.parameters()),
        ValueError,
        ("shared", "no loss reaches"),
    ),
    "sparse gradients": (
        lambda trunk, heads, losses, h, table: (
            [losses[0] + table(torch.tensor([1])).sum(), losses[1]],
            table.parameters(),
        ),
        TypeError,
        ("dense", "sparse"),
    ),
    "an unsupported parameter dtype": (
        lambda trunk, heads, losses, h, table: (
            losses,
            [trunk.weight, torch.ones(2, dtype=torch.complex64, requires_grad=True)],
        ),
        TypeError,
        ("shared[1]", "float32", "complex64"),
    ),
}


def snapshot(parameters):
    return [
        (p.grad, None if p.grad is None else p.grad.clone(), -1 if p.grad is None else p.grad._version)
        for p in parameters
    ]


def check_unchanged(parameters, before):
    for p, (grad, value, version) in zip(parameters, before, strict=True):
        assert p.grad is grad
        if grad is not None:
            assert torch.equal(grad, value)
            assert grad._version == version


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name, parts):
    arguments, kind, message = BACKWARD[name]
    trunk, heads, losses, parameters, h, table = parts
    before = snapshot(parameters)
    fired = []
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    with pytest.raises(kind) as caught:
        M().backward(*arguments(trunk, heads, losses, h, table))
    check_message(caught.value, message)
    check_unchanged(parameters, before)
    assert table.weight.grad is None
    assert not fired


def test_backward_with_weights_of_the_wrong_length(parts):
    trunk, _, losses, parameters, _, _ = parts
    before = snapshot(parameters)
    with pytest.raises(ValueError, match=re.escape("weights: expected length 2")):
        M(weights=[1.0, 2.0, 3.0]).backward(losses, trunk.parameters())
    check_unchanged(parameters, before)


def test_a_pass_that_fails_midway(parts):
    trunk, heads, losses, parameters, h, _ = parts
    before = snapshot(parameters)
    with pytest.raises(ArithmeticError, match="cannot be differentiated"):
        M().backward([losses[0], Fail.apply(heads[1](h).mean())], trunk.parameters())
    check_unchanged(parameters, before)


def test_an_aggregation_that_fails(parts, monkeypatch):
    trunk, _, losses, parameters, _, _ = parts
    before = snapshot(parameters)

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(fastmtl.ops, "align_rows", fail)
    with pytest.raises(MemoryError):
        M().backward(losses, trunk.parameters())
    check_unchanged(parameters, before)


def test_argument_errors_leave_the_graph_usable(parts):
    """What is wrong with the arguments is said before the passes free the graph: the call can be repeated."""
    trunk, _, losses, parameters, _, _ = parts
    for p in parameters:
        p.grad = None
    for method, arguments in ((M(), (losses, [])), (M(weights=[1.0, 2.0, 3.0]), (losses, trunk.parameters()))):
        with pytest.raises(ValueError, match=r"shared|weights"):
            method.backward(*arguments)
    M().backward(losses, trunk.parameters())
    assert all(p.grad is not None for p in parameters)


# name: (options from the parts, error, parts of the message)
OPTIONS = {
    "shared and representation": (
        lambda trunk, heads, h, table: {"shared": trunk.parameters(), "representation": h},
        ValueError,
        ("shared", "None", "representation", "generator"),
    ),
    "shared and groups": (
        lambda trunk, heads, h, table: {"shared": trunk.parameters(), "groups": [trunk.parameters()]},
        ValueError,
        ("shared", "None", "groups"),
    ),
    "features and representation": (
        lambda trunk, heads, h, table: {"features": h, "representation": h},
        ValueError,
        ("features", "None", "representation", "[6, 4]"),
    ),
    "groups and representation": (
        lambda trunk, heads, h, table: {"groups": [trunk.parameters()], "representation": h},
        ValueError,
        ("groups", "None", "representation", "list"),
    ),
    "representation without a graph": (
        lambda trunk, heads, h, table: {"representation": h.detach()},
        ValueError,
        ("representation", "requires grad", "[6, 4]"),
    ),
    "representation a list without a graph": (
        lambda trunk, heads, h, table: {"representation": [h.detach(), None]},
        ValueError,
        ("representation", "requires grad", "list"),
    ),
    "representation a number": (
        lambda trunk, heads, h, table: {"representation": 1.0},
        ValueError,
        ("representation", "tensor", "float"),
    ),
    "representation complex": (
        lambda trunk, heads, h, table: {"representation": h.to(torch.complex64)},
        TypeError,
        ("representation", "float32", "complex64"),
    ),
    "representation that no loss reaches": (
        lambda trunk, heads, h, table: {"representation": trunk(torch.ones(4))},
        ValueError,
        ("representation", "no loss reaches"),
    ),
    "features without a graph": (
        lambda trunk, heads, h, table: {"features": {"h": h.detach()}},
        ValueError,
        ("features", "requires grad", "dict"),
    ),
    "features complex": (
        lambda trunk, heads, h, table: {"features": h.to(torch.complex64)},
        TypeError,
        ("features", "float32", "complex64"),
    ),
    "features that no loss reaches": (
        lambda trunk, heads, h, table: {"features": table(torch.tensor([1])).tanh(), "shared": table.parameters()},
        ValueError,
        ("shared", "no loss reaches"),
    ),
    "batched without features": (
        lambda trunk, heads, h, table: {"shared": trunk.parameters(), "batched": True},
        ValueError,
        ("batched", "False without features", "True"),
    ),
    "batched with a representation": (
        lambda trunk, heads, h, table: {"representation": h, "batched": True},
        ValueError,
        ("batched", "False without features", "True"),
    ),
    "batched with a part of what lies behind": (
        lambda trunk, heads, h, table: {"shared": [trunk.weight], "features": h, "batched": True},
        ValueError,
        ("batched", "shared parameters", "behind the features"),
    ),
    "batched with more than lies behind": (
        lambda trunk, heads, h, table: {
            "shared": [*trunk.parameters(), heads[0].weight],
            "features": h,
            "batched": True,
        },
        ValueError,
        ("batched", "shared parameters", "behind the features"),
    ),
    "no group": (lambda trunk, heads, h, table: {"groups": []}, ValueError, ("groups", "at least one group", "none")),
    "an empty group": (
        lambda trunk, heads, h, table: {"groups": [trunk.parameters(), []]},
        ValueError,
        ("groups[1]", "at least one", "none"),
    ),
    "groups a tensor": (
        lambda trunk, heads, h, table: {"groups": trunk.weight},
        TypeError,
        ("groups", "sequence", "tensor of shape [4, 4]"),
    ),
    "groups a generator": (
        lambda trunk, heads, h, table: {"groups": (layer.parameters() for layer in [trunk])},
        TypeError,
        ("groups", "sequence", "generator"),
    ),
    "groups of tensors": (
        lambda trunk, heads, h, table: {"groups": list(trunk.parameters())},
        TypeError,
        ("groups[0]", "iterable", "tensor of shape [4, 4]"),
    ),
    "a parameter in two groups": (
        lambda trunk, heads, h, table: {"groups": [[trunk.weight], [trunk.bias], [trunk.bias]]},
        ValueError,
        ("groups[2]", "no other group", "groups[1]"),
    ),
    "an intermediate in a group": (
        lambda trunk, heads, h, table: {"groups": [[trunk.weight], [h]]},
        ValueError,
        ("groups[1][0]", "leaf", "[6, 4]"),
    ),
    "a frozen group": (
        lambda trunk, heads, h, table: {"groups": [[trunk.weight], [torch.ones(3)]]},
        ValueError,
        ("groups[1]", "requires grad", "1 frozen"),
    ),
    "groups that no loss reaches": (
        lambda trunk, heads, h, table: {"groups": [table.parameters()]},
        ValueError,
        ("shared", "no loss reaches"),
    ),
    "scale_heads with groups": (
        lambda trunk, heads, h, table: {"groups": [trunk.parameters()], "scale_heads": True},
        ValueError,
        ("scale_heads", "False with groups", "True"),
    ),
    "batched as a number": (
        lambda trunk, heads, h, table: {"features": h, "batched": 3},
        TypeError,
        ("batched", "True or False", "int"),
    ),
    "retain_graph as a word": (
        lambda trunk, heads, h, table: {"shared": trunk, "retain_graph": "no"},
        TypeError,
        ("retain_graph", "True or False", "str"),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_backward_options(name, parts):
    options, kind, message = OPTIONS[name]
    trunk, heads, losses, parameters, h, table = parts
    before = snapshot(parameters)
    with pytest.raises(kind) as caught:
        M().backward(losses, **options(trunk, heads, h, table))
    check_message(caught.value, message)
    check_unchanged(parameters, before)
    assert table.weight.grad is None


WAYS = {
    "shared": lambda trunk, h: {"shared": trunk.parameters()},
    "default": lambda trunk, h: {},
    "representation": lambda trunk, h: {"representation": h},
    "features": lambda trunk, h: {"features": h},
    "groups": lambda trunk, h: {"groups": [[trunk.weight], [trunk.bias]]},
    "groups and features": lambda trunk, h: {"groups": [[trunk.weight], [trunk.bias]], "features": h},
}


@pytest.mark.parametrize("where", ["encoder", "first head", "last head"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_written_where_a_pass_fails(way, where, parts):
    trunk, heads, _, parameters, _, _ = parts
    fails = {"encoder": 0, "first head": 1, "last head": 2}[where]
    steps = [Fail.apply if i == fails else torch.clone for i in range(3)]
    h = steps[0](trunk(randn(6, 4))).tanh()
    losses = [step(head(h)).square().mean() for step, head in zip(steps[1:], heads, strict=True)]
    before = snapshot(parameters)
    fired = []
    for p in parameters:
        p.register_post_accumulate_grad_hook(fired.append)
        p.register_hook(fired.append)
    with pytest.raises(ArithmeticError, match="cannot be differentiated"):
        M().backward(losses, **WAYS[way](trunk, h))
    check_unchanged(parameters, before)
    assert not fired


def test_nothing_is_written_where_a_batched_pass_fails(parts):
    trunk, heads, _, parameters, _, _ = parts
    h = Fail.apply(trunk(randn(6, 4))).tanh()
    before = snapshot(parameters)
    with pytest.raises(ArithmeticError):
        M().backward([head(h).square().mean() for head in heads], features=h, batched=True)
    check_unchanged(parameters, before)


@pytest.mark.parametrize("way", WAYS)
def test_option_errors_leave_the_graph_usable(way, parts):
    trunk, _, losses, parameters, h, _ = parts
    for p in parameters:
        p.grad = None
    with pytest.raises(ValueError, match="weights"):
        M(weights=[1.0, 2.0, 3.0]).backward(losses, **WAYS[way](trunk, h))
    M().backward(losses, **WAYS[way](trunk, h))
    assert all(p.grad is not None for p in parameters)


# ------------------------------------------------------------------------------------------------ fan_out and attach


def leaf(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype, requires_grad=True)


# name: (call, error, parts of the message)
FAN_OUT = {
    "no task": (lambda: fastmtl.fan_out(leaf(3), 0, M()), ValueError, ("tasks", ">= 1", "0")),
    "tasks a float": (lambda: fastmtl.fan_out(leaf(3), 2.0, M()), ValueError, ("tasks", "integer", "2.0")),
    "tasks a list": (lambda: fastmtl.fan_out(leaf(3), [leaf(3)], M()), ValueError, ("tasks", "integer")),
    "a class for a method": (lambda: fastmtl.fan_out(leaf(3), 2, M), TypeError, ("method", "AlignedMTL()", "type")),
    "a name for a method": (
        lambda: fastmtl.fan_out(leaf(3), 2, "aligned"),
        TypeError,
        ("method", "AlignedMTL()", "str"),
    ),
    "an unknown via": (lambda: fastmtl.fan_out(leaf(3), 2, M(), via="graph"), ValueError, ("via", "node", "graph")),
    "h without tensors": (lambda: fastmtl.fan_out([1, None], 2, M()), ValueError, ("h", "tensor", "list")),
    "h a number": (lambda: fastmtl.fan_out(1.0, 2, M()), ValueError, ("h", "tensor", "float")),
    "h complex": (
        lambda: fastmtl.fan_out(leaf(3, dtype=torch.complex64), 2, M()),
        TypeError,
        ("h", "float32", "complex64"),
    ),
    "a part of h complex": (
        lambda: fastmtl.fan_out({"a": [leaf(3), leaf(3, dtype=torch.complex64)]}, 2, M()),
        TypeError,
        ("h", "float32", "complex64"),
    ),
    "h sparse": (
        lambda: fastmtl.fan_out(sparse(3).requires_grad_(), 2, M()),
        TypeError,
        ("h", "dense", "sparse"),
    ),
    "weights of another length": (
        lambda: fastmtl.fan_out(leaf(3), 2, M(weights=[1.0, 2.0, 3.0])),
        ValueError,
        ("weights", "length 2", "3"),
    ),
    "info for other tasks": (
        lambda: fastmtl.fan_out(leaf(3), 2, M(), info=fastmtl.Info(3)),
        ValueError,
        ("info", "Info(2)", "[3]"),
    ),
    "info a dict": (lambda: fastmtl.fan_out(leaf(3), 2, M(), info={}), TypeError, ("info", "Info(2)", "dict")),
    "a global Gram of a method without one": (
        lambda: fastmtl.fan_out(leaf(3), 2, fastmtl.GradDrop(), process_group=True),
        ValueError,
        ("process_group", "Gram", "GradDrop"),
    ),
    "an encoder that is no module": (
        lambda: fastmtl.attach(torch.tanh, [nn.Tanh()], M()),
        TypeError,
        ("encoder", "Module"),
    ),
    "a head that is no module": (
        lambda: fastmtl.attach(nn.Tanh(), [nn.Tanh(), torch.tanh], M()),
        TypeError,
        ("heads[1]", "Module"),
    ),
    "no head": (lambda: fastmtl.attach(nn.Tanh(), [], M()), ValueError, ("heads", "at least one", "none")),
    "a head twice": (
        lambda: fastmtl.attach(nn.Tanh(), [nn.ReLU()] * 2, M()),
        ValueError,
        ("heads", "one module a task", "twice"),
    ),
    "the encoder among the heads": (
        lambda: (lambda m: fastmtl.attach(m, [nn.ReLU(), m], M()))(nn.Tanh()),
        ValueError,
        ("heads", "encoder", "twice"),
    ),
    "attach without a method": (
        lambda: fastmtl.attach(nn.Tanh(), [nn.ReLU()], M),
        TypeError,
        ("method", "AlignedMTL()", "type"),
    ),
    "attach with weights of another length": (
        lambda: fastmtl.attach(nn.Tanh(), [nn.ReLU()], M(weights=[1.0, 2.0])),
        ValueError,
        ("weights", "length 1", "2"),
    ),
    "attach with an unknown via": (
        lambda: fastmtl.attach(nn.Tanh(), [nn.ReLU()], M(), via="graph"),
        ValueError,
        ("via", "node", "graph"),
    ),
    "attach with a wrong scale": (
        lambda: fastmtl.attach(nn.Tanh(), [nn.ReLU()], M(), grad_scale=-1.0),
        ValueError,
        ("grad_scale", "> 0", "-1.0"),
    ),
}


@pytest.mark.parametrize("name", FAN_OUT)
def test_fan_out(name):
    call, kind, parts = FAN_OUT[name]
    with pytest.raises(kind) as caught:
        call()
    check_message(caught.value, parts)


def test_fan_out_checks_also_where_no_gradient_is_recorded():
    with torch.no_grad():
        for name in ("no task", "a class for a method", "an unknown via", "h without tensors", "info a dict"):
            call, kind, _ = FAN_OUT[name]
            with pytest.raises(kind):
                call()

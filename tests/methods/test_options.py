"""Options of methods: by keyword, checked alike where they are given and set later, and made on any default device."""

import copy
import inspect
import math
import re

import numpy as np
import pytest
import torch
from helpers import F64, generator, randn

from fastmtl import methods, scalarization
from fastmtl.methods.base import Method

S = scalarization
GRADIENTS = [getattr(methods, name) for name in methods.__all__]
LOSSES = [getattr(scalarization, name) for name in scalarization.__all__ if name != "Scalarization"]

# method: option: (a value that is not the default, [values that are refused, with the error and what it says])
NUMBERS = [
    ("a", TypeError, "expected a number"),
    (True, TypeError, "expected a number"),
    (math.nan, ValueError, "expected a finite number"),
    (math.inf, ValueError, "expected a finite number"),
    (-1, ValueError, "expected a finite number"),
]
WEIGHTS = [
    ("both", ValueError, 'expected None, "mean", "sum" or T numbers'),
    (3, TypeError, "expected None"),
    (["a"], TypeError, "expected None"),
    ([], ValueError, "expected shape [T]"),
    ([[1.0]], ValueError, "expected shape [T]"),
    ([1.0, math.nan, 1.0], ValueError, "expected finite numbers"),
    (torch.ones(3, device="meta"), TypeError, "expected None"),
]
INTEGERS = [
    (1.5, TypeError, "expected an integer"),
    (-1, ValueError, "expected an integer"),
    ("2", TypeError, "expected"),
]
GENERATOR = [(3, TypeError, "expected a torch.Generator or None, got int")]
CHOICE = [
    ("mni", ValueError, "expected one of"),
    (None, ValueError, "expected one of"),
    (7, ValueError, "expected one of"),
]
FOUR = [0.2, 0.3, 0.1, 0.4]
OPTIONS = {
    methods.AlignedMTL: {
        "weights": (FOUR, WEIGHTS),
        "scale": ("median", CHOICE),
        "rtol": (1e-3, NUMBERS),
        "rank_rule": ("gram", CHOICE),
    },
    methods.MGDA: {"normalization": ("l2", CHOICE)},
    methods.PCGrad: {
        "order": ("step", CHOICE),
        "reduction": ("mean", CHOICE),
        "generator": (generator(1), GENERATOR),
    },
    methods.GradVac: {
        "beta": (0.25, [*NUMBERS, (1.5, ValueError, "[0, 1]")]),
        "generator": (generator(1), GENERATOR),
    },
    methods.CAGrad: {"c": (0.25, NUMBERS), "rescale": (0, CHOICE)},
    methods.IMTL: {"rtol": (1e-3, NUMBERS)},
    methods.NashMTL: {"max_norm": (0.5, NUMBERS), "every": (2, [*INTEGERS, (0, ValueError, ">= 1")])},
    methods.GradDrop: {
        "leak": (FOUR, [("a", TypeError, "expected a number, T numbers or None"), (1.5, ValueError, "within [0, 1]")]),
        "generator": (generator(1), GENERATOR),
    },
    methods.Uniform: {"weights": (FOUR, WEIGHTS)},
    methods.RLW: {"generator": (generator(1), GENERATOR)},
    methods.UPGrad: {"weights": (FOUR, WEIGHTS), "ridge": (1e-3, NUMBERS)},
    methods.DualProj: {"weights": (FOUR, WEIGHTS), "ridge": (1e-3, NUMBERS)},
    methods.FairGrad: {"fairness": (2.0, NUMBERS)},
    methods.ConFIG: {"weights": (FOUR, WEIGHTS), "length": ("min", CHOICE), "rtol": (1e-3, NUMBERS)},
    methods.TrimmedMean: {"trim": (0, INTEGERS)},
    methods.PCD: {
        "tau": ([0.2, 0.3, 0.1], [("a", TypeError, "expected a number or T - 1 numbers"), (1.5, ValueError, "[0, 1]")]),
        "beta": (0.5, [*NUMBERS, (1, ValueError, "[0, 1)")]),
        "eps": (1.0, NUMBERS),
    },
    methods.SDMGrad: {
        "lam": (0.9, NUMBERS),
        "weights": (FOUR, WEIGHTS),
        "lr": (0.01, [*NUMBERS, (0, ValueError, "> 0")]),
        "momentum": (0.1, NUMBERS),
        "iterations": (1, INTEGERS),
    },
    methods.MoDo: {"gamma": (0.001, [*NUMBERS, (0, ValueError, "> 0")]), "rho": (2.0, NUMBERS)},
    methods.CRMOGM: {"momentum": (0.1, [*NUMBERS, (1.5, ValueError, "[0, 1]")])},
    methods.ExcessMTL: {"step_size": (0.1, [*NUMBERS, (0, ValueError, "> 0")]), "warmup": (1, INTEGERS)},
    methods.MoCo: {
        "beta": (0.9, [*NUMBERS, (1.5, ValueError, "[0, 1]")]),
        "beta_decay": (0.0, NUMBERS),
        "gamma": (1.0, NUMBERS),
        "gamma_decay": (0.0, NUMBERS),
        "rho": (1.0, NUMBERS),
        "normalize": (False, [(0, TypeError, "expected True or False, got int")]),
    },
    methods.DBMTL: {
        "beta": (0.5, [*NUMBERS, (1.5, ValueError, "[0, 1]")]),
        "beta_decay": (0.5, NUMBERS),
        "log": (False, [(0, TypeError, "expected True or False, got int")]),
    },
    methods.MConFIG: {
        "beta1": (0.5, [*NUMBERS, (1, ValueError, "[0, 1)")]),
        "beta2": (0.9, [*NUMBERS, (1, ValueError, "[0, 1)")]),
        "weights": (FOUR, WEIGHTS),
        "length": ("min", CHOICE),
        "rtol": (1e-3, NUMBERS),
    },
    methods.Bloop: {"lam": (0.5, NUMBERS), "rho": (0.5, [*NUMBERS, (1.5, ValueError, "[0, 1]")])},
    methods.Krum: {
        "byzantine": (1, INTEGERS),
        "selected": (2, INTEGERS),
        "squared": (False, [(0, TypeError, "expected True or False, got int")]),
    },
    S.LS: {"weights": (FOUR, WEIGHTS)},
    S.RLW: {"distribution": ("uniform", CHOICE), "generator": (generator(1), GENERATOR)},
    S.DWA: {
        "temperature": (1.0, [*NUMBERS, (0, ValueError, "> 0")]),
        "window": (2, [*INTEGERS, (0, ValueError, ">= 1")]),
    },
    S.Uncertainty: {"initial": (-0.5, NUMBERS[:4])},
    S.IMTLL: {},
    S.GradNorm: {"alpha": (0.5, NUMBERS), "lr": (0.1, NUMBERS)},
    S.GLS: {},
    S.STCH: {"mu": (0.5, [*NUMBERS, (0, ValueError, "> 0")])},
    S.FAMO: {"lr": (0.1, NUMBERS), "weight_decay": (0.1, NUMBERS)},
    S.COSMOS: {"weights": (FOUR, WEIGHTS), "lam": (0.5, NUMBERS)},
    S.PBI: {
        "weights": (FOUR, WEIGHTS),
        "theta": (0.5, NUMBERS),
        "reference": ([-0.1] * 4, [("a", TypeError, "expected T numbers")]),
    },
    S.GO4Align: {"groups": (3, [*INTEGERS, (0, ValueError, ">= 1")]), "step_size": (0.5, NUMBERS)},
    S.SoftAdapt: {"beta": (2.0, NUMBERS[:4]), "variant": ("normalized", CHOICE)},
    S.ReLoBRaLo: {
        "alpha": (0.5, [*NUMBERS, (1.5, ValueError, "[0, 1]")]),
        "temperature": (1.0, [*NUMBERS, (0, ValueError, "> 0")]),
        "lookback": (0.1, [*NUMBERS, (1.5, ValueError, "[0, 1]")]),
    },
    S.NTK: {"probes": (None, [*INTEGERS, (0, ValueError, ">= 1")])},
    S.PiKE: {
        "zeta1": (0.5, NUMBERS),
        "zeta2": (0.5, NUMBERS),
        "batch_size": (8, [*INTEGERS, (0, ValueError, ">= 1")]),
        "tau": (2.0, [*NUMBERS, (0, ValueError, "> 0")]),
    },
}
# What the state depends on is given once.
FIXED = {
    S.GLS: {"tasks": (4, INTEGERS)},
    S.STCH: {
        "tasks": (4, INTEGERS),
        "weights": (FOUR, WEIGHTS),
        "reference": ([-0.1] * 4, [("a", TypeError, "expected T numbers")]),
        "warmup": (None, INTEGERS),
    },
    S.FAMO: {
        "tasks": (4, INTEGERS),
        "min_losses": ([-0.5] * 4, [([0.0], ValueError, "expected shape [4], got shape [1]")]),
    },
    S.GradNorm: {
        "tasks": (4, INTEGERS),
        "initial_losses": (
            [1.0, 2.0, 3.0, 4.0],
            [([1.0, 0.0, 1.0, 1.0], ValueError, "positive"), (1.0, TypeError, "T numbers")],
        ),
    },
    S.DWA: {"tasks": (4, [*INTEGERS, (None, TypeError, "expected an integer >= 1, got NoneType")])},
    S.Uncertainty: {"tasks": (4, INTEGERS)},
    S.IMTLL: {"tasks": (4, INTEGERS)},
    S.RLW: {},
    S.GO4Align: {"tasks": (4, INTEGERS)},
    S.SoftAdapt: {"tasks": (4, INTEGERS)},
    S.ReLoBRaLo: {"tasks": (4, INTEGERS)},
    S.NTK: {"tasks": (4, INTEGERS)},
    S.PiKE: {
        "tasks": (4, INTEGERS),
        "weights": (FOUR, [*WEIGHTS, ("sum", ValueError, "positive"), ([1.0, 0.0, 1.0, 1.0], ValueError, "positive")]),
    },
    methods.CRMOGM: {"method": (None, [(3, TypeError, "expected a method on the Gram matrix or None, got int")])},
}


def make(kind, **options):
    """For four tasks."""
    if "tasks" in inspect.signature(kind).parameters:
        options.setdefault("tasks", 4)
    return kind(**options)


def cases(table, refused):
    for kind, options in table.items():
        for name, (value, bad) in options.items():
            for entry in bad if refused else [value]:
                yield pytest.param(kind, name, entry, id=f"{kind.__name__}-{name}-{entry[0] if refused else ''}")


def outcome(method):
    """What it makes of some gradients or losses, several times: the state counts."""
    torch.manual_seed(0)
    if vars(method).get("generator") is not None:
        method.generator.manual_seed(1)
    if isinstance(method, Method):
        losses = torch.tensor([1.0, 2.0, 0.5, 4.0])
        return [method(randn(4, 20, dtype=F64, seed=k) + 0.1, losses=losses) for k in range(3)]
    results = []
    for k in range(5):
        p = randn(4, dtype=F64, seed=k).abs().add(0.1).requires_grad_()
        value = method(list(p.unbind()), *([p] if isinstance(method, S.GradNorm) else []))
        value.backward()
        results += [value.detach(), p.grad]
        if isinstance(method, S.FAMO):
            method.update(p.detach() * 0.9)
    return results


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_option_is_tried():
    assert set(OPTIONS) == {*GRADIENTS, *LOSSES}
    for kind in OPTIONS:
        tried = {*OPTIONS[kind], *FIXED.get(kind, ())}
        assert tried == {*inspect.signature(kind).parameters}, kind


@pytest.mark.parametrize("kind", OPTIONS)
def test_by_keyword_only(kind):
    """But for what says how many tasks there are: their number, or the weights of linear scalarization."""
    parameters = inspect.signature(kind).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert positional == (
        ["weights"] if kind is S.LS else ["tasks"] if "tasks" in inspect.signature(kind).parameters else []
    )


@pytest.mark.parametrize(("kind", "name", "entry"), [*cases(OPTIONS, True), *cases(FIXED, True)])
def test_a_bad_value_is_refused(kind, name, entry):
    value, error, message = entry
    with pytest.raises(error, match=f"^{name}: .*{re.escape(message)}"):
        make(kind, **{name: value})
    if name in OPTIONS[kind]:
        method = make(kind)
        before, kept = outcome(copy.deepcopy(method)), getattr(method, name)
        with pytest.raises(error, match=f"^{name}: .*{re.escape(message)}"):
            setattr(method, name, value)
        assert getattr(method, name) is kept
        if name != "generator" and kind not in (methods.PCGrad, methods.RLW, S.RLW, methods.GradDrop):
            assert same(outcome(method), before)


@pytest.mark.parametrize(("kind", "name", "value"), [*cases(OPTIONS, False)])
def test_set_later_as_given_at_once(kind, name, value):
    given, changed = make(kind, **{name: value}), make(kind)
    setattr(changed, name, value)
    if kind is S.Uncertainty:
        changed.reset()  # `initial` is what that goes back to
    assert repr(changed) == repr(given)
    assert same(outcome(changed), outcome(given))
    setattr(changed, name, getattr(make(kind), name))
    if isinstance(changed, torch.nn.Module):
        changed.reset()
    if name != "generator":
        assert same(outcome(changed), outcome(make(kind)))


@pytest.mark.parametrize(("kind", "name", "value"), [*cases(FIXED, False)])
def test_what_the_state_depends_on_stays(kind, name, value):
    method = make(kind, **{name: value})
    kept = getattr(method, name)
    with pytest.raises(AttributeError, match=f"^{name}: expected to stay .*: make a new one"):
        setattr(method, name, value)
    assert getattr(method, name) is kept


def test_weights_of_another_length():
    """Given later they are checked as given at once: where the number of tasks is known."""
    for kind in (methods.AlignedMTL, methods.UPGrad, methods.DualProj, methods.ConFIG, methods.Uniform):
        method = kind()
        method.weights = [1.0, 2.0]
        assert method.weights.dtype is F64
        with pytest.raises(ValueError, match=r"weights: expected length 3 .*, got 2; pass None for a task"):
            method(randn(3, 9))
        method.weights = torch.tensor([1, 2, 3], dtype=torch.int32)
        assert same([method(randn(3, 9))], [kind(weights=[1, 2, 3])(randn(3, 9))])


def test_numbers_of_numpy():
    assert methods.CAGrad(c=np.float32(0.25)).c == 0.25
    assert methods.NashMTL(every=np.int64(3)).every == 3
    assert type(methods.NashMTL(every=np.int64(3)).every) is int
    assert S.DWA(np.int32(2), temperature=np.float64(1.5)).temperature == 1.5


@pytest.mark.parametrize(("kind", "name", "value"), [*cases(OPTIONS, False), *cases(FIXED, False)])
def test_numbers_and_arrays_of_numpy(kind, name, value):
    if not isinstance(value, (bool, int, float, list)):
        pytest.skip("the value is no number or array: numpy has no type for it")
    given, array = make(kind, **{name: value}), np.asarray(value)
    for of_numpy in (array[()], array, array[..., ::-1][..., ::-1] if array.ndim else array):
        other = make(kind, **{name: of_numpy})
        assert repr(other) == repr(given)
        assert type(getattr(other, name)) is type(getattr(given, name))
        assert same(outcome(other), outcome(copy.deepcopy(given)))


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([None]), np.array([[1.0]]), np.array(1.0)], ids=str)
def test_arrays_that_are_none(value):
    with pytest.raises((TypeError, ValueError), match=r"^weights: expected (None|shape \[T\])"):
        methods.AlignedMTL(weights=value)


# ------------------------------------------------------------------------------------------------ default devices

ALL = [
    pytest.param(kind, options, id=f"{kind.__name__}-{','.join(options)}")
    for kind in OPTIONS
    for options in (
        {},
        *({name: value} for name, (value, _) in [*OPTIONS[kind].items(), *FIXED.get(kind, {}).items()]),
        *([{"warmup": 1}] if kind is S.STCH else []),
    )
]


@pytest.mark.cover(1)
@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("how", ["context", "default"])
@pytest.mark.parametrize(("kind", "options"), ALL)
def test_made_under_another_default_device(kind, options, how, device):
    """Numbers that a user gives stay numbers, on the CPU; what a module keeps is where any module has it."""
    expected = make(kind, **options)
    has_state = (
        any(True for _ in torch.nn.Module.state_dict(expected)) if isinstance(expected, torch.nn.Module) else False
    )
    if device == "cuda" and has_state and not torch.cuda.is_available():
        return  # there is nowhere to put it
    if how == "context":
        with torch.device(device):
            method = make(kind, **options)
    else:
        torch.set_default_device(device)
        try:
            method = make(kind, **options)
        finally:
            torch.set_default_device(None)
    assert repr(method) == repr(expected)
    for value in vars(method).values():
        assert not isinstance(value, torch.Tensor) or value.device.type == "cpu"
    if has_state:
        assert all(x.device.type == device for x in [*method.parameters(), *method.buffers()])
        method.to_empty(device="cpu")
        method.reset()
    if options.get("generator") is None:
        assert same(outcome(method), outcome(expected))


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_step_under_another_default_device(kind):
    """What a step makes is where the gradients are, and what it keeps is there or on the CPU."""
    torch.manual_seed(0)
    net, heads = torch.nn.Linear(6, 4), torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(4))
    x = randn(5, 6)

    def steps(method):
        net.zero_grad()
        torch.manual_seed(3)
        for _ in range(2):
            h = net(x)
            losses = [head(h).square().mean() for head in heads]
            method.backward(losses, shared=net, every=2 if method.on_gram else 1)
        return net.weight.grad, net.bias.grad, *method.state_dict().values()

    expected, method = steps(make(kind)), make(kind)
    with torch.device("meta"):
        found = steps(method)
    assert same(found, expected)

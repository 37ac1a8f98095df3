"""Nested structures: every container of tensors is rebuilt as it was, and visited in one order."""

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

from fastmtl.structure import map_tensors, tensors_of

Point = namedtuple("Point", "x y")
A, B, C = (torch.full((2,), float(i)) for i in range(3))


@dataclasses.dataclass
class Output:
    first: Any
    second: Any = None
    name: str = "output"


@dataclasses.dataclass(frozen=True)
class Frozen:
    first: Any


class Own(list):
    """A list of the user's own kind."""


class Unknown:
    """No container that anyone knows of."""

    def __init__(self):
        self.x = A


UNKNOWN = Unknown()
# name: (structure, its tensors in order)
CASES = {
    "tensor": (A, [A]),
    "list": ([A, B], [A, B]),
    "tuple": ((B, A), [B, A]),
    "empty": ([], []),
    "named tuple": (Point(A, B), [A, B]),
    "read-only mapping": (MappingProxyType({"b": A, "a": [B]}), [A, B]),
    "dict": ({"b": A, "a": B}, [A, B]),
    "ordered dict": (OrderedDict(b=A, a=B), [A, B]),
    "dataclass": (Output(A, [B]), [A, B]),
    "frozen dataclass": (Frozen(Frozen(A)), [A]),
    "a list of one's own": (Own([A, B]), [A, B]),
    "nested": ([Point(Output({"k": (A,)}), [B]), {"z": [C]}], [A, B, C]),
    "other leaves": ([1, None, "text", 2.5, A, UNKNOWN, torch.float32, range(3)], [A]),
    "the same tensor twice": ([A, {"again": A}], [A, A]),
    "no tensor": ("text", []),
    "none": (None, []),
    "a class": (Output, []),
}


def same(a, b):
    """Structures of the same types and leaves, tensors and unknown objects by identity."""
    if isinstance(a, torch.Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


@pytest.mark.parametrize("name", CASES)
def test_tensors_in_order(name):
    structure, expected = CASES[name]
    found = list(tensors_of(structure))
    assert [id(x) for x in found] == [id(x) for x in expected]


@pytest.mark.parametrize("name", CASES)
def test_map_visits_in_the_same_order_and_rebuilds(name):
    structure, expected = CASES[name]
    visited = []

    def keep(x):
        visited.append(x)
        return x

    result = map_tensors(keep, structure)
    assert [id(x) for x in visited] == [id(x) for x in expected]
    assert same(result, structure)


@pytest.mark.parametrize("name", CASES)
def test_map_replaces_and_leaves_the_original_alone(name):
    structure, expected = CASES[name]
    result = map_tensors(lambda x: x + 10, structure)
    found = list(tensors_of(result))
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y + 10)
    assert [id(x) for x in tensors_of(structure)] == [id(x) for x in expected]


@pytest.mark.parametrize("name", CASES)
def test_map_passes_on_what_does_not_change(name):
    structure, _ = CASES[name]
    assert map_tensors(lambda x: x, structure) is structure
    outer = {"structure": structure, "own": (own := torch.ones(2))}
    result = map_tensors(lambda x: x + 1 if x is own else x, outer)
    assert result is not outer
    assert result["structure"] is structure
    assert torch.equal(result["own"], own + 1)


def test_map_to_what_is_no_tensor():
    assert map_tensors(lambda x: None, Point(A, [B, "x"])) == Point(None, [None, "x"])
    assert map_tensors(lambda x: x.shape[0], {"a": (A, 3)}) == {"a": (2, 3)}


def test_parameters_are_tensors():
    p = torch.nn.Parameter(torch.ones(2))
    assert next(tensors_of([p])) is p


def test_a_hugging_face_like_output():
    """A dataclass that is an ordered dict too, with fields that may be None."""

    @dataclasses.dataclass
    class ModelOutput(OrderedDict):
        last: Any = None
        states: Any = None

        def __post_init__(self):
            for field in dataclasses.fields(self):
                if getattr(self, field.name) is not None:
                    self[field.name] = getattr(self, field.name)

    output = ModelOutput(last=A, states=(B, C))
    assert [id(x) for x in tensors_of(output)] == [id(x) for x in (A, B, C)]
    result = map_tensors(lambda x: x + 1, output)
    assert type(result) is ModelOutput
    assert torch.equal(result.last, A + 1)
    assert torch.equal(result["states"][1], C + 1)


def test_a_default_dict_keeps_its_factory():
    structure = defaultdict(list, a=A)
    result = map_tensors(lambda x: x + 1, structure)
    assert torch.equal(result["a"], A + 1)
    assert result["new"] == []


def test_a_dataclass_with_a_field_that_is_no_argument():
    @dataclasses.dataclass
    class Counted:
        x: Any
        size: int = dataclasses.field(init=False)

        def __post_init__(self):
            self.size = 7

    result = map_tensors(lambda x: x + 1, Counted(A))
    assert torch.equal(result.x, A + 1)
    assert result.size == 7

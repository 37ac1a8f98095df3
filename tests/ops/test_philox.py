"""fastmtl.ops.reference.philox against the published vectors, and the permutations drawn from it."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastmtl.ops.reference.philox import permutations, philox

FULL = 0xFFFFFFFF
# Key, counter and words: the known answers of the authors' Random123.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL, FULL), (FULL, FULL, FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_known_answers(key, counter, words):
    seed = key[0] | key[1] << 32
    seed = torch.tensor(seed - (seed >> 63 << 64))  # as int64 holds these bits
    assert philox(seed, torch.tensor(counter)).tolist() == list(words)
    assert philox(seed[None], torch.tensor([counter, counter]))[1].tolist() == list(words)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 6, 9, 40])
def test_permutations_are_permutations(T):
    order = permutations(torch.tensor(3), 4, 5, T)
    assert order.shape == (4, 5, T)
    assert torch.equal(order.sort(-1).values, torch.arange(T).expand(4, 5, T))


def test_permutations_depend_on_seed_task_and_matrix_alone():
    order = permutations(torch.tensor(3), 4, 5, 12)
    assert len({tuple(p) for p in order.reshape(-1, 12).tolist()}) == 20
    assert torch.equal(order[:2, :3], permutations(torch.tensor([3]), 2, 3, 12))
    assert not torch.equal(order, permutations(torch.tensor(3 + 2**40), 4, 5, 12))


def test_frozen_permutations():
    assert permutations(torch.tensor(5), 2, 2, 6).tolist() == [
        [[1, 5, 2, 3, 0, 4], [4, 2, 3, 0, 1, 5]],
        [[4, 0, 3, 5, 1, 2], [2, 4, 5, 0, 3, 1]],
    ]


@pytest.mark.parametrize("T", [3, 4])
def test_permutations_are_uniform(T):
    """Chi-square over all T! orders: 6 and 24 cells, beyond the 1e-4 quantile in one seed of 10⁴."""
    order = permutations(torch.tensor(1), 400, 60, T).reshape(-1, T)
    cells = [(order == torch.tensor(p)).all(-1).sum().item() for p in itertools.permutations(range(T))]
    expected = len(order) / len(cells)
    assert sum((n - expected) ** 2 / expected for n in cells) < {3: 25.7, 4: 58.6}[T]

"""Realistic gradients of many tasks: of single examples, on a small network that learns handwritten digits."""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

__all__ = ["EXAMPLES", "per_example"]

EXAMPLES = 1797  # in scikit-learn's digits, and so the most tasks
PARAMS = 26_122  # of the network with 128 units a layer
BATCH = 256


def per_example(tasks: int, params: int = PARAMS, steps: int = 200, seed: int = 0) -> Tensor:
    """Float32 gradients [tasks, params] of the cross entropies of that many single examples.

    The network has two hidden layers, as wide as `params` parameters take; of any surplus the first `params` are used.
    Norms spread over a factor of 1e4 and, as it learns, 1e9; beyond some hundred tasks, rows are nearly dependent.

    Args:
        tasks: T, the number of examples, at most `EXAMPLES`.
        params: P.
        steps: steps of Adam at 1e-3 on batches of 256 before the gradients are taken.
        seed: of the network, the batches and the examples.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: more tasks than there are examples.
    """
    if tasks > EXAMPLES:
        raise ValueError(f"tasks: expected at most {EXAMPLES} examples of digits, got {tasks}")
    images, labels = _digits()
    width = next(h for h in itertools.count(1) if (64 + h + 12) * h + 10 >= params)
    net = _trained(width, steps, seed)
    some = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(seed))[:tasks]
    state = {name: p.detach() for name, p in net.named_parameters()}

    def loss(state: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(net, state, (image[None],)), label[None])

    found = vmap(grad(loss), (None, 0, 0))(state, images[some], labels[some])
    return torch.cat([g.flatten(1) for g in found.values()], 1)[:, :params].contiguous()


@cache
def _trained(width: int, steps: int, seed: int) -> nn.Module:
    images, labels = _digits()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(steps):
            some = torch.randint(0, EXAMPLES, (BATCH,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[some]), labels[some]).backward()
            optimizer.step()
    return net


@cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("real gradients need scikit-learn: pip install 'fastmtl-torch[demo]'") from error
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)

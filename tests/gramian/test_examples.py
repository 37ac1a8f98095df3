"""`backward(losses, batch_dim=0)`: B gradients from one backward pass are those of B backward passes."""

import copy
import math

import pytest
import torch
from gramian_models import LAYERS, MODELS, Uses, build, resnet18
from helpers import BF16, F32, F64, dtype_id, randn
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn

import fastmtl
from fastmtl.gramian.examples import layout

# Of an entry of the Gram relative to the norms of its two rows, and of the gradient.
GRAM = {F32: 1e-5, F64: 1e-9}
LIMIT = {F32: 1e-4, F64: 1e-9}

dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)


def weights(B):
    """A weighting without a solver, of another weight for each loss, and of both signs."""
    return torch.linspace(-0.5, 1.0, B, dtype=F64)


def weighted():
    return fastmtl.GramMethod.of(lambda M: weights(M.shape[-1]).expand(M.shape[:-1]))


def jacobian(losses, parameters):
    """One backward pass a loss: [N, P], float64."""
    rows = []
    for loss in losses.flatten():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters)]))
    return torch.stack(rows).double()


def gradient(parameters):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).double()


def agree(losses, parameters, dtype=F64, method=None, **options):
    """Holds a step to one backward pass a loss; `losses()` computes them. Returns what the step saw."""
    parameters = [p for p in parameters if p.requires_grad]
    torch.manual_seed(3)
    expected = losses()
    J = jacobian(expected, parameters)
    M = J @ J.T
    for p in parameters:
        p.grad = None
    torch.manual_seed(3)
    info = (method or weighted()).backward(losses(), parameters, batch_dim=expected.ndim - 1, **options)
    assert info.gram.dtype is F64
    norms = M.diagonal().sqrt()
    error = (info.gram - M).abs() / torch.where(norms > 0, norms, 1)[:, None] / torch.where(norms > 0, norms, 1)
    assert error.max().item() <= GRAM[dtype]
    got, wanted = gradient(parameters), info.alpha @ J
    assert (got - wanted).norm() <= LIMIT[dtype] * (info.alpha.abs() @ J.norm(dim=1))
    for p in parameters:
        assert p.grad is None or p.grad.dtype is p.dtype
    return info


def losses_of(trunk, x):
    """A loss for each example of x [B, ...] from a trunk's features [B, ...]."""
    h = trunk(x).flatten(1)
    return (h.sin() * torch.linspace(0.5, 2, h.shape[1], dtype=h.dtype)).sum(1)


# ------------------------------------------------------------------------------------- every use of every parameter

MIXING = {
    "batch norm",
    "batch norm of features",
    "resnet18",
}
CASES = {name: make for name, make in {**MODELS, **LAYERS}.items() if hasattr(make(), "trunk")}


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_uses_of_parameters(name, dtype):
    model = build(CASES[name], dtype)
    if name in MIXING:
        with pytest.raises(ValueError, match="NativeBatchNormBackward0 with statistics of the batch"):
            agree(lambda: losses_of(model.trunk, model.x), model.shared(), dtype)
        return
    agree(lambda: losses_of(model.trunk, model.x), model.shared(), dtype)

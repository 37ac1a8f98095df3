"""Task weights from Gram matrices on a GPU: every op against the CPU's, graphs, streams. Skipped without a GPU."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import F32, F64, generator, randn
from test_cuda import busy, captured, no_waiting, same_bits

import fastmtl
from fastmtl import ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TASKS = (1, 2, 3, 5, 8, 16, 17, 32, 33, 64)
LARGE = (65, 100)


def weights(T):
    w = torch.rand(T, dtype=F64, generator=generator(T)) + 0.1
    w[1::3] *= -1
    return w


# By name: op(M, weights, seed, targets) with all tensors on one device.
METHODS = {
    "mgda": lambda M, w, seed, targets: ops.mgda(M),
    "dual cone": lambda M, w, seed, targets: ops.dual_cone(M, None, False),
    "weighted dual cone": lambda M, w, seed, targets: ops.dual_cone(M, w, False),
    "UPGrad": lambda M, w, seed, targets: ops.dual_cone(M, None, True),
    "weighted UPGrad": lambda M, w, seed, targets: ops.dual_cone(M, w, True),
    "cagrad": lambda M, w, seed, targets: ops.cagrad(M, 0.4),
    "nash": lambda M, w, seed, targets: ops.nash(M, 1.0),
    "fair": lambda M, w, seed, targets: ops.nash(M, 0.5),
    "pcgrad": lambda M, w, seed, targets: (ops.pcgrad(M, seed, True),),
    "pcgrad in one order": lambda M, w, seed, targets: (ops.pcgrad(M, seed, False),),
    "gradvac": lambda M, w, seed, targets: (ops.gradvac(M, seed, 0.3, targets), targets),
}
methods = pytest.mark.parametrize("method", METHODS)
AT_ANY_T = [(method, 130) for method in METHODS if method.startswith(("pcgrad", "gradvac"))]  # the others ask the host
on_the_device = pytest.mark.parametrize(("method", "T"), [*itertools.product(METHODS, (1, 3, 17, 64)), *AT_ANY_T])


def inputs(M, device, seed=7):
    """What a method gets; every call has targets of its own."""
    targets = 0.5 - torch.rand(M.shape, dtype=F64, generator=generator(1))
    tensors = (M, weights(M.shape[-1]), torch.tensor(seed << 33), targets)
    return [x.to(device) for x in tensors]


def gradients(*shape, seed=0):
    """With fewer conflicts than pure noise has."""
    return randn(*shape, dtype=F64, seed=seed) + 0.2 * randn(shape[-1], dtype=F64, seed=seed + 1)


def gram(G):
    M = G @ G.mT
    return (M + M.mT) / 2


def distance(G, a, b):
    """‖Gᵀ(a - b)‖ relative to what the sums are made of, the worst of a batch."""
    size = (torch.maximum(a.abs(), b.abs()) * G.norm(dim=-1)).sum(-1)
    return float((((a - b)[..., None, :] @ G).squeeze(-2).norm(dim=-1) / size).max())


def check(method, G):
    M = gram(G)
    alpha, *rest = (x.cpu() for x in METHODS[method](*inputs(M, "cuda")))
    want, *expected = METHODS[method](*inputs(M, "cpu"))
    assert distance(G, alpha, want) <= 1e-9
    for x, y in zip(rest, expected, strict=True):
        assert x.shape == y.shape
        assert torch.allclose(x, y, rtol=0, atol=1e-10)


@methods
@pytest.mark.parametrize("T", [*TASKS, *LARGE])
def test_as_on_the_cpu(T, method):
    check(method, gradients(T, 4 * T + 8, seed=T))


@methods
@pytest.mark.parametrize("shape", [(40, 3), (2000, 5), (3, 64), (2, 70)], ids=str)
def test_batch(shape, method):
    B, T = shape
    check(method, gradients(B, T, 4 * T + 8, seed=T))


@methods
@pytest.mark.parametrize("T", [3, 20, 70])
def test_strides_and_dtypes(T, method):
    M = gram(gradients(2, T, 4 * T + 8)).to(F32)
    expected = METHODS[method](*inputs(M, "cpu"))
    wide = torch.full((2, T, 2 * T), torch.nan, device="cuda")[:, :, ::2]
    wide.copy_(M)
    for x, y in zip(METHODS[method](wide, *inputs(M, "cuda")[1:]), expected, strict=True):
        assert x.dtype is F64
        assert torch.allclose(x.cpu(), y, rtol=1e-6, atol=1e-8)


@methods
def test_no_matrices(method):
    M = torch.empty(0, 3, 3, dtype=F64)
    assert METHODS[method](*inputs(M, "cuda"))[0].shape == (0, 3)


@methods
@pytest.mark.parametrize("T", [1, 3, 33, 70])
def test_a_matrix_that_is_not_finite_spares_the_others(T, method):
    M = gram(gradients(3, T, 4 * T + 8))
    good = [x.cpu() for x in METHODS[method](*inputs(M, "cuda"))]
    M[1, T - 1, 0] = torch.nan
    given = inputs(M, "cuda")
    before = given[-1].clone()
    got = [x.cpu() for x in METHODS[method](*given)]
    assert got[0][1].isnan().all()
    for x, y in zip(got, good, strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])
    assert torch.equal(given[-1][1], before[1])


@on_the_device
def test_nothing_waits(method, T):
    given = inputs(gram(gradients(4, T, 4 * T + 8)), "cuda")
    METHODS[method](*given)
    with no_waiting():
        METHODS[method](*given)


@on_the_device
def test_graph(method, T):
    """M, weights, seed and targets are those of the replay."""
    given = inputs(gram(gradients(2, T, 4 * T + 8)), "cuda")
    graph, result = captured(lambda: METHODS[method](*given))
    for seed in (1, 2):
        M = gram(gradients(2, T, 4 * T + 8, seed=seed))
        new = inputs(M, "cuda", seed)
        for x, y in zip(given, new, strict=True):
            x.copy_(y)
        graph.replay()
        assert same_bits(result, METHODS[method](*new))


def test_capture_of_many_tasks_is_refused():
    script = """
import torch
from fastmtl import ops
M = torch.eye(70, dtype=torch.float64, device="cuda")
ops.mgda(M)
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.mgda(M)
except RuntimeError:
    print("refused")
"""
    command = [sys.executable, "-c", script]  # a failed capture may leave the process unfit for others
    environment = {**os.environ, "PYTHONPATH": str(Path(fastmtl.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "refused\n", done.stderr


@methods
@pytest.mark.parametrize("T", [3, 64, 70])
def test_the_current_stream(T, method):
    values = inputs(gram(gradients(T, 4 * T + 8)), "cuda")
    expected = METHODS[method](*[x.clone() for x in values])
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        given = [torch.zeros_like(x) for x in values]
        busy()
        for x, y in zip(given, values, strict=True):
            x.copy_(y)
        got = [x.clone() for x in METHODS[method](*given)]
    side.synchronize()
    assert same_bits(got, expected)


@methods
@pytest.mark.parametrize("T", [3, 17, 64])
def test_the_same_bits_on_every_run(T, method):
    M = gram(gradients(50, T, T // 2 + 1, seed=T))  # of low rank
    first = METHODS[method](*inputs(M, "cuda"))
    for _ in range(5):
        junk = torch.full((1 << 22,), torch.nan, device="cuda")  # memory that kernels get is not what they left
        del junk
        assert same_bits(METHODS[method](*inputs(M, "cuda")), first)


def test_devices_must_agree():
    M, w, seed, targets = inputs(torch.eye(3, dtype=F64), "cpu")
    M = M.cuda()
    for call in (
        lambda: ops.dual_cone(M, w, True),
        lambda: ops.pcgrad(M, seed, True),
        lambda: ops.gradvac(M, seed, 0.5, targets.cuda()),
        lambda: ops.gradvac(M, seed.cuda(), 0.5, targets),
    ):
        with pytest.raises(RuntimeError, match=r"^(weights|seed|targets): expected .*got .* on cpu"):
            call()
    torch.cuda.synchronize()  # none of them left an error behind

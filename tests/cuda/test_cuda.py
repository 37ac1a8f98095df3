"""The CUDA kernels on a GPU: the truth of tests/helpers.py, graphs, streams, memory. Skipped where there is none."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import (
    BF16,
    DEPENDENT,
    DTYPES,
    EPS,
    EPS32,
    F16,
    F32,
    F64,
    condition,
    conditioned,
    contract,
    default_rtol,
    dense,
    dtype_id,
    flat,
    gram_error,
    hard_to_round,
    nearest,
    randn,
    relative,
    residuals,
    rounded,
    same_numbers,
    svd_align,
    svd_rank,
)

import fastmtl
from fastmtl import ops
from fastmtl.ops import reference
from fastmtl.pipeline import aggregate_rows

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Kernels of every kind: few tasks, tiles of 16, 32 and 64 rows, and blocks of 64 beyond.
TASKS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64)
LARGE = (65, 100, 128, 130)
SCALES = ("min", "median", "rmse")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def on_gpu(x):
    """Tensors of nested lists on the GPU, in their own layouts."""
    if isinstance(x, torch.Tensor):
        return x.cuda()
    return x if x is None else [on_gpu(y) for y in x]


def on_cpu(x):
    if isinstance(x, torch.Tensor):
        return x.cpu()
    return x if x is None else [on_cpu(y) for y in x]


def policy(T, dtype=F32):
    return (None, "min", default_rtol(T, dtype), EPS32, "normalized")


def bits(x):
    if isinstance(x, torch.Tensor):
        return [x.clone().reshape(-1).view(torch.uint8)]
    return [b for part in x if part is not None for b in bits(part)]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


@contextlib.contextmanager
def no_waiting():
    """torch raises where it would make the host wait."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call, warm_ups=3):
    """A CUDA graph of `call`, warmed up on a side stream as torch asks for, and what the captured call returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def ragged(T, dtype=F32, missing=True):
    """T rows of tensors of many sizes: empty, a scalar, odd ones, some larger than a tile."""
    shapes = [(3, 5), (), (0, 4), (1000,), (513,), (64, 65), (7,), (2, 3, 4, 5)]
    rows = [[randn(*shape, dtype=dtype, seed=100 * t + k) for k, shape in enumerate(shapes)] for t in range(T)]
    if missing and T > 1:
        rows[1][3] = rows[0][6] = None
        for row in rows:
            row[4] = None
    return rows


def check_align(G, kappa=None, **options):
    """`AlignedMTL(**options)` on the GPU against the truth; `G` [T, P] lies on the CPU."""
    got = fastmtl.AlignedMTL(**options)(on_gpu(G)).cpu()
    assert got.dtype is G.dtype
    kappa = condition(G) if kappa is None else kappa
    assert relative(got, svd_align(G, **options)) <= contract(G.shape[0], kappa, G.dtype)


# ------------------------------------------------------------------------------------------------ what is there


def test_the_kernels_are_built_and_registered():
    assert ops.EXTENSIONS["_C_cuda"] is not None, "build with FASTMTL_CUDA=1"
    made_of_other_ops = {"unit_solve", "constant"}
    for name in {name for name in ops.__all__ if name.islower()} - made_of_other_ops:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmtl::{name}", "CUDA"), name


# ------------------------------------------------------------------------------------------------ gram


@dtypes
@pytest.mark.parametrize("T", [*TASKS, *LARGE])
@pytest.mark.parametrize("P", [1, 7, 512, 513, 4099, 70_001])
def test_gram(T, P, dtype):
    G = randn(T, P, dtype=dtype)
    M = ops.gram(on_gpu(G)).cpu()
    assert gram_error(M, G) <= 1e-12
    assert torch.equal(M, M.mT)


@dtypes
@pytest.mark.parametrize("shape", [(5, 3, 100), (300, 8, 40), (3, 40, 3000), (2, 130, 900), (0, 3, 5)], ids=str)
def test_gram_of_a_batch(shape, dtype):
    G = randn(*shape, dtype=dtype)
    assert gram_error(ops.gram(on_gpu(G)).cpu(), G) <= 1e-12


def test_gram_without_columns():
    assert not ops.gram(torch.empty(3, 0, device="cuda")).any()


def strided(T, P):
    """Name, and the same kind of view on both devices."""
    yield "rows further apart", lambda x: x[:, : P - 64], (T, P)
    yield "unaligned rows", lambda x: x[1:].view(T, P), (T * P + 1,)
    yield "odd row length", lambda x: x[:, 1:], (T, P + 1)
    yield "columns apart", lambda x: x[:, ::2], (T, 2 * P)
    yield "transposed", lambda x: x.T, (P, T)
    yield "every other row", lambda x: x[::2], (2 * T, P)
    yield "one row for all", lambda x: x.expand(T, P), (1, P)


@dtypes
@pytest.mark.parametrize("T", [3, 8, 20, 64])
def test_strides(T, dtype):
    for name, view, shape in strided(T, 2049):
        buffer = randn(*shape, dtype=dtype, seed=T)
        G, device = view(buffer), view(on_gpu(buffer))
        assert gram_error(ops.gram(device).cpu(), G) <= 1e-12, name
        expected = svd_align(G)
        assert relative(fastmtl.AlignedMTL()(device).cpu(), expected) <= contract(T, condition(G), dtype), name
        out = torch.full((2 * G.shape[1],), torch.nan, dtype=dtype, device="cuda")[::2]
        fastmtl.AlignedMTL()(device, out=out)
        assert relative(out.cpu(), expected) <= contract(T, condition(G), dtype), name


# ------------------------------------------------------------------------------------------------ combine


@dtypes
@pytest.mark.parametrize("T", [*TASKS, *LARGE])
@pytest.mark.parametrize("P", [1, 7, 513, 70_001])
def test_combine(T, P, dtype):
    G, alpha = randn(T, P, dtype=dtype), randn(T, dtype=F64, seed=1)
    out = torch.full((P,), torch.nan, dtype=dtype, device="cuda")
    ops.combine(on_gpu(G), on_gpu(alpha), out)
    slack = 1e-13 * (alpha.abs() @ G.to(F64).abs())
    assert rounded(out.cpu(), alpha @ G.to(F64), slack)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_combine_rounds_once(dtype):
    alpha = hard_to_round(dtype)
    out = torch.empty(len(alpha), 21, dtype=dtype, device="cuda")
    ops.combine(on_gpu(torch.ones(len(alpha), 1, 21, dtype=dtype)), on_gpu(alpha[:, None]), out)
    expected = [nearest(x, dtype) for x in alpha.tolist()]
    for column in out.cpu().T:
        assert same_numbers(column, expected)


# ------------------------------------------------------------------------------------------------ balance, eigh


@pytest.mark.parametrize("rank_rule", ["normalized", "gram"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("T", [*TASKS, *LARGE])
def test_balance(T, scale, rank_rule):
    """Against the CPU's kernels, which the other tests compare with the truth."""
    w = torch.linspace(0.5, 2, T, dtype=F64)
    G = torch.stack([conditioned(T, 200, 30.0, spread=100.0, dtype=F64, seed=s) for s in range(3)])
    G[1, T // 2] = 0
    M = ops.gram(G)
    options = (scale, default_rtol(T, F64), EPS[F64], rank_rule)
    got = ops.balance(on_gpu(M), on_gpu(w), *options)
    expected = ops.balance(M, w, *options)
    assert relative(got[0].cpu(), expected[0]) <= 1e-9
    assert relative(got[1].cpu(), expected[1]) <= 1e-12
    assert torch.equal(got[2].cpu(), expected[2])
    assert same_bits(ops.balance(on_gpu(M[0]), on_gpu(w), *options)[0], got[0][0])


def test_weighting_takes_float32():
    M = ops.gram(randn(4, 100))
    method = fastmtl.AlignedMTL(weights=[1, 2, 3, 4])
    assert relative(method.weighting(on_gpu(M)).cpu(), method.weighting(M)) <= 1e-9
    assert relative(method.weighting(on_gpu(M.float())).cpu(), method.weighting(M)) <= 1e-5


@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
@pytest.mark.parametrize(("B", "T"), [(300, 1), (512, 3), (200, 8), (64, 16), (64, 33), (20, 64), (3, 65), (2, 130)])
def test_eigh(B, T, dtype):
    A = randn(B, T, T, dtype=dtype)
    M = A + A.mT
    lam, V = fastmtl.eigh(on_gpu(M))
    assert (lam.dtype, V.dtype) == (dtype, dtype)
    lam, V = lam.cpu(), V.cpu()
    assert (lam.diff() >= 0).all()
    assert max(residuals(M, lam, V)) <= 10


def test_eigh_reads_the_lower_triangle_of_any_view():
    M = randn(4, 6, 5, 5)
    lower = M.tril()
    symmetric = lower + lower.tril(-1).mT
    expected = torch.linalg.eigvalsh(symmetric.double())
    for view in (on_gpu(M), on_gpu(M.mT.contiguous()).mT, on_gpu(M.transpose(0, 1).contiguous()).transpose(0, 1)):
        lam, V = fastmtl.eigh(view)
        assert lam.shape == (4, 6, 5)
        assert V.shape == (4, 6, 5, 5)
        assert relative(lam.cpu(), expected) <= 1e-6


def graded(T):
    """D C D, whose eigenvalues span 60 orders of magnitude (Demmel and Veselić 1992)."""
    G = conditioned(T, 200, 3.0, dtype=F64)
    D = torch.logspace(0, -30, T, dtype=F64)
    return (G @ G.T) * D[:, None] * D


@pytest.mark.parametrize("T", [3, 8, 16, 32, 33, 64])
def test_eigh_keeps_small_eigenvalues(T):
    """The CPU is that accurate up to 32: beyond, two such matrices that do not know of each other."""
    parts = [graded(T)] if T <= 32 else [graded(T // 2), 3 * graded(T - T // 2)]
    expected = torch.cat([fastmtl.eigh(M)[0] for M in parts]).sort()[0]
    shuffle = torch.randperm(T)
    M = torch.block_diag(*parts)[shuffle][:, shuffle]
    lam = fastmtl.eigh(on_gpu(M))[0].cpu()
    assert ((lam - expected).abs() <= 1e-10 * expected).all()


@pytest.mark.parametrize("T", [3, 8, 64, 65])
def test_eigh_of_what_is_not_finite(T):
    M = torch.eye(T).repeat(3, 1, 1)
    M[1, T - 1, 0] = torch.nan
    lam, V = (x.cpu() for x in fastmtl.eigh(on_gpu(M)))
    assert lam[1].isnan().all()
    assert V[1].isnan().all()
    assert torch.equal(lam[::2], torch.ones(2, T))


# ------------------------------------------------------------------------------------------------ align


@dtypes
@pytest.mark.parametrize("T", [*TASKS, *LARGE])
@pytest.mark.parametrize("P", [200, 4099, 70_001])
def test_align(T, P, dtype):
    check_align(randn(T, P, dtype=dtype))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rank_rule", ["normalized", "gram"])
@pytest.mark.parametrize("T", [3, 10, 40, 70])
def test_options(T, scale, rank_rule):
    G = conditioned(T, 3000, 20.0, spread=10.0)
    for weights in (None, "sum", list(torch.linspace(0.5, 2, T))):
        w = torch.ones(T, dtype=F64) if weights == "sum" else None if weights is None else torch.tensor(weights)
        got = fastmtl.AlignedMTL(weights=weights, scale=scale, rank_rule=rank_rule)(on_gpu(G)).cpu()
        expected = svd_align(G, w, scale=scale, rank_rule=rank_rule)
        assert relative(got, expected) <= contract(T, 200.0 if rank_rule == "gram" else 20.0)


@pytest.mark.parametrize(
    ("T", "spread", "kappa"),
    [
        (T, spread, kappa)
        for T in (2, 4, 10, 32, 64, 100)
        for kappa in (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
        for spread in (1.0, 1e6)
        if kappa * T * EPS32 <= 0.3 and (kappa <= 1e4 or spread == 1.0)
    ],
)
def test_condition_numbers(T, spread, kappa):
    """Where a Gram matrix in float32 fails: the second pass, decided on the device."""
    check_align(conditioned(T, 20_000, kappa, spread), kappa)


@dtypes
@pytest.mark.parametrize("rank_rule", ["normalized", "gram"])
@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_tasks(name, rank_rule, dtype):
    G = DEPENDENT[name](dtype)
    for scale in SCALES:
        expected = svd_align(G, scale=scale, rank_rule=rank_rule)
        got = fastmtl.AlignedMTL(scale=scale, rank_rule=rank_rule)(on_gpu(G)).cpu()
        assert relative(got, expected) <= 2 * EPS[dtype] + contract(G.shape[0], 10, dtype)


@pytest.mark.parametrize("exponent", [-300, -160, 160, 300])
@pytest.mark.parametrize("T", [3, 20, 40, 70])
def test_float64_beyond_the_range_of_squares(T, exponent):
    for P in (200, 9000):
        G = conditioned(T, P, 5.0, dtype=F64) * 10.0**exponent
        check_align(G, 5.0)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("T", [3, 20, 40, 70])
def test_float32_of_any_size(T, size):
    check_align(conditioned(T, 9000, 5.0, dtype=F64).mul(size).float(), 5.0)


@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("T", [2, 8, 20, 40, 70])
def test_what_is_not_finite_stays_visible(T, bad, dtype):
    for P in (50, 9000):
        G = randn(T, P, dtype=dtype)
        G[T // 2, P // 3] = bad
        assert not fastmtl.AlignedMTL()(on_gpu(G)).isfinite().any()
        batch = torch.stack([randn(T, P, dtype=dtype, seed=1), G])
        got = fastmtl.AlignedMTL()(on_gpu(batch))
        assert got[0].isfinite().all()
        assert not got[1].isfinite().any()


@dtypes
def test_zeros(dtype):
    for T in (1, 3, 20, 64, 70):
        for P in (0, 9, 9000):
            got = fastmtl.AlignedMTL()(torch.zeros(T, P, dtype=dtype, device="cuda"))
            assert torch.equal(got, torch.zeros(P, dtype=dtype, device="cuda"))


@dtypes
@pytest.mark.parametrize(
    "shape", [(7, 3, 100), (512, 8, 204), (100, 20, 300), (3, 12, 9000), (4, 40, 2000), (2, 70, 300)], ids=str
)
def test_batches(shape, dtype):
    G = randn(*shape, dtype=dtype)
    device = on_gpu(G)
    got = fastmtl.AlignedMTL()(device)
    for b in range(0, shape[0], max(1, shape[0] // 5)):
        limit = contract(shape[1], condition(G[b]), dtype)
        assert relative(got[b].cpu(), svd_align(G[b])) <= limit
    padded = torch.empty(shape[0] + 1, shape[1] + 2, shape[2] + 3, dtype=dtype, device="cuda")[1:, 1:-1, 2:-1]
    padded.copy_(device)
    again = fastmtl.AlignedMTL()(padded)  # unaligned rows: sums in another order
    for b in range(0, shape[0], max(1, shape[0] // 5)):
        assert relative(again[b].cpu(), svd_align(G[b])) <= contract(shape[1], condition(G[b]), dtype)


def test_an_empty_batch():
    assert fastmtl.AlignedMTL()(torch.empty(0, 3, 100, device="cuda")).shape == (0, 100)


# ------------------------------------------------------------------------------------------------ ragged


@dtypes
@pytest.mark.parametrize("T", [1, 2, 3, 8, 12, 20, 40, 70])
def test_ragged(T, dtype):
    rows = ragged(T, dtype)
    G = dense(rows)
    device = on_gpu(rows)
    got = fastmtl.AlignedMTL()(device)
    assert [g is None for g in got] == [all(row[k] is None for row in rows) for k in range(len(rows[0]))]
    for g, column in zip(got, zip(*rows, strict=True), strict=True):
        assert g is None or all(x is None or x.shape == g.shape for x in column)
    assert relative(flat(on_cpu(got)), svd_align(G)) <= contract(T, condition(G), dtype)
    kept = [k for k, g in enumerate(got) if g is not None]
    grads = [row[k] for row in device for k in kept]
    assert gram_error(ops.gram_rows(grads, T).cpu(), G) <= 1e-12


def test_ragged_info():
    rows = ragged(5)
    G = dense(rows)
    _, info = aggregate_rows(fastmtl.AlignedMTL(), on_gpu(rows))
    assert all(x.device.type == "cuda" for x in vars(info).values() if isinstance(x, torch.Tensor))
    assert gram_error(info.gram.cpu(), G) <= 1e-12
    assert int(info.rank) == svd_rank(G)
    assert relative((info.alpha.cpu() @ G.to(F64)), svd_align(G)) <= 2e-6
    assert relative(info.eigenvalues.cpu().flip(0), torch.linalg.eigvalsh(info.gram.cpu())) <= 1e-10


@pytest.mark.parametrize("T", [3, 20, 40, 70])
def test_ragged_of_several_dtypes(T):
    shapes = [(1000,), (33,), (64, 30), (5,)]
    kinds = [F32, BF16, F64, F16]
    rows = [
        [randn(*s, dtype=d, seed=9 * t + k) for k, (s, d) in enumerate(zip(shapes, kinds, strict=True))]
        for t in range(T)
    ]
    got = fastmtl.AlignedMTL(rtol=1e-3)(on_gpu(rows))
    assert [g.dtype for g in got] == kinds
    expected = svd_align(dense(rows), rtol=1e-3)
    for g, e in zip(got, expected.split([g.numel() for g in got]), strict=True):
        assert relative(g.cpu().reshape(-1), e) <= 1e-4 + EPS[g.dtype]


def test_ragged_with_thousands_of_tensors():
    """A table that takes several launches to upload."""
    for K in (1, 60, 400, 3000):
        rows = [[randn(1 + k % 5, seed=t * K + k) for k in range(K)] for t in range(4)]
        G = dense(rows)
        got = fastmtl.AlignedMTL()(on_gpu(rows))
        assert relative(flat(on_cpu(got)), svd_align(G)) <= contract(4, condition(G))


def test_ragged_layouts_that_differ():
    values = torch.stack([randn(4, 3, 5, 6, seed=s) for s in range(3)])
    rows = on_gpu(list(values))
    rows[1] = rows[1].contiguous(memory_format=torch.channels_last)
    rows[2] = rows[2].transpose(2, 3).contiguous().transpose(2, 3)
    (got,) = fastmtl.AlignedMTL()(rows)
    assert relative(got.cpu().reshape(-1), svd_align(values.flatten(1))) <= 2e-6
    out = torch.empty(4, 3, 5, 6, device="cuda").contiguous(memory_format=torch.channels_last)
    fastmtl.AlignedMTL()(rows, out=[out])
    assert relative(out.cpu().reshape(-1), svd_align(values.flatten(1))) <= 2e-6


def test_nothing_else_is_written():
    buffer = torch.full((1000,), 7.0, device="cuda")
    for T in (3, 20, 40):
        for offset, P in ((64, 257), (63, 511), (65, 6)):
            buffer.fill_(7)
            fastmtl.AlignedMTL()(on_gpu(randn(T, P)), out=buffer[offset : offset + P])
            assert (buffer[:offset] == 7).all()
            assert (buffer[offset + P :] == 7).all()


# ------------------------------------------------------------------------------------------------ errors


def test_devices_must_agree():
    G, cpu = torch.ones(2, 10, device="cuda"), torch.ones(2, 10)
    method = fastmtl.AlignedMTL()
    with pytest.raises(ValueError, match=r"out: expected .* on cuda:\d, got .* on cpu"):
        method(G, out=torch.empty(10))
    with pytest.raises(ValueError, match=r"out: expected .* on cpu, got .* on cuda"):
        method(cpu, out=torch.empty(10, device="cuda"))
    with pytest.raises(ValueError, match=r"rows\[1\]\[0\]: expected all gradients on cuda:\d, got .* on cpu"):
        method([G[0], cpu[1]])
    with pytest.raises(ValueError, match=r"rows\[\d\]\[1\]: expected all gradients on cuda:\d, got .* on cpu"):
        method([[G[0], cpu[0]], [G[1], cpu[1]]])
    with pytest.raises(ValueError, match=r"out\[0\]: expected .* on cuda:\d, got .* on cpu"):
        method(list(G), out=[torch.empty(10)])


def test_devices_must_agree_in_ops():
    G, M, alpha = (torch.ones(*shape, dtype=F64, device="cuda") for shape in ((2, 10), (2, 2), (2,)))
    w, out = torch.ones(2, dtype=F64), torch.empty(10, dtype=F64, device="cuda")
    _, *rest = policy(2)
    for call in (
        lambda: ops.balance(M, w, *rest),
        lambda: ops.align(G, w, *rest, out),
        lambda: ops.align(G, None, *rest, out.cpu()),
        lambda: ops.combine(G, w, out),
        lambda: ops.combine(G, alpha, out.cpu()),
        lambda: ops.combine_rows(list(G), w, [out]),
        lambda: ops.combine_rows(list(G), alpha, [out.cpu()]),
        lambda: ops.align_rows(list(G), 2, w, *rest, [out]),
        lambda: ops.gram_rows([G[0], G[1].cpu()], 2),
    ):
        with pytest.raises(RuntimeError):
            call()
    torch.cuda.synchronize()  # none of them left an error behind


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    G = randn(4, 5000)
    method = fastmtl.AlignedMTL(weights=[1, 2, 3, 4])
    expected = method(G.to("cuda:0"))
    got = method(G.to("cuda:1"))  # not the current device
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0
    assert len(method._copies) == 2
    with pytest.raises(ValueError, match=r"cuda:1"):
        method([G[0].to("cuda:0"), G[1].to("cuda:1"), None, None])


# ------------------------------------------------------------------------------------------------ no waiting


@dtypes
@pytest.mark.parametrize("T", [1, 3, 8, 12, 20, 40, 64])
@pytest.mark.parametrize("weights", [None, "sum", "numbers"])
def test_nothing_waits(T, weights, dtype):
    method = fastmtl.AlignedMTL(weights=[1.0] * T if weights == "numbers" else weights)
    calls = [randn(T, 300, dtype=dtype), randn(T, 90_000, dtype=dtype), randn(3, T, 900, dtype=dtype)]
    calls = [*map(on_gpu, calls), on_gpu(ragged(T, dtype))]
    M = ops.gram(calls[0])
    for G in calls:
        method(G)  # places the weights
    with no_waiting():
        for G in calls:
            method(G)
        method.weighting(M)
        fastmtl.eigh(M)


def test_ill_conditioned_gradients_do_not_wait():
    inputs = [on_gpu(conditioned(T, 20_000, 1e3, 1e3)) for T in (3, 20, 40, 64)]
    inputs += [on_gpu(conditioned(T, 9000, 5.0, dtype=F64)) * 1e-200 for T in (3, 20, 64)]
    with no_waiting():
        for G in inputs:
            fastmtl.AlignedMTL()(G)


class Model(torch.nn.Module):
    def __init__(self, tasks=3, device="cuda"):
        super().__init__()
        torch.manual_seed(0)
        layers = [torch.nn.Linear(16, 200), torch.nn.Tanh(), torch.nn.Linear(200, 50), torch.nn.Tanh()]
        self.trunk = torch.nn.Sequential(*layers).to(device)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(50, 1) for _ in range(tasks)).to(device)

    def losses(self, x):
        h = self.trunk(x)
        return [head(h).square().mean() for head in self.heads]

    def grads(self):
        return [p.grad.clone() for p in self.parameters()]


@pytest.mark.parametrize("scale_heads", [False, True])
def test_backward(scale_heads):
    gpu, cpu = Model(), Model(device="cpu")
    x = randn(32, 16)
    method = fastmtl.AlignedMTL(weights=[1.0, 2.0, 3.0])
    for model, data in ((gpu, on_gpu(x)), (cpu, x)):
        method.backward(model.losses(data), shared=model.trunk.parameters(), scale_heads=scale_heads)
    for a, b in zip(gpu.grads(), cpu.grads(), strict=True):
        assert relative(a.cpu(), b.double()) <= 1e-4
    data = on_gpu(x)
    with no_waiting():  # `.grad` is added to
        method.backward(gpu.losses(data), shared=gpu.trunk.parameters(), scale_heads=scale_heads)
    for a, b in zip(gpu.grads(), cpu.grads(), strict=True):
        assert relative(a.cpu(), 2 * b.double()) <= 1e-4


# ------------------------------------------------------------------------------------------------ graphs


@dtypes
@pytest.mark.parametrize("shape", [(3, 300), (4, 90_000), (12, 50_000), (20, 30_000), (64, 9000), (5, 8, 700)], ids=str)
def test_graph_of_a_matrix(shape, dtype):
    method = fastmtl.AlignedMTL()
    G = on_gpu(randn(*shape, dtype=dtype))
    out = torch.empty(*shape[:-2], shape[-1], dtype=dtype, device="cuda")
    graph, _ = captured(lambda: method(G, out=out))
    inputs = [randn(*shape, dtype=dtype, seed=s) for s in (1, 2)]
    if len(shape) == 2:  # the replay, too, takes its own decision on a second pass
        inputs += [conditioned(*shape, 100.0, dtype=dtype), torch.zeros(shape, dtype=dtype)]
    for new in inputs:
        G.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        assert same_bits(out, method(on_gpu(new)))


@pytest.mark.parametrize("weights", ["sum", [1.0, 2.0, 3.0]], ids=str)
def test_graph_of_a_ragged_list(weights):
    """The table of addresses is part of the graph."""
    method = fastmtl.AlignedMTL(weights=weights)
    rows = on_gpu(ragged(3))
    outs = [None if g is None else torch.empty_like(g) for g in method(rows)]
    graph, _ = captured(lambda: method(rows, out=outs))
    for seed in (1, 2):
        for t, row in enumerate(rows):
            for k, g in enumerate(row):
                if g is not None:
                    g.copy_(randn(*g.shape, seed=1000 * seed + 10 * t + k))
        graph.replay()
        assert same_bits(outs, method(rows))


def test_graph_of_weighting_and_eigh():
    M = ops.gram(on_gpu(randn(5, 6, 100)))
    method = fastmtl.AlignedMTL()
    graph, (alpha, (lam, V)) = captured(lambda: (method.weighting(M), fastmtl.eigh(M)))
    M.copy_(ops.gram(on_gpu(randn(5, 6, 100, seed=1))))
    graph.replay()
    assert same_bits([alpha, lam, V], [method.weighting(M), *fastmtl.eigh(M)])


@pytest.mark.parametrize("weights", ["sum", [1.0, 2.0, 3.0]], ids=str)
def test_weights_before_and_after_a_capture(weights):
    """What a graph allocates is its own: a capture must not leave weights behind that only its replay fills."""
    G = on_gpu(randn(3, 900))
    expected = fastmtl.AlignedMTL(weights=weights)(G)
    method = fastmtl.AlignedMTL(weights=weights)
    if weights == "sum":  # numbers have to be placed before: a copy from the host cannot be captured
        graph = torch.cuda.CUDAGraph()
        fastmtl.AlignedMTL(weights=weights)(G)
        out = torch.empty(900, device="cuda")
        with torch.cuda.graph(graph):
            method(G, out=out)
        assert not len(method._copies)
        graph.replay()
        assert torch.equal(out, expected)
    assert torch.equal(method(G), expected)
    assert len(method._copies) == 1


@pytest.mark.parametrize("scale_heads", [False, True])
def test_graph_of_a_whole_step(scale_heads):
    """Forward, T backward passes, alignment and commit in one graph."""
    model, x = Model(), on_gpu(randn(32, 16))
    method = fastmtl.AlignedMTL()

    def step():
        for p in model.parameters():
            p.grad = None
        return method.backward(model.losses(x), shared=model.trunk.parameters(), scale_heads=scale_heads)

    graph, info = captured(step)
    grads = [p.grad for p in model.parameters()]
    for seed in (1, 2):
        x.copy_(randn(32, 16, seed=seed))
        graph.replay()
        replayed, alpha = [g.clone() for g in grads], info.alpha.clone()
        eager = step()
        assert relative(alpha.cpu(), eager.alpha.cpu()) <= 1e-5
        for a, b in zip(replayed, model.grads(), strict=True):
            assert relative(a.cpu(), b.cpu().double()) <= 1e-5


def test_capture_of_many_tasks_is_refused():
    """Beyond 64 tasks the eigenproblem goes to the host: an error, not a graph of stale numbers."""
    script = """
import torch, fastmtl
G, out = torch.randn(70, 900, device="cuda"), torch.empty(900, device="cuda")
fastmtl.AlignedMTL()(G, out=out)
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        fastmtl.AlignedMTL()(G, out=out)
except RuntimeError:
    print("refused")
"""
    command = [sys.executable, "-c", script]  # a failed capture may leave the process unfit for others
    environment = {**os.environ, "PYTHONPATH": str(Path(fastmtl.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "refused\n", done.stderr


# ------------------------------------------------------------------------------------------------ streams


def busy(milliseconds=50):
    """Keeps the current stream busy: what runs elsewhere without waiting for it comes too early."""
    torch.cuda._sleep(int(milliseconds * 2e6))


@pytest.mark.parametrize("T", [3, 12, 40, 70])
@pytest.mark.parametrize("P", [300, 70_001])
def test_the_current_stream(T, P):
    method = fastmtl.AlignedMTL(weights="sum")
    values = on_gpu(randn(T, P))
    rows = [list(r.split([100, P - 100])) for r in values]
    expected, expected_rows = method(values), method(rows)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        G = torch.full((T, P), torch.nan, device="cuda")
        out = torch.full((P,), torch.nan, device="cuda")
        busy()
        G.copy_(values)
        method(G, out=out)
        later = out.clone()
        got = method([list(r.split([100, P - 100])) for r in G])
    side.synchronize()
    assert torch.equal(later, expected)
    assert same_bits(got, expected_rows)


def test_nothing_runs_on_the_default_stream():
    """A busy default stream does not hold up a call on another one."""
    method = fastmtl.AlignedMTL()
    inputs = [on_gpu(randn(T, 70_001)) for T in (3, 12, 40)] + [on_gpu(ragged(3))]
    side = torch.cuda.Stream()
    for G in inputs:
        method(G)
    with torch.cuda.stream(side):
        for G in inputs:
            method(G)
    torch.cuda.synchronize()
    busy(500)
    start = torch.cuda.Event()
    start.record()
    with torch.cuda.stream(side):
        for G in inputs:
            method(G)
    side.synchronize()
    assert not start.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("accumulate", [False, True])
def test_backward_on_another_stream(accumulate):
    """The forward pass on the default stream, `backward` on another: `.grad` is complete for whoever waits for it."""
    model, x = Model(), on_gpu(randn(32, 16))
    method = fastmtl.AlignedMTL()
    method.backward(model.losses(x), shared=model.trunk.parameters())
    expected = model.grads()
    if not accumulate:
        model.zero_grad()
    losses = model.losses(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy()
        method.backward(losses, shared=model.trunk.parameters())
        got = model.grads()
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert relative(a.cpu(), (2 if accumulate else 1) * b.cpu().double()) <= 1e-5


def test_streams_and_threads_at_once():
    """One method, weights that are placed while others already use them."""
    inputs = [on_gpu(randn(T, P, seed=T)) for T, P in ((3, 70_001), (3, 300), (12, 5000), (40, 3000))]
    expected = [fastmtl.AlignedMTL(weights="sum")(G) for G in inputs]
    torch.cuda.synchronize()
    method, failures = fastmtl.AlignedMTL(weights="sum"), []

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(50):
                k = (i + seed) % len(inputs)
                if not torch.equal(method(inputs[k]), expected[k]):
                    failures.append((seed, k))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ------------------------------------------------------------------------------------------------ the same bits


@dtypes
@pytest.mark.parametrize("T", [2, 3, 8, 12, 20, 40, 64, 70])
def test_the_same_bits_on_every_run(T, dtype):
    G, rows = on_gpu(randn(T, 70_001, dtype=dtype)), on_gpu(ragged(T, dtype))
    batch = on_gpu(randn(20, T, 900, dtype=dtype))
    method = fastmtl.AlignedMTL()

    def everything():
        return [method(G), method(rows), method(batch), ops.gram(G), *fastmtl.eigh(ops.gram(batch))]

    first = everything()
    for _ in range(10):
        junk = torch.full((1 << 22,), torch.nan, device="cuda")  # memory that kernels get is not what they left
        del junk
        assert same_bits(everything(), first)


# ------------------------------------------------------------------------------------------------ memory

MEGABYTE = 1 << 20


def peak(call):
    """Bytes that torch's allocator held at most during a call, beyond what it held before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=dtype_id)
@pytest.mark.parametrize(("T", "P"), [(3, 20_000_000), (12, 8_000_000), (40, 4_000_000), (64, 4_000_000)])
def test_gradients_are_read_in_place(T, P, dtype):
    G = torch.randn(T, P, device="cuda").to(dtype)
    size, method = G.element_size(), fastmtl.AlignedMTL()
    out = torch.empty(P, dtype=dtype, device="cuda")
    assert peak(lambda: method(G, out=out)) <= 48 * MEGABYTE  # partial sums of two passes
    assert peak(lambda: method(G)) <= P * size + 48 * MEGABYTE
    sizes = [1000, P // 2, P - P // 2 - 1000]
    rows = [list(r.split(sizes)) for r in G]
    assert peak(lambda: method(rows)) <= P * size + 48 * MEGABYTE
    shifted = G[:, 1:]  # unaligned
    assert peak(lambda: method(shifted, out=out[1:])) <= 48 * MEGABYTE


def test_few_tasks_need_hardly_any_memory():
    G, out = torch.randn(8, 4_000_000, device="cuda"), torch.empty(4_000_000, device="cuda")
    method = fastmtl.AlignedMTL()
    assert peak(lambda: method(G, out=out)) <= MEGABYTE


def test_nothing_leaks():
    G, method = on_gpu(randn(20, 9000)), fastmtl.AlignedMTL(weights="sum")
    rows = on_gpu(ragged(20))
    for _ in range(3):
        method(G)
        method(rows)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        method(G)
        method(rows)
    assert torch.cuda.memory_allocated() == before


# ------------------------------------------------------------------------------------------------ GradDrop


@dtypes
@pytest.mark.parametrize("leak", [None, [0.0, 0.25, 0.5, 1.0]], ids=str)
def test_sign_drop(dtype, leak):
    """The choices of the reference, in every coordinate."""
    seed = torch.tensor(-(2**40) + 12345)
    leaks = None if leak is None else torch.tensor(leak, dtype=F64)
    odd = torch.cat([torch.zeros(1, dtype=dtype), randn(4 * 4099, dtype=dtype)])[1:].view(4, 4099)
    for G in (randn(4, 1, dtype=dtype), randn(4, 70_001, dtype=dtype), randn(7, 4, 900, dtype=dtype), odd):
        shape = (*G.shape[:-2], G.shape[-1])
        expected, out = torch.empty(shape, dtype=F64), torch.empty(shape, dtype=dtype, device="cuda")
        reference.sign_drop(G, seed, leaks, expected)
        ops.sign_drop(on_gpu(G), seed.cuda(), None if leaks is None else leaks.cuda(), out)
        assert rounded(out.cpu(), expected, 0.0 if leak is None else 1e-14 * G.to(F64).abs().sum(-2))


def test_sign_drop_of_ragged_rows():
    for T in (1, 3, 8):
        rows = [[*row, randn(700, dtype=BF16, seed=t), randn(9, dtype=F64, seed=t)] for t, row in enumerate(ragged(T))]
        grads = [g for row in rows for g in row]
        like = [next(g for g in column if g is not None) for column in zip(*rows, strict=True)]
        seed = torch.tensor(5)
        expected = [torch.empty(g.shape, dtype=F64) for g in like]
        outs = [torch.empty_like(g, device="cuda") for g in like]
        reference.sign_drop_rows(grads, T, seed, None, expected)
        ops.sign_drop_rows(on_gpu(grads), T, seed.cuda(), None, outs)
        assert all(rounded(out.cpu(), want) for out, want in zip(outs, expected, strict=True))


def test_graddrop_does_not_wait_and_is_reproducible():
    G, rows = on_gpu(randn(4, 70_001)), on_gpu(ragged(4))
    for leak in (None, 0.5, [0.0, 0.25, 0.5, 1.0]):
        method = fastmtl.GradDrop(leak=leak)
        method(G)  # places the leaks
        torch.manual_seed(1)
        with no_waiting():
            got = [method(G), method(rows)]
        torch.manual_seed(1)
        assert same_bits([method(G), method(rows)], got)
        assert not torch.equal(method(G), got[0])


def test_graph_of_graddrop():
    """Every replay draws anew."""
    G, method = on_gpu(randn(4, 9000)), fastmtl.GradDrop()
    graph, out = captured(lambda: method(G))
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)
    positive, negative = G.to(F64).clamp_min(0).sum(0), G.to(F64).clamp_max(0).sum(0)
    assert (torch.minimum((out - positive).abs(), (out - negative).abs()) <= 1e-5).all()


# ------------------------------------------------------------------------------------------------ torch


def test_compile():
    method = fastmtl.AlignedMTL(weights="sum")
    G, rows = on_gpu(randn(3, 900)), on_gpu(ragged(3))
    compiled = torch.compile(lambda G, rows: (method(G), method(rows)), fullgraph=True, backend="aot_eager")
    g, gs = compiled(G, rows)
    assert torch.equal(g, method(G))
    assert same_bits(gs, method(rows))


def test_version_counter_and_inference_mode():
    G, out = on_gpu(randn(3, 900)), torch.empty(900, device="cuda")
    version = out._version
    expected = fastmtl.AlignedMTL()(G, out=out)
    assert out._version > version
    with torch.inference_mode():
        assert torch.equal(fastmtl.AlignedMTL()(G), expected)
    with pytest.raises(ValueError, match="overlap"):
        fastmtl.AlignedMTL()(G, out=G[0])

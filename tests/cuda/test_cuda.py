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
    DTYPES,
    F32,
    F64,
    condition,
    conditioned,
    contract,
    dense,
    dtype_id,
    flat,
    gram_error,
    randn,
    relative,
    residuals,
    rounded,
    svd_align,
    svd_rank,
)
from parity import SCALES, Parity, Torch, graded, policy

import fastmtl
from fastmtl import ops
from fastmtl.ops import reference
from fastmtl.pipeline import aggregate_rows

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


class TestCuda(Parity):
    """Kernels of every kind: few tasks, tiles of 16, 32 and 64 rows, and blocks of 64 beyond."""

    backends = (Torch(device="cuda", entries=1e8, blocks=lambda T, dtype: T > 8 and dtype is not F64),)


def on_gpu(x):
    """Tensors of nested lists on the GPU, in their own layouts."""
    if isinstance(x, torch.Tensor):
        return x.cuda()
    return x if x is None else [on_gpu(y) for y in x]


def on_cpu(x):
    if isinstance(x, torch.Tensor):
        return x.cpu()
    return x if x is None else [on_cpu(y) for y in x]


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


# ------------------------------------------------------------------------------------------------ what is there


def test_the_kernels_are_built_and_registered():
    assert ops.EXTENSIONS["_C_cuda"] is not None, "build with FASTMTL_CUDA=1"
    made_of_other_ops = {"unit_solve", "constant"}
    for name in {name for name in ops.__all__ if name.islower()} - made_of_other_ops:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmtl::{name}", "CUDA"), name


# ------------------------------------------------------------------------------------------------ balance, eigh


@pytest.mark.parametrize("T", [3, 17, 64, 100])
def test_balance_of_a_matrix_alone_and_in_a_batch_gives_the_same_bits(T):
    M, options = on_gpu(ops.gram(randn(3, T, 200, dtype=F64))), policy(T, F64)
    assert same_bits(ops.balance(M[0], *options)[0], ops.balance(M, *options)[0][0])


@dtypes
def test_strided_out(dtype):
    G = on_gpu(randn(8, 2049, dtype=dtype))
    out = torch.full((2 * 2049,), torch.nan, dtype=dtype, device="cuda")
    fastmtl.AlignedMTL()(G, out=out[::2])
    assert torch.equal(out[::2], fastmtl.AlignedMTL()(G))
    assert out[1::2].isnan().all()


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


@pytest.mark.parametrize("T", [3, 8, 16, 32, 33, 64])
def test_eigh_keeps_small_eigenvalues(T):
    """The CPU is that accurate up to 32: beyond, two such matrices that do not know of each other."""
    parts = [graded(T, 30)] if T <= 32 else [graded(T // 2, 30), 3 * graded(T - T // 2, 30)]
    expected = torch.cat([fastmtl.eigh(M)[0] for M in parts]).sort()[0]
    shuffle = torch.randperm(T)
    M = torch.block_diag(*parts)[shuffle][:, shuffle]
    lam = fastmtl.eigh(on_gpu(M))[0].cpu()
    assert ((lam - expected).abs() <= 1e-10 * expected).all()


# ------------------------------------------------------------------------------------------------ align


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
    with pytest.raises(ValueError, match=r"rows: expected gradients on one device for GradDrop.* on cuda:\d, cpu"):
        fastmtl.GradDrop()([[G[0], cpu[0]], [G[1], cpu[1]]])
    assert [g.device for g in method([[G[0], cpu[0]], [G[1], cpu[1]]])] == [G.device, cpu.device]
    with pytest.raises(ValueError, match=r"out\[0\]: expected .* on cuda:\d, got .* on cpu"):
        method(list(G), out=[torch.empty(10)])


def test_devices_must_agree_in_ops():
    G, M, alpha = (torch.ones(*shape, dtype=F64, device="cuda") for shape in ((2, 10), (2, 2), (2,)))
    w, out = torch.ones(2, dtype=F64), torch.empty(10, dtype=F64, device="cuda")
    _, *rest = policy(2, F64)
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
@pytest.mark.parametrize("T", [1, 3, 8, 12, 20, 40, 64, 65, 130])
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
        if T <= 65:
            fastmtl.eigh(M)


def test_ill_conditioned_gradients_do_not_wait():
    inputs = [on_gpu(conditioned(T, 20_000, 1e3, 1e3)) for T in (3, 20, 40, 64, 100)]
    inputs += [on_gpu(conditioned(T, 9000, 5.0, dtype=F64)) * 1e-200 for T in (3, 20, 64, 70)]
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


def test_graph_of_many_tasks():
    """Torch's own kernels are part of it. The replay, too, takes its own decision on a second pass."""
    method, (T, P) = fastmtl.AlignedMTL(), (100, 9000)
    G = on_gpu(randn(T, P))
    out = torch.empty(P, device="cuda")
    graph, _ = captured(lambda: method(G, out=out))
    for new in (randn(T, P, seed=1), conditioned(T, P, 100.0), torch.zeros(T, P), randn(T, 50) @ randn(50, P)):
        G.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        assert relative(out.cpu(), method(on_gpu(new)).cpu()) <= 1e-6
        assert relative(out.cpu(), svd_align(new)) <= 1e-4


def test_capture_of_a_large_eigh_is_refused():
    """Beyond 64 tasks that is LAPACK's, on the host: an error, not a graph of stale numbers."""
    script = """
import torch, fastmtl
M = torch.eye(70, dtype=torch.float64, device="cuda")
fastmtl.eigh(M)
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        fastmtl.eigh(M)
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

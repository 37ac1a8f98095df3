"""Ways to be silently wrong or slow that every other test would miss."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import BF16, EPS32, F64, gram_error, needs_extension, randn, relative, svd_align
from torch.profiler import ProfilerActivity, profile

import fastmtl
from fastmtl import ops

OPS = [name for name in ops.__all__ if name.islower()]
IN_PYTHON = ("balance_many", "second_pass")  # on every device: they are matrix products
COMPILED = [name for name in OPS if name not in IN_PYTHON]
POLICY = (None, "min", 1e-3, EPS32, "normalized")


# ------------------------------------------------------------------------------------------------ what really runs


def test_the_reference_stands_behind_every_device():
    """Registered for "CPU" it would silently replace the compiled kernels."""
    for name in OPS:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has(f"fastmtl::{name}", "CompositeExplicitAutograd"), name
        if ops.EXTENSIONS["_C"] is None:
            assert not has(f"fastmtl::{name}", "CPU"), name


@needs_extension
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_kernel_is_registered_for_the_cpu(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmtl::{name}", "CPU")
    registrations = [
        line for line in torch._C._dispatch_dump(f"fastmtl::{name}").splitlines() if line.startswith("CPU:")
    ]
    assert len(registrations) == 1
    assert ".py" not in registrations[0], registrations[0]


@needs_extension
def test_the_compiled_kernels_run():
    """The reference would leave its matrix products in a profile; the kernels leave nothing but allocations."""
    G = randn(8, 1000)
    rows = [list(r.split([400, 600])) for r in G]
    calls = {
        "gram": lambda: ops.gram(G),
        "gram_rows": lambda: ops.gram_rows([g for r in rows for g in r], 8),
        "balance": lambda: ops.balance(ops.gram(G), *POLICY),
        "align_gram": lambda: ops.align_gram(ops.gram(G), *POLICY),
        "combine": lambda: ops.combine(G, torch.ones(8, dtype=F64), out=torch.empty(1000)),
        "combine_rows": lambda: ops.combine_rows(list(G), torch.ones(8, dtype=F64), [torch.empty(1000)]),
        "align": lambda: fastmtl.AlignedMTL()(G),
        "align_rows": lambda: fastmtl.AlignedMTL()(rows),
        "eigh": lambda: fastmtl.eigh(torch.eye(8).expand(3, 8, 8)),
    }
    M, seed, out = torch.eye(8, dtype=F64), torch.tensor(1), torch.empty(1000)
    calls |= {
        "mgda": lambda: ops.mgda(M),
        "dual_cone": lambda: ops.dual_cone(M, None, True),
        "cagrad": lambda: ops.cagrad(M, 0.5),
        "nash": lambda: ops.nash(M, 1.0),
        "unit_solve": lambda: ops.unit_solve(M, None, 0.0),
        "constant": lambda: ops.constant(M, None),
        "pcgrad": lambda: ops.pcgrad(M, seed, True),
        "gradvac": lambda: ops.gradvac(M, seed, 0.5, M.clone()),
        "sign_drop": lambda: ops.sign_drop(G, seed, None, out),
        "sign_drop_rows": lambda: ops.sign_drop_rows(list(G), 8, seed, None, [out]),
    }
    assert set(calls) == set(COMPILED)
    for name, call in calls.items():
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            call()
        seen = {event.name for event in recorded.events()}
        assert f"fastmtl::{name}" in seen
        arithmetic = {
            "aten::matmul",
            "aten::mm",
            "aten::bmm",
            "aten::mul",
            "aten::add_",
            "aten::sum",
            "aten::stack",
            "aten::where",
        }
        assert not seen & arithmetic, name


# ------------------------------------------------------------------------------------------------ version counters


@pytest.mark.parametrize("form", ["matrix", "batch", "rows", "strided"])
def test_out_bumps_the_version_counter(form):
    """Otherwise autograd would not notice a saved tensor that was overwritten, and would return a wrong gradient."""
    m = fastmtl.AlignedMTL()
    G = randn(3, 10)
    out = {
        "matrix": torch.ones(10),
        "batch": torch.ones(2, 10),
        "rows": torch.ones(10),
        "strided": torch.ones(10, 2)[:, 0],
    }[form]
    x = torch.ones(out.shape, requires_grad=True)
    y = (x * out).sum()  # saves `out`
    version = out._version
    if form == "rows":
        m(list(G), out=[out])
    else:
        m(torch.stack([G, G]) if form == "batch" else G, out=out)
    assert out._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_results_are_no_part_of_a_graph():
    G = randn(3, 10).requires_grad_()
    with torch.no_grad():
        g = fastmtl.AlignedMTL()(G)
    assert not g.requires_grad
    assert g.grad_fn is None
    x = torch.ones(10, requires_grad=True)
    (x * g).sum().backward()  # a fresh result may be saved and used like any tensor
    assert torch.equal(x.grad, g)


# ------------------------------------------------------------------------------------------------ layouts


def test_layouts_that_differ_between_tasks():
    """A channels_last head makes gradients whose memory order differs from the others': products go by index."""
    values = torch.stack([randn(4, 3, 5, 6, seed=s) for s in range(3)])
    rows = [
        values[0],
        values[1].contiguous(memory_format=torch.channels_last),
        values[2].transpose(2, 3).contiguous().transpose(2, 3),
    ]
    assert len({g.stride() for g in rows}) == 3
    G = values.flatten(1)
    assert gram_error(ops.gram_rows(rows, 3), G) <= 1e-13
    (got,) = fastmtl.AlignedMTL()(rows)
    assert relative(got.reshape(-1), svd_align(G)) <= 2e-6


def test_layouts_that_differ_between_tasks_in_a_backward():
    weight = torch.nn.Parameter(randn(4, 3, 3, 3))
    x = randn(2, 3, 9, 9)

    def losses():
        first = torch.nn.functional.conv2d(x, weight)
        second = torch.nn.functional.conv2d(
            x.contiguous(memory_format=torch.channels_last), weight.contiguous(memory_format=torch.channels_last)
        )
        return [first.square().sum(), second.sin().sum(), (weight * weight.detach().permute(0, 1, 3, 2)).sum()]

    G = torch.stack([torch.autograd.grad(loss, weight)[0].reshape(-1) for loss in losses()])
    info = fastmtl.AlignedMTL().backward(losses(), [weight])
    assert relative(info.gram, G.to(F64) @ G.to(F64).T) <= 1e-6
    assert relative(weight.grad.reshape(-1), svd_align(G)) <= 5e-6
    assert weight.grad.stride() == weight.stride()


# ------------------------------------------------------------------------------------------------ copies and memory


COPIES = {
    "aten::cat",
    "aten::stack",
    "aten::clone",
    "aten::contiguous",
    "aten::copy_",
    "aten::to",
    "aten::_to_copy",
    "aten::reshape",
}


def allocated(call):
    """Bytes that torch allocates during a call, freed again or not, and how often which ops ran."""
    call()  # scratch that lives on is not counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    events = recorded.events()
    results = 1 if isinstance(result, torch.Tensor) else len(result)
    del result
    ran = Counter(e.name for e in events)
    ran["aten::copy_"] -= results  # of each result onto itself, which tells autograd that it was written
    return sum(max(e.self_cpu_memory_usage, 0) for e in events), +ran


def layouts():
    T, P = 6, 300_000
    sizes = [1, 100_000, 7, 199_992]
    buffer = randn(T, P + 100)
    half = buffer.to(BF16)
    yield "matrix", lambda m: m(buffer), (P + 100) * 4
    yield "row stride > P", lambda m: m(buffer[:, 50:-50]), P * 4
    yield "bfloat16", lambda m: m(half), (P + 100) * 2
    yield "views of one buffer", lambda m: m([list(r[:P].split(sizes)) for r in buffer]), P * 4
    yield (
        "matrices in one buffer",
        lambda m: m([[r[: P // 2].view(300, -1), r[P // 2 : P].view(-1, 50)] for r in buffer]),
        P * 4,
    )
    yield "separate tensors", lambda m: m([[x] for x in buffer.unbind()]), (P + 100) * 4
    yield (
        "missing entries",
        lambda m: m([[r[:P], None if t == 2 else r[P:]] for t, r in enumerate(buffer)]),
        (P + 100) * 4,
    )
    yield "batch", lambda m: m(buffer[:, : P // 10].view(2, 3, -1)), 2 * P // 10 * 4


LAYOUTS = list(layouts())


@needs_extension
@pytest.mark.parametrize(("name", "call", "result"), LAYOUTS, ids=[name for name, _, _ in LAYOUTS])
def test_gradients_are_read_in_place(name, call, result):
    m = fastmtl.AlignedMTL()
    total, ran = allocated(lambda: call(m))
    assert result <= total <= result + 2**20
    assert not ran.keys() & COPIES


@needs_extension
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_of_the_process():
    """What the kernels allocate themselves is not in torch's books: the peak of a fresh process is."""
    script = """
import sys, torch, fastmtl

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(2)
m = fastmtl.AlignedMTL()
T, P = int(sys.argv[1]), int(sys.argv[2])
m([list(r.split([500, 524])) for r in torch.randn(T, 1024)])  # code, threads and their stacks
m(torch.randn(T, 60_000))
flat = torch.randn(T, P)  # far more than anything before: the peak is now
sizes = [1000, P // 2, P - P // 2 - 1000]
rows = [list(r.split(sizes)) for r in flat]
before = peak()
result = m(rows)
print(peak() - before - 4 * P)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(fastmtl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    for T, P in ((8, 2_000_000), (48, 400_000)):
        command = [sys.executable, "-c", script, str(T), str(P)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        assert int(done.stdout) <= 2**20, (T, P)


# ------------------------------------------------------------------------------------------------ threads


def cpu_times():
    """CPU time of every thread of this process so far, in seconds."""
    times = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            times[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except (OSError, ValueError, IndexError):  # a thread that just ended
            continue
    return times


@needs_extension
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="CPU time per thread is read from /proc")
@pytest.mark.parametrize("name", ["gram", "combine", "align", "eigh"])
def test_kernels_share_their_work_between_threads(name):
    """A parallel_for that silently runs on one thread would pass every other test. Works on one core, too."""
    torch.set_num_threads(2)
    G, out = randn(12, 400_000), torch.empty(400_000)
    alpha = torch.ones(12, dtype=F64)
    A = randn(512, 16, 16, dtype=F64)
    M = A + A.mT
    call = {
        "gram": lambda: ops.gram(G),
        "combine": lambda: ops.combine(G, alpha, out=out),
        "align": lambda: ops.align(G, *POLICY, out=out),
        "eigh": lambda: ops.eigh(M),
    }[name]
    call()
    before, until = cpu_times(), time.monotonic() + 20
    while time.monotonic() < until:
        for _ in range(10):
            call()
        spent = {task: t - before.get(task, 0.0) for task, t in cpu_times().items()}
        if sum(spent.values()) > 0.3:
            break
    total = sum(spent.values())
    busy = [t for t in spent.values() if t > 0.2 * total]
    assert len(busy) == 2, spent

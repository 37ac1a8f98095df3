"""The host never waits for a GPU between the gradients and `.grad`: shown without one.

Fake CUDA tensors have a device but no numbers: code that asks for a number fails. A recorder sees every op that Python
calls and refuses those that wait. What the compiled ops do is checked by tests/cuda/test_cuda.py on a GPU, and here by
reading their source.
"""

import contextlib
import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from helpers import BF16, DTYPES, F16, F32, F64, dtype_id
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmtl
from fastmtl import catalog, inputs
from fastmtl.observe import diagnostics
from fastmtl.ops import reference

CSRC = Path(__file__).parents[2] / "csrc"
DOCS = Path(__file__).parents[2] / "docs" / "numerics.md"

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="fake CUDA tensors that require grad need a torch built with CUDA"
)


class Waits(AssertionError):
    pass


class Recorder(TorchDispatchMode):
    """Names every op in `ops`, and fails on one that makes the host wait for the device."""

    WAITING = frozenset(
        {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}
        | {"unique_consecutive", "bincount", "repeat_interleave", "allclose", "_linalg_check_errors", "_assert_async"}
    )

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "aten" and name in self.WAITING:
            raise Waits(f"{func} makes the host wait")
        result = func(*args, **(kwargs or {}))
        if namespace != "prim":
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            devices = {x.device.type for x in tensors}
            if len(devices) > 1:
                raise Waits(f"{func} moves numbers between {' and '.join(sorted(devices))}")
            self.ops.append(f"{namespace}::{name}")
        return result


@pytest.fixture(autouse=True)
def _fake_addresses(monkeypatch):
    """A fake tensor has no address: every storage gets one, so that the check for overlaps runs as it does on a GPU."""
    known = {}
    extent = inputs._extent

    def fake_extent(x):
        if not isinstance(x, torch._subclasses.FakeTensor):
            return extent(x)
        storage = x.untyped_storage()
        start, _ = known.setdefault(storage._cdata, (len(known) << 40, storage))  # kept, so that no address comes again
        start += x.storage_offset() * x.element_size()
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        return start, start + (last + 1) * x.element_size()

    monkeypatch.setattr(inputs, "_extent", fake_extent)


@pytest.fixture
def watch():
    with FakeTensorMode(), Recorder() as recorder:
        yield recorder


def cuda(*shape, dtype=F32):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def with_weights(weights, T):
    """A method as it is after its first call: the weights lie on the device."""
    if not isinstance(weights, list):
        return fastmtl.AlignedMTL(weights=weights)
    method = fastmtl.AlignedMTL()
    method.weights = cuda(T, dtype=F64)
    return method


# ------------------------------------------------------------------------------------------------ the net


@needs_cuda_build
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).copy_(x),
        lambda x: torch.tensor([1.0, 2.0, 3.0]).to(x.device),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.allclose(x, x + 1),
        lambda x: [1, 2][x.sum().int()],
        lambda x: "yes" if x.isfinite().all() else "no",
    ],
)
def test_the_net_catches_what_waits(watch, wait):
    x = cuda(3)
    with pytest.raises((Waits, DataDependentOutputException, DynamicOutputShapeException)):
        wait(x)


# ------------------------------------------------------------------------------------------------ the calls


@dtypes
@pytest.mark.parametrize("shape", [(3, 100), (1, 7), (64, 100), (65, 10), (5, 3, 100), (0, 3, 8), (3, 0)], ids=str)
def test_matrix(watch, dtype, shape):
    G = cuda(*shape, dtype=dtype)
    g = fastmtl.AlignedMTL()(G)
    assert (g.device.type, g.dtype, g.shape) == ("cuda", dtype, (*shape[:-2], shape[-1]))
    assert watch.ops == ["aten::empty", "aten::new_empty", "fastmtl::align"]


@needs_cuda_build
@dtypes
def test_out(watch, dtype):
    G, out = cuda(3, 100, dtype=dtype), cuda(100, dtype=dtype)
    watch.ops.clear()
    assert fastmtl.AlignedMTL()(G, out=out) is out
    assert watch.ops == ["fastmtl::align"]
    with pytest.raises(ValueError, match="overlap"):
        fastmtl.AlignedMTL()(G, out=G[0])
    G, out = cuda(2, 3, 100, dtype=dtype), cuda(100, 2, dtype=dtype).T
    watch.ops.clear()
    fastmtl.AlignedMTL()(G, out=out)
    assert watch.ops == ["fastmtl::align"]


@pytest.mark.parametrize("weights", [None, "mean", "sum", [1.0, 2.0, 3.0]], ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": "rmse", "rank_rule": "gram", "rtol": 1e-3}, {"scale": "median"}])
def test_options(watch, weights, options):
    method = with_weights(weights, 3)
    for name, value in options.items():
        setattr(method, name, value)
    G = cuda(3, 100)
    method(G)
    method(cuda(2, 3, 100))
    method(list(G))
    method.weighting(cuda(3, 3))
    assert watch.ops.count("fastmtl::align") == 2
    assert {"fastmtl::align_rows", "fastmtl::align_gram"} < set(watch.ops)


@dtypes
def test_rows(watch, dtype):
    m = fastmtl.AlignedMTL()
    (g,) = m(list(cuda(3, 100, dtype=dtype)))
    assert (g.shape, g.dtype, g.device.type) == ((100,), dtype, "cuda")
    rows = [[cuda(3, 4, dtype=dtype), None if t == 1 else cuda(7, dtype=dtype), None, cuda(2)] for t in range(3)]
    results = m(rows)
    assert [None if g is None else g.shape for g in results] == [(3, 4), (7,), None, (2,)]
    m([rows[0], None, rows[2]])
    outs = [torch.empty_like(g) if g is not None else None for g in results]
    watch.ops.clear()
    m(rows, out=outs)
    assert watch.ops == ["aten::empty", "fastmtl::align_rows"]  # the first for the column without any gradient


@needs_cuda_build
def test_mixed_dtypes_and_layouts(watch):
    def row():
        return [cuda(4, 3, 5, 5), cuda(7, dtype=BF16), cuda(3, dtype=F64), cuda(8, dtype=F16)]

    rows = [row(), row(), row()]
    rows[1][0] = rows[1][0].contiguous(memory_format=torch.channels_last)
    watch.ops.clear()
    fastmtl.AlignedMTL()(rows)
    assert watch.ops == ["aten::empty_like"] * 4 + ["fastmtl::align_rows"]


@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)
@pytest.mark.parametrize("shape", [(3, 3), (64, 64), (5, 8, 8), (2, 65, 65)], ids=str)
def test_weighting_and_eigh(watch, dtype, shape):
    M = cuda(*shape, dtype=dtype)
    watch.ops.clear()
    alpha = fastmtl.AlignedMTL().weighting(M)
    assert (alpha.shape, alpha.dtype, alpha.device.type) == (shape[:-1], F64, "cuda")
    assert watch.ops == ["fastmtl::align_gram"]
    watch.ops.clear()
    eigenvalues, eigenvectors = fastmtl.eigh(M)
    assert (eigenvalues.shape, eigenvectors.shape) == (shape[:-1], shape)
    assert watch.ops == ["fastmtl::eigh"]


def test_every_op(watch):
    """Also what only `fastmtl.ops` offers."""
    ops, policy = fastmtl.ops, (None, "min", 1e-3, 1e-7, "normalized")
    G, out, alpha, M = cuda(3, 100), cuda(100), cuda(3, dtype=F64), cuda(3, 3, dtype=F64)
    watch.ops.clear()
    ops.gram(G)
    ops.gram_rows(list(G), 3)
    ops.balance(M, *policy)
    ops.balance_many(M, *policy)
    ops.second_pass(M, cuda((), dtype=F64), True)
    ops.align_gram(M, *policy)
    ops.combine(G, alpha, out)
    ops.combine_rows(list(G), alpha, [out])
    ops.align(G, *policy, out)
    ops.align_rows(list(G), 3, *policy, [out])
    ops.eigh(M)
    seed = cuda((), dtype=torch.int64)
    ops.mgda(M)
    ops.dual_cone(M, alpha, True)
    ops.cagrad(M, 0.5)
    ops.nash(M, 1.0)
    ops.unit_solve(M, None, 1e-6)
    ops.constant(M, alpha)
    ops.pcgrad(M, seed, True)
    ops.gradvac(M, seed, 0.5, cuda(3, 3, dtype=F64))
    ops.sign_drop(G, seed, None, out)
    ops.sign_drop_rows(list(G), 3, seed, None, [out])
    assert {name for name in watch.ops if name.startswith("fastmtl")} == {
        f"fastmtl::{name}" for name in ops.__all__ if name.islower()
    }


# ------------------------------------------------------------------------------------------------ many tasks

# For T > 64 these ops ask the host, and so do the methods that need them: docs/numerics.md says so.
WAITING = {"eigh", "mgda", "dual_cone", "cagrad", "nash"}
SPECTRAL = {"aligned_gram", "condition_number", "rank", "singular_values", "stable_rank", "summary"}  # need eigenvalues


@needs_cuda_build
@pytest.mark.parametrize(("T", "scale", "rank_rule"), [(65, "min", "normalized"), (130, "median", "gram")])
def test_ops_of_many_tasks(watch, T, scale, rank_rule):
    """What the kernels of Aligned-MTL leave to Python: the functions themselves, on fake CUDA tensors."""
    M, bound = cuda(2, T, T, dtype=F64), cuda(2, dtype=F64)
    results = reference.balance_many(M, cuda(T, dtype=F64), scale, 1e-3, 1e-7, rank_rule)
    assert {x.device.type for x in results} == {"cuda"}
    reference.second_pass(M, bound, True)
    reference.second_pass(M, bound, False)
    reference.unit_solve(M, cuda(T, dtype=F64), 1e-6)
    reference.constant(M, None)
    assert not [name for name in watch.ops if name.startswith("fastmtl")]
    # One Cholesky factorisation waits for the one before: what a step takes is their number.
    assert watch.ops.count("aten::linalg_cholesky_ex") <= (3 * 38 + 3 + 38) * -(-T // 128)


@needs_cuda_build
def test_what_waits_for_many_tasks_is_said():
    """Every method on 65 gradients: none moves a number to the host itself, and the ops that do are the known ones."""
    entries = [entry for entry in catalog.entries() if not entry.name.startswith("scalarization.")]
    made = [(entry.name, catalog.make(entry.make), 2 if entry.state else 1) for entry in entries]
    waiting = set()
    for name, method, steps in made:
        with FakeTensorMode(), Recorder() as recorder:
            for _ in range(steps):  # the second with what the first has left
                method(cuda(65, 10), losses=list(cuda(65).unbind()))
        if {f"fastmtl::{op}" for op in WAITING} & set(recorder.ops):
            waiting.add(name)
    told = re.search(r"For T > 64 some methods solve on the CPU, which waits: ([^.;]*)[.;]", DOCS.read_text())
    assert set(re.findall(r"`(\w+)`", told[1])) == waiting


@pytest.mark.skipif(not CSRC.is_dir(), reason="the tests run without the source tree")
def test_which_ops_wait_for_many_tasks():
    solvers = [path.read_text() for path in sorted((CSRC / "math").glob("*.h"))]
    named = {name: "kManyTasks = true" in text for text in solvers for name in re.findall(r'kName = "(\w+)"', text)}
    assert {name for name, many in named.items() if not many} == WAITING - {"eigh"}
    waits = [
        line for path in (CSRC / "ops").glob("*cuda*") for line in path.read_text().splitlines() if EXCEPTION in line
    ]
    assert len(waits) == 1


# ------------------------------------------------------------------------------------------------ backward


class Model(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.trunk = torch.nn.Sequential(torch.nn.Linear(4, 6, device=device), torch.nn.Tanh())
        self.heads = torch.nn.ModuleList(torch.nn.Linear(6, 1, device=device) for _ in range(3))
        self.scale = torch.nn.Parameter(torch.empty((), device=device))  # reached by all losses, shared by none

    def losses(self, x):
        h = self.trunk(x) * self.scale
        return [head(h).square().mean() for head in self.heads]


@needs_cuda_build
@pytest.mark.parametrize("weights", [None, "sum", [1.0, 2.0, 3.0]], ids=str)
@pytest.mark.parametrize("scale_heads", [False, True])
def test_backward_from_gradients_to_the_commit(watch, monkeypatch, weights, scale_heads):
    """torch's engine refuses fake CUDA tensors where there is no GPU: its two calls are replaced, nothing else is."""
    committed = []

    def grad(loss, inputs, **_):
        return [torch.empty_like(p) for p in inputs]

    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr("fastmtl.training.backward.commit", lambda updates, _: committed.extend(p for p, _ in updates))
    model = Model("cuda")
    losses = model.losses(cuda(5, 4))
    method = with_weights(weights, 3)
    info = method.backward(losses, shared=model.trunk.parameters(), scale_heads=scale_heads)
    assert {id(p) for p in committed} == {id(p) for p in model.parameters()}
    assert all(x.device.type == "cuda" for x in vars(info).values() if isinstance(x, torch.Tensor))
    assert watch.ops.count("fastmtl::align_rows") == 1


@pytest.mark.parametrize("weights", [None, "sum", [1.0, 2.0, 3.0]], ids=str)
@pytest.mark.parametrize("scale_heads", [False, True])
def test_backward_on_meta(weights, scale_heads):
    """The whole of it with torch's engine, on the other device whose tensors have no numbers."""
    model = Model("meta")
    x = torch.empty(5, 4, device="meta")
    method = fastmtl.AlignedMTL(weights=weights)
    method.backward(model.losses(x), shared=model.trunk.parameters())  # the first call places the weights
    for _ in range(2):  # `.grad` is there and is added to
        with Recorder() as recorder:
            method.backward(model.losses(x), shared=model.trunk.parameters(), scale_heads=scale_heads)
        assert recorder.ops.count("fastmtl::align_rows") == 1
    assert all(p.grad.device.type == "meta" for p in model.parameters())


# ------------------------------------------------------------------------------------------------ methods and paths


@needs_cuda_build
@pytest.mark.parametrize("T", [3, 64])
def test_no_method_waits(T):
    """On a matrix, and, which takes time here, on a few lists; also with what the steps before have left."""
    for entry in catalog.entries():
        if entry.name.startswith("scalarization."):
            continue
        of_lists, of_a_matrix = catalog.make(entry.make), catalog.make(entry.make)
        with FakeTensorMode(), Recorder():
            for _ in range(3 if T < 64 else 0):
                rows = [[cuda(4, 3), cuda(7)] for _ in range(T)]
                results = of_lists(rows, losses=list(cuda(T).unbind()))
                assert {g.device.type for g in results} == {"cuda"}, entry.name
            for _ in range(2):
                assert of_a_matrix(cuda(T, 10), losses=cuda(T)).device.type == "cuda", entry.name


@needs_cuda_build
@pytest.mark.parametrize("T", [3, 65])
def test_what_watches_does_not_wait(watch, T):
    """Every diagnostic of an info and of a Gram matrix; a monitor until its buffer is full, a live table beside it."""
    M = cuda(T, T, dtype=F64)
    info = fastmtl.Info(T, device="cuda")
    for x in (M, info, M.float(), M.expand(2, T, T)):
        for name in diagnostics.__all__:
            if not (T > 64 and name in SPECTRAL):
                getattr(diagnostics, name)(x)
    monitor = fastmtl.Monitor(buffer=100)
    for step in range(5):
        monitor(info, list(cuda(T).unbind()), step=step)
    assert not [name for name in watch.ops if name == "fastmtl::eigh" and T > 64]


@needs_cuda_build
def test_mixed_devices_are_named():
    """Two GPUs in one call: what says so before any kernel runs; emulation/test_fake_devices.py has the kernels'."""

    def on(device, *shape, dtype=F32):
        return torch.empty(*shape, dtype=dtype, device=f"cuda:{device}")

    method, policy = fastmtl.AlignedMTL(), ("min", 1e-3, 1e-7, "normalized")
    with FakeTensorMode():
        seed, M = on(0, 1, dtype=torch.int64)[0], on(0, 3, 3, dtype=F64)
        for call in (
            lambda: method([on(0, 5), on(1, 5)]),
            lambda: method([[on(0, 5), on(0, 3)], [on(0, 5), on(1, 3)]]),
            lambda: method(on(0, 3, 5), out=on(1, 5)),
            lambda: method([on(0, 5), on(0, 5)], out=[on(1, 5)]),
            lambda: fastmtl.GradDrop()([[on(0, 5), on(1, 3)], [on(0, 5), on(1, 3)]]),
            lambda: fastmtl.ops.gram_rows([on(0, 5), on(0, 3), on(1, 5), on(1, 3)], 2),
            lambda: fastmtl.ops.align_gram(M, on(1, 3, dtype=F64), *policy),
            lambda: fastmtl.ops.pcgrad(on(1, 3, 3), seed, True),
            lambda: fastmtl.ops.gradvac(M, seed, 0.5, on(1, 3, 3, dtype=F64)),
            lambda: fastmtl.ops.combine(on(0, 3, 5), on(1, 3, dtype=F64), on(0, 5)),
            lambda: fastmtl.ops.sign_drop(on(0, 3, 5), seed, on(1, 3, dtype=F64), on(0, 5)),
        ):
            with pytest.raises((ValueError, RuntimeError)) as error:
                call()
            assert {"cuda:0", "cuda:1"} <= set(re.findall(r"cuda:\d", str(error.value))), str(error.value)


META_WAYS = {
    "shared": lambda m, s: m.backward(s.losses(), s.trunk.parameters()),
    "found": lambda m, s: m.backward(s.losses()),
    "gramian": lambda m, s: m.backward(s.losses(), s.trunk.parameters(), engine="gramian"),
    "auto": lambda m, s: m.backward(s.losses(), s.trunk.parameters(), engine="auto"),
    "every": lambda m, s: m.backward(s.losses(), s.trunk.parameters(), every=2),
    "representation": lambda m, s: m.backward(s.losses(h := s.forward()), representation=h),
    "features": lambda m, s: m.backward(s.losses(h := s.forward()), features=h),
    "batched": lambda m, s: m.backward(s.losses(h := s.forward()), features=h, batched=True),
    "groups": lambda m, s: m.backward(s.losses(), groups=[list(s.trunk[k].parameters()) for k in (0, 2)]),
    "fan_out": lambda m, s: s.fan_out(m),
    "hooks": lambda m, s: s.fan_out(m, via="hooks"),
    "accumulate": lambda m, s: s.accumulate(m),
}


class Steps:
    """A trunk of two layers and T heads on the meta device, whose tensors have no numbers: engines run on it."""

    def __init__(self, T):
        self.trunk = torch.nn.Sequential(*(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5))).to("meta")
        self.heads = torch.nn.ModuleList(torch.nn.Linear(5, 1) for _ in range(T)).to("meta")

    def forward(self):
        return self.trunk(torch.empty(7, 4, device="meta"))

    def losses(self, h=None):
        h = self.forward() if h is None else h
        return [head(h).square().mean() for head in self.heads]

    def fan_out(self, method, **options):
        hs = fastmtl.fan_out(self.forward(), len(self.heads), method, **options)
        hs.total([head(h).square().mean() for head, h in zip(self.heads, hs, strict=True)]).backward()

    def accumulate(self, method):
        batches = method.accumulate(list(self.trunk.parameters()))
        for _ in range(2):
            batches.add(self.losses())
        batches.backward()


@pytest.mark.parametrize(
    ("way", "T"), [*((way, 3) for way in META_WAYS), ("shared", 66), ("gramian", 66), ("fan_out", 66)]
)
def test_no_path_of_backward_waits(monkeypatch, way, T):
    """From the losses to `.grad`, with torch's engine, whatever has to be known of numbers and devices."""
    known = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: device != ("meta",) and known(*device))
    steps, method = Steps(T), fastmtl.AlignedMTL(weights=[1.0] * T)
    META_WAYS[way](method, steps)
    for _ in range(2):
        with Recorder() as recorder:
            META_WAYS[way](method, steps)
        assert [name for name in recorder.ops if name.startswith("fastmtl::")] or way == "every"
    assert all(p.grad.device.type == "meta" for p in (*steps.trunk.parameters(), *steps.heads.parameters()))


def test_no_method_on_losses_waits():
    """On the meta device, where a module can be moved to without a GPU."""
    for entry in catalog.entries():
        if entry.name.startswith("scalarization."):
            made = catalog.make(entry.make, tasks=3) if "tasks" in entry.options else catalog.make(entry.make)
            method, steps = made.to("meta"), Steps(3)
            for step in range(3):
                with Recorder() if step else contextlib.nullcontext():  # the first places weights
                    method.backward(steps.losses(), steps.trunk.parameters())
            assert steps.trunk[0].weight.grad.device.type == "meta", entry.name


def test_the_check_of_examples_waits_and_is_said():
    """Which rows are whose is decided in Python, from numbers: the one path of `backward` that asks for them."""
    steps, method = Steps(1), fastmtl.AlignedMTL()
    losses = steps.heads[0](steps.forward()).square().squeeze(1)
    with pytest.raises((Waits, RuntimeError), match=r"item|moves numbers"), Recorder():
        method.backward(losses, batch_dim=0)
    assert "the host waits" in DOCS.with_name("per-example.md").read_text()


# ------------------------------------------------------------------------------------------------ weights


def meta(*shape):
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize("weights", ["sum", [1.0, 2.0, 3.0]], ids=str)
def test_weights_are_placed_once_a_device(weights):
    method = fastmtl.AlignedMTL(weights=weights)
    out = meta(100)
    G, M = meta(3, 100), torch.empty(3, 3, dtype=F64, device="meta")
    method(G, out=out)
    with Recorder() as recorder:
        method(G, out=out)
        method.weighting(M)
    assert recorder.ops == ["fastmtl::align", "fastmtl::align_gram"]
    assert [device.type for _, device in method._copies._placed] == ["meta"]


def test_weights_of_the_cpu_are_used_where_they_are():
    method = fastmtl.AlignedMTL(weights=[1.0, 2.0, 3.0])
    method(torch.randn(3, 10))
    assert not len(method._copies)
    assert method._policy(3, F32, torch.randn(3, 10))[0] is method.weights


def test_sum_for_several_numbers_of_tasks():
    method = fastmtl.AlignedMTL(weights="sum")
    for T in (2, 5, 2, 5):
        w = method._policy(T, F32, torch.randn(T, 10))[0]
        assert torch.equal(w, torch.ones(T, dtype=F64))
        assert method._policy(T, F32, torch.randn(T, 10))[0] is w
    assert len(method._copies) == 2


def test_new_weights_are_not_those_that_were_placed():
    method = fastmtl.AlignedMTL(weights="sum")
    G = torch.randn(3, 10)
    before = method(G)
    method.weights = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    assert torch.equal(method(G), fastmtl.AlignedMTL(weights=[1, 0, 0])(G))
    method.weights = "sum"
    assert torch.equal(method(G), before)


def test_placed_under_inference_mode():
    method = fastmtl.AlignedMTL(weights="sum")
    with torch.inference_mode():
        method(torch.randn(3, 10))
    (w,) = method._copies._placed.values()
    assert not w.is_inference()


def test_nothing_fake_is_kept():
    method = fastmtl.AlignedMTL(weights="sum")
    with FakeTensorMode():
        method(torch.empty(3, 10))
        method(cuda(3, 10))
    torch.compile(lambda G: method(G), fullgraph=True, backend="aot_eager")(torch.randn(3, 10))
    assert not len(method._copies)
    method(torch.randn(3, 10))
    assert [type(w) for w in method._copies._placed.values()] == [torch.Tensor]
    with FakeTensorMode():
        method(torch.empty(3, 10))


@pytest.mark.parametrize("transfer", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
@pytest.mark.parametrize("weights", ["sum", [1.0, 2.0, 3.0]], ids=str)
def test_copies_place_their_own(weights, transfer):
    method = fastmtl.AlignedMTL(weights=weights)
    method(meta(3, 100))
    again = transfer(method)
    assert len(method._copies)
    assert not len(again._copies)
    again(meta(3, 100))
    again(torch.randn(3, 100))
    assert again._copies is not method._copies


# ------------------------------------------------------------------------------------------------ the sources

WAITING_CALLS = re.compile(
    r"\b(cudaDeviceSynchronize|cudaStreamSynchronize|cudaEventSynchronize|cudaMemcpy(?=\()|cudaMemset(?=\()"
    r"|cudaMalloc(?=\()|cudaFree(?=\())|\.item\(|\bto\([^;]*\bkHost\b"
)
EXCEPTION = "// waits: many tasks"


def waiting_calls(text):
    """(line number, line) of calls that make the host wait.

    The comment EXCEPTION excuses its own line; on a line by itself, all down to the first line that is indented less.
    """
    found = []
    excused = None  # least indentation of the region
    for number, line in enumerate(text.splitlines(), 1):
        code, _, _ = line.partition("//")
        indentation = len(line) - len(line.lstrip())
        if line.strip() and excused is not None and indentation < excused:
            excused = None
        if EXCEPTION in line and not code.strip():
            excused = indentation
        if WAITING_CALLS.search(code) and EXCEPTION not in line and excused is None:
            found.append((number, line.strip()))
    return found


@pytest.mark.skipif(not CSRC.is_dir(), reason="the tests run without the source tree")
def test_the_sources_do_not_wait():
    sources = [*sorted((CSRC / "cuda").iterdir()), *sorted((CSRC / "ops").glob("*cuda*"))]
    assert len(sources) > 10
    assert not [(path.name, *call) for path in sources for call in waiting_calls(path.read_text())]


def test_what_the_sources_are_searched_for():
    text = """
  cudaStreamSynchronize(stream);
  cudaMemcpyAsync(a, b, n, kind, stream);
  cudaMemcpy(a, b, n, kind); // waits: many tasks
  if (T > 64) {
    // waits: many tasks
    cudaMemcpy(a, b, n, kind);

    x.item();
  }
  // cudaDeviceSynchronize() is not called
  cudaEventSynchronize(event);
  x.item<double>();
  x.item();
  y = torch::stable::to(x, kHost);
"""
    assert [number for number, _ in waiting_calls(text)] == [2, 12, 14, 15]

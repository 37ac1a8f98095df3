"""The methods that see only the losses: each against its formula, and what they share over all of them."""

import copy
import inspect
import io
import math
import pickle
from collections import Counter

import pytest
import torch
from helpers import BF16, F16, F32, F64, dtype_id, generator, randn
from test_cuda_python import Recorder
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmtl import GradVac, NashMTL
from fastmtl.scalarization import (
    COSMOS,
    DWA,
    FAMO,
    GLS,
    IMTLL,
    LS,
    NTK,
    PBI,
    RLW,
    STCH,
    GO4Align,
    GradNorm,
    PiKE,
    ReLoBRaLo,
    Scalarization,
    SoftAdapt,
    Uncertainty,
)

METHODS = {
    "LS": lambda T: LS(),
    "LS sum": lambda T: LS(weights="sum"),
    "LS numbers": lambda T: LS(weights=[1.0 + t for t in range(T)]),
    "RLW": lambda T: RLW(),
    "RLW uniform": lambda T: RLW(distribution="uniform"),
    "RLW dirichlet": lambda T: RLW(distribution="dirichlet"),
    "RLW bernoulli": lambda T: RLW(distribution="bernoulli"),
    "RLW one": lambda T: RLW(distribution="constrained_bernoulli"),
    "RLW generator": lambda T: RLW(generator=generator(7)),
    "DWA": lambda T: DWA(T),
    "DWA window": lambda T: DWA(T, temperature=1.0, window=3),
    "Uncertainty": lambda T: Uncertainty(T),
    "Uncertainty -0.5": lambda T: Uncertainty(T, initial=-0.5),
    "GLS": lambda T: GLS(),
    "STCH": lambda T: STCH(),
    "STCH numbers": lambda T: STCH(mu=0.5, weights=[0.5 + t for t in range(T)], reference=[-0.1 * t for t in range(T)]),
    "STCH warm-up": lambda T: STCH(mu=1.0, warmup=1, tasks=T),
    "IMTLL": lambda T: IMTLL(T),
    "FAMO": lambda T: FAMO(T),
    "FAMO bounds": lambda T: FAMO(T, lr=0.1, weight_decay=0.01, min_losses=[-0.5 - t for t in range(T)]),
    "GradNorm": lambda T: GradNorm(T),
    "GradNorm initial": lambda T: GradNorm(T, alpha=0.5, lr=0.1, initial_losses=[1.0 + t for t in range(T)]),
    "COSMOS": lambda T: COSMOS(),
    "COSMOS numbers": lambda T: COSMOS(weights=[0.5 + t for t in range(T)], lam=0.1),
    "PBI": lambda T: PBI(theta=0.1),
    "GO4Align": lambda T: GO4Align(T),
    "SoftAdapt": lambda T: SoftAdapt(T),
    "SoftAdapt weighted": lambda T: SoftAdapt(T, variant="loss-weighted"),
    "ReLoBRaLo": lambda T: ReLoBRaLo(T),
    "NTK": lambda T: NTK(T),
    "PiKE": lambda T: PiKE(T, weights=[1.0 + t for t in range(T)]),
}
# Those whose state_dict holds what a run depends on, apart from torch's random numbers.
STATEFUL = [m for m in METHODS if m.startswith(("DWA", "Unc", "STCH w", "IMTLL", "FAMO", "GradNorm", "RLW gen"))]
methods = pytest.mark.parametrize("name", METHODS)


class Run:
    """A training run of a small model with positive losses, four steps an epoch."""

    def __init__(self, name, T=3, dtype=F32, device="cpu"):
        torch.manual_seed(3)
        self.shared = nn.Linear(4, 5).to(device, dtype)
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(T)).to(device, dtype)
        self.method = METHODS[name](T).to(device)
        self.optimizer = torch.optim.SGD([*self.model.parameters(), *self.method.parameters()], lr=0.02, momentum=0.9)
        self.done = 0

    @property
    def model(self):
        return nn.ModuleList([self.shared, self.heads])

    def losses(self, k=0):
        like = self.shared.weight
        x = randn(6, 4, dtype=like.dtype, seed=k).to(like.device)
        h = self.shared(x).tanh()
        return [3.0**t * (head(h) - 1 - t).square().mean() for t, head in enumerate(self.heads)]

    def scalar(self, losses, **options):
        return self.method(losses, *self.layer(), **options)

    def layer(self):
        return [self.shared.weight] if isinstance(self.method, GradNorm) else []

    def steps(self, n):
        for _ in range(n):
            self.optimizer.zero_grad()
            self.method.backward(self.losses(self.done), self.layer())
            self.optimizer.step()
            if isinstance(self.method, FAMO):
                with torch.no_grad():
                    self.method.update(self.losses(self.done))
            self.done += 1
            if self.done % 4 == 0 and self.counts_epochs:
                self.method.end_epoch()
        return self

    @property
    def counts_epochs(self):
        return getattr(self.method, "warmup", None) is not None or getattr(self.method, "window", 1) is None

    def saved(self):
        parts = {name: getattr(self, name).state_dict() for name in ("shared", "heads", "method", "optimizer")}
        file = io.BytesIO()
        torch.save({**parts, "done": self.done, "random": torch.get_rng_state()}, file)
        return file

    def restored(self, file):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        for name in ("shared", "heads", "method", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.done = state["done"]
        torch.set_rng_state(state["random"])
        return self


def state_of(method):
    return {key: value.clone() for key, value in method.state_dict().items()}


def same(a, b):
    """Bit for bit, NaN included."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def equal(a, b):
    try:
        same(a, b)
    except AssertionError:
        return False
    return True


def tensor(*values, dtype=F64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


# ------------------------------------------------------------------------------------------------ all of them


@methods
def test_resumes_bit_for_bit(name):
    torch.manual_seed(11)
    run = Run(name).steps(7)
    file = run.saved()
    run.steps(8)
    fresh = Run(name).restored(file).steps(8)
    same(fresh.model.state_dict(), run.model.state_dict())
    same(state_of(fresh.method), state_of(run.method))
    same(fresh.method.last_weights, run.method.last_weights)


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_is_what_a_run_resumes_from(name):
    """Without the method's state the second half of the run differs: the test above can fail."""
    run = Run(name).steps(7)
    file = run.saved()
    run.steps(8)
    fresh = Run(name).restored(file)
    fresh.method = METHODS[name](3)
    fresh.steps(8)
    assert not equal(fresh.model.state_dict(), run.model.state_dict())


@methods
def test_copies_go_on_alike(name):
    run = Run(name).steps(6)
    twin = copy.deepcopy(run)
    random = torch.get_rng_state()
    run.steps(5)
    torch.set_rng_state(random)
    twin.steps(5)
    same(twin.model.state_dict(), run.model.state_dict())
    same(state_of(twin.method), state_of(run.method))


@pytest.mark.parametrize("name", [m for m in METHODS if m != "RLW generator"])
def test_pickles(name):
    """As part of a model that is saved as a whole, or sent to another process."""
    method = Run(name).steps(2).method
    other = pickle.loads(pickle.dumps(method))
    assert torch.equal(other.last_weights, method.last_weights)
    same(state_of(other), state_of(method))


@pytest.mark.parametrize("name", [m for m in STATEFUL if m != "RLW generator"])
def test_reset(name):
    run = Run(name)
    new = state_of(run.method)
    run.steps(9)
    assert not equal(state_of(run.method), new)
    run.method.reset()
    same(state_of(run.method), new)


@methods
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=dtype_id)
def test_weights_are_the_derivative(name, dtype):
    run = Run(name, dtype=F64).steps(9)
    L = torch.stack(run.losses(9)).to(dtype)
    value = run.scalar(L)
    (derivative,) = torch.autograd.grad(value, L)
    assert value.shape == ()
    assert value.dtype is (F64 if dtype is F64 else F32)
    assert run.method.last_weights.dtype is value.dtype
    assert not run.method.last_weights.requires_grad
    torch.testing.assert_close(run.method.last_weights.to(dtype), derivative)


@pytest.mark.parametrize("name", ["LS", "GLS", "STCH", "STCH numbers", "COSMOS", "COSMOS numbers", "PBI"])
@pytest.mark.parametrize("absent", [False, True])
def test_derivatives_of_any_order(name, absent):
    """Of the formula's own derivatives too, where one node of the graph stands for all of its operations."""
    method = METHODS[name](4)

    def f(*losses):
        return method([*losses, None] if absent else torch.stack([*losses, losses[0].sin() + 2]))

    losses = [torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.7, 1.9, 0.4)]
    assert torch.autograd.gradcheck(f, losses)
    assert torch.autograd.gradgradcheck(f, losses)


@pytest.mark.parametrize("name", ["GLS", "STCH", "COSMOS", "PBI", "FAMO", "DWA"])
def test_within_a_compiled_step(name):
    """One graph, with the operations that one node stands for elsewhere."""
    method, other = METHODS[name](3), METHODS[name](3)
    compiled = torch.compile(lambda L: other(L), backend="eager", fullgraph=True)
    for k in range(2):
        L = tensor(0.7, 1.9, 0.4 + k)
        values = method(L), compiled(L)
        slopes = [torch.autograd.grad(value, L)[0] for value in values]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*slopes)
        torch.testing.assert_close(method.last_weights, other.last_weights)
    torch.testing.assert_close(state_of(method), state_of(other), equal_nan=True)


def test_second_derivatives_of_famo():
    """Its weights z and c are constants."""
    L = tensor(0.7, 1.9, 0.4)
    method = FAMO(3)
    (first,) = torch.autograd.grad(method(L), L, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), L)
    torch.testing.assert_close(second, -method.last_weights / (L.detach() + 1e-8))


@methods
def test_a_tensor_or_scalars(name):
    run, twin = Run(name).steps(5), Run(name).steps(5)
    torch.manual_seed(1)
    first = run.scalar(run.losses(5))
    torch.manual_seed(1)
    same(twin.scalar(torch.stack(twin.losses(5))), first)
    same(state_of(twin.method), state_of(run.method))


@methods
def test_backward_is_the_backward_pass_of_the_call(name):
    run, twin = Run(name), Run(name)
    torch.manual_seed(1)
    info = run.method.backward(run.losses(), run.layer(), retain_graph=True)
    torch.manual_seed(1)
    twin.scalar(twin.losses()).backward()
    for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    same(info.alpha, twin.method.last_weights.to(F64))


@methods
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_losses(name, value):
    run = Run(name).steps(7)
    before = state_of(run.method)
    losses = run.losses(7)
    losses[1] = losses[1] + value
    run.optimizer.zero_grad()
    result = run.scalar(losses)
    result.backward()
    assert not result.isfinite()
    assert not any(p.grad.isfinite().any() for p in run.shared.parameters())
    if isinstance(run.method, FAMO):
        run.method.update([loss.detach() for loss in losses])
    if not isinstance(run.method, RLW):  # whose generator has moved on
        same(state_of(run.method), before)


@pytest.mark.cover(1)
@methods
@pytest.mark.parametrize("S", [2.0**16, 1000.0, torch.tensor(3e-4), torch.tensor([2.0**-10], dtype=F64)], ids=str)
def test_grad_scale(name, S):
    """S times the gradient of unscaled losses, and the state of unscaled losses."""
    run, twin = Run(name, dtype=F64), Run(name, dtype=F64)
    for k in range(6):
        for r in (run, twin):
            torch.manual_seed(k)
            r.optimizer.zero_grad()
            if r is run:
                r.method.backward([S * loss.reshape(S.shape if torch.is_tensor(S) else ()) for loss in r.losses(k)],
                                  r.layer(), grad_scale=S)  # fmt: skip
                for p in [*r.model.parameters(), *r.method.parameters()]:
                    if p.grad is not None:
                        p.grad /= S
            else:
                r.method.backward(r.losses(k), r.layer())
            r.optimizer.step()
            if isinstance(r.method, FAMO):
                factor = float(S) if r is run else 1.0
                r.method.update([factor * loss.detach() for loss in r.losses(k)], grad_scale=factor)
            if r.counts_epochs and k % 2:
                r.method.end_epoch()
        torch.testing.assert_close(run.model.state_dict(), twin.model.state_dict(), rtol=1e-6, atol=1e-9)
    ours, its = state_of(run.method), state_of(twin.method)
    torch.testing.assert_close(ours, its, rtol=1e-6, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(run.method.last_weights, twin.method.last_weights, rtol=1e-6, atol=1e-9)


@methods
def test_evaluation_leaves_the_state(name):
    run = Run(name).steps(6)
    run.method.eval()
    before = state_of(run.method)
    with torch.no_grad():
        value = run.method(run.losses(99))
    assert value.isfinite()
    if not isinstance(run.method, RLW):
        same(state_of(run.method), before)


@methods
def test_one_task(name):
    run = Run(name, T=1, dtype=F64).steps(6)
    (loss,) = run.losses(6)
    value = run.scalar([loss])
    assert value.isfinite()
    fixed = {"LS": loss, "LS sum": loss, "GLS": loss, "STCH": loss, "GradNorm": loss, "DWA": loss, "RLW": loss}
    if name in fixed or name.startswith("RLW"):
        torch.testing.assert_close(value, loss)


@pytest.mark.skipif(
    torch.version.cuda is None, reason="fake CUDA tensors that require grad need a torch built with CUDA"
)
@methods
def test_nothing_waits_for_the_device(name, monkeypatch):
    """On fake CUDA tensors, which have no numbers to wait for."""
    # Autograd's engine would ask the driver for the device.
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, W, **options: [torch.empty_like(x) for x in W])
    if name == "RLW generator":
        pytest.skip("a generator lies on a device of its own, of which there is none here")
    method = METHODS[name](3)
    with FakeTensorMode():
        for part in method.modules():
            for tensors in (part._buffers, part._parameters):
                for key, value in tensors.items():
                    if value is not None:
                        moved = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                        tensors[key] = nn.Parameter(moved) if isinstance(value, nn.Parameter) else moved
        for key, value in vars(method).items():  # options, as they are used after the first call
            if isinstance(value, torch.Tensor):
                vars(method)[key] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        W, S = torch.empty(4, device="cuda", requires_grad=True), torch.empty((), device="cuda")
        with Recorder() as recorder:
            for losses in ([W.sum() for _ in range(3)], W[:3].bfloat16()):
                value = method(losses, *([W] if isinstance(method, GradNorm) else []), grad_scale=S)
                if isinstance(method, FAMO):
                    method.update(losses, grad_scale=S)
                if isinstance(method, DWA) and method.window is None:
                    method.end_epoch()
            assert value.device.type == method.last_weights.device.type == "cuda"
        assert recorder.ops


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", [m for m in METHODS if not m.startswith("RLW")])
def test_on_a_gpu(name):
    host, gpu = Run(name, dtype=F64).steps(6), Run(name, dtype=F64, device="cuda").steps(6)
    losses = gpu.losses(6)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.scalar(losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host.scalar(host.losses(6))
    # What is learned is float32, and its last bit may differ.
    close = {"rtol": 1e-6, "atol": 1e-7} if list(host.method.parameters()) else {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(gpu.method.last_weights.cpu(), host.method.last_weights, **close)
    state = {key: value.cpu() for key, value in state_of(gpu.method).items()}
    torch.testing.assert_close(state, state_of(host.method), **close, equal_nan=True)


@methods
def test_repr_and_shape_of_the_class(name):
    method = METHODS[name](2)
    assert isinstance(method, Scalarization)
    if method.__dict__.get("generator") is None:
        twin = eval(repr(method))  # the options, all of them
        same(state_of(twin), state_of(method))
        assert repr(twin) == repr(method)
    assert "Source:" in type(method).__doc__ or isinstance(method, LS)
    assert method.last_weights is None
    assert "grad_scale" in inspect.signature(method.forward).parameters


BAD_LOSSES = [
    ([], ValueError, "losses: expected at least one loss"),
    (3.0, TypeError, "losses: expected a sequence .* got float"),
    ([1.0, 2.0], TypeError, r"losses\[0\]: expected a floating scalar tensor, or None, got float"),
    ([torch.ones(()), torch.ones((), dtype=torch.int64)], TypeError, r"losses\[1\]: .* got int64 tensor"),
    ([torch.ones(()), torch.ones(2)], ValueError, r"losses\[1\]: expected a scalar .* shape \[2\]"),
    ([torch.ones(()), torch.ones((), device="meta")], ValueError, r"losses\[1\]: expected a loss on cpu .* on meta"),
    (
        torch.ones(2, dtype=torch.int32),
        TypeError,
        r"losses\[0\]: expected a floating scalar tensor, or None, got int32",
    ),
    (torch.ones(()), ValueError, r"losses: expected T scalars or a tensor of shape \[T\]"),
    (torch.ones(2, 2), ValueError, r"losses: expected T scalars or a tensor of shape \[T\]"),
    (torch.ones(0), ValueError, r"losses: expected at least one loss \(T >= 1\)"),
]


@pytest.mark.parametrize(("losses", "error", "message"), BAD_LOSSES)
def test_losses_that_are_none(losses, error, message):
    for method in (LS(), DWA(2)):
        with pytest.raises(error, match=message):
            method(losses)
    with pytest.raises(error, match=message):
        FAMO(2).update(losses)


@pytest.mark.parametrize("name", ["LS numbers", "DWA", "Uncertainty", "STCH numbers", "STCH warm-up", "IMTLL", "FAMO"])
def test_another_number_of_tasks_or_device(name):
    method = METHODS[name](3)
    with pytest.raises(ValueError, match=r"expected (3|length 2) .*, got [23]; pass None for a task that is absent"):
        method(torch.ones(2))
    if not method.state_dict():  # nothing is on a device
        assert method(torch.ones(3, device="meta")).is_meta
        return
    with pytest.raises(ValueError, match=r"losses: expected losses on cpu, .* on meta"):
        method(torch.ones(3, device="meta"))


@pytest.mark.parametrize(
    ("S", "error"),
    [(0.0, ValueError), (-1.0, ValueError), (math.inf, ValueError), (torch.ones(2), ValueError), ("2", TypeError)],
    ids=str,
)
def test_bad_grad_scale(S, error):
    with pytest.raises(error, match="grad_scale: expected"):
        GLS()(torch.ones(2), grad_scale=S)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LS(weights="median"), ValueError, 'weights: expected None, "mean", "sum" or T numbers'),
        (lambda: LS(weights=3), TypeError, 'weights: expected None, "mean", "sum" or T numbers, got int'),
        (lambda: LS(weights=["a"]), TypeError, 'weights: expected None, "mean", "sum" or T numbers, got'),
        (lambda: LS(weights=[[1.0]]), ValueError, r"weights: expected shape \[T\], got shape \[1, 1\]"),
        (lambda: LS(weights=[math.nan]), ValueError, "weights: expected finite numbers"),
        (lambda: RLW(distribution="gauss"), ValueError, "distribution: expected one of"),
        (lambda: RLW(generator=3), TypeError, "generator: expected a torch.Generator"),
        (lambda: DWA(0), ValueError, "tasks: expected an integer >= 1, got 0"),
        (lambda: DWA(2.0), TypeError, "tasks: expected an integer >= 1, got float"),
        (lambda: DWA(2, temperature=0.0), ValueError, "temperature: expected a finite number > 0"),
        (lambda: DWA(2, window=0), ValueError, "window: expected an integer >= 1 or None, got 0"),
        (lambda: DWA(2, window=1.5), TypeError, "window: expected an integer >= 1 or None, got float"),
        (lambda: Uncertainty(0), ValueError, "tasks"),
        (lambda: Uncertainty(2, initial=math.inf), ValueError, "initial: expected a finite number"),
        (lambda: Uncertainty(2, initial="0"), TypeError, "initial: expected a number"),
        (lambda: IMTLL(True), TypeError, "tasks: expected an integer >= 1, got bool"),
        (lambda: STCH(mu=0), ValueError, "mu: expected a finite number > 0"),
        (lambda: STCH(mu="1"), TypeError, "mu: expected a number"),
        (lambda: STCH(weights="max"), ValueError, "weights: expected"),
        (lambda: STCH(weights=[1.0], reference=[1.0, 2.0]), ValueError, r"reference: .* \[1\], got shape \[2\]"),
        (lambda: STCH(weights=[1.0], tasks=2), ValueError, r"weights: expected shape \[2\], got shape \[1\]"),
        (lambda: STCH(warmup=4), ValueError, "tasks: expected the number of tasks"),
        (lambda: STCH(warmup=-1, tasks=2), ValueError, "warmup: expected an integer >= 0 or None, got -1"),
        (lambda: STCH(warmup=1.0, tasks=2), TypeError, "warmup: expected an integer >= 0 or None, got float"),
        (lambda: STCH(warmup=1, tasks=2, weights=[1.0, 1.0]), ValueError, "warmup: expected None where weights"),
        (lambda: FAMO(2, lr=-1.0), ValueError, "lr: expected a finite number >= 0"),
        (lambda: FAMO(2, weight_decay=None), TypeError, "weight_decay: expected a number"),
        (lambda: FAMO(2, min_losses=[0.0]), ValueError, r"min_losses: expected shape \[2\], got shape \[1\]"),
        (lambda: GradNorm(2, alpha=-1), ValueError, "alpha"),
        (lambda: GradNorm(2, lr=math.nan), ValueError, "lr"),
        (
            lambda: GradNorm(2, initial_losses=[1.0, 0.0]),
            ValueError,
            "initial_losses: expected finite positive numbers",
        ),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ------------------------------------------------------------------------------------------------ absent tasks

AWAY, OTHERS = 1, [0, 2, 3]
# The method of the other three of four tasks; default weights stay 1/4.
WITHOUT = {
    "LS": lambda: LS(weights=[0.25] * 3),
    "LS sum": lambda: LS(weights="sum"),
    "LS numbers": lambda: LS(weights=[1.0, 3.0, 4.0]),
    "DWA": lambda: DWA(3),
    "DWA window": lambda: DWA(3, temperature=1.0, window=3),
    "Uncertainty": lambda: Uncertainty(3),
    "Uncertainty -0.5": lambda: Uncertainty(3, initial=-0.5),
    "GLS": GLS,
    "STCH": lambda: STCH(weights=[0.25] * 3),
    "STCH numbers": lambda: STCH(mu=0.5, weights=[0.5, 2.5, 3.5], reference=[0.0, -0.2, -0.3]),
    "STCH warm-up": lambda: STCH(3, mu=1.0, warmup=1),
    "IMTLL": lambda: IMTLL(3),
    "FAMO": lambda: FAMO(3),
    "FAMO bounds": lambda: FAMO(3, lr=0.1, weight_decay=0.01, min_losses=[-0.5, -2.5, -3.5]),
    "GradNorm": lambda: GradNorm(3),
    "GradNorm initial": lambda: GradNorm(3, alpha=0.5, lr=0.1, initial_losses=[1.0, 3.0, 4.0]),
}


def drive(method, losses_of, steps):
    """(values, gradients of the losses' parameter, weights) of so many steps; an epoch is two of them."""
    record = []
    own = list(method.parameters())
    optimizer = torch.optim.SGD(own, lr=0.1) if own else None
    for k in range(steps):
        p = torch.ones(5, dtype=F64, requires_grad=True)
        losses = losses_of(p, k)
        value = method(losses, *([p] if isinstance(method, GradNorm) else []))
        value.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if isinstance(method, FAMO):
            method.update([None if loss is None else loss.detach() * (0.9 + 0.01 * k) for loss in losses])
        if k % 2 and ((type(method) is DWA and method.window is None) or getattr(method, "warmup", None) is not None):
            method.end_epoch()
        record.append((value.detach(), p.grad, method.last_weights))
    return record


@pytest.mark.parametrize("how", ["None", "constant", "detached"])
@pytest.mark.parametrize("name", WITHOUT)
def test_an_absent_task(name, how):
    method, others = METHODS[name](4), WITHOUT[name]()
    before = state_of(method)

    def loss(p, t, k):
        return (p * randn(5, dtype=F64, seed=10 * k + t)).square().mean() * (t + 1) + 0.1

    def all_of(p, k):
        away = {"None": None, "constant": torch.tensor(math.inf), "detached": loss(p, AWAY, k).detach()}[how]
        return [away if t == AWAY else loss(p, t, k) for t in range(4)]

    got = drive(method, all_of, 7)
    wanted = drive(others, lambda p, k: [loss(p, t, k) for t in OTHERS], 7)
    for (value, gradient, weights), (its_value, its_gradient, its_weights) in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, its_value, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient, its_gradient, rtol=1e-6, atol=1e-9)
        assert weights[AWAY] == 0
        torch.testing.assert_close(weights[OTHERS], its_weights, rtol=1e-6, atol=1e-9)
    for key, value in state_of(method).items():
        if value.shape == (4,):
            assert torch.equal(value[AWAY], before[key][AWAY]) or value[AWAY].isnan()
            assert value[AWAY].isnan() == before[key][AWAY].isnan()
            its = state_of(others)[key]
            torch.testing.assert_close(value[OTHERS], its, rtol=1e-6, atol=1e-9, equal_nan=True)


@methods
def test_what_is_remembered_of_a_task_stays(name):
    """Through steps in which it is absent, after some in which it was there."""
    method = METHODS[name](3)

    def losses(p, k, away=None):
        each = [(p * randn(5, dtype=F64, seed=10 * k + t)).square().mean() + 0.1 for t in range(3)]
        return [None if t == away else loss for t, loss in enumerate(each)]

    drive(method, losses, 5)
    if name in ("DWA", "DWA window"):
        while method.count.any():  # to the end of an epoch
            method.window or method.end_epoch()
            drive(method, losses, 1 if method.count.any() else 0)
    before = {key: value.clone() for key, value in state_of(method).items()}
    record = drive(method, lambda p, k: losses(p, 20 + k, away=2), 2)
    assert all(weights[2] == 0 for _, _, weights in record)
    for key, value in state_of(method).items():
        if value.shape == (3,) and key != "previous":  # FAMO's losses of the last call
            assert torch.equal(value[2], before[key][2]), key
    after = drive(method, lambda p, k: losses(p, 30 + k), 2)
    assert all(value.isfinite() for value, _, _ in after)


def test_dwa_of_a_task_that_comes_later():
    """Its ratio is 1 until there are two averages of it; then it is weighed as all are."""
    method = DWA(3, temperature=1.0)

    def epoch(*losses):
        method([None if x is None else tensor(x) for x in losses])
        method.end_epoch()

    epoch(1.0, 2.0, None)
    epoch(0.5, 2.0, None)
    epoch(0.25, 2.0, 7.0)
    assert method([tensor(1.0)] * 3).isfinite()
    ratios = torch.tensor([0.5, 1.0, 1.0], dtype=F64)
    torch.testing.assert_close(method.last_weights, 3 * ratios.softmax(0))
    method.reset()
    epoch(1.0, 2.0, None)
    epoch(0.5, 2.0, None)
    epoch(0.25, 2.0, 7.0)
    epoch(0.25, 2.0, 14.0)
    method([tensor(1.0)] * 3)
    torch.testing.assert_close(method.last_weights, 3 * torch.tensor([1.0, 1.0, 2.0], dtype=F64).softmax(0))
    method([tensor(1.0), None, tensor(1.0)])
    shares = torch.tensor([1.0, 2.0], dtype=F64).softmax(0)
    torch.testing.assert_close(method.last_weights[[0, 2]], 2 * shares)


def test_dwa_of_losses_that_rise_from_zero():
    method = DWA(4, window=1)
    for values in ([0.0, 0.0, 1.0, 2.0], [1.0, 0.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]):
        method(tensor(*values))
    # Of 0 -> 1, 0 -> 0, 1 -> 1, 2 -> 2, at the third call, the first has all the weight.
    torch.testing.assert_close(method.last_weights, torch.tensor([4.0, 0.0, 0.0, 0.0], dtype=F64))
    method(tensor(1.0, 1.0, 1.0, 1.0))  # 1 -> 1, 0 -> 1, 1 -> 1, 2 -> 1
    torch.testing.assert_close(method.last_weights, torch.tensor([0.0, 4.0, 0.0, 0.0], dtype=F64))


def test_stch_of_a_task_without_an_average():
    """Its first loss stands for it; and a warm-up that ends without a step is no division by zero."""
    method = STCH(2, mu=1.0, warmup=0)
    method([tensor(4.0), None])
    method.end_epoch()
    value = method([tensor(4.0), tensor(9.0)])
    assert value.item() == pytest.approx(2 * math.log(2))  # both are as they were
    assert method.total.tolist() == [4.0, 9.0]
    value = method([tensor(4.0), tensor(18.0)])
    assert value.item() == pytest.approx(2 * math.log(1 + 2))
    hasty = STCH(2, mu=1.0, warmup=0)
    hasty.end_epoch()
    assert hasty(tensor(3.0, 5.0)).item() == pytest.approx(2 * math.log(2))


def test_famo_learns_from_tasks_that_are_in_both_calls():
    method, pair = FAMO(3), FAMO(2)
    method(tensor(1.0, 2.0, 3.0))
    method.update([tensor(0.5), None, tensor(2.0)])
    pair(tensor(1.0, 3.0))
    pair.update(tensor(0.5, 2.0))
    torch.testing.assert_close(method.logits[[0, 2]], pair.logits)
    assert method.logits[1] == 0
    assert method.adam.steps.tolist() == [1, 0, 1]
    method([tensor(1.0), tensor(2.0), None])
    state = state_of(method)
    method.update([None, None, tensor(2.0)])  # of nobody is there a change
    same(state_of(method), state)


def test_scaled_losses_of_absent_tasks():
    method = IMTLL(3)
    p = tensor(2.0)
    scaled = method.scaled([p[0] * 3, None, torch.tensor(1.0)])
    assert scaled[1] is scaled[2] is None
    assert scaled[0].item() == 6.0
    with pytest.raises(ValueError, match=r"losses\[1\]: expected a loss >= 0"):
        method.scaled([p[0], -p[0], p[0]])


def test_nobody_is_there():
    with pytest.raises(ValueError, match="losses: expected at least one task that is present, got None for all 3"):
        LS()([None, None, None])
    with torch.no_grad():  # no loss needs a gradient, and all count
        assert LS()([torch.tensor(2.0), torch.tensor(4.0)]) == 3.0
        assert LS()([torch.tensor(2.0), None]) == 1.0


# ------------------------------------------------------------------------------------------------ LS, RLW


def test_ls():
    L = tensor(2.0, 3.0, 7.0)
    assert LS()(L).item() == pytest.approx(4.0, rel=1e-15)
    assert LS(weights="mean")(L).item() == LS()(L).item()
    assert LS(weights="sum")(L).item() == 12.0
    assert LS(weights=[1.0, -1.0, 0.5])(L).item() == 2.5
    assert LS()([torch.tensor(1.0), torch.tensor(2.0, dtype=F64)]).item() == 1.5


def test_rlw_is_the_softmax_of_normal_numbers():
    L = tensor(1.0, 5.0, 2.0, 8.0, dtype=F32)
    torch.manual_seed(5)
    value = RLW()(L)
    z = torch.randn(4, generator=generator(5))
    expected = z.exp() / z.exp().sum()
    torch.testing.assert_close(value, (expected * L).sum())
    torch.testing.assert_close(
        RLW(distribution="uniform", generator=generator(5))(L), (torch.rand(4, generator=generator(5)).softmax(0) @ L)
    )


@pytest.mark.parametrize("distribution", ["normal", "uniform", "dirichlet", "bernoulli", "constrained_bernoulli"])
def test_rlw_draws(distribution):
    method, L, n = RLW(distribution=distribution, generator=generator(0)), torch.ones(3, dtype=F64), 4000
    w = torch.stack([method(L) * 0 + method.last_weights for _ in range(n)])
    assert len({tuple(row.tolist()) for row in w}) == {"bernoulli": 7, "constrained_bernoulli": 3}.get(distribution, n)
    assert (w >= 0).all()
    if distribution == "bernoulli":
        counts = Counter(tuple(row.tolist()) for row in w)
        assert max(abs(count / n - 1 / 7) for count in counts.values()) < 0.03  # all but 000 alike: 5 sigma
        return
    torch.testing.assert_close(w.sum(1), torch.ones(n, dtype=F64))
    torch.testing.assert_close(w.mean(0), torch.full((3,), 1 / 3, dtype=F64), rtol=0, atol=0.04)
    # Second moments tell the distributions apart: 2 / (T (T + 1)) for the uniform one on the simplex.
    seconds = {"dirichlet": 1 / 6, "constrained_bernoulli": 1 / 3}
    if distribution in seconds:
        assert w.square().mean().item() == pytest.approx(seconds[distribution], rel=0.05)


@pytest.mark.parametrize("T", [1, 2, 70])
def test_rlw_bernoulli_is_never_all_zero(T):
    method = RLW(distribution="bernoulli", generator=generator(1))
    w = torch.stack([method(torch.ones(T, dtype=F64)) * 0 + method.last_weights for _ in range(500)])
    assert (w.sum(1) >= 1).all()
    assert w.mean().item() == pytest.approx(0.5 / (1 - 0.5**T), abs=0.08)


def test_rlw_state_needs_a_generator():
    with pytest.raises(ValueError, match="generator: this RLW has no generator"):
        RLW().load_state_dict(RLW(generator=generator(1)).state_dict())
    with pytest.raises(ValueError, match="generator: this RLW has a generator"):
        RLW(generator=generator(1)).load_state_dict(RLW().state_dict())


# ------------------------------------------------------------------------------------------------ DWA


def dwa_by_hand(losses, tau, k):
    """Weights of epoch k from a list of epochs, each a list of the steps' losses."""
    T = len(losses[0][0])
    if k < 2:
        return [1.0] * T
    mean = [[sum(step[t] for step in epoch) / len(epoch) for t in range(T)] for epoch in losses]
    shares = [math.exp(mean[k - 1][t] / mean[k - 2][t] / tau) for t in range(T)]
    return [T * share / sum(shares) for share in shares]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tau", [2.0, 0.5])
def test_dwa(window, tau):
    epochs = (randn(5, 3, 4, dtype=F64).abs() + 0.1).tolist()
    method = DWA(4, temperature=tau, window=window)
    for k, epoch in enumerate(epochs):
        for step in epoch:
            L = tensor(*step)
            value = method(L)
            expected = torch.tensor(dwa_by_hand(epochs, tau, k), dtype=F64)
            torch.testing.assert_close(method.last_weights, expected)
            torch.testing.assert_close(value, expected @ L)
        if window is None:
            method.end_epoch()


def test_dwa_skips_what_is_not_finite_and_empty_epochs():
    method, twin = DWA(2), DWA(2)
    for k in range(9):
        L = randn(2, dtype=F64, seed=k).abs() + 0.1
        for m in (method, twin):
            m(L)
        method(torch.tensor([1.0, math.nan], dtype=F64))
        if k % 3 == 2:
            method.end_epoch()
            method.end_epoch()
            twin.end_epoch()
    same(state_of(method), state_of(twin))
    assert not method.older.isnan().any()


@pytest.mark.parametrize("name", METHODS)
def test_epochs_are_counted_by_those_that_count_them(name):
    run = Run(name).steps(5)
    before = state_of(run.method)
    run.method.end_epoch()
    assert equal(state_of(run.method), before) != run.counts_epochs


# ------------------------------------------------------------------------------------------------ learned scales, GLS


def test_uncertainty():
    method, L = Uncertainty(3), tensor(0.5, 2.0, 7.0)
    with torch.no_grad():
        method.s.copy_(torch.tensor([0.3, -1.0, 0.0]))
    value = method(L)
    sigma2 = method.s.detach().to(F64).exp()
    expected = sum(L[t] / (2 * sigma2[t]) + 0.5 * math.log(sigma2[t]) for t in range(3))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    value.backward()
    torch.testing.assert_close(method.s.grad, (0.5 - 0.5 * L / sigma2).to(F32).detach())


def test_uncertainty_and_imtl_l_find_their_optima():
    """Fixed losses: exp(s) = L for Uncertainty, exp(-s) = L for IMTL-L."""
    L = torch.tensor([0.5, 2.0, 7.0])
    for method, sign in ((Uncertainty(3, initial=-0.5), 1), (IMTLL(3), -1)):
        optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
        for _ in range(600):
            optimizer.zero_grad()
            method.backward(L)
            optimizer.step()
        torch.testing.assert_close((sign * method.s).exp().detach(), L, rtol=1e-3, atol=0)


def test_imtl_l():
    method, L = IMTLL(2), tensor(0.5, 3.0)
    with torch.no_grad():
        method.s.copy_(torch.tensor([0.25, -2.0]))
    expected = math.exp(0.25) * 0.5 - 0.25 + math.exp(-2.0) * 3.0 + 2.0
    assert method(L).item() == pytest.approx(expected, rel=1e-6)


def test_gls():
    L = tensor(0.5, 4.0, 32.0)
    assert GLS()(L).item() == pytest.approx(4.0)
    huge = torch.full((12,), 1e30)
    assert GLS()(huge).item() == pytest.approx(1e30, rel=1e-5)
    assert GLS()(1 / huge).item() == pytest.approx(1e-30, rel=1e-5)


class Unseen(TorchDispatchMode):
    """As where losses lie on a GPU: nobody looks at their values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


# name: (a new instance for 3 tasks, losses of task 1 that it cannot take, what it says of them)
DOMAINS = {
    "GLS": (GLS, [0.0, -1.0], "expected a loss > 0, since the geometric mean has no derivative at zero"),
    "STCH": (lambda: STCH(3, warmup=2), [0.0, -1.0], "expected a loss > 0, since with warmup= STCH takes logarithms"),
    "FAMO": (lambda: FAMO(3, min_losses=[0.5] * 3), [0.4, -1.0], r"expected a loss >= 0.5, its bound in min_losses"),
    "FAMO, no bounds": (lambda: FAMO(3), [-1e-3], "expected a loss >= 0, its bound in min_losses"),
    "DWA": (lambda: DWA(3), [-1e-3], "expected a loss >= 0, since DWA weighs by ratios of losses"),
    "IMTLL": (lambda: IMTLL(3), [-1e-3], "expected a loss >= 0, since s is learned"),
    "GradNorm": (lambda: GradNorm(3).eval(), [-1e-3], "expected a loss >= 0, since GradNorm compares it"),
    "GO4Align": (lambda: GO4Align(3), [0.0, -1.0], "expected a loss > 0, since GO4Align divides by it"),
    "ReLoBRaLo": (lambda: ReLoBRaLo(3), [0.0, -1.0], "expected a loss > 0, since ReLoBRaLo divides by it"),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_losses_outside_the_domain(name):
    """An error that names the loss; NaN, and nothing learned, where the host would have to wait to see it."""
    make, values, message = DOMAINS[name]
    for bad in values:
        method = make()
        before = state_of(method)
        for losses in (tensor(1.0, bad, 2.0), [tensor(x) for x in (1.0, bad, 2.0)], torch.tensor([1.0, bad, 2.0])):
            with pytest.raises(ValueError, match=rf"losses\[1\]: {message}.*, got {bad:g}"):
                method(losses)
        with pytest.raises(ValueError, match=r"losses\[1\]: .*, got"):  # of the unscaled ones
            method([1024 * tensor(x) for x in (1.0, bad, 2.0)], grad_scale=1024.0)
        L = tensor(1.0, bad, 2.0)
        with Unseen():
            value = method(L)
        value.backward()
        assert value.isnan()
        assert L.grad.isnan().all()
        same(state_of(method), before)


@pytest.mark.parametrize("name", DOMAINS)
def test_losses_that_are_not_finite_never_raise(name):
    """A loss scaler has to see them, and skips the step."""
    for bad in (math.nan, math.inf, -math.inf):
        L = tensor(1.0, bad, 2.0)
        method = DOMAINS[name][0]()
        before = state_of(method)
        value = method(L)
        value.backward()
        assert value.isnan()
        assert not L.grad.isfinite().any()
        same(state_of(method), before)


@methods
def test_zero_losses_have_finite_weights(name):
    """Or an error: where all zero, where some are, and where they rise from zero."""
    method = METHODS[name](3)
    for values in ([0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, 2.0], [3.0, 1.0, 0.0], [1.0, 1.0, 1.0]):
        model = [torch.tensor(value, requires_grad=True) for value in values]
        for _ in range(2):
            layer = [model[0]] if isinstance(method, GradNorm) else []
            logarithms = isinstance(method, (GLS, GO4Align, ReLoBRaLo)) or name == "STCH warm-up"  # or divisions
            if logarithms and 0.0 in values:
                with pytest.raises(ValueError, match=r"losses\[\d\]: expected a loss > 0"):
                    method(model, *layer)
                continue
            value = method(model, *layer)
            value.backward()
            assert value.isfinite()
            assert all(p.grad.isfinite() for p in model)
            if isinstance(method, FAMO):
                method.update([loss.detach() + 0.1 for loss in model])
        if name in ("DWA", "STCH warm-up"):
            method.end_epoch()


# ------------------------------------------------------------------------------------------------ STCH


def test_stch():
    L, lam, z, mu = [0.5, 2.0, 1.5], [0.2, 0.5, 0.3], [0.1, 0.0, -1.0], 0.3
    expected = mu * math.log(sum(math.exp(a * (x - b) / mu) for a, x, b in zip(lam, L, z, strict=True)))
    assert STCH(mu=mu, weights=lam, reference=z)(tensor(*L)).item() == pytest.approx(expected, rel=1e-12)
    plain = 0.1 * math.log(sum(math.exp(x / 3 / 0.1) for x in L))
    assert STCH()(tensor(*L)).item() == pytest.approx(plain, rel=1e-12)
    total = 0.1 * math.log(sum(math.exp(x / 0.1) for x in L))
    assert STCH(weights="sum")(tensor(*L)).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("mu", [1.0, 1e-2, 1e-30])
def test_stch_is_a_smooth_maximum(mu):
    L = tensor(1e3, 2e3, 2e3 - 1e-3, dtype=F32)
    value = STCH(mu=mu, weights="sum")(L).item()
    assert 2e3 <= value <= 2e3 + mu * math.log(3) * (1 + 1e-3) + 1e-3


def stch_by_hand(epochs, warmup, mu, k, losses):
    """What the authors' code computes in epoch k."""
    if k <= warmup:
        return sum(math.log(x) for x in losses)
    T, steps = len(losses), epochs[warmup]
    nadir = [sum(step[t] for step in steps) / len(steps) for t in range(T)]
    logs = [math.log(x / n) for x, n in zip(losses, nadir, strict=True)]
    return T * mu * math.log(sum(math.exp((x - max(logs)) / mu) for x in logs)) + T * max(logs)


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_stch_with_warmup(warmup):
    """The authors' code leaves out the constant T · max(log), which has no derivative there either way."""
    epochs = (randn(5, 3, 4, dtype=F64).abs() + 0.1).tolist()
    method = STCH(mu=0.5, warmup=warmup, tasks=4)
    for k, epoch in enumerate(epochs):
        for step in epoch:
            expected = stch_by_hand(epochs, warmup, 0.5, k, step)
            assert method(tensor(*step)).item() == pytest.approx(expected, rel=1e-9)
        method.end_epoch()


# ------------------------------------------------------------------------------------------------ FAMO


class NaiveFAMO:
    """Equations 10 to 12 with autograd and torch's Adam."""

    def __init__(self, T, lr, gamma, bounds):
        self.xi = torch.zeros(T, dtype=F64, requires_grad=True)
        self.adam = torch.optim.Adam([self.xi], lr=lr, weight_decay=gamma)
        self.bounds = bounds

    def loss(self, L):
        D = L - self.bounds + 1e-8
        z = self.xi.detach().softmax(0)
        self.before = D.detach().log()
        return (z * D.log()).sum() / (z / D.detach()).sum()

    def update(self, L):
        delta = self.before - (L - self.bounds + 1e-8).log()
        self.adam.zero_grad()
        (self.xi.softmax(0) * delta).sum().backward()
        self.adam.step()


@pytest.mark.parametrize("bounds", [None, [-1.0, 0.05, -0.2]])
@pytest.mark.parametrize(("lr", "gamma"), [(0.025, 1e-3), (0.3, 0.1)])
def test_famo(lr, gamma, bounds):
    b = torch.zeros(3, dtype=F64) if bounds is None else torch.tensor(bounds, dtype=F64)
    method, naive = FAMO(3, lr=lr, weight_decay=gamma, min_losses=bounds), NaiveFAMO(3, lr, gamma, b)
    for k in range(30):
        L = (randn(3, dtype=F64, seed=k).abs() + 0.1).requires_grad_()
        after = L.detach() * (0.5 + torch.rand(3, dtype=F64, generator=generator(k)))
        value, expected = method(L), naive.loss(L)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, L), torch.autograd.grad(expected, L))
        assert method.last_weights.sum().item() == pytest.approx(1.0)
        method.update(after)
        naive.update(after)
        torch.testing.assert_close(method.logits, naive.xi.detach(), rtol=1e-9, atol=1e-12)
    assert method.logits.abs().max() > 0.05  # it did learn


def test_famo_updates_once_for_every_call():
    method, L = FAMO(2), torch.tensor([1.0, 2.0], dtype=F64)
    new = state_of(method)
    method.update(L)
    same(state_of(method), new)
    method(L)
    method.update(L / 2 * torch.tensor([1.0, 0.5]))
    once = state_of(method)
    assert not torch.equal(once["logits"], new["logits"])
    method.update(L / 8)
    same(state_of(method), once)


def test_famo_favours_the_task_that_falls_slowly():
    method, L = FAMO(2), torch.tensor([1.0, 1.0])
    for _ in range(20):
        method(L)
        method.update(L * torch.tensor([0.5, 0.99]))
    assert method.logits[1] > method.logits[0] + 0.5


# ------------------------------------------------------------------------------------------------ TorchJD


def torchjd_pairs(T=4):
    theirs = pytest.importorskip("torchjd.scalarization", reason="torchjd is not installed")
    lam, z = torch.linspace(0.1, 1.0, T, dtype=F64), torch.linspace(-1.0, 0.0, T, dtype=F64)
    return {
        "Mean": (LS(), theirs.Mean()),
        "Sum": (LS(weights="sum"), theirs.Sum()),
        "Constant": (LS(weights=lam), theirs.Constant(lam)),
        "Random": (RLW(), theirs.Random()),
        "GeometricMean": (GLS(), theirs.GeometricMean()),
        "STCH": (STCH(mu=0.2), theirs.STCH(0.2)),
        "STCH numbers": (STCH(mu=0.05, weights=lam, reference=z), theirs.STCH(0.05, lam, z)),
        "UW": (Uncertainty(T), theirs.UW(T)),
        "IMTLL": (IMTLL(T), theirs.IMTLL(T)),
        "DWA": (DWA(T), theirs.DWA()),
        "FAMO": (FAMO(T), theirs.FAMO(T)),
        "FAMO bounds": (FAMO(T, lr=0.1, weight_decay=0.01, min_losses=z), theirs.FAMO(T, z, 0.1, 0.01)),
    }


NAMES = "Mean, Sum, Constant, Random, GeometricMean, STCH, STCH numbers, UW, IMTLL, DWA, FAMO, FAMO bounds"


@pytest.mark.parametrize("name", NAMES.split(", "))
def test_parity_with_torchjd(name):
    ours, theirs = (method.double() for method in torchjd_pairs()[name])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs) if name in ("UW", "IMTLL")]
    for k in range(12):
        L = (randn(4, dtype=F64, seed=k).abs() + 0.1).requires_grad_()
        gradients = []
        for method in (ours, theirs):
            torch.manual_seed(k)
            gradients.append([value := method(L), *torch.autograd.grad(value, L, retain_graph=True)])
            if optimizers:
                method.zero_grad()
                value.backward()
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        if name.startswith("FAMO"):
            for method in (ours, theirs):
                method.update(L.detach() * 0.9 + 0.02 * k)
        if name == "DWA" and k % 3 == 2:
            ours.end_epoch()
            theirs.step()


@pytest.mark.parametrize("cast", [torch.nn.Module.half, lambda m: m.to(torch.bfloat16)], ids=["half", "bfloat16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DWA(3, window=1),
        lambda: FAMO(3),
        lambda: STCH(3, warmup=1),
        lambda: Uncertainty(3, initial=0.1),
        lambda: IMTLL(3),
        lambda: GradNorm(3),
        GradVac,
        lambda: NashMTL(every=2),
    ],
    ids=lambda make: type(make()).__name__,
)
def test_a_model_that_is_cast_leaves_a_methods_precision(make, cast):
    """As part of a model in 16 bits a method goes on as it would by itself; widened, it is widened."""

    def step(method, weight):
        x = torch.linspace(-1, 1, 12, dtype=weight.dtype).reshape(3, 4)
        return method.backward(list((x @ weight).exp().mean(1).unbind()), shared=[weight])

    plain, part = make(), make()
    model = torch.nn.ModuleDict({"trunk": torch.nn.Linear(2, 2), "method": part})
    for k in range(3):
        weights = [torch.nn.Parameter(torch.linspace(0.1, 0.8, 8).reshape(4, 2)) for _ in range(2)]
        torch.manual_seed(k)
        wanted = step(plain, weights[0])
        cast(model)
        torch.manual_seed(k)
        assert torch.equal(step(part, weights[1]).alpha, wanted.alpha)
        assert torch.equal(weights[0].grad, weights[1].grad)
    assert model["trunk"].weight.dtype is not torch.float32
    assert all(torch.equal(x, y) for x, y in zip(part.state_dict().values(), plain.state_dict().values(), strict=True))
    model.double()
    assert all(x.dtype is torch.float64 for x in part.state_dict().values() if x.is_floating_point())

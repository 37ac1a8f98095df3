"""The problems that check.py times: each prepared, with its result compared with a float64 computation."""

from __future__ import annotations

import importlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import measure
import peers
import per_example as examples
import pure
import torch
import workloads
from torch import Tensor

import fastmtl
from fastmtl import catalog, ops
from fastmtl.ops import reference
from fastmtl.scaling import digits
from fastmtl.scaling.baseline import Pure, task_weights
from fastmtl.scaling.memory import peak_extra_memory

__all__ = ["FIGURES", "TRIALS", "Trial"]


@dataclass(frozen=True)
class Trial:
    """A prepared case.

    Attributes:
        fast: fastmtl.
        base: what it is compared with.
        read: a streaming read of the input.
        error: how wrong fastmtl's result was.
        tolerance: how wrong it may be.
        multiply_adds: of the Gram's upper triangle.
        products: the cheapest dtype that is accurate enough for them.
        rounds: how many rounds to time for one of the other cases, where the ratio is close to 1 or a call is long.
        calls: how many calls each function makes; times are given for one.
        read_alone: the read on one thread, where two threads are compared with one.
    """

    fast: Callable[[], object]
    base: Callable[[], object]
    read: Callable[[], object]
    error: float
    tolerance: float
    multiply_adds: int = 0
    products: torch.dtype = torch.float32
    rounds: float = 1.0
    calls: int = 1
    read_alone: Callable[[], object] | None = None


def triangle(T: int, P: int) -> int:
    """Multiply-adds of the upper triangle of a Gram."""
    return T * (T + 1) // 2 * P


def flat(T: int, P: int, kappa: float, spread: float = 1.0) -> Trial:
    """A matrix [T, P] whose row norms go from 1 to 1 / `spread` times what they were."""
    G, out = workloads.matrix(T, P, kappa=kappa), torch.empty(P)
    if spread > 1:
        G *= (spread ** -torch.linspace(0, 1, T))[:, None]
    method, base = fastmtl.AlignedMTL(), Pure((T, P))
    return Trial(
        fast=lambda: method(G, out=out),
        base=lambda: base(G),
        read=lambda: G.sum(),
        error=workloads.error(method(G), workloads.exact(G)),
        tolerance=workloads.tolerance(T),
        multiply_adds=triangle(T, P),
        products=torch.float64 if kappa > 1 else torch.float32,
        rounds=1 if T < 1000 else 1 / 3,  # seconds
    )


def real(T: int, P: int, kappa: float, steps: int) -> Trial:
    """Gradients [T, P] of single examples after so many steps of training; plain PyTorch in float64."""
    G, out = digits.per_example(T, P, steps), torch.empty(P)
    method, base, wide = fastmtl.AlignedMTL(), Pure((T, P), torch.float64), G.double()
    return Trial(
        fast=lambda: method(G, out=out),
        base=lambda: base(wide),
        read=lambda: G.sum(),
        error=workloads.error(method(G), workloads.exact(G)),
        tolerance=workloads.tolerance(T),
        rounds=1 if T < 500 else 1 / 3,  # seconds
    )


def real_weights(method: str, T: int, kappa: float, steps: int) -> Trial:
    """Task weights of such gradients against LAPACK's eigenvectors of the same Gram matrix, in float64."""
    return eigh_beside(method, digits.per_example(T, steps=steps).double())


def hard_weights(method: str, T: int, kappa: float) -> Trial:
    """The same of rows in no order whose norms lie over 1e9, evenly or (`groups`) 1e3 apart."""
    torch.manual_seed(1)
    decades = 9 * torch.rand(T, 1, dtype=torch.float64)
    if method == "groups":
        decades = 3 * (decades / 3).floor()
    G = workloads.matrix(T, 2 * T, kappa=kappa, dtype=torch.float64)
    return eigh_beside("aligned-min", G / G.norm(dim=1, keepdim=True) * 10**decades)


def eigh_beside(method: str, G: torch.Tensor) -> Trial:
    """Task weights of G against LAPACK's eigenvectors of its Gram matrix."""
    M = G @ G.T
    kind, _, scale = method.partition("-")
    options: dict[str, Any] = {"scale": scale} if scale else {}
    weigher: Any = catalog.make(kind, **options)
    info = weigher.solve(M, torch.float32)
    residual = 0.0 if info.residual is None else float(info.residual)
    return Trial(
        fast=lambda: weigher.weighting(M, torch.float32),
        base=lambda: torch.linalg.eigh(M),
        read=lambda: M.sum(),
        error=residual if info.alpha.isfinite().all() else float("inf"),
        tolerance=1e-8,
        rounds=1 if len(M) < 500 else 1 / 3,  # seconds
    )


def batched(B: int, T: int, P: int, kappa: float) -> Trial:
    """A batch [B, T, P]."""
    G, out = workloads.matrix(B, T, P, kappa=kappa), torch.empty(B, P)
    method, base = fastmtl.AlignedMTL(), Pure((B, T, P))
    return Trial(
        fast=lambda: method(G, out=out),
        base=lambda: base(G),
        read=lambda: G.sum(),
        error=workloads.error(method(G), workloads.exact(G)),
        tolerance=workloads.tolerance(T),
        multiply_adds=B * triangle(T, P),
        products=torch.float64 if kappa > 1 else torch.float32,
    )


def bfloat16(T: int, P: int, kappa: float) -> Trial:
    """A bfloat16 matrix against a float32 matrix of the same shape."""
    wide = workloads.matrix(T, P, kappa=kappa)
    half, out, wide_out = wide.bfloat16(), torch.empty(P, dtype=torch.bfloat16), torch.empty(P)
    method = fastmtl.AlignedMTL()
    return Trial(
        fast=lambda: method(half, out=out),
        base=lambda: method(wide, out=wide_out),
        read=lambda: wide.sum(),
        error=workloads.error(method(half), workloads.exact(half)),
        tolerance=workloads.tolerance(T, torch.bfloat16),
    )


def eigh(B: int, T: int, kappa: float) -> Trial:
    """Batched float64 eigendecomposition of [B, T, T] against torch.linalg.eigh."""
    M = workloads.symmetric(B, T)
    return Trial(
        fast=lambda: fastmtl.eigh(M),
        base=lambda: torch.linalg.eigh(M),
        read=lambda: M.sum(),
        error=workloads.eigen_error(M, *fastmtl.eigh(M)),
        tolerance=10.0,
    )


def resnet50(T: int, kappa: float) -> Trial:
    """A ragged list shaped like ResNet-50's parameters against concatenation."""
    shapes = workloads.resnet50()
    rows, base, method = workloads.ragged(T, shapes), pure.Ragged(T, shapes), fastmtl.AlignedMTL()
    matrix = base.flatten(rows)
    return Trial(
        fast=lambda: method(rows),
        base=lambda: base(rows),
        read=lambda: matrix.sum(),
        error=workloads.error(method(rows), workloads.exact(matrix)),
        tolerance=workloads.tolerance(T),
        multiply_adds=triangle(*matrix.shape),
    )


def backward(T: int, kappa: float) -> Trial:
    """`m.backward` of T heads on an MLP against the bare loop of T autograd.grad calls; the graph is kept by both."""
    problem, method = workloads.mlp(T), fastmtl.AlignedMTL()
    losses = problem.losses([problem.forward()] * T)
    loop = pure.autograd_loop(losses, problem.shared, problem.heads)
    matrix = torch.stack([workloads.flatten(row[: len(problem.shared)]) for row in loop])
    del loop

    def fast() -> None:
        problem.zero_grad()
        method.backward(losses, shared=problem.shared, retain_graph=True)

    fast()
    return Trial(
        fast=fast,
        base=lambda: pure.autograd_loop(losses, problem.shared, problem.heads),
        read=lambda: matrix.sum(),
        error=workloads.error(problem.shared_grad(), workloads.exact(matrix)),
        tolerance=workloads.tolerance(T),
        multiply_adds=triangle(*matrix.shape),
    )


def fan_out(problem: workloads.MultiTask) -> Callable[[], object]:
    """A training step through `fan_out`."""
    method = fastmtl.AlignedMTL()
    return lambda: problem.step(lambda h: fastmtl.fan_out(h, problem.tasks, method))


def step(problem: workloads.MultiTask, rounds: float) -> Trial:
    """A training step (without optimizer) through `fan_out` against one of the plain sum of the losses."""
    measure.keep_memory()
    expected, fast = problem.exact_upper_bound(), fan_out(problem)
    fast()
    return Trial(
        fast=fast,
        base=problem.step,
        read=lambda: expected.sum(),
        error=workloads.error(problem.shared_grad(), expected),
        tolerance=workloads.tolerance(problem.tasks),
        rounds=rounds,
    )


def repeated(problem: workloads.MultiTask, steps: int, every: int, rounds: float, solve: bool = True) -> Trial:
    """So many exact steps with task weights in every k-th, of which the first is one, against as many plain ones.

    Args:
        problem: the model.
        steps: how many.
        every: k.
        rounds: see `Trial`.
        solve: whether the first one computes weights; else weights are there already, and no step does.
    """
    measure.keep_memory()
    method = fastmtl.AlignedMTL()

    def step() -> None:
        problem.zero_grad()
        h = problem.forward()
        method.backward(problem.losses([h] * problem.tasks), shared=problem.shared, every=every, engine="auto")

    def fast() -> None:
        if solve:
            method.reset()
        for _ in range(steps):
            step()

    def base() -> None:
        for _ in range(steps):
            problem.step()

    expected = problem.exact()
    step()
    fast()  # the last of them is one in between, and weights, for the same gradients, are the same
    return Trial(
        fast=fast,
        base=base,
        read=lambda: expected.sum(),
        error=workloads.error(problem.shared_grad(), expected),
        tolerance=workloads.tolerance(problem.tasks),
        rounds=rounds,
        calls=steps,
    )


def amortised_mlp(T: int, every: int, kappa: float) -> Trial:
    """A cycle of `every` steps on an MLP."""
    return repeated(workloads.mlp(T), every, every, rounds=2)


def amortised_resnet18(T: int, every: int, kappa: float) -> Trial:
    """The same on convolutions."""
    return repeated(workloads.resnet18(T), every, every, rounds=1 / 2)


def between_solutions(T: int, kappa: float) -> Trial:
    """A step with weights of an earlier one, on an MLP."""
    return repeated(workloads.mlp(T), 1, 10**9, rounds=5, solve=False)


def accumulate(T: int, pieces: int, kappa: float) -> Trial:
    """Micro-batches whose gradients are summed and aggregated once, against each one aggregated by itself."""
    measure.keep_memory()
    problem, method = workloads.mlp(T), fastmtl.AlignedMTL()
    accumulator = method.accumulate(problem.shared)

    def fast() -> None:
        problem.zero_grad()
        for _ in range(pieces):
            accumulator.add(problem.losses([problem.forward()] * T))
        accumulator.backward()

    def base() -> None:
        problem.zero_grad()
        for _ in range(pieces):
            method.backward(problem.losses([problem.forward()] * T), shared=problem.shared)

    expected = pieces * problem.exact()
    fast()
    return Trial(
        fast=fast,
        base=base,
        read=lambda: expected.sum(),
        error=workloads.error(problem.shared_grad(), expected),
        tolerance=workloads.tolerance(T),
        rounds=2,
    )


def step_mlp(T: int, kappa: float) -> Trial:
    """T heads on an MLP: a step of a few milliseconds."""
    return step(workloads.mlp(T), rounds=10)


def step_resnet18(T: int, kappa: float) -> Trial:
    """T heads on convolutions."""
    return step(workloads.resnet18(T), rounds=1)


def weighting(method: str, T: int, kappa: float) -> Trial:
    """Task weights from a Gram matrix [T, T] against TorchJD's from the same one."""
    grams, peer = workloads.grams(T), peers.PEERS[method]
    fast, base = peer.passes(grams)
    stacked = torch.stack(grams)
    return Trial(
        fast=fast,
        base=base,
        read=lambda: stacked.sum(),
        error=max(peer.error(M) for M in grams),
        tolerance=peer.tolerance,
        rounds=1 if T < 100 else 1 / 3,  # theirs takes up to half a second
        calls=len(grams),
    )


def aggregation(method: str, T: int, P: int, kappa: float) -> Trial:
    """A whole aggregation of [T, P] against Aligned-MTL's."""
    G, out = workloads.conflicting(T, P), torch.empty(P)
    peer, aligned = peers.PEERS[method], fastmtl.AlignedMTL()
    fast = peer.ours()
    return Trial(
        fast=lambda: fast(G, out=out),
        base=lambda: aligned(G, out=out),
        read=lambda: G.sum(),
        error=peer.aggregation_error(G),
        tolerance=peers.AGGREGATION,
    )


def graddrop(T: int, P: int, kappa: float) -> Trial:
    """GradDrop of [T, P] against TorchJD's."""
    G, out = workloads.conflicting(T, P), torch.empty(P)
    method, base = fastmtl.GradDrop(), peers.torchjd().GradDrop()
    return Trial(
        fast=lambda: method(G, out=out),
        base=lambda: base(G),
        read=lambda: G.sum(),
        error=workloads.sign_error(G, method(G)),
        tolerance=workloads.tolerance(T),
    )


def coordinates(method: str, T: int, P: int, kappa: float) -> Trial:
    """A method that looks at every coordinate of [T, P], or keeps something of its size, against TorchJD's."""
    G, out = workloads.conflicting(T, P), torch.empty(P)
    options = {"TrimmedMean": ({"trim": 2}, (2,)), "ExcessMTL": ({}, ())}[method]
    fast, other = (getattr(fastmtl, method)(**options[0]) for _ in range(2))
    base, wide = (getattr(peers.torchjd(), method)(*options[1]) for _ in range(2))
    return Trial(
        fast=lambda: fast(G, out=out),
        base=lambda: base(G),
        read=lambda: G.sum(),
        error=workloads.error(other(G), wide(G.double())),
        tolerance=peers.AGGREGATION,
    )


class PlainMemory:
    """Methods with a memory as one would write them: MoCo and DB-MTL as in LibMTL, the others as in their papers."""

    def __init__(self, G: Tensor) -> None:
        T, P = G.shape
        self.step, self.y, self.w = 0, torch.zeros_like(G), G.new_full((T,), 1 / T)
        self.fake, self.second = G.new_zeros(2, P)

    def MoCo(self, G: Tensor, losses: Tensor) -> Tensor:
        self.step += 1
        G = G / G.norm(dim=1, keepdim=True) * losses[:, None]
        self.y = self.y - 0.5 / self.step**0.5 * (self.y - G)
        self.w = (self.w - 0.1 / self.step**0.5 * (self.y @ self.y.T) @ self.w).softmax(0)
        return self.y.T @ self.w

    def DBMTL(self, G: Tensor, losses: Tensor) -> Tensor:
        G = G / losses[:, None]
        self.y = G + 0.9 * (self.y - G)
        norms = self.y.norm(dim=1)
        return (norms.max() / norms) @ self.y

    def Bloop(self, G: Tensor, losses: Tensor) -> Tensor:
        mean = self.y[0] if self.step else G[0]
        self.step += 1
        a = G[1:].sum(0)
        g = G[0] + a - (a @ mean) / (mean @ mean) * mean
        self.y = torch.lerp(mean, G[0], 0.01)[None]
        return g

    def MConFIG(self, G: Tensor, losses: Tensor) -> Tensor:
        self.step += 1
        self.y = 0.9 * self.y + 0.1 * G
        m = self.y / (1 - 0.9**self.step)
        units = m / m.norm(dim=1, keepdim=True)
        u = torch.linalg.pinv(units) @ units.new_ones(len(G))
        u = u / u.norm()
        c = (m @ u).sum() * u
        new = c * (1 - 0.9**self.step)
        self.second = 0.999 * self.second + 0.001 * ((new - 0.9 * self.fake) / 0.1).square()
        self.fake = new
        return c / ((self.second / (1 - 0.999**self.step)).sqrt() + 1e-8)


def memory(method: str, T: int, P: int, kappa: float) -> Trial:
    """A step of a method that keeps something as large as gradients, [T, P], against plain PyTorch."""
    G, out, losses = workloads.conflicting(T, P), torch.empty(P), torch.rand(T) + 0.5
    fast, other = (getattr(fastmtl, method)() for _ in range(2))
    base, wide = (getattr(PlainMemory(x), method) for x in (G, G.double()))
    error = max(workloads.error(other(k * G, losses=losses), wide(k * G.double(), losses)) for k in (1.0, 1.5))
    return Trial(
        fast=lambda: fast(G, out=out, losses=losses),
        base=lambda: base(G, losses),
        read=lambda: G.sum(),
        error=error,
        tolerance=1e-4,
    )


def projector(T: int, kappa: float) -> Trial:
    """Weights of the projections of all T rows onto the dual cone against TorchJD's, for the same Gram matrix."""
    linalg, ours = (importlib.import_module(name) for name in ("torchjd.linalg", "fastmtl.integrations.torchjd.linalg"))
    G = workloads.conflicting(T, 3 * T).double()
    M, U = G @ G.mT, torch.eye(T, dtype=torch.float64) / T
    fast, base = ours.ActiveSetProjector(), linalg.QuadprogProjector()
    return Trial(
        fast=lambda: fast(U, M),
        base=lambda: base(U, M),
        read=lambda: M.sum(),
        error=workloads.error(fast(U, M).sum(0) @ G, base(U, M).sum(0) @ G),
        tolerance=1e-5,
        rounds=1 if T < 100 else 1 / 3,
    )


def scalarizer(method: str, T: int, kappa: float) -> Trial:
    """A scalarizer of T values, forward and backward, against TorchJD's; after FAMO's its update."""
    names = "fastmtl.integrations.torchjd.scalarization", "torchjd.scalarization"
    modules = [importlib.import_module(name) for name in names]
    w = torch.rand(T) + 0.1
    options = {"COSMOS": (2.0, w), "PBI": (3.0, w), "STCH": (0.1, w), "FAMO": (T,)}.get(method, ())
    x = (torch.rand(T) + 0.3).requires_grad_()

    def step_of(scalarizer: Any) -> Callable[[], Tensor]:
        def step() -> Tensor:
            value: Tensor = scalarizer(x)
            value.backward()
            if method == "FAMO":
                scalarizer.update(0.9 * x.detach())
            return value

        return step

    fast, base = (step_of(getattr(module, method)(*options)) for module in modules)
    found = []
    for step in (fast, base):
        torch.manual_seed(peers.SEED)
        x.grad = None
        found.append((step().detach(), x.grad))
    error = max(float((mine - its).abs().max() / its.abs().max()) for mine, its in zip(*found, strict=True))
    return Trial(fast=fast, base=base, read=lambda: x.sum(), error=error, tolerance=1e-4, rounds=20)


def drop_in(T: int, kappa: float) -> Trial:
    """A step of TorchJD's documented example, with our UPGrad in its import line against with theirs."""
    example = importlib.import_module("torchjd_example")
    ours, theirs = (make(torch.float64) for make in (example.variant()["training"], example.training))
    losses = [torch.stack([step() for _ in range(50)]) for step in (ours, theirs)]
    fast, base = (make() for make in (example.variant()["training"], example.training))
    return Trial(
        fast=fast,
        base=base,
        read=lambda: losses[0].sum(),
        error=float((losses[0] - losses[1]).abs().max()),
        tolerance=1e-4,
        rounds=20,
    )


def per_example(network: str, B: int, kappa: float) -> Trial:
    """A step of B losses' gradients, without a solver, against one of their mean."""
    problem = examples.NETWORKS[network](B)
    method = fastmtl.Uniform()
    error = problem.error(problem.step(method))
    x = torch.randn(B, 1000)
    return Trial(lambda: problem.step(method), problem.plain, lambda: x.sum(), error, tolerance=1e-5, rounds=5)


def per_example_autogram(network: str, B: int, kappa: float) -> Trial:
    """The same against TorchJD's engine."""
    problem, other = (examples.NETWORKS[network](B) for _ in range(2))
    method = fastmtl.Uniform()
    error = problem.error(problem.step(method))
    weights, x = torch.full((B,), 1 / B), torch.randn(B, 1000)
    base = other.autogram(lambda _: weights)
    return Trial(lambda: problem.step(method), base, lambda: x.sum(), error, tolerance=1e-5)


def per_example_upgrad(network: str, B: int, kappa: float) -> Trial:
    """The same, end to end with UPGrad against TorchJD's."""
    weightings = importlib.import_module("torchjd.aggregation")
    problem, other = (examples.NETWORKS[network](B) for _ in range(2))
    method, x = fastmtl.UPGrad(ridge=1e-4), torch.randn(B, 1000)
    error = problem.error(problem.step(method))
    base = other.autogram(weightings.UPGradWeighting())
    return Trial(lambda: problem.step(method), base, lambda: x.sum(), error, tolerance=1e-5, rounds=0.2)


def per_example_memory(network: str, B: int) -> float:
    """What a step holds at its peak beyond the peak of a plain one, of the activations that a forward pass keeps."""
    problem, method = examples.NETWORKS[network](B), fastmtl.Uniform()

    def held(function: Callable[[], object]) -> measure.Held:
        problem.network.zero_grad()  # what was there before would be given back within
        return measure.held(function)

    problem.step(method)
    activations = held(problem.losses).left
    plain, step = (held(f).peak for f in (problem.plain, lambda: problem.step(method)))
    return (step - plain) / activations


def threads(T: int, P: int, kappa: float) -> Trial:
    """A matrix [T, P] on as many threads as torch has now, against the same on one."""
    return against_one_thread(flat(T, P, kappa))


def batch_threads(op: str, B: int, T: int, kappa: float) -> Trial:
    """One op on a batch of B Gram matrices [T, T], or `align` on the gradients [B, T, 4 T]; threads as above."""
    G = workloads.matrix(B, T, 4 * T, kappa=kappa)
    M, out = ops.gram(G), torch.empty(B, 4 * T)
    calls: dict[str, Callable[[], Any]] = {
        "align": lambda: ops.align(G, *POLICY, out),
        "align_gram": lambda: ops.align_gram(M, *POLICY)[0],
        "balance": lambda: ops.balance(M, *POLICY)[0],
        "eigh": lambda: ops.eigh(M)[0],
        "gram": lambda: ops.gram(G),
        "unit_solve": lambda: ops.unit_solve(M, None, 1e-6)[0],
        "mgda": lambda: ops.mgda(M)[0],
    }
    function = calls[op]
    several = function()
    with one_thread():
        alone = function()
    error = 0.0 if several is None else float((several - alone).abs().max() / alone.abs().max())
    # LAPACK's bits are its own.
    trial = Trial(function, function, lambda: G.sum(), error, tolerance=1e-12 if op == "eigh" else 0.0)
    return against_one_thread(trial)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread."""
    several = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(several)


def against_one_thread(trial: Trial) -> Trial:
    """A trial, with the same function on one thread as what it is compared with."""

    def alone(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with one_thread():
                function()

        return run

    return replace(trial, base=alone(trial.fast), read_alone=alone(trial.read))


def import_(kappa: float) -> Trial:
    """`import fastmtl` in a fresh process against `import torch`; the read is that of the interpreter."""

    def start(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    return Trial(
        fast=start("import fastmtl"),
        base=start("import torch"),
        read=start("pass"),
        error=0.0,
        tolerance=0.0,
        rounds=2 / 3,
    )


def ragged(T: int, layers: int, kappa: float) -> Trial:
    """T rows of `layers` weights [64, 64] and biases [64] against concatenation."""
    shapes = [shape for _ in range(layers) for shape in ((64, 64), (64,))]
    rows, base, method = workloads.ragged(T, shapes), pure.Ragged(T, shapes), fastmtl.AlignedMTL()
    matrix = base.flatten(rows)
    return Trial(
        fast=lambda: method(rows),
        base=lambda: base(rows),
        read=lambda: matrix.sum(),
        error=workloads.error(method(rows), workloads.exact(matrix)),
        tolerance=workloads.tolerance(T),
    )


def small_tensors(T: int, K: int, n: int, kappa: float) -> Trial:
    """T rows of K tensors of n elements against two of torch's own passes over such lists: a norm of each, a factor."""
    rows, method = workloads.ragged(T, [(n,)] * K), fastmtl.AlignedMTL()
    tensors, outs = [g for row in rows for g in row], [torch.empty(n) for _ in range(K)]
    matrix = torch.stack([torch.cat(row) for row in rows])

    def base() -> None:
        torch._foreach_norm(tensors)
        torch._foreach_mul_(tensors, 1.0)

    method(rows, outs)
    return Trial(
        fast=lambda: method(rows, outs),
        base=base,
        read=lambda: matrix.sum(),
        error=workloads.error(torch.cat(outs), workloads.exact(matrix)),
        tolerance=workloads.tolerance(T),
        rounds=5,
    )


def as_rows(T: int, P: int, kappa: float) -> Trial:
    """T rows of one tensor each, as a list, against the same as a matrix."""
    G, method = workloads.matrix(T, P, kappa=kappa), fastmtl.AlignedMTL()
    rows, out, outs = [[g] for g in G], torch.empty(P), [torch.empty(P)]
    method(rows, outs)
    return Trial(
        fast=lambda: method(rows, outs),
        base=lambda: method(G, out),
        read=lambda: G.sum(),
        error=workloads.error(outs[0], workloads.exact(G)),
        tolerance=workloads.tolerance(T),
    )


def aliases(T: int, batch: int, kappa: float) -> Trial:
    """`fan_out` of a representation [batch, 512] and the backward through it against the same in plain PyTorch."""
    torch.manual_seed(0)
    h, gradients = torch.nn.Parameter(torch.randn(batch, 512)), torch.randn(T, batch, 512)
    method, base = fastmtl.AlignedMTL(), pure.FanOut(T, h.shape)

    def backward(outputs: Sequence[Tensor]) -> Tensor:
        return torch.autograd.grad(list(outputs), h, gradients.unbind())[0]

    def fast() -> Tensor:
        return backward(fastmtl.fan_out(h, T, method))

    return Trial(
        fast=fast,
        base=lambda: backward(base(h)),
        read=lambda: gradients.sum(),
        error=workloads.error(workloads.flatten([fast()]), workloads.exact(gradients.view(T, -1))),
        tolerance=workloads.tolerance(T),
    )


POLICY = (None, "min", 1e-3, 0.0, "normalized")  # of Aligned-MTL, as the ops take it
PIECES = 20  # tensors a row, of the ops on lists


def op(name: str, T: int, P: int, kappa: float) -> Trial:
    """One op on gradients [T, P], or on their columns in pieces; plain Aligned-MTL is the fixed work beside it."""
    G = workloads.conflicting(T, P)
    alpha, seed = torch.linspace(0.5, 1.5, T, dtype=torch.float64), torch.tensor(0)
    pieces = [piece for row in G for piece in row.chunk(PIECES)]
    results = torch.empty(P)
    outs = list(results.chunk(PIECES))
    arguments: dict[str, tuple[Any, ...]] = {
        "align": (G, *POLICY, results),
        "align_rows": (pieces, T, *POLICY, outs),
        "combine": (G, alpha, results),
        "combine_rows": (pieces, alpha, outs),
        "gram": (G,),
        "gram_rows": (pieces, T),
        "sign_drop": (G, seed, None, results),
        "sign_drop_rows": (pieces, T, seed, None, outs),
    }

    def call(module: Any) -> Tensor:
        results.zero_()
        returned = getattr(module, name)(*arguments[name])
        return results.double() if returned is None or name == "align_rows" else returned

    function, base = getattr(ops, name), Pure((T, P))
    return Trial(
        fast=lambda: function(*arguments[name]),
        base=lambda: base(G),
        read=lambda: G.sum(),
        error=workloads.error(call(ops), call(reference)),
        tolerance=peers.AGGREGATION,
    )


def solver(op: str, T: int, kappa: float) -> Trial:
    """Task weights by one op from a Gram matrix [T, T] against those of plain Aligned-MTL."""
    grams, w = workloads.grams(T), torch.full((T,), 1 / T, dtype=torch.float64)
    arguments: dict[str, tuple[Any, ...]] = {
        "balance": POLICY,
        "align_gram": POLICY,
        "mgda": (),
        "dual_cone": (None, True),
        "cagrad": (0.5,),
        "nash": (1.0,),
        "unit_solve": (None, 1e-6),
        "pcgrad": (torch.tensor(0), True),
        "gradvac": (torch.tensor(0), 0.5, torch.zeros(T, T, dtype=torch.float64)),
    }

    def error(M: Tensor) -> float:
        weights = []
        for module in (ops, reference):
            fresh = [x.clone() if isinstance(x, Tensor) else x for x in arguments[op]]  # gradvac's targets move
            result = getattr(module, op)(M, *fresh)
            weights.append(result if isinstance(result, Tensor) else result[0])
        return peers.difference(M, *weights)

    function = getattr(ops, op)
    return Trial(
        fast=lambda: [function(M, *arguments[op]) for M in grams],
        base=lambda: [task_weights(M, w) for M in grams],
        read=lambda: [M.sum() for M in grams],
        error=max(error(M) for M in grams),
        tolerance=1e-6,
        calls=len(grams),
    )


def resnet50_memory(T: int) -> float:
    """MB that the aggregation of T ragged rows takes beyond its result."""
    result = 4 * sum(torch.Size(shape).numel() for shape in workloads.resnet50())
    return (peak_extra_memory(_resnet50_call, T) - result) / 1e6


def _resnet50_call(T: int) -> tuple[Callable[[], object], Callable[[], object]]:
    method = fastmtl.AlignedMTL()
    small, rows = workloads.ragged(T, [(100, 1000), (1000,)]), workloads.ragged(T, workloads.resnet50())
    return lambda: method(small), lambda: method(rows)


def step_memory(T: int) -> float:
    """MB that a step through `fan_out` takes beyond a plain step and the T gradients that are captured."""
    batch, width = 4096, 512  # 8 MiB each: far beyond what the measurement is off by
    peaks = [peak_extra_memory(_step_call, T, batch, aggregated) for aggregated in (False, True)]
    return (peaks[1] - peaks[0] - T * batch * width * 4) / 1e6


def _step_call(T: int, batch: int, aggregated: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    problems = workloads.mlp(T), workloads.mlp(T, batch)
    small, large = (fan_out(problem) if aggregated else problem.step for problem in problems)
    return small, large


def first_call(T: int, P: int) -> float:
    """Milliseconds that the first aggregation of a fresh process takes."""
    return statistics.median(_first_call(T, P) for _ in range(7))


def _first_call(T: int, P: int) -> float:
    code = f"""
import time, torch, fastmtl
torch.set_num_threads({torch.get_num_threads()})
G, method = torch.randn({T}, {P}), fastmtl.AlignedMTL()
start = time.perf_counter()
method(G)
print(1e3 * (time.perf_counter() - start))
"""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


TRIALS: dict[str, Callable[..., Trial]] = {
    function.__name__.rstrip("_"): function
    for function in (
        *(flat, real, real_weights, hard_weights, batched, bfloat16, eigh, resnet50, backward, step_mlp, step_resnet18),
        *(threads, import_, weighting, aggregation, graddrop, coordinates, memory, projector, scalarizer, drop_in),
        *(per_example, per_example_autogram, per_example_upgrad),
        *(ragged, aliases, op, solver),
        *(small_tensors, as_rows, batch_threads),
        *(amortised_mlp, amortised_resnet18, between_solutions, accumulate),
    )
}
FIGURES: dict[str, Callable[..., float]] = {
    function.__name__: function for function in (resnet50_memory, step_memory, per_example_memory, first_call)
}

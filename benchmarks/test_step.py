"""Training steps: the gradients of one batch, from `zero_grad` to `.grad`, in every way there is to aggregate them.

A step drops every `.grad`, runs forward and runs backward; an optimizer would cost all ways the same and is left out.
Each way is timed in turn with the plain step of the summed losses: those ratios make the table at the end of the run
(conftest.py prints it), whereas pytest-benchmark's own tables time one way after the other.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import loops
import measure
import pure
import pytest
import torch
import workloads
from torch import Tensor

import fastmtl
from fastmtl import scalarization
from fastmtl.scaling.timing import interleave
from fastmtl.training.fan_out import Via

pytest.importorskip("pytest_benchmark")

SECONDS = 3.0  # of interleaved timing for a ratio
MODELS = {
    "mlp T=3": lambda: workloads.mlp(3),
    "mlp T=10": lambda: workloads.mlp(10),
    "mlp T=40": lambda: workloads.mlp(40),
    "resnet18 T=3": lambda: workloads.resnet18(3),
}


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" T=", "-"))
def problem(request: pytest.FixtureRequest) -> tuple[str, workloads.MultiTask, dict[str, Tensor]]:
    """A model, and its encoder's gradient: of the plain sum, of Aligned-MTL-UB, of Aligned-MTL and of it by layers."""
    measure.keep_memory()
    model = MODELS[request.param]()
    model.step()
    plain = model.shared_grad().double()
    expected = {"plain": plain, "half": plain / 2, "UB": model.exact_upper_bound(), "full": model.exact()}
    return request.param, model, expected | {"layers": model.exact(model.layers)}


def plain(model: workloads.MultiTask) -> Callable[[], object]:
    """One backward of the summed losses: no aggregation."""
    return model.step


def fan_out(model: workloads.MultiTask, via: Via = "node") -> Callable[[], object]:
    """One backward of the summed losses, aggregation where the aliases of the representation meet."""
    method = fastmtl.AlignedMTL()
    return lambda: model.step(lambda h: fastmtl.fan_out(h, model.tasks, method, via=via))


def attached(model: workloads.MultiTask) -> Callable[[], object]:
    """The same by module hooks, on modules of their own with the same parameters: the plain step has to go without."""
    twin = copy.deepcopy(model, {id(p): p for p in model.model.parameters()})
    fastmtl.attach(twin.encoder, list(twin.model[1:]), fastmtl.AlignedMTL())
    return twin.step


def weighted(model: workloads.MultiTask) -> Callable[[], object]:
    """A weighted sum of the losses: no aggregation, but what the losses' weights cost."""
    method = scalarization.Uncertainty(model.tasks)

    def run() -> None:
        model.zero_grad()
        method.zero_grad()
        method(model.losses([model.forward()] * model.tasks)).backward()

    return run


def pure_full(model: workloads.MultiTask) -> Callable[[], object]:
    """The exact method in plain PyTorch."""
    base = pure.Backward(model.shared, model.heads)

    def run() -> None:
        model.zero_grad()
        base(model.losses([model.forward()] * model.tasks))

    return run


def loop(model: workloads.MultiTask) -> Callable[[], object]:
    """The exact method as LibMTL-style loops collect it."""
    collect = loops.Loop(model.shared)

    def run() -> None:
        model.zero_grad()
        collect(model.losses([model.forward()] * model.tasks))

    return run


def loop_ub(model: workloads.MultiTask) -> Callable[[], object]:
    """The upper bound as they do it."""

    def run() -> None:
        model.zero_grad()
        loops.upper_bound(model.forward(), lambda z: model.losses([z] * model.tasks))

    return run


def pure_fan_out(model: workloads.MultiTask) -> Callable[[], object]:
    """The same in plain PyTorch."""
    aliases = pure.FanOut(model.tasks, model.forward().shape)
    return lambda: model.step(aliases)


def backward(model: workloads.MultiTask, options: Sequence[str]) -> Callable[[], object]:
    """`method.backward` with these options."""
    method = fastmtl.AlignedMTL()

    def run() -> None:
        model.zero_grad()
        h = model.forward()
        values: dict[str, Any] = {"shared": model.shared, "representation": h, "features": h, "batched": True}
        values["groups"] = model.layers
        method.backward(model.losses([h] * model.tasks), **{option: values[option] for option in options})

    return run


def torchjd(model: workloads.MultiTask, chunk: int | None = None) -> Callable[[], object]:
    """TorchJD's `mtl_backward`, behind the features with `torch.vmap` (chunk None) or one pass after the other (1)."""
    mtl_backward, jac_to_grad, aggregator = torchjd_parts()

    def run() -> None:
        model.zero_grad()
        h = model.forward()
        mtl_backward(model.losses([h] * model.tasks), features=h, parallel_chunk_size=chunk)
        jac_to_grad(model.shared, aggregator)

    return run


def torchjd_ub(model: workloads.MultiTask) -> Callable[[], object]:
    """TorchJD offers no upper bound; its parts make one, on a detached representation."""
    mtl_backward, jac_to_grad, aggregator = torchjd_parts()

    def run() -> None:
        model.zero_grad()
        h = model.forward()
        z = h.detach().requires_grad_()
        mtl_backward(model.losses([z] * model.tasks), features=z, shared_params=[z], tasks_params=model.heads)
        jac_to_grad([z], aggregator)
        torch.autograd.backward(h, z.grad)

    return run


def torchjd_parts() -> tuple[Any, Any, Any]:
    autojac = pytest.importorskip("torchjd.autojac")
    if not hasattr(autojac, "jac_to_grad"):
        pytest.skip("needs a TorchJD with jac_to_grad")
    return autojac.mtl_backward, autojac.jac_to_grad, pytest.importorskip("torchjd.aggregation").AlignedMTL()


# The table's rows: which gradient it is, and how the step is made.
WAYS: dict[str, tuple[str, Callable[..., Callable[[], object]], dict[str, Any]]] = {
    "summed losses": ("plain", plain, {}),
    "weighted losses: Uncertainty": ("half", weighted, {}),
    "UB: fan_out": ("UB", fan_out, {}),
    'UB: fan_out, via="hooks"': ("UB", fan_out, {"via": "hooks"}),
    "UB: attach": ("UB", attached, {}),
    "UB: backward(representation=)": ("UB", backward, {"options": ["representation"]}),
    "UB: plain PyTorch": ("UB", pure_fan_out, {}),
    "UB: TorchJD's parts": ("UB", torchjd_ub, {}),
    "UB: LibMTL-style loop": ("UB", loop_ub, {}),
    "full: backward(shared=)": ("full", backward, {"options": ["shared"]}),
    "full: backward(features=)": ("full", backward, {"options": ["features"]}),
    "full: backward(features=, batched=True)": ("full", backward, {"options": ["features", "batched"]}),
    "full: backward(groups=layers)": ("layers", backward, {"options": ["groups"]}),
    "full: plain PyTorch": ("full", pure_full, {}),
    "full: TorchJD's mtl_backward": ("full", torchjd, {}),
    "full: TorchJD's mtl_backward, one by one": ("full", torchjd, {"chunk": 1}),
    "full: LibMTL-style loop": ("full", loop, {}),
}
OURS = (fan_out, attached, backward, weighted)


@pytest.mark.benchmark(max_time=0.3, min_rounds=3)
@pytest.mark.parametrize("way", WAYS)
def test_step(
    benchmark: Any, record_property: Any, problem: tuple[str, workloads.MultiTask, dict[str, Tensor]], way: str
) -> None:
    """One step, compared with its exact gradient, then timed beside the plain step."""
    name, model, expected = problem
    gradient, make, options = WAYS[way]
    run = make(model, **options)
    run()
    tolerance = workloads.tolerance(model.tasks) if make in OURS else 1e-3
    assert workloads.error(model.shared_grad(), expected[gradient]) <= tolerance

    start = time.perf_counter()
    run()
    model.step()
    rounds = min(max(round(SECONDS / (time.perf_counter() - start)), 9), 300)
    timing = interleave({"plain": model.step, "way": run, "read": expected[gradient].sum}, rounds)
    ratio = timing.seconds["way"] / timing.seconds["plain"]
    cell = f"{ratio:.2f} ({1e3 * timing.seconds['way']:.3g}){'' if timing.steady else ' ?'}"
    record_property("step", (way, name, cell, timing.others))
    benchmark.extra_info |= {"ratio": ratio, **timing._asdict()}
    benchmark.group = f"step {name}"
    benchmark(run)

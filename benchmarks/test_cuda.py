"""On a GPU: fastmtl beside plain PyTorch, called eagerly and as a CUDA graph, timed by CUDA events.

With FASTMTL_REHEARSAL=1 everything runs on the CPU, at tiny sizes (tools/gpu.py --rehearse): that the code is right.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import measure
import pure
import pytest
import torch
import workloads
from torch import Tensor

import fastmtl
from fastmtl import ops
from fastmtl.scaling.baseline import Pure

pytest.importorskip("pytest_benchmark")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (measure.REHEARSAL or torch.cuda.is_available()), reason="needs an NVIDIA GPU"),
]

FLAT = [(2, 1_000_000), (10, 1_000_000), (10, 10_000_000), (32, 1_000_000), (64, 1_000_000), (128, 100_000)]
HARD = [(10, 1_000_000), (32, 1_000_000)]
MANY, UNEVEN = [(65, 100_000), (128, 100_000), (256, 100_000), (512, 20_000), (1024, 10_000)], (128, 100_000)
BATCHED, EIGH = [(512, 8, 2048)], [(512, 3), (4096, 8), (1024, 33), (500, 64)]
ROUNDS, ENOUGH, LONGEST = 30, 2e-3, 0.3  # timed rounds; seconds that one takes at least, and all of them at most
ROOF = 1 << 29
if measure.REHEARSAL:
    FLAT, HARD, MANY, UNEVEN, BATCHED, EIGH = [(3, 1000)], [(10, 2000)], [(65, 500)], (65, 500), [(8, 3, 70)], [(5, 3)]
    ROUNDS, ENOUGH, LONGEST, ROOF = 3, 1e-5, 1e-2, 1 << 10
DEVICE = measure.DEVICE
MEGABYTE = 1_000_000

ways = pytest.mark.parametrize("way", ["eager", "graph"])
names = pytest.mark.parametrize("name", ["fastmtl", "pure"])


class Times(NamedTuple):
    """Seconds of one call on the device, a number a round."""

    rounds: list[float]
    bytes: int  # that the call allocates at most


def on_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns where all that it makes lies on the GPU. Not for what is timed: it costs the host."""
    with torch.device(DEVICE):
        return function(*arguments)


def name_of(shape: tuple[int, ...]) -> str:
    """2x1000000."""
    return "x".join(map(str, shape))


def captured(call: Callable[[], object], must: bool) -> Callable[[], object]:
    """The call as a CUDA graph; plain PyTorch's is skipped where torch.linalg.eigh cannot be captured."""
    if measure.REHEARSAL:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        if must:
            raise
        torch.cuda.synchronize()
        pytest.skip(f"cannot be captured: {str(error).splitlines()[0]}")
    return graph.replay


def timed(call: Callable[[], object]) -> Times:
    """Warm and preallocated. A round is as many calls in a row as fill `ENOUGH`, between two events."""
    sample = measure.sample()
    for _ in range(3):
        call()
    n = max(1, round(ENOUGH / sample(call, 1)))
    n = max(1, round(ENOUGH / sample(call, n)))
    peak = measure.peak(call)
    rounds = [sample(call, n)]
    while len(rounds) < ROUNDS and (len(rounds) < 3 or sum(rounds) * n < LONGEST):
        rounds.append(sample(call, n))
    return Times(rounds, peak)


def report(benchmark: Any, group: str, call: Callable[[], object], way: str, moved: int) -> None:
    """Times the call: events in `extra_info`, and pytest-benchmark's own clock around a call and a wait for it.

    `moved` is what the call cannot do without, in bytes: of a step two reads of the input and a write of the result.
    """
    call = captured(call, must=benchmark.params.get("name") != "pure") if way == "graph" else call
    times = timed(call)
    median = statistics.median(times.rounds)
    benchmark.group = group
    benchmark.extra_info["device"] = measure.device_name()
    benchmark.extra_info["microseconds"] = round(median * 1e6, 2)
    benchmark.extra_info["fastest, microseconds"] = round(min(times.rounds) * 1e6, 2)
    benchmark.extra_info["GB/s"] = round(moved / median / 1e9, 1)
    benchmark.extra_info["megabytes allocated"] = round(times.bytes / MEGABYTE, 2)

    def wait() -> None:
        call()
        measure.synchronize()

    benchmark.pedantic(wait, rounds=len(times.rounds), warmup_rounds=1)


@pytest.mark.parametrize("name", ["copy", "sum"])
def test_roof(benchmark: Any, name: str) -> None:
    """What the device's memory gives: a copy, and PyTorch's own reading of everything once."""
    x = torch.rand(ROOF, device=DEVICE)
    out = torch.empty_like(x)
    run = (lambda: out.copy_(x)) if name == "copy" else (lambda: x.sum())
    report(benchmark, "cuda roof", run, "eager", x.nbytes * (2 if name == "copy" else 1))


@ways
@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", FLAT, ids=name_of)
def test_flat(benchmark: Any, shape: tuple[int, int], dtype: torch.dtype, name: str, way: str) -> None:
    """One matrix [T, P] of full rank; plain PyTorch has a Gram matrix and an eigenproblem in float32."""
    T, P = shape
    if name == "pure" and dtype is not torch.float32:
        pytest.skip("torch.linalg.eigh takes no bfloat16")
    G = on_gpu(workloads.matrix, T, P).to(dtype)
    method, out, base = fastmtl.AlignedMTL(), torch.empty(P, dtype=dtype, device=DEVICE), on_gpu(Pure, (T, P), dtype)

    def run() -> Tensor:
        return method(G, out=out) if name == "fastmtl" else base(G)

    limit = workloads.tolerance(T, dtype) if name == "fastmtl" else 1e-3
    assert workloads.error(run(), on_gpu(workloads.exact, G)) <= limit
    moved = (2 * T + 1) * P * G.element_size()
    report(benchmark, f"cuda {str(dtype)[6:]} {name_of(shape)}", run, way, moved)


@pytest.mark.parametrize("way", ["eager", "graph"])
@pytest.mark.parametrize("name", ["fastmtl", "pure", "host"])
@pytest.mark.parametrize(
    ("shape", "spread"), [*((shape, 1.0) for shape in MANY), (UNEVEN, 1e4)], ids=[*map(name_of, MANY), "uneven"]
)
def test_many(benchmark: Any, shape: tuple[int, int], spread: float, name: str, way: str) -> None:
    """More than 64 tasks: weights on the device, beside PyTorch's eigh there, and beside the CPU's of a copy.

    Norms of rows may spread as those of single examples do, for which eigh in float32 has no digits.
    """
    T, P = shape
    if way == "graph" and name != "fastmtl":
        pytest.skip("neither eigh nor a copy to the host can be captured")
    if spread > 1 and name == "pure":
        pytest.skip("eigh in float32 has no digits left where norms of rows differ by 1e4")
    G = on_gpu(lambda: workloads.matrix(T, P, spread=spread))
    method, out, base = fastmtl.AlignedMTL(), torch.empty(P, device=DEVICE), on_gpu(Pure, (T, P))

    def on_host() -> Tensor:
        alpha, _ = ops.align_gram(ops.gram(G).cpu(), None, "min", 1e-3, 1e-7, "normalized")
        ops.combine(G, alpha.to(G.device), out)
        return out

    run = {"fastmtl": lambda: method(G, out=out), "pure": lambda: base(G), "host": on_host}[name]
    limit = 1e-3 if name == "pure" else workloads.tolerance(T)
    assert workloads.error(run(), on_gpu(workloads.exact, G)) <= limit
    group = f"cuda many {'uneven ' if spread > 1 else ''}{name_of(shape)}"
    report(benchmark, group, run, way, (2 * T + 1) * P * 4)


@ways
@pytest.mark.parametrize("shape", HARD, ids=name_of)
def test_ill_conditioned(benchmark: Any, shape: tuple[int, int], way: str) -> None:
    """A condition number of 1000: where float64 is slow, float32 blocks do not do, and a second pass is taken."""
    G = on_gpu(lambda: workloads.matrix(*shape, kappa=1e3))
    method, out = fastmtl.AlignedMTL(), torch.empty(shape[1], device=DEVICE)

    def run() -> Tensor:
        return method(G, out=out)

    assert workloads.error(run(), on_gpu(workloads.exact, G)) <= workloads.tolerance(shape[0])
    report(benchmark, f"cuda κ=1e3 {name_of(shape)}", run, way, (2 * shape[0] + 1) * shape[1] * 4)


@ways
@names
@pytest.mark.parametrize("shape", BATCHED, ids=name_of)
def test_batched(benchmark: Any, shape: tuple[int, int, int], name: str, way: str) -> None:
    """[B, T, P]: one launch, against bmm and a batched torch.linalg.eigh."""
    B, T, P = shape
    G = on_gpu(workloads.matrix, *shape)
    method, out, base = fastmtl.AlignedMTL(), torch.empty(B, P, device=DEVICE), on_gpu(Pure, shape)

    def run() -> Tensor:
        return method(G, out=out) if name == "fastmtl" else base(G)

    assert workloads.error(run(), on_gpu(workloads.exact, G)) <= (1e-5 if name == "fastmtl" else 1e-3)
    report(benchmark, f"cuda batched {name_of(shape)}", run, way, B * (2 * T + 1) * P * 4)


@ways
@names
@pytest.mark.parametrize("shape", EIGH, ids=name_of)
def test_eigh(benchmark: Any, shape: tuple[int, int], name: str, way: str) -> None:
    """B eigenproblems of T x T in float64."""
    M = on_gpu(workloads.symmetric, *shape)
    run = (lambda: fastmtl.eigh(M)) if name == "fastmtl" else (lambda: tuple(torch.linalg.eigh(M)))
    eigenvalues, eigenvectors = run()
    assert on_gpu(workloads.eigen_error, M, eigenvalues, eigenvectors) <= 10
    B, T = shape
    report(benchmark, f"cuda eigh {name_of(shape)}", run, way, B * (2 * T * T + T) * 8)


@ways
@names
@pytest.mark.parametrize("T", [8])
def test_ragged(benchmark: Any, T: int, name: str, way: str) -> None:
    """The 161 gradients of a ResNet-50, read where they lie, against a concatenation into a preallocated matrix."""
    shapes = workloads.resnet50()[:: 40 if measure.REHEARSAL else 1]
    rows = on_gpu(workloads.ragged, T, shapes)
    base, method = on_gpu(pure.Ragged, T, shapes), fastmtl.AlignedMTL()
    out = [torch.empty_like(g) for g in rows[0]]

    def run() -> Sequence[Tensor | None]:
        return method(rows, out=out) if name == "fastmtl" else base(rows)

    expected = on_gpu(workloads.exact, base.flatten(rows))
    assert workloads.error(run(), expected) <= (2e-6 if name == "fastmtl" else 1e-3)
    report(benchmark, f"cuda ragged resnet50 T={T}", run, way, (2 * T + 1) * expected.numel() * 4)
    if name == "fastmtl":
        assert benchmark.extra_info["megabytes allocated"] <= 8  # no copy of G, which takes 818

"""Task weights from a Gram matrix, beside TorchJD's; and whole aggregations, beside Aligned-MTL's.

The ratios come from interleaved medians and make the tables at the end of the run (conftest.py prints them), whereas
pytest-benchmark's own tables time one after the other. Both sides get the same float64 Gram matrices, several in turn:
a solver that remembers the last solution sees a new problem, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
import workloads

import fastmtl
from fastmtl.scaling.timing import Timing, interleave

pytest.importorskip("pytest_benchmark")

ROUNDS = {10: 30, 40: 12, 128: 5}
T, P = 10, 1_000_000


def compare(
    fast: Callable[[], object], base: Callable[[], object], data: torch.Tensor, rounds: int, calls: int = 1
) -> tuple[float, float, Timing]:
    """Seconds of a call of each, and the timing."""
    timing = interleave({"base": base, "fast": fast, "read": data.sum}, rounds).per_call(calls)
    return timing.seconds["fast"], timing.seconds["base"], timing


@pytest.mark.benchmark(max_time=0.2, min_rounds=3)
@pytest.mark.parametrize("tasks", workloads.GRAMS)
@pytest.mark.parametrize("name", peers.PEERS)
def test_weighting(benchmark: Any, record_property: Any, name: str, tasks: int) -> None:
    """Our weights, checked; then timed beside TorchJD's."""
    peer, grams = peers.PEERS[name], workloads.grams(tasks)
    try:
        ours, theirs = peer.passes(grams)
    except ImportError as error:
        pytest.skip(f"{error}: {peers.INSTALL}")
    assert max(peer.error(M) for M in grams) <= peer.tolerance

    fast, base, timing = compare(ours, theirs, torch.stack(grams), ROUNDS[tasks], len(grams))
    cell = f"{base / fast:.3g} × ({1e6 * fast:.3g} µs, {1e3 * base:.3g} ms){'' if timing.steady else ' ?'}"
    record_property("weighting", (name, f"T = {tasks}", cell, timing.others))
    benchmark.extra_info |= {"ratio": base / fast, **timing._asdict()}
    benchmark.group = f"weighting T={tasks}, {len(grams)} matrices"
    benchmark(ours)


@pytest.mark.benchmark(max_time=0.2, min_rounds=3)
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "AlignedMTL"])
def test_weighting_aggregation(benchmark: Any, record_property: Any, name: str) -> None:
    """A whole aggregation, checked; then timed beside Aligned-MTL's."""
    peer, G, out = peers.PEERS[name], workloads.conflicting(T, P), torch.empty(P)
    assert peer.aggregation_error(G) <= peers.AGGREGATION
    method, aligned = peer.ours(), fastmtl.AlignedMTL()

    def run() -> None:
        method(G, out=out)

    fast, base, timing = compare(run, lambda: aligned(G, out=out), G, 30)
    cell = f"{fast / base:.2f} × ({1e3 * fast:.3g} ms){'' if timing.steady else ' ?'}"
    record_property("aggregation", (name, f"m(G) / AlignedMTL()(G), [{T}, {P:.0e}]", cell, timing.others))
    benchmark.extra_info |= {"ratio": fast / base, **timing._asdict()}
    benchmark.group = "weighting: whole aggregations"
    benchmark(run)


@pytest.mark.benchmark(max_time=0.2, min_rounds=3)
def test_weighting_graddrop(benchmark: Any, record_property: Any) -> None:
    """GradDrop, which works on the gradients themselves, beside TorchJD's."""
    theirs = pytest.importorskip("torchjd.aggregation", reason=peers.INSTALL)
    G, out = workloads.conflicting(T, P), torch.empty(P)
    method, peer = fastmtl.GradDrop(), theirs.GradDrop()
    assert workloads.sign_error(G, method(G)) <= workloads.tolerance(T)

    def run() -> None:
        method(G, out=out)

    fast, base, timing = compare(run, lambda: peer(G), G, 10)
    cell = f"{base / fast:.3g} × ({1e3 * fast:.3g} ms, {1e3 * base:.3g} ms){'' if timing.steady else ' ?'}"
    record_property("graddrop", ("GradDrop", f"[{T}, {P:.0e}]", cell, timing.others))
    benchmark.extra_info |= {"ratio": base / fast, **timing._asdict()}
    benchmark.group = "weighting: GradDrop"
    benchmark(run)

"""benchmarks/cuda_model.py counts what the pipeline launches, with the numbers of its sources."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import BF16, DTYPES, F32, F64, dtype_id, randn

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir() or not (ROOT / "csrc").is_dir(), reason="the tests run without the source tree"
)


@pytest.fixture(scope="module")
def model():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("cuda_model")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def emulation():
    """The kernels and their pipeline on the host."""
    sys.path.insert(0, str(ROOT / "tests" / "emulation"))
    try:
        return importlib.import_module("harness")
    finally:
        sys.path.pop(0)


def sources():
    return "\n".join(p.read_text() for p in sorted((ROOT / "csrc").rglob("*.*")))


def test_the_constants_are_those_of_the_sources(model):
    text = sources()
    expected = {**model.CONSTANTS, **model.THRESHOLDS}

    def found(pattern):
        values = {eval(re.sub(r"int64_t\((\d+)\)", r"\1", x)) for x in re.findall(pattern, text)}
        assert len(values) == 1, (pattern, values)
        return values.pop()

    patterns = {
        "slow float64, tasks in float64": r"slow_float64 \? (\d+) : kGroupRows",
        "slow float64, least ratio": r"slow_float64 = ratio > (\d+);",
        "blocks, stream": r"enough = plan\.rows <= 8 \? (\d+) : \d+;",
        "blocks, tiles": r"enough = plan\.rows <= 8 \? \d+ : (\d+);",
        "blocks, at most": r"std::clamp<int64_t>\(tiles / \d+, enough, (\d+)\)",
        "tiles of a block": r"std::clamp<int64_t>\(tiles / (\d+), enough, \d+\)",
    }
    for name in expected:
        assert found(patterns.get(name, rf"\b{name} = ([^,;=]+)[,;]")) == expected[name], name


def names(kernels):
    return [kernel.name.partition("<")[0] for kernel in kernels for _ in range(kernel.launches)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64, 72])
@pytest.mark.parametrize("slow", [False, True], ids=["float64", "slow float64"])
def test_launches_of_a_matrix(model, emulation, T, dtype, slow):
    device = next(d for d in model.DEVICES if d.slow_float64 == slow)
    small = model.CONSTANTS["kSmallEntries"] // max(T, 8)
    for P in (700, small, small + 1) if T <= 32 else (700,):
        got = emulation.Device(slow).align(randn(T, P, dtype=dtype)).launches
        assert names(model.align(model.Case(T, P, dtype), device)) == got


@pytest.mark.parametrize("shape", [(3, 8, 200), (64, 4, 800), (65, 32, 40), (2, 33, 100)], ids=str)
def test_launches_of_a_batch(model, emulation, shape):
    B, T, P = shape
    got = emulation.Device(False).align(randn(*shape)).launches
    assert names(model.align(model.Case(T, P, B=B), model.DEVICES[0])) == got


@pytest.mark.parametrize(("T", "K"), [(3, 5), (8, 161), (20, 40), (2, 700)])
def test_launches_of_a_ragged_list(model, emulation, T, K):
    sizes = tuple(1 + 37 * k % 211 for k in range(K))
    grads = [randn(n, seed=t * K + k) for t in range(T) for k, n in enumerate(sizes)]
    got = emulation.Device(False).align_rows(grads, T, F32).launches
    case = model.Case(T, sum(sizes), sizes=sizes)
    assert names(model.align(case, model.DEVICES[0])) == got


def test_launches_of_many_tasks(model, emulation):
    """Beyond what one block can solve ops/large_cuda.h calls the pipeline's parts, and ops of torch's between them."""
    device, G = emulation.Device(False), randn(130, 600)
    device.gram(G, exact=False)
    got = device.launches()
    device.gram(G, exact=True)
    got += device.launches()
    device.combine(G, torch.ones(130, dtype=F64))
    got += device.launches()
    kernels = model.align(model.Case(130, 600), model.DEVICES[0])
    ours = [kernel for kernel in kernels if kernel.name not in ("second_pass", "balance_many")]
    assert names(ours) == got
    assert [kernel.name for kernel in kernels if kernel not in ours] == ["second_pass", "balance_many"]


def test_products_of_many_tasks(model):
    """25 doublings of two products and a factorisation each, of M and C, and what goes before and after."""
    weights = model._products("balance_many", 1, 128, None, "min", 1e-3, 1e-7, "normalized")
    assert 25 * 2 * 2 <= weights.mma64 / 128**3 <= 150
    assert weights.steps == (25 + 4 + 1 + 1) * 128
    assert 20 * 25 <= weights.launches <= 700
    twice = model._products("balance_many", 1, 256, None, "min", 1e-3, 1e-7, "normalized")
    assert twice.steps == 2 * weights.steps
    assert twice.mma64 >= 8 * weights.mma64


def test_devices(model):
    assert [device.slow_float64 for device in model.DEVICES] == [False, False, True]


def test_the_roofline(model):
    device = model.Device("test", bandwidth=1e9, float32=4e9, float64=2e9, matrix64=4e9, processors=10)
    launch = model.LAUNCH
    assert model.Kernel("reads", 10, bytes=1e6, fma32=1e6).seconds(device) == pytest.approx(1e-3 + launch)
    assert model.Kernel("float32", 10, bytes=1e6, fma32=4e6).seconds(device) == pytest.approx(2e-3 + launch)
    assert model.Kernel("float64", 10, fma64=1e6).seconds(device) == pytest.approx(1e-3 + launch)
    assert model.Kernel("matrix products", 10, mma64=1e6).seconds(device) == pytest.approx(5e-4 + launch)
    assert model.Kernel("one block", 1, fma64=1e6).seconds(device) == pytest.approx(1e-2 + launch)
    assert model.Kernel("nothing", 1, launches=3).seconds(device) == pytest.approx(3 * launch)
    assert model.Kernel("waits", 1, cycles=1.7e6).seconds(device) == pytest.approx(1e-3 + launch)


def test_what_weights_wait_for(model):
    """T steps of constant length, and rounds that narrow λ_min to the width of the sources."""
    for threads in (64, 256, 512):
        shifts = min(threads, 256)
        width, rounds = 1 - 1e-8 ** (1 / shifts), 1
        while width > 1e-13:
            width, rounds = width / (shifts + 1), rounds + 1
        assert model._rounds(threads) == rounds
    totals = {T: sum(model._weights(T, 512)[2].values()) for T in (3, 32, 64)}
    assert totals[64] - totals[32] == pytest.approx(32 / 29 * (totals[32] - totals[3]), rel=1e-9)
    assert totals[64] / model.DEVICES[0].clock < 1e-4 < 504 * model.JACOBI_STEP[64]


def test_what_is_counted(model):
    """G is read twice and the result written once, whatever else there is."""
    for case in model.CASES:
        for device in model.DEVICES:
            moved = sum(kernel.bytes for kernel in model.align(case, device))
            reads = 1 if case.B > 1 else 1 + -(-case.T // 64)
            reads += case.B == 1 and (8 if device.slow_float64 else 64) < case.T  # the probe
            assert 1.0 <= moved / (case.entries * (reads + 1 / case.T)) <= 1.2, case.name
    assert model.plain(model.Case(10, 1000, BF16)) is None
    kernels = model.plain(model.Case(10, 1_000_000))
    assert sum(kernel.fma32 for kernel in kernels) == 110 * 1_000_000

"""The emulator of host_cuda.h computes what a device would, and finds the defects that it claims to find."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import numpy as np
import pytest
from emulation import build
from helpers import HEADERS, NO_HEADERS

pytestmark = pytest.mark.skipif(not HEADERS, reason=NO_HEADERS)
ORDERS = [("sequential", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)]
NUMBERS = np.random.default_rng(0).integers(0, 9, 640).astype(np.float32)

# What the emulator finds by itself, and a part of the message.
ERRORS = {
    "different_barriers": "wait at different barriers",
    "return_before_barrier": "returned",
    "return_at_barrier": "returned",
    "mask_of_returned": "names lane 7, which has returned",
    "return_inside_mask": "names lane 7, which has returned",
    "mask_without_caller": "does not name the calling lane",
    "read_outside_mask": "reads lane 16, which is not in the mask 0x0000ffff",
    "masks_disagree": "lanes of a warp disagree",
    "places_disagree": "lanes of a warp disagree",
    "deadlock": "32 threads wait at a barrier, 32 in a warp collective",
}
# What AddressSanitizer and the undefined-behaviour sanitizer find, as an expression on `toys`.
OUTSIDE = {
    "shared_read_outside": "heap-buffer-overflow",
    "shared_write_outside": "heap-buffer-overflow",
    "shared_read_before": "heap-buffer-overflow",
    "global_read_outside": "heap-buffer-overflow",
    "global_write_outside": "heap-buffer-overflow",
    "misaligned": "misaligned address",
}
# What ThreadSanitizer finds.
RACES = {
    "missing barrier": "toys.rotate(x, False)",
    "shuffle instead of __syncwarp": "toys.exchange_in_warp(False)",
    "blocks write the same": "toys.write_same(2)",
    "no fence before the atomic": "toys.last_block_sum_without_fence_before(x)",
    "no fence after the atomic": "toys.last_block_sum_without_fence_after(x)",
}


@pytest.fixture(scope="module")
def toys() -> ModuleType:
    return build.load(build.build("plain"))


@pytest.fixture(autouse=True)
def _reset(toys: ModuleType) -> None:
    toys.set_order("sequential", 0)
    toys.set_shared_limit(227 << 10)
    toys.reset_launches()


def expected_collectives() -> np.ndarray:
    t = np.arange(96)
    lane, warp = t % 32, t // 32

    def value(source: np.ndarray | int) -> np.ndarray:
        return (warp * 32 + source) ** 2 + 1.0

    low = lane < 8
    columns = [
        value(5),
        value(lane // 8 * 8 + (lane + 1) % 8),
        value(lane ^ 16),
        value(np.where((lane ^ 4) // 4 <= lane // 4, lane ^ 4, lane)),
        value(np.where(lane + 3 < 32, lane + 3, lane)),
        value(np.where(lane % 16 + 3 < 16, lane + 3, lane)),
        value(np.where(lane >= 2, lane - 2, lane)),
        value(np.where(lane % 4 >= 2, lane - 2, lane)),
        sum(1 << k for k in range(0, 32, 3)),
        warp == 1,
        warp != 1,
        21,
        1,
        0,
        1,
        0,
        np.where(warp % 2 == 0, value(lane ^ 1), -1),
        np.where(low, value(lane ^ 7), value(np.minimum(lane + 1, 31))),
        96 * 1e6 + 1e3,
        32,
    ]
    return np.stack([np.broadcast_to(np.asarray(column, float), t.shape) for column in columns], axis=1)


def check_values(toys: ModuleType) -> None:
    for type_name in ("float", "double", "int", "uint", "int64"):
        np.testing.assert_array_equal(toys.collectives(type_name), expected_collectives())
    np.testing.assert_array_equal(toys.partial_warp(), np.repeat(np.arange(40).reshape(5, 8).sum(1), 8))
    np.testing.assert_array_equal(toys.indices(), (1000 * np.arange(24)[:, None] + np.arange(60)).ravel())
    np.testing.assert_array_equal(toys.intrinsics(), [10, -2, 8, 4, 31, 1, 14, 6, 2])
    assert toys.last_block_sum(NUMBERS) == NUMBERS.sum()
    assert toys.count() == (1000, -500)
    np.testing.assert_array_equal(toys.rotate(NUMBERS, True), np.roll(NUMBERS, -1))
    np.testing.assert_array_equal(toys.exchange_in_warp(True), np.arange(64) ^ 1)
    np.testing.assert_array_equal(toys.local_array(), np.tile(np.arange(16), 8))
    np.testing.assert_array_equal(toys.defective(toys.Defect.none), np.ones(64))


def check_errors(toys: ModuleType) -> None:
    """Each error is thrown, names the place, and leaves the emulator as it was."""
    for name, message in ERRORS.items():
        with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
            toys.defective(getattr(toys.Defect, name))
        assert re.search(
            r"toys\.cpp:\d+, kernel defective, block \(0, 0, 0\), thread \(\d+, 0, 0\)$", str(caught.value)
        )
        np.testing.assert_array_equal(toys.defective(toys.Defect.none), np.ones(64))


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_values(toys: ModuleType, order: str, seed: int) -> None:
    toys.set_order(order, seed)
    check_values(toys)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_errors(toys: ModuleType, order: str, seed: int) -> None:
    toys.set_order(order, seed)
    check_errors(toys)


def test_place_of_an_error(toys: ModuleType) -> None:
    """The message has the line of the call and the thread, also in three dimensions and in a template."""
    source = (build.HERE / "toys.cpp").read_text().splitlines()
    with pytest.raises(RuntimeError) as caught:
        toys.defective(toys.Defect.mask_without_caller)
    found = re.search(r"__syncwarp at \S*toys\.cpp:(\d+), .* thread \(0, 0, 0\)$", str(caught.value))
    assert found
    assert "__syncwarp(1u << 3)" in source[int(found[1]) - 1]


def test_missing_barrier_gives_a_wrong_result(toys: ModuleType) -> None:
    """Shared memory starts as NaN, and some order lets a thread read before its neighbour has written."""
    results = []
    for order, seed in ORDERS:
        toys.set_order(order, seed)
        results.append(toys.rotate(NUMBERS, False))
    right = np.roll(NUMBERS, -1)
    assert any(np.isnan(result).any() for result in results)
    assert all(np.isin(result[~np.isnan(result)], right).all() for result in results)


def test_uninitialised_shared_memory_is_nan(toys: ModuleType) -> None:
    """Also when an earlier launch left numbers there."""
    toys.empty((1, 1, 1), (32, 1, 1), 1024)
    assert np.isnan(toys.defective(toys.Defect.shared_uninitialised)).all()


def test_order_of_blocks(toys: ModuleType) -> None:
    """The last block to run wins a race; each order has another, and a seed always the same."""
    toys.set_order("sequential", 0)
    assert toys.write_same(50) == 49
    toys.set_order("reversed", 0)
    assert toys.write_same(50) == 0
    last = []
    for seed in (1, 2, 3, 1):
        toys.set_order("shuffled", seed)
        last.append(toys.write_same(50))
    assert len(set(last[:3])) > 1
    assert last[0] == last[3]
    with pytest.raises(ValueError, match="no such order: backwards"):
        toys.set_order("backwards", 0)


def test_launches_are_recorded(toys: ModuleType) -> None:
    toys.last_block_sum(NUMBERS)
    toys.indices()
    call = ("last_block_sum<FenceBefore, FenceAfter>", (10, 1, 1), (64, 1, 1), 257)
    assert toys.launches() == [call, call, ("indices", (2, 3, 4), (3, 4, 5), 0)]
    toys.reset_launches()
    assert toys.launches() == []


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        ((0, 1, 1), (32, 1, 1), 0, "an empty grid or block"),
        ((1, 1, 1), (32, 0, 1), 0, "an empty grid or block"),
        ((1 << 31, 1, 1), (32, 1, 1), 0, "the grid is too large"),
        ((1, 65536, 1), (32, 1, 1), 0, "the grid is too large"),
        ((1, 1, 65536), (32, 1, 1), 0, "the grid is too large"),
        ((1, 1, 1), (1025, 1, 1), 0, "too many threads in a block"),
        ((1, 1, 1), (32, 33, 1), 0, "too many threads in a block"),
        ((1, 1, 1), (1, 1, 65), 0, "too many threads in a block"),
        ((1, 1, 1), (1 << 16, 1 << 16, 1), 0, "too many threads in a block"),
        ((1, 1, 1), (32, 1, 1), (227 << 10) + 1, "too much dynamic shared memory"),
    ],
)
def test_invalid_launch(toys: ModuleType, grid: tuple, block: tuple, shared: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"invalid launch configuration: {message}: kernel nothing"):
        toys.empty(grid, block, shared)
    assert toys.launches() == []


def test_largest_launch(toys: ModuleType) -> None:
    toys.empty((1, 2, 1), (1024, 1, 1), 227 << 10)
    toys.set_shared_limit(1 << 10)
    with pytest.raises(RuntimeError, match="too much dynamic shared memory"):
        toys.empty((1, 1, 1), (32, 1, 1), (1 << 10) + 1)


# ---- Under a sanitizer, in a process of its own ----------------------------------------------------------------------

USE_TOYS = """
import sys
import numpy as np
from emulation import build
toys = build.load(sys.argv[1])
x = np.ones(256, np.float32)
"""


@pytest.mark.slow  # as what follows: each mode takes a compilation, and is what `make emulate` runs the kernels in
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_right_kernels_are_clean(mode: str) -> None:
    """All of the above once more: what is right raises no alarm, and errors still are found without one."""
    result = build.run(mode, [__file__, str(build.build(mode))])
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("done\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTSIDE)
def test_address_sanitizer_finds(name: str) -> None:
    code = f"{USE_TOYS}toys.defective(toys.Defect.{name})"
    result = build.run("address", ["-c", code, str(build.build("address"))])
    assert result.returncode, result.stdout
    assert OUTSIDE[name] in result.stderr
    assert "defective" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_finds(name: str) -> None:
    result = build.run("thread", ["-c", USE_TOYS + RACES[name], str(build.build("thread"))])
    assert result.returncode == 66, result.stdout + result.stderr
    assert "ThreadSanitizer: data race" in result.stderr
    assert "toys.cpp" in result.stderr


if __name__ == "__main__":
    module = build.load(sys.argv[1])
    for order, seed in ORDERS:
        module.set_order(order, seed)
        check_values(module)
        check_errors(module)
    print("done")

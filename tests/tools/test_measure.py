"""benchmarks/measure.py: the clock of the gate."""

import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the tests run without the source tree")


def test_the_processor_clock_stands_still_while_others_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure

    clock = measure.cpu_clock()
    if clock is not time.process_time:
        pytest.skip("this system's processor clock is too coarse: the gate uses the one on the wall")
    start, wall = clock(), time.perf_counter()
    time.sleep(0.2)
    assert time.perf_counter() - wall >= 0.2
    assert clock() - start < 0.1

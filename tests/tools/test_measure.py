"""benchmarks/measure.py: which rounds of interleaved timings count, on a machine whose time is made up."""

import importlib
import random
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the tests run without the source tree")

ROUNDS = 15
READ, FAST, BASE = 1e-3, 2e-3, 6e-3


@pytest.fixture(scope="module")
def measure():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("measure")
    finally:
        sys.path.pop(0)


class Machine:
    """A clock that only moves while its functions run; `slowness(name, round)` says by how much longer each takes.

    Rounds count from 0; -1 is the read before them. What runs before that warms up.
    """

    def __init__(self, slowness=lambda name, number: 1.0, **seconds):
        self.now = 0.0
        self.calls = []
        self.slowness = slowness
        self.seconds = seconds or {"base": BASE, "fast": FAST, "read": READ}

    def clock(self):
        return self.now

    def function(self, name):
        def run():
            number = self.calls.count(name) - (4 if name == "read" else 3)
            self.calls.append(name)
            self.now += self.seconds[name] * (self.slowness(name, number) if number >= -1 else 1.0)

        return run

    def timed(self, measure, rounds=ROUNDS):
        functions = {name: self.function(name) for name in self.seconds}
        return measure.interleave(functions, rounds, self.clock)


def test_a_quiet_machine(measure):
    timing = Machine().timed(measure)
    assert timing.seconds == pytest.approx({"base": BASE, "fast": FAST, "read": READ})
    assert (timing.kept, timing.rounds, timing.steady) == (ROUNDS, ROUNDS, True)


def test_functions_take_turns(measure):
    machine = Machine()
    machine.timed(measure, rounds=2)
    assert machine.calls == [*["base"] * 3, *["fast"] * 3, *["read"] * 3, "read", *["base", "fast", "read"] * 2]


def test_short_functions_fill_a_sample(measure):
    machine = Machine(fast=5e-6, read=READ)
    timing = machine.timed(measure, rounds=3)
    assert machine.calls.count("fast") == 3 + 3 * round(measure.SHORTEST / 5e-6)
    assert timing.seconds["fast"] == pytest.approx(5e-6)


def test_long_functions_warm_up_once(measure):
    machine = Machine(fast=2.0, read=READ)
    machine.timed(measure, rounds=2)
    assert machine.calls.count("fast") == 1 + 2


@pytest.mark.parametrize("hiccup", [500.0, 0.0])
@pytest.mark.parametrize("number", range(3))
def test_a_disturbed_warm_up_does_not_change_the_samples(measure, hiccup, number):
    """Neither a call that was interrupted nor one that the clock missed says how many calls fill a sample."""
    machine = Machine(fast=1e-5, read=READ)
    factors = [hiccup if k == number else 1.0 for k in range(3)]
    fast = machine.function("fast")

    def disturbed():
        before = machine.now
        fast()
        machine.now = before + (machine.now - before) * (factors.pop() if factors else 1.0)

    measure.interleave({"fast": disturbed, "read": machine.function("read")}, 2, machine.clock)
    assert machine.calls.count("fast") == 3 + 2 * 10


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_rounds_in_which_the_read_moved_are_discarded(measure, factor):
    """Round 3 goes with its own read; round 4 also with that before it, and so on."""
    disturbed = {3, 7, 8, 12}

    def slowness(name, number):
        drift = 1 + 0.001 * number if name == "fast" else 1.0
        return drift * (factor if number in disturbed else 1.0)

    timing = Machine(slowness).timed(measure)
    kept = [number for number in range(ROUNDS) if not {number, number - 1} & disturbed]
    assert timing.kept == len(kept) == 8
    assert timing.steady
    # Not what all rounds together would give.
    everything = statistics.median(FAST * slowness("fast", number) for number in range(ROUNDS))
    assert timing.seconds["fast"] == pytest.approx(FAST * statistics.median(1 + 0.001 * n for n in kept), rel=1e-9)
    assert timing.seconds["fast"] != pytest.approx(everything, rel=1e-9)


def test_a_read_that_was_slow_before_the_first_round_discards_it(measure):
    timing = Machine(lambda name, number: 3.0 if number == -1 else 1.0).timed(measure)
    assert timing.kept == ROUNDS - 1


def test_small_movements_of_the_read_are_allowed(measure):
    timing = Machine(lambda name, number: 1.0 + 0.2 * (number % 3)).timed(measure)
    assert timing.kept == ROUNDS


def test_the_disturbed_rounds_are_discarded_where_they_are_the_majority(measure):
    """The slow reads are then the median of all; they are not what is usual, and the attempt is not steady."""
    timing = Machine(lambda name, number: 3.0 if number >= 6 else 1.0).timed(measure)
    assert timing.kept == 6
    assert not timing.steady
    assert timing.seconds["fast"] == pytest.approx(FAST)


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_never_settles_is_not_steady(measure, seed):
    rng = random.Random(seed)
    timing = Machine(lambda name, number: 2 ** rng.uniform(0, 5)).timed(measure)
    assert not timing.steady


def test_without_a_good_round_the_medians_are_those_of_all(measure):
    timing = Machine(lambda name, number: 100.0**number if name == "read" else 1.0).timed(measure, rounds=3)
    assert timing.kept == 0
    assert not timing.steady
    assert timing.seconds["fast"] == pytest.approx(FAST)


def test_per_call(measure):
    assert Machine().timed(measure).per_call(8).seconds["fast"] == pytest.approx(FAST / 8)


def test_the_processor_clock_stands_still_while_others_run(measure):
    clock = measure.cpu_clock()
    if clock is not measure.time.process_time:
        pytest.skip("this system's processor clock is too coarse: the gate uses the one on the wall")
    start, wall = clock(), measure.time.perf_counter()
    measure.time.sleep(0.2)
    assert measure.time.perf_counter() - wall >= 0.2
    assert clock() - start < 0.1


def test_what_this_process_and_its_children_use_is_not_that_of_others(measure, monkeypatch):
    """Processor time since the start: 300 s in all, of which this process took 40 and children that have ended 60."""
    ticks = measure.os.sysconf("SC_CLK_TCK") if hasattr(measure.os, "sysconf") else None
    if ticks is None:
        pytest.skip("only Linux says what other processes use")
    user, system, idle = (seconds * ticks for seconds in (200, 100, 5000))
    monkeypatch.setattr(
        measure.Path, "read_text", lambda path: f"cpu  {user} 0 {system} {idle} 0 0 0 0 0 0\ncpu0 ...\n"
    )
    monkeypatch.setattr(measure.os, "times", lambda: (30.0, 10.0, 50.0, 10.0, 999.0))
    assert measure._used_by_others() == pytest.approx(200.0)

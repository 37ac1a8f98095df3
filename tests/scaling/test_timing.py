"""scaling/timing.py: which rounds of interleaved timings count, on a machine whose time is made up."""

import random
import statistics

import pytest

from fastmtl.scaling import timing

ROUNDS = 15
READ, FAST, BASE = 1e-3, 2e-3, 6e-3


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

    def timed(self, rounds=ROUNDS):
        functions = {name: self.function(name) for name in self.seconds}
        return timing.interleave(functions, rounds, timing.by_clock(self.clock))


def test_a_quiet_machine():
    found = Machine().timed()
    assert found.seconds == pytest.approx({"base": BASE, "fast": FAST, "read": READ})
    assert (found.kept, found.rounds, found.steady) == (ROUNDS, ROUNDS, True)


def test_functions_take_turns():
    machine = Machine()
    machine.timed(2)
    assert machine.calls == [*["base"] * 3, *["fast"] * 3, *["read"] * 3, "read", *["base", "fast", "read"] * 2]


def test_short_functions_fill_a_sample():
    machine = Machine(fast=5e-6, read=READ)
    found = machine.timed(3)
    assert machine.calls.count("fast") == 3 + 3 * round(timing.SHORTEST / 5e-6)
    assert found.seconds["fast"] == pytest.approx(5e-6)


def test_long_functions_warm_up_once():
    machine = Machine(fast=2.0, read=READ)
    machine.timed(2)
    assert machine.calls.count("fast") == 1 + 2


@pytest.mark.parametrize("hiccup", [500.0, 0.0])
@pytest.mark.parametrize("number", range(3))
def test_a_disturbed_warm_up_does_not_change_the_samples(hiccup, number):
    """Neither a call that was interrupted nor one that the clock missed says how many calls fill a sample."""
    machine = Machine(fast=1e-5, read=READ)
    factors = [hiccup if k == number else 1.0 for k in range(3)]
    fast = machine.function("fast")

    def disturbed():
        before = machine.now
        fast()
        machine.now = before + (machine.now - before) * (factors.pop() if factors else 1.0)

    timing.interleave({"fast": disturbed, "read": machine.function("read")}, 2, timing.by_clock(machine.clock))
    assert machine.calls.count("fast") == 3 + 2 * 10


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_rounds_in_which_the_read_moved_are_discarded(factor):
    """Round 3 goes with its own read; round 4 also with that before it, and so on."""
    disturbed = {3, 7, 8, 12}

    def slowness(name, number):
        drift = 1 + 0.001 * number if name == "fast" else 1.0
        return drift * (factor if number in disturbed else 1.0)

    found = Machine(slowness).timed()
    kept = [number for number in range(ROUNDS) if not {number, number - 1} & disturbed]
    assert found.kept == len(kept) == 8
    assert found.steady
    # Not what all rounds together would give.
    everything = statistics.median(FAST * slowness("fast", number) for number in range(ROUNDS))
    assert found.seconds["fast"] == pytest.approx(FAST * statistics.median(1 + 0.001 * n for n in kept), rel=1e-9)
    assert found.seconds["fast"] != pytest.approx(everything, rel=1e-9)


def test_a_read_that_was_slow_before_the_first_round_discards_it():
    found = Machine(lambda name, number: 3.0 if number == -1 else 1.0).timed()
    assert found.kept == ROUNDS - 1


def test_small_movements_of_the_read_are_allowed():
    found = Machine(lambda name, number: 1.0 + 0.2 * (number % 3)).timed()
    assert found.kept == ROUNDS


def test_the_disturbed_rounds_are_discarded_where_they_are_the_majority():
    """The slow reads are then the median of all; they are not what is usual, and the attempt is not steady."""
    found = Machine(lambda name, number: 3.0 if number >= 6 else 1.0).timed()
    assert found.kept == 6
    assert not found.steady
    assert found.seconds["fast"] == pytest.approx(FAST)


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_never_settles_is_not_steady(seed):
    rng = random.Random(seed)
    found = Machine(lambda name, number: 2 ** rng.uniform(0, 5)).timed()
    assert not found.steady


def test_without_a_good_round_the_medians_are_those_of_all():
    found = Machine(lambda name, number: 100.0**number if name == "read" else 1.0).timed(3)
    assert found.kept == 0
    assert not found.steady
    assert found.seconds["fast"] == pytest.approx(FAST)


def test_per_call():
    assert Machine().timed().per_call(8).seconds["fast"] == pytest.approx(FAST / 8)


def test_what_this_process_and_its_children_use_is_not_that_of_others(monkeypatch):
    """Processor time since the start: 300 s in all, of which this process took 40 and children that have ended 60."""
    ticks = timing.os.sysconf("SC_CLK_TCK") if hasattr(timing.os, "sysconf") else None
    if ticks is None:
        pytest.skip("only Linux says what other processes use")
    user, system, idle = (seconds * ticks for seconds in (200, 100, 5000))
    monkeypatch.setattr(
        timing.Path, "read_text", lambda path, **options: f"cpu  {user} 0 {system} {idle} 0 0 0 0 0 0\ncpu0 ...\n"
    )
    monkeypatch.setattr(timing.os, "times", lambda: (30.0, 10.0, 50.0, 10.0, 999.0))
    assert timing._used_by_others() == pytest.approx(200.0)


def test_rounds_follow_from_the_time_there_is():
    calls = []

    def sample(function, n):
        calls.append(n)
        return 0.5

    functions = {"read": lambda: None, "fastmtl": lambda: None}
    assert timing.interleave(functions, 100, sample, seconds=7.2).rounds == 7
    assert timing.interleave(functions, 100, sample, seconds=0.0).rounds == timing.LEAST
    assert timing.interleave(functions, 5, sample, seconds=1e9).rounds == 5
    assert set(calls) == {1}

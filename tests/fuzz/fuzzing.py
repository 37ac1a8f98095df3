"""How a property is fuzzed: replays of the corpus, a fixed run for CI, and a run of FUZZ_SECONDS for `make fuzz`.

A property is a function of `Gradients` and of plain values. Its arguments are one line of JSON in tests/fuzz/corpus;
every line there is replayed in every run. A failing line is in the message, and `make fuzz` appends it to
corpus/failures.jsonl, so that the next runs fail too until it is mended. What ran when a process died is in
.hypothesis/running-*.json.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from strategies import Gradients

CORPUS = Path(__file__).parent / "corpus"
FAILURES = CORPUS / "failures.jsonl"
RUNNING = Path(".hypothesis") / f"running-{os.getpid()}.json"
# For all properties together; 0: as many examples as each says, the same in every run.
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
FRESH = "fresh"
PROPERTIES: list[str] = []

SETTINGS = settings(
    deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False, print_blob=bool(SECONDS)
)


def encode(name: str, arguments: dict[str, Any]) -> str:
    plain = {key: value.recipe() if isinstance(value, Gradients) else value for key, value in arguments.items()}
    return json.dumps({"property": name, **plain})


def decode(line: str) -> tuple[str, dict[str, Any]]:
    arguments = json.loads(line)
    name = arguments.pop("property")
    return name, {key: Gradients(**value) if isinstance(value, dict) else value for key, value in arguments.items()}


def corpus() -> Iterator[str]:
    for path in sorted(CORPUS.glob("*.jsonl")):
        yield from (line for line in path.read_text().splitlines() if line and not line.startswith("#"))


def fuzz(examples: int, **strategies: SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a pytest test of a property: on so many examples in CI, else on as many as its share of SECONDS holds."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        name = check.__name__.removeprefix("test_")
        PROPERTIES.append(name)
        kept = [line for line in corpus() if decode(line)[0] == name]

        @pytest.mark.parametrize("case", [*kept, FRESH], ids=[*(f"corpus-{i}" for i in range(len(kept))), FRESH])
        def test(case: str) -> None:
            if case != FRESH:
                check(**decode(case)[1])
            elif SECONDS:
                _run_for(SECONDS / len(PROPERTIES), name, check, strategies)
            else:
                _run(SETTINGS, examples, name, check, strategies, derandomize=True, database=None)

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate


def _run_for(seconds: float, name: str, check: Callable[..., None], strategies: dict[str, SearchStrategy]) -> None:
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        count += _run(SETTINGS, 300, name, check, strategies, until=end)
    print(f"{name}: {count} examples")


def _run(
    base: settings,
    examples: int,
    name: str,
    check: Callable[..., None],
    strategies: dict[str, SearchStrategy],
    until: float | None = None,
    **options: Any,
) -> int:
    failing: list[str] = []
    count = 0

    @settings(base, max_examples=examples, **options)
    @given(**strategies)
    def example(**arguments: Any) -> None:
        nonlocal count
        if until is not None and not failing and time.monotonic() > until:
            return
        count += 1
        line = encode(name, arguments)
        running.seek(0)
        running.truncate()
        running.write(line + "\n")
        running.flush()
        torch.manual_seed(0)
        try:
            check(**arguments)
        except Exception:
            failing[:] = [line]  # hypothesis ends with the simplest
            raise

    RUNNING.parent.mkdir(exist_ok=True)
    try:
        with RUNNING.open("w") as running:
            example()
    except BaseException as error:
        if not failing or isinstance(error, KeyboardInterrupt):
            raise
        if until is not None and failing[0] not in corpus():
            with FAILURES.open("a") as file:
                file.write(failing[0] + "\n")
        raise AssertionError(f"{error}\nreplay it as a line of {FAILURES.parent}/*.jsonl:\n{failing[0]}") from error
    finally:
        RUNNING.unlink(missing_ok=True)
    return count

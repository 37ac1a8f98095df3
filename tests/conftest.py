"""Shared fixtures: every test starts from the same seed and leaves the thread count as it found it.

`--slow` (make test-all) runs all there is. Without, tests marked `slow` are skipped, and of tests over products of
parameters run the cases that thinning.py picks: with every pair of values, or every value once (`--cover 1`). Both
together (make emulate) skip nothing, and thin by what `--cover` says alone.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from thinning import thinned

from fastmtl import once


def pytest_configure(config: pytest.Config) -> None:
    """Workers that run at the same time share the cores: with all of them each, they mostly wait for each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of what they start


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    once.forget()  # warnings come once in a process, and here once in a test
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def order() -> None:
    """Of the threads of a kernel, where there is one to choose: emulation/conftest.py."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Within a test, what only the garbage collector would free stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run the tests marked slow too, and full products of parameters (make test-all)"
    parser.addoption("--slow", action="store_true", help=text)
    text = "of products of parameters, cases with every value once (1) or every pair (2: the default without --slow)"
    parser.addoption("--cover", type=int, choices=(1, 2), help=text)


# Files that take longest, first of all: where they run in parallel, none of them is what is waited for in the end.
LONGEST = (
    "test_sanitizers.py",
    "test_kernels.py",
    "test_isa.py",
    "test_distributed.py",
    "test_scaling.py",
    "test_ops.py",
    "test_defects.py",
    "test_sanitize.py",
    "test_host_cuda.py",
    "test_own_method.py",
    "test_many_tasks.py",
    "test_portable.py",
)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    slow, cover = config.getoption("--slow"), config.getoption("--cover")
    if slow and cover is None:
        return
    everything = list(items)
    items[:] = thinned(everything, cover or 2, slow)
    kept = set(items)
    config.hook.pytest_deselected(items=[item for item in everything if item not in kept])
    for item in items:
        if not slow and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs under `make test-all` (--slow)"))

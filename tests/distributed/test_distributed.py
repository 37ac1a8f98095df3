"""More than one process, for real: worlds of 2 and 4 processes over gloo run the checks of `distributed_checks.py`."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

import distributed_checks

from fastmtl import distributed


@pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"world{world}")
def world(request, tmp_path_factory):
    """The folder where every rank of a world that ran its checks left its reports, and the number of ranks."""
    size = request.param
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = [item.callspec.params["check"] for item in items if item.callspec.params["world"] == size]
    folder = tmp_path_factory.mktemp(f"world{size}")
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():  # which imports torch once, not in every rank
        multiprocessing.set_forkserver_preload(["distributed_checks"])
        method = "forkserver"
    context = torch.multiprocessing.start_processes(
        distributed_checks.run, (size, str(folder), names), nprocs=size, join=False, start_method=method
    )
    try:
        # Joins the processes one by one as they end; a rank that hangs costs its own time-out and then its reports.
        deadline = time.monotonic() + 240
        while not context.join(timeout=1) and time.monotonic() < deadline:
            pass
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return folder, size


@pytest.mark.cover(1)  # every check in one of the worlds
@pytest.mark.parametrize("check", list(distributed_checks.CHECKS))
def test_on_every_rank(world, check):
    folder, size = world
    for rank in range(size):
        report = Path(folder, f"{check}.{rank}")
        assert report.exists(), f"rank {rank} ended before this check"
        assert not report.read_text(), f"rank {rank}:\n{report.read_text()}"


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.gram_group()
    assert not distributed.is_sharded([torch.zeros(2)])


def test_where_torch_has_no_distributed(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="to be initialised"):
        distributed.gram_group(True)
    assert not distributed.is_sharded([torch.zeros(2)])

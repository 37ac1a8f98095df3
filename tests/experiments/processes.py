"""An experiment's command as a process of its own, and how it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(name: str, arguments: Sequence[object]) -> subprocess.Popen[bytes]:
    """`python -m experiments.<name>` on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def kill_in(process: subprocess.Popen[bytes], run: Path, seconds: float = 300) -> None:
    """Kills the process as soon as this run has a checkpoint, which is before the run ends."""
    try:
        end = time.monotonic() + seconds
        while not (run / "checkpoint.pt").exists():
            assert process.poll() is None, "ended before its first checkpoint"
            assert time.monotonic() < end, "no checkpoint"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert process.returncode == -signal.SIGKILL
    assert not (run / "result.json").exists()

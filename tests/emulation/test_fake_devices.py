"""No op touches another device's stream or memory: the CUDA extension on a PyTorch with three fake GPUs (devices/).

The sources of csrc/ops and csrc/cuda are compiled as they are, against PyTorch's own headers; behind the C functions of
its stable ABI stands devices/torch.cpp. Launches are looked at, and nothing else is done with them.
"""

from __future__ import annotations

import re
import subprocess

import build

DEVICES = build.HERE / "devices"
CSRC = build.ROOT / "csrc"
FLAGS = [
    *("-O0", "-Wno-unknown-pragmas", "-Wno-unused-function", "-DUSE_CUDA", "-DFASTMTL_EMULATE"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # as in setup.py
    "-ftrivial-auto-var-init=zero",  # words of arguments that nobody has written are no addresses
]


def test_every_op_stays_on_its_device() -> None:
    """Current device and stream, memory, errors, and devices that are mixed."""
    ours, others = build.include_dirs()
    flags = [*FLAGS, f"-I{DEVICES}", *(f"-I{path}" for path in ours)]
    flags += [word for path in others for word in ("-isystem", str(path))]
    folder = build.CACHE / "devices"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [DEVICES / "devices.cpp", DEVICES / "torch.cpp"]
    for files in ([path] for path in sorted(CSRC.glob("ops/*_cuda.cu"))), [sorted(CSRC.glob("cuda/*.cu"))]:
        for included in files:  # ops by themselves, kernels together
            made = folder / f"{included[0].stem}.cpp"
            text = "".join(f'#include "{path.relative_to(CSRC).as_posix()}"\n' for path in included)
            text = f'#include "runtime.h"\n{text}'
            if not made.exists() or made.read_text() != text:
                made.write_text(text)
            sources.append(made)
    program = build.program("plain", sources, flags)
    done = subprocess.run([program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{3,} calls of 1\d ops, 0 failures\n", done.stdout), done.stdout

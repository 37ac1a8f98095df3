"""Defects put into the kernels on purpose: the matrix of cases must find each of them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import harness
import pytest

ROOT = Path(__file__).parents[2]
# Short compile times: float32 only, and no more of a sanitizer than is needed.
MODES = {"plain": ["-O1"], "address": ["-O1", "-fsanitize=address"]}


class Defect(NamedTuple):
    file: str  # of csrc/cuda
    pattern: str  # occurs once
    replacement: str
    report: str  # part of what is said about it
    mode: str = "plain"


DEFECTS = {
    "none": Defect("gram.cuh", "the stage has been read", "the stage has been read", "cases hold"),
    "missing barrier": Defect("gram.cuh", "__syncthreads(); // the stage has been read", "", "AssertionError"),
    "missing barrier in Jacobi": Defect(
        "eigh.cuh",
        "sine[thread] = s;\n      }\n      __syncthreads();",
        "sine[thread] = s;\n      }",
        "Error",
    ),
    "missing barrier in the tridiagonalisation": Defect(
        "tridiagonal.cuh",
        "find_reflection(x, S, k);\n    }\n    __syncthreads();",
        "find_reflection(x, S, k);\n    }",
        "Error",
    ),
    "divergent barrier": Defect(
        "eigh.cuh",
        "place[before] = i;\n  }\n  __syncthreads();",
        "place[before] = i;\n  }\n  if (threadIdx.x < 32) {\n    __syncthreads();\n  }",
        "barrier",
    ),
    "shuffle with a lane that has returned": Defect(
        "eigh.cu",
        "for (int offset = 16;",
        "if (threadIdx.x == 5) {\n      return;\n    }\n    for (int offset = 16;",
        "lane 5, which has returned",
    ),
    # `align` repairs this one: a Gram that is NaN gets the exact pass.
    "shared memory read before it is written": Defect("gram.cuh", "longer[k * Shape::kThreads] = 0.0f;", "", "nan > "),
    "tile bound off by one": Defect(
        "gram.cuh", "k < Shape::kTiles * 4; k +=", "k < Shape::kTiles * 4 - 1; k +=", "AssertionError"
    ),
    "read beyond the end of a row": Defect(
        "vector.cuh", "row ? end - at : 0", "row ? end - at + 1 : 0", "heap-buffer-overflow", "address"
    ),
    "too little shared memory": Defect(
        "launch.cuh",
        "unsigned(groups)),\n        dim3(Shape::kThreads),\n        Shape::kShared,",
        "unsigned(groups)),\n        dim3(Shape::kThreads),\n        Shape::kShared - 64,",
        "heap-buffer-overflow",
        "address",
    ),
}


def source_of(defect: Defect, root: Path = ROOT) -> tuple[Path, str]:
    """The file that a defect is put into, and what it says now."""
    path = root / "csrc" / "cuda" / defect.file
    text = path.read_text(encoding="utf-8")
    assert text.count(defect.pattern) == 1, f"{defect.file} has not one place like {defect.pattern!r}"
    return path, text


def patched(defect: Defect, tree: Path) -> None:
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "tests" / "emulation").mkdir(parents=True)
    for source in Path(__file__).parent.iterdir():
        if source.is_file():
            shutil.copy(source, tree / "tests" / "emulation")
    path, text = source_of(defect, tree)
    path.write_text(text.replace(defect.pattern, defect.replacement))


def look_for(defect: Defect, tree: Path) -> CompletedProcess[str]:
    patched(defect, tree)
    emulation = tree / "tests" / "emulation"
    spec = importlib.util.spec_from_file_location(f"build_{tree.name}", emulation / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.MODES = MODES
    module = build.build(defect.mode, emulation / "kernels.cpp", ["FASTMTL_EMULATE_ONLY_F32"])
    return build.run(defect.mode, [str(emulation / "matrix.py"), str(module)], timeout=120)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """All that were asked for, compiled and run side by side."""
    harness.require_tools()
    items = (item for item in request.session.items if item.path == request.path and any(item.iter_markers("slow")))
    names = [item.callspec.params["name"] for item in items if not any(item.iter_markers("skip"))]
    pool = ThreadPoolExecutor(min(2, os.cpu_count() or 1))
    folder = tmp_path_factory.mktemp("defects")
    futures = {name: pool.submit(look_for, DEFECTS[name], folder / f"tree{i}") for i, name in enumerate(names)}
    yield futures
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_has_its_place(name: str) -> None:
    """Those that are not tried, too."""
    source_of(DEFECTS[name])


@pytest.mark.slow  # each takes a compilation
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name: str, results: dict[str, Future]) -> None:
    result = results[name].result()
    said = result.stdout + result.stderr
    assert (result.returncode != 0) == (name != "none"), said
    assert DEFECTS[name].report in said

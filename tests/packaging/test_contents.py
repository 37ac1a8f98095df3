"""What is released: files of sdist and wheel, their metadata, and what the compiled objects ask of a machine."""

import email
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from artefacts import (
    LIBRARIES,
    LIBRARIES_CUDA,
    ROOT,
    build,
    foreign_symbols,
    libraries,
    modules,
    sdist_files,
    wheel_files,
)

from fastmtl import catalog, ops

LINUX = sys.platform == "linux" and shutil.which("nm") is not None and shutil.which("readelf") is not None
KINDS = (".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".md", ".toml", ".json")
OBJECTS = [pytest.param(Path(path), id=name) for name, path in ops.EXTENSIONS.items() if path is not None]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Sdist and wheel without kernels; test_wheel.py has those with them, in minutes."""
    env = {**os.environ, "FASTMTL_NO_EXT": "1"}
    env.pop("PYTHONPATH", None)
    return build(tmp_path_factory.mktemp("dist"), "--no-isolation", env=env)


def test_the_sdist_is_the_whole_source_release(released):
    files = sdist_files(released[0])
    top = {
        "LICENSE",
        "NOTICE",
        "CITATION.cff",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "mkdocs.yml",
        "pyproject.toml",
        "setup.py",
        "Makefile",
    }
    assert top <= files.keys()
    # What tests and documents look up; untracked files of a checkout may come too.
    for folder in ("csrc", "fastmtl", "tests", "benchmarks", "docs", "examples", "experiments", "tools"):
        here = {str(path.relative_to(ROOT)) for kind in KINDS for path in (ROOT / folder).rglob(f"*{kind}")}
        assert here
        here = {name for name in here if "/results/" not in name}
        assert here <= files.keys(), here - files.keys()
    assert not [name for name in files if "/results/" in name]  # what was measured
    assert not [name for name in files if Path(name).suffix in (".so", ".pyc", ".o") or "/." in name]
    assert sum(files.values()) < 5_000_000


def test_the_wheel_has_the_library_and_nothing_else(released):
    files = wheel_files(released[1])
    library = {name for name in files if ".dist-info/" not in name}
    assert library == modules() | {"fastmtl/py.typed"}
    information = {name.partition(".dist-info/")[2] for name in files} - {""}
    assert information == {"METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE", "licenses/NOTICE"}


def test_a_wheel_without_kernels_is_for_any_python_and_platform(released):
    assert released[1].name.endswith("-py3-none-any.whl")


def test_the_metadata(released):
    with zipfile.ZipFile(released[1]) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(opened.read(name))
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.10", "numpy"]


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert re.search(r"^version: (.*)$", text, re.M)[1] == declared[1]
    assert re.search(r"^license: MIT$", text, re.M)


def test_the_notice_names_the_paper_of_every_method():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    entries = [" ".join(entry.split()) for entry in re.split(r"\n(?! )", notice)]
    papers = {paper for entry in catalog.entries() for paper in entry.paper.split("; ") if paper}
    assert len(papers) > 15
    for paper in papers:
        surname, place = paper.replace(",", "").split()[0], paper.rpartition(", ")[2].split()
        venue = " ".join(place if len(place) > 1 and paper.count(", ") else place[-1:])
        assert any(surname in entry and venue in entry for entry in entries), paper


@pytest.mark.skipif(not LINUX, reason="needs nm and readelf, and an ELF object")
@pytest.mark.parametrize("binary", OBJECTS)
def test_compiled_objects_need_only_the_stable_abi(binary):
    """Or else they would run on no torch but the one that they were built with."""
    assert foreign_symbols(binary) == []
    extra = LIBRARIES_CUDA if "cuda" in binary.name else set()
    assert libraries(binary) <= LIBRARIES | extra


@pytest.mark.skipif(not LINUX, reason="needs nm and readelf, and an ELF object")
def test_the_unstable_abi_would_be_seen():
    """libtorch's own Python binding is made of it."""
    import torch

    binary = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    assert [name for name in foreign_symbols(binary) if name.startswith("at::")]

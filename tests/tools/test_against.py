"""benchmarks/against.py: a tree against itself is as fast, against one with a delay in it is not."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
from helpers import needs_extension

ROOT = Path(__file__).parents[2]

pytestmark = [
    needs_extension,
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the tests run without the source tree"),
]


@pytest.fixture
def against(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("against")


def test_a_slower_tree_is_seen(against, tmp_path):
    for part in ("fastmtl", "benchmarks"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("results", "__pycache__"))
    trials = tmp_path / "benchmarks" / "trials.py"
    text = trials.read_text()
    assert "fast=lambda: method(G, out=out)," in text
    trials.write_text(
        text.replace("fast=lambda: method(G, out=out),", "fast=lambda: [method(G, out=out) for _ in '123456'],", 1)
    )
    trees = against.Tree(ROOT), against.Tree(tmp_path)
    assert trees[0].cases == trees[1].cases
    found = against.compared(trees, "flat 3x5e4", 9)
    assert 1.5 < found["ratio"] < 9, found
    assert found["old"] < found["new"], found

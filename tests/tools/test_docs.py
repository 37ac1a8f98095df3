"""What the documentation shows must run: its Python blocks, the new side of its diffs, its links."""

import re
from pathlib import Path

import pictures
import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / "experiments").glob("README.md"),
]
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def new_side(diff):
    """The file that a diff leads to; removed lines stay as empty ones, so that line numbers hold."""
    return "".join("\n" if line.startswith("-") else line[1:] or "\n" for line in diff.splitlines(keepends=True))


@pages
def test_blocks_run_in_sequence(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = page.read_text()
    namespace = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        source = new_side(block[2]) if block[1] == "diff" else block[2]
        # Leading newlines make a traceback show the line of the page.
        padding = "\n" * text.count("\n", 0, block.start(2))
        exec(compile(padding + source, page, "exec"), namespace)


@pages
def test_relative_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    missing = {link for link in LINK.findall(prose) if not (page.parent / link).exists()}
    if not (ROOT / "benchmarks" / "results").exists():  # a source release
        missing = {link for link in missing if "results/" not in link}
    assert not missing


def test_the_trips_of_contributing_lead_somewhere():
    """A row names a file, and what is defined there."""
    trips = re.findall(
        r"^\| .* \| `(fastmtl/\S+\.py)` \| `(\w+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert len(trips) >= 9
    for file, name in trips:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), (file, name)


def test_the_readme_is_short_and_its_picture_is_drawn():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 150
    assert text.index("```diff") < 2000
    assert pictures.main(["--check"]) == 0


def test_new_side_of_a_diff():
    assert new_side("+a = 1\n for x in y:\n-    old()\n+    new()\n\n") == "a = 1\nfor x in y:\n\n    new()\n\n"

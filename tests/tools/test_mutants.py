"""The seeded faults of tools/mutants.py: each still has its place in the code, and its line in docs/mutants.md."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "mutants.py"

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="the tests run without the source tree")


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_changes_one_place_to_other_code(mutants):
    assert len(mutants.MUTANTS) >= 20
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)
    for mutant in mutants.MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.old) == 1, mutant.name
        changed = text.replace(mutant.old, mutant.new)
        assert changed != text, mutant.name
        if mutant.file.endswith(".py"):
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), mutant.name
        for name in mutant.tests.split():
            assert (ROOT / "tests" / name).exists(), mutant.name


def test_the_table_has_each_and_says_what_missed(mutants):
    kept = {"short": "tests/ops/test_ops.py::test_gram[a|b]", "long": None}
    later = {"short": None, "long": "tests/ops/test_ops.py::test_gram"}
    neither = {"short": None, "long": None}
    names = [mutant.name for mutant in mutants.MUTANTS]
    text = mutants.table(dict(zip(names, [kept, later, neither], strict=False)))
    assert "3 of" in text
    assert "the short suite finds 1, the long one 2." in text
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [line.split(" | ")[2] for line in lines] == [
        r"`tests/ops/test_ops.py::test_gram[a\|b]` |",
        "the long suite: `tests/ops/test_ops.py::test_gram` |",
        "nothing |",
    ]

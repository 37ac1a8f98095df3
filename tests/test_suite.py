"""The tests about themselves: which cases the short suite takes, and what may be skipped."""

import ast
import itertools
from pathlib import Path

import pytest
from thinning import covering, split

TESTS = Path(__file__).parent


@pytest.mark.parametrize("strength", [1, 2])
@pytest.mark.parametrize("sizes", [(1,), (4, 3), (12, 6, 4), (3, 3, 3, 3), (1, 5, 1, 2)], ids=str)
def test_the_short_suite_shows_all_values_together(sizes, strength):
    cases = [tuple(map(str, case)) for case in itertools.product(*map(range, sizes))]
    del cases[3:5]  # as where a combination means nothing

    def shown(cases):
        columns = list(itertools.combinations(range(len(sizes)), min(strength, len(sizes))))
        return {(c, *(case[k] for k in c)) for case in cases for c in columns}

    taken = [cases[k] for k in covering(cases, strength)]
    assert shown(taken) == shown(cases)
    assert taken == sorted(taken, key=cases.index)
    if len(sizes) <= strength:
        assert taken == cases
    elif len(sizes) == 4 and strength == 2:
        assert len(taken) <= 16  # nine at best


def unprobed(tree):
    """Lines that skip tests whatever is there, or do not say why, or expect a failure; and what is wrong with each."""
    guards = (node for node in ast.walk(tree) if isinstance(node, ast.If | ast.ExceptHandler | ast.Match))
    guarded = {id(node) for guard in guards for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if getattr(node, "attr", "") == "xfail":
            yield node.lineno, "expected to fail: mend it, or test what it does"
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name not in ("pytest.skip", "pytest.mark.skip", "pytest.mark.skipif"):
            continue
        reason = next((k.value for k in node.keywords if k.arg == "reason"), None)
        if name == "pytest.mark.skipif":
            if not node.args or not any(isinstance(part, ast.Name | ast.Call) for part in ast.walk(node.args[0])):
                yield node.lineno, "skips by a constant"
        elif id(node) not in guarded:
            yield node.lineno, "skips without a condition"
            continue
        else:
            reason = reason or (node.args[0] if node.args else None)
        if reason is None or (isinstance(reason, ast.Constant) and len(reason.value) < 8):
            yield node.lineno, "gives no reason"


def test_what_is_skipped_was_probed_and_says_why():
    for path in sorted(TESTS.rglob("*.py")):
        found = [] if path.name == "conftest.py" else list(unprobed(ast.parse(path.read_text())))
        assert not found, path


@pytest.mark.parametrize(
    "line",
    [
        "pytest.skip('no time for this')",
        "if x: pytest.skip()",
        "@pytest.mark.skip(reason='fails at times')\ndef test(): ...",
        "@pytest.mark.skipif(True, reason='fails at times')\ndef test(): ...",
        "@pytest.mark.skipif(os.name == 'nt')\ndef test(): ...",
        "@pytest.mark.xfail\ndef test(): ...",
    ],
)
def test_that_is_found(line):
    assert len(list(unprobed(ast.parse(line)))) == 1


def test_the_sizes_of_a_shape_are_values_of_their_own():
    assert split([["3x40", "float32"], ["5x1", "float64"]]) == [["3", "40", "float32"], ["5", "1", "float64"]]
    assert split([["3x40", "float32"], ["2x5x1", "float64"]]) == [["3x40", "float32"], ["2x5x1", "float64"]]
    assert split([["0x", "x"]]) == [["0x", "x"]]

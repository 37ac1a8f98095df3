"""What csrc keeps to: short functions, and one place for what the numerics are decided by."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
MOST_LINES = 80

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="the tests run without the source tree")


def without_comments(text: str) -> str:
    """The code, line by line: comments, strings and characters are blank."""
    blank = lambda found: re.sub(r"[^\n]", " ", found[0])  # noqa: E731
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', blank, text, flags=re.DOTALL)


def functions(text: str) -> Iterator[tuple[str, int]]:
    """(first line, number of lines) of the functions of a file, with what stands between name and body."""
    directive = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
    code = directive.sub(lambda found: "\n" * found[0].count("\n"), without_comments(text))
    scopes, head, line, start = [], "", 1, 1  # scopes: (first line, line number) of a function, or None for others
    for character in code:
        if character == "{":
            inside = any(scope is not None for scope in scopes)
            body = re.search(r"\)\s*(?:const\b|noexcept\b|->[^()]*|:[^:].*)?\s*$", head, re.DOTALL)
            scopes.append((head.strip().partition("\n")[0], start) if body and not inside else None)
        elif character == "}":
            scope = scopes.pop()
            if scope:
                yield scope[0], line - scope[1] + 1
        if character in "{};":
            head = ""
        elif head or not character.isspace():
            start = start if head else line
            head += character
        line += character == "\n"
    assert not scopes


def test_functions_are_found() -> None:
    text = """
namespace a {
struct B {
  B(int x)
      : x_(x) {
    f();
  }
  int g() const { return "}"[0]; } // {
};
template <class F>
void long_one(
    int x) {
  const auto inner = [&](int y) {
    return y;
  };
}
constexpr int kTable[] = {1, 2};
#define MACRO() \\
  {
}
"""
    assert list(functions(text)) == [("B(int x)", 4), ("int g() const", 1), ("template <class F>", 7)]


def test_no_function_is_long() -> None:
    sources = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".inc")]
    found = [(path, *function) for path in sources for function in functions(path.read_text())]
    assert len(found) > 300
    long = [f"{path.relative_to(ROOT)}: {name}: {n}" for path, name, n in found if n > MOST_LINES]
    assert not long, "\n".join(long)


THRESHOLDS = CSRC / "math" / "thresholds.h"


def test_thresholds_are_those_of_the_documentation() -> None:
    """Name, value and reason; and each decides something."""
    code = re.findall(r"^constexpr \w+ (k\w+) = (.*?); +// (.*)$", THRESHOLDS.read_text(), re.MULTILINE)
    assert len(code) == THRESHOLDS.read_text().count("constexpr") - 1 >= 30  # the comment shows the form
    section = (ROOT / "docs" / "numerics.md").read_text().partition("## Thresholds\n")[2]
    documented = re.findall(r"^\| `(k\w+)` \| `(.*?)` \| (.*) \|$", section, re.MULTILINE)
    assert documented == [(name, value, reason) for name, value, reason in code]
    rest = "".join(without_comments(path.read_text()) for path in CSRC.rglob("*.*"))
    unused = [name for name, _, _ in code if len(re.findall(rf"\b{name}\b", rest)) < 2]
    assert not unused


def test_nothing_is_decided_by_a_number_without_a_name() -> None:
    """1e-6 and 0x1p-52 stand in thresholds.h, or by a name of their own beside what they are for."""
    number = re.compile(r"\b\d[\d.]*e[+-]?\d+\b|\b0x[\da-f.]+p-\d{2,}\b")
    random = {"0x1p-24", "0x1p-63"}  # that makes a float or a double of a random integer, or of half precision
    found = []
    for path in sorted(CSRC.rglob("*.*")):
        for line, text in enumerate(without_comments(path.read_text()).splitlines(), 1):
            if not re.match(r"\s*(static )?constexpr \w+ k\w+ = ", text):
                unnamed = [x for x in number.findall(text) if x not in random and x.rstrip("f") not in random]
                found += [f"{path.relative_to(ROOT)}:{line}: {x}" for x in unnamed]
    assert not found

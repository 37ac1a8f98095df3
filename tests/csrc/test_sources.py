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

"""The house: imports run one way, also inside functions and under TYPE_CHECKING, and private names stay at home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

HOUSE = Path(__file__).parents[1] / "fastmtl"

# From the ground up: what stands on a line is imported by lines below it only. `fastmtl` itself is its __init__.py,
# whose names are for users; large-T studies and the command line use them as users do.
ORDER = (
    *("inputs", "losses", "options", "once", "graph", "structure"),
    "ops",
    "info",
    "rule",
    "pipeline",
    "gramian",
    "distributed",
    "training",
    *("methods", "scalarization"),
    "catalog",
    "observe",
    "fastmtl",
    "integrations",
    "scaling",
    "__main__",
)


LONGEST = 400  # lines of a file


class Import(NamedTuple):
    """One name that a module imports from another one: `name` is empty where it is the whole module."""

    module: str
    name: str
    line: int


class Source(NamedTuple):
    """What a module imports from the package, by what names; and the private names that it defines and reads."""

    path: Path
    imports: list[Import]
    defined: set[str]
    read: list[tuple[str, int]]


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def package_of(module: str) -> str:
    """The entry of `ORDER` that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def find_modules(root: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read_source(module: str, path: Path, modules: dict[str, Path]) -> Source:
    imports, defined, read = [], set(), []

    def add(origin: str, name: str, line: int) -> None:
        # `from package import module` imports the module; `import package.module.name` does not exist.
        whole = f"{origin}.{name}" if name else origin
        imports.append(Import(whole, "", line) if whole in modules else Import(origin, name, line))

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                for alias in node.names:
                    if alias.name.split(".")[0] == "fastmtl":
                        add(alias.name, "", node.lineno)
            case ast.ImportFrom():
                origin = node.module or ""
                if node.level:
                    home = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                    above = home[: len(home) - node.level + 1]
                    origin = ".".join([*above, *([origin] if origin else [])])
                if origin.split(".")[0] == "fastmtl":
                    for alias in node.names:
                        add(origin, alias.name, node.lineno)
            case ast.Attribute() if is_private(node.attr):
                if isinstance(node.ctx, ast.Load):
                    read.append((node.attr, node.lineno))
                else:
                    defined.add(node.attr)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() if is_private(node.name):
                defined.add(node.name)
            case ast.Name(ctx=ast.Store()) if is_private(node.id):
                defined.add(node.id)
    return Source(path, imports, defined, read)


def read_house(root: Path = HOUSE) -> dict[str, Source]:
    modules = find_modules(root)
    return {module: read_source(module, path, modules) for module, path in modules.items()}


def wrong_ways(house: dict[str, Source], order: tuple[str, ...] = ORDER) -> Iterator[str]:
    """Imports of what does not stand below the importing package."""
    place = {name: n for n, name in enumerate(order)}
    for module, source in house.items():
        here = package_of(module)
        for found in source.imports:
            there = package_of(found.module)
            if there != here and place[there] >= place[here]:
                yield f"{source.path}:{found.line}: {here} imports {found.module}, which stands above it"


def circles(house: dict[str, Source]) -> Iterator[str]:
    """Modules that import each other, at whatever moment."""
    graph = {module: {found.module for found in source.imports} - {module} for module, source in house.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " imports ".join(reversed(error.args[1]))


def trespasses(house: dict[str, Source]) -> Iterator[str]:
    """Private names that are imported from, or read of objects of, another package."""
    at_home: dict[str, set[str]] = {}
    for module, source in house.items():
        at_home.setdefault(package_of(module), set()).update(source.defined)
    anywhere = set().union(*at_home.values())
    for module, source in house.items():
        here = package_of(module)
        for found in source.imports:
            parts = [*found.module.split("."), *([found.name] if found.name else [])]
            if package_of(found.module) != here and any(map(is_private, parts)):
                yield f"{source.path}:{found.line}: {here} imports {'.'.join(parts)}"
        for name, line in source.read:
            # Names that nobody here defines are torch's or Python's.
            if name in anywhere and name not in at_home[here]:
                yield f"{source.path}:{line}: {here} reads .{name}, which is another package's"


def test_no_file_is_too_long():
    """Or else it is two."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in find_modules(HOUSE).values()}
    assert not {str(path): length for path, length in lengths.items() if length > LONGEST}


def test_every_package_has_a_place():
    assert {package_of(module) for module in find_modules(HOUSE)} == set(ORDER)


@pytest.mark.parametrize("faults", [wrong_ways, circles, trespasses])
def test_the_house(faults):
    found = list(faults(read_house()))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("faults", "files"),
    [
        (wrong_ways, {"low.py": "def f():\n    from fastmtl.high import g\n"}),
        (wrong_ways, {"low.py": "if TYPE_CHECKING:\n    from fastmtl import high\n"}),
        (wrong_ways, {"low.py": "import fastmtl.high.deep\n"}),
        (wrong_ways, {"low.py": "from . import high\n"}),
        (circles, {"high/a.py": "from fastmtl.high.b import x\n", "high/b.py": "def f():\n    from . import a\n"}),
        (circles, {"high/__init__.py": "from fastmtl.high.a import x\n", "high/a.py": "from fastmtl.high import y\n"}),
        (trespasses, {"high/a.py": "from fastmtl.low import _x\n"}),
        (trespasses, {"high/a.py": "from fastmtl import low\nlow._x\n", "low.py": "_x = 1\n"}),
        (trespasses, {"high/a.py": "def f(y):\n    return y._x\n", "low.py": "class Y:\n    def _x(self): ...\n"}),
        (trespasses, {"high/a.py": "from fastmtl._low import x\n", "_low.py": "x = 1\n"}),
    ],
)
def test_faults_are_found(faults, files, tmp_path):
    root = tmp_path / "fastmtl"
    for name, text in {"__init__.py": "", "low.py": "", "high/__init__.py": "", "high/deep.py": "", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    house = read_house(root)
    found = list(wrong_ways(house, ("low", "high", "fastmtl")) if faults is wrong_ways else faults(house))
    assert len(found) == 1

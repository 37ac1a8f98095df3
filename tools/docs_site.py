"""Makes the pages of the site that are not files of docs/: a hook of MkDocs (see mkdocs.yml), and plain functions.

The front page is the README; the API reference lists every public name; every method has a page with its definition, a
picture of two gradients and what it makes of them, its options, what it is good for, and how it did in the experiments;
every tutorial is run. What documents link to outside of docs/ is taken along: text as a page, pictures as they are.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
for _path in (ROOT, ROOT / "tools"):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

import pictures  # noqa: E402  (from tools)
import tutorials  # noqa: E402

import fastmtl  # noqa: E402
from fastmtl import catalog  # noqa: E402
from fastmtl.methods.base import GramMethod, Method  # noqa: E402

__all__ = ["api_pages", "method_pages", "method_pictures", "on_config", "on_files", "on_page_markdown", "sourced"]

# Files of the checkout that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "experiments/README.md": "experiments.md",
    "benchmarks/README.md": "benchmarks.md",
}
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^( *)(```+|~~~+)(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
IMAGES = (".png", ".svg", ".jpg")
INHERITING = ("GramMethod", "Method", "Scalarization")  # shown with what they inherit
# Pages of the reference: heading and modules.
API: dict[str, tuple[str, tuple[str, ...]]] = {
    "training": ("Training", ("fastmtl",)),
    "diagnostics": ("Diagnostics", ("fastmtl.observe.diagnostics",)),
    "watching": ("Figures and metrics", ("fastmtl.observe.figures", "fastmtl.observe.metrics")),
    "scalarization": ("Methods on losses", ("fastmtl.scalarization",)),
    "catalog": ("Catalog", ("fastmtl.catalog",)),
    "ops": ("Ops", ("fastmtl.ops",)),
    "torchjd": ("TorchJD", ("fastmtl.integrations.torchjd",)),
    "libmtl": ("LibMTL", ("fastmtl.integrations.libmtl",)),
    "trainers": ("Trainers", ("fastmtl.integrations.lightning", "fastmtl.integrations.transformers")),
}


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def kinds() -> dict[str, type]:
    """Every method's class, by its name for `catalog.make`."""
    found = {}
    for entry in catalog.entries():
        package, _, name = entry.name.rpartition(".")
        found[entry.make] = getattr(fastmtl.scalarization if package else fastmtl, name)
    return found


# Two tasks, the second of which has the longer gradient and opposes the first; a third for methods that need one.
G = ((1.0, 0.55), (-1.6, 1.2))
LOSSES = (0.8, 1.6)
THIRD, THIRD_LOSS = (1.2, 1.1), 1.0
OF_THREE = ("krum", "trimmed-mean")


def task_gradients(name: str) -> tuple[tuple[float, float], ...]:
    """Those in the picture of a method."""
    return (*G, THIRD) if name in OF_THREE else G


def combined(name: str) -> list[float]:
    """What a method makes of the gradients in its picture, in its first step."""
    rows = torch.tensor(task_gradients(name), dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        method = catalog.make(name, tasks=len(rows))
        p = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)  # a weight: GradNorm looks for one
        offsets = (*LOSSES, THIRD_LOSS)[: len(rows)]
        method.backward([loss + (row @ p)[0] for row, loss in zip(rows, offsets, strict=True)], shared=[p])
    assert p.grad is not None
    return [float(x) for x in p.grad[:, 0]]


def method_pictures() -> dict[str, str]:
    """Drawings by the site's file names."""
    return {
        f"methods/{name}.svg": pictures.combination(task_gradients(name), combined(name), kind.__name__)
        for name, kind in kinds().items()
    }


def good_for() -> dict[str, tuple[str, str]]:
    """The class of each method, and what it is good for: the table of docs/choosing.md."""
    text = (DOCS / "choosing.md").read_text(encoding="utf-8").partition("## What each is good for")[2]
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| `([\w.]+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: (kind, words) for name, kind, words in rows}


def measured() -> dict[str, list[str]]:
    """How each method did: lines by its name, from the committed tables."""
    found: dict[str, list[str]] = {}
    for experiment, said in (("regression", "QM9, 11 targets"), ("fashion", "overlaid garments"), ("scene", "rooms")):
        path = ROOT / "experiments" / "results" / experiment / "table.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
        deltas = {name: row["Δm % ↓"] for name, row in rows.items() if "Δm % ↓" in row}
        order = sorted(deltas, key=lambda name: deltas[name][0])
        for place, name in enumerate(order, 1):
            mean, error = deltas[name]
            found.setdefault(name, []).append(
                f"| [{said}](../experiments.md) | {mean:.1f} ± {error:.1f} | {place} of {len(order)} "
                f"| {deltas['uniform'][0]:.1f} |"
            )
    return found


def method_pages() -> dict[str, str]:
    """A page a method, by the site's file names."""
    entries = {entry.make: entry for entry in catalog.entries()}
    good, results, found = good_for(), measured(), {}
    for name, kind in kinds().items():
        entry = entries[name]
        where = f"fastmtl.{entry.name}"
        said = [f"# {kind.__name__}", good[name][1]]
        if entry.paper:
            said.append(f"*{entry.paper}.* `fastmtl.catalog.make({name!r}, tasks=T)` makes it by name.")
        about = {
            "needs": entry.needs,
            "keeps": entry.state or "nothing",
            "memory": entry.memory,
            "in TorchJD": entry.torchjd,
            "in LibMTL": entry.libmtl,
            "in the official code": entry.official,
            "works with": works_with(kind),
        }
        said.append("| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in about.items() if v))
        third = f", and a third with a loss of {THIRD_LOSS:g}" if name in OF_THREE else ""
        said.append("## In the plane")
        said.append(
            f"![Task gradients and what {kind.__name__} makes of them]({name}.svg)\n\nTwo tasks with losses of "
            f"{LOSSES[0]} and {LOSSES[1]}, whose gradients conflict{third}; beside them their mean, and the first step "
            "of the method with its default options. An arrow that is missing has no length."
        )
        if name in results:
            head = "| experiment | Δm % ↓ | place | plain sum |\n|---|---|---|---|\n"
            said += ["## Measured", head + "\n".join(results[name])]
        said += [
            "## Definition and options",
            f"::: {where}\n    options:\n      members: false\n      show_root_heading: false",
        ]
        said.append(
            "[What all methods share](../reference/training.md), `backward` above all; [all methods](../methods.md)."
        )
        found[f"methods/{name}.md"] = "\n\n".join(said) + "\n"
    return found


def works_with(kind: type) -> str:
    """The entries that take it."""
    if issubclass(kind, GramMethod):
        return "every entry: `backward` on all paths, `fan_out`, `attach`, `method(G)`, `weighting(M)`"
    if issubclass(kind, Method):
        return "`backward` with `shared=`, `features=` and `representation=`, `fan_out`, `method(G)`; not `weighting`"
    return "`method(losses).backward()`, `backward(losses)`, and `fan_out`, whose `total` it is"


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def public(module: str) -> list[str]:
    """The names that a module offers and its package defines: not those of submodules or of other libraries."""
    try:
        loaded = importlib.import_module(module)
    except ImportError:  # an extra that is not installed; what it is made of says the same
        text = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        declared = re.search(r"^__all__ = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        return re.findall(r'"(\w+)"', declared[1] if declared else "")
    there = {name: getattr(loaded, name) for name in loaded.__all__}
    return [name for name, value in there.items() if (getattr(value, "__module__", "") or "").startswith("fastmtl")]


def api_pages() -> dict[str, str]:
    """The reference, by the site's file names; every public name is on one page."""
    pages_of = {f"fastmtl.{entry.name}": f"../methods/{entry.make}.md" for entry in catalog.entries()}
    found, rows = {}, []
    for page, (heading, modules) in API.items():
        pieces = [f"# {heading}"]
        for module in modules:
            for name in public(module):
                path = f"{module}.{name}"
                if path in pages_of:
                    rows.append((path, pages_of[path]))
                    continue
                rows.append((path, f"{page}.md#{path}"))
                pieces.append(f"::: {path}\n    options:\n      inherited_members: {str(name in INHERITING).lower()}")
        found[f"reference/{page}.md"] = "\n\n".join(pieces) + "\n"
    table = "\n".join(f"| [`{path}`]({link}) |" for path, link in rows)
    found["reference/index.md"] = f"# Reference\n\nEvery public name.\n\n| name |\n|---|\n{table}\n"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Links that leave docs/


def outside_fences(text: str) -> Iterator[tuple[bool, str]]:
    """Pieces of Markdown: whether it is a block of code, and the text."""
    at = 0
    for fence in FENCE.finditer(text):
        yield False, text[at : fence.start()]
        yield True, fence[0]
        at = fence.end()
    yield False, text[at:]


def destination(target: Path) -> str:
    """Where a file or folder of the checkout is on the site."""
    inside = target.relative_to(ROOT).as_posix()
    if target.is_dir() and (target / "README.md").exists():
        inside, target = f"{inside}/README.md", target / "README.md"
    if inside in PAGES:
        return PAGES[inside]
    if target.is_relative_to(tutorials.FOLDER) and target.suffix == ".py":
        return f"tutorials/{target.stem}.md"
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    if target.suffix in IMAGES:
        return f"files/{inside}"
    return f"source/{inside}.md"


def rewritten(text: str, origin: Path, uri: str) -> tuple[str, set[Path]]:
    """The page with links as they are on the site, and the files of the checkout that it links to.

    Args:
        text: Markdown.
        origin: the file that it is.
        uri: the page's name on the site.
    """
    used: set[Path] = set()

    def link(match: re.Match[str]) -> str:
        path, mark, anchor = match[2].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        target = (origin.parent / path).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]  # for MkDocs to warn of
        used.add(target)
        where = posixpath.relpath(destination(target), posixpath.dirname(uri) or ".")
        return f"{match[1]}{where}{mark}{anchor}{match[3]}"

    pieces = (
        piece if code else LINK.sub(link, COMMENT.sub("", piece))
        for code, piece in outside_fences(without_hidden(text))
    )
    return wide("".join(pieces)), used


def without_hidden(text: str) -> str:
    """Without comments that hide blocks of code, which are for the tests."""
    return re.sub(r"<!--[^\n]*\n```.*?```\n-->\n?", "", text, flags=re.DOTALL)


def wide(text: str) -> str:
    """With what belongs to an item of a list indented by four, as Python-Markdown wants it, not by two."""
    lines, inside, fence, blank = [], False, "", True
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        if fence:
            lines.append(" " * fence.count(" ") + line if line else line)
            if line.strip().startswith(fence.strip()):
                fence = ""
            continue
        if re.match(r"(?:[*-]|\d+\.) ", line):
            inside = True
        elif blank and line and not indent:
            inside = False
        if inside and indent:
            line = " " * indent + line
        if re.match(r" *(```+|~~~+)", line):
            fence = " " * (indent if inside else 0) + re.findall(r"```+|~~~+", line)[0]
        lines.append(line)
        blank = not line.strip()
    return "\n".join(lines)


def sourced(path: Path) -> str:
    """A file of the checkout as a page; of a folder what is in it."""
    if path.is_dir():
        names = sorted(inner.relative_to(ROOT).as_posix() for inner in path.iterdir() if inner.name[0] not in "._")
        return f"# {path.relative_to(ROOT).as_posix()}\n\n" + "".join(f"- `{name}`\n" for name in names)
    language = {".py": "python", ".md": "markdown", ".toml": "toml", ".h": "cpp", ".cpp": "cpp"}.get(
        path.suffix, "text"
    )
    text = path.read_text(encoding="utf-8").rstrip()
    return f"# {path.relative_to(ROOT).as_posix()}\n\n~~~~~~{language}\n{text}\n~~~~~~\n"


# ---------------------------------------------------------------------------------------------------------------------
# The hook


def on_config(config: Any) -> Any:
    """Puts what is made into the navigation."""
    scripts = re.findall(r"^\| \[.*\]\((\w+)\.py\)", (tutorials.FOLDER / "index.md").read_text("utf-8"), re.MULTILINE)
    more = {
        "Tutorials": [f"tutorials/{name}.md" for name in scripts],
        "Methods": [f"methods/{name}.md" for name in kinds()],
        "Reference": [f"reference/{page}.md" for page in API],
    }
    for section in config["nav"]:
        for name, pages in section.items():
            if name in more:
                pages.extend(more[name])
    return config


_ORIGINS: dict[str, Path] = {}


def on_files(files: Any, config: Any) -> Any:
    """Adds what is made, and what documents link to."""
    from mkdocs.structure.files import File

    made: dict[str, str | Path] = {**method_pages(), **method_pictures(), **api_pages(), **run_tutorials()}
    for name, uri in PAGES.items():
        if (ROOT / name).exists():
            made[uri] = (ROOT / name).read_text(encoding="utf-8")
            _ORIGINS[uri] = ROOT / name
    for path in tutorials.FOLDER.glob("*.py"):
        _ORIGINS[f"tutorials/{path.stem}.md"] = path
        if (script := files.get_file_from_path(f"tutorials/{path.name}")) is not None:
            files.remove(script)
    for path in DOCS.rglob("*.md"):
        _ORIGINS[path.relative_to(DOCS).as_posix()] = path
    for uri, origin in _ORIGINS.items():
        text = made.get(uri) or origin.read_text(encoding="utf-8")
        for target in rewritten(str(text), origin, uri)[1]:
            where = destination(target)
            if where.startswith("source/"):
                made[where] = sourced(target)
            elif where.startswith("files/"):
                made[where] = target
    for uri, content in made.items():
        if isinstance(content, Path):
            files.append(File.generated(config, uri, abs_src_path=str(content)))
        else:
            files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are on the site."""
    origin = _ORIGINS.get(page.file.src_uri)
    return markdown if origin is None else rewritten(markdown, origin, page.file.src_uri)[0]


def run_tutorials() -> Mapping[str, str | Path]:
    """Pages and pictures of all tutorials, each run by a process of its own; those that have not changed are kept.

    Raises:
        subprocess.CalledProcessError: one failed.
    """
    made: dict[str, str | Path] = {}
    for path in sorted(tutorials.FOLDER.glob("*.py")):
        version = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        folder = ROOT / "build" / "tutorials" / f"{path.stem}-{version}"
        if not (folder / f"{path.stem}.md").exists():
            subprocess.run([sys.executable, ROOT / "tools" / "tutorials.py", path, folder], check=True)
        for file in folder.iterdir():
            if file.suffix == ".md":
                made[f"tutorials/{path.stem}.md"] = file.read_text(encoding="utf-8")
            elif file.suffix in IMAGES:
                made[f"tutorials/{file.name}"] = file
    return made

"""The site: what scripts make of it is complete, tutorials run, links lead somewhere; once built, it is opened."""

import contextlib
import http.server
import importlib
import re
import shutil
import struct
import threading
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import docs_site
import pytest
import torch
import tutorials

import fastmtl
from fastmtl import catalog

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(tutorials.FOLDER.glob("*.py"))
NEEDS = {"lightning": ("pytorch_lightning",), "from_torchjd": ("torchjd", "quadprog")}
API = docs_site.api_pages()
MODULES = [module for _, modules in docs_site.API.values() for module in modules]


# ------------------------------------------------------------------------------------------------ tutorials


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tmp_path):
    """A few steps of it; the site has all of them."""
    for package in NEEDS.get(path.stem, ()):
        pytest.importorskip(package, reason=f"the tutorial is about {package}, which is not installed")
    threads = torch.get_num_threads()
    try:
        done = tutorials.run(path, tmp_path, steps=12)
    finally:
        torch.set_num_threads(threads)
    page = tutorials.page(done)
    assert page.startswith("# ")
    assert any(cell.printed for cell in done)
    for cell in done:
        assert all((tmp_path / name).stat().st_size > 1000 for name in cell.pictures)
    listed = (tutorials.FOLDER / "index.md").read_text()
    assert f"| [{page.partition(chr(10))[0][2:]}]({path.name}) |" in listed  # in the navigation, under its title


def test_cells():
    text = "import a\n\n# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nprint(1)\n"
    first, prose, code = tutorials.cells(text)
    assert (first.source, first.prose, first.line) == ("import a", False, 1)
    assert (prose.source, prose.prose) == ("# Title\n\nWords.", True)
    assert (code.source, code.line) == ("print(1)", 9)
    with pytest.raises(ValueError, match="line 2: expected prose in comments, got 'x = 1'"):
        list(tutorials.cells("# %% [markdown]\n# Words.\nx = 1\n"))


def test_what_a_cell_prints_and_draws(tmp_path):
    script = tmp_path / "script.py"
    drawn = "# %%\nfrom pathlib import Path\nPath('a.svg').write_text('<svg/>')\nprint('STEPS', STEPS)\n"
    script.write_text(f"# %%\nSTEPS = 100\n{drawn}# %%\n1 / 0\n")
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError) as raised:
        tutorials.run(script, out, steps=3)
    assert raised.traceback[-1].lineno + 1 == 8  # of the script
    script.write_text(f"# %%\nSTEPS = 100\n{drawn}")
    (again := tmp_path / "again").mkdir()
    page = tutorials.page(tutorials.run(script, again, steps=3))
    assert "```text\nSTEPS 3\n```" in page
    assert page.endswith("(a.svg)\n")


# ------------------------------------------------------------------------------------------------ pages by script


def test_the_reference_has_every_public_name():
    text = "\n".join(API.values())
    for module in MODULES:
        with contextlib.suppress(ImportError):  # an extra that is not installed: the names come from the source
            importlib.import_module(module)
        for name in docs_site.public(module):
            assert f"[`{module}.{name}`]" in API["reference/index.md"], name
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    shown |= {f"fastmtl.{entry.name}" for entry in catalog.entries()}
    homes = {name.rpartition(".")[2] for name in MODULES}
    for name in set(fastmtl.__all__) - {"__version__"}:
        if isinstance(getattr(fastmtl, name), type(re)):
            assert name in homes
        else:
            assert f"fastmtl.{name}" in shown


def test_names_of_an_extra_that_is_not_installed(monkeypatch):
    expected = docs_site.public("fastmtl.integrations.lightning")
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert docs_site.public("fastmtl.integrations.lightning") == expected == ["MultiTask"]


def test_every_method_has_a_page_and_a_word_on_when():
    pages = docs_site.method_pages()
    assert {name: kind for name, (kind, _) in docs_site.good_for().items()} == {
        e.make: e.name for e in catalog.entries()
    }
    assert pages.keys() == {f"methods/{name}.md" for name in catalog.names()}
    aligned = pages["methods/aligned.md"]
    for expected in ("::: fastmtl.AlignedMTL\n", "(aligned.svg)", "Senushkin et al., CVPR 2023"):
        assert expected in aligned
    assert ("QM9, 11 targets" in aligned) == (ROOT / "experiments" / "results").exists()  # not in a source release


@pytest.mark.filterwarnings("ignore")
def test_pictures_show_what_methods_do():
    drawn = docs_site.method_pictures()
    assert len(drawn) == len(catalog.names())
    for text in drawn.values():
        ElementTree.fromstring(text)
    mean, summed, aligned, first = (docs_site.combined(name) for name in ("constant", "pcgrad", "aligned", "upgrad"))
    G = torch.tensor(docs_site.G, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), G.mean(0))
    U, s, V = torch.linalg.svd(G)
    torch.testing.assert_close(torch.tensor(aligned, dtype=torch.float64), s[-1] * (U @ V).mean(0))
    assert (G @ torch.tensor(first, dtype=torch.float64) > -1e-9).all()
    assert summed != mean


def test_links_that_leave_the_folder():
    text = "See [a](../examples/pinn.py#x), [b](methods.md), [c](../experiments/README.md), ![d](../benchmarks/no.png)."
    page, used = docs_site.rewritten(text, ROOT / "docs" / "training.md", "training.md")
    assert page.startswith("See [a](source/examples/pinn.py.md#x), [b](methods.md), [c](experiments.md), ![d](../bench")
    assert used == {ROOT / "examples" / "pinn.py", ROOT / "docs" / "methods.md", ROOT / "experiments" / "README.md"}
    page, _ = docs_site.rewritten("[a](docs/usage.md) [b](LICENSE)", ROOT / "README.md", "index.md")
    assert page == "[a](usage.md) [b](source/LICENSE.md)"
    page, _ = docs_site.rewritten(
        "[a](first_loop.py) [b](../usage.md)", tutorials.FOLDER / "index.md", "tutorials/index.md"
    )
    assert page == "[a](first_loop.md) [b](../usage.md)"
    code = "```python\n[a](../examples/pinn.py)  # <!-- kept -->\n```\n<!-- n: x -->1<!-- /n -->"
    assert docs_site.rewritten(code, ROOT / "docs" / "usage.md", "usage.md")[0] == code.partition("<!-- n")[0] + "1"


def test_items_are_indented_for_the_site():
    text = "* one\n  goes on:\n\n  ```python\n  if x:\n      y\n  ```\n\n* two\n\nplain\n    code"
    wide = "* one\n    goes on:\n\n    ```python\n    if x:\n        y\n    ```\n\n* two\n\nplain\n    code"
    assert docs_site.wide(text) == wide


# ------------------------------------------------------------------------------------------------ in a browser

SIZES = {"desk": (1280, 900), "phone": (390, 844)}
LOOKED_AT = {
    "front": ("", "fastmtl"),
    "reference": ("reference/training/", "fan_out"),
    "method": ("methods/aligned/", "AlignedMTL"),
    "tutorial": ("tutorials/first_loop/", "A first loop"),
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    """The built site, served on this machine."""
    if not (ROOT / "site" / "index.html").exists():
        pytest.skip("the site is not built: make test-site does that")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(ROOT / "site"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: make test-site does that"
    )
    with sync_api.sync_playwright() as playwright:
        try:
            own = shutil.which("chromium")
            launched = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield launched
        launched.close()


def look(browser, where, size, picture):
    """Opens a page and takes a picture of what is seen at first; its text, and what went wrong."""
    page = browser.new_page(viewport=dict(zip(("width", "height"), SIZES[size], strict=True)))
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("response", lambda response: wrong.append(response.url) if response.status >= 400 else None)
    loaded = []
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(where, wait_until="load")
    page.screenshot(path=picture)
    text = page.inner_text("body")
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
    page.close()
    assert wrong == []
    assert broken == []
    assert wide <= 1, f"{wide} pixels wider than the screen"
    return text, loaded


def colours(path):
    """How many bytes a picture compresses to a pixel: a blank page has next to none."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return len(data) / (width * height)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOOKED_AT)
def test_browser_opens_the_site(address, browser, name, size):
    where, expected = LOOKED_AT[name]
    (ROOT / "site-pictures").mkdir(exist_ok=True)
    picture = ROOT / "site-pictures" / f"{name}-{size}.png"
    text, loaded = look(browser, address + where, size, picture)
    assert expected in text
    assert "::: fastmtl" not in text
    assert all(url.startswith((address, "data:")) for url in loaded)  # nothing comes from elsewhere
    assert colours(picture) > 0.02


@pytest.mark.parametrize("size", SIZES)
def test_browser_opens_a_report(browser, tmp_path, size):
    monitor, trunk = fastmtl.Monitor(), torch.nn.Linear(6, 5)
    for _ in range(30):
        h = trunk(torch.randn(8, 6))
        losses = {"near": h.square().mean(), "far": (9 * h).square().mean()}
        monitor(fastmtl.AlignedMTL().backward(losses, shared=trunk), losses)
    monitor.report(tmp_path / "run.html", title="A run")
    text, loaded = look(browser, (tmp_path / "run.html").as_uri(), size, tmp_path / "run.png")
    assert len(loaded) == 1
    assert "Condition number κ" in text
    assert colours(tmp_path / "run.png") > 0.02


def test_browser_finds_no_dead_link(address):
    """Every link of every page of the site, with its anchor, leads somewhere on it."""
    site = ROOT / "site"
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    dead = []
    for path, text in pages.items():
        for target, _, anchor in (link.partition("#") for link in re.findall(r'(?:href|src)="([^"]+)"', text)):
            if re.match(r"[a-z]+:|//", target) or path.name == "404.html":
                continue
            found = (path.parent / target).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            if not found.exists() or (
                anchor and found in anchors and anchor not in anchors[found] and "__" not in anchor
            ):
                dead.append((path.relative_to(site).as_posix(), target, anchor))
    assert dead == []

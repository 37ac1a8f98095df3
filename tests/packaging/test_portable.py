"""Other Pythons and other systems, as far as they can be seen from this one."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from artefacts import ROOT

FILES = sorted([ROOT / "setup.py", *(p for d in ("fastmtl", "benchmarks", "tools") for p in (ROOT / d).rglob("*.py"))])
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
# PEP 594, PEP 632 and what went with them: there up to 3.11 or 3.12, gone in 3.13.
REMOVED = (
    "aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib nis nntplib "
    "ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib"
)
# Modules and functions that Windows does not have.
POSIX_MODULES = "fcntl grp pty pwd resource syslog termios tty"
POSIX_FUNCTIONS = "fork forkpty getuid geteuid getpgid getloadavg sched_getaffinity sysconf uname wait4"


def interpreter(version):
    """A `python3.x` that works, or None; where pyenv keeps several, the variable says which one is meant."""
    command, env = f"python{version}", {**os.environ, "PYENV_VERSION": version}
    env.pop("PYTHONPATH", None)
    try:
        subprocess.run([command, "-c", ""], env=env, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return command, env


# ------------------------------------------------------------------------------------------------ Python 3.10 to 3.13


def vermin(*files):
    """Finds the oldest Python that has the syntax, modules, functions and arguments which a file uses."""
    code = "from vermin import main; main()"
    command = [sys.executable, "-c", code, "--target=3.10-", "--violations", "--no-tips", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_nothing_needs_more_than_python_3_10():
    done = vermin(*FILES)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "code", ["import tomllib\n", "from typing import Self\n", "try:\n    pass\nexcept* OSError:\n    pass\n"]
)
def test_what_needs_python_3_11_is_seen(code, tmp_path):
    path = tmp_path / "newer.py"
    path.write_text(code)
    done = vermin(path)
    assert done.returncode == 1
    assert "3.11" in done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_every_file_compiles_without_a_warning(version):
    """Warnings of the compiler are the syntax errors of later versions."""
    found = interpreter(version)
    if found is None:
        pytest.skip(f"there is no python{version} here")
    command, env = found
    code = "import sys\nfor p in sys.argv[1:]: compile(open(p, encoding='utf-8').read(), p, 'exec')"
    done = subprocess.run([command, "-W", "error", "-c", code, *FILES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_is_used_that_python_3_13_has_not():
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level]
        assert not {name.partition(".")[0] for name in names}.intersection(REMOVED.split()), path


# ------------------------------------------------------------------------------------------------ Windows and macOS

TRAINING = f"""
import importlib, os, pkgutil, sys

# Built for the other system there.
import torch

for name in ("matplotlib.figure", "rich", "sklearn.datasets", "tensorboard", "torchjd"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass

platform, without_posix = sys.argv[1], sys.argv[2] == "without"


class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in {POSIX_MODULES.split()}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


if without_posix:
    sys.meta_path.insert(0, Absent)
    for name in {POSIX_MODULES.split()}:
        sys.modules.pop(name, None)
    for name in {POSIX_FUNCTIONS.split()}:
        if hasattr(os, name):
            delattr(os, name)
    try:
        import fcntl
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("fcntl is still there")
sys.platform = platform

import fastmtl
from fastmtl import __main__ as command_line

optional = {{"torchjd", "sklearn", "matplotlib", "rich", "tensorboard", "LibMTL"}}
seen = 0
for module in pkgutil.walk_packages(fastmtl.__path__, "fastmtl."):
    # Not what was built, and not what stands on trainers: whether those run there is for their authors to say.
    if module.name.startswith(("fastmtl._C", "fastmtl.integrations.lightning", "fastmtl.integrations.transformers")):
        continue
    try:
        __import__(module.name)
        seen += 1
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in optional:
            raise
assert seen > 30, seen

encoder, heads = torch.nn.Linear(5, 7), [torch.nn.Linear(7, 1) for _ in range(3)]
x = torch.randn(11, 5)
for name in fastmtl.__all__:
    kind = getattr(fastmtl, name)
    abstract = kind in (fastmtl.Method, fastmtl.GramMethod)
    if abstract or not (isinstance(kind, type) and issubclass(kind, fastmtl.Method)):
        continue
    method = kind()
    encoder.zero_grad()
    method.backward([head(encoder(x)).square().mean() for head in heads], shared=encoder.parameters())
    assert encoder.weight.grad.isfinite().all() and encoder.weight.grad.any(), name
    encoder.zero_grad()
    hs = fastmtl.fan_out(encoder(x), tasks=3, method=kind())  # some remember the gradients, and these are of h
    hs.total([head(h).square().mean() for head, h in zip(heads, hs)]).backward()
    assert encoder.weight.grad.isfinite().all() and encoder.weight.grad.any(), name
    print(name)
command_line.main(["info"])
command_line.main(["methods"])
"""


@pytest.mark.parametrize(("platform", "posix"), [("win32", "without"), ("darwin", "with")])
def test_training_on_another_system(platform, posix, tmp_path):
    """On the reference, with what Windows has not made unavailable, and its usual encoding for files and output."""
    env = {
        **os.environ,
        "FASTMTL_NO_EXT": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "cp1252",
    }
    command = [sys.executable, "-c", TRAINING, platform, posix]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, encoding="cp1252")
    assert done.returncode == 0, done.stderr
    assert {"AlignedMTL", "GradDrop", "NashMTL", "PCGrad"} <= set(done.stdout.split())
    assert "reference (pure PyTorch)" in done.stdout


def test_files_are_read_and_written_in_a_named_encoding():
    """Windows' default is not UTF-8, and papers' authors have names."""
    for path in (p for p in FILES if Path("fastmtl") in p.relative_to(ROOT).parents or p.name == "setup.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", None))
                named = {keyword.arg for keyword in node.keywords}
                assert called not in ("read_text", "write_text") or "encoding" in named, f"{path}:{node.lineno}"

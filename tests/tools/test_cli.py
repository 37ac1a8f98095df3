"""The command line, run as users run it: in a process of its own."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmtl
from fastmtl import __main__ as cli

NO_EXTRA = "import sys; sys.modules.update(dict.fromkeys(('rich', 'matplotlib', 'sklearn')))\n"


def python(*arguments, cwd, **environment):
    env = {key: value for key, value in os.environ.items() if not key.startswith("FASTMTL_")}
    # The package under test, wherever it lies: not another one that happens to be installed.
    env["PYTHONPATH"] = str(Path(fastmtl.__file__).parents[1])
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=120)


def fields(text):
    return {line[:13].strip(): line[13:] for line in text.splitlines()}


def test_info_says_what_is_in_use(tmp_path):
    done = python("-m", "fastmtl", "info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info = fields(done.stdout)
    assert info["torch"] == torch.__version__
    assert info["python"].startswith(platform.python_version())
    assert info["fastmtl"].startswith(fastmtl.__version__)
    assert int(info["threads"]) >= 1
    assert str(torch.version.cuda) in info["CUDA"] or "not a CUDA build" in info["CUDA"]
    if info["CPU kernels"].startswith("not built"):
        assert info["CPU ISA"] == "reference (pure PyTorch)"
    else:
        assert Path(info["CPU kernels"]).is_file()
        assert info["CPU ISA"] in ("avx512", "avx2", "portable")


def test_info_without_kernels_says_why(tmp_path):
    done = python("-m", "fastmtl", "info", cwd=tmp_path, FASTMTL_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    info = fields(done.stdout)
    assert info["CPU ISA"] == "reference (pure PyTorch)"
    assert info["CPU kernels"] == info["CUDA kernels"] == "not loaded: FASTMTL_NO_EXT=1"


@pytest.mark.skipif(fastmtl.ops.EXTENSIONS["_C"] is None, reason="needs the CPU kernels")
def test_info_shows_a_forced_instruction_set(tmp_path):
    done = python("-m", "fastmtl", "info", cwd=tmp_path, FASTMTL_CPU="portable")
    assert fields(done.stdout)["CPU ISA"] == "portable (FASTMTL_CPU=portable)"


def test_methods_are_listed(tmp_path):
    done = python("-m", "fastmtl", "methods", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "Navon et al., ICML 2022" in rows["NashMTL"]
    assert "tasks, temperature=2.0" in rows["scalarization.DWA"]
    markdown = python("-m", "fastmtl", "methods", "--markdown", cwd=tmp_path).stdout
    columns = "| method | make | paper | needs | state | memory | options | TorchJD | LibMTL | official |"
    assert markdown.startswith(f"{columns}\n|---|")


def test_info_under_a_torch_without_cuda(monkeypatch):
    monkeypatch.delenv("FASTMTL_NO_EXT", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setitem(fastmtl.ops.EXTENSIONS, "_C_cuda", None)
    info = cli.info()
    assert info["CUDA"] == "none: torch is not a CUDA build"
    assert info["CUDA kernels"] == "not loaded: torch is not a CUDA build"


def test_info_where_cuda_kernels_may_have_been_switched_off(monkeypatch):
    """With FASTMTL_CUDA=0 they were not wanted: nothing need be missing."""
    monkeypatch.delenv("FASTMTL_NO_EXT", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(fastmtl.ops.EXTENSIONS, "_C_cuda", None)
    line = cli.info()["CUDA kernels"]
    assert line.startswith("not built, or switched off by FASTMTL_CUDA=0: ")
    assert line.endswith("FASTMTL_CUDA=1 pip install . builds them or says what is missing")


def test_info_in_a_checkout_that_hides_what_is_installed(monkeypatch, tmp_path):
    """`pip install .` and then Python in the same folder: the kernels are there, but not here."""
    monkeypatch.delenv("FASTMTL_NO_EXT", raising=False)
    monkeypatch.setitem(fastmtl.ops.EXTENSIONS, "_C", None)
    monkeypatch.setattr(cli, "_FOLDER", tmp_path / "fastmtl")
    assert cli.info()["CPU kernels"].startswith("not built: pip install .")
    (tmp_path / "setup.py").touch()
    assert cli.info()["CPU kernels"].endswith("start Python in another folder")


def test_info_needs_no_extra(tmp_path):
    code = NO_EXTRA + "from fastmtl.__main__ import main; raise SystemExit(main(['info']))"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert fields(done.stdout)["torch"] == torch.__version__


@pytest.mark.parametrize("arguments", [[], ["train"], ["scaling", "--tasks", "0"], ["methods", "x"]])
def test_wrong_arguments_exit_2_with_a_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m fastmtl" in capsys.readouterr().err

"""The forms and workflows that a maintainer takes as they are: their syntax, and that what they name is there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
pytestmark = pytest.mark.skipif(not GITHUB.exists(), reason="a source release has no .github")

WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path):
    content = yaml.safe_load(path.read_text())
    content["on"] = content.pop(True, content.get("on"))  # YAML 1.1 takes a bare `on` for a truth value
    return content


def steps(path):
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


@workflows
def test_jobs_are_complete_and_need_what_is_there(path):
    content = read(path)
    assert content["on"]
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert job["runs-on"]
        needed = job.get("needs", [])
        assert {needed} if isinstance(needed, str) else set(needed) <= content["jobs"].keys()
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step.get("uses", "a/b@c"))


@workflows
def test_expressions_name_what_is_there(path):
    for job in read(path)["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        keys = set(matrix) - {"include"} | {key for case in matrix.get("include", []) for key in case}
        assert set(re.findall(r"matrix\.(\w+)", str(job))) <= keys
        assert str(job).count("${{") == len(re.findall(r"\$\{\{ [\w.]+ \}\}", str(job)))


@workflows
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_commands_are_shell_and_targets_exist(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [step["run"] for step in steps(path) if "run" in step]
    for command in commands:
        subprocess.run(["bash", "-n"], input=re.sub(r"\$\{\{.*?\}\}", "x", command), text=True, check=True)
        assert set(re.findall(r"^make ([\w-]+)", command, re.MULTILINE)) <= set(targets)
    assert commands


def test_every_python_that_is_promised_is_tested():
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert read(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == promised


def test_what_is_published_was_uploaded():
    found = steps(GITHUB / "workflows" / "release.yml")
    uploaded = {
        s["with"]["name"].split("$")[0] for s in found if s.get("uses", "").startswith("actions/upload-artifact")
    }
    downloaded = {
        s["with"].get("name") or s["with"]["pattern"] for s in found if "download-artifact" in s.get("uses", "")
    }
    assert uploaded == {"dist-sdist", "dist-"}
    assert downloaded == {"dist-sdist", "dist-*"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path):
    form = yaml.safe_load(path.read_text())
    assert form.keys() == {"name", "description", "labels", "body"}
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "markdown", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in form["body"])

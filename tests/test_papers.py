"""Licence, citation, CI and packaging say the same."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

from tests.test_setup import PACKAGE, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version_and_licence_stand_once() -> None:
    project, citation = PROJECT["project"], yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert citation["authors"] == project["authors"] == [{"name": "the ffcv-imnet authors"}]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Copyright 2026 the ffcv-imnet authors" in licence
    assert all((ROOT / name).is_file() for name in project["license-files"])


def test_ci_runs_on_every_python_that_is_declared() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    job = yaml.safe_load(text)["jobs"]["test"]
    declared = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if "3." in c]
    assert job["strategy"]["matrix"]["python"] == declared == ["3.11", "3.12", "3.13"]
    assert "bash .ci/run" in text


def test_the_commit_hooks_are_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None
    commands = lint[1].replace("$(python)", ".venv/bin/python").replace("\t@", "").splitlines()
    assert [hook["entry"] for hook in hooks] == commands


def test_what_the_package_needs_is_installed_with_it() -> None:
    """Every file that is not Python, but for what is compiled; and each pattern finds one."""
    table, package = PROJECT["tool"]["setuptools"], ROOT / PACKAGE
    found = set()
    for name, patterns in table["package-data"].items():
        for pattern in patterns:
            matches = set((ROOT / name.replace(".", "/")).glob(pattern))
            assert matches, f"{name}: {pattern} finds nothing"
            found |= matches
    built = {".py", ".pyc", ".so", ".partial", ".nbc", ".nbi"}
    there = {p for p in package.rglob("*") if p.is_file() and p.suffix not in built}
    assert there <= found, there - found
    assert {p.name for p in (package / "rn_configs").iterdir()} == {
        p.name for p in (ROOT / "rn_configs").iterdir()
    }
    assert set(table["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}


def test_set_up_installs_nothing_again_where_the_crop_decoder_cannot_be_compiled(
    tmp_path: Path,
) -> None:
    """A whole .venv, whose pip fails if it is asked, and a compiler that fails."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("core", "native"):
        shutil.copytree(ROOT / PACKAGE / folder, tmp_path / PACKAGE / folder, ignore=ignore)
    shutil.copy(ROOT / "setup.sh", tmp_path)
    shutil.copy(
        ROOT / PACKAGE / "__init__.py", tmp_path / PACKAGE
    )  # else the installed one goes first
    (tmp_path / "requirements.lock").write_text(f"ffcv=={version('ffcv')}\n")
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "lib/python3/site-packages/pip").mkdir(parents=True)
    (venv / "bin/activate").write_text(str(venv))
    python = venv / "bin/python"
    python.write_text(f'#!/bin/sh\n[ "$2" != pip ] || exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    lock = hashlib.sha256((tmp_path / "requirements.lock").read_bytes()).hexdigest()
    (venv / ".complete").write_text(f"{lock}  -\n")
    done = subprocess.run(
        ["bash", "setup.sh"], cwd=tmp_path, env=os.environ | {"CC": "false"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "nothing missing" in done.stdout, done
    assert "the crop decoder was not compiled" in done.stdout and "pip" not in done.stdout

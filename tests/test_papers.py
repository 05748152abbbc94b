"""Licence, citation, CI and packaging say the same."""

import re
import tomllib

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

"""Packages that need not be there: what counts as installed."""

import sys
from pathlib import Path

import pytest

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.optional import is_there, require


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to import from, in which CUDA's wheels and somebody's runs have left theirs."""
    (tmp_path / "nvidiax/cublas").mkdir(parents=True)
    (tmp_path / "wandbx").mkdir()
    (tmp_path / "broken.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_package_is_there_if_its_own_module_is(packages: Path) -> None:
    assert is_there("json") and is_there("os.path")
    for absent in ("nvidiax.dali", "nvidiax", "wandbx", "no_such_package", "no_such_package.io"):
        assert not is_there(absent)
    (packages / "nvidiax/dali").mkdir()
    assert not is_there("nvidiax.dali")
    (packages / "nvidiax/dali/__init__.py").touch()
    assert is_there("nvidiax.dali")
    assert "nvidiax.dali" not in sys.modules  # looking is not importing


def test_what_is_missing_is_said_with_its_remedy(packages: Path) -> None:
    assert require("json", "it", "json").loads("1") == 1
    with pytest.raises(
        UsageError, match=r"^it needs wandbx, which is not installed: pip install w$"
    ):
        require("wandbx", "it", "w")
    with pytest.raises(UsageError, match=r"does not load .*no_such_library.*--force-reinstall b"):
        require("broken", "it", "b")

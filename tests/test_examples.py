"""The examples run, in this process, on the tests' small data."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SmallData
from tests.test_setup import ROOT

EXAMPLES = ROOT / "examples"
SHORT = ["--epochs", "1", "--batch_size", "32", "--resolution", "32"]


@pytest.fixture
def folder(small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose data/beton has the two files, as write_ffcv.py leaves them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/beton").symlink_to(small.train.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str, *options: str) -> float:
    """`main` of an example; what it says is the top-1 of its last epoch."""
    files = ["data/beton/train.beton", "data/beton/val.beton"]
    top_1: float = runpy.run_path(str(EXAMPLES / name))["main"]([*files, *SHORT, *options])
    return top_1


def test_plain_pytorch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 <= run("plain_pytorch.py") <= 1
    assert "epoch 0: loss " in capsys.readouterr().out


def test_a_mistake_in_plain_pytorch_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["data/beton/train.beton", "data/beton/val.beton"]
    monkeypatch.setattr(sys, "argv", ["plain_pytorch.py", *files, "--resolution", "32"])
    with pytest.raises(SystemExit, match="error: batch_size 256 is more than the 100 images"):
        runpy.run_path(str(EXAMPLES / "plain_pytorch.py"), run_name="__main__")


def test_stock_ffcv(folder: Path) -> None:
    assert 0 <= run("stock_ffcv.py", "--classes", "10") <= 1
    text = (EXAMPLES / "stock_ffcv.py").read_text()
    assert len(re.findall(r"# CHANGED, was: ", text)) == 2 and text.count("ffcv_imnet") == 1


def test_lightning(folder: Path) -> None:
    pytest.importorskip("lightning")
    assert 0 <= run("with_lightning.py", "--classes", "10") <= 1


def test_the_notebook(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((EXAMPLES / "loader.ipynb").read_text())
    space: dict[str, Any] = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
    assert "160 px: " in capsys.readouterr().out
    space["plt"].close("all")


def test_the_blocks_of_loader_md(folder: Path) -> None:
    from tests.test_docs import blocks

    found = [b for b in blocks(ROOT / "docs/loader.md") if b.language == "python"]
    assert len(found) == 2
    for block in found:
        exec(compile(block.text, block.where, "exec"), {})

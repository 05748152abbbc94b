"""ONNX files are programs: what one may take of memory and processor, and what is not run at all."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx", reason="the group `export` is not installed")
pytest.importorskip("onnxruntime", reason="the group `export` is not installed")

from ffcv_imnet.core.errors import RunError
from ffcv_imnet.evaluate import onnx_network
from ffcv_imnet.evaluate.onnx_network import OnnxNetwork
from ffcv_imnet.evaluate.onnx_worker import fault_of
from tests.fuzz import onnx_files

STATIC = ["loop", "scan", "if", "function", "sparse", "domain"]


@pytest.mark.parametrize("name", STATIC)
def test_what_is_not_run(name: str) -> None:
    make, words = onnx_files.by_hand()[name]
    assert words in (fault_of(make()) or "")


def test_a_sound_one_is_run(tmp_path: Path) -> None:
    assert fault_of(onnx_files.sound()) is None


@pytest.mark.parametrize("name", ["Expand", "pipe"])
def test_what_takes_too_much_is_one_sentence(name: str, tmp_path: Path) -> None:
    """Of memory; of a pipe, which never ends."""
    make, words = onnx_files.by_hand()[name]
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    with pytest.raises(RunError, match=words) as caught:
        OnnxNetwork(path)(torch.zeros(1, 3, onnx_files.SIDE, onnx_files.SIDE, dtype=torch.uint8))
    assert len(str(caught.value)) < 600


def test_time_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = onnx_files.by_hand()["squares"]
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    monkeypatch.setattr(onnx_network, "SECONDS", 1)
    network = OnnxNetwork(path)
    started = os.times().children_user
    with pytest.raises(RunError, match=f"more than 1 {words}"):
        network(torch.zeros(1, 3, onnx_files.SIDE, onnx_files.SIDE, dtype=torch.uint8))
    assert os.times().children_user - started < 8
    with pytest.raises(RunError, match="cannot run it"):  # its process has ended
        network(torch.zeros(1, 3, onnx_files.SIDE, onnx_files.SIDE, dtype=torch.uint8))

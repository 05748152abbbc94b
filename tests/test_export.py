"""`export`: the graph's shape, its parity with PyTorch, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models as tv
from torch import nn

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data import beton
from ffcv_imnet.evaluate.weights import load_network
from ffcv_imnet.images.imagenet import classes_in
from ffcv_imnet.models.blurpool import BlurConv2d
from ffcv_imnet.tools import export
from tests.conftest import SmallData
from tests.pictures import picture
from tests.test_evaluate_tool import save_run

onnx = pytest.importorskip("onnx", reason="the group `export` is not installed")
ort = pytest.importorskip("onnxruntime", reason="the group `export` is not installed")
load_file = pytest.importorskip("safetensors.torch", reason="`export` is not installed").load_file


@pytest.fixture(scope="module")
def run(small: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = small.settings(folder, training__ema_decay=0.9)
    save_run(settings, beton.check_beton(small.val).classes, folder / "best.pt")
    return folder / "best.pt"


def ship(weights: Path, folder: Path, *options: str) -> Path:
    """The exported file."""
    out = folder / "model.onnx"
    assert export.main(["--weights", str(weights), "--out", str(out), *options]) == 0
    return out


def pixels(count: int, side: int = 32) -> np.ndarray:
    return np.stack([picture(seed, side, side).transpose(2, 0, 1) for seed in range(count)])


def test_the_graph(run: Path, tmp_path: Path, small: SmallData) -> None:
    out = ship(run, tmp_path, "--data", str(small.val))
    graph = onnx.load(out)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 13)]
    source, target = graph.graph.input[0], graph.graph.output[0]
    assert (len(graph.graph.input), source.name, target.name) == (1, "input_0", "output_0")
    assert [d.dim_value for d in source.type.tensor_type.shape.dim] == [1, 3, 32, 32]
    assert source.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    kinds = [node.op_type for node in graph.graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.index("Sub") < kinds.index("Div") < kinds.index("Conv")  # normalises inside
    assert all(i.data_location == onnx.TensorProto.DEFAULT for i in graph.graph.initializer)

    model = load_network(run).model  # the average: the run had one
    data = pixels(1)
    with torch.no_grad():
        expected = model(torch.from_numpy(data)).numpy()
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    found = session.run(["output_0"], {"input_0": data.astype("f4")})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "labels.txt", "model.onnx", "model.safetensors",
    ]  # fmt: skip
    classes = classes_in((tmp_path / "labels.txt").read_text())
    assert classes == beton.check_beton(small.val).classes


def test_blurpool_is_a_constant_depthwise_convolution(run: Path, tmp_path: Path) -> None:
    graph = onnx.load(ship(run, tmp_path)).graph
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    groups = {}
    for node in graph.node:
        if node.op_type == "Conv":
            group = next(a.i for a in node.attribute if a.name == "group")
            groups[group] = constants[node.input[1]]
    blurs = sorted(group for group in groups if group > 1)
    names = [
        m.conv.in_channels for m in load_network(run).model.modules() if isinstance(m, BlurConv2d)
    ]
    assert blurs == sorted(names) == [16, 32]
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    for group in blurs:
        np.testing.assert_allclose(groups[group], np.broadcast_to(kernel, (group, 1, 3, 3)))


@pytest.mark.parametrize("options", [
    ("--input", "uint8"), ("--batch", "3"), ("--dynamic_batch",), ("--opset", "11"),
    ("--opset", "17"), ("--opset", "20", "--resolution", "48"), ("--plain",),
], ids=" ".join)  # fmt: skip
def test_it_loads_back_and_gives_the_same_logits(
    run: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    network = load_network(run, plain="--plain" in options)
    shipped = load_network(ship(run, tmp_path, *options))
    side = 48 if "48" in options else 32
    assert shipped.classes == network.classes and shipped.how.resolution == side
    assert shipped.how.crop_ratio == network.how.crop_ratio
    data = torch.from_numpy(pixels(4, side))
    with torch.no_grad():
        torch.testing.assert_close(shipped.model(data), network.model(data), rtol=1e-3, atol=1e-4)


def test_torchvision_loads_the_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = tv.resnet18(num_classes=5).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    ship(tmp_path / "w.pth", tmp_path, "--resolution", "32", "--mean", "127", "--std", "128")
    other = tv.resnet18(num_classes=5).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    back = load_network(tmp_path / "model.safetensors")
    assert (back.arch, back.how.resolution) == ("resnet18", 32)
    normalised = next(back.model.children())(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
    assert torch.equal(normalised, torch.ones(1, 3, 1, 1))


def test_blurpools_safetensors_load_back_here(run: Path, tmp_path: Path) -> None:
    ship(run, tmp_path)
    network, back = load_network(run), load_network(tmp_path / "model.safetensors")
    assert back.uses_blurpool and back.classes == network.classes and back.how == network.how
    data = torch.from_numpy(pixels(2))
    with torch.no_grad():
        torch.testing.assert_close(back.model(data), network.model(data))


def test_it_refuses_what_onnx_runtime_does_not_reproduce(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(nn.Module):
        def __init__(self, path: Path) -> None:
            super().__init__()
            self.model = load_network(run).model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images) * 1.01

    monkeypatch.setattr(export, "OnnxNetwork", Wrong)
    with pytest.raises(RunError, match=r"does not reproduce PyTorch: largest difference 1\.0e-02"):
        export.main(["--weights", str(run), "--out", str(tmp_path / "model.onnx")])
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line_and_leave_nothing(
    run: Path, tmp_path: Path, small: SmallData
) -> None:
    (tmp_path / "tree" / "circle").mkdir(parents=True)
    (tmp_path / "tree" / "circle" / "bad.jpg").write_bytes(b"\xff\xd8 no")
    out = ["--weights", str(run), "--out", str(tmp_path / "model.onnx")]
    cases: dict[str, tuple[type[Exception], list[str]]] = {
        "'5' is not a whole number from 11 to 20": (UsageError, [*out, "--opset", "5"]),
        "opset: '99'": (UsageError, [*out, "--opset", "99"]),
        r"x\.pb: its name must end in \.onnx": (
            UsageError,
            [*out[:2], "--out", str(tmp_path / "x.pb")],
        ),
        r"no/x\.onnx: the folder .*no does not exist": (
            UsageError,
            [*out[:2], "--out", str(tmp_path / "no/x.onnx")],
        ),
        "bad.jpg: the image cannot be read": (
            RunError,
            [*out, "--data", str(tmp_path / "tree")],
        ),
        "--batch: '0' is not": (UsageError, [*out, "--batch", "0"]),
    }
    for message, (kind, argv) in cases.items():
        with pytest.raises(kind, match=message):
            export.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]
    (tmp_path / "labels.txt").write_text("another\n")
    with pytest.raises(UsageError, match="classes of another network"):
        export.main(out)


def test_the_notes_are_json(run: Path, tmp_path: Path) -> None:
    graph = onnx.load(ship(run, tmp_path))
    notes = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert notes["ffcv_imnet.crop_ratio"] == 224 / 256 and notes["ffcv_imnet.resolution"] == 32

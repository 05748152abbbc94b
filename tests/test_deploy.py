"""deploy/evaluate_onnx.py stands alone, and gives `evaluate`'s numbers on the same pixels."""

import ast
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ffcv_imnet.data import beton
from ffcv_imnet.images.imagenet import write_labels
from ffcv_imnet.images.preprocess import Preprocess, preprocess
from ffcv_imnet.tools import evaluate, export, predict
from tests.conftest import SmallData
from tests.pictures import picture, save
from tests.test_evaluate_tool import save_run

pytest.importorskip("onnxruntime", reason="the group `export` is not installed")
SCRIPT = Path(__file__).parents[1] / "deploy" / "evaluate_onnx.py"


@pytest.fixture(scope="module")
def deploy() -> Any:
    spec = importlib.util.spec_from_file_location("evaluate_onnx", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds(folder: Path) -> list[Path]:
    """Images of every kind that needs care."""
    pixels = picture(1, 61, 83)
    save(folder / "plain.jpg", pixels)
    save(folder / "tall.jpg", picture(2, 200, 31))
    save(folder / "small.png", picture(3, 9, 14))
    Image.fromarray(pixels).convert("L").save(folder / "gray.jpg")
    Image.fromarray(pixels).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(pixels).convert("P").save(folder / "palette.png")
    Image.fromarray(pixels).convert("RGBA").save(folder / "alpha.png")
    cut_out = Image.fromarray(pixels).convert("RGBA")
    cut_out.putalpha(Image.fromarray(pixels[..., 1]))
    cut_out.save(folder / "transparent.png")
    Image.fromarray(pixels[..., 0].astype(np.float32) / 255).save(folder / "float.tiff")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "wide.png")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(folder / f"turned{orientation}.jpg", exif=exif)
    Image.fromarray(pixels).save(folder / "really_png.jpg", format="PNG")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("how", [
    Preprocess(), Preprocess(32, 1.0), Preprocess(37, 0.9, "bicubic"), Preprocess(24, 0.7, "box"),
    Preprocess(40, 0.875, "lanczos"),
], ids=str)  # fmt: skip
def test_the_pixels_are_evaluates(deploy: Any, tmp_path: Path, how: Preprocess) -> None:
    for path in kinds(tmp_path):
        data = path.read_bytes()
        ours = preprocess(data, how)
        theirs = deploy.preprocess(data, how.resolution, how.crop_ratio, how.interpolation)
        assert np.array_equal(ours, theirs), path.name


def test_it_needs_nothing_but_numpy_and_pillow() -> None:
    """Nor syntax or modules that Python 3.6 lacks."""
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    nodes = list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others == {"numpy", "PIL", "onnxruntime", "tensorrt"}
    assert not names & {"dataclasses", "__future__"}


def test_labels(deploy: Any, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text(write_labels(("n01440764", "my cat", "n99999999")))
    assert deploy.read_labels(str(tmp_path / "labels.txt")) == ["n01440764", "my cat", "n99999999"]
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")  # as Windows writes it
    assert deploy.read_labels(str(tmp_path / "labels.txt")) == ["cat", "dog"]


def test_percentiles(deploy: Any) -> None:
    assert [deploy.percentile([4.0, 1, 3, 2], p) for p in (50, 90, 99)] == [2, 4, 4]


@pytest.fixture(scope="module")
def shipped(small: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped")
    classes = beton.check_beton(small.val).classes
    save_run(small.settings(folder), classes, folder / "best.pt")
    options = ["--weights", str(folder / "best.pt"), "--out", str(folder / "model.onnx")]
    assert export.main([*options, "--batch", "3"]) == 0
    return folder


def run(*options: object) -> "subprocess.CompletedProcess[str]":
    """The script in a Python that finds neither torch nor this project."""
    code = (
        "import sys, runpy; sys.modules.update(torch=None, ffcv=None, ffcv_imnet=None);"
        f"sys.argv = ['evaluate_onnx.py', *sys.argv[1:]]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    words = [sys.executable, "-I", "-c", code, *map(str, options)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_its_numbers_are_evaluates(shipped: Path, small: SmallData) -> None:
    folder = small.val.parent / "images" / "val"
    done = run("--model", shipped / "model.onnx", "--data", folder, "--json", shipped / "d.json",
               "--provider", "CPUExecutionProvider")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "latency of a batch of 3: p50" in done.stdout
    theirs = json.loads((shipped / "d.json").read_text())
    for weights in ("model.onnx", "best.pt"):
        out = shipped / "e.json"
        assert evaluate.main(["--weights", str(shipped / weights), "--data", str(folder),
                              "--out", str(out)]) == 0  # fmt: skip
        (ours,) = json.loads(out.read_text())["views"]
        assert (theirs["images"], theirs["top_1"], theirs["top_5"]) == (
            ours["images"], ours["top_1"], ours["top_5"],
        )  # fmt: skip
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)


def test_it_names_what_predict_names(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    save(photo, picture(1, 60, 40))
    done = run("--model", shipped / "model.onnx", "--image", photo, photo)
    assert done.returncode == 0, done.stderr
    one, two = done.stdout.split(f"{photo}\n")[1:]
    assert one == two and len(one.splitlines()) == 5
    assert predict.main(["--weights", str(shipped / "model.onnx"), str(photo)]) == 0
    theirs = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-5:]]
    for line, (probability, label) in zip(one.splitlines(), theirs, strict=True):
        ours = line.split(maxsplit=1)
        assert ours[1] == label and float(ours[0]) == pytest.approx(float(probability), abs=2e-4)
    for words in ((), ("--image", photo, "--data", tmp_path)):
        done = run("--model", shipped / "model.onnx", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
    done = run("--model", shipped / "model.onnx", "--image", tmp_path / "none.jpg", photo)
    assert done.returncode == 1 and "none.jpg: the image cannot be read" in done.stderr
    assert f"{photo}\n" in done.stdout
    done = run("--model", shipped / "model.onnx", "--image", photo, "--limit", "3")
    assert done.returncode == 2 and "not with --image" in done.stderr


def test_mistakes_are_one_line(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "bad" / "circle").mkdir(parents=True)
    (tmp_path / "bad" / "circle" / "0.jpg").write_bytes(b"no")
    (tmp_path / "odd" / "whale").mkdir(parents=True)
    (tmp_path / "x.onnx").write_bytes(b"no")
    (tmp_path / "labels.txt").write_text((shipped / "labels.txt").read_text())
    model = shipped / "model.onnx"
    cases = {
        "circle/0.jpg: the image cannot be read": (1, model, "bad"),
        "'whale' that is not among the 10": (2, model, "odd"),
        "no such folder": (2, model, "none"),
        "no such file": (2, tmp_path / "no.onnx", "bad"),
        "ONNX Runtime cannot load it": (1, tmp_path / "x.onnx", "bad"),
        "expected .onnx, or .engine": (2, tmp_path / "labels.txt", "bad"),
    }
    options: dict[str, tuple[str, ...]] = {
        "0 is not from 0.01 to 1": ("--crop_ratio", "0"),
        "--batch 7: ": ("--batch", "7"),
        "invalid int value: 'x'": ("--limit", "x"),
        "its folder does not exist": ("--json", "/no/x.json"),
        "its name must end in .json": ("--json", "/no/x.beton"),
        "no Quantum, only": ("--provider", "Quantum"),
    }
    (tmp_path / "good" / "circle").mkdir(parents=True)
    save(tmp_path / "good" / "circle" / "0.png", picture(1, 40, 40))
    every = {text: (*case, ()) for text, case in cases.items()}
    more = {text: (2, model, "good", words) for text, words in options.items()}
    for message, (status, weights, data, words) in {**every, **more}.items():
        done = run("--model", weights, "--data", tmp_path / data, *words)
        assert done.returncode == status, done.stderr
        assert message in done.stderr and done.stderr.count("\n") == 1


class FakeCuda:
    """Device memory that is the host's."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []

    def allocate(self, size: int) -> int:
        self.blocks.append(np.zeros(size, np.uint8))
        return int(self.blocks[-1].ctypes.data)

    def copy(self, target: int, source: int, size: int, to_device: bool) -> None:
        import ctypes

        ctypes.memmove(target, source, size)


@pytest.mark.parametrize("version", ["8.2", "10.3"])
def test_an_engine_with_a_stand_in_for_tensorrt(
    deploy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    """Both generations of the API as documented; TensorRT itself is not here to be tried."""
    names, shapes = ["input_0", "output_0"], [(2, 3, 4, 4), (2, 5)]

    class Context:
        def execute_v2(self, addresses: list[int]) -> bool:
            import ctypes

            assert len(addresses) == 2
            pixels = np.ctypeslib.as_array((ctypes.c_float * 96).from_address(addresses[0]))
            out = np.ctypeslib.as_array((ctypes.c_float * 10).from_address(addresses[1]))
            out[:] = np.arange(10) + pixels.sum()
            return True

    engine: Any = types.SimpleNamespace(create_execution_context=Context)
    if version == "10.3":
        engine.num_io_tensors = 2
        engine.get_tensor_name = lambda i: names[i]
        engine.get_tensor_shape = lambda name: shapes[names.index(name)]
        engine.get_tensor_dtype = lambda name: "f4"
    else:
        engine.num_bindings = 2
        engine.get_binding_name = lambda i: names[i]
        engine.get_binding_shape = lambda i: shapes[i]
        engine.get_binding_dtype = lambda i: "f4"
    tensorrt: Any = types.ModuleType("tensorrt")
    tensorrt.__version__ = version
    tensorrt.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    tensorrt.nptype = lambda kind: np.float32
    tensorrt.Runtime = lambda logger: types.SimpleNamespace(
        deserialize_cuda_engine=lambda data: engine if data == b"engine" else None
    )
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setattr(deploy, "CudaMemory", FakeCuda)
    (tmp_path / "model.engine").write_bytes(b"engine")
    model = deploy.EngineModel(str(tmp_path / "model.engine"))
    found = model(np.ones((2, 3, 4, 4), "f4"))
    assert model.shape == [2, 3, 4, 4] and np.array_equal(found, np.arange(10).reshape(2, 5) + 96)
    (tmp_path / "old.engine").write_bytes(b"other")
    with pytest.raises(deploy.Failure, match="build it here with trtexec"):
        deploy.EngineModel(str(tmp_path / "old.engine"))

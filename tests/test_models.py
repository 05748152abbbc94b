"""Networks against hand-computed examples and torchvision."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ffcv_imnet import models
from ffcv_imnet.config.parsing import load
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.models import blurpool, registry
from ffcv_imnet.tools.models import RECORDS, recorded


def test_blurpool_by_hand() -> None:
    conv = nn.Conv2d(16, 1, 3, stride=2, padding=1, bias=False)
    nn.init.zeros_(conv.weight)
    conv.weight.data[0, 0, 1, 1] = 1.0  # the identity on channel 0: what is left is the blur
    x = torch.zeros(1, 16, 4, 4)
    x[0, 0] = torch.arange(16.0).view(4, 4)
    # Blurred at (0, 0): (4*0 + 2*1 + 2*4 + 5) / 16 with zeros outside, and so on.
    expected = torch.tensor([[15 / 16, 33 / 16], [(4 * 8 + 2 * (4 + 12 + 9) + 5 + 13) / 16, 10.0]])
    expected[0, 1] = (4 * 2 + 2 * (1 + 3 + 6) + 5 + 7) / 16
    assert torch.allclose(blurpool.BlurConv2d(conv)(x)[0, 0], expected)


def test_blur_takes_the_stride_of_a_1x1_convolution() -> None:
    conv = nn.Conv2d(16, 8, 1, stride=2, bias=False)
    weight, x = conv.weight.detach().clone(), torch.randn(2, 16, 7, 9)
    kernel = blurpool.BlurConv2d(nn.Conv2d(16, 16, 3)).kernel
    plain = F.conv2d(F.conv2d(x, kernel, padding=1, groups=16), weight, stride=2)
    assert torch.allclose(blurpool.BlurConv2d(conv)(x), plain, atol=1e-6)


def test_a_network_of_ours_needs_no_torchvision() -> None:
    """It would load torch's compiler: two seconds of every `predict`."""
    code = (
        "import sys, ffcv_imnet.tools.predict, ffcv_imnet.tools.evaluate\n"
        "from ffcv_imnet.models.registry import build\n"
        "build('slim13', 10, True)\n"
        "sys.exit(', '.join({'torchvision', 'torch._dynamo'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blurpool_stands_where_the_recipe_says() -> None:
    plain = torchvision.models.resnet18()
    strided = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2) and module.in_channels >= 16
    ]
    assert "conv1" not in strided and len(strided) == 6
    network = registry.build("resnet18", 1000, False)
    blurpool.apply_blurpool(network)
    blurred = [n for n, m in network.named_modules() if isinstance(m, blurpool.BlurConv2d)]
    assert blurred == strided


@pytest.mark.parametrize("name", sorted(registry.REGISTRY))
def test_networks_take_uint8_and_give_logits(name: str) -> None:
    model = models.build_model(load(model__arch=name), classes=7)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert model(pixels).shape == (2, 7)


def test_without_blurpool_torchvision_loads_it() -> None:
    model = models.build_model(load(training__use_blurpool=False), classes=1000).eval()
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(model[1].state_dict())
    theirs.eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normalized = torchvision.transforms.functional.normalize(pixels / 255, mean, std)
    assert torch.allclose(model(pixels), theirs(normalized), atol=1e-4)


def test_zero_gamma_makes_blocks_the_identity() -> None:
    def gamma(zero: bool) -> float:
        parameters = dict(registry.build("resnet18", 10, zero).named_parameters())
        return float(parameters["layer3.0.bn2.weight"].detach().abs().sum())

    assert gamma(True) == 0 and gamma(False) > 0


def test_the_seed_gives_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        return next(models.build_model(load(training__seed=seed), 10).parameters())

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_unknown_network() -> None:
    with pytest.raises(UsageError, match=r"did you mean resnet18\?"):
        registry.build("resnet_18", 10, False)


def test_timms_networks() -> None:
    """Optional: pip install timm."""
    timm = pytest.importorskip("timm", reason="timm is optional")
    torch.manual_seed(0)
    theirs = timm.create_model("resnet14t", num_classes=7).state_dict()
    model = models.build_model(load(model__arch="timm:resnet14t", training__use_blurpool=False), 7)
    ours = model[1].state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    with pytest.raises(UsageError, match=r"did you mean timm:resnet14t\?"):
        registry.check_arch("timm:resnet14")
    with pytest.raises(UsageError, match="zero_gamma"):
        registry.build("timm:resnet14t", 7, True)


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        registry.check_arch("timm:resnet14t")


def test_the_table_tells_experiments_apart() -> None:
    """records/2026-11-25_finetune: seeds of one recipe from one file, and nothing tried on the way."""
    scores = recorded(RECORDS)
    record = "2026-11-25_finetune"
    rows = [row[3:] for row in scores["slim13"] if row[0] == record and row[1] == "9,469"]
    assert sorted(rows) == [
        ["10", "random weights", "85.7%", "3"],
        ["3", "tiny100/last.pt", "84.6%", "3"],
        ["3", "tiny100_full/last.pt", "86.6%", "3"],
    ]
    lite0 = [row[4:] for row in scores["efficientnet_lite0"]]
    assert sorted(row[1] for row in lite0) == ["84.2%", "9.9%"]

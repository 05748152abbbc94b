"""Every network of the registry trains, resumes, is evaluated and exported; ResNet's options are what they say."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import train_imagenet
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schema import to_dict
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.log import read_log
from ffcv_imnet.evaluate.weights import load_network
from ffcv_imnet.machine.distributed import describe_world
from ffcv_imnet.models import build_model, check_outputs
from ffcv_imnet.models.registry import REGISTRY, build, register
from ffcv_imnet.tools import evaluate, export, models
from ffcv_imnet.train import checkpoint
from ffcv_imnet.train.epoch import build_learner
from tests.conftest import SmallData
from tests.test_report import epoch, header, summary, write_run


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"tiny"}))
def test_a_network_goes_all_the_way(name: str, small: SmallData, tmp_path: Path) -> None:
    """Two steps; the checkpoint goes on from where it was; its weights are evaluated as the log says, and exported."""
    folder = tmp_path / "run"
    settings = small.settings(
        folder, model__arch=name, model__zero_gamma=True, training__batch_size=50, lr__lr=0.01,
        training__ema_decay=0.5, validation__batch_size=33, training__epochs=1,
        lr__lr_peak_epoch=0,
    )  # fmt: skip
    assert train_imagenet.train(settings, None, time.perf_counter()) == 0
    best = folder / "best.pt"
    state = checkpoint.load(best)
    learner = build_learner(settings, 10, describe_world())
    checkpoint.restore(learner, state, best)
    assert all(torch.equal(v, state["model"][k]) for k, v in learner.model.state_dict().items())

    evaluated = tmp_path / "evaluated.json"
    command = ["--weights", str(best), "--data", str(small.val), "--out", str(evaluated)]
    assert evaluate.main(command) == 0
    (view,) = json.loads(evaluated.read_text())["views"]
    (epoch,) = read_log(folder).epochs
    assert view["top_1"] == pytest.approx(epoch.ema_top_1)

    if name in ("resnet34", "resnet50"):
        return  # seconds more, for operations that resnet18 has too
    pytest.importorskip("onnxruntime", reason="the group `export` is not installed")
    assert export.main(["--weights", str(best), "--out", str(tmp_path / "model.onnx")]) == 0
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    plain = load_network(tmp_path / "model.safetensors").model(pixels)
    assert torch.equal(plain, load_network(best).model(pixels))


# ---- the table ----------------------------------------------------------------------------------


def test_the_table_of_networks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models.main(["resnet18", "slim13", "--training.use_blurpool=false"]) == 0
    table, records = capsys.readouterr().out.split("\n\n")
    rows = {line.split()[0]: line.split() for line in table.splitlines()[:-1]}
    assert records.splitlines()[0].split()[-4:] == ["epochs", "from", "top-1", "seeds"]
    # 1.814 billion multiply-adds at 224 px, as torchvision states for ResNet-18, are twice as many operations.
    assert rows["resnet18"][1:3] == ["11.7", "M"] and rows["resnet18"][6] == "3.63"
    for ours, theirs in zip(rows["slim13"][3:7], rows["resnet18"][3:7], strict=True):
        assert float(ours) < float(theirs)
    monkeypatch.setattr(models, "STEPS", 1)
    assert models.main(["tiny", "--measure", "--resolution", "32", "--batch_size", "2"]) == 0
    assert "training images/s" in capsys.readouterr().out
    with pytest.raises(UsageError, match="section"):
        models.main(["--stem=deep"])
    with pytest.raises(UsageError, match="resnet18"):
        models.main(["resnet_18"])


def test_recorded_top_1_is_the_mean_over_seeds_of_one_recipe(tmp_path: Path) -> None:
    def keep(folder: str, top_1: float, seed: int, lr: float, **options: object) -> None:
        settings: dict[str, dict[str, Any]] = {
            "model": {"arch": "slim13", **options},
            "training": {"seed": seed},
            "lr": {"lr": lr},
            "logging": {"folder": f"runs/{seed}"},
        }
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        data: dict[str, dict[str, str | int | None]] = {"train": {"samples": 1234, "classes": 10}}
        start = replace(header(), settings=settings, manifests=data)
        write_run(tmp_path / folder, start, epoch(0, top_1), summary(top_1))

    keep("one/a/seed1", 0.80, 1, 0.5)
    keep("one/a/seed2", 0.90, 2, 0.5)
    keep("one/b", 0.70, 1, 2.0)
    keep("two", 0.60, 1, 0.5, stem="deep")  # an option of earlier versions
    write_run(tmp_path / "three", header(), epoch(0, 0.5))  # not finished
    assert models.recorded(tmp_path) == {
        "slim13": [
            ["one", "1,234", "10", "1", "random weights", "85.0%", "2"],
            ["one", "1,234", "10", "1", "random weights", "70.0%", "1"],
        ],
        "slim13 model.stem=deep": [["two", "1,234", "10", "1", "random weights", "60.0%", "1"]],
    }
    assert models.network_of(to_dict(load(model__arch="slim13"))) == "slim13"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["resnet18", "--model.arch=slim13"], "name the network without an option"),
        (["--batch_size", "4"], "are those of --measure"),
        (["--measure", "--resolution", "0"], "from 32 to 1024 px"),
        (["--measure", "--batch_size", "-4"], "1 or more"),
        (["--model.stem"], "settings are given as"),
    ],
)
def test_the_table_refuses(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        models.main(words)


# ---- a network with a mistake -------------------------------------------------------------------


class Wrong(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(x)


def breaks(_: Tensor) -> None:
    raise ValueError("my forward is broken")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: torch.zeros(len(x), 1000), r"makes \(1, 1000\) of float32 .* \(1, 10\)"),
        (lambda x: torch.zeros(len(x), 2), r"makes \(1, 2\)"),
        (lambda x: torch.zeros(len(x)), r"makes \(1,\)"),
        (lambda x: torch.zeros(len(x), 10).long(), "int64"),
        (lambda x: (x, x), "makes a tuple"),
        (breaks, r"an image of \d+ px ends in ValueError: my forward is broken"),
    ],
)
def test_outputs_that_are_no_logits(
    answer: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "wrong", lambda classes, zero_gamma: Wrong(answer))
    with pytest.raises(UsageError, match=f"model.arch 'wrong'.*{said}"):
        build_model(load(model__arch="wrong"), 10)


def test_the_look_at_a_network_changes_nothing() -> None:
    model = build_model(load(model__arch="slim13"), 10)
    rng = torch.get_rng_state()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    check_outputs(model, 10, 64, "slim13")
    assert model.training and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_constructors_with_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "returns_nothing", lambda classes, zero_gamma: None)
    with pytest.raises(UsageError, match="returns NoneType, not a network"):
        build("returns_nothing", 10, False)
    monkeypatch.setitem(REGISTRY, "takes_one", lambda classes: nn.Identity())
    with pytest.raises(UsageError, match=r"'takes_one' \(.*test_networks.py\).*raises TypeError"):
        build("takes_one", 10, False)

    def resnet18(classes: int, zero_gamma: bool) -> nn.Module:
        return nn.Identity()

    with pytest.raises(UsageError, match=r"two networks are called resnet18: in .*resnet.py and"):
        register(resnet18)
    assert register(REGISTRY["resnet18"]) is REGISTRY["resnet18"]  # as a reload does

"""Starting from weights: files of many programs, what is kept of the head, and what of the body is trained."""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import train_imagenet
from ffcv_imnet.bench.dry_run import dry_run
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.log import read_log
from ffcv_imnet.data.beton import check_beton
from ffcv_imnet.evaluate.weights import load_network
from ffcv_imnet.images.imagenet import imagenet_names
from ffcv_imnet.models import build_model
from ffcv_imnet.models.blurpool import apply_blurpool
from ffcv_imnet.models.parts import parts_of
from ffcv_imnet.train import checkpoint
from ffcv_imnet.train.epoch import begin_training, build_learner, train_step
from ffcv_imnet.train.start import Start, start_from
from tests.conftest import SmallData
from tests.networks import tiny
from tests.test_data import ALONE
from tests.test_evaluate_tool import save_run

NAMES = [f"class {index}" for index in range(10)]


def network(classes: int = 10, blurpool: bool = True) -> Any:
    """`tiny`, with weights and statistics of its own."""
    torch.manual_seed(7)
    made = tiny(classes, False)
    if blurpool:
        apply_blurpool(made)
    torch.manual_seed(8)
    for name, buffer in made.named_buffers():
        if "running" in name:
            buffer.uniform_(*(0.5, 1.5) if "var" in name else (-0.1, 0.1))
    return made


def settings_for(path: Path, **overrides: Any) -> Settings:
    return load(
        model__arch="tiny", model__weights=path, resolution__min_res=32, resolution__max_res=32,
        training__precision="fp32", lr__lr_peak_epoch=0, **overrides,
    )  # fmt: skip


def unwrapped(model: Any) -> Any:
    """Without the layer that normalises pixels."""
    return model[1]


def started(path: Path, classes: list[str] = NAMES, **overrides: Any) -> tuple[Start, Any]:
    """What `path` gives, and a network that it was put into."""
    settings = settings_for(path, **overrides)
    start = start_from(settings, classes)
    assert start is not None
    model = build_model(settings, len(classes))
    start.put_into(model)
    return start, unwrapped(model)


def same(a: nn.Module, b: nn.Module, but: str = "never") -> bool:
    """Whether their floats are equal, but for those whose name begins with `but`."""
    theirs = b.state_dict()
    return all(
        torch.equal(value, theirs[name])
        for name, value in a.state_dict().items()
        if value.is_floating_point() and not name.startswith(but)
    )


# ---- files --------------------------------------------------------------------------------------


def averaged(model: nn.Module) -> dict[str, Any]:
    """An average that is not `model`, and has begun."""
    average = AveragedModel(model)
    average.update_parameters(model)
    for value in average.module.parameters():
        value.data += 1
    return average.state_dict()


def compiled(model: nn.Module) -> Any:
    """As torch.compile names it; nothing is compiled until it is called."""
    return torch.compile(model)


def distributed(model: nn.Module) -> nn.Module:
    """As DistributedDataParallel names it, in one process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


class Lightning(nn.Module):
    """A LightningModule's names: the network is one of its modules."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.criterion = nn.BCELoss(torch.ones(3))


def composer(model: nn.Module) -> dict[str, Any]:
    """Composer's, with the states of the generators, which are NumPy's."""
    inner = {"model": distributed(model).state_dict(), "timestamp": {"epoch": 3}}
    return {"state": inner, "rng": [{"numpy": np.random.default_rng(0).bit_generator.state}],
            "numpy": np.arange(3), "best": np.float64(0.5)}  # fmt: skip


ARGUMENTS = argparse.Namespace(lr=0.1, output=Path("runs"), epochs=3)
FILES: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "state dict": ("", lambda m: m.state_dict()),
    "DDP": ("module", lambda m: distributed(m).state_dict()),
    "compiled": ("", lambda m: compiled(m).state_dict()),
    "compiled DDP, compiled": ("module", lambda m: compiled(distributed(compiled(m))).state_dict()),
    "Lightning": ("state_dict.net", lambda m: {"state_dict": Lightning(m).state_dict(), "epoch": 3}),
    "Lightning, DDP, compiled": (
        "state_dict.model.net.module",
        lambda m: {"state_dict": nn.ModuleDict({"model": Lightning(distributed(compiled(m)))}).state_dict()},
    ),
    "Composer": ("state.model.module", composer),
    "torchvision": ("model", lambda m: {"model": m.state_dict(), "args": ARGUMENTS, "epoch": 3}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_wrapped_files(kind: str, tmp_path: Path) -> None:
    taken, make = FILES[kind]
    model = network()
    torch.save(make(model), tmp_path / "w.pth")
    start, loaded = started(tmp_path / "w.pth")
    assert same(loaded, model)
    assert (start.record["taken"], start.record["averaged"]) == (taken, False)
    assert start.record["loaded"] == 3 + 3 * 4 + 2 and start.record["rows_kept"] == 10
    assert not start.record["missing"] and not start.record["new"] and not start.record["unused"]


def test_an_average_goes_before_plain_weights_once_it_has_begun(tmp_path: Path) -> None:
    model = network()
    for key, average in (("model_ema", averaged(model)), ("state_dict_ema", averaged(model))):
        content = {"model": model.state_dict(), key: average, "args": ARGUMENTS}
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=key != "model_ema")
        start, loaded = started(tmp_path / "w.pth")
        assert start.record["taken"] == f"{key}.module" and start.record["averaged"]
        assert torch.equal(loaded[0].weight, model[0].weight + 1)
    fresh = AveragedModel(model).state_dict()  # holds the random start, and was never updated
    torch.save({"model": model.state_dict(), "model_ema": fresh}, tmp_path / "w.pth")
    assert started(tmp_path / "w.pth")[0].record["taken"] == "model"


def test_this_projects_files(small: SmallData, tmp_path: Path) -> None:
    """The checkpoint of a run with and without an average, and what `export` writes of it."""
    classes = check_beton(small.val).classes
    path = tmp_path / "last.pt"
    for decay, taken in ((0.0, "model.1"), (0.9, "ema.module.1")):
        settings = small.settings(tmp_path, training__ema_decay=decay)
        save_run(settings, classes, path)
        start, loaded = started(path, list(classes))
        assert start.record["taken"] == taken
        expected = unwrapped(load_network(path).model)
        assert same(loaded, expected)
    with pytest.raises(
        UsageError, match=r"is of tiny, model.arch is resnet18: give --model.arch=tiny"
    ):
        start_from(load(model__weights=path), classes)

    package = pytest.importorskip("safetensors.torch", reason="the group `export` is not installed")
    notes = {"format": "pt", "ffcv_imnet.classes": '["b", "a"]'}
    package.save_file(network(2).state_dict(), tmp_path / "model.safetensors", notes)
    start, loaded = started(tmp_path / "model.safetensors", ["a", "b"])
    assert torch.equal(loaded[-1].weight, network(2)[-1].weight[[1, 0]])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(RunError, match="not a readable safetensors file"):
        started(tmp_path / "cut.safetensors")


class UpstreamBlur(nn.Module):
    """Names of ffcv-imagenet's BlurPool: the convolution, and a filter that is saved."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("blur_filter", torch.ones(16, 1, 3, 3))


def test_blurpool_of_ffcv_imagenet_and_none(tmp_path: Path) -> None:
    """final_weights.pt; and weights from before a blur fit a network with it, and the other way round."""
    model = network(blurpool=False)
    blurred = network()
    upstream = network(blurpool=False)
    for index in (3, 6):
        upstream[index] = UpstreamBlur(upstream[index])
    torch.save(distributed(upstream).state_dict(), tmp_path / "final_weights.pt")
    start, loaded = started(tmp_path / "final_weights.pt")
    assert same(loaded, blurred) and not start.record["unused"]
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    assert same(started(tmp_path / "plain.pth")[1], blurred)
    for name in ("final_weights.pt", "plain.pth"):
        assert same(started(tmp_path / name, training__use_blurpool=False)[1], model)
    # What is only evaluated must have it as it was.
    found = load_network(tmp_path / "plain.pth", arch="tiny")
    assert not found.uses_blurpool
    found = load_network(tmp_path / "final_weights.pt", arch="tiny")
    assert found.uses_blurpool and same(unwrapped(found.model), blurred)


# ---- the head -----------------------------------------------------------------------------------


def test_rows_of_classes_known_by_name_are_kept(small: SmallData, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_run(small.settings(tmp_path), ("cat", "dog", "eel"), path)
    theirs = unwrapped(load_network(path).model)[-1].weight
    start, loaded = started(path, ["ant", "dog", "cat"])
    fresh = unwrapped(build_model(settings_for(path), 3))[-1].weight
    assert torch.equal(loaded[-1].weight, torch.stack([fresh[0], theirs[1], theirs[0]]))
    assert start.record["rows_kept"] == 2 and start.record["new"] == ["11.weight", "11.bias"]
    # The body is all there, whatever becomes of the head.
    start, loaded = started(path, ["ant", "bee"])
    assert start.record["rows_kept"] == 0 and start.record["loaded"] == 15
    assert same(loaded, unwrapped(load_network(path).model), but="11.")
    assert same(loaded[-1], unwrapped(build_model(settings_for(path), 2))[-1])


def test_a_thousand_rows_are_imagenets(tmp_path: Path) -> None:
    torch.save(network(1000).state_dict(), tmp_path / "w.pth")
    theirs = network(1000)[-1].weight
    wnids = list(imagenet_names())
    assert len(set(imagenet_names().values())) == 1000  # so that a name is one class's
    start, loaded = started(tmp_path / "w.pth", [wnids[7], "tench", "mine"])
    assert start.record["rows_kept"] == 2
    assert torch.equal(loaded[-1].weight[:2], theirs[[7, 0]])
    strangers = [f"class {index}" for index in range(1000)]
    assert started(tmp_path / "w.pth", strangers)[0].record["rows_kept"] == 0
    # Other numbers without names are taken in their order, where there are as many.
    torch.save(network(7).state_dict(), tmp_path / "w.pth")
    assert started(tmp_path / "w.pth", NAMES[:7])[0].record["rows_kept"] == 7
    assert started(tmp_path / "w.pth", NAMES[:6])[0].record["rows_kept"] == 0
    headless = {k: v for k, v in network(7).state_dict().items() if not k.startswith("11.")}
    torch.save(headless, tmp_path / "w.pth")
    assert started(tmp_path / "w.pth", NAMES[:7])[0].record["rows_kept"] == 0


# ---- refusals -----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 / 0",)


def changed(**values: Any) -> dict[str, Any]:
    return {**network().state_dict(), **{k.replace("__", "."): v for k, v in values.items()}}


W = torch.ones
HOSTILE: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "code": (RunError, r"holds Python objects \('eval'\)", lambda: {**changed(), "e": Evil()}),
    "a network": (RunError, "holds Python objects", network),
    "another network": (
        UsageError, r"has 0 of the 15 tensors of tiny's body: it lacks '0.weight', '1.weight', '1.bias' and "
        r"12 more, and has instead 'conv.weight'; name the network", lambda: {"conv.weight": W(3)},
    ),
    "another shape": (
        UsageError, r"1 tensors have other shapes than tiny's: '0.weight \(3, 16\) for \(16, 3, 3, 3\)'",
        lambda: changed(**{"0__weight": W(3, 16)}),
    ),
    "NaN": (RunError, "1.bias holds NaN", lambda: changed(**{"1__bias": W(16) * torch.nan})),
    "NaN in the head": (RunError, "11.bias holds NaN", lambda: changed(**{"11__bias": W(10) * torch.nan})),
    "integers": (RunError, "1.bias is not of floating-point numbers", lambda: changed(**{"1__bias": W(16).int()})),
    "sparse": (RunError, "sparse, quantized", lambda: changed(**{"1__bias": W(16).to_sparse()})),
    "meta": (RunError, "without numbers", lambda: changed(**{"1__bias": W(16, device="meta")})),
    "no tensors": (RunError, "neither a checkpoint", lambda: {"a": 1}),
    "a list": (RunError, "neither a checkpoint", lambda: [W(1)]),
    "a long name": (RunError, "neither a checkpoint", lambda: {"a." * 100_000: W(1)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    error, says, make = HOSTILE[kind]
    path = tmp_path / "w.pth"
    for new in (True, False):
        torch.save(make(), path, _use_new_zipfile_serialization=new)
        with pytest.raises(error, match=says) as caught:
            started(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_no_such_file_and_a_wrong_kind(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "good.pth")
    with pytest.raises(
        UsageError, match=r"model.weights .*god.pth: no such file \(did you mean good.pth\?\)"
    ):
        started(tmp_path / "god.pth")
    with pytest.raises(UsageError, match=r"is an ONNX file"):
        (tmp_path / "x.onnx").write_bytes(b"")
        started(tmp_path / "x.onnx")


# ---- runs ---------------------------------------------------------------------------------------


def run(settings: Settings, resume: str | None = None) -> int:
    return train_imagenet.train(settings, resume, time.perf_counter())


def floats(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict().items()
    return {name: value.clone() for name, value in state if value.is_floating_point()}


def test_a_run_from_weights(
    small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One stage frozen, the head alone at first, an average; the log says what was loaded, `--dry_run` says
    the same; and the run goes on without the file."""
    file = tmp_path / "w.pth"
    torch.save({"state_dict": network(3).state_dict(), "args": ARGUMENTS}, file)
    settings = small.settings(
        tmp_path / "run", model__weights=file, model__freeze=1, model__freeze_epochs=1,
        lr__body_lr_mult=0.1, training__ema_decay=0.5, training__optimizer="muon",
    )  # fmt: skip
    assert dry_run(settings, False, 0.0) == 0
    said = f"model.weights {file}: 15 tensors loaded under 'state_dict'; the head is new (11.weight, 11.bias)\n"
    assert said in capsys.readouterr().out
    stopping = replace(settings, training=replace(settings.training, max_hours=1e-9))
    assert run(stopping) == 0  # before the first step
    assert said in capsys.readouterr().out
    file.unlink()
    with mock.patch.object(train_imagenet, "validate", wraps=train_imagenet.validate) as validated:
        assert run(settings, "auto") == 0
    first, later = (header.weights for header in read_log(tmp_path / "run").headers)
    assert later is None and first is not None
    assert (first["loaded"], first["new"], first["missing"]) == (15, ["11.weight", "11.bias"], [])
    learner: checkpoint.Learner = validated.call_args.args[0]
    ends = unwrapped(learner.model)
    assert same(ends[:2], network()[:2])  # frozen, BatchNorm's statistics too
    assert not torch.equal(ends[3].conv.weight, network()[3].conv.weight)
    assert not {id(p) for p in ends[0].parameters()} & {id(p) for p in learner.optimizer.state}
    assert learner.ema is not None and same(unwrapped(learner.ema.module)[1], network()[1])


def step_of(settings: Settings, file: Path, alone: bool) -> tuple[nn.Module, nn.Module]:
    """The network before and after a step."""
    before = started(file, training__ema_decay=0.0)[1]
    learner = build_learner(settings, 10, ALONE)
    start = start_from(settings, NAMES)
    assert start is not None
    start.put_into(learner.model)
    waiting = begin_training(learner, alone)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    train_step(learner, images, torch.arange(8), 0.1, 0.0, waiting=waiting)
    return before, unwrapped(learner.model)


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "soap"])
def test_what_a_step_moves(optimizer: str, tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "w.pth")
    common = {"training__optimizer": optimizer, "training__weight_decay": 0.0}

    def moved(alone: bool = False, **settings: Any) -> dict[str, float]:
        before, after = step_of(
            settings_for(tmp_path / "w.pth", **common, **settings), tmp_path / "w.pth", alone=alone
        )
        theirs = floats(after)
        return {n: float((theirs[n] - v).abs().max()) for n, v in floats(before).items()}

    plain, body = moved(), moved(model__freeze="body")
    assert all(plain.values())
    assert {name for name, by in body.items() if by} == {"11.weight", "11.bias"}
    assert moved(alone=True, model__freeze_epochs=1) == pytest.approx(body)
    two = moved(model__freeze=2)
    assert {name.split(".")[0] for name, by in two.items() if by} == {"6", "7", "11"}
    tenth = moved(lr__body_lr_mult=0.1)
    for name, by in tenth.items():
        factor = 1.0 if name.startswith("11.") or "running" in name else 0.1
        assert by == pytest.approx(factor * plain[name], rel=1e-2), name
    with pytest.raises(
        UsageError, match=r"model.freeze 4: the network has 3 stages before its head"
    ):
        moved(model__freeze=4)


@pytest.mark.parametrize(("arch", "count"), [("resnet50", 5), ("slim13", 3)])  # fmt: skip
def test_stages_are_those_of_one_resolution(arch: str, count: int) -> None:
    """And they, with the head, are all of the network."""
    settings = load(model__arch=arch, resolution__min_res=64, resolution__max_res=64)
    model = build_model(settings, 10)
    parts = parts_of(model, settings, 10)
    names = {module: name for name, module in model[1].named_modules()}
    held = [p for m in (*parts.body, *parts.head) for p in m.parameters(recurse=False)]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len(
        set(held)
    )
    assert len(parts.stages) == count and len(parts.head) == 1
    if arch.startswith("resnet"):
        for number, stage in enumerate(parts.stages[1:], 1):
            assert {names[module].split(".")[0] for module in stage} == {f"layer{number}"}


def test_settings_that_clash() -> None:
    for options, says in (
        ({"model__freeze": "body"}, "model.freeze needs model.weights"),
        ({"model__freeze_epochs": 1}, "model.freeze_epochs needs model.weights"),
        ({"model__weights": "w", "model__freeze_epochs": 16}, "leaves none of training.epochs"),
        (
            {"model__weights": "w", "model__freeze": "body", "lr__body_lr_mult": 0.1},
            "leaves nothing",
        ),
        ({"model__freeze": "head"}, "model.freeze must be none, body, or a number of stages"),
        (
            {"model__std": "0.229,0.224,0.225"},
            r"model.std, '0.229,0.224,0.225' must be of pixels from 0 to 255",
        ),
        ({"model__mean": "1,2"}, "model.mean must be one or three numbers"),
        ({"model__freeze": 0}, "model.freeze must be none, body, or a number of stages"),
    ):
        with pytest.raises(UsageError, match=says):
            load(**options)

"""Weights of every kind that we evaluate, as one thing: a network from raw pixels to logits.

This project's checkpoints, state dicts of torchvision, timm and ours (.pt, .pth, .safetensors), and
ONNX files.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffcv_imnet.config.parsing import from_dict
from ffcv_imnet.config.schema import MEAN, STD, Settings
from ffcv_imnet.core.errors import RunError, UsageError, in_range, nearest, reason_of
from ffcv_imnet.core.names import number_of
from ffcv_imnet.core.paths import path_of
from ffcv_imnet.evaluate.onnx_network import OnnxNetwork
from ffcv_imnet.images.imagenet import CLASSES, imagenet_names
from ffcv_imnet.images.preprocess import INTERPOLATIONS, Preprocess
from ffcv_imnet.models import Normalize, build_model
from ffcv_imnet.models.blurpool import BlurConv2d, apply_blurpool
from ffcv_imnet.models.registry import REGISTRY, TIMM, build
from ffcv_imnet.models.state_dict import State, find, is_averaged
from ffcv_imnet.train.weights_file import check_there, read_weights

Channels = tuple[float, ...]  # three numbers, in units of 0 to 255


@dataclass(frozen=True)
class Network:
    """Weights in working order.

    `model` takes uint8 (or float) pixels 0 to 255, (N, 3, H, W), and gives logits (N, outputs). Of a
    torch network it is `Sequential(Normalize, network)`.
    """

    model: nn.Module
    outputs: int
    classes: tuple[str, ...] | None  # names in index order, where the file or its folder has them
    how: Preprocess  # what the weights were validated with, else torchvision's
    origin: str  # for people: what was loaded
    settings: Settings | None = None  # of the run, where these are a checkpoint's
    arch: str | None = None

    @property
    def uses_blurpool(self) -> bool:
        """Whether a fixed blur stands before its strided convolutions."""
        return any(isinstance(module, BlurConv2d) for module in self.model.modules())


def load_network(
    path: Path,
    *,
    arch: str | None = None,
    plain: bool = False,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Network:
    """Read weights, on the CPU, in evaluation mode; runs nothing that the file holds.

    Args:
        arch: of a state dict: a name of this project's registry (`timm:NAME` too) or torchvision's.
            By default the network of the registry whose parameters have these names and shapes.
        plain: of a checkpoint with averaged weights, take the plain ones.
        mean, std: of the pixels, 0 to 255. Default: ImageNet's; for ONNX: raw pixels go in.

    Raises:
        UsageError: no such file, or it needs (or forbids) one of the options.
        RunError: the file is damaged or is not what it is taken for.
    """
    check_there(path, "--weights ")
    if path.suffix.lower() == ".onnx":
        if arch or plain:
            raise UsageError(
                f"{path} is an ONNX file and knows its network: leave out --arch, --plain"
            )
        network = _from_onnx(path, mean, std)
    elif (file := read_weights(path, "--weights ")).checkpoint is None:
        mean, std = mean or file.notes.get("mean"), std or file.notes.get("std")
        network = _from_state(path, file.state, arch or file.arch, mean, std)
        network = _with_notes(network, file.notes)
    elif arch or mean or std:
        raise UsageError(
            f"{path} is a checkpoint and knows its network: leave out --arch, --mean, --std"
        )
    else:
        network = _from_checkpoint(path, file.checkpoint, plain)
    for name, value in network.model.eval().requires_grad_(False).state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(f"{path}: {name} holds NaN or infinite values, the weights are lost")
    return network


# ---- kinds --------------------------------------------------------------------------------------


def _from_checkpoint(path: Path, state: dict[str, Any], plain: bool) -> Network:
    try:
        run, weights, average = state["run"], state["model"], state["ema"]
        settings = from_dict(run["settings"], str(path))
        classes = tuple(run["classes"])
        epochs = sum(record.get("type") == "epoch" for record in run["records"])
        use_average = average is not None and bool(average["n_averaged"]) and not plain
        if use_average:  # AveragedModel's: a counter, and the network under `module`
            weights = {
                k.removeprefix("module."): v for k, v in average.items() if k != "n_averaged"
            }
        model = build_model(settings, len(classes))
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(
            f"{path}: a checkpoint whose parts do not fit each other ({reason_of(error)})"
        ) from error
    kind = "averaged weights" if use_average else "weights"
    how = Preprocess(settings.validation.resolution, settings.validation.crop_ratio)
    origin = f"{kind} of {settings.model.arch} after {number_of(epochs, 'epoch')}, {len(classes)} classes"
    return Network(model, len(classes), classes, how, origin, settings, settings.model.arch)


def _from_onnx(path: Path, mean: Channels | None, std: Channels | None) -> Network:
    if (mean is None) != (std is None):
        raise UsageError("an ONNX file needs both of --mean and --std, or neither (raw pixels)")
    model = OnnxNetwork(path, mean, std)
    notes = model.notes()
    how = Preprocess(model.resolution or Preprocess().resolution)
    network = Network(model, model.outputs, None, how, f"ONNX, {model.outputs} classes")
    return _with_notes(network, notes)


def _with_notes(network: Network, notes: dict[str, Any]) -> Network:
    """What `export` wrote beside the numbers. Raises RunError if it is of another network."""
    if "classes" in notes and len(notes["classes"]) != network.outputs:
        raise RunError(f"{network.origin}: the file names {len(notes['classes']):,} classes")
    how = {k: notes[k] for k in ("resolution", "crop_ratio", "interpolation") if k in notes}
    classes = tuple(notes["classes"]) if "classes" in notes else network.classes
    return replace(network, classes=classes, how=replace(network.how, **how))


def _from_state(
    path: Path,
    state: State,
    arch: str | None,
    mean: Channels | None,
    std: Channels | None,
) -> Network:
    candidates = [arch] if arch else sorted(REGISTRY)
    faults = []
    for name in candidates:
        for blurpool in (False, True):
            construct = partial(_construct, name, blurpool)
            prefix, found, outputs = _found(construct, state)
            if outputs is None and not arch:
                continue
            network = construct(outputs or 1)
            faults.append(_mismatch(network, found))
            if outputs is not None and faults[-1] is None:
                for key, own in network.state_dict().items():
                    if own.is_floating_point() and not found[key].is_floating_point():
                        raise RunError(f"{path}: {key} is not of floating-point numbers")
                network.load_state_dict(found, strict=False)  # BatchNorm's counters may lack
                model = nn.Sequential(Normalize(mean or MEAN, std or STD), network)
                kind = "averaged weights" if is_averaged(prefix) else "state dict"
                origin = f"{kind} of {name}{' with BlurPool' if blurpool else ''}"
                return Network(
                    model, outputs, None, Preprocess(), f"{origin}, {outputs} classes", arch=name,
                )  # fmt: skip
    if not arch:
        raise UsageError(
            f"{path}: a state dict of none of {', '.join(candidates)}; name its network with --arch "
            f"(one of torchvision's, or {TIMM}NAME)"
        )
    raise UsageError(f"{path}: the state dict does not fit {arch}: {faults[0]}")


def _construct(name: str, blurpool: bool, classes: int) -> nn.Module:
    """The network of that name. Raises UsageError for one nobody knows."""
    if name in REGISTRY or name.startswith(TIMM):
        network = build(name, classes, False)
    else:
        import torchvision.models as tv  # see models/resnet.py

        theirs = tv.list_models(module=tv)
        if name not in theirs:
            raise UsageError(
                f"--arch {name}: known neither here nor to torchvision{nearest(name, [*REGISTRY, *theirs])}; "
                f"timm's networks are named {TIMM}NAME"
            )
        network = tv.get_model(name, weights=None, num_classes=classes)
    if blurpool:
        apply_blurpool(network)
    return network


def _found(construct: Callable[[int], nn.Module], state: State) -> tuple[str, State, int | None]:
    """Where in a file the network's tensors are, and they: under its very names, with BlurPool or without; and
    the length there of the first parameter that follows the number of classes."""
    with torch.device("meta"):
        two, three = construct(2).state_dict(), construct(3).state_dict()
    prefix, found = find(state, {name: name for name in two})
    head = next((name for name in two if two[name].shape != three[name].shape), None)
    return prefix, found, len(found[head]) if head in found and found[head].ndim else None


def _mismatch(network: nn.Module, state: State) -> str | None:
    """The first difference in names and shapes, in a few words; None if there is none."""
    counter = "num_batches_tracked"  # absent from old files, of no use here
    want = {k: tuple(v.shape) for k, v in network.state_dict().items() if counter not in k}
    have = {k: tuple(v.shape) for k, v in state.items() if counter not in k}
    for name, shape in want.items():
        if name not in have:
            return f"{name} is missing"
        if have[name] != shape:
            return f"{name} has shape {have[name]}, expected {shape}"
    extra = next((name for name in have if name not in want), None)
    return None if extra is None else f"{extra} belongs to another network"


# ---- options and classes ------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every tool that takes weights; `load_from` and `parse_preprocess` read them."""
    add = parser.add_argument
    add("--weights", type=path_of, required=True, metavar="FILE",
        help="checkpoint, state dict, .safetensors or .onnx")  # fmt: skip
    add("--arch", metavar="NAME", help=f"of a state dict: here, in torchvision, or {TIMM}NAME")
    add("--plain", action="store_true", help="the plain weights of a run that averaged them")
    add("--mean", metavar="M", help="one or three numbers, 0 to 255; default: ImageNet's")
    add("--std", metavar="S", help="likewise")
    add("--crop_ratio", type=in_range(float, 0.01, 1), metavar="R",
        help="side of the input over the resized shorter side; default: as validated")  # fmt: skip
    add("--interpolation", choices=list(INTERPOLATIONS), help="of an image that is resized")


def load_from(options: argparse.Namespace) -> Network:
    """The network that the options of `add_options` name. Raises UsageError, RunError."""
    return load_network(
        options.weights, arch=options.arch, plain=options.plain,
        mean=parse_channels(options.mean, "--mean"), std=parse_channels(options.std, "--std"),
    )  # fmt: skip


def parse_channels(text: str | None, option: str) -> Channels | None:
    """`127` or `123.675,116.28,103.53` as three numbers. Raises UsageError."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(-1e4 < value < 1e4 for value in values):
        raise UsageError(f"{option} {text}: expected a number, or three separated by commas")
    if min(values) < 1 and (option == "--std" or 0 < max(values) <= 1):
        raise UsageError(
            f"{option} {text}: in units of pixels from 0 to 255 (torchvision's 0.229 is 58.395)"
        )
    return values * 3 if len(values) == 1 else values


def parse_preprocess(
    network: Network, resolution: int | None, options: argparse.Namespace
) -> Preprocess:
    """The network's own preprocessing with what the command line changes.

    Raises:
        UsageError: the network does not take images of that size; it is tried on a black one.
    """
    how = Preprocess(
        resolution or network.how.resolution, options.crop_ratio or network.how.crop_ratio,
        options.interpolation or network.how.interpolation,
    )  # fmt: skip
    fixed = network.model.resolution if isinstance(network.model, OnnxNetwork) else None
    if fixed and how.resolution != fixed:
        raise UsageError(f"--resolution {how.resolution}: this ONNX file takes {fixed} px only")
    try:
        black = torch.zeros(1, 3, how.resolution, how.resolution, dtype=torch.uint8)
        network.model(black)
    except (RuntimeError, AssertionError, ValueError) as error:  # a transformer of fixed size
        raise UsageError(
            f"{network.origin}: does not take {how.resolution} px ({reason_of(error)}); "
            "give another --resolution"
        ) from error
    return how


def match_classes(network: Network, classes: Sequence[str], where: str) -> list[int]:
    """The network's output for each class of a data set.

    By name where the network has names; a network of 1,000 outputs without names has ImageNet's; else
    in index order, if there are as many. ImageNet networks may so be evaluated on some of its classes.

    Raises:
        UsageError: the classes do not fit.
    """
    if network.classes is not None or network.outputs == CLASSES:
        index = {name: i for i, name in enumerate(class_names(network))}
        strangers = [name for name in classes if name not in index]
        if not strangers:
            return [index[name] for name in classes]
        if network.classes is not None:
            raise UsageError(
                f"{where} has {len(classes):,} classes and the network {network.outputs:,}, "
                f"{strangers[0]!r} is not among them{nearest(strangers[0], index)}"
            )
    if len(classes) != network.outputs:
        raise UsageError(
            f"{where} has {len(classes):,} classes and the network {network.outputs:,}"
        )
    return list(range(network.outputs))


def class_names(network: Network) -> tuple[str, ...]:
    """The network's classes; ImageNet's for 1,000 without names; else numbers."""
    if network.classes is not None:
        return network.classes
    if network.outputs == CLASSES:
        return tuple(imagenet_names())
    return tuple(str(index) for index in range(network.outputs))

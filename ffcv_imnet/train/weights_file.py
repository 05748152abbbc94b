"""Files of weights, of whatever program: read on the CPU, without running anything they hold."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffcv_imnet.config.schema import MEAN, STD
from ffcv_imnet.core.errors import RunError, UsageError, nearest, reason_of
from ffcv_imnet.core.optional import EXPORT, require
from ffcv_imnet.core.paths import what_is
from ffcv_imnet.images.notes import read_notes
from ffcv_imnet.models.state_dict import State, tensors_of
from ffcv_imnet.train import checkpoint


@dataclass(frozen=True)
class WeightsFile:
    """What stands in one."""

    state: State  # every tensor, by its dotted path
    classes: tuple[str, ...] | None = None  # names in index order, where the file has them
    arch: str | None = None
    checkpoint: dict[str, Any] | None = None  # of this project, whole
    # Of `export`: how images are to be prepared.
    notes: dict[str, Any] = field(default_factory=dict)


def read_weights(path: Path, option: str) -> WeightsFile:
    """A checkpoint of this project, what torch.save wrote, or a .safetensors file.

    Args:
        option: stands before the name in messages.

    Raises:
        UsageError: no such file, or of a kind that is not read.
        RunError: it holds no weights or is damaged, or reading it would run what it holds.
    """
    check_there(path, option)
    if path.suffix.lower() == ".onnx":
        raise UsageError(
            f"{option}{path} is an ONNX file: name the weights that it was exported from"
        )
    content: Any
    notes: dict[str, Any] = {}
    if path.suffix.lower() == ".safetensors":
        content, notes = _read_safetensors(path)
    else:
        content = checkpoint.read(path)
    if isinstance(content, dict) and "run" in content and "format" in content:
        checkpoint.check_format(content, path)
        run = content["run"]
        state = tensors_of({key: content[key] for key in ("model", "ema") if content[key]})
        model = run["settings"].get("model", {})
        notes = {"mean": model.get("mean", list(MEAN)), "std": model.get("std", list(STD))}
        arch = model.get("arch", "resnet18")
        return WeightsFile(state, tuple(run["classes"]), arch, content, notes)
    try:
        state = tensors_of(content)
    except ValueError as error:
        raise RunError(f"{path}: {error}") from None
    classes = tuple(notes["classes"]) if "classes" in notes else None
    return WeightsFile(state, classes, notes.get("arch"), notes=notes)


def check_there(path: Path, option: str) -> None:
    """Raises UsageError, with the nearest right name, unless `path` is a file."""
    if path.is_dir():
        hint = f": name {path / 'best.pt'}" if (path / "best.pt").is_file() else ""
        raise UsageError(f"{option}{path} is a folder{hint}")
    if not path.is_file():
        gone = path.parent.is_dir() and not os.path.lexists(path)
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if gone else ""
        raise UsageError(f"{option}{path}: {what_is(path)}{near}")


def _read_safetensors(path: Path) -> tuple[State, dict[str, Any]]:
    package = require("safetensors", "reading a .safetensors file", EXPORT)
    try:
        with package.safe_open(path, framework="pt") as file:
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return content, read_notes(file.metadata() or {})
    except Exception as error:
        raise RunError(f"{path}: not a readable safetensors file ({reason_of(error)})") from error

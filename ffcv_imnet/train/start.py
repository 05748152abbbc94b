"""What a run starts from: `model.weights`, put into a network whose head may have other classes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.names import quoted
from ffcv_imnet.images.imagenet import CLASSES, imagenet_names
from ffcv_imnet.models import build_model
from ffcv_imnet.models.parts import head_names
from ffcv_imnet.models.state_dict import FIXED, State, find, is_averaged, names_of
from ffcv_imnet.train.weights_file import WeightsFile, read_weights

FEWEST = 0.5  # of the body's tensors: with less the file is of another network
NAMED = 3  # names in a message


@dataclass(frozen=True)
class Start:
    """Values by the network's own names; of the head only `rows`: those of our classes, and where they stand."""

    body: State
    head: State
    rows: tuple[tuple[int, int], ...]  # (ours, the file's)
    record: dict[str, Any]  # for the log's header

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Into `build_model`'s network, in place."""
        state = model.state_dict()
        for name, value in self.body.items():
            state[name].copy_(value)
        ours, theirs = ([pair[side] for pair in self.rows] for side in (0, 1))
        for name, value in self.head.items() if self.rows else ():
            state[name][ours] = value[theirs].to(state[name])


def start_from(settings: Settings, classes: Sequence[str]) -> Start | None:
    """What `model.weights` has for the network of `settings`; None where it names no file.

    Raises:
        UsageError: no such file, or one of another network.
        RunError: it is damaged, or reading it would run what it holds.
    """
    if settings.model.weights is None:
        return None
    path = Path(settings.model.weights)
    file = read_weights(path, "model.weights ")
    arch = settings.model.arch
    if file.checkpoint is not None and file.arch != arch:
        raise UsageError(
            f"model.weights {path} is of {file.arch}, model.arch is {arch}: give --model.arch={file.arch}"
        )
    for key, ours in (("mean", settings.model.mean), ("std", settings.model.std)):
        theirs = file.notes.get(key, list(ours))
        if not np.allclose(np.asarray(theirs, dtype=np.float32), ours, atol=1e-3):
            raise UsageError(
                f"model.weights {path} was trained on pixels of another {key}: give --model.{key}="
                f"{','.join(f'{value:g}' for value in theirs)}"
            )
    model = build_model(settings, len(classes))
    prefix, found = find(file.state, names_of(model[1]))
    found = {f"1.{name}": value for name, value in found.items()}
    heads = head_names(model, settings, len(classes))
    own = {name: value for name, value in model.state_dict().items() if not name.endswith(FIXED)}
    body = {name: value for name, value in own.items() if name not in heads}
    _check_body(path, arch, file.state, found, body)
    head, rows = _head(found, {name: own[name] for name in heads}, classes, file)
    loaded = {name: found[name] for name in body if name in found}
    for name, value in {**loaded, **(head if rows else {})}.items():
        if fault := _fault_of(value):
            raise RunError(f"model.weights {path}: {name[2:]} {fault}")
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    record = {
        "file": str(path),
        "sha256": digest,
        "taken": prefix.removesuffix("."),
        "averaged": is_averaged(prefix),
        "loaded": len(loaded) + (len(head) if rows else 0),
        "missing": [name[2:] for name in body if name not in found],
        "unused": [name[2:] for name in found if name not in own],
        "new": [name[2:] for name in heads] if len(rows) < len(classes) else [],
        "rows_kept": len(rows),
    }
    return Start(loaded, head, rows, record)


def _check_body(path: Path, arch: str, state: State, found: State, body: State) -> None:
    """Raises UsageError unless most of the body is there, and all that is has its shape."""
    there = [name for name in body if name in found]
    if len(there) < FEWEST * len(body):
        absent = [name[2:] for name in body if name not in found]
        taken = {id(found[name]) for name in there}
        others = [name for name, value in state.items() if id(value) not in taken]
        raise UsageError(
            f"model.weights {path} has {len(there)} of the {len(body)} tensors of {arch}'s body: it lacks "
            f"{_some(absent)}, and has instead {_some(others)}; name the network that wrote it with model.arch"
        )
    shapes = [
        f"{name[2:]} {tuple(found[name].shape)} for {tuple(body[name].shape)}"
        for name in there
        if found[name].shape != body[name].shape
    ]
    if shapes:
        raise UsageError(
            f"model.weights {path}: {len(shapes)} tensors have other shapes than {arch}'s: {_some(shapes)}; "
            f"name the network that wrote it with model.arch"
        )


def _head(
    found: State, own: State, classes: Sequence[str], file: WeightsFile
) -> tuple[State, tuple[tuple[int, int], ...]]:
    """The file's tensors of the head, and the rows of it that are kept; none where it has another head."""
    head = {name: found[name] for name in own if name in found}
    sizes = {len(value) if value.ndim else 0 for value in head.values()}
    same = all(value.shape[1:] == own[name].shape[1:] for name, value in head.items())
    if len(head) < len(own) or len(sizes) != 1 or not same:
        return {}, ()
    return head, tuple(_rows(classes, file.classes, sizes.pop()))


def _rows(
    classes: Sequence[str], theirs: Sequence[str] | None, outputs: int
) -> list[tuple[int, int]]:
    """(ours, the file's) of each class that both know, by name; in index order where the file has as many and no
    names. A thousand without names are ImageNet's, which are known by wnid and by what people call them."""
    if theirs is None and outputs == CLASSES:
        theirs = tuple(imagenet_names())
    if theirs is None or len(theirs) != outputs:
        return (
            [(i, i) for i in range(outputs)] if outputs == len(classes) and theirs is None else []
        )
    index = {name: place for place, name in enumerate(theirs)}
    known = imagenet_names()
    index |= {known[wnid]: place for wnid, place in index.items() if wnid in known}
    return [(place, index[name]) for place, name in enumerate(classes) if name in index]


def _fault_of(value: Tensor) -> str | None:
    if not value.is_floating_point():
        return "is not of floating-point numbers"
    return (
        None
        if bool(value.isfinite().all())
        else "holds NaN or infinite values, the weights are lost"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(quoted(name) for name in names[:NAMED]) + more


def describe_start(record: dict[str, Any], classes: int) -> str:
    """What `Start.record` says, in a line or a few."""
    taken = f" under {quoted(record['taken'])}" if record["taken"] else ""
    average = ", averaged weights" if record["averaged"] else ""
    kept = record["rows_kept"]
    head = (
        f"the head's {kept} rows too" if kept == classes
        else f"of the head's {classes} rows {kept} are kept, known by their class names, the others are new" if kept
        else f"the head is new ({', '.join(record['new'])})"
    )  # fmt: skip
    lines = [
        f"model.weights {record['file']}: {record['loaded']} tensors loaded{taken}{average}; {head}"
    ]
    for key, what in (
        ("missing", "of the network's body start fresh, the file lacks them"),
        ("unused", "of the file are not used, the network lacks them"),
    ):
        if record[key]:
            lines.append(f"model.weights: {len(record[key])} tensors {what}: {_some(record[key])}")
    return "\n".join(lines)

"""Checkpoints: saved whole or not at all, loaded without running anything they hold."""

import re
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.serialization import safe_globals

from ffcv_imnet.core import log
from ffcv_imnet.core.atomic import NotWritten, drop_cached, link, partial_path, rename, written
from ffcv_imnet.core.bounded import SPARE, fault_of_zip, in_words, memory_at_most
from ffcv_imnet.core.errors import RunError, UsageError, reason_of
from ffcv_imnet.core.names import fault_of_all, quoted
from ffcv_imnet.core.paths import open_regular
from ffcv_imnet.core.typed import fault_of_fields, is_value
from ffcv_imnet.machine.device import DTYPES
from ffcv_imnet.train.augment import Augment
from ffcv_imnet.train.stand_ins import stand_ins

FORMAT = 1
# Of any kind in a file, each as often as it is named; a checkpoint has thousands.
MOST_VALUES = 1_000_000


@dataclass(frozen=True)
class Learner:
    """What training changes, and the ways to run it. `ema` is None where no average is kept."""

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler
    ema: AveragedModel | None
    forward: nn.Module  # `model` as training calls it: compiled, in DistributedDataParallel
    eval_forward: nn.Module  # `model` and `ema` as validation calls them: compiled at most
    ema_eval_forward: nn.Module | None
    precision: str  # fp32, bf16 or fp16
    augment: Augment
    compiled: bool = False
    frozen: tuple[nn.Module, ...] = ()  # modules of model.freeze
    body: tuple[nn.Module, ...] = ()  # all but the head, where model.freeze_epochs has them wait
    loss: str = "ce"

    @property
    def dtype(self) -> torch.dtype:
        """Autocast's; float32 means none."""
        return DTYPES[self.precision]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How far the training of an epoch has come, and what it came to so far."""

    steps: int = 0
    loss_sum: float = 0.0  # over the steps: the training objective, mean over all processes
    lr: float = 0.0  # at the last step
    seconds: float = 0.0
    loader_seconds: float = 0.0  # waited for batches
    skipped: int = 0  # damaged images, of all processes
    compile_seconds: float | None = None  # None: not compiled
    signal: int | None = None  # the one that ended it early
    late: bool = False  # ended early by a limit of hours or dollars
    norms: list[dict[str, float]] = field(default_factory=list)  # a row a look: `Norms.read`


_PLAIN = bool | int | float | str | None
_SETTING = _PLAIN | list[_PLAIN] | list[list[_PLAIN]] | list[dict[str, _PLAIN]]


@dataclass(frozen=True)
class _State:
    """What `state_of` gives."""

    format: int
    run: dict[str, Any]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, bool | int | float | None]
    ema: dict[str, Any] | None
    torch_rng: torch.Tensor | None = None  # of older checkpoints, and of no more use
    device_rng: torch.Tensor | None = None


@dataclass(frozen=True)
class _Run:
    """What `run_dir` keeps in it; older checkpoints lack the last two."""

    settings: dict[str, dict[str, _SETTING]]
    data: dict[str, str]
    classes: list[str]
    records: list[Any]
    trained: dict[str, Any] = field(default_factory=dict)
    elapsed_seconds: float = 0.0


def state_of(learner: Learner, run: dict[str, Any]) -> dict[str, Any]:
    """Everything that going on needs. All that is drawn needs nothing: it follows from epoch and step.

    Args:
        run: plain values: settings, data checksums, classes, the records so far.
    """
    return {
        "format": FORMAT,
        "run": run,
        "model": learner.model.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "ema": learner.ema.state_dict() if learner.ema is not None else None,
    }


def restore(learner: Learner, state: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's state into `learner`. Raises RunError if it does not fit."""
    try:
        learner.model.load_state_dict(state["model"])
        learner.optimizer.load_state_dict(_optimizer_state(learner.optimizer, state["optimizer"]))
        if learner.scaler.is_enabled():
            learner.scaler.load_state_dict(state["scaler"])
        if learner.ema is not None:
            learner.ema.load_state_dict(state["ema"])
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]  # torch's first line alone says nothing
        raise RunError(f"{path}: the checkpoint does not fit this network: {reason}") from error


def _optimizer_state(optimizer: Optimizer, held: dict[str, Any]) -> dict[str, Any]:
    """`held` with the options that the settings gave `optimizer`: of the file only momenta are believed.

    Raises:
        ValueError: it has other groups.
    """
    groups = [
        {**own, "params": kept["params"]}
        for own, kept in zip(optimizer.param_groups, held["param_groups"], strict=True)
    ]
    return {"state": held["state"], "param_groups": groups}


def save(state: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write under a temporary name, reach the disk, read back, rename: `path` is never half a
    checkpoint. What bore the name before is kept as `previous`.

    Raises:
        RunError: the disk is full, or gives back other bytes than it was given.
    """
    partial = partial_path(path)
    try:
        with written(path) as file:
            torch.save(state, file)
        if (damage := damage_of(partial, fresh=True)) is not None:
            partial.unlink(missing_ok=True)
            raise RunError(
                f"{path} was written and reads back damaged ({damage}): is the disk sound?"
            )
        if previous is not None and path.exists():
            link(path, previous)
        rename(partial, path)
    except NotWritten as error:
        with suppress(OSError):  # whichever step failed
            partial.unlink()
        raise RunError(f"{error}; --resume auto goes on from the checkpoint before") from error


def damage_of(path: Path, fresh: bool = False) -> str | None:
    """What is wrong with a checkpoint's bytes; None if each part has its checksum (the zip's CRC-32) and
    all come to no more than the file.

    `fresh`: just written and forced to the disk, so ask for the disk's bytes and not the cache's.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            if fresh:
                drop_cached(file)
            if fault := fault_of_zip(archive, file):
                return fault
            part = archive.testzip()
    # zipfile takes an encrypted part or a newer version for the caller's mistake.
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError) as error:
        return reason_of(error)
    return None if part is None else f"the checksum of {part} differs"


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's state, on the CPU; only tensors and plain values are accepted.

    Raises:
        UsageError: no such file, or one of another kind.
        RunError: the file is damaged or is not a checkpoint of this project.
    """
    state = read(path)
    check_format(state, path)
    return state


def check_format(state: Any, path: Path) -> None:
    """Raises RunError if what `read` gave is no checkpoint of this project: the one check of all that
    is believed afterwards, save whether the tensors fit the network."""
    if not isinstance(state, dict) or not (
        is_value(found := state.get("format"), int) and found == FORMAT
    ):
        raise RunError(f"{path}: not a checkpoint of this project (format {FORMAT})")
    if fault := _fault_of(state):
        raise RunError(f"{path}: not a checkpoint of this project, it {fault}")


def _fault_of(state: dict[str, Any]) -> str | None:
    if fault := fault_of_fields(_State, state):
        return fault
    run, ema = state["run"], state["ema"]
    if fault := fault_of_fields(_Run, run):
        return f"{fault} in its run"
    if fault := fault_of_all(run["classes"]):
        return f"{fault} in its classes"
    for number, record in enumerate(run["records"]):
        try:
            log.from_dict(record)
        except ValueError as error:
            return f"has a record {number} that is none: {error}"
    if fault := fault_of_fields(Trained, run.get("trained", {})):
        return f"{fault} in its trained"
    if not state["model"]:
        return "has no weights"
    if not all(map(_is_real, [*state["model"].values(), *(ema or {}).values()])):
        return "has weights that are not tensors of real numbers"
    return _fault_of_optimizer(state["optimizer"])


def _is_real(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_complex()


def _fault_of_optimizer(state: dict[str, Any]) -> str | None:
    groups, held = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(held, dict):
        return "has an optimizer without its groups or its state"
    for group in groups:
        if not isinstance(group, dict) or not is_value(group.get("params"), list[int]):
            return "has an optimizer's group that is none"
        if not all(is_value(v, _PLAIN) for k, v in group.items() if k != "params"):
            return "has an optimizer's group whose settings are not plain"
    for kept in held.values():
        if not isinstance(kept, dict) or not all(
            _is_real(value) or is_value(value, _PLAIN) for value in kept.values()
        ):
            return "has an optimizer's state that is none"
    return None


def read(path: Path) -> Any:
    """What torch.save wrote, on the CPU. Only tensors and plain values are made; what known
    libraries keep beside weights is replaced by empty stand-ins (`stand_ins.py`), and nothing of theirs is run.

    Raises:
        UsageError: the file cannot be opened.
        RunError: torch.save did not write it, it is damaged, or reading it would run what it holds.
    """
    try:
        with open_regular(path) as file:
            start = file.read(2)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise RunError(f"{path} is empty, and no file of weights")
    if start != b"PK" and not start.startswith(b"\x80"):  # a zip, before torch 1.6 a pickle
        raise RunError(f"{path} is no file of weights: torch.save did not write it")
    if start == b"PK" and (damage := damage_of(path)) is not None:
        raise RunError(f"{path} is damaged, truncated or no file of weights ({damage})")
    try:
        with (
            warnings.catch_warnings(),
            safe_globals(stand_ins(path, zipped=start == b"PK")),
            memory_at_most(2 * path.stat().st_size),
        ):
            warnings.simplefilter("ignore")  # of TorchScript's archives, which are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        if named := re.search(
            r"(?i)unsupported (?:global|class|operand)\W+(?:GLOBAL )?([\w.]*)", str(error)
        ):
            raise RunError(
                f"{path} holds Python objects{_of(named[1])} whose loading would run their code: save its "
                f"state_dict() instead"
            ) from error
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise RunError(
                f"{path} asks for more than {in_words(SPARE)} beyond twice its own size to be read: it is damaged,"
                " or made to exhaust the memory"
            ) from None
        raise RunError(f"{path} is damaged, truncated or no file of weights") from error
    if fault := fault_of_content(content):
        raise RunError(f"{path} {fault}: it is no file of weights")
    return content


def fault_of_content(content: Any) -> str | None:
    """What in an unpickled value would cost more than its file has bytes, to follow its name; None if nothing.

    A pickle may name one list in a thousand places, itself among them, and a tensor may say more numbers
    (strides of 0) than it has, which a copy would make room for.
    """
    rest, count = [content], 0
    while rest:  # not recursive: it nests as deeply as it likes
        value = rest.pop()
        count += 1
        if count > MOST_VALUES:
            return f"holds more than {MOST_VALUES:,} values, or itself"
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, (list, tuple, set)):
            rest += value
        elif isinstance(value, torch.Tensor):
            if (
                value.layout is not torch.strided
                or value.is_quantized
                or value.device.type != "cpu"
            ):
                return "holds a tensor that is sparse, quantized or without numbers"
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                return "holds a tensor of more numbers than it has"
    return None


def _of(name: str) -> str:
    return f" ({quoted(name)})" if name else " (a whole network?)"

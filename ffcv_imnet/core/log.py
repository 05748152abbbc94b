"""The JSON epoch log, `RUN/log.jsonl`: these dataclasses are its schema; append to it, read it.

One JSON object a line. The first is a `Header` (a resumed run adds another), then one `Epoch` per
epoch (a `Lowered` before it, where the loss was not finite), at the end a `Summary`. A field that does not
apply is absent, never null.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ffcv_imnet.core.atomic import atomic_write, force, open_named
from ffcv_imnet.core.bounded import no_number
from ffcv_imnet.core.errors import RunError, UsageError, not_written
from ffcv_imnet.core.names import number_of
from ffcv_imnet.core.paths import open_regular, what_is
from ffcv_imnet.core.typed import fault_of_fields

LARGEST = 256 << 20  # bytes of a log: 100,000 epochs have a fifth of it
LOG = "log.jsonl"  # its name in a run's folder


@dataclass(frozen=True, kw_only=True)
class Header:
    """How the run was started."""

    TYPE: ClassVar[str] = "header"

    settings: dict[str, dict[str, Any]]  # every setting, resolved, by section
    # train, val: path, samples, classes, content_checksum
    manifests: dict[str, dict[str, str | int | None]]
    versions: dict[str, str]  # python, torch, torchvision, ffcv, numba, numpy
    device: str  # name of the accelerator or of the processor
    precision: str  # fp32, bf16 or fp16: what `auto` came to
    world_size: int  # number of processes, one a device
    started: str  # UTC, ISO 8601
    git_commit: str | None = None  # of this project, with "+changes" if the tree was not clean
    first_epoch: int = 0  # > 0 on a resumed run
    first_step: int = 0  # within it, > 0 on a run that was stopped within an epoch
    # What model.weights gave, on the run's first start: file, sha256, taken (where in the file), averaged, loaded
    # (number of tensors); names of tensors that are missing in the file, unused in it, new (the head's); rows_kept.
    weights: dict[str, str | bool | int | list[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch did, and one pass over the whole validation set after it."""

    TYPE: ClassVar[str] = "epoch"

    epoch: int  # counted from 0
    resolution: int  # side of the training crops, px
    batch_size: int  # global
    lr: float  # at the last step
    train_loss: float  # mean training objective, on mixed images where they are mixed
    val_loss: float  # mean plain cross-entropy, single view
    top_1: float  # fraction of one, single view; this and the next are never test-time augmented
    top_5: float
    ema_val_loss: float | None = None  # the same of the averaged weights, where EMA is on
    ema_top_1: float | None = None
    ema_top_5: float | None = None
    tta_top_1: float | None = None  # logits summed over the image and its mirror image
    tta_top_5: float | None = None
    ema_tta_top_1: float | None = None
    ema_tta_top_5: float | None = None
    images_per_second: float  # training images over train_seconds, all processes together
    train_seconds: float
    loader_seconds: float  # the part of train_seconds that rank 0 waited for its loader
    # from constructing the loader to its first batch, where this process made its first one
    loader_start_seconds: float | None = None
    compile_seconds: float | None = None  # the part of it that torch.compile took; absent without
    val_seconds: float
    elapsed_seconds: float  # since the script started, earlier parts of a resumed run included
    peak_memory_bytes: int | None = None  # on one accelerator; absent on a CPU
    # Damaged images that were left out, of all processes; absent where they end the run.
    skipped: int | None = None  # of the training images
    val_skipped: int | None = None  # of the validation images
    # A row each time that the host read from the device, the last step among them: step, loss, and
    # GROUP_gradient, GROUP_weights, GROUP_update; see docs/log.md. Earlier logs have none.
    norms: list[dict[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Reached:
    """When the target `training.stop_at` was first reached, without test-time augmentation."""

    top_1: float
    by: str  # "top_1" or "ema_top_1"
    epoch: int  # counted from 0; the number of epochs spent is this + 1
    elapsed_seconds: float


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The loss became NaN or infinite; the run went back to its last checkpoint, at a lower rate."""

    TYPE: ClassVar[str] = "lowered"

    epoch: int  # in which the loss was not finite, counted from 0
    step: int  # the first whose loss was not finite
    back_to_step: int  # of the same epoch: how much of it was done in the checkpoint
    lr_scale: float  # all rates from there on, over the recipe's


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The last line of a finished run, and of one that a limit stopped."""

    TYPE: ClassVar[str] = "summary"

    reached: Reached | None = None  # absent if there was no target or it was missed
    best_top_1: float  # the larger of top_1 and ema_top_1
    best_epoch: int
    epochs: int  # epochs trained
    elapsed_seconds: float
    cost_dollars: float | None = None  # of elapsed_seconds, at cost.*; absent without a price
    stopped: str | None = None  # the limit that ended the run before its epochs; absent if none did


Record = Header | Epoch | Lowered | Summary
_TYPES: dict[str, type[Record]] = {kind.TYPE: kind for kind in (Header, Epoch, Lowered, Summary)}


@dataclass(frozen=True)
class Log:
    """What a `log.jsonl` holds."""

    headers: list[Header] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    summary: Summary | None = None  # None: the run has not finished
    lowered: list[Lowered] = field(default_factory=list)


def best_of(epoch: Epoch) -> tuple[float, str]:
    """The better of the weights' and their average's top-1, never test-time augmented, and its name."""
    if epoch.ema_top_1 is not None and epoch.ema_top_1 > epoch.top_1:
        return epoch.ema_top_1, "ema_top_1"
    return epoch.top_1, "top_1"


def first_reached(epochs: list[Epoch], target: float) -> Reached | None:
    """The first epoch at or above `target`; None if there is none, or the target is 0."""
    for epoch in epochs if target else []:
        top_1, by = best_of(epoch)
        if top_1 >= target:
            elapsed = epoch.elapsed_seconds
            return Reached(top_1=top_1, by=by, epoch=epoch.epoch, elapsed_seconds=elapsed)
    return None


def to_dict(record: Record | Reached) -> dict[str, Any]:
    """A record as JSON's types, its type's name first, without the fields that do not apply."""
    out: dict[str, Any] = {} if isinstance(record, Reached) else {"type": record.TYPE}
    for item in fields(record):
        value = getattr(record, item.name)
        if value is not None:
            out[item.name] = to_dict(value) if isinstance(value, Reached) else value
    return out


def from_dict(values: Any) -> Record:
    """The inverse of `to_dict`. Raises ValueError, in words, when `values` is not a record."""
    named = values.get("type") if isinstance(values, dict) else None
    kind = _TYPES.get(named) if isinstance(named, str) else None
    if kind is None:
        raise ValueError(f"it is of none of the types {', '.join(_TYPES)}")
    values = {key: value for key, value in values.items() if key != "type"}
    if fault := fault_of_fields(kind, values):
        raise ValueError(f"it {fault}")
    if kind is Summary and "reached" in values:
        values["reached"] = Reached(**values["reached"])
    return kind(**values)


def to_line(record: Record) -> str:
    """A record as its line of the log. Raises ValueError on NaN or infinity, which JSON lacks."""
    return json.dumps(to_dict(record), allow_nan=False) + "\n"


def append(path: Path, record: Record) -> None:
    """Add one line and have the disk keep it before anything else happens.

    Raises:
        RunError: the disk is full.
    """
    line = to_line(record)
    try:
        with open_named(path, "a") as file:
            file.write(line)
            force(file)
    except OSError as error:
        raise RunError(
            f"{not_written(path, error)}; --resume auto completes it from the checkpoint"
        ) from error


def rewrite(path: Path, records: list[Record]) -> None:
    """Replace the log in one step: after a resume it says exactly what the checkpoint knows.

    Raises:
        NotWritten: the disk is full, or the folder is read-only.
    """
    with atomic_write(path, "w") as file:
        file.write("".join(to_line(record) for record in records))


def read_log(path: Path) -> Log:
    """The records of a log.

    A last line without its newline is a write that was truncated and is left out.

    Raises:
        UsageError: no such file, or one that does not begin as a log does.
        RunError: a line is not a record; it is named.
    """
    if path.is_dir():
        path = path / LOG
    if not path.is_file():
        gone = what_is(path).replace("no such file", "no such file or folder")
        raise UsageError(f"{path}: {gone}; a run's folder holds {LOG}")
    found: dict[type[Record], list[Any]] = {kind: [] for kind in _TYPES.values()}
    with open_regular(path) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise UsageError(f"{path}: not a run's log: it has more than {LARGEST >> 20} MB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise RunError(f"{path}: not a log: it is no text") from None
    for number, line in enumerate(text.split("\n")[:-1], 1):  # the last is empty, or was truncated
        try:
            record = from_dict(json.loads(line, parse_constant=no_number))
        except (ValueError, RecursionError) as error:
            reason = str(error) if type(error) is ValueError else "it is not JSON"
            if number == 1:
                raise UsageError(
                    f"{path}: not a run's log: its first line is no record ({reason}); where the run's "
                    f"checkpoint is at hand, --resume auto writes the log again"
                ) from error
            raise RunError(
                f"{path}, line {number}: not a record of this log ({reason}); where its checkpoint is at "
                f"hand, --resume auto writes the log again"
            ) from error
        if number == 1 and not isinstance(record, Header):
            raise UsageError(f"{path}: not a run's log: its first line is no header")
        last = found[Epoch][-1].epoch if found[Epoch] else -1
        if isinstance(record, Epoch) and record.epoch <= last:
            raise RunError(
                f"{path}, line {number}: epoch {record.epoch} after epoch {last}, so it is the log of two runs or "
                f"damaged; where its checkpoint is at hand, --resume auto writes the log again"
            )
        found[type(record)].append(record)
    summary = next(reversed(found[Summary]), None)
    return Log(found[Header], found[Epoch], summary, found[Lowered])


# ---- lines for people ---------------------------------------------------------------------------


def describe_epoch(epoch: Epoch, epochs: int) -> str:
    """One line."""
    start = epoch.loader_start_seconds
    first = f"  first batch after {start:.1f} s" if start is not None else ""
    ema = f"  ema_top_1 {epoch.ema_top_1:.4f}" if epoch.ema_top_1 is not None else ""
    left_out = "".join(
        f"  {name} {count:,}"
        for name, count in (("skipped", epoch.skipped), ("val_skipped", epoch.val_skipped))
        if count
    )
    return (
        f"epoch {epoch.epoch} (of 0-{epochs - 1})  {epoch.resolution} px  "
        f"train_loss {epoch.train_loss:.3f}  val_loss {epoch.val_loss:.3f}  "
        f"top_1 {epoch.top_1:.4f}  top_5 {epoch.top_5:.4f}{ema}  "
        f"{epoch.images_per_second:,.0f} img/s  {epoch.elapsed_seconds:,.0f} s{first}{left_out}"
    )


def describe_summary(summary: Summary, path: Path, target: float) -> str:
    """The result in a line or two. `path` is the log's; `target` a fraction of one, 0 for none."""
    text = (
        f"best top-1 {summary.best_top_1:.4f} after epoch {summary.best_epoch}; "
        f"{number_of(summary.epochs, 'epoch')} in {summary.elapsed_seconds:,.0f} s; log: {path}"
    )
    if summary.reached is not None:
        hit = summary.reached
        text += (
            f"\ntarget {target:g} reached: {hit.by} {hit.top_1:.4f} after "
            f"{number_of(hit.epoch + 1, 'epoch')} and {hit.elapsed_seconds:,.0f} s"
        )
    elif target:
        text += f"\ntarget {target:g} was not reached"
    if summary.cost_dollars is not None:
        text += f"\ncost: ${summary.cost_dollars:,.2f}"
    return text

"""A configuration in ffcv-imagenet's words, as a recipe in ours.

Most of its keys are called alike here. Its defaults are not ours, and its batches are those of one
process, so everything is spelled out. `REASONS` has what means nothing here, and why.
"""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ffcv_imnet.config.domains import argument
from ffcv_imnet.config.schema import checker_of, declared
from ffcv_imnet.core.errors import UsageError

# The defaults of its train_imagenet.py, by the name of the setting here, which is the same.
DEFAULTS: dict[str, Any] = {
    "model.arch": "resnet18",
    "data.train_dataset": "data/beton/train.beton",
    "data.val_dataset": "data/beton/val.beton",
    "resolution.min_res": 160,
    "resolution.max_res": 160,
    "resolution.start_ramp": 0,
    "resolution.end_ramp": 0,
    "lr.lr": 0.5,
    "lr.lr_peak_epoch": 2,
    "training.epochs": 30,
    "training.batch_size": 512,
    "training.optimizer": "sgd",
    "training.momentum": 0.9,
    "training.weight_decay": 4e-5,
    "training.label_smoothing": 0.1,
    "training.use_blurpool": 0,
    "validation.batch_size": 512,
    "validation.resolution": 224,
    "validation.lr_tta": 1,
    "logging.folder": "runs",
}
OURS = ("resnet18", "resnet34", "resnet50")  # of torchvision's networks
REASONS = {
    "data.num_workers": "all cores that a process has are used; data.num_workers says otherwise",
    "data.in_memory": "the page cache keeps what fits, and data.read_ahead asks for the rest",
    "data.gpu": "torchrun numbers the processes",
    "data.test_dataset": "there is no third file here",
    "lr.step_ratio": "lr.decay: steps goes to a tenth after each third of the epochs",
    "lr.step_length": "lr.decay: steps goes to a tenth after each third of the epochs",
    "lr.lr_schedule_type": "the learning rate rises and falls linearly, as under cyclic",
    "model.pretrained": "a run starts from random weights, or from the file that model.weights names",
    "resolution.interpolate": "it always is, to the nearest 32 px",
    "resolution.val_res": "it is validation.resolution here",
    "logging.log_level": "every epoch is logged",
    "training.eval_only": "`python -m ffcv_imnet evaluate` does that",
    "training.bn_wd": "one-dimensional parameters do not decay",
    "training.use_ema": "training.ema_decay is the setting",
    "training.distributed": "`torchrun --nproc_per_node=N train_imagenet.py ...` starts N processes",
    "dist.world_size": "torchrun's --nproc_per_node; the batches are multiplied by it",
    "dist.address": "torchrun's --master_addr",
    "dist.port": "torchrun's --master_port",
}
STRANGE = "neither ffcv-imagenet nor this project has such a setting"
ADD = "it is a setting of this project, not of ffcv-imagenet: add it to the recipe"


@dataclass(frozen=True)
class Migrated:
    """A recipe, by section, and what was done to get there."""

    values: dict[str, dict[str, Any]]
    changed: tuple[str, ...]  # a sentence each
    dropped: tuple[str, ...]


def migrate(given: dict[str, Any], name: str) -> Migrated:
    """`given`: its settings by dotted key. `name`: of the run, and of its folder.

    Raises:
        UsageError: a value lies outside its domain here; names the key.
    """
    if "resolution.val_res" in given:
        given = {"validation.resolution": given["resolution.val_res"]} | given
    values = {
        key: argument(key, given.get(key, default), checker_of(key))
        for key, default in DEFAULTS.items()
    }
    changed = []
    if (arch := values["model.arch"]) not in OURS:
        values["model.arch"] = f"timm:{arch}"
        changed.append(f"model.arch is timm:{arch}, for there is no {arch} here (pip install timm)")
    processes = _processes(given)
    if processes > 1:
        for key in ("training.batch_size", "validation.batch_size"):
            changed.append(
                f"{key} is {values[key]} of {processes} processes, {values[key] * processes} in all"
            )
            values[key] *= processes
    values["lr.base_batch_size"] = values["training.batch_size"]
    changed.append(
        f"lr.base_batch_size {values['training.batch_size']} keeps the learning rate as it is at this"
        " batch, and in proportion at another"
    )
    folder = PurePath(values["logging.folder"])
    if folder.name != name:
        values["logging.folder"] = str(folder := folder / name)
        changed.append(f"logging.folder is {folder}: a run's files lie right in it")
    for key in ("data.train_dataset", "data.val_dataset"):
        if key not in given:
            changed.append(f"{key} is {values[key]}: the configuration names none")
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, word = key.partition(".")
        nested.setdefault(section, {})[word] = value
    return Migrated(nested, tuple(changed), tuple(_dropped(given)))


def _processes(given: dict[str, Any]) -> int:
    """Its batches are a process's, where there are several."""
    try:
        on = int(given.get("training.distributed") or 0)
        return max(1, int(given.get("dist.world_size") or 1)) if on else 1
    except (TypeError, ValueError):
        raise UsageError(
            "training.distributed and dist.world_size must be whole numbers, not"
            f" {given.get('training.distributed')!r} and {given.get('dist.world_size')!r}"
        ) from None


def _dropped(given: dict[str, Any]) -> list[str]:
    out = []
    for key, value in given.items():
        if key in DEFAULTS:
            continue
        reason = REASONS.get(key, STRANGE if key not in declared() else ADD)
        if key == "lr.lr_schedule_type" and str(value) not in ("cyclic", "ramp"):
            reason = f"THE SCHEDULE IS ANOTHER: {reason}"
        if key == "model.pretrained" and str(value).lower() not in ("0", "false"):
            reason = f"THE WEIGHTS ARE OTHERS: {reason}"
        if key == "training.bn_wd" and str(value).lower() not in ("0", "0.0", "false"):
            reason = f"THE DECAY IS ANOTHER: {reason}"
        out.append(f"{key}: {value} ({reason})")
    return out

"""Every training setting, declared once: name, type, default, unit, help.

One dataclass a section. `parsing` fills them from YAML files and the command line. Names are
those of ffcv-imagenet where it has them.
"""

import math
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, get_type_hints

from fastargs.validation import Checker

from ffcv_imnet.config.domains import (
    MOST_EPOCHS,
    Channels,
    Choice,
    Freeze,
    Number,
    OneOf,
    PathText,
    Range,
    Stage,
    Stages,
    Switch,
    Text,
    Words,
)

# Of ImageNet's training set in RGB, for pixels from 0 to 255; torchvision's and everybody's.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

DEVICES = "auto", "cuda", "cpu"


def _setting(default: Any, checker: Checker, text: str) -> Any:
    return field(default=default, metadata={"checker": checker, "help": text})


def _int(default: int | None, text: str, low: int = 0, high: float = math.inf) -> Any:
    return _setting(default, Number(int, low, high), text)


def _float(default: float | None, text: str, low: float = 0.0, high: float = math.inf) -> Any:
    return _setting(default, Number(float, low, high), text)


def _switch(default: bool, text: str) -> Any:
    return _setting(default, Switch(), text)


def _text(default: str, text: str) -> Any:
    return _setting(default, Text(), text)


def _path(default: str, text: str, remote: bool = False) -> Any:
    return _setting(default, PathText(remote), text)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network"""

    arch: str = _text(
        "resnet18", "a network's name (python -m ffcv_imnet models lists them), or timm:NAME"
    )
    zero_gamma: bool = _switch(
        False, "start the last BatchNorm of each residual block at zero (arXiv:1706.02677, 5.1)"
    )
    stochastic_depth: float = _float(
        0.0,
        "chance that the last residual branch is left out, earlier ones in proportion (arXiv:1603.09382); 0: none",
        0.0,
        0.9,
    )
    weights: str | None = _setting(
        None, PathText(), "file to start from: a checkpoint, a state dict, .safetensors"
    )
    freeze: str = _setting(
        "none",
        Freeze(),
        "what keeps its weights and BatchNorm statistics: all but the head, or the first stages",
    )
    freeze_epochs: int = _int(0, "first epochs, in which only the head is trained")
    mean: tuple[float, float, float] = _setting(
        MEAN, Channels(0.0), "subtracted from pixels; ImageNet's, or what weights were trained with"
    )
    std: tuple[float, float, float] = _setting(
        STD, Channels(1e-3), "pixels are divided by it after the mean is subtracted"
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Files and their loading"""

    train_dataset: str = _path(
        "data/beton/train.beton", ".beton to train on; a path, or an address", remote=True
    )
    val_dataset: str = _path("data/beton/val.beton", ".beton to validate on; likewise", remote=True)
    cache_dir: str = _path(
        "data/cache", "where files at an address (s3://BUCKET/train.beton) are copied, once"
    )
    num_workers: int | None = _int(
        None, "decoding threads of one process; default: usable cores over local processes", 1
    )
    batches_ahead: int = _int(3, "batches decoded ahead of the one in use", 1, 64)
    read_ahead: int = _int(
        1, "batches that the disk is asked for before they are decoded; 0: none", 0, 64
    )
    decoder: str = _setting(
        "crop",
        Choice(["crop", "whole"]),
        "crop: fast, decodes the crop alone; whole: FFCV's, to compare with",
    )
    verify: bool = _switch(
        False, "read both files whole at the start, and compare them with their checksums"
    )
    on_damaged: str = _setting(
        "stop",
        Choice(["stop", "skip"]),
        "stop: end the run at a stored image that does not decode; skip: leave it out",
    )


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What a training image goes through"""

    crop_scale: tuple[float, float] = _setting(
        (0.08, 1.0), Range(0.001, 1.0), "area of a crop over that of its image"
    )
    crop_ratio: tuple[float, float] = _setting(
        (0.75, 4 / 3), Range(0.01, 100.0), "width over height of a crop"
    )
    flip: str = _setting(
        "random",
        Choice(["random", "alternating", "none"], once={"true": "random", "false": "none"}),
        "mirror each image: by chance, every second epoch (arXiv:2404.00498), or never",
    )
    mixup: float = _float(
        0.0,
        "MixUp's alpha (arXiv:1710.09412); 0: none; if cutmix is on too, each batch gets one of the two",
        0.0,
        100.0,
    )
    cutmix: float = _float(0.0, "CutMix's alpha (arXiv:1905.04899); 0: none", 0.0, 100.0)
    randaugment: int = _int(
        0, "RandAugment's magnitude, of two operations (arXiv:1909.13719); 0: none", 0, 30
    )


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """Progressive resizing: side of the training crops"""

    min_res: int = _int(160, "up to epoch start_ramp, px", 8, 4096)
    max_res: int = _int(160, "from epoch end_ramp on, px", 8, 4096)
    start_ramp: int = _int(0, "epoch in which the ramp begins, counted from 0")
    end_ramp: int = _int(0, "epoch in which it ends; between, linear, to the nearest 32 px")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The run as a table, in place of the section resolution"""

    stages: tuple[Stage, ...] = _setting(
        (), Stages(), "one row after another; their epochs add up to training.epochs"
    )


@dataclass(frozen=True, kw_only=True)
class Lr:
    """Learning rate: linear warm-up from zero, then decay, evaluated at every step"""

    lr: float = _float(0.5, "at the peak, for a batch of lr.base_batch_size", 1e-12)
    lr_peak_epoch: float = _float(2.0, "length of the warm-up, in epochs")
    decay: str = _setting(
        "linear",
        Choice(["linear", "cosine", "steps"]),
        "its shape; cosine: arXiv:1608.03983 without restarts; steps: to a tenth after each third",
    )
    base_batch_size: int = _int(
        0, "lr is scaled by batch_size over this (arXiv:1706.02677, 2.1); 0: taken as it is"
    )
    body_lr_mult: float = _float(
        1.0,
        "learning rate of all but the head, over the head's; under Muon and SOAP too",
        1e-6,
        100.0,
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Optimisation"""

    epochs: int = _int(16, "passes over the training set", 1, MOST_EPOCHS)
    batch_size: int = _int(1024, "global: over all processes", 1)
    optimizer: str = _setting(
        "sgd",
        Choice(["sgd", "muon", "soap"]),
        "muon: for the convolutions, SGD for everything else; soap: for all parameters",
    )
    momentum: float = _float(0.9, "of SGD", 0.0, 0.9999)
    nesterov: bool = _switch(False, "Nesterov's momentum")
    weight_decay: float = _float(5e-5, "SGD's L2 factor; not on one-dimensional parameters")
    loss: str = _setting(
        "ce",
        Choice(["ce", "bce"]),
        "cross-entropy, or binary cross-entropy of each class (arXiv:2110.00476)",
    )
    label_smoothing: float = _float(0.1, "arXiv:1512.00567, 7", 0.0, 0.9999)
    use_blurpool: bool = _switch(
        True, "fixed 1-2-1 blur before every strided convolution of 16 or more inputs"
    )
    ema_decay: float = _float(
        0.0, "per-step decay of averaged weights and buffers, validated too; 0: none", 0.0, 0.999999
    )
    device: str = _setting(
        "auto",
        Choice(DEVICES),
        "also --device; auto: a GPU, or the CPU if there is no NVIDIA card",
    )
    precision: str = _setting(
        "auto",
        Choice(["auto", "fp32", "bf16", "fp16"]),
        "autocast type; auto: the fastest that the device runs natively",
    )
    compile: bool = _switch(False, "torch.compile, one static graph for each resolution")
    seed: int = _int(0, "of initial weights, order and augmentation", 0, 2**63 - 1)
    stop_at: float = _float(0.0, "target of top_1 or ema_top_1, a fraction of one; 0: none", 0, 1)
    stop_at_on: str = _setting(
        "any",
        Choice(["any", "imagenet", "imagenette", "shapes"]),
        "data set that stop_at is meant for, known by its classes (shapes: those of make demo): on another there is no target",
    )
    stop_when_reached: bool = _switch(False, "end the run at the target instead of at its epochs")
    checkpoint_minutes: float = _float(
        10.0,
        "between checkpoints within an epoch; one is written after each epoch too; 0: only then",
    )
    on_nonfinite_loss: str = _setting(
        "stop",
        Choice(["stop", "back"]),
        "when the loss becomes NaN or infinite; back: to the last checkpoint, at half the learning "
        "rate, three times at most",
    )
    max_hours: float = _float(
        0.0, "stop at a checkpoint before this much is spent, earlier parts included; 0: none"
    )
    max_cost: float = _float(0.0, "the same in dollars, at the price of cost.*; 0: none")


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Momentum orthogonalised by Newton-Schulz, for kernels of convolutions (kellerjordan.github.io/posts/muon)"""

    lr: float = _float(
        0.02, "at the peak, whatever the batch; it follows the schedule of lr.lr", 1e-12, 10.0
    )
    momentum: float = _float(0.95, "Nesterov's", 0.0, 0.9999)
    ns_steps: int = _setting(
        5,
        OneOf(3, 5),
        "Newton-Schulz: 5, Keller Jordan's; 3, minimax polynomials, half the work (arXiv:2505.16932)",
    )
    weight_decay: float = _float(0.0, "of the kernels, times the learning rate (arXiv:1711.05101)")


@dataclass(frozen=True, kw_only=True)
class Soap:
    """Adam in the eigenvectors of each layer's gradients (arXiv:2409.11321)"""

    lr: float = _float(
        0.012, "at the peak, whatever the batch; it follows the schedule of lr.lr", 1e-12, 10.0
    )
    every: int = _int(10, "steps from one turn of the bases to the next", 1)
    weight_decay: float = _float(
        0.0, "of all but one-dimensional parameters, times the learning rate (arXiv:1711.05101)"
    )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One exact pass over the validation set after each epoch"""

    batch_size: int = _int(512, "global: over all processes", 1)
    resolution: int = _int(256, "side of the image that the network sees, px", 8, 4096)
    crop_ratio: float = _float(
        224 / 256, "side of the central crop over the image's shorter side", 0.01, 1.0
    )
    lr_tta: bool = _switch(False, "also with logits summed over the image and its mirror image")


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """Several processes, as torchrun starts them"""

    timeout_seconds: float = _float(
        600.0, "a process that the others wait for longer than this ends the run", 1.0, 1e6
    )


@dataclass(frozen=True, kw_only=True)
class Logging:
    """The run's folder"""

    folder: str = _path("runs/latest", "RUN: log.jsonl, config.yaml, last.pt, best.pt, classes.txt")
    trackers: tuple[str, ...] = _setting(
        (), Words(["tensorboard", "wandb"]), "that get the log too, in RUN; wandb: offline"
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an hour of the machine costs"""

    dollars_per_hour: float | None = _float(None, "price of this machine; default: cost.machine's")
    machine: str | None = _setting(
        None, Text(), "name in ffcv_imnet/bench/machines.yaml: g4dn.2xlarge"
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All sections. `Settings()` is every default."""

    model: Model = Model()
    data: Data = Data()
    augmentation: Augmentation = Augmentation()
    resolution: Resolution = Resolution()
    plan: Plan = Plan()
    lr: Lr = Lr()
    training: Training = Training()
    muon: Muon = Muon()
    soap: Soap = Soap()
    validation: Validation = Validation()
    distributed: Distributed = Distributed()
    logging: Logging = Logging()
    cost: Cost = Cost()

    @property
    def schedule(self) -> Lr:
        """What the learning rate follows: `lr`, in which SOAP has a peak of its own, whatever the batch."""
        if self.training.optimizer == "soap":
            return replace(self.lr, lr=self.soap.lr, base_batch_size=0)
        return self.lr


def without_target(settings: Settings) -> Settings:
    """What is left of a recipe on other images than those that its target is for."""
    training = replace(settings.training, stop_at=0.0, stop_when_reached=False)
    return replace(settings, training=training)


# Settings that may differ between a run and its resumption: they leave the numbers as they are.
# The data's paths are among them because their content is compared by checksum.
NOT_OF_THE_RESULT = (
    "model.weights",  # read once, at the start, and told in the log: the file may be gone by now
    "data.train_dataset",
    "data.val_dataset",
    "data.cache_dir",
    "data.num_workers",
    "data.batches_ahead",
    "data.read_ahead",
    "data.verify",
    "data.on_damaged",  # a damaged image in a long run must not cost the run
    "training.device",
    "logging.folder",
    "training.stop_at",  # what is aimed at; how long it lasts with stop_when_reached may change
    "training.stop_at_on",
    "training.checkpoint_minutes",
    "training.on_nonfinite_loss",
    "validation.batch_size",  # each image counts once
    "distributed.timeout_seconds",
    "training.max_hours",
    "training.max_cost",
    "cost.dollars_per_hour",
    "cost.machine",
    "logging.trackers",
)

# Other names of settings: earlier ones, so that files and commands that use them still work, and
# short ones, which stand at the top of a file and are options of their own.
RENAMED = {
    "training.on_lost_loss": "training.on_nonfinite_loss",
    "device": "training.device",
}

# Settings of earlier versions, with the value at which they did what is done today. A recipe or a
# checkpoint that names one still loads; another value than this is said to be ignored, or refused
# where it made another network ("model.").
RETIRED: dict[str, Any] = {
    "model.stem": "plain",
    "model.shortcut": "conv",
    "model.squeeze_excite": False,
    "model.antialias_maxpool": False,
    "lr.final": 0.0,
    "lr.decay_epoch": 0.0,
    "training.decay_all": False,
    "training.average_last": 0,
    "training.lower_by": 0.5,
    "training.lower_times": 3,
    "logging.tensorboard": False,
    "logging.wandb": False,
    "cost.spot": False,
}


def to_dict(settings: Settings) -> dict[str, dict[str, Any]]:
    """By section, in JSON's and YAML's types; settings left to the machine (None) are absent."""
    return {section: json_types(values) for section, values in asdict(settings).items()}


def json_types(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: json_types(item) for key, item in value.items() if item is not None}
    return [json_types(item) for item in value] if isinstance(value, tuple) else value


def flatten(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`{"lr": {"lr": 1.7}}` as `{"lr.lr": 1.7}`."""
    return {
        f"{s}.{name}": value for s, values in settings.items() for name, value in values.items()
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """One text for each setting of two `to_dict`s that shapes the result and differs.

    A setting that one of them does not know yet has its default there: an older run goes on.
    """
    default = flatten(to_dict(Settings()))
    a, b = (
        default | {RENAMED.get(key, key): value for key, value in flatten(side).items()}
        for side in (ours, theirs)
    )
    for side in (a, b):  # a retired setting that did nothing is no difference
        for key, inert in RETIRED.items():
            if side.get(key) == inert:
                del side[key]
    keys = [key for key in sorted(a.keys() | b.keys()) if key not in NOT_OF_THE_RESULT]
    return [f"{key} {b.get(key)} -> {a.get(key)}" for key in keys if a.get(key) != b.get(key)]


def sections() -> dict[str, type]:
    return get_type_hints(Settings)


def declared() -> dict[str, "Field[Any]"]:
    """All settings by their dotted name."""
    return {f"{s}.{f.name}": f for s, section in sections().items() for f in fields(section)}


def checker_of(key: str) -> Checker:
    """The domain of a setting."""
    checker: Checker = declared()[key].metadata["checker"]
    return checker

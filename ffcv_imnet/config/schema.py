"""Every training setting, declared once: name, type, default, unit, help.

The dataclasses below are the declaration. fastargs reads YAML files and the command line; what it
would let pass (unknown keys, abbreviations, the environment, `bool("False")`) is refused here.
Names are those of ffcv-imagenet where it has them.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import fastargs
import yaml
from fastargs.dict_utils import expand_keys, fix_dict
from fastargs.validation import Checker

from ffcv_imnet.core.errors import Parser, UsageError, nearest

MOST_EPOCHS = 100_000  # the plan has a row for each


class Number(Checker):
    """An int or a float within bounds."""

    def __init__(self, kind: type[int] | type[float], low: float, high: float) -> None:
        self.kind, self.low, self.high = kind, low, high

    def check(self, value: object) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
        whole = self.kind is int
        # JSON has no infinity, and int() of it is another error.
        if not (math.isfinite(number) and self.low <= number <= self.high):
            raise ValueError
        if whole and number != int(number):
            raise ValueError
        return int(value) if whole else number  # int(value): a 63-bit seed does not fit a float

    def help(self) -> str:
        noun = "an integer" if self.kind is int else "a number"
        if math.isinf(self.high):
            return noun if math.isinf(self.low) else f"{noun} of at least {self.low:g}"
        return f"{noun} from {self.low:g} to {self.high:g}"


class OneOf(Checker):
    """One of two integers."""

    def __init__(self, first: int, second: int) -> None:
        self.numbers = first, second

    def check(self, value: object) -> int:
        number = Number(int, *self.numbers).check(value)
        if number not in self.numbers:
            raise ValueError
        return int(number)

    def help(self) -> str:
        return "{} or {}".format(*self.numbers)


class Switch(Checker):
    """true or false, in YAML's words or as 1 and 0."""

    def check(self, value: object) -> bool:
        word = str(value).lower()
        if word not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            raise ValueError
        return word in ("true", "yes", "on", "1")

    def help(self) -> str:
        return "true or false"


class Choice(Checker):
    """One of a few words; `once` maps what earlier recipes say to what it is called now."""

    def __init__(self, words: Sequence[str], once: dict[str, str] | None = None) -> None:
        self.words, self.once = words, once or {}

    def check(self, value: object) -> str:
        word = str(value).lower()
        word = self.once.get(word, word)
        if word not in self.words:
            raise ValueError
        return word

    def help(self) -> str:
        return "one of " + ", ".join(self.words)


class Text(Checker):
    """Any text that is not empty."""

    def check(self, value: object) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value

    def help(self) -> str:
        return "a text"


class Range(Checker):
    """Two numbers, the smaller first: `[0.35, 1]` in YAML, `0.35,1` on the command line."""

    def __init__(self, low: float, high: float) -> None:
        self.number = Number(float, low, high)

    def check(self, value: object) -> tuple[float, float]:
        parts = value.strip("[]()").split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or len(parts) != 2:
            raise ValueError
        first, second = (self.number.check(part) for part in parts)
        if first > second:
            raise ValueError
        return first, second

    def help(self) -> str:
        return f"two numbers from {self.number.low:g} to {self.number.high:g}, the smaller first"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of `plan.stages`. What it leaves out is taken from the settings of that name."""

    epochs: int
    resolution: int  # side of the training crops, px
    crop_scale: tuple[float, float] | None = None
    batch_size: int | None = None  # global
    label_smoothing: float | None = None


class RowError(ValueError):
    """What is wrong with a row of `plan.stages`, in words for the user."""


class Stages(Checker):
    """A list of `Stage`s: in YAML as it is, on the command line as YAML text. `check` raises RowError."""

    columns: ClassVar[dict[str, Checker]] = {
        "epochs": Number(int, 1, MOST_EPOCHS),
        "resolution": Number(int, 8, 4096),
        "crop_scale": Range(0.001, 1.0),
        "batch_size": Number(int, 1, math.inf),
        "label_smoothing": Number(float, 0.0, 0.9999),
    }

    def check(self, value: object) -> tuple[Stage, ...]:
        try:
            rows = yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError:
            raise ValueError from None
        if not isinstance(rows, list | tuple):
            raise ValueError
        return tuple(
            row if isinstance(row, Stage) else self._stage(row, f"row {number}")
            for number, row in enumerate(rows, 1)
        )

    def _stage(self, row: object, where: str) -> Stage:
        if not isinstance(row, dict):
            raise RowError(
                f"{where} must be settings such as {{epochs: 3, resolution: 128}}, not {row!r}"
            )
        values = {}
        for key, value in row.items():
            if key not in self.columns:
                raise RowError(
                    f"{where}: unknown {key!r}{nearest(str(key), list(self.columns))}; known are "
                    f"{', '.join(self.columns)}"
                )
            try:
                values[key] = self.columns[key].check(value)
            except (ValueError, TypeError, OverflowError):
                domain = self.columns[key].help()
                raise RowError(f"{where}: {key} must be {domain}, not {value!r}") from None
        for key in ("epochs", "resolution"):
            if key not in values:
                raise RowError(f"{where} has no {key}")
        return Stage(**values)

    def help(self) -> str:
        optional = [name for name in self.columns if name not in ("epochs", "resolution")]
        return (
            "a list of rows such as {epochs: 3, resolution: 128}, each with optional "
            + ", ".join(optional)
        )


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


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network"""

    arch: str = _text(
        "resnet18", "a network's name (python -m ffcv_imnet models lists them), or timm:NAME"
    )
    zero_gamma: bool = _switch(
        False, "start the last BatchNorm of each residual block at zero (arXiv:1706.02677, 5.1)"
    )
    stem: str = _setting(
        "plain", Choice(["plain", "deep"]),
        "of a ResNet; deep: three 3x3 convolutions for the one of 7x7 (arXiv:1812.01187, 4.2)",
    )  # fmt: skip
    shortcut: str = _setting(
        "conv", Choice(["conv", "avgpool"]),
        "of a ResNet's strided blocks; avgpool: average before a 1x1 convolution (ResNet-D)",
    )  # fmt: skip
    squeeze_excite: bool = _switch(
        False, "of a ResNet: weigh the channels of each residual branch (arXiv:1709.01507)"
    )
    antialias_maxpool: bool = _switch(
        False, "of a ResNet: blur between max-pooling and its stride (arXiv:1904.11486, 3.2)"
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Files and their loading"""

    train_dataset: str = _text("data/beton/train.beton", ".beton to train on")
    val_dataset: str = _text("data/beton/val.beton", ".beton to validate on")
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
        "a stored picture that does not decode ends the run, or not",
    )


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What a training picture goes through"""

    crop_scale: tuple[float, float] = _setting(
        (0.08, 1.0), Range(0.001, 1.0), "area of a crop over that of its picture"
    )
    crop_ratio: tuple[float, float] = _setting(
        (0.75, 4 / 3), Range(0.01, 100.0), "width over height of a crop"
    )
    flip: str = _setting(
        "random",
        Choice(["random", "alternating", "none"], once={"true": "random", "false": "none"}),
        "mirror each picture: by chance, every second epoch (arXiv:2404.00498), or never",
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
        Choice(["linear", "cosine"]),
        "its shape; cosine: arXiv:1608.03983 without restarts",
    )
    decay_epoch: float = _float(
        0.0, "epoch in which the decay begins, the peak held till then; 0: after the warm-up"
    )
    final: float = _float(0.0, "rate at the end, as a part of the peak's", 0.0, 1.0)
    base_batch_size: int = _int(
        0, "lr is scaled by batch_size over this (arXiv:1706.02677, 2.1); 0: taken as it is"
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Optimisation"""

    epochs: int = _int(16, "passes over the training set", 1, MOST_EPOCHS)
    batch_size: int = _int(1024, "global: over all processes", 1)
    optimizer: str = _setting(
        "sgd", Choice(["sgd", "muon"]), "muon: for the convolutions, SGD for everything else"
    )
    momentum: float = _float(0.9, "of SGD", 0.0, 0.9999)
    nesterov: bool = _switch(False, "Nesterov's momentum")
    weight_decay: float = _float(5e-5, "L2 factor; not on one-dimensional parameters")
    decay_all: bool = _switch(False, "weight decay on one-dimensional parameters too")
    label_smoothing: float = _float(0.1, "arXiv:1512.00567, 7", 0.0, 0.9999)
    use_blurpool: bool = _switch(
        True, "fixed 1-2-1 blur before every strided convolution of 16 or more inputs"
    )
    ema_decay: float = _float(
        0.0, "per-step decay of averaged weights and buffers, validated too; 0: none", 0.0, 0.999999
    )
    average_last: int = _int(
        0,
        "average the weights after each of the last so many epochs (arXiv:2209.14981), in EMA's place",
    )
    precision: str = _setting(
        "auto",
        Choice(["auto", "fp32", "bf16", "fp16"]),
        "autocast type; auto: the fastest that the device runs natively",
    )
    compile: bool = _switch(False, "torch.compile, one static graph for each resolution")
    seed: int = _int(0, "of initial weights, order, crops and flips", 0, 2**63 - 1)
    stop_at: float = _float(0.0, "target of top_1 or ema_top_1, a fraction of one; 0: none", 0, 1)
    stop_when_reached: bool = _switch(False, "end the run at the target instead of at its epochs")
    checkpoint_minutes: float = _float(
        10.0,
        "between checkpoints within an epoch; one is written after each epoch too; 0: only then",
    )
    on_lost_loss: str = _setting(
        "stop",
        Choice(["stop", "back"]),
        "when the loss becomes NaN or infinite; back: to the last checkpoint, at a lower rate",
    )
    lower_by: float = _float(0.5, "what the rate is multiplied by, each time", 1e-6, 0.999999)
    lower_times: int = _int(3, "at most, in a run; then it stops", 1)
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
    weight_decay: float = _float(0.0, "of the kernels, times the rate (arXiv:1711.05101)")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One exact pass over the validation set after each epoch"""

    batch_size: int = _int(512, "global: over all processes", 1)
    resolution: int = _int(256, "side of the picture that the network sees, px", 8, 4096)
    crop_ratio: float = _float(
        224 / 256, "side of the central crop over the picture's shorter side", 0.01, 1.0
    )
    lr_tta: bool = _switch(False, "also with logits summed over the picture and its mirror image")


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """Several processes, as torchrun starts them"""

    timeout_seconds: float = _float(
        600.0, "a process that the others wait for longer than this ends the run", 1.0, 1e6
    )


@dataclass(frozen=True, kw_only=True)
class Logging:
    """The run's folder"""

    folder: str = _text("runs/latest", "RUN: log.jsonl, config.yaml, last.pt, best.pt, classes.txt")
    tensorboard: bool = _switch(
        False, "the log for TensorBoard too, in RUN (pip install tensorboard)"
    )
    wandb: bool = _switch(
        False, "the log for Weights & Biases too, offline, in RUN/wandb (pip install wandb)"
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an hour of the machine costs"""

    dollars_per_hour: float | None = _float(None, "price of this machine; default: cost.machine's")
    machine: str | None = _setting(
        None, Text(), "name in ffcv_imnet/bench/machines.yaml: g4dn.2xlarge"
    )
    spot: bool = _switch(False, "take the table's spot price")


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
    validation: Validation = Validation()
    distributed: Distributed = Distributed()
    logging: Logging = Logging()
    cost: Cost = Cost()


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line of train_imagenet.py."""

    settings: Settings
    dry_run: bool = False
    measure: bool = False
    resume: str | None = None  # "auto" or a checkpoint's path


# Settings that may differ between a run and its resumption: they leave the numbers as they are.
# The data's paths are among them because their content is compared by checksum.
NOT_OF_THE_RESULT = (
    "data.train_dataset",
    "data.val_dataset",
    "data.num_workers",
    "data.batches_ahead",
    "data.read_ahead",
    "data.verify",
    "data.on_damaged",  # a damaged picture in a long run must not cost the run
    "logging.folder",
    "training.checkpoint_minutes",
    "training.on_lost_loss",
    "training.lower_by",
    "training.lower_times",
    "distributed.timeout_seconds",
    "training.max_hours",
    "training.max_cost",
    "cost.dollars_per_hour",
    "cost.machine",
    "cost.spot",
    "logging.tensorboard",
    "logging.wandb",
)


def to_dict(settings: Settings) -> dict[str, dict[str, Any]]:
    """By section, in JSON's and YAML's types; settings left to the machine (None) are absent."""
    return {section: _json_types(values) for section, values in asdict(settings).items()}


def _json_types(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_types(item) for key, item in value.items() if item is not None}
    return [_json_types(item) for item in value] if isinstance(value, tuple) else value


def to_yaml(settings: Settings) -> str:
    """A file that `--config` takes and that gives the same settings."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, default_flow_style=None, width=1000)


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
    a, b = default | flatten(ours), default | flatten(theirs)
    keys = [key for key in sorted(a.keys() | b.keys()) if key not in NOT_OF_THE_RESULT]
    return [f"{key} {b.get(key)} -> {a.get(key)}" for key in keys if a.get(key) != b.get(key)]


def _sections() -> dict[str, type]:
    return get_type_hints(Settings)


def _declared() -> dict[str, "Field[Any]"]:
    """All settings by their dotted name."""
    return {f"{s}.{f.name}": f for s, section in _sections().items() for f in fields(section)}


class StrictConfig(fastargs.Config):
    """fastargs without its surprises.

    Unknown keys are refused with the nearest right name; a value is checked when it is read, so
    that the message can name its file; the environment changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, section in _sections().items():
            params = {f.name: _param(f) for f in fields(section)}
            fastargs.Section(name, (section.__doc__ or "").strip(), self).params(**params)

    def collect_from(self, values: dict[Any, Any], origin: str) -> None:
        """Check `values` (nested or dotted keys) and merge them over what is there.

        Raises:
            UsageError: an unknown key or a value out of its domain; names `origin` and the key.
        """
        for path, value in _leaves(fix_dict(expand_keys(values))):
            key = ".".join(path)
            if key in _sections():
                if value is None:  # every line below it is a comment
                    continue
                example = next(name for name in _declared() if name.startswith(f"{key}."))
                raise UsageError(
                    f"{origin}: {key} is a section: its settings stand below it, {example} for one"
                )
            if path not in self.entries:
                raise UsageError(f"{origin}: unknown setting {key!r}{_suggest(key)}")
            if value is None:
                continue
            checker = self.entries[path].checker
            try:
                checker.check(value)
            except RowError as error:
                raise UsageError(f"{origin}: {key}, {error}") from None
            except (ValueError, KeyError, TypeError, OverflowError):
                raise UsageError(
                    f"{origin}: {key} must be {checker.help()}, not {value!r}"
                ) from None
        self.collect({key: value for key, value in values.items() if value is not None})

    def collect_env_variables(self) -> "StrictConfig":
        """The environment changes nothing."""
        return self


def _param(declared: "Field[Any]") -> fastargs.Param:
    assert declared.default is not MISSING
    return fastargs.Param(declared.metadata["checker"], declared.metadata["help"], declared.default)


def _leaves(
    values: dict[Any, Any], above: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any]]:
    out: list[tuple[tuple[str, ...], Any]] = []
    for key, value in values.items():
        path = (*above, str(key))
        out += _leaves(value, path) if isinstance(value, dict) else [(path, value)]
    return out


def _suggest(key: str) -> str:
    """The nearest setting, looking first for the same last name in another section."""
    names = list(_declared())
    same = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    return f" (did you mean {same[0]}?)" if same else nearest(key, names)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one winning unseen."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_config(path: str, option: str = "--config ") -> dict[Any, Any]:
    """A YAML file as a dict; `option` stands before its name in messages.

    Raises:
        UsageError: the file is missing, is not YAML or is not a table of settings.
    """
    file = Path(path)
    if file.is_dir():
        recipes = ", ".join(sorted(p.name for p in file.glob("*.yaml"))) or "no .yaml file"
        raise UsageError(f"{option}{path}: a folder; name one file (it holds {recipes})")
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path()
        near = nearest(file.name, [p.name for p in folder.glob("*.yaml")])
        raise UsageError(f"{option}{path}: no such file{near}")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{option}{path}: not a YAML file: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(
            f"{option}{path}: holds no settings; expected lines such as 'lr: {{lr: 0.5}}'"
        )
    return values


def help_text() -> str:
    """Every setting with its default, its domain and its meaning."""
    lines = ["settings, in a --config file or as --section.name=value:"]
    for name, section in _sections().items():
        lines.append(f"\n  {(section.__doc__ or '').strip()}")
        for item in fields(section):
            default = "" if item.default is None else f" [{_plain(item.default)}]"
            lines.append(f"    --{name}.{item.name}{default}: {item.metadata['checker'].help()}")
            lines.append(f"        {item.metadata['help']}")
    return "\n".join(lines)


def _plain(value: object) -> str:
    """A setting's value as the command line takes it."""
    if isinstance(value, tuple) and value and not isinstance(value[0], Stage | dict):
        return ",".join(f"{part:g}" for part in value)
    if isinstance(value, list | tuple):
        rows = [_json_types(asdict(row)) if isinstance(row, Stage) else row for row in value]
        return yaml.safe_dump(rows, default_flow_style=True, width=1000).strip()
    return str(value)


def _parser() -> Parser:
    parser = Parser(
        prog="train_imagenet.py",
        description="Train a classifier on .beton files that write_ffcv.py wrote.",
        epilog=help_text(),
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML; repeatable, later wins"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="auto|CHECKPOINT",
        help="go on with the run in logging.folder, or from a file",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print settings, plan and bill; needs neither data nor a GPU",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="with --dry_run: measure this machine on the data and predict the run's duration",
    )
    for key in _declared():
        parser.add_argument(f"--{key}", dest=key, help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str] | None = None) -> Command:
    """The command line as resolved settings: defaults, then each --config, then --section.name.

    Raises:
        UsageError: see `StrictConfig.collect_from`, `read_config` and `check`; nothing has been
            allocated by then.
    """
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    for word in unknown:
        option = word.split("=")[0].lstrip("-")
        if not word.startswith("-"):
            raise UsageError(
                f"unexpected word {word!r}; settings are given as --section.name=value"
            )
        known = [*_declared(), "config", "resume", "dry_run", "measure", "help"]
        hint = _suggest(option) if "." in option else nearest(option, known)
        raise UsageError(f"unknown option --{option}{hint}")
    if arguments.resume == "":
        raise UsageError(
            "--resume: give auto (go on with the run in logging.folder) or a checkpoint's path"
        )
    config = StrictConfig()
    for path in arguments.config:
        config.collect_from(read_config(path), f"--config {path}")
    given = {
        key: value for key, value in vars(arguments).items() if "." in key and value is not None
    }
    config.collect_from(given, "command line")
    settings = _build(config)
    check(settings)
    if arguments.measure and not arguments.dry_run:
        raise UsageError("--measure goes with --dry_run: it measures instead of training")
    return Command(
        settings=settings,
        dry_run=arguments.dry_run,
        measure=arguments.measure,
        resume=arguments.resume,
    )


def _build(config: StrictConfig) -> Settings:
    return Settings(
        **{
            name: section(**{f.name: config[(name, f.name)] for f in fields(section)})
            for name, section in _sections().items()
        }
    )


def load(*paths: str | Path, **overrides: Any) -> Settings:
    """Settings from config files and keyword overrides, for tools and tests.

    A dot in a name is written as two underscores: `load(lr__lr=1.7)`.
    """
    options = [f"--config={path}" for path in paths]
    for key, value in overrides.items():
        options.append(f"--{key.replace('__', '.')}={_plain(value)}")
    return parse(options).settings


def check(settings: Settings) -> None:
    """What single domains cannot say. Raises UsageError naming the settings that clash."""
    s = settings
    rules: list[tuple[bool, Callable[[], str]]] = [
        (
            s.resolution.start_ramp > s.resolution.end_ramp,
            lambda: (
                f"resolution.start_ramp {s.resolution.start_ramp} lies after "
                f"resolution.end_ramp {s.resolution.end_ramp}"
            ),
        ),
        (
            s.resolution.min_res > s.resolution.max_res,
            lambda: (
                f"resolution.min_res {s.resolution.min_res} is larger than "
                f"resolution.max_res {s.resolution.max_res}"
            ),
        ),
        (
            bool(s.plan.stages) and sum(row.epochs for row in s.plan.stages) != s.training.epochs,
            lambda: (
                f"plan.stages make {sum(row.epochs for row in s.plan.stages)} epochs, "
                f"training.epochs is {s.training.epochs}; make them equal"
            ),
        ),
        (
            bool(s.plan.stages) and s.resolution != Resolution(),
            lambda: "plan.stages and the section resolution both say the resolution; leave one out",
        ),
        (
            0 < s.lr.decay_epoch < s.lr.lr_peak_epoch or s.lr.decay_epoch >= s.training.epochs,
            lambda: (
                f"lr.decay_epoch {s.lr.decay_epoch:g} must lie between lr.lr_peak_epoch "
                f"{s.lr.lr_peak_epoch:g} and the end of training.epochs {s.training.epochs}"
            ),
        ),
        (
            s.training.average_last > 0 and s.training.ema_decay > 0,
            lambda: "training.average_last and training.ema_decay are two averages; set one to 0",
        ),
        (
            s.training.average_last > s.training.epochs,
            lambda: (
                f"training.average_last {s.training.average_last} is more than training.epochs "
                f"{s.training.epochs}"
            ),
        ),
        (
            s.lr.lr_peak_epoch > s.training.epochs,
            lambda: (
                f"lr.lr_peak_epoch {s.lr.lr_peak_epoch:g} lies after the last of "
                f"training.epochs {s.training.epochs}"
            ),
        ),
        (
            s.muon.lr * s.muon.weight_decay >= 1,
            lambda: (
                f"muon.weight_decay {s.muon.weight_decay:g} times muon.lr {s.muon.lr:g} is one or more: a "
                f"step would wipe the kernels out; lower one"
            ),
        ),
        (
            s.training.nesterov and s.training.momentum == 0,
            lambda: "training.nesterov needs training.momentum above 0",
        ),
        (
            s.training.stop_when_reached and s.training.stop_at == 0,
            lambda: "training.stop_when_reached needs training.stop_at above 0",
        ),
        (
            s.training.max_cost > 0 and s.cost.dollars_per_hour is None and s.cost.machine is None,
            lambda: "training.max_cost needs a price: cost.dollars_per_hour or cost.machine",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise UsageError(message())

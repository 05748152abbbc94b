"""Settings from YAML files and the command line.

fastargs reads both; what it would let pass (unknown keys, abbreviations, the environment,
`bool("False")`) is refused here.
"""

import argparse
import difflib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import fastargs

from ffcv_imnet.config.domains import Stage, argument
from ffcv_imnet.config.migrate import REASONS
from ffcv_imnet.config.schema import (
    RENAMED,
    RETIRED,
    Resolution,
    Settings,
    checker_of,
    declared,
    json_types,
    sections,
    to_dict,
)
from ffcv_imnet.config.strict_yaml import LARGEST, StrictError, dump_yaml, load_yaml
from ffcv_imnet.core.errors import Parser, UsageError, nearest
from ffcv_imnet.core.names import quoted
from ffcv_imnet.core.paths import local, what_is

# Sections and settings that an optimizer does not read.
UNREAD = {
    "sgd": ("muon", "soap"),
    "muon": ("soap",),
    "soap": (
        "muon",
        "lr.lr",
        "lr.base_batch_size",
        "training.momentum",
        "training.nesterov",
        "training.weight_decay",
    ),
}
RECIPES = Path(__file__).parents[1] / "rn_configs"  # a link in a checkout, a copy where installed


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line of train_imagenet.py."""

    settings: Settings
    dry_run: bool = False
    measure: bool = False
    resume: str | None = None  # "auto" or a checkpoint's path


def to_yaml(settings: Settings) -> str:
    """A file that `--config` takes and that gives the same settings."""
    return dump_yaml(to_dict(settings))


class StrictConfig(fastargs.Config):
    """fastargs without its surprises.

    Unknown keys are refused with the nearest right name; a value is checked when it is read, so
    that the message can name its file; the environment changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, section in sections().items():
            params = {
                f.name: fastargs.Param(f.metadata["checker"], f.metadata["help"], f.default)
                for f in fields(section)
            }
            fastargs.Section(name, (section.__doc__ or "").strip(), self).params(**params)

    def collect_from(self, values: dict[Any, Any], origin: str) -> None:
        """Check `values` (nested or dotted keys) and merge them over what is there.

        Raises:
            UsageError: an unknown key or a value out of its domain; names `origin` and the key.
        """
        given: dict[str, Any] = {}
        seen: set[str] = set()
        unknown: list[str] = []
        for name, value in leaves(values):
            key = RENAMED.get(name, name)
            if key in seen:
                raise UsageError(f"{origin}: {quoted(key)} is given twice, written in two ways")
            seen.add(key)
            if key in sections():
                if value is None:  # every line below it is a comment
                    continue
                example = next(name for name in declared() if name.startswith(f"{key}."))
                raise UsageError(
                    f"{origin}: {key} is a section: its settings stand below it, {example} for one"
                )
            if key in RETIRED:
                ignore_retired(key, value, origin)
                continue
            if key not in declared():
                unknown.append(key)
                continue
            if value is not None:
                argument(f"{origin}: {name}", value, checker_of(key))
                given[key] = value
            elif origin.startswith("--config ") and declared()[key].default is not None:
                raise UsageError(f"{origin}: {name} has no value: write one, or leave the line out")
        if unknown:
            raise UsageError(f"{origin}: {_unknown(unknown, origin)}")
        self.collect(given)

    def collect_env_variables(self) -> "StrictConfig":
        """The environment changes nothing."""
        return self


def ignore_retired(key: str, value: object, origin: str) -> None:
    """Say that a setting of an earlier version is ignored, unless it asks for what is done anyway.

    Raises:
        UsageError: it made another network than there is now.
    """
    inert = RETIRED[key]
    if value is None or str(value).lower() == str(inert).lower():
        return
    if isinstance(inert, float) and isinstance(value, int | float) and value == inert:
        return
    if key.startswith("model."):
        raise UsageError(
            f"{origin}: {key}={value} made a network that is no longer here; docs/own-network.md says how to add one"
        )
    instead = key.removeprefix("logging.")
    hint = f"; use --logging.trackers={instead}" if instead in ("tensorboard", "wandb") else ""
    print(
        f"{origin}: {key}={value} is ignored: this version has no such setting{hint}",
        file=sys.stderr,
    )


def leaves(values: dict[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and their values, however they are nested."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _unknown(keys: Sequence[str], origin: str) -> str:
    """All that are unknown at once, and the way out where they are ffcv-imagenet's."""
    named = ", ".join(f"{quoted(key)}{_suggest(key)}" for key in keys[:20])
    more = f" and {len(keys) - 20:,} more" if len(keys) > 20 else ""
    text = f"unknown setting{'s' if len(keys) > 1 else ''} {named}{more}"
    if any(key in REASONS for key in keys) and origin.startswith("--config "):
        path = shlex.quote(origin.removeprefix("--config "))
        text += f"; `python -m ffcv_imnet migrate {path}` rewrites a configuration of ffcv-imagenet"
    return text


def _suggest(key: str) -> str:
    """The nearest setting, looking first for the same last name in another section."""
    names = list(declared())
    same = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    if not same and key in sections():  # --lr for --lr.lr
        same = [name for name in names if name.startswith(f"{key}.")]
    return f" (did you mean {same[0]}?)" if same else nearest(key, names)


def read_config(path: str, option: str = "--config ") -> dict[Any, Any]:
    """A YAML file as a dict; `option` stands before its name in messages.

    Raises:
        UsageError: the file is missing, is not YAML or is not a table of settings.
    """
    file = Path(local(path, option))
    if not file.exists() and file.parent == Path("rn_configs") and not file.parent.exists():
        file = RECIPES / file.name  # installed, and run from some other folder
    if file.is_dir():
        recipes = ", ".join(sorted(p.name for p in file.glob("*.yaml"))) or "no .yaml file"
        raise UsageError(f"{option}{path}: a folder; name one file (it holds {recipes})")
    if not file.is_file():
        raise UsageError(f"{option}{path}: {what_is(file)}{_other_file(file)}")
    try:
        with file.open("rb") as opened:
            data = opened.read(4 * LARGEST + 1)  # a character has four bytes at most
        values = load_yaml(data.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{option}{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option}{path}: not a YAML file: it is not text in UTF-8") from None
    except StrictError as error:
        raise UsageError(f"{option}{path}: not a YAML file of settings: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(
            f"{option}{path}: holds no settings; expected lines such as 'lr: {{lr: 0.5}}'"
        )
    return values


def _other_file(file: Path) -> str:
    """Of a file that is not there: .yaml files of a like name in its folder, else recipes."""
    for folder, name in ((file.parent, ""), (RECIPES, "rn_configs/")):
        stems = [p.stem for p in sorted(folder.glob("[!.]*.yaml")) if p != file]
        begun = [stem for stem in stems if stem.startswith(f"{file.stem}_")]
        if close := begun or difflib.get_close_matches(file.stem, stems, n=1):
            return f" (did you mean {' or '.join(f'{name}{stem}.yaml' for stem in close)}?)"
    return ""


def help_text() -> str:
    """Every setting with its default, its domain and its meaning."""
    lines = ["settings, in a --config file or as --section.name=value:"]
    for name, section in sections().items():
        lines.append(f"\n  {(section.__doc__ or '').strip()}")
        for item in fields(section):
            default = "" if item.default is None else f" [{as_word(item.default)}]"
            lines.append(f"    --{name}.{item.name}{default}: {item.metadata['checker'].help()}")
            lines.append(f"        {item.metadata['help']}")
    return "\n".join(lines)


def as_word(value: object) -> str:
    """A setting's value as the command line takes it."""
    if isinstance(value, list | tuple) and value and not isinstance(value[0], Stage | dict):
        return ",".join(map(str, value))
    if isinstance(value, list | tuple):
        rows = [json_types(asdict(row)) if isinstance(row, Stage) else row for row in value]
        return dump_yaml(rows, flow=True).strip()
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
        help="print settings, plan and cost estimate; needs neither data nor a GPU",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="with --dry_run: measure this machine on the data and predict the run's duration",
    )
    for key in (*declared(), *RENAMED, *RETIRED):
        parser.add_argument(f"--{key}", dest=key, help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str] | None = None) -> Command:
    """The command line as resolved settings: defaults, then each --config, then --section.name.

    A setting on the command line that the optimizer does not read is named on stderr.

    Raises:
        UsageError: see `StrictConfig.collect_from`, `read_config` and `check`; nothing has been
            allocated by then.
    """
    command, typed = _parse(argv)
    optimizer = command.settings.training.optimizer
    unread = [k for k in typed if {k, k.split(".")[0]} & set(UNREAD[optimizer])]
    if unread:
        print(
            f"command line: without effect, as training.optimizer is {optimizer}: {', '.join(unread)}",
            file=sys.stderr,
        )
    return command


def _parse(argv: Sequence[str] | None) -> tuple[Command, list[str]]:
    """See `parse`; and the settings on the command line, by their present names."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    for word in unknown:
        option = word.split("=")[0].lstrip("-")
        if not word.startswith("-"):
            raise UsageError(
                f"unexpected word {word!r}; settings are given as --section.name=value"
            )
        known = [*declared(), "device", "config", "resume", "dry_run", "measure", "help"]
        hint = _suggest(option) if "." in option or option in sections() else nearest(option, known)
        raise UsageError(f"unknown option --{option}{hint}")
    if arguments.resume == "":
        raise UsageError(
            "--resume: give auto (go on with the run in logging.folder) or a checkpoint's path"
        )
    config = StrictConfig()
    for path in arguments.config:
        config.collect_from(read_config(path), f"--config {path}")
    typed = vars(arguments)
    given = {key: typed[key] for key in (*declared(), *RENAMED, *RETIRED) if typed[key] is not None}
    config.collect_from(given, "command line")
    settings = _build(config)
    check(settings)
    if arguments.measure and not arguments.dry_run:
        raise UsageError("--measure goes with --dry_run: it measures instead of training")
    command = Command(
        settings=settings,
        dry_run=arguments.dry_run,
        measure=arguments.measure,
        resume=local(arguments.resume, "--resume ") if arguments.resume else None,
    )
    return command, [RENAMED.get(key, key) for key in given]


def _build(config: StrictConfig) -> Settings:
    return Settings(
        **{
            name: section(**{f.name: config[(name, f.name)] for f in fields(section)})
            for name, section in sections().items()
        }
    )


def from_dict(values: dict[str, dict[str, Any]], origin: str) -> Settings:
    """What `to_dict` gave, of this version or an earlier one.

    Raises:
        UsageError: see `StrictConfig.collect_from`; `origin` is the file in its messages.
    """
    config = StrictConfig()
    config.collect_from(values, origin)
    return _build(config)


def load(*paths: str | Path, **overrides: Any) -> Settings:
    """Settings from config files and keyword overrides, for tools and tests.

    A dot in a name is written as two underscores: `load(lr__lr=1.7)`.
    """
    options = [f"--config={path}" for path in paths]
    for key, value in overrides.items():
        options.append(f"--{key.replace('__', '.')}={as_word(value)}")
    return _parse(options)[0].settings


def check(settings: Settings) -> None:
    """What single domains cannot say. Raises UsageError naming the settings that clash."""
    for clash in _clashes(settings):
        raise UsageError(clash)


def _clashes(s: Settings) -> Iterator[str]:
    resolution, training = s.resolution, s.training
    if resolution.start_ramp > resolution.end_ramp:
        yield (
            f"resolution.start_ramp {resolution.start_ramp} lies after "
            f"resolution.end_ramp {resolution.end_ramp}"
        )
    if resolution.min_res > resolution.max_res:
        yield (
            f"resolution.min_res {resolution.min_res} is larger than "
            f"resolution.max_res {resolution.max_res}"
        )
    planned = sum(row.epochs for row in s.plan.stages)
    if s.plan.stages and planned != training.epochs:
        yield (
            f"plan.stages make {planned} epochs, training.epochs is {training.epochs}; "
            "make them equal, or leave the stages out (--plan.stages=[])"
        )
    if s.plan.stages and resolution != Resolution():
        yield "plan.stages and the section resolution both say the resolution; leave one out (--plan.stages=[] leaves out the first)"
    yield from _frozen_clashes(s)
    if s.lr.lr_peak_epoch > training.epochs:
        yield (
            f"lr.lr_peak_epoch {s.lr.lr_peak_epoch:g} lies after the last of "
            f"training.epochs {training.epochs}"
        )
    for name, rule in (("muon", s.muon), ("soap", s.soap)):
        if rule.lr * rule.weight_decay >= 1:
            yield (
                f"{name}.weight_decay {rule.weight_decay:g} times {name}.lr {rule.lr:g} is one or more: "
                "a step would set the weights to zero; lower one"
            )
    if training.nesterov and training.momentum == 0:
        yield "training.nesterov needs training.momentum above 0"
    if training.stop_when_reached and training.stop_at == 0:
        yield "training.stop_when_reached needs training.stop_at above 0"
    if training.max_cost > 0 and s.cost.dollars_per_hour is None and s.cost.machine is None:
        yield "training.max_cost needs a price: cost.dollars_per_hour or cost.machine"


def _frozen_clashes(s: Settings) -> Iterator[str]:
    model = s.model
    if model.weights is None and (model.freeze != "none" or model.freeze_epochs):
        which = "freeze" if model.freeze != "none" else "freeze_epochs"
        yield f"model.{which} needs model.weights: random weights would stay as they are"
    if model.freeze_epochs >= s.training.epochs:
        yield (
            f"model.freeze_epochs {model.freeze_epochs} leaves none of training.epochs "
            f"{s.training.epochs} for the body; model.freeze=body trains the head alone"
        )
    if model.freeze == "body" and (model.freeze_epochs or s.lr.body_lr_mult != 1.0):
        yield "model.freeze body leaves nothing to model.freeze_epochs and lr.body_lr_mult; leave them out"

"""Rewrite a configuration of ffcv-imagenet as a recipe of this project.

python -m ffcv_imnet migrate rn18_88_epochs.yaml --out rn_configs/rn18_88ep.yaml

What means the same is kept, what is counted otherwise is converted, what means nothing here is
dropped; all three are said, and stand at the head of the recipe.
"""

import textwrap
from pathlib import Path

import yaml

from ffcv_imnet.config.migrate import DEFAULTS, REASONS, Migrated, migrate
from ffcv_imnet.config.parsing import leaves, load, read_config
from ffcv_imnet.config.schema import RENAMED, RETIRED, declared
from ffcv_imnet.core.atomic import atomic_write, partial_path
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.paths import check_output, path_of, refuse_inputs
from ffcv_imnet.tools import ToolParser


def main(argv: list[str]) -> int:
    """Exit status 0 if the recipe is written, and is one that training takes."""
    parser = ToolParser("migrate", __doc__)
    parser.add_argument("config", type=path_of, metavar="FILE", help="its YAML")
    parser.add_argument("--out", type=path_of, metavar="FILE",
                        help="the recipe (default: beside it, ending in .migrated.yaml)")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    options = parser.parse_args(argv)
    source: Path = options.config
    out: Path = options.out or source.with_suffix(".migrated.yaml")
    check_output("--out", out, ".yaml", ".yml")
    refuse_inputs("--out", out, source)
    if out.exists() and not options.force:
        raise UsageError(f"{out} is there already: --force replaces it, --out names another")
    held = leaves(read_config(str(source), option=""))
    given = {key: value for key, value in held if value is not None}
    if not given:
        raise UsageError(f"{source} holds no settings")
    own, theirs = {*declared(), *RENAMED, *RETIRED}, {*DEFAULTS, *REASONS}
    if own >= given.keys() and not theirs >= given.keys():
        raise UsageError(f"{source} is a recipe of this project already")
    try:
        found = migrate(given, source.stem)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    write(out, source.name, found)
    for line in found.changed:
        print(f"converted  {line}")
    for line in found.dropped:
        print(f"dropped    {line}")
    print(f"{out}: python train_imagenet.py --config {out} --dry_run")
    return 0


def write(out: Path, name: str, found: Migrated) -> None:
    """The recipe under its name, once training's own parser has taken it. Raises NotWritten, UsageError."""
    lines = [f"From ffcv-imagenet's {name}. Not measured here.", *found.changed]
    lines += [f"Dropped: {line}" for line in found.dropped]
    head = "".join(f"# {part}\n" for line in lines for part in textwrap.wrap(line, 110))
    body = "".join(
        yaml.safe_dump({section: values}, sort_keys=False, default_flow_style=None, width=1000)
        for section, values in found.values.items()
    )
    with atomic_write(out, "w") as file:
        file.write(f"{head}\n{body}")
        file.flush()
        load(partial_path(out))

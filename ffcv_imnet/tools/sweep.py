"""Train a list of variants over seeds, skipping what is done, and print the table.

python -m ffcv_imnet sweep SWEEP.yaml --out runs/sweep

SWEEP.yaml:
    config: rn_configs/imagenette_5ep.yaml   what all variants start from; a path or a list of them
    seeds: [0, 1, 2]                         left out: 0 alone
    variants:                                name: settings that differ, as on the command line
      base: {}
      sgd: {training.optimizer: sgd}

Each run is one of train_imagenet.py in OUT/NAME/seedN. Stop it at any time and start it again: what
its logs show done is skipped, what was begun goes on; a folder that holds a run of other settings is refused. With several lists of variants under way at
once, give each its own --out.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ffcv_imnet.config.parsing import as_word, leaves, parse, read_config
from ffcv_imnet.config.schema import Settings, differences, to_dict, without_target
from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.log import Log, read_log
from ffcv_imnet.core.paths import path_of
from ffcv_imnet.core.signals import exit_when_asked, run_child
from ffcv_imnet.report.statistics import Spread, score, spread
from ffcv_imnet.tools import ToolParser

SCRIPT = Path(__file__).parents[2] / "train_imagenet.py"


@dataclass(frozen=True)
class Run:
    """One variant under one seed."""

    name: str
    seed: int
    folder: Path
    options: tuple[str, ...]  # of train_imagenet.py

    def log(self) -> Log | None:
        """What it has logged so far."""
        return read_log(self.folder) if (self.folder / "log.jsonl").exists() else None

    @property
    def done(self) -> bool:
        """Whether the log has its summary."""
        log = self.log()
        return log is not None and log.summary is not None and log.summary.stopped is None


def read_sweep(path: Path, out: Path) -> list[Run]:
    """All runs of a sweep, seed by seed, so that a stopped one has compared variants evenly.

    Raises:
        UsageError: the file is no sweep, or a variant's settings are wrong; names both.
    """
    sweep = read_config(str(path), "")
    where = f"{path}: "
    if unknown := sorted(map(str, sweep.keys() - {"config", "seeds", "variants"})):
        raise UsageError(f"{where}unknown key {unknown[0]!r}; known are config, seeds and variants")
    configs, seeds, variants = sweep.get("config"), sweep.get("seeds", [0]), sweep.get("variants")
    configs = [configs] if isinstance(configs, str) else configs
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UsageError(f"{where}seeds must be a list of integers such as [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"{where}a seed stands twice in seeds: {seeds}")
    if (
        not isinstance(configs, list)
        or not isinstance(variants, dict)
        or not (configs and variants)
    ):
        raise UsageError(f"{where}needs config: a recipe's path, and variants: {{name: settings}}")
    runs = []
    for seed in seeds:
        for name, settings in variants.items():
            if not re.fullmatch(r"[\w+=-][\w.+=-]*", str(name)):
                raise UsageError(
                    f"{where}the variant {name!r} names a folder: letters, digits, ._+=-"
                )
            if not isinstance(settings or {}, dict):
                raise UsageError(f"{where}variant {name}: expected settings, not {settings!r}")
            flat = dict(leaves(settings or {}))
            if own := {"training.seed", "logging.folder"} & set(flat):
                raise UsageError(f"{where}variant {name}: {min(own)} is the sweep's to set")
            folder = out / str(name) / f"seed{seed}"
            options = [f"--config={config}" for config in configs]
            options += [f"--{key}={as_word(value)}" for key, value in flat.items()]
            options += [f"--training.seed={seed}", f"--logging.folder={folder}"]
            try:
                wanted = parse(options).settings
            except UsageError as error:
                raise UsageError(f"{where}variant {name}: {error}") from None
            run = Run(str(name), seed, folder, tuple(options))
            log = run.log()
            if log and log.headers:
                there = log.headers[0].settings
                differ = differences(to_dict(_aimed(wanted, there)), there)
                if differ:
                    raise UsageError(
                        f"{where}{folder} holds a run of other settings ({'; '.join(differ)}): take "
                        f"another --out, or another name for the variant"
                    )
            runs.append(run)
    return runs


def _aimed(wanted: Settings, there: dict[str, Any]) -> Settings:
    """`wanted` without its target where `there`, settings of a run's log, has none: it was for other images."""
    if wanted.training.stop_at_on == "any" or there.get("training", {}).get("stop_at"):
        return wanted
    return without_target(wanted)


def train(run: Run) -> None:
    """Make one run, or the rest of it. Raises RunError if it fails; Ctrl-C stops it first."""
    command = [sys.executable, str(SCRIPT), *run.options, "--resume", "auto"]
    print(f"\n$ {shlex.join(command[1:])}", flush=True)
    if status := run_child(command):
        raise RunError(
            f"{run.folder}: training ended with status {status}; mend it and start the sweep again: "
            f"finished runs are kept"
        )


def table(runs: list[Run]) -> str:
    """A row a variant: top-1 after its last epoch, best first."""
    rows: list[tuple[Spread, list[str]]] = []
    for name in dict.fromkeys(run.name for run in runs):
        logs = [log for run in runs if run.name == name and run.done and (log := run.log())]
        if not logs:
            rows.append((Spread(0.0, None, 0), [name, "0", "", "", ""]))
            continue
        top_1 = spread([score(log.epochs[-1]) for log in logs])
        seconds = spread([log.epochs[-1].elapsed_seconds for log in logs])
        each = " ".join(f"{score(log.epochs[-1]):.2%}"[:-1] for log in logs)
        rows.append((top_1, [name, str(top_1.count), f"{top_1:%}", each, f"{seconds.mean:,.0f}"]))
    rows.sort(key=lambda row: -row[0].mean)
    columns = "variant", "runs", "top-1, % (mean ± s.e.)", "each", "seconds"
    return tabulate([row for _, row in rows], columns, disable_numparse=True)


def main(argv: list[str]) -> int:
    """Make the runs that are missing, then print and write OUT/table.txt."""
    parser = ToolParser("sweep", __doc__)
    parser.add_argument("sweep", type=path_of, metavar="SWEEP.yaml")
    parser.add_argument(
        "--out", type=path_of, required=True, metavar="DIR", help="where the runs go"
    )
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args(argv)
    runs = read_sweep(options.sweep, options.out)
    missing = [] if options.table else [run for run in runs if not run.done]
    exit_when_asked()
    for number, run in enumerate(missing, 1):
        print(f"run {number} of {len(missing)} missing ({len(runs)} in all): {run.folder}")
        train(run)
    text = table(runs)
    print(f"\n{text}")
    if not options.table:
        with atomic_write(options.out / "table.txt", "w") as file:
            file.write(text + "\n")
    return 0

"""What there is to say of runs: results, targets, seeds of one recipe, settings that differ."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ffcv_imnet.config.schema import NOT_OF_THE_RESULT, flatten
from ffcv_imnet.core.errors import RunError
from ffcv_imnet.core.log import LOG, Epoch, Log, Reached, best_of, first_reached, read_log
from ffcv_imnet.core.names import shown

SEED = "training.seed"


@dataclass(frozen=True)
class Run:
    """A run's folder, or one of several logs in a folder; it has one epoch at least."""

    path: Path  # a folder with its log.jsonl, or a log of another name
    log: Log

    @property
    def name(self) -> str:
        """The folder's or the log's name."""
        path = self.path.resolve()
        return path.name if path.is_dir() else path.stem


@dataclass(frozen=True)
class Group:
    """Runs under the same settings and on the same data, the seed aside: what a curve stands for."""

    name: str
    runs: tuple[Run, ...]


def read_run(path: Path) -> Run:
    """The run of a folder or of its log. Raises UsageError, and RunError before the first epoch."""
    log = read_log(path)
    if not log.epochs:
        raise RunError(f"{path}: no epoch has been logged yet")
    return Run(path.parent if path.name == LOG else path, log)


# ---- one run ------------------------------------------------------------------------------------


def target(log: Log) -> float:
    """`training.stop_at` of the run, 0 if it has none."""
    settings = log.headers[-1].settings if log.headers else {}
    return float(settings.get("training", {}).get("stop_at", 0.0))


def reached(log: Log) -> Reached | None:
    """When the target was reached: as the summary says, or, in a run that goes on, from its epochs."""
    if log.summary is not None:
        return log.summary.reached
    return first_reached(log.epochs, target(log))


def best(log: Log) -> tuple[float, int]:
    """The best single-view top-1, of the weights or of their average, and its epoch."""
    top_1, epoch = max((best_of(e)[0], -e.epoch) for e in log.epochs)
    return top_1, -epoch


def origin(log: Log) -> str:
    """Where and from what the run was made."""
    if not log.headers:
        return "no header"
    header = log.headers[-1]
    model = header.settings.get("model", {}).get("arch", "?")
    resumed = f", {len(log.headers) - 1} x resumed" if len(log.headers) > 1 else ""
    return shown(
        f"{model} on {header.device}, {header.precision}, world size {header.world_size}, "
        f"commit {(header.git_commit or 'unknown')[:12]}{resumed}"
    )


def norm_groups(log: Log) -> list[str]:
    """The parameter groups whose norms the log has, in its order; none in earlier logs."""
    keys = [key for epoch in log.epochs for row in epoch.norms or [] for key in row]
    return list(dict.fromkeys(k.removesuffix("_weights") for k in keys if k.endswith("_weights")))


def norm_points(log: Log, group: str, share: bool) -> list[tuple[float, float]]:
    """A group's gradient norm, or with `share` the norm of its update over that of its weights, wherever it is
    above zero: (epoch, value), an epoch's last step at its number, as its accuracy is."""
    points = []
    for epoch in log.epochs:
        rows = epoch.norms or []
        for row in rows:
            value = row.get(f"{group}_gradient", 0.0)
            if share:
                value = row.get(f"{group}_update", 0.0) / (row.get(f"{group}_weights") or math.inf)
            if value > 0:
                steps = rows[-1]["step"] + 1
                points.append((epoch.epoch - 1 + (row["step"] + 1) / steps, value))
    return points


def time_spent(log: Log) -> dict[str, float]:
    """Seconds by what they went to. "other" is start-up, checkpoints, and epochs that were lost to a stop."""
    train = sum(e.train_seconds for e in log.epochs)
    loader = sum(e.loader_seconds for e in log.epochs)
    compiling = sum(e.compile_seconds or 0.0 for e in log.epochs)
    validation = sum(e.val_seconds for e in log.epochs)
    other = log.epochs[-1].elapsed_seconds - train - validation
    # Compiled graphs for validation are made within val_seconds; which part is not recorded.
    step = max(0.0, train - loader - compiling)
    spent = {"step": step, "loader": loader, "compile": compiling, "validation": validation}
    return {**spent, "other": max(0.0, other)}


# ---- several ------------------------------------------------------------------------------------


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Seeds of one recipe together, in the order given; each group under a name of its own."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_recipe(run), []).append(run)
    names: list[str] = []
    for members in found.values():
        name = _common_name(members)
        longer = f"{name} ({members[0].path.resolve().parent.name})"
        numbered = (f"{longer} {number}" for number in itertools.count(2))
        names.append(next(n for n in itertools.chain((name, longer), numbered) if n not in names))
    return [Group(n, tuple(runs)) for n, runs in zip(names, found.values(), strict=True)]


def _recipe(run: Run) -> str:
    """What runs of one group have in common, as text."""
    if not run.log.headers:
        return str(run.path.resolve())
    header = run.log.headers[-1]
    settings = {
        k: v for k, v in flatten(header.settings).items() if k not in (*NOT_OF_THE_RESULT, SEED)
    }
    data = {name: m.get("content_checksum") for name, m in header.manifests.items()}
    # The weights that the run started from, whatever their file is called.
    weights = (run.log.headers[0].weights or {}).get("sha256")
    # Two logs of one seed are the same run twice over, or a run on other hardware: not a spread.
    machine = [
        header.device.replace(", 1 threads", ", 1 thread"),
        header.precision,
        header.world_size,
    ]
    return json.dumps([settings, data, machine, weights], sort_keys=True)


def _common_name(runs: Sequence[Run]) -> str:
    """`rn18_seed` of rn18_seed0, rn18_seed1 as `rn18`."""
    names = [run.name for run in runs]
    if len(names) == 1:
        return names[0]
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    common = "".join(column[0] for column in letters).rstrip("_-. 0123456789")
    for ending in ("seed", "run"):
        common = common.removesuffix(ending).rstrip("_-. ")
    arch = runs[0].log.headers[-1].settings.get("model", {}).get("arch", "runs")
    return common or str(arch)


def differing_settings(groups: Sequence[Group]) -> dict[str, list[str]]:
    """By dotted name, each group's value, of the settings in which the groups differ."""
    flat = [
        flatten(log.headers[-1].settings) if (log := group.runs[0].log).headers else {}
        for group in groups
    ]
    keys = sorted({key for settings in flat for key in settings} - {*NOT_OF_THE_RESULT, SEED})
    values = {key: [_show(settings.get(key)) for settings in flat] for key in keys}
    return {key: shown for key, shown in values.items() if len(set(shown)) > 1}


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return "–".join(_show(v) for v in value)
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Series:
    """One field over the epochs that all runs of a group have: mean and extremes, (epochs,) each."""

    epochs: list[int]
    minutes: list[float]  # mean over the runs, at the end of the epoch
    mean: list[float]
    low: list[float]
    high: list[float]


def series(group: Group, field: str) -> Series | None:
    """`field` of `Epoch` in a group's runs; None if they have not got it."""
    rows: dict[int, list[tuple[Epoch, float]]] = {}
    for run in group.runs:
        for epoch in run.log.epochs:
            if (value := getattr(epoch, field)) is not None:
                rows.setdefault(epoch.epoch, []).append((epoch, float(value)))
    whole = {e: points for e, points in sorted(rows.items()) if len(points) == len(group.runs)}
    if not whole:
        return None
    values = [[value for _, value in points] for points in whole.values()]
    minutes = [statistics.fmean(e.elapsed_seconds / 60 for e, _ in p) for p in whole.values()]
    return Series(
        epochs=list(whole), minutes=minutes, mean=[statistics.fmean(v) for v in values],
        low=[min(v) for v in values], high=[max(v) for v in values],
    )  # fmt: skip


def percent(values: Sequence[float]) -> str:
    """`78.3 %`, or `78.3 % ± 0.4` (standard deviation, n - 1) of several fractions of one."""
    mean = f"{statistics.fmean(values):.1%}".replace("%", " %")
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean

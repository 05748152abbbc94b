"""Compare two recipes, each by its runs over seeds: a table with p-values, and the curves.

python -m ffcv_imnet compare runs/new/*/log.jsonl --against runs/old/*/log.jsonl --target 0.65

The p-value is that of a t-test on the runs' values: paired by seed where both recipes have the same
seeds, else Welch's (unequal variances). With three runs a side it can only find large effects.
A run that keeps averaged weights is evaluated by them (ema_top_1), not by the better of the two.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tabulate import tabulate

from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.log import Log, read_log
from ffcv_imnet.core.names import shown, shown_lines
from ffcv_imnet.core.paths import check_output, path_of
from ffcv_imnet.report.statistics import epochs_to, p_value, score, seconds_to, spread
from ffcv_imnet.tools import ToolParser

BLUE, ORANGE = "#0072b2", "#d55e00"  # of Okabe and Ito's palette


@dataclass(frozen=True)
class Side:
    """The runs of one recipe, in the order of their seeds."""

    name: str
    logs: tuple[Log, ...]

    @property
    def seeds(self) -> list[int | None]:
        """`training.seed` of each run."""
        return [_seed(log) for log in self.logs]

    def values(self, measure: Callable[[Log], float | None]) -> list[float]:
        """One a run, without the runs that have none."""
        return [value for log in self.logs if (value := measure(log)) is not None]


def _seed(log: Log) -> int | None:
    seed = log.headers[0].settings.get("training", {}).get("seed")
    return seed if type(seed) is int else None


def read_side(name: str, paths: list[Path]) -> Side:
    """Raises UsageError for a seed given twice, RunError for a run without header or epochs."""
    logs = {}
    for path in paths:
        log = read_log(path)
        if not log.headers or not log.epochs:
            raise RunError(f"{path}: no epoch has been logged yet")
        seed = _seed(log)
        if seed is None:
            raise RunError(f"{path}: its header does not say training.seed")
        if seed in logs:
            raise UsageError(f"{path}: seed {seed} stands twice among the runs of {name}")
        logs[seed] = log
    return Side(name, tuple(logs[seed] for seed in sorted(logs)))


def warnings(a: Side, b: Side) -> list[str]:
    """What a reader of the table must know: other validation images, runs that did not end."""
    found = []
    evaluated = [
        log.headers[0].manifests.get("val", {}).get("content_checksum")
        for log in (*a.logs, *b.logs)
    ]
    if len(set(evaluated)) > 1:
        found.append(
            "the runs were validated on different images: the difference is not the recipe's"
        )
    for side in (a, b):
        if any(log.epochs[-1].ema_top_1 is not None for log in side.logs):
            found.append(f"{side.name} keeps averaged weights: its top-1 is theirs, ema_top_1")
        for seed, log in zip(side.seeds, side.logs, strict=True):
            if log.summary is None or log.summary.stopped:
                last = log.epochs[-1].epoch
                found.append(
                    f"{side.name}, seed {seed}: the run has not ended; epoch {last} is taken"
                )
    return found


def table(a: Side, b: Side, target: float | None) -> str:
    """Final top-1 and, with a target, what each recipe spent to reach it."""
    last: Callable[[Log], float] = lambda log: score(log.epochs[-1])  # noqa: E731
    measures: list[tuple[str, str, Callable[[Log], float | None]]] = [
        ("final top-1, %", "%", last),
        ("epochs run", ".0f", lambda log: float(len(log.epochs))),
        ("seconds run", ",.0f", lambda log: log.epochs[-1].elapsed_seconds),
    ]
    if target is not None:
        measures += [
            (f"epochs to {target:.2%}", ".2f", lambda log: epochs_to(log, target)),
            (f"seconds to {target:.2%}", ",.0f", lambda log: seconds_to(log, target)),
        ]
    rows = []
    for title, form, measure in measures:
        ours, theirs = a.values(measure), b.values(measure)
        texts = [
            format(spread(values), form)
            if len(values) == len(side.logs)
            else f"reached by {len(values)} of {len(side.logs)}"
            for side, values in ((a, ours), (b, theirs))
        ]
        if len(ours) < len(a.logs) or len(theirs) < len(b.logs):
            rows.append([title, *texts, "", ""])
            continue
        gap = spread(ours).mean - spread(theirs).mean
        gap_text = f"{100 * gap:+.2f}" if form == "%" else format(gap, "+" + form)
        p = p_value(ours, theirs, paired=a.seeds == b.seeds)
        one = min(len(ours), len(theirs)) == 1
        rows.append([title, *texts, gap_text, f"{p:.2g}" if p is not None else "one run" * one])
    columns = "mean ± s.e.", f"{a.name} (n={len(a.logs)})", f"{b.name} (n={len(b.logs)})"
    test = "p, paired by seed" if a.seeds == b.seeds else "p, Welch"
    return tabulate(rows, [*columns, "difference", test], disable_numparse=True)


def plot(a: Side, b: Side, target: float | None, path: Path) -> None:
    """Top-1 against epochs and against minutes: every run thin, the mean thick. A PNG at `path`."""
    figure = Figure(figsize=(10, 4.2), layout="constrained", facecolor="white")
    by_epoch, by_minute = figure.subplots(1, 2, sharey=True)
    for side, colour in ((a, BLUE), (b, ORANGE)):
        runs = [[score(epoch) for epoch in log.epochs] for log in side.logs]
        minutes = [[epoch.elapsed_seconds / 60 for epoch in log.epochs] for log in side.logs]
        for values, times in zip(runs, minutes, strict=True):
            by_epoch.plot(range(1, len(values) + 1), values, color=colour, alpha=0.3, linewidth=1)
            by_minute.plot(times, values, color=colour, alpha=0.3, linewidth=1)
        length = min(map(len, runs))
        mean = [spread([values[i] for values in runs]).mean for i in range(length)]
        when = [spread([times[i] for times in minutes]).mean for i in range(length)]
        marker = "o" if length < 40 else None
        label = f"{side.name} (n={len(runs)})"
        by_epoch.plot(range(1, length + 1), mean, color=colour, linewidth=2.2, marker=marker,
                      markersize=4, label=label)  # fmt: skip
        by_minute.plot(when, mean, color=colour, linewidth=2.2, marker=marker, markersize=4)
    for axes, unit in ((by_epoch, "epochs"), (by_minute, "minutes")):
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
        axes.grid(True, color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if target is not None:
            axes.axhline(target, color="#8a8a8a", linewidth=1, linestyle=(0, (4, 3)))
    by_epoch.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    by_epoch.set_title("Validation top-1, single view", loc="left", fontsize=11)
    by_epoch.legend(loc="lower right", frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def main(argv: list[str]) -> int:
    """Print the table and write the image."""
    parser = ToolParser("compare", __doc__)
    parser.add_argument("runs", nargs="+", type=path_of, metavar="RUN", help="folders or logs")
    parser.add_argument("--against", nargs="+", type=path_of, required=True, metavar="RUN")
    parser.add_argument("--target", type=float, metavar="TOP_1", help="a fraction of one")
    parser.add_argument("--names", nargs=2, default=("new", "old"), metavar=("NEW", "OLD"))
    parser.add_argument("--out", type=path_of, metavar="FILE.png", help="the curves")
    options = parser.parse_args(argv)
    if options.target is not None and not 0 < options.target < 1:
        raise UsageError(f"--target {options.target:g} must lie between 0 and 1, such as 0.65")
    check_output("--out", options.out, ".png")
    new = read_side(options.names[0], options.runs)
    old = read_side(options.names[1], options.against)
    print(shown_lines(table(new, old, options.target)))
    for words in warnings(new, old):
        print(f"warning: {shown(words)}", file=sys.stderr)
    if options.out is not None:
        plot(new, old, options.target, options.out)
        print(f"curves: {options.out}")
    return 0

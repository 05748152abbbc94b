"""Show runs: their epochs as a table, their curves as a PNG, all there is to see as a page.

python -m ffcv_imnet report RUN                       writes RUN/curve.png
python -m ffcv_imnet report RUN RUN --out both.png    lays the curves over each other
python -m ffcv_imnet report RUN... --out report.html  one page, readable without a network

RUN is a run's folder or a log; a run that still goes on will do. On the page runs that differ
in nothing but the seed are one curve with a band. Where best.pt and the validation data of a run are
at hand, the best run of each curve is evaluated: its classes, confusions and wrong predictions.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tabulate import tabulate

from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.log import Log
from ffcv_imnet.core.paths import path_of
from ffcv_imnet.report.axes import log_scale
from ffcv_imnet.report.runs import (
    Group,
    best,
    group_runs,
    norm_groups,
    norm_points,
    origin,
    reached,
    read_run,
    target,
)
from ffcv_imnet.tools import ToolParser

if TYPE_CHECKING:
    from ffcv_imnet.report.evaluation import Evaluated

# Kept apart by colour and by pattern: the plain weights' curve is the thick one.
SCORES = {
    "top_1": "top-1",
    "ema_top_1": "top-1, EMA",
    "tta_top_1": "top-1, flip TTA",
    "ema_tta_top_1": "top-1, EMA + flip TTA",
}
PATTERNS = dict(zip(SCORES, ("-", "--", ":", "-."), strict=True))
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
INK, FAINT = "#333333", "#8a8a8a"


# ---- the table ----------------------------------------------------------------------------------


def table(log: Log) -> str:
    """One row an epoch; the columns of EMA, TTA and skipped images only where some epoch has them."""
    columns: dict[str, str] = {
        "epoch": "d", "resolution": "d", "lr": ".4f", "train_loss": ".3f", "val_loss": ".3f",
        "top_1": ".4f", "top_5": ".4f", "ema_top_1": ".4f", "tta_top_1": ".4f",
        "ema_tta_top_1": ".4f", "images_per_second": ",.0f", "elapsed_seconds": ",.0f",
        "skipped": ",d", "val_skipped": ",d",
    }  # fmt: skip
    nothing = {"skipped": (None, 0), "val_skipped": (None, 0)}
    shown = [
        c for c in columns
        if any(getattr(epoch, c) not in nothing.get(c, (None,)) for epoch in log.epochs)
    ]  # fmt: skip
    titles = {"resolution": "px", "images_per_second": "img/s", "elapsed_seconds": "elapsed s"}
    rows = [
        ["" if (v := getattr(epoch, c)) is None else format(v, columns[c]) for c in shown]
        for epoch in log.epochs
    ]
    headers = [titles.get(c, c) for c in shown]
    return tabulate(rows, headers, disable_numparse=True, stralign="right")


def verdict(log: Log) -> str:
    """What came of the run, in a sentence or two."""
    top_1, epoch = best(log)
    state = "finished" if log.summary and not log.summary.stopped else "not finished"
    text = f"best top-1 {top_1:.4f} after epoch {epoch}; {len(log.epochs)} epochs, {state}."
    if hit := reached(log):
        return (
            f"{text} Target {target(log):g} reached: {hit.by} {hit.top_1:.4f} after epoch {hit.epoch},"
            f" {hit.elapsed_seconds:,.0f} s."
        )
    return f"{text} Target {target(log):g} not reached." if target(log) else f"{text} No target."


# ---- the image --------------------------------------------------------------------------------


def plot(logs: dict[str, Log], path: Path) -> None:
    """Top-1, loss, the plan (resolution, learning rate) and where there are some the norms, over the epochs,
    as a PNG at `path`."""
    has_norms = any(norm_groups(log) for log in logs.values())
    heights = (5, 4, 3, 3, 3) if has_norms else (5, 4, 3)
    size = 8, 0.71 * sum(heights)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    top, loss, plan, *norms = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axes in (top, loss, plan, *norms):
        _dress(axes)
    if has_norms:
        _plot_norms(logs, *norms)
    rate = plan.twinx()
    _dress(rate)
    rate.grid(False)
    for (name, log), colour in zip(logs.items(), _colours(len(logs)), strict=True):
        _plot_scores(top, log, colour, name if len(logs) > 1 else "")
        _plot_losses(loss, log, colour)
        _plot_plan(plan, rate, log, colour)
    for goal in sorted({target(log) for log in logs.values()} - {0.0}):
        _plot_target(top, goal)
    _name_axes(figure, top, loss, plan, rate)
    sides = sorted({epoch.resolution for log in logs.values() for epoch in log.epochs})
    if len(sides) <= 8:
        plan.set_yticks(sides)
    plan.margins(y=0.15)
    if len(logs) == 1:
        name, log = next(iter(logs.items()))
        figure.suptitle(
            f"{Path(name).name}\n{origin(log)}", fontsize=10, color=INK, x=0.01, ha="left"
        )
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _plot_scores(axes: Axes, log: Log, colour: str, name: str) -> None:
    for field, label in SCORES.items():
        points = [(e.epoch, v) for e in log.epochs if (v := getattr(e, field)) is not None]
        if not points:
            continue
        plain = field == "top_1"
        label = f"{label}, best {max(v for _, v in points):.1%}"
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle=PATTERNS[field],
            linewidth=2.2 if plain else 1.4,
            marker="o" if plain and len(points) < 40 else None,
            markersize=4,
            label=f"{name}: {label}" if name else label,
        )


def _plot_target(axes: Axes, goal: float) -> None:
    axes.axhline(goal, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"target {goal:.0%}", (0, goal), xycoords=("axes fraction", "data"), fontsize=9,
        color=FAINT, va="bottom", xytext=(4, 2), textcoords="offset points",
    )  # fmt: skip


def _plot_losses(axes: Axes, log: Log, colour: str) -> None:
    epochs = [e.epoch for e in log.epochs]
    marker = "o" if len(epochs) < 40 else None
    axes.plot(epochs, [e.val_loss for e in log.epochs], color=colour, linewidth=2.2, marker=marker,
              markersize=4)  # fmt: skip
    axes.plot(epochs, [e.train_loss for e in log.epochs], color=colour, linewidth=1.4,
              linestyle="--")  # fmt: skip


def _plot_plan(plan: Axes, rate: Axes, log: Log, colour: str) -> None:
    epochs = [e.epoch for e in log.epochs]
    plan.step(epochs, [e.resolution for e in log.epochs], where="mid", color=colour, linewidth=2.2)
    rate.plot(epochs, [e.lr for e in log.epochs], color=colour, linewidth=1.4, linestyle="--")


def _plot_norms(logs: dict[str, Log], gradient: Axes, share: Axes) -> None:
    """At each look; a group of parameters has a pattern, a run its colour."""
    groups = list(dict.fromkeys(group for log in logs.values() for group in norm_groups(log)))
    patterns = dict(zip(groups, PATTERNS.values(), strict=False))
    for log, colour in zip(logs.values(), _colours(len(logs)), strict=True):
        for group in norm_groups(log):
            for axes, of_update in ((gradient, False), (share, True)):
                points = norm_points(log, group, of_update)
                dots = "o" if len(points) < 40 else None
                axes.plot(*zip(*points, strict=True), color=colour, linestyle=patterns[group],
                          linewidth=1.4, marker=dots, markersize=3)  # fmt: skip
    for group, look in patterns.items():
        gradient.plot([], [], color=INK, linewidth=1.4, linestyle=look, label=group)
    gradient.set_title("Gradient's norm", loc="left", fontsize=11, color=INK)
    share.set_title("Update's norm over that of the weights", loc="left", fontsize=11, color=INK)
    share.set_xlabel("epoch; its last step at its number", fontsize=9, color=INK)
    gradient.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, frameon=False,
                    ncols=len(patterns))  # fmt: skip
    for axes in (gradient, share):
        log_scale(axes)


def _name_axes(figure: Figure, top: Axes, loss: Axes, plan: Axes, rate: Axes) -> None:
    """Titles, legends and scales; curves of several runs share a colour per run."""
    low, high = top.get_ylim()
    top.set_ylim(max(0.0, low), min(1.0, high + 0.08 * (high - low)) if high < 1 else 1.02)
    top.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    top.set_title("Validation accuracy", loc="left", fontsize=11, color=INK)
    top.legend(loc="lower right", fontsize=9, frameon=False)
    loss.set_title("Loss", loc="left", fontsize=11, color=INK)
    kinds = [
        Line2D([], [], color=INK, linewidth=2.2, label="validation (cross-entropy)"),
        Line2D([], [], color=INK, linewidth=1.4, linestyle="--", label="training objective"),
    ]
    loss.legend(handles=kinds, loc="upper right", fontsize=9, frameon=False)
    plan.set_title("Plan", loc="left", fontsize=11, color=INK)
    plan.set_ylabel("resolution, px  (solid)", fontsize=9, color=INK)
    if plan.get_subplotspec().is_last_row():  # type: ignore[union-attr]
        plan.set_xlabel("epoch", fontsize=9, color=INK)
    plan.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate.set_ylabel("lr at the epoch's end  (dashed)", fontsize=9, color=INK)
    rate.set_ylim(bottom=0)
    figure.align_ylabels([plan])


# ---- the page -----------------------------------------------------------------------------------


def write_report(groups: list[Group], out: Path, png: Path | None, shown: int) -> None:
    """The page at `out`, and each of its charts as a PNG in the folder `png`."""
    from ffcv_imnet.report import charts, html  # torch, for evaluating; the table needs none

    evaluated = [_evaluate(group, shown) for group in groups]
    tables = [
        (f"{group.name}: {run.name}" if len(group.runs) > 1 else group.name, table(run.log))
        for group in groups
        for run in group.runs
    ]
    page = html.write_page(groups, evaluated, tables)
    with atomic_write(out, "w") as file:
        file.write(page)
    print(f"page: {out} ({len(page) / 1e6:.1f} MB)")
    if png is not None:
        drawn = [*html.groups_curves(groups), *html.groups_time(groups), *html.groups_norms(groups)]
        drawn += html.evaluated_charts(groups, evaluated)
        for number, chart in enumerate(drawn):
            with atomic_write(png / f"{number}_{chart.name}.png") as file:
                file.write(charts.to_png(chart))
        print(f"charts: {len(drawn)} PNGs in {png}")


def _evaluate(group: Group, shown: int) -> "Evaluated | str":
    """The group's best run evaluated, or why it cannot be."""
    from ffcv_imnet.report.evaluation import evaluate_run

    if not shown:
        return "left out by --images 0"
    try:
        return evaluate_run(max(group.runs, key=lambda run: best(run.log)[0]), shown)
    except (UsageError, RunError) as error:
        print(f"{group.name}: not evaluated: {error}")
        return str(error)


# ---- the command --------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Print each run's table and write the image or the page."""
    parser = ToolParser("report", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=path_of, metavar="RUN", help="a run's folder or log"
    )
    parser.add_argument(
        "--out",
        type=path_of,
        metavar="FILE",
        help=".png or .html; default: RUN/curve.png, or LOG.png",
    )
    parser.add_argument("--png", type=path_of, metavar="DIR", help="the page's charts as PNGs too")
    parser.add_argument("--images", type=int, default=24, metavar="N",
                        help="wrong predictions shown; 0: evaluate nothing (default: %(default)s)")  # fmt: skip
    parser.add_former("--photographs", "images", type=int)
    options = parser.parse_args(argv)
    if options.images < 0:
        raise UsageError("--images is 0 or more")
    out = _output(options.out, options.png, options.runs)

    runs = [read_run(path) for path in options.runs]
    for run in runs:
        print(f"{run.path}: {origin(run.log)}\n\n{table(run.log)}\n\n{verdict(run.log)}")
    only = runs[0].path
    out = out or (only / "curve.png" if only.is_dir() else only.with_suffix(".png"))
    if out.suffix.lower() == ".html":
        write_report(group_runs(runs), out, options.png, options.images)
        return 0
    plot({str(run.path): run.log for run in runs}, out)
    print(f"curve: {out}")
    return 0


def _output(out: Path | None, png: Path | None, runs: list[Path]) -> Path | None:
    """`--out`, if it can be written. Raises UsageError."""
    if out is None and len(runs) > 1:
        raise UsageError("several runs make one image: name it with --out FILE.png or .html")
    good = out is None or (out.suffix.lower() in (".png", ".html") and out.parent.is_dir())
    if not good:
        raise UsageError(f"--out {out}: name a .png or .html file in a folder that exists")
    if png is not None and (out is None or out.suffix.lower() != ".html"):
        raise UsageError("--png writes the charts of the page: name it with --out FILE.html")
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
    return out

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

from tabulate import tabulate

from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.log import Log
from ffcv_imnet.core.names import number_of, shown_lines
from ffcv_imnet.core.paths import check_output, path_of
from ffcv_imnet.report import charts
from ffcv_imnet.report.runs import Group, best, group_runs, origin, reached, read_run, target
from ffcv_imnet.tools import ToolParser

if TYPE_CHECKING:
    from ffcv_imnet.report.evaluation import Evaluated

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
    text = f"best top-1 {top_1:.4f} after epoch {epoch}; {number_of(len(log.epochs), 'epoch')}, {state}."
    if hit := reached(log):
        return (
            f"{text} Target {target(log):g} reached: {hit.by} {hit.top_1:.4f} after epoch {hit.epoch},"
            f" {hit.elapsed_seconds:,.0f} s."
        )
    return f"{text} Target {target(log):g} not reached." if target(log) else f"{text} No target."


# ---- the page -----------------------------------------------------------------------------------


def write_report(groups: list[Group], out: Path, png: Path | None, shown: int) -> None:
    """The page at `out`, and each of its charts as a PNG in the folder `png`."""
    from ffcv_imnet.report import html  # torch, for evaluating; the table needs none

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
        said = f"{run.path}: {origin(run.log)}\n\n{table(run.log)}\n\n{verdict(run.log)}"
        print(shown_lines(said))
    only = runs[0].path
    out = out or (only / "curve.png" if only.is_dir() else only.with_suffix(".png"))
    if out.suffix.lower() == ".html":
        write_report(group_runs(runs), out, options.png, options.images)
        return 0
    of_one = [Group(run.name, (run,)) for run in runs]  # a colour a run
    with atomic_write(out) as file:
        file.write(charts.to_png(charts.curves(of_one, "epochs", alone=True)))
    print(f"curve: {out}")
    return 0


def _output(out: Path | None, png: Path | None, runs: list[Path]) -> Path | None:
    """`--out`, if it can be written. Raises UsageError."""
    if out is None and len(runs) > 1:
        raise UsageError("several runs make one image: name it with --out FILE.png or .html")
    check_output("--out", out, ".png", ".html")
    if png is not None and (out is None or out.suffix.lower() != ".html"):
        raise UsageError("--png writes the charts of the page: name it with --out FILE.html")
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
    return out

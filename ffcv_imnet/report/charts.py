"""Charts as SVG for the page and as PNG for slides, drawn by matplotlib.

In the SVG every colour is a CSS variable and every text a text in the page's font, so one drawing
serves light and dark. Each chart is drawn for two widths, not scaled: letters stay legible on a phone.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import cycle
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogFormatter,
    LogLocator,
    MaxNLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from ffcv_imnet.core.names import shown as on_one_line
from ffcv_imnet.core.units import duration
from ffcv_imnet.report.runs import (
    Group,
    Series,
    best,
    norm_groups,
    norm_points,
    origin,
    reached,
    series,
    target,
    time_spent,
)

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
WIDTHS = {"wide": 560, "narrow": 350}  # CSS px; one SVG unit is one of them
PNG_DPI = 144
PARTS = ("step", "loader", "compile", "validation", "other")
DASHED, DOTTED, DASH_DOTTED = (0, (4, 2)), (0, (1, 1.5)), (0, (4, 2, 1, 2))
SCORES = {  # an epoch's accuracies: the line's pattern, and what a legend and a tooltip say of it
    "top_1": ("-", "", "top-1"),
    "ema_top_1": (DASHED, "dashed: averaged weights", "top-1 of the averaged weights"),
    "tta_top_1": (DOTTED, "dotted: with the mirror image", "top-1 with the mirror image"),
    "ema_tta_top_1": (DASH_DOTTED, "dash-dotted: both", "top-1 of the averaged weights with it"),
}


@dataclass(frozen=True)
class Palette:
    """Colours by what they are for; `series` are told apart by the colour-blind too."""

    ink: str
    muted: str
    grid: str
    surface: str
    series: tuple[str, ...]
    parts: tuple[str, ...]  # of `PARTS`; none of them a run's

    def variables(self) -> dict[str, str]:
        """CSS variable -> colour."""
        plain = {f"--{f.name}": getattr(self, f.name) for f in fields(self)[:4]}
        plain |= {f"--s{i}": colour for i, colour in enumerate(self.series)}
        return plain | {f"--p{i}": colour for i, colour in enumerate(self.parts)}


LIGHT = Palette(
    "#1b1e23", "#667080", "#e6e9ed", "#ffffff",
    ("#2b63d9", "#d1570b", "#0b8a6a", "#a8418f", "#8a6a00", "#4a6572"),
    ("#46536a", "#b47700", "#7d55d8", "#21868a", "#8d96a3"),
)  # fmt: skip
DARK = Palette(
    "#e8eaee", "#98a2b0", "#2b313a", "#14171c",
    ("#7aa7ff", "#ff9d5c", "#46c9a4", "#e58bd0", "#d9b64a", "#9fb6c3"),
    ("#a9b4c6", "#e5b94f", "#b79bff", "#5cc3c6", "#6f7988"),
)  # fmt: skip
# Hexadecimal values that nothing else has: they become `var(--name)` in the SVG.
STAND_INS = Palette(
    "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04",
    tuple(f"#0a0c0{i}" for i in range(6)), tuple(f"#0a0d0{i}" for i in range(5)),
)  # fmt: skip
VARIABLE_OF = {colour: name for name, colour in STAND_INS.variables().items()}


@dataclass(frozen=True)
class Chart:
    """A drawing by name.

    `draw(figure, palette, narrow)` fills an empty figure and returns tooltips: by the gid of a
    scatter, a text for each of its points.
    """

    name: str
    description: str  # for those who cannot see it
    heights: tuple[int, int]  # CSS px, wide and narrow
    draw: Callable[[Figure, Palette, bool], dict[str, list[str]]]


def to_svg(chart: Chart, size: str, prefix: str) -> str:
    """One of the two `WIDTHS` as an SVG element for an HTML page; its ids begin with `prefix`."""
    text, tips = _render(chart, size, STAND_INS, "svg")
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(text)
    for child in root.findall(f"{{{SVG}}}metadata"):
        root.remove(child)
    for gid, lines in tips.items():
        _add_tips(root, gid, lines)
    root.attrib.pop("height")
    root.attrib |= {"role": "img", "aria-label": chart.description, "class": size, "width": "100%"}
    out = ElementTree.tostring(root, encoding="unicode")
    out = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", out)
    return re.sub("#0a0[bcd]0[0-9]", lambda match: f"var({VARIABLE_OF[match[0]]})", out)


def to_png(chart: Chart) -> bytes:
    """The wide one in the light theme's colours."""
    data, _ = _render(chart, "wide", LIGHT, "png")
    return data


def _render(
    chart: Chart, size: str, palette: Palette, kind: str
) -> tuple[bytes, dict[str, list[str]]]:
    width, height = WIDTHS[size], chart.heights[list(WIDTHS).index(size)]
    plain = {"metadata": dict.fromkeys(("Creator", "Date", "Format", "Type"))}
    look = {"dpi": PNG_DPI, "facecolor": palette.surface}
    with mpl.rc_context(_style(palette)):  # type: ignore[arg-type]
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.06)  # type: ignore[union-attr, call-arg]
        tips = chart.draw(figure, palette, size == "narrow")
        buffer = io.BytesIO()
        how: dict[str, Any] = plain if kind == "svg" else look
        figure.savefig(buffer, format=kind, **how)
    return buffer.getvalue(), tips


def _style(palette: Palette) -> dict[str, Any]:
    ink, muted, grid = palette.ink, palette.muted, palette.grid
    return {
        # Text stays text, and a dollar in a class's name is a dollar.
        "svg.fonttype": "none", "svg.hashsalt": "ffcv_imnet", "text.parse_math": False,
        "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlepad": 9,
        "axes.titlelocation": "left", "axes.titlecolor": ink, "axes.labelcolor": muted,
        "text.color": ink, "xtick.color": muted, "ytick.color": muted, "xtick.labelcolor": muted,
        "axes.edgecolor": grid, "grid.color": grid, "axes.axisbelow": True,
        "axes.facecolor": "none", "figure.facecolor": "none", "axes.spines.top": False,
        "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 0,
        "ytick.major.size": 0, "lines.solid_capstyle": "round",
    }  # fmt: skip


def _add_tips(root: ElementTree.Element, gid: str, lines: list[str]) -> None:
    group = root.find(f".//{{{SVG}}}g[@id='{gid}']")
    if group is None:
        return
    group.attrib["class"] = "tips"
    for use, line in zip(group.iter(f"{{{SVG}}}use"), lines, strict=True):
        ElementTree.SubElement(use, f"{{{SVG}}}title").text = line


# ---- accuracy, loss and plan --------------------------------------------------------------------


def curves(groups: Sequence[Group], against: str, alone: bool = False) -> Chart:
    """Top-1, loss, resolution and learning rate over `against`: "epochs" or "minutes".

    `alone`: with all that a page would say of them: names, origin, and norms where there are some.
    """
    of_all = norm_parts(groups) if alone else []
    ratios = (10, 7, 2.4, 2.4, *((6, 6) if of_all else ()))

    def draw(figure: Figure, palette: Palette, narrow: bool) -> dict[str, list[str]]:
        top, loss, side, rate, *of_norms = every = figure.subplots(
            len(ratios), 1, sharex=True, height_ratios=ratios
        )
        tips: dict[str, list[str]] = {}
        for number, (group, colour) in enumerate(_coloured(groups, palette)):
            tips |= _accuracy(top, group, against, colour, "" if alone else f"top{number}")
            _line(loss, group, "val_loss", against, colour)
            _line(loss, group, "train_loss", against, colour, DASHED, 1.6)
            _plan(side, rate, group, against, colour)
        _targets(top, groups, against, palette)
        notes = [s[1] for field, s in SCORES.items() if any(series(g, field) for g in groups)]
        _title(top, "Top-1 accuracy", "; ".join(filter(None, notes)), palette)
        _title(loss, "Loss", "validation; dashed: training objective", palette)
        _title(side, "Resolution, px", "", palette)
        _title(rate, "Learning rate", "at the epoch's end", palette)
        top.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        sides = sorted({e.resolution for g in groups for run in g.runs for e in run.log.epochs})
        side.set_yticks(sides if len(sides) <= 3 else [sides[0], sides[-1]])
        side.margins(y=0.3)
        rate.set_ylim(0, None)
        rate.margins(y=0.2)
        rate.yaxis.set_major_locator(MaxNLocator(2))
        if of_all:
            looks = dict(zip(of_all, cycle(score[0] for score in SCORES.values()), strict=False))
            _norm_panels(of_norms, groups, looks, palette)
        if alone:
            _head(figure, top, groups, palette)
        every[-1].set_xlabel(against if against == "minutes" else "epoch, counted from 0")
        if against == "epochs":
            every[-1].xaxis.set_major_locator(MaxNLocator(6 if narrow else 10, integer=True))
        for axes in every:
            axes.grid(True, axis="y")
            axes.tick_params(axis="x", length=0)
        return tips

    about = f"Top-1 accuracy, loss, resolution and learning rate against {against}"
    more = (60 + 18 * len(groups) if alone else 0) + (320 if of_all else 0)
    return Chart(f"curves_{against}", about, (590 + more, 550 + more), draw)


def _coloured(groups: Sequence[Group], palette: Palette) -> "zip[tuple[Group, str]]":
    return zip(groups, cycle(palette.series), strict=False)


def _x(line: Series, against: str) -> list[float]:
    return line.minutes if against == "minutes" else [float(e) for e in line.epochs]


def _line(
    axes: Axes, group: Group, field: str, against: str, colour: str, pattern: Any = "-",
    width: float = 2.2,
) -> Series | None:  # fmt: skip
    """A group's mean, with a band from its lowest to its highest run; None where no run has the field."""
    line = series(group, field)
    if line is not None:
        x = _x(line, against)
        if len(group.runs) > 1:
            axes.fill_between(x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        look = _dots(len(x), 3.5) if pattern == "-" else {}
        axes.plot(x, line.mean, color=colour, linestyle=pattern, linewidth=width, **look)
    return line


def _accuracy(
    axes: Axes, group: Group, against: str, colour: str, gid: str
) -> dict[str, list[str]]:
    """Tooltips for points that are invisible in a page, under ids that begin with `gid`; none without."""
    tips: dict[str, list[str]] = {}
    for field, (pattern, _, what) in SCORES.items():
        line = _line(axes, group, field, against, colour, pattern)
        if line is not None and gid:
            name = f"{gid}_{field}_{against}"
            axes.scatter(_x(line, against), line.mean, s=90, color=colour, gid=name, zorder=6)
            tips[name] = [_tip(group, what, line, i) for i in range(len(line.epochs))]
    return tips


def _tip(group: Group, what: str, line: Series, i: int) -> str:
    band = f" ({line.low[i]:.1%} to {line.high[i]:.1%})" if len(group.runs) > 1 else ""
    when = duration(60 * line.minutes[i])
    return f"{group.name}, epoch {line.epochs[i]}, {when}: {what} {line.mean[i]:.2%}{band}"


def _dots(count: int, size: float) -> dict[str, Any]:
    """Points as dots while they can be told apart."""
    return {"marker": "o", "markersize": size} if count <= 32 else {}


def _plan(side: Axes, rate: Axes, group: Group, against: str, colour: str) -> None:
    resolution, lr = series(group, "resolution"), series(group, "lr")
    assert resolution is not None and lr is not None  # every epoch has them
    x, sides = _x(lr, against), resolution.mean
    rate.plot(x, lr.mean, color=colour, linewidth=1.8)
    if against == "epochs":
        side.step(x, sides, where="mid", color=colour, linewidth=1.8)
    else:  # an epoch lasts from the end of the one before it to its own
        side.step([0.0, *x], [sides[0], *sides], where="pre", color=colour, linewidth=1.8)


def _head(figure: Figure, top: Axes, groups: Sequence[Group], palette: Palette) -> None:
    """What the image is of: the runs' names, each with its best top-1, and one's origin."""
    for group, colour in _coloured(groups, palette):
        top_1 = max(best(run.log)[0] for run in group.runs)
        top.plot([], [], color=colour, linewidth=2.2, label=f"{group.name}: best {top_1:.1%}")
    of_one = origin(groups[0].runs[0].log) if len(groups) == 1 else None
    figure.legend(loc="outside upper left", title=of_one, fontsize=10, title_fontsize=9,
                  alignment="left", frameon=False)  # fmt: skip


def _targets(axes: Axes, groups: Sequence[Group], against: str, palette: Palette) -> None:
    """The line, and a ring where a run crossed it: on its curve, or on the line under a band."""
    for goal in sorted({target(run.log) for g in groups for run in g.runs} - {0.0}):
        axes.axhline(goal, color=palette.muted, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        axes.annotate(
            f"target {100 * goal:g} %", (0, goal), xycoords=("axes fraction", "data"),
            color=palette.muted, va="bottom", xytext=(2, 2), textcoords="offset points", fontsize=10,
        )  # fmt: skip
    for group, colour in _coloured(groups, palette):
        for hit in (hit for run in group.runs if (hit := reached(run.log))):
            x = hit.elapsed_seconds / 60 if against == "minutes" else hit.epoch
            y = hit.top_1 if len(group.runs) == 1 else target(group.runs[0].log)
            axes.plot(
                [x], [y], "o", markersize=7, markerfacecolor=palette.surface,
                markeredgecolor=colour, markeredgewidth=2, zorder=5,
            )  # fmt: skip


def _title(axes: Axes, title: str, note: str, palette: Palette) -> None:
    drawn = axes.set_title(title)
    if note:
        axes.annotate(
            note, (1, 0.5), xycoords=drawn, xytext=(8, 0), textcoords="offset points",
            va="center", color=palette.muted, fontsize=10,
        )  # fmt: skip


# ---- time ---------------------------------------------------------------------------------------


def throughput(groups: Sequence[Group]) -> Chart:
    """Training images a second in each epoch."""

    def draw(figure: Figure, palette: Palette, narrow: bool) -> dict[str, list[str]]:
        axes = figure.subplots()
        tips = {}
        for number, (group, colour) in enumerate(_coloured(groups, palette)):
            line = _line(axes, group, "images_per_second", "epochs", colour)
            assert line is not None  # every epoch has it
            axes.scatter(line.epochs, line.mean, s=90, color=colour, gid=f"rate{number}", zorder=6)
            tips[f"rate{number}"] = [
                f"{group.name}, epoch {e}: {v:,.0f} images/s"
                for e, v in zip(line.epochs, line.mean, strict=True)
            ]
        axes.set_ylim(0, None)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(6 if narrow else 10, integer=True))
        axes.set_xlabel("epoch, counted from 0")
        axes.grid(True, axis="y")
        _title(axes, "Throughput", "training images/s", palette)
        return tips

    return Chart("throughput", "Training images a second in each epoch", (240, 220), draw)


def norm_parts(groups: Sequence[Group]) -> list[str]:
    """The parameter groups whose norms some log has; see `runs.norm_groups`."""
    return list(dict.fromkeys(part for g in groups for part in norm_groups(g.runs[0].log)))


def norms(groups: Sequence[Group], part: str) -> Chart:
    """The norms of a parameter group's gradient and relative update at each look, of the first runs."""

    def draw(figure: Figure, palette: Palette, narrow: bool) -> dict[str, list[str]]:
        gradient, share = both = figure.subplots(2, 1, sharex=True)
        _norm_panels(both, groups, {part: "-"}, palette)
        share.set_xlabel("epoch, counted from 0; its last step at its number")
        share.xaxis.set_major_locator(MaxNLocator(6 if narrow else 10, integer=True))
        for axes in (gradient, share):
            axes.grid(True, axis="y")
            axes.tick_params(axis="x", length=0)
        return {}

    return Chart(f"norms_{part}", f"Norms of the gradient and update of {part}", (360, 340), draw)


def _norm_panels(
    panels: Sequence[Axes], groups: Sequence[Group], looks: dict[str, Any], palette: Palette
) -> None:
    """A colour a run, a pattern a parameter group of `looks`; logarithmic, with plain numbers, for powers need
    mathematical text, which labels here do not have."""
    gradient, share = panels
    for group, colour in _coloured(groups, palette):
        for part, look in looks.items():
            for axes, of_update in ((gradient, False), (share, True)):
                if points := norm_points(group.runs[0].log, part, of_update):
                    axes.plot(*zip(*points, strict=True), color=colour, linestyle=look,
                              linewidth=1.6, **_dots(len(points), 3))  # fmt: skip
    parts = ", ".join(looks)
    _title(gradient, f"Gradient of {parts}", "norm", palette)
    _title(share, f"Update of {parts}", "norm, over that of the weights", palette)
    for part, look in looks.items():  # for a legend
        share.plot([], [], color=palette.ink, linewidth=1.6, linestyle=look, label=part)
    for axes in panels:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.4)))


def where_time_went(groups: Sequence[Group]) -> Chart:
    """Shares of the elapsed time, a bar a group (mean of its runs)."""
    spent = [[time_spent(run.log) for run in group.runs] for group in groups]
    means = [{p: sum(s[p] for s in runs) / len(runs) for p in PARTS} for runs in spent]
    several = any(len(group.runs) > 1 for group in groups)

    def draw(figure: Figure, palette: Palette, narrow: bool) -> dict[str, list[str]]:
        axes = figure.subplots()
        for row, (group, parts) in enumerate(zip(groups, means, strict=True)):
            whole, left = sum(parts.values()) or 1.0, 0.0
            name = _cut(group.name, 24 if narrow else 40)
            axes.text(0, row - 0.36, f"{name}, {duration(whole)}", va="bottom", fontsize=10)
            for colour, part in zip(palette.parts, PARTS, strict=True):
                share = parts[part] / whole
                axes.barh(row, share, left=left, height=0.6, color=colour,
                          edgecolor=palette.surface, linewidth=1)  # fmt: skip
                if share >= (0.12 if narrow else 0.08):
                    axes.text(left + share / 2, row, f"{100 * share:.0f} %", ha="center",
                              va="center", fontsize=10, color=palette.surface)  # fmt: skip
                left += share
        axes.set(xlim=(0, 1), ylim=(len(groups) - 0.6, -0.8))
        axes.tick_params(labelbottom=False, labelleft=False)
        axes.spines[:].set_visible(False)
        _title(axes, "Where the time went", "mean of the seeds" if several else "", palette)
        return {}

    height = 36 + 56 * len(groups)
    return Chart("time", "Shares of the elapsed time", (height, height), draw)


def _cut(text: str, length: int) -> str:
    text = on_one_line(text)
    return text if len(text) <= length else text[: length - 1] + "…"


# ---- classes ------------------------------------------------------------------------------------


def class_bars(
    names: Sequence[str], scores: Sequence[Sequence[float]], colours: Sequence[int], shown: int
) -> Chart:
    """Top-1 of single classes, the worst of the first group first.

    Args:
        names: of all classes.
        scores: for each group, each class's top-1.
        colours: each group's number.
        shown: the number of classes drawn.
    """
    order = sorted(range(len(names)), key=lambda i: (scores[0][i], i))[:shown]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> dict[str, list[str]]:
        axes = figure.subplots()
        tips, thick = {}, 0.7 / len(scores)
        for number, values in enumerate(scores):
            rows = [row + (number - (len(scores) - 1) / 2) * thick for row in range(len(order))]
            lengths = [values[i] for i in order]
            colour = palette.series[colours[number] % len(palette.series)]
            axes.barh(rows, lengths, height=thick * 0.9, color=colour)
            if len(scores) == 1:
                for row, value in zip(rows, lengths, strict=True):
                    axes.text(value + 0.01, row, f"{100 * value:.0f} %", va="center", fontsize=10)
            axes.scatter(lengths, rows, s=90, color=colour, gid=f"class{number}", zorder=4)
            tips[f"class{number}"] = [f"{on_one_line(names[i])}: {values[i]:.1%}" for i in order]
        axes.set_yticks(range(len(order)), [_cut(names[i], 16 if narrow else 28) for i in order])
        axes.tick_params(axis="y", labelcolor=palette.ink)
        axes.set(xlim=(0, 1.08), ylim=(len(order) - 0.4, -0.6), xticks=[0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.grid(True, axis="x")
        axes.spines["bottom"].set_visible(False)
        return tips

    height = 40 + len(order) * max(22, 13 * len(scores) + 6)
    return Chart("classes", "Top-1 accuracy of single classes", (height, height), draw)


def confusion(names: Sequence[str], rows: Sequence[int], counts: Any, colour: int) -> Chart:
    """What images of the classes `rows` were taken for, as a matrix of shares of a row.

    Args:
        names: of all classes.
        rows: indices of the classes shown.
        counts: (classes, classes) images by label and prediction.
        colour: number of the series' colour.
    """
    rest = len(rows) < len(names)

    def draw(figure: Figure, palette: Palette, narrow: bool) -> dict[str, list[str]]:
        axes = figure.subplots()
        tone = palette.series[colour % len(palette.series)]
        for y, label in enumerate(rows):
            total = max(1, int(counts[label].sum()))
            shares = [float(counts[label][other]) / total for other in rows]
            shares += [max(0.0, 1 - sum(shares))] if rest else []
            for x, share in enumerate(shares):
                axes.add_patch(
                    mpl.patches.Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, color=tone, linewidth=0,
                                          alpha=0.06 + 0.94 * share)
                )  # fmt: skip
                if round(100 * share):
                    axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=10,
                              color=palette.surface if share > 0.55 else palette.ink)  # fmt: skip
        short = [_cut(names[i], 11 if narrow else 18) for i in rows]
        columns = [*short, "others"] if rest else short
        axes.set_yticks(range(len(rows)), short)
        axes.set_xticks(range(len(columns)), columns, rotation=90 if narrow else 45,
                        ha="center" if narrow else "left", rotation_mode="default" if narrow else "anchor")  # fmt: skip
        axes.xaxis.tick_top()
        axes.tick_params(labelcolor=palette.ink)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.spines[:].set_visible(False)
        return {}

    about = "Share of each class's images, in percent, by predicted class"
    return Chart("confusion", about, (110 + 38 * len(rows), 100 + 26 * len(rows)), draw)

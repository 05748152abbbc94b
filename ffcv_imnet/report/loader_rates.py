"""The figure of `benchmark loader`: images/s by resolution, and how they grow with cores."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.report.charts import LIGHT, PNG_DPI

Row = dict[str, Any]  # of `bench.peers.summarise`
NAMES = {
    "ffcv_imnet": "ffcv-imnet",
    "ffcv+CropDecoder": "FFCV with CropDecoder",
    "ffcv": "FFCV",
    "torchvision": "torchvision",
    "dali": "DALI (CPU)",
    "spdl": "SPDL",
    "turbojpeg": "libjpeg-turbo alone",
}
MARKS = "osD^v<>"
BEYOND = 4  # times the most cores that were measured: as far as the arithmetic is drawn


def draw_loaders(path: Path, rows: list[Row], machine: str) -> None:
    """A PNG of `rows`. Raises NotWritten."""
    counts = sorted({row["cores"] for row in rows})
    several = len(counts) > 1
    figure = Figure(figsize=(11 if several else 6.5, 4.8), dpi=PNG_DPI, layout="constrained")
    panels = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    by_resolution(panels[0], [row for row in rows if row["cores"] == counts[-1]])
    if several:
        by_cores(panels[1], rows)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(machine, fontsize=9, color=LIGHT.muted)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


def style(axes: Axes, title: str, across: str) -> None:
    """What both panels share."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(across)
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", color=LIGHT.grid)
    axes.spines[["top", "right"]].set_visible(False)


def look(name: str) -> dict[str, Any]:
    """A loader's colour and mark; the limit is grey."""
    place = list(NAMES).index(name)
    colour = LIGHT.muted if name == "turbojpeg" else LIGHT.series[place]
    return {"color": colour, "marker": MARKS[place], "markersize": 5}


def loaders(rows: list[Row]) -> list[str]:
    """Those that took part, in the order of `NAMES`."""
    there = {row["loader"] for row in rows}
    return [name for name in NAMES if name in there]


def by_resolution(axes: Axes, rows: list[Row]) -> None:
    """A line a loader and crop, at one number of cores."""
    crops = sorted({row["min_crop"] for row in rows})
    for name in loaders(rows):
        for number, crop in enumerate(crops):
            points = sorted(
                (row["resolution"], row["images_per_second"])
                for row in rows
                if (row["loader"], row["min_crop"]) == (name, crop)
            )
            label = NAMES[name] if number == 0 else None
            dash = ("-", "--", ":")[min(number, 2)]
            axes.plot(*zip(*points, strict=True), dash, label=label, **look(name))
    cores, said = rows[0]["cores"], " and dashed ".join(f"{crop:g}" for crop in crops)
    plural = "s" if cores > 1 else ""
    style(axes, f"{cores} core{plural}; crops from {said} of the area", "side of the crops, px")
    axes.set_xticks(sorted({row["resolution"] for row in rows}))


def by_cores(axes: Axes, rows: list[Row]) -> None:
    """A line a loader at the first resolution and crop: measured, and in proportion beyond."""
    side, crop = min((row["resolution"], row["min_crop"]) for row in rows)
    most = max(row["cores"] for row in rows)
    for name in loaders(rows):
        points = sorted(
            (row["cores"], row["images_per_second"])
            for row in rows
            if (row["loader"], row["resolution"], row["min_crop"]) == (name, side, crop)
        )
        axes.plot(*zip(*points, strict=True), "-", **look(name))
        cores, last = points[-1]
        beyond = look(name) | {"marker": "", "linewidth": 1}
        axes.plot((cores, BEYOND * most), (last, last / cores * BEYOND * most), ":", **beyond)
    style(axes, f"{side} px, crops from {crop:g}; dotted: in proportion, not measured", "cores")
    axes.set_xticks(
        [*sorted({row["cores"] for row in rows}), *range(2 * most, BEYOND * most + 1, most)]
    )

"""The tables and figures of whatever the log has: python records/2026-11-25_transfer/analyse.py (PYTHONPATH=.)

Writes tables.md and the figures beside this file, and says what is missing.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import plan
import study
from experiment import Run
from tabulate import tabulate

IMAGENET = 1_281_167
SAME_STEPS = (
    IMAGENET / 1024 * 64
)  # images at batch 64 for as many steps an epoch as the recipes make
DRAWS = 2_000  # of the noise, for the intervals, which are 90 %
MARGIN = 0.01  # of top-1: so far the ends of part A's brackets fall, as in plan.bracket
LEVEL = 0.005  # of top-1: no difference that a recipe would notice
ASSUMED_NOISE = 0.006  # of top-1 from seed to seed, until at least three runs have been repeated
LEADS = {"sgd": "SGD", "muon": "Muon", "our_soap": "SOAP"}
Marks = dict[float, list[list[float]]]  # learning rate -> each seed's last top-1 on both halves


@dataclass(frozen=True)
class Optimum:
    """Of one cell."""

    lr: float | None  # the parabola's peak; None while the bracket is open
    low: float
    high: float
    best: float  # the learning rate of the best point
    level: tuple[float, float]  # the learning rates tried that are within `LEVEL` of the best
    value: float  # top-1 on the half that it was not chosen on, both ways
    open: str  # sides on which the bracket is not closed


def cells_of(rows: dict[Run, dict[str, Any]]) -> dict[Run, Marks]:
    """All points by what they share; the key's learning rate and seed are zero."""
    out: dict[Run, Marks] = defaultdict(lambda: defaultdict(list))
    for run, row in rows.items():
        if "error" not in row:
            last = [0.0, 0.0] if row["diverged"] else row["curve"]["top_1"][-1]
            out[replace(run, lr=0.0, seed=0)][run.lr].append(last)
    return out


def noise_of(cells: dict[Run, Marks]) -> tuple[float, int]:
    """Standard deviation of top-1 from seed to seed, pooled, and its degrees of freedom."""
    squares, freedom = 0.0, 0
    for marks in cells.values():
        for seeds in marks.values():
            means = np.mean(seeds, axis=1)
            squares += float(((means - means.mean()) ** 2).sum())
            freedom += len(seeds) - 1
    return (math.sqrt(squares / freedom), freedom) if freedom >= 3 else (ASSUMED_NOISE, freedom)


def peak(lrs: np.ndarray, values: np.ndarray) -> float:
    """log2 of the peak of a parabola through the best and all within a factor of four of it; the end
    where the best has no neighbour on one side. No farther out than its points."""
    place = int(values.argmax())
    if place in (0, len(lrs) - 1):
        return float(np.log2(lrs[place]))
    near = np.abs(np.log2(lrs / lrs[place])) < 2.1
    near[place - 1 : place + 2] = True
    x, y = np.log2(lrs[near]), values[near]
    a, b, _ = np.polyfit(x, y, 2)
    return float(np.clip(-b / (2 * a), x[0], x[-1])) if a < 0 else float(np.log2(lrs[place]))


def optimum(marks: Marks, noise: float, margin: float = 0.0) -> Optimum:
    """Where the best learning rate is, with the interval that seed-to-seed noise leaves.

    The bracket is open on a side that does not fall by `margin` of top-1 below the best.
    """
    lrs = np.array(sorted(marks))
    halves = np.array([np.mean(marks[lr], axis=0) for lr in lrs])
    values = halves.mean(axis=1)
    place = int(values.argmax())
    ends = {"left": 0, "right": len(lrs) - 1}
    sides = [s for s, end in ends.items() if place == end or values[place] - values[end] < margin]
    spread = noise / np.sqrt([len(marks[lr]) for lr in lrs])
    draws = np.random.default_rng(0).normal(values, spread, (DRAWS, len(lrs)))
    low, high = np.percentile([peak(lrs, draw) for draw in draws], (5, 95))
    crossed = (halves[halves[:, 0].argmax(), 1] + halves[halves[:, 1].argmax(), 0]) / 2
    level = lrs[values > values.max() - LEVEL]
    at = None if sides or len(lrs) < 3 else 2.0 ** peak(lrs, values)
    return Optimum(
        at,
        2.0**low,
        2.0**high,
        float(lrs[place]),
        (float(level[0]), float(level[-1])),
        float(crossed),
        " and ".join(sides),
    )


def span(found: Optimum) -> str:
    """The optimum for a table."""
    if found.lr is None:
        return f"open to the {found.open}: best tried {found.best:g}"
    return f"{found.lr:.3g} ({found.low:.2g} to {found.high:.2g})"


def title(run: Run) -> str:
    """What a cell is, against the base."""
    return plan.Cell("", run).name


# ---- A: where the optimum is --------------------------------------------------------------------


def transfer(cells: dict[Run, Marks], rows: dict[Run, Any], noise: float) -> str:
    """One row a cell of Muon on the 50,000, and of what is asked about SOAP."""
    table = []
    asked = (*plan.transfer_short(), *plan.soap_transfer(), *plan.long_runs())
    short = {replace(c.run, lr=0.0) for c in asked}
    for run, marks in cells.items():
        muon = run.optimizer == "muon" and run.images == plan.BASE.images
        if not muon and run not in short:
            continue
        found = optimum(marks, noise, MARGIN)
        at_best = [
            row
            for r, row in rows.items()
            if replace(r, lr=0.0, seed=0) == run and r.lr == found.best
        ]
        growth = np.mean([row["norm_growth"][0] for row in at_best])
        points = " ".join(f"{lr:g}: {np.mean(marks[lr]):.1%}" for lr in sorted(marks))
        table.append(
            [
                title(run),
                run.steps,
                span(found),
                "{:g} to {:g}".format(*found.level),
                f"{found.value:.1%}",
                f"{growth:.2f}",
                points,
            ]
        )
    headers = [
        "cell",
        "steps",
        "best learning rate (90 %)",
        "tried, within half a point",
        "top-1",
        "norm grew to",
        "top-1 by learning rate",
    ]
    return tabulate(table, headers, tablefmt="pipe", disable_numparse=True)


AXES: dict[str, tuple[str, Callable[[Run], float]]] = {
    "steps, batch 256": ("epochs", lambda run: run.steps),
    "batch, at equal epochs": ("batch", lambda run: run.batch),
    "batch, at equal steps": ("batch epochs", lambda run: run.batch),
    "width": ("width", lambda run: run.width),
    "momentum": ("momentum", lambda run: run.momentum),
}  # fmt: skip


def along(cells: dict[Run, Marks], base: Run, axis: str) -> list[Run]:
    """The cells that differ from `base` along `axis` alone, in its order."""
    names, value = AXES[axis]
    found = []
    for run in cells:
        same = replace(run, **{name: getattr(base, name) for name in names.split()}) == base
        if same and (axis != "batch, at equal steps" or abs(run.steps / base.steps - 1) < 0.02):
            found.append(run)
    return sorted(found, key=value)


def slopes(cells: dict[Run, Marks], noise: float) -> str:
    """How the optimum moves: the exponent of each axis, cell against cell, by rule."""
    table = []
    for rule in plan.START:
        for net in ("rn18", "rn50"):
            base = replace(plan.BASE, scale=rule, net=net, lr=0.0)
            for axis in (
                "steps, batch 256",
                "batch, at equal epochs",
                "batch, at equal steps",
                "width",
            ):
                runs = along(cells, base, axis)
                found = [(AXES[axis][1](run), optimum(cells[run], noise, MARGIN)) for run in runs]
                closed = [(x, o) for x, o in found if o.lr is not None]
                if len(closed) < 2:
                    continue
                x = np.log2([x for x, _ in closed])
                rng = np.random.default_rng(0)
                sigma = [np.log2(o.high / o.low) / 3.29 for _, o in closed]
                draws = rng.normal(
                    [np.log2(o.lr) for _, o in closed if o.lr], sigma, (DRAWS, len(x))
                )
                fits = [np.polyfit(x, draw, 1)[0] for draw in draws]
                low, middle, high = np.percentile(fits, (5, 50, 95))
                places = ", ".join(f"{v:g}: {o.lr:.3g}" for v, o in closed)
                table.append(
                    [rule, net, axis, places, f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"]
                )
    headers = ["rule", "network", "axis", "optima", "exponent (90 %)"]
    if not table:
        return "No axis has two closed brackets."
    return tabulate(table, headers, tablefmt="pipe", disable_numparse=True)


def asked_panels(
    cells: dict[Run, Marks], base: Run
) -> tuple[dict[str, list[Run]], dict[tuple[str, Run], str]]:
    """Of `plan.transfer_short` and of SOAP: cells by panel, and what a panel calls each."""
    short = replace(base, epochs=1, batch=64)
    few = replace(short, images=12_500)
    asked = {
        "momentum, 781 steps of 64": (short, "momentum"),
        "rule for shape, 781 steps of 64": (short, "scale"),
        "rule for shape, bottleneck": (replace(short, net="rn50"), "scale"),
        "decay, 781 steps of 64": (short, "decay"),
        "SGD's part, 781 steps of 64": (short, "sgd_lr"),
        "first convolution, 781 steps of 64": (short, "stem"),
        "momentum, kernels at a fixed norm": (replace(short, hold=True), "momentum"),
        "width, 195 steps of 64": (few, "width"),
        "SOAP, width, 195 steps of 64": (replace(few, optimizer="our_soap"), "width"),
    }
    panels: dict[str, list[Run]] = {}
    labels: dict[tuple[str, Run], str] = {}
    for name, (cell, field) in asked.items():
        panels[name] = [
            run for run in cells if replace(run, **{field: getattr(cell, field)}) == cell
        ]
        labels |= {(name, run): f"{getattr(run, field)}" for run in panels[name]}
    name = "SOAP, by steps"
    of_soap = [
        run for run in cells
        if run.optimizer in ("soap", "our_soap") and (run.data, run.width, run.net) == ("tiny100", 0.25, "rn18")
        and len(cells[run]) > 2
    ]  # fmt: skip
    panels[name] = sorted(of_soap, key=lambda run: run.steps)
    labels |= {(name, run): f"{run.steps:,} steps of {run.batch}" for run in panels[name]}
    return panels, labels


def draw_curves(cells: dict[Run, Marks], out: Path) -> None:
    """Top-1 against learning rate, a panel an axis."""
    base = replace(plan.BASE, lr=0.0)
    panels = {axis: along(cells, base, axis) for axis in AXES}
    for epochs in (1, 4, 16):
        panels[f"rule for shape, epochs={epochs}"] = [
            run for run in cells if replace(run, scale="none") == replace(base, epochs=epochs)
        ]
    for epochs in (1, 4, 16):
        free = replace(base, epochs=epochs)
        panels[f"kernels at a fixed norm, epochs={epochs}"] = [
            run
            for run in cells
            if run == free or (run.hold and replace(run, hold=False, momentum=0.95) == free)
        ]
    short, labels = asked_panels(cells, base)
    panels |= short
    drawn = {name: [run for run in runs if len(cells[run]) > 1] for name, runs in panels.items()}
    panels = {name: runs for name, runs in drawn.items() if len(runs) > 1}
    if not panels:
        return
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, 3.4 * lines), squeeze=False)
    for ax, (name, runs) in zip(axes.flat, panels.items(), strict=False):
        for run in runs:
            lrs = sorted(cells[run])
            means = [100 * np.mean(cells[run][lr]) for lr in lrs]
            ax.plot(lrs, means, "o-", markersize=4, label=labels.get((name, run), title(run)))
        ax.set_xscale("log", base=2)
        ticks = sorted({lr for run in runs for lr in cells[run]})
        ax.set_xticks(ticks, [f"{lr:g}" for lr in ticks], fontsize=7, rotation=60)
        ax.set_xticks([], minor=True)
        ax.set(title=name, xlabel="learning rate", ylabel="top-1, %")
        many = len(runs) > 5
        ax.legend(fontsize=6 if many else 7, ncols=2 if many else 1)
        ax.grid(alpha=0.3)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    figure.tight_layout()
    figure.savefig(out / "learning_rates.png", dpi=110)
    plt.close(figure)


# ---- B: the lead against the number of images ---------------------------------------------------


def lead_cells(cells: dict[Run, Marks], width: float) -> dict[tuple[str, int, int], Marks]:
    """(optimizer, images, epochs) -> points, of part B."""
    out = {}
    for name in LEADS:
        base = replace(plan.BASE, optimizer=name, batch=64, width=width, lr=0.0)
        for run, marks in cells.items():
            if (
                replace(run, images=base.images, epochs=base.epochs) == base
                and run.epochs in plan.LENGTHS
            ):
                out[name, run.images, run.epochs] = marks
    return out


def needed(curve: Iterable[tuple[int, float]], target: float) -> float:
    """Epochs at which Muon's top-1, linear in the logarithm of epochs, passes `target`."""
    epochs, values = map(np.array, zip(*sorted(curve), strict=True))
    x = np.log(epochs)
    values = np.maximum.accumulate(values)
    place = int(np.clip(np.searchsorted(values, target), 1, len(x) - 1))
    rise = max(values[place] - values[place - 1], 1e-4)
    slope = (x[place] - x[place - 1]) / rise
    return float(np.exp(x[place - 1] + np.clip(target - values[place - 1], -0.2, 0.2) * slope))


def lead(cells: dict[Run, Marks], noise: float, out: Path) -> str:
    """The table of top-1 by images and epochs, and the epochs that Muon needs."""
    text, needs = [], {}
    for width in (0.25, 0.5):
        found = {key: optimum(marks, noise) for key, marks in lead_cells(cells, width).items()}
        table = []
        for images in sorted({key[1] for key in found}):
            row: list[Any] = [f"{images:,}"]
            for name in LEADS:
                for epochs in sorted(plan.LENGTHS):
                    one = found.get((name, images, epochs))
                    row.append(f"{one.value:.1%}{'*' if one.lr is None else ''}" if one else "")
            for name in ("muon", "our_soap"):
                values = epochs_needed(found, name, images, noise)
                if values is None:
                    row.append("")
                    continue
                if name == "muon":
                    needs[width, images] = values
                low, middle, high = np.percentile(values, (5, 50, 95))
                row.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
            table.append(row)
        if table:
            headers = ["images", *(f"{n} {e}" for n in LEADS.values() for e in sorted(plan.LENGTHS)),
                       "Muon's epochs for SGD's 16 (90 %)", "SOAP's"]  # fmt: skip
            text.append(
                f"Width {width:g}:\n\n"
                + tabulate(table, headers, tablefmt="pipe", disable_numparse=True)
            )
    text.append(extrapolated(needs, out))
    return "\n\n".join(text)


def epochs_needed(
    found: dict[tuple[str, int, int], Optimum], optimizer: str, images: int, noise: float
) -> np.ndarray | None:
    """Draws of the epochs an optimizer needs for SGD's 16-epoch top-1; None until it gets there."""
    target = found.get(("sgd", images, 16))
    curve = [(e, o.value) for (name, n, e), o in found.items() if (name, n) == (optimizer, images)]
    if target is None or len(curve) < 2 or max(v for _, v in curve) < target.value:
        return None
    rng = np.random.default_rng(0)
    return np.array([
        needed([(e, v + rng.normal(0, noise)) for e, v in curve], target.value + rng.normal(0, noise))
        for _ in range(DRAWS)
    ])  # fmt: skip


def extrapolated(needs: dict[tuple[float, int], np.ndarray], out: Path) -> str:
    """A power law in the number of images, to ImageNet's, from at least three sizes; and its figure."""
    if not needs:
        return "Epochs needed: no size has SGD's 16 epochs and enough of Muon's."
    figure, ax = plt.subplots(figsize=(6, 4))
    text = []
    for width in sorted({width for width, _ in needs}):
        sizes = sorted(n for w, n in needs if w == width)
        quantiles = np.array([np.percentile(needs[width, n], (5, 50, 95)) for n in sizes])
        errors = np.abs(quantiles[:, [0, 2]] - quantiles[:, [1]]).T
        points = ax.errorbar(
            sizes, quantiles[:, 1], errors, fmt="o", capsize=3, label=f"width {width:g}"
        )
        color = points[0].get_color()
        if len(sizes) < 3:
            text.append(f"Width {width:g}: {len(sizes)} of four sizes: no extrapolation yet.")
            continue
        x = np.log(sizes)
        draws = np.log([needs[width, n] for n in sizes]).T
        fits = np.array([np.polyfit(x, draw, 1) for draw in draws])
        line = np.log([*np.geomspace(sizes[0], IMAGENET, 50), SAME_STEPS])
        low, middle, high = np.percentile(np.exp(fits @ [line, np.ones(51)]), (5, 50, 95), axis=0)
        ax.plot(np.exp(line[:50]), middle[:50], color=color)
        ax.fill_between(np.exp(line[:50]), low[:50], high[:50], color=color, alpha=0.2)
        for place, what in ((49, f"at {IMAGENET:,} images"), (50, "at ImageNet's steps an epoch")):
            text.append(f"Width {width:g}: {what}, {middle[place]:.1f} epochs ({low[place]:.1f} to "
                        f"{high[place]:.1f}) if the power law holds that far.")  # fmt: skip
    ax.axhline(16, linestyle="--", color="grey")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="training images",
        ylabel="epochs Muon needs for SGD's 16",
    )
    ax.set_yticks([2, 3, 5, 8, 16], ["2", "3", "5", "8", "16"])
    ax.set_yticks([], minor=True)
    ax.legend()
    ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "lead.png", dpi=110)
    plt.close(figure)
    return "\n".join(text)


# ---- C, D, and what is missing ------------------------------------------------------------------


def rivals(cells: dict[Run, Marks], rows: dict[Run, Any]) -> str:
    """Each optimizer's best of its eight trials: of the two repeated ones by one half, reported on the other."""
    table = []
    wanted = {replace(cell.run, lr=0.0) for cell in plan.rivals()}
    groups: dict[tuple[Any, ...], list[tuple[Run, float, list[list[float]]]]] = defaultdict(list)
    for run in wanted & cells.keys():
        name = "fixed norm" if run.hold else run.optimizer
        groups[run.data, run.epochs, name] += [(run, lr, seeds) for lr, seeds in cells[run].items()]
    for (data, epochs, name), trials in sorted(groups.items()):
        most = max(len(trial[2]) for trial in trials)
        repeated = [trial for trial in trials if len(trial[2]) == most]
        run, lr, seeds = max(repeated, key=lambda trial: np.mean(trial[2], axis=0)[0])
        other = [100 * seed[1] for seed in seeds]
        error = f"{np.std(other, ddof=1) / math.sqrt(len(other)):.2f}" if len(other) > 1 else ""
        seconds = [row["cpu_seconds"] / row["steps"] for r, row in rows.items()
                   if replace(r, lr=0.0, seed=0) == run and "steps" in row]  # fmt: skip
        table.append([data, epochs, name, len(trials), f"{lr:g} {title(run)}", f"{np.mean(other):.2f}",
                      error, len(other), f"{min(seconds):.3f}"])  # fmt: skip
    headers = [
        "data",
        "epochs",
        "optimizer",
        "trials",
        "best",
        "top-1, %",
        "s.e.",
        "seeds",
        "CPU s a step",
    ]
    return (
        tabulate(table, headers, tablefmt="pipe", disable_numparse=True) if table else "Not begun."
    )


# 95 %, one side, of a line through so many
STUDENT = {4: 2.92, 5: 2.35, 6: 2.13, 7: 2.02, 8: 1.94, 9: 1.89, 10: 1.86, 11: 1.83, 12: 1.81}
RECIPES = {"rn50_5ep": 6_255, "rn18_8ep": 10_008}  # steps


def soap(cells: dict[Run, Marks]) -> str:
    """SOAP's learning rate: the parabola's peak where it is bracketed, and a power of the steps through them."""
    table, places = [], []
    for run, marks in cells.items():
        if run.optimizer not in ("soap", "our_soap"):
            continue
        lrs = np.array(sorted(marks))
        values = np.array([np.mean(marks[lr]) for lr in lrs])
        found = ""
        if 0 < int(values.argmax()) < len(lrs) - 1:
            top = 2.0 ** peak(lrs, values)
            found = f"{top:.4f}"
            if (run.net, run.width) == ("rn18", plan.BASE.width):
                places.append((math.log(run.steps), math.log(top)))
        points = " ".join(f"{lr:g}: {value:.1%}" for lr, value in zip(lrs, values, strict=True))
        table.append([title(run), run.steps, found, points])
    text = tabulate(table, ["cell", "steps", "best soap.lr", "top-1 by learning rate"], "pipe", disable_numparse=True)  # fmt: skip
    if len(places) not in STUDENT:
        return text
    steps, tops = np.array(places).T
    power, cov = np.polyfit(steps, tops, 1, cov="unscaled")
    scatter = float(np.std(tops - np.polyval(power, steps), ddof=2))
    lines = [
        f"It falls as steps to the power {power[0]:.2f} (standard error {scatter * math.sqrt(cov[0, 0]):.2f})."
    ]
    for name, count in RECIPES.items():
        x = np.array([math.log(count), 1.0])
        error = STUDENT[len(places)] * scatter * math.sqrt(1 + x @ cov @ x)  # of a new cell
        middle = float(x @ power)
        low, high = math.exp(middle - error), math.exp(middle + error)
        lines.append(
            f"{name}, {count:,} steps: {math.exp(middle):.4f} (90 %: {low:.4f} to {high:.4f})."
        )
    return text + "\n\n" + "\n".join(lines)


def networks(cells: dict[Run, Marks], noise: float) -> str:
    """The bottleneck network against ResNet-18."""
    all_of_them = (*plan.networks_first(), *plan.networks())
    wanted = [replace(cell.run, lr=0.0) for cell in all_of_them]
    found = [(run, optimum(cells[run], noise)) for run in wanted if run in cells]
    table = [
        [title(run), len(cells[run][one.best]), span(one), f"{one.value:.1%}"] for run, one in found
    ]
    return (
        tabulate(table, ["cell", "seeds", "best muon.lr (90 %)", "top-1"], tablefmt="pipe")
        if table
        else "Not begun."
    )


def missing(rows: dict[Run, Any]) -> str:
    """Cells by state, a line a part."""
    marks = study.top_1(rows)
    parts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for cell in dict.fromkeys(plan.cells()):
        done = not plan.next_runs(cell, marks)
        begun = bool(plan.scored(cell, marks))
        parts[cell.part][0 if done else 1 if begun else 2] += 1
    table = [[part, *counts] for part, counts in parts.items()]
    return tabulate(table, ["part", "cells done", "begun", "not begun"], tablefmt="pipe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=study.HERE / "log.jsonl")
    parser.add_argument("--out", type=Path, default=study.HERE)
    options = parser.parse_args()
    rows = study.read(options.log)
    cells = cells_of(rows)
    noise, freedom = noise_of(cells)
    behind = sum(row.get("cpu_seconds", 0.0) for row in rows.values()) / 3600
    how = (
        f"measured, {freedom} degrees of freedom"
        if freedom >= 3
        else "assumed: too few repeated runs"
    )
    draw_curves(cells, options.out)
    sections = {
        "What is done": f"{len(rows)} runs, {behind:.1f} CPU-hours. Top-1 from seed to seed: "
        f"{100 * noise:.2f} points ({how}).\n\n{missing(rows)}",
        "A: the best learning rate": transfer(cells, rows, noise),
        "A: how it moves": slopes(cells, noise),
        "B: the lead against the number of images": lead(cells, noise, options.out)
        + "\n\n(* the bracket is not closed)",
        "C: rivals": rivals(cells, rows),
        "C: SOAP's learning rate": soap(cells),
        "D: networks": networks(cells, noise),
    }
    text = "\n\n".join(f"## {name}\n\n{body}" for name, body in sections.items())
    (options.out / "tables.md").write_text(f"# Tables, by analyse.py\n\n{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

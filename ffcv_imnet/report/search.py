"""What a search of `tune` came to: whether the best trial is better than the recipe, a page and a figure."""

import math
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from tabulate import tabulate

from ffcv_imnet.bench.search import (
    BEST,
    DIVERGED,
    RECIPE,
    Search,
    best_trial,
    drawn,
    scores_of,
    values_of,
    with_values,
)
from ffcv_imnet.bench.short_runs import RUNGS, held_out, short
from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.provenance import git_commit, versions
from ffcv_imnet.machine.distributed import describe_world
from ffcv_imnet.report.statistics import spread


def outcome(study: Any) -> dict[str, list[dict[str, float]]]:
    """The last rung's scores under new seeds, of the best trial and of the recipe."""
    made: dict[str, list[dict[str, float]]] = {BEST: [], RECIPE: []}
    for trial in study.get_trials(deepcopy=False):
        if (again := trial.user_attrs.get("again")) and trial.state.name == "COMPLETE":
            made[again] += trial.user_attrs.get("scores", [])
    return made


def verdict(made: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Whether the best trial is the better recipe, in a sentence. `made`: see `outcome`."""
    if not made[BEST]:
        return "no trial was better than the recipe as it is: there is no reason to change it"
    best, recipe = (spread([s["loss"] for s in made[what]]) for what in (BEST, RECIPE))
    gain = recipe.mean - best.mean
    noise = math.hypot(best.standard_error or 0.0, recipe.standard_error or 0.0)
    if gain > 2 * noise:
        return f"the best trial is better than the recipe by a loss of {gain:.4f} (standard error {noise:.4f})"
    return (
        f"the best trial is not better than the recipe beyond noise (loss {-gain:+.4f}, standard error "
        f"{noise:.4f}): there is no reason to change the recipe"
    )


def write_results(search: Search, study: Any, command: Sequence[str]) -> str:
    """OUT/recipe.yaml, trials.png and README.md. Returns what the last of them says."""
    best = best_trial(study)
    tuned = with_values(search.settings, drawn(best), search.steps)
    made, trials = outcome(study), study.get_trials(deepcopy=False)
    words = verdict(made)
    with atomic_write(search.out / "recipe.yaml", "w") as file:
        keys = ", ".join(search.keys)
        file.write(
            f"# By `ffcv_imnet tune`, {date.today()}: {keys} of trial {best.number + 1}; {words}.\n"
        )
        file.write(to_yaml(tuned))
    draw(search, trials, best, search.out / "trials.png")
    text = record(search, trials, best, tuned, made, command)
    with atomic_write(search.out / "README.md", "w") as file:
        file.write(text)
    return text


def record(
    search: Search, trials: Sequence[Any], best: Any, tuned: Settings,
    made: Mapping[str, Sequence[Mapping[str, float]]], command: Sequence[str],
) -> str:  # fmt: skip
    """The page for people: what was searched, on what, what came out."""
    rows = []
    for key in search.keys:
        section, name = key.split(".")
        ours, theirs = (getattr(getattr(s, section), name) for s in (tuned, search.settings))
        rows.append([key, f"{theirs:.3g}", f"{ours:.3g}"])
    settings = tabulate(rows, ("setting", "recipe", "tuned"), "github", disable_numparse=True)
    rows = []
    for what, scores in made.items() if made[BEST] else ():
        loss, top_1 = (spread([s[of] for s in scores]) for of in ("loss", "top_1"))
        rows.append([what, str(len(scores)), f"{loss:.4f}", f"{top_1:%}"])
    columns = "last rung, new seeds", "runs", "loss (mean ± s.e.)", "top-1, %"
    again = tabulate(rows, columns, "github", disable_numparse=True) + "\n\n" if rows else ""
    scores = scores_of(trials)
    hours = sum(score["seconds"] for score in scores) / 3600
    counts = [sum(int(s["rung"]) == number for s in scores) for number in range(RUNGS)]
    runs = "; ".join(
        f"{count} of {rung.images:,} images"
        for count, rung in zip(counts, search.rungs, strict=True)
    )
    found = versions()
    decay = (
        f"Weight decay is searched as what it does over a whole run; recipe.yaml has what does as much over its own "
        f"{search.steps:,} steps. "
        if any(key.endswith("weight_decay") for key in search.keys)
        else ""
    )
    return (
        f"# A search for {', '.join(search.keys)}\n\n{verdict(made).capitalize()}.\n\n{settings}\n\n{again}"
        f"Runs at the lowest resolution, {short(search.settings, search.rungs[0]).plan.stages[0].resolution} px: "
        f"{runs}; scored on {held_out(search.samples):,} images held out of {search.settings.data.train_dataset} "
        f"({search.samples:,} images, {len(search.classes):,} classes). {hours:.2f} hours of a device.\n\n"
        f"![loss by setting](trials.png)\n\n"
        f"{decay}That the best settings of a short run are the best of a long one is an assumption.\n\n"
        f"    python -m ffcv_imnet tune {' '.join(command)}\n\n"
        f"{date.today()}, {describe_world(search.settings.training.device).device_name()}; "
        f"{', '.join(f'{name} {found[name]}' for name in ('torch', 'ffcv') if name in found)}; commit {git_commit()}\n"
    )


def draw(search: Search, trials: Sequence[Any], best: Any, path: Path) -> None:
    """A panel a setting: the loss of each rung's runs against it."""
    colours = ("#c3cad4", "#7f9fd8", "#2b63d9")
    figure = Figure(
        figsize=(3.4 * len(search.keys) + 0.6, 3.6), layout="constrained", facecolor="white"
    )
    panels = figure.subplots(1, len(search.keys), sharey=True, squeeze=False)[0]
    losses = [score["loss"] for score in scores_of(trials) if score["loss"] < DIVERGED]
    for key, axes in zip(search.keys, panels, strict=True):
        for number, rung in enumerate(search.rungs):
            points = [
                (drawn(trial)[key], score["loss"])
                for trial in trials if "again" not in trial.user_attrs
                for score in trial.user_attrs.get("scores", [])
                if int(score["rung"]) == number and score["loss"] < DIVERGED
            ]  # fmt: skip
            if points:
                axes.scatter(*zip(*points, strict=True), s=18 + 14 * number, color=colours[number],
                             label=f"{rung.images:,} images")  # fmt: skip
        axes.axvline(drawn(best)[key], color="#2b63d9", linewidth=1, label="best")
        recipe = values_of(search.settings, search.keys, search.steps)[key]
        if recipe > 0:
            axes.axvline(
                recipe, color="#d1570b", linewidth=1, linestyle=(0, (4, 3)), label="recipe"
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        labels = {
            "soap.lr": "soap.lr of a run of 1,000 steps",
            "muon.momentum": "1 - muon.momentum",
            "training.momentum": "1 - training.momentum",
        }
        decay = f"{key} x sum of learning rates"
        axes.set_xlabel(decay if key.endswith("weight_decay") else labels.get(key, key))
        axes.grid(True, color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    low, high = min(losses), sorted(losses)[int(0.9 * (len(losses) - 1))]
    panels[0].set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    panels[0].set_ylabel("loss on the images held out")
    panels[-1].legend(frameon=False, fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)

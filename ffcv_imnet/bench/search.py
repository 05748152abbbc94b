"""What `tune` searches: which settings, how far, and how a trial's numbers become a run's settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffcv_imnet.bench.short_runs import Rung, runs_of_rungs
from ffcv_imnet.config.schedules import learning_rate, plan_run
from ffcv_imnet.config.schema import Settings, to_dict
from ffcv_imnet.core.errors import RunError

AGAIN = 2  # runs of the last rung, under seeds of their own, of the best trial and of the recipe as it is
RECIPE, BEST = "the recipe as it is", "the best trial"
DIVERGED = 1e6  # stands for an infinite loss
# A schedule's mean over its peak: it rises and falls linearly, or falls as a cosine does.
MEAN_LR = 0.5
# SOAP's best learning rate falls as the run's steps to this power (records/2026-11-25_transfer).
SOAP_POWER = -0.16


@dataclass(frozen=True)
class Range:
    """Of one setting; searched on a logarithmic scale, in what `with_values` makes the setting of."""

    low: float
    high: float


def ranges(settings: Settings) -> dict[str, Range]:
    """By setting. Learning rates around the recipe's; momentum as 1 - momentum; weight decay as what it does over
    a whole run, decay x the sum of the learning rates, so that runs of any length can share it; SOAP's learning
    rate as that of a run of 1,000 steps, for the same reason."""
    muon, lr = settings.muon, settings.lr.lr
    own = {"momentum": Range(0.02, 0.5), "weight_decay": Range(0.003, 3.0)}
    if settings.training.optimizer == "sgd":
        return {"lr.lr": Range(lr / 8, lr * 8)} | {f"training.{k}": v for k, v in own.items()}
    if settings.training.optimizer == "soap":
        return {"soap.lr": Range(0.0015, 0.1), "soap.weight_decay": own["weight_decay"]}
    both = {"muon.lr": Range(muon.lr / 8, muon.lr * 8), "lr.lr": Range(lr / 4, lr * 4)}
    return both | {f"muon.{name}": span for name, span in own.items()}


def _decayed(settings: Settings, key: str, steps: int) -> float:
    """The sum of the learning rates of the parameters that the decay `key` is for, over a run of `steps`."""
    peak = settings.soap.lr if key.startswith("soap.") else settings.muon.lr
    if key.startswith("training."):
        t = settings.training
        peak = learning_rate(settings.lr, t.epochs, settings.lr.lr_peak_epoch, t.batch_size)
    return MEAN_LR * peak * steps


def with_values(settings: Settings, values: Mapping[str, float], steps: int) -> Settings:
    """`settings` with what was drawn, for a run of `steps`. Decay is last: it goes by the learning rate."""
    for key, x in sorted(values.items(), key=lambda item: item[0].endswith("weight_decay")):
        section, name = key.split(".")
        value = x
        if key == "soap.lr":
            value = x * (steps / 1000) ** SOAP_POWER
        elif name == "momentum":
            value = 1 - x
        elif name == "weight_decay":
            value = x / _decayed(settings, key, steps)
        part = replace(getattr(settings, section), **{name: float(f"{value:.3g}")})
        settings = replace(settings, **{section: part})
    return settings


def values_of(settings: Settings, keys: Sequence[str], steps: int) -> dict[str, float]:
    """What would have to be drawn for `settings`, a run of `steps`."""
    found = {}
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(settings, section), name)
        if key == "soap.lr":
            value /= (steps / 1000) ** SOAP_POWER
        elif name == "momentum":
            value = 1 - value
        elif name == "weight_decay":
            value *= _decayed(settings, key, steps)
        found[key] = float(value)
    return found


@dataclass(frozen=True)
class Search:
    """All that the processes of a search must agree on."""

    settings: Settings
    samples: int
    classes: tuple[str, ...]
    rungs: tuple[Rung, ...]
    trials: int
    keys: tuple[str, ...]
    out: Path
    processes: int = 1

    @property
    def steps(self) -> int:
        """Of the recipe's own run."""
        return sum(plan.steps for plan in plan_run(self.settings, self.samples))

    @property
    def runs(self) -> list[float]:
        """Expected, of each rung."""
        counts = runs_of_rungs(self.trials)
        return [*counts[:-1], counts[-1] + 2 * AGAIN]

    def to_json(self) -> dict[str, Any]:
        """What a search that goes on must have in common with what was begun."""
        rungs = [[rung.subset, rung.epochs] for rung in self.rungs]
        return {"settings": to_dict(self.settings), "samples": self.samples, "rungs": rungs,
                "trials": self.trials, "search": list(self.keys)}  # fmt: skip


def drawn(trial: Any) -> dict[str, float]:
    """A recipe's own value may lie outside of the ranges, a decay of zero for one."""
    return dict(trial.user_attrs.get("exact") or trial.params)


def scores_of(trials: Sequence[Any]) -> list[dict[str, float]]:
    """Of all runs of all trials: rung, loss, top_1, seconds."""
    return [score for trial in trials for score in trial.user_attrs.get("scores", [])]


def best_trial(study: Any) -> Any:
    """The lowest loss on the last rung. Raises RunError if no trial got there."""
    done = [
        trial for trial in study.get_trials(deepcopy=False)
        if trial.state.name == "COMPLETE" and "again" not in trial.user_attrs
    ]  # fmt: skip
    if not done:
        raise RunError("every trial diverged: start from a recipe of a lower lr.lr")
    return min(done, key=lambda trial: trial.value)

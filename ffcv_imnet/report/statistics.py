"""What several runs say together: means, standard errors, and whether two recipes differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ffcv_imnet.core.log import Epoch, Log


@dataclass(frozen=True)
class Spread:
    """A mean over independent runs."""

    mean: float
    standard_error: float | None  # of the mean; None for a single run
    count: int

    def __format__(self, form: str) -> str:
        """`%` for per cent with two decimals, else a number's format; the standard error behind it."""
        scale, form = (100, ".2f") if form == "%" else (1, form)
        text, error = format(scale * self.mean, form), self.standard_error
        return text if error is None else f"{text} ± {scale * error:{form}}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and its standard error from the sample's variance (n - 1)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Spread(mean, None, len(values))
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Spread(mean, math.sqrt(variance / len(values)), len(values))


def score(epoch: Epoch) -> float:
    """Single-view top-1, of the averaged weights where the run keeps them."""
    return epoch.top_1 if epoch.ema_top_1 is None else epoch.ema_top_1


def epochs_to(log: Log, target: float) -> float | None:
    """Epochs done when `score` first reached `target`; None if it never did."""
    hits = (epoch.epoch + 1 for epoch in log.epochs if score(epoch) >= target)
    return next(hits, None)


def seconds_to(log: Log, target: float) -> float | None:
    """Seconds since the start when `score` first reached `target`; None if it never did."""
    return next((e.elapsed_seconds for e in log.epochs if score(e) >= target), None)


def p_value(a: Sequence[float], b: Sequence[float], paired: bool) -> float | None:
    """Two-sided, of equal means: a t-test paired by position, or Welch's.

    None where it says nothing: fewer than two values a side, or no variation at all.
    """
    if len(a) < 2 or len(b) < 2:
        return None
    from scipy import stats

    differences = [x - y for x, y in zip(a, b, strict=False)] if paired else [*a, *b]
    if len(set(differences)) == 1 or (len(set(a)) == 1 and len(set(b)) == 1):
        return None
    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    return float(test.pvalue)

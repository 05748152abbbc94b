"""Means, standard errors and p-values against numbers from a textbook or by hand."""

import math

import pytest

from ffcv_imnet.core.log import Epoch, Log
from ffcv_imnet.report.statistics import epochs_to, p_value, score, seconds_to, spread


def epoch(number: int, top_1: float, ema: float | None = None) -> Epoch:
    return Epoch(
        epoch=number, resolution=32, batch_size=8, lr=0.1, train_loss=1.0, val_loss=1.0,
        top_1=top_1, top_5=1.0, ema_top_1=ema, images_per_second=1.0, train_seconds=1.0,
        loader_seconds=0.0, val_seconds=1.0, elapsed_seconds=10.0 * (number + 1),
    )  # fmt: skip


def test_spread_by_hand() -> None:
    of_three = spread([1.0, 2.0, 6.0])
    assert of_three.mean == 3.0
    assert of_three.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert f"{spread([0.5, 0.7]):%}" == "60.00 ± 10.00"
    assert f"{spread([0.5]):%}" == "50.00"
    assert spread([0.5]).standard_error is None


def test_student_s_own_sleep_data() -> None:
    """Student (1908): extra hours of sleep of ten patients under two drugs; p as R prints it."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert p_value(first, second, paired=True) == pytest.approx(0.002833, rel=1e-3)
    assert p_value(first, second, paired=False) == pytest.approx(0.07939, rel=1e-3)


def test_no_p_value_where_it_says_nothing() -> None:
    assert p_value([1.0], [2.0, 3.0], paired=False) is None
    assert p_value([1.0, 2.0], [2.0, 3.0], paired=True) is None  # the same difference twice
    assert p_value([1.0, 1.0], [2.0, 2.0], paired=False) is None


def test_when_a_target_is_reached() -> None:
    log = Log(epochs=[epoch(0, 0.3), epoch(1, 0.6, 0.4), epoch(2, 0.5, 0.7)])
    assert score(log.epochs[1]) == 0.4  # of the average where there is one
    assert (epochs_to(log, 0.35), seconds_to(log, 0.35)) == (2, 20.0)
    assert epochs_to(log, 0.9) is None and seconds_to(log, 0.9) is None

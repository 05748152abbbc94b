"""Schedules as tables."""

import itertools

import pytest

from ffcv_imnet import schedules
from ffcv_imnet.errors import UsageError
from ffcv_imnet.settings import load


def test_resolution_of_the_public_recipe() -> None:
    settings = load("rn_configs/rn18_16ep.yaml")
    table = [schedules.resolution(settings, epoch) for epoch in range(16)]
    assert table == [160] * 12 + [192] * 4


@pytest.mark.parametrize(
    ("low", "high", "start", "end", "table"),
    [
        (128, 128, 0, 0, [128] * 6),
        (96, 128, 3, 3, [96, 96, 96, 128, 128, 128]),
        (64, 192, 0, 4, [64, 96, 128, 160, 192, 192]),
        (72, 136, 1, 3, [72, 72, 96, 136, 136, 136]),  # ends as given, between multiples of 32
    ],
)
def test_ramp(low: int, high: int, start: int, end: int, table: list[int]) -> None:
    settings = load(
        resolution__min_res=low,
        resolution__max_res=high,
        resolution__start_ramp=start,
        resolution__end_ramp=end,
    )
    assert [schedules.resolution(settings, epoch) for epoch in range(6)] == table


def test_learning_rate_by_hand() -> None:
    settings = load(lr__lr=1.0, lr__lr_peak_epoch=1, training__epochs=3, training__batch_size=4)
    rates = [schedules.learning_rate(settings, step, 2) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.75, 0.875, 0.625, 0.375, 0.125])


def test_no_warm_up_starts_at_the_peak() -> None:
    settings = load(lr__lr=1.0, lr__lr_peak_epoch=0, training__epochs=2)
    assert schedules.learning_rate(settings, 0, 100) == pytest.approx(1 - 0.005 / 2)


def test_rate_follows_the_batch() -> None:
    assert schedules.peak_lr(load(lr__lr=0.5, training__batch_size=256)) == 0.5
    scaled = load(lr__lr=0.5, lr__base_batch_size=1024, training__batch_size=256)
    assert schedules.peak_lr(scaled) == 0.125


def test_plan_is_the_schedule() -> None:
    settings = load("rn_configs/rn18_16ep.yaml")
    plans = schedules.plan_run(settings, schedules.IMAGENET_TRAIN_IMAGES)
    assert [plan.epoch for plan in plans] == list(range(16))
    assert all(plan.steps == 1251 and plan.images == 1251 * 1024 for plan in plans)
    assert max(plan.lr_end for plan in plans) == pytest.approx(0.5, rel=1e-3)
    for plan, after in itertools.pairwise(plans):
        assert plan.lr_end == pytest.approx(after.lr_start, abs=0.5 / 2 / 1251)


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(UsageError, match=r"training\.batch_size 1024 is larger than the 500"):
        schedules.plan_run(load("rn_configs/rn18_16ep.yaml"), 500)

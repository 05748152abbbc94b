"""Measuring: rates of a loader and a step that take a known time, and a whole prediction."""

import time
from pathlib import Path

import pytest
import torch

from ffcv_imnet.bench import measure
from ffcv_imnet.bench.dry_run import dry_run
from ffcv_imnet.bench.measure import Measured, Rates, bottleneck
from ffcv_imnet.config.schedules import EpochPlan
from ffcv_imnet.data.loader import Batches
from tests.conftest import SmallData


def plan(epoch: int, resolution: int) -> EpochPlan:
    return EpochPlan(epoch, resolution, 10, 20, (0.1, 1.0), 0.1, 0.1, 0.1, 1)


def test_prediction_by_hand() -> None:
    """200 images an epoch: two epochs at 100 images/s, one at 50."""
    low = Rates(32, 1000, 120, 100, first_batch=0.5, warm_up=3)
    high = Rates(64, 1000, 60, 50, first_batch=1.0, warm_up=4)
    plans = (plan(0, 32), plan(1, 32), plan(2, 64))
    measured = Measured(7.0, (low, high), 2.0, 5.0, 0.25, "a machine", plans)
    assert measured.epoch_seconds(plans[0]) == 0.5 + 2 + 2 + 0.25
    assert measured.run_seconds() == 7 + 3 + 4 + 5 + 2 * 4.75 + (1 + 4 + 2.25)
    text = measure.describe(measured, 36.0)
    assert "this run will take 36 s (0.01 h), $0.36 at $36 an hour" in text


def test_mean_of_rounds() -> None:
    """100 images at 100 a second and 100 at 25 take 5 s: 40 a second."""
    rounds = [Rates(32, 10, 100, 100, 1.0, warm_up=9), Rates(32, 10, 100, 25, 3.0, warm_up=0)]
    assert measure.mean(rounds) == Rates(32, 10, 100, 40, 2.0, 9)


def test_what_limits() -> None:
    def of(loader: float, step: float, both: float, gpu: bool) -> str:
        return bottleneck(Rates(32, loader, step, both, 0.0, 0.0), gpu)[0]

    assert of(100, 500, 99, True) == "loader"
    assert of(1000, 500, 490, True) == "step"
    assert of(1000, 500, 300, True) == "transfer"
    assert of(1000, 500, 333, False) == "processor"


def test_a_clocked_loader() -> None:
    """The first batch takes long, each later one 20 ms: the mean is of the later ones."""

    def source() -> Batches:
        time.sleep(0.2)
        while True:
            yield torch.zeros(1), torch.zeros(1)
            time.sleep(0.02)

    timed = measure._Timed(source)
    timed.until = time.perf_counter() + 0.5
    count = sum(1 for _ in timed.batches())
    assert 5 < count < 20 and timed.first_batch > 0.19
    assert 0.02 < timed.seconds_a_batch < 0.05


def test_measure_run(small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both resolutions of a plan are measured; nothing is left behind."""
    settings = small.settings(
        tmp_path / "run", resolution__max_res=64, resolution__end_ramp=1,
        cost__dollars_per_hour=1, training__ema_decay=0.5,
    )  # fmt: skip
    measured = measure.measure_run(settings, time.perf_counter(), seconds=0.3)
    assert measured is not None
    assert [rate.resolution for rate in measured.rates] == [32, 64]
    for rate in measured.rates:
        assert min(rate.loader, rate.step, rate.both) > 1 and rate.first_batch > 0
    assert measured.run_seconds() > measured.start_up > 0
    assert measured.validation > 0 and measured.checkpoint > 0
    assert list(tmp_path.iterdir()) == []


def test_dry_run_measures_no_data(tmp_path: Path) -> None:
    from ffcv_imnet.config.parsing import load
    from ffcv_imnet.core.errors import UsageError

    settings = load(data__train_dataset=tmp_path / "none.beton")
    with pytest.raises(UsageError, match="does not exist"):
        dry_run(settings, True, 0.0)

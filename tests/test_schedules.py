"""Schedules as tables."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ffcv_imnet.config import schedules
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schema import Lr, Settings, differences, to_dict
from ffcv_imnet.core.errors import UsageError


def parse_text(recipe: str) -> Settings:
    values = {f"{s}__{k}": v for s, row in yaml.safe_load(recipe).items() for k, v in row.items()}
    return load(**values)


def test_resolution_of_the_public_recipe() -> None:
    settings = load("rn_configs/rn18_16ep.yaml")
    table = [schedules.resolution(settings, epoch) for epoch in range(16)]
    assert table == [160] * 12 + [192] * 4


def test_decay_by_steps_is_torchvisions() -> None:
    settings = load("rn_configs/rn50_224.yaml")
    plans = schedules.plan_run(settings, schedules.IMAGENET_TRAIN_IMAGES)
    expected = [0.1] * 30 + [0.01] * 30 + [0.001] * 30
    assert [plan.lr_start for plan in plans] == pytest.approx(expected)
    assert [plan.lr_end for plan in plans] == pytest.approx(expected)
    lr = Lr(lr=1.0, lr_peak_epoch=3, decay="steps")  # thirds of what follows the warm-up
    rates = [schedules.learning_rate(lr, 12, epoch, 1) for epoch in (1.5, 5.9, 6.1, 9.1)]
    assert rates == pytest.approx([0.5, 1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("epochs", "first"), [(16, 12), (24, 19), (32, 25), (40, 32), (56, 45), (88, 71)]
)
def test_the_ladder(epochs: int, first: int) -> None:
    """A rung changes the length alone; its header says from which epoch on the images are of 192 px."""
    name = f"rn_configs/ladder_{epochs}ep.yaml"
    for network in ("rn18", "rn50"):
        base = f"rn_configs/{network}_16ep.yaml"
        settings = load(base, name) if epochs > 16 else load(base)
        sides = [schedules.resolution(settings, epoch) for epoch in range(epochs)]
        assert sides == [160] * first + [192] * (epochs - first)
        changed = {key.split(" ")[0] for key in differences(to_dict(settings), to_dict(load(base)))}
        ramp = {"resolution.start_ramp", "resolution.end_ramp", "training.epochs"}
        assert changed == (ramp if epochs > 16 else set())
    if epochs > 16:
        assert f"192 px from epoch {first} on" in Path(name).read_text()


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


def rates(epochs: int, steps: int, **settings: object) -> list[float]:
    """The learning rate at every step of a run."""
    resolved = load(training__epochs=epochs, **settings)
    middles = [(step + 0.5) / steps for step in range(epochs * steps)]
    return [
        schedules.learning_rate(resolved.lr, resolved.training.epochs, middle, 4)
        for middle in middles
    ]


def test_learning_rate_by_hand() -> None:
    expected = [0.25, 0.75, 0.875, 0.625, 0.375, 0.125]
    assert rates(3, 2, lr__lr=1.0, lr__lr_peak_epoch=1) == pytest.approx(expected)


def test_the_peak_may_be_the_end() -> None:
    """Muon's learning rate is set in proportion to the one there."""
    lr = load(lr__lr=0.5, lr__lr_peak_epoch=2, training__epochs=2).lr
    assert schedules.learning_rate(lr, 2, 2, 256) == 0.5


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates(2, 100, lr__lr=1.0, lr__lr_peak_epoch=0)[0] == pytest.approx(1 - 0.005 / 2)


def test_cosine_is_above_the_line_and_then_below() -> None:
    shapes = [rates(2, 10, lr__lr_peak_epoch=0, lr__decay=name) for name in ("cosine", "linear")]
    above = [cosine > linear for cosine, linear in zip(*shapes, strict=True)]
    assert above == [True] * 10 + [False] * 10
    assert sum(shapes[0]) == pytest.approx(sum(shapes[1]))


def test_rate_follows_the_batch() -> None:
    alone = load(lr__lr=0.5, lr__lr_peak_epoch=0)
    assert schedules.learning_rate(alone.lr, 16, 0, 256) == 0.5
    scaled = load(lr__lr=0.5, lr__lr_peak_epoch=0, lr__base_batch_size=1024)
    assert schedules.learning_rate(scaled.lr, 16, 0, 256) == 0.125


def test_plan_is_the_schedule() -> None:
    settings = load("rn_configs/rn18_16ep.yaml")
    plans = schedules.plan_run(settings, schedules.IMAGENET_TRAIN_IMAGES)
    assert [plan.epoch for plan in plans] == list(range(16))
    assert all(plan.steps == 1251 and plan.images == 1251 * 1024 for plan in plans)
    assert max(plan.lr_end for plan in plans) == pytest.approx(0.5, rel=1e-3)
    for plan, after in itertools.pairwise(plans):
        assert plan.lr_end == pytest.approx(after.lr_start, abs=0.5 / 2 / 1251)


def test_one_resolution_is_no_ramp() -> None:
    """Also where it is no multiple of 32, to which a ramp rounds."""
    settings = load(resolution__min_res=48, resolution__max_res=48, resolution__end_ramp=3)
    assert schedules.resolutions(settings) == (48,)


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(UsageError, match=r"training\.batch_size 1024 is larger than the 500"):
        schedules.plan_run(load("rn_configs/rn18_16ep.yaml"), 500)


def test_stages_say_what_the_ramp_says() -> None:
    ramp = load("rn_configs/rn18_16ep.yaml")
    rows = "[{epochs: 12, resolution: 160}, {epochs: 4, resolution: 192}]"
    text = Path("rn_configs/rn18_16ep.yaml").read_text()
    stages = "".join(line for line in text.splitlines(True) if not line.startswith("resolution:"))
    ours = parse_text(stages + f"plan: {{stages: {rows}}}\n")
    images = schedules.IMAGENET_TRAIN_IMAGES
    assert schedules.plan_run(ours, images) == schedules.plan_run(ramp, images)
    assert schedules.resolutions(ours) == (160, 192)


def test_a_stage_has_its_own_batch_crops_and_smoothing() -> None:
    row = "{epochs: 2, resolution: 96, batch_size: 50, crop_scale: [0.5, 1], label_smoothing: 0}"
    settings = load(
        plan__stages=f"[{{epochs: 1, resolution: 64}}, {row}]",
        training__epochs=3,
        training__batch_size=25,
        lr__lr=1.0,
        lr__lr_peak_epoch=0,
        lr__base_batch_size=50,
    )
    first, second, third = schedules.plan_run(settings, 120)
    assert (first.steps, second.steps) == (4, 2)
    assert (first.crop_scale, second.crop_scale) == ((0.08, 1.0), (0.5, 1.0))
    assert (first.label_smoothing, second.label_smoothing) == (0.1, 0.0)
    assert third == replace(second, epoch=2, lr_start=third.lr_start, lr_end=third.lr_end)
    assert (first.lr_start, second.lr_start) == pytest.approx((0.5 * 23 / 24, 7 / 12))
    assert schedules.batch_sizes(settings) == (25, 50)


def test_soap_has_a_peak_of_its_own() -> None:
    soap = load(training__optimizer="soap", soap__lr=0.01, lr__lr=3.0, lr__base_batch_size=64)
    assert schedules.learning_rate(soap.schedule, 16, soap.lr.lr_peak_epoch, 1024) == 0.01
    muon = load(training__optimizer="muon", soap__lr=0.01, lr__lr=3.0)
    assert muon.schedule == muon.lr


@pytest.mark.parametrize(("images", "steps"), [(88, 1), (639, 9), (640, 0)])
def test_few_steps_an_epoch_are_said(
    images: int, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = schedules.plan_run(load(training__batch_size=64), images)
    schedules.say_few_steps(plans, images, say=False)
    assert not capsys.readouterr().err
    schedules.say_few_steps(plans, images)
    said = capsys.readouterr().err
    assert (f"of {images} training images an epoch makes {steps} step" in said) == bool(steps)
    schedules.say_few_steps(schedules.plan_run(load(training__batch_size=1), 9), 9)
    assert not capsys.readouterr().err  # no batch is smaller


def test_the_ramp_stays_between_its_ends() -> None:
    """Whatever they are: between 8 and 16 px the nearest multiple of 32 is 0."""
    for low, high in ((8, 16), (100, 113), (128, 192)):
        settings = load(
            resolution__min_res=low, resolution__max_res=high, resolution__start_ramp=0,
            resolution__end_ramp=3, training__epochs=4,
        )  # fmt: skip
        assert all(low <= schedules.resolution(settings, epoch) <= high for epoch in range(4))

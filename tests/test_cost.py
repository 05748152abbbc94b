"""The cost estimate: arithmetic against hand-computed values, the tables, prices, limits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ffcv_imnet.bench import cost
from ffcv_imnet.bench.dry_run import counted, dry_run
from ffcv_imnet.config.parsing import load, parse
from ffcv_imnet.config.schedules import IMAGENET_TRAIN_IMAGES, plan_run
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core import log as records
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.machine.distributed import StopSignal
from ffcv_imnet.models import build_model
from ffcv_imnet.train.optim import build_optimizer
from ffcv_imnet.train.run_dir import cost_of
from ffcv_imnet.train.soap import SOAP
from tests.conftest import SmallData
from tests.test_records import EPOCH
from tests.test_training import results, run

RN18, RN50 = "rn_configs/rn18_16ep.yaml", "rn_configs/rn50_16ep.yaml"


def lines(settings: Settings) -> dict[str, cost.Line]:
    """The estimate for ImageNet by machine."""
    plans = plan_run(settings, IMAGENET_TRAIN_IMAGES)
    return {line.machine.name: line for line in cost.estimate(settings, plans)}


# ---- FLOPs --------------------------------------------------------------------------------------


def test_flops_of_a_network_by_hand() -> None:
    """tests.networks.tiny at 32 px: convolutions to 16, 8 and 4 px, then 48 x 10."""
    settings = load(
        model__arch="tiny", training__use_blurpool=False, training__epochs=2,
        training__batch_size=10, resolution__min_res=32, resolution__max_res=32,
        validation__resolution=32, validation__lr_tta=True, training__ema_decay=0.9,
    )  # fmt: skip
    first = 2 * 27 * 16 * 16**2
    others = 2 * 9 * 16 * 32 * 8**2 + 2 * 9 * 32 * 48 * 4**2 + 2 * 48 * 10
    plans = plan_run(settings, 25)  # two steps an epoch
    training, optimizer, validation = cost.run_flops(settings, plans, 7, 10)
    assert optimizer == 0
    # Backward costs two forwards, but for the pixels' gradient, which nobody needs.
    assert training == 2 * 20 * (2 * first + 3 * others)
    assert validation == 2 * 7 * 4 * (first + others)  # mirror image, and the average as well


def test_flops_of_muon_by_hand() -> None:
    """Five iterations over a rows x columns matrix, in two parts of Gram matrices."""
    settings = load(model__arch="resnet18", training__optimizer="muon")
    kernels = [
        (p.shape[0], p[0].numel()) for p in build_model(settings, 10).parameters() if p.ndim > 3
    ]
    expected = 0
    for rows, columns in ((min(k), max(k)) for k in kernels):
        wide, square = 2 * rows * rows * columns, 2 * max(128, rows) ** 3
        # Twice X X^T and the product with X; 5 polynomials, 2 + 1 further Gram matrices of two
        # products, 2 + 1 products of polynomials.
        expected += 4 * wide + (5 + 6 + 3) * square
    assert cost.step_flops(settings, 10) == expected
    assert cost.step_flops(load(model__arch="resnet18"), 10) == 0


def test_flops_of_soap_are_torchs_count_of_a_step() -> None:
    settings = load(model__arch="resnet18", training__optimizer="soap")
    with torch.device("meta"):
        model = build_model(settings, 10)
    rule = build_optimizer(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert isinstance(rule, SOAP)
    rule.calls = rule.every  # the bases turn in none of the steps that follow, which is not counted
    with FlopCounterMode(display=False) as counter:
        rule.step()
    assert cost.step_flops(settings, 10) == counter.get_total_flops()


def test_flops_of_resnet18_as_published() -> None:
    """torchvision's page of its weights: 1.81 billion multiply-adds at 224 px."""
    settings = load(training__use_blurpool=False)
    assert cost.image_flops(settings, 1000, 224, False) / 2e9 == pytest.approx(1.81, abs=0.01)


# ---- throughputs and the estimate ---------------------------------------------------------------


def test_the_published_runs_come_out() -> None:
    """From the 88-epoch runs, never from the 16-epoch ones themselves: 35.0 and 14.9 minutes."""
    text = cost.THROUGHPUTS.read_text()
    assert "187.3" in text and "77.2" in text
    assert not {"35.0", "35", "14.9"} & set(text.replace(",", " ").split())
    a100 = lines(load(RN18))["a2-highgpu-1g"]
    assert a100.throughput.kind == "published"
    assert a100.hours * 60 == pytest.approx(35.0, rel=0.15)
    eight = lines(load(RN50))["p4d.24xlarge"]
    assert eight.throughput.kind == "published"
    assert eight.hours * 60 == pytest.approx(14.9, rel=0.15)


def test_hours_and_dollars_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that made a run in 60 minutes makes one of twice the epochs in 120."""
    settings = "{training.epochs: 2, training.batch_size: 10, resolution.min_res: 32, resolution.max_res: 32}"
    (tmp_path / "t.yaml").write_text(
        f"rows:\n  - {{gpu: X, arch: tiny, gpus: 1, minutes: 60, images: 100, val_images: 20, "
        f"classes: 10, settings: {settings}, kind: measured, source: here}}\n"
        f"  - {{gpu: Y, of: X, factor: 0.5, kind: estimate, source: half}}\n"
        f"scaling: {{factor: 0.8, source: guess}}\n"
        f"decoding: {{a_vcpu: 0.5, source: here, images_per_second: {{400: {{1: {{32: 1000}}}}}}}}\n"
    )
    (tmp_path / "m.yaml").write_text(
        "machines:\n"
        "  one: {gpu: X, gpus: 1, vcpus: 2, memory_gb: 1, disk_gb: 1, on_demand: 3.0}\n"
        "  four: {gpu: X, gpus: 4, vcpus: 2, memory_gb: 1, disk_gb: 1, on_demand: 3.0}\n"
        "  half: {gpu: Y, gpus: 1, vcpus: 2, memory_gb: 1, disk_gb: 1, on_demand: 3.0}\n"
        "  new: {gpu: Z, gpus: 1, vcpus: 2, memory_gb: 1, disk_gb: 1, on_demand: 3.0}\n"
    )
    monkeypatch.setattr(cost, "MACHINES", tmp_path / "m.yaml")
    monkeypatch.setattr(cost, "THROUGHPUTS", tmp_path / "t.yaml")
    wanted = load(
        model__arch="tiny", training__epochs=4, training__batch_size=10,
        resolution__min_res=32, resolution__max_res=32,
    )  # fmt: skip
    found = {
        line.machine.name: line for line in cost.estimate(wanted, plan_run(wanted, 100), 20, 10)
    }
    assert set(found) == {"one", "four", "half"}  # nothing is known of Z
    assert found["one"].hours == pytest.approx(2.0)
    assert found["one"].cost == pytest.approx(6.0) and found["one"].limit == "GPU"
    assert found["four"].hours == pytest.approx(2.0 / 4 / 0.8)
    assert found["four"].throughput.kind == "estimate"
    assert found["half"].hours == pytest.approx(4.0)
    (stage,) = found["one"].stages
    assert stage.images == 400 and stage.loader == 2 * 0.5 * 1000
    assert stage.gpu > 400 / 7200  # of training alone, so a little faster than the whole run


def test_a_stage_goes_at_the_slower_of_gpu_and_loader() -> None:
    plain = cost.StageSpeed(resolution=128, images=6000, gpu=100.0, loader=300.0)
    bound = cost.StageSpeed(resolution=160, images=6000, gpu=100.0, loader=50.0)
    assert (plain.seconds, plain.limit) == (60, "GPU")
    assert (bound.seconds, bound.limit) == (120, "decoding")
    machine = cost.Machine("box", "X", 1, 2, 1, 1, 10.0)
    known = cost.Throughput(1.0, "estimate", "here")
    both = cost.Line(machine, known, (plain, bound), validation=180.0)
    assert both.hours == 0.1 and both.cost == 1.0 and both.limit == "decoding at 160 px"
    assert cost.Line(machine, known, (bound,), 0.0).limit == "decoding"


def test_decoding_takes_the_row_that_is_not_easier(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {256: {0.08: {128: 8.0, 192: 7.0}, 0.5: {128: 6.0}}, 400: {0.08: {128: 4.0}}}
    table = {"a_vcpu": 0.5, "images_per_second": rows}
    monkeypatch.setattr(cost, "_table", lambda path, key: table)
    assert cost.decode_rate(256, 0.08, 128) == 4
    assert cost.decode_rate(200, 0.05, 160) == 3.5  # the smallest stored, the next resolution
    assert cost.decode_rate(256, 0.35, 128) == 3  # weaker crops are larger: slower
    assert cost.decode_rate(300, 0.08, 128) == 2
    assert cost.decode_rate(999, 0.9, 999) == 2  # beyond the table: its hardest row
    del rows[256][0.08], rows[256][0.5]
    with pytest.raises(UsageError, match=r"throughputs\.yaml: decoding lacks or mistakes"):
        cost.decode_rate(256, 0.08, 128)


@pytest.mark.parametrize("recipe", ["rn18_10ep", "rn18_8ep"])
def test_an_h100_with_16_vcpus_waits_for_400_px_and_not_for_256(recipe: str) -> None:
    """The claim of the recipes' headers."""
    settings = load(f"rn_configs/{recipe}.yaml")
    plans = plan_run(settings, IMAGENET_TRAIN_IMAGES)
    minutes = {}
    for stored in (400, 256):
        found = cost.estimate(settings, plans, stored=stored)
        (line,) = (line for line in found if line.machine.name == "p5.4xlarge")
        minutes[stored] = 60 * line.hours
        assert line.limit.startswith("decoding" if stored == 400 else "GPU"), line
    assert minutes[256] < 0.9 * minutes[400]


def test_the_stored_size_is_the_files_own(small: SmallData, tmp_path: Path) -> None:
    assert cost.stored_side(load(data__train_dataset=tmp_path / "no.beton")) == cost.STORED
    assert cost.stored_side(small.settings(tmp_path)) == 400
    said = json.loads(small.train.with_suffix(".json").read_text())
    said["settings"] |= {"max_resolution": None, "short_side": 192}
    (tmp_path / "train.json").write_text(json.dumps(said))
    assert cost.stored_side(load(data__train_dataset=tmp_path / "train.beton")) == 256


def test_the_tables_parse_and_every_row_names_its_source() -> None:
    known = cost.machines()
    assert {"g4dn.2xlarge", "g5.2xlarge", "p4d.24xlarge", "p5.48xlarge"} <= set(known)
    for machine in known.values():
        found = cost.throughput(machine.gpu, machine.gpus, "resnet18")
        assert found is not None and found.tflops > 1 and found.source
        assert found.kind in ("measured", "published", "estimate")
        assert machine.vcpus >= 8 and machine.on_demand > 0
    other = cost.throughput("A100", 1, "resnet34")
    assert other is not None and other.kind == "estimate" and "resnet34 taken" in other.source


@pytest.mark.parametrize("row", ["{gpu: X}", "{gpu: X, gpus: 1, vcpu: 8}"])
def test_a_wrong_row_is_one_line(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MACHINES", tmp_path / "m.yaml")
    (tmp_path / "m.yaml").write_text(f"machines:\n  box: {row}\n")
    with pytest.raises(UsageError, match=r"m\.yaml: box: .*(vcpu|missing)") as error:
        cost.machines()
    assert "\n" not in str(error.value)
    (tmp_path / "m.yaml").write_text("machines: {box")
    with pytest.raises(UsageError, match=r"m\.yaml: not a table"):
        cost.machines()


def test_dry_run_prints_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(load(RN18), False, 0.0) == 0
    said = capsys.readouterr().out
    assert "p4d.24xlarge" in said and "published [" in said and "ffcv-imagenet" in said
    assert "on demand" in said and "not verified" in said
    assert "min at 400 px" in said and "min at 256 px" in said and "stored at 400 px" in said


@pytest.mark.parametrize("recipe", sorted(Path("rn_configs").glob("rn*.yaml")), ids=str)
def test_the_estimate_fits_100_columns(recipe: Path) -> None:
    settings = load(recipe)
    said = cost.describe(settings, plan_run(settings, IMAGENET_TRAIN_IMAGES))
    assert not [line for line in said.splitlines() if len(line) > 100 and "yaml" not in line]
    assert "img/s [" in said and "decoding" in said


def test_a_run_of_seconds_has_no_table() -> None:
    settings = load("rn_configs/demo.yaml")
    said = cost.describe(settings, plan_run(settings, 640), 64, 10)
    assert "seconds on each of the " in said and "$" not in said
    assert "$" in cost.describe(settings, plan_run(settings, IMAGENET_TRAIN_IMAGES), 64, 10)


def test_the_dry_run_of_imagenet_where_small_files_lie(
    small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too small a file is a warning; one file alone does not mix with ImageNet's numbers."""
    wide = small.settings(tmp_path, training__batch_size=1024)
    assert dry_run(wide, False, 0.0) == 0
    said, warned = capsys.readouterr()
    assert "training would refuse" in warned and "larger than the 100 training images" in warned
    assert "1,281,167 training images (ImageNet's number, as " in said and "is too small" in said
    assert "50,000 validation images" in said and "cost estimate" in said
    assert (
        dry_run(replace(wide, data=replace(wide.data, train_dataset="no.beton")), False, 0.0) == 0
    )
    said, warned = capsys.readouterr()
    assert "1,281,167 training" in said and "50,000 validation" in said and not warned
    alone = small.settings(tmp_path, data__val_dataset="no.beton")
    (train,) = counted(alone, ["train"])  # as tune asks
    assert train.images == 100


# ---- prices and limits --------------------------------------------------------------------------


def test_price() -> None:
    assert cost.price(load().cost) is None
    assert cost.price(load(cost__machine="g4dn.2xlarge").cost) == 0.752
    assert cost.price(load(cost__machine="g4dn.2xlarge", cost__dollars_per_hour=0.3).cost) == 0.3
    with pytest.raises(UsageError, match=r"'g4dn.xlarge' is not in .*did you mean g4dn.2xlarge"):
        cost.price(load(cost__machine="g4dn.xlarge").cost)
    with pytest.raises(UsageError, match=r"training\.max_cost needs a price"):
        load(training__max_cost=1)
    with pytest.raises(UsageError, match="--measure goes with --dry_run"):
        parse(["--measure"])


def test_limits_by_hand() -> None:
    assert cost.limit(load().training, 4.0) is None
    hour = cost.limit(load(training__max_hours=1).training, None)
    assert hour == cost.Limit(3600, "training.max_hours 1")
    both = load(training__max_hours=1, training__max_cost=2, cost__dollars_per_hour=4)
    half_an_hour = cost.limit(both.training, 4.0)
    assert half_an_hour == cost.Limit(1800, "training.max_cost 2")
    epoch = replace(EPOCH, val_seconds=20.0)
    assert cost.training_seconds(half_an_hour, [epoch]) == 1800 - 20 - cost.RESERVE
    assert cost.training_seconds(half_an_hour, []) == 1800 - cost.RESERVE
    assert cost.training_seconds(None, [epoch]) == float("inf")
    assert cost_of(1800, 4.0) == 2.0 and cost_of(1800, None) is None


def test_a_run_stops_at_its_limit_and_resumes(
    small: SmallData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The time is up after one epoch and two steps of the next."""
    plain = {"training__epochs": 3, "cost__dollars_per_hour": 3600}
    limited = small.settings(tmp_path / "run", **plain, training__max_hours=1)
    asked: list[None] = []

    def late(stop: StopSignal) -> bool:
        asked.append(None)
        return len(asked) > 1 + 6 + 1 + 1  # before each epoch, and in each of its steps

    monkeypatch.setattr(StopSignal, "late", property(late))
    assert run(limited) == 0
    assert "stopped by training.max_hours 1 in epoch 1, step 2;" in capsys.readouterr().out
    log = records.read_log(tmp_path / "run")
    assert len(log.epochs) == 1 and log.summary is not None
    assert log.summary.stopped == "training.max_hours 1"
    assert log.summary.elapsed_seconds > log.epochs[-1].elapsed_seconds
    assert log.summary.cost_dollars == pytest.approx(log.summary.elapsed_seconds, abs=1e-3)

    assert run(limited, "auto") == 0  # the same limit: nothing more, and no harm
    assert "in epoch 1, step 2" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(small.settings(tmp_path / "run", **plain), "auto") == 0
    resumed = records.read_log(tmp_path / "run")
    starts = [(header.first_epoch, header.first_step) for header in resumed.headers]
    assert starts == [(0, 0), (1, 2), (1, 2)]  # the second had no time at all
    assert run(small.settings(tmp_path / "whole", **plain)) == 0
    assert results(resumed) == results(records.read_log(tmp_path / "whole"))
    assert resumed.summary is not None and resumed.summary.stopped is None
    last = (tmp_path / "run/log.jsonl").read_text().splitlines()[-1]
    assert '"type": "summary"' in last and "cost_dollars" in last


def test_a_limit_within_the_first_epoch(
    small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small.settings(tmp_path / "run", training__max_hours=1e-9)
    assert run(settings) == 0
    assert "stopped by training.max_hours 1e-09 in epoch 0, step 0" in capsys.readouterr().out
    assert records.read_log(tmp_path / "run").summary is None

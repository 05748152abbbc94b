"""The JSON epoch log: written, read, truncated, damaged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ffcv_imnet.core import log as records
from ffcv_imnet.core.errors import RunError, UsageError

HEADER = records.Header(
    settings={"lr": {"lr": 0.5}},
    manifests={"train": {"samples": 3}},
    versions={"torch": "2"},
    device="cpu",
    precision="fp32",
    world_size=1,
    started="2026-01-01T00:00:00+00:00",
)
EPOCH = records.Epoch(
    epoch=0,
    resolution=160,
    batch_size=8,
    lr=0.1,
    train_loss=1.5,
    val_loss=1.25,
    top_1=0.5,
    top_5=0.75,
    ema_top_1=0.625,
    images_per_second=100.0,
    train_seconds=1.0,
    loader_seconds=0.1,
    val_seconds=0.5,
    elapsed_seconds=2.0,
)
REACHED = records.Reached(top_1=0.625, by="ema_top_1", epoch=0, elapsed_seconds=2.0)
SUMMARY = records.Summary(
    reached=REACHED, best_top_1=0.625, best_epoch=0, epochs=1, elapsed_seconds=2.0
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for record in (HEADER, EPOCH, HEADER, SUMMARY):
        records.append(path, record)
    assert records.read_log(path) == records.Log([HEADER, HEADER], [EPOCH], SUMMARY)
    assert records.read_log(tmp_path) == records.read_log(path)


def test_absent_not_null() -> None:
    line = records.to_line(EPOCH)
    assert "null" not in line
    assert "tta_top_1" not in json.loads(line) and json.loads(line)["ema_top_1"] == 0.625


def test_not_a_number_is_no_json() -> None:
    with pytest.raises(ValueError):
        records.to_line(records.Epoch(**{**EPOCH.__dict__, "val_loss": float("nan")}))


def test_line_cut_off_in_writing_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(records.to_line(HEADER) + records.to_line(EPOCH)[:40])
    assert records.read_log(path) == records.Log([HEADER], [], None)


@pytest.mark.parametrize("line", ["{not json}\n", '{"type": "poch"}\n', "[1]\n", "{}\n"])
def test_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(records.to_line(HEADER) + line)
    with pytest.raises(RunError, match="line 2"):
        records.read_log(path)


def test_missing_log(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        records.read_log(tmp_path)
    with pytest.raises(
        UsageError, match=r"no such file or folder; a run's folder holds log\.jsonl"
    ):
        records.read_log(tmp_path / "no")


def test_one_is_not_many() -> None:
    said = records.describe_summary(replace(SUMMARY, epochs=1, reached=None), Path("l"), 0.0)
    assert "; 1 epoch in " in said


def test_rewrite_replaces_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    records.rewrite(path, [HEADER, EPOCH, EPOCH])
    records.rewrite(path, [HEADER, EPOCH])
    assert len(records.read_log(path).epochs) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match=r"log\.jsonl: not a log: it is no text"):
        records.read_log(tmp_path)


HEADER_LINE, EPOCH_LINE = records.to_line(HEADER), records.to_line(EPOCH)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (EPOCH_LINE, "its first line is no header"),
        (
            HEADER_LINE + EPOCH_LINE.replace('"top_1": 0.5', '"top_1": 66.2'),
            "top_1, which is a frac",
        ),
        (HEADER_LINE + EPOCH_LINE.replace('"epoch": 0', '"epoch": "0"'), "has '0' as its epoch"),
        (
            HEADER_LINE + EPOCH_LINE.replace('"lr": 0.1', '"lr": NaN'),
            "it has NaN, which is no number",
        ),
        (HEADER_LINE + EPOCH_LINE.replace('"lr": 0.1', '"lr": 1e999'), "has inf as its lr"),
        (HEADER_LINE + EPOCH_LINE.replace('"lr": 0.1', '"lr": true'), "has True as its lr"),
        (HEADER_LINE + EPOCH_LINE.replace('"lr"', '"rate"'), "has no lr"),
        (
            HEADER_LINE + EPOCH_LINE.replace('"lr"', '"mood": 1, "lr"'),
            "has the unknown field 'mood'",
        ),
        (HEADER_LINE + '{"type": ["epoch"]}\n', "it is of none of the types"),
        (HEADER_LINE + "[" * 100_000 + "\n", "it is not JSON"),
        (HEADER_LINE.replace('{"lr": 0.5}', "0.5"), "as its settings"),
        (HEADER_LINE.replace('{"samples": 3}', "[]"), "as its manifests"),
        ('{"epoch": 1, "accuracy": 71.3}\n', "not a run's log"),
    ],
)
def test_a_foreign_log_is_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    """Percent for fractions drew 6600 %, and types were believed."""
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises((RunError, UsageError)) as error:
        records.read_log(tmp_path)
    assert says in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500

"""The tools' entry, the report of a run, and the demo's verdict."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ffcv_imnet import __main__ as entry
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.log import Epoch, Header, Reached, Record, Summary, read_log, to_line
from ffcv_imnet.report import html, runs
from ffcv_imnet.report.runs import group_runs
from ffcv_imnet.tools import demo, report


def header(stop_at: float = 0.65) -> Header:
    return Header(
        settings={"model": {"arch": "resnet18"}, "training": {"stop_at": stop_at}},
        manifests={},
        versions={},
        device="test device",
        precision="fp32",
        world_size=1,
        started="2026-01-01T00:00:00+00:00",
        git_commit="0123456789abcdef",
    )


def epoch(number: int, top_1: float, **more: Any) -> Epoch:
    return Epoch(
        epoch=number,
        resolution=160 if number < 2 else 192,
        batch_size=256,
        lr=0.5 - 0.1 * number,
        train_loss=3.0 - 0.2 * number,
        val_loss=2.5 - 0.2 * number,
        top_1=top_1,
        top_5=min(1.0, top_1 + 0.2),
        images_per_second=1234.5,
        train_seconds=10.0,
        loader_seconds=1.0,
        val_seconds=2.0,
        elapsed_seconds=12.0 * (number + 1),
        **more,
    )


def summary(top_1: float, reached: Reached | None = None) -> Summary:
    return Summary(reached=reached, best_top_1=top_1, best_epoch=2, epochs=3, elapsed_seconds=36.0)


def write_run(folder: Path, *records: Record) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(to_line(record) for record in records))
    return folder


HIT = Reached(top_1=0.7, by="top_1", epoch=2, elapsed_seconds=36.0)
FINISHED = (header(), epoch(0, 0.3), epoch(1, 0.5), epoch(2, 0.7), summary(0.7, HIT))


# ---- the entry ----------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["ffcv_imnet", *argv])
    return entry.main()


def test_help_lists_every_tool_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in ([], ["--help"]):
        assert call(monkeypatch, *argv) == 0
        out = capsys.readouterr().out
        for name, line in entry.tools().items():
            assert line and f"  {name} " in out and line in out
    assert {"demo", "report"} <= set(entry.tools())


def test_an_unknown_tool_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"'reprot' \(did you mean report\?\)"):
        call(monkeypatch, "reprot")


# ---- the table ----------------------------------------------------------------------------------


def test_the_table_has_a_row_an_epoch_and_only_the_columns_there_are(tmp_path: Path) -> None:
    plain = report.table(read_log(write_run(tmp_path / "plain", *FINISHED)))
    assert len(plain.splitlines()) == 2 + 3
    assert plain.split()[:7] == ["epoch", "px", "lr", "train_loss", "val_loss", "top_1", "top_5"]
    assert plain.splitlines()[-1].split() == [
        "2", "192", "0.3000", "2.600", "2.100", "0.7000", "0.9000", "1,234", "36"
    ]  # fmt: skip
    assert "ema" not in plain and "tta" not in plain
    none = write_run(tmp_path / "none", header(), epoch(0, 0.3, skipped=0, val_skipped=0))
    assert "skipped" not in report.table(read_log(none))
    some = write_run(tmp_path / "some", header(), epoch(0, 0.3, skipped=2, val_skipped=0))
    lost = report.table(read_log(some))
    assert lost.splitlines()[0].split()[-1] == "skipped" and lost.split()[-1] == "2"
    augmented = epoch(0, 0.3, tta_top_1=0.31, ema_top_1=0.32, ema_tta_top_1=0.33)
    both = report.table(read_log(write_run(tmp_path / "both", header(), augmented, epoch(1, 0.5))))
    assert all(name in both for name in ("ema_top_1", "tta_top_1", "ema_tta_top_1", "0.3300"))


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (FINISHED, "Target 0.65 reached: top_1 0.7000 after epoch 2, 36 s."),
        ((header(), epoch(0, 0.3), summary(0.3)), "Target 0.65 not reached."),
        ((header(0.0), epoch(0, 0.3), summary(0.3)), "No target."),
        # Not finished: no summary says it, the epochs do. TTA does not count, EMA does.
        ((header(), epoch(0, 0.6, tta_top_1=0.7)), "not finished. Target 0.65 not reached."),
        ((header(), epoch(0, 0.6, ema_top_1=0.66)), "reached: ema_top_1 0.6600 after epoch 0"),
    ],
)
def test_the_verdict(tmp_path: Path, records: tuple[Record, ...], expected: str) -> None:
    assert expected in report.verdict(read_log(write_run(tmp_path / "run", *records)))


def test_a_resumed_run_says_so(tmp_path: Path) -> None:
    log = read_log(write_run(tmp_path / "run", header(), epoch(0, 0.3), header(), epoch(1, 0.4)))
    assert "1 x resumed" in report.origin(log)


# ---- the image --------------------------------------------------------------------------------


def test_the_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", *FINISHED)
    assert report.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "resnet18 on test device" in out and f"curve: {run / 'curve.png'}" in out
    with Image.open(run / "curve.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 600
    assert sorted(p.name for p in run.iterdir()) == ["curve.png", "log.jsonl"]
    assert report.main([str(run / "log.jsonl")]) == 0  # the file itself will do


def test_words_of_a_log_do_nothing_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = replace(header(), device="\x1b]0;title\x07", git_commit="\x1b[31m")
    assert report.main([str(write_run(tmp_path / "run", odd, *FINISHED[1:]))]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and r"\x1b]0;title\x07" in said


def test_epochs_of_a_log_follow_one_another(tmp_path: Path) -> None:
    for twice in (0, 2):
        path = write_run(
            tmp_path / f"run{twice}", header(), epoch(2, 0.3), header(), epoch(twice, 0.4)
        )
        with pytest.raises(
            RunError, match=f"line 4: epoch {twice} after epoch 2, so it is the log of"
        ):
            read_log(path)


def test_matplotlib_is_quiet_whatever_surrounds_it(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("font.family: Nope\nbogus: 3\n")
    code = "import ffcv_imnet.tools; from matplotlib.figure import Figure; f = Figure(); f.text(0, 0, '🦊'); f.savefig('x.png')"
    environment = os.environ | {"MPLBACKEND": "nope", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_norms_are_drawn_where_the_log_has_them(tmp_path: Path) -> None:
    rows = [
        {"step": s, "loss": 3.0, "sgd_gradient": 2.0, "sgd_weights": 8.0, "sgd_update": s / 10}
        for s in (0, 4, 9)
    ]
    del rows[2]["sgd_gradient"]  # it was not finite
    log = write_run(tmp_path / "run", header(), epoch(0, 0.3), epoch(1, 0.4, norms=rows))
    read = read_log(log)
    assert runs.norm_groups(read) == ["sgd"]
    assert runs.norm_points(read, "sgd", share=False) == [(0.1, 2.0), (0.5, 2.0)]
    assert runs.norm_points(read, "sgd", share=True) == [(0.5, 0.05), (1.0, 0.1125)]
    heights = {}
    for name, path in (("with", log), ("without", write_run(tmp_path / "plain", *FINISHED))):
        assert report.main([str(path)]) == 0
        with Image.open(path / "curve.png") as picture:
            heights[name] = picture.size[1]
    assert heights["with"] > heights["without"]
    page = html.write_page(group_runs([runs.read_run(log)]), ["left out"], [])
    assert "Gradients and updates" in page and "Update of sgd" in page
    page = html.write_page(group_runs([runs.read_run(tmp_path / "plain")]), ["left out"], [])
    assert "Gradients and updates" not in page


def test_several_runs_share_one_image(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, *FINISHED)) for name in ("one", "two")]
    with pytest.raises(UsageError, match="--out"):
        report.main(runs)
    assert report.main([*runs, "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").is_file()
    assert not (tmp_path / "one" / "curve.png").exists()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match=r"unknown option --outt"):
        report.main([str(tmp_path), "--outt", "x.png"])
    with pytest.raises(RunError, match="no epoch"):
        report.main([str(write_run(tmp_path / "new", header()))])
    run = write_run(tmp_path / "run", *FINISHED)
    for out in ("curve.jpg", "no/such/folder/curve.png"):
        with pytest.raises(UsageError, match="--out"):
            report.main([str(run), "--out", str(tmp_path / out)])
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    lines[1] = json.dumps({"type": "epoch", "epoch": 0}) + "\n"
    (run / "log.jsonl").write_text("".join(lines))
    with pytest.raises(RunError, match=r"log\.jsonl, line 2"):
        report.main([str(run)])


# ---- the demo's verdict -------------------------------------------------------------------------


def test_the_demo_fails_below_the_accuracy_that_proves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.conclude(write_run(tmp_path / "good", *FINISHED)) == 0
    assert "It works: top-1 70.0%; 65% proves it" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"30\.0% stayed below 65%"):
        demo.conclude(write_run(tmp_path / "bad", header(), epoch(0, 0.3), summary(0.3)))


def test_a_failed_step_ends_the_demo(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="-c ended with status 3"):
        demo.run("-c", "raise SystemExit(3)")

"""Variants over seeds, and two recipes beside each other."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image

import train_imagenet
from ffcv_imnet.config.parsing import parse, to_yaml
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.log import read_log
from ffcv_imnet.tools import compare, sweep
from tests.conftest import SmallData

CONFIG = "config: rn_configs/demo.yaml\n"
SWEEP = """
config: {config}
seeds: [3, 4]
variants:
  plain: {{}}
  muon: {{training.optimizer: muon, training: {{ema_decay: 0.5}}, augmentation.crop_scale: [0.5, 1]}}
"""


@pytest.fixture(scope="module")
def swept(small: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants of a tiny network over two seeds, trained in this process."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "recipe.yaml").write_text(to_yaml(small.settings(folder / "unused")))
    (folder / "sweep.yaml").write_text(SWEEP.format(config=folder / "recipe.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "train", train_here)
        assert sweep.main([str(folder / "sweep.yaml"), "--out", str(folder / "out")]) == 0
    return folder


def train_here(run: sweep.Run) -> None:
    assert train_imagenet.train(parse(run.options).settings, "auto", time.perf_counter()) == 0


def test_the_runs_are_what_the_sweep_says(swept: Path) -> None:
    for seed in (3, 4):
        plain, muon = (
            read_log(swept / "out" / name / f"seed{seed}").headers[0].settings
            for name in ("plain", "muon")
        )
        assert plain["training"]["seed"] == muon["training"]["seed"] == seed
        assert plain["training"]["optimizer"] == "sgd"
        assert muon["training"]["optimizer"] == "muon"
        assert muon["training"]["ema_decay"] == 0.5
        assert muon["augmentation"]["crop_scale"] == [0.5, 1.0]


def test_what_is_done_is_skipped(
    swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(sweep, "train", lambda run: trained.append(str(run.folder)))
    log = swept / "out/plain/seed4/log.jsonl"
    whole = log.read_text()
    arguments = [str(swept / "sweep.yaml"), "--out", str(swept / "out")]
    assert sweep.main(arguments) == 0 and trained == []
    text = capsys.readouterr().out
    assert (swept / "out/table.txt").read_text().strip() in text
    assert [line.split()[1] for line in text.splitlines()[-2:]] == ["2", "2"]
    log.write_text("".join(whole.splitlines(True)[:-1]))  # without its summary
    assert sweep.main(arguments) == 0
    assert trained == [str(log.parent)]
    log.write_text(whole)


def test_a_run_of_other_settings_is_not_taken_for_this_one(swept: Path) -> None:
    """A folder of an earlier sweep must not stand in the table of a changed one."""
    changed = (swept / "sweep.yaml").read_text().replace("ema_decay: 0.5", "ema_decay: 0")
    (swept / "changed.yaml").write_text(changed)
    words = r"out/muon/seed3 holds a run of other settings \(training.ema_decay 0.5 -> 0.0\)"
    with pytest.raises(UsageError, match=words):
        sweep.main([str(swept / "changed.yaml"), "--out", str(swept / "out"), "--table"])


def test_a_target_for_other_images_stops_no_second_start(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training drops such a target, before it writes its settings into the log."""
    settings = small.settings(
        tmp_path / "unused", training__epochs=1, training__stop_at=0.9,
        training__stop_at_on="imagenet", training__stop_when_reached=True,
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(to_yaml(settings))
    path = tmp_path / "sweep.yaml"
    path.write_text(f"config: {tmp_path / 'recipe.yaml'}\nvariants: {{a: {{}}}}\n")
    monkeypatch.setattr(sweep, "train", train_here)
    for _ in range(2):
        assert sweep.main([str(path), "--out", str(tmp_path / "out")]) == 0
    path.write_text(path.read_text().replace("{a: {}}", "{a: {training.stop_at_on: any}}"))
    with pytest.raises(UsageError, match="stop_when_reached False -> True"):
        sweep.main([str(path), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: no.yaml\nvariants: {a: {}}", "variant a: --config no.yaml: no such file"),
        (f"{CONFIG}variants: {{a: {{training.epoch: 3}}}}", r"variant a: .*training\.epoch"),
        (f"{CONFIG}variants: {{../a: {{}}}}", "names a folder"),
        (f"{CONFIG}variants: {{..: {{}}}}", "names a folder"),
        (f"{CONFIG}variants: {{a: [1, 2]}}", r"variant a: expected settings, not \[1, 2\]"),
        (f"{CONFIG}variants: {{a: muon}}", "variant a: expected settings, not 'muon'"),
        (f"{CONFIG}variants: {{a: {{training: {{seed: 3}}}}}}", "training.seed is the sweep's"),
        (f"{CONFIG}variants: [a]", "needs config"),
        ("variants: {a: {}}", "needs config"),
        ("", "holds no settings"),
        ("seeds: 3", "seeds must be a list of integers"),
        ("seeds: [1, 2, 1]", "a seed stands twice"),
        ("variant: {a: {}}", "unknown key 'variant'"),
    ],
)
def test_mistakes_are_said_before_any_run(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        sweep.main([str(tmp_path / "s.yaml"), "--out", str(tmp_path)])


def test_a_run_that_fails_ends_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        f"{CONFIG}variants: {{a: {{data.train_dataset: {tmp_path}/no.beton}}}}"
    )
    with pytest.raises(RunError, match=r"a/seed0: training ended with status 2"):
        sweep.main([str(tmp_path / "s.yaml"), "--out", str(tmp_path)])


def test_compare(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, old = ([str(p) for p in sorted(swept.glob(f"out/{n}/*"))] for n in ("muon", "plain"))
    out = swept / "curves.png"
    arguments = [*new, "--against", *old, "--target", "0.05", "--names", "muon", "sgd"]
    assert compare.main([*arguments, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "p, paired by seed" in text and "muon (n=2)" in text and "epochs to 5.00%" in text
    with Image.open(out) as picture:
        assert picture.size[0] == 1200
    assert compare.main([new[0], "--against", *old]) == 0
    assert "p, Welch" in capsys.readouterr().out


def test_compare_s_mistakes(swept: Path) -> None:
    run = str(swept / "out/plain/seed3")
    with pytest.raises(UsageError, match="seed 3 stands twice among the runs of new"):
        compare.main([run, run, "--against", run])
    with pytest.raises(UsageError, match="--target 65 must lie between 0 and 1"):
        compare.main([run, "--against", run, "--target", "65"])


def test_compare_warns_of_what_does_not_compare(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = swept / "out/plain/seed3"
    assert compare.main([str(run), "--against", str(run)]) == 0
    assert "warning" not in capsys.readouterr().err
    averaged = swept / "out/muon/seed3"
    assert compare.main([str(run), "--against", str(averaged), "--target", "0.999"]) == 0
    out, words = capsys.readouterr()
    assert words == "warning: old keeps averaged weights: its top-1 is theirs, ema_top_1\n"
    assert "reached by 0 of 1" in out and "one run" in out
    with pytest.raises(UsageError, match="not a run's log"):
        compare.main([str(Path(__file__).parents[1] / "README.md"), "--against", str(run)])
    header, first, *_ = (run / "log.jsonl").read_text().splitlines()
    record = json.loads(header)
    record["manifests"]["val"]["content_checksum"] = "sha256:0"
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(record)}\n{first}\n")
    assert compare.main([str(tmp_path), "--against", str(run)]) == 0
    words = capsys.readouterr().err
    assert "different images" in words
    assert "new, seed 3: the run has not ended; epoch 0 is taken" in words

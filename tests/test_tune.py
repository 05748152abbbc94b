"""The search for a recipe's settings: what its short runs are, and one search from end to end."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ffcv_imnet.bench import short_runs
from ffcv_imnet.bench.search import Search, ranges, values_of, with_values
from ffcv_imnet.bench.short_runs import Rung, ShortRuns, held_out, plan_rungs, runs_of_rungs, short
from ffcv_imnet.config.parsing import load, to_yaml
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data import loader
from ffcv_imnet.machine.distributed import World, describe_world
from ffcv_imnet.tools import tune
from tests.conftest import SmallData

RECIPE = "rn_configs/rn18_10ep.yaml"


def test_short_run_keeps_the_schedules_shape() -> None:
    recipe = load(RECIPE)
    two = short(recipe, Rung(subset=5_000, epochs=2))
    plans = plan_run(two, 5_000)
    assert [plan.resolution for plan in plans] == [128, 128]
    assert two.lr.lr_peak_epoch / 2 == recipe.lr.lr_peak_epoch / recipe.training.epochs
    # 224 px after 192 in training is 149 after 128: the next multiple of 16.
    assert two.validation.resolution == 144
    assert not two.training.compile and two.training.ema_decay == 0


@pytest.mark.parametrize("trials", [9, 27, 100])
def test_expected_runs_are_those_of_random_scores(trials: int) -> None:
    """Optuna's rule, played with scores in random order."""
    random = np.random.default_rng(0)
    counts = []
    for _ in range(300):
        rungs: list[list[float]] = [[], [], []]
        for _ in range(trials):
            for rung in rungs:
                score = float(random.random())
                rung.append(score)
                if sorted(rung).index(score) >= max(1, len(rung) // 3):
                    break
        counts.append([len(rung) for rung in rungs])
    assert runs_of_rungs(trials) == pytest.approx(np.mean(counts, axis=0), rel=0.15)


def test_rungs_fill_the_budget_and_stay_within_the_data() -> None:
    rungs = plan_rungs(20_000_000, 27, 4, 1_281_167, 1024)
    assert [b.images / a.images for a, b in pairwise(rungs)] == pytest.approx([3, 3], rel=1e-3)
    counts = runs_of_rungs(27)
    counts[-1] += 4
    whole = sum(rung.images * count for rung, count in zip(rungs, counts, strict=True))
    assert whole == pytest.approx(20_000_000, rel=1e-3)
    small = plan_rungs(math.inf, 27, 4, 25_000, 64)[
        -1
    ]  # no more than twice all that is not held out
    assert small == Rung(subset=22_500, epochs=2)
    with pytest.raises(
        UsageError, match="16 are needed: give a batch of 51 or less, or a larger --min"
    ):
        plan_rungs(100_000, 27, 4, 1_281_167, 1024)
    with pytest.raises(
        UsageError, match=r"16 are needed: give a batch of \d+ or less, or more images"
    ):
        plan_rungs(math.inf, 27, 4, 1_000, 1024)


@pytest.mark.parametrize(
    "options",
    [{}, {"training__optimizer": "sgd", "lr__decay": "cosine"}, {"training__optimizer": "soap"}],
)
def test_drawn_values_become_settings_and_come_back(options: dict[str, str]) -> None:
    recipe = load(RECIPE, **options)
    keys = list(ranges(recipe))
    middle = {key: math.sqrt(span.low * span.high) for key, span in ranges(recipe).items()}
    for steps in (100, 10_000):
        there = with_values(recipe, middle, steps)
        assert values_of(there, keys, steps) == pytest.approx(middle, rel=0.02)
    if "soap.lr" in keys:
        rates = [with_values(recipe, {"soap.lr": 0.01}, n).soap.lr for n in (1000, 16_000)]
        assert rates == [0.01, 0.00642]
    # The same decay over a whole run, whatever its length; SOAP's learning rate falls as it becomes longer.
    decays = [key for key in keys if key.endswith("weight_decay")]
    section, name = decays[0].split(".")
    of = [getattr(getattr(with_values(recipe, middle, n), section), name) for n in (100, 1000)]
    shrink = 10 ** (0.84 if "soap.lr" in keys else 1)
    assert of[0] == pytest.approx(shrink * of[1], rel=0.01)


def test_subsets_are_nested_and_held_out_images_never_trained(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small.settings(tmp_path)
    runs = ShortRuns(100, 10, None, describe_world("cpu"))
    assert len(runs.held) == held_out(100) == 10
    assert sorted([*runs.held, *runs.rest]) == list(range(100))
    orders = []

    class Noted(short_runs.TrainLoader):
        def epoch(self, plan, first_step=0, only=None):  # type: ignore[no-untyped-def]
            orders.append(only)
            return super().epoch(plan, first_step, only)

    monkeypatch.setattr(short_runs, "TrainLoader", Noted)
    scores = [runs.run(settings, rung) for rung in (Rung(48, 1), Rung(90, 2), Rung(48, 1))]
    assert [len(order) for order in orders] == [48, 80, 80, 48]  # what fills batches of 16
    assert set(orders[0]) == set(runs.rest[:48])
    assert all(not set(order) & set(runs.held) for order in orders)
    assert scores[0].loss == scores[2].loss < math.inf  # the same run twice
    wild = replace(settings, lr=replace(settings.lr, lr=1e30))
    assert runs.run(wild, Rung(48, 1)).loss == math.inf


def test_dry_run_needs_neither_data_nor_optuna(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--config", RECIPE, "--dry_run", "--search", "muon.lr"]) == 0
    said = capsys.readouterr().out
    assert "27 trials of muon.lr at 128 px, scored on 10,000 images" in said
    (line,) = [line for line in said.splitlines() if short_runs.PRICED_ON in line]
    assert 28 <= float(line.split()[2]) <= 32  # minutes: the default is 30
    assert re.search("none: a CPU +not measured", said)
    for options, words in (
        (["--search", "lr.warmth"], "--search 'lr.warmth': it is one or more of muon.lr,lr.lr"),
        (["--trials", "3"], "argument --trials: '3' is not a whole number of at least 9|from 9"),
        (["--resume", "auto"], "takes neither --resume"),
        (["--minuts", "3"], "unknown option --minuts"),
        (["--search", ""], "--search ''"),
        (["--model.weights=nowhere.pth"], "nowhere.pth: no such file"),
    ):
        with pytest.raises(UsageError, match=words):
            tune.main(["--config", RECIPE, "--dry_run", *options])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"settings": 3}', '{"settings": {"lr": 3}}', "[" * 100_000, "\xff"],
)
def test_what_is_searched_is_read_or_refused(small: SmallData, tmp_path: Path, text: str) -> None:
    settings = small.settings(tmp_path, training__batch_size=1)
    search = Search(settings, 100, ("a", "b"), (Rung(48, 1),) * 3, 9, ("lr.lr",), tmp_path)
    path = tmp_path / "search.json"
    path.write_text(json.dumps(search.to_json()))
    tune._check_same(search)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=r"search\.json: not the file that says what is searched"):
        tune._check_same(search)


@pytest.mark.parametrize("text", ["rubbish\n", "[]\n", '{"op_code": 99}\n', "\xff\n"])
def test_a_damaged_log_of_trials_is_named(small: SmallData, tmp_path: Path, text: str) -> None:
    pytest.importorskip("optuna")
    settings = small.settings(tmp_path)
    search = Search(settings, 100, ("a", "b"), (Rung(48, 1),) * 3, 9, ("lr.lr",), tmp_path)
    tune.open_study(search)
    with (tmp_path / "trials.log").open("a", encoding="latin-1") as file:
        file.write(text)
    with pytest.raises(RunError, match=r"trials\.log: optuna cannot read it"):
        tune.open_study(search)


@pytest.mark.parametrize(
    ("visible", "gpus", "wanted"),
    [
        (None, 0, [None, None, None]),
        (None, 1, ["0", "0", "0"]),
        (None, 8, ["0", "1", "2"]),
        ("4,6", 2, ["4", "6", "4"]),
        ("GPU-a,GPU-b,GPU-c,GPU-d", 4, ["GPU-a", "GPU-b", "GPU-c"]),
        ("1,-1,2", 1, ["1", "1", "1"]),  # what stands behind -1 is not seen
    ],
)
def test_more_processes_than_cards_share_them(
    visible: str | None, gpus: int, wanted: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "count_gpus", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    got = [environment.get("CUDA_VISIBLE_DEVICES") for environment in tune.environments(3)]
    assert got == wanted


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds: list[World] = []
    monkeypatch.setattr(tune, "open_study", lambda *_: None)
    monkeypatch.setattr(tune, "connect", worlds.append)
    monkeypatch.setattr(tune, "_is_left", lambda *_: False)
    search = Search(load(RECIPE, training__device="cpu"), 100, ("a",), (), 9, (), Path(), 2)
    tune.work(search, None, 1)
    assert [(world.size, world.local_size) for world in worlds] == [(1, 2)]
    monkeypatch.setattr(loader, "usable_cores", lambda: 16)
    assert loader.workers_of(None, worlds[0]) == 8


def test_one_search_from_end_to_end(small: SmallData, tmp_path: Path) -> None:
    """Killed once, gone on with in two processes; real Optuna, real training."""
    pytest.importorskip("optuna")
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    # A network that the processes know without this module.
    settings = small.settings(tmp_path, training__batch_size=1, lr__lr=0.02, model__arch="slim13")
    recipe.write_text(to_yaml(settings))
    command = [sys.executable, "-m", "ffcv_imnet", "tune", f"--config={recipe}", f"--out={out}",
               "--trials=9", "--search=lr.lr,training.momentum"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("trial 3"):
                process.send_signal(signal.SIGKILL)
                break
    before = (out / "trials.log").read_bytes()
    with subprocess.Popen(
        [*command, "--processes=2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        next(line for line in process.stdout if line.startswith("trial "))
        process.send_signal(signal.SIGTERM)
        assert (
            "the same command goes on" in process.stderr.read()
        )  # to its end: no child has it open
    done = subprocess.run([*command, "--processes=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "trials.log").read_bytes().startswith(before)
    assert "trial 9 of 9" in done.stdout and "trial 1 of 9" not in done.stdout
    assert {"recipe.yaml", "trials.png", "README.md"} <= {path.name for path in out.iterdir()}
    page = (out / "README.md").read_text()
    assert page.startswith("# A search for lr.lr, training.momentum")
    assert ("| the best trial " in page) is ("no trial was better" not in page)
    tuned = load(out / "recipe.yaml")
    assert replace(tuned, lr=settings.lr, training=settings.training) == settings
    again = time.monotonic()
    assert subprocess.run(command, capture_output=True).returncode == 0  # nothing is left to do
    assert time.monotonic() - again < 60
    other = subprocess.run([*command, "--search=lr.lr"], capture_output=True, text=True)
    assert other.returncode == 2 and "holds another search" in other.stderr

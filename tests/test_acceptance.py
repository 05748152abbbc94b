"""The first hour on a GPU: its driver with parts of milliseconds, what it reads from numbers, its data and bundle."""

import json
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import acceptance.__main__ as driver
from acceptance import bundle, checks, data, packages, plan, profile, smoke, turns
from acceptance.plan import FULL, REHEARSAL, SMALLEST, Part, Place, Size
from acceptance.record import Check, Outcome, Result, verdict
from ffcv_imnet.config.parsing import load, parse
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data.beton import read_tables
from ffcv_imnet.data.loader import TrainLoader
from ffcv_imnet.machine.distributed import World
from tests.conftest import SmallData

SAYS = "import sys; print('said', open(sys.argv[1], 'a').write('x')); sys.exit(int(sys.argv[2]))"


def by_status(outcome: Outcome) -> list[Check]:
    """A part's check in these tests."""
    return [checks.ended(outcome), Check("a | in its words", outcome.said.strip())]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, over three parts: one that ends well, one that fails, one that sleeps."""
    seen = tmp_path / "seen"

    def parts(place: Place) -> list[Part]:
        good = ("-S", "-c", SAYS, str(seen), "0")
        bad = ("-S", "-c", SAYS, str(seen), "3")
        slow = ("-S", "-c", "import time; time.sleep(60)")
        return [
            Part("smoke", "good", good, 60, by_status),
            Part("smoke", "bad", bad, 60, by_status),
            Part("step", "slow", slow, 1, by_status),
            Part("step", "gpu", slow, 1, by_status, gpu_only=True),
        ]

    monkeypatch.setattr(plan, "parts", parts)
    monkeypatch.setattr(driver, "prepare", lambda place, seconds: True)

    def call(*words: str) -> int:
        monkeypatch.setattr(
            sys, "argv", ["gpu.sh", "--out", str(tmp_path / "out"), "--rehearse", *words]
        )
        return driver.main()

    call.out, call.seen = tmp_path / "out", seen  # type: ignore[attr-defined]
    return call


def test_parts_run_once_and_the_report_says_what_they_found(run: Any) -> None:
    assert run("--stage", "smoke/good") == 0
    assert run("--stage", "smoke") == 1  # `bad` failed; `good` is not run again
    assert run("--all") == 1
    assert run.seen.read_text() == "xx"
    report = (run.out / "report.md").read_text()
    assert "| PASS | smoke/good | ends well | exit status 0 | exit status 0 |" in report
    assert "| FAIL | smoke/bad | ends well | exit status 3 | exit status 0 |" in report
    assert "| FAIL | step/slow | ends well | killed after 1 s | exit status 0 |" in report
    assert "| SKIP | step/gpu | needs a GPU | not run |" in report
    assert "|  | smoke/good | a \\| in its words | said 1 |" in report
    assert "1 PASS, 2 FAIL, 1 SKIP; 0 parts left" in report and "nothing about a GPU" in report
    (run.out / "results/smoke.good.json").unlink()  # as if it had been killed
    assert run("--stage", "smoke/good") == 0 and run.seen.read_text() == "xxx"


def test_a_stage_ends_in_time_and_goes_on_at_the_next_call(run: Any) -> None:
    """Killed by the stage's end and not by its own limit: no result, and exit status 75."""
    assert run("--stage", "step", "--minutes", "0.01") == 75
    assert not list((run.out / "results").glob("step.slow*"))
    assert "4 parts left" in (run.out / "report.md").read_text()


def test_what_the_cards_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 has no bf16 and 15 GB; without nvidia-smi, and in a rehearsal, nothing changes."""
    t4, h200 = (
        plan.for_card(FULL, said) for said in ("7.5, 15360\n", "9.0, 143771\n9.0, 143771\n")
    )
    assert (t4.precisions, t4.batch) == (("fp16",), 256)
    assert replace(h200, processes=1) == FULL == plan.for_card(FULL, "")
    assert (t4.processes, h200.processes) == (1, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert plan.for_card(FULL, "9.0, 143771\n9.0, 143771\n").processes == 1
    assert plan.for_card(plan.SMALLEST, "7.5, 15360") == plan.SMALLEST


def test_what_tells_most_comes_first(tmp_path: Path) -> None:
    known = plan.parts(Place(tmp_path, tmp_path, FULL))
    keys = [part.key for part in driver.chosen(known, None)]
    assert keys[: len(plan.FIRST)] == list(plan.FIRST)
    assert sorted(keys) == sorted(part.key for part in known)


def test_all_in_some_minutes_has_one_end(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many stages it has."""
    monkeypatch.setattr(plan, "FIRST", {"step.slow": 0})
    assert run("--all", "--minutes", "0.01") == 75
    assert not list((run.out / "results").glob("*"))
    assert "4 parts left" in (run.out / "report.md").read_text()


def test_making_the_data_is_of_the_stages_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []

    def slow(place: Place, seconds: float) -> bool:
        time.sleep(0.2)
        return True

    monkeypatch.setattr(driver, "prepare", slow)
    monkeypatch.setattr(driver, "run_part", lambda part, place, seconds: left.append(seconds))
    assert run("--stage", "step", "--minutes", "0.01") == 75
    assert left[0] <= 0.4


def test_the_doctor_comes_before_the_data(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with a machine may be why no data can be made on it."""
    real = plan.environment(Place(run.out, run.out, FULL))
    assert [part.name for part in real if not part.needs_data] == ["doctor", "decoder"]
    (part, *others) = plan.parts(Place(run.out, run.out, SMALLEST))
    known = [replace(part, needs_data=False), *others]
    monkeypatch.setattr(plan, "parts", lambda place: known)
    monkeypatch.setattr(driver, "prepare", lambda place, seconds: sys.exit("no data"))
    assert run("--stage", "smoke/good") == 0
    with pytest.raises(SystemExit, match="no data"):
        run("--stage", "smoke/bad")


def test_what_a_killed_call_left_running_is_ended(tmp_path: Path) -> None:
    words = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(words, start_new_session=True) as process:
        started = driver.started_at(process.pid)
        (tmp_path / driver.RUNNING).write_text(f"{process.pid} {started - 1}")
        driver.end_leftover(tmp_path)  # another process, of the same number
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        (tmp_path / driver.RUNNING).write_text(f"{process.pid} {started}")
        driver.end_leftover(tmp_path)
        assert process.wait(10) == -signal.SIGKILL
    driver.end_leftover(tmp_path)
    assert driver.started_at(process.pid) == -1


def orphan() -> str:
    """A process that goes on when it is asked to end, started by one that ends at once."""
    child = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    return f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {child!r}])"


def test_children_end_with_the_part_that_started_them(tmp_path: Path) -> None:
    """They would share the GPU with what is measured next; so do those of a call that was killed."""
    place = Place(tmp_path, tmp_path, SMALLEST)
    out, err = tmp_path / "out", tmp_path / "err"
    for wait in ("; import time; time.sleep(1)", "; import time; time.sleep(60)"):
        command = [sys.executable, "-S", "-c", orphan() + wait]
        _, seconds, timed_out = driver.run(command, out, err, 2, place)
        assert timed_out == ("60" in wait) and seconds < 10
        assert not alive(int(out.read_text())) and not (tmp_path / driver.RUNNING).exists()
    with out.open("w") as file:
        words = [sys.executable, "-S", "-c", orphan()]
        process = subprocess.Popen(words, start_new_session=True, stdout=file)
    started = driver.started_at(process.pid)
    process.wait()
    while not out.read_text():
        time.sleep(0.01)
    assert alive(int(out.read_text()))
    (tmp_path / driver.RUNNING).write_text(f"{process.pid} {started}")
    driver.end_leftover(tmp_path)
    assert not alive(int(out.read_text()))


def alive(pid: int) -> bool:
    """Whether it runs after a tenth of a second; one that nobody waits for is not."""
    time.sleep(0.1)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_part_that_leaves_no_numbers_has_not_passed(tmp_path: Path) -> None:
    silent = Outcome(0, 1.0, None, "14 skipped in 2.03s")
    for check in (checks.tests, checks.step(1.4), checks.turns, checks.loader(4, True),
                  checks.imagenette(tmp_path, tmp_path, True), checks.profile("resnet18", True, True, True)):  # fmt: skip
        assert "FAIL" in {found.verdict for found in check(silent)}
    assert checks.tests(Outcome(0, 1.0, None, "13 passed, 1 skipped in 2.03s"))[0].verdict == "PASS"


def test_goals_of_photographs_hold_for_photographs() -> None:
    rows = [
        {"loader": name, "resolution": 128, "images_per_second": 1.0, "ratio_to_stock": 0.5}
        for name in ("ffcv_imnet", "ffcv", "dali")
    ]
    for real in (True, False):
        found = checks.loader(1, real)(Outcome(0, 1.0, {"rows": rows}))
        assert ("FAIL" in {check.verdict for check in found}) == real
        assert "its CPU decoder" in found[1].measured


def test_what_python_lacks_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.main() == 0
    monkeypatch.setattr(packages, "LOADED", {"_no_such_library": "cv"})
    with pytest.raises(
        UsageError, match=r"lacks cv \(No module named '_no_such_library'\): name a"
    ):
        packages.main()
    monkeypatch.setattr(packages, "NEEDED", {"_no_torch": "", "_no_yaml": "PyYAML"})
    with pytest.raises(UsageError, match="lacks _no_torch, PyYAML: name a Python"):
        packages.main()


def test_results_travel_in_an_archive(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "results.tar.gz"
    whole = driver.run_part

    def after_one(part: Part, *more: Any) -> Outcome | None:
        if part.name == "bad":  # this call will be killed
            with tarfile.open(archive) as file:
                assert "results/smoke.good.json" in file.getnames()
        return whole(part, *more)

    monkeypatch.setattr(driver, "run_part", after_one)
    assert run("--stage", "smoke", "--archive", str(archive)) == 1
    run.out.rename(tmp_path / "first machine")
    assert run("--stage", "smoke/good", "--archive", str(archive)) == 0
    assert run.seen.read_text() == "xx"  # of the first call


def test_mistakes(run: Any) -> None:
    with pytest.raises(UsageError, match=r"no stage is called 'stop' \(did you mean step\?\)"):
        run("--stage", "stop")
    with pytest.raises(UsageError, match=r"give --all, or --stage"):
        run()


def test_numbers_that_cannot_be_read_fail(run: Any) -> None:
    part = Part("step", "x", (), 1, checks.step(1.4))
    (check,) = driver.read(part, Outcome(0, 1.0, {"rows": [{}]}))
    assert check.verdict == "FAIL" and "KeyError" in check.measured


# ---- the parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [FULL, REHEARSAL, SMALLEST], ids=lambda size: size.name)
def test_the_commands_are_ones_that_our_programs_take(size: Size, tmp_path: Path) -> None:
    from ffcv_imnet.tools import benchmark

    place = Place(tmp_path, tmp_path, size)
    (tmp_path / "json").mkdir()
    parts = plan.parts(place)
    assert tuple(dict.fromkeys(part.stage for part in parts)) == plan.STAGES
    assert len({part.key for part in parts}) == len(parts)
    for part in parts:
        assert 0 < part.limit <= 540, f"{part.key}: a stage has nine minutes"
        words = list(part.command)
        if words[0] == "train_imagenet.py":
            settings = parse(words[1:]).settings
            assert settings.training.device == size.device
        elif words[:3] == ["-m", "ffcv_imnet", "benchmark"]:
            assert benchmark.parse(words[3:]).json == place.json(part.key)
        else:
            assert words[0] == "-m"
    goals = [part for part in parts if part.key == f"step.resnet18_{size.resolutions[0]}"]
    assert len(goals) == 1


@pytest.mark.parametrize("recipe", plan.RECIPES)
def test_recipes_are_shortened_to_an_epoch_of_each_stage(recipe: str) -> None:
    settings = load(f"rn_configs/{recipe}.yaml")
    sides = {p.resolution for p in plan_run(settings, 10_000)}
    short = smoke.shortened(settings, None, 256)
    assert {p.resolution for p in plan_run(short, 10_000)} == sides
    assert short.training.epochs == len(sides) <= 3
    tiny = smoke.shortened(settings, 32, 16)
    assert {p.resolution for p in plan_run(tiny, 10_000)} == {32}
    assert tiny.validation.resolution == 32


# ---- what is read -------------------------------------------------------------------------------


def verdicts(found: list[Check]) -> dict[str, str]:
    """By what was checked."""
    return {check.what: check.verdict for check in found}


def test_step_goal() -> None:
    def row(step: str, ratio: float) -> dict[str, Any]:
        return {"step": step, "precision": "bf16", "images_per_second": 1.0, "spread": 0.1,
                "ratio_to_public": ratio, "optimizer_share": 0.1, "warm_up_seconds": 1.0}  # fmt: skip

    for ratio, expected in ((1.41, "PASS"), (1.39, "FAIL")):
        rows = [row("public", 1.0), row("sgd", 1.1), row("muon compiled", ratio)]
        *_, last = checks.step(1.4)(Outcome(0, 1.0, {"rows": rows}))
        assert (last.verdict, last.goal) == (expected, ">= 1.4")
        assert last.measured == f"{ratio} (muon compiled bf16)"
    assert all(
        check.verdict != "FAIL" for check in checks.step(None)(Outcome(0, 1.0, {"rows": rows}))
    )


def test_imagenette_goals(tmp_path: Path) -> None:
    epoch = {"type": "epoch", "train_seconds": 8.0, "val_seconds": 1.0, "loader_seconds": 0.1}
    (tmp_path / "train.json").write_text('{"settings": {"max_resolution": 144}}')

    def found(top_1: float, seconds: float, real: bool = True) -> list[Check]:
        summary = {"type": "summary", "best_top_1": top_1, "elapsed_seconds": seconds}
        lines = [json.dumps(row) for row in (epoch, epoch, summary)]
        (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
        return checks.imagenette(tmp_path, tmp_path, real)(Outcome(0, 1.0))

    good = found(0.8845, 59.0)
    assert [check.verdict for check in good] == ["PASS", "INFO", "PASS", "INFO"]
    assert "here 144 px" in good[1].goal and good[3].measured == "1.2%"
    (tmp_path / "train.json").write_text('{"settings": {"max_resolution": 224}}')
    assert [check.verdict for check in found(0.8845, 59.0)] == ["PASS", "PASS", "PASS", "INFO"]
    assert [check.verdict for check in found(0.8699, 61.0)] == ["PASS", "FAIL", "FAIL", "INFO"]
    assert [check.verdict for check in found(0.1, 600.0, False)] == ["PASS", *["INFO"] * 3]
    assert (
        checks.imagenette(tmp_path / "none", tmp_path, True)(Outcome(1, 1.0))[0].verdict == "FAIL"
    )


def test_memory_and_resume_verdicts() -> None:
    said = {"message": "error: ... 24 would fit", "fits": 24, "fits_status": 0}
    assert set(verdicts(checks.memory(Outcome(0, 1.0, said))).values()) == {"PASS"}
    assert "FAIL" in verdicts(checks.memory(Outcome(0, 1.0, {**said, "fits_status": 1}))).values()
    assert "FAIL" in verdicts(checks.memory(Outcome(0, 1.0, {"message": "CUDA error"}))).values()
    went = {
        "term_status": 143,
        "epochs": [0, 1],
        "wanted": [0, 1],
        "top_1": 0.5,
        "plain_top_1": 0.5,
    }
    assert "FAIL" not in verdicts(checks.resume(Outcome(0, 1.0, went))).values()
    assert "FAIL" in verdicts(checks.resume(Outcome(0, 1.0, {**went, "epochs": [0, 0]}))).values()


def test_a_trace_by_hand() -> None:
    """Two updates of three launches each; one of two copies on the stream that computes, one pageable."""

    def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    events = [
        event("kernel", "fill", -900, 5, stream=7),  # long before: the loader starts
        event("kernel", "conv", 100, 40, stream=7),
        event("kernel", "conv", 120, 40, stream=7),  # overlaps: busy from 100 to 160
        event("kernel", "cublasLt::splitKreduce_kernel", 180, 20, stream=9, correlation=5),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1, 5, stream=9, bytes=1 << 24),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 2, 5, stream=7, bytes=1 << 24),
        event(
            "gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 2, 5, stream=7, bytes=64
        ),  # a scalar
        event("cuda_runtime", "cudaLaunchKernel", 5, 1),  # of the forward pass
        event("cuda_runtime", "cudaLaunchKernel", 105, 1, correlation=5),  # cuBLAS's own
    ]
    for start in (100, 200):
        events.append(event("user_annotation", "Optimizer.step#Muon.step", start, 50))
        events += [event("cuda_runtime", "cuLaunchKernelEx", start + i, 1) for i in (1, 2, 3)]
        events.append(event("cpu_op", "aten::mul", start + 4, 1))
    said = profile.seen(events)
    assert said == {"copies": 2, "pinned_copies": 1, "copies_beside_compute": 1, "optimizer_launches": 3,
                    "optimizer_operations": 1, "busy_share": 0.8}  # fmt: skip
    whole = {
        "images_per_second": 1.0,
        "loader_share": 0.019,
        "first_batch_seconds": 0.1,
        "compile_seconds": 0.0,
        **said,
    }
    found = verdicts(checks.profile("resnet18", True, True, True)(Outcome(0, 1.0, whole)))
    assert found["training waits for the loader, after the first batch"] == "PASS"
    assert found["copies to the GPU on a stream of their own"] == "FAIL"
    assert found["Muon's kernel launches a step"] == "PASS"
    compared = verdicts(checks.profile("resnet18", True, False, True)(Outcome(0, 1.0, whole)))
    assert compared["copies to the GPU on a stream of their own"] == "PASS"  # it has none, as asked
    assert profile.seen([])["busy_share"] == 0


def test_judge() -> None:
    assert verdict("a", "1", "2", True) == Check("a", "1", "2", "PASS")
    result = Result("step", "x", "python", 0, 1.0, "now", [verdict("a", "1", "2", False)])
    assert result.checks[0].verdict == "FAIL"


def test_the_result_of_a_part_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "step.x.json"
    result = Result("step", "x", "python", 0, 1.0, "now", [Check("a", "1")])
    result.save(path)
    assert Result.load(path) == result
    for text in ("", "{", "[]", "{}", '{"checks": 3}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(RunError, match=r"step\.x\.json: not the result of a part"):
            Result.load(path)


# ---- data and bundle ----------------------------------------------------------------------------


def test_a_file_in_which_images_repeat(small: SmallData, tmp_path: Path) -> None:
    """The loader reads it; sample n + i has the pixels of sample i, and the file has them once."""
    path = data.repeated(small.train, tmp_path / "many" / "train.beton", 250)
    assert len(read_tables(path).labels) == 300
    assert path.stat().st_size < 1.1 * small.train.stat().st_size
    settings = small.settings(
        tmp_path, augmentation__crop_scale="[1, 1]", augmentation__flip="none"
    )
    settings = replace(settings, data=replace(settings.data, train_dataset=str(path)))
    world = World(0, 1, 0, 1, torch.device("cpu"))
    loader = TrainLoader(str(path), 300, settings, world)
    first = plan_run(settings, 300)[0]
    batches = [images.clone() for images, _ in loader.epoch(first, only=np.arange(300)[3::100])]
    assert torch.equal(batches[0][0], batches[0][1]) and torch.equal(batches[0][0], batches[0][2])


def test_the_bundle_is_weighed(
    small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = bundle.parse(["--no_wheels", "--out", str(tmp_path / "bundle")])
    assert (options.imagenette_px, options.imagenette_quality) == (128, 65)
    bundle.betons(small.train.parent, tmp_path / "bundle/imagenette.tar.gz", 144, 75)
    assert bundle.weigh(tmp_path / "bundle", 64) == 0
    said = json.loads((tmp_path / "bundle/bundle.json").read_text())
    assert 0 < said["files"]["imagenette.tar.gz"] < small.train.stat().st_size / 10  # no zeros
    place = Place(tmp_path, tmp_path / "bundle", FULL)
    assert place.has("imagenette") and not Place(tmp_path, tmp_path, FULL).has("imagenette")
    with tarfile.open(tmp_path / "bundle/imagenette.tar.gz") as file:
        assert set(file.getnames()) == {"train.beton", "train.json", "val.beton", "val.json"}
    with pytest.raises(RunError, match=r"MiB, more than 0.01: take a smaller --imagenette_px"):
        bundle.weigh(tmp_path / "bundle", 0.01)
    with pytest.raises(UsageError, match="holds neither train/ nor"):
        bundle.betons(tmp_path / "bundle", tmp_path / "other.tar.gz", 144, 75)
    assert bundle.pin("ffcv").startswith("ffcv==") and bundle.pin("no-such") == "no-such"


def test_both_ways_to_turn_bases_find_the_same() -> None:
    torch.manual_seed(0)
    noise = torch.randn(3, 20, 40) * torch.logspace(0, -2, 20)[:, None]
    image = noise @ noise.mT
    by_qr, by_cholesky = turns.by_qr(image), turns.by_cholesky(image)
    torch.testing.assert_close((by_qr * by_cholesky).sum(1).abs(), torch.ones(3, 20))
    numbers = {"qr": {"seconds": 0.02, "matrices": 59, "skewness": 1e-6}}
    assert (
        checks.turns(Outcome(0, 1.0, numbers))[1].measured
        == "20.0 ms for 59 bases, orthonormal to 1e-06"
    )

"""The benchmark: its arithmetic, its processes, what it says of mistakes."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from ffcv_imnet.bench import peers
from ffcv_imnet.bench.loaders import PEERS
from ffcv_imnet.bench.peers import Case, Passes
from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.report import loader_rates
from ffcv_imnet.tools import benchmark
from tests.conftest import SmallData


def run(rate: float, memory: int = 1000) -> dict[str, float]:
    """A pass of a second, in which two cores were half busy."""
    return {"images": rate, "seconds": 1.0, "cpu_seconds": 1.0, "peak_memory_bytes": memory}


def test_ratios_are_medians_of_each_rounds_own() -> None:
    """The machine was half as fast in the second round; no ratio shows it."""
    two, one = Case(128, 0.08, 2), Case(128, 0.08, 1)
    passes: Passes = {
        two: {
            "ffcv_imnet": [run(400, 7), run(200, 9), run(400)],
            "ffcv": [run(200), run(100), run(200)],
            "turbojpeg": [run(500), run(250), run(500)],
        }
    }
    ours, theirs, limit = peers.summarise(passes)
    assert ours["images_per_second"] == ours["images_per_cpu_second"] == 400
    assert ours["spread"] == 0.5
    assert ours["ratio_to_stock"] == 2 and ours["ratio_to_limit"] == 0.8
    assert ours["peak_memory_bytes"] == 1000 and theirs["ratio_to_stock"] == 1
    assert limit["ratio_to_limit"] == 1 and "growth" not in ours
    passes[one] = {"ffcv_imnet": [run(250), run(125), run(250)]}
    assert [row.get("growth") for row in peers.summarise(passes)] == [1.6, None, None, None]
    alone = peers.summarise({Case(96, 0.5, 1): {"ffcv_imnet": [run(10)]}})
    assert "ratio_to_stock" not in alone[0]
    assert "ffcv_imnet" in peers.table([ours, *alone])
    assert peers.unlisted(json.loads(json.dumps(peers.listed(passes)))) == passes


def test_loader_benchmark_end_to_end(
    small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "rows.json", tmp_path / "rows.png"
    names = "ffcv+CropDecoder", "torchvision"
    command = f"loader --beton {small.train} --min_crop 0.5 --batch_size 16 --cores 1"
    command += f" --resolution 32 48 --rounds 1 --loaders {' '.join(names)} --json {out}"
    assert benchmark.main(command.split()) == 0
    report = json.loads(out.read_text())
    assert {(row["loader"], row["resolution"]) for row in report["rows"]} == {
        (name, side) for name in names for side in (32, 48)
    }
    for row in report["rows"]:
        assert row["images_per_second"] > 0 and row["peak_memory_bytes"] > 0
        assert row["images_per_cpu_second"] > 0 and row["min_crop"] == 0.5
    assert all(one["images"] == 96 for one in report["passes"])
    assert report["processor"] and report["date"] and report["samples"] == 100
    assert "torchvision" in capsys.readouterr().out
    command += f" --resume --figure {figure}"  # with nothing left to measure
    assert benchmark.main(command.split()) == 0
    assert "torchvision" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="was measured with other batch_size: name another file"):
        benchmark.main(f"{command} --batch_size 8".split())


def test_what_was_measured_is_not_measured_again() -> None:
    asked: list[tuple[int, float]] = []

    class Noted(peers.Peer):
        def __init__(self) -> None:
            pass

        def one_pass(self, resolution: int, min_crop: float = 0.08) -> peers.Answer:
            asked.append((resolution, min_crop))
            return run(100)

    cases = [Case(side, 0.5, cores) for side in (32, 48) for cores in (1, 2)]
    passes: Passes = {cases[0]: {"ffcv": [run(1)]}, cases[1]: {"ffcv": [run(1)]}}
    saved: list[int] = []
    both: dict[tuple[str, int], peers.Peer] = {("ffcv", 1): Noted(), ("ffcv", 2): Noted()}
    peers.measure(both, cases, 3, passes, lambda: saved.append(len(passes)))
    assert asked == [(48, 0.5)] * 8 and saved == [4]
    assert [len(found["ffcv"]) for found in passes.values()] == [1, 1, 3, 3]


def test_a_figure_of_all_loaders_and_cores(tmp_path: Path) -> None:
    rows = [
        {"loader": name, "resolution": side, "min_crop": crop, "cores": cores, "images_per_second": 9.0}
        for name in loader_rates.NAMES for side in (128, 224) for crop in (0.08, 0.5) for cores in (1, 2)
    ]  # fmt: skip
    assert list(loader_rates.NAMES) == list(PEERS)
    loader_rates.draw_loaders(tmp_path / "rows.png", rows, "a machine")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_a_loader_without_its_package_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's wheels bring a package `nvidia`, which is not DALI."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "spdl.io", None)
    assert importlib.util.find_spec("nvidia") is not None
    assert benchmark.installed(True) == [
        "ffcv_imnet",
        "ffcv+CropDecoder",
        "ffcv",
        "torchvision",
        "turbojpeg",
    ]
    assert benchmark.installed(False) == ["ffcv_imnet", "ffcv+CropDecoder", "ffcv"]
    with pytest.raises(UsageError, match=r"--loaders dali needs nvidia\.dali"):
        benchmark.parse(["loader", "--beton", "x", "--loaders", "ffcv", "dali"])


def test_a_loader_that_fails_says_why(small: SmallData) -> None:
    spec = peers.Spec(beton="nowhere.beton", folder="", batch_size=1, num_workers=1)
    with (
        peers.Peer("ffcv_imnet", spec) as peer,
        pytest.raises(RunError, match=r"loader ffcv_imnet failed: .*nowhere\.beton"),
    ):
        peer.one_pass(32)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("loader", "needs --beton"),
        ("train", "needs --config"),
        ("loader --beton B --rounds 0", "--rounds: '0' is not a whole number"),
        ("loader --beton B --num_workers 4096", "--num_workers: '4096' is not"),
        ("loader --beton B --loaders fast", "invalid choice"),
        ("loader --beton B --cores 0", "--cores: '0' is not a whole number"),
        ("loader --beton B --min_crop 2", "--min_crop: '2' is not a number from 0.001 to 1"),
        ("loader --beton B --resume", "--resume needs --json"),
        ("loader --beton B --figure no/where.png", "--figure no/where.png: the folder no does not"),
        ("both", "invalid choice"),
    ],
)
def test_mistakes(command: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        benchmark.main(command.split())


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"passes": 3}', '{"passes": [3]}'])
def test_what_is_resumed_is_a_result(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match=r"r\.json is no result of"):
        benchmark.earlier_passes(tmp_path / "r.json", {})


def test_a_batch_larger_than_the_data(small: SmallData) -> None:
    with pytest.raises(UsageError, match="holds 100 images, fewer than"):
        benchmark.main(["loader", "--beton", str(small.train)])


def test_a_folder_without_images(small: SmallData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folders of images there"):
        command = ["loader", "--beton", str(small.train), "--data_dir", str(tmp_path)]
        benchmark.main([*command, "--batch_size", "10"])


def test_training_benchmark(
    small: SmallData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    two = {"resolution__max_res": 64, "resolution__start_ramp": 1, "resolution__end_ramp": 1}
    recipe.write_text(to_yaml(small.settings(tmp_path / "run", **two)))
    monkeypatch.setitem(benchmark.PEAK_FLOPS, "thread", 1e12)  # as if the processor's were known
    path = tmp_path / "rows.json"
    command = ["train", "--config", str(recipe), "--seconds", "1", "--json", str(path)]
    assert benchmark.main(command) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.strip()[:2] in ("32", "64")]
    assert [row[0] for row in rows] == ["32", "64"]
    assert all(row[-1].endswith("%") for row in rows)
    saved = json.loads(path.read_text())
    assert saved["precision"] in ("bf16", "fp32") and saved["batch_size"] > 0
    assert [row["resolution"] for row in saved["rows"]] == [32, 64]
    assert all(row["both"] > 0 and "model_flop_utilisation" in row for row in saved["rows"])
    assert not (tmp_path / "run").exists()


def test_torchvision_is_left_out_where_its_processes_would_die(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container's /dev/shm has 64 MiB."""
    words = [
        "loader",
        "--beton",
        "B",
        "--num_workers",
        "1",
        "--batch_size",
        "512",
        "--resolution",
        "128",
        "160",
    ]
    shm = shutil._ntuple_diskusage(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shm)
    assert "torchvision" not in benchmark.chosen_loaders(benchmark.parse(words), True)
    assert "need 112.5 MiB of /dev/shm, where 64 MiB are free" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"processes need 112\.5 MiB"):
        benchmark.chosen_loaders(benchmark.parse([*words, "--loaders", "torchvision"]), True)
    words[words.index("512")] = "128"
    assert "torchvision" in benchmark.chosen_loaders(benchmark.parse(words), True)

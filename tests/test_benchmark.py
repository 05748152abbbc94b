"""The benchmark: its arithmetic, its processes, what it says of mistakes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.tools import benchmark
from tests.conftest import SmallData


def run(rate: float, memory: int = 1000) -> dict[str, float]:
    return {"images": rate, "seconds": 1.0, "peak_memory_bytes": memory}


def test_ratios_are_medians_of_each_rounds_own() -> None:
    """The machine was half as fast in the second round; no ratio shows it."""
    passes = {
        ("ffcv_imnet", 128): [run(400, 7), run(200, 9), run(400)],
        ("ffcv", 128): [run(200), run(100), run(200)],
        ("turbojpeg", 128): [run(500), run(250), run(500)],
    }
    ours, stock, limit = benchmark.summarise(passes)
    assert ours["images_per_second"] == 400 and ours["spread"] == 0.5
    assert ours["ratio_to_stock"] == 2 and ours["ratio_to_limit"] == 0.8
    assert ours["peak_memory_bytes"] == 1000 and stock["ratio_to_stock"] == 1
    assert limit["ratio_to_limit"] == 1
    alone = benchmark.summarise({("ffcv_imnet", 96): [run(10)]})
    assert "ratio_to_stock" not in alone[0]
    assert "ffcv_imnet" in benchmark.table([ours, *alone], cores=2)


def test_loader_benchmark_end_to_end(
    small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    command = f"loader --beton {small.train} --resolution 32 48 --batch_size 16 --num_workers 1"
    command += f" --rounds 1 --loaders ffcv_imnet torchvision --json {out}"
    assert benchmark.main(command.split()) == 0
    report = json.loads(out.read_text())
    assert {(row["loader"], row["resolution"]) for row in report["rows"]} == {
        (name, side) for name in ("ffcv_imnet", "torchvision") for side in (32, 48)
    }
    for row in report["rows"]:
        assert row["images_per_second"] > 0 and row["peak_memory_bytes"] > 0
    assert all(one["images"] == 96 for one in report["passes"])
    assert report["processor"] and report["date"] and report["samples"] == 100
    assert "torchvision" in capsys.readouterr().out


def test_a_loader_without_its_package_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's wheels bring a package `nvidia`, which is not DALI."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "spdl.io", None)
    assert importlib.util.find_spec("nvidia") is not None
    assert benchmark.installed(True) == ["ffcv_imnet", "ffcv", "torchvision", "turbojpeg"]
    assert benchmark.installed(False) == ["ffcv_imnet", "ffcv"]
    with pytest.raises(UsageError, match=r"--loaders dali needs nvidia\.dali"):
        benchmark.parse(["loader", "--beton", "x", "--loaders", "ffcv", "dali"])


def test_a_loader_that_fails_says_why(small: SmallData) -> None:
    spec = benchmark.Spec(beton="nowhere.beton", folder="", batch_size=1, num_workers=1)
    with (
        benchmark.Peer("ffcv_imnet", spec) as peer,
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
        ("both", "invalid choice"),
    ],
)
def test_mistakes(command: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        benchmark.main(command.split())


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

"""Paths as people write them, and a target that is meant for other data."""

import importlib
import os
from pathlib import Path

import pytest

import write_ffcv
from ffcv_imnet.config.parsing import load, parse, read_config
from ffcv_imnet.core.errors import RunError, UsageError, not_written
from ffcv_imnet.core.log import read_log
from ffcv_imnet.core.paths import check_output, expanded, open_regular
from ffcv_imnet.data.beton import check_beton
from ffcv_imnet.data.loader import own_target
from ffcv_imnet.evaluate.weights import load_network
from ffcv_imnet.images import synthetic
from ffcv_imnet.images.imagenet import IMAGENETTE, imagenet_names
from ffcv_imnet.images.labels import read_labels
from ffcv_imnet.images.parquet import shards_of
from ffcv_imnet.images.tar import index_tar
from ffcv_imnet.tools import adopt, migrate, verify
from ffcv_imnet.train import checkpoint

ROOT = Path(__file__).parents[1]


def test_home_and_variables_are_expanded_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BIG_DISK", f"{tmp_path}/big")
    assert expanded("~/x") == expanded("$HOME/x") == expanded("${HOME}/x") == f"{tmp_path}/x"
    assert expanded("s3://a/$b") == "s3://a/$b" and expanded("a~b") == "a~b"
    with pytest.raises(UsageError, match=r"^\$NONE/x: there is no environment variable NONE$"):
        expanded("$NONE/x")
    with pytest.raises(UsageError, match=r"no user nobody_here; a file is ./~nobody_here"):
        expanded("~nobody_here/x")
    monkeypatch.chdir(tmp_path)
    Path("$NONE").touch()
    assert expanded("$NONE") == "$NONE"

    Path("c.yaml").write_text("data: {train_dataset: ~/t.beton, val_dataset: $BIG_DISK/v.beton}\n")
    command = parse(["--config=~/c.yaml", "--logging.folder=~/run", "--resume=~/last.pt"])
    data = command.settings.data
    assert (data.train_dataset, data.val_dataset) == (
        f"{tmp_path}/t.beton",
        f"{tmp_path}/big/v.beton",
    )
    assert command.settings.logging.folder == f"{tmp_path}/run"
    assert command.resume == f"{tmp_path}/last.pt"
    options = write_ffcv.parse(["--split=val", "--data_dir=~/d", "--out_dir=$BIG_DISK/b"])
    assert options.data_dir == [tmp_path / "d"] and options.out_dir == tmp_path / "big" / "b"
    (tmp_path / "x.ffcv").touch()
    assert adopt.parse(["~/x.ffcv"]).paths == [tmp_path / "x.ffcv"]
    for file in (*(ROOT / "ffcv_imnet").rglob("*.py"), ROOT / "acceptance/__main__.py"):
        assert "type=Path" not in file.read_text(), f"{file}: type=path_of expands"


def test_paths_that_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"argument --data_dir: an empty path; the current folder is \."
    ):
        write_ffcv.parse(["--split=val", "--data_dir="])
    (tmp_path / "file").touch()
    for name, said in (("file", r"file is not a \.beton, it has only 0"), ("", "is a folder")):
        with pytest.raises((UsageError, RunError), match=said):
            check_beton(tmp_path / name)
    with pytest.raises(UsageError, match=r"^--out /.* is a folder: name a file in it$"):
        migrate.main(["x.yaml", "--out", f"{tmp_path}"])
    with pytest.raises(OSError) as raised:
        (tmp_path / "file" / "train.beton").touch()
    assert not_written("file/train.beton", raised.value).endswith(
        "its folder is a file, name another"
    )


@pytest.mark.parametrize("words", [
    "evaluate --data v.beton --weights", "predict a.png --weights", "export --out m.onnx --weights",
    "samples --config", "samples --beton", "report", "compare r --against r --out", "verify v.beton --labels", "benchmark loader --json",
])  # fmt: skip
def test_an_address_where_a_path_is_wanted_keeps_its_slashes(words: str) -> None:
    tool, *rest = words.split()
    with pytest.raises(UsageError, match=r"s3://b/x\.y is an address: name a path on this machine"):
        importlib.import_module(f"ffcv_imnet.tools.{tool}").main([*rest, "s3://b/x.y"])


def test_a_link_in_a_circle_is_no_output(tmp_path: Path) -> None:
    synthetic.write_tree(tmp_path / "d", train_per_class=1, val_per_class=1)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=r"loop.* could not be written"):
        write_ffcv.main(
            ["--split", "val", "--data_dir", f"{tmp_path}/d", "--out_dir", f"{tmp_path}/loop"]
        )


def test_of_an_output_what_is_wrong_is_said(tmp_path: Path) -> None:
    check_output("--out", None, ".json")
    check_output("--out", tmp_path / "x.PNG", ".png", ".html")
    for name, said in (
        ("x.pb", r"/x\.pb: its name must end in \.png or \.html$"),
        ("no/x.png", r"/no/x\.png: the folder .*/no does not exist$"),
        ("", "is a folder: name a file in it$"),
    ):
        with pytest.raises(UsageError, match=rf"^--out /.*{said}"):
            check_output("--out", tmp_path / name, ".png", ".html")


def test_a_target_is_not_held_against_other_data(capsys: pytest.CaptureFixture[str]) -> None:
    root = ROOT / "rn_configs"
    settings = load(root / "imagenette_5ep.yaml")
    assert own_target(settings, IMAGENETTE) == settings and settings.training.stop_at == 0.85
    assert own_target(settings, ("cat", "dog")).training.stop_at == 0
    assert "0.85 is for imagenette, which this is not" in capsys.readouterr().out
    imagenet = load(root / "rn18_16ep.yaml")
    assert own_target(imagenet, tuple(imagenet_names())).training.stop_at == 0.65
    assert own_target(imagenet, IMAGENETTE, say=False).training.stop_at == 0
    demo = load(root / "demo.yaml")
    assert own_target(demo, synthetic.CLASSES) == demo and demo.training.stop_at == 0.8
    assert own_target(demo, ("cat", "dog"), say=False).training.stop_at == 0
    own = load(root / "rn18_16ep.yaml", training__stop_at_on="any")
    assert own_target(own, ("cat", "dog")) == own and not capsys.readouterr().out


def test_only_files_are_read(tmp_path: Path) -> None:
    """A pipe would be waited for, a device read for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name, said in (
        ("pipe", "it is a pipe"),
        ("zeros", "it is a device"),
        ("", "it is a folder"),
    ):
        with pytest.raises(OSError, match=said):
            open_regular(tmp_path / name)
        for read in (read_labels, adopt.read_names, index_tar, checkpoint.read):
            with pytest.raises(UsageError, match=rf"cannot be read: {said}$"):
                read(tmp_path / name)
    for read in (read_log, lambda path: read_config(str(path)), load_network, verify.targets):
        with pytest.raises(UsageError, match=r"pipe: it is a pipe, and a file is wanted$|wanted; "):
            read(tmp_path / "pipe")
    with pytest.raises(UsageError, match="has no shards of train"):
        (tmp_path / "train.parquet").symlink_to("pipe")
        shards_of(tmp_path, "train")


@pytest.mark.parametrize("words", [
    "evaluate --weights w.pt --data v.beton --out", "benchmark loader --beton v.beton --json",
    "benchmark loader --beton v.beton --figure", "migrate x.yaml --force --out",
])  # fmt: skip
@pytest.mark.parametrize("name", ["train.beton", "last.pt", "log.jsonl", "script.py"])
def test_an_output_is_of_its_kind(words: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"mine")
    tool, *rest = words.split()
    with pytest.raises(
        UsageError, match=rf"{name}: its name must end in \.(json|png|yaml or \.yml)$"
    ):
        importlib.import_module(f"ffcv_imnet.tools.{tool}").main([*rest, str(tmp_path / name)])
    assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("words", [
    "predict --weights w.pt a.png b.png --out b.png", "evaluate --weights w.pt --data v.beton --out v.json",
    "evaluate --weights w.pt --data v.beton --out link.json", "evaluate --weights w.pt --data v.beton --out u.json",
    "export --weights w.safetensors --out w.onnx", "export --weights w.onnx --out w.onnx",
    "benchmark loader --beton v.beton --json v.json", "migrate r.yaml --force --out r.yaml",
])  # fmt: skip
def test_no_output_replaces_an_input_or_a_manifest(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "w.pt",
        "w.safetensors",
        "w.onnx",
        "a.png",
        "b.png",
        "v.beton",
        "v.json",
        "u.json",
        "r.yaml",
    ):
        Path(name).write_bytes(b"mine")
    Path("u.beton").write_bytes(b"mine")
    Path("link.json").symlink_to("v.beton")
    tool, *rest = words.split()
    with pytest.raises(
        UsageError, match=r"would replace (a file that is read|the manifest of [uv]\.beton)"
    ):
        importlib.import_module(f"ffcv_imnet.tools.{tool}").main(rest)
    assert all(path.read_bytes() == b"mine" for path in tmp_path.iterdir())

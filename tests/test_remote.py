"""Files at an address: fsspec's own memory and local file systems, and an S3 server of moto's where it is installed."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

import write_ffcv
from ffcv_imnet.bench.dry_run import dry_run
from ffcv_imnet.config.parsing import load, to_yaml
from ffcv_imnet.config.schema import Data
from ffcv_imnet.core.atomic import partial_path
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.optional import is_there
from ffcv_imnet.data import remote
from ffcv_imnet.data.beton import check_beton, manifest_path, read_tables
from ffcv_imnet.data.remote import copy_path, fetch, fetch_beton, local_copies
from ffcv_imnet.images import synthetic
from ffcv_imnet.tools import adopt, tune, verify
from tests.conftest import SmallData

ADDRESS = "memory://bucket/set/train.beton"


@pytest.fixture
def store(small: SmallData, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store that has the small training file."""
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe("/bucket/set/train.beton", small.train.read_bytes())
    files.pipe("/bucket/set/train.json", manifest_path(small.train).read_bytes())
    yield files
    files.store.clear()


def cut(files: Any, monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """`files` that fails beyond so many bytes of a .beton; returns where it was asked for."""
    asked: list[int] = []
    whole = type(files).cat_file

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
        if path.endswith(".beton"):
            asked.append(start or 0)
            if end is not None and end > after:
                raise OSError("connection reset by peer")
        return bytes(whole(self, path, start, end))

    monkeypatch.setattr(type(files), "cat_file", cat_file)
    return asked


def test_it_is_copied_once(store: Any, small: SmallData, tmp_path: Path) -> None:
    copy = fetch_beton(ADDRESS, tmp_path)
    assert copy.read_bytes() == small.train.read_bytes() and check_beton(copy).samples == 100
    store.rm("/bucket/set/train.json")  # it would be asked for
    stamp = copy.stat().st_mtime_ns
    data = Data(train_dataset=ADDRESS, val_dataset=str(small.val), cache_dir=str(tmp_path))
    assert local_copies(data) == replace(data, train_dataset=str(copy))
    assert copy.stat().st_mtime_ns == stamp
    # What is there now is not what was copied.
    store.pipe("/bucket/set/train.beton", small.val.read_bytes())
    store.pipe("/bucket/set/train.json", manifest_path(small.val).read_bytes())
    assert check_beton(fetch_beton(ADDRESS, tmp_path)).samples == 33
    assert not list(copy.parent.glob("*.partial"))


def test_a_broken_connection_is_tried_again_and_gone_on_with(
    store: Any, small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = small.train.stat().st_size
    monkeypatch.setattr(remote, "BLOCK", length // 7 + 1)
    with monkeypatch.context() as broken:
        asked = cut(store, broken, after=length // 2)
        with pytest.raises(
            RunError, match=r"^memory://bucket.* could not be read from byte .*reset"
        ):
            fetch_beton(ADDRESS, tmp_path)
        assert max(map(asked.count, asked)) == remote.TRIES
    copy = copy_path(ADDRESS, tmp_path)
    begun = partial_path(copy).stat().st_size
    assert 0 < begun <= length // 2 and not copy.exists()
    asked = cut(store, monkeypatch, after=length)
    assert fetch_beton(ADDRESS, tmp_path).read_bytes() == small.train.read_bytes()
    assert min(asked) == begun
    # Begun from other bytes, it is begun again.
    copy.rename(partial_path(copy))
    store.pipe("/bucket/set/train.beton", small.val.read_bytes())
    store.pipe("/bucket/set/train.json", manifest_path(small.val).read_bytes())
    assert fetch_beton(ADDRESS, tmp_path).read_bytes() == small.val.read_bytes()


def test_a_copy_that_is_not_what_its_manifest_says_goes(
    store: Any, small: SmallData, tmp_path: Path
) -> None:
    data = bytearray(small.train.read_bytes())
    data[int(read_tables(small.train).pointers[50]) + 400] ^= 1  # of an image: no table says it
    store.pipe("/bucket/set/train.beton", bytes(data))
    with pytest.raises(RunError, match="copied and removed again: its images or labels are not"):
        fetch_beton(ADDRESS, tmp_path)
    store.pipe("/bucket/set/train.beton", bytes(data[:-1]))
    with pytest.raises(RunError, match=r"copied and removed again: .* is truncated"):
        fetch_beton(ADDRESS, tmp_path)
    assert not partial_path(copy_path(ADDRESS, tmp_path)).exists()
    store.rm("/bucket/set/train.json")  # another writer's: copied, and to be adopted
    store.pipe("/bucket/set/train.beton", small.train.read_bytes())
    with pytest.raises(UsageError, match=r"has no manifest .*`python -m ffcv_imnet adopt"):
        check_beton(fetch_beton(ADDRESS, tmp_path))


def test_what_is_refused(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: SmallData
) -> None:
    for address, text in (
        ("memory://bucket/set/no.beton", r"^memory://bucket/set/no\.beton does not exist$"),
        ("memory://bucket/set", "is a folder: name the file in it"),
        ("memory://bucket/set/", "is a folder: name the file in it"),
        ("nonsense://bucket/train.beton", r"^nonsense://bucket/train\.beton: Protocol not known"),
    ):
        with pytest.raises(UsageError, match=text):
            fetch_beton(address, tmp_path)
    for address, status in (
        ("foo://bucket/x", "Protocol not known: foo"),
        ("s3://bucket/x", "s3fs"),
    ):
        if status == "s3fs" and is_there("s3fs"):
            continue  # before an image is looked at
        with pytest.raises(UsageError, match=rf"^{address}/train\.beton: .*{status}"):
            write_ffcv.placed(address, "train.beton", tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        with pytest.raises(UsageError, match=r"MB and .* has 1 kB free: make room, or"):
            fetch_beton(ADDRESS, tmp_path)
    with pytest.raises(UsageError, match="--data_dir: s3://b/x is an address: name a path on"):
        write_ffcv.parse(["--split=val", "--data_dir=s3://b/x"])
    copy = fetch_beton(ADDRESS, tmp_path)
    monkeypatch.setattr(
        remote, "look", lambda address: (_ for _ in ()).throw(RunError("no network"))
    )
    assert fetch_beton(ADDRESS, tmp_path) == copy


def test_a_file_at_an_address_is_adopted_and_verified(
    store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the copy that training uses: the manifest beside it is what training then finds."""
    store.rm_file("/bucket/set/train.json")
    cache = ["--cache_dir", str(tmp_path)]
    assert adopt.main([ADDRESS, "--num_workers=1", *cache]) == 0
    copy = copy_path(ADDRESS, tmp_path)
    assert capsys.readouterr().out.count(f"{manifest_path(copy)}: 100 images") == 1
    data = Data(train_dataset=ADDRESS, val_dataset=str(copy), cache_dir=str(tmp_path))
    assert check_beton(Path(local_copies(data).train_dataset)).source["kind"] == "adopted"
    assert verify.main([ADDRESS, "--no_decode", "--num_workers=1", *cache]) == 0
    assert str(copy) in capsys.readouterr().out


def test_the_second_process_waits(
    store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_path(ADDRESS, tmp_path)
    with remote.alone(copy):  # another open file is another lock, as another process's
        waiting = threading.Thread(target=fetch_beton, args=(ADDRESS, tmp_path))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and not copy.exists()
    waiting.join(10)
    assert copy.exists() and "another process is copying" in capsys.readouterr().out


def test_the_dry_run_reads_the_manifests_alone(
    store: Any, small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small.settings(tmp_path, data__train_dataset=ADDRESS, data__cache_dir=tmp_path)
    assert dry_run(settings, False, 0.0) == 0
    assert "100 training images" in capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(to_yaml(settings))
    with pytest.raises(UsageError, match="give a batch of 1 or less, or more images"):  # of the 100
        tune.main([f"--config={tmp_path}/c.yaml", "--dry_run"])
    assert not copy_path(ADDRESS, tmp_path).exists()


def test_write_ffcv_takes_addresses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.write_tree(tmp_path / "images", train_per_class=2, val_per_class=1)
    out = f"file://{tmp_path}/there"
    words = ["--data_dir", str(tmp_path / "images"), "--num_workers", "1", "--out_dir", out]
    words += ["--cache_dir", str(tmp_path / "cache"), "--split"]
    with monkeypatch.context() as broken:
        broken.setattr(fsspec.filesystem("file").__class__, "put_file", lambda *_, **__: 1 / 0)
        with pytest.raises(RunError, match=r"train\.beton could not be written \(division by zero"):
            write_ffcv.main([*words, "train"])
    capsys.readouterr()
    assert write_ffcv.main([*words, "train"]) == 0
    said = capsys.readouterr().out
    assert f"{out}/train.beton: uploaded" in said and "encoded" not in said  # only uploaded
    assert check_beton(tmp_path / "there/train.beton").samples == 20
    assert write_ffcv.main([*words, "train"]) == 0
    assert capsys.readouterr().out == f"{out}/train.beton is up to date\n"
    with pytest.raises(
        UsageError,
        match=r"there/train\.beton is there already and differs: it was written with --jpeg_quality 90, and",
    ):
        write_ffcv.main([*words, "train", "--jpeg_quality", "80"])
    # On this machine the copy is there already.
    monkeypatch.setattr(remote, "download", lambda *_: pytest.fail("downloaded"))
    assert check_beton(fetch_beton(f"{out}/train.beton", tmp_path / "cache")).samples == 20


def test_an_archive_at_an_address(store: Any, tmp_path: Path) -> None:
    store.pipe("/bucket/val.tar", b"no tar")
    copy = fetch("memory://bucket/val.tar", tmp_path)
    assert copy.read_bytes() == b"no tar"
    words = ["--split=val", "--tar=memory://bucket/val.tar", f"--cache_dir={tmp_path}"]
    with pytest.raises((UsageError, RunError), match=r"val\.tar"):
        write_ffcv.main([*words, f"--out_dir={tmp_path}"])


def test_a_real_s3_client_and_server(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs", reason="s3fs is optional")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "test")
        monkeypatch.setattr(remote, "BLOCK", 1 << 20)
        with pytest.raises(UsageError, match=r"^s3://photos/set/train\.beton does not exist$"):
            fetch_beton("s3://photos/set/train.beton", tmp_path)
        fsspec.filesystem("s3").mkdir("photos")
        remote.put_beton(small.train, "s3://photos/set/train.beton")
        copy = fetch_beton("s3://photos/set/train.beton", tmp_path)
        assert copy.read_bytes() == small.train.read_bytes()
        assert json.loads(manifest_path(copy).read_text())["samples"] == 100
        assert remote.manifest_at("s3://photos/set/train.beton", tmp_path) is not None
    finally:
        server.stop()
        small.train.with_name("train.beton.origin").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, '{"address": "a", "bytes": 1e999, "token": "t"}', '{"a": 1}']
)
def test_a_note_of_another_kind_is_none(tmp_path: Path, text: str) -> None:
    remote.note_path(tmp_path / "x").write_text(text)
    assert remote.noted(tmp_path / "x") is None


def test_settings_take_addresses() -> None:
    assert load(data__train_dataset="s3://b/$x.beton").data.train_dataset == "s3://b/$x.beton"

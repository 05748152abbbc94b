"""Archives read in place, against tarfile and the tree they would unpack to; hostile ones."""

import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.images import tar
from ffcv_imnet.images.folder import ImageFolderTree
from ffcv_imnet.images.labels import read_labels
from ffcv_imnet.images.tar import TarArchive, index_tar
from tests.archives import member, pack_train, pack_val, tar_of
from tests.pictures import make_tree
from tests.test_atomic import largest_file


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_tree(tmp_path_factory.mktemp("tree"))
    return make_tree(root, (3, 2, 4), split="val")


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def train_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """An outer tar of one inner tar."""
    return tar_of(member("n0.tar", tar_of(*members)))


def assert_same(archive: TarArchive, source: ImageFolderTree) -> None:
    assert archive.classes == source.classes and np.array_equal(archive.labels, source.labels)
    assert [archive.name(i) for i in range(len(archive))] == [
        source.name(i) for i in range(len(source))
    ]
    assert all(archive.read(i) == source.read(i) for i in range(len(source)))


def test_train_archive_is_the_tree(tree: Path, tmp_path: Path) -> None:
    archive = TarArchive(pack_train(tree, tmp_path / "train.tar"))
    source = ImageFolderTree(tree / "train")
    assert_same(archive, source)
    part = archive.subset(np.array([7, 2]))
    assert part.name(0) == source.name(7) and part.read(1) == source.read(2)
    assert len(pickle.dumps(part)) < 2000


def test_val_archive_is_the_tree(tree: Path, tmp_path: Path) -> None:
    path = pack_val(tree, tmp_path / "val.tar", tmp_path / "labels.txt")
    assert_same(
        TarArchive(path, read_labels(tmp_path / "labels.txt")), ImageFolderTree(tree / "val")
    )
    with pytest.raises(UsageError, match=r"9 images side by side.*--labels"):
        TarArchive(path)
    with pytest.raises(RunError, match=r"8 of the 9 images .* have no label"):
        TarArchive(path, {"n00000000_0000": "a"})
    with pytest.raises(UsageError, match="--labels is not needed"):
        TarArchive(pack_train(tree, tmp_path / "train.tar"), {"a": "b"})


LONG = "d" * 60 + "/" + "e" * 70 + ".jpg"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_is_read_as_tarfile_reads_it(form: int, tmp_path: Path) -> None:
    members = [
        member("./b.jpg", b"b" * 700),
        member(LONG, b"long"),
        member("sub/", type=tarfile.DIRTYPE),
        member("a.JPG", b"a", mtime=1.5 if form == tarfile.PAX_FORMAT else 0),
        member("readme.txt", b"-"),
        *([member("\u00fc" * 90 + ".png", b"umlaut")] if form != tarfile.USTAR_FORMAT else []),
    ]
    path = put(tmp_path / "x.tar", tar_of(*members, form=form))
    index = index_tar(path)
    assert index.ignored == 1 and not index.fault
    with tarfile.open(path) as archive:
        images = [m for m in archive if m.isreg() and not m.name.endswith("txt")]
    said = {os.fsdecode(n): p for n, p in zip(index.names.tolist(), index.offsets, strict=True)}
    assert said == {m.name.removeprefix("./"): m.offset_data for m in images}


def test_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "BATCH", 3)
    path = put(tmp_path / "x.tar", tar_of(*(member(f"{i}.jpg", bytes(i)) for i in range(10, 30))))
    assert index_tar(path).sizes.tolist() == list(range(10, 30))


HOSTILE = {
    "absolute path": member("/etc/x.jpg", b"1"),
    r"'\.\.' in its path": member("a/../../x.jpg", b"1"),
    "a symbolic link": member("x.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": member("x.jpg", type=tarfile.LNKTYPE, linkname="y.jpg"),
    "a character device": member("x.jpg", type=tarfile.CHRTYPE),
    "a block device": member("x.jpg", type=tarfile.BLKTYPE),
    "a named pipe": member("x.jpg", type=tarfile.FIFOTYPE),
    "a sparse file": member("x.jpg", type=tarfile.GNUTYPE_SPARSE),
    "unknown type": member("x.jpg", type=b"Q"),
}


@pytest.mark.parametrize("why", HOSTILE)
@pytest.mark.parametrize("inner", [True, False])
def test_hostile_member_is_refused_by_name(why: str, inner: bool, tmp_path: Path) -> None:
    members = member("0.jpg", b"0"), HOSTILE[why], member("1.jpg", b"0")
    path = put(tmp_path / "x.tar", train_of(*members) if inner else tar_of(*members))
    with pytest.raises(RunError, match=why) as caught:
        index_tar(path)
    assert HOSTILE[why][0].name in str(caught.value) and "refused" in str(caught.value)
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == [path]


def test_name_twice_is_refused(tmp_path: Path) -> None:
    twice = [member("a.jpg", b"1"), member("b.jpg", b"1"), member("./a.jpg", b"2")]
    inner = tar_of(member("a.jpg", b"1"))
    for data, name in [
        (train_of(*twice), "a.jpg"),
        (tar_of(*twice), "a.jpg"),
        (tar_of(member("n0.tar", inner), member("x/n0.tar", inner)), "n0.tar"),
    ]:
        with pytest.raises(RunError, match=f"{name}' is there twice: refused"):
            index_tar(put(tmp_path / "x.tar", data))


def bomb(size: int) -> bytes:
    """A header that claims `size` bytes and has none."""
    info = tarfile.TarInfo("bomb.jpg")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [5000, 1 << 33, 1 << 70])
def test_bomb_is_refused_by_name(size: int, tmp_path: Path) -> None:
    good = tar_of(member("a.jpg", b"1"))[:1024]
    path = put(tmp_path / "x.tar", tar_of(member("n0.tar", good + bomb(size) + bytes(1024))))
    with pytest.raises(RunError, match=f"'bomb.jpg' claims {size:,} bytes, more .*refused"):
        index_tar(path)
    path = put(tmp_path / "y.tar", good + bomb(size) + bytes(1024))
    with pytest.raises(RunError, match=f"'bomb.jpg' claims {size:,} bytes of which 1,024 are"):
        TarArchive(path, {"a": "x"})


def forged(size: bytes, kind: bytes = b"0", name: str = "bomb.jpg") -> bytes:
    """A header with these twelve bytes as its size, and a checksum that fits."""
    info = tarfile.TarInfo(name)
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


SIZES = [
    b"-0000001000", b"-000001000\0", b"00000_1000\0", b"+0000001000", b"0o000001000", b"         -1\0",
    b"00000001009", b"0x000000100", b" \t000001000", "٠٠٠٠٠".encode(), b"\xff" * 12, b"\xff" + bytes(10) + b"\x01",
    b"\x80" + b"\xff" * 11, b"\x81" + bytes(11), b"77777777777\0", b"777777777777", b"1 2", b"\0\0\0\0\0\0\0\0\0\0\0007",
]  # fmt: skip


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"5", b"S"])
def test_no_size_is_believed(kind: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs, underscores, other digits, base 256: refused with the file's name, as the last of a batch too."""
    monkeypatch.setattr(tar, "BATCH", 2)
    good = tar_of(member("a.jpg", b"1"))[:1024]
    for front in (good, good + tar_of(member("b.jpg", b"1"))[:1024]):
        for size in SIZES:
            data = front + forged(size, kind) + bytes(1024)
            if kind == b"5" and size in (SIZES[-1], b"777777777777", b"77777777777\0", SIZES[12]):
                continue  # a folder has no data, whatever its size says
            if kind in b"0Lxg" and size == SIZES[-1]:
                continue  # the field ends at its first NUL: no size, which is sound
            with pytest.raises(RunError, match=r"x\.tar"):
                TarArchive(put(tmp_path / "x.tar", data), {"a": "x", "b": "x"})
            inner = tar_of(member("n0.tar", data))
            with pytest.raises(RunError, match=r"y\.tar"):
                TarArchive(put(tmp_path / "y.tar", inner))


@pytest.mark.parametrize(
    "records",
    [
        b"9" * 5000 + b" path=x\n", b"-9 path=x\n", b"99 path=x\n", b"9 path=x\n9", b"012 path=x\n", b"1 x\n",
        b"16 size=9999999\n" + b"7 a=b\n", b"21 size=-000000000001\n", b"15 size=1_000_0\n", b"14 size=0x100\n",
        b"25 size=99999999999999999\n", b"22 GNU.sparse.major=1\n", b"17 path=/etc/a.j\n", b"16 path=../a.jpg\n",
        b"12 path=a\0b\n", b"4098 path=" + b"a" * 4087 + b"\n",
    ],
)  # fmt: skip
def test_no_pax_record_is_believed(records: bytes, tmp_path: Path) -> None:
    pax = forged(b"%011o" % len(records), b"x", "pax") + records.ljust(
        -(-len(records) // 512) * 512, b"\0"
    )
    data = tar_of(member("a.jpg", b"1"))[:1024] + pax + tar_of(member("b.jpg", b"1"))
    with pytest.raises(RunError, match=r"x\.tar"):
        TarArchive(put(tmp_path / "x.tar", data), {"a": "x", "b": "x"})


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated_archive_says_how_much_is_good(part: float, tree: Path, tmp_path: Path) -> None:
    path = pack_train(tree, tmp_path / "train.tar")
    whole, size = TarArchive(path), path.stat().st_size
    end = int((whole.offsets + whole.sizes).max())
    os.truncate(path, int(end * part))
    with pytest.raises(
        RunError, match=r"truncated or damaged: .*; good are \d (whole classes|images)"
    ):
        TarArchive(path)
    some = TarArchive(path, damaged=True)
    assert some.fault and len(some.classes) < 3 and size > path.stat().st_size
    for index in range(len(some)):
        same = [whole.name(i) for i in range(len(whole))].index(some.name(index))
        assert some.read(index)[0] == whole.read(same)[0]


def test_other_damage_is_noticed(tree: Path, tmp_path: Path) -> None:
    data = pack_train(tree, tmp_path / "train.tar").read_bytes()
    middle = int(TarArchive(tmp_path / "train.tar").offsets[6]) - 512
    reserved = data[:middle] + bytes(4 << 20)  # a download that reserved its space
    broken = data[: middle + 3] + b"\xff" + data[middle + 4 :]
    second = data.index(b"n00000001.tar")
    for what, reason in [
        (broken, f"the header at byte {middle:,} is damaged"),
        (data[:second] + bytes(4 << 20), "an end mark stands .* bytes before the end"),
        (data[:second], "ends without an end mark"),
        (data + data, "something follows its end mark|an end mark stands"),
        (reserved, "an end mark stands .* bytes before the end"),
    ]:
        with pytest.raises(RunError, match=reason):
            TarArchive(put(tmp_path / "x.tar", what))


@pytest.mark.parametrize("blocks", range(15, 22))
def test_the_end_may_lie_in_two_records(blocks: int, tmp_path: Path) -> None:
    # One length in twenty: the second block of the end begins a record, 10,752 bytes of zeros.
    inner = train_of(member("n0_1.JPEG", b"x" * 512 * blocks))
    assert len(TarArchive(put(tmp_path / "train.tar", inner))) == 1


def test_what_is_no_tar(tmp_path: Path) -> None:
    for data, reason in [
        (b"", "not a tar"),
        (b"\x1f\x8b" + bytes(600), "gunzip"),
        (b"<html>" + bytes(600), "a web page"),
        (bytes(2048), "not a tar"),
        (b"x" * 2048, "not a tar"),
    ]:
        with pytest.raises(UsageError, match=reason):
            index_tar(put(tmp_path / "x.tar", data))
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        index_tar(tmp_path / "none.tar")


# ------------------------------------------------------------------------------------- the cache


def test_cached_index_is_taken_and_checked(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack_train(tree, tmp_path / "train.tar")
    cache = tmp_path / "train.tar.index.npz"
    first = index_tar(path)
    kept = cache.read_bytes()
    calls: list[Path] = []
    real = tar._index

    def counted(*arguments: Any) -> Any:
        calls.append(path)
        return real(*arguments)

    monkeypatch.setattr(tar, "_index", counted)
    assert np.array_equal(index_tar(path).offsets, first.offsets) and not calls
    for damage in (b"", kept[:500], b"PK" + kept[3:], os.urandom(2000)):
        cache.write_bytes(damage)
        assert np.array_equal(index_tar(path).names, first.names)
    assert len(calls) == 4
    os.utime(path, (1, 1))
    index_tar(path)
    assert len(calls) == 5
    state = path.stat()  # other contents of the same size and time
    path.write_bytes(path.read_bytes()[:512].ljust(state.st_size, b"\0"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert index_tar(path).fault
    assert len(calls) == 6


def test_cache_that_cannot_be_stored(tree: Path, tmp_path: Path) -> None:
    path = pack_train(tree, tmp_path / "train.tar")
    with largest_file(100):
        assert len(index_tar(path).names) == 15
    assert list(tmp_path.iterdir()) == [path]

"""The .beton file: read by ffcv as its own, and refused when it is not what its manifest says."""

import dataclasses
import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ffcv_imnet.core.atomic import partial_path
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data import beton
from ffcv_imnet.images.pixels import encode_jpeg
from ffcv_imnet.images.stored import JPEG, RAW, Stored, sample_digest
from tests.fuzz.forge import Parts
from tests.pictures import picture

LABELS = [0, 0, 1, 2, 2, 2, 1]
SMALL_PAGE = 1 << 15


def stored(index: int) -> Stored:
    """Sample `index`: every third one raw, all of one size."""
    pixels = picture(index)
    mode = RAW if index % 3 == 0 else JPEG
    data = pixels.tobytes() if mode == RAW else encode_jpeg(pixels, 95)
    digest = sample_digest(LABELS[index], data)
    height, width = pixels.shape[:2]
    return Stored(LABELS[index], mode, height, width, data, digest)


def write(path: Path, page_size: int = beton.PAGE_SIZE, spare: int = 0) -> beton.Manifest:
    """A .beton of all samples and its manifest, with room for `spare` more in its tables."""
    samples = [stored(index) for index in range(len(LABELS))]
    with path.open("wb") as file:
        writer = beton.BetonWriter(file, len(samples) + spare, page_size)
        for sample in samples:
            writer.add(sample)
        tables_checksum = writer.finish()
    content = hashlib.sha256(b"".join(sample.digest for sample in samples))
    manifest = beton.Manifest(
        format=beton.MANIFEST_FORMAT,
        split="train",
        samples=len(samples),
        classes=("ant", "bee", "cat"),
        class_counts=(2, 2, 3),
        bytes=path.stat().st_size,
        content_checksum=f"sha256:{content.hexdigest()}",
        tables_checksum=tables_checksum,
        settings={},
        source={},
        skipped=(),
        versions={},
        created="2026-01-01T00:00:00+00:00",
    )
    manifest.save(beton.manifest_path(path))
    return manifest


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "train.beton"
    write(path)
    return path


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """A pair of files to damage."""
    shutil.copy(beton.manifest_path(original), tmp_path)
    return Path(shutil.copy(original, tmp_path))


def test_front_is_as_ffcv_writes_it(original: Path, tmp_path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(), "label": IntField()}
    theirs = DatasetWriter(str(tmp_path / "theirs"), fields, page_size=beton.PAGE_SIZE)
    theirs.num_samples = len(LABELS)
    theirs.prepare()  # header and descriptors only; starts no process
    theirs.metadata_sm.close()
    theirs.metadata_sm.unlink()
    front, ours = (tmp_path / "theirs").read_bytes(), original.read_bytes()
    assert ours[:16] == front[:16] and ours[24 : len(front)] == front[24:]  # all but the pointer
    assert int.from_bytes(front[16:24], "little") == 0
    pointer = int.from_bytes(ours[16:24], "little")
    assert len(ours) - pointer == 24 * len(LABELS)


@pytest.mark.parametrize("page_size", [beton.PAGE_SIZE, SMALL_PAGE])
def test_ffcv_reads_what_was_stored(page_size: int, tmp_path: Path) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Squeeze, ToTensor

    path = tmp_path / "train.beton"
    write(path, page_size, spare=3)
    loader = Loader(
        str(path),
        batch_size=4,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        os_cache=page_size == beton.PAGE_SIZE,  # both of ffcv's ways to read
        pipelines={
            "image": [SimpleRGBImageDecoder(), ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze(1)],
        },
    )
    # Batches are views into buffers that are used again.
    batches = [(image.numpy().copy(), label.numpy().copy()) for image, label in loader]
    images = np.concatenate([image for image, _ in batches])
    assert np.concatenate([label for _, label in batches]).tolist() == LABELS
    for index, pixels in enumerate(images):
        # ffcv decodes with the fast DCT, which adds about 1.5 levels of its own.
        error = np.abs(pixels.astype(int) - picture(index)).mean()
        assert error == 0 if stored(index).mode == RAW else error < 3, index


def test_content_checksum_does_not_depend_on_the_layout(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.beton"
    small = write(path, SMALL_PAGE, spare=9)
    large = beton.Manifest.load(beton.manifest_path(original))
    assert small.content_checksum == large.content_checksum
    assert small.tables_checksum != large.tables_checksum and small.bytes < large.bytes
    # As computed while writing, and as read back from the file.
    assert beton.content_checksum(path) == beton.content_checksum(original)
    assert beton.content_checksum(path) == small.content_checksum
    tables = beton.read_tables(path)
    first, last = tables.pointers, tables.pointers + tables.sizes - 1
    assert len(np.unique(first // SMALL_PAGE)) > 1, "one page would prove nothing"
    assert np.array_equal(first // SMALL_PAGE, last // SMALL_PAGE)
    beton.verify_beton(path)


def test_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    manifest = write(tmp_path / "train.beton")
    odd = dataclasses.replace(manifest, skipped=({"path": "ü/\udcff.jpg", "reason": "empty"},))
    odd.save(tmp_path / "odd.json")
    assert beton.Manifest.load(tmp_path / "odd.json") == odd
    assert beton.check_beton(tmp_path / "train.beton") == manifest


def edit(path: Path, where: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(where)
        file.write(data)


def edit_alone(path: Path, where: int, data: bytes) -> None:
    beton.manifest_path(path).unlink()
    edit(path, where, data)


def flip(path: Path, where: int) -> None:
    edit(path, where, bytes([path.read_bytes()[where] ^ 1]))


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = beton.Manifest.load(beton.manifest_path(path))
    dataclasses.replace(manifest, **changes).save(beton.manifest_path(path))  # type: ignore[arg-type]


TABLE = 24 * len(LABELS)
DAMAGES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no beton": (os.unlink, UsageError, r"train.beton does not exist: .*--split train --data_dir"),
    "no manifest": (
        lambda path: beton.manifest_path(path).unlink(),
        UsageError,
        r"has no manifest .*train.json: copy the .json from beside .*python -m ffcv_imnet adopt .*train.beton",
    ),
    "empty": (lambda path: os.truncate(path, 0), RunError, "not a .beton, it has only 0 bytes"),
    "something else": (
        lambda path: edit_alone(path, 0, b"\x89PNG"),
        UsageError,
        "not a .beton of version",
    ),
    "half-written": (
        lambda path: edit_alone(path, 16, bytes(8)),
        RunError,
        "half-written",
    ),
    "truncated": (
        lambda path: os.truncate(path, path.stat().st_size - 24),
        RunError,
        "truncated: it has .* bytes and its header says",
    ),
    "truncated by one byte": (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        RunError,
        "truncated",
    ),
    "version": (lambda path: flip(path, 0), RunError, "the header of .* is damaged, the file has"),
    "page size": (lambda path: flip(path, 4), RunError, "the header of .* is damaged"),
    "count": (lambda path: flip(path, 8), RunError, "the header of .* is damaged"),
    "pointer": (lambda path: flip(path, 20), RunError, "the header of .* is damaged"),
    "longer": (lambda path: edit(path, path.stat().st_size, b"x"), RunError, "too long"),
    "other label": (lambda path: flip(path, 24 + 2 * 1041 + 16), RunError, "tables .* are not"),
    "other pointer": (
        lambda path: flip(path, path.stat().st_size - TABLE + 8),
        RunError,
        "its two tables place its samples differently",
    ),
    "other size": (lambda path: edit_manifest(path, bytes=7), RunError, "manifest .* says 7"),
    "other counts": (
        lambda path: edit_manifest(path, class_counts=(2, 3, 2)),
        RunError,
        "does not count the samples",
    ),
    "manifest truncated": (
        lambda path: os.truncate(beton.manifest_path(path), 50),
        RunError,
        "manifest .* cannot be read",
    ),
    "manifest of another format": (
        lambda path: edit_manifest(path, format=99),
        RunError,
        "is not a manifest of format 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_with_the_reason(damage: str, copy: Path) -> None:
    do, error, reason = DAMAGES[damage]
    do(copy)
    with pytest.raises(error, match=reason) as caught:
        beton.check_beton(copy)
    assert "\n" not in str(caught.value)


def test_verify_finds_changed_pixels(copy: Path) -> None:
    expected = {index: stored(index).digest for index in range(len(LABELS))}
    beton.verify_beton(copy, expected)
    tables = beton.read_tables(copy)
    flip(copy, int(tables.pointers[3]) + 5)  # a raw one: nothing else can notice
    beton.check_beton(copy)
    with pytest.raises(RunError, match=r"sample 3 of .* is not what was to be stored"):
        beton.verify_beton(copy, expected)
    assert beton.content_checksum(copy) != beton.check_beton(copy).content_checksum


def test_verify_decodes_a_sample(copy: Path) -> None:
    beton.verify_beton(copy)
    edit(copy, int(beton.read_tables(copy).pointers[1]), bytes(10))
    with pytest.raises(RunError, match=r"sample 1 of .* does not decode \(.*\): write it again"):
        beton.verify_beton(copy)


def change(name: str, index: int, value: int) -> Callable[[beton.Tables], beton.Tables]:
    def changed(tables: beton.Tables) -> beton.Tables:
        column: NDArray[np.int64] = getattr(tables, name).copy()
        column[index] = value
        return dataclasses.replace(tables, **{name: column})  # type: ignore[arg-type]

    return changed


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (change("pointers", 0, 8), "sample 0 .* lies outside the data"),
        (change("sizes", 6, 1 << 20), "sample 6 .* lies outside the data"),
        (change("pointers", 2, beton.PAGE_SIZE * 2 - 5), "sample 2"),
        (change("sizes", 1, 9000), "sample 2 .* overlaps the one before"),
        (change("heights", 4, 0), "sample 4 .* is empty"),
        (change("labels", 5, 3), "sample 5 .* label out of range"),
        (change("labels", 5, -1), "sample 5 .* label out of range"),
        (change("modes", 5, 2), "sample 5 .* unknown storage mode"),
        (change("widths", 3, 63), "sample 3 .* not height x width x 3"),
    ],
)
def test_verify_looks_at_every_entry(
    fault: Callable[[beton.Tables], beton.Tables], reason: str, original: Path
) -> None:
    with pytest.raises(RunError, match=reason):
        beton.verify_tables(original, fault(beton.read_tables(original)), 3)


def forged(copy: Path, change: Callable[[Parts], object]) -> Path:
    """The pair with other tables, and a manifest that fits them."""
    parts = Parts.of(copy)
    change(parts)
    parts.save(copy)
    return copy


FORGERIES: dict[str, tuple[Callable[[Parts], object], str]] = {
    "nothing": (lambda parts: None, ""),
    "raw pixels that are not there": (
        lambda parts: parts.image(5, mode=RAW, width=65535, height=65535).place(5, size=1 << 40),
        "sample 5 .* lies outside the data",
    ),
    "in the header": (
        lambda parts: parts.image(5, mode=RAW, width=8, height=8).place(5, 0, 192),
        "sample 5 .* lies outside the data",
    ),
    "a size that overflows": (
        lambda parts: parts.place(5, size=(1 << 64) - 8),
        "sample 5 .* lies outside the data",
    ),
    "label 50": (lambda parts: parts.label(5, 50), "sample 5 .* label out of range"),
    "label -5": (lambda parts: parts.label(5, -5), "sample 5 .* label out of range"),
    "label 2^62": (lambda parts: parts.label(5, 1 << 62), "sample 5 .* label out of range"),
    "a bomb": (
        lambda parts: parts.image(4, mode=JPEG, width=65535, height=65535),
        "sample 4 .* has too many pixels for its bytes",
    ),
    "no height": (lambda parts: parts.image(4, height=0), "sample 4 .* is empty"),
    "in one table alone": (
        lambda parts: parts.image(4, data_ptr=1 << 30),
        "its two tables place its samples differently",
    ),
    "a name that ffcv cannot read": (
        lambda parts: parts.descriptors.__setitem__(3, 0xE9),
        "the names of its fields are not ASCII",
    ),
    "one field": (lambda parts: parts.header.__setitem__("num_fields", 1), "has 1 fields"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_manifest_that_fits_makes_no_table_true(name: str, copy: Path) -> None:
    change, reason = FORGERIES[name]
    path = forged(copy, change)
    if not reason:
        beton.check_beton(path)
        return
    with pytest.raises((RunError, UsageError), match=reason) as caught:
        beton.check_beton(path)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.beton")
    with pytest.raises(UsageError, match="it is a pipe"):
        beton.check_beton(tmp_path / "train.beton")


def test_unfinished_file_is_recognised(tmp_path: Path) -> None:
    # At no moment before the end of `finish` may a file look whole.
    file = io.BytesIO()
    writer = beton.BetonWriter(file, 2, SMALL_PAGE)
    writer.add(stored(0))
    (tmp_path / "train.beton").write_bytes(file.getvalue())
    with pytest.raises(RunError, match="half-written"):
        beton.read_tables(tmp_path / "train.beton")


def test_stop_between_the_two_renames_is_repaired(copy: Path) -> None:
    right = beton.check_beton(copy)
    manifest = beton.manifest_path(copy)
    waiting = manifest.read_bytes()
    edit_manifest(copy, tables_checksum="sha256:0")  # the manifest of a file that was replaced
    partial_path(manifest).write_bytes(waiting)
    with pytest.raises(RunError):
        beton.check_beton(copy)
    assert beton.repair_beton(copy)
    assert beton.check_beton(copy) == right
    assert not partial_path(manifest).exists() and not beton.repair_beton(copy)


def test_a_refused_name_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a sticky folder, where the file that bears the name is another user's."""
    both = copy, beton.manifest_path(copy)
    held = [path.read_bytes() for path in both]
    for path in both:
        shutil.copy(path, partial_path(path))

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(RunError, match="Operation not permitted"):
        beton.commit_beton(copy)
    assert not any(partial_path(path).exists() for path in both)
    assert [path.read_bytes() for path in both] == held


def test_left_over_manifest_of_another_file_is_not_taken(copy: Path) -> None:
    right = beton.check_beton(copy)
    dataclasses.replace(right, tables_checksum="sha256:0").save(
        partial_path(beton.manifest_path(copy))
    )
    assert not beton.repair_beton(copy)
    assert beton.check_beton(copy) == right


def test_the_layout_is_ffcvs_own() -> None:
    """Every dtype, version and descriptor that beton.py spells out, against ffcv's modules."""
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    fields = {"image": RGBImageField(), "label": IntField()}
    assert beton.VERSION == types.CURRENT_VERSION
    assert types.HeaderType == beton.HEADER
    assert beton.ALLOCATION == types.ALLOC_TABLE_TYPE
    assert types.get_metadata_type(list(fields.values())) == beton.METADATA
    assert beton.DESCRIPTORS.dtype == types.FieldDescType
    for row, (name, field) in zip(beton.DESCRIPTORS, fields.items(), strict=True):
        assert types.TYPE_ID_HANDLER[int(row["type_id"])] is type(field)
        assert bytes(row["name"]).rstrip(b"\0").decode() == name
        assert not row["arguments"].any() and not field.to_binary()["f0"].any()

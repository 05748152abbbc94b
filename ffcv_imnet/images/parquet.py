"""Parquet shards with a column `image` and a column `label`, as on the Hugging Face hub.

`image` holds encoded files: bytes, or a struct of `bytes` and `path`. `label` holds class names, or
numbers whose names the hub keeps in the file's metadata: `tench, Tinca tinca` for ImageNet, not the
wnid. Its shards name each file `n01440764_10026_n01440764.JPEG`, though: wnid and original name are
taken from there, so that order and classes are those of every other way in. Copies whose file names
were lost are recognised by their thousand names. Local files only. Needs pyarrow (optional).
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.bounded import in_words, memory_at_most
from ffcv_imnet.core.errors import RunError, UsageError, reason_of
from ffcv_imnet.core.names import LONGEST, fault_of, quoted, shown
from ffcv_imnet.core.optional import require
from ffcv_imnet.images import POINTER, InArrays
from ffcv_imnet.images.imagenet import CLASSES, imagenet_names
from ffcv_imnet.images.stored import checksum

if TYPE_CHECKING:
    import pyarrow

HUB_NAME = re.compile(r"(.+)_(n\d{8})(\.\w+)")  # original name, wnid
SHARD = re.compile(r"(train|validation|val|test)[-_.]")
COUNTED = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")  # the n-th of so many; the hub may add a hash
# Bytes of a row group's images, which a worker holds (the hub's have 12 MB), and of its names and labels
# (those of a million images have a third).
LARGEST_GROUP, LARGEST_LABELS = 4 << 30, 1 << 30
THREADS = 8  # of Arrow, that read files
ALIKE = 900  # class names that must be ImageNet's, in its order, for the others to be taken as such
Label = int | str


def _pyarrow(part: str) -> Any:
    return require(f"pyarrow.{part}", "reading parquet", "pyarrow")


def shards_of(folder: Path, split: str) -> list[Path]:
    """The shards of `split`, sorted: `split`-*.parquet in `folder` (or `folder`/data), or all of
    those in `folder`/`split`. The hub's name for val is validation.

    Raises:
        UsageError: there are none.
        RunError: their names say that there should be more.
    """
    names = ("val", "validation") if split == "val" else (split,)
    if not folder.exists():
        raise UsageError(f"{folder} does not exist")
    if folder.is_file():
        if (said := SHARD.match(folder.name)) and said[1] not in names:
            raise UsageError(f"{folder} is a shard of {said[1]}, and --split is {split}")
        return _all_there([folder])
    for place in (folder, folder / "data"):
        found = [
            path
            for path in sorted(place.glob("*.parquet"))
            if (said := SHARD.match(path.name)) and said[1] in names and path.is_file()
        ]
        if found:
            return _all_there(found)
    for name in names:
        if found := sorted((folder / name).glob("*.parquet")):
            return _all_there(found)
    raise UsageError(
        f"{folder} has no shards of {split}: expected {names[-1]}-00000-of-00014.parquet or"
        f" {names[-1]}/*.parquet"
    )


def _all_there(found: list[Path]) -> list[Path]:
    """Refuse a download with holes: each name says how many there are."""
    for path in found:
        if not (said := COUNTED.fullmatch(path.stem)):
            continue
        have = {int(m[2]) for p in found if (m := COUNTED.fullmatch(p.stem)) and m[3] == said[3]}
        if missing := sorted(set(range(int(said[3]))) - have):
            raise RunError(
                f"{path if len(found) == 1 else path.parent} has {len(have):,} of the {int(said[3]):,} shards of {said[1]},"
                f" {said[1]}-{missing[0]:05}-of-{said[3]} is missing: complete the download, and give"
                " the folder of all"
            )
    return found


class ParquetShards(InArrays):
    """The images of parquet shards, by class and original file name.

    Args:
        shards: the files, all of one split.

    Raises:
        UsageError: pyarrow is missing, or the columns are not as above.
        RunError: a file is damaged, or its labels contradict its names.
    """

    kind = "parquet"
    arrays = "files", "labels", "places"

    def __init__(self, shards: Sequence[Path]) -> None:
        parquet = _pyarrow("parquet")
        self.where = f"{shards[0].parent}/*.parquet" if len(shards) > 1 else str(shards[0])
        self.ignored = 0
        self.shards = tuple(str(shard) for shard in shards)
        names: list[str] = []
        labels: list[Label] = []
        wnids: dict[Label, str] = {}
        said: list[str] | None = None
        places: list[NDArray[np.int64]] = []
        for number, shard in enumerate(shards):
            try:
                columns = _Columns(parquet.ParquetFile(shard), shard, wnids)
                if number and columns.class_names != said:
                    raise RunError(f"{shard} names its classes otherwise than {shards[0]}")
                said = columns.class_names
                for group in range(columns.file.num_row_groups):
                    part_names, part_labels = columns.read(group)
                    names += part_names
                    labels += part_labels
                    rows = np.arange(len(part_names))
                    places.append(np.column_stack(np.broadcast_arrays(number, group, rows)))
            except (RunError, UsageError):
                raise
            except Exception as error:  # pyarrow's own, of every kind for a damaged file
                raise RunError(_unreadable(shard, error)) from None
        if not names:
            raise UsageError(f"{self.where} holds no images")
        name_of = class_names(set(labels), wnids, said, self.where)
        self.classes = tuple(sorted(name_of.values()))
        index = {label: self.classes.index(name) for label, name in name_of.items()}
        numbers = np.array([index[label] for label in labels], np.int64)
        files = np.array([name.encode() for name in names], np.bytes_)
        order = np.lexsort((files, numbers))  # stable: images without a name stay in their order
        self.files, self.labels = files[order], numbers[order]
        # (images, 3): shard, row group, row in it.
        self.places: NDArray[np.int64] = np.concatenate(places)[order]

    def reading_order(self) -> NDArray[np.int64]:
        """Indices in the order of the shards, which the hub's are shuffled over: reading by class
        would decompress a row group for every image."""
        shard, group, row = self.places.T
        return np.lexsort((row, group, shard))

    def name(self, index: int) -> str:
        """`class/file`; the place in the shards where the file has no name."""
        shard, group, row = self.places[index].tolist()
        file = bytes(self.files[index]).decode()
        file = file or f"{Path(self.shards[shard]).name}:{group}:{row}"
        return f"{self.classes[int(self.labels[index])]}/{file}"

    def read(self, index: int) -> tuple[bytes, int]:
        """The file's bytes and its label; OSError when it cannot be read."""
        shard, group, row = self.places[index].tolist()
        try:
            value = _row_group(self.shards[shard], group)[row].as_py()
        except (ValueError, MemoryError, LookupError) as error:
            raise OSError(shown(reason_of(error))) from None
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise OSError("the shard holds no bytes of it, only a path")
        return data, int(self.labels[index])

    def fingerprint(self) -> str:
        """SHA-256 over name, size and time of every shard and over name and label of every image."""
        said = " ".join(self.classes)
        for shard in map(Path, self.shards):
            state = shard.stat()
            said += f"{shard.name}\0{state.st_size}\0{state.st_mtime_ns}\n"
        return checksum(said.encode(), self.files, self.labels, self.places)


@functools.lru_cache(maxsize=1)
def _row_group(shard: str, group: int) -> "pyarrow.ChunkedArray":
    # One is kept: a worker's images come from the same one. Its size, about 12 MB on the hub,
    # is what a worker needs in memory. No threads: the workers are the parallelism.
    # A dictionary of one large value unpacks to any size.
    with memory_at_most(LARGEST_GROUP, THREADS):
        file = _pyarrow("parquet").ParquetFile(shard)
        return file.read_row_group(group, columns=["image"], use_threads=False).column("image")


class _Columns:
    """Names and labels of the rows of one shard; `wnids`, by label, are gathered over all shards."""

    def __init__(self, file: Any, shard: Path, wnids: dict[Label, str]) -> None:
        self.file, self.shard, self.wnids = file, shard, wnids
        schema = file.schema_arrow
        for column in ("image", "label"):
            if column not in schema.names:
                raise UsageError(
                    f"{shard} has no column {column!r}, it has {shown(', '.join(schema.names[:9])[:200])}"
                )
        self._check_types(schema.field("image").type, schema.field("label").type)
        self._check_size(Path(shard).stat().st_size)
        self.class_names = _hub_names(schema.metadata)

    def _check_types(self, image: Any, label: Any) -> None:
        types = _pyarrow("types")
        parts = {part.name: part.type for part in image} if types.is_struct(image) else {}
        encoded, path = parts.get("bytes", image), parts.get("path")
        self.has_path = path is not None and not types.is_null(path)
        if not (
            types.is_binary(encoded) or types.is_large_binary(encoded) or types.is_null(encoded)
        ) or (self.has_path and not (types.is_string(path) or types.is_large_string(path))):
            raise UsageError(
                f"the column image of {self.shard} holds {shown(str(image)[:200])}, not encoded images"
            )
        kind = label.value_type if types.is_dictionary(label) else label
        if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
            raise UsageError(
                f"the column label of {self.shard} holds {shown(str(label)[:200])}, not numbers or names"
            )

    def _check_size(self, length: int) -> None:
        """Raises UsageError for what the footer says, RunError where it cannot be true."""
        said = self.file.metadata
        if not 0 <= said.num_rows <= length:
            raise RunError(
                f"{self.shard} says that it holds {said.num_rows:,} images in {length:,} bytes"
            )
        for group in range(said.num_row_groups):
            if (most := said.row_group(group).total_byte_size) > LARGEST_GROUP:
                raise UsageError(
                    f"row group {group} of {self.shard} unpacks to {most >> 20:,} MB, and a worker holds one:"
                    f" write the shard again with groups of less than {LARGEST_GROUP >> 30} GB (row_group_size)"
                )

    def read(self, group: int) -> tuple[list[str], list[Label]]:
        """File names and labels of a row group."""
        columns = ["image.path", "label"] if self.has_path else ["label"]
        with memory_at_most(LARGEST_LABELS, THREADS):
            table = self.file.read_row_group(group, columns=columns, use_threads=False)
            labels = table.column("label").to_pylist()
            paths = [""] * len(labels)
            if self.has_path:  # an image that is null has none
                rows = table.column("image").to_pylist()
                paths = [((row or {}).get("path") or "") for row in rows]
        return [self._file(*row) for row in zip(paths, labels, strict=True)], labels

    def _file(self, path: str, label: Label | None) -> str:
        file = path.rpartition("/")[2]
        if label is None or label == -1:
            raise UsageError(f"{self.shard} has images without labels (the test split?)")
        if len(file) > LONGEST:  # the longest one sets the room for all
            raise RunError(f"{self.shard} has a file name of {len(file):,} characters")
        if not (said := HUB_NAME.fullmatch(file)):
            return file
        if self.wnids.setdefault(label, said[2]) != said[2]:
            raise RunError(
                f"{self.shard}: label {quoted(label)} is {self.wnids[label]} and {said[2]}"
            )
        return said[1] + said[3]


def class_names(
    labels: set[Label], wnids: Mapping[Label, str], said: Sequence[str] | None, where: str
) -> dict[Label, str]:
    """The class name of every label: its wnid if that can be known, else what the shards call it.

    Args:
        labels: those that occur: class names, or numbers.
        wnids: what the names of files say.
        said: names in the order of the numbers, from the shards' metadata.
        where: what messages call the shards.

    Raises:
        UsageError: a number has no name.
        RunError: two labels have one name, or only some have a wnid.
    """
    if said is not None and is_imagenet(said):
        found = dict(enumerate(imagenet_names())) | dict(wnids)
        if wrong := [n for n, wnid in enumerate(imagenet_names()) if wnids.get(n, wnid) != wnid]:
            raise RunError(
                f"{where}: files of label {wrong[0]} are named {wnids[wrong[0]]}, but its metadata"
                f" calls it {quoted(said[wrong[0]])}"
            )
    elif wnids:
        found = dict(wnids)
        if lost := sorted(labels - set(wnids), key=str):
            raise RunError(
                f"{where}: the files of some classes are named by a wnid, those of label {quoted(lost[0])}"
                " are not: are shards of two data sets mixed?"
            )
    else:
        found = {label: label for label in labels if isinstance(label, str)}
        found |= dict(enumerate(said or ()))
    nameless = [label for label in labels if not found.get(label)]
    if nameless:
        raise UsageError(
            f"{where} numbers its classes and does not name {quoted(nameless[0])}: no file name ends in a"
            " wnid and its metadata holds no name"
        )
    used = {label: found[label] for label in labels}
    if bad := next((name for name in used.values() if fault_of(name)), None):
        raise UsageError(f"{where} calls a class {quoted(bad)}, which {fault_of(bad)}")
    for label, name in used.items():
        if twice := [other for other in used if used[other] == name and other != label]:
            raise RunError(
                f"{where}: the labels {quoted(label)} and {quoted(twice[0])} are both called {quoted(name)}"
            )
    return used


def is_imagenet(said: Sequence[str]) -> bool:
    """Whether these are ImageNet's thousand classes in the order of the wnids. The hub lists all
    synonyms, and lists differ in a few: the first one must agree in nearly all."""
    if len(said) != CLASSES:
        return False
    pairs = zip(said, imagenet_names().values(), strict=True)
    return sum(a.split(",")[0].lower() == b.lower() for a, b in pairs) >= ALIKE


def _unreadable(shard: Path, error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"{shard}: the names or labels of a row group unpack to more than {in_words(LARGEST_LABELS)}"
    with shard.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            return f"{shard} is only Git's pointer to the file: fetch it with `git lfs pull`"
    return f"{shard} cannot be read, is its download complete? ({shown(reason_of(error))})"


def _hub_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """Class names as the hub's `datasets` stores them with the schema."""
    try:
        said = json.loads((metadata or {})[b"huggingface"])
        names = said["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None

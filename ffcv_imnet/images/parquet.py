"""Parquet shards with a column `image` and a column `label`, as on the Hugging Face hub.

`image` holds encoded files: bytes, or a struct of `bytes` and `path`. `label` holds class names, or
numbers whose names the hub keeps in the file's metadata. ImageNet's own shards name each file
`n01440764_10026_n01440764.JPEG`: the wnid and the original name are taken from there, so that order
and classes are those of every other way in. Local files only. Needs pyarrow (optional).
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.errors import RunError, UsageError

if TYPE_CHECKING:
    import pyarrow

HUB_NAME = re.compile(r"(.+)_(n\d{8})(\.\w+)")  # original name, wnid
SHARD = re.compile(r"(train|validation|val|test)[-_.]")


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            "reading parquet needs pyarrow, which is not installed: pip install pyarrow"
        ) from None
    return pyarrow.parquet


def shards_of(folder: Path, split: str) -> list[Path]:
    """The shards of `split`, sorted: `split`-*.parquet in `folder` (or `folder`/data), or all of
    those in `folder`/`split`. The hub's name for val is validation.

    Raises:
        UsageError: there are none.
    """
    names = ("val", "validation") if split == "val" else (split,)
    if folder.is_file():
        return [folder]
    for place in (folder, folder / "data"):
        found = [
            path
            for path in sorted(place.glob("*.parquet"))
            if (said := SHARD.match(path.name)) and said[1] in names
        ]
        if found:
            return found
    for name in names:
        if found := sorted((folder / name).glob("*.parquet")):
            return found
    raise UsageError(
        f"{folder} has no shards of {split}: expected {names[-1]}-00000-of-00014.parquet or"
        f" {names[-1]}/*.parquet"
    )


class ParquetShards:
    """The images of parquet shards, by class and original file name.

    Args:
        shards: the files, all of one split.

    Raises:
        UsageError: pyarrow is missing, or the columns are not as above.
        RunError: a file is damaged, or its labels contradict its names.
    """

    kind = "parquet"

    def __init__(self, shards: Sequence[Path]) -> None:
        parquet = _pyarrow()
        self.where = f"{shards[0].parent}/*.parquet" if len(shards) > 1 else str(shards[0])
        self.ignored = 0
        self.shards = tuple(str(shard) for shard in shards)
        names: list[str] = []
        classes: list[str] = []
        places: list[NDArray[np.int64]] = []
        for number, shard in enumerate(shards):
            try:
                file = parquet.ParquetFile(shard)
                said = _Columns(file, shard)
                for group in range(file.num_row_groups):
                    part_names, part_classes = said.read(group)
                    names += part_names
                    classes += part_classes
                    rows = np.arange(len(part_names))
                    places.append(
                        np.stack([np.full_like(rows, number), np.full_like(rows, group), rows], 1)
                    )
            except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
                raise RunError(f"{shard} cannot be read: {' '.join(str(error).split())}") from None
        if not names:
            raise UsageError(f"{self.where} holds no images")
        self.classes = tuple(sorted(set(classes)))
        index = {name: number for number, name in enumerate(self.classes)}
        labels = np.array([index[name] for name in classes], np.int64)
        files = np.array([name.encode() for name in names], np.bytes_)
        order = np.lexsort((files, labels))  # stable: images without a name stay in their order
        self.files, self.labels = files[order], labels[order]
        # (images, 3): shard, row group, row in it.
        self.places: NDArray[np.int64] = np.concatenate(places)[order]

    def reading_order(self) -> NDArray[np.int64]:
        """Indices in the order of the shards, which the hub's are shuffled over: reading by class
        would decompress a row group for every image."""
        shard, group, row = self.places.T
        return np.lexsort((row, group, shard))

    def __len__(self) -> int:
        return len(self.files)

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
        except ValueError as error:
            raise OSError(" ".join(str(error).split())) from None
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise OSError("the shard holds no bytes of it, only a path")
        return data, int(self.labels[index])

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """The same shards with these images alone, in this order."""
        part = type(self).__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.files, part.labels = self.files[indices], self.labels[indices]
        part.places = self.places[indices]
        return part

    def fingerprint(self) -> str:
        """SHA-256 over name, size and time of every shard and over name and label of every image."""
        digest = hashlib.sha256(" ".join(self.classes).encode())
        for shard in map(Path, self.shards):
            state = shard.stat()
            digest.update(f"{shard.name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
        for array in (self.files, self.labels, self.places):
            digest.update(np.ascontiguousarray(array).data)
        return f"sha256:{digest.hexdigest()}"


@functools.lru_cache(maxsize=1)
def _row_group(shard: str, group: int) -> "pyarrow.ChunkedArray":
    # One is kept: a worker's images come from the same one. Its size, about 12 MB on the hub,
    # is what a worker needs in memory. No threads: the workers are the parallelism.
    file = _pyarrow().ParquetFile(shard)
    return file.read_row_group(group, columns=["image"], use_threads=False).column("image")


class _Columns:
    """Names and classes of the rows of one shard."""

    def __init__(self, file: Any, shard: Path) -> None:
        self.file, self.shard = file, shard
        schema = file.schema_arrow
        for column in ("image", "label"):
            if column not in schema.names:
                raise UsageError(
                    f"{shard} has no column {column!r}, it has {', '.join(schema.names)}"
                )
        image = str(schema.field("image").type)
        self.has_path = image.startswith("struct") and "path: " in image
        if not image.startswith(("struct", "binary", "large_binary")):
            raise UsageError(f"the column image of {shard} holds {image}, not encoded images")
        kind = str(schema.field("label").type)
        self.numbered = "int" in kind
        if not self.numbered and "string" not in kind:
            raise UsageError(f"the column label of {shard} holds {kind}, not numbers or names")
        self.class_names = _hub_names(schema.metadata)
        self.wnid_of: dict[int | str, str] = {}  # by the shard's own label

    def read(self, group: int) -> tuple[list[str], list[str]]:
        """File names and class names of a row group."""
        columns = ["image.path", "label"] if self.has_path else ["label"]
        table = self.file.read_row_group(group, columns=columns, use_threads=False)
        labels = table.column("label").to_pylist()
        paths = [""] * len(labels)
        if self.has_path:
            paths = [(row["path"] or "") for row in table.column("image").to_pylist()]
        rows = [self._row(path, label) for path, label in zip(paths, labels, strict=True)]
        return [name for name, _ in rows], [name for _, name in rows]

    def _row(self, path: str, label: int | str | None) -> tuple[str, str]:
        file = path.rpartition("/")[2]
        if label is None or label == -1:
            raise UsageError(f"{self.shard} has images without labels (the test split?)")
        if said := HUB_NAME.fullmatch(file):
            wnid = said[2]
            if self.wnid_of.setdefault(label, wnid) != wnid:
                raise RunError(f"{self.shard}: label {label} is {self.wnid_of[label]} and {wnid}")
            return said[1] + said[3], wnid
        if not self.numbered:
            return file, str(label)
        number = int(label)
        if self.class_names is None or number >= len(self.class_names):
            raise UsageError(
                f"{self.shard} numbers its classes and does not name them: no file name ends in a"
                " wnid and its metadata holds no names"
            )
        return file, self.class_names[number]


def _hub_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """Class names as the hub's `datasets` stores them with the schema."""
    try:
        said = json.loads((metadata or {})[b"huggingface"])
        names = said["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None

"""A table of images and their classes: CSV, TSV, JSON-lines or plain text, and which row is whose.

    filename,label              image_id;breed           p000.jpg n01440764
    "a, b.jpg",golden jackal    dogs/17;golden jackal    p001.jpg "golden jackal"

The separator is the one of the first line: tab, comma, semicolon, or else spaces. Quotes are CSV's.
Nothing is guessed: a row of another length, or columns whose meaning neither a header nor their
number says, end in an error.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ffcv_imnet.core.bounded import read_at_most
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.names import fault_of, quoted
from ffcv_imnet.images.folder import EXTENSIONS

# Names of columns, compared without case, spaces and underscores; the first that is there counts.
FILE_COLUMNS = (
    "filename", "filepath", "file", "imagename", "imagepath", "imagefile", "fname", "path",
    "image", "images", "img", "imageid", "id",
)  # fmt: skip
LABEL_COLUMNS = (
    "classname", "labelname", "wnid", "synset", "predictionstring", "class", "label", "category",
    "breed", "species", "target", "classes", "labels",
)  # fmt: skip
# Kaggle's LOC_val_solution.csv: a class and the four corners of a box, as often as there are boxes.
BOXES = re.compile(r"(\S+)( \d+){4}( \S+( \d+){4})*\s*")
IMAGENET = re.compile(r"ILSVRC2012|\bn\d{8}[_/\\]", re.ASCII)  # within the name of a file
LARGEST = 512 << 20  # bytes of a table: the fourteen million images of all of ImageNet have as many
LONGEST = 1 << 17  # characters of a line of JSON; csv's own bound of a cell
SUFFIXES = tuple(suffix.decode() for suffix in EXTENSIONS)
SPLIT_COLUMNS = ("split", "subset", "set", "partition")
Row = tuple[int, list[str]]  # number of its line, cells


def read_table(path: Path) -> dict[str, str]:
    """Class name by file name, both as they stand in the table.

    Raises:
        OSError: it cannot be read.
        UsageError: it is not such a table; names the line.
    """
    data = read_at_most(path, LARGEST)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} {_no_text(data)}. A label file is a CSV, TSV or JSON-lines of file and class, a text with an image"
            " and its class a line, LOC_val_solution.csv or the devkit's .tar.gz"
        ) from None
    if text.lstrip().startswith("["):
        raise UsageError(f"{path} is a list in JSON: write an object a line (JSON-lines), or a CSV")
    if mark := re.match(
        r"sep=.\s*\n", text
    ):  # Excel's separator, which the first line shows anyway
        text = "\n" + text[mark.end() :]
    json_lines = text.lstrip().startswith("{")
    pairs = _pairs(path, text) if json_lines else _columns(path, list(_cells(path, text)))
    found: dict[str, str] = {}
    for line, file, name in pairs:
        boxes = BOXES.fullmatch(name)
        name = boxes[1] if boxes else name
        _check(path, line, file, name)
        if found.setdefault(file, name) != name:
            raise UsageError(f"{path}, line {line}: {quoted(file)} has two classes")
    if not found:
        raise UsageError(f"{path} holds no labels")
    return found


def _no_text(data: bytes) -> str:
    """What a table is that is not in UTF-8, and what to do."""
    if data.startswith(b"PK"):
        return "is packed, as a workbook of Excel is: save it as CSV in UTF-8"
    encoding = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return f"is not in UTF-8: save it as CSV in UTF-8, or convert it (iconv -f {encoding} -t UTF-8 OLD > NEW)"


def _check(path: Path, line: int, file: str, name: str) -> None:
    if not file:
        raise UsageError(f"{path}, line {line}: no file is named")
    fault = fault_of(name)
    if fault is None and (name in (".", "..") or "/" in name):
        fault = "cannot be the name of a class"
    if fault:
        raise UsageError(f"{path}, line {line}: the class {quoted(name)} {fault}")
    if name.isdigit() and IMAGENET.search(file):
        raise UsageError(
            f"{path}, line {line}: the class is the number {name}, {quoted(file)} is named as ImageNet's"
            " images are, and its lists number the classes differently: write the wnid (n01440764) in"
            f" its place, or for classes of your own a name such as class{name}"
        )


# -------------------------------------------------------------------------------------- as cells


def _cells(path: Path, text: str) -> Iterator[Row]:
    """The lines that are not empty, cut into cells."""
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    mark = next((mark for mark in "\t,;" if mark in first), None)
    # Of spaces, any number are one; within a CSV a line break may stand between quotes.
    parts = (line.strip() for line in lines) if mark is None else text.splitlines(keepends=True)
    reader = csv.reader(parts, delimiter=mark or " ", skipinitialspace=True, strict=True)
    width = 2 if mark is None else 0
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            width = width or len(cells)
            if len(cells) != width or width < 2:
                raise UsageError(_not_a_row(path, reader.line_num, row, width, mark))
            yield reader.line_num, cells
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _not_a_row(path: Path, line: int, row: list[str], width: int, mark: str | None) -> str:
    what = quoted((mark or " ").join(row))
    if mark is None:
        return (
            f"{path}, line {line}: {what} is not an image and a class: names with spaces need commas,"
            " tabs or quotes"
        )
    return (
        f"{path}, line {line}: {what} has {len(row)} columns, not {max(2, width)}: a name that holds"
        f" {quoted(mark)} needs quotes"
    )


def _columns(path: Path, rows: list[Row]) -> Iterator[tuple[int, str, str]]:
    """Line, file and class of every row; a first line that names its columns is none."""
    if not rows:
        return
    head = rows[0][1]
    places = _place(head, FILE_COLUMNS), _place(head, LABEL_COLUMNS)
    file, label = places[0][0], places[1][0]
    header = file is not None and label is not None
    if header and (twice := places[0][1] or places[1][1]):
        raise UsageError(f"{path}, line {rows[0][0]}: {twice}")
    if len(head) == 2 and not header:
        # The column of the files is the one with their endings; one that starts below is a header.
        ends = [[_is_image(cell) for cell in row] for _, row in rows[:2]]
        file = 1 if ends[-1] == [False, True] else 0
        label = 1 - file
        header = not ends[0][file] and ends[-1][file]
    if file is None or label is None:
        raise UsageError(
            f"{path} has {len(head)} columns and no first line that says which are file and class"
            f" ({', '.join(map(quoted, head[:5]))}): call them filename and label"
        )
    body = rows[1 if header else 0 :]
    split, _ = _place(head, SPLIT_COLUMNS) if header else (None, "")
    if split is not None and len(values := {row[split] for _, row in body}) > 1:
        raise UsageError(
            f"{path}: its column {quoted(head[split])} says {', '.join(map(quoted, sorted(values)[:3]))}, which is"
            " not read: make a table of each, without the column, and give each with its own --split"
        )
    for line, row in body:
        yield line, row[file], row[label]


def _place(names: Sequence[str], wanted: Sequence[str]) -> tuple[int | None, str]:
    """Where the first of `wanted` stands among names of columns, and what is said if it does so twice."""
    words = [re.sub(r"[\s_-]", "", name.lower()) for name in names]
    found = next((word for word in wanted if word in words), None)
    if found is None:
        return None, ""
    place = words.index(found)
    times = words.count(found)
    return place, f"{times} columns are called {quoted(names[place])}" if times > 1 else ""


def _pairs(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """The same from JSON-lines: an object a line."""
    for line, words in enumerate(text.splitlines(), 1):
        if len(words) > LONGEST:
            raise UsageError(f"{path}, line {line}: it has more than {LONGEST:,} characters")
        if not words.strip():
            continue
        try:
            held = json.loads(words, object_pairs_hook=tuple)  # a key may stand there twice
        except ValueError as error:
            raise UsageError(f"{path}, line {line}: not JSON ({error})") from None
        except RecursionError:
            raise UsageError(f"{path}, line {line}: not JSON (nested too deeply)") from None
        if not isinstance(held, tuple):
            raise UsageError(f"{path}, line {line}: not an object such as {{...}}")
        yield line, _field(path, line, held, FILE_COLUMNS), _field(path, line, held, LABEL_COLUMNS)


def _field(path: Path, line: int, held: tuple[tuple[str, Any], ...], wanted: Sequence[str]) -> str:
    names = [name for name, _ in held]
    place, twice = _place(names, wanted)
    if twice:
        raise UsageError(f"{path}, line {line}: {twice}")
    value = None if place is None else held[place][1]
    if isinstance(value, bool) or not isinstance(value, str | int):
        what = "file name" if wanted is FILE_COLUMNS else "class"
        keys = ", ".join(map(quoted, names[:5]))
        if place is not None:
            raise UsageError(
                f"{path}, line {line}: its {what} {quoted(names[place])} is {json.dumps(value)[:40]}, which is"
                " neither text nor a number"
            )
        raise UsageError(
            f"{path}, line {line}: no {what} (text or a number) among {keys}: call it"
            f" {'filename' if wanted is FILE_COLUMNS else 'label'}"
        )
    return str(value).strip()


# ------------------------------------------------------------------------- which row is an image's


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _normal(name: str) -> str:
    """Slashes forward, no `./`, the ending in lower case."""
    name = name if "/" in name else name.replace("\\", "/")
    name = "/".join(part for part in name.split("/") if part not in ("", "."))
    return _stem(name) + name[len(_stem(name)) :].lower()


def _stem(name: str) -> str:
    return name[: name.rindex(".")] if _is_image(name) else name


class Rows:
    """Finds the row of an image. A row says as much of the path as it likes, from its end: `1.jpg` and
    `dogs/1.jpg` are both `/data/dogs/1.JPG`, and so is `dogs/1`; the longest one counts."""

    def __init__(self, table: Mapping[str, str]) -> None:
        self.names, self.stems = self._index({_normal(file): file for file in table})
        last = [(_normal(file).rpartition("/")[2], file) for file in table]
        once = Counter(name for name, _ in last)
        self.last, self.last_stems = self._index({n: file for n, file in last if once[n] == 1})
        self.depths = sorted({name.count("/") for name in self.names}, reverse=True)

    @staticmethod
    def _index(names: dict[str, str]) -> tuple[dict[str, str], dict[str, str | None]]:
        """Rows by name, and by name without ending, of which a.jpg and a.png have none."""
        stems: dict[str, str | None] = {}
        for name, file in names.items():
            stem = _stem(name)
            stems[stem] = None if stems.get(stem, file) != file else file
        return names, stems

    def of_all(self, paths: Sequence[str]) -> list[str | None]:
        """The row of each image, by its path: the file name as the table has it, None without one.

        Where not one fits because the table's folders are not on this disk, by the name alone.
        """
        found = [self._of(_normal(path)) for path in paths]
        if not any(found):
            names = [_normal(path).rpartition("/")[2] for path in paths]
            return [self.last.get(name) or self.last_stems.get(_stem(name)) for name in names]
        return found

    def _of(self, path: str) -> str | None:
        parts = path.split("/")
        for depth in self.depths:
            end = "/".join(parts[-1 - depth :])
            if depth < len(parts) and (row := self.names.get(end) or self.stems.get(_stem(end))):
                return row
        return None

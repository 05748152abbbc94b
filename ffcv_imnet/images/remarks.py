"""What is remarkable about a source, whichever its kind: refused, said, or an answer asked for."""

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.names import fault_of_all, shown
from ffcv_imnet.images import ImageSource
from ffcv_imnet.images.folder import ImageFolderTree, alike
from ffcv_imnet.images.merged import Merged
from ffcv_imnet.images.pixels import brightest

ALLOW = "--allow_odd"
LOOKED_AT = 16  # images of 16 bits, for how many of them are used
DEEP = (".tif", ".tiff", ".png", ".pgm")


def check_classes(source: ImageSource) -> None:
    """Raises UsageError where a class has a name that cannot be stored or shown, or two have one."""
    if fault := fault_of_all(list(source.classes)):
        raise UsageError(f"the list of classes of {shown(source.where)} {fault}: rename it")


def notes(source: ImageSource) -> list[str]:
    """What needs no answer, a sentence each."""
    found = [note for part in _parts(source) for note in getattr(part, "notes", [])]
    names = list(source.classes)
    numbers = all(name.isascii() and name.isdigit() for name in names)
    ordered = sorted(names, key=int) if numbers else names
    if names != ordered:
        first = next(
            i for i, pair in enumerate(zip(names, ordered, strict=True)) if len(set(pair)) > 1
        )
        found.append(
            f"the classes are numbers and, as in torchvision, in the order of text: output {first} of the"
            f" network is class {names[first]} (labels.txt lists them all; names such as {first:03d} would"
            " be in the order of numbers)"
        )
    return found


def oddities(source: ImageSource) -> list[str]:
    """What was left out, found twice, or looks like a mistake, a sentence each."""
    found = [odd for part in _parts(source) for odd in getattr(part, "oddities", [])]
    folders = Counter(os.path.realpath(part.where) for part in _parts(source))
    found += [f"the folder {shown(name)} is given twice" for name, n in folders.items() if n > 1]
    found += alike(source.classes)
    if len(source.classes) == 1 and not any("one level deeper" in odd for odd in found):
        found.append(
            f"there is one class only, {shown(source.classes[0])}, and nothing to tell it from: the classes"
            " may lie one level deeper"
        )
    return [*found, *_dark(source)]


def _dark(source: ImageSource) -> list[str]:
    """A sentence where 16-bit grayscale uses a sixteenth of its range, as cameras of 12 bits do; else none."""
    deep = [i for i in range(len(source)) if source.name(i).lower().endswith(DEEP)]
    found = []
    for index in deep[:: max(1, len(deep) // LOOKED_AT)][:LOOKED_AT]:
        with suppress(OSError):
            data, _ = source.read(index)
            found += [brightest(data)] if isinstance(data, bytes) else []
    values = [value for value in found if value is not None]
    if not values or max(values) >= 1 << 12:
        return []
    return [
        f"16-bit images without a value above {max(values):,} of 65,535, as cameras of 12 bits write them, would be"
        " almost black: multiply them to the full range first"
    ]


def _parts(source: ImageSource) -> Sequence[ImageSource]:
    return source.parts if isinstance(source, Merged) else [source]


def class_folders(source: ImageSource) -> list[Path]:
    """The folders in which a further folder would be taken for a class."""
    return [Path(part.where) for part in _parts(source) if isinstance(part, ImageFolderTree)]


def check_oddities(source: ImageSource) -> None:
    """Raises UsageError with all oddities, if there are any."""
    if found := oddities(source):
        raise UsageError(f"{'; '.join(found)}; mend that, or go on all the same with {ALLOW}")

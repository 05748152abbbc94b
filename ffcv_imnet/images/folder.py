"""An ImageFolder tree: one folder a class, the images inside, as torchvision reads it."""

import hashlib
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.bounded import read_at_most
from ffcv_imnet.core.errors import UsageError, nearest
from ffcv_imnet.core.names import fault_of, quoted, shown
from ffcv_imnet.core.optional import is_there
from ffcv_imnet.images import LARGEST_FILE, InArrays, leftovers
from ffcv_imnet.images.leftovers import Left

HEIC = (b".heic", b".heif", b".hif")
# What people call the two folders; the first that is there is taken.
FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev", "test")}
SPLITS = frozenset((*FOLDERS["train"], *FOLDERS["val"], "testing"))
# torchvision.datasets.folder.IMG_EXTENSIONS, two more of JPEG, and what Pillow and its plug-in read;
# compared in lower case.
EXTENSIONS = (
    *(b".jpg", b".jpeg", b".png", b".ppm", b".bmp", b".pgm", b".tif", b".tiff", b".webp"),
    *(b".jfif", b".jpe", b".avif"),
    *(HEIC if is_there("pillow_heif") else ()),
)


class ImageFolderTree(InArrays):
    """The images of `root`/<class>/**, in torchvision.datasets.ImageFolder's order and labels.

    Classes are the sub-folders sorted by name. A million paths are held as one array of bytes,
    about 30 MB, because a million `str` objects would take three times as much. Unlike torchvision's,
    a walk enters each real folder of a class once: links that lead back into it, or above the root,
    are named in `notes`. What computers leave behind in folders (`leftovers`) is no class and no image.

    Attributes:
        ignored: files inside class folders that are not images by their extension.
        notes: what was passed over and is harmless, a sentence each.
        oddities: what was left out, found twice, or looks like a mistake, a sentence each.

    Args:
        may_be_empty: some of them, said once: a class that is only trained.

    Raises:
        UsageError: `root` is missing, cannot be read, has no class folders, or one whose name cannot
            be stored or that holds no image.
    """

    kind = "folder"

    def __init__(self, root: Path, may_be_empty: bool = False) -> None:
        _check_root(root)
        self.where = str(root)
        top = scan_folder(os.fsencode(root))
        self.classes: tuple[str, ...] = tuple(sorted(os.fsdecode(name) for name in top.folders))
        _check_classes(root, self.classes)
        walk = _Walk(os.fsencode(root))
        listings = [walk.list_class(os.fsencode(name)) for name in self.classes]
        counts = [len(listing) for listing in listings]
        _check_empty(root, self.classes, counts, walk.left, may_be_empty)
        self.ignored = walk.left.ignored
        self.files: NDArray[np.bytes_] = np.concatenate(listings)  # relative to the root
        self.labels = np.repeat(np.arange(len(counts)), counts)
        walk.left.leftovers += top.leftovers
        self.notes = [*walk.notes, *walk.left.notes()]
        self.oddities = [
            *_broken(root, top.broken),
            *_beside(root, top.files),
            *_level(root, self.classes, walk.direct, walk.inside),
            *_splits(root, self.classes),
            *walk.oddities(),
            *walk.left.oddities(),
        ]

    def name(self, index: int) -> str:
        """`class/file`, relative to the root."""
        return os.fsdecode(bytes(self.files[index]))

    def read(self, index: int) -> tuple[bytes, int]:
        """The file's bytes and its label; OSError when it cannot be read."""
        data = read_at_most(f"{self.where}/{self.name(index)}", LARGEST_FILE)
        return data, int(self.labels[index])

    def fingerprint(self) -> str:
        """SHA-256 over path, size and modification time of every image.

        The time is in it because raw formats keep their size when their pixels change: a stale
        .beton taken for current would be worse than one written again after a copy of the tree.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            name = self.name(index)
            try:
                entry = os.stat(f"{self.where}/{name}")  # noqa: PTH116 - a million times
                known = f"{name}\0{entry.st_size}\0{entry.st_mtime_ns}\n"
            except OSError:
                known = f"{name}\0unreadable\n"
            digest.update(os.fsencode(known))
        # The others stand in the paths.
        for label in np.setdiff1d(np.arange(len(self.classes)), self.labels).tolist():
            digest.update(os.fsencode(f"{self.classes[label]}\0no image\n"))
        return f"sha256:{digest.hexdigest()}"


def _check_root(root: Path) -> None:
    if root.is_dir():
        return
    layout = f"expected {root}/<class name>/*.jpg"
    if root.parent.is_file():
        raise UsageError(
            f"{root.parent} is a file, not a folder (a zip must be unpacked): {layout}"
        )
    if not root.parent.is_dir():
        raise UsageError(f"the folder {root.parent} does not exist: {layout}")
    if os.path.lexists(root):
        what = (
            "is a file, not a folder (a zip must be unpacked)"
            if root.is_file()
            else "is a link to nothing"
        )
        raise UsageError(f"{root} {what}: {layout}")
    names = sorted(entry.name for entry in os.scandir(root.parent))
    holds = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    # "Train" for "train" is the commonest slip, "Validation" for "val" another.
    called = FOLDERS.get(root.name, (root.name.lower(),))
    close = [name for name in names if name.lower() in called]
    hint = nearest(root.name, names)
    if close:
        renamed = f" (rename {close[0]} to {root.name})"
        hint = renamed if root.name in FOLDERS else f" (did you mean {close[0]}?)"
    if root.parent.absolute().name == root.name:
        hint = f" (did you mean {root.parent.absolute().parent}?)"
    elif any(name.endswith(".tar") for name in names):
        hint = " (a tar is read with --tar)"
    raise UsageError(f"{root.parent} has no folder {root.name!r}: {layout}; it holds {holds}{hint}")


def _check_classes(root: Path, classes: Sequence[str]) -> None:
    if not classes:
        flat = sum(entry.name.lower().encode().endswith(EXTENSIONS) for entry in os.scandir(root))
        have = f"but {flat:,} images side by side" if flat else "and no images"
        raise UsageError(
            f"{root} holds no class folders {have}: expected {root}/<class name>/*.jpg"
        )
    for name in classes:
        if fault := fault_of(name):
            raise UsageError(
                f"{shown(str(root))} has a class folder whose name {fault}, {quoted(name)}: rename it,"
                " since the name of a class must be stored, printed and shown"
            )


def _check_empty(
    root: Path, classes: Sequence[str], counts: Sequence[int], left: Left, may_be_empty: bool
) -> None:
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if not empty:
        return
    also = "".join(f"; {odd}" for odd in left.oddities())
    if len(empty) == len(classes):
        raise UsageError(f"no images in any of the {len(classes):,} class folders of {root}{also}")
    if may_be_empty:
        print(
            f"{len(empty):,} of the {len(classes):,} classes of {root} have no image: {_some(empty)}; they"
            " are absent from the evaluation",
            file=sys.stderr,
        )
        return
    raise UsageError(
        f"{len(empty):,} of the {len(classes):,} class folders of {root} hold no image:"
        f" {_some(empty)}; fill or remove them, since every folder counts as a class{also}"
    )


# -------------------------------------------------------------------------------------- the walk


class Scan:
    """What one folder holds, names sorted."""

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self.folders: list[bytes] = []
        self.links: set[bytes] = set()  # those of `folders` that are links
        self.broken: list[bytes] = []  # links that lead nowhere and are not called like an image
        self.leftovers = 0  # files and folders


def scan_folder(folder: bytes) -> Scan:
    """One folder's entries without what computers leave behind.

    Raises:
        UsageError: it cannot be read.
    """
    found = Scan()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if leftovers.is_leftover(entry.name):
                    found.leftovers += 1
                elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # noqa: PTH112
                    found.folders.append(entry.name)
                    if entry.is_symlink():
                        found.links.add(entry.name)
                elif (
                    entry.is_symlink()
                    and not entry.name.lower().endswith(EXTENSIONS)
                    and not os.path.exists(entry.path)  # noqa: PTH110 - bytes
                ):
                    found.broken.append(entry.name)
                else:
                    found.files.append(entry.name)
    except OSError as error:
        raise UsageError(f"the folder {_show(folder)} cannot be read: {error.strerror}") from None
    found.files.sort()
    found.folders.sort()
    found.broken.sort()
    return found


class _Walk:
    """All class folders of a tree, each real folder once for a class."""

    def __init__(self, root: bytes) -> None:
        self.root = root
        # The root and all above it: a link to one of them holds the tree itself.
        above = os.path.realpath(root)
        self.above = {_identity(above)}
        while above != os.path.dirname(above):  # noqa: PTH120 - bytes
            above = os.path.dirname(above)  # noqa: PTH120
            self.above.add(_identity(above))
        self.owner: dict[tuple[int, int], bytes] = {}  # class that a real folder was found in
        self.left = Left()
        self.notes: list[str] = []
        self.broken: list[bytes] = []
        self.shared: list[tuple[bytes, bytes]] = []  # folder, and the class that has it too
        self.direct: list[int] = []  # images of each class that lie in its folder itself
        self.inside: list[list[str]] = []  # names of each class's folders that hold images

    def list_class(self, name: bytes) -> NDArray[np.bytes_]:
        """The class's images relative to the root, sorted like torchvision: by folder, then by file."""
        found: list[tuple[bytes, list[bytes]]] = []
        own: set[tuple[int, int]] = set()
        real, linked = [name], list[bytes]()  # links last: a real folder is found by its own name
        while real or linked:
            folder, by_link = (real.pop(), False) if real else (linked.pop(0), True)
            if not self._enter(folder, name, own, by_link):
                continue
            scan = scan_folder(self.root + b"/" + folder)
            below = [folder + b"/" + f for f in scan.folders if f not in scan.links]
            links = [folder + b"/" + f for f in scan.links]
            real, linked = (
                (real, [*linked, *below, *links]) if by_link else (real + below, linked + links)
            )
            linked.sort()
            self.broken += [folder + b"/" + f for f in scan.broken]
            images = [f for f in scan.files if f.lower().endswith(EXTENSIONS)]
            self.left.leftovers += scan.leftovers
            self.left.add(self.root + b"/" + folder, sorted(set(scan.files).difference(images)))
            found.append((folder, images))
        found.sort()
        self.direct.append(len(found[0][1]) if found and found[0][0] == name else 0)
        inside = {os.fsdecode(f.split(b"/")[1]) for f, images in found if images and f != name}
        self.inside.append(sorted(inside))
        return np.array([f + b"/" + image for f, images in found for image in images], np.bytes_)

    def _enter(self, folder: bytes, name: bytes, own: set[tuple[int, int]], by_link: bool) -> bool:
        """Whether to go into a folder. What lies in the tree itself is always entered: some file
        systems number their folders alike, and only links make circles."""
        path = self.root + b"/" + folder
        place = _identity(path)
        if (by_link and place in own) or place in self.above:
            self.notes.append(
                f"{_show(path)} leads by a link back to {_show(os.path.realpath(path))}, whose images"
                " are taken once"
            )
            return False
        if self.owner.setdefault(place, name) != name and (by_link or folder == name):
            self.shared.append((folder, self.owner[place]))
        own.add(place)
        return True

    def oddities(self) -> Iterable[str]:
        """What was found twice, and links that lead nowhere."""
        if self.shared:
            folder, other = self.shared[0]
            yield (
                f"{_show(self.root + b'/' + folder)} is also a folder of class {_show(other)}, so that"
                f" its images have two classes ({len(self.shared):,} such folders)"
            )
        yield from _broken(Path(os.fsdecode(self.root)), self.broken)


def _identity(path: bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116 - bytes
    except OSError as error:
        raise UsageError(f"the folder {_show(path)} cannot be read: {error.strerror}") from None
    return status.st_dev, status.st_ino


# ----------------------------------------------------------------------------- what is remarkable


def _broken(root: Path, names: Sequence[bytes]) -> Iterable[str]:
    if names:
        link = os.fsencode(root) + b"/" + names[0]
        count = f" ({len(names):,} such links)" if len(names) > 1 else ""
        yield f"{_show(link)} is a link that leads nowhere, to {_show(os.path.realpath(link))}{count}"


def _beside(root: Path, files: Sequence[bytes]) -> Iterable[str]:
    images = [name for name in files if name.lower().endswith(EXTENSIONS)]
    if images:
        yield (
            f"{len(images):,} images lie beside the class folders of {root}, in none of them:"
            f" {_some([_show(name) for name in images])}"
        )


def _level(
    root: Path, classes: Sequence[str], direct: Sequence[int], inside: Sequence[Sequence[str]]
) -> Iterable[str]:
    """Images that lie only in folders of the class folders: are those the classes?"""
    deepest = max(range(len(classes)), key=lambda index: len(inside[index]))
    if any(direct) or (len(classes) > 1 and len(inside[deepest]) < 2):
        return
    if classes == (root.name,):
        remedy = f"name {root} as the folder"
    else:
        remedy = f"move them up, to lie in {root} itself"
    yield (
        f"no class folder of {root} holds images itself, only in folders of its own"
        f" ({classes[deepest]}/ has {_some(inside[deepest])}): if the classes lie one level deeper, {remedy}"
    )


def _splits(root: Path, classes: Sequence[str]) -> Iterable[str]:
    """Classes that are the parts of a data set."""
    if len(classes) > 1 and {name.casefold() for name in classes} <= SPLITS:
        yield (
            f"the classes of {root} would be {_some(classes)}: they seem to lie one level deeper, in one of these"
        )


def alike(classes: Sequence[str]) -> Iterable[str]:
    """That some classes are one to a reader's eye, a sentence if there are any."""
    folded = Counter(map(_folded, classes))
    found = [name for name in classes if folded[_folded(name)] > 1]
    if found:
        yield f"these classes differ only in how their names are written: {_some(found)}"


def _folded(name: str) -> str:
    """What of a name can be seen, and of a number what it is worth."""
    seen = (c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    folded = "".join(seen).casefold().strip()
    return str(int(folded)) if folded.isdecimal() else folded


def _show(path: bytes) -> str:
    return shown(os.fsdecode(path))


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:5])) + (", ..." if len(names) > 5 else "")

"""What lies in folders of images and is none: what computers leave behind, and images that are not read."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from ffcv_imnet.core.names import number_of, shown
from ffcv_imnet.core.paths import open_regular

# In lower case. Copies and thumbnails that macOS, Windows, Jupyter, NAS boxes and file systems make.
LEFTOVERS = frozenset((
    b".ds_store", b"__macosx", b".appledouble", b".spotlight-v100", b".trashes", b".fseventsd",
    b"thumbs.db", b"desktop.ini", b"$recycle.bin", b"system volume information",
    b".ipynb_checkpoints", b"@eadir", b"#recycle", b"lost+found", b".thumbnails", b".directory",
    b".git", b".cache",
))  # fmt: skip
APPLE_DOUBLE = b"._"  # macOS keeps a file's attributes beside it under this name, suffix and all

# Image formats that are not read, and a program that makes PNGs or JPEGs of them (Debian's packages).
CONVERTERS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "or read them after `pip install pillow-heif`"),
    ".jxl": "djxl of libjxl-tools",
    ".gif": "convert of imagemagick",
    ".jp2": "opj_decompress of libopenjp2-tools",
    ".svg": "rsvg-convert of librsvg2-bin",
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"), "dcraw"),
    **dict.fromkeys(
        (".psd", ".tga", ".ico", ".exr", ".hdr", ".pcx", ".jp2k", ".j2k"), "imagemagick"
    ),
}
# Of other suffixes the first bytes tell: images that someone's program named otherwise, or not at all.
STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP",
          b"\0\0\0\x0cJXL")  # fmt: skip
HEIF = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"mif1", b"msf1", b"avif"))
# Not even opened: descriptions of images, of which there may be one each.
PLAIN = frozenset((".txt", ".csv", ".tsv", ".xml", ".json", ".jsonl", ".html", ".md", ".yaml", ".yml", ".mat",
                   ".npy", ".npz", ".pt", ".pkl", ".log", ".pdf", ".py", ".zip", ".tar", ".gz"))  # fmt: skip


def is_leftover(name: bytes) -> bool:
    """Whether a file or folder of this name was left behind by a computer, not put there."""
    return name.lower() in LEFTOVERS or name.startswith(APPLE_DOUBLE)


class Left:
    """Counts of what was left out."""

    def __init__(self) -> None:
        self.leftovers = 0  # files and folders
        self.ignored = 0  # files that are no images by their extension
        self.images: Counter[str] = Counter()  # those of them that are images, by suffix
        self.example = ""

    def add(self, folder: bytes, names: Iterable[bytes]) -> None:
        """Files of `folder` that are no images by their extension."""
        for name in names:
            self.ignored += 1
            suffix = PurePosixPath(os.fsdecode(name)).suffix.lower()
            if suffix not in PLAIN and (suffix in CONVERTERS or _is_image(folder + b"/" + name)):
                self.images[suffix] += 1
                self.example = self.example or os.fsdecode(folder + b"/" + name)

    def notes(self) -> Iterable[str]:
        """What needs no answer."""
        if self.leftovers:
            yield (
                f"{self.leftovers:,} files and folders that computers leave behind (.DS_Store, ._*,"
                " .ipynb_checkpoints and the like) were passed over"
            )

    def oddities(self) -> Iterable[str]:
        """Images that would be left out."""
        if not self.images:
            return
        kinds = ", ".join(
            f"{count:,} {shown(suffix) or 'without suffix'}"
            for suffix, count in self.images.most_common(5)
        )
        tools = {CONVERTERS[suffix] for suffix in self.images if suffix in CONVERTERS}
        remedy = f"convert them ({'; '.join(sorted(tools)[:3])})" if tools else "rename them"
        if tools and set(self.images) - set(CONVERTERS):
            remedy += " or give them their own suffix"
        yield (
            f"{number_of(self.images.total(), 'image')} not read for their suffix ({kinds}), for instance"
            f" {shown(self.example)}: {remedy}"
        )


def _is_image(path: bytes) -> bool:
    try:
        with open_regular(path) as file:
            start = file.read(16)
    except OSError:
        return False
    return (
        start.startswith(STARTS)
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or start[4:12] in HEIF
    )

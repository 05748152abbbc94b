"""Generated archives in ImageNet's packing."""

import io
import tarfile
from pathlib import Path

from ffcv_imnet.images.folder import ImageFolderTree


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """One member; `fields` are tarfile.TarInfo's."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """The bytes of an archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def pack_train(tree: Path, target: Path) -> Path:
    """`tree`/train as a tar of one tar a class, members and classes out of order."""
    source = ImageFolderTree(tree / "train")
    inner: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {}
    for index in reversed(range(len(source))):
        wnid, file = source.name(index).split("/")
        inner.setdefault(wnid, []).append(member(file, source.read(index)[0]))
    target.write_bytes(tar_of(*(member(f"{w}.tar", tar_of(*m)) for w, m in inner.items())))
    return target


def pack_val(tree: Path, target: Path, labels: Path) -> Path:
    """`tree`/val as a flat tar, its classes in a text of two columns."""
    source = ImageFolderTree(tree / "val")
    names = [source.name(index).split("/") for index in range(len(source))]
    order = sorted(range(len(source)), key=lambda index: names[index][1], reverse=True)
    target.write_bytes(tar_of(*(member(names[i][1], source.read(i)[0]) for i in order)))
    labels.write_text("".join(f"{file} {wnid}\n" for wnid, file in names))
    return target

"""ImageNet's thousand classes: synset ids (wnids) in index order, and what people call them.

`imagenet_classes.txt` has a line a class, `n01440764 tench`: the ids of ILSVRC 2012 sorted, as
ImageFolder and every published network number them, and torchvision's names
(`ResNet18_Weights.IMAGENET1K_V1.meta["categories"]`; a test compares them).
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from ffcv_imnet.core.names import shown

CLASSES = 1000
# github.com/fastai/imagenette: ten of them.
IMAGENETTE = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
    "n03394916", "n03417042", "n03425413", "n03445777", "n03888257",
)  # fmt: skip


@functools.cache
def imagenet_names() -> dict[str, str]:
    """Human-readable name by wnid, in index order."""
    text = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8")
    names = dict(line.split(" ", 1) for line in text.splitlines())
    assert len(names) == CLASSES
    return names


def readable(name: str) -> str:
    """`n01440764 tench` for a wnid of ImageNet; any other class name as it is."""
    known = imagenet_names().get(name)
    return name if known is None else f"{name} {known}"


def write_labels(classes: Sequence[str]) -> str:
    """The text of a labels.txt: `readable` class names, one a line, in index order."""
    return "".join(f"{shown(readable(name))}\n" for name in classes)


def classes_in(text: str) -> tuple[str, ...]:
    """Class names of a labels.txt that `write_labels` made: what a person reads is left out."""
    known = imagenet_names()
    lines = text.splitlines()
    return tuple(
        line.split(" ", 1)[0] if line.split(" ", 1)[0] in known else line for line in lines
    )

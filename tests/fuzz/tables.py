"""Forged tables through training's check, through both decoders as if it had passed, and through a loader.

What must hold for every forged file: the check answers in one sentence or accepts; whatever it said, a
decoder fed with these tables touches nothing outside the mapping (the file is copied into memory of its
exact length, around which the address sanitizer watches) and gives a status; and where check and loader
are both content, every stored image is one of the size and class that its table says.
"""

import itertools
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ffcv_imnet.data.fast_import  # noqa: F401

# isort: split
import numpy as np
import torch
from ffcv.pipeline.compiler import Compiler
from numba import njit
from numpy.typing import NDArray

from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data.beton import check_beton, read_tables
from ffcv_imnet.data.decoders import DAMAGES, CropDecoder, _decode_natively
from ffcv_imnet.data.loader import TrainLoader
from ffcv_imnet.images.pixels import BadImage, decode_rgb
from ffcv_imnet.images.stored import JPEG, RAW
from ffcv_imnet.machine.distributed import World
from tests.fuzz.forge import CLASSES, SAMPLES, Parts, mutate, write_sound

SIDE = 16  # px of what comes out of the decoders
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Decoders:
    """Both decoders, compiled once, for any file and tables of `SAMPLES` samples."""

    def __init__(self, metadata: NDArray[Any]) -> None:
        Compiler.set_num_threads(1)
        self.crop = CropDecoder(SIDE, (0.1, 1.0))
        self.whole = CropDecoder(SIDE, (0.1, 1.0), whole=True)
        largest = metadata["f0"].copy()
        largest["height"] = largest["width"] = 1024  # what its scratch memory holds
        for decoder in (self.crop, self.whole):
            decoder.accept_globals(largest, None)
        self.decode_whole = njit(nogil=True)(self.whole._plain_code())

    def run(self, data: bytes, metadata: NDArray[Any], table: NDArray[Any]) -> Counter[str]:
        """Decode every sample in both ways; how many had which status."""
        order = np.argsort(table["ptr"])
        pointers, sizes = table["ptr"][order], table["size"][order]
        file = np.frombuffer(data, np.uint8).copy()  # memory of its own, of this length exactly
        file.flags.writeable = False
        out = np.full((SAMPLES, SIDE, SIDE, 3), 99, np.uint8)
        indices, image = np.arange(SAMPLES), metadata["f0"].copy()
        statuses: Counter[str] = Counter()
        if self.crop.native:
            words = self.crop.control.view(np.uint64)
            numbers = self.crop.control.view(np.float64)
            storage = file, pointers, sizes
            _decode_natively(indices, out, image, storage, words, numbers, self.crop.damaged)
            statuses += Counter(f"crop: {DAMAGES[n] or 'decoded'}" for n in self.crop.damaged)
            assert not out[self.crop.damaged > 0].any(), "pixels of a damaged image"
        image["height"], image["width"] = image["height"] % 1025, image["width"] % 1025
        self.decode_whole(indices, out, image, (file, pointers, sizes))
        return statuses + Counter(f"whole: {DAMAGES[n] or 'decoded'}" for n in self.whole.damaged)


def refused(path: Path) -> str | None:
    """What training's check says, without names and numbers; None where it accepts."""
    try:
        check_beton(path)
    except (RunError, UsageError) as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1000, text
        return "".join(c for c in text.split(str(path))[-1].split(":")[0] if not c.isdigit())[:60]
    return None


def fault_of_content(path: Path) -> str | None:
    """An independent look at an accepted file: what of it is not as its tables say; None if all is."""
    tables, data = read_tables(path), path.read_bytes()
    spans = []
    for sample in range(len(tables.labels)):
        start, size = int(tables.pointers[sample]), int(tables.sizes[sample])
        height, width = int(tables.heights[sample]), int(tables.widths[sample])
        if not (tables.start <= start and start + size <= tables.end and size > 0):
            return f"sample {sample} lies outside"
        if not 0 <= int(tables.labels[sample]) < len(CLASSES):
            return f"sample {sample} has no class"
        spans.append((start, start + size))
        if tables.modes[sample] == RAW and size != height * width * 3:
            return f"sample {sample} has other pixels"
        if tables.modes[sample] == JPEG:
            try:
                found = decode_rgb(data[start : start + size]).shape[:2]
            except BadImage:
                return f"sample {sample} does not decode"
            if found != (height, width):
                return f"sample {sample} has another size"
    spans.sort()
    if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
        return "two samples overlap"
    return None


def loads(path: Path, folder: Path, decoder: str) -> bool:
    """Whether an epoch of training's loader goes through the file."""
    settings = load(
        data__train_dataset=path, data__val_dataset=path, data__num_workers=1, data__decoder=decoder,
        logging__folder=folder, resolution__min_res=32, resolution__max_res=32,
        training__batch_size=4, training__epochs=1, lr__lr_peak_epoch=0,
    )  # fmt: skip
    seen = 0
    try:
        loader = TrainLoader(str(path), SAMPLES, settings, ALONE)
        for _, labels in loader.epoch(plan_run(settings, SAMPLES)[0]):
            assert ((labels >= 0) & (labels < len(CLASSES))).all()
            seen += len(labels)
    except RunError as error:
        assert "\n" not in str(error)
        return False
    assert seen == SAMPLES
    return True


def fuzz(seconds: float, seed: int, loader_every: float) -> dict[str, int]:
    """Forge for `seconds`; counts of what came out.

    Args:
        loader_every: seconds between passes of a whole loader, of which each compiles its pipeline.

    Raises:
        AssertionError: something was accepted that must not be, or answered wrongly.
    """
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "train.beton"
        write_sound(path)
        sound = path.read_bytes(), Parts.of(path).manifest
        decoders = Decoders(Parts.of(path).metadata)
        end, looked = time.monotonic() + seconds, 0.0
        while time.monotonic() < end:
            rng = np.random.default_rng([seed, counts["forged"]])
            counts["forged"] += 1
            parts = Parts(*sound)
            mutate(parts, rng)
            parts.save(path)
            answer = refused(path)
            counts[f"check: {answer or 'accepted'}"] += 1
            counts += decoders.run(path.read_bytes(), parts.metadata, parts.allocations)
            if answer is None:
                bad = fault_of_content(path)
                if bad and "has another size" not in bad and "does not decode" not in bad:
                    raise AssertionError(f"seed {seed}, case {counts['forged']}: accepted, {bad}")
                if time.monotonic() - looked < loader_every:
                    continue
                looked = time.monotonic()
                decoder = "crop" if counts["loader passes"] % 2 else "whole"
                done = loads(path, folder, decoder)
                counts["loader passes"] += 1
                counts[f"loader: {'trains' if done else 'names the image'}"] += 1
                if done and bad:
                    raise AssertionError(f"seed {seed}, case {counts['forged']}: trains, {bad}")
    return dict(counts)

"""Loaders to measure against each other, each in a process of its own that goes when it is told to.

    python -m ffcv_imnet.bench.loaders NAME SPEC         SPEC: the fields of `Spec` as JSON

Each line on its standard input is a resolution and the least area of a crop, "128 0.08"; for each it makes
one pass and answers with a line of JSON. `bench/peers.py` starts and drives it. Every peer makes random
crops of that part to all of the area and of aspect ratio 3/4 to 4/3, mirrors half of them, and hands out
uint8 batches; it is set up as its own documentation advises for a CPU.
"""

import ctypes
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from numba import njit, prange, set_num_threads, types

from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.core.errors import RunError, run_main
from ffcv_imnet.data.beton import read_tables
from ffcv_imnet.data.decoders import CropDecoder, native_kernel, random_crop
from ffcv_imnet.data.loader import TrainLoader, epoch_order
from ffcv_imnet.machine.distributed import World

RATIO = (0.75, 4 / 3)
AHEAD = 3  # batches prepared ahead, in every loader that asks
Scale = tuple[float, float]  # area of a crop over that of its image, least and most
Pass = Callable[[int, Scale], Iterable[int]]  # resolution -> sizes of the batches of one pass


@dataclass(frozen=True)
class Spec:
    """What all peers load, and how."""

    beton: str
    folder: str  # the same images as files
    batch_size: int
    num_workers: int


def ours(spec: Spec) -> Pass:
    """This project's loader."""
    samples = len(read_tables(Path(spec.beton)).labels)
    settings = load(
        data__train_dataset=spec.beton,
        data__num_workers=spec.num_workers,
        data__batches_ahead=AHEAD,
        training__batch_size=spec.batch_size,
    )
    world = World(0, 1, 0, 1, torch.device("cpu"))
    loader = TrainLoader(spec.beton, samples, settings, world)
    first = plan_run(settings, samples)[0]
    epoch = 0

    def one_pass(resolution: int, scale: Scale) -> Iterator[int]:
        nonlocal epoch
        epoch += 1
        plan = replace(first, epoch=epoch, resolution=resolution, crop_scale=scale)
        for images, _ in loader.epoch(plan):
            yield len(images)

    return one_pass


def stock(spec: Spec, decoder_class: Any = None) -> Pass:
    """The training pipeline of ffcv-imagenet up to its host tensor, without normalisation."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    made: dict[Scale, tuple[Any, Any]] = {}  # FFCV's decoder cannot take another scale

    def build(scale: Scale) -> tuple[Any, Any]:
        decoder = (decoder_class or RandomResizedCropRGBImageDecoder)((64, 64), scale, RATIO)
        return decoder, Loader(
            spec.beton,
            batch_size=spec.batch_size,
            num_workers=spec.num_workers,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            batches_ahead=AHEAD,
            pipelines={
                "image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
                "label": [IntDecoder(), ToTensor(), Squeeze()],
            },
        )

    def one_pass(resolution: int, scale: Scale) -> Iterator[int]:
        if scale not in made:
            made[scale] = build(scale)
        decoder, loader = made[scale]
        decoder.output_size = (resolution, resolution)
        for images, _ in loader:
            yield len(images)

    return one_pass


def torchvision(spec: Spec) -> Pass:
    """ImageFolder and DataLoader with worker processes, uint8 out."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    def one_pass(resolution: int, scale: Scale) -> Iterator[int]:
        augment = transforms.Compose(
            [
                transforms.RandomResizedCrop(resolution, scale, RATIO),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
        )
        loader = DataLoader(
            ImageFolder(spec.folder, augment),
            batch_size=spec.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=spec.num_workers,
            prefetch_factor=AHEAD,
        )
        for images, _ in loader:
            yield len(images)

    return one_pass


def dali(spec: Spec) -> Pass:
    """NVIDIA DALI's CPU operators: crop while decoding, resize, mirror."""
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import types as dali_types

    pipelines: dict[tuple[int, Scale], Any] = {}

    def build(resolution: int, scale: Scale) -> Any:
        @pipeline_def(
            batch_size=spec.batch_size,
            num_threads=spec.num_workers,
            device_id=None,
            prefetch_queue_depth=AHEAD,
        )
        def pipeline() -> Any:
            jpegs, labels = fn.readers.file(
                file_root=spec.folder, random_shuffle=True, name="files"
            )
            images = fn.decoders.image_random_crop(
                jpegs, device="cpu", random_area=list(scale), random_aspect_ratio=list(RATIO)
            )
            images = fn.resize(
                images,
                resize_x=resolution,
                resize_y=resolution,
                interp_type=dali_types.INTERP_TRIANGULAR,
                antialias=True,
            )
            return fn.flip(images, horizontal=fn.random.coin_flip()), labels

        built = pipeline()
        built.build()
        return built

    def one_pass(resolution: int, scale: Scale) -> Iterator[int]:
        if (resolution, scale) not in pipelines:
            pipelines.clear()
            pipelines[resolution, scale] = build(resolution, scale)
        ready = pipelines[resolution, scale]
        for _ in range(ready.epoch_size("files") // spec.batch_size):
            images, _ = ready.run()
            yield len(images.as_tensor().shape()) and spec.batch_size

    return one_pass


def spdl(spec: Spec) -> Pass:
    """SPDL: decoding threads, FFmpeg filters for crop, resize and mirror, one buffer a batch."""
    import random

    import spdl.io
    from spdl.pipeline import PipelineBuilder

    files = [str(path) for path in sorted(Path(spec.folder).rglob("*")) if path.is_file()]
    ratio = np.array(RATIO)

    def one_pass(resolution: int, scale: Scale) -> Iterator[int]:
        area = np.array(scale)
        order = random.sample(range(len(files)), len(files))

        def decode(sample: int) -> Any:
            seed = random.getrandbits(32)
            packets = spdl.io.demux_image(files[sample])
            height, width = packets.height, packets.width
            top, left, h, w = random_crop(height, width, seed, 0, sample, area, ratio)
            flip = ",hflip" if seed & 1 else ""
            return spdl.io.decode_packets(
                packets,
                filter_desc=f"crop={w}:{h}:{left}:{top}:exact=1,"
                f"scale={resolution}:{resolution}:flags=bilinear{flip},format=pix_fmts=rgb24",
            )

        pipeline = (
            PipelineBuilder()
            .add_source(order)
            .pipe(decode, concurrency=spec.num_workers)
            .aggregate(spec.batch_size, drop_last=True)
            .pipe(lambda frames: spdl.io.to_numpy(spdl.io.convert_frames(frames)))
            .add_sink(AHEAD)
            .build(num_threads=spec.num_workers)
        )
        with pipeline.auto_stop():
            for images in pipeline:
                yield len(images)

    return one_pass


def turbojpeg(spec: Spec) -> Pass:
    """The limit: libjpeg-turbo decoding the crops and scales of `ours`, and nothing else."""
    library = native_kernel()
    if library is None:
        raise RunError("the limit needs the compiled decoder, see above")
    name = "ffcv_imnet_crop_decode"
    llvmlite.binding.add_symbol(name, ctypes.cast(library[name], ctypes.c_void_p).value)
    decode: Any = types.ExternalFunction(name, types.int64(*[types.int64] * 10))
    tables = read_tables(Path(spec.beton))
    if not (tables.modes == 0).all():
        raise RunError(f"{spec.beton} holds raw samples: libjpeg-turbo has nothing to decode")
    file = np.memmap(spec.beton, np.uint8, mode="r")
    shapes = np.stack([tables.heights, tables.widths], 1).astype(np.int64)
    starts = tables.pointers.astype(np.int64) + file.ctypes.data
    lengths = tables.sizes.astype(np.int64)
    ratio = np.array(RATIO)
    set_num_threads(spec.num_workers)

    @njit(parallel=True, nogil=True)
    def run(order: Any, epoch: int, side: int, area: Any) -> None:
        for place in prange(len(order)):
            i = order[place]
            h, w = shapes[i]
            top, left, rows, columns = random_crop(h, w, 0, epoch, i, area, ratio)
            decode(starts[i], lengths[i], h, w, top, left, rows, columns, side, side)

    epoch = 0

    def one_pass(resolution: int, scale: Scale) -> Iterator[int]:
        nonlocal epoch
        epoch += 1
        assert len(file) > 0  # this closure keeps the mapping that `starts` points into
        order = epoch_order(len(lengths), 0, epoch)
        for start in range(0, len(order) - spec.batch_size + 1, spec.batch_size):
            run(order[start : start + spec.batch_size], epoch, resolution, np.array(scale))
            yield spec.batch_size

    return one_pass


PEERS: dict[str, Callable[[Spec], Pass]] = {
    "ffcv_imnet": ours,
    "ffcv+CropDecoder": partial(stock, decoder_class=CropDecoder),  # as examples/stock_ffcv.py
    "ffcv": stock,
    "torchvision": torchvision,
    "dali": dali,
    "spdl": spdl,
    "turbojpeg": turbojpeg,
}
NEEDS = {"dali": "nvidia.dali", "spdl": "spdl.io"}  # optional packages


# ---- memory -------------------------------------------------------------------------------------


def _own_bytes(process: str) -> int:
    """Memory of a process that is not a file's: of the page cache the .beton is a part, of no loader."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    found = (line.split() for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return 1024 * sum(int(words[1]) for words in found)


class PeakMemory:
    """Most memory of this process and its workers, looked at every 20 ms."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
        while True:
            workers = children.read_text().split() if children.exists() else []
            self.peak = max(self.peak, sum(map(_own_bytes, ["self", *workers])))
            time.sleep(0.02)


# ---- the process --------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process, its threads, and those of its workers that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> int:
    """Build the loader, then one pass for each line. The first pass at a resolution warms up."""
    name, fields = sys.argv[1:]
    spec = Spec(**json.loads(fields))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the peers print is no answer
    before = _own_bytes("self")
    memory = PeakMemory()
    one_pass = PEERS[name](spec)
    for line in sys.stdin:
        resolution, least = line.split()
        started, spent = time.perf_counter(), cpu_seconds()
        first = images = 0.0
        for size in one_pass(int(resolution), (float(least), 1.0)):
            images += size
            first = first or time.perf_counter() - started
        answer = {
            "images": int(images),
            "seconds": time.perf_counter() - started,
            "cpu_seconds": cpu_seconds() - spent,
            "first_batch_seconds": first,
            "peak_memory_bytes": max(0, memory.peak - before),
        }
        print(json.dumps(answer), file=answers)
    return 0


if __name__ == "__main__":
    run_main(main)

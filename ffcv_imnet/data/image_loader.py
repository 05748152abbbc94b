"""Batches of a .beton for a training loop of one's own: this project's loaders behind one iterable."""

import os
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from ffcv_imnet.config.domains import Number, Switch, argument
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.config.schema import DEVICES, Settings, checker_of
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.names import quoted
from ffcv_imnet.core.paths import local
from ffcv_imnet.data.beton import check_beton
from ffcv_imnet.data.loader import Batches, TrainLoader, ValLoader
from ffcv_imnet.machine import device as devices
from ffcv_imnet.machine.distributed import TORCHRUN, Ranks, World, read_ranks
from ffcv_imnet.machine.host import affinity_cores

Batch = tuple[Tensor, Tensor]
# The training settings that have the meaning and the domain of an argument here.
SETTINGS = {
    "path": "data.train_dataset",
    "batch_size": "training.batch_size",
    "resolution": "resolution.min_res",
    "seed": "training.seed",
    "scale": "augmentation.crop_scale",
    "ratio": "augmentation.crop_ratio",
    "flip": "augmentation.flip",
    "central": "validation.crop_ratio",
    "num_workers": "data.num_workers",
    "batches_ahead": "data.batches_ahead",
    "on_damaged": "data.on_damaged",
}
COUNT = Number(int, 1, 1 << 20)
EPOCH = Number(int, 0, 2**32 - 1)


class ImageLoader:
    """Decoded batches of a .beton, pass after pass: (images, labels) for every step of a training loop.

    `images` are uint8 (n, 3, side, side) in channels-last memory, RGB; `labels` int64 (n,), places in
    `classes`; both on `device`. The network or the loop makes floats of them and normalises. Training
    takes every image once a pass in an order of its own, cropped and flipped at random, and leaves out
    what fills no batch; validation takes every image once, in the file's order, and its last batch may
    be smaller. Order, crops and flips are functions of (seed, epoch, sample): the same at any number of
    threads.

    With several processes each takes its own share: in training the same number of batches on every rank; in
    validation every image on exactly one rank, so that ranks may differ by one batch: evaluate without
    DistributedDataParallel's wrapper and add the counts up. Ranks are torch.distributed's where it is
    initialised, else torchrun's environment.

    One pass runs at a time, with one thread beside those that decode; `close`, or leaving the `with`
    block, ends it.

    Args:
        path: a .beton with its manifest: `write_ffcv.py` writes both, `python -m ffcv_imnet adopt` makes the
            manifest of a file of FFCV's own writer.
        batch_size: images of a batch of this process.
        resolution: side of the images that come out, px, from 8 to 4096. May be set anew between passes:
            `loader.resolution = 160`.
        train: random crops in random order, or validation.
        seed: of order, crops and flips, from 0 to 2**63 - 1.
        device: "auto" (this process's GPU, or the CPU where there is none), "cuda", "cpu", or a torch.device.
        scale: training: area of a crop over that of its image, (least, most).
        ratio: training: width over height of a crop, (least, most).
        flip: training: "random", "alternating" (every image in every second epoch) or "none".
        central: validation: side of the central square over the image's shorter side.
        num_workers: decoding threads, 1 or more; default: this process's share of the machine's cores.
        batches_ahead: batches decoded ahead of the one in use; each takes batch_size x 3 x side^2 bytes.
        on_damaged: "stop": a stored image that does not decode raises RunError; "skip": it is black and
            labelled -1, which `cross_entropy(..., ignore_index=-1)` leaves out.
        copy: False: a batch is valid only until the next one is taken, for its memory is used again.
        rank, world_size: this process's place, where neither torch.distributed nor torchrun says it.

    Attributes:
        classes: names, in the order of the labels.
        samples: images in the file.
        epoch: the next pass, counted from 0.

    Raises:
        UsageError: an argument out of its domain, no such file, no manifest, fewer images than a batch.
        RunError: the file is damaged or is not its manifest's; while iterating: an image does not decode, or
            the file was changed.
    """

    __slots__ = (  # a misspelt attribute is an error, not a pass at the old resolution
        "__weakref__", "_end", "_loader", "_resolution", "_running", "batch_size", "classes", "copy", "epoch", "path",
        "samples", "settings", "train", "world",
    )  # fmt: skip

    def __init__(
        self,
        path: str | os.PathLike[str],
        batch_size: int,
        resolution: int,
        *,
        train: bool = True,
        seed: int = 0,
        device: str | torch.device = "auto",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: str = "random",
        central: float = 224 / 256,
        num_workers: int | None = None,
        batches_ahead: int = 3,
        on_damaged: str = "stop",
        copy: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "path": _path(path),
            "batch_size": batch_size,
            "resolution": resolution,
            "seed": seed,
            "scale": scale,
            "ratio": ratio,
            "flip": flip,
            "central": central,
            "num_workers": num_workers,
            "batches_ahead": batches_ahead,
            "on_damaged": on_damaged,
        }
        if num_workers is None:  # left to the machine
            del given["num_workers"]
        given = {name: _checked(name, value) for name, value in given.items()}
        if num_workers is not None and num_workers > (cores := affinity_cores()):
            raise UsageError(
                f"num_workers {num_workers} is more than the {cores} cores of this process"
            )
        self.train = argument("train", train, Switch())
        self.copy = argument("copy", copy, Switch())
        self.path, self.batch_size = Path(given["path"]), int(given["batch_size"])
        self.resolution, self.epoch = resolution, 0
        self.world = _world(device, rank, world_size)
        manifest = check_beton(self.path)
        self.classes, self.samples = manifest.classes, manifest.samples
        self.settings = _settings(given, self.world)
        if self.train and self.batch_size * self.world.size > self.samples:
            together = f" in {self.world.size} processes" if self.world.size > 1 else ""
            raise UsageError(
                f"batch_size {batch_size}{together} is more than the {self.samples} images of"
                f" {path}, of which none would fill it: take {max(1, self.samples // self.world.size)} or less"
            )
        kind = TrainLoader if self.train else ValLoader
        self._loader = kind(str(self.path), self.samples, self.settings, self.world)
        self._running = _Running()
        # At the interpreter's end too: a thread that still decoded then would meet freed memory.
        self._end = weakref.finalize(self, _Running.end, self._running)

    @property
    def resolution(self) -> int:
        """Side of the images of the next pass, px."""
        return self._resolution

    @resolution.setter
    def resolution(self, side: int) -> None:
        self._resolution: int = _checked("resolution", side)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is `epoch`, counted from 0, and those after it follow: what a resumed run needs.

        Raises:
            UsageError: it is no whole number of at least 0.
        """
        self.epoch = argument("epoch", epoch, EPOCH)

    def __len__(self) -> int:
        """Batches of a pass on this process."""
        if isinstance(self._loader, TrainLoader):
            return self.samples // (self.batch_size * self.world.size)
        return -(-len(self._loader.order) // self._loader.local_batch)

    def __iter__(self) -> Iterator[Batch]:
        """One pass; the next one is the next epoch. It ends a pass that is still running, if one is.

        Raises:
            UsageError: the loader is closed.
            RunError: see the class.
        """
        if not self._end.alive:
            raise UsageError(f"the loader of {self.path} is closed: make another")
        self._running.end()
        batches = self._running.batches = self._pass(self.epoch)
        self.epoch += 1
        return self._hand_out(batches)

    def _pass(self, epoch: int) -> Batches:
        if isinstance(self._loader, TrainLoader):
            plan = plan_run(self.settings, self.samples)[0]
            return self._loader.epoch(replace(plan, epoch=epoch, resolution=self.resolution))
        self._loader.decoder.output_size = self.resolution
        # Below the level that fills up the last batch.
        return self._loader.loader.batches(self._loader.order, self.world.device)

    def _hand_out(self, batches: Batches) -> Iterator[Batch]:
        with closing(batches):
            for images, labels in batches:
                yield (images.clone(), labels.clone()) if self.copy else (images, labels)
        if not self._end.alive:
            raise UsageError(f"the loader of {self.path} was closed during this pass")
        if self._running.batches is not batches:
            raise UsageError(
                f"another pass over {self.path} has begun and ended this one: take a second ImageLoader to have two"
            )

    def close(self) -> None:
        """End the pass that is running, and its threads; the loader cannot be used again."""
        self._end()

    def __repr__(self) -> str:
        return (
            f"ImageLoader({str(self.path)!r}, batch_size={self.batch_size}, resolution={self.resolution},"
            f" train={self.train}): {len(self)} batches a pass"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Running:
    """The pass that is running: apart from its loader, which may go first."""

    batches: Batches | None = None

    def end(self) -> None:
        """And its thread."""
        if self.batches is not None:
            self.batches.close()
        self.batches = None


def _path(path: str | os.PathLike[str]) -> str:
    """Raises UsageError unless it can be a file's."""
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"path must be that of a .beton, not {quoted(path)}")
    return local(os.fspath(path))


def _checked(name: str, value: object) -> Any:
    return argument(name, value, checker_of(SETTINGS[name]))


def _settings(given: dict[str, Any], world: World) -> Settings:
    """What the loaders of a training run would be told in its settings."""
    values = {SETTINGS[name]: value for name, value in given.items()}
    total = given["batch_size"] * world.size
    values |= {"training.batch_size": total, "validation.batch_size": total}
    values |= dict.fromkeys(("resolution.max_res", "validation.resolution"), given["resolution"])
    return load(**{name.replace(".", "__"): value for name, value in values.items()})


def _world(device: str | torch.device, rank: int | None, size: int | None) -> World:
    """This process's place: as the arguments say, or torch.distributed, or torchrun.

    Raises:
        UsageError: they contradict each other, or there is no such device.
    """
    if (rank is None) != (size is None):
        raise UsageError("rank and world_size go together: give both, or neither")
    if rank is None and not (dist.is_available() and dist.is_initialized()):
        ranks = read_ranks()
    elif rank is None and all(name in os.environ for name in TORCHRUN):
        ranks = replace(read_ranks(), rank=dist.get_rank(), size=dist.get_world_size())
    else:
        size = argument("world_size", dist.get_world_size() if size is None else size, COUNT)
        rank = argument("rank", dist.get_rank() if rank is None else rank, Number(int, 0, size - 1))
        local_size = min(size, devices.count() or size)  # nobody says how many are on this machine
        ranks = Ranks(rank, size, rank % local_size, local_size)
    if isinstance(device, str) and device in DEVICES:
        chosen = devices.choose(device, ranks.local_rank, ranks.local_size, 'device="cpu"')
        return World(**vars(ranks), device=chosen)
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = torch.device("meta")
    if chosen.type not in DEVICES:
        raise UsageError(f"device must be auto, cuda, cuda:N or cpu, not {str(device)!r}")
    return World(**vars(ranks), device=devices.numbered(chosen, 'device="cpu"'))

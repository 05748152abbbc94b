"""FFCV loaders: the same batches at any number of threads and processes, and never a hang."""

import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from queue import Empty, Full
from typing import Any

import ffcv_imnet.data.fast_import  # noqa: F401

# isort: split
import numpy as np
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
from ffcv.pipeline import Compiler, PipelineSpec
from ffcv.pipeline.graph import Graph
from ffcv.reader import Reader
from ffcv.transforms import Squeeze, ToTensor, ToTorchImage
from numpy.typing import NDArray
from torch import Tensor

from ffcv_imnet.config.schedules import EpochPlan, batch_sizes, resolutions
from ffcv_imnet.config.schema import Data, Settings, without_target
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data.beton import (
    Manifest,
    adopt_command,
    check_beton,
    check_manifests,
    content_checksum,
    manifest_path,
)
from ffcv_imnet.data.decoders import DAMAGES, CropDecoder
from ffcv_imnet.data.read_ahead import ReadAhead
from ffcv_imnet.images import synthetic
from ffcv_imnet.images.imagenet import IMAGENETTE, imagenet_names
from ffcv_imnet.machine.device import copies_to, current, make_current
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.machine.host import affinity_cores, usable_cores

Batches = Generator[tuple[Tensor, Tensor], None, None]
Indices = NDArray[np.int64]
# Label of an image that does not count: what fills up the last validation batch, what is damaged.
PADDING = -1
LAST_COPY = 10.0  # seconds that a pass which ends waits for its last copy to the device
UNDER_WAY: list[object] = []  # memory of copies that had not ended then, and may yet


def check_data(data: Data, world: World | None = None) -> tuple[Manifest, Manifest]:
    """The manifests of both files, found to be what they say and to speak of the same classes.

    Of the processes on one machine the first reads the files, the others their manifests alone: none
    maps a file before all of them have met, and where the first refuses it does not come.

    Raises:
        UsageError: a file is missing, the classes of the two differ, or they are halves of two divisions.
        RunError: a file is not what its manifest says.
    """
    paths = (Path(data.train_dataset), Path(data.val_dataset))
    check_manifests(*paths)
    first = world is None or world.local_rank == 0
    train, val = (check_beton(p) if first else Manifest.load(manifest_path(p)) for p in paths)
    if train.divided_otherwise(val):
        raise UsageError(
            f"{paths[0]} and {paths[1]} are of two divisions by --holdout (other images, fraction, seed or subset), so that"
            " the images of one may be in the other: write both again with write_ffcv.py --holdout --force"
        )
    places = class_places(train.classes, val.classes)
    if places is None:
        odd = sorted(set(val.classes) - set(train.classes))
        own = train.settings and val.settings  # write_ffcv.py's: `adopt` would lose the names
        otherwise = "" if own else f", or give both to `{adopt_command(*paths)} --force`"
        raise UsageError(
            f"{data.val_dataset} has {len(odd):,} classes that {data.train_dataset} has not, "
            f"for instance {', '.join(odd[:3])}: write both from the same classes{otherwise}"
        )
    if world is None or world.is_main:
        for remark in _remarks(data, train, val, places):
            print(remark, file=sys.stderr, flush=True)
    for path, said in zip(paths, (train, val), strict=True):
        if data.verify and first and content_checksum(path) != said.content_checksum:
            raise RunError(
                f"{path}: its images or labels are not those of {manifest_path(path)}: write it again "
                f"with write_ffcv.py --force"
            )
    return train, val


def _remarks(data: Data, train: Manifest, val: Manifest, places: Sequence[int]) -> Iterator[str]:
    """What about the two files may be a mistake, a sentence each."""
    counts = dict(zip(places, val.class_counts, strict=True))
    absent = [name for index, name in enumerate(train.classes) if not counts.get(index)]
    if absent:
        yield (
            f"{len(absent):,} of the {len(train.classes):,} classes have no image in {data.val_dataset}, for "
            f"instance {', '.join(absent[:3])}: they are trained, and absent from the evaluation"
        )
    if train.content_checksum == val.content_checksum:
        yield (
            f"{data.val_dataset} has the same images as {data.train_dataset}: top-1 will say how well they are "
            f"remembered, not how well others are told apart"
        )
    if (train.split, val.split) == ("val", "train"):
        yield f"{data.train_dataset} was written as val and {data.val_dataset} as train: are they swapped?"


def own_target(settings: Settings, classes: Sequence[str], say: bool = True) -> Settings:
    """Without a target, said where `say`, if `training.stop_at` is meant for another data set."""
    training, ours = settings.training, tuple(classes)
    classes_of = {
        "any": ours,
        "imagenet": tuple(imagenet_names()),
        "imagenette": IMAGENETTE,
        "shapes": synthetic.CLASSES,
    }
    if not training.stop_at or ours == classes_of[training.stop_at_on]:
        return settings
    if say:
        print(
            f"training.stop_at {training.stop_at:g} is for {training.stop_at_on}, which this is not: no target"
            f" (--training.stop_at_on=any makes it one)",
            flush=True,
        )
    return without_target(settings)


def class_places(train: Sequence[str], val: Sequence[str]) -> list[int] | None:
    """The number in `train` of each class of `val`; None where one is not there."""
    number = {name: index for index, name in enumerate(train)}
    return [number[name] for name in val] if set(val) <= set(train) else None


def local_batch_size(batch: int, world: World, samples: int) -> int:
    """This process's share of a global batch of `samples` training images.

    Raises:
        UsageError: the world does not divide the batch; names the nearest that fits.
    """
    if samples < world.size:
        raise UsageError(
            f"{samples} training images are too few for {world.size} processes, each of which takes its "
            f"share of every batch: start fewer"
        )
    if batch % world.size:
        most = samples // world.size
        fits = min(most, max(1, round(batch / world.size))) * world.size
        raise UsageError(
            f"training.batch_size {batch} does not divide into {world.size} processes; "
            f"the nearest that does is {fits}"
        )
    return batch // world.size


def workers_of(workers: int | None, world: World) -> int:
    """Decoding threads of this process: `workers`, or its share of the cores.

    Raises:
        UsageError: more than the cores this process may use, which numba refuses.
    """
    if workers is None:
        return max(1, usable_cores() // world.local_size)
    if workers > (cores := affinity_cores()):
        raise UsageError(
            f"data.num_workers {workers} is more than the {cores} cores this process may use; "
            f"set it to {cores} or less, or leave it out"
        )
    return workers


def epoch_order(samples: int, seed: int, epoch: int) -> Indices:
    """One permutation of all samples, the same on every process. Shape (samples,), int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)


def share_of_order(order: Indices, local_batch: int, rank: int, size: int) -> Indices:
    """What `rank` of `size` trains on: its slice of every global batch; the rest that fills none is dropped."""
    steps = len(order) // (local_batch * size)
    batches = order[: steps * local_batch * size].reshape(steps, size, local_batch)
    return batches[:, rank].reshape(-1)


def exact_share(samples: int | Indices, batch_size: int, world: World) -> tuple[Indices, int]:
    """What this process evaluates, every world.size-th sample from its rank on, and its batch size."""
    every = np.arange(samples) if isinstance(samples, int) else samples
    share = -(-len(every) // world.size)
    return np.ascontiguousarray(every[world.rank :: world.size]), max(
        1, min(batch_size // world.size, share)
    )


class _Epoch(EpochIterator):
    """FFCV's iterator with an end for every case: an error in its thread, a consumer that leaves."""

    def __init__(self, loader: "_OrderedLoader", order: Indices, device: torch.device) -> None:
        self.device = device
        self.error: BaseException | None = None
        self.read_ahead: ReadAhead | None = None
        with current(device):  # of which FFCV makes its streams
            super().__init__(loader, order)

    def run(self) -> None:
        try:
            # FFCV enters CUDA streams here; without it each rank would open a context on the first GPU.
            make_current(self.device)
            if self.loader.read_ahead and len(self.order):
                cuts = range(self.loader.batch_size, len(self.order), self.loader.batch_size)
                self.read_ahead = ReadAhead(
                    self.storage_state[0],
                    self.loader.starts,
                    self.loader.ends,
                    np.split(self.order, cuts),
                    self.loader.read_ahead,
                )
            super().run()
        except BaseException as error:  # FFCV would leave the consumer waiting for ever
            self.error = error
            while not self.terminate_event.is_set():
                with suppress(Full):
                    self.output_queue.put(None, timeout=0.5)
                    return

    def run_pipeline(self, *arguments: Any) -> Any:
        if self.read_ahead is not None:
            self.read_ahead.begin_batch()
        return super().run_pipeline(*arguments)

    def __next__(self) -> Any:
        asked = time.perf_counter()
        try:
            return super().__next__()
        except StopIteration:
            if self.error is not None:
                raise RunError(
                    f"{self.loader.fname}: the loader failed: {self.error!r}"
                ) from self.error
            raise
        finally:
            self.loader.waited += time.perf_counter() - asked

    def stop(self) -> None:
        """End the thread and free its buffers, wherever it is."""
        self.close()
        # FFCV's thread looks at its stop sign only while the queue is full: emptying the queue
        # alone would let it decode the rest of the epoch.
        self.iter_ixes = iter(())
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get(timeout=0.05)
        if self.read_ahead is not None:
            self.read_ahead.stop()


class _Mapped(OSCacheManager):
    """FFCV's access to a mapped file, without the dicts and sets of all samples that its base class
    builds and only its other cache reads: seconds and a gigabyte at ImageNet's count."""

    compiled: Any = None

    def __init__(self, reader: Reader) -> None:
        table = reader.alloc_table
        order = np.argsort(table["ptr"])  # a place in the file is looked up by bisection
        self.reader = reader
        self.ptrs, self.sizes = table["ptr"][order], table["size"][order]
        self.context = OSCacheContext(self)

    def compile_reader(self) -> Any:
        """Once a process: FFCV would compile the same code for each loader."""
        if _Mapped.compiled is None:
            _Mapped.compiled = super().compile_reader()
        return _Mapped.compiled


class _OrderedLoader:
    """What FFCV's iterator asks of a loader, and the order of samples given for each epoch.

    FFCV's own Loader compiles the same pipelines, but cannot be told how to access the file.
    """

    def __init__(
        self, path: str, batch_size: int, decoder: CropDecoder, data: Data, world: World
    ) -> None:
        self.fname, self.batch_size, self.batches_ahead = path, batch_size, data.batches_ahead
        self.num_workers, self.decoder = workers_of(data.num_workers, world), decoder
        started = time.perf_counter()
        threads = torch.get_num_threads()
        Compiler.set_num_threads(self.num_workers)
        self.opened, self.replaced = Path(path).stat(), False
        self.reader = Reader(path)
        self.memory_manager = _Mapped(self.reader)
        self.memory_manager.context.__enter__()  # mapped now: later the name may be another file's
        self._check_unchanged()
        # By their kind: ffcv's own files call them as they like, in either order.
        place = {type(field): n for n, field in enumerate(self.reader.handlers.values())}
        image, label = (self.reader.field_names[place[f]] for f in (RGBImageField, IntField))
        pipelines = {
            image: [decoder, ToTensor(), ToTorchImage()],
            label: [IntDecoder(), ToTensor(), Squeeze(1)],
        }
        self.graph = Graph(
            {name: PipelineSpec(name, None, steps) for name, steps in pipelines.items()},
            self.reader.handlers,
            {name: number for number, name in enumerate(self.reader.handlers)},
            self.reader.metadata,
            self.memory_manager.compile_reader(),
        )
        _, stages = self.graph.collect_requirements()
        self.code = self.graph.codegen_all(stages)
        torch.set_num_threads(threads)  # FFCV sets it for the whole process
        self.read_ahead = data.read_ahead
        self.starts, self.ends = self._places(f"f{place[RGBImageField]}")
        self.skip_damaged = data.on_damaged == "skip"
        self.skipped: set[int] = set()
        self.said_unpinned = False
        self.waited = 0.0  # seconds without a decoded batch, over all passes; copies are not in it
        self.first_wait = 0.0  # of these, until the first batch of the last pass
        self.construction_seconds = time.perf_counter() - started
        self.start_seconds: float | None = None  # construction and wait for the first batch of all

    def _places(self, image: str) -> tuple[Indices, Indices]:
        """Where each sample's bytes start and end, for reading ahead; never outside the mapping."""
        starts, sizes = self.reader.metadata[image]["data_ptr"], self.memory_manager.sizes
        places = np.searchsorted(self.memory_manager.ptrs, starts).clip(0, len(sizes) - 1)
        length = np.uint64(len(self.memory_manager.context.mmap))
        starts = np.minimum(starts, length)
        return starts.astype(np.int64), (
            starts + np.minimum(sizes[places], length - starts)
        ).astype(np.int64)

    def batches(self, order: Indices, device: torch.device) -> Batches:
        """uint8 images (batch, 3, side, side), channels last, and int64 labels (batch,), on `device`.

        A batch is valid until the next one is taken. A damaged image that is skipped is black
        and labelled `PADDING`.

        Raises:
            RunError: a stored image did not decode and is not to be skipped, or the loader's
                thread failed.
        """
        threads = torch.get_num_threads()
        copies = copies_to(device)
        asked, before = time.perf_counter(), self.waited
        self._check_unchanged()
        epoch = _Epoch(self, order, device)
        self.waited += time.perf_counter() - asked
        try:
            for number, (images, labels) in enumerate(epoch):
                if number == 0:
                    self.first_wait = self.waited - before
                if self.start_seconds is None:
                    self.start_seconds = self.construction_seconds + self.first_wait
                # The loader's thread changed it before its first batch.
                torch.set_num_threads(threads)
                start = number * self.batch_size
                self._check_decoded(order[start : start + self.batch_size], labels)
                if copies is None:
                    yield images, labels
                    continue
                if number == 0:
                    self._check_pinned(images)
                images, labels = copies.start(images, labels)
                yield images, labels
                # FFCV reuses a host buffer some batches later without asking the device.
                copies.wait()
            self._check_unchanged()
        finally:
            try:
                # Of a pass that is left early one may be under way.
                if copies is not None and not copies.is_done(LAST_COPY):
                    UNDER_WAY.append(epoch.memory_allocations)
            finally:
                epoch.stop()
                torch.set_num_threads(threads)

    def _check_pinned(self, images: Tensor) -> None:
        """Say once if FFCV could not lock its memory, which it keeps to itself."""
        if not self.said_unpinned and not images.is_pinned():
            print(
                "the loader's memory is not page-locked, so copies to the GPU are slow and steps wait for "
                "them: raise the limit of locked memory (ulimit -l), or lower data.batches_ahead",
                file=sys.stderr,
                flush=True,
            )
            self.said_unpinned = True

    def _check_unchanged(self) -> None:
        """Raises RunError if the file was written to since it was opened.

        One that was replaced or deleted is still there, whole, for whoever has it mapped. A read past
        the end of one that was truncated raises SIGBUS: `bus_error`.
        """
        try:
            now = Path(self.fname).stat()
        except OSError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != (self.opened.st_dev, self.opened.st_ino):
            if not self.replaced:
                print(
                    f"{self.fname} was replaced or deleted; this process goes on with the file it opened",
                    file=sys.stderr,
                    flush=True,
                )
            self.replaced = True
        elif (now.st_size, now.st_mtime_ns) != (self.opened.st_size, self.opened.st_mtime_ns):
            raise RunError(
                f"{self.fname} was changed while it was read ({self.opened.st_size:,} bytes before, "
                f"{now.st_size:,} now): write it again with write_ffcv.py --force; the last checkpoint "
                f"may have seen changed images, the one of the epoch before has not"
            )

    def _check_decoded(self, samples: Indices, labels: Tensor) -> None:
        """End at a damaged image of this batch, or make it one that does not count."""
        damaged = self.decoder.damaged[samples]
        if not damaged.any():
            return
        self._check_unchanged()
        for slot in np.flatnonzero(damaged):
            sample, label = int(samples[slot]), int(labels[slot])
            what = self._describe(sample, label, int(damaged[slot]))
            if not self.skip_damaged:
                raise RunError(
                    f"{what}; write the file again with write_ffcv.py --force, or train without "
                    f"the image: data.on_damaged=skip"
                )
            labels[slot] = PADDING
            if sample not in self.skipped:
                self.skipped.add(sample)
                print(f"{what}: skipped", file=sys.stderr, flush=True)
        if damaged.all() and self.decoder.control["random"][0]:  # of such a batch no loss is left
            raise RunError(
                f"{self.fname}: all {len(samples)} images of a training batch are damaged: write the "
                f"file again with write_ffcv.py --force, or take a larger training.batch_size"
            )

    def _describe(self, sample: int, label: int, damage: int) -> str:
        manifest = manifest_path(Path(self.fname))
        classes = Manifest.load(manifest).classes if manifest.is_file() else ()
        name = classes[label] if 0 <= label < len(classes) else label
        return f"{self.fname}: the image of sample {sample}, class {name}, {DAMAGES[damage]}"


class TrainLoader:
    """Training batches of a .beton with so many `samples`: global permutation, seeded crops and flips, this
    process's share."""

    def __init__(self, path: str, samples: int, settings: Settings, world: World) -> None:
        self.samples, self.seed, self.world = samples, settings.training.seed, world
        self.start_told = False
        local_batches = [local_batch_size(batch, world, samples) for batch in batch_sizes(settings)]
        how = settings.augmentation
        self.decoder = CropDecoder(
            max(resolutions(settings)),
            how.crop_scale,
            how.crop_ratio,
            flip=how.flip,
            seed=self.seed,
            on_damaged="skip",  # this loader looks at every batch
            whole=settings.data.decoder == "whole",
        )
        self.loader = _OrderedLoader(path, max(local_batches), self.decoder, settings.data, world)

    def epoch(self, plan: EpochPlan, first_step: int = 0, only: Indices | None = None) -> Batches:
        """This process's batches of one epoch from a step on, or what they make of the samples
        `only`, in that order; see `_OrderedLoader.batches`."""
        self.decoder.set_epoch(plan.epoch)
        self.decoder.control["scale"] = plan.crop_scale
        self.decoder.output_size = plan.resolution
        self.loader.batch_size = plan.batch_size // self.world.size
        order = epoch_order(self.samples, self.seed, plan.epoch)
        order = share_of_order(order, self.loader.batch_size, self.world.rank, self.world.size)
        order = order[first_step * self.loader.batch_size :] if only is None else only
        return self.loader.batches(order, self.world.device)

    @property
    def waited(self) -> float:
        """Seconds that this process has been without a batch, over all epochs."""
        return self.loader.waited

    def first_batch_seconds(self) -> float | None:
        """From the construction to the first batch of all; None if that was told before."""
        told, self.start_told = self.start_told, True
        return None if told else self.loader.start_seconds


class ValLoader:
    """Validation batches, each image once over all processes, all batches of one shape.

    Args:
        samples: number of images in the file, or the numbers of those that are evaluated.
        places: what to call each label of the file; as it is by default. See `class_places`.
    """

    def __init__(
        self,
        path: str,
        samples: int | Indices,
        settings: Settings,
        world: World,
        places: Sequence[int] | None = None,
    ) -> None:
        self.samples = samples if isinstance(samples, int) else len(samples)
        self.world = world
        self.places: Tensor | None = None
        if places is not None and list(places) != list(range(len(places))):
            # The last is found by the number of what does not count, -1.
            self.places = torch.tensor([*places, PADDING], device=world.device)
        self.order, self.local_batch = exact_share(samples, settings.validation.batch_size, world)
        how, whole = settings.validation, settings.data.decoder == "whole"
        self.decoder = CropDecoder(
            how.resolution, ratio=how.crop_ratio, on_damaged="skip", whole=whole
        )
        self.loader = _OrderedLoader(path, self.local_batch, self.decoder, settings.data, world)

    def batches(self) -> Batches:
        """As training batches; the last is filled up with black images labelled `PADDING`."""
        with closing(self.loader.batches(self.order, self.world.device)) as batches:
            for images, labels in batches:
                places = labels if self.places is None else self.places[labels]
                yield pad(images, places, self.local_batch)


def pad(images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Fill a batch up to `batch_size`: one shape, one compiled graph.

    Args:
        images: (n, 3, side, side), n <= batch_size; the memory format is kept.
        labels: (n,).
    """
    missing = batch_size - len(labels)
    if missing == 0:
        return images, labels
    black = images.new_zeros((missing, *images.shape[1:]))
    full = torch.cat([images, black]).contiguous(memory_format=torch.channels_last)
    return full, torch.cat([labels, labels.new_full((missing,), PADDING)])

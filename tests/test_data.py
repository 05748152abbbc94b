"""Loaders: the same batches everywhere, every image once, an error instead of a hang."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import write_ffcv
from ffcv_imnet.config.schedules import EpochPlan, plan_run
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data import decoders
from ffcv_imnet.data import loader as data
from ffcv_imnet.data.beton import manifest_path, read_tables
from ffcv_imnet.images import synthetic as shapes
from ffcv_imnet.machine import distributed
from ffcv_imnet.machine.device import Copies
from ffcv_imnet.machine.host import usable_cores
from ffcv_imnet.native import build
from tests.conftest import SmallData

ALONE = distributed.World(0, 1, 0, 1, torch.device("cpu"))


def world(rank: int, size: int) -> distributed.World:
    """A place in a world that is not connected: loaders do not talk."""
    return dataclasses.replace(ALONE, rank=rank, size=size)


def train_batches(
    settings: Settings, small: SmallData, where: distributed.World = ALONE, epoch: int = 1
) -> list[tuple[Tensor, Tensor]]:
    loader = data.TrainLoader(str(small.train), small.train_samples, settings, where)
    plan = plan_run(settings, small.train_samples)[epoch]
    return [(images.clone(), labels.clone()) for images, labels in loader.epoch(plan)]


def test_batches_do_not_depend_on_workers_or_world(small: SmallData, tmp_path: Path) -> None:
    reference = train_batches(small.settings(tmp_path), small)
    assert len(reference) == 6
    two_threads = small.settings(tmp_path, data__num_workers=min(2, usable_cores()))
    for (images, labels), (again, labels_again) in zip(
        reference, train_batches(two_threads, small), strict=True
    ):
        assert torch.equal(images, again) and torch.equal(labels, labels_again)
    halves = [train_batches(small.settings(tmp_path), small, world(rank, 2)) for rank in (0, 1)]
    for (images, labels), first, second in zip(reference, *halves, strict=True):
        assert torch.equal(images, torch.cat([first[0], second[0]]))
        assert torch.equal(labels, torch.cat([first[1], second[1]]))


def test_batches_are_uint8_and_channels_last(small: SmallData, tmp_path: Path) -> None:
    images, labels = train_batches(small.settings(tmp_path), small)[0]
    assert images.dtype == torch.uint8 and images.shape == (16, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64 and labels.shape == (16,)


def test_epochs_and_seeds_differ_and_repeat(small: SmallData, tmp_path: Path) -> None:
    def first(epoch: int, seed: int) -> Tensor:
        settings = small.settings(tmp_path, training__seed=seed)
        return train_batches(settings, small, epoch=epoch)[0][0]

    a, b, c, again = first(0, 0), first(1, 0), first(0, 1), first(0, 0)
    assert torch.equal(a, again)
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_ffcv_is_imported_without_compiling_its_modes() -> None:
    from ffcv.fields.rgb_image import IMAGE_MODES
    from numba.typed import Dict

    assert type(IMAGE_MODES) is dict and IMAGE_MODES == {"jpg": 0, "raw": 1}
    assert Dict is not dict


def test_leaving_an_epoch_does_not_decode_the_rest(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    decode = data._Epoch.run_pipeline

    def counted(self: data._Epoch, *args: object) -> object:
        nonlocal decoded
        decoded += 1
        return decode(self, *args)

    monkeypatch.setattr(data._Epoch, "run_pipeline", counted)
    settings = small.settings(tmp_path)
    loader = data.TrainLoader(str(small.train), small.train_samples, settings, ALONE)
    batches = loader.loader.batches(np.zeros(16 * 2000, np.int64), torch.device("cpu"))
    next(batches)
    batches.close()
    assert decoded < 100


def test_one_loader_goes_through_resolutions_and_crop_scales(
    small: SmallData, tmp_path: Path
) -> None:
    settings = small.settings(tmp_path, augmentation__flip="none")
    loader = data.TrainLoader(str(small.train), small.train_samples, settings, ALONE)
    for side, scale, batch in ((32, (0.9, 1.0), 16), (48, (0.1, 0.2), 8), (32, (0.9, 1.0), 16)):
        plan = EpochPlan(0, side, batch, 100 // batch, scale, 0.1, 0.1, 0.1, 1)
        images = next(iter(loader.epoch(plan)))[0]
        assert images.shape == (batch, 3, side, side)
        if side == 32 and scale[0] == 0.9:
            kept = images.clone()
    fresh = data.TrainLoader(str(small.train), small.train_samples, settings, ALONE)
    again = next(iter(fresh.epoch(EpochPlan(0, 32, 16, 6, (0.9, 1.0), 0.1, 0.1, 0.1, 1))))[0]
    assert torch.equal(kept, again)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    """Stored without compression, so that pixels can be compared exactly."""
    root = tmp_path_factory.mktemp("raw")
    shapes.write_tree(root / "images", train_per_class=2, val_per_class=1)
    for split in ("train", "val"):
        folder = ["--data_dir", str(root / "images"), "--out_dir", str(root), "--num_workers", "1"]
        assert write_ffcv.main(["--split", split, *folder, "--compress_probability", "0"]) == 0
    return SmallData(root / "train.beton", root / "val.beton", 20, 10)


def stored_image(path: Path, sample: int) -> np.ndarray:
    tables = read_tables(path)
    height, width = int(tables.heights[sample]), int(tables.widths[sample])
    offset = int(tables.pointers[sample])
    return np.fromfile(path, np.uint8, height * width * 3, offset=offset).reshape(height, width, 3)


@pytest.mark.parametrize("decoder", ["crop", "whole"])
def test_pixels_are_the_crop_resized_and_mirrored(
    raw: SmallData, tmp_path: Path, decoder: str
) -> None:
    settings = raw.settings(
        tmp_path, training__seed=5, training__batch_size=20, data__decoder=decoder
    )
    plan = plan_run(settings, 20)[1]
    loader = data.TrainLoader(str(raw.train), 20, settings, ALONE)
    images = next(iter(loader.epoch(plan)))[0]
    scale, ratio = (np.array(pair) for pair in ((0.08, 1.0), (0.75, 4 / 3)))
    for slot, sample in enumerate(data.epoch_order(20, 5, 1)):
        picture = stored_image(raw.train, sample)
        height, width, _ = picture.shape
        top, left, h, w = decoders.random_crop(height, width, 5, 1, sample, scale, ratio)
        crop = picture[top : top + h, left : left + w].astype(np.float32)
        if loader.decoder.native:  # each axis on its own: area where it shrinks
            across = cv2.INTER_AREA if w >= 32 else cv2.INTER_LINEAR
            down = cv2.INTER_AREA if h >= 32 else cv2.INTER_LINEAR
            narrow = cv2.resize(crop, (32, h), interpolation=across)
            expected = cv2.resize(narrow, (32, 32), interpolation=down)
        else:
            expected = cv2.resize(crop, (32, 32), interpolation=cv2.INTER_AREA)
        if decoders.mirrored(1, 5, 1, sample):
            expected = expected[:, ::-1]
        assert np.abs(images[slot].permute(1, 2, 0).numpy() - expected).max() <= 1


def test_validation_counts_every_image_once(small: SmallData, tmp_path: Path) -> None:
    for size in (1, 2, 4):
        labels = []
        for rank in range(size):
            loader = data.ValLoader(
                str(small.val), small.val_samples, small.settings(tmp_path), world(rank, size)
            )
            for images, batch_labels in loader.batches():
                assert len(images) == len(batch_labels) == loader.local_batch
                labels += batch_labels[batch_labels != data.PADDING].tolist()
        assert sorted(labels) == sorted(read_tables(small.val).labels.tolist())


def test_a_last_batch_of_one(small: SmallData, tmp_path: Path) -> None:
    settings = small.settings(tmp_path, validation__batch_size=32)
    loader = data.ValLoader(str(small.val), 33, settings, ALONE)
    counts = [int((labels != data.PADDING).sum()) for _, labels in loader.batches()]
    assert counts == [32, 1]


def test_more_processes_than_images(small: SmallData, tmp_path: Path) -> None:
    loader = data.ValLoader(str(small.val), 3, small.settings(tmp_path), world(3, 4))
    assert list(loader.batches()) == []


def test_leaving_an_epoch_ends_its_thread(small: SmallData, tmp_path: Path) -> None:
    settings = small.settings(tmp_path)
    loader = data.TrainLoader(str(small.train), small.train_samples, settings, ALONE)
    plan = plan_run(settings, small.train_samples)[0]
    threads = threading.active_count()
    for _ in range(3):
        batches = loader.epoch(plan)
        next(batches)
        batches.close()
    assert threading.active_count() == threads


def test_torch_keeps_its_threads(small: SmallData, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    settings = small.settings(tmp_path, data__num_workers=1)
    loader = data.TrainLoader(str(small.train), small.train_samples, settings, ALONE)
    assert torch.get_num_threads() == 2
    for _ in loader.epoch(plan_run(settings, small.train_samples)[0]):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2


def damage(small: SmallData, folder: Path, sample: int) -> SmallData:
    """A copy of the data with one JPEG's bytes overwritten; header and tables are untouched."""
    path = folder / "train.beton"
    content = bytearray(small.train.read_bytes())
    start = int(read_tables(small.train).pointers[sample])
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    manifest_path(path).write_text(manifest_path(small.train).read_text())
    return dataclasses.replace(small, train=path)


def test_one_changed_pixel_is_refused_if_asked(raw: SmallData, tmp_path: Path) -> None:
    path = tmp_path / "train.beton"
    content = bytearray(raw.train.read_bytes())
    content[int(read_tables(raw.train).pointers[7]) + 500] ^= 1
    path.write_bytes(content)
    manifest_path(path).write_text(manifest_path(raw.train).read_text())
    changed = dataclasses.replace(raw, train=path)
    data.check_data(changed.settings(tmp_path).data)
    data.check_data(raw.settings(tmp_path, data__verify=True).data)
    with pytest.raises(RunError, match=r"train.beton: its images or labels are not those of"):
        data.check_data(changed.settings(tmp_path, data__verify=True).data)


def test_a_damaged_jpeg_is_named(small: SmallData, tmp_path: Path) -> None:
    damaged = damage(small, tmp_path, sample=int(data.epoch_order(100, 0, 1)[3]))
    data.check_data(damaged.settings(tmp_path).data)  # its tables are whole
    with pytest.raises(
        RunError, match=rf"sample {data.epoch_order(100, 0, 1)[3]}, class \w+, is damaged"
    ):
        train_batches(damaged.settings(tmp_path), damaged)


def test_a_damaged_jpeg_may_be_skipped_and_is_counted(
    small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = data.epoch_order(100, 0, 1)
    damaged = damage(small, tmp_path, sample=int(order[3]))
    settings = damaged.settings(tmp_path, data__on_damaged="skip")
    loader = data.TrainLoader(str(damaged.train), 100, settings, ALONE)
    plan = plan_run(settings, 100)[1]
    batches = [(images.clone(), labels.clone()) for images, labels in loader.epoch(plan)]
    whole = train_batches(small.settings(tmp_path), small)
    assert loader.loader.skipped == {order[3]}
    assert f"sample {order[3]}, class" in capsys.readouterr().err
    for number, (ours, theirs) in enumerate(zip(batches, whole, strict=True)):
        for slot in range(16):
            if (number, slot) == (0, 3):
                assert ours[1][slot] == data.PADDING and not ours[0][slot].any()
            else:
                assert ours[1][slot] == theirs[1][slot]
                assert torch.equal(ours[0][slot], theirs[0][slot])


def test_a_batch_without_a_image_ends_the_run(small: SmallData, tmp_path: Path) -> None:
    sample = int(data.epoch_order(100, 0, 1)[3])
    damaged = damage(small, tmp_path, sample)
    options = {"data__on_damaged": "skip", "training__batch_size": 1}
    with pytest.raises(RunError, match="all 1 images of a training batch are damaged"):
        train_batches(damaged.settings(tmp_path, **options), damaged)


def test_without_the_compiled_decoder_the_same_crops_come(
    small: SmallData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_it = train_batches(small.settings(tmp_path), small)
    monkeypatch.setattr(build, "load", lambda: None)
    monkeypatch.setenv("CC", "no-compiler")
    decoders.native_kernel.cache_clear()
    try:
        for _ in range(2):
            without = train_batches(small.settings(tmp_path), small)
        said = capsys.readouterr().err
        assert said.count("is not compiled") == 1 and "no C compiler called no-compiler" in said
        damaged = damage(small, tmp_path, sample=3)
        with pytest.raises(RunError, match=r"sample 3, class .* is damaged"):
            train_batches(damaged.settings(tmp_path), damaged)
    finally:
        decoders.native_kernel.cache_clear()
    whole = train_batches(small.settings(tmp_path, data__decoder="whole"), small)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole, without, strict=True))
    for (images, labels), (again, labels_again) in zip(with_it, without, strict=True):
        assert torch.equal(labels, labels_again)
        # Another filter, the same boxes and flips: other boxes would be 40 levels off.
        assert (images.float() - again.float()).abs().mean() < 6


def test_alternating_flips_show_both_sides(small: SmallData, tmp_path: Path) -> None:
    def pictures(epoch: int) -> dict[int, Tensor]:
        settings = small.settings(
            tmp_path, augmentation__flip="alternating", augmentation__crop_scale=(1.0, 1.0)
        )
        loader = data.TrainLoader(str(small.train), 100, settings, ALONE)
        loader.decoder.control["random"] = 0  # the whole image: what differs is the flip
        loader.decoder.control["central"] = 1.0
        plan = dataclasses.replace(plan_run(settings, 100)[0], epoch=epoch)
        order = data.epoch_order(100, 0, epoch)
        images = torch.cat([images.clone() for images, _ in loader.epoch(plan)])
        return dict(zip(order.tolist(), images, strict=False))

    first, second, third = (pictures(epoch) for epoch in (0, 1, 2))
    for sample in first.keys() & second.keys():
        assert torch.equal(first[sample], second[sample].flip(-1))
    for sample in first.keys() & third.keys():
        assert torch.equal(first[sample], third[sample])
    flips = {decoders.mirrored(2, 0, 0, sample) for sample in range(20)}
    assert flips == {False, True}


def test_an_error_in_the_loaders_thread_ends_the_epoch(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr(data._Epoch, "run_pipeline", fail)
    started = time.monotonic()
    with pytest.raises(RunError, match="no memory left"):
        train_batches(small.settings(tmp_path), small)
    assert time.monotonic() - started < 20


def test_copies_on_a_stream_of_their_own(
    small: SmallData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What happens on a GPU, with torch's meta device, and streams and events that keep a diary."""
    diary: list[str] = []
    follow_streams(diary, monkeypatch)
    meta = dataclasses.replace(ALONE, device=torch.device("meta"))
    monkeypatch.setattr(data, "copies_to", Copies)
    threads = []
    monkeypatch.setattr(
        data, "make_current", lambda device: threads.append((threading.current_thread(), device))
    )
    settings = small.settings(tmp_path)
    loader = data.TrainLoader(str(small.train), small.train_samples, settings, meta)
    places = []
    for images, labels in loader.epoch(plan_run(settings, small.train_samples)[0]):
        assert images.device.type == labels.device.type == "meta"
        places.append(images.untyped_storage()._cdata)
        diary.append("step")
    first = ["side waits for compute", "copy", "copy", "copied on side", "compute waits for copied"]
    other = ["copy", "copy", "copied on side", "compute waits for copied"]
    expected = [*first, "step", "host waits for copied"]
    expected += ["used 1 on compute", *other, "step", "host waits for copied"]
    for number in range(2, 6):
        last, before = 1 + number % 2, 1 + (number + 1) % 2
        # The place is free when the step before the last is done; FFCV's memory when it is copied.
        expected += [f"used {before} on compute", f"side waits for used {last}", *other]
        expected += ["step", "host waits for copied"]
    expected.append("host asks for copied")  # before its memory is freed: a copy may be under way
    assert diary == expected
    assert places == places[:2] * 3 and places[0] != places[1]
    ((thread, device),) = threads
    assert isinstance(thread, data._Epoch) and device == meta.device
    assert capsys.readouterr().err.count("not page-locked") == 1


def test_leaving_a_pass_waits_for_the_copy_under_way(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's memory is freed behind it, and the next pass would write there."""
    diary: list[str] = []
    follow_streams(diary, monkeypatch)
    monkeypatch.setattr(data, "copies_to", Copies)
    stop = data._Epoch.stop

    def noted(epoch: data._Epoch) -> None:
        diary.append("stop")
        stop(epoch)

    monkeypatch.setattr(data._Epoch, "stop", noted)
    meta = dataclasses.replace(ALONE, device=torch.device("meta"))
    settings = small.settings(tmp_path)
    loader = data.TrainLoader(str(small.train), small.train_samples, settings, meta)
    batches = loader.epoch(plan_run(settings, small.train_samples)[0])
    next(batches)
    batches.close()
    assert diary[-2:] == ["host asks for copied", "stop"]


def test_waiting_for_the_device_is_not_waiting_for_the_loader(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy waits for the step before the last: a busy GPU must not look like a slow decoder."""
    pause = 0.1

    class Busy:
        def start(self, *batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return batch

        def wait(self) -> None:
            time.sleep(pause)

        def is_done(self, seconds: float) -> bool:
            return True

    monkeypatch.setattr(data, "copies_to", lambda device: Busy())
    monkeypatch.setattr(data._OrderedLoader, "_check_pinned", lambda *_: None)
    settings = small.settings(tmp_path)
    plan = plan_run(settings, small.train_samples)[0]
    loader = data.TrainLoader(str(small.train), small.train_samples, settings, ALONE)
    next(batches := loader.epoch(plan))  # compiles
    batches.close()
    before, started = loader.waited, time.perf_counter()
    assert len(list(loader.epoch(plan))) == plan.steps
    taken, waited = time.perf_counter() - started, loader.waited - before
    assert plan.steps * pause < taken
    assert 0 < waited < taken - plan.steps * pause


def follow_streams(diary: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and events in place of torch.cuda's: each call is an entry."""
    names = iter(("copied", "used 1", "used 2"))

    class Event:
        def __init__(self, blocking: bool = False) -> None:
            self.name = next(names)
            assert blocking == (self.name == "copied")

        def record(self, stream: "Stream") -> None:
            diary.append(f"{self.name} on {stream.name}")

        def synchronize(self) -> None:
            diary.append(f"host waits for {self.name}")

        def query(self) -> bool:
            diary.append(f"host asks for {self.name}")
            return True

    class Stream:
        def __init__(self, device: torch.device, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            diary.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Event) -> None:
            diary.append(f"{self.name} waits for {event.name}")

    @contextmanager
    def stream(entered: Stream) -> Iterator[None]:
        assert entered.name == "side"
        with monkeypatch.context() as inside:
            copy = torch.Tensor.copy_

            def noted(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> object:
                assert non_blocking
                diary.append("copy")
                return copy(target, source)

            inside.setattr(torch.Tensor, "copy_", noted)
            yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "compute"))


def test_classes_must_agree(small: SmallData, tmp_path: Path) -> None:
    shapes.write_tree(tmp_path / "images", train_per_class=1, val_per_class=1)
    (tmp_path / "images/val" / shapes.CLASSES[2]).rename(tmp_path / "images/val/zebra")
    options = ["--data_dir", str(tmp_path / "images"), "--out_dir", str(tmp_path)]
    assert write_ffcv.main(["--split", "val", "--num_workers", "1", *options]) == 0
    settings = small.settings(tmp_path, data__val_dataset=tmp_path / "val.beton")
    with pytest.raises(UsageError, match=r"has 1 classes that .* has not, for instance zebra"):
        data.check_data(settings.data)


def test_missing_data(small: SmallData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.*train\.beton"):
        data.check_data(small.settings(tmp_path, data__train_dataset="nowhere/train.beton").data)


def test_batch_that_the_world_does_not_divide(small: SmallData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the nearest that does is 15"):
        data.local_batch_size(16, world(0, 3), 100)
    with pytest.raises(UsageError, match="the nearest that does is 6"):  # not 8: of seven images
        data.local_batch_size(7, world(0, 2), 7)
    with pytest.raises(UsageError, match="7 training images are too few for 8 processes"):
        data.local_batch_size(8, world(0, 8), 7)


def test_more_workers_than_cores(small: SmallData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.num_workers 4096 is more than the \d+ cores"):
        data.workers_of(4096, ALONE)
    shared = dataclasses.replace(ALONE, local_size=1000)
    default = dataclasses.replace(small.settings(tmp_path).data, num_workers=None)
    settings = dataclasses.replace(small.settings(tmp_path), data=default)
    assert data.workers_of(settings.data.num_workers, shared) == 1
    assert data.workers_of(settings.data.num_workers, ALONE) == usable_cores()


def test_the_start_is_timed_once(small: SmallData, tmp_path: Path) -> None:
    settings = small.settings(tmp_path)
    loader = data.TrainLoader(str(small.train), small.train_samples, settings, ALONE)
    plan = plan_run(settings, small.train_samples)[0]
    assert loader.loader.start_seconds is None
    seen = [loader.loader.start_seconds for _ in range(2) for _ in loader.epoch(plan)]
    assert len(set(seen)) == 1 and seen[0] is not None
    assert seen[0] > loader.loader.construction_seconds > 0


def test_the_reader_of_the_file_is_compiled_once(small: SmallData, tmp_path: Path) -> None:
    loaders = [
        data.ValLoader(str(small.val), 33, small.settings(tmp_path), ALONE).loader for _ in range(2)
    ]
    first, second = (loader.memory_manager.compile_reader() for loader in loaders)
    assert first is second


def test_a_process_on_one_core_that_forked_ends() -> None:
    """With numba's threads from TBB it would not."""
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "import ffcv_imnet.data.fast_import, numba\n"
        "numba.np.ufunc.parallel._launch_threads()\n"
        "os.waitpid(os.fork() or os._exit(0), 0)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

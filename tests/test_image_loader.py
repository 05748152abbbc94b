"""What the package offers to training loops of others: ImageLoader, CropDecoder, and how both refuse."""

import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ffcv_imnet
from ffcv_imnet import CropDecoder, ImageLoader, RunError, UsageError
from ffcv_imnet.data.beton import read_tables
from ffcv_imnet.data.loader import PADDING
from ffcv_imnet.machine.host import find_nvidia
from tests.conftest import SmallData
from tests.test_data import damage, train_batches

NO_CARD = pytest.mark.skipif(bool(find_nvidia()), reason="there is a card")


def loader_of(path: Path, batch_size: int = 16, **options: Any) -> ImageLoader:
    """At 32 px, with one decoding thread."""
    return ImageLoader(path, batch_size, 32, **{"num_workers": 1, "device": "cpu", **options})


def images_of(loader: ImageLoader) -> Tensor:
    return torch.cat([images for images, _ in list(loader)])  # kept past their steps


def test_the_package_imports_nothing_until_a_name_is_asked_for() -> None:
    code = """
import sys, ffcv_imnet
assert {"ImageLoader", "CropDecoder"} < set(dir(ffcv_imnet))
assert not {"torch", "numpy", "ffcv", "ffcv_imnet.core"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'Imageloader'"):
        _ = ffcv_imnet.Imageloader


def test_passes_of_a_training_loader(small: SmallData, tmp_path: Path) -> None:
    before = threading.active_count()
    with loader_of(small.train) as loader:
        assert (len(loader), loader.samples, len(loader.classes)) == (6, 100, 10)
        first, second = images_of(loader), images_of(loader)
        assert first.dtype == torch.uint8 and first.shape == (96, 3, 32, 32)
        assert not torch.equal(first, second) and loader.epoch == 2
        theirs = train_batches(small.settings(tmp_path), small)  # of epoch 1, by the run's loader
        assert torch.equal(second, torch.cat([images for images, _ in theirs]))
        loader.set_epoch(1)
        loader.resolution = 48
        images, labels = next(iter(loader))
        assert images.shape == (16, 3, 48, 48) and torch.equal(labels, theirs[0][1])
        assert images.is_contiguous(memory_format=torch.channels_last)
        loader.resolution = 32
        loader.set_epoch(0)
        assert torch.equal(images_of(loader), first)
        left, anew = iter(loader), iter(loader)
        assert threading.active_count() == before
        next(anew)
        with pytest.raises(UsageError, match=r"another pass over .* has begun and ended this one"):
            next(left)
        with pytest.raises(AttributeError):
            loader.resolutoin = 64  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="was closed during this pass"):
        next(anew)
    assert threading.active_count() == before
    with pytest.raises(UsageError, match="is closed: make another"):
        iter(loader)


def test_without_copying_a_batch_is_overwritten(small: SmallData) -> None:
    """What `copy` is for."""
    with loader_of(small.train, 4, copy=False, batches_ahead=1) as loader:
        kept = list(loader)
        assert any(torch.equal(a[0], b[0]) for a, b in pairwise(kept[::3]))


def test_the_end_of_the_last_reference_ends_the_thread(small: SmallData) -> None:
    before = threading.active_count()
    batches = iter(loader_of(small.train, 4))
    next(batches)
    assert threading.active_count() > before
    del batches
    assert threading.active_count() == before


def test_shares_of_two_ranks(small: SmallData) -> None:
    """Training: equal counts that make the global batch; validation, amid it: every image once."""
    whole = images_of(loader_of(small.train, 16)).split(16)
    ranks = [loader_of(small.train, 8, rank=rank, world_size=2) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [len(whole)] * 2 == [6] * 2
    parts = [images_of(rank).split(8) for rank in ranks]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(batch, torch.cat(shares))
    found = []
    training = iter(ranks[0])
    for rank in range(2):
        next(training)
        loader = loader_of(small.val, 8, train=False, rank=rank, world_size=2)
        batches = [labels for _, labels in loader]
        assert len(batches) == len(loader)
        found += torch.cat(batches).tolist()
    assert len(found) == 33 and sorted(found) == sorted(read_tables(small.val).labels.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"batch_size": None}, "batch_size must be an integer of at least 1, not None"),
        ({"batch_size": 101}, "batch_size 101 is more than the 100 images of"),
        ({"batch_size": 51, "rank": 1, "world_size": 2}, "in 2 processes .*: take 50 or less"),
        ({"resolution": 4}, "resolution must be an integer from 8 to 4096, not 4"),
        ({"scale": (1, 0.08)}, "scale must be two numbers from 0.001 to 1, the smaller first"),
        ({"ratio": 0.875}, "ratio must be two numbers"),
        ({"flip": "up"}, "flip must be one of random, alternating, none, not 'up'"),
        ({"train": "perhaps"}, "train must be true or false"),
        ({"seed": -1}, "seed must be an integer from 0 to"),
        ({"device": "tpu"}, "device must be auto, cuda, cuda:N or cpu, not 'tpu'"),
        pytest.param({"device": "cuda"}, r'; device="cpu" works here$', marks=NO_CARD),
        pytest.param(
            {"device": torch.device("cuda")}, r'; device="cpu" works here$', marks=NO_CARD
        ),
        ({"rank": 1}, "rank and world_size go together"),
        ({"rank": 2, "world_size": 2}, "rank must be an integer from 0 to 1, not 2"),
        ({"num_workers": 999}, "num_workers 999 is more than the"),
        ({"path": None}, r"path must be that of a \.beton, not None"),
        ({"path": "s3://b/x.beton"}, r"^s3://b/x\.beton is an address: name a path on"),
        ({"path": "nowhere.beton"}, r"nowhere\.beton does not exist: write it with"),
    ],
)
def test_wrong_use_is_one_sentence(small: SmallData, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "path": small.train,
        "batch_size": 16,
        "resolution": 32,
        "device": "cpu",
    }
    with pytest.raises(UsageError, match=message) as error:
        ImageLoader(**arguments | options)
    assert "\n" not in str(error.value)


def test_a_file_without_manifest_names_the_command(small: SmallData, tmp_path: Path) -> None:
    (tmp_path / "theirs.beton").write_bytes(small.val.read_bytes())
    with pytest.raises(UsageError, match=r"python -m ffcv_imnet adopt .*theirs\.beton"):
        loader_of(tmp_path / "theirs.beton", train=False)


# ---- CropDecoder in FFCV's own Loader -----------------------------------------------------------


def stock(path: Path, decoder: CropDecoder, **options: Any) -> Any:
    """`ffcv.Loader` around it, in the file's order, 25 images a batch."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import Squeeze, ToTensor, ToTorchImage

    pipelines = {
        "image": [decoder, ToTensor(), ToTorchImage()],
        "label": [IntDecoder(), ToTensor(), Squeeze(1)],
    }
    return Loader(str(path), batch_size=25, num_workers=1, pipelines=pipelines, **options)


def test_the_decoder_in_a_stock_loader(small: SmallData, tmp_path: Path) -> None:
    """Validation's pixels are those of ImageLoader; a damaged image is black, and said."""
    damaged = damage(small, tmp_path, sample=7).train
    ours = list(loader_of(damaged, 25, train=False, on_damaged="skip"))
    loader = stock(damaged, CropDecoder((32, 32), ratio=224 / 256))
    for (images, labels), (theirs, their_labels) in zip(ours, loader, strict=True):
        assert torch.equal(images, theirs)
        assert ((labels == their_labels) | (labels == PADDING)).all()
    assert not ours[0][0][7].any() and ours[0][1][7] == PADDING
    with pytest.raises(
        RunError,
        match="1 of the images did not decode, first that of sample 7, which is damaged: write",
    ):
        iter(loader)


def test_epochs_and_sizes_of_the_decoder_in_a_stock_loader(small: SmallData) -> None:
    """With the file in memory and, page by page, from the disk."""

    def images(loader: Any) -> Tensor:
        return torch.cat([images.clone() for images, _ in loader])

    decoder = CropDecoder(32, seed=3, flip="random")
    again = CropDecoder(32, seed=3, flip="random")
    mapped = stock(small.train, decoder)
    paged = stock(small.train, again, os_cache=False, recompile=True)
    first, second = images(mapped), images(mapped)
    assert not torch.equal(first, second)
    again.set_epoch(1)
    assert torch.equal(images(paged), second)
    decoder.set_epoch(0)
    assert torch.equal(images(mapped), first)
    decoder.output_size = (48, 40)
    assert images(mapped).shape == (100, 3, 48, 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_size": 0}, "output_size must be an integer from 1 to 4096, not 0"),
        ({"output_size": "32"}, "output_size must be one side or"),
        ({"output_size": (1, 2, 3)}, r"output_size must be one side or \(height, width\)"),
        ({"scale": (0.5, 1), "ratio": 0.875}, "ratio 0.875 takes the central square"),
        ({"ratio": 2}, "ratio must be a number from 0.01 to 1"),
        ({"flip": "sometimes"}, "flip must be one of"),
    ],
)
def test_wrong_arguments_of_the_decoder(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CropDecoder(**{"output_size": 32, **arguments})


def test_the_decoder_at_a_wrong_place(small: SmallData) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.loader import Loader

    for pipelines, message in (
        (
            {"image": None, "label": [IntDecoder(), CropDecoder(32)]},
            "of this pipeline is a IntField",
        ),
        (
            {"image": [CropDecoder(32), CropDecoder(32)], "label": None},
            "must be the first operation",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            Loader(str(small.train), batch_size=4, num_workers=1, pipelines=pipelines)

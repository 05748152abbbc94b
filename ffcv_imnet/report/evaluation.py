"""A run's best checkpoint evaluated on its own validation data, and the images it got wrong."""

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ffcv_imnet.config.parsing import load
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.data.beton import Tables, check_beton, read_image, read_tables
from ffcv_imnet.data.loader import ValLoader
from ffcv_imnet.evaluate.metrics import Outcomes, collect_outcomes
from ffcv_imnet.evaluate.weights import load_network, match_classes
from ffcv_imnet.images.imagenet import imagenet_names
from ffcv_imnet.machine.device import DTYPES, choose_precision
from ffcv_imnet.machine.distributed import connect, describe_world
from ffcv_imnet.report.runs import Run
from ffcv_imnet.train.run_dir import BEST

A_CLASS = 3  # images on the sheet, at most, of one class and of one confusion
THUMBNAIL = 200  # px, the longer side


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for something else."""

    index: int  # in the .beton
    label: str
    prediction: str
    confidence: float  # probability given to the prediction
    jpeg: bytes


@dataclass(frozen=True)
class Evaluated:
    """What a checkpoint does with each class of its validation set."""

    weights: Path
    data: str
    names: tuple[str, ...]  # of the classes, in index order, for people
    counts: NDArray[np.int64]  # (classes, classes): images by label and prediction
    mistakes: tuple[Mistake, ...]  # the most confident ones

    @property
    def top_1(self) -> list[float]:
        """Of each class; 1 for a class without images."""
        total = self.counts.sum(axis=1)
        return [float(self.counts[i, i] / n) if n else 1.0 for i, n in enumerate(total)]


def evaluate_run(run: Run, shown: int) -> Evaluated:
    """Evaluate RUN/best.pt on the run's validation file, as the run itself validated.

    Raises:
        UsageError, RunError: the checkpoint or the data is not at hand, or another than the run's.
    """
    weights = run.path / BEST
    if not weights.is_file():  # of another log in a record's folder no weights are known
        raise UsageError(f"{weights}: no such file")
    network = load_network(weights)
    assert network.settings is not None and network.classes is not None  # a checkpoint's
    chosen = network.settings
    data = Path(chosen.data.val_dataset)
    manifest = check_beton(data)
    recorded = run.log.headers[-1].manifests.get("val", {}).get("content_checksum")
    if recorded not in (None, manifest.content_checksum):
        raise UsageError(f"{data} is not the file that {run.path} was validated on")
    outputs = match_classes(network, manifest.classes, str(data))

    # Not "cuda" as the run perhaps demanded: this may be another machine.
    world = describe_world("cpu" if chosen.training.device == "cpu" else "auto")
    connect(world)  # all cores
    precision = choose_precision(chosen.training.precision, world.device)
    dtype = DTYPES[precision]
    model = network.model.to(world.device).to(memory_format=torch.channels_last)
    here = load(
        data__val_dataset=data, validation__resolution=chosen.validation.resolution,
        validation__crop_ratio=repr(chosen.validation.crop_ratio),
        validation__batch_size=chosen.validation.batch_size,
    )  # fmt: skip
    loader = ValLoader(str(data), manifest.samples, here, world)
    outcomes = collect_outcomes(
        model, loader, world, dtype, outputs, what=f"evaluating {run.name}"
    )["single"]
    classes = len(network.classes)
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (outcomes.labels, outcomes.predictions), 1)
    names = tuple(imagenet_names().get(name, name) for name in network.classes)
    mistakes = _mistakes(data, outcomes, names, shown)
    return Evaluated(weights, str(data), names, counts, mistakes)


def _mistakes(
    data: Path, outcomes: Outcomes, names: tuple[str, ...], count: int
) -> tuple[Mistake, ...]:
    """The most confident ones, not more than `A_CLASS` of a class while there are others."""
    wrong = np.flatnonzero(outcomes.labels != outcomes.predictions)
    ordered = wrong[np.argsort(-outcomes.confidences[wrong], kind="stable")]
    seen: Counter[int] = Counter()
    first: list[int] = []
    later: list[int] = []
    for index in ordered.tolist():
        label = int(outcomes.labels[index])
        (first if seen[label] < A_CLASS else later).append(index)
        seen[label] += 1
    tables = read_tables(data)
    return tuple(
        Mistake(
            index=i, label=names[outcomes.labels[i]], prediction=names[outcomes.predictions[i]],
            confidence=float(outcomes.confidences[i]), jpeg=thumbnail(data, tables, i),
        )
        for i in [*first, *later][:count]
    )  # fmt: skip


def thumbnail(data: Path, tables: Tables, index: int) -> bytes:
    """The stored image `index` as a JPEG of at most `THUMBNAIL` px a side."""
    small = Image.fromarray(read_image(data, tables, index))
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82)
    return buffer.getvalue()

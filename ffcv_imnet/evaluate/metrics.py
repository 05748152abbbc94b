"""What a network is worth: accuracy with confidence intervals, calibration, confusions.

Every image's outcome is kept, one row each; all numbers are computed from these rows. So they are
the same at any number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ffcv_imnet.core.errors import RunError
from ffcv_imnet.data.loader import PADDING
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.train.validate import Loader, forward

Z = 1.959964  # standard normal quantile of 0.975: 95 % intervals
ECE_BINS = 15  # Guo et al., arXiv:1706.04599, 5


@dataclass(frozen=True)
class Outcomes:
    """One row an image, (images,) each; labels and predictions are the network's outputs."""

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    in_top_5: NDArray[np.bool_]
    losses: NDArray[np.float64]  # cross-entropy, nats
    confidences: NDArray[np.float64]  # probability given to the prediction


@torch.no_grad()
def collect_outcomes(
    model: nn.Module,
    loader: Loader,
    world: World,
    dtype: torch.dtype,
    outputs_of_labels: Sequence[int],
    *,
    tta: bool = False,
    what: str = "evaluation",
) -> dict[str, Outcomes]:
    """Every image's outcome, by view: "single", and with `tta` "flip".

    Args:
        dtype: autocast's; float32 means none.
        outputs_of_labels: the network's output for each label; see `weights.match_classes`.
        tta: also with logits averaged over the image and its mirror image; see `forward`.

    Raises:
        RunError: a logit is NaN or infinite, or the loader failed.
    """
    device = world.device
    outputs = torch.tensor(outputs_of_labels, device=device)
    views = ["single", "flip"] if tta else ["single"]
    # Rows of other processes stay zero and the sum over processes puts all together, exactly.
    rows = {
        view: torch.zeros(loader.samples, 5, dtype=torch.float64, device=device) for view in views
    }
    done = 0
    for logits, labels in forward(model, loader, world, dtype, tta=tta, what=what):
        real = (labels != PADDING).nonzero()[:, 0]  # wherever the padding stands
        mine = (done + real) * world.size + world.rank
        for view in views:
            rows[view][mine] = _rows(logits[view][real], outputs[labels[real]])
        done += len(labels)
    return {view: _outcomes(world.sum(rows[view]).cpu().numpy(), what) for view in views}


def _rows(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, 5), float64: label, prediction, among the first five, loss, confidence."""
    best = logits.topk(min(5, logits.shape[1])).indices
    columns = (
        labels,
        best[:, 0],
        (best == labels[:, None]).any(1),
        F.cross_entropy(logits, labels, reduction="none"),
        logits.double().softmax(1).amax(1),
    )
    return torch.stack([column.double() for column in columns], dim=1)


def _outcomes(rows: NDArray[np.float64], what: str) -> Outcomes:
    if not np.isfinite(rows).all():
        raise RunError(f"{what}: the network gives NaN or infinite values, its weights are lost")
    labels, predictions, top_5, losses, confidences = rows.T
    return Outcomes(
        labels.astype(np.int64), predictions.astype(np.int64), top_5 > 0, losses, confidences
    )


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a fraction (Wilson, 1927; doi:10.2307/2276774)."""
    p, z2 = hits / count, Z * Z
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * (p * (1 - p) / count + z2 / (4 * count * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_error(confidences: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Expected calibration error: over 15 equal bins of confidence (lower edge excluded), the mean
    of |accuracy - confidence|, weighted by images (arXiv:1706.04599, 3)."""
    bins = np.ceil(confidences * ECE_BINS).astype(np.int64).clip(1, ECE_BINS) - 1
    gap = np.bincount(bins, correct.astype(np.float64) - confidences, ECE_BINS)
    return float(np.abs(gap).sum() / len(confidences))


def score(outcomes: Outcomes, names: Sequence[str]) -> dict[str, Any]:
    """All numbers of one view, in JSON's types; fractions of one, losses in nats.

    Args:
        names: of the network's outputs, in index order.

    Returns:
        images, top_1, top_1_interval, top_5, top_5_interval, loss, ece; per_class: class, images,
        top_1, in index order; confused: label, prediction, images, the most frequent first.
    """
    correct = outcomes.predictions == outcomes.labels
    count, first, five = len(correct), int(correct.sum()), int(outcomes.in_top_5.sum())
    images = np.bincount(outcomes.labels, minlength=len(names))
    hits = np.bincount(outcomes.labels[correct], minlength=len(names))
    pairs = np.stack([outcomes.labels[~correct], outcomes.predictions[~correct]])
    pairs, times = np.unique(pairs, axis=1, return_counts=True)
    order = np.argsort(-times, kind="stable")
    return {
        "images": count,
        "top_1": first / count,
        "top_1_interval": list(wilson(first, count)),
        "top_5": five / count,
        "top_5_interval": list(wilson(five, count)),
        "loss": float(outcomes.losses.mean()),
        "ece": calibration_error(outcomes.confidences, correct),
        "per_class": [
            {"class": names[int(i)], "images": int(images[i]), "top_1": float(hits[i] / images[i])}
            for i in np.flatnonzero(images)
        ],
        "confused": [
            {"label": names[a], "prediction": names[b], "images": int(n)}
            for (a, b), n in zip(pairs.T[order], times[order], strict=True)
        ],
    }

"""The training objective."""

import math

import torch.nn.functional as F
from torch import Tensor

from ffcv_imnet.data.loader import PADDING
from ffcv_imnet.train.augment import one_hot


def objective(logits: Tensor, labels: Tensor, label_smoothing: float, loss: str) -> Tensor:
    """The mean over all images that count, a scalar.

    "ce" is cross-entropy. "bce" takes each class as a question of its own (arXiv:2110.00476, 2.2) and sums over the
    classes. Its logits are lowered by log(classes - 1), as if the head's biases had started there: every class begins
    at a probability of 1 / classes in place of a half, and the first gradients are those of cross-entropy,
    so that its learning rate serves. The order of the logits, and their softmax, do not see it.

    Args:
        logits: (batch, classes).
        labels: (batch,), int64, `PADDING` where an image does not count; or each class's part, (batch, classes),
            whose sum is an image's weight: one, or less where it was mixed with an image that does not count.
    """
    if loss == "ce" and labels.ndim == 1:
        return F.cross_entropy(
            logits, labels, ignore_index=PADDING, label_smoothing=label_smoothing
        )
    classes = logits.shape[1]
    parts = labels if labels.ndim == 2 else one_hot(labels, classes)
    weights = parts.sum(1, keepdim=True)
    target = (1 - label_smoothing) * parts + label_smoothing / classes * weights
    if loss == "ce":
        each = -target * F.log_softmax(logits.float(), 1)
    else:
        lowered = logits.float() - math.log(max(classes - 1, 1))
        # Linear in the target: a weight below one scales an image's loss.
        each = weights * F.softplus(lowered) - target * lowered
    return each.sum() / weights.sum()

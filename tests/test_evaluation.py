"""Evaluation against a plain loop, alone; on several processes in test_distributed.py."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ffcv_imnet.core.errors import RunError
from ffcv_imnet.data import loader as data
from ffcv_imnet.models import build_model
from ffcv_imnet.train.validate import Metrics, evaluate, hits
from tests.conftest import SmallData
from tests.test_data import ALONE


def test_hits_by_hand() -> None:
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6]])
    assert hits(logits, torch.tensor([0, 3, 1])).tolist() == [1, 2]
    assert hits(logits, torch.tensor([0, -1, 2])).tolist() == [1, 1]  # -1 is padding


def test_fewer_than_five_classes() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert hits(logits, torch.tensor([2, 2])).tolist() == [1, 2]


def plain_loop(model: nn.Module, loader: data.ValLoader) -> Metrics:
    """One image at a time."""
    model.eval()
    losses, first, five, tta_first, tta_five = [], 0, 0, 0, 0
    with torch.no_grad():
        for images, labels in loader.batches():
            for image, label in zip(images, labels, strict=True):
                if label == data.PADDING:
                    continue
                logits, flipped = model(image[None]), model(image[None].flip(3))
                losses.append(float(F.cross_entropy(logits, label[None])))
                first += int(logits.argmax() == label)
                five += int(label in logits.topk(5).indices)
                tta_first += int((logits + flipped).argmax() == label)
                tta_five += int(label in (logits + flipped).topk(5).indices)
    count = len(losses)
    return Metrics(
        sum(losses) / count,
        first / count,
        five / count,
        tta_first / count,
        tta_five / count,
        count,
    )


def assert_equal(ours: Metrics, reference: Metrics) -> None:
    assert ours.loss == pytest.approx(reference.loss, rel=1e-5)
    assert ours.top_1 == reference.top_1 and ours.top_5 == reference.top_5
    assert ours.tta_top_1 == reference.tta_top_1 and ours.tta_top_5 == reference.tta_top_5
    assert ours.images == reference.images


def test_evaluate_is_the_plain_loop(small: SmallData, tmp_path: Path) -> None:
    settings = small.settings(tmp_path)
    loader = data.ValLoader(str(small.val), 33, settings, ALONE)
    model = build_model(settings, 10)
    assert_equal(evaluate(model, loader, ALONE, torch.float32, tta=True), plain_loop(model, loader))
    assert evaluate(model, loader, ALONE, torch.float32).tta_top_1 is None


def test_lost_weights_are_an_error(small: SmallData, tmp_path: Path) -> None:
    settings = small.settings(tmp_path)
    model = build_model(settings, 10)
    with torch.no_grad():
        list(model.parameters())[-1].fill_(float("nan"))
    loader = data.ValLoader(str(small.val), 33, settings, ALONE)
    with pytest.raises(RunError, match="validation loss is NaN or infinite"):
        evaluate(model, loader, ALONE, torch.float32)

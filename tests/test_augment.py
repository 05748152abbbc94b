"""MixUp, CutMix and RandAugment on the device, binary cross-entropy, stochastic depth."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffcv_imnet.config.parsing import load
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.data.loader import PADDING
from ffcv_imnet.machine.device import CPU
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.models import build_model
from ffcv_imnet.models.stochastic_depth import DroppedNorm
from ffcv_imnet.train.augment import ALIKE, Augment, build_augment, one_hot
from ffcv_imnet.train.objective import objective

CLASSES = 10
ALL: dict[str, Any] = {
    "augmentation__mixup": 0.2,
    "augmentation__cutmix": 1.0,
    "augmentation__randaugment": 9,
}


def augment_of(rank: int = 0, size: int = 1, **settings: Any) -> Augment:
    return build_augment(load(**settings), CLASSES, World(rank, size, 0, 1, CPU))


def flat_images(count: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Each of one value, 20 times its label."""
    labels = torch.arange(count) % CLASSES
    images = (20 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 3, side, side)
    return images.contiguous(memory_format=torch.channels_last), labels


def noise(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count) % CLASSES


def test_without_them_there_is_nothing() -> None:
    batch = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    nothing = build_augment(load(), CLASSES, World(0, 1, 0, 1, CPU))(*batch, 0, 0)
    assert nothing[0] is batch[0] and nothing[1] is batch[1]


def test_the_networks_own_draws_differ_by_process_and_step() -> None:
    """Eight processes must not leave out the same branches; a resumed run must."""

    def drawn(rank: int, epoch: int, step: int, seed: int = 0) -> tuple[float, ...]:
        augment = augment_of(rank, 8, training__batch_size=64, training__seed=seed)
        augment.seed_network(epoch, step)
        return tuple(torch.rand(4).tolist())

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(3, 2, 1) == drawn(3, 2, 1)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_an_images_label_is_what_it_consists_of(kind: str) -> None:
    """Each pixel of a flat image tells its class; the parts of the label are those of the mean pixel."""
    only: dict[str, Any] = {f"augmentation__{kind}": 1.0}
    augment = augment_of(**only)
    images, labels = flat_images(8)
    mixed_at_all = 0
    for step in range(6):
        mixed, parts = augment(images, labels, 0, step)
        assert (mixed.dtype, mixed.shape) == (images.dtype, images.shape)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(parts.sum(1), torch.ones(8))
        expected = parts @ (20.0 * torch.arange(CLASSES))
        assert torch.allclose(
            mixed.float().mean((1, 2, 3)), expected, atol=0.51
        )  # rounded to uint8
        values = len(mixed[1, 0].unique())
        assert values <= (1 if kind == "mixup" else 2)
        mixed_at_all += int(parts[1].max() < 0.99)
    assert mixed_at_all > 2


def test_what_does_not_count_has_no_part() -> None:
    images, labels = flat_images(4)
    labels[2] = PADDING
    _, parts = augment_of(augmentation__mixup=1.0)(images, labels, 0, 0)
    kept = float(parts[2].sum()) + float(parts[3].sum())  # its pair got its pixels
    assert float(parts.sum()) == pytest.approx(3.0) and kept == pytest.approx(1.0)


def test_it_follows_from_seed_epoch_and_step_alone() -> None:
    images, labels = noise(2 * ALIKE)
    before = torch.get_rng_state()
    whole = augment_of(**ALL)(images, labels, 3, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again = augment_of(**ALL)(images, labels, 3, 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    others = [
        augment_of(**ALL)(images, labels, 3, 8),
        augment_of(**ALL)(images, labels, 4, 7),
        augment_of(**ALL, training__seed=1)(images, labels, 3, 7),
        augment_of(1, 2, **ALL)(images, labels, 3, 7),
    ]
    assert not any(torch.equal(whole[0], other[0]) for other in others)


def test_two_processes_alter_images_as_one_does() -> None:
    images, labels = noise(4 * ALIKE)
    one = augment_of(augmentation__randaugment=9)
    whole, same = one(images, labels, 0, 5)
    assert torch.equal(same, labels) and not torch.equal(whole, images)
    halves = [
        augment_of(rank, 2, augmentation__randaugment=9)(images[part], labels[part], 0, 5)[0]
        for rank, part in enumerate((slice(0, 2 * ALIKE), slice(2 * ALIKE, None)))
    ]
    assert torch.equal(torch.cat(halves), whole)
    # Groups draw each for themselves: the same images, altered differently.
    repeated = images[:ALIKE].repeat(4, 1, 1, 1)
    groups = one(repeated, labels, 0, 5)[0].split(ALIKE)
    assert len({group.numpy().tobytes() for group in groups}) > 1


# ---- the objective ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return 3 * torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 3, PADDING, 9, 3, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parts_of_whole_images_are_labels(logits: Tensor, smoothing: float) -> None:
    expected = F.cross_entropy(logits, LABELS, ignore_index=PADDING, label_smoothing=smoothing)
    assert torch.equal(objective(logits, LABELS, smoothing, "ce"), expected)
    parts = one_hot(LABELS, CLASSES)
    assert torch.allclose(objective(logits, parts, smoothing, "ce"), expected)
    by_labels, by_parts = (objective(logits, t, smoothing, "bce") for t in (LABELS, parts))
    assert torch.equal(by_labels, by_parts)


def test_a_mixed_image_has_the_mean_of_both_losses(logits: Tensor) -> None:
    whole = LABELS.clamp_min(0)
    parts = 0.7 * one_hot(whole, CLASSES) + 0.3 * one_hot(whole.roll(1), CLASSES)
    for loss in ("ce", "bce"):
        a, b = (objective(logits, labels, 0.1, loss) for labels in (whole, whole.roll(1)))
        assert torch.allclose(objective(logits, parts, 0.1, loss), 0.7 * a + 0.3 * b)


def test_binary_cross_entropy(logits: Tensor) -> None:
    counted = LABELS != PADDING
    target = one_hot(LABELS, CLASSES)[counted]
    lowered = logits[counted] - torch.log(torch.tensor(CLASSES - 1.0))
    expected = F.binary_cross_entropy_with_logits(lowered, target, reduction="sum") / 5
    assert torch.allclose(objective(logits, LABELS, 0.0, "bce"), expected)
    gradients: list[Tensor] = []
    for loss in ("ce", "bce"):
        start = torch.zeros(6, CLASSES, requires_grad=True)
        objective(start, LABELS, 0.0, loss).backward()
        assert start.grad is not None
        gradients.append(start.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


# ---- stochastic depth ---------------------------------------------------------------------------


def dropped(model: nn.Module) -> Iterator[DroppedNorm]:
    return (module for module in model.modules() if isinstance(module, DroppedNorm))


@pytest.mark.parametrize(("arch", "blocks"), [("resnet18", 8), ("slim13", 5)])
def test_branches_are_left_out_in_training_alone(arch: str, blocks: int) -> None:
    small = {"model__arch": arch, "resolution__min_res": 32, "resolution__max_res": 32}
    plain = build_model(load(**small), CLASSES)
    model = build_model(load(**small, model__stochastic_depth=0.4), CLASSES)
    theirs, ours = plain.state_dict(), model.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    chances = [norm.probability for norm in dropped(model)]
    assert chances == pytest.approx([0.4 * (n + 1) / blocks for n in range(blocks)])
    images = noise(4)[0]
    with torch.no_grad():
        assert torch.equal(model.eval()(images), plain.eval()(images))
        last = list(dropped(model))[-1].train()
        outputs = last(torch.randn(400, last.num_features, 1, 1))
    gone = (outputs == 0).flatten(1).all(1).float().mean()
    assert float(gone) == pytest.approx(0.4, abs=0.1)


def test_a_network_without_known_branches_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model\.stochastic_depth: 'tiny' has no residual"):
        build_model(load(model__arch="tiny", model__stochastic_depth=0.1), CLASSES)

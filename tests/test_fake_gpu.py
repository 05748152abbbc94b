"""Steps and evaluation as a GPU would run them, on one that is not there.

torch's fake tensors on "cuda" have shapes, types and a device, and no numbers. Reading a number, for which a real
GPU makes the host wait, raises. Gradients are put by hand: backward asks the missing driver.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.models import build_model
from ffcv_imnet.train import epoch as training
from ffcv_imnet.train.checkpoint import Learner, Trained
from ffcv_imnet.train.epoch import Tally, build_learner, train_step
from ffcv_imnet.train.norms import Norms
from ffcv_imnet.train.validate import evaluate

GPU = torch.device("cuda", 0)
ON_GPU = World(0, 1, 0, 1, GPU)
CARDS = {"T4": ((7, 5), "fp16"), "A100": ((8, 0), "bf16"), "H100": ((9, 0), "bf16")}
SIDE = 64
LIBRARY = torch.library.Library("aten", "IMPL", "Meta")


def fused_sgd(params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], **_: Any) -> None:
    """What the kernel asks of its tensors (ATen/native/cuda/FusedSgdKernel.cu): lists of one length, each
    alike in shape, strides and type."""
    for group in zip(params, grads, momenta or params, strict=True):
        assert len({(t.shape, t.stride(), t.dtype, t.device) for t in group}) == 1


LIBRARY.impl("_fused_sgd_", fused_sgd)


def network(settings: Settings, classes: int) -> nn.Module:
    """Built on "meta", then given memory on the GPU."""
    with torch.device("meta"):
        model = build_model(settings, classes)
    return on_gpu(model)


def on_gpu(model: nn.Module) -> nn.Module:
    return _apply(
        model, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU)
    )


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """`nn.Module.to`, whose own cannot exchange fake tensors."""
    for child in module.children():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            moved = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
            module._parameters[name] = moved
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


class Mode(FakeTensorMode):
    """torch's asks `torch.cuda.is_available`, and where that says yes puts constants on the card."""

    avoid_device_init = True


@contextmanager
def fake_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """In here torch.cuda has one card of this compute capability, and all tensors are fake."""
    mode = Mode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        for name, value in (
            ("is_available", True),
            ("get_device_capability", capability),
            ("is_bf16_supported", True),  # emulated, below 8.0
        ):
            stack.enter_context(mock.patch(f"torch.cuda.{name}", lambda *_, found=value: found))
        # Where is_available says yes, torch before 2.15 wants a tensor on the real card first.
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context"))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(mode)
        yield


def learner_of(settings: Settings) -> Learner:
    """`build_learner`'s, but for how its two networks are made: after tens of networks built on a fake CPU, moved
    and deep-copied, torch 2.15 ends in a segmentation fault."""
    with (
        mock.patch.object(training, "build_model", network),
        mock.patch("torch.optim.swa_utils.deepcopy", lambda _: network(settings, 1000)),
    ):
        return build_learner(settings, 1000, ON_GPU)


def batch_of(size: int) -> tuple[Tensor, Tensor]:
    images = torch.empty(size, 3, SIDE, SIDE, dtype=torch.uint8, device=GPU)
    labels = torch.zeros(size, dtype=torch.int64, device=GPU)
    return images.contiguous(memory_format=torch.channels_last), labels


class Batches:
    """A loader of two batches on the device."""

    samples = 16

    def batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        for _ in range(2):
            yield batch_of(8)


def gradients_by_hand(model: nn.Module) -> Any:
    """In place of backward: what is asked of the loss, and gradients of no value."""

    def backward(loss: Tensor) -> None:
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device == GPU
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)

    return mock.patch.object(Tensor, "backward", backward)


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "soap"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "slim13"])
@pytest.mark.parametrize("card", CARDS)
def test_a_step_and_an_evaluation(card: str, arch: str, optimizer: str) -> None:
    """Nothing in them lies on the host or waits for the device."""
    capability, precision = CARDS[card]
    settings = load(model__arch=arch, training__optimizer=optimizer, training__ema_decay=0.99)
    with fake_gpu(capability):
        learner = learner_of(settings)
        assert learner.precision == precision
        assert learner.scaler.is_enabled() is (precision == "fp16")
        learner.model.train()
        tally = Tally(Trained(), 2, ON_GPU)
        with gradients_by_hand(learner.model):
            for step in range(2):
                images, labels = batch_of(8)
                loss = train_step(learner, images, labels, 0.1, 0.1, Norms())
                tally.add(step, loss, labels)
        with pytest.raises(DataDependentOutputException):
            loss.item()  # what would have been raised in the step
        assert learner.ema is not None and int(learner.ema.n_averaged) == 2
        values = [*learner.model.state_dict().values(), *learner.ema.module.state_dict().values()]
        for state in learner.optimizer.state.values():
            values += [value for value in state.values() if isinstance(value, Tensor)]
        values += [loss, tally.loss_sum, tally.first_bad, tally.skipped]
        assert all(isinstance(value, FakeTensor) and value.device == GPU for value in values)
        assert learner.ema_eval_forward is not None
        with mock.patch.object(FakeTensor, "tolist", lambda sums: [1.0, 2.0] * 3):
            for model in (learner.eval_forward, learner.ema_eval_forward):
                metrics = evaluate(model, Batches(), ON_GPU, learner.dtype, tta=True)
                assert metrics.tta_top_1 == 0.5

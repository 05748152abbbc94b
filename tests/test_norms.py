"""The norms in the log: right, and taken without changing what is trained."""

import time
from typing import Any

import pytest
import torch

from ffcv_imnet.config.parsing import load
from ffcv_imnet.machine.device import CPU
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.train.checkpoint import Learner
from ffcv_imnet.train.epoch import build_learner, train_step
from ffcv_imnet.train.norms import Norms, group_name
from ffcv_imnet.train.watch import AGREE_EVERY, LOOK_EVERY, Watch

ALONE = World(0, 1, 0, 1, CPU)


def learner_of(**settings: Any) -> Learner:
    tiny = {"model__arch": "tiny", "resolution__min_res": 32, "resolution__max_res": 32}
    learner = build_learner(load(**{**tiny, **settings}), 10, ALONE)
    learner.model.train()
    return learner


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (16, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, (16,), generator=generator)


def steps(learner: Learner, count: int, norms: Norms | None) -> torch.Tensor:
    for number in range(count):
        loss = train_step(learner, *batch(number), 0.05, 0.1, norms)
    return loss


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "muon", "soap"])
def test_norms_are_right_and_change_nothing(optimizer: str, precision: str) -> None:
    kind = {"training__optimizer": optimizer, "training__precision": precision}
    looked, blind = learner_of(**kind), learner_of(**kind)
    if precision == "fp16":  # a real scaler, at a scale at which nothing overflows
        for learner in (looked, blind):
            learner.scaler.load_state_dict({**learner.scaler.state_dict(), "scale": 1024.0})
    steps(looked, 3, Norms())
    steps(blind, 3, None)
    pairs = zip(looked.model.state_dict().values(), blind.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    before = {p: p.detach().clone() for p in looked.model.parameters()}
    norms = Norms()
    loss = train_step(looked, *batch(7), 0.05, 0.1, norms)
    row = norms.read(7, loss)
    # The same gradients by torch.autograd from the weights as they were, unscaled.
    after = [p.detach().clone() for p in before]
    for p, old in before.items():
        p.data.copy_(old)
    images, labels = batch(7)
    with torch.autocast("cpu", looked.dtype, enabled=precision != "fp32"):
        logits = looked.forward(images)
        again = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    gradients = torch.autograd.grad(again, list(before))
    assert (row["step"], row["loss"]) == (7, pytest.approx(again.item(), rel=1e-4))
    every = dict(zip(before, zip(gradients, after, strict=True), strict=True))
    for group in looked.optimizer.param_groups:
        mine = [(*every[p], before[p]) for p in group["params"]]
        flat = [torch.cat([t.flatten() for t in one]) for one in zip(*mine, strict=True)]
        gradient, new, old = flat
        name = group_name(group)
        close = 1e-5 if precision == "fp32" else 2e-2
        assert row[f"{name}_gradient"] == pytest.approx(float(gradient.norm()), rel=close)
        assert row[f"{name}_weights"] == pytest.approx(float(old.norm()), rel=1e-5)
        assert row[f"{name}_update"] == pytest.approx(float((new - old).norm()), rel=1e-4)


def test_an_overflow_moves_nothing_and_has_no_gradient() -> None:
    learner = learner_of(training__precision="fp16")  # at the scaler's own first scale
    state = learner.scaler.state_dict()
    learner.scaler.load_state_dict({**state, "scale": 2.0**40})
    norms = Norms()
    row = norms.read(0, steps(learner, 1, norms))
    assert "sgd_gradient" not in row and row["sgd_update"] == 0 and row["sgd_weights"] > 0


def test_what_is_due_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is measured only if the tally is read after it, on one process and on several."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(World, "any", lambda self, flags: list(flags))
    for size in (1, 2):
        watch = Watch(World(0, size, 0, size, CPU), listen=False)
        due, looked = [], []
        for step in range(40):
            clock[0] += LOOK_EVERY / 5.5
            due += [step] if watch.will_look(step, step == 39) else []
            looked += [step] if watch.vote(step, step == 39) else []
        assert due == looked and due[-1] == 39 and len(due) > 3
        assert size == 1 or all(step % AGREE_EVERY == 0 for step in due[:-1])

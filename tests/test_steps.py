"""The steps that the benchmark sets side by side: the same arithmetic, timed, and what they say of a full memory."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ffcv_imnet.bench import steps
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.machine.distributed import describe_world
from ffcv_imnet.tools import benchmark


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two wait for each other, often long, where other processes compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ours_and_the_public_step_compute_the_same() -> None:
    """What the benchmark compares differs in speed alone: the same weights after two steps from the same."""
    world = describe_world()
    ours = steps.ours("resnet18", "sgd", "fp32", 4, world)
    public = steps.public("resnet18", "fp32", world.device)
    network = ours.model.get_submodule("1")  # after Normalize
    public.model.load_state_dict(network.state_dict())
    images, labels = steps.batch_of(4, 32, world.device)
    before = {name: value.clone() for name, value in public.model.state_dict().items()}
    for stepper in (ours, public):
        assert stepper.seconds(images, labels, 2) > 0
    for name, value in network.state_dict().items():
        theirs = public.model.state_dict()[name]
        torch.testing.assert_close(value, theirs, rtol=1e-3, atol=2e-5, msg=name)
        assert not torch.equal(before[name], theirs), f"{name} did not move"


@pytest.mark.parametrize("step", ["sgd", "muon"])
def test_an_update_alone(step: str) -> None:
    """It moves the weights and leaves no gradient behind for the next step. Before it fp16 overflows, as it does
    from GradScaler's first scale on, and the loss stays finite."""
    world = describe_world()
    stepper = steps.ours("resnet18", step, "fp16", 2, world)
    images, labels = steps.batch_of(2, 32, world.device)
    stepper.seconds(images, labels, 4)  # sets the rate
    before = [p.detach().clone() for p in stepper.model.parameters()]
    assert stepper.update_seconds(images, 1) > 0
    for old, new in zip(before, stepper.model.parameters(), strict=True):
        assert not torch.equal(old, new) and new.grad is None


def test_a_full_memory_is_one_sentence() -> None:
    images, labels = steps.batch_of(2, 32, torch.device("cpu"))
    layer = torch.nn.Linear(1, 1)

    def run(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stepper = steps.Stepper(layer, torch.optim.SGD(layer.parameters()), run)
    with pytest.raises(RunError, match=r"2 images of 32 px do not fit .* smaller --batch_size"):
        stepper.seconds(images, labels, 1)


def test_step_benchmark_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    command = f"step --resolution 32 --batch_size 2 --rounds 2 --seconds 0.1 --json {out}"
    command += " --steps public sgd --precision bf16 fp32"
    assert benchmark.main(command.split()) == 0
    report = json.loads(out.read_text())
    kinds = [(row["step"], row["precision"]) for row in report["rows"]]
    assert kinds == [("public", "bf16"), ("sgd", "bf16"), ("sgd", "fp32")]
    for row in report["rows"]:
        assert row["arch"] == "resnet18" and row["resolution"] == 32
        assert row["images_per_second"] > 0 and row["warm_up_seconds"] >= 0
        assert row["optimizer_share"] > 0 and row["ratio_to_public"] > 0
    assert report["rows"][0]["ratio_to_public"] == 1 and report["device"]
    assert "x public" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("step --arch resnet19", "invalid choice: 'resnet19'"),
        ("step --steps fast", "invalid choice: 'fast'"),
        ("step --precision int8", "invalid choice: 'int8'"),
        ("step --batch_size 1", "BatchNorm needs two images"),
        (
            "step --json nowhere/rows.json",
            r"--json nowhere/rows\.json: the folder nowhere does not exist",
        ),
    ],
)
def test_mistakes(command: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        benchmark.main(command.split())

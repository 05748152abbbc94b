"""What several gloo processes do of which one is known to do it right.

    python -m tests.ranks DIR        DIR/config.yaml and DIR/run/last.pt -> DIR/SIZE.pt for each size

The checkpoint is evaluated and differentiated by one process and by 2, 3 and 4; two of them also train, and
evaluate as the command does (DIR/words.json: its words, DIR/two_N.json: the results). Forked from one process
that has imported everything, so that a test pays for that once. If one fails, the others are ended at once.
"""

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import tests.networks  # noqa: F401
from ffcv_imnet import ImageLoader
from ffcv_imnet.bench import measure
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.data.loader import TrainLoader, ValLoader, check_data
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.models import build_model
from ffcv_imnet.tools import evaluate as evaluate_tool
from ffcv_imnet.train import checkpoint
from ffcv_imnet.train.epoch import build_learner, train_step
from ffcv_imnet.train.validate import evaluate
from tests.faults.lives import open_data
from tests.faults.outside import free_port

SIZES = (1, 2, 3, 4)


def found_by(world: World, settings: Settings, path: Path) -> dict[str, Any]:
    """Validation's counts, and the gradients of one global batch with BatchNorm frozen."""
    train_set, val_set = check_data(settings.data)
    learner = build_learner(settings, len(train_set.classes), world)
    checkpoint.restore(learner, checkpoint.load(path), path)
    val_loader = ValLoader(settings.data.val_dataset, val_set.samples, settings, world)
    evaluated = evaluate(learner.eval_forward, val_loader, world, learner.dtype)
    freeze(learner.model)
    loader = TrainLoader(settings.data.train_dataset, train_set.samples, settings, world)
    batches = loader.epoch(plan_run(settings, train_set.samples)[0])
    images, labels = next(batches)
    F.cross_entropy(learner.forward(images), labels).backward()
    gradients = [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]
    batches.close()
    return {"metrics": vars(evaluated), "gradients": gradients, "batch": len(labels)}


def compiled_steps(world: World, settings: Settings, path: Path) -> dict[str, Any]:
    """The weights after two rounds of Muon's steps at two resolutions and of a validation, by compiled networks,
    from a checkpoint's and with BatchNorm frozen; the number of graphs after each round, and why there are more.
    By dynamo's "eager": no C++ is built."""
    muon = replace(settings.training, optimizer="muon", compile=True)
    plain = torch.compile
    torch._dynamo.reset()
    counters.clear()
    with mock.patch.object(torch, "compile", lambda m, **more: plain(m, backend="eager", **more)):
        learner = build_learner(replace(settings, training=muon), 10, world)
    learner.model.load_state_dict(checkpoint.load(path)["model"])
    generator = torch.Generator().manual_seed(1)
    graphs = []
    for _ in range(2):
        for side in (32, 48):
            pixels = torch.randint(
                256, (16, 3, side, side), dtype=torch.uint8, generator=generator
            ).contiguous(memory_format=torch.channels_last)
            images = pixels.chunk(world.size)[world.rank]
            labels = torch.arange(16).remainder(10).chunk(world.size)[world.rank]
            freeze(learner.model)
            train_step(learner, images, labels, 0.05, 0.1)
        learner.model.eval()
        with torch.no_grad():
            learner.eval_forward(images)
        graphs.append(counters["stats"]["unique_graphs"])
    weights = [p.detach().clone() for p in learner.model.parameters()]
    assert world.agree(str([float(w.double().sum()) for w in weights])), "their weights differ"
    return {"weights": weights, "graphs": graphs, "breaks": list(counters["graph_break"])}


def agreed(world: World, settings: Settings) -> dict[str, Any]:
    """Validation with test-time augmentation of a new network, whose BatchNorm statistics were not those of
    the others until they were shared; and a vote."""
    model = build_model(settings, 10)
    for buffer in model.buffers():  # ranks disagree, as after training
        if buffer.shape == (16,) and not buffer.any():
            buffer += 2.0 * world.rank
    world.share(model)
    loader = ValLoader(settings.data.val_dataset, 33, settings, world)
    evaluated = evaluate(model, loader, world, torch.float32, tta=True)
    mean = float(model[1][1].running_mean.mean())  # type: ignore[index]
    found = [vars(evaluated), mean, world.any([world.rank == 0, False])]
    assert world.agree(json.dumps(found)), found
    return {"agreed": found}


def by_command(number: int, folder: Path, settings: Settings, ports: list[int]) -> None:
    """As torchrun would start it: `evaluate`, for each line of DIR/words.json, and --dry_run --measure."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2",
                      LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")  # fmt: skip
    words = folder / "words.json"
    for place, line in enumerate(json.loads(words.read_text()) if words.exists() else []):
        os.environ["MASTER_PORT"] = str(ports[place])
        assert evaluate_tool.main([*line, "--out", str(folder / f"two_{place}.json")]) == 0
    os.environ["MASTER_PORT"] = str(ports[-1])
    with mock.patch.object(measure.checkpoint, "save", wraps=measure.checkpoint.save) as save:
        measured = measure.measure_run(settings, time.perf_counter(), seconds=0.3)
    found = {"measured": measured is not None, "saved": save.call_count}
    (folder / f"measured_{number}.json").write_text(json.dumps(found))


def counted(world: World, settings: Settings) -> torch.Tensor:
    """How many images of each class the public loader gives all processes together, which it finds by itself."""
    counts = torch.zeros(10, dtype=torch.int64)
    loader = ImageLoader(settings.data.val_dataset, 5, 32, train=False, device="cpu", num_workers=1)
    for _, labels in loader:
        counts += torch.bincount(labels, minlength=10)
    return world.sum(counts)


def freeze(model: nn.Module) -> None:
    """Training, but for BatchNorm, whose statistics would be those of each process's own share."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def rank(number: int, folder: Path, settings: Settings, ports: dict[int, int]) -> None:
    """This process's part in every world that it belongs to."""
    torch.set_num_threads(1)
    for size in SIZES:
        if number < size:
            world = World(number, size, number, size, torch.device("cpu"))
            if size > 1:
                dist.init_process_group(
                    "gloo",
                    init_method=f"tcp://127.0.0.1:{ports[size]}",
                    rank=number,
                    world_size=size,
                    timeout=timedelta(seconds=600),
                )
            found = found_by(world, settings, folder / "run/last.pt")
            found["label_counts"] = counted(world, settings)
            if size <= 2:
                found |= compiled_steps(world, settings, folder / "run/last.pt")
            if size == 2:
                found |= agreed(world, settings)
            if world.is_main:
                torch.save(found, folder / f"{size}.pt")
            if size > 1:
                dist.destroy_process_group()


def main() -> int:
    """Exit status 0 if all processes got through."""
    folder = Path(sys.argv[1])
    settings = load(folder / "config.yaml")
    open_data(Path(settings.data.train_dataset).parent)  # numba compiles here, once
    ports = {size: free_port() for size in SIZES}
    more = [free_port() for _ in range(3)]
    children = {}
    for number in range(max(SIZES)):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                rank(number, folder, settings, ports)
                if number < 2:
                    by_command(number, folder, settings, more)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children[pid] = number
    return wait_for_all(children)


def wait_for_all(children: dict[int, int]) -> int:
    """1 as soon as one of them fails, named by its number; its own words stand above."""
    while children:
        pid, status = os.wait()
        number = children.pop(pid, None)
        if number is not None and status:
            print(
                f"process {number} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr
            )
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The training loop under torch.profiler, with the real loader: does the GPU wait, and for what?

python -m acceptance.profile --arch resnet18 --work DIR --device cuda --json OUT --trace TRACE.json.gz
"""

import argparse
import gzip
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from acceptance.data import repeated
from ffcv_imnet.bench.steps import CLASSES
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import EpochPlan, plan_run
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import Parser, run_main
from ffcv_imnet.data.beton import read_tables
from ffcv_imnet.data.loader import TrainLoader
from ffcv_imnet.machine import device as devices
from ffcv_imnet.machine.distributed import World, connect, describe_world, disconnect
from ffcv_imnet.train.checkpoint import Learner, Trained
from ffcv_imnet.train.epoch import build_learner, train_epoch
from ffcv_imnet.train.watch import Watch

PROFILED = 6  # steps under the profiler, whose trace grows by megabytes a step
Event = dict[str, Any]


def main() -> int:
    """Warm up, time `--steps` steps, profile a few more."""
    options = parse()
    if options.one_stream:
        copy_on_the_computing_stream()
    world = describe_world(options.device)
    connect(world)
    needed = options.batch_size * (options.steps + PROFILED)
    source = options.work / "photos/train.beton"
    path = repeated(source, options.work / f"photos_{needed}/train.beton", needed)
    samples = len(read_tables(path).labels)
    settings = settings_of(options, str(path))
    loader = TrainLoader(str(path), samples, settings, world)
    learner = build_learner(settings, CLASSES, world)
    plan = plan_run(settings, samples)[0]

    cold = steps(learner, loader, replace(plan, steps=PROFILED), settings, world)  # compiles, tunes
    timed = steps(learner, loader, replace(plan, epoch=1, steps=options.steps), settings, world)
    first = loader.loader.first_wait  # of an epoch, which elsewhere is thousands of steps long
    short = replace(plan, epoch=2, steps=PROFILED)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if world.device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        steps(learner, loader, short, settings, world)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
    said = {
        "images_per_second": options.steps * options.batch_size / timed.seconds,
        "loader_share": (timed.loader_seconds - first) / (timed.seconds - first),
        "first_batch_seconds": first,
        "compile_seconds": cold.compile_seconds or 0.0,
        **seen(events_of(profiler, options.trace)),
    }
    disconnect(world)
    print(json.dumps(said, indent=1))
    options.json.write_text(json.dumps(said) + "\n")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m acceptance.profile", description=__doc__)
    add = parser.add_argument
    add("--arch", required=True)
    add("--work", type=Path, required=True)
    add("--device", required=True)
    add("--resolution", type=int, default=128)
    add("--batch_size", type=int, default=1024)
    add("--steps", type=int, default=60)
    add("--compile", action="store_true")
    add("--one_stream", action="store_true", help="batches are copied on the stream that computes")
    add("--json", type=Path, required=True)
    add("--trace", type=Path, required=True)
    return parser.parse_args()


def copy_on_the_computing_stream() -> None:
    """The other half of a comparison: what training would be without a stream for the copies."""

    class OneStream(devices.Copies):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.side = self.compute

    setattr(devices, "Copies", OneStream)  # noqa: B010  (`copies_to` looks it up there)


def settings_of(options: argparse.Namespace, path: str) -> Settings:
    """Muon, the crops of the short recipes."""
    return load(
        training__device=options.device,
        model__arch=options.arch,
        data__train_dataset=path,
        augmentation__crop_scale="[0.5, 1]",
        resolution__min_res=options.resolution,
        resolution__max_res=options.resolution,
        training__batch_size=options.batch_size,
        training__optimizer="muon",
        training__compile=options.compile,
        lr__lr=1e-3,
        lr__lr_peak_epoch=0,
    )


def steps(
    learner: Learner, loader: TrainLoader, plan: EpochPlan, settings: Settings, world: World
) -> Trained:
    """Some steps of an epoch, as training makes them; its seconds include the device's work."""
    started = time.perf_counter()
    trained = train_epoch(
        learner, loader, plan, settings.schedule, Trained(), Watch(world, listen=False)
    )
    return replace(trained, seconds=time.perf_counter() - started)


# ---- the trace ----------------------------------------------------------------------------------


def events_of(profiler: "torch.profiler.profile", keep: Path) -> list[Event]:
    """The profiler's events as Chrome's trace format has them, which is kept, compressed, in `keep`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        text = path.read_bytes()
    keep.write_bytes(gzip.compress(text))
    found: list[Event] = json.loads(text)["traceEvents"]
    return [event for event in found if event.get("ph") == "X"]


def seen(events: list[Event]) -> dict[str, float]:
    """Copies, streams, launches and busy time of `PROFILED` steps.

    Kernels and copies carry the stream that they ran on; a runtime call belongs to the optimizer
    where it begins within one of torch's marks "Optimizer.step#...".
    """
    kernels = [event for event in events if event.get("cat") == "kernel"]
    busiest = most_used(kernels)
    copies = [
        e for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"] and is_batch(e)
    ]
    updates = [
        e
        for e in events
        if e["name"].startswith("Optimizer.step") and e.get("cat") == "user_annotation"
    ]
    within = [(e["ts"], e["ts"] + e["dur"]) for e in updates]

    def in_update(event: Event) -> bool:
        return any(start <= event["ts"] < end for start, end in within)

    # The second launch of a product that cuBLAS cuts along its inner side is cuBLAS's choice.
    second = {number(e) for e in kernels if "splitKreduce" in e["name"]} - {None}
    launches = [
        e
        for e in events
        if "LaunchKernel" in e["name"] and in_update(e) and number(e) not in second
    ]
    begin = min((start for start, _ in within), default=0.0)  # before it the loader starts
    operations = [e for e in events if e.get("cat") == "cpu_op" and in_update(e)]
    return {
        "copies": len(copies),
        "pinned_copies": sum("Pinned" in event["name"] for event in copies),
        "copies_beside_compute": sum(stream(event) != busiest for event in copies),
        "optimizer_launches": len(launches) / max(1, len(updates)),
        "optimizer_operations": len(operations) / max(1, len(updates)),
        "busy_share": busy([event for event in kernels if event["ts"] >= begin]),
    }


def is_batch(event: Event) -> bool:
    """Whether a copy is large enough to be a batch of images: a megabyte, or its size is not known."""
    return bool(event.get("args", {}).get("bytes", 1 << 20) >= 1 << 20)


def stream(event: Event) -> Any:
    """The CUDA stream of a kernel or copy."""
    return event.get("args", {}).get("stream", event.get("tid"))


def number(event: Event) -> Any:
    """By which a kernel and the call that launched it belong together; None where there is none."""
    return event.get("args", {}).get("correlation")


def most_used(kernels: list[Event]) -> Any:
    """The stream with most time of kernels: the one that computes."""
    spent: dict[Any, float] = {}
    for event in kernels:
        spent[stream(event)] = spent.get(stream(event), 0.0) + event["dur"]
    return max(spent, key=lambda number: spent[number], default=None)


def busy(kernels: list[Event]) -> float:
    """The part of the time from the first kernel to the end of the last in which one runs."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in kernels)
    if not spans:
        return 0.0
    covered, reached = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / (reached - spans[0][0])


if __name__ == "__main__":
    run_main(main)

"""Train a classifier on .beton files: settings -> world -> data -> model -> optimizer -> plan -> loop.

    python train_imagenet.py --config rn_configs/rn18_16ep.yaml
    python train_imagenet.py --config rn_configs/rn18_16ep.yaml --resume auto
    torchrun --nproc_per_node=8 train_imagenet.py --config rn_configs/rn50_16ep.yaml

`--dry_run` prints settings, plan and bill, with `--measure` what this machine will take; `--help`
lists every setting.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the process and shows no traceback; `run_main` puts it back.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import datetime
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ffcv_imnet.config.parsing import parse, to_yaml
from ffcv_imnet.config.schedules import IMAGENET_TRAIN_IMAGES, plan_run
from ffcv_imnet.config.schema import Settings, to_dict
from ffcv_imnet.core.errors import NonFiniteLoss, run_main
from ffcv_imnet.core.log import Epoch, Header, Summary
from ffcv_imnet.data.beton import Manifest, manifest_path
from ffcv_imnet.machine.host import keep_compilations

if TYPE_CHECKING:  # at run time after the settings are found right: torch takes seconds
    from ffcv_imnet.machine.distributed import World
    from ffcv_imnet.train.run_dir import RunFolder


def main() -> int:
    """Exit status: 0 trained, 1 the work failed, 2 wrong usage, 128 + n ended by signal n."""
    started = time.perf_counter()
    command = parse()
    if command.dry_run:
        return dry_run(command.settings, command.measure, started)
    return train(command.settings, command.resume, started)


def dry_run(settings: Settings, measuring: bool, started: float) -> int:
    """Print what a run would do and cost. Needs neither data nor a GPU, unless it measures."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `train`
    from ffcv_imnet.bench import cost
    from ffcv_imnet.models.registry import check_arch

    check_arch(settings.model.arch)
    price = cost.price(settings)
    if measuring:
        from ffcv_imnet.bench import measure

        measured = measure.measure_run(settings, started)
        if measured is not None:
            print(measure.describe(measured, price))
        return 0
    manifest = manifest_path(Path(settings.data.train_dataset))
    if manifest.is_file():
        images, source = Manifest.load(manifest).samples, str(manifest)
    else:
        images, source = IMAGENET_TRAIN_IMAGES, f"ImageNet's number, as {manifest} does not exist"
    plans = plan_run(settings, images)
    print(to_yaml(settings))
    print(f"{images:,} training images ({source})\n")
    columns = "epoch", "px", "batch", "steps", "images", "crop scale", "lr start", "lr end"
    rows = [
        (
            p.epoch,
            p.resolution,
            p.batch_size,
            p.steps,
            f"{p.images:,}",
            "{:g}-{:g}".format(*p.crop_scale),
            f"{p.lr_start:.5f}",
            f"{p.lr_end:.5f}",
        )
        for p in plans
    ]
    print(tabulate(rows, columns, disable_numparse=True, stralign="right"))
    print("\n" + cost.describe(settings, plans))
    return 0


def train(settings: Settings, resume: str | None, started: float) -> int:
    """One run, or the rest of one."""
    # Read when torch loads. Threads that spin while they wait make a CPU run crawl as soon as
    # anything else is busy; asleep they cost little.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.training.compile:
        keep_compilations(Path(settings.logging.folder).parent)
    # Here and not above: a wrong setting is said at once, before seconds of imports.
    from ffcv_imnet.bench import cost
    from ffcv_imnet.data.bus_error import explain_bus_error
    from ffcv_imnet.data.loader import TrainLoader, ValLoader, check_data, class_places
    from ffcv_imnet.machine.checks import say_at_start
    from ffcv_imnet.machine.distributed import (
        Interrupted,
        StopSignal,
        connect,
        describe_world,
        disconnect,
    )
    from ffcv_imnet.models.registry import check_arch
    from ffcv_imnet.train import checkpoint
    from ffcv_imnet.train.epoch import build_learner, epoch_record, train_epoch
    from ffcv_imnet.train.failures import explained
    from ffcv_imnet.train.heartbeat import SILENT
    from ffcv_imnet.train.run_dir import open_run
    from ffcv_imnet.train.trackers import Trackers, check_trackers
    from ffcv_imnet.train.validate import validate

    check_arch(settings.model.arch)
    price = cost.price(settings)
    limit = cost.limit(settings, price)
    check_trackers(settings.logging.trackers)
    world = describe_world(settings.training.device)
    train_set, val_set = check_data(settings, world)
    plans = plan_run(settings, train_set.samples)
    run = open_run(settings, resume, train_set, val_set)
    if run.finished:
        print(f"{run.path}: the run is finished after {len(run.epochs)} epochs; nothing to do")
        return 0
    first, trained, before = len(run.epochs), run.trained, run.elapsed_seconds

    connect(world, settings.distributed.timeout_seconds)
    run.check_agreement(world)
    stop = StopSignal()
    explain_bus_error(
        f"{settings.data.train_dataset} or {settings.data.val_dataset} was cut off, or its disk failed, "
        f"while it was read: once the file is whole again, --resume auto goes on"
    )
    train_loader = TrainLoader(settings.data.train_dataset, train_set.samples, settings, world)
    places = class_places(train_set.classes, val_set.classes)
    val_loader = ValLoader(settings.data.val_dataset, val_set.samples, settings, world, places)
    learner = build_learner(settings, len(train_set.classes), world)
    if run.state is not None:
        checkpoint.restore(learner, run.state, run.path)
        run.state = None  # hundreds of megabytes that are no longer needed
    header = describe_run(run, world, learner.precision, train_set, val_set)
    if world.is_main:
        run.start(header)
        say_at_start(world, run.path)
        print(f"{run.path}: {header.device}, {header.precision}, world size {world.size}")
        if settings.training.on_nonfinite_loss == "back" and not (run.path / "last.pt").exists():
            run.save_within(learner, trained, before)  # so that there is one to go back to
    trackers = Trackers(run.path, header, settings.logging.trackers if world.is_main else ())
    heart = run.heartbeat if world.is_main else SILENT
    heart.beat("starting", first, trained.steps, now=True)

    def elapsed() -> float:
        return before + time.perf_counter() - started

    status, stopped, limit_name = 0, None, limit.name if limit else None
    skips = settings.data.on_damaged == "skip"
    try:
        for plan in plans[first:]:
            stop.deadline = started - before + cost.training_seconds(limit, run.epochs)
            with explained(learner, plan, settings, world):
                if world.any([stop.late])[0]:
                    raise Interrupted(None)
                while trained.steps < plan.steps:
                    try:
                        trained = train_epoch(
                            learner, train_loader, plan, run.recipe, world, stop, trained, heart
                        )
                    except NonFiniteLoss as lost:
                        trained = run.go_back(learner, lost, elapsed(), world)
                        continue
                    if trained.signal is not None or trained.late:
                        raise Interrupted(trained.signal)
                    if trained.steps < plan.steps and world.is_main:
                        run.save_within(learner, trained, elapsed())
                heart.beat("validating", plan.epoch, trained.steps)
                validation_started = time.perf_counter()
                plain, ema = validate(
                    learner, val_loader, world, settings.validation.lr_tta, stop, heart
                )
            epoch = epoch_record(
                plan,
                trained,
                plain,
                ema,
                val_seconds=time.perf_counter() - validation_started,
                elapsed_seconds=elapsed(),
                peak_memory_bytes=world.peak_memory(),
                skipped=trained.skipped if skips else None,
                val_skipped=val_loader.samples - plain.images if skips else None,
                loader_start_seconds=(
                    train_loader.loader.start_seconds if plan is plans[first] else None
                ),
            )
            run.records.append(epoch)
            trained = checkpoint.Trained()
            if world.is_main:
                run.save(learner)
                trackers.add(epoch)
                print(describe(epoch, settings.training.epochs), flush=True)
            if settings.training.stop_when_reached and run.reached():
                break
    except Interrupted as end:
        status = 0 if end.signal is None else 128 + end.signal
        if world.is_main:
            run.save_within(learner, trained, elapsed())
            stopped = signal.Signals(end.signal).name if end.signal else limit_name
            where = f"in epoch {len(run.epochs)}, step {trained.steps}"
            print(f"stopped by {stopped} {where}; --resume auto goes on")
    if world.is_main and status == 0 and run.epochs:
        print(describe_end(run.finish(elapsed(), price, stopped), settings))
    heart.beat("stopped" if stopped else "finished", now=True)
    disconnect(world)
    trackers.close()
    run.release()
    return status


def describe_run(
    run: "RunFolder", world: "World", precision: str, train: Manifest, val: Manifest
) -> Header:
    """The log's line for this start."""
    from ffcv_imnet.core import provenance

    settings = run.settings
    return Header(
        settings=to_dict(settings),
        manifests={
            "train": manifest_summary(settings.data.train_dataset, train),
            "val": manifest_summary(settings.data.val_dataset, val),
        },
        versions=provenance.versions(),
        device=world.device_name(),
        precision=precision,
        world_size=world.size,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        git_commit=provenance.git_commit(),
        first_epoch=len(run.epochs),
        first_step=run.trained.steps,
    )


def manifest_summary(path: str, manifest: Manifest) -> dict[str, Any]:
    """What the log says of a data set."""
    return {
        "path": path,
        "samples": manifest.samples,
        "classes": len(manifest.classes),
        "content_checksum": manifest.content_checksum,
    }


def describe(epoch: Epoch, epochs: int) -> str:
    """One line for a person."""
    start = epoch.loader_start_seconds
    first = f"  first batch after {start:.1f} s" if start is not None else ""
    ema = f"  ema_top_1 {epoch.ema_top_1:.4f}" if epoch.ema_top_1 is not None else ""
    lost = "".join(
        f"  {name} {count:,}"
        for name, count in (("skipped", epoch.skipped), ("val_skipped", epoch.val_skipped))
        if count
    )
    return (
        f"epoch {epoch.epoch} (of 0-{epochs - 1})  {epoch.resolution} px  "
        f"train_loss {epoch.train_loss:.3f}  val_loss {epoch.val_loss:.3f}  "
        f"top_1 {epoch.top_1:.4f}  top_5 {epoch.top_5:.4f}{ema}  "
        f"{epoch.images_per_second:,.0f} img/s  {epoch.elapsed_seconds:,.0f} s{first}{lost}"
    )


def describe_end(summary: Summary, settings: Settings) -> str:
    """The result in a line or two."""
    text = (
        f"best top-1 {summary.best_top_1:.4f} after epoch {summary.best_epoch}; "
        f"{summary.epochs} epochs in {summary.elapsed_seconds:,.0f} s; "
        f"log: {settings.logging.folder}/log.jsonl"
    )
    target = settings.training.stop_at
    if summary.reached is not None:
        hit = summary.reached
        text += (
            f"\ntarget {target:g} reached: {hit.by} {hit.top_1:.4f} after "
            f"{hit.epoch + 1} epochs and {hit.elapsed_seconds:,.0f} s"
        )
    elif target:
        text += f"\ntarget {target:g} was not reached"
    if summary.cost_dollars is not None:
        text += f"\ncost: ${summary.cost_dollars:,.2f}"
    return text


if __name__ == "__main__":
    run_main(main)

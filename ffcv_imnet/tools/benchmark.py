"""Measure loaders against each other, training steps against each other, or a recipe's loader against its model.

python -m ffcv_imnet benchmark loader --beton data/beton/train.beton --json OUT.json --figure OUT.png
python -m ffcv_imnet benchmark step --arch resnet18 --resolution 128 160 192 --json OUT
python -m ffcv_imnet benchmark train --config rn_configs/rn18_16ep.yaml

`loader`: each loader in its own process, in alternation, medians of several rounds. DALI and SPDL
take part where they are installed; libjpeg-turbo, decoding the same crops and nothing else, is the
limit. `--cores 1 2` pins the processes to that many cores, in alternation too; `--min_crop 0.08 0.5` takes
crops of those areas and more. What is done stands in the JSON file after every resolution and crop, and
`--resume` goes on behind it. `step`: forward, backward and update on a batch that stays on the device, in alternation: this
project's with SGD and Muon, compiled and not, and with SOAP, in each 16-bit type the device computes, beside
ffcv-imagenet's (autocast, GradScaler, not compiled); what compiling took and what share of the
step the optimizer is. `train`: images/s of the loader alone, of the model alone on a batch that stays on the device,
and of both, at every resolution of the plan.
"""

import argparse
import datetime
import itertools
import json
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from ffcv_imnet.bench.cost import image_flops
from ffcv_imnet.bench.loaders import AHEAD, NEEDS, PEERS, Spec
from ffcv_imnet.bench.measure import PILOT_STEPS, bottleneck
from ffcv_imnet.bench.measure import measure as measure_training
from ffcv_imnet.bench.peers import (
    READ_FILES,
    Case,
    Passes,
    Peer,
    installed,
    listed,
    measure,
    summarise,
    table,
    unlisted,
    unpack,
)
from ffcv_imnet.bench.steps import ARCHS, STEPS, Stepper, batch_of, ours, public
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.core import provenance
from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.bounded import read_json
from ffcv_imnet.core.errors import UsageError, in_range
from ffcv_imnet.core.optional import is_there
from ffcv_imnet.core.paths import check_output, path_of, refuse_inputs
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.core.units import of_memory
from ffcv_imnet.data.beton import Manifest, manifest_path, read_tables
from ffcv_imnet.data.loader import TrainLoader, check_data
from ffcv_imnet.data.remote import local_copies
from ffcv_imnet.machine.checks import SHM
from ffcv_imnet.machine.device import DTYPES, choose_precision
from ffcv_imnet.machine.distributed import connect, describe_world, disconnect
from ffcv_imnet.machine.host import core_numbers, usable_cores
from ffcv_imnet.report.loader_rates import draw_loaders
from ffcv_imnet.tools import ToolParser
from ffcv_imnet.train.epoch import build_learner

ROUNDS = 5
# Multiply-adds counted as two, dense, bf16 or fp16: the makers' data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12}


def main(argv: list[str]) -> int:
    """The tool. Returns 0."""
    options = parse(argv)
    if options.what == "train":
        return benchmark_train(options)
    if options.what == "step":
        return benchmark_step(options)
    return benchmark_loader(options)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = ToolParser("benchmark", __doc__)
    parser.add_argument("what", choices=["loader", "step", "train"])
    add, cores = parser.add_argument, usable_cores()
    add("--config", action="append", help="train: a recipe; may be given several times")
    add("--beton", type=path_of, help="loader: the .beton that is loaded")
    add("--data_dir", type=path_of, help="its images as a folder a class; default: those it stores")
    pixels, some = in_range(int, 1, 4096), in_range(int, 1)
    add("--resolution", type=pixels, nargs="+", metavar="PX",
        help="default: 128 160 192; loader: and 224")  # fmt: skip
    add("--min_crop", type=in_range(float, 0.001, 1), nargs="+", default=[0.08], metavar="AREA",
        help="loader: least area of a crop over that of its image (default: 0.08)")  # fmt: skip
    add("--batch_size", type=some, default=512, metavar="N")
    add("--num_workers", type=in_range(int, 1, cores), default=cores, metavar="N")
    add("--cores", type=in_range(int, 1, cores), nargs="+", metavar="N",
        help="loader: pin each process to so many cores, with as many workers; default: --num_workers, not pinned")  # fmt: skip
    add("--rounds", type=some, default=ROUNDS, metavar="N", help="default: %(default)s")
    add("--seconds", type=in_range(float, 0.1), default=30.0, metavar="S",
        help="train, step: of measuring at each resolution (default: %(default)g)")  # fmt: skip
    add("--arch", nargs="+", choices=ARCHS, default=["resnet18"], help="step: networks")
    add("--steps", nargs="+", choices=["public", *STEPS], default=["public", *STEPS],
        help="step: which of them (default: all)")  # fmt: skip
    add("--precision", nargs="+", choices=list(DTYPES),
        help="step: default: what the device computes natively; the public step takes the first")  # fmt: skip
    parser.add_device()
    add("--loaders", nargs="+", choices=list(PEERS), help="default: all that are installed")
    add("--json", type=path_of, metavar="FILE.json", help="where the rows go")
    add("--figure", type=path_of, metavar="FILE.png", help="loader: a PNG of the rows")
    add("--resume", action="store_true", help="loader: go on with what --json holds")
    options = parser.parse_args(argv)
    options.resolution = (
        options.resolution or [128, 160, 192, 224][: 4 if options.what == "loader" else 3]
    )
    if options.what == "train" and not options.config:
        raise UsageError("benchmark train needs --config, a recipe")
    if options.what == "step" and options.batch_size < 2:
        raise UsageError("--batch_size 1: BatchNorm needs two images; take 2 or more")
    beside = options.beton and manifest_path(options.beton)
    for name, suffix in (("json", ".json"), ("figure", ".png")):
        path = getattr(options, name)
        check_output(f"--{name}", path, suffix)
        refuse_inputs(f"--{name}", path, options.beton, beside, *(options.config or []))
    if options.resume and options.json is None:
        raise UsageError("--resume needs --json, the file to go on with")
    if options.what == "loader" and options.beton is None:
        raise UsageError("benchmark loader needs --beton, a file of write_ffcv.py")
    for name in set(options.loaders or []) & set(NEEDS):
        if not is_there(NEEDS[name]):
            raise UsageError(f"--loaders {name} needs {NEEDS[name]}: pip install .[peers]")
    return options


# ---- loaders ------------------------------------------------------------------------------------


def benchmark_loader(options: argparse.Namespace) -> int:
    """Rounds of all loaders in alternation; table, JSON, figure."""
    tables = read_tables(options.beton)
    if len(tables.labels) < options.batch_size:
        raise UsageError(
            f"{options.beton} holds {len(tables.labels)} images, fewer than --batch_size "
            f"{options.batch_size}: take a smaller batch"
        )
    names = chosen_loaders(options, bool((tables.modes == 0).all()))
    counts = options.cores or [options.num_workers]
    cases = [
        Case(*case) for case in itertools.product(options.resolution, options.min_crop, counts)
    ]
    about = describe_loaders(options, names, len(tables.labels))
    passes = earlier_passes(options.json, about) if options.resume else {}

    def save() -> None:
        if options.json:
            rows = {"rows": summarise(passes), "passes": listed(passes)}
            write_json(options.json, about | rows)

    if any(case not in passes for case in cases):
        with ExitStack() as stack:
            peers = start_peers(options, names, stack)
            measure(peers, cases, options.rounds, passes, save)
    rows = summarise(passes)
    print(table(rows))
    if options.figure:
        draw_loaders(options.figure, rows, f"{provenance.cpu_name()}, batch {options.batch_size}")
    return 0


def chosen_loaders(options: argparse.Namespace, jpegs: bool) -> list[str]:
    """Those asked for, else all that can run: torchvision's processes hand over their batches in /dev/shm, of which a
    container has 64 MiB, and die where it is full. Raises UsageError."""
    names: list[str] = options.loaders or installed(jpegs)
    workers = max(options.cores or [options.num_workers])
    needed = AHEAD * workers * options.batch_size * 3 * max(options.resolution) ** 2
    free = shutil.disk_usage(SHM).free if SHM.exists() else 0
    if "torchvision" not in names or needed <= free:
        return names
    why = f"its processes need {of_memory(needed)} of /dev/shm, where {of_memory(free)} are free (docker run --ipc=host)"
    if options.loaders:
        raise UsageError(f"--loaders torchvision: {why}")
    print(f"torchvision is left out: {why}", file=sys.stderr, flush=True)
    return [name for name in names if name != "torchvision"]


def start_peers(
    options: argparse.Namespace, names: list[str], stack: ExitStack
) -> dict[tuple[str, int], Peer]:
    """The loaders' processes, by loader and cores, and the files that some of them read, until `stack` closes."""
    folder: Path | None = options.data_dir
    if folder is not None and not any(folder.glob("*/*")):
        raise UsageError(
            f"--data_dir {folder}: no folders of images there; leave it out to unpack the .beton's own"
        )
    if folder is None and set(names) & set(READ_FILES):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        unpack(options.beton, folder)
    peers = {}
    for name, cores in itertools.product(names, options.cores or [options.num_workers]):
        spec = Spec(str(options.beton), str(folder), options.batch_size, cores)
        pinned = core_numbers()[:cores] if options.cores else ()
        peers[name, cores] = stack.enter_context(Peer(name, spec, pinned))
    return peers


def describe_loaders(options: argparse.Namespace, names: list[str], samples: int) -> dict[str, Any]:
    """How rows were made; what has to be the same where `--resume` goes on."""
    manifest = manifest_path(options.beton)
    return {
        "samples": samples,
        "stored": Manifest.load(manifest).settings if manifest.is_file() else {},
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "cores_pinned": options.cores or [],
        "rounds": options.rounds,
        "loaders": names,
    }


def earlier_passes(path: Path, about: dict[str, Any]) -> Passes:
    """The passes of an earlier `--json`; none if there is no such file.

    Raises:
        UsageError: it is another measurement's.
    """
    if not path.is_file():
        return {}
    try:
        held = read_json(path)
        other = [key for key, value in about.items() if held.get(key) != value]
        passes = unlisted(held["passes"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"--resume: {path} is no result of `benchmark loader --json`") from None
    if other:
        raise UsageError(
            f"--resume: {path} was measured with other {', '.join(other)}: name another file"
        )
    return passes


def write_json(path: Path, result: dict[str, Any]) -> None:
    """The result, and what it must name to be believed."""
    made = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": provenance.cpu_name(),
        "cores": usable_cores(),
        "git_commit": provenance.git_commit(),
        "versions": provenance.versions(),
    }
    with atomic_write(path, "w") as file:
        file.write(json.dumps(made | result, indent=1) + "\n")


# ---- steps --------------------------------------------------------------------------------------


def benchmark_step(options: argparse.Namespace) -> int:
    """`step`: each network at each resolution, all steps in alternation; table, JSON."""
    world = describe_world(options.device)
    if world.size > 1:
        raise UsageError("benchmark step measures one process: start it without torchrun")
    connect(world)
    precisions = options.precision or native_precisions(world.device)
    kinds = [(name, p) for name in options.steps for p in precisions]
    kinds = [kind for kind in kinds if kind[0] != "public" or kind[1] == precisions[0]]
    rows: list[dict[str, Any]] = []
    for arch in options.arch:
        torch._dynamo.reset()  # all networks count towards one limit of graphs, beyond which it compiles no more
        steppers = {
            (name, precision): public(arch, precision, world.device)
            if name == "public"
            else ours(arch, name, precision, options.batch_size, world)
            for name, precision in kinds
        }
        for side in options.resolution:
            images, labels = batch_of(options.batch_size, side, world.device)
            of_side = measure_steps(steppers, images, labels, options.rounds, options.seconds)
            rows += [{"arch": arch, "resolution": side, **row} for row in of_side]
    disconnect(world)
    if world.is_main:
        print(f"{world.device_name()}, batch {options.batch_size}\n\n{step_table(rows)}")
        if options.json:
            run = {"device": world.device_name(), "batch_size": options.batch_size}
            write_json(options.json, run | {"rounds": options.rounds, "rows": rows})
    return 0


def native_precisions(device: torch.device) -> list[str]:
    """fp16 first on CUDA, for ffcv-imagenet's step is in it; and what `auto` chooses."""
    chosen = choose_precision("auto", device)
    return list(dict.fromkeys(["fp16", chosen] if device.type == "cuda" else [chosen]))


def measure_steps(
    steppers: dict[tuple[str, str], Stepper],
    images: Tensor,
    labels: Tensor,
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """A row a step and precision: median images/s, spread, the median of each round's ratio to the public
    step, the optimizer's share, what the first steps took more (compilation, cuDNN's tuning).

    Takes about `seconds` after these first steps, longer where a step takes long.
    """
    warm_up, count = {}, {}
    rates: dict[tuple[str, str], list[float]] = {kind: [] for kind in steppers}
    what = f"{images.shape[-1]} px"
    with Progress((2 + rounds) * len(steppers), what, "block") as progress:
        for kind, stepper in steppers.items():
            period, cold = stepper.period, stepper.seconds(images, labels, PILOT_STEPS)
            if period > 1:  # each of the first ones is of the dear kind
                stepper.seconds(images, labels, period)
            pilot = max(PILOT_STEPS, period)
            warm = stepper.seconds(images, labels, pilot) / pilot
            warm_up[kind] = max(0.0, cold - PILOT_STEPS * warm)
            a_block = seconds / rounds / len(steppers)
            count[kind] = whole_periods(a_block / warm, period)
            progress.update(2, " ".join(kind))
        for _ in range(rounds):
            for kind, stepper in steppers.items():
                taken = stepper.seconds(images, labels, count[kind])
                rates[kind].append(count[kind] * len(images) / taken)
                progress.update(1, " ".join(kind))
    base = next((own for kind, own in rates.items() if kind[0] == "public"), None)
    rows = []
    for kind, own in rates.items():
        median = statistics.median(own)
        some = whole_periods(count[kind] // 4, steppers[kind].period)
        update = steppers[kind].update_seconds(images, some)
        row = {
            "step": kind[0],
            "precision": kind[1],
            "images_per_second": round(median, 1),
            "spread": round((max(own) - min(own)) / median, 4),
            "optimizer_share": round(update * median / len(images), 4),
            "warm_up_seconds": round(warm_up[kind], 2),
        }
        if base:
            ratios = [a / b for a, b in zip(own, base, strict=True)]
            row["ratio_to_public"] = round(statistics.median(ratios), 3)
        rows.append(row)
    return rows


def whole_periods(steps: float, period: int) -> int:
    """About so many steps, in whole periods, `PILOT_STEPS` at least."""
    return period * max(-(-PILOT_STEPS // period), round(steps / period))


def step_table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person."""
    columns = "network", "px", "step", "", "images/s", "spread", "x public", "optimizer", "warm-up"
    lines = [
        (
            row["arch"],
            row["resolution"],
            row["step"],
            row["precision"],
            f"{row['images_per_second']:,.0f}",
            f"{row['spread']:.1%}",
            f"{row['ratio_to_public']:.2f}" if "ratio_to_public" in row else "",
            f"{row['optimizer_share']:.1%}",
            f"{row['warm_up_seconds']:.1f} s",
        )
        for row in rows
    ]
    return tabulate(lines, columns, disable_numparse=True, stralign="right")


# ---- training -----------------------------------------------------------------------------------


def benchmark_train(options: argparse.Namespace) -> int:
    """`train`: loader, model and both, at each resolution of the plan; table, JSON."""
    settings = load(*options.config)
    device = settings.training.device if options.device == "auto" else options.device
    world = describe_world(device)
    settings = replace(settings, data=local_copies(settings.data))
    train_set, _ = check_data(settings.data, world)
    plans = plan_run(settings, train_set.samples)
    connect(world)
    loader = TrainLoader(settings.data.train_dataset, train_set.samples, settings, world)
    learner = build_learner(settings, len(train_set.classes), world)
    name = world.device_name()
    peak = next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)
    rows, advice = [], []
    for side, plan in sorted({plan.resolution: plan for plan in reversed(plans)}.items()):
        rates = measure_training(learner, loader, plan, settings, world, options.seconds)
        limit, change = bottleneck(rates, world.device.type == "cuda")
        flops = image_flops(settings, len(train_set.classes), side, True)
        row = {
            "resolution": side,
            "loader": round(rates.loader, 1),
            "model": round(rates.step, 1),
            "both": round(rates.both, 1),
            "limit": limit,
        }
        if peak:
            row["model_flop_utilisation"] = round(rates.both * flops / world.size / peak, 4)
        rows.append(row)
        advice.append(change)
    disconnect(world)
    if world.is_main:
        batch = settings.training.batch_size
        print(f"{name}, {learner.precision}, batch {batch}\n")
        print(training_table(rows))
        print("\n" + "\n".join(dict.fromkeys(advice)))
        if options.json:
            run = {"device": name, "precision": learner.precision, "batch_size": batch}
            write_json(options.json, run | {"world_size": world.size, "rows": rows})
    return 0


def training_table(rows: list[dict[str, Any]]) -> str:
    """Images/s of loader, model and both, a line a resolution."""
    columns = ("px", "loader img/s", "model img/s", "both img/s", "limit", "model FLOP utilisation")
    lines = []
    for row in rows:
        used = row.get("model_flop_utilisation")
        speeds = [f"{row[what]:,.0f}" for what in ("loader", "model", "both")]
        share = "peak not known" if used is None else f"{used:.1%}"
        lines.append((row["resolution"], *speeds, row["limit"], share))
    return tabulate(lines, columns, disable_numparse=True, stralign="right")

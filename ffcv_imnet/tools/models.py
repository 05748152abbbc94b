"""List the networks: parameters, FLOPs, images a second here, top-1 where a record has it.

python -m ffcv_imnet models                               no network is run
python -m ffcv_imnet models --measure                     times a training step of each, seconds a network
python -m ffcv_imnet models resnet18 slim13 --training.use_blurpool=false    some of them, with options

FLOPs are those of one image forward, additions and multiplications counted separately
(torch's FlopCounterMode), with BlurPool as training.use_blurpool has it.
"""

import statistics
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from ffcv_imnet.bench.cost import image_flops
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schema import RETIRED, Settings, flatten, to_dict
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.log import LOG
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.machine.device import DTYPES, choose_precision, synchronise
from ffcv_imnet.machine.distributed import connect, describe_world
from ffcv_imnet.models import build_model
from ffcv_imnet.models.registry import REGISTRY
from ffcv_imnet.report.runs import best, group_runs, read_run
from ffcv_imnet.tools import ToolParser

SIDES = (128, 160, 192, 224)
CLASSES = 1000
STEPS = 7  # timed, after one that is not; their median counts
BATCH = {"cpu": 32, "cuda": 256}
RECORDS = Path(__file__).parents[2] / "records"  # those of this checkout; none where installed


def main(argv: list[str]) -> int:
    """Print the table. Exit status 0."""
    parser = ToolParser("models", __doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="default: all of the registry")
    add("--measure", action="store_true", help="time training steps on this machine")
    add("--resolution", type=int, metavar="PX", help="of --measure, 32 to 1024 (default: 160)")
    add("--batch_size", type=int, metavar="N", help="of --measure; default: 32, on a GPU 256")
    parser.add_device()
    options, rest = parser.parse_known_args(argv)
    overrides = chosen_options(rest)
    side = 160 if options.resolution is None else options.resolution
    if not options.measure and (options.resolution, options.batch_size) != (None, None):
        raise UsageError("--resolution and --batch_size are those of --measure: add it")
    if not 32 <= side <= 1024:
        raise UsageError(f"--resolution {side}: from 32 to 1024 px")
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError(f"--batch_size {options.batch_size}: 1 or more")

    every, counted = {}, {}
    for name in options.names or sorted(REGISTRY):
        settings = load(**{**overrides, "model__arch": name})
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build_model(settings, CLASSES).parameters()) / 1e6
        every[name] = settings
        flops = [image_flops(settings, CLASSES, side, training=False) for side in SIDES]
        counted[name] = [f"{parameters:.1f} M", *(f"{count / 1e9:.2f}" for count in flops)]
    scores = recorded(RECORDS)
    measured = measure(every, side, options.batch_size, options.device) if options.measure else {}
    columns = ["network", "parameters", *(f"GFLOP, {side} px" for side in SIDES)]
    columns += ["training images/s"] if measured else []
    rows = [
        [name, *cells, *([f"{measured[name]:,.0f}"] if measured else [])]
        for name, cells in counted.items()
    ]
    print(tabulate(rows, columns, disable_numparse=True,
                   colalign=("left", *["right"] * (len(columns) - 1))))  # fmt: skip
    if overrides:
        print("with " + ", ".join(rest))
    networks = {name: network_of(to_dict(settings)) for name, settings in every.items()}
    best_of = [
        [name, *row] for name, network in networks.items() for row in scores.get(network, [])
    ]
    if best_of:
        columns = ["network", "record", "images", "classes", "epochs", "from", "top-1", "seeds"]
        print("\n" + tabulate(best_of, columns, disable_numparse=True, stralign="right",
                              colalign=("left", "left")))  # fmt: skip
    return 0


def chosen_options(words: list[str]) -> dict[str, str]:
    """Settings given as --section.name=value, for `load`. Raises UsageError."""
    overrides = {}
    for word in words:
        key, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key or not value:
            raise UsageError(f"unexpected {word!r}; settings are given as --section.name=value")
        if key == "model.arch":
            raise UsageError(f"{word}: name the network without an option, as in: models {value}")
        overrides[key.replace(".", "__")] = value
    return overrides


def measure(
    every: dict[str, Settings], side: int, batch: int | None, device: str
) -> dict[str, float]:
    """Training images a second of each network: forward and backward, as training runs them, without a loader."""
    world = describe_world(device)
    connect(world)  # all cores
    count = batch or BATCH[world.device.type]
    precision = choose_precision("auto", world.device)
    dtype = DTYPES[precision]
    print(f"timing on {world.device_name()}, {precision}, batch {count}, {side} px")
    built = {
        name: build_model(settings, CLASSES).to(world.device).to(memory_format=torch.channels_last)
        for name, settings in every.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in built}
    with Progress(len(every) * (STEPS + 1), "measuring", unit="step") as progress:
        for _ in range(STEPS + 1):  # in turns, so that what disturbs the machine hits all of them
            for name, model in built.items():
                seconds[name].append(step_seconds(model.train(), count, side, dtype))
                progress.update(1, name)
    return {name: count / statistics.median(taken[1:]) for name, taken in seconds.items()}


def step_seconds(model: nn.Module, count: int, side: int, dtype: torch.dtype) -> float:
    """One forward and backward pass."""
    device = next(model.parameters()).device
    pixels = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    started = time.perf_counter()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(model(pixels), labels)
    loss.backward()
    model.zero_grad(set_to_none=True)
    loss.item()  # waits for the device
    synchronise(device)
    return time.perf_counter() - started


def network_of(settings: dict[str, dict[str, object]]) -> str:
    """Its name and options, as text: what a record and a row of the table have in common."""
    default = RETIRED | flatten(to_dict(load()))
    # Named apart, of the first step, of the pixels or of what is trained: the network is the same.
    others = {
        f"model.{key}"
        for key in ("arch", "zero_gamma", "weights", "mean", "std", "freeze", "freeze_epochs")
    }
    options = [
        f"{key}={value}"
        for key, value in sorted(flatten(settings).items())
        if key.startswith("model.") and key not in others and value != default.get(key, value)
    ]
    return " ".join([str(settings.get("model", {}).get("arch", "?")), *options])


def recorded(records: Path) -> dict[str, list[list[str]]]:
    """By `network_of`, a row for each recipe of each record: what it was trained on, its best top-1, the mean over seeds.

    A result's logs are called log.jsonl; a record's other logs are of what was tried on the way.
    """
    found: dict[str, list[list[str]]] = {}
    for record in sorted(path for path in records.glob("*") if path.is_dir()):
        runs = []
        for path in sorted(record.rglob(LOG)):
            # Of another format, or without an epoch: no number for this table.
            with suppress(RunError, UsageError):
                runs.append(read_run(path))
        finished = [run for run in runs if run.log.headers and run.log.summary is not None]
        for group in group_runs(finished):
            header = group.runs[0].log.headers[-1]
            trained_on = header.manifests.get("train", {})
            score = statistics.mean(best(run.log)[0] for run in group.runs)
            weights = group.runs[0].log.headers[0].weights
            seeds = {run.log.headers[-1].settings["training"]["seed"] for run in group.runs}
            row = [
                record.name,
                *(f"{trained_on.get(what) or 0:,}" for what in ("samples", "classes")),
                f"{len(group.runs[0].log.epochs)}",
                "/".join(Path(str(weights["file"])).parts[-2:]) if weights else "random weights",
                f"{score:.1%}",
                f"{len(seeds)}",
            ]
            found.setdefault(network_of(header.settings), []).append(row)
    return found

"""Evaluate weights on a .beton or a folder: top-1, top-5, loss, calibration, classes, confusions.

python -m ffcv_imnet evaluate --weights runs/rn18_16ep/best.pt --data data/beton/val.beton
python -m ffcv_imnet evaluate --weights model.onnx --data data/imagenet/val --out evaluated.json
torchrun --nproc_per_node=2 -m ffcv_imnet evaluate --weights W --data DATA

Weights are a checkpoint of this project, a state dict (torchvision, timm) or an ONNX file. By default
a checkpoint is evaluated as its run validated it, so that the log's number comes out again; other
weights as torchvision evaluates its own: shorter side to 256, centre 224, bilinear.
"""

import argparse
import datetime
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from ffcv_imnet.config import parsing
from ffcv_imnet.core import provenance
from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.errors import UsageError, in_range
from ffcv_imnet.core.paths import check_output, path_of, refuse_inputs
from ffcv_imnet.data.beton import Manifest, check_beton, manifest_path
from ffcv_imnet.data.folder_loader import FolderLoader
from ffcv_imnet.data.loader import ValLoader, workers_of
from ffcv_imnet.evaluate.metrics import collect_outcomes, score
from ffcv_imnet.evaluate.onnx_network import OnnxNetwork
from ffcv_imnet.evaluate.weights import (
    Network,
    add_options,
    class_names,
    load_from,
    match_classes,
    parse_preprocess,
)
from ffcv_imnet.images.folder import FOLDERS, SPLITS, ImageFolderTree
from ffcv_imnet.images.imagenet import readable
from ffcv_imnet.images.preprocess import Preprocess
from ffcv_imnet.machine.device import DTYPES, choose_precision
from ffcv_imnet.machine.distributed import (
    TIMEOUT,
    World,
    connect,
    describe_world,
    disconnect,
    together,
)
from ffcv_imnet.tools import ToolParser
from ffcv_imnet.train.validate import Loader

BATCH = 256
SIDE = in_range(int, 8, 4096)  # px
SHOWN = 10  # rows of classes and of confusions in the table; the JSON has all


def parser() -> ToolParser:
    """The command line."""
    options = ToolParser("evaluate", __doc__)
    add = options.add_argument
    add_options(options)
    add("--data", type=path_of, required=True, help="a .beton, or a folder with a folder a class")
    add(
        "--resolution", type=SIDE, nargs="+", metavar="PX", help="one or several sides of the input"
    )
    add("--resize", type=SIDE, metavar="PX", help="shorter side, instead of --crop_ratio")
    add("--tta", action="store_true", help="also with logits averaged over image and mirror image")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"],
        help="default: as the run trained; fp32 for other weights")  # fmt: skip
    add("--batch_size", type=in_range(int, 1), metavar="N",
        help=f"over all processes; default: the run's or {BATCH}")  # fmt: skip
    options.add_device()
    add("--num_workers", type=in_range(int, 1), metavar="N", help="decoding threads of one process")
    add("--out", type=path_of, metavar="FILE.json", help="write all numbers as JSON")
    return options


def main(argv: list[str]) -> int:
    """Evaluate, print the tables, write the JSON. Exit status 0."""
    options = parser().parse_args(argv)
    check_output("--out", options.out, ".json")
    if options.interpolation and not options.data.is_dir():
        raise UsageError("--interpolation is for folders: a .beton is resized by area averaging")
    beside = manifest_path(options.data) if options.data.is_file() else None
    refuse_inputs("--out", options.out, options.weights, options.data, beside)
    world = describe_world(options.device)
    network = load_from(options)
    hows = preprocessings(network, options)
    manifest = None if options.data.is_dir() else check_beton(options.data)
    classes = (manifest or ImageFolderTree(options.data, may_be_empty=True)).classes
    try:
        outputs = match_classes(network, classes, str(options.data))
    except UsageError as error:
        parts = [name for name in classes if name.casefold() in SPLITS]
        if manifest is not None or len(parts) < len(classes):
            raise
        part = next((name for name in parts if name in FOLDERS["val"]), parts[0])
        raise UsageError(f"{error}; name {options.data / part}") from None
    connect(world)
    precision = choose_arithmetic(network, options.precision, world)
    model = network.model.to(world.device)
    if not isinstance(model, OnnxNetwork):
        model = model.to(memory_format=torch.channels_last)
    names = class_names(network)
    if network.outputs == len(classes):  # the data's names, in the order of the outputs
        names = tuple(name for _, name in sorted(zip(outputs, classes, strict=True)))
    views = []
    try:
        for how in hows:
            loader = open_data(options, network, how, world, manifest)
            with together(world, TIMEOUT, "in the evaluation"):
                evaluated = collect_outcomes(
                    model, loader, world, DTYPES[precision], outputs, tta=options.tta,
                    what=f"{how.resolution} px",
                )  # fmt: skip
            for view, outcomes in evaluated.items():
                views.append({**asdict(how), "view": view, **score(outcomes, names)})
    finally:
        disconnect(world)
    if not world.is_main:
        return 0
    report = {
        "weights": str(options.weights), "network": network.origin, "data": str(options.data),
        "content_checksum": manifest.content_checksum if manifest else None, "classes": len(classes), "outputs": network.outputs,
        "precision": precision, "device": world.device_name(), "world_size": world.size,
        "versions": provenance.versions(), "git_commit": provenance.git_commit(),
        "evaluated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "views": views,
    }  # fmt: skip
    if options.out is not None:  # before a reader who has seen enough closes the output
        write_json({k: v for k, v in report.items() if v is not None}, options.out)
    print(describe(report))
    if options.out is not None:
        print(f"\nall numbers: {options.out}")
    return 0


def preprocessings(network: Network, options: argparse.Namespace) -> list[Preprocess]:
    """One for each resolution asked for. Raises UsageError."""
    hows = []
    for resolution in options.resolution or [None]:
        how = parse_preprocess(network, resolution, options)
        if options.resize is not None:
            if options.crop_ratio is not None or options.resize < how.resolution:
                raise UsageError(
                    f"--resize {options.resize}: at least the resolution {how.resolution}, and "
                    "without --crop_ratio"
                )
            how = replace(how, crop_ratio=how.resolution / options.resize)
        hows.append(how)
    return hows


def choose_arithmetic(network: Network, asked: str | None, world: World) -> str:
    """fp32, bf16 or fp16, with torch's switches as training sets them. Raises UsageError."""
    if isinstance(network.model, OnnxNetwork):
        if asked in ("bf16", "fp16"):
            raise UsageError(f"--precision {asked}: an ONNX file computes in its own precision")
        return "fp32"
    torch.backends.cudnn.benchmark = True
    if network.settings is not None and asked != "fp32":
        torch.set_float32_matmul_precision("high")
    asked = asked or (network.settings.training.precision if network.settings else "fp32")
    return choose_precision(asked, world.device)


def open_data(
    options: argparse.Namespace,
    network: Network,
    how: Preprocess,
    world: World,
    manifest: Manifest | None,
) -> Loader:
    """The loader of one resolution. `manifest` is the .beton's, None of a folder."""
    batch = options.batch_size or (
        network.settings.validation.batch_size if network.settings else BATCH
    )
    chosen = {
        "data__val_dataset": options.data, "validation__batch_size": batch,
        "validation__resolution": how.resolution, "validation__crop_ratio": repr(how.crop_ratio),
    }  # fmt: skip
    if options.num_workers is not None:
        chosen["data__num_workers"] = options.num_workers
    loading = parsing.load(**chosen)
    if manifest is None:
        return FolderLoader(
            options.data, how, batch, world, workers_of(loading.data.num_workers, world)
        )
    return ValLoader(str(options.data), manifest.samples, loading, world)


def describe(report: dict[str, Any]) -> str:
    """The report for a person: a row a view, then the first view's classes and confusions."""
    views = report["views"]
    columns = "px", "crop ratio", "view", "images", "top-1", "95 %", "top-5", "95 %", "loss", "ECE"
    rows = [
        (
            view["resolution"], f"{view['crop_ratio']:.3g}", view["view"], f"{view['images']:,}",
            f"{view['top_1']:.4f}", "{:.4f}-{:.4f}".format(*view["top_1_interval"]),
            f"{view['top_5']:.4f}", "{:.4f}-{:.4f}".format(*view["top_5_interval"]),
            f"{view['loss']:.4f}", f"{view['ece']:.4f}",
        )
        for view in views
    ]  # fmt: skip
    first = views[0]
    worst = sorted(first["per_class"], key=lambda row: row["top_1"])[:SHOWN]
    classes = [(f"{r['top_1']:.4f}", r["images"], readable(r["class"])) for r in worst]
    pairs = [
        (row["images"], readable(row["label"]), readable(row["prediction"]))
        for row in first["confused"][:SHOWN]
    ]
    few = len(first["per_class"]) <= SHOWN
    of = f"at {first['resolution']} px, view {first['view']}:\n" if len(views) > 1 else ""
    return "\n".join(
        [
            f"{report['weights']}: {report['network']}",
            f"{report['data']}: {report['classes']:,} classes; {report['precision']} on "
            f"{report['device']}, world size {report['world_size']}",
            "",
            tabulate(rows, columns, disable_numparse=True, stralign="right"),
            "",
            of
            + tabulate(classes, ("top-1", "images", "class" if few else f"{SHOWN} worst classes")),
            "",
            of
            + (
                tabulate(pairs, ("images", "most confused: label", "taken for"))
                if pairs
                else "no errors"
            ),
        ]
    )


def write_json(report: dict[str, Any], path: Path) -> None:
    """Whole or not at all. Raises RunError."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(report, indent=1, ensure_ascii=False) + "\n")

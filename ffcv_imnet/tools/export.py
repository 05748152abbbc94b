"""Write weights as one ONNX file that takes raw pixels, checked against PyTorch before it exists.

python -m ffcv_imnet export --weights runs/rn18_16ep/best.pt --out ship/model.onnx --data data/beton/val.beton

Beside it: labels.txt, and model.safetensors, a plain state dict (torchvision's own where the network
has no BlurPool). The input `input_0` is (batch, 3, side, side), RGB, 0 to 255; the output `output_0`
is (batch, classes), logits. deploy/README.md goes on from here.
"""

import argparse
import io
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffcv_imnet.core.atomic import atomic_write, partial_path, rename, written
from ffcv_imnet.core.errors import RunError, UsageError, in_range, reason_of
from ffcv_imnet.core.optional import EXPORT, require
from ffcv_imnet.core.paths import check_output, path_of, refuse_inputs
from ffcv_imnet.data.beton import check_beton, read_image, read_tables
from ffcv_imnet.evaluate.onnx_network import OnnxNetwork
from ffcv_imnet.evaluate.weights import (
    Network,
    add_options,
    class_names,
    load_from,
    match_classes,
    parse_preprocess,
)
from ffcv_imnet.images import Pixels, synthetic
from ffcv_imnet.images.folder import ImageFolderTree
from ffcv_imnet.images.imagenet import write_labels
from ffcv_imnet.images.pixels import BadImage, decode_rgb
from ffcv_imnet.images.preprocess import Preprocess, resize_and_crop
from ffcv_imnet.models import Normalize
from ffcv_imnet.tools import ToolParser

OPSETS = range(11, 21)  # 11: TensorRT 7; 20: the last of the exporter that can also write 13
TOLERANCE = 1e-4  # largest difference of a logit, over the largest logit (1 at least); fp32
GENERATED = 64  # images, where no images are given
BATCH = 32


def parser() -> ToolParser:
    """The command line."""
    options = ToolParser("export", __doc__)
    add = options.add_argument
    add_options(options)
    add("--out", type=path_of, required=True, metavar="MODEL.onnx", help="what to write")
    add(
        "--data",
        type=path_of,
        help="images to compare on: .beton or folder; default: generated",
    )
    add("--images", type=in_range(int, 1), default=256, metavar="N",
        help="at most so many (default: %(default)s)")  # fmt: skip
    options.add_former("--photos", "images", type=in_range(int, 1))
    add("--opset", type=in_range(int, OPSETS[0], OPSETS[-1]), default=13,
        help="of ONNX (default: %(default)s; TensorRT 8.0 and later read it)")  # fmt: skip
    add("--input", choices=["float", "uint8"], default="float",
        help="type of the pixels (default: %(default)s; uint8 needs TensorRT 10)")  # fmt: skip
    add("--batch", type=in_range(int, 1, 4096), default=1, metavar="N",
        help="static batch size (default: %(default)s)")  # fmt: skip
    add("--dynamic_batch", action="store_true", help="any batch size instead")
    add("--resolution", type=in_range(int, 8, 4096), metavar="PX",
        help="side of the input; default: as validated")  # fmt: skip
    return options


def main(argv: list[str]) -> int:
    """Export, compare, give the files their names. Exit status 0."""
    options = parser().parse_args(argv)
    check_output("--out", options.out, ".onnx")
    for path in (options.out, options.out.with_suffix(".safetensors")):
        refuse_inputs("--out", path, options.weights)
    for module in EXPORT.split():
        require(module, "export", EXPORT)
    network = load_from(options)
    if isinstance(network.model, OnnxNetwork):
        raise UsageError(f"--weights {options.weights} is an ONNX file already")
    how = parse_preprocess(network, options.resolution, options)
    out: Path = options.out
    labels = check_labels(out.with_name("labels.txt"), network)
    print(f"{options.weights}: {network.origin}")
    # All are read before the slow part.
    examples = np.stack(list(sample_images(options, network, how)))
    notes = notes_of(network, how)
    weights = out.with_suffix(".safetensors")
    try:
        write_onnx(network, how, options, notes, out)
        difference = compare(network.model, partial_path(out), examples)
        write_safetensors(network, notes, weights)
        if labels is not None:
            with atomic_write(out.with_name("labels.txt"), "w") as file:
                file.write(labels)
        for path in (weights, out):
            rename(partial_path(path), path)
    except BaseException:
        for path in (out, weights):
            partial_path(path).unlink(missing_ok=True)
        raise
    what = f"images of {options.data}" if options.data else "generated images"
    print(
        f"ONNX Runtime gives PyTorch's logits on {len(examples)} {what}: largest difference "
        f"{difference:.1e} (tolerance {TOLERANCE:g}) of the largest logit, all top-1 the same"
    )
    describe(out, network, how, options)
    return 0


def check_labels(path: Path, network: Network) -> str | None:
    """The text for labels.txt, None if it is there already. Raises UsageError for another one's."""
    text = write_labels(class_names(network))
    if not path.exists():
        return text
    if path.is_file() and path.read_bytes() == text.encode():
        return None
    raise UsageError(f"{path} has the classes of another network: choose another folder for --out")


def notes_of(network: Network, how: Preprocess) -> dict[str, Any]:
    """What a reader of the files needs besides the numbers; `load_network` reads it back."""
    layer = network.model[0] if isinstance(network.model, torch.nn.Sequential) else None
    assert isinstance(layer, Normalize)
    return {
        "classes": class_names(network),
        "arch": network.arch,
        "blurpool": network.uses_blurpool,
        "resolution": how.resolution,
        "crop_ratio": how.crop_ratio,
        "interpolation": how.interpolation,
        "mean": layer.mean.flatten().tolist(),
        "std": layer.std.flatten().tolist(),
    }


# ---- writing ------------------------------------------------------------------------------------


def write_onnx(
    network: Network,
    how: Preprocess,
    options: argparse.Namespace,
    notes: dict[str, Any],
    path: Path,
) -> None:
    """The graph with BatchNorm folded, checked by onnx, under `path`'s temporary name.

    By torch's TorchScript exporter: the newer one starts at opset 18 and converts downwards, and
    needs two more packages.
    """
    import onnx

    dtype = torch.uint8 if options.input == "uint8" else torch.float32
    example = torch.zeros(options.batch, 3, how.resolution, how.resolution, dtype=dtype)
    axes = {"input_0": {0: "batch"}, "output_0": {0: "batch"}} if options.dynamic_batch else None
    buffer: Any = io.BytesIO()  # the exporter writes to files too, which its types deny
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of the other, and traced shapes
            torch.onnx.export(
                network.model, (example,), buffer, opset_version=options.opset, dynamo=False,
                input_names=["input_0"], output_names=["output_0"], dynamic_axes=axes,
            )  # fmt: skip
        graph = onnx.load_from_string(buffer.getvalue())
        constants_to_initializers(graph.graph)
        for key, value in notes.items():
            graph.metadata_props.add(key=f"ffcv_imnet.{key}", value=json.dumps(value))
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # of torch's exporter and onnx's checker, both of many kinds
        raise RunError(
            f"{options.weights}: cannot be exported at opset {options.opset} ({reason_of(error)})"
        ) from error
    with written(path) as file:
        file.write(graph.SerializeToString())


def constants_to_initializers(graph: Any) -> None:
    """Blur kernels, mean and deviation as weights: the form in which every parser knows them."""
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        tensor = next((a.t for a in node.attribute if a.name == "value"), None)
        if tensor is not None:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            graph.node.remove(node)


def write_safetensors(network: Network, notes: dict[str, Any], path: Path) -> None:
    """The state dict without our first layer, under the network's own names; `path` as above."""
    from safetensors.torch import save as serialise

    assert isinstance(network.model, torch.nn.Sequential)
    state = {key: value.contiguous() for key, value in network.model[1].state_dict().items()}
    text = {f"ffcv_imnet.{key}": json.dumps(value) for key, value in notes.items()}
    with written(path) as file:
        file.write(serialise(state, {"format": "pt", **text}))


# ---- comparing ----------------------------------------------------------------------------------


def sample_images(
    options: argparse.Namespace, network: Network, how: Preprocess
) -> Iterator[Pixels]:
    """(side, side, 3) uint8 each: spread evenly over --data, or drawn. Raises RunError, UsageError."""
    data: Path | None = options.data
    if data is None:
        for index in range(GENERATED):
            drawn = synthetic.draw(index % len(synthetic.CLASSES), (index,), (320, 256))
            yield resize_and_crop(np.asarray(drawn), how)
        return
    if data.is_dir():
        tree = ImageFolderTree(data)
        classes, total = tree.classes, len(tree)
        read: Callable[[int], Pixels] = lambda index: decode_rgb(tree.read(index)[0])  # noqa: E731
        name: Callable[[int], str] = lambda index: f"{tree.where}/{tree.name(index)}"  # noqa: E731
    else:
        classes, tables = check_beton(data).classes, read_tables(data)
        total, read = len(tables.labels), partial(read_image, data, tables)
        name = f"sample {{}} of {data}".format
    match_classes(network, classes, str(data))
    count = min(options.images, total)
    for index in (number * total // count for number in range(count)):
        try:
            yield resize_and_crop(read(index), how)
        except (OSError, BadImage) as error:
            raise RunError(f"{name(index)}: the image cannot be read ({error})") from error


@torch.no_grad()
def compare(model: torch.nn.Module, path: Path, examples: Pixels) -> float:
    """Largest difference of a logit between PyTorch and ONNX Runtime, over the largest logit.

    Args:
        examples: (N, side, side, 3) uint8.

    Raises:
        RunError: it exceeds `TOLERANCE`, or a top-1 differs.
    """
    shipped = OnnxNetwork(path)
    largest, worst, changed = 1.0, 0.0, 0
    for start in itertools.count(0, BATCH):
        part = examples[start : start + BATCH]
        if not len(part):
            break
        pixels = torch.from_numpy(np.ascontiguousarray(part.transpose(0, 3, 1, 2)))
        ours, theirs = model(pixels), shipped(pixels)
        largest = max(largest, float(ours.abs().max()))
        worst = max(worst, float((ours - theirs).abs().max()))
        worst = worst if (ours.isfinite() & theirs.isfinite()).all() else float("inf")
        changed += int((ours.argmax(1) != theirs.argmax(1)).sum())
    if not worst / largest <= TOLERANCE or changed:
        raise RunError(
            f"ONNX Runtime does not reproduce PyTorch: largest difference {worst / largest:.1e} of the "
            f"largest logit (tolerance {TOLERANCE:g}), {changed} of {len(examples)} top-1 differ; "
            "nothing was written"
        )
    return worst / largest


def describe(out: Path, network: Network, how: Preprocess, options: argparse.Namespace) -> None:
    """What lies where, and what it takes."""
    batch = "N" if options.dynamic_batch else options.batch
    shape = f"({batch}, 3, {how.resolution}, {how.resolution})"
    weights = out.with_suffix(".safetensors")
    whose = (
        "for evaluate and predict" if network.uses_blurpool
        else f"plain state dict of {network.arch}"
    )  # fmt: skip
    print(
        f"  {out}  input_0 {options.input} {shape}, output_0 ({batch}, {network.outputs}), "
        f"opset {options.opset}, {out.stat().st_size / 1e6:.1f} MB\n"
        f"  {out.with_name('labels.txt')}  {network.outputs} classes\n"
        f"  {weights}  {whose}\n"
        f"pixels: shorter side to {how.resize} px ({how.interpolation}), centre {how.resolution} px, "
        "RGB, 0 to 255\n"
        f"for deploy/evaluate_onnx.py with an engine: --crop_ratio {how.crop_ratio:g}"
        f" --interpolation {how.interpolation}"
    )

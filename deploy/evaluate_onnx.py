"""Evaluate an exported network on an ImageFolder tree, on the device: accuracy and speed.

    python3 evaluate_onnx.py --model model.onnx --data val             ONNX Runtime
    python3 evaluate_onnx.py --model model.engine --data val           TensorRT, an engine of trtexec
    python3 evaluate_onnx.py --model model.onnx --image photo.jpg      the five likeliest classes

Needs numpy, Pillow and onnxruntime or TensorRT; Python 3.6 or newer, so that it runs on JetPack 4 too.
Copy it with model.onnx and labels.txt. Exit status: 0 done, 1 the work failed, 2 wrong usage.
"""

import argparse
import ctypes
import io
import json
import math
import os
import re
import sys
import time
import warnings
from typing import Any, Dict, List, NoReturn, Optional, Tuple

import numpy as np
from PIL import Image

Array = Any  # numpy's types cannot be named in the versions that JetPack 4 has
PILLOW = Image  # type: Any  # its constants moved into enums in 9.1, and are still found here
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
INTERPOLATIONS = {
    "bilinear": PILLOW.BILINEAR,
    "bicubic": PILLOW.BICUBIC,
    "box": PILLOW.BOX,
    "lanczos": PILLOW.LANCZOS,
}
ENGINES = (".engine", ".plan", ".trt")
ORIENTATION = 0x0112  # the EXIF tag; what undoes each of its values
UPRIGHT = {
    2: PILLOW.FLIP_LEFT_RIGHT,
    3: PILLOW.ROTATE_180,
    4: PILLOW.FLIP_TOP_BOTTOM,
    5: PILLOW.TRANSPOSE,
    6: PILLOW.ROTATE_270,
    7: PILLOW.TRANSVERSE,
    8: PILLOW.ROTATE_90,
}
WNID = re.compile(r"(n\d{8}) .+")  # a line of labels.txt for a class of ImageNet: id, then its name


class Failure(Exception):
    """One clear line and an exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def in_range(kind: type, low: float, high: float = float("inf")) -> Any:
    """An argparse type: a number of `kind` from `low` to `high`."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            span = "at least %g" % low if math.isinf(high) else "from %g to %g" % (low, high)
            raise argparse.ArgumentTypeError("%s is not %s" % (text, span))
        return value

    convert.__name__ = kind.__name__  # for argparse's "invalid int value"
    return convert


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        raise Failure(message, 2)


# ---- pixels -------------------------------------------------------------------------------------


def decode(data: bytes) -> Image.Image:
    """An image upright and in RGB, whatever its kind: 16-bit and floating-point grayscale scaled to 8
    bits, what is transparent laid on white."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # type: Any
        image.load()
        try:
            method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
        except Exception:  # damaged EXIF: the pixels as they lie
            method = None
        if method is not None:
            image = image.transpose(method)
        if image.mode == "F" or image.mode.startswith("I"):
            wide = np.asarray(image).astype(np.float64)
            scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
            white = next((scale for scale in scales if wide.max() <= scale), None)
            if white is None or not wide.min() >= 0:
                raise ValueError("its values are not from 0 to 65535")
            image = Image.fromarray(np.floor(wide * (255 / white) + 0.5).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")


def preprocess(data: bytes, side: int, crop_ratio: float, interpolation: str) -> Array:
    """Shorter side to round(side / crop_ratio), central crop: (side, side, 3) uint8.

    torchvision's Resize and CenterCrop on a PIL image.
    """
    image = decode(data)
    width, height = image.size
    short = max(side, round(side / crop_ratio))
    if width <= height:
        size = (short, int(short * height / width))
    else:
        size = (int(short * width / height), short)
    image = image.resize(size, INTERPOLATIONS[interpolation])
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)))


# ---- networks -----------------------------------------------------------------------------------


class OnnxModel:
    """`model.onnx` by ONNX Runtime: CUDA where its build has it, else the CPU, or --provider."""

    def __init__(self, path: str, provider: Optional[str]) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise Failure("onnxruntime is missing: pip3 install onnxruntime", 2) from None
        onnxruntime.set_default_logger_severity(3)
        able = onnxruntime.get_available_providers()
        wanted = (
            ["CUDAExecutionProvider", "CPUExecutionProvider"] if provider is None else [provider]
        )
        chosen = [name for name in wanted if name in able]
        if not chosen:
            raise Failure("this onnxruntime has no %s, only %s" % (provider, ", ".join(able)), 2)
        try:
            self.session = onnxruntime.InferenceSession(path, providers=chosen)
        except Exception as error:
            raise Failure(
                "%s: ONNX Runtime cannot load it (%s)" % (path, first_line(error))
            ) from error
        source, target = self.session.get_inputs()[0], self.session.get_outputs()[0]
        self.path, self.names = path, (source.name, target.name)
        self.shape = [n if isinstance(n, int) else None for n in source.shape]
        types = {"tensor(uint8)": "u1", "tensor(float)": "f4"}
        if source.type not in types:
            raise Failure("%s: its input is %s, expected float or uint8" % (path, source.type), 2)
        self.dtype = np.dtype(types[source.type])
        found = self.session.get_modelmeta().custom_metadata_map
        try:
            self.notes = {
                key[len("ffcv_imnet.") :]: json.loads(value)
                for key, value in found.items()
                if key.startswith("ffcv_imnet.")
            }  # type: Dict[str, Any]
        except ValueError as error:
            raise Failure("%s: its metadata are damaged (%s)" % (path, error)) from error
        self.runs_on = "ONNX Runtime %s, %s" % (
            onnxruntime.__version__, self.session.get_providers()[0],
        )  # fmt: skip

    def __call__(self, pixels: Array) -> Array:
        """(N, 3, side, side) -> (N, classes)."""
        try:
            return self.session.run([self.names[1]], {self.names[0]: pixels})[0]
        except Exception as error:
            raise Failure(
                "%s: ONNX Runtime failed (%s)" % (self.path, first_line(error))
            ) from error


class CudaMemory:
    """The four calls of CUDA that an engine needs, so that pycuda need not be built."""

    def __init__(self) -> None:
        for name in ("libcudart.so", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so.10.2"):
            try:
                self.library = ctypes.CDLL(name)
                return
            except OSError:
                continue
        raise Failure("libcudart.so is not found: add CUDA's lib64 to LD_LIBRARY_PATH", 2)

    def check(self, status: int, what: str) -> None:
        """Raises Failure for a status other than 0."""
        if status:
            raise Failure("CUDA: %s failed with error %d" % (what, status))

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes; freed when the process ends."""
        address = ctypes.c_void_p()
        self.check(
            self.library.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size)), "cudaMalloc"
        )
        return int(address.value or 0)

    def copy(self, target: int, source: int, size: int, to_device: bool) -> None:
        """Waits until it is done."""
        kind = 1 if to_device else 2
        status = self.library.cudaMemcpy(
            ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), kind
        )
        self.check(status, "cudaMemcpy")


class EngineModel:
    """A static engine that trtexec built. TensorRT 8 to 10: binding indices are gone in 10."""

    def __init__(self, path: str) -> None:
        try:
            import tensorrt
        except ImportError:
            raise Failure("an engine needs TensorRT's Python package (JetPack has it)", 2) from None
        self.memory = CudaMemory()
        with open(path, "rb") as file:
            data = file.read()
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise Failure(
                "%s: TensorRT %s cannot load it; engines are bound to device and version: build it "
                "here with trtexec" % (path, tensorrt.__version__)
            )
        if hasattr(engine, "num_io_tensors"):
            names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
            shapes = [tuple(engine.get_tensor_shape(name)) for name in names]
            types = [engine.get_tensor_dtype(name) for name in names]
        else:
            names = [engine.get_binding_name(i) for i in range(engine.num_bindings)]
            shapes = [tuple(engine.get_binding_shape(i)) for i in range(engine.num_bindings)]
            types = [engine.get_binding_dtype(i) for i in range(engine.num_bindings)]
        if sorted(names) != ["input_0", "output_0"] or min(map(min, shapes)) < 1:
            raise Failure("%s: expected input_0 and output_0 of static shape" % path)
        self.order = names
        self.context = engine.create_execution_context()
        self.engine, self.runtime = engine, runtime  # they must outlive the context
        place = names.index("input_0")
        self.shape = list(shapes[place])  # type: List[Optional[int]]
        self.dtype = np.dtype(tensorrt.nptype(types[place]))
        self.output = np.zeros(shapes[1 - place], tensorrt.nptype(types[1 - place]))
        size = int(np.prod(shapes[place])) * self.dtype.itemsize
        self.addresses = {
            "input_0": self.memory.allocate(size),
            "output_0": self.memory.allocate(self.output.nbytes),
        }
        self.notes = {}  # type: Dict[str, Any]
        self.runs_on = "TensorRT %s" % tensorrt.__version__

    def __call__(self, pixels: Array) -> Array:
        """(N, 3, side, side) -> (N, classes)."""
        pixels = np.ascontiguousarray(pixels)
        self.memory.copy(self.addresses["input_0"], pixels.ctypes.data, pixels.nbytes, True)
        if not self.context.execute_v2([self.addresses[name] for name in self.order]):
            raise Failure("TensorRT could not execute the engine")
        target = self.output.ctypes.data
        self.memory.copy(target, self.addresses["output_0"], self.output.nbytes, False)
        return self.output.astype(np.float32)


# ---- data ---------------------------------------------------------------------------------------


def read_labels(path: str, whole: bool = False) -> List[str]:
    """Class names in index order: the first word of a line `n01440764 tench`, else, or where `whole`, the line."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # Windows may mark it
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Failure(
            "%s cannot be read (%s); name it with --labels" % (path, reason), 2
        ) from error
    if whole:
        return lines
    matches = [WNID.match(line) for line in lines]
    return [found.group(1) if found else line for line, found in zip(lines, matches)]


def list_images(root: str, labels: List[str]) -> List[Tuple[str, int]]:
    """Paths with the network's output for their class, folder by folder."""
    if not os.path.isdir(root):
        raise Failure("--data %s: no such folder" % root, 2)
    index = {name: i for i, name in enumerate(labels)}
    found = []
    for name in sorted(os.listdir(root)):
        if not os.path.isdir(os.path.join(root, name)):
            continue
        if name not in index:
            raise Failure(
                "%s has a class %r that is not among the %d of the labels"
                % (root, name, len(labels)),
                2,
            )
        for folder, _, files in sorted(os.walk(os.path.join(root, name), followlinks=True)):
            found += [
                (os.path.join(folder, file), index[name])
                for file in sorted(files)
                if file.lower().endswith(EXTENSIONS)
            ]
    if not found:
        raise Failure("%s: no images; expected %s/<class>/*.jpg" % (root, root), 2)
    return found


def load(path: str, side: int, crop_ratio: float, interpolation: str) -> Array:
    """One image, (side, side, 3) uint8."""
    try:
        with open(path, "rb") as file:
            return preprocess(file.read(), side, crop_ratio, interpolation)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise Failure("%s: the image cannot be read (%s)" % (path, first_line(error))) from error


def first_line(error: BaseException) -> str:
    """What another library complains about, cut to a line."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (
        "no image" if text.startswith("cannot identify image file") else text
    )  # the rest: an address


# ---- evaluation ---------------------------------------------------------------------------------


def evaluate(
    model: Any, images: List[Tuple[str, int]], batch: int, options: Tuple[int, float, str]
) -> Dict[str, float]:
    """Counts, losses and times over all images; the last batch is filled up with black."""
    side = options[0]
    warm_up = np.zeros((batch, 3, side, side), model.dtype)
    for _ in range(5):  # clocks rise, memory is allocated
        model(warm_up)
    first = five = 0
    loss = decoding = 0.0
    seconds = []  # type: List[float]
    started = shown = time.perf_counter()
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        asked = time.perf_counter()
        pixels = np.zeros((batch, 3, side, side), model.dtype)
        for slot, (path, _) in enumerate(part):
            pixels[slot] = load(path, *options).transpose(2, 0, 1)
        decoding += time.perf_counter() - asked
        asked = time.perf_counter()
        logits = model(pixels)
        seconds.append(time.perf_counter() - asked)
        logits = logits[: len(part)].astype(np.float64)
        if not np.isfinite(logits).all():
            raise Failure("the network gives NaN or infinite values")
        labels = np.array([label for _, label in part])
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        first += int((best[:, 0] == labels).sum())
        five += int((best == labels[:, None]).any(axis=1).sum())
        top = logits.max(axis=1)
        norm = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        loss += float((norm - logits[np.arange(len(part)), labels]).sum())
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print("%d of %d images" % (start + len(part), len(images)), file=sys.stderr)
    count = len(images)
    spent = time.perf_counter() - started
    result = {
        "images": count, "top_1": first / count, "top_5": five / count, "loss": loss / count,
        "images_per_second": count / spent, "network_images_per_second": count / sum(seconds),
        "preprocessing_ms_per_image": 1000 * decoding / count,
    }  # fmt: skip
    for percent in (50, 90, 99):
        result["latency_ms_p%d" % percent] = 1000 * percentile(seconds, percent)
    return result


def name(
    model: Any, paths: List[str], labels: List[str], batch: int, options: Tuple[int, float, str]
) -> None:
    """Print the five likeliest classes of each image, with their probabilities. Raises Failure, at the end, if one
    cannot be read."""
    bad = 0
    for path in paths:
        pixels = np.zeros((batch, 3, options[0], options[0]), model.dtype)
        try:
            pixels[0] = load(path, *options).transpose(2, 0, 1)
        except Failure as failure:
            bad += 1
            print("error: %s" % failure, file=sys.stderr)
            continue
        logits = model(pixels)[0].astype(np.float64)
        if not np.isfinite(logits).all():
            raise Failure("the network gives NaN or infinite values")
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        lines = [path]
        for index in np.argsort(-shares, kind="stable")[:5]:
            lines.append("  %.4f  %s" % (shares[index], labels[index]))
        text, encoding = "\n".join(lines), sys.stdout.encoding or "ascii"
        # JetPack 4's may be ASCII.
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    if bad:
        raise Failure("%d of %d images cannot be read" % (bad, len(paths)))


def percentile(values: List[float], percent: int) -> float:
    """The smallest value that `percent` of them do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The command line. Raises Failure."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="model.onnx, or an engine of trtexec")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="a folder with a folder of images a class")
    what.add_argument("--image", nargs="+", metavar="FILE", help="name what is on these images")
    parser.add_argument("--labels", help="default: labels.txt beside the model")
    parser.add_argument(
        "--crop_ratio",
        type=in_range(float, 0.01, 1),
        help="default: noted in the .onnx, else 0.875",
    )
    parser.add_argument("--interpolation", choices=sorted(INTERPOLATIONS),
                        help="default: noted in the .onnx, else bilinear")  # fmt: skip
    parser.add_argument("--batch", type=in_range(int, 1), help="of a dynamic model (default: 1)")
    parser.add_argument("--provider", help="of ONNX Runtime, for instance CPUExecutionProvider")
    parser.add_argument(
        "--limit", type=in_range(int, 1), help="only every k-th image, so many in all"
    )
    parser.add_argument("--json", help="write the numbers to this file too")
    options = parser.parse_args(argv)
    if not os.path.isfile(options.model):
        raise Failure("--model %s: no such file" % options.model, 2)
    if not options.model.endswith((".onnx", *ENGINES)):
        raise Failure("--model %s: expected .onnx, or %s" % (options.model, ", ".join(ENGINES)), 2)
    if options.image and (options.json or options.limit):
        raise Failure("--json and --limit go with --data, not with --image", 2)
    if options.json and not options.json.endswith(".json"):
        raise Failure("--json %s: its name must end in .json" % options.json, 2)
    if options.json and not os.path.isdir(os.path.dirname(options.json) or "."):
        raise Failure("--json %s: its folder does not exist" % options.json, 2)
    return options


def main(argv: Optional[List[str]] = None) -> None:
    """Evaluate, or name what is on images, and print. Raises Failure."""
    options = parse(argv)
    labels_path = options.labels or os.path.join(os.path.dirname(options.model), "labels.txt")
    labels = read_labels(labels_path)
    images = list_images(options.data, labels) if options.data else []
    if options.limit and options.limit < len(images):
        chosen = range(options.limit)
        images = [images[i * len(images) // options.limit] for i in chosen]
    is_onnx = options.model.endswith(".onnx")
    model = OnnxModel(options.model, options.provider) if is_onnx else EngineModel(options.model)  # type: Any
    if len(model.shape) != 4 or model.shape[1] != 3:
        raise Failure("%s: its input is not (batch, 3, side, side)" % options.model, 2)
    side = model.shape[2] or model.notes.get("resolution")
    if not side:
        raise Failure("%s: its input has no fixed size" % options.model, 2)
    crop_ratio = options.crop_ratio or model.notes.get("crop_ratio", 0.875)
    interpolation = options.interpolation or model.notes.get("interpolation", "bilinear")
    batch = model.shape[0] or options.batch or 1
    if options.batch and batch != options.batch:
        raise Failure("--batch %d: %s takes %d" % (options.batch, options.model, batch), 2)
    outputs = model(np.zeros((batch, 3, side, side), model.dtype)).shape[1]
    if outputs != len(labels):
        raise Failure(
            "%s has %d outputs and %s %d classes"
            % (options.model, outputs, labels_path, len(labels)),
            2,
        )
    if options.image:
        name(
            model,
            options.image,
            read_labels(labels_path, True),
            batch,
            (side, crop_ratio, interpolation),
        )
        return
    result = evaluate(model, images, batch, (side, crop_ratio, interpolation))
    print(
        "%s: %s, batch %d, %s\npixels: shorter side to %d px (%s), centre %d px"
        % (options.model, model.runs_on, batch, model.dtype, max(side, round(side / crop_ratio)),
           interpolation, side)
    )  # fmt: skip
    print(describe(result, batch))
    if options.json:
        with open(options.json + ".partial", "w") as file:
            json.dump(result, file, indent=1)
        os.replace(options.json + ".partial", options.json)


def describe(result: Dict[str, float], batch: int) -> str:
    """The numbers for a person."""
    return (
        "images %d   top-1 %.4f   top-5 %.4f   loss %.4f\n"
        "latency of a batch of %d: p50 %.2f ms, p90 %.2f ms, p99 %.2f ms\n"
        "network alone %.1f images/s; with reading and resizing %.1f images/s (%.2f ms an image)"
        % (
            result["images"], result["top_1"], result["top_5"], result["loss"],
            batch, result["latency_ms_p50"], result["latency_ms_p90"], result["latency_ms_p99"],
            result["network_images_per_second"], result["images_per_second"],
            result["preprocessing_ms_per_image"],
        )
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        print("error: %s" % failure, file=sys.stderr)
        sys.exit(failure.status)
    except OSError as error:  # a full disk, a file without permission: names its path itself
        print("error: %s" % error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)

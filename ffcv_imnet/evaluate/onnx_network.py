"""An ONNX file as a network, run by ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ffcv_imnet.core.bounded import SPARE, memory_at_most
from ffcv_imnet.core.errors import RunError, UsageError, reason_of
from ffcv_imnet.core.optional import EXPORT, require
from ffcv_imnet.images.notes import read_notes
from ffcv_imnet.machine.distributed import read_ranks
from ffcv_imnet.machine.host import usable_cores

INPUT_TYPES: dict[str, Any] = {"tensor(float)": np.dtype("f4"), "tensor(uint8)": np.dtype("u1")}


def runtime() -> Any:
    """The onnxruntime package, which is optional. Raises UsageError if it is not installed."""
    onnxruntime = require("onnxruntime", "reading an ONNX file", EXPORT)
    onnxruntime.set_default_logger_severity(3)  # errors: its warnings speak to its developers
    return onnxruntime


class OnnxNetwork(nn.Module):
    """Pixels to logits. A static batch size is met by cutting and filling up.

    Args:
        path: the file, with one input (N, 3, H, W) of float32 or uint8 and one output (N, classes).
        mean, std: subtracted and divided by before the network, in units of 0 to 255; None if the
            graph takes raw pixels.

    Raises:
        UsageError: onnxruntime is missing, or the network is not an image classifier.
        RunError: the file is damaged.
    """

    def __init__(
        self,
        path: Path,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        ort = runtime()
        options = ort.SessionOptions()
        # Not torch's number: importing ffcv leaves torch with one thread.
        options.intra_op_num_threads = max(1, usable_cores() // read_ranks().local_size)
        try:
            # Constants that it computes when it is loaded may claim any size.
            with memory_at_most(
                4 * path.stat().st_size + SPARE, threads=options.intra_op_num_threads
            ):
                self.session = ort.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:  # a class of its own for every kind of damage
            raise RunError(f"{path}: ONNX Runtime cannot load it ({reason_of(error)})") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3 or len(outputs[0].shape) != 2:
            raise UsageError(f"{path}: not a classifier of images (N, 3, H, W)")
        if inputs[0].type not in INPUT_TYPES:
            raise UsageError(f"{path}: its input is {inputs[0].type}, expected float or uint8")
        self.path, self.dtype = path, INPUT_TYPES[inputs[0].type]
        self.input, self.output = inputs[0].name, outputs[0].name
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.resolution = shape[2] if isinstance(shape[2], int) else None
        classes = outputs[0].shape[1]
        side = self.resolution or 224
        self.mean = None if mean is None else np.array(mean, "f4").reshape(1, -1, 1, 1)
        self.std = None if std is None else np.array(std, "f4").reshape(1, -1, 1, 1)
        if not isinstance(classes, int):
            classes = self(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[1]
        self.outputs: int = classes

    def notes(self) -> dict[str, Any]:
        """What `export` noted in the file: classes, crop ratio, interpolation; else empty."""
        try:
            return read_notes(self.session.get_modelmeta().custom_metadata_map)
        except ValueError as error:
            raise RunError(f"{self.path}: {reason_of(error)}") from None

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 pixels -> (N, classes) float32, on the device of `images`."""
        pixels = np.ascontiguousarray(images.cpu().numpy())
        if self.mean is not None:
            pixels = (pixels.astype("f4") - self.mean) / self.std
        pixels = pixels.astype(self.dtype, copy=False)
        count, batch = len(pixels), self.batch or len(pixels)
        parts = []
        for first in range(0, count, batch):
            part = pixels[first : first + batch]
            if len(part) < batch:
                part = np.concatenate(
                    [part, np.zeros_like(pixels[:1]).repeat(batch - len(part), 0)]
                )
            try:
                parts.append(self.session.run([self.output], {self.input: part})[0])
            except Exception as error:
                raise RunError(f"{self.path}: ONNX Runtime failed ({reason_of(error)})") from error
        logits = np.concatenate(parts)[:count].astype("f4", copy=False)
        return torch.from_numpy(logits).to(images.device)

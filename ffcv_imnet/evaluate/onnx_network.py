"""An ONNX file as a network, run by ONNX Runtime on the CPU, in a process whose memory and time are bounded."""

import contextlib
import math
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ffcv_imnet.core.errors import RunError, reason_of
from ffcv_imnet.core.names import quoted
from ffcv_imnet.core.optional import EXPORT, require
from ffcv_imnet.evaluate import onnx_worker
from ffcv_imnet.evaluate.onnx_worker import AT_ONCE
from ffcv_imnet.images.notes import read_notes
from ffcv_imnet.machine.distributed import read_ranks
from ffcv_imnet.machine.host import usable_cores

INPUT_TYPES: dict[str, Any] = {"tensor(float)": np.dtype("f4"), "tensor(uint8)": np.dtype("u1")}
SECONDS = (
    60  # of processor time to load the file, and to compute an image (AT_ONCE of a batch count)
)
MOST_NUMBERS = 1 << 27  # of a batch: 891 images of 224 px; as float32 half a GB
MEMORY = "it takes more memory than 1 GB and four times the file"  # see onnx_worker.ROOM
PATIENCE = 20  # times as long by the clock, for a process that waits for what never comes


class OnnxNetwork(nn.Module):
    """Pixels to logits. A static batch size is met by cutting and filling up.

    Args:
        path: the file, with one input (N, 3, H, W) of float32 or uint8 and one output (N, classes).
        mean, std: subtracted and divided by before the network, in units of 0 to 255; None if the
            graph takes raw pixels.

    Raises:
        UsageError: onnx or onnxruntime is missing.
        RunError: the file is damaged or no image classifier, or takes more memory or time than it may.
    """

    def __init__(
        self,
        path: Path,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        for module in ("onnxruntime", "onnx"):
            require(module, "reading an ONNX file", EXPORT)
        self._worker = Worker(path)
        said = self._worker.description
        (source, *more), target = said["inputs"] or [{"shape": []}], said["outputs"][0]
        shape = source["shape"]
        if more or len(shape) != 4 or shape[1] != 3 or len(target["shape"]) != 2:
            raise RunError(f"{path}: not a classifier of images (N, 3, H, W)")
        if source["type"] not in INPUT_TYPES:
            raise RunError(f"{path}: its input is {source['type']}, expected float or uint8")
        if math.prod(side for side in shape if isinstance(side, int)) > MOST_NUMBERS:
            raise RunError(
                f"{path}: its input has {quoted(shape)} numbers, {MOST_NUMBERS:,} at most"
            )
        self.path, self.dtype = path, INPUT_TYPES[source["type"]]
        self.input, self.output = source["name"], target["name"]
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.resolution = shape[2] if isinstance(shape[2], int) else None
        classes = target["shape"][1]
        side = self.resolution or 224
        self.mean = None if mean is None else np.array(mean, "f4").reshape(1, -1, 1, 1)
        self.std = None if std is None else np.array(std, "f4").reshape(1, -1, 1, 1)
        if not isinstance(classes, int):
            classes = self(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[1]
        self.outputs: int = classes

    def notes(self) -> dict[str, Any]:
        """What `export` noted in the file: classes, crop ratio, interpolation; else empty."""
        try:
            return read_notes(self._worker.description["notes"])
        except ValueError as error:
            raise RunError(f"{self.path}: {reason_of(error)}") from None

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 pixels -> (N, classes) float32, on the device of `images`."""
        pixels = np.ascontiguousarray(images.cpu().numpy())
        if self.mean is not None:
            pixels = (pixels.astype("f4") - self.mean) / self.std
        pixels = pixels.astype(self.dtype, copy=False)
        count, most = len(pixels), self.batch or AT_ONCE
        parts = []
        for first in range(0, count, most):
            part = pixels[first : first + most]
            if self.batch and len(part) < self.batch:
                part = np.concatenate(
                    [part, np.zeros_like(pixels[:1]).repeat(self.batch - len(part), 0)]
                )
            parts.append(self._worker.run(self.input, self.output, part))
        logits = np.concatenate(parts)[:count]
        return torch.from_numpy(logits).to(images.device)


class Worker:
    """The process that runs the file, until this object is gone. Raises RunError where it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Not torch's number of threads: importing ffcv leaves torch with one.
        threads = max(1, usable_cores() // read_ranks().local_size)
        seconds = SECONDS + SECONDS * (path.stat().st_size >> 30)
        words = [onnx_worker.__file__, path.absolute(), threads, seconds]
        self.process = subprocess.Popen(
            [sys.executable, "-P", *map(str, words)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._late = threading.Event()
        weakref.finalize(self, _end, self.process)
        self.description = self._answer("load it", seconds)[0]

    def run(self, source: str, target: str, images: np.ndarray) -> np.ndarray:
        """One batch -> (N, classes) float32. Raises RunError."""
        seconds = SECONDS * min(len(images), AT_ONCE)
        head = {"input": source, "output": target, "seconds": seconds,
                "dtype": str(images.dtype), "shape": images.shape}  # fmt: skip
        said, data = self._answer("run it", seconds, head, images.tobytes())
        return np.frombuffer(bytearray(data), "f4").reshape(said["shape"])

    def _answer(
        self, what: str, seconds: int, head: dict[str, Any] | None = None, data: bytes = b""
    ) -> tuple[dict[str, Any], bytes]:
        """Ask, if there is a question, and wait for the answer."""
        process = self.process
        assert process.stdin and process.stdout
        clock = threading.Timer(PATIENCE * seconds, self._give_up)
        clock.daemon = True
        clock.start()
        try:
            if head is not None:
                onnx_worker.send(process.stdin, head, data)
            said, data = onnx_worker.receive(process.stdout)
        except (OSError, EOFError):
            why = self._why(seconds)
            raise RunError(f"{self.path}: ONNX Runtime cannot {what} ({why})") from None
        finally:
            clock.cancel()
        if "error" not in said:
            return said, data
        if said["ours"]:
            raise RunError(f"{self.path}: {said['error']}")
        reason = MEMORY if said["memory"] else said["error"]
        raise RunError(f"{self.path}: ONNX Runtime cannot {what} ({reason})")

    def _give_up(self) -> None:
        self._late.set()
        self.process.kill()

    def _why(self, seconds: int) -> str:
        code = self.process.wait()
        if code == -signal.SIGXCPU or self._late.is_set():
            return f"it takes more than {seconds} s of processor time"
        if code < 0:
            return f"it ended by {signal.Signals(-code).name}, as where {MEMORY}"
        return f"its process ended with status {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):  # of a question that was not heard
            pipe.close()

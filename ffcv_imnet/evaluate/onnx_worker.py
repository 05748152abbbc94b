"""Runs one ONNX file in a process of its own, whose memory and processor time are bounded.

`onnx_network` starts it, as a file: python -P onnx_worker.py FILE THREADS SECONDS. An ONNX file is a
program, and ONNX Runtime has no bound of its own on what one takes; nor is its C++ expected to survive
every file. The first answer describes the network; then each message is a batch, its answer the output.

A message is a line of JSON, then as many bytes as its "bytes" says.
"""

import json
import os
import resource
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MOST_NODES = 20_000  # MaxViT with a dynamic batch, the largest of torchvision's, has 4,300
MOST_OUTPUTS = 1_000_000  # classes
DOMAINS = ("", "ai.onnx", "com.microsoft")  # the last: int8 operators of ONNX Runtime's quantizer
ROOM = 1 << 30  # bytes of memory, the libraries' 0.2 GB among them, beside four times the file
ROOM_OF_IMAGE = 32 << 20  # and for each of a batch: ResNet-50 takes 20 MB at 224 px
MOST_IMAGES = 256  # that count in this
AT_ONCE = 8  # images, where any number may be: on a CPU larger batches are hardly faster
NO_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "bfc_arena",
    "Failed to allocate",
    "would require more than",
)
THREAD = 192 << 20  # address space that glibc reserves for one: 128 MB of heap, 8 MB of stack


def send(file: IO[bytes], head: dict[str, Any], data: bytes | memoryview = b"") -> None:
    """One message."""
    file.write(json.dumps(head | {"bytes": len(data)}).encode() + b"\n")
    file.write(data)
    file.flush()


def receive(file: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """One message. Raises EOFError if the other side has ended."""
    line = file.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    data = file.read(head["bytes"])
    if len(data) < head["bytes"]:
        raise EOFError
    return head, data


def fault_of(model: Any) -> str | None:
    """What no image classifier needs, and what a file could do without end with; None if nothing."""
    graph = model.graph
    if len(graph.node) > MOST_NODES:
        return f"it has {len(graph.node):,} operators, more than {MOST_NODES:,}"
    if model.functions:
        return "it defines operators of its own, which are not run"
    if graph.sparse_initializer:
        return "it has sparse weights, which are not read"
    for node in graph.node:
        if node.domain not in DOMAINS:
            return f"its operator {node.op_type[:60]!r} is of {node.domain[:60]!r}, not of ONNX"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                return f"its operator {node.op_type[:60]!r} holds a graph (a loop or a branch), which is not run"
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                return "it has sparse weights, which are not read"
    return None


def outside_files(model: Any, folder: Path) -> Iterator[Path]:
    """The files beside the model that hold its weights. ONNX Runtime refuses those outside `folder`.

    Raises:
        ValueError: one is a pipe or a device, which ONNX Runtime would wait for.
    """
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
    names = {e.value for t in tensors for e in t.external_data if e.key == "location"}
    for path in {folder / name for name in names if "\0" not in name}:
        try:
            kind = path.stat().st_mode
        except OSError:
            continue
        if not stat.S_ISREG(kind):
            raise ValueError(f"its weights are in {path.name[:60]!r}, which is no file")
        yield path


def load(path: Path, threads: int) -> Any:
    """The session. Raises ValueError for what is refused before ONNX Runtime sees it."""
    import onnx
    import onnxruntime

    most = room(path) + threads * THREAD
    bound_memory(most)
    model = onnx.load(path, load_external_data=False)
    fault = fault_of(model)
    if fault is not None:
        raise ValueError(fault)
    most += 4 * sum(file.stat().st_size for file in outside_files(model, path.parent))
    bound_memory(most + ROOM_OF_IMAGE * min(batch_of(model) or AT_ONCE, MOST_IMAGES))
    del model
    onnxruntime.set_default_logger_severity(4)  # its errors are in the answers
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting is no work
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def room(path: Path) -> int:
    """Bytes of memory for a file, more for those beside it, for a batch and for threads."""
    return ROOM + 4 * path.stat().st_size


def batch_of(model: Any) -> int | None:
    """The batch size that the file's input has, if it has one."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for source in model.graph.input:
        if source.name not in weights:
            sides = source.type.tensor_type.shape.dim
            return max(0, sides[0].dim_value) if sides else None
    return None


def bound_memory(most: int) -> None:
    """From now on this process gets at most `most` bytes of address space."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def bound_time(seconds: int) -> None:
    """SIGXCPU ends this process when it has had `seconds` more of the processor."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime) + 1 + seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def description(session: Any) -> dict[str, Any]:
    """What the file says of its inputs and outputs, and the texts it carries."""
    sides = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
    said: dict[str, Any] = {
        side: [{"name": v.name, "type": v.type, "shape": list(v.shape or [])} for v in values]
        for side, values in sides.items()
    }
    return said | {"notes": dict(session.get_modelmeta().custom_metadata_map)}


def answer(session: Any, head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """One batch through the network."""
    import numpy as np

    images = np.frombuffer(data, head["dtype"]).reshape(head["shape"])
    found = session.run([head["output"]], {head["input"]: images})[0]
    shape = list(np.shape(found))
    if len(shape) != 2 or shape[0] != len(images) or not 0 < shape[1] <= MOST_OUTPUTS:
        raise ValueError(
            f"its output has shape {shape[:6]}, expected [{len(images)}, classes], "
            f"{MOST_OUTPUTS:,} at most"
        )
    return {"shape": shape}, found.astype("f4").tobytes()


def main(argv: list[str]) -> int:
    """Load, then answer until there are no more questions."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, for all: the other side ends us
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path, threads, seconds = Path(argv[0]), int(argv[1]), int(argv[2])
    bound_time(seconds)
    try:
        session = load(path, threads)
        send(answers, description(session))
    except Exception as error:  # ONNX Runtime has a class of its own for every kind of damage
        send(answers, fault(error))
        return 0
    while True:
        try:
            head, data = receive(sys.stdin.buffer)
        except EOFError:
            return 0
        bound_time(head["seconds"])
        try:
            send(answers, *answer(session, head, data))
        except Exception as error:
            send(answers, fault(error))


def fault(error: Exception) -> dict[str, Any]:
    """An exception as an answer; `ours`: raised above; `memory`: for want of it."""
    text = str(error).strip() or type(error).__name__
    return {
        "error": text.splitlines()[0][:200],
        "ours": type(error) is ValueError,
        "memory": isinstance(error, MemoryError) or any(word in text for word in NO_MEMORY),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

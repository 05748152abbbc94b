"""ONNX files that ask for more than they have bytes, by hand; and mutated ones of a small classifier."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ffcv_imnet.evaluate.weights import load_network
from tests.fuzz.outcome import Wrong, blind

Nodes = list[onnx.NodeProto]
SIDE, CLASSES = 8, 3


def classifier(before: Nodes = [], weights: dict[str, Any] = {}) -> onnx.ModelProto:  # noqa: B006
    """The mean of each channel of `y`, which is `x`, the images, or what the nodes before make of them."""
    nodes = [*(before or [helper.make_node("Identity", ["x"], ["y"])]),
             helper.make_node("ReduceMean", ["y"], ["out"], axes=[2, 3], keepdims=0)]  # fmt: skip
    ends = (("x", [1, 3, SIDE, SIDE]), ("out", [1, CLASSES]))
    source, target = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in ends)
    arrays = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", [source], [target], initializer=arrays)
    versions = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=versions, ir_version=8)
    return model


def node(kind: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    """The last name is the output's."""
    return helper.make_node(kind, list(names[:-1]), [names[-1]], **attributes)


def _body(kind: str) -> onnx.GraphProto:
    """Of a loop without end, a scan, a branch."""
    value = helper.make_tensor_value_info
    true, image = TensorProto.BOOL, TensorProto.FLOAT
    nodes = [node("Identity", "yes", "go"), node("Identity", "v" if kind == "Loop" else "x", "w")]
    ins = [value("n", TensorProto.INT64, []), value("c", true, []), value("v", image, None)]
    outs = [value("go", true, []), value("w", image, None)]
    if kind == "If":
        return helper.make_graph(nodes[1:], "body", [], outs[1:])
    return helper.make_graph(nodes, "body", ins, outs)


def _function() -> onnx.ModelProto:
    """Its own operator calls two of another, that two of another, 40 deep."""
    model = classifier([helper.make_node("F0", ["x"], ["y"], domain="own")])
    model.opset_import.append(helper.make_opsetid("own", 1))
    for depth in range(40):
        calls = [helper.make_node(f"F{depth + 1}", [a], [b], domain="own") for a, b in ("xm", "my")]
        inner = calls if depth < 39 else [node("Identity", "x", "y")]
        model.functions.append(
            helper.make_function("own", f"F{depth}", ["x"], ["y"], inner, model.opset_import)
        )
    return model


def _sparse() -> onnx.ModelProto:
    model = classifier()
    one = numpy_helper.from_array(np.ones(1, "f4"), "w")
    place = numpy_helper.from_array(np.zeros(1, "i8"), "at")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(one, place, [1 << 40]))
    return model


def _outside(location: str, length: int = 4 * SIDE) -> onnx.ModelProto:
    """Weights in another file."""
    model = classifier([node("Add", "x", "w", "y")], {"w": np.ones((1, 1, 1, SIDE), "f4")})
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return model


def _chain(kind: str, count: int) -> Nodes:
    names = ["x", *(f"v{n}" for n in range(count - 1)), "y"]
    return [node(kind, *pair) for pair in itertools.pairwise(names)]


def _squares(count: int, side: int) -> onnx.ModelProto:
    """`count` products of matrices of `side`, made of the image."""
    shape = np.array([1, 1, side, side])
    nodes = [node("ReduceMean", "x", "m", axes=[1, 2, 3]), node("Expand", "m", "shape", "v0")]
    nodes += [node("MatMul", f"v{n}", f"v{n}", f"v{n + 1}") for n in range(count)]
    three = np.array([1, 3, 1, 1])
    nodes += [node("ReduceMean", f"v{count}", "s", axes=[2, 3]), node("Expand", "s", "three", "y")]
    return classifier(nodes, {"shape": shape, "three": three})


def _grown(kind: str) -> onnx.ModelProto:
    """The image made 4 GB and more, of a size that is computed."""
    sizes: dict[str, tuple[list[int], str]] = {
        "Expand": ([1, 3, 1 << 15, 1 << 15], "i8"), "Tile": ([1, 1, 1 << 12, 1 << 12], "i8"),
        "Pad": ([0, 0, 1 << 15, 1 << 15] * 2, "i8"), "ConstantOfShape": ([1, 3, 1 << 15, 1 << 15], "i8"),
        "Resize": ([1, 3, 1 << 15, 1 << 15], "i8"),
    }  # fmt: skip
    size, form = sizes[kind]
    first = [
        node("Shape", "x", "s"),
        node("Slice", "s", "a", "b", "one"),
        node("Mul", "half", "one", "size"),
    ]
    small = node("ReduceMean", "x", "m", axes=[2, 3])  # Expand takes sides of 1 alone
    ins = {"Expand": ["m"], "ConstantOfShape": [], "Resize": ["x", "", ""]}.get(kind, ["x"])
    weights = {"half": np.array(size, form), "a": np.array([0]), "b": np.array([1])}
    return classifier([small, *first, node(kind, *ins, "size", "y")], weights)


def by_hand() -> dict[str, tuple[Callable[[], onnx.ModelProto], str]]:
    """Each with words of the sentence that refuses it."""
    loop = node("Loop", "", "yes", "x", "y", body=_body("Loop"))
    yes = {"yes": np.array(True)}
    own = helper.make_node("Own", ["x"], ["y"], domain="com.example")
    return {
        "loop": (lambda: classifier([loop], yes), "'Loop' holds a graph"),
        "scan": (lambda: classifier([node("Scan", "x", "y", body=_body("Scan"), num_scan_inputs=1)], yes),
                 "'Scan' holds a graph"),
        "if": (lambda: classifier([node("If", "yes", "y", then_branch=_body("If"), else_branch=_body("If"))], yes),
               "'If' holds a graph"),
        "function": (_function, "operators of its own"),
        "sparse": (_sparse, "sparse weights"),
        "domain": (lambda: classifier([own]), "'Own' is of 'com.example'"),
        "nodes": (lambda: classifier(_chain("Identity", 1_000_000)), "more than 20,000"),
        "unknown": (lambda: classifier([node("Nothing", "x", "y")]), "cannot load it"),
        **{kind: (lambda kind=kind: _grown(kind), "more memory than 1 GB")  # type: ignore[misc]
           for kind in ("Expand", "Tile", "Pad", "ConstantOfShape", "Resize")},
        "squares": (lambda: _squares(400, 2048), "s of processor time"),
        "above": (lambda: _outside("../x"), "cannot load it"),
        "absolute": (lambda: _outside("/etc/passwd"), "cannot load it"),
        "long": (lambda: _outside("data", 1 << 40), "cannot load it"),
        "pipe": (lambda: _outside("pipe"), "which is no file"),
        "device": (lambda: _outside("zero"), "which is no file"),
    }  # fmt: skip


# ---- mutated ------------------------------------------------------------------------------------


def sound() -> onnx.ModelProto:
    """A convolution, a pool, a product, as networks have them."""
    draw = np.random.default_rng(0).standard_normal
    weights = {"k": draw((4, 3, 3, 3)).astype("f4"), "b": np.zeros(4, "f4"), "shape": np.array([1, -1, 1, 1]),
               "d": draw((4, 3)).astype("f4"), "one": np.array([1, 3, 1, 1])}  # fmt: skip
    nodes = [
        node("Conv", "x", "k", "b", "c", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1], group=1),
        node("Relu", "c", "r"), node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", "p", "g"), node("Flatten", "g", "f", axis=1), node("Gemm", "f", "d", "e"),
        node("Reshape", "e", "one", "y"),
    ]  # fmt: skip
    return classifier(nodes, weights)


PLAIN = sound().SerializeToString()
NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    7,
    255,
    1 << 15,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    1 << 40,
    (1 << 63) - 1,
    -(1 << 63),
]
WORDS = [b"Conv", b"Loop", b"Gemm", b"\x0a", b"\xff" * 9, b"\x08\x01", bytes(4)]
KINDS = ["Loop", "If", "Expand", "Tile", "Resize", "ConstantOfShape", "Transpose", "MatMul", "Concat", "Gather",
         "Range", "Upsample", "Pad", "Add", "OneHot", "ConvTranspose", "NonZero", "Split", "LSTM", "TopK", "Nothing",
         "GroupNormalization", "MaxUnpool", "Cast", "Slice", "Softmax", "DepthToSpace"]  # fmt: skip


def change(model: onnx.ModelProto, draw: random.Random) -> None:
    """One attribute, wire, shape, weight, operator."""
    graph, kind = model.graph, draw.randrange(9)
    chosen = draw.choice(graph.node)
    names = [name for one in graph.node for name in (*one.input, *one.output)]
    if kind <= 1 and chosen.attribute:
        attribute = draw.choice(chosen.attribute)
        attribute.i = draw.choice(NUMBERS)
        if attribute.ints:
            attribute.ints[draw.randrange(len(attribute.ints))] = draw.choice(NUMBERS)
    elif kind == 2:
        chosen.op_type = draw.choice([*KINDS, *(one.op_type for one in graph.node)])
    elif kind == 3 and chosen.input:
        chosen.input[draw.randrange(len(chosen.input))] = draw.choice(names)
    elif kind == 4:
        weight = draw.choice(graph.initializer)
        weight.dims[draw.randrange(len(weight.dims))] = draw.choice(NUMBERS)
    elif kind == 5:
        weight = next(w for w in graph.initializer if w.name in ("shape", "one"))
        weight.raw_data = b"".join(
            draw.choice(NUMBERS).to_bytes(8, "little", signed=True) for _ in range(4)
        )
    elif kind == 6:
        value = draw.choice([*graph.input, *graph.output])
        side = draw.choice(value.type.tensor_type.shape.dim)
        side.dim_value = draw.choice(NUMBERS)
        if draw.random() < 0.3:
            side.dim_param = "n"
    elif kind == 7 and len(graph.node) > 1:
        graph.node.remove(chosen) if draw.random() < 0.5 else graph.node.append(chosen)
    else:
        draw.choice(graph.initializer).data_type = draw.randrange(24)


def make(draw: random.Random) -> bytes:
    """Of what it says: attributes, shapes, operators, wires; or of its bytes."""
    if draw.random() < 0.3:
        return blind(PLAIN, draw, WORDS)
    model = onnx.load_from_string(PLAIN)
    for _ in range(draw.randint(1, 3)):
        change(model, draw)
    data: bytes = model.SerializeToString()
    return data


def read(path: Path) -> None:
    """As `evaluate` reads it: one image, and nine."""
    import torch

    network = load_network(path)
    side = network.how.resolution
    if side > 256:
        return
    for count in (1, 9):
        found = network.model(torch.zeros(count, 3, side, side, dtype=torch.uint8))
        if found.shape != (count, network.outputs):
            raise Wrong("shape")

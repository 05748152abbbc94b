"""Mutated files of the kinds that people bring: each is read rightly, or refused in one sentence, in bounds.

Two kinds of change: of what a file says, by its own structure, and of its bytes, blindly.
"""

import gzip
import io
import json
import random
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ffcv_imnet.core.names import fault_of
from ffcv_imnet.images.labels import read_labels
from ffcv_imnet.images.pixels import decode_rgb
from tests.fuzz.outcome import Wrong, blind, bounded, outcome

LABELS = [b"\t", b",", b";", b'"', b"\n", b"\r\n", b"\0", b"\xff", b"{", b"}", b"[" * 3000, b"{}", b"null",
          b'{"file": "a.jpg", "label": 1}\n', b"9" * 5000, b"\\ud800", b"\xef\xbb\xbf", b"../x", b"label",
          b"\xe2\x80\xae", b"x" * 150_000]  # fmt: skip
MARKS = [b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xc2", b"\xff\xe1", b"\xff\xff", b"IDAT", b"IEND", b"iCCP",
         b"acTL", b"fdAT", b"zTXt", b"PLTE", b"tRNS", b"eXIf", b"II*\0", b"MM\0*", b"RIFF", b"VP8 ", b"VP8L", b"VP8X",
         b"ANMF", b"GIF89a", b"!\xf9\x04", b",", b"Exif\0\0", bytes(4), b"\xff" * 4]  # fmt: skip
MOST_PIXELS = 4_000_000  # --max_pixels: a fuzzer has other uses of its time than large images


@dataclass(frozen=True)
class Kind:
    """How to make one mutated file, and how the project reads it."""

    name: str  # of the file
    make: Callable[[random.Random], bytes]
    read: Callable[[Path], None]  # raises Wrong where it was accepted and must not have been


# ---- labels -------------------------------------------------------------------------------------


def labels() -> Kind:
    """Tables of every form, and JSON-lines whose values change."""
    sound = [
        b"filename,label\n1.jpg,n01440764\n2.jpg,n02084071\n\"3, x.jpg\",n02119789\n",
        b"image_id;breed\ndogs/17;golden jackal\ndogs/18;fox\n", b"1.jpg n01440764\n2.jpg n02084071\n",
        b"file\tlabel\na.png\tcat\nb.png\tdog\n",
    ]  # fmt: skip
    values: list[Any] = [None, True, -1, 0, 10**400, 0.5, "", "a\nb", "\ud800", "..", "a/b", [], {}, "x" * 600,
                         [[[]]], "é", 7]  # fmt: skip

    def make(draw: random.Random) -> bytes:
        if draw.random() < 0.5:
            return blind(draw.choice(sound), draw, LABELS)
        rows: list[dict[str, Any]] = [{"file": f"{n}.jpg", "label": "fox"} for n in range(3)]
        row = draw.choice(rows)
        row[draw.choice(["file", "label", "class", "id", "x", ""])] = draw.choice(values)
        text = "\n".join(map(json.dumps, rows)).encode()
        return blind(text, draw, LABELS) if draw.random() < 0.3 else text

    return Kind("labels.csv", make, _read_labels)


def _read_labels(path: Path) -> None:
    for file, name in read_labels(path).items():
        if not file or fault_of(name) or "/" in name or name in (".", ".."):
            raise Wrong(f"labels: {fault_of(name) or 'a path'}")


def mats() -> Kind:
    """The devkit with a mutated meta.mat: of its bytes, of what it inflates to, of the archive."""
    from tests.test_labels import MAT, devkit

    head, packed = MAT[:128], MAT[136:]
    plain = zlib.decompress(packed)
    words = [struct.pack("<I", n) for n in range(16)] + [b"n01440764", b"../", bytes(8)]

    def make(draw: random.Random) -> bytes:
        kind = draw.randrange(4)
        inside = blind(plain, draw, words)
        if kind == 0:  # elements within themselves
            at = draw.randrange(0, len(plain), 8)
            for _ in range(draw.choice([1, 12, 300])):
                inside = plain[:at] + struct.pack("<2I", 14, len(inside)) + inside
                if len(inside) > 1 << 20:
                    break
        small = zlib.compress(inside)
        mat = head + (inside if kind == 1 else struct.pack("<2I", 15, len(small)) + small)
        if kind == 2:
            mat = blind(MAT, draw, words)
        with tempfile.TemporaryDirectory() as name:
            data = devkit(
                Path(name) / "kit.gz", mat, draw.choice([b"1\n2\n3\n", b"1\n", b"x\n"])
            ).read_bytes()
        if kind == 3 and draw.random() < 0.5:  # the archive's own headers
            data = gzip.compress(blind(gzip.decompress(data), draw, words), 1)
        return data

    return Kind("devkit.tar.gz", make, _read_labels)


# ---- images -------------------------------------------------------------------------------------


def images() -> Kind:
    """Of seven formats, with profiles, EXIF and frames; PNG chunks with right checksums."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274], exif[305] = 6, "x" * 40
    sound = []
    formats: list[tuple[str, dict[str, Any]]] = [
        ("JPEG", {"exif": exif, "icc_profile": bytes(200)}), ("JPEG", {"progressive": True}), ("PNG", {"exif": exif}),
        ("PNG", {"icc_profile": bytes(300)}), ("PNG", {"save_all": True, "append_images": [rgb.rotate(9)]}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {}),
        ("GIF", {"save_all": True, "append_images": [rgb.rotate(9)]}), ("WEBP", {"exif": exif}),
        ("WEBP", {"lossless": True}), ("WEBP", {"save_all": True, "append_images": [rgb.rotate(9)]}),
        ("BMP", {}), ("PPM", {}), ("AVIF", {}),
    ]  # fmt: skip
    for kind, how in formats:
        for image in (rgb, rgb.convert("L"), rgb.convert("P")):
            file = io.BytesIO()
            try:
                image.save(file, kind, **how)
            except (OSError, ValueError):  # not every format has every mode
                continue
            sound.append(file.getvalue())

    def make(draw: random.Random) -> bytes:
        data = draw.choice(sound)
        if data[:4] == b"\x89PNG" and draw.random() < 0.7:
            return _png(data, draw)
        if draw.random() < 0.5:  # headers are where the sizes are
            return blind(data[:120], draw, MARKS) + data[120:]
        return blind(data, draw, MARKS)

    def read(path: Path) -> None:
        found = decode_rgb(path.read_bytes(), MOST_PIXELS)
        if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3:
            raise Wrong("pixels")
        if not 0 < found.shape[0] * found.shape[1] <= MOST_PIXELS:
            raise Wrong("size")

    return Kind("image", make, read)


def _png(data: bytes, draw: random.Random) -> bytes:
    chunks, at = [], 8
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + size]])
        at += 12 + size
    for _ in range(draw.randint(1, 3)):
        chunk, kind = draw.choice(chunks), draw.randrange(6)
        if kind == 0 and len(chunks) > 1:
            chunks.remove(chunk)
        elif kind == 1:
            chunks.insert(draw.randrange(len(chunks)), list(chunk))
        elif kind == 2:
            chunk[0] = draw.choice(
                [b"IDAT", b"iCCP", b"zTXt", b"iTXt", b"tRNS", b"PLTE", b"eXIf", b"fdAT", b"IEND"]
            )
        elif kind == 3:
            text = draw.choice([b"zTXt", b"iCCP", b"iTXt"])
            flag = b"\1\0\0\0" if text == b"iTXt" else b""
            bomb = b"a\0" + flag + b"\0" + zlib.compress(bytes(draw.choice([9, 1 << 21])))
            chunks[1:1] = [[text, bomb] for _ in range(draw.choice([1, 3, 90]))]
        else:
            chunk[1] = blind(chunk[1], draw, MARKS) if chunk[1] else b"x"
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    ]
    return data[:8] + b"".join(parts)


# ---- logs ---------------------------------------------------------------------------------------


def logs() -> Kind:
    """A log whose fields and lines change, read as `report`, `compare` and `sweep` read it."""
    from ffcv_imnet.core import log
    from ffcv_imnet.report.html import write_page
    from ffcv_imnet.report.runs import group_runs, read_run
    from ffcv_imnet.tools import compare, report
    from tests.test_records import EPOCH

    header = log.Header(
        settings={"model": {"arch": "tiny"}, "training": {"seed": 0, "stop_at": 0.4}},
        manifests={"val": {"path": "val.beton", "samples": 3}}, versions={"python": "3"}, device="cpu",
        precision="fp32", world_size=1, started="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    summary = log.Summary(best_top_1=0.6, best_epoch=0, epochs=2, elapsed_seconds=9.0)
    sound = [json.loads(log.to_line(r)) for r in (header, EPOCH, EPOCH, summary)]
    sound[2]["epoch"] = 1
    values: list[Any] = [None, True, -1, 0, 1, 66.0, 10**30, 1e308, 0.5, "", "x", "\ud800", "a\nb", [], {}, [1],
                         {"a": {"b": {}}}, "<script>", "x" * 10**5, 2**63, 2**62, {"seed": "x"}, {"stop_at": "x"},
                         {"training": 5}, {"training": {"stop_at": []}}, {"model": {"arch": {}}}]  # fmt: skip
    words = [b"\n", b"NaN", b"1e999", b"[" * 3000, b"9" * 5000, b"}", b"{", b'"', b"\xff", b"null", b"\0",
             b"\\ud800"]  # fmt: skip

    def make(draw: random.Random) -> bytes:
        rows = json.loads(json.dumps(sound))
        for _ in range(draw.randint(0, 2)):
            kind, row = draw.randrange(5), draw.choice(rows)
            key = draw.choice([*row, "x"])
            inner = row.get(key)
            if kind == 0:
                row.pop(key, None)
            elif kind == 1 and isinstance(inner, dict) and inner:
                inner[draw.choice(list(inner))] = draw.choice(values)
            elif kind == 2:
                rows.insert(draw.randrange(len(rows)), dict(row))
            elif kind == 3 and len(rows) > 1:
                rows.remove(row)
            else:
                row[key] = draw.choice(values)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return blind(text, draw, words) if draw.random() < 0.3 else text

    def read(path: Path) -> None:
        run = read_run(path)
        for epoch in run.log.epochs:
            scores = [epoch.top_1, epoch.top_5, epoch.ema_top_1 or 0.0]
            if not all(0 <= score <= 1 for score in scores):
                raise Wrong("scores")
        text = report.table(run.log) + report.verdict(run.log)
        if zlib.crc32(path.read_bytes()) % 20 == 0:  # a second's work
            page = write_page(group_runs([run]), [""], [(run.name, text)])
            if "<script>" in page:
                raise Wrong("markup")
            page.encode()
        side = compare.read_side("a", [path])
        compare.warnings(side, side)
        compare.table(side, side, 0.5)

    return Kind("log.jsonl", make, read)


# ---- weights, parquet ---------------------------------------------------------------------------


def safetensors() -> Kind:
    """A state dict whose header or bytes change."""
    import torch
    from safetensors.torch import save

    from ffcv_imnet.evaluate.weights import load_network
    from tests.networks import tiny

    state = {key: value.contiguous() for key, value in tiny(3, False).state_dict().items()}
    notes = {
        "ffcv_imnet.arch": '"tiny"',
        "ffcv_imnet.classes": '["ant", "bee", "cat"]',
        "ffcv_imnet.mean": "[1, 2, 3]",
    }
    data = save(state, {"format": "pt", **notes})
    size = int.from_bytes(data[:8], "little")
    head, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    values: list[Any] = [None, True, -1, 0, 1, 2**40, 2**64, 1e308, "", "F64", "F32", "I8", "x", [], [0], [2**32, 2**32],
                         [-1], [0, 0], [0, 4], [4, 0], {}, "[" * 3000, "5", '"x"', "null", '["a"]', "NaN"]  # fmt: skip
    words = [b"F64", b"[", b"}", b'"', b"9" * 50, b"\xff"]

    def make(draw: random.Random) -> bytes:
        fields = json.loads(json.dumps(head))
        for _ in range(draw.randint(0, 2)):
            key = draw.choice(list(fields))
            if draw.random() < 0.2:
                del fields[key]
                continue
            inner = fields[key]
            inner[draw.choice([*inner, "x", "ffcv_imnet.resolution", "ffcv_imnet.std"])] = (
                draw.choice(values)
            )
        text = json.dumps(fields).encode()
        length = (
            len(text)
            if draw.random() < 0.9
            else draw.choice([0, 1, len(text) + 1, 1 << 40, (1 << 64) - 1])
        )
        made = length.to_bytes(8, "little") + text + body
        return blind(made, draw, words) if draw.random() < 0.3 else made

    def read(path: Path) -> None:
        network = load_network(path)
        if network.classes is not None and len(network.classes) != network.outputs:
            raise Wrong("classes")
        if network.model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape != (
            1,
            network.outputs,
        ):
            raise Wrong("network")

    return Kind("model.safetensors", make, read)


def parquet() -> Kind:
    """A shard of other types, values and bytes, its footer above all."""
    import pyarrow
    import pyarrow.parquet

    from ffcv_imnet.images.parquet import ParquetShards, _row_group

    blob, path = b"x" * 50, "a_n01440764.JPEG"
    columns: list[list[Any]] = [
        [blob] * 6, [{"bytes": blob, "path": path}] * 6, [{"bytes": blob, "path": None}, None] * 3,
        [{"bytes": [blob]}] * 6, [[blob]] * 6, [{"bytes": 1}] * 6, [{"path": path}] * 6, [1] * 6, ["x"] * 6,
        [{"bytes": {"bytes": blob}, "path": path}] * 6, [None] * 6,
    ]  # fmt: skip
    names: list[list[Any]] = [
        [0, 1, 0, 1, 0, 1], ["ant", "bee"] * 3, [[0]] * 6, [{"int": 1}] * 6, [None] * 6, [2**62, -5] * 3,
        [-1] * 6, [0.5] * 6, ["a\nb", ""] * 3, ["\u202ex", "y"] * 3, ["x" * 600, "y"] * 3, [b"ant"] * 6, [True] * 6,
    ]  # fmt: skip
    words = [
        b"PAR1",
        b"PARE",
        b"\x15",
        b"\x19",
        b"\x2c",
        b"\xff" * 5,
        bytes(4),
        b"schema",
        b"int32",
    ]

    def make(draw: random.Random) -> bytes:
        first = draw.random() < 0.5
        table = {"image": columns[draw.choice([0, 1])] if first else draw.choice(columns),
                 "label": names[draw.choice([0, 1])] if first else draw.choice(names)}  # fmt: skip
        said = draw.choice(["{}", "[" * 5000, '{"info": {"features": {"label": {"names": ["ant", "bee"]}}}}',
                            '{"info": {"features": {"label": {"names": [1, null]}}}}', "x"])  # fmt: skip
        file = io.BytesIO()
        pyarrow.parquet.write_table(
            pyarrow.table(table).replace_schema_metadata({"huggingface": said}),
            file,
            row_group_size=4,
        )
        data = file.getvalue()
        if draw.random() < 0.3:
            return data
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        if draw.random() < 0.7:
            return data[:footer] + blind(data[footer:-8], draw, words) + data[-8:]
        return blind(data, draw, words)

    def read(path: Path) -> None:
        _row_group.cache_clear()  # every case has the same name
        source = ParquetShards([path])
        for index in range(min(len(source), 20)):
            try:
                data, label = source.read(index)
            except OSError:
                continue
            if not isinstance(data, bytes) or not 0 <= label < len(source.classes):
                raise Wrong("image or label")
        if any(map(fault_of, source.classes)):
            raise Wrong("classes")

    return Kind("train.parquet", make, read)


def onnx() -> Kind:
    """Small classifiers that are no longer what they were."""
    from tests.fuzz.onnx_files import make, read

    return Kind("model.onnx", make, read)


KINDS: dict[str, Callable[[], Kind]] = {
    make.__name__: make for make in (labels, mats, images, logs, safetensors, parquet, onnx)
}


def fuzz(what: str, cases: int, seed: int) -> Counter[str]:
    """`cases` files of one kind; keys other than "read" and "refused" are failures, each said once."""
    kind, draw, counts = KINDS[what](), random.Random(seed), Counter[str]()
    with bounded(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kind.name
        for case in range(cases):
            path.write_bytes(kind.make(draw))
            said = outcome(lambda: kind.read(path), path)
            if said not in ("read", "refused") and not counts[said]:
                print(f"case {case}: {said}", flush=True)
            counts[said] += 1
    return counts

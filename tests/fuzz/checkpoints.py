"""Mutated checkpoints: of a sound one's values, of its pickle, of its zip."""

import copy
import io
import random
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import tests.networks  # noqa: F401  (registers the tiny network)
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schema import differences, to_dict
from ffcv_imnet.core import log
from ffcv_imnet.core.errors import RunError
from ffcv_imnet.evaluate.weights import load_network
from ffcv_imnet.train import checkpoint
from ffcv_imnet.train.epoch import build_learner
from tests.fuzz.outcome import Wrong, blind, bounded, outcome
from tests.test_data import ALONE
from tests.test_records import EPOCH

WORDS = [b"PK\x01\x02", b"PK\x03\x04", b"\x80\x02", b"}", b"]", b"(", b"R", b"b", b"\x8a\xff", b"cos\nsystem\n",
         b"X\xff\xff\xff\x7f", b"h\x00", b"q\x00", b"\xff" * 8, bytes(8)]  # fmt: skip


class Calls:
    """Pickled, calls `function` when it is read."""

    def __init__(self, function: Callable[..., Any], *values: Any) -> None:
        self.function, self.values = function, values

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.values


def values(draw: random.Random) -> Any:
    """Something that hardly any place of a checkpoint holds."""
    twice: list[Any] = [1]
    for _ in range(draw.choice([2, 40])):
        twice = [twice, twice]
    itself: dict[str, Any] = {}
    itself["a"] = itself
    deep: list[Any] = []
    for _ in range(draw.choice([3, 200])):
        deep = [deep]
    one = torch.ones(1)
    return draw.choice([
        None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -1.5, float("nan"), float("inf"), 1e308, "", "x",
        "a\nb", "\ud800", "\u202ex", "a" * 5000, b"x", [], {}, (), [[]], {"": 1}, {1: 2}, {"a": {}}, ["a", "a"],
        ["a", None], set(), {1}, 1j, torch.float32, torch.Size([1]), torch.device("cpu"), Counter("aab"),
        one, one * float("nan"), one.expand(10**6), one.expand(10**12), torch.zeros(0), torch.zeros(3, 4),
        one.to_sparse(), torch.ones(1, device="meta"), one.int(), one.bool(), one.half(), one.to(torch.complex64),
        torch.nn.Parameter(one), twice, itself, deep, Calls(bytearray, 10**12), Calls(bytearray, 10**9),
        Calls(torch.Tensor, 10**6, 10**6), Calls(print, "run"), bytearray(9), 66.0, 100,
    ])  # fmt: skip


def change(state: dict[str, Any], draw: random.Random) -> None:
    """One value, somewhere in the mappings and lists of `state`, dropped, replaced, added, doubled."""
    held: Any = state
    for _ in range(draw.randint(0, 4)):
        inner = [v for v in (held.values() if isinstance(held, dict) else held)
                 if isinstance(v, (dict, list)) and v]  # fmt: skip
        if not inner:
            break
        held = draw.choice(inner)
    kind = draw.randrange(6)
    keys = list(held) if isinstance(held, dict) else list(range(len(held)))
    key = draw.choice(keys)
    if kind == 0:
        del held[key]
    elif kind == 1 and isinstance(held, dict):
        held[draw.choice(["x", "", 1, None, "type", (1, 2)])] = values(draw)
    elif kind == 2:
        held[key] = held[draw.choice(keys)]
    elif kind == 3 and isinstance(held, list):
        held.insert(draw.randrange(len(held) + 1), values(draw))
    else:
        held[key] = values(draw)


def rezipped(data: bytes, draw: random.Random) -> bytes:
    """The same parts in a zip of other manners."""
    out = io.BytesIO()
    deflate = draw.random() < 0.3
    with zipfile.ZipFile(io.BytesIO(data)) as old, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts: list[Any] = [[part.filename, old.read(part)] for part in old.infolist()]
        for _ in range(draw.randint(1, 2)):
            kind, part = draw.randrange(5), draw.choice(parts)
            if kind == 0:
                parts.remove(part)
            elif kind == 1:
                parts.append(list(part))
            elif kind == 2:
                part[0] = draw.choice(["x", "/etc/x", "../x", part[0] * 2, draw.choice(parts)[0]])
            elif kind == 3:
                part[1] = draw.choice([b"", part[1] * 2, draw.choice(parts)[1], bytes(10**6)])
            else:
                part[1] = blind(part[1], draw, WORDS) if part[1] else b"x"
            parts = parts or [["x", b""]]
        with zipfile.ZipFile(
            out, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
        ) as new:
            for name, held in parts:
                new.writestr(name, held)
    return out.getvalue()


def saved(value: Any, zipped: bool = True) -> bytes:
    """As torch.save writes it."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def fuzz(cases: int, seed: int) -> Counter[str]:
    """Mutate `cases` times; each is read as `--resume` and as `--weights` read it."""
    settings = load(model__arch="tiny", training__precision="fp32")
    learner = build_learner(settings, 3, ALONE)
    run = {
        "settings": to_dict(settings), "data": {"train": "sha256:0", "val": "sha256:1"},
        "classes": ["ant", "bee", "cat"], "records": [log.to_dict(EPOCH)],
        "trained": asdict(checkpoint.Trained(steps=3)), "elapsed_seconds": 5.0,
    }  # fmt: skip
    sound = checkpoint.state_of(learner, run)
    draw, counts = random.Random(seed), Counter[str]()
    with bounded(), tempfile.TemporaryDirectory() as name:
        path = Path(name) / "last.pt"

        def read() -> None:
            refused = None
            try:
                resume()
            except RunError as error:
                refused = RunError(str(error))  # not `error`, whose frames hold what was read
            network = load_network(path)  # may be a state dict, which no run resumes
            if network.classes is not None and len(network.classes) != network.outputs:
                raise Wrong("classes")
            if not all(v.isfinite().all() for v in network.model.state_dict().values()):
                raise Wrong("not finite")
            if refused is not None:
                raise refused

        def resume() -> None:
            state = checkpoint.load(path)
            held = state["run"]
            differences(to_dict(settings), held["settings"])
            records = [log.from_dict(record) for record in held["records"]]
            for record in records:
                log.to_line(record)
            checkpoint.Trained(**held.get("trained", {}))
            float(held.get("elapsed_seconds", 0.0))
            if len(set(held["classes"])) < len(held["classes"]) or not all(
                map(str.strip, held["classes"])
            ):
                raise Wrong("classes")
            checkpoint.restore(learner, state, path)

        for case in range(cases):
            state = copy.deepcopy(sound)
            kind = case % 4
            for _ in range(draw.randint(1, 2) if kind < 2 else 0):
                change(state, draw)
            try:
                data = saved(state, zipped=draw.random() < 0.8)
            except Exception:  # what cannot be saved is no case
                counts["not saved"] += 1
                continue
            if kind == 2:
                data = blind(data, draw, WORDS)
            elif kind == 3:
                data = rezipped(saved(sound), draw)
            path.write_bytes(data)
            said = outcome(read, path)
            if said not in ("read", "refused") and not counts[said]:
                print(f"case {case}: {said}", flush=True)
            counts[said] += 1
    return counts

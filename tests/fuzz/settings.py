"""Mutated recipes: each is read rightly, or refused in one line and in time.

Two kinds of change. Values, keys and lines that must be refused are put in by name, so that taking one
is seen ("accepted: 1:30"); bytes are changed blindly, where only tracebacks, hangs and long messages are.
"""

import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from ffcv_imnet.config.parsing import parse
from ffcv_imnet.core.errors import UsageError

LINE = 400  # characters of a message, the file's name not counted
PATIENCE = 10.0  # seconds

RECIPE = """model: {{arch: resnet18}}
lr: {{lr: {lr}, lr_peak_epoch: 1}}
training: {{epochs: {epochs}, batch_size: {batch_size}, use_blurpool: {switch}}}
augmentation: {{crop_scale: {pair}}}
logging: {{folder: {folder}}}
{more}
"""
SOUND = {"lr": "0.5", "epochs": "16", "batch_size": "64", "switch": "true", "pair": "[0.5, 1]",
         "folder": "runs/x", "more": ""}  # fmt: skip
# What no place of the recipe may take, as it stands in the file.
NUMBERS = ["1:30", "1:2:3.5", "010", "0b11", "1_000", "2001-01-01", "!!int abc", "!!float 1", "&a 1", "*a",
           "9" * 5000, "1e999", ".nan", ".inf", "-.inf", "[1]", "{a: 1}", "true", "'010'", "!!bool maybe",
           "0x", "٣", "１", "1 2", "--1", "1e", "!!python/object:os.system x", "!<tag:yaml.org,2002:int> 1"]  # fmt: skip
TEXTS = ['"a\\0b"', '"\\ud800"', '"\\udfff"', "!!str x", "&b x", "*b", "[a]", "{a: b}", "5", "true", "1.5",
         '"\\U00110000"', "a" * 5000, '""']  # fmt: skip
LINES = ["lr.lr: 2", "training: {epochs: 3}", "training.epochs: 3", "1: 2", "null: 1", "[1]: 2", "? {a: 1}\n: 2",
         "lr: &a\n  lr: *a", "x: {a: {a: {a: 1}}}", "<<: {lr: {lr: 1}}", "lr.lr.lr: 1", ".lr: 1", "lr..lr: 1",
         "x: " + "[" * 100 + "]" * 100, "x: " + "{a: " * 1000 + "1" + "}" * 1000, "- 1", "---\nlr: {lr: 1}",
         "a.b" * 2000 + ": 1", "!!set {lr}", "2001-01-01: 1", "~: 1", "lr: 3", "training: [1]",
         "plan: {stages: [{epochs: 16, epochs: 16, resolution: 64}]}", "plan: {stages: '*a'}",
         "plan: {stages: '[{epochs: 010, resolution: 64}]'}",
         "x:\n" + "\n".join(f"  - &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]  # fmt: skip


def forbidden(draw: random.Random) -> tuple[str, str]:
    """A recipe with one thing that must be refused, and what that is."""
    values = dict(SOUND)
    place = draw.choice(["lr", "epochs", "batch_size", "switch", "pair", "folder", "more"])
    choices = {"folder": TEXTS, "more": LINES}.get(place, NUMBERS)
    bad = draw.choice(choices)
    if place == "switch" and bad in ("true", "!!bool true"):
        bad = "maybe"
    if place == "pair":
        bad = f"[0.5, {bad}]" if draw.random() < 0.5 else f"[{bad}, 1]"
    if place == "lr" and bad == "*a":  # (an alias without its anchor is another mistake)
        bad = "[&a 1, *a]"
    values[place] = bad
    return RECIPE.format(**values), f"{place}: {bad[:40]}"


def blind(text: str, draw: random.Random) -> bytes:
    """Bytes changed, moved, repeated, truncated."""
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at:at] = draw.choice([*NUMBERS, *TEXTS, *LINES]).encode("utf-8", "surrogatepass")
        elif kind == 2:
            del data[at : at + draw.randint(1, 30)]
        elif kind == 3:
            data[at:at] = data[at : at + draw.randint(1, 200)]
        elif kind == 4:
            data[at:at] = draw.choice(
                [b"\xff", b"\0", b"\t", b"\r", b"\xef\xbb\xbf", b"\x85", b"%", b"@", b"`", b"|"]
            )
        elif draw.random() < 0.3:
            del data[at:]
    return bytes(data)


def outcome(path: Path, data: bytes) -> str:
    """What reading it came to: "read", "refused", or what went wrong."""
    path.write_bytes(data)
    started = time.perf_counter()
    try:
        parse([f"--config={path}"])
        said = "read"
    except UsageError as error:
        message = str(error).replace(str(path), "")
        most = 20 * LINE if "unknown settings" in message else LINE  # it names up to twenty of them
        said = "refused" if "\n" not in message and len(message) < most else "refused at length"
    except Exception as error:
        said = f"traceback: {type(error).__name__}"
    return said if time.perf_counter() - started < PATIENCE else f"{said}, too late"


def fuzz(cases: int, seed: int) -> Counter[str]:
    """`cases` recipes, half of either kind. Keys that begin with "accepted" or "traceback" are failures."""
    draw, counts = random.Random(seed), Counter[str]()
    recipes = [
        path.read_text(encoding="utf-8") for path in sorted(Path("rn_configs").glob("*.yaml"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        assert outcome(path, RECIPE.format(**SOUND).encode()) == "read"
        for number in range(cases):
            text, what = forbidden(draw)
            if number % 2:
                counts[outcome(path, blind(draw.choice([*recipes, text]), draw))] += 1
                continue
            said = outcome(path, text.encode("utf-8", "surrogatepass"))
            counts[f"accepted: {what}" if said == "read" else said] += 1
    return counts

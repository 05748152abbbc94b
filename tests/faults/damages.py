"""Files truncated and bytes flipped, in every file that a run reads; who notices, and what is said."""

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ffcv_imnet.data import beton
from ffcv_imnet.tools import verify
from tests.conftest import SmallData
from tests.faults.lives import PATIENCE, Life, Row, same_run, train_config
from tests.faults.outside import copy_of

KINDS = ("tables", "images", "manifest", "checkpoint", "log", "config")


def damage(path: Path, draw: random.Random, first: int = 0, last: int | None = None) -> str:
    """Cut `path` off, or change one byte of it between `first` and `last`; which of the two."""
    data = bytearray(path.read_bytes())
    place = draw.randrange(first, last or len(data))
    if draw.random() < 0.3:
        path.write_bytes(data[:place])
        return f"truncated at byte {place:,}"
    data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"bit flipped in byte {place:,}"


def one(
    kind: str, data: SmallData, half: Path, whole: Path, place: Path, draw: random.Random
) -> Row:
    """Damage one file of a copy of the half-finished run or its data, go on with the run, look.

    Well is: refused in one line that names the file, within `PATIENCE`; or gone on with, and the
    result is the undisturbed run's, bit for bit. Changed pixels that still decode are refused because
    the run is told to verify its data.
    """
    own = copy_of(data, place / "data")
    run = place / "run"
    shutil.copytree(half, run)
    config = place / "c.yaml"
    shutil.copy(half.with_suffix(".yaml"), config)
    tables = beton.read_tables(own.train)
    target, span = {
        "tables": (own.train, (0, tables.start)),
        "images": (own.train, (int(tables.pointers.min()), tables.end)),
        "manifest": (own.train.with_suffix(".json"), (0, None)),
        "checkpoint": (run / "last.pt", (0, None)),
        "log": (run / "log.jsonl", (0, None)),
        "config": (config, (0, None)),
    }[kind]
    what = f"{target.name if kind != 'config' else 'config.yaml'} ({kind}) {damage(target, draw, *span)}"
    life = train_config(
        config, run, "--resume", "auto",
        f"--data.train_dataset={own.train}", f"--data.val_dataset={own.val}",
        f"--data.verify={kind == 'pictures'}".lower(),
    )  # fmt: skip
    status = life.end()
    quick = time.perf_counter() - life.started < PATIENCE
    happened, well = "hung", False
    if status is not None and status != 0:
        # A damaged table, manifest or image is named by its file; a config by its own name or key.
        named = target.name in life.error() or target.stem in life.error() or kind == "config"
        well = status in (1, 2) and named and quick and "Traceback" not in life.said()
        happened = f"refused ({status}): {life.error().replace(str(place), '')[7:120]}"
    elif status == 0:
        same = same_run(run, whole)
        said = "is damaged" in life.said()
        found = kind in ("tables", "images", "manifest") and verified(own, place)
        well = same
        happened = ("set right, saying so" if said else "went on") + (
            ", the result is the same" if same else ", the result DIFFERS"
        )
        happened += "; verify finds it" if found else ""
    shutil.rmtree(place)
    return Row(kind, what, happened, "nothing" if well else "?", well)


def verified(data: SmallData, place: Path) -> bool:
    """Whether `verify` names the damaged training file."""

    def main() -> int:
        return verify.main([str(data.train)])

    life = Life(main, place / "verify.txt")
    return life.end() == 1 and data.train.stem in life.error()


def damages(
    data: SmallData, half: Path, whole: Path, folder: Path, count: int, seed: int
) -> Iterator[Row]:
    """`count` damaged files, the kinds in turn."""
    draw = random.Random(seed)
    for n in range(count):
        yield one(KINDS[n % len(KINDS)], data, half, whole, folder / f"damaged{n}", draw)

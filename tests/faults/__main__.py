"""Hurt real runs and print what was injected, what happened, what was lost.

    python -m tests.faults                                    as CI does, under a minute
    python -m tests.faults --kills 100 --damages 50 --soak 200 --dir /big/disk/faults --json rows.jsonl

Exit status 1 if anything was lost, hung or accepted that should not be.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from tabulate import tabulate

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as train_imagenet.py has it

from tests.conftest import SmallData
from tests.faults.damages import damages
from tests.faults.inputs import inputs
from tests.faults.kills import kills
from tests.faults.lives import Row, changes_of, open_data, train, write_data
from tests.faults.outside import full_disk, nodes, ranks, truncated
from tests.faults.situations import classes, limits, phases, stops, surroundings, worlds
from tests.faults.soak import soak
from tests.test_training import FULL

BY_DEFAULT = ("kills", "damages", "map", "disk", "ranks", "soak")


def baseline(data: SmallData, folder: Path) -> tuple[Path, Path]:
    """A run that nobody disturbed, and one that was killed in its last epoch."""
    whole, half = folder / "whole", folder / "half"
    if train(data.settings(whole, **FULL)).end() != 0:
        raise RuntimeError(f"the undisturbed run failed, see {whole}.txt")
    life = train(data.settings(half, **FULL, training__checkpoint_minutes=1e-9))
    checkpoints = changes_of(half / "last.pt")
    life.until(lambda: checkpoints() >= 15)  # seven an epoch
    life.send(signal.SIGKILL)
    life.end()
    return whole, half


def main() -> int:
    """Exit status 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--damages", type=int, default=6)
    parser.add_argument("--soak", type=int, default=12, help="epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        nargs="*",
        help="some of kills, damages, map, disk, ranks, soak; and of those left out without it: lost, nodes, inputs, worlds, phases, stops, surroundings, limits, classes",
    )
    parser.add_argument("--dir", type=Path, help="kept; default: a temporary folder")
    parser.add_argument(
        "--data", type=Path, help="a small train.beton and val.beton; default: generated"
    )
    parser.add_argument("--json", type=Path, help="the rows, one object a line")
    given = parser.parse_args()
    if given.dir:
        given.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.dir or Path(temporary)).absolute()
        data = open_data(given.data) if given.data else write_data(folder)
        whole, half = baseline(data, folder)
        parts: dict[str, Callable[[], Iterable[Row]]] = {
            "kills": lambda: kills(data, folder, whole, given.kills, given.seed),
            "damages": lambda: damages(data, half, whole, folder, given.damages, given.seed),
            "map": lambda: truncated(data, folder),
            "disk": lambda: full_disk(data, folder, whole),
            "ranks": lambda: ranks(data, folder, signal.SIGSTOP),
            "lost": lambda: ranks(data, folder, signal.SIGKILL),
            "nodes": lambda: nodes(data, folder),
            "inputs": lambda: inputs(data, folder, whole),
            "worlds": lambda: worlds(folder),
            "phases": lambda: phases(data, folder),
            "stops": lambda: stops(data, folder, whole),
            "surroundings": lambda: surroundings(data, folder),
            "limits": lambda: limits(data, folder),
            "classes": lambda: classes(folder),
            "soak": lambda: soak(data, folder, given.soak, given.json),
        }  # fmt: skip
        rows: list[Row] = []
        for name, part in parts.items():
            if name in (given.only or BY_DEFAULT):
                for row in part():
                    rows.append(row)
                    used = sum(os.times()[:4])  # of this process and of all lives that ended
                    print(f"{used:5.0f} s {row.kind}: {row.injected}", file=sys.stderr, flush=True)
                    if given.json:
                        lines = [json.dumps(asdict(row)) + "\n" for row in rows]
                        given.json.write_text("".join(lines))
    marks = [("" if row.well else "WRONG ") + row.kind for row in rows]
    cells = [
        (mark, row.injected, row.happened, row.lost) for mark, row in zip(marks, rows, strict=True)
    ]
    print(tabulate(cells, ("", "injected", "happened", "lost"), maxcolwidths=[None, 38, 80, 20]))
    return int(not all(row.well for row in rows))


if __name__ == "__main__":
    sys.exit(main())

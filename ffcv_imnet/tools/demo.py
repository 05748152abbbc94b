"""Run the whole path on a generated data set: write, train, log, table, curve.

Draws small images of ten shapes, then runs the two scripts as a user would, printing each command
before it starts. Ends with status 1 if the network does not reach the accuracy that only a pipeline
which works can reach (`training.stop_at` of rn_configs/demo.yaml). Each time trains anew.
"""

import datetime
import os
import shlex
import sys
from pathlib import Path

from ffcv_imnet.core.errors import RunError
from ffcv_imnet.core.log import read_log
from ffcv_imnet.core.paths import path_of
from ffcv_imnet.core.signals import exit_when_asked, run_child
from ffcv_imnet.images.synthetic import CLASSES, write_tree
from ffcv_imnet.tools import ToolParser

HOME = Path(__file__).parents[2]  # of the two scripts: a checkout's root, or site-packages
CONFIG = Path("rn_configs/demo.yaml")
TRAIN_PER_CLASS, VAL_PER_CLASS, SEED = 400, 100, 0
LINEAR_TOP_1 = 0.17  # the best of ridge regression on pixels, see tests/test_shapes.py


def run(*command: str | Path) -> None:
    """Run a command of this Python, shown first. Raises RunError if it fails."""
    words = [str(word) for word in command]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    there = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
    if status := run_child([sys.executable, *words], os.environ | {"PYTHONPATH": there}):
        raise RunError(f"{words[0]} ended with status {status}; its own message stands above")


def script(name: str) -> Path:
    """As a user would name it: short in a checkout's root, in full elsewhere."""
    return Path(name) if Path(name).is_file() else HOME / name


def main(argv: list[str]) -> int:
    """Everything. Exit status 0 if the network learned, 1 if it did not or a step failed."""
    parser = ToolParser("demo", __doc__)
    parser.add_argument("--out_dir", type=path_of, default=Path("data/demo"), metavar="DIR",
                        help="where all of it goes (default: %(default)s)")  # fmt: skip
    parser.add_device()
    options = parser.parse_args(argv)
    out = options.out_dir
    exit_when_asked()
    images, betons = out / "images", out / "beton"
    number = len(CLASSES) * (TRAIN_PER_CLASS + VAL_PER_CLASS)
    print(
        f"{number:,} images of {len(CLASSES)} shapes in {images}: {', '.join(CLASSES)}",
        flush=True,
    )
    if not write_tree(images, TRAIN_PER_CLASS, VAL_PER_CLASS, SEED):
        print("(drawn by an earlier run)")
    for split in ("train", "val"):
        where = ("--data_dir", images, "--out_dir", betons)
        run(script("write_ffcv.py"), "--split", split, *where, "--force")

    folder = out / f"run-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    run(
        script("train_imagenet.py"), "--config", CONFIG,
        f"--data.train_dataset={betons / 'train.beton'}",
        f"--data.val_dataset={betons / 'val.beton'}",
        f"--logging.folder={folder}", f"--device={options.device}",
    )  # fmt: skip
    print(f"\n$ cat {folder / 'log.jsonl'}")
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        # The header is cut: the screen would drown in settings.
        long_header = line.startswith('{"type": "header"') and len(line) > 300
        print(f"{line[:300]} ... ({len(line)} characters)" if long_header else line)
    run("-m", "ffcv_imnet", "report", folder)
    return conclude(folder)


def conclude(folder: Path) -> int:
    """Say what was proved, what lies where and what comes next."""
    log = read_log(folder / "log.jsonl")
    assert log.summary is not None  # the training script ended with status 0
    top_1, goal = log.summary.best_top_1, log.headers[-1].settings["training"]["stop_at"]
    scale = f"chance is {1 / len(CLASSES):.0%}, a linear classifier on pixels {LINEAR_TOP_1:.0%}"
    if log.summary.reached is None:
        raise RunError(
            f"top-1 {top_1:.1%} stayed below {goal:.0%} ({scale}): the pipeline is broken; "
            f"see {folder / 'log.jsonl'}"
        )
    print(
        f"\nIt works: top-1 {top_1:.1%}; {goal:.0%} proves it ({scale}).\n"
        f"  log     {folder / 'log.jsonl'}\n"
        f"  curve   {folder / 'curve.png'}\n"
        f"  weights {folder / 'best.pt'}\n"
        "Next, with images in data/imagenet/{train,val}/<class>/:\n"
        "  .venv/bin/python write_ffcv.py --split train\n"
        "  .venv/bin/python write_ffcv.py --split val\n"
        "  .venv/bin/python train_imagenet.py --config rn_configs/rn18_16ep.yaml"
    )
    return 0

"""Whether this checkout trains exactly as another one did: bit-identical losses and checkpoints.

    git worktree add /tmp/before OLD_COMMIT
    python -m tests.compare_versions /tmp/before            # a table; exit status 1 if anything differs

The other checkout writes a small data set, a run that is stopped by its time limit, and a sweep. Both
train 20 steps of each of its recipes, at a batch of 8 and one resolution, without torch.compile; this one goes on
with the other's run and sweep. Run it after a change that is meant to change no result.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from ffcv_imnet.core.log import read_log
from ffcv_imnet.train import checkpoint

ROOT = Path(__file__).parents[1]
STEPS, BATCH = 20, 8
# Fields of a log that no version repeats.
CLOCK = ("seconds", "images_per_second")


def run(checkout: Path, *words: str) -> str:
    """A Python command in `checkout`, on two threads. Returns what it printed."""
    command = [sys.executable, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def write_data(checkout: Path, folder: Path) -> None:
    """STEPS batches for training and 20 images for validation, of ten classes of generated shapes."""
    code = "import sys; from pathlib import Path\n"
    code += "try:\n from ffcv_imnet.images.synthetic import write_tree\n"
    code += "except ImportError:\n from ffcv_imnet.shapes import write_tree\n"
    code += f"write_tree(Path(sys.argv[1]), train_per_class={STEPS * BATCH // 10}, val_per_class=2)"
    run(checkout, "-c", code, str(folder / "images"))
    for split in ("train", "val"):
        options = ["--data_dir", str(folder / "images"), "--out_dir", str(folder)]
        run(checkout, "write_ffcv.py", "--split", split, *options)


def options(recipe: Path, data: Path, out: Path) -> list[str]:
    """The recipe's optimizer, network and augmentation; one epoch of STEPS steps at its first size."""
    staged = "stages" in recipe.read_text()
    return [
        "train_imagenet.py", f"--config={recipe}", f"--logging.folder={out}",
        f"--data.train_dataset={data / 'train.beton'}", f"--data.val_dataset={data / 'val.beton'}",
        f"--training.batch_size={BATCH}", "--validation.batch_size=20", "--training.compile=false",
        "--training.epochs=1", "--lr.lr_peak_epoch=0.2", "--training.precision=fp32",
        *(["--plan.stages=[{epochs: 1, resolution: 128}]"] if staged else
          ["--resolution.max_res=128", "--resolution.min_res=128", "--resolution.start_ramp=0", "--resolution.end_ramp=0"]),
    ]  # fmt: skip


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The log's epochs, without what the clock shapes."""
    return [
        {k: v for k, v in vars(epoch).items() if not any(word in k for word in CLOCK)}
        for epoch in read_log(folder).epochs
    ]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of last.pt: weights, statistics, momentum, average, random state."""
    found: dict[str, torch.Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(f"{name}.{key}", item)

    state = checkpoint.load(folder / "last.pt")
    for part in ("model", "optimizer", "ema"):
        collect(part, state[part])
    return found


def same(a: Path, b: Path) -> str:
    """ "identical", or the first difference."""
    if numbers(a) != numbers(b):
        return f"logs differ: {numbers(a)} {numbers(b)}"
    ours, theirs = tensors(a), tensors(b)
    if ours.keys() != theirs.keys():
        return f"checkpoints hold different tensors: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    odd = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    return (
        f"{len(odd)} tensors differ, {odd[0]} first" if odd else f"identical ({len(ours)} tensors)"
    )


def main() -> int:
    """Print the table. Exit status 0 if everything is identical, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("other", type=Path, help="a checkout of the version to compare with")
    other: Path = parser.parse_args().other.resolve()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(other, folder)
        for recipe in sorted((other / "rn_configs").glob("*.yaml")):
            old, new = folder / "old" / recipe.stem, folder / "new" / recipe.stem
            run(other, *options(recipe, folder, old))
            run(ROOT, *options(recipe, folder, new))
            epoch = read_log(new).epochs[0]
            rows.append((recipe.name, f"{epoch.train_loss:.6f}", same(old, new)))
            print(rows[-1], file=sys.stderr, flush=True)

        demo = options(other / "rn_configs/demo.yaml", folder, folder / "stopped")
        demo = [*demo, "--training.epochs=2"]
        run(other, *demo, "--training.max_hours=0.003")  # a checkpoint at once
        run(ROOT, *demo, "--resume=auto")
        run(other, *demo, f"--logging.folder={folder / 'whole'}")
        rows.append(("a run of the other, resumed", "", same(folder / "whole", folder / "stopped")))
        sweep = folder / "sweep.yaml"
        sweep.write_text(
            f"config: {folder / 'whole/config.yaml'}\nvariants: {{slow: {{lr.lr: 0.1}}}}\n"
        )
        words = ["-m", "ffcv_imnet", "sweep", str(sweep), f"--out={folder / 'sweep'}"]
        run(other, *words)
        before = (folder / "sweep/slow/seed0/log.jsonl").read_bytes()
        run(ROOT, *words)
        kept = before == (folder / "sweep/slow/seed0/log.jsonl").read_bytes()
        rows.append(("a sweep of the other", "", "identical" if kept else "was trained again"))
    print(tabulate(rows, ("recipe", "train loss", "against the other"), disable_numparse=True))
    return 0 if all(row[2].startswith("identical") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

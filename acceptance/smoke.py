"""Short training runs: a recipe from end to end, a run that is killed, a batch that does not fit.

    python -m acceptance.smoke recipe rn18_10ep bf16 --work DIR
    python -m acceptance.smoke resume --work DIR
    python -m acceptance.smoke memory --work DIR

Each runs `train_imagenet.py` as a user would, on the generated images of DIR/shapes, and writes what
it saw as JSON where the acceptance asks for it ($ACCEPTANCE_JSON).
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from acceptance.checks import read_log
from ffcv_imnet.config.domains import Stage
from ffcv_imnet.config.parsing import load, to_yaml
from ffcv_imnet.config.schedules import stages
from ffcv_imnet.config.schema import Resolution, Settings
from ffcv_imnet.core.errors import Parser, RunError, run_main

# Of a ResNet-50's training step in fp32 at 512 px, about: 172 MB at 224 px, times the area. Training tries an eighth
# and a quarter of the batch that did not fit, which must fit for it to name a number.
BYTES_AN_IMAGE, TOO_MUCH = 0.9e9, 2.5
EPOCHS = 3  # of the run that is killed


def main() -> int:
    """Exit status 0 if the run did what it should."""
    parser = Parser(prog="python -m acceptance.smoke", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("recipe", "resume", "memory"):
        one = kinds.add_parser(kind)
        if kind == "recipe":
            one.add_argument("recipe")
            one.add_argument("precision")
            one.add_argument("--compile", action="store_true")
            one.add_argument("--processes", type=int, default=1, help="by torchrun")
        one.add_argument("--work", type=Path, required=True)
        one.add_argument(
            "--resolution", type=int, help="a rehearsal: of everything, px, on the CPU"
        )
    options = parser.parse_args()
    name, said = {"recipe": recipe, "resume": resume, "memory": memory}[options.kind](options)
    text = json.dumps(said)
    print(text)
    if folder := os.environ.get("ACCEPTANCE_JSON"):
        (Path(folder) / f"{name}.json").write_text(text + "\n")
    return int(said["status"])


# ---- recipes ------------------------------------------------------------------------------------


def shortened(settings: Settings, resolution: int | None, batch: int) -> Settings:
    """An epoch of each stage of the plan, at its own resolution or at `resolution`."""
    sides = dict.fromkeys(stage.resolution for stage in stages(settings))
    rows = tuple(Stage(epochs=1, resolution=resolution or side) for side in sides)
    validation = resolution or settings.validation.resolution
    return replace(
        settings,
        plan=replace(settings.plan, stages=rows),
        resolution=Resolution(),
        lr=replace(settings.lr, lr_peak_epoch=0.5),
        training=replace(settings.training, epochs=len(rows), batch_size=batch, stop_at=0.0),
        validation=replace(settings.validation, resolution=validation, batch_size=batch),
    )


def recipe(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A shortened recipe in one 16-bit type."""
    several = options.processes > 1
    what = "processes" if several else "compiled" if options.compile else options.precision
    name = f"{options.recipe}_{what}"
    small = options.resolution is not None
    settings = load(f"rn_configs/{options.recipe}.yaml", training__precision=options.precision)
    batch = (8 if small else 64 if several else 256) * options.processes
    settings = shortened(settings, options.resolution, batch)
    run = options.work / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    written = options.work / "runs" / f"{name}.yaml"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(to_yaml(settings))
    words = ["--config", str(written), f"--training.compile={options.compile}".lower()]
    status = train(options, run, *words, processes=options.processes).wait()
    said: dict[str, Any] = {"status": status}
    if status == 0:
        header = json.loads((run / "log.jsonl").read_text().splitlines()[0])
        epochs, _ = read_log(run)
        said |= {
            "device": header["device"],
            "precision": header["precision"],
            "asked": options.precision,
            "first_loss": epochs[0]["train_loss"],
            "last_loss": epochs[-1]["train_loss"],
            "peak_memory_bytes": epochs[-1].get("peak_memory_bytes"),
            "compile_seconds": sum(epoch.get("compile_seconds", 0) for epoch in epochs),
        }
    shutil.rmtree(run, ignore_errors=True)  # its checkpoints are large
    return f"smoke.{name}", said


def train(
    options: argparse.Namespace, run: Path, *words: str, processes: int = 1, **streams: Any
) -> "subprocess.Popen[str]":
    """`train_imagenet.py` on the generated images, started, by torchrun if there are several processes."""
    device = "cpu" if options.resolution is not None else "cuda"
    folder = options.work / "shapes"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["train_imagenet.py", *words, f"--device={device}"]
    command += [
        f"--data.train_dataset={folder}/train.beton",
        f"--data.val_dataset={folder}/val.beton",
    ]
    command += [f"--logging.folder={run}"]
    return subprocess.Popen(command, text=True, **streams)


# ---- killed and resumed -------------------------------------------------------------------------


def resume(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """One run that is left alone; one that is asked to end, resumed, killed, and resumed again."""
    side, batch = (options.resolution, 8) if options.resolution else (64, 32)
    words = [
        "--model.arch=resnet18",
        f"--training.epochs={EPOCHS}",
        f"--training.batch_size={batch}",
    ]
    words += [f"--resolution.{end}={side}" for end in ("min_res", "max_res")]
    words += [f"--validation.resolution={side}", "--validation.batch_size=64", "--lr.lr=0.05"]
    words += ["--lr.lr_peak_epoch=1", "--resume", "auto"]
    run, plain = options.work / "runs/resume", options.work / "runs/plain"
    for folder in (run, plain):
        shutil.rmtree(folder, ignore_errors=True)
    if train(options, plain, *words).wait():
        raise RunError("a short run failed; its message stands above")
    term_status = end_after(train(options, run, *words), run, 1, signal.SIGTERM)
    end_after(train(options, run, *words), run, 2, signal.SIGKILL)
    status = train(options, run, *words).wait()
    epochs, summary = read_log(run)
    _, plain_summary = read_log(plain)
    for folder in (run, plain):
        for file in folder.glob("*.pt"):
            file.unlink()
    return "survive.resume", {
        "status": status,
        "term_status": term_status,
        "epochs": [epoch["epoch"] for epoch in epochs],
        "wanted": list(range(EPOCHS)),
        "top_1": summary["best_top_1"] if summary else 0.0,
        "plain_top_1": plain_summary["best_top_1"] if plain_summary else 0.0,
    }


def end_after(process: "subprocess.Popen[str]", run: Path, epochs: int, number: int) -> int:
    """Send a signal once the run's log has so many epochs; what it ended with, 128 + n for signal n."""
    while process.poll() is None:
        if len(read_log(run)[0]) >= epochs:
            process.send_signal(number)
            break
        time.sleep(0.02)
    status = process.wait()
    return 128 - status if status < 0 else status


# ---- out of memory ------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A batch of two and a half times the GPU's memory; then the one that the message names."""
    look = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    samples = round(TOO_MUCH * int(done.stdout) / BYTES_AN_IMAGE)
    run = options.work / "runs/memory"
    words = [
        "--model.arch=resnet50",
        "--training.epochs=1",
        "--training.precision=fp32",
        "--lr.lr=0.001",
    ]
    words += ["--lr.lr_peak_epoch=0.5", "--resolution.min_res=512", "--resolution.max_res=512"]
    words += ["--validation.resolution=64", "--validation.batch_size=64"]
    words += ["--data.batches_ahead=1"]
    shutil.rmtree(run, ignore_errors=True)
    first = train(options, run, *words, f"--training.batch_size={samples}", stderr=subprocess.PIPE)
    _, text = first.communicate()
    message = next((line for line in text.splitlines() if line.startswith("error:")), text[-300:])
    said: dict[str, Any] = {"status": 0, "message": message, "first_status": first.returncode}
    if found := re.search(r"(\d+) would fit", message):
        said["fits"] = int(found[1])
        shutil.rmtree(run, ignore_errors=True)
        said["fits_status"] = train(
            options, run, *words, f"--training.batch_size={found[1]}"
        ).wait()
    shutil.rmtree(run, ignore_errors=True)
    return "survive.memory", said


if __name__ == "__main__":
    run_main(main)

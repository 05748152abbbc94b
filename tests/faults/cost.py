"""What safety costs: seconds a checkpoint of a ResNet-18, and seconds from a start to the first step.

    python -m tests.faults.cost --dir /disk/of/the/runs

By hand, on a machine that does nothing else. A start is a new process that resumes (imports, data,
checkpoint and one step on generated images included), with everything in the page cache.
"""

import argparse
import json
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.machine.distributed import describe_world
from ffcv_imnet.train import checkpoint
from ffcv_imnet.train.epoch import build_learner
from ffcv_imnet.train.run_dir import LAST, PREVIOUS
from tests.faults.lives import ROOT, write_data

TRIALS = 6


def save_seconds(settings: Settings, folder: Path) -> list[float]:
    """Of whole checkpoints: gathered, written, flushed, read back, renamed, the one before kept."""
    learner = build_learner(settings, 1000, describe_world())
    for parameter in learner.model.parameters():
        parameter.grad = parameter.new_ones(parameter.shape)
    learner.optimizer.step()  # momentum, as large as the weights
    taken = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        checkpoint.save(checkpoint.state_of(learner, {}), folder / LAST, folder / PREVIOUS)
        taken.append(time.perf_counter() - started)
    return taken


def start_seconds(settings: Settings, folder: Path) -> list[tuple[float, float]]:
    """From the command to its first step, resumed, and processor seconds of the whole process, which
    SIGTERM ends after that step, with a checkpoint."""
    config = folder / "cost.yaml"
    config.write_text(to_yaml(settings))
    heartbeat = Path(settings.logging.folder) / "heartbeat.json"
    words = [sys.executable, "train_imagenet.py", "--config", str(config), "--resume", "auto"]
    taken = []
    for _ in range(TRIALS):
        heartbeat.unlink(missing_ok=True)
        started, used = time.perf_counter(), processor_seconds()
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while not heartbeat.exists() and process.poll() is None:
                time.sleep(0.01)
            seconds = time.perf_counter() - started
            process.send_signal(signal.SIGTERM)
        taken.append((seconds, processor_seconds() - used))
    return taken[1:]  # the first had nothing to resume, and may have filled the cache


def processor_seconds() -> float:
    """Of all children that ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Print both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--dir", type=Path, required=True)
    folder = parser.parse_args().dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    data = write_data(folder, per_class=100)
    settings = data.settings(
        folder / "run",
        model__arch="resnet18",
        training__precision="auto",
        training__epochs=1000,
        resolution__min_res=64,
        resolution__max_res=64,
        training__batch_size=64,
    )
    saved, started = save_seconds(settings, folder), start_seconds(settings, folder)
    size = (folder / LAST).stat().st_size
    interval = 60 * settings.training.checkpoint_minutes
    said = {
        "checkpoint_bytes": size,
        "checkpoint_seconds": [round(s, 3) for s in saved],
        "percent_of_training": round(100 * statistics.median(saved) / interval, 3),
        "start_seconds": [round(seconds, 2) for seconds, _ in started],
        "median_start_seconds": round(statistics.median(s for s, _ in started), 2),
        "start_processor_seconds": [round(used, 2) for _, used in started],
    }
    print(json.dumps(said, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

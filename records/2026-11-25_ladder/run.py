"""Each option alone and all together, on a narrow residual network: python records/2026-11-25_ladder/run.py OUT CONFIG [SEED...]

Runs one after another in this process, what is done skipped, what was begun goes on. From the repository's root.
"""

import sys
import time
from pathlib import Path

import yaml
from torch import nn

sys.path.insert(0, ".")

import train_imagenet
from ffcv_imnet.config.parsing import load
from ffcv_imnet.models.registry import register
from ffcv_imnet.models.slim import Slim

HERE = Path(__file__).parent


@register
def narrow(classes: int, zero_gamma: bool) -> nn.Module:
    """slim13's kind with four blocks, of 64 and 128 channels."""
    return Slim(classes, ((64, 2), (128, 2)), zero_gamma)


def main() -> int:
    """Exit status: of the first run that was stopped or failed."""
    out, config, seeds = Path(sys.argv[1]), sys.argv[2], list(map(int, sys.argv[3:])) or [0]
    variants = yaml.safe_load((HERE / "variants.yaml").read_text())
    for seed in seeds:
        for name, options in variants.items():
            folder = out / name / f"seed{seed}"
            given = {key.replace(".", "__"): value for key, value in options.items()}
            given |= {"training__seed": seed, "logging__folder": folder}
            started = time.perf_counter()
            if status := train_imagenet.train(load(config, **given), "auto", started):
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())

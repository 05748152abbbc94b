"""A grid of soap.lr, and `tune`, on a narrow residual network. From the repository's root:

python records/2026-12-01_tune_soap/grid.py grid CONFIG OUT RATE...     # whole runs, one after another; what is done is skipped
python records/2026-12-01_tune_soap/grid.py tune [what `python -m ffcv_imnet tune` takes]
"""

import sys
import time
from pathlib import Path

from torch import nn

sys.path.insert(0, ".")

import train_imagenet
from ffcv_imnet.config.parsing import load
from ffcv_imnet.models.registry import register
from ffcv_imnet.models.slim import Slim
from ffcv_imnet.tools import tune


@register
def narrow(classes: int, zero_gamma: bool) -> nn.Module:
    """slim13's kind with four blocks, of 64 and 128 channels."""
    return Slim(classes, ((64, 2), (128, 2)), zero_gamma)


def grid(config: str, out: Path, rates: list[float]) -> int:
    """Exit status: of the first run that was stopped or failed."""
    for lr in rates:
        settings = load(config, soap__lr=lr, logging__folder=out / f"{lr:g}")
        if status := train_imagenet.train(settings, "auto", time.perf_counter()):
            return status
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "grid":
        sys.exit(grid(sys.argv[2], Path(sys.argv[3]), list(map(float, sys.argv[4:]))))
    sys.exit(tune.main(sys.argv[2:]))

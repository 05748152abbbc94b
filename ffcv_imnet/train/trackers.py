"""The log for TensorBoard and for Weights & Biases, where a setting asks for it.

Both are fed the numbers of the line that the JSON log gets, under its names, an epoch a step.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.log import Epoch, Header
from ffcv_imnet.core.optional import is_there


def check_trackers(trackers: Sequence[str]) -> None:
    """Raises UsageError if one of `logging.trackers` has no package of its name installed."""
    for package in trackers:
        if not is_there(package):  # looked for and not imported: either takes seconds
            raise UsageError(
                f"logging.trackers: {package} is not installed: pip install {package}, "
                "or leave it out"
            )


def numbers(epoch: Epoch) -> dict[str, float]:
    """Every field of the record that applies, but the epoch itself; of its norms those of the last step."""
    every = {item.name: getattr(epoch, item.name) for item in fields(epoch)}
    norms = (every.pop("norms") or [{}])[-1]
    every |= {name: value for name, value in norms.items() if name not in ("step", "loss")}
    return {name: value for name, value in every.items() if value is not None and name != "epoch"}


class Trackers:
    """What `logging.trackers` names, fed an epoch at a time.

    Args:
        folder: RUN. TensorBoard reads it (`tensorboard --logdir RUN`); W&B writes RUN/wandb, offline
            (`wandb sync RUN/wandb/offline-run-*` uploads it).
        header: of this start; a resumed run goes on where the log does.
        names: of `logging.trackers`; none on ranks other than 0.
    """

    def __init__(self, folder: Path, header: Header, names: Sequence[str]) -> None:
        self.tensorboard: Any = None
        self.wandb: Any = None
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder), purge_step=header.first_epoch)
        if "wandb" in names:
            import wandb

            # The same name on every resumption, so that the parts are synchronised into one run.
            name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            self.wandb = wandb.init(
                mode="offline", dir=folder, project="ffcv-imnet", name=folder.name, id=name,
                config=header.settings,
            )  # fmt: skip

    def add(self, epoch: Epoch) -> None:
        """One epoch, on the disk when this returns."""
        if self.tensorboard is not None:
            for name, value in numbers(epoch).items():
                self.tensorboard.add_scalar(name, value, epoch.epoch)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(numbers(epoch), step=epoch.epoch)

    def close(self) -> None:
        """Finish what is open."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

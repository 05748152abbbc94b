"""The log for TensorBoard and for Weights & Biases, where a setting asks for it.

Both are fed the numbers of the line that the JSON log gets, under its names, an epoch a step.
"""

import hashlib
import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any

from ffcv_imnet.config.schema import Logging
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.log import Epoch, Header


def check_boards(logging: Logging) -> None:
    """Raises UsageError if a board is asked for whose package is not installed."""
    for package in ("tensorboard", "wandb"):
        if getattr(logging, package) and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"logging.{package} needs the package {package}: pip install {package}, "
                "or leave the setting out"
            )


def numbers(epoch: Epoch) -> dict[str, float]:
    """Every field of the record that applies, but the epoch itself."""
    every = {item.name: getattr(epoch, item.name) for item in fields(epoch)}
    return {name: value for name, value in every.items() if value is not None and name != "epoch"}


class Boards:
    """The boards that `header.settings` asks for.

    Args:
        folder: RUN. TensorBoard reads it (`tensorboard --logdir RUN`); W&B writes RUN/wandb, offline
            (`wandb sync RUN/wandb/offline-run-*` uploads it).
        header: of this start; a resumed run goes on where the log does.
        enabled: False opens nothing (ranks other than 0).
    """

    def __init__(self, folder: Path, header: Header, enabled: bool = True) -> None:
        wanted = header.settings["logging"] if enabled else {}
        self.tensorboard: Any = None
        self.wandb: Any = None
        if wanted.get("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder), purge_step=header.first_epoch)
        if wanted.get("wandb"):
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

"""RUN, the folder of one run: log.jsonl, config.yaml, classes.txt, checkpoints, heartbeat.json.

Resume policy: last.pt holds the records of its epochs, and how far the one after them has come; a
resumed run first makes log.jsonl say exactly those, then goes on with the next step. An epoch counts
once its checkpoint has its name. If last.pt is damaged, previous.pt, the checkpoint before, is
taken. A run is resumed only under the settings and data that shape its result.
"""

import fcntl
import functools
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.config.schema import Settings, differences, to_dict
from ffcv_imnet.core import log
from ffcv_imnet.core.atomic import NotWritten, atomic_write, link, make_folder, rename
from ffcv_imnet.core.errors import NonFiniteLoss, RunError, UsageError, not_written
from ffcv_imnet.core.log import LOG, Epoch, Header, Lowered, Reached, Record, Summary
from ffcv_imnet.data.beton import Manifest
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.train import checkpoint
from ffcv_imnet.train.checkpoint import Trained
from ffcv_imnet.train.heartbeat import Heartbeat

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
HEARTBEAT = "heartbeat.json"
# Of training.on_nonfinite_loss=back: the learning rate's factor each time, and how often at most.
LOWER_BY, LOWER_TIMES = 0.5, 3


@dataclass
class RunFolder:
    """What the folder knows of its run so far."""

    path: Path
    settings: Settings
    classes: tuple[str, ...]
    data: dict[str, str]  # content checksums of train and val
    state: dict[str, Any] | None = None  # the checkpoint to go on from
    trained: Trained = field(default_factory=Trained)  # of the epoch after those in `records`
    elapsed_seconds: float = 0.0  # up to the checkpoint, from the start of the run's first part
    damaged: bool = False  # last.pt is, and `state` is the one before
    records: list[Record] = field(default_factory=list)
    release: Callable[[], object] = lambda: None  # lets another process train in the folder

    @property
    def epochs(self) -> list[Epoch]:
        """The epochs done."""
        return [record for record in self.records if isinstance(record, Epoch)]

    @property
    def lowered(self) -> list[Lowered]:
        """Each time that the loss was lost and the run went back."""
        return [record for record in self.records if isinstance(record, Lowered)]

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the target was reached and ends the run."""
        training = self.settings.training
        target_ends_it = training.stop_when_reached and self.reached() is not None
        return len(self.epochs) >= training.epochs or target_ends_it

    def reached(self) -> Reached | None:
        """The first epoch at or above `training.stop_at`, if there is one."""
        return log.first_reached(self.epochs, self.settings.training.stop_at)

    @property
    def lr_scale(self) -> float:
        """All rates from here on, over the recipe's: below one once the loss was lost."""
        return self.lowered[-1].lr_scale if self.lowered else 1.0

    @property
    def recipe(self) -> Settings:
        """The settings to train with: those of the run, at `lr_scale`."""
        lr = self.settings.lr
        return replace(self.settings, lr=replace(lr, lr=lr.lr * self.lr_scale))

    @functools.cached_property
    def heartbeat(self) -> Heartbeat:
        """The file that says that the run lives."""
        return Heartbeat(self.path / HEARTBEAT)

    def check_agreement(self, world: World) -> None:
        """Raises UsageError unless all processes found the same run, data and settings."""
        where = [
            len(self.epochs),
            self.trained.steps,
            self.data,
            differences(to_dict(self.settings), {}),
        ]
        if not world.agree(repr(where)):
            raise UsageError(
                f"process {world.rank} of {world.size} finds epoch {len(self.epochs)}, step "
                f"{self.trained.steps} in logging.folder {self.path}, another finds another, or has other "
                f"data or settings: give all machines the same command, data, and a folder that all share"
            )

    def start(self, header: Header) -> None:
        """Write what stands in the folder before the first step.

        Raises:
            UsageError: the folder cannot be written, or another process is training in it.
        """
        self.records.append(header)
        try:
            make_folder(self.path)
            self._lock()
            if self.damaged:  # kept for whoever wants to look, and out of previous.pt's way
                rename(self.path / LAST, self.path / "damaged.pt")
            with atomic_write(self.path / "config.yaml", "w") as file:
                file.write(to_yaml(self.settings))
            with atomic_write(self.path / "classes.txt", "w") as file:
                file.writelines(f"{name}\n" for name in self.classes)
            log.rewrite(self.path / LOG, self.records)
        except OSError as error:
            raise UsageError(f"logging.folder: {not_written(self.path, error)}") from None
        except NotWritten as error:
            raise UsageError(f"logging.folder: {error}") from None

    def _lock(self) -> None:
        """Held until `release`, or the end of the process. Leaves no file behind."""
        folder = os.open(self.path, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"logging.folder {self.path}: another process is training in it; wait for it, or "
                f"name another folder"
            ) from None
        except OSError:
            pass  # a file system without locks

    def save_within(
        self, learner: checkpoint.Learner, trained: Trained, elapsed_seconds: float
    ) -> None:
        """Keep how far an epoch has come. Raises RunError; see `checkpoint.save`."""
        run = {
            "settings": to_dict(self.settings),
            "data": self.data,
            "classes": list(self.classes),
            "records": [log.to_dict(record) for record in self.records],
            "trained": asdict(replace(trained, signal=None, late=False)),
            "elapsed_seconds": elapsed_seconds,
        }
        state = checkpoint.state_of(learner, run)
        checkpoint.save(state, self.path / LAST, self.path / PREVIOUS)

    def save(self, learner: checkpoint.Learner) -> None:
        """Keep the epoch that was appended to `records`: checkpoint first, then its line in the log."""
        self.save_within(learner, Trained(), self.epochs[-1].elapsed_seconds)
        *earlier, newest = [log.best_of(epoch)[0] for epoch in self.epochs]
        if newest > max(earlier, default=-1.0):
            link(self.path / LAST, self.path / BEST)
        log.append(self.path / LOG, self.epochs[-1])

    def go_back(
        self, learner: checkpoint.Learner, lost: NonFiniteLoss, elapsed_seconds: float, world: World
    ) -> Trained:
        """To the last checkpoint whose weights are good, all processes together; `recipe` has a
        lower rate from then on.

        Saved and said by the first process, so that a resumed run keeps the rate. Returns how far
        the epoch has come.

        Raises:
            NonFiniteLoss: the run is to stop instead, or has no checkpoint of this epoch.
            RunError: it went back often enough.
        """
        training, times = self.settings.training, len(self.lowered)
        if training.on_nonfinite_loss != "back":
            raise lost
        if times >= LOWER_TIMES:
            raise RunError(
                f"the loss became NaN or infinite in epoch {lost.epoch}, step {lost.step}, also at "
                f"{self.lr_scale:g} of the recipe's learning rate, lowered {times} times: start again "
                f"in another logging.folder with a much lower lr.lr"
            ) from lost
        state, trained = self._within(LAST, lost)
        if trained.steps == lost.step:  # its own weights give no finite loss
            state, trained = self._within(PREVIOUS, lost)
        checkpoint.restore(learner, state, self.path)
        world.least(0)  # all have read before one writes
        scale, step = self.lr_scale * LOWER_BY, trained.steps
        self.records.append(
            Lowered(epoch=lost.epoch, step=lost.step, back_to_step=step, lr_scale=scale)
        )
        if world.is_main:
            self.save_within(learner, trained, elapsed_seconds)
            log.rewrite(self.path / LOG, self.records)
            print(
                f"epoch {lost.epoch}: the loss became NaN or infinite in step {lost.step}; on from step "
                f"{step} of the last checkpoint, at {scale:g} of the recipe's learning rate",
                flush=True,
            )
        return trained

    def _within(self, name: str, lost: NonFiniteLoss) -> tuple[dict[str, Any], Trained]:
        """A checkpoint of the epoch whose loss was lost, and how far it has come. Raises `lost`."""
        if not (self.path / name).is_file():
            raise lost
        state = checkpoint.load(self.path / name)
        saved = state["run"]
        if sum(record["type"] == Epoch.TYPE for record in saved["records"]) != lost.epoch:
            raise lost
        return state, Trained(**saved["trained"])

    def finish(
        self, elapsed_seconds: float, dollars_per_hour: float | None, stopped: str | None
    ) -> Summary:
        """Write the log's last line; there must be an epoch. One that a limit `stopped` can be resumed."""
        best = max(self.epochs, key=lambda epoch: log.best_of(epoch)[0])
        summary = Summary(
            reached=self.reached(),
            best_top_1=log.best_of(best)[0],
            best_epoch=best.epoch,
            epochs=len(self.epochs),
            elapsed_seconds=elapsed_seconds,
            cost_dollars=cost_of(elapsed_seconds, dollars_per_hour),
            stopped=stopped,
        )
        self.records.append(summary)
        log.rewrite(self.path / LOG, self.records)
        return summary


def cost_of(seconds: float, dollars_per_hour: float | None) -> float | None:
    """Dollars, to the cent's hundredth; None without a price."""
    return None if dollars_per_hour is None else round(seconds / 3600 * dollars_per_hour, 4)


def open_run(settings: Settings, resume: str | None, train: Manifest, val: Manifest) -> RunFolder:
    """The folder `logging.folder`, empty or with what `--resume` asks for. Nothing is written.

    Args:
        resume: None (the folder must hold no run), "auto" (go on, or start where there is nothing
            to go on from), or a checkpoint's path.

    Raises:
        UsageError: the folder holds another run; the checkpoint was made under other settings or
            from other data.
        RunError: the checkpoint is damaged.
    """
    folder = Path(settings.logging.folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"logging.folder {folder} is a file; name a folder")
    data = {"train": train.content_checksum, "val": val.content_checksum}
    run = RunFolder(folder, settings, train.classes, data)
    source = _checkpoint_to_resume(folder, resume)
    if source is None:
        return run

    run.state = _load(source)
    if run.state is None:
        run.state, run.damaged = checkpoint.load(source.with_name(PREVIOUS)), True
    saved = run.state["run"]
    if differ := differences(to_dict(settings), saved["settings"]):
        raise UsageError(
            f"--resume: {source} was made under other settings ({'; '.join(differ)}); give the same "
            f"ones, or start afresh in another logging.folder"
        )
    changed = [split for split in data if data[split] != saved["data"][split]]
    if changed or list(run.classes) != saved["classes"]:
        which = " and ".join(changed) or "classes"
        raise UsageError(f"--resume: {source} was made from other data ({which} differ)")
    run.records = [log.from_dict(record) for record in saved["records"]]
    run.trained = Trained(**saved.get("trained", {}))
    so_far = run.epochs[-1].elapsed_seconds if run.epochs else 0.0
    run.elapsed_seconds = saved.get("elapsed_seconds", so_far)
    return run


def _load(source: Path) -> dict[str, Any] | None:
    """`source`'s state; None, said, if it is a damaged last.pt and previous.pt is whole.

    Without that the message names best.pt, where it is another file.
    """
    previous, best = source.with_name(PREVIOUS), source.with_name(BEST)
    try:
        return checkpoint.load(source)
    except RunError as error:
        if source.name != LAST:
            raise
        if previous.is_file() and checkpoint.damage_of(previous) is None:
            print(f"{error}: going on from {previous}, the one before", file=sys.stderr)
            return None
        if not best.is_file() or best.samefile(source):
            raise RunError(f"{error}; start again in another logging.folder") from error
        raise RunError(f"{error}; --resume {best} goes on from the best epoch") from error


def _checkpoint_to_resume(folder: Path, resume: str | None) -> Path | None:
    holds_run = (folder / LOG).exists() or (folder / LAST).exists()
    if resume is None:
        if holds_run:
            raise UsageError(
                f"logging.folder {folder} holds a run already; add --resume auto to go on with it, "
                f"or name another folder with --logging.folder=..."
            )
        return None
    if resume == "auto":
        # Without last.pt: a run that went on from previous.pt was stopped before its first checkpoint.
        return next((folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()), None)
    source = Path(resume)
    if not source.is_file():
        raise UsageError(
            f"--resume {source}: no such checkpoint; --resume auto goes on with the run in {folder}"
        )
    if holds_run and source.resolve().parent != folder.resolve():
        raise UsageError(
            f"logging.folder {folder} holds another run than --resume {source}: name a new folder "
            f"with --logging.folder=..., or {source.parent} to go on there"
        )
    return source

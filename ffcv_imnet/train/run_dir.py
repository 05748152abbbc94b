"""RUN, the folder of one run: log.jsonl, config.yaml, classes.txt, checkpoints, heartbeat.json.

Resume policy: last.pt holds the records of its epochs, and how far the one after them has come; a
resumed run first makes log.jsonl say exactly those, then goes on with the next step. An epoch counts
once its checkpoint has its name. If last.pt is damaged, previous.pt, the checkpoint before, is
taken. A run is resumed only under the settings and data that shape its result.
"""

import datetime
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.config.schedules import EpochPlan
from ffcv_imnet.config.schema import Lr, Settings, differences, to_dict
from ffcv_imnet.core import log, provenance
from ffcv_imnet.core.atomic import NotWritten, atomic_write, link, locked, make_folder, rename
from ffcv_imnet.core.errors import NonFiniteLoss, RunError, UsageError, not_written
from ffcv_imnet.core.log import LOG, Epoch, Header, Lowered, Reached, Record, Summary
from ffcv_imnet.core.names import number_of
from ffcv_imnet.core.paths import what_is
from ffcv_imnet.data.beton import Manifest
from ffcv_imnet.machine.checks import say_at_start
from ffcv_imnet.machine.distributed import Interrupted, World
from ffcv_imnet.train import checkpoint
from ffcv_imnet.train.checkpoint import Learner, Trained
from ffcv_imnet.train.heartbeat import SILENT, Heartbeat
from ffcv_imnet.train.start import Start, describe_start
from ffcv_imnet.train.trackers import Trackers
from ffcv_imnet.train.validate import Validation

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
HEARTBEAT = "heartbeat.json"
# Of training.on_nonfinite_loss=back: the learning rate's factor each time, and how often at most.
LOWER_BY, LOWER_TIMES = 0.5, 3


@dataclass
class RunFolder:
    """One run: what its folder holds, and how far it has come. The first process writes; the others
    keep the same books and write nothing."""

    path: Path
    settings: Settings
    classes: tuple[str, ...]
    data: dict[str, str]  # content checksums of train and val
    world: World
    began: float  # perf_counter() when the run would have begun, had it never been stopped
    state: dict[str, Any] | None = None  # the checkpoint to go on from, until `start`
    trained: Trained = field(default_factory=Trained)  # of the epoch after those in `records`
    damaged: bool = False  # last.pt is, and `state` is the one before
    from_last: bool = False  # `state` is that of a sound last.pt
    elsewhere: Path | None = None  # the checkpoint, if it is in another folder
    records: list[Record] = field(default_factory=list)
    heart: Heartbeat = SILENT
    trackers: Trackers | None = None
    release: Callable[[], object] = lambda: None  # lets another process train in the folder

    @property
    def epochs(self) -> list[Epoch]:
        """The epochs done."""
        return [record for record in self.records if isinstance(record, Epoch)]

    @property
    def lowered(self) -> list[Lowered]:
        """Each time that the loss was not finite and the run went back."""
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

    def elapsed(self) -> float:
        """Seconds since the run began, its earlier parts included."""
        return time.perf_counter() - self.began

    @property
    def lr_scale(self) -> float:
        """All learning rates from here on, over the recipe's: below one after a non-finite loss."""
        return self.lowered[-1].lr_scale if self.lowered else 1.0

    @property
    def lr(self) -> Lr:
        """The recipe's learning rate at `lr_scale`."""
        lr = self.settings.schedule
        return replace(lr, lr=lr.lr * self.lr_scale)

    def check_agreement(self) -> None:
        """Raises UsageError unless all processes found the same run, data and settings."""
        where = [
            len(self.epochs),
            self.trained.steps,
            self.data,
            differences(to_dict(self.settings), {}),
            self.settings.validation.batch_size,  # each batch is a vote
        ]
        if not self.world.agree(repr(where)):
            raise UsageError(
                f"process {self.world.rank} of {self.world.size} finds epoch {len(self.epochs)}, step "
                f"{self.trained.steps} in logging.folder {self.path}, another finds another, or has other "
                f"data or settings: give all machines the same command, data, and a folder that all share"
            )

    def start(
        self,
        learner: Learner,
        train: Manifest,
        val: Manifest,
        start: Start | None = None,
    ) -> None:
        """Give `learner` the state of the checkpoint, or what it starts from, and write what stands in
        the folder before the first step.

        Raises:
            UsageError: the folder cannot be written, or another process is training in it.
            RunError: the checkpoint does not fit the network.
        """
        if self.state is not None:
            checkpoint.restore(learner, self.state, self.path)
            self.state = None  # hundreds of megabytes that are no longer needed
        if start is not None:
            start.put_into(learner.model)
        weights = start.record if start is not None else None
        header = replace(self._header(learner.precision, train, val), weights=weights)
        self.records.append(header)
        if not self.world.is_main:
            return
        self._write_start()
        say_at_start(self.world, self.path)
        print(f"{self.path}: {header.device}, {header.precision}, world size {self.world.size}")
        if weights is not None:
            print(describe_start(weights, len(self.classes)))
        going_back = self.settings.training.on_nonfinite_loss == "back"
        if going_back and not (self.path / LAST).exists():
            self._save(learner, self.elapsed())  # so that there is one to go back to
        self.trackers = Trackers(self.path, header, self.settings.logging.trackers)
        self.heart.beat("starting", len(self.epochs), self.trained.steps, now=True)

    def _header(self, precision: str, train: Manifest, val: Manifest) -> Header:
        """The log's line for this start."""
        data = self.settings.data
        sets = {"train": (data.train_dataset, train), "val": (data.val_dataset, val)}
        return Header(
            settings=to_dict(self.settings),
            manifests={
                name: {
                    "path": path,
                    "samples": manifest.samples,
                    "classes": len(manifest.classes),
                    "content_checksum": manifest.content_checksum,
                }
                for name, (path, manifest) in sets.items()
            },
            versions=provenance.versions(),
            device=self.world.device_name(),
            precision=precision,
            world_size=self.world.size,
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            git_commit=provenance.git_commit(),
            first_epoch=len(self.epochs),
            first_step=self.trained.steps,
        )

    def _write_start(self) -> None:
        try:
            make_folder(self.path)
            self._lock()
            # Kept for whoever wants to look, and out of previous.pt's way.
            if self.damaged and self.elsewhere is None:
                rename(self.path / LAST, self.path / "damaged.pt")
            with atomic_write(self.path / "config.yaml", "w") as file:
                file.write(to_yaml(self.settings))
            with atomic_write(self.path / "classes.txt", "w") as file:
                file.writelines(f"{name}\n" for name in self.classes)
            log.rewrite(self.path / LOG, self.records)
            # Where the disk was full between the checkpoint and this.
            if self.from_last and self.epochs and not self.trained.steps:
                self._keep_best()
            if self.elsewhere is not None:
                self._take_best(self.elsewhere)
        except OSError as error:
            raise UsageError(f"logging.folder: {not_written(self.path, error)}") from None
        except NotWritten as error:
            raise UsageError(f"logging.folder: {error}") from None

    def _lock(self) -> None:
        """Held until `release`, or the end of the process. Leaves no file behind."""
        folder = os.open(self.path, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, folder)
        if not locked(folder):
            raise UsageError(
                f"logging.folder {self.path}: another process is training in it; wait for it, or "
                f"name another folder"
            )

    def keep(self, learner: Learner, plan: EpochPlan, trained: Trained) -> None:
        """Note how far the epoch has come; within it, write a checkpoint.

        Raises:
            Interrupted: a signal or a limit ended the epoch early.
            RunError: see `checkpoint.save`.
        """
        self.trained = trained
        if trained.signal is not None or trained.late:
            raise Interrupted(trained.signal)
        if trained.steps < plan.steps:
            self._save(learner, self.elapsed())

    def _save(self, learner: Learner, elapsed_seconds: float) -> None:
        """Write last.pt. Raises RunError; see `checkpoint.save`."""
        if not self.world.is_main:
            return
        run = {
            "settings": to_dict(self.settings),
            "data": self.data,
            "classes": list(self.classes),
            "records": [log.to_dict(record) for record in self.records],
            "trained": asdict(replace(self.trained, signal=None, late=False)),
            "elapsed_seconds": elapsed_seconds,
        }
        state = checkpoint.state_of(learner, run)
        checkpoint.save(state, self.path / LAST, self.path / PREVIOUS)

    def save(
        self,
        learner: Learner,
        plan: EpochPlan,
        validation: Validation,
        first_batch_seconds: float | None,
    ) -> None:
        """Keep an epoch and its validation: the checkpoint first, then its line in the log."""
        epoch = self._record(plan, validation, first_batch_seconds)
        self.records.append(epoch)
        self.trained = Trained()
        if not self.world.is_main:
            return
        self._save(learner, epoch.elapsed_seconds)
        self._keep_best()
        log.append(self.path / LOG, epoch)
        if self.trackers is not None:
            self.trackers.add(epoch)
        print(log.describe_epoch(epoch, self.settings.training.epochs), flush=True)

    def _keep_best(self) -> None:
        """best.pt is last.pt where the epoch that ends there is the best so far."""
        *earlier, newest = [log.best_of(one)[0] for one in self.epochs]
        if newest > max(earlier, default=-1.0):
            link(self.path / LAST, self.path / BEST)

    def _take_best(self, source: Path) -> None:
        """best.pt of the epochs that were trained in the folder of `source`, for none after them may be as good."""
        best = max(self.epochs, key=lambda epoch: log.best_of(epoch)[0], default=None)
        for path in (source, source.with_name(BEST)):
            with suppress(RunError, UsageError):
                saved = checkpoint.load(path)["run"]
                records = [log.from_dict(record) for record in saved["records"]]
                epochs = [record for record in records if isinstance(record, Epoch)]
                if epochs and epochs[-1] == best and not saved.get("trained", {}).get("steps"):
                    link(path, self.path / BEST)
                    return

    def complete(self, price: float | None) -> None:
        """Say that the run is finished, and make what its folder lacks, if the disk was full after its last
        checkpoint."""
        if not self.world.is_main:
            return
        if self.elsewhere is None:
            self._fill_in(price)
        epochs = number_of(len(self.epochs), "epoch")
        print(f"{self.elsewhere or self.path}: finished after {epochs}; nothing to do")

    def _fill_in(self, price: float | None) -> None:
        try:
            summary = log.read_log(self.path).summary
        except (UsageError, RunError):
            summary = None
        if summary is None or summary.stopped is not None:
            self._lock()
            if self.from_last:
                self._keep_best()
            self.began = time.perf_counter() - self.epochs[-1].elapsed_seconds
            self._summarise(price, None)
            self.release()

    def _record(
        self, plan: EpochPlan, validation: Validation, first_batch_seconds: float | None
    ) -> Epoch:
        """The line of the log for the epoch in hand."""
        trained, plain, ema = self.trained, validation.plain, validation.ema
        skips = self.settings.data.on_damaged == "skip"
        return Epoch(
            epoch=plan.epoch,
            resolution=plan.resolution,
            batch_size=plan.batch_size,
            lr=trained.lr,
            train_loss=trained.loss_sum / plan.steps,
            val_loss=plain.loss,
            top_1=plain.top_1,
            top_5=plain.top_5,
            tta_top_1=plain.tta_top_1,
            tta_top_5=plain.tta_top_5,
            ema_val_loss=ema.loss if ema else None,
            ema_top_1=ema.top_1 if ema else None,
            ema_top_5=ema.top_5 if ema else None,
            ema_tta_top_1=ema.tta_top_1 if ema else None,
            ema_tta_top_5=ema.tta_top_5 if ema else None,
            images_per_second=plan.images / trained.seconds,
            train_seconds=trained.seconds,
            loader_seconds=trained.loader_seconds,
            loader_start_seconds=first_batch_seconds,
            compile_seconds=trained.compile_seconds,
            val_seconds=validation.seconds,
            elapsed_seconds=self.elapsed(),
            peak_memory_bytes=self.world.peak_memory(),
            skipped=trained.skipped if skips else None,
            val_skipped=validation.skipped if skips else None,
            norms=trained.norms or None,
        )

    def go_back(self, learner: Learner, lost: NonFiniteLoss) -> None:
        """To the last checkpoint whose weights are good, all processes together, at a lower
        learning rate from then on.

        Saved and said by the first process, so that a resumed run keeps the learning rate.

        Raises:
            NonFiniteLoss: the run is to stop instead, or has no checkpoint of this epoch.
            RunError: it went back often enough.
        """
        times = len(self.lowered)
        if self.settings.training.on_nonfinite_loss != "back":
            raise lost
        if times >= LOWER_TIMES:
            raise RunError(
                f"the loss became NaN or infinite in epoch {lost.epoch}, step {lost.step}, also at "
                f"{self.lr_scale:g} of the recipe's learning rate, lowered {times} times: start again "
                f"in another logging.folder with a much lower lr.lr"
            ) from lost
        state, self.trained = self._within(LAST, lost)
        if self.trained.steps == lost.step:  # its own weights give no finite loss
            state, self.trained = self._within(PREVIOUS, lost)
        checkpoint.restore(learner, state, self.path)
        self.world.least(0)  # all have read before one writes
        scale, step = self.lr_scale * LOWER_BY, self.trained.steps
        self.records.append(
            Lowered(epoch=lost.epoch, step=lost.step, back_to_step=step, lr_scale=scale)
        )
        if self.world.is_main:
            self._save(learner, self.elapsed())
            log.rewrite(self.path / LOG, self.records)
            print(
                f"epoch {lost.epoch}: the loss became NaN or infinite in step {lost.step}; on from step "
                f"{step} of the last checkpoint, at {scale:g} of the recipe's learning rate",
                flush=True,
            )

    def _within(self, name: str, lost: NonFiniteLoss) -> tuple[dict[str, Any], Trained]:
        """A checkpoint of the epoch whose loss was not finite, and how far it has come. Raises `lost`."""
        if not (self.path / name).is_file():
            raise lost
        state = checkpoint.load(self.path / name)
        saved = state["run"]
        if sum(record["type"] == Epoch.TYPE for record in saved["records"]) != lost.epoch:
            raise lost
        return state, Trained(**saved["trained"])

    def stop(
        self, learner: Learner, end: Interrupted, limit: str | None, price: float | None
    ) -> int:
        """Leave a checkpoint where a signal or the limit named `limit` ended the run. Returns the exit status."""
        if self.world.is_main:
            self._save(learner, self.elapsed())
            name = signal.Signals(end.signal).name if end.signal else limit
            where = f"in epoch {len(self.epochs)}, step {self.trained.steps}"
            print(f"stopped by {name} {where}; --resume auto goes on")
        if end.signal is None:
            self._summarise(price, limit)
        self._close("stopped")
        return 0 if end.signal is None else 128 + end.signal

    def finish(self, price: float | None) -> int:
        """Write the log's last line. Returns the exit status."""
        self._summarise(price, None)
        self._close("finished")
        return 0

    def _summarise(self, dollars_per_hour: float | None, stopped: str | None) -> None:
        """The log's last line, where there is an epoch. A run that a limit `stopped` can be resumed."""
        if not self.epochs or not self.world.is_main:
            return
        best = max(self.epochs, key=lambda epoch: log.best_of(epoch)[0])
        seconds = self.elapsed()
        summary = Summary(
            reached=self.reached(),
            best_top_1=log.best_of(best)[0],
            best_epoch=best.epoch,
            epochs=len(self.epochs),
            elapsed_seconds=seconds,
            cost_dollars=cost_of(seconds, dollars_per_hour),
            stopped=stopped,
        )
        self.records.append(summary)
        log.rewrite(self.path / LOG, self.records)
        print(log.describe_summary(summary, self.path / LOG, self.settings.training.stop_at))

    def _close(self, doing: str) -> None:
        self.heart.beat(doing, now=True)
        if self.trackers is not None:
            self.trackers.close()
        self.release()


def cost_of(seconds: float, dollars_per_hour: float | None) -> float | None:
    """Dollars, to the cent's hundredth; None without a price."""
    return None if dollars_per_hour is None else round(seconds / 3600 * dollars_per_hour, 4)


def open_run(
    settings: Settings,
    resume: str | None,
    train: Manifest,
    val: Manifest,
    world: World,
    started: float,
) -> RunFolder:
    """The folder `logging.folder`, empty or with what `--resume` asks for. Nothing is written.

    Args:
        resume: None (the folder must hold no run), "auto" (go on, or start where there is nothing
            to go on from), or a checkpoint's path.
        started: perf_counter() when this process began.

    Raises:
        UsageError: the folder holds another run; the checkpoint was made under other settings or
            from other data.
        RunError: the checkpoint is damaged.
    """
    folder = Path(settings.logging.folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"logging.folder {folder} is a file; name a folder")
    data = {"train": train.content_checksum, "val": val.content_checksum}
    run = RunFolder(folder, settings, train.classes, data, world, started)
    if world.is_main:
        run.heart = Heartbeat(folder / HEARTBEAT)
    source = _checkpoint_to_resume(folder, resume)
    if source is None:
        if folder.resolve() == Path.cwd() or any(folder.glob("*.beton")):
            raise UsageError(
                f"logging.folder {folder} is the current folder or holds .beton files: name a folder of the run's own"
            )
        return run

    run.state, run.damaged = _load(source)
    run.from_last = not run.damaged and source.resolve() == (folder / LAST).resolve()
    run.elsewhere = source if source.parent.resolve() != folder.resolve() else None
    saved = run.state["run"]
    if differ := differences(to_dict(settings), saved["settings"]):
        raise UsageError(
            f"--resume: {source} was made under other settings ({'; '.join(differ)}); give the same "
            f"ones, or start afresh in another logging.folder"
        )
    changed = [split for split in data if data[split] != saved["data"].get(split)]
    if changed or list(run.classes) != saved["classes"]:
        which = " and ".join(changed) or "classes"
        raise UsageError(f"--resume: {source} was made from other data ({which} differ)")
    run.records = [log.from_dict(record) for record in saved["records"]]
    run.trained = Trained(**saved.get("trained", {}))
    so_far = run.epochs[-1].elapsed_seconds if run.epochs else 0.0
    run.began -= saved.get("elapsed_seconds", so_far)
    return run


def _load(source: Path) -> tuple[dict[str, Any], bool]:
    """`source`'s state and False; previous.pt's and True, said, if last.pt is damaged or foreign.

    Where that is no better the message names best.pt, if it is another file.
    """
    previous, best = source.with_name(PREVIOUS), source.with_name(BEST)
    try:
        return checkpoint.load(source), False
    except (RunError, UsageError) as error:
        if source.name != LAST:
            raise
        with suppress(RunError, UsageError):
            state = checkpoint.load(previous)
            print(f"{error}: going on from {previous}, the one before", file=sys.stderr)
            return state, True
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
            f"--resume {source}: {what_is(source)}; --resume auto goes on with the run in {folder}"
        )
    if holds_run and source.resolve().parent != folder.resolve():
        raise UsageError(
            f"logging.folder {folder} holds another run than --resume {source}: name a new folder "
            f"with --logging.folder=..., or {source.parent} to go on there"
        )
    return source

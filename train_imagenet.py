"""Train a classifier on .beton files: settings -> data -> run -> network -> loop.

    python train_imagenet.py --config rn_configs/rn18_16ep.yaml
    python train_imagenet.py --config rn_configs/rn18_16ep.yaml --resume auto
    torchrun --nproc_per_node=8 train_imagenet.py --config rn_configs/rn50_16ep.yaml

`--dry_run` prints settings, plan and cost estimate, with `--measure` what this machine will take;
`--help` lists every setting.
"""

import time
from dataclasses import replace

from ffcv_imnet.config.parsing import Command, parse
from ffcv_imnet.core.errors import begin_script, run_main

STARTED = time.perf_counter()


def command() -> Command:
    """Before the imports below, which take four seconds: a wrong setting or path is said at once."""
    found = parse()
    if not found.dry_run or found.measure:
        from ffcv_imnet.data.beton import check_there

        check_there(found.settings.data.train_dataset, found.settings.data.val_dataset)
    return found


COMMAND = begin_script(command) if __name__ == "__main__" else None

from ffcv_imnet.bench import cost
from ffcv_imnet.bench.dry_run import dry_run
from ffcv_imnet.config.schedules import plan_run, say_few_steps
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import NonFiniteLoss
from ffcv_imnet.data.bus_error import explain_bus_error
from ffcv_imnet.data.loader import TrainLoader, ValLoader, check_data, class_places, own_target
from ffcv_imnet.data.remote import local_copies
from ffcv_imnet.machine.distributed import (
    Interrupted,
    connect,
    describe_world,
    disconnect,
    together,
)
from ffcv_imnet.models.registry import check_arch
from ffcv_imnet.train.epoch import build_learner, train_epoch
from ffcv_imnet.train.failures import explained
from ffcv_imnet.train.run_dir import open_run
from ffcv_imnet.train.start import start_from
from ffcv_imnet.train.trackers import check_trackers
from ffcv_imnet.train.validate import validate
from ffcv_imnet.train.watch import Watch


def main() -> int:
    """Exit status: 0 trained, 1 the work failed, 2 wrong usage, 128 + n ended by signal n."""
    given = COMMAND or parse()
    if given.dry_run:
        return dry_run(given.settings, given.measure, STARTED)
    return train(given.settings, given.resume, STARTED)


def train(settings: Settings, resume: str | None, started: float) -> int:
    """One run, or the rest of one. Returns the exit status."""
    val_batch, timeout = settings.validation.batch_size, settings.distributed.timeout_seconds

    # Set up. What can be refused is refused before anything is allocated.
    check_arch(settings.model.arch)
    check_trackers(settings.logging.trackers)
    price = cost.price(settings.cost)
    limit = cost.limit(settings.training, price)
    world = describe_world(settings.training.device)
    settings = replace(settings, data=local_copies(settings.data))
    train_set, val_set = check_data(settings.data, world)
    settings = own_target(settings, train_set.classes, world.is_main)
    plans = plan_run(settings, train_set.samples)

    # Resuming: last.pt holds the records of the log and how far the epoch after them has come. The
    # log is first made to say the same, then training goes on with the next step. previous.pt stands
    # in for a damaged last.pt. Settings and data that shape the result must be those of the run.
    run = open_run(settings, resume, train_set, val_set, world, started)
    if run.finished:
        run.complete(price)
        return 0
    start = start_from(settings, train_set.classes) if run.state is None else None

    connect(world, timeout)
    with together(world, timeout, "while they set up"):
        run.check_agreement()
        watch = Watch(world, run.heart, settings.training.checkpoint_minutes)
        explain_bus_error(settings.data.train_dataset, settings.data.val_dataset)
        train_loader = TrainLoader(settings.data.train_dataset, train_set.samples, settings, world)
        places = class_places(train_set.classes, val_set.classes)
        val_loader = ValLoader(settings.data.val_dataset, val_set.samples, settings, world, places)
        learner = build_learner(settings, len(train_set.classes), world)
        run.start(learner, train_set, val_set, start)
        say_few_steps(plans, train_set.samples, world.is_main)

    # The loop.
    try:
        for plan in plans[len(run.epochs) :]:
            watch.stop.deadline = run.began + cost.training_seconds(limit, run.epochs)
            with explained(learner, plan, world, val_batch, timeout):
                # Once more after each checkpoint within the epoch.
                while run.trained.steps < plan.steps:
                    try:
                        trained = train_epoch(
                            learner, train_loader, plan, run.lr, run.trained, watch
                        )
                    except NonFiniteLoss as error:
                        run.go_back(learner, error)
                    else:
                        run.keep(learner, plan, trained)  # raises Interrupted
                validation = validate(learner, val_loader, watch, settings.validation.lr_tta)
            run.save(learner, plan, validation, train_loader.first_batch_seconds())
            if run.finished:
                break
        status = run.finish(price)
    except Interrupted as end:
        status = run.stop(learner, end, limit.name if limit else None, price)
    disconnect(world)
    return status


if __name__ == "__main__":
    run_main(main)

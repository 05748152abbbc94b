"""Search learning rates, momentum and weight decay of a recipe on your own images, and write the recipe.

python -m ffcv_imnet tune --config rn_configs/rn18_10ep.yaml --dry_run
python -m ffcv_imnet tune --config rn_configs/rn18_10ep.yaml --out runs/rn18_10ep_tune

Successive halving (arXiv:1810.05934) over short runs at the recipe's lowest resolution. Each trial draws
settings, trains on a part of the training images and is scored by its loss on images held out of the
training file; the best third goes on to three times as many images, and the best third of those again. Then
the best trial and the recipe as it is run again under new seeds. OUT gets recipe.yaml, trials.png and README.md.

--config, --dry_run and --section.name=value are those of train_imagenet.py. `--minutes` are an A100's by the cost
estimate, 30 by default; --dry_run says what that makes on other machines. Of several GPUs each works on a trial of
its own. Stop it at any time and start it again: it goes on where it was, and makes only the runs under way again.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import IO, Any

from tabulate import tabulate

from ffcv_imnet.bench.cost import NO_GPU
from ffcv_imnet.bench.dry_run import counted
from ffcv_imnet.bench.search import (
    AGAIN,
    BEST,
    DIVERGED,
    RECIPE,
    Search,
    best_trial,
    drawn,
    ranges,
    scores_of,
    values_of,
    with_values,
)
from ffcv_imnet.bench.short_runs import (
    REDUCTION,
    RUNGS,
    Score,
    ShortRuns,
    a100_images,
    estimate,
    held_out,
    plan_rungs,
    short,
)
from ffcv_imnet.config.parsing import parse
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.config.schema import Settings, differences
from ffcv_imnet.core.atomic import atomic_write, locked, make_folder
from ffcv_imnet.core.bounded import read_json
from ffcv_imnet.core.errors import RunError, UsageError, in_range, reason_of
from ffcv_imnet.core.optional import require
from ffcv_imnet.core.paths import path_of
from ffcv_imnet.core.signals import exit_when_asked
from ffcv_imnet.data.beton import check_beton
from ffcv_imnet.data.remote import local_copies
from ffcv_imnet.machine.device import count as count_gpus
from ffcv_imnet.machine.distributed import connect, describe_world
from ffcv_imnet.models.registry import check_arch
from ffcv_imnet.report.search import write_results
from ffcv_imnet.tools import ToolParser
from ffcv_imnet.train.start import Start, start_from


def open_study(search: Search, worker: int = 0) -> Any:
    """Optuna's, in OUT/trials.log, which several processes write. Raises RunError if that is damaged."""
    optuna = require("optuna", "tune", "optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    from optuna.storages.journal import JournalFileBackend

    path = search.out / "trials.log"
    try:
        study = optuna.create_study(
            study_name="tune",
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
            load_if_exists=True,
            pruner=optuna.pruners.SuccessiveHalvingPruner(1, REDUCTION),
        )
    except OSError:
        raise
    except Exception as error:  # of a log that another program changed it raises nearly anything
        raise RunError(
            f"{path}: optuna cannot read it ({type(error).__name__}: {reason_of(error)}): remove it to begin anew, "
            f"or name another folder with --out"
        ) from error
    # Not the draws of the part before, when a search goes on.
    seed = 1000 * len(study.trials) + worker
    study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=8)
    return study


def begin(search: Search) -> None:
    """Enqueue the recipe itself first, and again what was under way when the search was stopped."""
    from optuna.trial import TrialState

    study = open_study(search)
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs=_kept(trial.user_attrs))
    if not study.trials:
        exact = values_of(search.settings, search.keys, search.steps)
        spans = ranges(search.settings)
        inside = {k: min(max(x, spans[k].low), spans[k].high) for k, x in exact.items()}
        study.enqueue_trial(inside, user_attrs={"exact": exact})


def _kept(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name != "scores"}


def run_again(search: Search) -> None:
    """Enqueue the runs that say whether the best trial is better than the recipe, if it is another, and once."""
    study = open_study(search)
    if _made_again(study):
        return
    recipe = values_of(search.settings, search.keys, search.steps)
    best = best_trial(study)
    if drawn(best) == recipe:
        return
    for what, values in ((RECIPE, recipe), (BEST, drawn(best))):
        for seed in range(1, AGAIN + 1):
            attributes = {
                "again": what,
                "exact": values,
                "seed": search.settings.training.seed + seed,
            }
            study.enqueue_trial(best.params, user_attrs=attributes)


def work(search: Search, start: Start | None, worker: int = 0) -> None:
    """Make trials until all are begun, on this process's device, or its share of the cores."""
    study = open_study(search, worker)
    world = describe_world(search.settings.training.device)
    world = replace(world, local_size=search.processes)  # which share the cores
    connect(world)
    runs = ShortRuns(search.samples, len(search.classes), start, world)
    parent = os.getppid()
    # A parent that was killed could not end this process.
    while _is_left(search, study) and os.getppid() == parent:
        _one(search, study, study.ask(), runs)


def _is_left(search: Search, study: Any) -> bool:
    """Whether a trial waits, or the search goes on: once trials are made again, it is over."""
    trials = study.get_trials(deepcopy=False)
    if any(trial.state.name == "WAITING" for trial in trials):
        return True
    return not _made_again(study) and _begun(study) < search.trials


def _made_again(study: Any) -> bool:
    return any("again" in trial.user_attrs for trial in study.get_trials(deepcopy=False))


def _begun(study: Any, up_to: float = math.inf) -> int:
    """Trials of the search that are there, without those that failed and those that were made again."""
    return sum(
        trial.state.name != "FAIL" and "again" not in trial.user_attrs and trial.number <= up_to
        for trial in study.get_trials(deepcopy=False)
    )


def _one(search: Search, study: Any, trial: Any, runs: ShortRuns) -> None:
    """One trial, rung after rung, as far as it comes; only the last rung where it is made again."""
    from optuna.trial import TrialState

    spans = ranges(search.settings)
    suggested = {
        key: trial.suggest_float(key, spans[key].low, spans[key].high, log=True)
        for key in search.keys
    }
    values = trial.user_attrs.get("exact") or suggested
    settings, again = search.settings, trial.user_attrs.get("again")
    if again:
        settings = replace(
            settings, training=replace(settings.training, seed=trial.user_attrs["seed"])
        )
    made: list[dict[str, float]] = []
    for number, rung in enumerate(search.rungs):
        if again and number < RUNGS - 1:
            continue
        steps = sum(plan.steps for plan in plan_run(short(settings, rung), rung.subset))
        score = runs.run(with_values(settings, values, steps), rung)
        made.append(_listed(score, number))
        trial.set_user_attr("scores", made)
        trial.report(min(score.loss, DIVERGED), REDUCTION**number)
        print(_line(search, study, trial.number, score, number, values, again), flush=True)
        if score.loss == math.inf or (not again and number < RUNGS - 1 and trial.should_prune()):
            study.tell(trial, state=TrialState.PRUNED)
            return
    study.tell(trial, score.loss)


def _listed(score: Score, number: int) -> dict[str, float]:
    return {"rung": number, "loss": min(score.loss, DIVERGED), "top_1": score.top_1,
            "seconds": score.seconds}  # fmt: skip


def _line(
    search: Search, study: Any, number: int, score: Score, rung: int, values: Mapping[str, float], again: str | None
) -> str:  # fmt: skip
    """What a run came to, and how long the rest will take at the speed so far."""
    made = scores_of(study.get_trials(deepcopy=False))
    images = sum(search.rungs[int(s["rung"])].images for s in made)
    whole = sum(r.images * count for r, count in zip(search.rungs, search.runs, strict=True))
    left = max(0.0, whole - images) / images * sum(s["seconds"] for s in made)
    left /= search.processes
    what = again or f"trial {_begun(study, number)} of {search.trials}"
    result = (
        f"loss {score.loss:.4f}, top-1 {score.top_1:.2%}" if score.loss < math.inf else "diverged"
    )
    drew = ", ".join(f"{key} {_said(key, x)}" for key, x in values.items())
    return (
        f"{what}, {search.rungs[rung].images:,} images: {result} ({drew})  {score.seconds:.0f} s, "
        f"about {left / 60:.0f} min left"
    )


def _said(key: str, x: float) -> str:
    return f"{1 - x:.3f}" if key.endswith("momentum") else f"{x:.3g}"


def work_on_all(search: Search, start: Start | None, command: Sequence[str], lock: IO[str]) -> None:
    """`work` in `search.processes` processes, on the GPUs that there are; here where it is one.

    None of them outlives this one, and each keeps `lock` for as long as it lives.

    Raises:
        RunError: one of them failed.
    """
    processes = search.processes
    if processes == 1:
        work(search, start)
        return
    children = []
    try:
        for worker, environment in enumerate(environments(processes)):
            words = [sys.executable, "-m", "ffcv_imnet", "tune", *command]
            words += [f"--processes={processes}", f"--worker={worker}"]
            children.append(subprocess.Popen(words, env=environment, pass_fds=[lock.fileno()]))
        statuses = [child.wait() for child in children]
    finally:
        for child in children:
            child.kill()  # a trial that is cut off is made again
            child.wait()
    if any(statuses):
        raise RunError(
            f"{sum(map(bool, statuses))} of the {processes} processes of the search failed; what they "
            f"said stands above. The same command goes on with the search"
        )


def environments(processes: int) -> list[dict[str, str]]:
    """Each process's: with a GPU of its own, or in turn one of those that there are."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else map(str, range(count_gpus()))
    cards = list(islice(numbers, count_gpus()))
    if not cards:
        return [dict(os.environ)] * processes
    turns = islice(cycle(cards), processes)
    return [os.environ | {"CUDA_VISIBLE_DEVICES": card} for card in turns]


# ---- the command --------------------------------------------------------------------------------


def plan(settings: Settings, options: Any, samples: int, classes: Sequence[str]) -> Search:
    """Raises UsageError for a setting that is not searched, and for too little data or time."""
    known = ranges(settings)
    named = options.search
    keys = list(known) if named is None else [key.strip() for key in named.split(",")]
    if odd := [key for key in keys if key not in known]:
        raise UsageError(f"--search {odd[0]!r}: it is one or more of {','.join(known)}")
    images = a100_images(settings, options.minutes, samples, len(classes))
    rungs = plan_rungs(images, options.trials, 2 * AGAIN, samples, settings.training.batch_size)
    out = options.out or Path(settings.logging.folder + "_tune")
    return Search(
        settings,
        samples,
        tuple(classes),
        tuple(rungs),
        options.trials,
        tuple(dict.fromkeys(keys)),
        out,
        options.processes or max(1, count_gpus() * (settings.training.device != "cpu")),
    )


def describe(search: Search) -> str:
    """What the search will make, and its cost on the machines of the cost estimate."""
    rows = [
        (f"{count:.0f}", f"{rung.subset:,}", rung.epochs, f"{rung.images * count:,.0f}")
        for rung, count in zip(search.rungs, search.runs, strict=True)
    ]
    runs = tabulate(
        rows, ("runs, about", "images", "epochs", "images in all"), disable_numparse=True
    )
    lines = estimate(
        search.settings, search.rungs, search.runs, search.samples, len(search.classes)
    )
    priced = [
        (line.machine.name, line.machine.gpu, f"{60 * line.hours:,.1f}",
         f"${line.cost:,.2f}", line.throughput.kind) for line in lines if line.machine.gpus == 1
    ]  # fmt: skip
    costs = tabulate(
        [*priced, NO_GPU],
        ("machine", "GPU", "minutes", "on demand", "throughput"),
        disable_numparse=True,
    )
    side = short(search.settings, search.rungs[0]).plan.stages[0].resolution
    return (
        f"{search.trials} trials of {', '.join(search.keys)} at {side} px, scored on "
        f"{held_out(search.samples):,} images held out of the training file; {2 * AGAIN} runs of the longest kind come "
        f"last: the best trial and the recipe, under two new seeds each\n\n{runs}\n\n{costs}\n\n"
        f"several GPUs work on a trial each; on another machine the lines of the trials say how long is left\n"
    )


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[IO[str]]:
    """One search at a time in a folder."""
    with (out / "lock").open("w") as file:
        if not locked(file):
            raise UsageError(
                f"--out {out}: another process is searching in it; wait for it, or name another folder"
            )
        yield file


def _check_same(search: Search) -> None:
    """Raises UsageError if OUT is a file, or holds another search or a run."""
    if search.out.exists() and not search.out.is_dir():
        raise UsageError(f"--out {search.out} is a file: name a folder")
    if (search.out / "log.jsonl").exists():
        raise UsageError(f"--out {search.out} holds a run: name another folder")
    path = search.out / "search.json"
    if path.exists():
        ours, there = search.to_json(), _begun_search(path)
        differ = differences(ours.pop("settings"), there.pop("settings"))
        differ += [
            "--minutes" if name == "rungs" else f"{name} {there.get(name)} -> {value}"
            for name, value in ours.items()
            if there.get(name) != value
        ]
        if differ:
            raise UsageError(
                f"--out {search.out} holds another search ({'; '.join(differ)}): name another folder"
            )


def _begun_search(path: Path) -> dict[str, Any]:
    """What `main` kept of a search. Raises RunError if it is something else."""
    there: Any = None
    with contextlib.suppress(OSError, ValueError):
        there = read_json(path)
    settings = there.get("settings") if isinstance(there, dict) else None
    if isinstance(settings, dict) and all(isinstance(part, dict) for part in settings.values()):
        return there
    raise RunError(
        f"{path}: not the file that says what is searched here: remove it if the same command began this "
        f"search, or name another folder with --out"
    )


@contextlib.contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print("stopped; the same command goes on with the search", file=sys.stderr, flush=True)
        raise


def main(argv: list[str]) -> int:
    """Search, and write the recipe. Settings of train_imagenet.py are taken as it takes them."""
    parser = ToolParser("tune", __doc__)
    add = parser.add_argument
    add("--out", type=path_of, metavar="DIR", help="default: logging.folder with _tune behind it")
    add("--minutes", type=in_range(float, 0.01, 1e5), default=30.0, metavar="M",
        help="of one A100, by the cost estimate, 0.01 or more (default: %(default)g)")  # fmt: skip
    add(
        "--trials",
        type=in_range(int, 9, 10_000),
        default=27,
        metavar="N",
        help="9 or more (default: %(default)s)",
    )
    add(
        "--search",
        metavar="KEY,KEY",
        help="settings to search; default: all of the recipe's optimizer",
    )
    add("--processes", type=in_range(int, 1, 64), metavar="N", help="default: one a GPU")
    add("--worker", type=int, help=SUPPRESS)  # for the processes that it starts
    options, rest = parser.parse_known_args(argv)
    command = parse(rest)
    if command.resume or command.measure:
        raise UsageError("tune takes neither --resume (the same command goes on) nor --measure")
    settings = command.settings
    check_arch(settings.model.arch)
    if command.dry_run:
        settings = replace(settings, data=local_copies(settings.data, manifests_only=True))
        (train,) = counted(settings, ["train"])
        start_from(settings, train.names)
        print(describe(plan(settings, options, train.images, train.names)))
        return 0
    require("optuna", "tune", "optuna")
    settings = replace(settings, data=local_copies(settings.data))
    manifest = check_beton(Path(settings.data.train_dataset))
    search = plan(settings, options, manifest.samples, manifest.classes)
    start = start_from(settings, manifest.classes)  # refused before anything is written
    if options.worker is not None:
        work(search, start, options.worker)
        return 0
    if describe_world(settings.training.device).size > 1:
        raise UsageError("tune starts a process a GPU itself: start it without torchrun")
    _check_same(search)
    print(describe(search), flush=True)
    make_folder(search.out)
    exit_when_asked()
    with _alone(search.out) as lock, _saying_how_to_go_on():
        with atomic_write(search.out / "search.json", "w") as file:
            json.dump(search.to_json(), file)
        begin(search)
        work_on_all(search, start, argv, lock)
        run_again(search)
        work_on_all(search, start, argv, lock)
        print(
            f"\n{write_results(search, open_study(search), argv)}\n{search.out}: recipe.yaml, trials.png, README.md"
        )
    return 0

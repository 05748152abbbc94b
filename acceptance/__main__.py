"""Run the stages of the acceptance, keep what each part found, write the report.

python -m acceptance --out DIR --all                every stage; what tells most first
python -m acceptance --out DIR --all --minutes 9    as much of that as 9 minutes hold; call it again to go on
python -m acceptance --out DIR --stage step         one stage, 9 minutes at most unless --minutes says otherwise
python -m acceptance --out DIR --stage step/resnet18_128     one part
python -m acceptance --rehearse [--smallest]        on a CPU, with small sizes

A part that has a result is skipped, one that was killed is run again. DIR gets report.md, results/,
logs/, json/ and work/ (data and runs). Exit status: 0 all that was asked for passed, 1 something
failed, 2 the command is wrong, 75 parts are left: call it again.
"""

import argparse
import datetime
import math
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

from acceptance import plan, report
from acceptance.plan import Part, Place
from acceptance.record import Check, Outcome, Result
from ffcv_imnet.core.errors import Parser, UsageError, in_range, nearest, run_main
from ffcv_imnet.core.paths import path_of

MINUTES = 9.0
UNFINISHED = os.EX_TEMPFAIL  # 75: called again it goes on
RUNNING = "running"  # in DIR: the process of the part in hand, and when it started
KEPT = ("report.md", "machine.json", "results", "logs", "json")  # of DIR, in --archive


def main() -> int:
    """The command. Exit status as above."""
    options = parse(sys.argv[1:])
    size = plan.FULL
    if options.rehearse:
        size = plan.SMALLEST if options.smallest else plan.REHEARSAL
    place = Place(options.out, options.bundle, plan.for_card(size, card()), options.archive)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    known = plan.parts(place)
    wanted = chosen(known, options.stage)
    if options.archive:
        unpack(options.archive, place.out)
    (place.out / "results").mkdir(parents=True, exist_ok=True)
    end_leftover(place.out)
    try:
        minutes = options.minutes or (math.inf if options.all else MINUTES)
        run_parts(wanted, known, place, 60 * minutes)
    finally:
        results = finish(known, place)
    return status(results, wanted)


def card() -> str:
    """Compute capability and memory of the first GPU, as nvidia-smi says them; "" where it does not."""
    words = ["nvidia-smi", "--query-gpu=compute_cap,memory.total", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(words, capture_output=True, text=True, timeout=30).stdout
    return ""


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    layout = (__doc__ or "").strip()
    parser = Parser(
        prog="bash acceptance/gpu.sh", description=layout, hint=" (--help lists the options)"
    )
    add = parser.add_argument
    add(
        "--out",
        type=path_of,
        default=Path("runs/acceptance"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    add("--stage", action="append", metavar="STAGE[/PART]", help=", ".join(plan.STAGES))
    add("--all", action="store_true", help="all stages, each until it is finished")
    add(
        "--minutes",
        type=in_range(float, 0.01, 600),
        metavar="M",
        help=f"after which the call stops (default: {MINUTES:g}; with --all none)",
    )
    add(
        "--bundle",
        type=path_of,
        default=Path(os.environ.get("BUNDLE", "bundle")),
        metavar="DIR",
        help="what acceptance/bundle.sh made (default: $BUNDLE, else bundle)",
    )
    add(
        "--archive",
        type=path_of,
        metavar="FILE.tar.gz",
        help="results of earlier calls come from here and go here: for a machine that forgets",
    )
    add("--rehearse", action="store_true", help="on a CPU, with small sizes")
    add("--smallest", action="store_true", help="with --rehearse: with the smallest")
    parser.refuse_unknown(argv)
    options = parser.parse_args(argv)
    if bool(options.stage) == options.all:
        raise UsageError("give --all, or --stage with one of: " + ", ".join(plan.STAGES))
    if options.smallest and not options.rehearse:
        raise UsageError("--smallest goes with --rehearse")
    return options


def chosen(known: list[Part], names: list[str] | None) -> list[Part]:
    """The parts that STAGE or STAGE/PART name; without a name all, those of `plan.FIRST` first. Raises UsageError."""
    if names is None:
        return sorted(known, key=lambda part: plan.FIRST.get(part.key, len(plan.FIRST)))
    found = []
    for name in names:
        of_name = [part for part in known if name in (part.stage, f"{part.stage}/{part.name}")]
        if not of_name:
            every = [*plan.STAGES, *(f"{part.stage}/{part.name}" for part in known)]
            raise UsageError(
                f"no stage is called {name!r}{nearest(name, every)}: " + ", ".join(plan.STAGES)
            )
        found += of_name
    return found


# ---- running ------------------------------------------------------------------------------------


def run_parts(parts: list[Part], known: list[Part], place: Place, seconds: float) -> bool:
    """Run the parts that have no result until `seconds` have passed; True if none is left."""
    deadline, ran = time.monotonic() + seconds, False
    for part in parts:
        kept = result_path(place, part)
        if kept.is_file():
            continue
        # Half of its limit is more than a part usually takes. The first one always gets its chance.
        if ran and deadline - time.monotonic() < part.limit / 2:
            return False
        if part.gpu_only and place.size.device == "cpu":
            outcome = Outcome(0, 0.0)
            checks = [Check("needs a GPU", "not run", verdict="SKIP")]
        else:
            if part.needs_data and not prepare(place, deadline - time.monotonic()):
                return False
            print(f"{part.stage}/{part.name} ...", flush=True)
            ended = run_part(part, place, min(part.limit, deadline - time.monotonic()))
            ran = True
            if ended is None:
                return False
            outcome = ended
            checks = read(part, outcome)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        command = f"python {shlex.join(part.command)}"
        Result(part.stage, part.name, command, outcome.status, outcome.seconds, now, checks).save(
            kept
        )
        finish(known, place)
        for check in checks:
            print(f"  {check.verdict:4}  {check.what}: {check.measured}", flush=True)
    return True


def result_path(place: Place, part: Part) -> Path:
    """Where a part's result is kept."""
    return place.out / "results" / f"{part.key}.json"


def run_part(part: Part, place: Place, seconds: float) -> Outcome | None:
    """Its process, killed after `seconds`; None if that was the call's time and not its own limit."""
    json, logs = place.json(part.key), place.out / "logs"
    for folder in (json.parent, logs):
        folder.mkdir(parents=True, exist_ok=True)
    json.unlink(missing_ok=True)
    out, err = logs / f"{part.key}.out", logs / f"{part.key}.err"
    status, seconds_taken, timed_out = run(
        [sys.executable, *part.command], out, err, seconds, place
    )
    if timed_out and seconds < part.limit:
        return None
    said = out.read_text(encoding="utf-8", errors="replace")
    data = report.read_json(json) or None
    return Outcome(status, seconds_taken, data, said, timed_out)


def run(
    command: list[str], out: Path, err: Path, seconds: float, place: Place
) -> tuple[int, float, bool]:
    """A process in a session of its own, so that its children go with it; status, seconds, whether it was killed."""
    environment = {
        **os.environ,
        "ACCEPTANCE_JSON": str(place.out / "json"),
        "BUNDLE": str(place.bundle),
    }
    started = time.monotonic()
    with out.open("wb") as standard, err.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdout=standard,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        (place.out / RUNNING).write_text(f"{process.pid} {started_at(process.pid)}")
        try:
            process.wait(seconds)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            kill(process)
    (place.out / RUNNING).unlink(missing_ok=True)
    return process.returncode, time.monotonic() - started, timed_out


def end_leftover(out: Path) -> None:
    """What a call left running that was itself killed: it would share the GPU with whatever is measured now."""
    try:
        pid, started = map(int, (out / RUNNING).read_text().split())
    except (OSError, ValueError):
        return
    # -1: it has ended, and its children may be there. Any other: a later process of that number.
    if started_at(pid) in (started, -1):
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
            print("ended what the last call left running", flush=True)


def started_at(pid: int) -> int:
    """Clock ticks since boot; -1 where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    return int(stat.rpartition(")")[2].split()[19])  # proc(5): field 22


def kill(process: "subprocess.Popen[bytes]") -> None:
    """The process, if it has not ended, and its children: asked first, made to after ten seconds. Children that are
    still at work when it has ended would share the GPU with what is measured next."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read(part: Part, outcome: Outcome) -> list[Check]:
    """The part's checks; one FAIL where its numbers are not what they should be."""
    try:
        return part.check(outcome)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        text = f"{type(error).__name__}: {error}"
        return [Check("its numbers can be read", text, "yes", "FAIL")]


def prepare(place: Place, seconds: float) -> bool:
    """The data in DIR/work, made where it is missing; False if the call's time ended first.

    Raises:
        UsageError: it failed, with its last words.
    """
    if (place.work / "complete").is_file() and (place.out / "machine.json").is_file():
        return True
    print("making the data ...", flush=True)
    logs = place.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    out, err = logs / "data.out", logs / "data.err"
    words = ["-m", "acceptance.data", "--out", str(place.out), "--bundle", str(place.bundle)]
    words += ["--device", place.size.device]
    words += ["--train_per_class", "400" if place.on_gpu else "4"]
    code, _, timed_out = run([sys.executable, *words], out, err, min(plan.LONGEST, seconds), place)
    if timed_out and seconds < plan.LONGEST:
        return False
    if code:
        raise UsageError(
            f"the data could not be made: {report.tail(err)[-600:]} (all of it: {err})"
        )
    return True


# ---- what comes of it ---------------------------------------------------------------------------


def finish(known: list[Part], place: Place) -> list[Result]:
    """Write the report over all results so far, which are returned, and the archive: the next part may be the last."""
    paths = [result_path(place, part) for part in known]
    results = [Result.load(path) for path in paths if path.is_file()]
    report.write(place.out, results, len(known) - len(results), place.size.name)
    if place.archive:
        pack(place.archive, place.out)
    return results


def status(results: list[Result], wanted: list[Part]) -> int:
    """Of the parts that were asked for; said in a line."""
    keys = {part.key for part in wanted}
    done = [result for result in results if f"{result.stage}.{result.part}" in keys]
    failed = sum(check.verdict == "FAIL" for result in done for check in result.checks)
    left = len(wanted) - len(done)
    print(f"{len(done)} parts done, {failed} checks failed, {left} parts left")
    return UNFINISHED if left else int(failed > 0)


def unpack(archive: Path, out: Path) -> None:
    """What an earlier call packed, where this machine has nothing yet."""
    if archive.is_file() and not (out / "results").is_dir():
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as file:
            file.extractall(out, filter="data")


def pack(archive: Path, out: Path) -> None:
    """Report, results, logs and numbers; not the data and the runs."""
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as file:
        for name in KEPT:
            if (out / name).exists():
                file.add(out / name, name)
    partial.replace(archive)


if __name__ == "__main__":
    run_main(main)

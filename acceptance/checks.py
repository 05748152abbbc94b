"""What a part's numbers say: each function reads an `Outcome` into lines of the report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acceptance.record import Check, Outcome, verdict

# The goals of the project on a GPU, and what Imagenette's recipe reached on a CPU: five seeds,
# records/2026-11-23_slim13, stored at 224 px.
STEP_GOAL, WAIT_GOAL, SECONDS_GOAL = 1.4, 0.02, 60.0
IMAGENETTE_TOP_1, IMAGENETTE_SPREAD, IMAGENETTE_STORED = 0.881, 0.008, 224
NAMES = {"dali": "dali (its CPU decoder)"}  # of loaders, where theirs says too little
NO_PHOTOS = "no photographs in the bundle, or a CPU: no goal"
LAUNCH_GOALS = {"resnet18": 120, "resnet50": 200}  # of Muon's update, a step


def ended(outcome: Outcome, what: str = "ends well") -> Check:
    """Whether the command did what it was asked to."""
    if outcome.timed_out:
        return verdict(what, f"killed after {outcome.seconds:.0f} s", "exit status 0", False)
    return verdict(what, f"exit status {outcome.status}", "exit status 0", outcome.status == 0)


def without_numbers(found: list[Check]) -> list[Check]:
    """The checks so far, and a FAIL: the command left no numbers."""
    return [*found, verdict("it left its numbers", "none", "some", False)]


def doctor(outcome: Outcome) -> list[Check]:
    """The doctor's verdict; its page stands in the report."""
    return [ended(outcome, "the doctor finds nothing that training would fail on")]


def decoder(outcome: Outcome) -> list[Check]:
    """Whether the crop decoder is there."""
    return [ended(outcome, "the crop decoder is compiled and loads")]


def tests(outcome: Outcome) -> list[Check]:
    """pytest's last line. Status 5: no test was chosen."""
    lines = [line for line in outcome.said.splitlines() if line.strip()]
    last = lines[-1].strip("= ") if lines else "no output"
    passed = outcome.status == 0 and " passed" in last  # not: all were skipped
    return [verdict("the tests that need a GPU (pytest -m gpu)", last, "all pass", passed)]


def smoke(outcome: Outcome) -> list[Check]:
    """A short run of a recipe."""
    found = [ended(outcome)]
    if isinstance(outcome.data, dict) and "precision" in outcome.data:  # it trained to its end
        said = outcome.data
        found.append(
            verdict(
                "trains on the device and in the type asked for, to a finite loss",
                f"{said['device']}, {said['precision']}, losses {said['first_loss']:.2f} to {said['last_loss']:.2f}",
                said["asked"],
                said["precision"] == said["asked"],
            )
        )
        if said.get("peak_memory_bytes"):
            found.append(Check("peak memory", f"{said['peak_memory_bytes'] / 1e9:.2f} GB"))
        if said.get("compile_seconds"):
            found.append(Check("torch.compile took", f"{said['compile_seconds']:.0f} s"))
    return found


def resume(outcome: Outcome) -> list[Check]:
    """SIGTERM, then kill -9, each followed by --resume auto."""
    found = [ended(outcome)]
    if isinstance(outcome.data, dict):
        said = outcome.data
        found += [
            verdict(
                "SIGTERM within an epoch ends with a checkpoint",
                f"exit status {said['term_status']}",
                "143",
                said["term_status"] == 143,
            ),
            verdict(
                "goes on after SIGTERM and after kill -9: every epoch once",
                f"epochs {said['epochs']}",
                f"{said['wanted']}",
                said["epochs"] == said["wanted"],
            ),
            Check(
                "top-1, and of a run that was not stopped",
                f"{said['top_1']:.4f}, {said['plain_top_1']:.4f}",
            ),
        ]
    return found


def memory(outcome: Outcome) -> list[Check]:
    """A batch that does not fit, and the one that the message names instead."""
    found = [ended(outcome)]
    if isinstance(outcome.data, dict):
        said = outcome.data
        advice = said.get("fits")
        found.append(
            verdict(
                "out of memory names a batch that would fit",
                said["message"],
                "a number",
                bool(advice),
            )
        )
        if advice:
            status = said["fits_status"]
            found.append(
                verdict(
                    f"and that batch, {advice}, trains", f"exit status {status}", "0", status == 0
                )
            )
    return found


def step(goal: float | None) -> Callable[[Outcome], list[Check]]:
    """Rows of `benchmark step`; `goal`: times the public step."""

    def check(outcome: Outcome) -> list[Check]:
        found = [ended(outcome)]
        if not outcome.data:
            return without_numbers(found)
        rows = outcome.data["rows"]
        for row in rows:
            cells = f"{row['images_per_second']:,.0f} images/s, spread {row['spread']:.0%}"
            if "ratio_to_public" in row:
                cells += f", {row['ratio_to_public']:.2f} x ffcv-imagenet's"
            cells += f", optimizer at most {row['optimizer_share']:.1%}, first steps {row['warm_up_seconds']:.0f} s more"
            found.append(Check(f"{row['step']} {row['precision']}", cells))
        ratios = {
            f"{r['step']} {r['precision']}": r["ratio_to_public"]
            for r in rows
            if r["step"] != "public" and "ratio_to_public" in r
        }
        if goal is not None and ratios:
            best = max(ratios, key=lambda kind: ratios[kind])
            found.append(
                verdict(
                    "the fastest of our steps over ffcv-imagenet's",
                    f"{ratios[best]:.2f} ({best})",
                    f">= {goal:g}",
                    ratios[best] >= goal,
                )
            )
        return found

    return check


def turns(outcome: Outcome) -> list[Check]:
    """What a turn of SOAP's bases takes, by QR as it is made and by Cholesky's decomposition."""
    found = [ended(outcome)]
    if not outcome.data:
        return without_numbers(found)
    for way, said in outcome.data.items():
        took = f"{1e3 * said['seconds']:.1f} ms for {said['matrices']} bases, orthonormal to {said['skewness']:.0e}"
        found.append(Check(f"a turn of SOAP's bases, every ten steps, by {way}", took))
    return found


def loader(workers: int, real: bool) -> Callable[[Outcome], list[Check]]:
    """Rows of `benchmark loader` with so many threads. `real`: of photographs, on a GPU's machine, so that the goal
    holds: the cores of a rehearsal have other work, and generated images are small."""

    def check(outcome: Outcome) -> list[Check]:
        found = [ended(outcome)]
        if not outcome.data:
            return without_numbers(found)
        rows = outcome.data["rows"]
        sides = sorted({row["resolution"] for row in rows})
        for side in sides:
            of_side = {row["loader"]: row for row in rows if row["resolution"] == side}
            cells = ", ".join(
                f"{NAMES.get(name, name)} {row['images_per_second'] / workers:,.0f}"
                for name, row in of_side.items()
            )
            what = f"{side} px, images/s a core, {workers} of them"
            found.append(Check(what, cells, "" if real else NO_PHOTOS))
            ours, stock = of_side.get("ffcv_imnet"), of_side.get("ffcv")
            if ours and stock and real:
                ratio = ours.get("ratio_to_stock", 0.0)
                found.append(
                    verdict(f"{side} px, over stock FFCV", f"{ratio:.2f}", "> 1", ratio > 1)
                )
        return found

    return check


def imagenette(run: Path, data: Path, real: bool) -> Callable[[Outcome], list[Check]]:
    """The log of five epochs. `real`: Imagenette itself on a GPU, so that the goals hold."""

    def check(outcome: Outcome) -> list[Check]:
        found = [ended(outcome)]
        epochs, summary = read_log(run)
        if not epochs or summary is None:
            return without_numbers(found)
        top_1, seconds = summary["best_top_1"], summary["elapsed_seconds"]
        stored = stored_size(data)
        low, high = IMAGENETTE_TOP_1 - IMAGENETTE_SPREAD, IMAGENETTE_TOP_1 + IMAGENETTE_SPREAD
        expected = (
            f"{low:.1%} to {high:.1%} (CPU, stored at {IMAGENETTE_STORED} px; here {stored} px)"
        )
        wait = sum(e["loader_seconds"] for e in epochs) / sum(e["train_seconds"] for e in epochs)
        took = (
            f"{seconds:.0f} s: training {sum(e['train_seconds'] for e in epochs):.0f}, validation "
        )
        took += f"{sum(e['val_seconds'] for e in epochs):.0f}, first batch {epochs[0].get('loader_start_seconds', 0):.0f}"
        top = "top-1 after five epochs of Imagenette", f"{top_1:.2%}", expected
        lines = [
            verdict(*top, low <= top_1 <= high) if stored == IMAGENETTE_STORED else Check(*top),
            verdict(
                "time of the whole run", took, f"< {SECONDS_GOAL:.0f} s", seconds < SECONDS_GOAL
            ),
            # Mostly the starts of five short epochs: the stage `profile` judges what comes after.
            Check("training waits for the loader, starts of epochs included", f"{wait:.1%}"),
        ]
        if not real:  # generated images, or a CPU: nothing to compare with
            lines = [
                Check(line.what, line.measured, "not Imagenette on a GPU: no goal")
                for line in lines
            ]
        return found + lines

    return check


def profile(
    arch: str, on_gpu: bool, own_stream: bool, photos: bool
) -> Callable[[Outcome], list[Check]]:
    """What torch.profiler saw. `own_stream`: copies are to have one, and not what that is compared with.
    `photos`: they are decoded, so that the goal of waiting holds."""

    def check(outcome: Outcome) -> list[Check]:
        found = [ended(outcome)]
        if not isinstance(outcome.data, dict):
            return without_numbers(found)
        said = outcome.data
        wait = said["loader_share"]
        waits = "training waits for the loader, after the first batch", f"{wait:.1%}"
        lines = [
            Check(
                "training, the real loader",
                f"{said['images_per_second']:,.0f} images/s, first batch after {said['first_batch_seconds']:.2f} s",
            ),
            verdict(*waits, f"< {WAIT_GOAL:.0%}", wait < WAIT_GOAL)
            if photos
            else Check(*waits, NO_PHOTOS),
        ]
        if said["compile_seconds"]:
            lines.append(Check("torch.compile took", f"{said['compile_seconds']:.0f} s"))
        if on_gpu:
            launches, goal = said["optimizer_launches"], LAUNCH_GOALS[arch]
            own = said["copies_beside_compute"]
            lines += [
                verdict(
                    "copies to the GPU on a stream of their own",
                    f"{own} of {said['copies']}",
                    "all" if own_stream else "none: to compare",
                    (0 < said["copies"] == own) == own_stream,
                ),
                verdict(
                    "copies from pinned memory",
                    f"{said['pinned_copies']} of {said['copies']}",
                    "all",
                    0 < said["copies"] == said["pinned_copies"],
                ),
                verdict(
                    "Muon's kernel launches a step",
                    f"{launches:.0f}",
                    f"<= {goal}",
                    0 < launches <= goal,
                ),
                Check("the GPU computes", f"{said['busy_share']:.1%} of the time"),
            ]
        else:
            lines.append(Check("Muon's operations a step", f"{said['optimizer_operations']:.0f}"))
            lines = [Check(line.what, line.measured, "a CPU: no goal") for line in lines]
        return found + lines

    return check


def read_log(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Epochs and summary of a run's folder; empty where there is no log."""
    path = run / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    summary = next((row for row in reversed(rows) if row["type"] == "summary"), None)
    return [row for row in rows if row["type"] == "epoch"], summary


def stored_size(data: Path) -> int | None:
    """Longest side, px, at which the writer was asked to store the images."""
    path = data / "train.json"
    if not path.is_file():
        return None
    said = json.loads(path.read_text())["settings"]
    return said.get("max_resolution") or said.get("short_side")

"""The stages of the acceptance in the order of what they teach, each a list of parts of a few minutes.

A part is one command of this project with a limit in seconds and a function that reads what it left.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from acceptance import checks
from acceptance.record import Check, Outcome
from ffcv_imnet.machine.host import usable_cores

RECIPES = (
    *("imagenette_5ep", "demo", "rn18_16ep", "rn18_10ep", "rn18_8ep"),
    *("rn50_16ep", "rn50_6ep", "rn50_5ep"),
)
LONGEST = 500  # seconds of a part; a call has 540 unless it is told otherwise
# Of all parts those that tell most, one of each kind, should a machine be lent for minutes only.
_EARLY = """environment.doctor environment.decoder environment.tests step.resnet18_128 imagenette.five_epochs
    profile.resnet18_eager profile.resnet18_compiled step.resnet18_turns smoke.rn18_10ep_bf16 smoke.rn18_8ep_fp16
    smoke.rn18_10ep_compiled survive.resume survive.memory step.resnet50_128 step.resnet50_turns"""
FIRST = {key: place for place, key in enumerate(_EARLY.split())}
STAGES = ("environment", "smoke", "survive", "step", "loader", "imagenette", "profile")


@dataclass(frozen=True)
class Size:
    """How much is done: everything on a GPU, little in a rehearsal, next to nothing in CI."""

    name: str
    device: str  # of training
    recipes: tuple[str, ...]
    precisions: tuple[str, ...]
    archs: tuple[str, ...]
    resolutions: tuple[int, ...]  # of the step benchmark
    loader_resolutions: tuple[int, ...]
    steps: tuple[str, ...]  # of `benchmark step`; none: all
    batch: int
    rounds: int
    seconds: float  # of measuring a resolution
    samples: int  # in the loader's file
    smoke: int | None = None  # resolution of the smoke runs; None: the recipe's own
    epochs: int = 5
    processes: int = 1  # of training with several


FULL = Size(
    name="full", device="cuda", recipes=RECIPES, precisions=("bf16", "fp16"),
    archs=("resnet18", "resnet50"), resolutions=(128, 160, 192), loader_resolutions=(128, 160, 192, 224),
    steps=(), batch=512, rounds=5, seconds=30.0, samples=60_000,
)  # fmt: skip
REHEARSAL = Size(
    name="rehearsal", device="cpu", recipes=RECIPES, precisions=("bf16", "fp16"),
    archs=("resnet18",), resolutions=(32, 48), loader_resolutions=(32, 48),
    steps=("public", "sgd", "muon"), batch=8, rounds=2, seconds=1.0, samples=256, smoke=32, epochs=2, processes=2,
)  # fmt: skip
SMALLEST = Size(
    name="smallest rehearsal", device="cpu", recipes=("rn18_8ep",), precisions=("fp16",),
    archs=("resnet18",), resolutions=(32,), loader_resolutions=(32,),
    steps=("public", "muon"), batch=4, rounds=1, seconds=0.1, samples=64, smoke=32, epochs=1, processes=2,
)  # fmt: skip


def for_card(size: Size, said: str) -> Size:
    """`size` as the cards allow: no bf16 before Ampere, half the batch below 24 GB; a process for each.

    Args:
        said: of nvidia-smi --query-gpu=compute_cap,memory.total --format=csv,noheader,nounits; it makes no context.
    """
    found = re.match(r"(\d+)\.\d+, (\d+)", said)
    if found is None or size.device != "cuda":
        return size
    cards = len(said.splitlines())
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        cards = min(cards, len(visible.split(",")))
    size = replace(size, processes=cards)
    if int(found[1]) < 8:
        size = replace(size, precisions=("fp16",))
    return replace(size, batch=size.batch // 2) if int(found[2]) < 22_000 else size


@dataclass(frozen=True)
class Part:
    """A command and what is read from it."""

    stage: str
    name: str
    command: tuple[str, ...]  # after `python`
    limit: int  # seconds, then it is killed
    check: Callable[[Outcome], list[Check]]
    gpu_only: bool = False
    needs_data: bool = True

    @property
    def key(self) -> str:
        """Its name in files: STAGE.NAME."""
        return f"{self.stage}.{self.name}"


@dataclass(frozen=True)
class Place:
    """Where everything lies."""

    out: Path
    bundle: Path
    size: Size
    archive: Path | None = None  # where results go too

    @property
    def work(self) -> Path:
        """Data and runs: large, made again where it is missing."""
        return self.out / "work"

    def json(self, key: str) -> Path:
        """Where a part's command writes its numbers."""
        return self.out / "json" / f"{key}.json"

    def data(self, name: str) -> tuple[str, str]:
        """Settings that take the .beton of work/NAME."""
        folder = self.work / name
        return (
            f"--data.train_dataset={folder}/train.beton",
            f"--data.val_dataset={folder}/val.beton",
        )

    @property
    def on_gpu(self) -> bool:
        """Whether the goals hold: a rehearsal on a CPU has none."""
        return self.size.device == "cuda"

    def has(self, name: str) -> bool:
        """Whether the bundle has "imagenette" or "photos"; generated images stand in for them otherwise."""
        return (self.bundle / f"{name}.tar.gz").is_file()


def parts(place: Place) -> list[Part]:
    """All of them, in order."""
    found = [
        *environment(place),
        *smoke(place),
        *survive(place),
        *step(place),
        *loader(place),
        *imagenette(place),
        *profile(place),
    ]
    # A rehearsal's machine may be busy: each part gets the longest time.
    return found if place.on_gpu else [replace(part, limit=LONGEST) for part in found]


def environment(place: Place) -> list[Part]:
    """Versions, the doctor, the decoder, the tests that need a card."""
    doctor = ("-m", "ffcv_imnet", "doctor", f"--device={place.size.device}")
    decoder = ("-m", "ffcv_imnet.native.build", "--check")
    tests = ("-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py")
    return [
        Part("environment", "doctor", doctor, 120, checks.doctor, needs_data=False),
        Part("environment", "decoder", decoder, 60, checks.decoder, needs_data=False),
        Part("environment", "tests", tests, 420, checks.tests, gpu_only=True),
    ]


def smoke(place: Place) -> list[Part]:
    """Every recipe in both 16-bit types, a step or more of each of its stages."""
    base = ("-m", "acceptance.smoke", "recipe")
    found = []
    for precision in place.size.precisions:
        for recipe in place.size.recipes:
            command = (*base, recipe, precision, *_work(place))
            limit = 240 if recipe.startswith("rn50") else 120
            found.append(Part("smoke", f"{recipe}_{precision}", command, limit, checks.smoke))
    recipe, precision = "rn18_10ep", place.size.precisions[0]
    command = (*base, recipe, precision, "--compile", *_work(place))
    found.append(Part("smoke", f"{recipe}_compiled", command, 400, checks.smoke, gpu_only=True))
    if place.size.processes > 1:
        command = (*base, recipe, precision, "--processes", str(place.size.processes))
        command += ("--compile", *_work(place)) if place.on_gpu else _work(place)
        found.append(Part("smoke", f"{recipe}_processes", command, 450, checks.smoke))
    return found


def survive(place: Place) -> list[Part]:
    """Killed and resumed; out of memory, and the batch that the message names."""
    resume, memory = (
        ("-m", "acceptance.smoke", kind, *_work(place)) for kind in ("resume", "memory")
    )
    return [
        Part("survive", "resume", resume, 300, checks.resume),
        Part("survive", "memory", memory, 300, checks.memory, gpu_only=True),
    ]


def _work(place: Place) -> tuple[str, ...]:
    small = ("--resolution", str(place.size.smoke)) if place.size.smoke else ()
    return ("--work", str(place.work), *small)


def step(place: Place) -> list[Part]:
    """Training steps on a batch that stays on the device, eager and compiled, beside ffcv-imagenet's."""
    size, found = place.size, []
    rounds = ("--rounds", str(size.rounds))
    for arch in size.archs:
        for side in size.resolutions:
            key = f"{arch}_{side}"
            words = ["-m", "ffcv_imnet", "benchmark", "step", "--arch", arch, *rounds]
            words += ["--resolution", str(side), "--batch_size", str(size.batch)]
            words += ["--seconds", str(size.seconds), "--json", str(place.json(f"step.{key}"))]
            words += ["--steps", *size.steps] if size.steps else []
            first = (arch, side) == ("resnet18", min(size.resolutions))
            goal = checks.STEP_GOAL if first and place.on_gpu else None
            found.append(Part("step", key, tuple(words), 400, checks.step(goal)))
        words = ["-m", "acceptance.turns", "--arch", arch, "--device", size.device, *rounds]
        words += ["--json", str(place.json(f"step.{arch}_turns"))]
        found.append(Part("step", f"{arch}_turns", tuple(words), 120, checks.turns))
    return found


def loader(place: Place) -> list[Part]:
    """The loader against stock FFCV, DALI and libjpeg-turbo, by number of cores."""
    size, cores, found = place.size, usable_cores(), []
    for workers in sorted({1, cores // 4, cores} - {0}) if place.on_gpu else [1]:
        key = f"cores_{workers}"
        words = ["-m", "acceptance.loaders", "--work", str(place.work)]
        words += ["--num_workers", str(workers), "--batch_size", str(min(512, size.samples // 4))]
        words += ["--resolution", *map(str, size.loader_resolutions)]
        words += [] if place.on_gpu else ["--rehearse"]
        words += ["--rounds", str(min(3, size.rounds)), "--json", str(place.json(f"loader.{key}"))]
        real = place.on_gpu and place.has("photos")
        found.append(Part("loader", key, tuple(words), 500, checks.loader(workers, real)))
    return found


def imagenette(place: Place) -> list[Part]:
    """Five epochs of Imagenette; of generated images where the bundle has none."""
    folder = place.work / "imagenette"
    run = place.work / "runs/imagenette"
    words = ["train_imagenet.py", "--config", "rn_configs/imagenette_5ep.yaml", "--resume", "auto"]
    words += [*place.data("imagenette"), f"--logging.folder={run}", f"--device={place.size.device}"]
    if place.size.smoke:
        side, epochs = place.size.smoke, place.size.epochs
        words += [f"--resolution.{end}={side}" for end in ("min_res", "max_res")]
        words += [
            f"--validation.resolution={side}",
            f"--training.epochs={epochs}",
            "--training.batch_size=8",
        ]
        words += ["--resolution.start_ramp=0", "--resolution.end_ramp=0", "--lr.lr_peak_epoch=0.5"]
    real = place.has("imagenette") and place.on_gpu
    return [
        Part("imagenette", "five_epochs", tuple(words), 500, checks.imagenette(run, folder, real))
    ]


def profile(place: Place) -> list[Part]:
    """torch.profiler over the training loop with the real loader; what compiling changes."""
    size, found = place.size, []
    batch = min(2 * size.batch, size.samples // 8)
    for arch in size.archs:
        for mode in ("eager", "compiled", "one_stream") if place.on_gpu else ("eager",):
            key = f"{arch}_{mode}"
            words = ["-m", "acceptance.profile", "--arch", arch, "--device", size.device]
            words += ["--work", str(place.work), "--steps", "150" if place.on_gpu else "4"]
            words += ["--resolution", str(size.resolutions[0]), "--batch_size", str(batch)]
            words += ["--json", str(place.json(f"profile.{key}"))]
            words += ["--trace", str(place.out / "json" / f"profile.{key}.trace.json.gz")]
            words += {"compiled": ["--compile"], "one_stream": ["--one_stream"]}.get(mode, [])
            check = checks.profile(arch, place.on_gpu, mode != "one_stream", place.has("photos"))
            found.append(Part("profile", key, tuple(words), 240, check))
    return found

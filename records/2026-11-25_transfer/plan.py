"""What is run, in order: cells, each a learning rate to be bracketed with all else fixed.

The next runs of a cell follow from the log alone, so the study goes on from any log.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from experiment import Run

BASE = Run()


@dataclass(frozen=True)
class Cell:
    """One bracket. It starts at `run.lr`, and that times and over `factor`."""

    part: str
    run: Run
    factor: float = (
        4.0  # from one learning rate to the next: with less, Muon's differ by less than seeds do
    )
    margin: float = 0.0  # both ends must be so much below the best in top-1
    points: int = 3  # at least so many learning rates; 1: `run.lr` alone, a neighbouring cell's bracket serves
    most: int = 8  # and at most so many
    seeds: int = 1
    again: int = 1  # how many of the learning rates, nearest the best, get the other seeds

    @property
    def name(self) -> str:
        """What differs from the base, for people."""
        base, own = vars(BASE), vars(self.run)
        differ = [f"{k}={own[k]}" for k in base if own[k] != base[k] and k not in ("lr", "seed")]
        return " ".join(differ) or "base"


def key(lr: float) -> float:
    """Learning rates are kept to three digits, so that they are found again."""
    return float(f"{lr:.3g}")


def scored(cell: Cell, top_1: Mapping[Run, float]) -> dict[float, float]:
    """Top-1 by learning rate, seed 0, of what the log has of this cell."""
    own = replace(cell.run, lr=0.0)
    return {
        run.lr: value for run, value in sorted(top_1.items(), key=lambda item: item[0].lr)
        if replace(run, lr=0.0) == own
    }  # fmt: skip


def lacking(points: Mapping[float, float], margin: float) -> str:
    """The side on which the best has no neighbour, or none that is `margin` below it: "right", "left", or ""."""
    lrs = sorted(points)
    best = max(lrs, key=lambda lr: points[lr])
    for side, lr in (("right", lrs[-1]), ("left", lrs[0])):
        if lr == best or points[best] - points[lr] < margin:
            return side
    return ""


def next_runs(cell: Cell, top_1: Mapping[Run, float]) -> list[Run]:
    """What the cell wants now; empty once it is done."""
    shares = (1, cell.factor, 1 / cell.factor) if cell.points > 1 else (1,)
    start = [key(cell.run.lr * share) for share in shares]
    points = scored(cell, top_1)
    if missing := [lr for lr in start if lr not in points]:
        return [replace(cell.run, lr=lr) for lr in missing]
    lrs = sorted(points)
    best = max(lrs, key=lambda lr: points[lr])
    place = lrs.index(best)
    side = lacking(points, cell.margin) if cell.points > 1 else ""
    if side and len(lrs) < cell.most:
        far = lrs[-1] * cell.factor if side == "right" else lrs[0] / cell.factor
        return [replace(cell.run, lr=key(far))]
    if side and cell.points == 3:
        return []
    if len(lrs) < cell.points and 0 < place < len(lrs) - 1:
        beside = max((lrs[place - 1], lrs[place + 1]), key=lambda lr: points[lr])
        return [replace(cell.run, lr=key(math.sqrt(best * beside)))]
    nearest = sorted(lrs, key=lambda lr: abs(math.log(lr / best)))[: cell.again]
    reseeded = [replace(cell.run, lr=lr, seed=s) for s in range(1, cell.seeds) for lr in nearest]
    return [run for run in reseeded if run not in top_1]


# ---- the grid -----------------------------------------------------------------------------------

ADAPTIVE = {"adamw": 0.003, "schedulefree": 0.005, "soap": 0.003, "shampoo": 0.001}
LENGTHS = (3, 16, 5, 8)  # epochs
START = {"none": 0.04, "keller": 0.04, "spectral": 0.12, "rms": 0.008}


def ruled(rule: str, **settings: object) -> Run:
    """A Muon run under a rule for shape, at the middle of where its bracket starts."""
    return replace(BASE, scale=rule, lr=START[rule], **settings)  # type: ignore[arg-type]


def bracket(part: str, run: Run, seeds: int = 1) -> Cell:
    """Of part A, where the place of the optimum is the question: both ends a point below the best."""
    return Cell(part, run, margin=0.01, most=7, seeds=seeds, again=3)


def held(lr: float = 0.12, **settings: object) -> Run:
    """Kernels at a fixed norm."""
    return replace(BASE, hold=True, lr=lr, **settings)  # type: ignore[arg-type]


def transfer_core() -> Iterator[Cell]:
    """A, the cheap corner: what moves the optimum, at a quarter of the width."""
    yield bracket("A steps", ruled("none", epochs=1))
    yield bracket("A hold", held(epochs=1))
    yield bracket("A hold", held())
    yield bracket("A decay", ruled("none", decay=1.0))
    yield from data_corner(0.25, (6_250,), (3, 16), seeds=1)
    yield from lead()
    yield bracket("A hold", held(epochs=16))
    yield bracket("A base", ruled("none"))
    yield bracket("A rule", ruled("rms", epochs=1))
    yield from data_corner(0.25, (6_250,), (5, 8), seeds=1)
    yield bracket("A momentum", ruled("none", momentum=0.85))
    yield bracket("A batch", ruled("none", batch=1024))
    yield bracket("A batch", ruled("none", batch=64, epochs=1))
    yield bracket("A base", ruled("none"), seeds=3)
    yield bracket("A rule", ruled("rms"))
    yield bracket("A steps", ruled("none", epochs=16))
    yield bracket("A batch", ruled("none", batch=64))
    yield bracket("A rule", ruled("spectral"))
    yield bracket("A momentum", ruled("none", momentum=0.6))
    yield bracket("A hold", held(momentum=0.6))


def three(run: Run) -> Cell:
    """Three learning rates, factors of four apart: of part A where a bracket has no place for more."""
    return Cell("A short", run, most=3)


def transfer_short() -> Iterator[Cell]:
    """A once around, 781 steps of batch 64 unless said: what of all that was asked moves the optimum at all."""
    base = {"batch": 64, "epochs": 1}
    for momentum in (0.95, 0.85, 0.6):
        yield three(ruled("none", momentum=momentum, **base))
    for rule in ("keller", "spectral", "rms"):
        yield three(ruled(rule, **base))
    for rule in ("none", "keller", "spectral", "rms"):
        yield three(ruled(rule, net="rn50", **base))
    yield three(ruled("none", width=0.5, **base))
    for width in (0.25, 0.5, 1.0):
        yield three(ruled("none", width=width, batch=64, epochs=1, images=12_500))
    for decay in (0.01, 0.1, 1.0):
        yield three(ruled("none", decay=decay, **base))
    for momentum in (0.95, 0.85, 0.6):
        yield three(held(0.03, momentum=momentum, **base))
    yield three(ruled("none", stem="sgd", **base))
    for sgd_lr in (0.25, 4.0):
        yield three(ruled("none", sgd_lr=sgd_lr, **base))
    yield three(ruled("none", batch=256, epochs=4))
    yield three(ruled("none", batch=1024, epochs=4))
    yield three(ruled("none", batch=1024, epochs=16))


def soap_transfer() -> Iterator[Cell]:
    """This project's SOAP: its learning rate over steps, batch, width and network, 781 steps of batch 64 unless said."""
    same = replace(BASE, optimizer="our_soap", lr=0.012, batch=64, epochs=1)
    for run in (
        same,
        replace(same, images=12_500),
        replace(same, images=12_500, width=0.5),
        replace(same, images=12_500, width=1.0),
        replace(same, net="rn50"),
        replace(same, width=0.5),
        replace(same, batch=256, epochs=4),
        replace(same, batch=1024, epochs=4),
        replace(same, epochs=4),
    ):
        yield Cell("A soap", run)


def long_runs() -> Iterator[Cell]:
    """As many steps as the ImageNet recipes make, and on the way there: SOAP's learning rate, and decay under both."""
    same = replace(BASE, batch=64, lr=0.04)
    soap = replace(same, optimizer="our_soap", lr=0.012)
    yield Cell("A long", replace(soap, epochs=16), 2.0)
    for epochs, lr in ((8, 0.0075), (8, 0.015), (5, 0.009), (3, 0.012)):
        yield Cell("A long", replace(soap, epochs=epochs, lr=lr), points=1)
    yield Cell("A long", replace(same, epochs=16))
    yield Cell("A long", replace(same, epochs=16, momentum=0.85), points=1)
    sgd = replace(same, optimizer="sgd", epochs=16, lr=1.0, sgd_decay=2e-4)
    yield Cell("A long", sgd, points=1)
    yield Cell("A long", replace(same, images=25_000, epochs=8, momentum=0.85), points=1)
    for decay, seeds in ((0.05, 1), (0.15, 2), (0.5, 1)):
        run = replace(soap, epochs=8, lr=0.0075, decay=decay)
        yield Cell("A long", run, points=1, seeds=seeds)
    for decay, seeds in ((0.02, 2), (0.08, 1)):
        yield Cell("A long", replace(same, epochs=8, decay=decay), points=1, seeds=seeds)
    yield Cell("A long", replace(soap, epochs=8, lr=0.015, decay=0.075), points=1)
    for decay in (0.05, 0.15):
        run = replace(soap, epochs=8, lr=0.0075, decay=decay, every=50)
        yield Cell("A long", run, points=1)
    for epochs, lr, seeds in ((5, 0.009, 2), (3, 0.012, 1)):
        run = replace(soap, epochs=epochs, lr=lr, decay=0.15)
        yield Cell("A long", run, points=1, seeds=seeds)
    yield Cell("A long", replace(same, epochs=5, decay=0.04), points=1)


def data_corner(
    width: float, sizes: tuple[int, ...], lengths: tuple[int, ...], seeds: int
) -> Iterator[Cell]:
    """B: SGD against Muon over the number of images and of epochs, at batch 64."""
    for images in sizes:
        for epochs in lengths:
            same = replace(BASE, images=images, epochs=epochs, batch=64, width=width)
            yield Cell("B data", replace(same, lr=0.04), seeds=seeds)
            yield Cell("B data", replace(same, optimizer="sgd", lr=1.0), 2.0, seeds=seeds)


def lead() -> Iterator[Cell]:
    """B at a quarter of the width, first pass: SGD's rate bracketed at 3 and 16 epochs, Muon's at 3, one rate
    between; what the crossing with SGD's 16 epochs does not need comes last."""

    def cell(images: int, epochs: int, optimizer: str, points: int = 3, seeds: int = 1) -> Cell:
        lr, factor = (1.0, 2.0) if optimizer == "sgd" else (0.04, 4.0)
        run = replace(BASE, images=images, epochs=epochs, batch=64, optimizer=optimizer, lr=lr)
        return Cell("B data", run, factor, points=points, seeds=seeds)

    sizes = (6_250, 12_500, 25_000, 50_000)
    for images in sizes:
        yield cell(images, 16, "sgd")
        yield cell(images, 8, "muon", points=1)
        yield cell(images, 5, "muon", points=1)
        yield cell(images, 3, "muon")
    for images in (6_250, 50_000):
        yield cell(images, 16, "sgd", seeds=2)
        yield cell(images, 8, "muon", points=1, seeds=2)
        yield cell(images, 5, "muon", points=1, seeds=2)
    for images in (25_000, 12_500, 50_000):
        yield cell(images, 16, "muon", points=1)
    for images in sizes:
        yield cell(images, 3, "sgd")
        for epochs in (5, 8):
            for lr in (1.0, 0.5):
                run = replace(cell(images, epochs, "sgd").run, lr=lr)
                yield Cell("B data", run, points=1)
    yield cell(50_000, 16, "muon")  # 12,500 steps, more than the ImageNet recipes make: bracketed


def data(width: float) -> Iterator[Cell]:
    """B: two seeds at the ends."""
    yield from data_corner(width, (6_250,), LENGTHS, seeds=2)
    yield from data_corner(width, (12_500, 25_000), LENGTHS, seeds=1)
    yield from data_corner(width, (50_000,), LENGTHS, seeds=2)


def transfer_rest() -> Iterator[Cell]:
    """A, the dear part: width, the bottleneck network, and rules, steps and decay crossed."""
    for rule in ("none", "rms", "spectral"):
        yield bracket("A width", ruled(rule, width=0.5))
    for rule in ("none", "spectral", "rms", "keller"):
        yield bracket("A bottleneck", ruled(rule, net="rn50"))
    for rule in ("spectral", "rms"):
        yield bracket("A steps", ruled(rule, epochs=16))
    for epochs in (4, 16):
        for decay in (0.1, 1.0):
            yield bracket("A decay", ruled("none", epochs=epochs, decay=decay))
    yield bracket("A decay", ruled("none", epochs=16, decay=0.01))
    for epochs in (1, 16):
        yield bracket("A hold", held(epochs=epochs, momentum=0.6))
    yield bracket("A stem", ruled("none", stem="sgd"))
    for sgd_lr in (0.25, 2.0):
        yield bracket("A head", ruled("none", sgd_lr=sgd_lr))
    yield bracket("A rule", ruled("keller"))
    yield bracket("A batch", ruled("none", batch=1024, epochs=16))
    for momentum in (0.6, 0.85):
        yield bracket("A momentum", ruled("none", epochs=16, momentum=momentum))
    for momentum in (0.6, 0.85):
        yield bracket("A momentum", ruled("none", batch=64, momentum=momentum))
    for rule in ("none", "rms", "spectral"):
        yield bracket("A width", ruled(rule, width=1.0))
    for rule in ("none", "spectral", "rms", "keller"):
        yield bracket("A bottleneck", ruled(rule, net="rn50", width=0.5))
    yield bracket("A steps", ruled("none", epochs=16, batch=64))


def rivals() -> Iterator[Cell]:
    """C: eight trials each, four learning rates at two values of the second setting that matters."""
    for epochs in (3, 5):
        for data, images, px in (("tiny100", 25_000, 40), ("imagenette", 9_469, 64)):
            same = replace(BASE, data=data, images=images, px=px, epochs=epochs, batch=64)
            for sgd_decay in (5e-5, 5e-4):
                sgd = replace(same, optimizer="sgd", lr=1.0, sgd_decay=sgd_decay)
                yield Cell("C rivals", sgd, 2.0, points=4, most=4, seeds=3)
            for momentum in (0.85, 0.95):
                for name, lr in (("muon", 0.04), ("torch_muon", 0.008)):
                    muon = replace(same, optimizer=name, momentum=momentum, lr=lr)
                    yield Cell("C rivals", muon, points=4, most=4, seeds=3)
            for momentum in (0.6, 0.85):
                fixed = replace(same, hold=True, momentum=momentum, lr=0.12)
                yield Cell("C rivals", fixed, points=4, most=4, seeds=3)
            for decay in (0.05, 0.5):
                for name, lr in ADAPTIVE.items():
                    rival = replace(same, optimizer=name, lr=lr, decay=decay)
                    yield Cell("C rivals", rival, points=4, most=4, seeds=3)


BEST = {  # of the first pass on seed 0: by tiny100 in three epochs and in five, Imagenette in three and in five
    "soap": (0.012, 0.012, 0.012, 0.012),
    "muon": (0.04, 0.16, 0.04, 0.16),
    "hold": (0.03, 0.03, 0.03, 0.03),
    "shampoo": (0.001, 0.001, 0.001, 0.001),
    "torch_muon": (0.016, 0.032, 0.032, 0.032),
    "schedulefree": (0.02, 0.02, 0.005, 0.02),
    "sgd": (1.0, 0.5, 1.0, 2.0),
    "adamw": (0.006, 0.006, 0.006, 0.006),
}


def rivals_again() -> Iterator[Cell]:
    """C, first pass: the best learning rate of each with more seeds."""
    for place, (data, images, px, epochs, seeds) in enumerate((
        ("tiny100", 25_000, 40, 3, 3), ("tiny100", 25_000, 40, 5, 2),
        ("imagenette", 9_469, 64, 3, 1), ("imagenette", 9_469, 64, 5, 3),
    )):  # fmt: skip
        same = replace(BASE, data=data, images=images, px=px, epochs=epochs, batch=64)
        for name, lrs in BEST.items():
            run = replace(same, lr=lrs[place], decay=0.05 if name in ADAPTIVE else 0.0)
            if name == "hold":
                run = replace(run, hold=True, momentum=0.85)
            else:
                run = replace(run, optimizer=name)
            yield Cell("C rivals", run, points=1, seeds=seeds)


def rivals_second() -> Iterator[Cell]:
    """C: the other value of each one's second setting, at the learning rate that is best with the first and beside it."""
    columns = (("tiny100", 25_000, 40, 3), ("tiny100", 25_000, 40, 5),
               ("imagenette", 9_469, 64, 3), ("imagenette", 9_469, 64, 5))  # fmt: skip
    others: dict[str, dict[str, float]] = {name: {"decay": 0.5} for name in ADAPTIVE}
    others |= {name: {"momentum": 0.85} for name in ("muon", "torch_muon")}
    others["sgd"] = {"sgd_decay": 5e-4}
    for place in (0, 3, 1, 2):
        data, images, px, epochs = columns[place]
        same = replace(BASE, data=data, images=images, px=px, epochs=epochs, batch=64)
        for name, lrs in BEST.items():
            if name == "hold":
                run = replace(same, hold=True, momentum=0.6)
            else:
                run = replace(same, optimizer=name, **others[name])  # type: ignore[arg-type]
            beside = {"sgd": (0.5,), "muon": (0.25, 4), "torch_muon": (0.25, 4), "hold": (0.25, 4)}
            shares = (1.0, *beside.get(name, (0.25,))) if place in (0, 3) else (1.0,)
            for share in shares:
                yield Cell("C rivals", replace(run, lr=key(lrs[place] * share)), points=1)


def half_width() -> Iterator[Cell]:
    """Three epochs of 50,000 images at half the width: SOAP and Muon, both with decay."""
    half = replace(BASE, batch=64, width=0.5, epochs=3, images=50_000)
    yield Cell("A long", replace(half, optimizer="our_soap", lr=0.0105, decay=0.19), points=1)
    yield Cell("A long", replace(half, lr=0.04, decay=0.05), points=1)


def networks() -> Iterator[Cell]:
    """D: a bottleneck network against ResNet-18 at equal epochs, under the same optimizer."""
    for net in ("rn18", "rn50"):
        run = replace(BASE, images=25_000, net=net, epochs=16, batch=128, lr=0.04)
        yield Cell("D networks", run, points=1)
    for epochs in (5, 16):
        for net in ("rn18", "rn50"):
            run = replace(BASE, net=net, width=0.5, epochs=epochs, batch=64, lr=0.04)
            yield Cell("D networks", run, most=5)


def networks_first() -> Iterator[Cell]:
    """D, first pass: a quarter of the width, one learning rate, two seeds, both data sets."""
    for data, images, px in (("tiny100", 25_000, 40), ("imagenette", 9_469, 64)):
        for net in ("rn18", "rn50"):
            run = replace(BASE, data=data, images=images, px=px, net=net, epochs=5)
            yield Cell("D networks", replace(run, batch=128, lr=0.04), points=1, seeds=2)


def cells() -> list[Cell]:
    """All, most information per hour first."""
    return [
        *networks_first(),
        *islice(rivals(), 16),  # three epochs of tiny100
        *transfer_core(),
        *transfer_short(),
        *soap_transfer(),
        *long_runs(),
        *rivals_again(),
        *rivals_second(),
        *half_width(),
        *data(0.25),
        *transfer_rest(),
        *rivals(),
        *networks(),
        *data(0.5),
    ]

"""What turning SOAP's bases costs: by QR, as the optimizer does, and by Cholesky's decomposition instead.

torch's QR goes through a batch one matrix after another on a GPU (github.com/pytorch/pytorch/issues/143281);
its Cholesky decomposition and triangular solution take a batch at once. Cholesky's needs float64.

python -m acceptance.turns --arch resnet18 --device cuda --json OUT
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ffcv_imnet.bench.steps import CLASSES
from ffcv_imnet.core.errors import Parser, run_main
from ffcv_imnet.machine.device import synchronise
from ffcv_imnet.models.registry import build
from ffcv_imnet.train.soap import stacks_of

# Added to a Gram matrix, times its largest eigenvalue: bounds the condition, which Cholesky squares.
SHIFT = 1e-6


def by_qr(image: Tensor) -> Tensor:
    """An orthonormal basis of the columns (n, w, w)."""
    return torch.linalg.qr(image).Q


def by_cholesky(image: Tensor) -> Tensor:
    """The same up to signs: Cholesky QR, made twice (arXiv:1809.11085)."""
    columns = image.double()
    columns = columns / columns.norm(dim=1, keepdim=True)
    for _ in range(2):
        factor = torch.linalg.cholesky_ex(columns.mT @ columns).L
        columns = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    return columns.float()


WAYS: dict[str, Callable[[Tensor], Tensor]] = {"qr": by_qr, "cholesky": by_cholesky}


def sides(arch: str, device: torch.device) -> dict[int, Tensor]:
    """By width w, Gram matrices (n, w, w) of normal random gradients: as many as the network has sides."""
    _, counts = stacks_of(list(build(arch, CLASSES, zero_gamma=False).parameters()))
    found = {}
    for width, count in counts.items():
        noise = torch.randn(count, width, 2 * width, device=device)
        # eigenvalues over six decades, as a layer's gradients have them
        noise *= torch.logspace(0, -3, width, device=device)[:, None]
        gram = noise @ noise.mT
        top = gram.diagonal(dim1=1, dim2=2).amax(1)
        gram.diagonal(dim1=1, dim2=2).add_(SHIFT * top[:, None])
        found[width] = gram
    return found


def seconds(grams: dict[int, Tensor], way: str) -> float:
    """Of a turn of all bases."""
    device = next(iter(grams.values())).device
    synchronise(device)
    started = time.perf_counter()
    for gram in grams.values():
        WAYS[way](gram)
    synchronise(device)
    return time.perf_counter() - started


def skewness(grams: dict[int, Tensor], way: str) -> float:
    """How far from orthonormal a basis ends: the largest |Q'Q - 1|."""
    found = []
    for gram in grams.values():
        basis = WAYS[way](gram).double()
        unit = torch.eye(basis.shape[1], device=basis.device, dtype=basis.dtype)
        found.append((basis.mT @ basis - unit).abs().max().item())
    return max(found)


def main() -> int:
    """Both ways in alternation, after a first turn of each."""
    options = parse()
    grams = sides(options.arch, torch.device(options.device))
    said: dict[str, dict[str, float]] = {
        way: {"skewness": skewness(grams, way), "matrices": sum(map(len, grams.values()))}
        for way in WAYS
    }
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            taken[way].append(seconds(grams, way))
    for way, values in taken.items():
        said[way]["seconds"] = statistics.median(values)
    print(json.dumps(said, indent=1))
    options.json.write_text(json.dumps(said) + "\n")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m acceptance.turns", description=__doc__)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)

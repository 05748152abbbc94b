"""`benchmark loader` on a file that is long enough for the number of threads.

python -m acceptance.loaders --work DIR --num_workers 4 --resolution 128 160 --json OUT
"""

import subprocess
import sys
from pathlib import Path

from acceptance.data import repeated
from ffcv_imnet.bench.peers import installed
from ffcv_imnet.core.errors import Parser, run_main

A_THREAD = 2048  # samples of a pass: about a second of decoding from 400 px
MOST = 65_536  # samples: each is a name in a folder for the loaders that read files
MANY = 32  # threads; torchvision would fork as many processes for every pass


def main() -> int:
    """The exit status of the benchmark. In a rehearsal FFCV's loader and ours are enough."""
    parser = Parser(prog="python -m acceptance.loaders", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--num_workers", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options, others = parser.parse_known_args()
    samples = (
        4 * options.batch_size if options.rehearse else min(MOST, A_THREAD * options.num_workers)
    )
    target = options.work / f"photos_{options.num_workers}/train.beton"
    beton = repeated(options.work / "photos/train.beton", target, samples)
    command = ["-m", "ffcv_imnet", "benchmark", "loader", "--beton", str(beton)]
    command += ["--num_workers", str(options.num_workers), "--batch_size", str(options.batch_size)]
    if options.rehearse:
        command += ["--loaders", "ffcv_imnet", "ffcv"]
    elif options.num_workers > MANY:
        command += ["--loaders", *(name for name in installed(True) if name != "torchvision")]
    return subprocess.run([sys.executable, *command, *others]).returncode


if __name__ == "__main__":
    run_main(main)

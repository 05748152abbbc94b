"""What a result must name to be believed: versions, commit, hardware."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "ffcv-imnet",  # where it is installed; a checkout has its commit instead
    "torch", "torchvision", "ffcv", "numba", "numpy", "opencv-python", "pillow", "timm",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Python's and the packages' versions, by name; a package that is not installed is absent."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """This project's commit, with "+changes" if the tree differs from it; None outside of git."""
    home = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(home), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != home:
            return None  # copied into somebody else's repository
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

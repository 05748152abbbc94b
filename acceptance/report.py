"""The report: one Markdown page over the results that there are."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from acceptance.record import Result
from ffcv_imnet.core.atomic import atomic_write

TAIL = 60  # lines of a part's output that the page shows


def write(out: Path, results: list[Result], left: int, size: str) -> Path:
    """`OUT/report.md`, whole or not at all."""
    path = out / "report.md"
    with atomic_write(path, "w") as file:
        file.write(page(out, results, left, size))
    return path


def page(out: Path, results: list[Result], left: int, size: str) -> str:
    """Machine, verdicts, then each part's command and output."""
    machine = read_json(out / "machine.json")
    counts = Counter(check.verdict for result in results for check in result.checks)
    title = machine.get("device", "a machine that is not known")
    lines = [f"# Acceptance on {title}", ""]
    if size != "full":
        lines += [
            f"**A {size} on a CPU: it shows that the command works, and nothing about a GPU.**",
            "",
        ]
    said = ", ".join(
        f"{counts[verdict]} {verdict}" for verdict in ("PASS", "FAIL", "SKIP") if counts[verdict]
    )
    lines += [f"{said or 'no result yet'}; {left} parts left", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {cell(value)} |" for key, value in machine.items()]
    lines += ["", "| verdict | part | what | measured | goal |", "|---|---|---|---|---|"]
    for result in results:
        for check in result.checks:
            verdict = "" if check.verdict == "INFO" else check.verdict
            words = (
                verdict,
                f"{result.stage}/{result.part}",
                check.what,
                check.measured,
                check.goal,
            )
            lines.append("| " + " | ".join(map(cell, words)) + " |")
    for result in results:
        lines += ["", f"## {result.stage}/{result.part}", ""]
        lines += [
            f"`{result.command}`",
            "",
            f"{result.finished}, {result.seconds:.0f} s, exit status {result.status}",
        ]
        text = tail(out / "logs" / f"{result.stage}.{result.part}.out")
        if not text and result.status:
            text = tail(out / "logs" / f"{result.stage}.{result.part}.err")
        lines += ["", "```", text, "```"] if text else []
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """As it may stand in a table of Markdown."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def tail(path: Path) -> str:
    """The last lines of a log."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(line.replace("```", "'''") for line in lines[-TAIL:])


def read_json(path: Path) -> Any:
    """What a file holds; an empty dict where it is missing or cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}

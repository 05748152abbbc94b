"""What a part of the acceptance found: checks with a verdict, kept as one JSON file a part."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.bounded import read_json
from ffcv_imnet.core.errors import RunError

Verdict = Literal["PASS", "FAIL", "SKIP", "INFO"]


@dataclass(frozen=True)
class Check:
    """A line of the report."""

    what: str
    measured: str
    goal: str = ""
    verdict: Verdict = "INFO"


def verdict(what: str, measured: str, goal: str, passed: bool) -> Check:
    """A line that passes or fails."""
    return Check(what, measured, goal, "PASS" if passed else "FAIL")


@dataclass(frozen=True)
class Outcome:
    """What a part's process left: exit status, seconds, the JSON it wrote, the end of its output."""

    status: int
    seconds: float
    data: Any = None
    said: str = ""
    timed_out: bool = False


@dataclass(frozen=True)
class Result:
    """A part that is done, as it is kept."""

    stage: str
    part: str
    command: str
    status: int
    seconds: float
    finished: str  # UTC
    checks: list[Check] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Under its name only when whole: a killed part has no result."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as file:
            file.write(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Result":
        """What `save` wrote. Raises RunError if it is something else."""
        try:
            fields = read_json(path)
            return cls(**{**fields, "checks": [Check(**check) for check in fields["checks"]]})
        except (OSError, ValueError, TypeError, KeyError):
            raise RunError(
                f"{path}: not the result of a part: remove it, and the part is run again"
            ) from None

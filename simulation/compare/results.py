"""Raw numbers of a comparison as JSON lines: one for each cell, written once, never rewritten."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agssd_core.evaluation.outcome import Outcome


@dataclass(frozen=True)
class Cell:
    """One question to one model.

    Attributes:
        arm: an arm, or the control ``position`` or ``intensity``.
        site: of arm ``alone``.
        fraction: of the labelled training patients.
        stamp: digest of everything that decides the answer.
    """

    seed: int
    arm: str
    site: str
    variant: str
    task: str
    method: str
    fraction: float
    stamp: str


@dataclass(frozen=True)
class Result:
    """A cell and its answer.

    Attributes:
        facts: of the model: weights digest, optimiser updates, what the collapse monitor said.
    """

    cell: Cell
    outcome: Outcome
    facts: Mapping[str, Any] = field(default_factory=dict)


class ResultFile:
    """``results.jsonl``: lines are added by several processes, each whole and synced."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, result: Result) -> None:
        """Add one line; it is on the disk when this returns."""
        line = {
            **asdict(result.cell),
            "metrics": dict(result.outcome.metrics),
            "per_site": {site: dict(own) for site, own in result.outcome.per_site.items()},
            "scans": dict(result.outcome.scans),
            "facts": dict(result.facts),
        }
        text = json.dumps(line, sort_keys=True, allow_nan=False) + "\n"
        with self.file.open("ab+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0, os.SEEK_END)
            if stream.tell():
                # A killed process may have left half a line; it must not swallow this one.
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def read(self) -> dict[Cell, Result]:
        """All answers; half a line that a killed process left is passed over."""
        found: dict[Cell, Result] = {}
        if not self.file.is_file():
            return found
        for text in self.file.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
                cell = Cell(**{name: line[name] for name in Cell.__dataclass_fields__})
                outcome = Outcome(line["metrics"], line["per_site"], line["scans"])
            except (ValueError, KeyError, TypeError):
                continue
            found[cell] = Result(cell, outcome, line.get("facts", {}))
        return found


def digest_of(*parts: str) -> str:
    """Short digest of texts, for stamps."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

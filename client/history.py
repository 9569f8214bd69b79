"""What every round at this site measured, for the site's own eyes: a line a round.

``SITE/federation/RUN/history.jsonl`` holds all metrics of a round, those too that the owner's
policy lets nobody else see. A line is written before its round counts as done; when a killed round
is trained again, its later line counts.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

HISTORY_FILE = "history.jsonl"


@dataclass(frozen=True)
class RoundNote:
    """One round; ``time`` is in seconds since 1970."""

    round: int
    time: float
    metrics: Mapping[str, float]


def note_round(folder: Path, note: RoundNote) -> None:
    """Add a line to a run's history; one that cannot be written costs no round."""
    row = {"round": note.round, "time": note.time, "metrics": dict(note.metrics)}
    text = json.dumps(row, sort_keys=True) + "\n"
    try:
        with (folder / HISTORY_FILE).open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        log.warning("the history of the run was not written (%s)", type(error).__name__)


def read_history(folder: Path) -> tuple[dict[int, RoundNote], int]:
    """Round -> what it measured last, and how many lines cannot be read."""
    found: dict[int, RoundNote] = {}
    damaged = 0
    file = folder / HISTORY_FILE
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            metrics = {str(name): float(value) for name, value in row["metrics"].items()}
            found[int(row["round"])] = RoundNote(int(row["round"]), float(row["time"]), metrics)
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += 1
    return dict(sorted(found.items())), damaged

"""``metrics.jsonl``: one row a line, appended; a resumed run leaves no double or torn rows."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agssd_core.errors import CheckpointError
from agssd_core.weights import write_text


class MetricsLog:
    """Rows of a run. Append a round's rows *before* its checkpoint is saved.

    A kill between the two leaves rows of a round that will run again; ``recover`` cuts them, so
    that a resumed run's file equals that of an uninterrupted one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row with a single call and sync it.

        Raises:
            CheckpointError: the disk is full, or a number is not finite.
        """
        try:
            line = json.dumps(row, sort_keys=True, allow_nan=False) + "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                _write_all(descriptor, line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"a row of metrics could not be written ({type(error).__name__}). Free disk space "
                "and resume; a torn row is cut then."
            ) from None

    def rows(self) -> list[dict[str, Any]]:
        """Every whole row; a torn or damaged line is left out."""
        return [row for _, row in self._lines()]

    def recover(self, next_round: int) -> int:
        """Keep the rows of rounds before ``next_round``; cut torn lines and later rounds.

        Returns:
            How many lines were cut.
        """
        if not self.path.exists():
            return 0
        total = len([line for line in self.path.read_bytes().split(b"\n") if line])
        kept = [line for line, row in self._lines() if int(row.get("round", 0)) < next_round]
        if len(kept) < total or not self.path.read_bytes().endswith(b"\n"):
            write_text(self.path, "".join(f"{line}\n" for line in kept))
        return total - len(kept)

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                found.append((line, row))
        return found


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]

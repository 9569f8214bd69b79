"""What rows over the toy federation share."""

import contextlib
import os
from collections.abc import Iterator
from unittest.mock import patch

from tests.support.toy import Hospital


@contextlib.contextmanager
def quick_disk() -> Iterator[None]:
    """No plug is pulled here: a killed process loses nothing that was not synced."""
    with patch.object(os, "fsync", lambda _descriptor: None):
        yield


def shares(run: Hospital, number: int) -> set[str]:
    """Whose updates a round merged."""
    rows = [row for row in run.rows("merge") if row["round"] == number]
    return set(rows[0].get("shares") or ()) if rows else set()

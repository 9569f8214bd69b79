"""Journals of a test, and processes that write them."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from agssd_core.journal import (
    JOURNAL_FILE,
    Journal,
)
from agssd_core.signing import SigningKey

ROOT = Path(__file__).parents[2]
NOON = datetime(2030, 5, 1, 12, tzinfo=UTC)
KEY = SigningKey.create()

APPENDER = """
import sys
from pathlib import Path
from agssd_core.journal import Journal
from agssd_core.signing import SigningKey
folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
journal = Journal(folder, SigningKey.load(folder / "key.pem"), owner="north")
for number in range(count):
    journal.append("update", {"writer": name, "round": number})
    print(number, flush=True)
"""


def opened(folder, key=KEY, **options):
    return Journal(folder, key, owner="north", clock=lambda: NOON, **options)


def filled(folder, count=5):
    journal = opened(folder)
    for number in range(count):
        journal.append("order", {"round": number, "cohort": "ct-mr", "late": False, "loss": 0.5})
    return journal


def lines_of(folder):
    return (folder / JOURNAL_FILE).read_bytes().splitlines(keepends=True)


def appender(folder, name, count):
    KEY.save(folder / "key.pem")
    command = [sys.executable, "-c", APPENDER, str(folder), name, str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def edit_fact(lines):
    lines[2] = lines[2].replace(b'"round":2', b'"round":9')

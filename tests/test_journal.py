"""The journal: what was written stays, and whatever is changed afterwards shows."""

import os
import signal
import sys
import time

import pytest

from agssd_core.errors import JournalError
from agssd_core.journal import (
    GENESIS,
    JOURNAL_FILE,
    Journal,
    entries_of,
    verify_journal,
)
from tests.support.journals import KEY, appender, edit_fact, filled, lines_of, opened


def test_entries_come_back_in_order_with_what_was_said(tmp_path):
    journal = filled(tmp_path, 3)
    entries = list(entries_of(tmp_path))
    assert [entry.sequence for entry in entries] == [1, 2, 3]
    assert entries[2].facts == {"round": 2, "cohort": "ct-mr", "late": False, "loss": 0.5}
    assert {entry.time for entry in entries} == {"2030-05-01T12:00:00.000+00:00"}
    assert verify_journal(tmp_path, KEY.public).head == journal.head() == (3, entries[2].digest)
    assert (tmp_path / JOURNAL_FILE).stat().st_mode & 0o777 == 0o600


def test_the_head_before_the_first_entry(tmp_path):
    assert opened(tmp_path).head() == (0, GENESIS)
    assert verify_journal(tmp_path, KEY.public, (0, GENESIS)).head == (0, GENESIS)


def test_another_process_goes_on_where_this_one_stopped(tmp_path):
    first = filled(tmp_path, 2)
    opened(tmp_path).append("stop", {})
    assert first.append("start", {}).sequence == 4
    assert verify_journal(tmp_path, KEY.public, first.head()).head[0] == 4


BAD_FACTS = {
    "nan": {"loss": float("nan")},
    "a list": {"round": [1]},
    "nothing": {"round": None},
    "two lines": {"reason": "a\nb"},
    "long": {"reason": "a" * 301},
    "large": {"round": 1 << 63},
    "a name": {"Patient Name": "x"},
    "many": {f"f{number}": 1 for number in range(25)},
}


@pytest.mark.parametrize("facts", BAD_FACTS.values(), ids=BAD_FACTS)
def test_facts_are_plain_values_only(tmp_path, facts):
    journal = opened(tmp_path)
    with pytest.raises(JournalError, match=r"Leave it out|Kinds"):
        journal.append("order", facts)
    with pytest.raises(JournalError, match="Kinds: order, update"):
        journal.append("diary", {})
    assert journal.head() == (0, GENESIS)


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_an_unfinished_line_is_set_aside_and_told(tmp_path, kept):
    filled(tmp_path, 3)
    *whole, last = lines_of(tmp_path)
    torn = last[:kept]
    (tmp_path / JOURNAL_FILE).write_bytes(b"".join(whole) + torn)
    assert verify_journal(tmp_path, KEY.public).torn_bytes == len(torn)
    opened(tmp_path).append("stop", {})
    note = list(entries_of(tmp_path))[2]
    assert lines_of(tmp_path)[:2] == whole
    assert (note.kind, note.facts["bytes"]) == ("start", len(torn))
    assert (tmp_path / "journal.torn-3").read_bytes() == torn
    assert verify_journal(tmp_path, KEY.public).head[0] == 4


def test_an_unfinished_line_is_told_even_if_killed_before_the_note(tmp_path, monkeypatch):
    filled(tmp_path, 2)
    with (tmp_path / JOURNAL_FILE).open("ab") as stream:
        stream.write(b'{"torn')
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_write", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            opened(tmp_path)
    assert len(lines_of(tmp_path)) == 2
    for _ in range(2):
        opened(tmp_path)
    events = [entry.facts.get("event") for entry in entries_of(tmp_path)]
    assert events == [None, None, "unfinished line set aside"]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    journal = filled(tmp_path, 2)
    before, write = (tmp_path / JOURNAL_FILE).read_bytes(), os.pwrite

    def full(descriptor, data, at):
        if at > len(before):
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:50], at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(JournalError, match="Free disk space"):
            journal.append("stop", {})
    assert (tmp_path / JOURNAL_FILE).read_bytes() == before
    assert journal.append("stop", {}).sequence == 3


def test_a_shortened_journal_is_noticed_while_it_is_in_use(tmp_path):
    journal = filled(tmp_path, 3)
    (tmp_path / JOURNAL_FILE).write_bytes(b"".join(lines_of(tmp_path)[:2]))
    with pytest.raises(JournalError, match="has become shorter"):
        journal.append("stop", {})


def test_a_damaged_journal_is_not_written_on(tmp_path):
    filled(tmp_path, 3)
    lines = lines_of(tmp_path)
    edit_fact(lines)
    (tmp_path / JOURNAL_FILE).write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match="from entry 3 on"):
        opened(tmp_path)


def test_two_processes_write_one_chain(tmp_path):
    writers = [appender(tmp_path, name, 40) for name in ("a", "b")]
    for writer in writers:
        writer.communicate(timeout=60)
    entries = list(entries_of(tmp_path))
    assert verify_journal(tmp_path, KEY.public).head[0] == 80
    for name in ("a", "b"):
        rounds = [entry.facts["round"] for entry in entries if entry.facts["writer"] == name]
        assert rounds == list(range(40))


def test_what_a_killed_writer_had_acknowledged_is_there(tmp_path):
    for attempt in range(3):
        before = len(lines_of(tmp_path)) if attempt else 0
        writer = appender(tmp_path, f"w{attempt}", 100_000)
        for _ in range(5 + attempt):
            last = int(writer.stdout.readline())
        time.sleep(0.01 * attempt)
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate(timeout=30)
        told = rest.splitlines()
        acknowledged = int(told[-1]) if told else last
        opened(tmp_path)
        kept = verify_journal(tmp_path, KEY.public).head[0]
        assert kept >= before + acknowledged + 1

"""The journal: what was written stays, and whatever is changed afterwards shows."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agssd_core import journal as journal_module
from agssd_core.errors import JournalError
from agssd_core.journal import (
    GENESIS,
    JOURNAL_FILE,
    NEXT_KEY,
    Journal,
    entries_of,
    key_in_force,
    verify_journal,
)
from agssd_core.signing import SigningKey

ROOT = Path(__file__).parent.parent
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


def _edit_fact(lines):
    lines[2] = lines[2].replace(b'"round":2', b'"round":9')


def _edit_fact_and_digest(lines):
    content = json.loads(lines[2])
    content["facts"]["round"] = 9
    entry = journal_module.Entry.from_dict(content)
    content["digest"] = entry.expected_digest()
    lines[2] = journal_module.Entry.from_dict(content).line() + b"\n"


def _edit_owner(lines):
    lines[2] = lines[2].replace(b'"owner":"north"', b'"owner":"south"')


def _other_form(lines):
    lines[2] = json.dumps(json.loads(lines[2])).encode() + b"\n"


def _twice_one_name(lines):
    lines[2] = lines[2].replace(b'"facts":{', b'"facts":{"round":9,')


def _swap(lines):
    lines[2], lines[3] = lines[3], lines[2]


def _repeat(lines):
    lines.insert(2, lines[1])


def _remove(lines):
    del lines[2]


def _remove_first(lines):
    del lines[:2]


def _spoil_signature(lines):
    content = json.loads(lines[2])
    content["signature"] = KEY.sign("order", content["digest"].encode())
    lines[2] = journal_module.Entry.from_dict(content).line() + b"\n"


def _not_text(lines):
    lines[2] = b"\xff\xfe\n"


def _blank(lines):
    lines.insert(2, b"\n")


TAMPERING = {
    "edited": (_edit_fact, "from entry 3 on: it was edited"),
    "edited with its digest": (_edit_fact_and_digest, "from entry 3 on: its signature"),
    "owner": (_edit_owner, "from entry 3 on: it was edited"),
    "other form": (_other_form, "from entry 3 on: it was edited"),
    "a name twice": (_twice_one_name, "from entry 3 on: it was edited"),
    "swapped": (_swap, "from entry 3 on: entry 4 stands there"),
    "repeated": (_repeat, "from entry 3 on: entry 2 stands there"),
    "removed": (_remove, "from entry 3 on: entry 4 stands there"),
    "beginning cut": (_remove_first, "from entry 1 on: entry 3 stands there"),
    "signature for another purpose": (_spoil_signature, "from entry 3 on: its signature"),
    "no text": (_not_text, "from entry 3 on: it is no entry"),
    "blank line": (_blank, "from entry 3 on: it is no entry"),
}


@pytest.mark.parametrize(("change", "said"), TAMPERING.values(), ids=TAMPERING)
def test_tampering_is_found_and_its_place_told(tmp_path, change, said):
    filled(tmp_path)
    lines = lines_of(tmp_path)
    change(lines)
    (tmp_path / JOURNAL_FILE).write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match=said):
        verify_journal(tmp_path, KEY.public)


def test_any_flipped_bit_is_found(tmp_path):
    filled(tmp_path, 2)
    whole = (tmp_path / JOURNAL_FILE).read_bytes()
    head = verify_journal(tmp_path, KEY.public).head
    for place in range(0, len(whole), 7):
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << (place % 8)
        (tmp_path / JOURNAL_FILE).write_bytes(spoiled)
        with pytest.raises(JournalError):
            verify_journal(tmp_path, KEY.public, head)


def test_a_cut_end_is_found_by_who_knows_the_head(tmp_path):
    head = filled(tmp_path).head()
    (tmp_path / JOURNAL_FILE).write_bytes(b"".join(lines_of(tmp_path)[:3]))
    assert verify_journal(tmp_path, KEY.public).head[0] == 3  # whole in itself
    with pytest.raises(JournalError, match="ends at entry 3, but entry 5 was seen"):
        verify_journal(tmp_path, KEY.public, head)


def test_a_history_written_anew_by_the_owner_is_found_by_who_knows_the_head(tmp_path):
    head = filled(tmp_path).head()
    (tmp_path / JOURNAL_FILE).unlink()
    other = opened(tmp_path)
    for _ in range(6):
        other.append("stop", {})
    with pytest.raises(JournalError, match="from entry 5 on: it is another than the one seen"):
        verify_journal(tmp_path, KEY.public, head)


def test_a_journal_made_with_another_key_is_refused(tmp_path):
    filled(tmp_path)
    with pytest.raises(JournalError, match="compare the key with its owner"):
        verify_journal(tmp_path, SigningKey.create().public)
    with pytest.raises(JournalError, match="is signed by another key"):
        opened(tmp_path, SigningKey.create()).append("stop", {})


def test_a_missing_journal_is_told(tmp_path):
    with pytest.raises(JournalError, match="restore it from the backup"):
        verify_journal(tmp_path, KEY.public)


def test_one_folder_holds_the_journal_of_one_owner(tmp_path):
    filled(tmp_path, 1)
    with pytest.raises(JournalError, match="that of north, not of south"):
        Journal(tmp_path, KEY, owner="south").append("stop", {})


def test_a_renewed_key_takes_over_and_the_old_one_ends(tmp_path):
    old, new = filled(tmp_path, 2), SigningKey.create()
    old.append("key", {"event": "renewed", NEXT_KEY: new.public.text()})
    assert key_in_force(tmp_path) == new.public.text()
    opened(tmp_path, new).append("start", {})
    for key in (KEY, new):
        assert verify_journal(tmp_path, key.public).head[0] == 4
    with pytest.raises(JournalError, match="Restart what runs with an older key"):
        old.append("stop", {})


def test_naming_a_key_does_not_speak_for_it(tmp_path):
    """A stranger's journal that hands over to the pinned key without its signature."""
    stranger = opened(tmp_path, SigningKey.create())
    stranger.append("key", {NEXT_KEY: KEY.public.text()})
    with pytest.raises(JournalError, match="no entry of the journal is signed by the owner's key"):
        verify_journal(tmp_path, KEY.public)


@pytest.mark.parametrize("stranger", [False, True])
def test_entries_of_another_journal_do_not_fit_in(tmp_path, stranger):
    """Genuine in themselves, with the right number, of the same owner."""
    (tmp_path / "other").mkdir()
    head = filled(tmp_path, 2).head()
    other = opened(tmp_path / "other", SigningKey.create() if stranger else KEY)
    if stranger:  # begun from the very head of the first
        other._place = journal_module.Place(*head, "", "north")
        entry = other._write(os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT), "stop", {}).line()
    else:
        entry = [other.append("stop", {}).line() for _ in range(3)][-1]
    with (tmp_path / JOURNAL_FILE).open("ab") as stream:
        stream.write(entry + b"\n")
    said = "by another key than the one in force" if stranger else "does not follow the entry"
    with pytest.raises(JournalError, match=f"from entry 3 on: it .*{said}"):
        verify_journal(tmp_path, KEY.public)


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
    _edit_fact(lines)
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

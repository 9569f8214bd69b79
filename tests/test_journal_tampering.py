"""Whatever is changed in a journal afterwards is found, and where."""

import json
import os

import pytest

from agssd_core import journal as journal_module
from agssd_core.errors import JournalError
from agssd_core.journal import (
    JOURNAL_FILE,
    NEXT_KEY,
    Journal,
    key_in_force,
    verify_journal,
)
from agssd_core.signing import SigningKey
from tests.support.journals import KEY, edit_fact, filled, lines_of, opened


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
    "edited": (edit_fact, "from entry 3 on: it was edited"),
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

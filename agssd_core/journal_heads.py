"""What each party remembers of the other's journal, so that a shortened one is noticed.

With every order and update travels the head of the sender's journal. The receiver keeps the
newest one beside its own journal, and an older one from then on is a roll-back.
"""

import json
import re
from pathlib import Path

from agssd_core.errors import JournalError
from agssd_core.journal_chain import Head
from agssd_core.weights import write_text

HEADS_FILE = "heads.json"


def told(head: Head) -> str:
    """A head as it travels."""
    return f"{head[0]}:{head[1]}"


def heard(text: str) -> Head:
    """A head that came.

    Raises:
        JournalError: it is none.
    """
    found = re.fullmatch(r"([0-9]{1,12}):([0-9a-f]{64})", text)
    if found is None:
        raise JournalError("the other side's journal has no head. Use the same version there.")
    return int(found[1]), found[2]


def remember(folder: Path, party: str, head: Head) -> None:
    """Keep the newest head of a party.

    Args:
        folder: where our own journal lies.
        party: the other's name.
        head: as it came.

    Raises:
        JournalError: it lies behind the one that is kept, or is another at the same place: the
            other's journal was rolled back or rewritten.
    """
    heads = known_heads(folder)
    before = heads.get(party)
    if before is not None and (head[0] < before[0] or (head[0] == before[0] and head != before)):
        raise JournalError(
            f"the journal of {party} was rolled back: its head is entry {head[0]}, it has told of "
            f"entry {before[0]}. Compare both journals before going on."
        )
    heads[party] = head
    text = json.dumps({name: list(each) for name, each in sorted(heads.items())}) + "\n"
    write_text(folder / HEADS_FILE, text)


def known_heads(folder: Path) -> dict[str, Head]:
    """Party -> newest head that it told of.

    Raises:
        JournalError: the file is damaged.
    """
    try:
        content = json.loads((folder / HEADS_FILE).read_text(encoding="utf-8"))
        return {str(name): (int(head[0]), str(head[1])) for name, head in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, IndexError):
        raise JournalError(
            f"{HEADS_FILE} beside the journal is damaged. Restore it from the backup."
        ) from None

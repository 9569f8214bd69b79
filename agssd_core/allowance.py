"""How much a message may bring: its header is fetched first and says it, then the arrays come.

Flower fetches a message as a tree of objects whose ids are known beforehand and whose sizes are
not. The header among them is ours and declares the arrays' sizes. So the objects down to the
header come first, under a small allowance; a declaration beyond the cap fetches no array; and the
arrays may bring what was declared, and no byte more than their framing.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from agssd_core.errors import OversizeError

HEADER_BYTES = 4 << 20
"""Most of everything above the arrays: the header with the configuration in it."""

_LEVELS = 3  # message, its records, and the header among those
_PLAIN_OBJECTS = 64
_LEAST_CHUNK = 64 << 10  # bytes; Flower's chunks are 5 MiB unless a site sets smaller ones
_FRAMING = 512  # bytes; an object's own head, and its id in its parent's

Fetch = Callable[[str], bytes]
FetchAll = Callable[[list[str], Fetch], dict[str, bytes]]


@dataclass(frozen=True)
class Form:
    """How objects are read.

    Attributes:
        head: type of an object, ids of its children, length of its body.
        fields: a ``ConfigRecord``'s, of its content.
    """

    head: Callable[[bytes], tuple[str, list[str], int]]
    fields: Callable[[bytes], Mapping[str, object]]


class Allowance:
    """Counts what is fetched, in any number of threads.

    Args:
        most: bytes of all objects together.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._spent = 0
        self._lock = threading.Lock()

    def counting(self, fetch: Fetch) -> Fetch:
        """The same fetch, which ends with the allowance.

        Raises:
            OversizeError: of the fetch, when it brings more than is left.
        """

        def counted(name: str) -> bytes:
            with self._lock:
                over = self._spent > self.most
            content = b"" if over else fetch(name)
            with self._lock:
                self._spent += len(content)
                over = over or self._spent > self.most
            if over:
                raise OversizeError(f"a message brings more than {self.most} bytes. Send less.")
            return content

        return counted


def fetch_header(
    ids: Sequence[str], fetch: Fetch, fetch_all: FetchAll, *, form: Form, most: int
) -> tuple[dict[str, bytes], Allowance]:
    """Fetch a message's objects down to its header, and hold what it declares against the cap.

    Args:
        ids: of all objects of the message, each after its children: the last is the message.
        fetch: the content of one object.
        fetch_all: fetches several by such a function, with Flower's patience.
        form: how objects are read.
        most: bytes that the arrays may have.

    Returns:
        What was fetched by id, and the allowance of all the rest.

    Raises:
        OversizeError: too many objects, too large a header, or a declaration above ``most``. No
            array was fetched then.
    """
    known = set(ids)
    if len(known) > _PLAIN_OBJECTS + most // _LEAST_CHUNK:
        raise OversizeError(f"a message has {len(known)} objects, too many for {most} bytes.")
    counted = Allowance(HEADER_BYTES).counting(fetch)
    found: dict[str, bytes] = {}
    level, declared = [ids[-1]], None
    for _ in range(_LEVELS):
        came = fetch_all(level, counted)
        found |= came
        level = []
        for content in came.values():
            kind, children, _ = _head(form, content)
            level += [child for child in children if child in known and child not in found]
            if kind == "ConfigRecord" and declared is None:
                declared = _declared(form, content)
        level = list(dict.fromkeys(level))
    if declared is not None and declared > most:
        raise OversizeError(f"a message declares {declared} bytes, the cap is {most}. Send less.")
    arrays = most if declared is None else declared
    return found, Allowance(arrays + _FRAMING * (len(known) + 1))


def _head(form: Form, content: bytes) -> tuple[str, list[str], int]:
    try:
        return form.head(content)
    except (ValueError, UnicodeDecodeError):
        return "", [], 0  # whoever inflates it says what is wrong


def _declared(form: Form, content: bytes) -> int | None:
    """Bytes that a header declares for its parts; None when it says nothing that can be read."""
    try:
        header = json.loads(str(form.fields(content)["body"]))
        sizes = header["payload_sizes"].values()
        # A negative size would buy room for another part's.
        return sum(size if size >= 0 else 1 << 62 for size in map(int, sizes))
    except Exception:  # noqa: BLE001 - a stranger's bytes; the wire says later what is wrong
        return None

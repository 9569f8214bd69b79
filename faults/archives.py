"""Rows 11 and 13: archives and payloads that unfold, climb out of their folder or run code.

Each is opened in a process of its own, whose memory is read when it ends.
"""

import json
import os
import pickle
import resource
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from agssd_core.enrolment import EnrolmentRequest
from agssd_core.envelope import SealedOrder, SealedUpdate, digests_of, sign, sizes_of
from agssd_core.errors import AgssdError, CheckpointError
from agssd_core.folders import read_small
from agssd_core.kit import MAX_KIT_BYTES, read_kit
from agssd_core.training.checkpoint import StateStamp, read_site_state
from agssd_core.weights import load_weights
from faults.suite import Fault, Try
from server.exchange import read_update
from tests.support.checkpoints import FILES, Bomb, in_child, store_in
from tests.support.fuzzing import Pair, message_of

GIGABYTES_10 = 10 * 2**30
BODY_LIMIT = 16 * 2**20
"""What the proxy lets in at once: the cap that no refusal's memory may exceed twofold."""


def _zipped(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def _kit(*members: tuple[str | zipfile.ZipInfo, bytes]) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        kit, ca = read_kit(_zipped(folder / "kit.zip", list(members)))
        del kit, ca

    return case


def _zip_bomb(folder: Path) -> None:
    """Nearly a thousand to one, as far as a kit's own size allows; made in little memory."""
    file, zeros = folder / "kit.zip", bytes(MAX_KIT_BYTES)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("ca.crt", "w") as member:
            for _ in range(900):
                member.write(zeros)
        archive.writestr("kit.json", b"{}")
    read_kit(file)


def _declares_much(folder: Path) -> None:
    """A member whose directory entry says 10 GB."""
    file = _zipped(folder / "kit.zip", [("ca.crt", b"x"), ("kit.json", b"{}")])
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 0xFFFFFFFE)
    file.write_bytes(bytes(content))
    read_kit(file)


def _link() -> zipfile.ZipInfo:
    link = zipfile.ZipInfo("kit.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    return link


def _huge_tensor() -> bytes:
    """A safetensors part whose header declares 10 GB."""
    shape = [GIGABYTES_10 // 4]
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, GIGABYTES_10]}
    header = json.dumps({"student/head.w": tensor}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 64


def _huge_update(folder: Path) -> None:
    """Properly signed by an enrolled site."""
    pair = Pair(folder / "north", "float32")
    honest = pair.site.answer(pair.order)
    payload = {**honest.payload, "student": _huge_tensor()}
    header = replace(
        honest.header, payload_digests=digests_of(payload), payload_sizes=sizes_of(payload)
    )
    sealed = SealedUpdate(header, payload, sign(header, pair.site.identity.signing_key))
    _refused(pair, sealed)


def _declared_update(folder: Path) -> None:
    """Its signed header declares 10 GB."""
    pair = Pair(folder / "north", "float32")
    honest = pair.site.answer(pair.order)
    sizes = {**honest.header.payload_sizes, "student": GIGABYTES_10}
    header = replace(honest.header, payload_sizes=sizes)
    sealed = SealedUpdate(header, honest.payload, sign(header, pair.site.identity.signing_key))
    _refused(pair, sealed)


def _refused(pair: Pair, sealed: SealedUpdate) -> None:
    texts = {"kind": "update", "body": sealed.header.to_json(), "signature": sealed.signature}
    found, reason = read_update(message_of(texts, sealed.payload), pair.rules, asked="north")
    if found is None and reason in ("size", "malformed", "digest", "schema"):
        raise CheckpointError(reason)


def _huge_order(folder: Path) -> None:
    """Properly signed by the coordinator."""
    pair = Pair(folder / "north", "float32")
    payload = {**pair.order.payload, "student": _huge_tensor()}
    order = replace(
        pair.order.order, payload_digests=digests_of(payload), payload_sizes=sizes_of(payload)
    )
    pair.site.answer(SealedOrder(order, payload, sign(order, pair.server_key)))


def _large_request(folder: Path) -> None:
    """An enrolment request of 64 MB."""
    file = folder / "request.json"
    with file.open("wb") as stream:
        stream.truncate(64 << 20)
    EnrolmentRequest.from_json(read_small(file, limit=MAX_KIT_BYTES, what="the request").decode())


CASES: dict[str, Callable[[Path], None]] = {
    "zip bomb as a kit": _zip_bomb,
    "kit with a member that declares 4 GB": _declares_much,
    "kit with a .. path": _kit(("../ca.crt", b"x"), ("kit.json", b"{}")),
    "kit with a symlink": _kit(("ca.crt", b"x"), (_link(), b"/etc/passwd")),
    "update with a tensor that declares 10 GB": _huge_update,
    "update whose signed header declares 10 GB": _declared_update,
    "order with a tensor that declares 10 GB": _huge_order,
    "enrolment request of 64 MB": _large_request,
}


def unfolding(folder: Path, tries: int) -> Iterator[Try]:
    """Refused by an error of ours; memory grows by less than twice the proxy's body limit."""
    for number in range(tries):
        name = list(CASES)[number % len(CASES)]
        place = folder / str(number)
        place.mkdir()
        read, write = os.pipe()

        def open_it(name: str = name, place: Path = place, write: int = write) -> int:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                CASES[name](place)
                code = 8
            except AgssdError:
                code = 7
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(write, str(grown / 1024).encode())
            return code

        code = in_child(open_it)
        os.close(write)
        with os.fdopen(read) as stream:
            grown = float(stream.read() or "nan")
        outside = [path.name for path in folder.iterdir() if not path.name.isdecimal()]
        good = code == 7 and grown < 2 * BODY_LIMIT / 2**20 and not outside
        yield Try(good, f"{name}: code {code}, {grown:.0f} MB, outside {outside}", {"MB": grown})


def _reader(name: str, place: Path) -> tuple[Path, Callable[[], object]]:
    """A file below a folder and what of ours reads it."""
    if name == "state":
        return place / "manifest.json", lambda: read_site_state(place, StateStamp("run-1", 0, "p"))
    if name == "weights":
        return place / "x.safetensors", lambda: load_weights(place / "x.safetensors")
    store = store_in(place)
    return store.checkpoints / "round-0001" / name, lambda: store.load(1)


def pickles(folder: Path, tries: int) -> Iterator[Try]:
    """In each file of a checkpoint, in a site's state and in a file of weights."""
    for number in range(tries):
        place = folder / str(number)
        place.mkdir()
        name = (*FILES, "state", "weights")[number % (len(FILES) + 2)]
        file, read = _reader(name, place)
        file.write_bytes(pickle.dumps(Bomb()))

        def loads(read: Callable[[], object] = read) -> int:
            try:
                read()
            except AgssdError:
                return 7
            return 8

        code = in_child(loads)
        yield Try(code == 7, f"{name}: code {code}")


FAULTS = [
    Fault(11, "archives and payloads that unfold or climb out", unfolding, 8, short=8),
    Fault(13, "pickle in a checkpoint's files, a state, weights", pickles, 5, short=5),
]

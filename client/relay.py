"""A message handed to the site's trainer process, and its answer, over a Unix socket.

Flower starts a process for every message; the trainer stays up and owns the GPUs. Frames are
plain: a JSON header, then the arrays' bytes as they came. Nothing is unpickled.
"""

import json
import os
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from agssd_core.errors import AgssdError, EngineError

_LENGTH = struct.Struct(">Q")
_MAX_HEADER = 64 << 20
_MAX_PART = 16 << 30
_SITE_FAULT = 2
_WAIT_S = 5.0


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round, at the trainer."""
    return _relayed(message, context)


@app.train("final")
def final(message: Message, context: Context) -> Message:
    """A final checkpoint, to the trainer."""
    return _relayed(message, context)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who the site is, by the trainer."""
    return _relayed(message, context)


def send_frame(stream: socket.socket, header: dict[str, Any], parts: Iterable[bytes] = ()) -> None:
    """Write one frame: header, then each part."""
    parts = list(parts)
    text = json.dumps(header | {"parts": [len(part) for part in parts]}).encode("utf-8")
    stream.sendall(_LENGTH.pack(len(text)) + text)
    for part in parts:
        stream.sendall(part)


def receive_frame(stream: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """Read one frame.

    Raises:
        EngineError: the other side ended before the frame did, or wrote no frame.
    """
    (size,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if size > _MAX_HEADER:
        raise EngineError("the trainer's socket carries something else. Restart the site.")
    try:
        header = json.loads(_exactly(stream, size))
        sizes = [int(part) for part in header["parts"]]
    except (ValueError, KeyError, TypeError):
        raise EngineError(
            "the trainer's socket carries something else. Restart the site."
        ) from None
    if any(not 0 <= part <= _MAX_PART for part in sizes):
        raise EngineError("a message is too large for the trainer's socket.")
    return header, [_exactly(stream, part) for part in sizes]


def describe(content: RecordDict) -> tuple[list[dict[str, Any]], list[bytes]]:
    """A message's records as plain data, and the bytes of its arrays in order."""
    records: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, record in content.items():
        if isinstance(record, ConfigRecord):
            records.append({"name": name, "config": dict(record)})
        elif isinstance(record, ArrayRecord):
            arrays = [
                {"key": key, "dtype": one.dtype, "shape": list(one.shape), "stype": one.stype}
                for key, one in record.items()
            ]
            records.append({"name": name, "arrays": arrays})
            parts += [one.data for one in record.values()]
    return records, parts


def compose(records: list[dict[str, Any]], parts: list[bytes]) -> RecordDict:
    """The records that ``describe`` took apart."""
    left = iter(parts)
    content = RecordDict()
    for record in records:
        if "config" in record:
            content[record["name"]] = ConfigRecord(record["config"])
        else:
            content[record["name"]] = ArrayRecord(
                {
                    one["key"]: Array(one["dtype"], tuple(one["shape"]), one["stype"], next(left))
                    for one in record["arrays"]
                }
            )
    return content


def ask_trainer(message: Message, path: Path) -> Message:
    """Let the trainer answer a message.

    Args:
        message: as Flower delivered it.
        path: of the trainer's socket.

    Raises:
        EngineError: no trainer listens there, or it ended while it worked.
    """
    records, parts = describe(message.content) if message.has_content() else ([], [])
    with socket.socket(socket.AF_UNIX) as stream:
        _connect(stream, path)
        send_frame(stream, {"type": message.metadata.message_type, "records": records}, parts)
        header, answer = receive_frame(stream)
    if "fault" in header:
        return Message(Error(code=_SITE_FAULT, reason=str(header["fault"])), reply_to=message)
    return Message(compose(header["records"], answer), reply_to=message)


def answer_one(stream: socket.socket, act: Callable[[str, RecordDict], RecordDict | str]) -> None:
    """Serve one message on the trainer's side.

    Args:
        stream: the connection.
        act: gets the type of the message and its records; answers with records, or with the
            text of a fault that may leave the site.
    """
    header, parts = receive_frame(stream)
    answer = act(str(header["type"]), compose(header["records"], parts))
    if isinstance(answer, str):
        send_frame(stream, {"fault": answer})
    else:
        records, bytes_of = describe(answer)
        send_frame(stream, {"records": records}, bytes_of)


def listen_on(path: Path) -> socket.socket:
    """A socket that only this user can reach; one that a killed trainer left is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(8)
    return listener


def _relayed(message: Message, context: Context) -> Message:
    try:
        return ask_trainer(message, Path(str(context.node_config["trainer"])))
    except AgssdError as error:
        reason = f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - its text may name a patient
        reason = type(error).__name__
    return Message(Error(code=_SITE_FAULT, reason=reason), reply_to=message)


def _connect(stream: socket.socket, path: Path) -> None:
    stream.settimeout(_WAIT_S)
    try:
        stream.connect(str(path))
    except OSError as error:
        raise EngineError(
            f"the site's trainer does not answer ({type(error).__name__}). `agssd-site run` starts "
            "it again; the order can be repeated."
        ) from None
    stream.settimeout(None)  # a round takes as long as it takes


def _exactly(stream: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    view = memoryview(buffer)
    done = 0
    while done < size:
        count = stream.recv_into(view[done:], min(size - done, 1 << 20))
        if count == 0:
            raise EngineError("the site's trainer ended while it worked. Repeat the order.")
        done += count
    return bytes(buffer)

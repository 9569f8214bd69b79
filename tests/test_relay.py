"""A message crosses to the trainer and back whole, over a socket that only its owner can reach."""

import socket
import stat
import struct
import threading

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from agssd_core.errors import EngineError
from client.launcher import local_message
from client.relay import answer_one, ask_trainer, listen_on, receive_frame


def content():
    data = np.arange(6, dtype=np.float32).tobytes()
    arrays = ArrayRecord({"student": Array("uint8", (len(data),), "safetensors", data)})
    return RecordDict({"header": ConfigRecord({"kind": "order", "body": "{}"}), "arrays": arrays})


def served(path, act):
    listener = listen_on(path)

    def once():
        with listener, listener.accept()[0] as stream:
            answer_one(stream, act)

    thread = threading.Thread(target=once)
    thread.start()
    return thread


def test_records_and_arrays_arrive_as_they_were_sent(tmp_path):
    seen = []

    def act(kind, records):
        seen.append((kind, records))
        return content()

    thread = served(tmp_path / "s", act)
    reply = ask_trainer(local_message("train", content()), tmp_path / "s")
    thread.join()
    kind, records = seen[0]
    assert kind == "train"
    assert records["header"]["body"] == "{}"
    assert records["arrays"]["student"].data == content()["arrays"]["student"].data
    assert reply.content["arrays"]["student"].stype == "safetensors"


def test_a_fault_comes_back_as_the_sites_own(tmp_path):
    thread = served(tmp_path / "s", lambda *_: "TrainingError: the loss is not finite.")
    reply = ask_trainer(local_message("train", content()), tmp_path / "s")
    thread.join()
    assert reply.error.reason == "TrainingError: the loss is not finite."


def test_only_the_owner_reaches_the_socket_and_a_stale_one_is_replaced(tmp_path):
    listen_on(tmp_path / "s").close()
    with listen_on(tmp_path / "s"):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_no_trainer_is_said_and_no_path_with_it(tmp_path):
    with pytest.raises(EngineError, match="trainer does not answer") as error:
        ask_trainer(local_message("train", content()), tmp_path / "none")
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("bytes_sent", [b"", b"\0" * 4, struct.pack(">Q", 1 << 40), b"GET / HTTP"])
def test_a_stream_of_anything_else_is_refused(bytes_sent):
    one, other = socket.socketpair()
    with one, other:
        one.sendall(bytes_sent)
        one.shutdown(socket.SHUT_WR)
        with pytest.raises(EngineError):
            receive_frame(other)

"""The site's trainer: one process that stays up, holds model and GPUs, and answers messages.

It outlives the SuperNode and every process that Flower starts for a message. When the site's
software is stopped it ends with it.
"""

import argparse
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, RecordDict

from agssd_core.errors import AgssdError
from agssd_core.processes import die_with_parent
from client.app import app
from client.launcher import local_message
from client.relay import answer_one, listen_on

log = logging.getLogger(__name__)

_NODE = 1  # of messages that never leave this process


def serve(node_config: Mapping[str, str], path: Path) -> None:
    """Answer messages until the process is ended.

    Args:
        node_config: the site's folder, its enrolled name and where its keys are.
        path: of the Unix socket.
    """
    desk = _Desk(node_config)
    with listen_on(path) as listener:
        log.info("trainer ready")
        while True:
            stream, _ = listener.accept()
            # One thread each: a `hello` is answered while a round trains.
            threading.Thread(target=desk.serve, args=(stream,), daemon=True).start()


class _Desk:
    """Turns records into a Flower message, lets the app act, and takes the reply apart."""

    def __init__(self, node_config: Mapping[str, str]) -> None:
        self.node_config = dict(node_config)
        self.training = threading.Lock()

    def serve(self, stream: socket.socket) -> None:
        """Answer one connection; a client that went away costs nothing but a log line."""
        with stream:
            try:
                answer_one(stream, self.act)
            except (AgssdError, OSError) as error:
                log.warning("a message was not answered (%s)", type(error).__name__)

    def act(self, kind: str, content: RecordDict) -> RecordDict | str:
        """Answer as the app would in a process of its own."""
        message = local_message(kind, content)
        context = Context(
            run_id=1,
            node_id=_NODE,
            node_config=dict(self.node_config),
            state=RecordDict(),
            run_config={},
        )
        if kind.partition(".")[0] == "train":  # a final checkpoint waits for its turn as well
            with self.training:
                reply = app(message, context)
        else:
            reply = app(message, context)
        if reply.has_error():
            return str(reply.error.reason)
        return reply.content


def main() -> None:
    """``python -m client.trainer SETTINGS SOCKET``; SETTINGS is a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    for argument in ("settings", "socket"):
        parser.add_argument(argument)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    die_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = json.loads(Path(given.settings).read_text(encoding="utf-8"))
    serve(settings, Path(given.socket))


if __name__ == "__main__":
    main()

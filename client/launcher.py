"""Flower's SuperNode and its executor, with what a hospital needs added.

The private names of Flower that this file relies on are listed and checked in
``client/flower_names.py``; the start is refused when one is missing. What is added:

- Bundle and size of a message are checked before anything of it is opened (client/pulling.py).
  Nothing of a bundle is unpacked or imported, ever: a task runs the app that is installed at the
  site.
- An exception's text never leaves; Flower's own error replies say the class of the exception.
- A node signs off first when it starts, for the process before may not have: the order that died
  with it is sent again now and not after the round's deadline.
- Tasks are forked from a process that has everything imported, and polls are short.
"""

import argparse
import contextlib
import hashlib
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Error, Message, RecordDict

from agssd_core.application import application_toml
from agssd_core.weights import write_text
from client.flower_names import require_hooks
from client.pulling import Door, guarded

log = logging.getLogger(__name__)

POLL_S = 0.3
NOTICED_S = 2.0
"""How long a node that was killed stays signed off: coordinators look once a second."""


def application_digest() -> str:
    """SHA-256 of the bundle that a coordinator of this version submits."""
    from flwr.cli.build import build_fab_from_disk

    with tempfile.TemporaryDirectory(prefix="agssd-app-") as name:
        write_text(Path(name) / "pyproject.toml", application_toml())
        return hashlib.sha256(build_fab_from_disk(Path(name))).hexdigest()


def run_node(arguments: list[str], *, door: Door, memory: Path) -> None:
    """Become a SuperNode.

    Args:
        arguments: of ``flower-supernode``.
        door: what the node lets in.
        memory: file that remembers the node's id, for the next start.

    Raises:
        EngineError: another Flower is installed than this version needs.
    """
    require_hooks()
    engine = _module("flwr.supernode.start_client_internal")
    engine._pull_and_store_message = guarded(engine._pull_and_store_message, engine, door)
    engine._init_connection = _signing_off_first(engine._init_connection, memory)
    engine.time = _impatient()
    _without_exception_texts()
    sys.argv = ["flower-supernode", *arguments]
    _module("flwr.supernode.cli.flower_supernode").flower_supernode()
    # It returns when it gave the connection up, and a thread of its own would keep the process,
    # off line, for ever; ended, it is started again.
    log.error("the node gave its connection up")
    logging.shutdown()
    os._exit(1)


def run_executor(arguments: list[str]) -> None:
    """Become the SuperExec that forks a ready process for every message."""
    require_hooks()
    executor = _ForkingExecutor()
    engine = _module("flwr.supercore.superexec.run_superexec")
    engine.get_executor = lambda *_args, **_kinds: executor
    sys.argv = ["flower-superexec", *arguments]
    _module("flwr.supercore.cli.flower_superexec").flower_superexec()


def run_task(address: str, token: str, parent: int) -> None:
    """Hand one message to the site's trainer, whatever the bundle names."""
    from client.relay import app

    runtime = _module("flwr.supernode.runtime.run_clientapp")
    runtime.install_from_fab = lambda *_args, **_kinds: None
    runtime.get_project_dir = lambda *_args, **_kinds: Path()
    runtime.get_load_client_app_fn = lambda **_kinds: lambda *_args: app
    runtime.Error = _plain_error
    pushed = runtime.push_task_output
    runtime.push_task_output = lambda **given: pushed(**(given | {"details": ""}))
    _without_exception_texts()
    runtime.run_clientapp(address, token, insecure=True, parent_pid=parent)


def local_message(kind: str, content: RecordDict) -> Message:
    """A message that stays in this process, for an app that acts without Flower's engine."""
    identity = _module("flwr.supercore.task_identity").TaskIdentity
    identity.task_id = identity.run_id = identity.node_id = 1
    message = Message(content, 1, kind)
    message.metadata.__dict__["_message_id"] = "local"
    return message


def _module(name: str) -> Any:
    """A module of Flower whose names we use or replace."""
    return import_module(name)


def _signing_off_first(connect: Callable[..., Any], memory: Path) -> Callable[..., Any]:
    """The engine's connection; what the process before was signed on as is signed off first.

    That process may have been killed, or may have ended while the coordinator was away.
    """

    @contextlib.contextmanager
    def connected(*given: Any, **named: Any) -> Iterator[Any]:
        _sign_off(memory, *given, **named)
        with connect(*given, **named) as connection:
            write_text(memory, str(connection[0]), private=True)
            yield connection

    return connected


def _sign_off(
    memory: Path,
    server_address: str,
    insecure: bool,
    root_certificates: bytes | str | None = None,
    authentication_keys: tuple[Any, Any] | None = None,
    **_others: Any,
) -> None:
    if not memory.is_file() or authentication_keys is None:
        return
    with contextlib.suppress(Exception):  # a courtesy: without it the heartbeat lapses later
        node = int(memory.read_text(encoding="utf-8"))
        version = _module("flwr.supercore.interceptors.http.runtime_version")
        signed = _module("flwr.supernode.node_auth_http_interceptor")
        interceptors = [
            version.RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            signed.NodeAuthHttpInterceptor(*authentication_keys),
        ]
        fleet = _module("flwr.supernode.fleet_http_client").FleetHttpClient
        request = _module("flwr.proto.fleet_pb2").DeactivateNodeRequest(node_id=node)
        with fleet.from_server_address(
            server_address, insecure, root_certificates, interceptors=interceptors
        ) as client:
            client.DeactivateNode(request)
        # The order that died with it is sent again once the coordinator has seen it absent.
        time.sleep(NOTICED_S)


def _impatient() -> Any:
    """Flower's ``time`` with short sleeps between polls."""
    names = {name: getattr(time, name) for name in dir(time) if not name.startswith("_")}
    return SimpleNamespace(**(names | {"sleep": lambda seconds: time.sleep(min(seconds, POLL_S))}))


def _plain_error(code: int, reason: str | None = None) -> Error:
    """An error reply whose text is the class of the exception and nothing of its words."""
    del reason
    found = sys.exc_info()[0]
    return Error(code=code, reason=found.__name__ if found is not None else "error")


def _without_exception_texts() -> None:
    """Keep words of foreign exceptions, which may hold a header value, out of Flower's log."""

    def plain(record: logging.LogRecord) -> bool:
        if record.exc_info:
            kind = record.exc_info[0]
            record.msg, record.args = f"{record.msg} ({kind.__name__ if kind else 'error'})", ()
            record.exc_info = record.exc_text = None
        return True

    logging.getLogger("flwr").addFilter(plain)


class _ForkingExecutor:
    """Starts a task by forking from a server process that has flwr and the app imported."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["client.preloaded"])
        self._running: list[Any] = []

    def get_eligible_capacity(self, supported_task_types: set[Any], **_: Any) -> Any:
        """Always ready."""
        return supported_task_types, set()

    def wait_for_capacity(self, *_args: Any, **_kinds: Any) -> None:
        """Always ready."""

    def launch(self, spec: Any) -> Any:
        """Fork a process for one task."""
        from flwr.supercore.superexec.executor.types import LaunchResult

        given = (spec.runtime_api_address, spec.token, spec.parent_pid)
        process = self._context.Process(target=run_task, args=given)
        process.start()
        self._running.append(process)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Collect processes that have ended."""
        self._running = [process for process in self._running if process.is_alive()]

    def close(self) -> None:
        """End what still runs."""
        for process in self._running:
            process.terminate()


def main() -> None:
    """``python -m client.launcher node|executor [OPTIONS] -- ARGUMENTS OF FLOWER``."""
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("node", "executor"))
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("--memory", type=Path)
    parser.add_argument("--site", type=Path)
    parser.add_argument("--key-id", type=int, default=0)
    given = parser.parse_args(sys.argv[1:split])
    arguments = sys.argv[split + 1 :]
    if given.role == "executor":
        run_executor(arguments)
    else:
        door = Door(frozenset(given.allow), given.site, given.key_id)
        run_node(arguments, door=door, memory=given.memory)


if __name__ == "__main__":
    main()

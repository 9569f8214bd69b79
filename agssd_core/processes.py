"""Child processes that are started, watched and ended by their ids, and never outlive us."""

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from agssd_core.errors import EngineError

LOOPBACK = "127.0.0.1"
STOP_PATIENCE_S = 15.0
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def engine_environment(home: Path, *, threads: int) -> dict[str, str]:
    """Our environment with a private home for the engine, no look-ups and a fixed thread count.

    Without the third variable the engine runs ``uv sync`` for every run (docs/federation.md).
    """
    own_bin = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([own_bin, os.environ.get("PATH", "")]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_HOME": str(home),
        **_direct_on_loopback(),
        **dict.fromkeys(_THREAD_VARIABLES, str(threads)),
    }


def _direct_on_loopback() -> dict[str, str]:
    """A hospital's outbound proxy is for the coordinator, never for our own processes."""
    found = {}
    for name in ("NO_PROXY", "no_proxy"):
        listed = [part for part in os.environ.get(name, "").split(",") if part.strip()]
        found[name] = ",".join(dict.fromkeys([*listed, LOOPBACK, "localhost"]))
    return found


def python_module(name: str) -> list[str]:
    """The command that runs one of our modules with this interpreter."""
    return [sys.executable, "-m", name]


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def require_free_port(port: int) -> None:
    """Check that a server can listen on a port of the loopback interface.

    Raises:
        EngineError: somebody else does, or we may not.
    """
    with socket.socket() as listener:
        # As servers do it: a connection that closed a moment ago is no obstacle.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError as error:
            raise EngineError(
                f"port {port} of this machine cannot be listened on ({error.strerror}). Name "
                "another with --port, or 0 for a free one."
            ) from None


class Child:
    """A process and everything that it starts.

    Args:
        command: program and arguments.
        environment: all of its variables.
        log_file: where its output goes.
    """

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], log_file: Path
    ) -> None:
        self.name = Path(command[0]).name
        self._family: set[psutil.Process] = set()
        log_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log_file.open("ab") as log:
                self.process = subprocess.Popen(  # noqa: S603 - our own programs
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
        except OSError:
            raise EngineError(
                f"{self.name} could not be started. Install the package with its dependencies."
            ) from None

    def poll(self) -> int | None:
        """Exit code, None while it runs; also notes who belongs to it."""
        with contextlib.suppress(psutil.Error):
            self._family.update(psutil.Process(self.process.pid).children(recursive=True))
        return self.process.poll()

    def stop(self, *, patience_s: float = STOP_PATIENCE_S) -> None:
        """End it with all its descendants, first politely."""
        self.poll()
        self._signal_family(signal.SIGTERM)
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        _, alive = psutil.wait_procs(self._family, timeout=patience_s)
        self._family = set(alive)
        self._signal_family(signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _signal_family(self, number: int) -> None:
        for member in self._family:
            # psutil compares start times, so a reused process id is never signalled.
            with contextlib.suppress(psutil.Error):
                member.send_signal(number)


def is_healthy(port: int, ca: Path | None = None) -> bool:
    """Whether a server on loopback answers for its ``/health`` page.

    Args:
        port: where it listens.
        ca: certificate of its authority, PEM; None asks without TLS.
    """
    page = f"{'https' if ca else 'http'}://{LOOPBACK}:{port}/health"
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if ca is not None:
        context = ssl.create_default_context(cafile=str(ca))
        handlers.append(urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(page, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def wait_until_healthy(
    port: int, child: Child, *, timeout_s: float, ca: Path | None = None
) -> None:
    """Wait for the ``/health`` page of a server on loopback.

    Raises:
        EngineError: the child ended, or gave no answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise EngineError(
                f"{child.name} ended with code {child.process.returncode} before it could serve. "
                "Its log is in the run's folder."
            )
        if is_healthy(port, ca):
            return
        time.sleep(0.2)
    raise EngineError(
        f"{child.name} did not answer within {timeout_s:g} s. Try again when the machine is less "
        "busy; its log is in the run's folder."
    )


@contextlib.contextmanager
def stopping_on_terminate() -> Any:
    """Turn SIGTERM into ``KeyboardInterrupt``, so that children are ended on the way out."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is gone, even by kill -9."""
    if _PRCTL is not None:
        _PRCTL(_DEATH_SIGNAL, signal.SIGTERM)

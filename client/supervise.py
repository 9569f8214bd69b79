"""An enrolled site on line: trainer, executor and node, kept running until they are stopped."""

import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from agssd_core.data.catalogue import open_catalogue
from agssd_core.errors import KeyFileError
from agssd_core.folders import folder_lock
from agssd_core.processes import (
    LOOPBACK,
    Child,
    engine_environment,
    free_port,
    python_module,
    stopping_on_terminate,
)
from agssd_core.weights import write_bytes, write_text
from client.connection import (
    Connection,
    ca_file,
    load_connection,
    node_key_file,
    signing_key_file,
)
from client.flower_names import require_hooks
from client.identity import SERVER_KEY, SIGNING_KEY
from client.launcher import application_digest

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 300.0
LASTING_S = 120.0
NODE = "node"

Say = Callable[[str], None]


def run_enrolled(site: Path, *, threads: int = 1, allowed: Sequence[str] = (), say: Say) -> None:
    """Connect an enrolled site to its coordinator and answer orders until interrupted.

    The trainer stays up while the node is started again; a node that ends without having been let
    in is started again after longer and longer pauses, since a revoked key or a wrong clock does
    not mend itself in seconds. A renewed key is taken into use at the next pause between two
    messages: the node ends then, and all parts start again with the new key.

    Args:
        site: folder made by ``agssd-site index`` and ``prepare``, enrolled.
        threads: CPU threads of the numerical libraries; training takes them from the order.
        allowed: digests of applications that the site answers; empty is the installed version's.
        say: where a line for the operator goes.

    Raises:
        CatalogueError: the folder is not a site.
        KeyFileError: the site is not enrolled, its keys are damaged, or it runs already.
        EngineError: another Flower is installed than this version needs.
    """
    catalogue = open_catalogue(site)
    connection = load_connection(site)
    require_hooks()
    counts = [f"{len(catalogue.patients_of(each))} {each}" for each in catalogue.cohorts]
    home = Path(tempfile.mkdtemp(prefix="agssd-site-"))
    try:
        with _alone(site), stopping_on_terminate(), ExitStack() as stack:
            say(
                f"site {connection.site} (patients: {', '.join(counts) or 'none'}) answers "
                f"{connection.server}; interrupt to stop"
            )
            allowed = allowed or (application_digest(),)
            parts = _parts(site.resolve(), connection, home, threads, allowed)
            for part in parts:
                stack.callback(part.stop)
            while True:
                renewed = _renewed(site, connection)
                if renewed is not None and not next(p for p in parts if p.name == NODE).runs():
                    connection = renewed
                    say(
                        f"key {connection.key_id} is in use from now on; it ends on "
                        f"{connection.expires[:10]}"
                    )
                    commands = _parts(site.resolve(), connection, home, threads, allowed)
                    for part, other in zip(parts, commands, strict=True):
                        part.become(other)
                for part in parts:
                    part.tend(say)
                time.sleep(0.5)
    except KeyboardInterrupt:
        say("stopped; the site's state is on its disk")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _alone(site: Path) -> AbstractContextManager[None]:
    """A site runs once: a second node of its key would sign the first one off, and so on."""
    folder = site / "federation"
    folder.mkdir(exist_ok=True)
    return folder_lock(
        folder,
        name="run.lock",
        what="the folder federation of the site",
        busy="this site runs already, perhaps as a service. Stop that first (`systemctl status`).",
    )


@dataclass
class Part:
    """A process of the site that is started again whenever it ends.

    Attributes:
        sign: a file that the process writes once it works; None where nothing tells that.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    log_file: Path
    sign: Path | None = None
    child: Child | None = None
    started: float = 0.0
    worked: bool = False
    pause_s: float = FIRST_PAUSE_S
    not_before: float = 0.0
    _born: float = 0.0

    def tend(self, say: Say) -> None:
        """Start the process if it does not run and its pause is over."""
        now = time.monotonic()
        if self.child is None:
            if now >= self.not_before:
                self.child = Child(
                    self.command, environment=self.environment, log_file=self.log_file
                )
                self.started, self.worked = now, False
                self._born = time.time()
            return
        self.worked = self.worked or self._gives_sign()
        code = self.child.poll()
        if code is None:
            return
        self.stop()
        lasted = now - self.started
        if self.worked or lasted > LASTING_S:
            self.pause_s = FIRST_PAUSE_S
        self.not_before = now + self.pause_s
        say(
            f"the {self.name} ended with code {code} after {lasted:.0f} s and starts again in "
            f"{self.pause_s:.0f} s; `agssd-site preflight` says whether the connection is the cause"
        )
        self.pause_s = min(self.pause_s * 2, LONGEST_PAUSE_S)

    def _gives_sign(self) -> bool:
        try:
            return self.sign is not None and self.sign.stat().st_mtime >= self._born
        except OSError:
            return False

    def runs(self) -> bool:
        """Whether the process is there and has not ended."""
        return self.child is not None and self.child.poll() is None

    def become(self, other: "Part") -> None:
        """End the process; the next one is that of another command, and starts at once."""
        self.stop()
        self.command, self.environment = other.command, other.environment
        self.pause_s, self.not_before = FIRST_PAUSE_S, 0.0

    def stop(self) -> None:
        """End it with all its children."""
        if self.child is not None:
            self.child.stop()
            self.child = None


def _renewed(site: Path, connection: Connection) -> Connection | None:
    """What `agssd-site enrol --answer` has put in the connection's place, if it has."""
    try:
        found = load_connection(site)
    except KeyFileError:
        return None  # what runs goes on; the next start says what is wrong
    return None if found == connection else found


def _parts(
    site: Path, connection: Connection, home: Path, threads: int, allowed: Sequence[str]
) -> list[Part]:
    secret, socket = home / "executor.secret", home / "trainer.sock"
    write_bytes(secret, secrets.token_bytes(32), private=True)
    settings = home / "node.toml"
    shown = {"trainer": str(socket)}
    write_text(settings, tomli_w.dumps(shown), private=True)
    environment = engine_environment(home, threads=threads)
    environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "0.2"
    logs = site / "federation"
    port = free_port()
    memory = logs / "node.id"
    node = [*python_module("client.launcher"), "node", "--memory", str(memory)]
    node += ["--site", str(site), "--key-id", str(connection.key_id)]
    for digest in allowed:
        node += ["--allow", digest]
    node += ["--", "--root-certificates", str(ca_file(site)), "--superlink", connection.server]
    node += ["--auth-supernode-private-key", str(node_key_file(site, connection.key_id))]
    node += ["--host", LOOPBACK, "--port", str(port), "--node-config", str(settings)]
    node += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    executor = [*python_module("client.launcher"), "executor", "--", "--insecure"]
    executor += ["--runtime-api-address", f"{LOOPBACK}:{port}"]
    executor += ["--superexec-auth-secret-file", str(secret)]
    own = home / "trainer.json"
    keys = {SERVER_KEY: connection.server_key}
    keys[SIGNING_KEY] = str(signing_key_file(site, connection.key_id))
    write_text(own, json.dumps({"site": str(site), "name": connection.site} | keys), private=True)
    trainer = [*python_module("client.trainer"), str(own), str(socket)]
    return [
        Part("trainer", trainer, environment, logs / "trainer.log"),
        Part(NODE, node, environment, logs / "node.log", sign=memory),
        Part("executor", executor, environment, logs / "executor.log"),
    ]

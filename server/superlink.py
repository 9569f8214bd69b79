"""A SuperLink on loopback and one run on it: started, followed and ended by us.

Without certificates it serves sites of this machine. With a federation's it speaks TLS and lets
registered nodes in only; it listens on loopback all the same, behind the proxy (server/proxy.py),
because one port also carries the calls that start runs and register nodes, which nothing guards.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w

from agssd_core.application import SITE_COMPONENT, application_toml
from agssd_core.config import Cohort, RunConfig, dump_config
from agssd_core.errors import EngineError, KeyFileError
from agssd_core.processes import (
    LOOPBACK,
    Child,
    engine_environment,
    free_port,
    require_free_port,
    wait_until_healthy,
)
from agssd_core.weights import write_text
from server.cohorts import cohort_stores
from server.control import state_of
from server.manifest import require_same_config
from server.outcome import RoundOutcome, outcomes_of
from server.pulling import require_hooks
from server.store import RunStore

START_TIMEOUT_S = 120.0
CONNECTION = "loopback"
STATE_FILE = "superlink.db"


@dataclass(frozen=True)
class Certificates:
    """The server's side of a federation's TLS; FEDERATION holds ca.crt, server.pem, server.key."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def of(cls, federation: Path) -> "Certificates":
        """Those of a federation's folder.

        Raises:
            KeyFileError: one is missing, or others can read the key.
        """
        names = ("ca.crt", "server.pem", "server.key")
        if missing := [name for name in names if not (federation / name).is_file()]:
            raise KeyFileError(
                f"the federation's folder lacks {', '.join(missing)}. Make it with "
                "`agssd-server provision`, or name another."
            )
        found = cls(*(federation.resolve() / name for name in names))
        if found.key.stat().st_mode & 0o077:
            raise KeyFileError("server.key can be read by others. Set its mode to 600.")
        return found


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink that listens on 127.0.0.1.

    Attributes:
        home: the engine's private folder; removed when the SuperLink ends.
        log_folder: also holds the state, where nodes are registered.
    """

    port: int
    home: Path
    environment: Mapping[str, str]
    child: Child
    log_folder: Path


@contextmanager
def superlink(
    config: RunConfig,
    log_folder: Path,
    *,
    simulation: bool = False,
    port: int = 0,
    variables: Mapping[str, str] | None = None,
    certificates: Certificates | None = None,
) -> Iterator[SuperLink]:
    """Start a SuperLink on loopback, and end it with all its children.

    Args:
        config: gives the thread count of every process.
        log_folder: where the processes' output goes, and the state of one with certificates: its
            nodes stay registered when it is started again.
        simulation: virtual nodes on Ray instead of real SuperNodes.
        port: 0 takes a free one.
        variables: further environment of every process of the engine.
        certificates: TLS, and registered nodes only; None is neither.

    Raises:
        EngineError: the port is taken, it did not start, or another Flower is installed.
    """
    require_hooks()
    port = port or free_port()
    require_free_port(port)
    home = Path(tempfile.mkdtemp(prefix="agssd-engine-"))
    environment = engine_environment(home, threads=config.threads) | dict(variables or {})
    command = ["flower-superlink", "--host", LOOPBACK, "--port", str(port)]
    command += ["--isolation", "subprocess", "--disable-runtime-dependency-installation"]
    command += _identity(certificates, log_folder)
    ca = certificates.ca if certificates else None
    trust = {"root-certificates": str(ca)} if ca else {"insecure": True}
    connection = {"address": f"{LOOPBACK}:{port}", **trust}
    settings = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    try:
        write_text(home / "config.toml", tomli_w.dumps(settings))
        with Child(
            [*command, *(["--simulation"] if simulation else [])],
            environment=environment,
            log_file=log_folder / "superlink.log",
        ) as child:
            wait_until_healthy(port, child, timeout_s=START_TIMEOUT_S, ca=ca)
            yield SuperLink(port, home, environment, child, log_folder)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _identity(certificates: Certificates | None, folder: Path) -> list[str]:
    """Arguments for who the SuperLink is and whom it lets in."""
    if certificates is None:
        return ["--insecure"]
    state = folder / STATE_FILE
    folder.mkdir(parents=True, exist_ok=True)
    state.touch(mode=0o600)  # the engine would let others read it, and updates pass through it
    arguments = ["--ssl-ca-certfile", certificates.ca, "--ssl-certfile", certificates.certificate]
    arguments += ["--ssl-keyfile", certificates.key, "--database", state]
    return ["--enable-supernode-auth", *map(str, arguments)]


@dataclass(frozen=True)
class Submission:
    """How a run is submitted.

    Attributes:
        component: what Flower loads for a site.
        simulation: Flower's settings of virtual nodes.
        signed_by: the coordinator's folder of an enrolled federation; None signs nothing.
    """

    component: str = SITE_COMPONENT
    simulation: Mapping[str, int] = field(default_factory=dict)
    signed_by: Path | None = None


def run_on(
    link: SuperLink,
    config: RunConfig,
    folder: Path,
    *,
    how: Submission = Submission(),
    on_round: Callable[[RoundOutcome], None] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Submit the run and follow it to its end.

    Only a few lines of TOML travel as the app: its components are those of the installed
    packages, on either side.

    Args:
        link: where to run.
        config: the run's configuration.
        folder: the run's, whose cohorts have a checkpoint.
        how: it is submitted.
        on_round: told of every closed round.
        meanwhile: called a few times a second while the run goes on.

    Raises:
        EngineError: the run ended before its last round, and nobody had stopped it.
        CheckpointError: the run's newest checkpoint is damaged or of another configuration.
    """
    progress = [
        _Progress(name, store, config.for_cohort(name))
        for name, store in cohort_stores(folder, config).items()
    ]
    command = _submission(link, config, folder, how)
    if how.simulation:
        text = " ".join(f"{name}={value}" for name, value in how.simulation.items())
        command += ["--federation-config", text]
    with Child(
        command, environment=link.environment, log_file=link.log_folder / "run.log"
    ) as child:
        ended = False
        while not ended:
            ended = child.poll() is not None
            link.child.poll()
            if meanwhile is not None:
                meanwhile()
            for outcome in [closed for each in progress for closed in each.closed()]:
                if on_round is not None:
                    on_round(outcome)
            time.sleep(0.0 if ended else 0.3)
    _require_complete(progress)


def _submission(link: SuperLink, config: RunConfig, folder: Path, how: Submission) -> list[str]:
    """Write what the run needs into the engine's folder; the command that submits it."""
    app, settings = link.home / "agssd", link.home / "run.toml"
    write_text(link.home / "config.json", dump_config(config), private=True)
    write_text(app / "pyproject.toml", application_toml(how.component))
    paths = {"config": str(link.home / "config.json"), "run-folder": str(folder.resolve())}
    paths["federation"] = "" if how.signed_by is None else str(how.signed_by.resolve())
    write_text(settings, tomli_w.dumps(paths), private=True)
    return ["flwr", "run", str(app), CONNECTION, "--stream", "--run-config", str(settings)]


@dataclass
class _Progress:
    """How far another process has come with a cohort's rounds; opening it checks the run."""

    cohort: Cohort
    store: RunStore
    config: RunConfig
    seen: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        checkpoint = self.store.latest(strict=True)
        if checkpoint is not None:
            require_same_config(checkpoint.manifest, dump_config(self.config))
            self.seen = checkpoint.round

    @property
    def last(self) -> int:
        """How many rounds there are."""
        return self.config.federation.rounds

    def closed(self) -> Iterator[RoundOutcome]:
        """Rounds that were closed since the last call."""
        rows = self.store.metrics.rows()
        for outcome in outcomes_of(rows, rounds=self.last, first=self.seen):
            # A row stands before its checkpoint does, so wait for that.
            if not (self.store.checkpoints / f"round-{outcome.round + 1:04d}").is_dir():
                return
            self.seen = outcome.round + 1
            yield outcome


def _require_complete(progress: Sequence[_Progress]) -> None:
    behind = [each for each in progress if each.seen < each.last]
    if not behind or all(state_of(each.store.folder) == "stop" for each in behind):
        return
    done = [f"{each.seen} of {each.last} rounds" for each in behind]
    if len(progress) > 1:
        done = [f"{text} of {each.cohort}" for text, each in zip(done, behind, strict=True)]
    raise EngineError(
        f"the run ended after {' and '.join(done)}. The same command goes on from there; the "
        "engine's last words are in run.log in the run's folder."
    )

"""A run for an enrolled federation: SuperLink on loopback, nginx before it, keys kept in step."""

import os
import shutil
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agssd_core.config import Cohort, RunConfig
from agssd_core.errors import ConfigError, EngineError
from agssd_core.processes import LOOPBACK, Child, engine_environment, stopping_on_terminate
from agssd_core.tracking import require_packages
from server.cohorts import cohort_stores
from server.control import set_state
from server.delivery import receipts, sites_without
from server.enrolled import active_enrolments
from server.federation_folder import load_federation
from server.live_page import live_page
from server.nodes import NodeKeeper
from server.outcome import RoundOutcome
from server.proxy import SUPERLINK_PORT, write_federation_proxy
from server.serve import require_site_counts, rounds_left, write_page, writing_page
from server.signed_run import signed_run
from server.store import RunStore
from server.superlink import Certificates, Submission, SuperLink, run_on, superlink
from server.tracking import tracking_cohorts

PROXY_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Door:
    """Where sites come in.

    Attributes:
        listen: ADDRESS:PORT of the proxy; empty is all interfaces at the federation's port.
        own_proxy: start nginx; False when the machine's own nginx has the configuration.
        port: of the SuperLink, on loopback; 0 takes a free one, or without our own proxy 9092.
    """

    listen: str = ""
    own_proxy: bool = True
    port: int = 0


def serve_federation(
    config: RunConfig,
    federation: Path,
    door: Door,
    *,
    say: Callable[[str], None],
    on_round: Callable[[RoundOutcome], None] | None = None,
) -> None:
    """Run all rounds with the enrolled sites; the same call resumes a run.

    Args:
        config: the run's.
        federation: folder made by ``agssd-server provision``.
        door: where sites come in.
        say: where a line for the operator goes.
        on_round: told of every closed round.

    Raises:
        ConfigError: it is not said how many sites to wait for, the folder is no federation's, or
            nginx is wanted and not installed.
        CheckpointError: the run has no round-0 checkpoint, or one of another configuration.
        KeyFileError: a key of the federation is missing or readable by others.
        JournalError: the coordinator's journal is damaged.
        EngineError: the engine or nginx did not start, or the run ended early.
    """
    require_site_counts(config)
    require_packages(config.tracking)
    certificates = Certificates.of(federation)
    folder = Path(config.output) / config.name
    stores = cohort_stores(folder, config)
    if not any(rounds_left(s, config.for_cohort(name)) > 0 for name, s in stores.items()):
        waiting = _without_checkpoint(stores.values(), federation)
        if not waiting:
            write_page(folder)
            say("the run is complete; nothing to do")
            return
        say(f"the run is complete; the final checkpoint waits for {', '.join(waiting)}")
    with ExitStack() as stack:
        stack.enter_context(stopping_on_terminate())
        on_closed = stack.enter_context(
            tracking_cohorts(
                config.tracking, stores, run=config.name, on_round=writing_page(folder, on_round)
            )
        )
        port = door.port or (0 if door.own_proxy else SUPERLINK_PORT)
        link = stack.enter_context(
            superlink(config, folder / "engine", port=port, certificates=certificates)
        )
        keeper = NodeKeeper(link, lambda: active_enrolments(federation, datetime.now(UTC)), say=say)
        say(_open_door(stack, federation, folder, door, link))
        say(f"live page: {stack.enter_context(live_page(folder))}")
        set_state([store.folder for store in stores.values()], "go")
        _journal_start_and_stop(stack, federation, folder)
        how = Submission(signed_by=federation)
        run_on(link, config, folder, how=how, on_round=on_closed, meanwhile=keeper)
    _tell_of_deliveries(config, stores, federation, say)
    say(f"report: {write_page(folder)}")


def _tell_of_deliveries(
    config: RunConfig,
    stores: Mapping[Cohort, RunStore],
    federation: Path,
    say: Callable[[str], None],
) -> None:
    """Who holds the final checkpoint, and who does not; nothing of a run that was stopped."""
    for name, store in stores.items():
        if rounds_left(store, config.for_cohort(name)) > 0:
            continue
        told = receipts(store.folder)
        taken = [site for site in sorted(told) if told[site].get("held")]
        say(f"final checkpoint of {name}: held by {', '.join(taken) or 'no site'}")
        if missing := _without_checkpoint([store], federation):
            say(f"not yet by {', '.join(missing)}: serve again, or `agssd-server deliver`")


def _without_checkpoint(stores: Iterable[RunStore], federation: Path) -> list[str]:
    """Enrolled sites of the run that have not signed for its final checkpoint."""
    active = {each.site for each in active_enrolments(federation, datetime.now(UTC))}
    return sorted({site for store in stores for site in sites_without(store, active)})


def _open_door(
    stack: ExitStack, federation: Path, folder: Path, door: Door, link: SuperLink
) -> str:
    """Start our own proxy if it is wanted; a line for the operator."""
    server = load_federation(federation).settings.server
    if not door.own_proxy:
        return f"the SuperLink listens on {LOOPBACK}:{link.port}, for the machine's own nginx"
    listen = door.listen or f"0.0.0.0:{server.port}"
    stack.enter_context(_proxy(federation, folder, listen=listen, upstream=link.port))
    return f"sites connect to {server.host}:{server.port} ({listen} here)"


def _journal_start_and_stop(stack: ExitStack, federation: Path, folder: Path) -> None:
    chronicle = signed_run(federation, folder)["chronicle"]
    if chronicle is not None:
        chronicle.journal.append("start", {"run": folder.name})
        stack.callback(chronicle.journal.append, "stop", {"run": folder.name})


@contextmanager
def _proxy(federation: Path, folder: Path, *, listen: str, upstream: int) -> Iterator[None]:
    """Nginx with our configuration, until the block ends."""
    if shutil.which("nginx") is None:
        raise ConfigError(
            "nginx is not installed, and it is the only door to the SuperLink. Install it (Debian: "
            "apt-get install nginx-light), or use --no-proxy with the machine's own nginx."
        )
    place = (folder / "proxy").resolve()
    write_federation_proxy(federation, place, listen=listen, upstream_port=upstream)
    command = ["nginx", "-e", "stderr", "-p", str(place), "-c", "nginx.conf"]
    if os.geteuid() == 0:  # its workers would become nobody, who cannot read the key
        command += ["-g", "user root;"]
    environment = engine_environment(place, threads=1)
    with Child(command, environment=environment, log_file=place / "proxy.log") as child:
        _wait_until_open(child, federation / "ca.crt", listen)
        yield


def _wait_until_open(child: Child, ca: Path, listen: str) -> None:
    host, _, port = listen.rpartition(":")
    host = LOOPBACK if host in ("", "0.0.0.0", "[::]") else host  # noqa: S104 - compared only
    trust = ssl.create_default_context(cafile=str(ca))
    trust.check_hostname = False  # the certificate holds the public name; the chain is checked
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
    )
    deadline = time.monotonic() + PROXY_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            break
        try:
            with opener.open(f"https://{host}:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise EngineError(
        f"nginx did not open {listen}. Is the port taken, or below 1024 without the right to it? "
        "proxy/proxy.log in the run's folder has its words."
    )

"""A coordinator, nginx and enrolled sites as real processes, each site by a line of its own."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from agssd_core.config import RunConfig
from agssd_core.processes import free_port, is_healthy
from client.connection import load_connection, save_connection
from faults.link import Link, opened
from server.store import RunStore
from tests.support.deployed import BIN, provisioned, started
from tests.support.federated import federated_config, started_run
from tests.support.sites import make_site

SITES = {"north": "CT", "south": "MR", "valley": "MR"}
PASSPHRASE = "of a fault injection only"  # noqa: S105 - no secret
START_S = 900.0


class NotInTimeError(Exception):
    """Something that was waited for did not happen."""


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What the condition gives as soon as it is true.

    Raises:
        NotInTimeError: it never was.
    """
    ends = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > ends:
            raise NotInTimeError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(0.05)
    return found


def killed(process: subprocess.Popen[bytes]) -> None:
    """``kill -9`` of a process and of all that it started, at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for member in [psutil.Process(process.pid), *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait(10)


@dataclass
class Deployment:
    """A federation on disk, and whichever of its processes run.

    Attributes:
        config: of the run; ``federation.deadline_s`` is what rounds are held against.
        sites: name -> folder.
        links: name -> line to the coordinator.
    """

    folder: Path
    config: RunConfig
    sites: Mapping[str, Path]
    federation: Path
    port: int
    links: Mapping[str, Link]
    stack: contextlib.ExitStack
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return Path(self.config.output) / self.config.name

    @property
    def store(self) -> RunStore:
        """Checkpoints and rows."""
        return RunStore(self.run)

    @property
    def deadline_s(self) -> float:
        """When a round closes, seconds after its orders."""
        return self.config.federation.deadline_s

    def begin_run(self, name: str) -> None:
        """Take another run of the same configuration, with its round-0 checkpoint."""
        self.config = self.config.model_copy(update={"name": name})
        self._write_config()
        started_run(self.config, self.run, run=name)

    def set_deadline(self, seconds: float) -> None:
        """Give the running coordinator another deadline; it is stopped and started again for it."""
        terminated(self.processes["server"])
        plan = self.config.federation.model_copy(update={"deadline_s": seconds})
        self.config = self.config.model_copy(update={"federation": plan})
        self._write_config()
        self.serve()

    def _write_config(self) -> None:
        text = yaml.safe_dump(self.config.model_dump(mode="json"))
        (self.folder / "run.yaml").write_text(text, encoding="utf-8")

    def serve(self) -> subprocess.Popen[bytes]:
        """Start the coordinator, or start it again."""
        command = [BIN / "agssd-server", "serve", self.folder / "run.yaml"]
        command += ["--federation", self.federation, "--listen", f"127.0.0.1:{self.port}"]
        process = self._start("server", *command)
        # Sites that find nobody try again after longer and longer pauses.
        wait_for(
            lambda: process.poll() is not None or is_healthy(self.port, self.federation / "ca.crt"),
            START_S,
            "the coordinator's door opening",
        )
        return process

    def connect(self, site: str) -> subprocess.Popen[bytes]:
        """Start a site, or start it again."""
        return self._start(site, BIN / "agssd-site", "run", self.sites[site])

    def _start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        log = self.folder / f"{name}-{len(list(self.folder.glob(f'{name}-*.log')))}.log"
        process = self.stack.enter_context(started(log, *command))
        self.processes[name] = process
        return process

    def live(self) -> dict[str, Any]:
        """The live table, empty when there is none yet."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.run / "live.json").read_text("utf-8"))
            return found
        return {}

    def rows(self, kind: str, number: int) -> list[dict[str, Any]]:
        """Rows of a kind and round."""
        rows = self.store.metrics.rows()
        return [row for row in rows if (row["kind"], row["round"]) == (kind, number)]

    def merged(self, number: int) -> set[str] | None:
        """Sites that a closed round's weights came from; None while it is open."""
        rows = self.rows("merge", number)
        closed = (self.store.checkpoints / f"round-{number + 1:04d}").is_dir()
        return set(rows[0].get("shares") or ()) if rows and closed else None

    def next_order(self, site: str, *, seconds: float = START_S) -> tuple[int, datetime]:
        """Wait for the next round that orders this site: its number, and when it did."""
        live = self.live()
        before = live.get("round", -1) if live.get("stage") == "collecting" else -1

        def ordered() -> tuple[int, datetime] | None:
            live = self.live()
            found = live.get("sites", {}).get(site, {})
            if live.get("stage") != "collecting" or found.get("step") != "ordered":
                return None
            if live["round"] == before:
                return None
            return int(live["round"]), datetime.fromisoformat(found["since"])

        found: tuple[int, datetime] = wait_for(ordered, seconds, f"an order of {site}")
        return found

    def closed(self, number: int, began: datetime) -> tuple[set[str], float]:
        """Wait until a round is closed: whose updates it merged, and seconds since its order."""
        # Far beyond the deadline, so that a round that is late is told with its seconds.
        wait_for(lambda: self.merged(number) is not None, START_S, f"the end of round {number}")
        place = self.store.checkpoints / f"round-{number + 1:04d}" / "manifest.json"
        moment = datetime.fromtimestamp(place.stat().st_mtime, UTC)
        return self.merged(number) or set(), (moment - began).total_seconds()

    def pulls(self, site: str) -> int:
        """How many calls for orders of this site were answered."""
        return self._calls(site, "/v1/fleet/pull-messages")

    def _calls(self, site: str, path: str) -> int:
        try:
            lines = (self.run / "proxy" / "access.log").read_text("utf-8").splitlines()
        except OSError:
            return 0
        start = f" {self.links[site].source} POST {path} 200 "
        return sum(start in line for line in lines)

    def memory(self) -> int:
        """Bytes that nginx, SuperLink and ServerApp hold now."""
        total = 0
        with contextlib.suppress(psutil.Error):
            for member in psutil.Process(self.processes["server"].pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += member.memory_info().rss
        return total


@contextlib.contextmanager
def deployment(
    folder: Path, *, sites: Mapping[str, str] = SITES, extra: tuple[str, ...] = (), **changes: Any
) -> Iterator[Deployment]:
    """An enrolled federation of which nothing runs yet; all ends with the block.

    Args:
        folder: where it lies.
        sites: name -> modality.
        extra: sites that are enrolled and have no line.
        changes: of the small configuration.
    """
    os.environ["AGSSD_CA_PASSPHRASE"] = PASSPHRASE
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder.mkdir(parents=True, exist_ok=True)
    names = [*sites, *extra]
    places = {
        name: make_site(folder / "sites" / name, sites.get(name, "CT"), seed=number)
        for number, name in enumerate(names)
    }
    port = free_port()
    federation = provisioned(folder, places, port)
    with contextlib.ExitStack() as stack:
        links = {
            name: stack.enter_context(opened(Link(port, f"127.0.0.{20 + number}")))
            for number, name in enumerate(sites)
        }
        for name, link in links.items():
            own = load_connection(places[name])
            save_connection(places[name], replace(own, server=f"localhost:{link.port}"))
        config = federated_config(folder / "runs", **changes)
        yield Deployment(folder, config, places, federation, port, links, stack)


def random_moment(random_: random.Random, longest_s: float) -> None:
    """Let some of a number of seconds pass."""
    time.sleep(random_.uniform(0.0, longest_s))


def terminated(process: subprocess.Popen[bytes]) -> int:
    """End a process politely; its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    return process.wait(90)

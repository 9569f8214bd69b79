"""Who is on line and in which step, as the rounds go: ``live.json`` beside a cohort's checkpoints.

Written for people who look on, so never synced and never awaited; losing it costs nothing.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LIVE_FILE = "live.json"
PAUSE_S = 0.5


@dataclass
class LiveSite:
    """What is known of one site.

    Attributes:
        online: its node was connected when nodes were last listed.
        last_seen: ISO time in UTC of that, or of its last answer.
        step: ``idle``, ``ordered``, ``admitted`` or ``refused``, of this round.
        since: ISO time in UTC since when it is in this step.
        bytes_up, bytes_down: of all rounds since the server was started.
        rounds, refusals: how many of each since then.
        reason: class of the last refusal.
    """

    online: bool = False
    last_seen: str = ""
    step: str = "idle"
    since: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    rounds: int = 0
    refusals: int = 0
    reason: str = ""


@dataclass
class LiveBoard:
    """The state of one cohort.

    Attributes:
        stage: ``starting``, ``discovering``, ``collecting``, ``merging``, ``paused``, ``stopped``,
            ``delivering`` or ``complete``.
    """

    folder: Path
    cohort: str = ""
    round: int = 0
    rounds: int = 0
    stage: str = "starting"
    sites: dict[str, LiveSite] = field(default_factory=dict)
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC), repr=False)
    _written: float = field(default=-PAUSE_S, repr=False)

    def enter(self, stage: str) -> None:
        """The cohort is in another stage."""
        self.stage = stage
        if stage == "discovering":
            for site in self.sites.values():
                site.step, site.since = "idle", self._time()
        self.write(at_once=True)

    def online(self, sites: Iterable[str]) -> None:
        """Nodes were listed."""
        found = set(sites)
        for name in found | self.sites.keys():
            site = self.sites.setdefault(name, LiveSite())
            site.online = name in found
            if site.online:
                site.last_seen = self._time()
        self.write()

    def ordered(self, name: str, *, size: int) -> None:
        """An order of ``size`` bytes is on its way."""
        self._step(name, "ordered").bytes_down += size
        self.write()

    def admitted(self, name: str, *, size: int) -> None:
        """An update of ``size`` bytes came and was admitted."""
        site = self._step(name, "admitted")
        site.bytes_up += size
        site.rounds += 1
        site.last_seen = site.since
        self.write()

    def refused(self, name: str, reason: str) -> None:
        """The site's round is lost, for this class of reason."""
        site = self._step(name, "refused")
        site.refusals += 1
        site.reason = reason
        self.write()

    def write(self, *, at_once: bool = False) -> None:
        """Publish what is known, at most twice a second."""
        now = time.monotonic()
        if not at_once and now - self._written < PAUSE_S:
            return
        self._written = now
        content = {
            "cohort": self.cohort,
            "round": self.round,
            "rounds": self.rounds,
            "stage": self.stage,
            "written": self._time(),
            "sites": {name: asdict(site) for name, site in sorted(self.sites.items())},
        }
        temporary = self.folder / f".{LIVE_FILE}.tmp"
        try:
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self.folder / LIVE_FILE)
        except OSError as error:
            log.debug("live.json could not be written (%s)", type(error).__name__)

    def _step(self, name: str, step: str) -> LiveSite:
        site = self.sites.setdefault(name, LiveSite())
        site.step, site.since = step, self._time()
        return site

    def _time(self) -> str:
        return self.now().isoformat(timespec="seconds")


def read_live(folder: Path) -> dict[str, Any] | None:
    """What a cohort's folder says; None when nothing was written yet."""
    try:
        content = json.loads((folder / LIVE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "sites" in content else None

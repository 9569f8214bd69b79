"""The enrolled sites of a running federation: whose node is whose, with which keys and counts.

What a node says of itself is not believed: its name comes from the key with which it was let in,
its patient count from its signed enrolment.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from agssd_core.enrolment import Enrolment
from agssd_core.signing import VerifyKey
from server.enrolled import active_enrolments

LOOK_AGAIN_S = 2.0


@dataclass
class Members:
    """Enrolments in force, read again every few seconds, so that a revocation counts at once.

    Attributes:
        federation: the coordinator's folder.
        nodes_file: ``SITE-KEYID`` -> node id, as the server keeps it while it registers nodes.
        now: with time zone.
    """

    federation: Path
    nodes_file: Path
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    _read: float = field(default=-LOOK_AGAIN_S, repr=False)
    _active: list[Enrolment] = field(default_factory=list, repr=False)

    def active(self) -> list[Enrolment]:
        """Enrolments in force, sorted by (site, key id)."""
        if time.monotonic() - self._read >= LOOK_AGAIN_S:
            self._active = active_enrolments(self.federation, self.now())
            self._read = time.monotonic()
        return self._active

    def site_of(self, node: int) -> str | None:
        """Whose node that is; None when its key is not in force."""
        names = {value: name for name, value in self._nodes().items()}
        name = names.get(node)
        return next(
            (each.site for each in self.active() if f"{each.site}-{each.key_id}" == name), None
        )

    def patients(self, site: str, cohort: str) -> int:
        """Patients of the newest enrolment in force; 0 when the site is not of the cohort."""
        counts = [each.cohorts.get(cohort, 0) for each in self.active() if each.site == site]
        return counts[-1] if counts else 0

    def keys(self) -> "SiteKeys":
        """Signing keys by site, looked up when asked."""
        return SiteKeys(self)

    def _nodes(self) -> dict[str, int]:
        try:
            content = json.loads(self.nodes_file.read_text(encoding="utf-8"))
            return {str(name): int(node) for name, node in content.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}


class SiteKeys(Mapping[str, Collection[VerifyKey]]):
    """Site -> its signing keys in force; two while a key is renewed."""

    def __init__(self, members: Members) -> None:
        self._members = members

    def __getitem__(self, site: str) -> Collection[VerifyKey]:
        found = [each for each in self._members.active() if each.site == site]
        if not found:
            raise KeyError(site)
        return [VerifyKey.from_text(each.signing_key) for each in found]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(each.site for each in self._members.active()))

    def __len__(self) -> int:
        return len({each.site for each in self._members.active()})

"""The keys of a federation's sites, and which of them may be used."""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from agssd_core.enrolment import Enrolment, require_node_key
from agssd_core.errors import AgssdError
from agssd_core.signing import VerifyKey
from server.federation_folder import (
    Federation,
    enrolled_file,
    key_ids,
    load_federation,
    load_token,
    revoked_file,
)

WARNING = timedelta(days=14)
KeyState = Literal["active", "ends soon", "expired", "revoked", "damaged"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteKey:
    """One admitted key of a site; ``enrolment`` is None when its record cannot be trusted."""

    site: str
    key_id: int
    state: KeyState
    enrolment: Enrolment | None


def active_enrolments(folder: Path, now: datetime) -> list[Enrolment]:
    """The enrolments whose keys may be used: signed by the coordinator, neither ended nor revoked.

    A record that was altered is left out with a warning; it stops nobody else.

    Args:
        folder: made by ``agssd-server provision``.
        now: with time zone.

    Returns:
        Sorted by (site, key_id); a site that renewed its key has two for a while.

    Raises:
        ConfigError, KeyFileError: the folder is no federation's, or federation.json is damaged.
    """
    return [
        key.enrolment
        for key in site_keys(folder, now)
        if key.enrolment is not None and key.state in ("active", "ends soon")
    ]


def site_keys(folder: Path, now: datetime) -> list[SiteKey]:
    """Every admitted key with its state, sorted by (site, key_id)."""
    federation = load_federation(folder)
    names = sorted(member.name for member in federation.settings.sites)
    return [
        _site_key(folder, federation, site, key_id, now)
        for site in names
        for key_id in key_ids(folder, site)
    ]


def waiting_kits(folder: Path, now: datetime) -> dict[str, str]:
    """Sites whose kit has admitted no key yet -> ``waiting``, ``expired`` or ``void``."""
    federation = load_federation(folder)
    found = {}
    for member in sorted(federation.settings.sites, key=lambda each: each.name):
        token = load_token(folder, member.name)
        if token is None or token.key_id in key_ids(folder, member.name):
            continue
        ended = datetime.fromisoformat(token.expires).astimezone(UTC) <= now
        found[member.name] = "void" if not token.token else "expired" if ended else "waiting"
    return found


def _site_key(
    folder: Path, federation: Federation, site: str, key_id: int, now: datetime
) -> SiteKey:
    enrolment = _trusted(folder, federation, site, key_id)
    if enrolment is None:
        log.warning("the enrolment of key %d of site %s is damaged; it is not used", key_id, site)
        return SiteKey(site, key_id, "damaged", None)
    state: KeyState = "active"
    if revoked_file(folder, site, key_id).exists():
        state = "revoked"
    elif not enrolment.is_valid_at(now):
        state = "expired"
    elif enrolment.expiry - now <= WARNING:
        state = "ends soon"
    return SiteKey(site, key_id, state, enrolment)


def _trusted(folder: Path, federation: Federation, site: str, key_id: int) -> Enrolment | None:
    """A record that the coordinator signed for this site and key."""
    try:
        text = enrolled_file(folder, site, key_id).read_text(encoding="utf-8")
        enrolment = Enrolment.from_json(text)
        enrolment.verify(federation.key)
        require_node_key(enrolment.node_key)
        VerifyKey.from_text(enrolment.signing_key)
    except (AgssdError, OSError, UnicodeDecodeError):
        return None
    named = (federation.settings.name, site, key_id)
    if (enrolment.federation, enrolment.site, enrolment.key_id) != named:
        return None
    return enrolment

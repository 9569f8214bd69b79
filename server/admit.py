"""``agssd-server admit`` and ``revoke``: who may take part, and with which keys."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from agssd_core.enrolment import Enrolment, EnrolmentRequest, fingerprint, require_node_key
from agssd_core.errors import EnrolmentError, ProtocolError
from agssd_core.folders import folder_lock, private_folder, read_small
from agssd_core.journal import Fact, Journal
from agssd_core.protocol import PROTOCOL_VERSION
from agssd_core.signing import VerifyKey
from agssd_core.weights import write_text
from server.enrolled import SiteKey, site_keys
from server.federation_folder import (
    Federation,
    enrolled_file,
    iso,
    key_ids,
    load_federation,
    load_token,
    open_journal,
    revoked_file,
    signing_key,
    void_token,
)

MAX_REQUEST_BYTES = 16_384
MAX_PATIENTS = 10_000_000
MAX_REASON = 200


def admit(
    request_file: Path, folder: Path, *, now: datetime, answer: Path | None = None
) -> tuple[Enrolment, Path]:
    """Check a site's request and enrol its key.

    Args:
        request_file: what the site sent.
        folder: made by ``agssd-server provision``.
        now: with time zone.
        answer: file for the site; FEDERATION/answers/SITE-KEYID.json if left out.

    Returns:
        The enrolment, and the answer's file.

    Raises:
        EnrolmentError, SignatureError, KeyFileError: the request cannot be taken; nothing changed.
    """
    request = read_request(request_file)
    with folder_lock(folder):
        federation = load_federation(folder)
        _require_member(request, federation)
        keys = site_keys(folder, now)
        _require_keys(request, keys)
        _require_proof(request, folder, keys, now)
        enrolment = _enrolled(request, federation, folder, now)
        place = answer or folder / "answers" / f"{request.site}-{request.key_id}.json"
        write_text(place, enrolment.to_json() + "\n")
    return enrolment, place


def revoke(
    folder: Path, site: str, *, reason: str, now: datetime, key_id: int = 0
) -> tuple[tuple[int, ...], bool]:
    """Take all keys of a site away, and its kit if that was not used yet; or one key alone.

    Args:
        folder: made by ``agssd-server provision``.
        site: a member.
        reason: one line for the journal; it names no patient.
        now: with time zone.
        key_id: this key alone; 0 is all of them and the kit.

    Returns:
        Numbers of the keys revoked now, and whether a kit became void.

    Raises:
        EnrolmentError: the site is no member, has no such key, or the reason is no line.
    """
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise EnrolmentError(f"the reason is not one line of at most {MAX_REASON} signs.")
    with folder_lock(folder):
        federation = load_federation(folder)
        settings = federation.settings
        if not settings.cohorts_of(site):
            raise _no_member(federation)
        journal = open_journal(folder, signing_key(folder), settings.name)
        ids = [each for each in key_ids(folder, site) if key_id in (0, each)]
        if key_id and not ids:
            raise EnrolmentError(f"site {site} has no key {key_id}. See `agssd-server sites`.")
        ids = [each for each in ids if not revoked_file(folder, site, each).exists()]
        for each in ids:
            _revoke_key(folder, site, each, reason=reason, now=now, journal=journal)
        voided = not key_id and void_token(folder, site)
        if voided:
            journal.append("key", {"event": "kit void", "site": site, "reason": reason})
    return tuple(ids), voided


def read_request(file: Path) -> EnrolmentRequest:
    """Read a request, not yet trusted.

    Raises:
        EnrolmentError, KeyFileError: it is missing, too large or none.
    """
    content = read_small(file, limit=MAX_REQUEST_BYTES, what="the request")
    try:
        return EnrolmentRequest.from_json(content.decode("utf-8"))
    except (ProtocolError, UnicodeDecodeError):
        raise EnrolmentError(
            "the file is no request of this version. Ask the site for its keys/request.json, and "
            "use the same version on both sides."
        ) from None


def _revoke_key(
    folder: Path, site: str, key_id: int, *, reason: str, now: datetime, journal: Journal
) -> None:
    facts: dict[str, Fact] = {"event": "key revoked", "site": site, "key_id": key_id}
    journal.append("key", {**facts, "reason": reason})
    private_folder(folder / "revoked", what="folder revoked")
    mark = {"site": site, "key_id": key_id, "revoked": iso(now), "reason": reason}
    write_text(revoked_file(folder, site, key_id), json.dumps(mark, sort_keys=True) + "\n")


def _require_member(request: EnrolmentRequest, federation: Federation) -> None:
    settings = federation.settings
    if request.protocol != PROTOCOL_VERSION:
        raise EnrolmentError(
            f"the request speaks protocol {request.protocol}, this software {PROTOCOL_VERSION}. "
            "Use the same version on both sides."
        )
    if request.federation != settings.name:
        raise EnrolmentError(
            f"the request is for another federation than {settings.name}. Name its folder, or ask "
            "the site which kit it used."
        )
    allowed = settings.cohorts_of(request.site)
    if not allowed:
        raise _no_member(federation)
    surplus = sorted(set(request.cohorts) - set(allowed))
    if surplus or not request.cohorts:
        raise EnrolmentError(
            f"site {request.site} may take part in {', '.join(allowed)}, and the request names "
            f"{'no cohort' if not surplus else f'{len(surplus)} other(s)'}. Add the cohort to "
            "federation.yaml and provision again, or ask for another request."
        )
    counts = request.cohorts.values()
    if not all(0 < count <= MAX_PATIENTS for count in counts):
        raise EnrolmentError(
            f"a patient count of the request is no whole number from 1 to {MAX_PATIENTS}. Ask for "
            "another request."
        )


def _require_keys(request: EnrolmentRequest, keys: list[SiteKey]) -> None:
    """The request is whole, its keys are of the right kinds, and nobody has them already."""
    request.verify()
    require_node_key(request.node_key)
    if any(key.site == request.site and key.key_id == request.key_id for key in keys):
        raise EnrolmentError(
            f"key {request.key_id} of site {request.site} was admitted before; a request counts "
            "once. Its answer is in the folder answers."
        )
    known = [key.enrolment for key in keys if key.enrolment is not None]
    if any(
        request.signing_key == other.signing_key or request.node_key == other.node_key
        for other in known
    ):
        raise EnrolmentError(
            "a key of the request is enrolled already, here or at another site. Keys are used "
            "once: ask for another request."
        )


def _require_proof(
    request: EnrolmentRequest, folder: Path, keys: list[SiteKey], now: datetime
) -> None:
    if request.renews:
        _require_renewal(request, keys)
        return
    token = load_token(folder, request.site)
    if token is None or not token.token:
        raise EnrolmentError(
            f"no kit is open for site {request.site}: it was used, or made void. Make another with "
            "`agssd-server provision --again SITE`."
        )
    if datetime.fromisoformat(token.expires).astimezone(UTC) <= now:
        raise EnrolmentError(
            f"the kit of site {request.site} expired on {token.expires[:10]}. Make another with "
            "`agssd-server provision --again SITE`."
        )
    if request.key_id != token.key_id or not request.has_token(token.token):
        raise EnrolmentError(
            f"the request was not made with the kit of site {request.site}, or was altered on its "
            "way. Ask for it again; if a new kit was made, the old one counts no more."
        )


def _require_renewal(request: EnrolmentRequest, keys: list[SiteKey]) -> None:
    """The newest key of the site, still in force, vouches for the next one."""
    own = [key for key in keys if key.site == request.site]
    old = own[-1] if own else None
    if old is None or old.key_id != request.renews or request.key_id != old.key_id + 1:
        raise EnrolmentError(
            f"the request renews key {request.renews} of site {request.site}, which is not its "
            "newest. Ask for another request, made with `agssd-site renew`."
        )
    if old.enrolment is None or old.state not in ("active", "ends soon"):
        raise EnrolmentError(
            f"key {old.key_id} of site {request.site} is {old.state}, so it vouches for no other. "
            "Make a new kit with `agssd-server provision --again SITE`."
        )
    request.verify_renewal(VerifyKey.from_text(old.enrolment.signing_key))


def _enrolled(
    request: EnrolmentRequest, federation: Federation, folder: Path, now: datetime
) -> Enrolment:
    """Sign, note and write: the journal first, the token's end last."""
    settings, key = federation.settings, signing_key(folder)
    enrolment = Enrolment(
        federation=settings.name,
        site=request.site,
        key_id=request.key_id,
        cohorts=dict(sorted(request.cohorts.items())),
        node_key=request.node_key,
        signing_key=request.signing_key,
        admitted=iso(now),
        expires=iso(now + timedelta(days=settings.key_days)),
    ).signed(key)
    enrolment.verify(federation.key)
    facts: dict[str, Fact] = {
        "event": "key admitted",
        "site": request.site,
        "key_id": request.key_id,
        "fingerprint": fingerprint(request.signing_key),
        "expires": enrolment.expires,
    }
    open_journal(folder, key, settings.name).append("key", facts)
    private_folder(folder / "enrolled", what="folder enrolled")
    write_text(enrolled_file(folder, request.site, request.key_id), enrolment.to_json() + "\n")
    if not request.renews:
        void_token(folder, request.site)
    return enrolment


def _no_member(federation: Federation) -> EnrolmentError:
    names = ", ".join(sorted(site.name for site in federation.settings.sites))
    return EnrolmentError(
        f"the site is no member of federation {federation.settings.name}. Members: {names}. Others "
        "are added to federation.yaml and provisioned."
    )

"""``agssd-site enrol`` and ``renew``: a site's keys, made here and kept here.

SITE/keys (mode 0700) holds what ``client.connection`` names, and::

    kit.json          what the kit said, without its token
    request.json      public keys and patient counts, to be sent to the coordinator
    enrolment-N.json  the coordinator's answer for key N
"""

from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from agssd_core.config.node import name_problem
from agssd_core.data.catalogue import open_catalogue
from agssd_core.enrolment import Enrolment, EnrolmentRequest
from agssd_core.errors import CatalogueError, EnrolmentError, KeyFileError, ProtocolError
from agssd_core.folders import folder_lock, private_folder, read_small
from agssd_core.journal import NEXT_KEY, Journal, key_in_force
from agssd_core.kit import Kit, read_kit
from agssd_core.protocol import PROTOCOL_VERSION, Record
from agssd_core.signing import SigningKey, VerifyKey
from agssd_core.weights import write_bytes, write_text
from client.connection import (
    CONNECTION_FILE,
    Connection,
    ca_file,
    keys_folder,
    load_connection,
    save_connection,
    signing_key_file,
)
from client.site_keys import make_keys, node_public, require_ca, signing_keys

KIT_FILE, REQUEST_FILE = "kit.json", "request.json"
MAX_ANSWER_BYTES = 16_384


@dataclass(frozen=True)
class Coordinator(Record):
    """What the kit said of the coordinator; its key is pinned from then on."""

    federation: str
    site: str
    cohorts: str
    server: str
    server_key: str


def enrol(site: Path, kit_file: Path, *, now: datetime) -> EnrolmentRequest:
    """Open a kit, make the site's keys and write the request; repeated, it keeps the keys.

    Args:
        site: folder made by ``agssd-site index``.
        kit_file: zip from the coordinator.
        now: with time zone.

    Raises:
        EnrolmentError, KeyFileError, SignatureError: the kit cannot be taken.
        CatalogueError: the site has no scan for the kit's cohorts.
    """
    kit, ca = read_kit(kit_file)
    kit.verify(ca, now=now)
    require_ca(ca, now)
    _require_names(kit)
    counts = _patient_counts(site, kit.cohorts)
    private_folder(keys_folder(site), what="folder keys")
    with folder_lock(keys_folder(site)):
        coordinator = Coordinator(**_shared(kit, Coordinator))
        _require_unbound(site, coordinator, kit.key_id)
        write_bytes(ca_file(site), ca)
        key = make_keys(site, kit.key_id)
        write_text(keys_folder(site) / KIT_FILE, coordinator.to_json() + "\n")
        request = _request(site, coordinator, key_id=kit.key_id, counts=counts, now=now)
        request = request.proved_by_token(kit.token).signed(key)
        _save_request(site, request)
    return request


def renew(site: Path, *, now: datetime) -> EnrolmentRequest:
    """Make the next keys and a request that the present key vouches for.

    The present keys stay in use until the answer has come.

    Raises:
        KeyFileError: the site is not enrolled, or its key is missing or readable by others.
        CatalogueError: the site has no scan for its cohorts any more.
    """
    connection = load_connection(site)
    with folder_lock(keys_folder(site)):
        coordinator = load_coordinator(site)
        counts = _patient_counts(site, coordinator.cohorts)
        old = SigningKey.load(signing_key_file(site, connection.key_id))
        key_id = connection.key_id + 1
        key = make_keys(site, key_id)
        request = _request(
            site, coordinator, key_id=key_id, counts=counts, now=now, renews=connection.key_id
        )
        request = request.proved_by_key(old).signed(key)
        _save_request(site, request)
    return request


def accept_answer(site: Path, answer: Path, *, now: datetime) -> Connection:
    """Check the coordinator's answer and put the key into use.

    Raises:
        EnrolmentError, SignatureError, KeyFileError: it is not the answer to this site's request.
    """
    content = read_small(answer, limit=MAX_ANSWER_BYTES, what="the answer")
    try:
        enrolment = Enrolment.from_json(content.decode("utf-8"))
    except (ProtocolError, UnicodeDecodeError):
        raise EnrolmentError(
            "the file is no answer of this version. Ask the coordinator for it again."
        ) from None
    coordinator = load_coordinator(site)
    enrolment.verify(VerifyKey.from_text(coordinator.server_key))
    with folder_lock(keys_folder(site)):
        _require_ours(site, enrolment, coordinator, now)
        key_id = enrolment.key_id
        new = SigningKey.load(signing_key_file(site, key_id))
        connection = Connection(
            **_shared(coordinator, Connection),
            key_id=key_id,
            expires=enrolment.expires,
        )
        _hand_over(site, coordinator.site, new, key_id)
        write_text(keys_folder(site) / f"enrolment-{key_id}.json", enrolment.to_json() + "\n")
        save_connection(site, connection)
        journal = Journal(site, new, owner=coordinator.site)
        journal.append(
            "key", {"event": "key in use", "key_id": key_id, "expires": enrolment.expires}
        )
    return connection


def load_coordinator(site: Path) -> Coordinator:
    """What the kit said.

    Raises:
        KeyFileError: no kit was opened for this site, or the record is damaged.
    """
    try:
        text = (keys_folder(site) / KIT_FILE).read_text(encoding="utf-8")
        return Coordinator.from_json(text)
    except FileNotFoundError:
        raise KeyFileError(
            "no kit was opened for this site. Use `agssd-site enrol KIT --site SITE`."
        ) from None
    except (OSError, ProtocolError, UnicodeDecodeError):
        raise KeyFileError("keys/kit.json is damaged. Restore it, or enrol again.") from None


def load_request(site: Path) -> EnrolmentRequest:
    """The newest request.

    Raises:
        KeyFileError: there is none, or it is damaged.
    """
    try:
        text = (keys_folder(site) / REQUEST_FILE).read_text(encoding="utf-8")
        return EnrolmentRequest.from_json(text)
    except (OSError, ProtocolError, UnicodeDecodeError):
        raise KeyFileError(
            "keys/request.json is missing or damaged. Use `agssd-site enrol KIT` or `renew` again."
        ) from None


def _require_names(kit: Kit) -> None:
    """What the kit names goes into files and commands, so it is looked at before."""
    host, _, port = kit.server.rpartition(":")
    if not host or not (port.isdecimal() and port.isascii() and 0 < int(port) < 1 << 16):
        raise EnrolmentError("the kit's server is no HOST:PORT. Ask for the kit again.")
    problem = name_problem(kit.site) or name_problem(kit.federation)
    if problem or not 0 < kit.key_id < 1_000_000:
        raise EnrolmentError("a name or number in the kit is none. Ask for the kit again.")


def _require_unbound(site: Path, coordinator: Coordinator, key_id: int) -> None:
    """The site belongs to no other federation, and the kit was not used up."""
    if (keys_folder(site) / KIT_FILE).exists():
        before = load_coordinator(site)
        pinned = (before.federation, before.site, before.server_key)
        if pinned != (coordinator.federation, coordinator.site, coordinator.server_key):
            raise EnrolmentError(
                f"this site opened a kit of federation {before.federation} as {before.site}, and "
                "the kit is of another federation, site or coordinator's key. Ask the coordinator; "
                "to change sides, move the folder keys and journal.jsonl to a safe place first."
            )
    if (keys_folder(site) / CONNECTION_FILE).exists():
        held = load_connection(site).key_id
        if held >= key_id:
            raise EnrolmentError(
                f"the kit is for key {key_id}, and the site has key {held}. Use `agssd-site renew` "
                "for the next key."
            )


def _patient_counts(site: Path, cohorts: str) -> dict[str, int]:
    """Patients with a scan, for each cohort that the site may take part in and has scans for."""
    catalogue = open_catalogue(site)
    allowed = cohorts.split()
    counts: dict[str, int] = {
        cohort: len(catalogue.patients_of(cohort))
        for cohort in catalogue.cohorts
        if cohort in allowed
    }
    if not counts:
        raise CatalogueError(
            f"the site has no scan for what it may take part in ({', '.join(allowed)}). Index "
            "folders that hold some, or ask the coordinator for another kit."
        )
    return counts


def _request(
    site: Path,
    coordinator: Coordinator,
    *,
    key_id: int,
    counts: dict[str, int],
    now: datetime,
    renews: int = 0,
) -> EnrolmentRequest:
    return EnrolmentRequest(
        protocol=PROTOCOL_VERSION,
        federation=coordinator.federation,
        site=coordinator.site,
        key_id=key_id,
        renews=renews,
        cohorts=counts,
        node_key=node_public(site, key_id),
        signing_key=SigningKey.load(signing_key_file(site, key_id)).public.text(),
        made=now.isoformat(timespec="seconds"),
    )


def _save_request(site: Path, request: EnrolmentRequest) -> None:
    """Note it, and write it for the coordinator."""
    journal = Journal(site, _journal_key(site, request.key_id), owner=request.site)
    named = {"event": "request made", "signing_key": request.signing_key}
    journal.append("key", {**named, "key_id": request.key_id})
    write_text(keys_folder(site) / REQUEST_FILE, request.to_json() + "\n")


def _require_ours(
    site: Path, enrolment: Enrolment, coordinator: Coordinator, now: datetime
) -> None:
    request = load_request(site)
    # Not the patient counts: a repeated request may hold newer ones.
    names = ("federation", "site", "key_id", "node_key", "signing_key")
    asked, given = asdict(request), asdict(enrolment)
    differing = [name for name in names if asked[name] != given[name]]
    if differing or enrolment.site != coordinator.site:
        raise EnrolmentError(
            f"the answer does not fit this site's request ({', '.join(differing)}). Ask for the "
            "answer to keys/request.json as it is now."
        )
    if enrolment.expiry <= now:
        raise EnrolmentError(
            f"the answer's key expired on {enrolment.expires[:10]}. Ask for a new kit, or set this "
            "machine's clock."
        )
    if node_public(site, enrolment.key_id) != enrolment.node_key:
        raise KeyFileError("the node's key is another than the request's. Restore it.")


def _hand_over(site: Path, owner: str, new: SigningKey, key_id: int) -> None:
    """Let the new key sign the journal from now on."""
    if key_in_force(site) in ("", new.public.text()):
        return
    journal = Journal(site, _journal_key(site, key_id), owner=owner)
    named = {"event": "key renewed", NEXT_KEY: new.public.text()}
    journal.append("key", {**named, "key_id": key_id})


def _journal_key(site: Path, key_id: int) -> SigningKey:
    """Of the site's keys the one that the journal goes on with; a new journal takes the newest."""
    wanted = key_in_force(site)
    keys = signing_keys(site, key_id)
    return next((key for key in keys if key.public.text() == wanted), keys[0])


def _shared(source: Record, target: type[Record] | type[Connection]) -> dict[str, str]:
    """The fields of ``source`` that ``target`` has too."""
    content = asdict(source)  # type: ignore[call-overload]
    wanted = {item.name for item in fields(target)}  # type: ignore[arg-type]
    return {name: value for name, value in content.items() if name in wanted}


def journal_key(site: Path) -> VerifyKey:
    """The key that signs the site's journal now; before the answer that of its request.

    Raises:
        KeyFileError: the site has no key, or it is damaged or readable by others.
    """
    if (keys_folder(site) / CONNECTION_FILE).exists():
        return SigningKey.load(signing_key_file(site, load_connection(site).key_id)).public
    return VerifyKey.from_text(load_request(site).signing_key)

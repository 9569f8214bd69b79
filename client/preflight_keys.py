"""Whether a site's keys are whole, private and in force, and what its owner allows."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from agssd_core.enrolment import Enrolment
from agssd_core.errors import AgssdError, KeyFileError, OrderRefusedError
from agssd_core.journal import key_in_force, verify_journal
from agssd_core.signing import VerifyKey
from client.connection import Connection, ca_file, keys_folder, server_key, signing_key
from client.enrol import journal_key
from client.objections import POLICY_FILE
from client.policy import Guard
from client.preflight_row import Row, fail, ok, warn
from client.site_keys import node_public, require_ca

SOON = timedelta(days=14)


def key_rows(site: Path, connection: Connection, *, now: datetime) -> list[Row]:
    """All checks of what lies in SITE/keys."""
    return [
        check_files(site, connection, now=now),
        check_privacy_of_files(site),
        check_expiry(connection, now=now),
        check_admitted(site, connection),
        check_journal(site),
    ]


def check_files(site: Path, connection: Connection, *, now: datetime) -> Row:
    """Whether authority, node key and signing key are there and can be read."""
    name = "key files"
    try:
        require_ca(ca_file(site).read_bytes(), now)
        node_public(site, connection.key_id)
        signing_key(site, connection)
        server_key(connection)
    except OSError:
        return fail(name, "keys/ca.crt is missing", "Restore it, or enrol again.")
    except AgssdError as error:
        return _of_error(name, error)
    return ok(name, f"authority, node key {connection.key_id} and signing key can be read")


def check_privacy_of_files(site: Path) -> Row:
    """Whether nobody but the owner can reach the private keys."""
    name, folder = "key modes", keys_folder(site)
    public = ("ca.crt", "node-*.pub", "enrolment-*.json", "request.json", "kit.json")
    open_ = {} if not folder.stat().st_mode & 0o077 else {"the folder keys": folder}
    for file in sorted(folder.iterdir()):
        if not any(file.match(each) for each in public) and file.stat().st_mode & 0o077:
            open_[file.name] = file
    if not open_:
        return ok(name, "for the owner alone")
    modes = [f"{label} {path.stat().st_mode & 0o777:03o}" for label, path in open_.items()]
    return fail(
        name,
        f"others can reach {', '.join(modes)}",
        "chmod 700 the folder and 600 the files. If others use this machine, renew the keys: "
        "`agssd-site renew`.",
    )


def check_expiry(connection: Connection, *, now: datetime) -> Row:
    """Whether the coordinator still takes the key."""
    name = "key expiry"
    try:
        expires = datetime.fromisoformat(connection.expires)
    except ValueError:
        return fail(name, "keys/connection.json tells no date", "Enrol again.")
    expires = expires.replace(tzinfo=expires.tzinfo or UTC)
    if expires <= now:
        return fail(
            name,
            f"the key ended on {expires:%Y-%m-%d}",
            "`agssd-site renew` makes a new one; an ended key cannot vouch for it after its day, "
            "then ask the coordinator for a new kit.",
        )
    if expires - now < SOON:
        return warn(name, f"the key ends on {expires:%Y-%m-%d}", "Use `agssd-site renew` now.")
    return ok(name, f"until {expires:%Y-%m-%d}")


def check_admitted(site: Path, connection: Connection) -> Row:
    """Whether the coordinator has admitted the key, as far as a site can know."""
    name = "registration"
    file = keys_folder(site) / f"enrolment-{connection.key_id}.json"
    try:
        enrolment = Enrolment.from_json(file.read_text(encoding="utf-8"))
        enrolment.verify(server_key(connection))
        VerifyKey.from_text(enrolment.signing_key)
        same = node_public(site, connection.key_id) == enrolment.node_key
    except OSError:
        return warn(
            name,
            "the coordinator's answer to the enrolment is not here",
            "Keep keys/enrolment-N.json with the keys; ask the coordinator with `agssd-server "
            "sites` whether the site is listed.",
        )
    except AgssdError as error:
        return _of_error(name, error)
    if not same:
        return fail(
            name, "the coordinator admitted another node key", "Restore it, or enrol again."
        )
    return ok(
        name,
        f"key {enrolment.key_id} was admitted on {enrolment.admitted[:10]}; a later revocation "
        "shows only when the site connects",
    )


def check_journal(site: Path) -> Row:
    """Whether the signed journal holds; nothing leaves a site that cannot write it."""
    name = "journal"
    try:
        if not key_in_force(site):
            return ok(name, "has no entry yet")
        # By the enrolled key: one that the journal itself names would prove nothing.
        found = verify_journal(site, journal_key(site))
    except AgssdError as error:
        return _of_error(name, error)
    return ok(name, f"{found.head[0]} entries hold")


def check_policy(site: Path) -> Row:
    """Whether the owner's policy can be read."""
    name = "policy"
    if not (site / POLICY_FILE).exists():
        return warn(
            name,
            f"no {POLICY_FILE}; an enrolled site then goes by cautious values",
            "`agssd-site policy init` writes them for the site's owner to decide on.",
        )
    try:
        Guard(site).leaves()
    except OrderRefusedError:
        return fail(
            name,
            f"{POLICY_FILE} cannot be read, so every order is refused",
            "`agssd-site policy check` says what is wrong.",
        )
    return ok(name, f"{POLICY_FILE} is in force")


def _of_error(name: str, error: AgssdError) -> Row:
    """One of our own errors is (fact, remedy), in sentences."""
    fact, _, remedy = str(error).partition(". ")
    if isinstance(error, KeyFileError) and not remedy:
        remedy = "Restore it from the backup, or enrol again."
    return fail(name, fact.rstrip("."), remedy)

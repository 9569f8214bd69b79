"""Hand the site its own copy of a final checkpoint, with everything about it checked again."""

from dataclasses import dataclass
from pathlib import Path

from agssd_core.config import Cohort
from agssd_core.delivery import Certificate
from agssd_core.errors import CheckpointError
from agssd_core.journal import Fact
from client.connection import load_connection, server_key
from client.delivered import (
    Delivered,
    held,
    read_file,
    require_newer,
    require_replaceable,
    store,
    write_checkpoint,
)
from client.site_journal import SiteJournal


@dataclass(frozen=True)
class Fetched:
    """A checkpoint that holds; ``folder`` is the site's own copy, or the one that was asked for."""

    certificate: Certificate
    folder: Path


def fetch_checkpoint(
    what: str, site: Path, *, out: Path | None = None, cohort: Cohort | None = None
) -> Fetched:
    """Verify a delivered checkpoint, and write it to a folder for export and fine-tuning.

    Args:
        what: name or id of a run whose final checkpoint came to the site, or a file that the
            coordinator made with ``agssd-server deliver``, which is taken in first.
        site: the enrolled site's folder; only its pinned coordinator key is believed.
        out: a new folder, or one that holds a checkpoint, which is replaced.
        cohort: where runs of both cohorts have one name.

    Raises:
        KeyFileError: the site is not enrolled.
        SignatureError: it is unsigned, altered, or another coordinator's.
        CheckpointError: nothing of that name is held, or digests do not hold.
        OrderRefusedError: the file is older than what is held, or contradicts it.
        JournalError: it cannot be noted; nothing is handed out then.
    """
    key = server_key(load_connection(site))
    if Path(what).is_file():
        signed, weights = read_file(Path(what), key)
        if require_newer(site, signed.certificate):
            folder = store(site, signed, weights)
            _note(site, "delivery", "held", signed.certificate)
        else:
            run = signed.certificate.run
            folder = next(one.folder for one in held(site) if one.certificate.run == run)
    else:
        found = _named(held(site), what, cohort)
        signed, weights, folder = found.signed, found.read(key), found.folder
    if out is not None:
        require_replaceable(out)
        _note(site, "export", "checkpoint fetched", signed.certificate)
        write_checkpoint(out, signed, weights)
        folder = out
    return Fetched(signed.certificate, folder)


def _note(site: Path, kind: str, event: str, said: Certificate) -> None:
    journal = SiteJournal.of(site)
    if journal is not None:
        facts: dict[str, Fact] = {"run": said.run, "cohort": said.cohort, "round": said.round}
        journal.append(kind, {"event": event, **facts, "weights": said.weights_digest})


def _named(own: list[Delivered], what: str, cohort: Cohort | None) -> Delivered:
    meant = [
        each
        for each in own
        if what in (each.certificate.run, each.certificate.name)
        and cohort in (None, each.certificate.cohort)
    ]
    if len(meant) == 1:
        return meant[0]
    listed = "; ".join(
        f"{c.name} ({c.run}, {c.cohort}, round {c.round})"
        for c in (each.certificate for each in own)
    )
    if meant:
        raise CheckpointError(
            f"{len(meant)} delivered checkpoints have that name: {listed}. Name one by its id, or "
            "with --cohort."
        )
    raise CheckpointError(
        f"no final checkpoint of that run was delivered; the site holds: {listed or 'none'}. It "
        "comes when the last round is over and `agssd-site run` is on line; or ask the coordinator "
        "for a file (`agssd-server deliver RUN --out FILE`) and name that."
    )

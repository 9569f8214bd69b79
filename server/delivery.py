"""The final checkpoint goes out: signed once, brought to every site, or written to a file.

It travels when the last round is over, to the sites that are on line then or come on line within
``federation.delivery_s``. Receipts are kept beside the checkpoints: a server that is started again
on a complete run brings it to the sites that have given none.
"""

import json
import logging
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agssd_core.config import RunConfig, config_from_json, dump_config
from agssd_core.delivery import Certificate, FinalOrder
from agssd_core.envelope import (
    SealedFinal,
    SealedReceipt,
    SealedRefusal,
    sign,
    sizes_of,
    verify,
)
from agssd_core.errors import AgssdError, CheckpointError, SignatureError
from agssd_core.protocol import PROTOCOL_VERSION
from agssd_core.signing import SigningKey
from agssd_core.weights import save_weights, write_text
from server import wire
from server.collect import push
from server.control import state_of
from server.discovery import MAX_HELLO_BYTES, Enrolment
from server.downlink import Downlink
from server.keys import Keys
from server.loop import RoundLoop
from server.manifest import Checkpoint
from server.refusals import plain_reason, reason_of
from server.site_config import site_config
from server.store import RunStore

log = logging.getLogger(__name__)

DELIVERIES_FILE = "deliveries.json"
LOOK_AGAIN_S = 5.0
RESENDS = 1


@dataclass(frozen=True)
class Certified:
    """A checkpoint's certificate and the coordinator's signature over it."""

    certificate: Certificate
    signature: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: RunConfig, key: SigningKey) -> "Certified":
        """Sign a checkpoint of a run with this configuration."""
        manifest = checkpoint.manifest
        certificate = Certificate(
            protocol=PROTOCOL_VERSION,
            run=manifest.run,
            name=config.name,
            cohort=manifest.cohort,
            round=manifest.round,
            rounds=config.federation.rounds,
            config=dump_config(site_config(config)),
            weights_digest=manifest.weights_digest,
            schema_digest=manifest.schema_digest,
        )
        return cls(certificate, sign(certificate, key))


def deliver_final(loop: RoundLoop, checkpoint: Checkpoint) -> None:
    """Bring the last checkpoint to every site of the run that has not said that it holds it.

    A site that refuses or fails costs nobody else anything. An unsigned run delivers nothing.

    Raises:
        JournalError: the coordinator's journal is damaged or cannot be written.
    """
    if loop.keys is not None:
        loop.board.enter("delivering")
        _Delivery(loop, loop.keys, checkpoint).run()


def write_delivery(store: RunStore, key: SigningKey, out: Path) -> Certificate:
    """Write a run's newest checkpoint to one signed file, for a site that was away.

    Raises:
        CheckpointError: the run has no checkpoint, or the newest is damaged.
        WeightsError: the file cannot be written; nothing is left behind.
    """
    checkpoint = store.latest(strict=True)
    if checkpoint is None:
        raise CheckpointError(
            "the folder holds no checkpoint. Name a run's folder, such as runs/lung."
        )
    certified = Certified.of(checkpoint, config_from_json(checkpoint.manifest.config), key)
    text = json.dumps(asdict(certified.certificate), sort_keys=True)
    said = {"certificate": text, "signature": certified.signature}
    save_weights(out, checkpoint.weights, metadata=said)
    return certified.certificate


def receipts(folder: Path) -> dict[str, dict[str, Any]]:
    """Site -> what became of its final checkpoint; empty when the file is missing or damaged."""
    try:
        content = json.loads((folder / DELIVERIES_FILE).read_text(encoding="utf-8"))
        return {str(site): dict(said) for site, said in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def undelivered(folder: Path, checkpoint: Checkpoint, sites: Mapping[str, int]) -> list[str]:
    """Sites that have not signed for this very checkpoint."""
    digest, told = checkpoint.manifest.weights_digest, receipts(folder)
    return [site for site in sorted(sites) if told.get(site, {}).get("held") != digest]


def sites_without(store: RunStore, active: Collection[str]) -> list[str]:
    """Sites of a complete run, enrolled now, that may still take its final checkpoint."""
    checkpoint = store.latest()
    counts = Enrolment.open(store.folder).patient_counts()
    own = {site: count for site, count in counts.items() if site in active}
    return [] if checkpoint is None else undelivered(store.folder, checkpoint, own)


@dataclass(frozen=True)
class _Sent:
    order: FinalOrder
    node: int
    expires: float
    tries: int


@dataclass
class _Delivery:
    """One checkpoint's way to the sites."""

    loop: RoundLoop
    keys: Keys
    checkpoint: Checkpoint
    _under_way: dict[str, _Sent] = field(default_factory=dict)
    _over: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Until every site has it or has refused, or nobody more comes within the time."""
        loop, federation = self.loop, self.loop.config.federation
        self._downlink = Downlink(self.checkpoint)
        self._certified = Certified.of(self.checkpoint, loop.config, self.keys.own)
        look = loop.clock()
        self._end = look + federation.delivery_s
        while state_of(loop.store.folder) != "stop":
            if loop.clock() >= look:
                look = loop.clock() + LOOK_AGAIN_S
                self._order_those_on_line()
            self._look_at_replies()
            if not self._under_way and (not self._open() or loop.clock() >= self._end):
                return
            loop.sleep(min(federation.poll_s, 1.0))

    def _open(self) -> set[str]:
        """Sites that may still take it: those of the run that are enrolled now."""
        counts = self.loop.book.enrolment.patient_counts()
        wanted = set(undelivered(self.loop.store.folder, self.checkpoint, counts)) - self._over
        members = self.loop.book.members
        if members is None:
            return wanted
        cohort = self.loop.config.federation.cohort
        return {site for site in wanted if members.patients(site, cohort) > 0}

    def _order_those_on_line(self) -> None:
        nodes = self.loop.book.refresh(wanted=0)
        self.loop.board.online(nodes)
        busy = {sent.order.site for sent in self._under_way.values()}
        for site in sorted(self._open() & nodes.keys() - busy):
            self._order(site, nodes[site], tries=0)

    def _order(self, site: str, node: int, *, tries: int) -> None:
        loop, said = self.loop, self._certified.certificate
        parcel = self._downlink.parcel(loop.book.held.get(site, "") if tries == 0 else "")
        order = FinalOrder(
            protocol=PROTOCOL_VERSION,
            run=said.run,
            cohort=said.cohort,
            round=said.round,
            weights_digest=said.weights_digest,
            nonce=secrets.token_hex(16),
            site=site,
            certificate=asdict(said),
            certificate_signature=self._certified.signature,
            wire=parcel.wire,
            previous_digest=parcel.previous_digest,
            payload_digests=parcel.digests,
            payload_sizes=sizes_of(parcel.payload),
            journal="" if loop.chronicle is None else loop.chronicle.head(),
        )
        sealed = SealedFinal(order, parcel.payload, sign(order, self.keys.own))
        deadline = loop.config.federation.deadline_s
        message = wire.encode_final(sealed, node=node, ttl_s=deadline)
        if loop.chronicle is not None:
            loop.chronicle.delivering(order, size=wire.size_of(message))
        identifier = push(loop.grid, message)
        if identifier is not None:
            expires = loop.clock() + deadline
            self._under_way[identifier] = _Sent(order, node, expires, tries)
        elif loop.clock() >= self._end:
            self._close(order, "unreachable")

    def _look_at_replies(self) -> None:
        for identifier, sent in list(self._under_way.items()):
            message = self.loop.puller.poll(identifier, MAX_HELLO_BYTES)
            late = self.loop.clock() >= sent.expires
            if message is None and not late:
                continue
            del self._under_way[identifier]
            reason = self._reason(sent.order, message) if message is not None else "no-reply"
            if reason == "lost" and self.loop.clock() < self._end:
                continue  # at the next look, by the node that is on line then
            if reason == "declined-base" and sent.tries < RESENDS:
                node = self.loop.book.nodes.get(sent.order.site, sent.node)
                self._order(sent.order.site, node, tries=sent.tries + 1)
            else:
                self._close(sent.order, reason)

    def _reason(self, order: FinalOrder, message: Any) -> str:
        """Empty for a receipt of the site that was asked; otherwise the class of reason."""
        site, keys = order.site, self.keys.sites.get(order.site, ())
        try:
            reply = wire.decode_reply(message, max_bytes=MAX_HELLO_BYTES)
            if isinstance(reply, SealedReceipt):
                verify(reply.receipt, reply.signature, keys)
                said = reply.receipt
                named = (said.site, said.run, said.cohort, said.round, said.weights_digest)
                wanted = (site, order.run, order.cohort, order.round, order.weights_digest)
                return "" if (*named, said.nonce) == (*wanted, order.nonce) else "nonce"
            if isinstance(reply, SealedRefusal):
                verify(reply.refusal, reply.signature, keys)
                same = reply.refusal.nonce == order.nonce
                return f"declined-{plain_reason(reply.refusal.reason)}" if same else "nonce"
        except SignatureError as error:
            log.warning("site '%s': %s", site, error)
            return "signature"
        except AgssdError as error:
            log.warning("site '%s': unusable reply (%s)", site, error)
            return reason_of(error)
        if isinstance(reply, wire.Fault):
            log.warning("site '%s': %s", site, reply.text)
            return reply.reason
        return "malformed"

    def _close(self, order: FinalOrder, reason: str) -> None:
        """Note what became of a site's delivery."""
        loop, site = self.loop, order.site
        self._over.add(site)
        told = receipts(loop.store.folder)
        told[site] = {"held": order.weights_digest, "round": order.round}
        if reason:
            log.warning("%s: final checkpoint not taken by %s (%s)", order.cohort, site, reason)
            told[site] = {"held": "", "round": order.round, "reason": reason}
            if loop.chronicle is not None:
                loop.chronicle.refused(
                    run=order.run,
                    cohort=order.cohort,
                    number=order.round,
                    site=site,
                    reason=reason,
                )
        elif loop.chronicle is not None:
            loop.chronicle.delivered(order)
        text = json.dumps(dict(sorted(told.items())), indent=1, sort_keys=True) + "\n"
        write_text(loop.store.folder / DELIVERIES_FILE, text)

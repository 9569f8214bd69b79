"""One round's orders and replies: who was asked, what came back, what became of it."""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agssd_core.envelope import SealedOrder, SealedRefusal, SealedUpdate, sign, sizes_of
from agssd_core.errors import (
    AgssdError,
    UpdateRejectedError,
)
from agssd_core.protocol import PROTOCOL_VERSION, RoundOrder, SiteUpdate, uplink_groups
from agssd_core.weights import schema_digest, schema_of
from server import wire
from server.admission import AdmissionRules, admit
from server.collect import collect, online_nodes, push
from server.downlink import Downlink
from server.envelope import open_update, require_own_refusal
from server.loop import LateOrder, RoundLoop
from server.manifest import Checkpoint
from server.refusals import plain_reason, reason_of
from server.spool import RoundSpool
from server.statements import ledger_head, note_statement

log = logging.getLogger(__name__)

RESENDS = 1
LATE_DEADLINES = 4.0
RETURN_S = 15.0
"""How long a round that waits for nobody else waits for a site whose connection was lost."""
_RESENT = ("lost", "declined-base")


@dataclass(frozen=True)
class Sent:
    """An order under way; an answer is awaited until ``due``, also when it was sent again."""

    site: str
    node: int
    nonce: str
    pushed: float
    tries: int
    due: float


@dataclass
class RoundExchange:
    """The orders of one round.

    Attributes:
        spool: admitted updates; what a killed server had admitted is not ordered again.
        config: canonical JSON that the orders carry.
        refusals: site -> class of reason, in the order in which it happened.
    """

    loop: RoundLoop
    base: Checkpoint
    spool: RoundSpool
    config: str
    enrolled: Mapping[str, int]
    refusals: dict[str, str] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    _nonces: dict[str, str] = field(default_factory=dict)
    _sent: dict[str, Sent] = field(default_factory=dict)
    _returning: dict[str, tuple[Sent, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        federation, manifest = self.loop.config.federation, self.base.manifest
        self.rules = AdmissionRules(
            base=self.base.weights,
            groups=uplink_groups(federation.merge.teacher_rule),
            run=manifest.run,
            cohort=federation.cohort,
            round=self.base.round,
            steps=federation.steps_per_round,
            base_digest=manifest.weights_digest,
            nonces=self._nonces,
            enrolled=self.enrolled,
            max_update_norm=federation.max_update_norm,
            wire=federation.wire,
            keys=None if self.loop.keys is None else self.loop.keys.sites,
        )
        self.spool.keep_only(
            run=manifest.run, round_index=self.base.round, base_digest=manifest.weights_digest
        )
        self._downlink = Downlink(self.base)
        self._schema_digest = schema_digest(schema_of(self.base.weights))

    def run(self, nodes: Mapping[str, int]) -> None:
        """Order the round of these sites and take what they answer until their deadlines."""
        loop, wanted = self.loop, dict[str, float]()
        for site in sorted(nodes.keys() - set(self.spool.sites())):
            self._order(site, nodes[site], wanted)
        arrivals = collect(
            wanted,
            loop.puller,
            max_bytes=reply_cap(self.rules),
            poll_s=loop.config.federation.poll_s,
            clock=loop.clock,
            sleep=loop.sleep,
            between=lambda: self._look_for_returning(wanted),
        )
        for identifier, reply in arrivals:
            sent = self._sent.pop(identifier)
            reason = self._take(sent, reply)
            if reason in _RESENT and sent.tries < RESENDS and loop.clock() < sent.due:
                if reason == "lost":
                    self._returning[sent.site] = (sent, loop.clock() + RETURN_S)
                else:
                    self._order(sent.site, sent.node, wanted, before=sent)
            elif reason:
                self.refuse(sent.site, reason)
        self._leave_late()

    def _look_for_returning(self, wanted: dict[str, float]) -> bool:
        """Order again the sites that were lost and are on line; whether others may come back.

        A site may come back as long as the round waits for anybody else.
        """
        if not self._returning:
            return False
        online, now = online_nodes(self.loop.grid) or set(), self.loop.clock()
        for site, (sent, until) in list(self._returning.items()):
            over = now >= sent.due or (now >= until and not wanted)
            if sent.node in online or over:
                del self._returning[site]
            if sent.node in online and now < sent.due:
                self._order(site, sent.node, wanted, before=sent)
            elif over:
                self.refuse(site, "lost")
        return bool(self._returning)

    def _order(
        self, site: str, node: int, wanted: dict[str, float], *, before: Sent | None = None
    ) -> None:
        """Send an order; one that is sent again leaves the round's end where it was."""
        federation = self.loop.config.federation
        tries = 0 if before is None else before.tries + 1
        # A site that could not use what it got is sent the weights whole.
        sealed = self._sealed(site, held=self.loop.book.held.get(site, "") if tries == 0 else "")
        message = wire.encode_order(sealed, node=node, ttl_s=federation.deadline_s * LATE_DEADLINES)
        size = wire.size_of(message)
        if self.loop.chronicle is not None:
            self.loop.chronicle.ordered(sealed.order, size=size)
        identifier = push(self.loop.grid, message)
        if identifier is None:
            self.refuse(site, "unreachable")
            return
        now = self.loop.clock()
        nonce = self._nonces[site] = sealed.order.nonce
        self.bytes_down[site] = self.bytes_down.get(site, 0) + size
        due = now + federation.deadline_s if before is None else before.due
        self._sent[identifier] = Sent(site, node, nonce, now, tries, due)
        wanted[identifier] = due
        self.loop.board.ordered(site, size=size)

    def _sealed(self, site: str, *, held: str) -> SealedOrder:
        """The order of a site that holds a base of this digest, with its weights, signed."""
        federation, keys = self.loop.config.federation, self.loop.keys
        parcel = self._downlink.parcel(held)
        order = RoundOrder(
            protocol=PROTOCOL_VERSION,
            run=self.rules.run,
            cohort=self.rules.cohort,
            round=self.base.round,
            steps=federation.steps_per_round,
            first_step=self.base.round * federation.steps_per_round,
            total_steps=federation.total_steps,
            config=self.config,
            base_digest=self.rules.base_digest,
            nonce=secrets.token_hex(16),
            site=site,
            wire=parcel.wire,
            previous_digest=parcel.previous_digest,
            schema_digest=self._schema_digest,
            payload_digests=parcel.digests,
            payload_sizes=sizes_of(parcel.payload),
            journal="" if self.loop.chronicle is None else self.loop.chronicle.head(),
            ledger=ledger_head(self.loop.store.folder, site),
        )
        return SealedOrder(order, parcel.payload, sign(order, None if keys is None else keys.own))

    def refuse(self, site: str, reason: str) -> None:
        """Note that a site's round is lost, for a class of reason."""
        self.refusals[site] = reason
        self.loop.board.refused(site, reason)
        if self.loop.chronicle is not None:
            self.loop.chronicle.refused(
                run=self.rules.run,
                cohort=self.rules.cohort,
                number=self.base.round,
                site=site,
                reason=reason,
            )

    def _take(self, sent: Sent, message: Any) -> str:
        """Spool an admitted update; otherwise the class of reason."""
        update, reason = read_update(message, self.rules, asked=sent.site)
        if update is None:
            return reason
        if (chronicle := self.loop.chronicle) is not None:
            try:
                chronicle.require_head(update.header)
            except UpdateRejectedError as error:
                log.warning("%s", error)
                return error.reason
            chronicle.admitted(update.header, size=wire.size_of(message))
        note = {
            "bytes_up": float(wire.size_of(message)),
            "bytes_down": float(self.bytes_down[sent.site]),
            "seconds": self.loop.clock() - sent.pushed,
        }
        note_statement(self.loop.store.folder, update.header)
        self.spool.add(update, note=note)
        self.loop.board.admitted(sent.site, size=int(note["bytes_up"]))
        if self.rules.wire != "float32":  # a site keeps the base of what it answered
            self.loop.book.held[sent.site] = self.rules.base_digest
        log.info("%s round %d: %s admitted", self.rules.cohort, self.base.round, sent.site)
        return ""

    def _leave_late(self) -> None:
        """Orders without a reply: the site is refused this round, its reply awaited a while."""
        federation = self.loop.config.federation
        for identifier, sent in self._sent.items():
            self.refuse(sent.site, "no-reply")
            where = f"{self.rules.cohort} round {self.base.round}"
            log.warning("%s: no reply from %s in time", where, sent.site)
            expires = sent.pushed + federation.deadline_s * LATE_DEADLINES
            order = LateOrder(sent.site, self.base.round, sent.nonce, expires)
            self.loop.late[identifier] = order
        self._sent.clear()


def reply_cap(rules: AdmissionRules) -> int:
    """Bytes of a reply's arrays above which they are not even fetched.

    It is wider than what is admitted, so that an update of another form is told by its name.
    """
    return 2 * rules.payload_cap()


def read_update(
    message: Any, rules: AdmissionRules, *, asked: str
) -> tuple[SiteUpdate | None, str]:
    """The admitted update of the site that was asked, or None and the class of reason."""
    try:
        reply = wire.decode_reply(message, max_bytes=reply_cap(rules))
        if isinstance(reply, SealedUpdate):
            return admit(open_update(reply, rules, asked=asked), rules), ""
        if isinstance(reply, SealedRefusal):
            require_own_refusal(reply, rules, asked=asked)
    except UpdateRejectedError as error:
        log.warning("%s", error)
        return None, error.reason
    except AgssdError as error:
        log.warning("site '%s': unusable reply (%s)", asked, error)
        return None, reason_of(error)
    if isinstance(reply, SealedRefusal):
        reason = plain_reason(reply.refusal.reason)
        log.warning("site '%s' declined: %s", asked, reason)
        return None, f"declined-{reason}"
    if isinstance(reply, wire.Fault):
        log.warning("site '%s': %s", asked, reply.text)
        return None, reply.reason
    return None, "malformed"

"""One round's orders and replies: who was asked, what came back, what became of it."""

import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agssd_core.errors import AgssdError, UpdateRejectedError
from agssd_core.protocol import PROTOCOL_VERSION, Refusal, RoundOrder, SiteUpdate, uplink_groups
from server import wire
from server.admission import AdmissionRules, admit
from server.collect import collect, push
from server.loop import LateOrder, RoundLoop
from server.manifest import Checkpoint
from server.spool import RoundSpool

log = logging.getLogger(__name__)

RESENDS = 1
LATE_DEADLINES = 4.0
_RESENT = ("lost", "declined-base")


@dataclass(frozen=True)
class Sent:
    """An order under way."""

    site: str
    node: int
    nonce: str
    pushed: float
    tries: int


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
        )
        self.spool.keep_only(
            run=manifest.run, round_index=self.base.round, base_digest=manifest.weights_digest
        )
        self._packed = wire.pack_base(self.base.weights)

    def run(self, nodes: Mapping[str, int]) -> None:
        """Order the round of these sites and take what they answer until their deadlines."""
        loop, wanted = self.loop, dict[str, float]()
        for site in sorted(nodes.keys() - set(self.spool.sites())):
            self._order(site, nodes[site], wanted, tries=0)
        arrivals = collect(
            wanted,
            loop.puller,
            poll_s=loop.config.federation.poll_s,
            clock=loop.clock,
            sleep=loop.sleep,
        )
        for identifier, reply in arrivals:
            sent = self._sent.pop(identifier)
            reason = self._take(sent, reply)
            if reason in _RESENT and sent.tries < RESENDS:
                self._order(sent.site, sent.node, wanted, tries=sent.tries + 1)
            elif reason:
                self._refuse(sent.site, reason)
        self._leave_late()

    def _order(self, site: str, node: int, wanted: dict[str, float], *, tries: int) -> None:
        federation = self.loop.config.federation
        nonce = secrets.token_hex(16)
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
            nonce=nonce,
        )
        ttl_s = federation.deadline_s * LATE_DEADLINES
        message = wire.encode_order(order, self._packed, node=node, ttl_s=ttl_s)
        identifier = push(self.loop.grid, message)
        if identifier is None:
            self._refuse(site, "unreachable")
            return
        now = self.loop.clock()
        self._nonces[site] = nonce
        self.bytes_down[site] = self.bytes_down.get(site, 0) + self._packed.size + len(self.config)
        self._sent[identifier] = Sent(site, node, nonce, now, tries)
        self.loop.board.ordered(site, size=self._packed.size + len(self.config))
        wanted[identifier] = now + federation.deadline_s

    def _refuse(self, site: str, reason: str) -> None:
        self.refusals[site] = reason
        self.loop.board.refused(site, reason)

    def _take(self, sent: Sent, message: Any) -> str:
        """Spool an admitted update; otherwise the class of reason."""
        update, reason = read_update(message, self.rules, asked=sent.site)
        if update is None:
            return reason
        note = {
            "bytes_up": float(wire.size_of(message)),
            "bytes_down": float(self.bytes_down[sent.site]),
            "seconds": self.loop.clock() - sent.pushed,
        }
        self.spool.add(update, note=note)
        self.loop.board.admitted(sent.site, size=int(note["bytes_up"]))
        log.info("%s round %d: %s admitted", self.rules.cohort, self.base.round, sent.site)
        return ""

    def _leave_late(self) -> None:
        """Orders without a reply: the site is refused this round, its reply awaited a while."""
        federation = self.loop.config.federation
        for identifier, sent in self._sent.items():
            self._refuse(sent.site, "no-reply")
            where = f"{self.rules.cohort} round {self.base.round}"
            log.warning("%s: no reply from %s in time", where, sent.site)
            expires = sent.pushed + federation.deadline_s * LATE_DEADLINES
            order = LateOrder(sent.site, self.base.round, sent.nonce, expires)
            self.loop.late[identifier] = order
        self._sent.clear()


def read_update(
    message: Any, rules: AdmissionRules, *, asked: str
) -> tuple[SiteUpdate | None, str]:
    """The admitted update of the site that was asked, or None and the class of reason."""
    try:
        reply = wire.decode_reply(message, max_bytes=2 * rules.byte_cap())
        if isinstance(reply, SiteUpdate):
            if reply.header.site != asked:
                raise UpdateRejectedError(
                    f"site '{asked}': its reply bears another site's name. The round goes on "
                    "without this site.",
                    site=asked,
                    reason="site",
                )
            return admit(reply, rules), ""
    except UpdateRejectedError as error:
        log.warning("%s", error)
        return None, error.reason
    except wire.OversizeError as error:
        log.warning("site '%s': %s", asked, error)
        return None, "size"
    except AgssdError as error:
        log.warning("site '%s': malformed reply (%s)", asked, error)
        return None, "malformed"
    if isinstance(reply, Refusal):
        log.warning("site '%s' declined: %s", asked, _plain(reply.reason))
        return None, f"declined-{_plain(reply.reason)}"
    if isinstance(reply, wire.Fault):
        log.warning("site '%s': %s", asked, reply.text)
        return None, "site-error" if reply.at_site else "lost"
    return None, "malformed"


def _plain(text: str) -> str:
    """A class of reason from outside, fit for a log line and a file."""
    return text if re.fullmatch(r"[a-z0-9-]{1,40}", text) else "unknown"

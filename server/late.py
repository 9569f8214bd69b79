"""Late replies: journalled and discarded, or merged as differences to their own base (T2)."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from agssd_core.errors import CheckpointError
from server.admission import AdmissionRules
from server.exchange import read_update, reply_cap
from server.loop import LateOrder, RoundLoop
from server.merge import StaleUpdate
from server.spool import RoundSpool
from server.statements import note_statement
from server.store import RunStore

log = logging.getLogger(__name__)


@dataclass
class LateReplies:
    """Late replies that arrived during one round.

    Attributes:
        arrived: (site, round of its order, ``late`` or the class of reason for its refusal).
        stale: updates to merge, by site; empty under ``late = discard``.
        factors: decay ** age of each of them.
    """

    arrived: list[tuple[str, int, str]] = field(default_factory=list)
    stale: dict[str, StaleUpdate] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)


def take_late(
    loop: RoundLoop, found: LateReplies, *, rules: AdmissionRules, fresh: Collection[str]
) -> None:
    """Look at every order whose deadline is over; expired ones are forgotten.

    Args:
        loop: the run's, with the orders that are late.
        found: where to put what arrived.
        rules: those of the round under way.
        fresh: sites with an update of this very round; their late ones are not needed.
    """
    for identifier, order in list(loop.late.items()):
        message = loop.puller.poll(identifier, reply_cap(rules))
        if message is None:
            if loop.clock() >= order.expires:
                del loop.late[identifier]
            continue
        del loop.late[identifier]
        cohort = loop.config.federation.cohort
        log.warning("%s: reply of %s to round %d came late", cohort, order.site, order.round)
        usable = order.site not in fresh and order.site not in found.stale
        reason = _stale(loop, found, order, message, rules) if usable else "late"
        found.arrived.append((order.site, order.round, reason))


def clear_late(store: RunStore) -> None:
    """Remove the arrays of late updates once a round is saved."""
    for folder in store.folder.glob("late-*"):
        RoundSpool(folder).clear()


def _stale(
    loop: RoundLoop, found: LateReplies, order: LateOrder, message: Any, rules: AdmissionRules
) -> str:
    """Prepare a late update for merging; the class of reason that its row will bear."""
    federation = loop.config.federation
    factor = federation.stale_decay ** (rules.round - order.round)
    if federation.late == "discard" or factor == 0:
        return "late"
    try:
        base = loop.store.load(order.round)
        reader = loop.store.reader(order.round)
    except CheckpointError:
        log.warning("the base of round %d is no longer kept", order.round)
        return "late"
    own = replace(
        rules,
        base=base.weights,
        base_digest=base.manifest.weights_digest,
        round=order.round,
        nonces={order.site: order.nonce},
    )
    update, reason = read_update(message, own, asked=order.site)
    if update is None:
        return f"late-{reason}"
    note_statement(loop.store.folder, update.header)
    spool = RoundSpool(loop.store.folder / f"late-{order.round:04d}")
    spool.add(update)
    site = order.site
    found.stale[site] = StaleUpdate(lambda name: spool.read(site, name), reader)
    found.factors[site] = factor
    return "late-merged"

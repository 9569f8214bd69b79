"""The rounds of a run: discover, sample, order, collect, admit, merge, save.

Every source of time is an argument, and everything random comes from (seed, round, cohort), so
two runs agree bit for bit and a killed run ends with the weights of one that was not.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np

from agssd_core.config import FederationConfig, RunConfig, dump_config
from agssd_core.errors import CheckpointError, RoundError
from server.central_accounts import reserve
from server.chronicle import Chronicle
from server.collect import Exchange, InlinePuller, Puller, ThreadedPuller
from server.control import may_go_on
from server.delivery import deliver_final
from server.discovery import Enrolment, SiteBook
from server.downlink import next_base, rule_state
from server.exchange import RoundExchange
from server.keys import Keys
from server.late import LateReplies, clear_late, take_late
from server.live import LiveBoard
from server.loop import RoundLoop
from server.manifest import Checkpoint, RoundRecord
from server.members import Members
from server.merge import MergeResult, MergeState, merge_round, site_weights
from server.outcome import RoundOutcome, round_rows
from server.site_config import site_config
from server.spool import RoundSpool
from server.statements import told
from server.store import RunStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    run: str
    rounds: int
    merged_rounds: int
    weights_digest: str


class How(TypedDict, total=False):
    """How a run reaches its sites; all may be left out.

    Attributes:
        clock: seconds, rising; with ``sleep`` the only source of time.
        sleep: waits a number of seconds of that clock.
        threads: pull each message in its own thread; False for grids that answer at once.
        keys: of a signed run; None is an unsigned one.
        members: enrolled sites, whose names and counts alone are believed; None believes what a
            node says of itself.
        chronicle: the coordinator's journal; None writes none.
    """

    clock: Callable[[], float]
    sleep: Callable[[float], None]
    threads: bool
    keys: Keys | None
    members: Members | None
    chronicle: Chronicle | None


def run_rounds(
    grid: Exchange,
    config: RunConfig,
    store: RunStore,
    *,
    on_round: Callable[[RoundOutcome], None] | None = None,
    **how: Unpack[How],
) -> RunSummary:
    """Run all rounds that the newest checkpoint does not hold yet.

    Args:
        grid: Flower's, or the in-process one.
        config: the cohort's own configuration.
        store: the cohort's folder, with at least the round-0 checkpoint.
        on_round: told of every closed round.
        how: time, threads and keys.

    Raises:
        CheckpointError: the run has no checkpoint, or was started with another configuration.
    """
    rounds = each_round(grid, config, store, **how)
    with closing(rounds):
        while True:
            try:
                outcome = next(rounds)
            except StopIteration as end:
                summary: RunSummary = end.value
                return summary
            if on_round is not None:
                on_round(outcome)


def each_round(
    grid: Exchange,
    config: RunConfig,
    store: RunStore,
    **how: Unpack[How],
) -> Generator[RoundOutcome, None, RunSummary]:
    """The rounds of ``run_rounds``, one at each ``next``; the store stays locked between them."""
    clock, sleep = how.get("clock", time.monotonic), how.get("sleep", time.sleep)
    with store.writing():
        checkpoint = store.resume(dump_config(config))
        if checkpoint is None:
            raise CheckpointError(
                "the run has no round-0 checkpoint. Write one with `agssd-sim init CONFIG`."
            )
        puller: Puller = (
            ThreadedPuller(grid, clock) if how.get("threads", True) else InlinePuller(grid)
        )
        enrolment = Enrolment.open(store.folder)
        book = SiteBook(
            grid,
            puller,
            config.federation,
            enrolment,
            clock,
            sleep,
            how.get("members"),
            how.get("keys"),
        )
        board = LiveBoard(
            store.folder, cohort=config.federation.cohort, rounds=config.federation.rounds
        )
        loop = RoundLoop(config, store, grid, puller, book, clock, sleep, board)
        loop.keys, loop.chronicle = how.get("keys"), how.get("chronicle")
        wanted = max(config.federation.expected_sites, config.federation.min_sites)
        for number in range(checkpoint.round, config.federation.rounds):
            if not may_go_on(loop):
                break
            outcome = _run_round(loop, checkpoint, wanted=wanted)
            checkpoint = store.load(number + 1)
            wanted = config.federation.min_sites
            yield outcome
        else:
            deliver_final(loop, checkpoint)
            board.enter("complete")
        merges = [row for row in store.metrics.rows() if row.get("kind") == "merge"]
    return RunSummary(
        run=checkpoint.manifest.run,
        rounds=checkpoint.round,
        merged_rounds=sum(int(row["metrics"].get("merged", 0)) for row in merges),
        weights_digest=checkpoint.manifest.weights_digest,
    )


def sample_sites(
    names: Mapping[str, int], federation: FederationConfig, *, seed: int, number: int
) -> tuple[str, ...]:
    """Draw a round's sites from sorted names, by a generator seeded by (seed, round, cohort)."""
    ordered = sorted(names)
    wanted = federation.sites_per_round or len(ordered)
    if wanted >= len(ordered):
        return tuple(ordered)
    text = f"sample/{seed}/{number}/{federation.cohort}"
    digest = hashlib.sha256(text.encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    chosen = rng.choice(len(ordered), size=wanted, replace=False)
    return tuple(ordered[index] for index in sorted(chosen))


def _run_round(loop: RoundLoop, base: Checkpoint, *, wanted: int) -> RoundOutcome:
    federation, began = loop.config.federation, loop.clock()
    loop.board.round = base.round
    loop.board.enter("discovering")
    nodes = dict(loop.book.refresh(wanted=wanted))
    loop.board.online(nodes)
    loop.board.enter("collecting")
    chosen = sample_sites(nodes, federation, seed=loop.config.seed, number=base.round)
    spool = RoundSpool(loop.store.folder / "spool")
    exchange = RoundExchange(
        loop=loop,
        base=base,
        spool=spool,
        config=dump_config(site_config(loop.config)),
        enrolled=loop.book.enrolment.patient_counts(),
    )
    late = LateReplies()
    take_late(loop, late, rules=exchange.rules, fresh=())
    for site, reason in loop.book.declined.items():
        exchange.refuse(site, reason)
    exchange.run({name: nodes[name] for name in chosen})
    take_late(loop, late, rules=exchange.rules, fresh=spool.sites())
    for site in spool.sites():
        late.stale.pop(site, None)
    loop.board.enter("merging")
    result = _merge(loop, base, exchange=exchange, late=late)
    seconds = loop.clock() - began
    outcome = RoundOutcome(
        cohort=federation.cohort,
        round=base.round,
        rounds=federation.rounds,
        merged=result is not None,
        sites=spool.sites(),
        refusals=dict(exchange.refusals),
        metrics={site: spool.header(site).metrics for site in spool.sites()},
        seconds=seconds,
    )
    # Rows first: a kill before the checkpoint leaves rows that the resumed run cuts.
    for row in round_rows(exchange, late, outcome=outcome, result=result):
        loop.store.metrics.append(row)
    _save(loop, base, exchange=exchange, result=result)
    spool.clear()
    clear_late(loop.store)
    log.info("%s round %d: %d site(s) merged", federation.cohort, base.round, len(outcome.sites))
    return outcome


def _merge(
    loop: RoundLoop, base: Checkpoint, *, exchange: RoundExchange, late: LateReplies
) -> MergeResult | None:
    """Merge what was admitted; None leaves the weights as they were."""
    config, spool = loop.config, exchange.spool
    federation = config.federation
    if len(spool.sites()) < federation.min_sites:
        log.warning(
            "%s round %d: %d of %d required sites usable; weights unchanged",
            federation.cohort,
            base.round,
            len(spool.sites()),
            federation.min_sites,
        )
        return None
    sites = [*spool.sites(), *late.stale]
    shares = site_weights(
        {site: exchange.enrolled[site] for site in sites},
        # Every site takes the same number of steps, so weighting by steps is uniform.
        weighting="patients" if federation.merge.weighting == "patients" else "uniform",
        cap=federation.merge.max_weight,
        decay={site: late.factors[site] for site in late.stale},
    )
    reserve(loop.store.folder, base, federation.merge, sites)
    steps = federation.steps_per_round
    try:
        return merge_round(
            base.weights,
            spool,
            merge=federation.merge,
            shares=shares,
            ema_product=config.teacher.momentum_product(
                base.round * steps, steps, federation.total_steps
            ),
            state=MergeState(rule_state(base.state)),
            stale=late.stale,
        )
    except RoundError as error:
        log.warning("%s round %d: %s", federation.cohort, base.round, error)
        return None


def _save(
    loop: RoundLoop, base: Checkpoint, *, exchange: RoundExchange, result: MergeResult | None
) -> None:
    shares = result.report.get("shares", {}) if result is not None else {}
    after = next_base(base, result, wire=loop.config.federation.wire)
    record = RoundRecord(
        run=base.manifest.run,
        round=base.round + 1,
        cohort=loop.config.federation.cohort,
        config=dump_config(loop.config),
        sites=tuple(shares),
        shares={site: float(share) for site, share in shares.items()},
        extra={
            **told(loop.store.folder, exchange.enrolled, exchange.refusals, base.manifest.extra),
            **after.extra,
        },
    )
    loop.store.save_round(record, after.weights, state=after.state)

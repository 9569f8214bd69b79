"""One site: answers orders by training, and remembers what it answered."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from agssd_core.config import Cohort, RunConfig
from agssd_core.config.node import name_problem
from agssd_core.differences import WIRES
from agssd_core.envelope import SealedHello, SealedOrder, SealedRefusal, SealedUpdate, sign
from agssd_core.errors import OrderRefusedError
from agssd_core.protocol import (
    PROTOCOL_VERSION,
    Refusal,
    RoundOrder,
    SiteHello,
    SiteQuery,
    version_problem,
)
from agssd_core.signing import SigningKey
from agssd_core.training.checkpoint import StateStamp
from agssd_core.weights import Weights, group, schema_of
from client.bases import KeptBase
from client.contracts import SiteFacts, Trainer, Workbench
from client.history import RoundNote, note_round
from client.identity import Identity, KeyPlace, key_place
from client.memory import LastRound, RunMemory
from client.objections import require_may_leave
from client.outbound import leaving, release
from client.policy import Guard, Recorder
from client.purse import Keeping, Purse, reason_of
from client.receive import checked, opened, plan_hash, require_envelope
from client.sending import packed, signed
from client.site_journal import SiteJournal
from client.start import Start, start_of_round

log = logging.getLogger(__name__)

COHORTS: tuple[Cohort, ...] = get_args(Cohort)


@dataclass
class _Warm:
    """A trainer kept between rounds, and what it is fit for."""

    trainer: Trainer
    run: str
    plan_hash: str
    round: int


@dataclass
class Site:
    """A site's folder and enrolled name, and a trainer a cohort while the process lives.

    Attributes:
        identity: keys of a signed connection; None believes and signs nothing.
        recorder: the site's journal; None at a site without a signing key.
    """

    folder: Path
    name: str
    workbench: Workbench
    identity: Identity | None = None
    recorder: Recorder | None = None
    ledger: Keeping = "site"
    _warm: dict[str, _Warm] = field(default_factory=dict, repr=False)

    @property
    def guard(self) -> Guard:
        """The policy of the site's owner."""
        return Guard(self.folder, self.recorder)

    def hello(self, query: SiteQuery) -> SealedHello:
        """Say who we are, signed with the question's nonce.

        Raises:
            OrderRefusedError: another protocol version, or no scan for the cohort.
        """
        facts = self._facts(query.protocol, query.cohort)
        hello = SiteHello(
            protocol=PROTOCOL_VERSION,
            site=self.name,
            cohort=query.cohort,
            patient_count=facts.patient_count,
            volume_count=facts.volume_count,
            software=version("agssd-federation"),
            wires=" ".join(WIRES),
            held=KeptBase.of(self.folder, query.cohort).digest(),
            nonce=query.nonce,
        )
        return SealedHello(hello, sign(hello, self._key))

    def answer(self, sealed: SealedOrder) -> SealedUpdate:
        """Open an order as it came, and carry it out (see ``opened`` and ``train_round``).

        Raises:
            OrderRefusedError: the envelope is not right, or the owner's policy forbids the order;
                nothing that came along was decoded then.
        """
        require_envelope(sealed, site=self.name, identity=self.identity)
        self.guard.admit(sealed.order)
        weights = opened(sealed, folder=self.folder)
        update = self.train_round(sealed.order, weights)
        head = self.guard.sent(sealed.order, update.header)
        header = replace(update.header, journal=head)
        return signed(SealedUpdate(header, update.payload), self.identity)

    def decline(self, refusal: Refusal) -> SealedRefusal:
        """Sign a refusal."""
        return SealedRefusal(refusal, sign(refusal, self._key))

    @property
    def _key(self) -> SigningKey | None:
        return None if self.identity is None else self.identity.signing_key

    def train_round(self, order: RoundOrder, weights: Weights) -> SealedUpdate:
        """Train the ordered steps and save the reply before giving it out.

        A repeated order for the same round, plan and base is answered from disk under the new
        order's nonce, without training.

        Raises:
            OrderRefusedError: no scan for the cohort, an order that does not fit its plan, damaged
                weights, a spent privacy budget, or a collapse under ``stop_on_collapse``.
        """
        facts = self._facts(order.protocol, order.cohort)
        config = checked(order, weights)
        # Now, rather than after hours of training; and again when it leaves.
        asked = schema_of(leaving(weights, config.federation.merge))
        require_may_leave(asked, self.guard.leaves())
        plan = plan_hash(config)
        memory = RunMemory.of(self.folder, order.run)
        with memory.locked():
            if memory.cohort() not in (None, order.cohort):
                message = "the order's run is another cohort's here. Give each cohort its own run."
                raise OrderRefusedError(message, reason="run")
            saved = memory.reply(order.round, plan_hash=plan, base_digest=order.base_digest)
            if saved is not None:
                log.info("round %d: answered again from disk", order.round)
                return signed(saved, self.identity, nonce=order.nonce)
            try:
                with memory.in_turn():
                    return self._train(
                        order, weights, config=config, memory=memory, plan=plan, facts=facts
                    )
            except BaseException as error:
                self._warm.pop(order.cohort, None)  # half-trained; the next starts from disk
                if reason := reason_of(error):
                    raise OrderRefusedError(str(error), reason=reason) from None
                raise

    def _train(
        self,
        order: RoundOrder,
        weights: Weights,
        *,
        config: RunConfig,
        memory: RunMemory,
        plan: str,
        facts: SiteFacts,
    ) -> SealedUpdate:
        merge, wire = config.federation.merge, config.federation.wire
        last = memory.last()
        present = last is not None and last.plan_hash == plan and last.round == order.round - 1
        keeps = merge.teacher_rule == "local" or merge.student == "fedema"
        own = memory.local(order.round - 1) if present and keeps else None
        first = last.first_divergence if last is not None and last.plan_hash == plan else 0.0
        start = start_of_round(weights, merge, own=own, first_divergence=first)
        trainer = self._trainer(order, start, config=config, memory=memory, last=last, plan=plan)
        purse = Purse(self.folder, self.name, order, plan, memory.folder, self.ledger)
        purse.offer(trainer)
        metrics = trainer.train_steps(order.first_step, order.steps, order.total_steps)
        metrics |= start.metrics(merge.student)
        trained = trainer.shared_weights()
        released = release(
            leaving(trained, merge),
            order=order,
            schema=schema_of(leaving(weights, merge)),
            site=self.name,
            patient_count=facts.patient_count,
            metrics=metrics,
            leaves=self.guard.leaves(),
        )
        released = replace(
            released, header=replace(released.header, privacy=purse.statement(metrics))
        )
        before = last is not None and last.plan_hash == plan and last.round < order.round
        residual = memory.residual(last) if before and last is not None else {}
        update, left = packed(released, weights, wire=wire, residual=residual)
        memory.begin(order.round)
        memory.keep_config(order.config)
        trainer.save_state(
            memory.state_folder(order.round), StateStamp(order.run, order.round, plan)
        )
        local = group(trained, "teacher") if merge.teacher_rule == "local" else {}
        if wire != "float32":  # the reply holds differences, and the next base may come as one
            local = released.weights | local
            KeptBase.of(self.folder, order.cohort).keep(weights, order.base_digest)
        done = LastRound(order.round, plan, order.base_digest, start.first_divergence)
        note_round(memory.folder, RoundNote(order.round, time.time(), metrics))
        memory.commit(done, update, local=local, residual=left)
        purse.settle()
        self._warm[order.cohort] = _Warm(trainer, order.run, plan, order.round)
        return signed(update, self.identity)

    def _trainer(
        self,
        order: RoundOrder,
        start: Start,
        *,
        config: RunConfig,
        memory: RunMemory,
        last: LastRound | None,
        plan: str,
    ) -> Trainer:
        """The warm trainer when it is the one that the disk remembers, else one from disk."""
        warm = self._warm.pop(order.cohort, None)
        before = last.round if last is not None and last.round < order.round else None
        if warm is not None and (warm.run, warm.plan_hash, warm.round) == (order.run, plan, before):
            warm.trainer.load(start.weights)
            return warm.trainer
        trainer = self.workbench.trainer(self.folder, config, site=self.name)
        trainer.load(start.weights)
        if before is not None:
            # Lost or of another plan: the trainer warms up again and its metrics say so.
            stamp = StateStamp(order.run, before, plan)
            trainer.load_state(memory.state_folder(before), stamp)
            # Again, because a state brings a local teacher, which is stale after a missed round.
            trainer.load(start.weights)
        return trainer

    def _facts(self, protocol: int, cohort: str) -> SiteFacts:
        """What the site has for a cohort, if both sides speak alike and it has anything."""
        if problem := version_problem(protocol, "server"):
            raise OrderRefusedError(problem, reason="protocol")
        known = next((each for each in COHORTS if each == cohort), None)
        facts = self.workbench.facts(self.folder, known) if known else SiteFacts(0, 0)
        if facts.patient_count < 1:
            raise OrderRefusedError(
                "the site has no scan for this cohort. Index such scans to take part in it.",
                reason="cohort",
            )
        return facts


_OPEN: dict[tuple[Path, str, int, KeyPlace | None], Site] = {}


def open_site(
    folder: Path, name: str, workbench: Workbench, *, keys: KeyPlace | None, ledger: Keeping
) -> Site:
    """The site of a folder; within a process always the same one, so its trainer stays warm."""
    key = (folder.resolve(), name, id(workbench), keys)
    if key not in _OPEN:
        identity = keys.load() if keys else None
        _OPEN[key] = Site(key[0], name, workbench, identity, SiteJournal.of(key[0]), ledger)
    return _OPEN[key]


def close_sites() -> None:
    """Forget all open sites and their warm trainers; what is on disk stays."""
    _OPEN.clear()


def named_site(node_config: Mapping[str, object], *, workbench: Workbench) -> Site:
    """Open the site that the node's own configuration names; never one that an order names.

    Args:
        node_config: ``site`` is the folder, ``name`` the enrolled name (the folder's by default),
            ``server-key`` and ``signing-key`` the keys of a signed connection,
            ``ledger`` is ``run`` in simulations, whose runs do not add up.
        workbench: how catalogue and trainer are opened.

    Raises:
        KeyFileError: a key is missing, damaged or readable by others.
        OrderRefusedError: the node was started without a site, or with a name that is none.
    """
    folder = node_config.get("site")
    if not isinstance(folder, str) or not folder:
        message = "the node was started without a site. Use `agssd-site run SITE --server ...`."
        raise OrderRefusedError(message, reason="site")
    name = str(node_config.get("name") or Path(folder).name)
    if problem := name_problem(name):
        raise OrderRefusedError(f"{problem} Use `--name`.", reason="site")
    ledger: Keeping = "run" if node_config.get("ledger") == "run" else "site"
    keys = key_place(node_config)
    return open_site(Path(folder), name, workbench, keys=keys, ledger=ledger)


SiteOpener = Callable[[Mapping[str, object]], Site]

"""Who is there: asking nodes for their site, and remembering who was enrolled with what."""

import json
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from agssd_core.application import DECLINED_UNOPENED
from agssd_core.config import FederationConfig
from agssd_core.config.node import name_problem
from agssd_core.envelope import SealedHello, SealedRefusal, verify
from agssd_core.errors import AgssdError, CheckpointError, OversizeError, SignatureError
from agssd_core.protocol import PROTOCOL_VERSION, Refusal, SiteHello, SiteQuery
from agssd_core.weights import write_text
from server import wire
from server.collect import Exchange, Puller, online_nodes, push
from server.keys import Keys
from server.members import Members

log = logging.getLogger(__name__)

ENROLMENT_FILE = "enrolment.json"
HELLO_TTL_S = 600.0
GRACE_S = 30.0
ASK_AGAIN_S = 3600.0
MAX_HELLO_BYTES = 1 << 16


@dataclass(frozen=True)
class Enrolled:
    """What a site was first known with; merging counts it by this, not by later claims."""

    patient_count: int
    volume_count: int


@dataclass
class Enrolment:
    """Sites of a run and their counts, on disk beside the checkpoints."""

    folder: Path
    sites: dict[str, Enrolled] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Enrolment":
        """Read the run's enrolment, empty at first.

        Raises:
            CheckpointError: the file is damaged.
        """
        file = folder / ENROLMENT_FILE
        if not file.is_file():
            return cls(folder)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(folder, {name: Enrolled(**counts) for name, counts in content.items()})
        except (ValueError, TypeError, AttributeError):
            raise CheckpointError(
                "the run's enrolment file is damaged. Restore it from a copy of the run folder, "
                "or remove it to enrol the sites again with today's counts."
            ) from None

    def admit(self, hello: SiteHello) -> None:
        """Enrol a site that is not known yet."""
        if hello.site in self.sites:
            return
        self.sites[hello.site] = Enrolled(hello.patient_count, hello.volume_count)
        rows = {name: asdict(counts) for name, counts in sorted(self.sites.items())}
        write_text(self.folder / ENROLMENT_FILE, json.dumps(rows, indent=1) + "\n")

    def patient_counts(self) -> dict[str, int]:
        """Site -> patients at enrolment."""
        return {name: counts.patient_count for name, counts in self.sites.items()}


class _Asked(NamedTuple):
    """A question under way: to which node, when, and with which nonce."""

    node: int
    at: float
    nonce: str


@dataclass
class SiteBook:
    """Node ids of the cohort's sites that are connected now.

    A site without a scan for the cohort says so, which is no fault. It is asked again when it
    connects anew, and every ``ASK_AGAIN_S``, since it may have indexed such scans by then.

    Attributes:
        held: site -> digest of the base that it keeps, as it said last.
        declined: site -> class of the reason why its node is left out; the rounds note it.
        keys: of a signed run, in which a node says who it is by its site's signature.
    """

    grid: Exchange
    puller: Puller
    federation: FederationConfig
    enrolment: Enrolment
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    members: Members | None = None
    keys: Keys | None = None
    nodes: dict[str, int] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    _answered: set[int] = field(default_factory=set)
    _elsewhere: dict[int, float] = field(default_factory=dict)
    _asked: dict[str, "_Asked"] = field(default_factory=dict)

    def refresh(self, *, wanted: int) -> Mapping[str, int]:
        """Ask new nodes who they are, waiting until ``wanted`` sites are known or time is over.

        A node that does not answer holds a round up for ``GRACE_S`` once, not every time.

        Returns:
            Site name -> node id. Of two nodes that give one name the first to answer is taken.
        """
        deadline = self.clock() + self.federation.discovery_timeout_s
        self.declined = {}
        self._answered = set(self.nodes.values())  # those that answered badly are asked again
        while True:
            self._ask_new(self._online())
            self._read_answers()
            now = self.clock()
            young = any(now - asked.at < GRACE_S for asked in self._asked.values())
            if (len(self.nodes) >= wanted and not young) or now >= deadline:
                # Whose own node answered as it should was not the one who took the name.
                self.declined = {s: why for s, why in self.declined.items() if s not in self.nodes}
                return self.nodes
            self.sleep(min(self.federation.poll_s, 1.0, max(deadline - now, 0.0)))

    def _online(self) -> set[int]:
        online = online_nodes(self.grid)
        if online is None:
            return self._answered | {asked.node for asked in self._asked.values()}
        self.nodes = {name: node for name, node in self.nodes.items() if node in online}
        self._answered &= online
        self._elsewhere = {n: until for n, until in self._elsewhere.items() if n in online}
        return online

    def _ask_new(self, online: set[int]) -> None:
        now = self.clock()
        self._asked = {
            identifier: asked
            for identifier, asked in self._asked.items()
            if asked.node in online and now - asked.at < HELLO_TTL_S
        }
        waiting = {asked.node for asked in self._asked.values()}
        waiting |= {node for node, until in self._elsewhere.items() if now < until}
        for node in sorted(online - self._answered - waiting):
            nonce = secrets.token_hex(16)
            query = SiteQuery(PROTOCOL_VERSION, self.federation.cohort, nonce)
            identifier = push(self.grid, wire.encode_query(query, node=node, ttl_s=HELLO_TTL_S))
            if identifier is not None:
                self._asked[identifier] = _Asked(node, now, nonce)

    def _read_answers(self) -> None:
        asked = sorted(self._asked.items(), key=lambda item: (item[1].node, item[1].at))
        for identifier, (node, _, nonce) in asked:
            reply = self.puller.poll(identifier, MAX_HELLO_BYTES)
            if reply is None:
                continue
            del self._asked[identifier]
            self._answered.add(node)
            hello = self._hello(reply, node, nonce)
            if isinstance(hello, SiteHello):
                self._enter(node, hello)
            elif isinstance(hello, Refusal):
                self._leave_out(node)

    def _hello(self, reply: object, node: int, nonce: str) -> SiteHello | Refusal | None:
        try:
            found = wire.decode_reply(reply, max_bytes=MAX_HELLO_BYTES)  # type: ignore[arg-type]
        except AgssdError as error:
            log.warning("a node did not say who it is: %s", error)
            if isinstance(error, OversizeError):
                self._blame(node, "", "size")
            return None
        if isinstance(found, wire.Fault):
            log.warning("a node could not say who it is: %s", found.text)
            self._note(node, found.text)
        if isinstance(found, SealedRefusal) and found.refusal.reason == "cohort":
            return found.refusal
        if not isinstance(found, SealedHello) or not self._is_genuine(found, node, nonce):
            return None
        hello = found.hello
        if hello.cohort != self.federation.cohort or hello.patient_count < 1:
            log.warning("site %r is of another cohort, or is empty", hello.site)
            return None
        if self.federation.wire not in hello.wires.split():
            said = (hello.site, self.federation.wire)
            log.warning("site %r cannot read federation.wire = %s. Upgrade the site.", *said)
            return None
        return hello

    def _is_genuine(self, sealed: SealedHello, node: int, nonce: str) -> bool:
        """In a signed run: signed by the site that it names, for this very question."""
        if self.keys is None:
            return True
        site = sealed.hello.site
        try:
            verify(sealed.hello, sealed.signature, self.keys.sites.get(site, ()))
            problem = "" if sealed.hello.nonce == nonce else "nonce"
        except SignatureError:
            problem = "signature"
        if problem:
            log.warning("a node says that it is site %r, refused (%s)", site[:64], problem)
            self._blame(node, site, problem)
        return not problem

    def _blame(self, node: int, named: str, reason: str) -> None:
        """Note whose node answered wrongly: by its key, or without such by the name it gave."""
        site = named if self.members is None else self.members.site_of(node)
        if site is not None and not name_problem(site):
            self.declined[site] = reason

    def _note(self, node: int, text: str) -> None:
        """Remember that a known site declined the very application."""
        site = None if self.members is None else self.members.site_of(node)
        if site is not None and text in DECLINED_UNOPENED:
            self.declined[site] = text

    def _leave_out(self, node: int) -> None:
        if node not in self._elsewhere:
            log.info("a node has no scans for cohort %s", self.federation.cohort)
        self._elsewhere[node] = self.clock() + ASK_AGAIN_S
        self._answered.discard(node)

    def _enter(self, node: int, hello: SiteHello) -> None:
        if self.members is not None:
            if self.members.site_of(node) != hello.site:
                log.warning("a node gives the name %r, which is not its own", hello.site)
                self._blame(node, hello.site, "site")
                return
            count = self.members.patients(hello.site, hello.cohort)
            if count < 1:
                log.warning("site %r is not enrolled for cohort %s", hello.site, hello.cohort)
                return
            hello = replace(hello, patient_count=count)
        if hello.site in self.nodes:
            log.warning("two nodes call themselves %r; the later one is left out", hello.site)
            return
        self.nodes[hello.site] = node
        self.held[hello.site] = hello.held
        self.enrolment.admit(hello)

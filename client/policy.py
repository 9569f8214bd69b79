"""An order held against the policy of the site's owner, before its weights are decoded.

SITE/policy.yaml is read anew for every order, so a change counts from the next order on. A
damaged file refuses everything. Without a file an enrolled site holds orders against the cautious
values of ``SitePolicy``; one that is not enrolled answers only a server on its own machine, and
then nothing is held against its orders.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from agssd_core.config.load import load_node
from agssd_core.config.policy import LeavesPolicy, SitePolicy
from agssd_core.delivery import FinalOrder
from agssd_core.errors import AgssdError, ConfigError, JournalError, OrderRefusedError
from agssd_core.protocol import RoundOrder, UpdateHeader
from client.connection import CONNECTION_FILE, keys_folder
from client.objections import POLICY_FILE, Objection, objections, objections_to_final

log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Where a site notes what it did; ``agssd_core.journal.Journal`` is one."""

    def append(self, kind: str, facts: Mapping[str, str | int | float | bool]) -> object:
        """Add an entry; on disk when this returns."""
        ...

    def head(self) -> str:
        """``SEQUENCE:DIGEST`` of the newest entry."""
        ...

    def hear(self, head: str) -> None:
        """Keep the head of the coordinator's journal; an older one than before is an error."""
        ...


def read_policy(site: Path) -> SitePolicy | None:
    """The policy in force; None at a site that is not enrolled and has no file.

    Raises:
        ConfigError: the file is not a policy.
    """
    file = site / POLICY_FILE
    if file.exists():
        return load_node(file, SitePolicy)
    return SitePolicy() if (keys_folder(site) / CONNECTION_FILE).exists() else None


def allowed_applications(site: Path) -> tuple[str, ...]:
    """Digests of applications that the owner lists; none listed is the installed version's only.

    Raises:
        ConfigError: the file is not a policy.
    """
    policy = read_policy(site)
    return () if policy is None else policy.code.applications


@dataclass(frozen=True)
class Guard:
    """Holds orders against a site's policy and notes what became of them.

    Attributes:
        recorder: the site's journal; None at a site that has no signing key.
        clock: local time.
    """

    folder: Path
    recorder: Recorder | None = None
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC).astimezone())

    def admit(self, order: RoundOrder) -> None:
        """Let an order pass, before anything that came with it is decoded.

        Raises:
            OrderRefusedError: the policy forbids it, or cannot be read.
        """
        self._hear(order)
        policy = self._policy()
        if policy is None:
            return
        _decide(next(objections(policy, order, now=self.clock()), None))

    def admit_final(self, order: FinalOrder) -> None:
        """Let a final checkpoint pass, before it is decoded (raises as ``admit``)."""
        self._hear(order)
        policy = self._policy()
        if policy is not None:
            _decide(next(objections_to_final(policy, order, now=self.clock()), None))

    def delivered(self, order: FinalOrder) -> None:
        """Note that a final checkpoint is held here.

        Raises:
            JournalError: it cannot be noted.
        """
        if self.recorder is not None:
            facts = {**_named(order), "weights": order.weights_digest[:64]}
            self.recorder.append("delivery", {"event": "held", **facts})

    def _hear(self, order: RoundOrder | FinalOrder) -> None:
        """Note an order that came, and hold the coordinator's journal against what it was."""
        if self.recorder is None:
            return
        try:
            self.recorder.hear(order.journal)
        except JournalError as error:
            raise OrderRefusedError(str(error), reason="journal") from None
        facts = {**_named(order), "nonce": order.nonce[:64], "server_head": order.journal[:80]}
        if isinstance(order, FinalOrder):
            came = {"event": "came", "weights": order.weights_digest[:64]}
            self.recorder.append("delivery", {**facts, **came})
        else:
            self.recorder.append("order", {**facts, "base": order.base_digest[:64]})

    def leaves(self) -> LeavesPolicy | None:
        """What may leave; None sets no limit.

        Raises:
            OrderRefusedError: the policy cannot be read.
        """
        policy = self._policy()
        return None if policy is None else policy.leaves

    def refused(self, order: RoundOrder | FinalOrder, reason: str) -> None:
        """Note that an order was declined; one that cannot be noted stays declined."""
        if self.recorder is None:
            return
        try:
            self.recorder.append("refusal", {**_named(order), "reason": reason})
        except (AgssdError, OSError) as error:
            log.error("a refusal could not be journalled (%s)", type(error).__name__)

    def sent(self, order: RoundOrder, header: UpdateHeader) -> str:
        """Note what is about to leave.

        Returns:
            The head of the site's journal then; empty without a journal.

        Raises:
            JournalError: it cannot be noted, and then it must not leave.
        """
        if self.recorder is None:
            return ""
        facts = {
            **_named(order),
            "weights": header.weights_digest,
            "patients": header.patient_count,
            "metrics": len(header.metrics),
        }
        self.recorder.append("update", facts)
        return self.recorder.head()

    def _policy(self) -> SitePolicy | None:
        try:
            return read_policy(self.folder)
        except (ConfigError, OSError):
            raise OrderRefusedError(
                f"the site's {POLICY_FILE} cannot be read, so no order is carried out. "
                "`agssd-site policy check SITE` says what is wrong.",
                reason="policy-file",
            ) from None


def _decide(found: Objection | None) -> None:
    if found is not None:
        message = f"{found.text}. The site's owner decides this in {POLICY_FILE}."
        raise OrderRefusedError(message, reason=found.reason)


def _named(order: RoundOrder | FinalOrder) -> dict[str, str | int]:
    return {"run": order.run[:64], "cohort": order.cohort[:16], "round": order.round}

"""The coordinator's journal of a run, and what its sites tell of theirs."""

from collections.abc import Mapping
from dataclasses import dataclass

from agssd_core.delivery import FinalOrder
from agssd_core.errors import JournalError, UpdateRejectedError
from agssd_core.journal import Journal
from agssd_core.journal_heads import heard, remember, told
from agssd_core.protocol import RoundOrder, UpdateHeader

Fact = str | int | float | bool


@dataclass
class Chronicle:
    """Writes what the rounds of a signed run do; an order that cannot be noted is not sent.

    Raises:
        JournalError: of every method, when the journal is damaged or cannot be written.
    """

    journal: Journal

    def head(self) -> str:
        """The journal's head, as an order carries it."""
        return told(self.journal.head())

    def ordered(self, order: RoundOrder, *, size: int) -> None:
        """An order is about to leave."""
        facts: Mapping[str, Fact] = {
            **_named(order.run, order.cohort, order.round, order.site),
            "nonce": order.nonce,
            "base": order.base_digest,
            "bytes": size,
        }
        self.journal.append("order", facts)

    def delivering(self, order: FinalOrder, *, size: int) -> None:
        """A final checkpoint is about to leave."""
        facts: Mapping[str, Fact] = {
            **_named(order.run, order.cohort, order.round, order.site),
            "event": "sent",
            "nonce": order.nonce,
            "weights": order.weights_digest,
            "bytes": size,
        }
        self.journal.append("delivery", facts)

    def delivered(self, order: FinalOrder) -> None:
        """A site has signed that it holds a final checkpoint."""
        named = _named(order.run, order.cohort, order.round, order.site)
        facts = {**named, "event": "held", "weights": order.weights_digest}
        self.journal.append("delivery", facts)

    def admitted(self, header: UpdateHeader, *, size: int) -> None:
        """An update is about to count."""
        facts: Mapping[str, Fact] = {
            **_named(header.run, header.cohort, header.round, header.site),
            "nonce": header.nonce,
            "weights": header.weights_digest,
            "bytes": size,
            "site_head": header.journal,
        }
        self.journal.append("update", facts)

    def refused(self, *, run: str, cohort: str, number: int, site: str, reason: str) -> None:
        """A site's round is lost, for a class of reason."""
        self.journal.append("refusal", {**_named(run, cohort, number, site), "reason": reason})

    def require_head(self, header: UpdateHeader) -> None:
        """Hold a site's head against the newest that it told of.

        Raises:
            UpdateRejectedError: the site's journal was rolled back.
        """
        try:
            remember(self.journal.folder, header.site, heard(header.journal))
        except JournalError as error:
            raise UpdateRejectedError(str(error), site=header.site, reason="journal") from None


def _named(run: str, cohort: str, number: int, site: str) -> dict[str, Fact]:
    return {"run": run, "cohort": cohort, "round": number, "site": site}

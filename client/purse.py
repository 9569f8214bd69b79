"""What a private round is paid from: the seam between training, ledger and update."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from agssd_core.accounting import Spend, Spending, epsilon
from agssd_core.errors import (
    AccountingError,
    AgssdError,
    BudgetError,
    CollapseError,
    LedgerError,
    OrderRefusedError,
)
from agssd_core.privacy_statement import PrivacyStatement
from agssd_core.protocol import RoundOrder
from client.budget import limits_of, plan_privacy, stated_delta
from client.ledger import Ledger, LedgerPlace, Purpose, population_of
from client.ledger_chain import UNIT, Head, LedgerEntry

Keeping = Literal["site", "run"]
"""Whose spending a ledger adds up: all runs on a site's patients, or one simulated run's."""

REASONS: tuple[tuple[type[AgssdError], str], ...] = (
    (CollapseError, "collapsed"),
    (BudgetError, "budget"),
    (LedgerError, "ledger"),
    (AccountingError, "ledger"),
)


@runtime_checkable
class PaysFirst(Protocol):
    """A trainer that can train privately; without privacy it never asks."""

    def spend_through(self, spend: Spend) -> None:
        """Ask ``spend`` before every private round."""


@dataclass
class Purse:
    """One round's spending.

    Attributes:
        keeping: which ledger is asked.
        reserved: what training has reserved; empty for a round without privacy.
    """

    site: Path
    name: str
    order: RoundOrder
    plan: str
    memory: Path
    keeping: Keeping
    reserved: list[LedgerEntry] = field(default_factory=list)

    def offer(self, trainer: object) -> None:
        """Have a trainer pay from here.

        Raises:
            OrderRefusedError: the plan asks for privacy and this trainer cannot promise any.
        """
        if isinstance(trainer, PaysFirst):
            trainer.spend_through(self.spend)
        elif self._wanted():
            message = "the order asks for privacy, which this training cannot promise. Upgrade."
            raise OrderRefusedError(message, reason="privacy")

    def spend(self, sigma_eff: float, q: float, steps: int) -> None:
        """Reserve a round; see ``Ledger.reserve`` for what it raises."""
        limits = limits_of(self.site, self.order.config)
        entry = self._ledger().reserve(
            Spending(sigma_eff, q, steps),
            Purpose(self.order.run, self.order.round, self.plan),
            limits=limits,
            delta=stated_delta(self.site, self.order.config),
            seen=self._seen(),
        )
        self.reserved.append(entry)

    def statement(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """What goes out beside the update; empty without privacy.

        Args:
            metrics: of the round; ``private`` 0 says that the noise could be repeated.

        Raises:
            OrderRefusedError: the plan asks for privacy and training paid for none.
        """
        if not self.reserved:
            if self._wanted():
                message = "training did not ask the privacy ledger; nothing was sent. Upgrade."
                raise OrderRefusedError(message, reason="privacy")
            return {}
        entry, chain = self.reserved[-1], self._ledger().read()
        of_run = epsilon(chain.history(run=self.order.run), delta=entry.delta)
        statement = PrivacyStatement(
            epsilon=entry.epsilon_after,
            # Sums in another order may differ in the last bit; a part never exceeds the whole.
            epsilon_run=min(of_run, entry.epsilon_after),
            delta=entry.delta,
            sigma=entry.sigma,
            rate=entry.rate,
            steps=sum(each.steps for each in self.reserved),
            unit=UNIT,
            scope="population" if self.keeping == "site" else "run",
            noise="secure" if metrics.get("private", 1.0) else "repeatable",
            population=entry.population,
            sequence=entry.sequence,
            digest=chain.digests[entry.sequence - 1],
            accountant=entry.accountant,
        )
        return asdict(PrivacyStatement.checked(asdict(statement)))

    def settle(self) -> None:
        """Commit what was reserved, once the reply is on disk."""
        for entry in self.reserved:
            self._ledger().commit(entry)

    def _ledger(self) -> Ledger:
        place = (
            LedgerPlace.of_site(self.site)
            if self.keeping == "site"
            else LedgerPlace.of_run(self.memory)
        )
        return Ledger(place, site=self.name, population=population_of(self.site))

    def _wanted(self) -> bool:
        """Whether the plan promises privacy; without noise it does not, whatever it trains by."""
        terms = plan_privacy(self.order.config)
        return bool(terms.get("enabled", False)) and terms.get("noise_multiplier") != 0

    def _seen(self) -> Head | None:
        """The head that came with the order."""
        head = self.order.ledger
        if not head:
            return None
        if head.get("population") != population_of(self.site):
            raise LedgerError(
                "the server knows this site's ledger under another population: the folder was "
                "indexed anew or another site has its name. Use the site's former folder."
            )
        try:
            return int(head["sequence"]), str(head["digest"])
        except (KeyError, ValueError, TypeError):
            message = "the order's ledger head is none. Use the same version on both sides."
            raise LedgerError(message) from None


def reason_of(error: BaseException) -> str:
    """Class of reason under which a site declines an order; empty for a fault."""
    return next((reason for kind, reason in REASONS if isinstance(error, kind)), "")

"""What a site says of the privacy of its update: a few numbers, and whose word they are."""

import re
from dataclasses import dataclass
from typing import Any, Literal, Self

from agssd_core.errors import ProtocolError
from agssd_core.protocol import Record

UNIT = "patient"
Scope = Literal["population", "run"]
_MOST = 1e12
_PATTERNS = {
    "unit": UNIT,
    "scope": "population|run",
    "noise": "secure|repeatable",
    "accountant": r"[a-z0-9 .+-]{1,60}",
    "population": "[0-9a-f]{16}",
    "digest": "[0-9a-f]{64}",
}


@dataclass(frozen=True)
class PrivacyStatement(Record):
    """Beside an update that was trained under differential privacy.

    Attributes:
        epsilon: of everything that the ledger holds; epsilon_run: of this run alone.
        delta: at which both are meant.
        sigma, rate, steps: of this round.
        unit: who is protected, always one patient of one site.
        scope: ``population``, all runs on these patients add up; ``run``, a simulation.
        noise: ``secure``, or ``repeatable``, which protects nobody.
        population: pseudonym of the patients as a whole.
        sequence, digest: the ledger's head when the round was reserved.
        accountant: who counted.
    """

    epsilon: float
    epsilon_run: float
    delta: float
    sigma: float
    rate: float
    steps: int
    unit: str
    scope: str
    noise: str
    population: str
    sequence: int
    digest: str
    accountant: str

    @classmethod
    def checked(cls, content: Any) -> Self:
        """Read a statement from outside; its texts go into pages and files.

        Raises:
            ProtocolError: a field is missing, surplus, of another type or without meaning.
        """
        found = cls.from_dict(content)
        numbers = (found.epsilon, found.epsilon_run, found.delta, found.sigma, found.rate)
        plain = (
            all(abs(number) <= _MOST for number in numbers)  # false for NaN as well
            and min(found.epsilon_run, found.sigma, found.rate) >= 0
            and found.epsilon >= found.epsilon_run
            and 0 < found.delta < 1
            and found.rate <= 1
            and 0 < found.steps <= _MOST
            and 0 < found.sequence <= _MOST
        )
        texts = all(re.fullmatch(form, getattr(found, name)) for name, form in _PATTERNS.items())
        if not plain or not texts:
            raise ProtocolError(
                "a statement of privacy holds a number or text without meaning. Use the same "
                "version on both sides."
            )
        return found

"""What the noised merges of a run have cost each site: written down before the noise is drawn.

RUN/central-privacy.json holds, for every site, in how many noised merges it was. A server that is
killed between the entry and its checkpoint merges the round again with fresh noise and counts it
again: too much is in the file, never too little. The newest manifest holds the same.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from agssd_core.accounting import Spending, accountant_name, epsilon
from agssd_core.config import MergeConfig
from agssd_core.errors import CheckpointError
from agssd_core.weights import write_text
from server.central_privacy import count_numbers
from server.manifest import Checkpoint

log = logging.getLogger(__name__)

FILE, EXTRA, UNIT = "central-privacy.json", "central_privacy", "site"
ASSUMPTION = (
    "neighbours differ in what one site sent, or nothing in its place; who takes part is public, "
    "so a site pays in full for every noised merge that it is in"
)


@dataclass(frozen=True)
class CentralAccount:
    """Noised merges of one cohort of a run.

    Attributes:
        clip_norm, noise_multiplier, delta: the plan's.
        numbers: how many a site sends; all of them are noised.
        rounds: site -> noised merges that it was in.
    """

    clip_norm: float
    noise_multiplier: float
    delta: float
    numbers: int
    rounds: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, content: Any) -> Self:
        """Take an account from a file.

        Raises:
            ValueError: it is none.
        """
        try:
            found = cls(
                clip_norm=float(content["clip_norm"]),
                noise_multiplier=float(content["noise_multiplier"]),
                delta=float(content["delta"]),
                numbers=int(content["numbers"]),
                rounds={str(site): int(count) for site, count in content["rounds"].items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
            raise ValueError("no account") from None
        positive = found.clip_norm > 0 and found.noise_multiplier > 0 and found.numbers > 0
        finite = math.isfinite(found.clip_norm) and math.isfinite(found.noise_multiplier)
        whole = 0 < found.delta < 1 and min(found.rounds.values(), default=0) >= 0
        if not (positive and finite and whole):
            raise ValueError("no account")
        return found

    def epsilon(self, site: str) -> float:
        """What one site's part in all merges so far gives away at ``delta``."""
        spent = Spending(self.noise_multiplier, 1.0, self.rounds.get(site, 0))
        return epsilon([spent], delta=self.delta)

    @property
    def largest(self) -> float:
        """Epsilon of the site that has been in most merges; 0 before the first."""
        most = max(self.rounds, key=lambda site: self.rounds[site], default="")
        return self.epsilon(most)

    def joined(self, other: "CentralAccount") -> "CentralAccount":
        """The greater count of each site."""
        sites = self.rounds.keys() | other.rounds.keys()
        counts = {s: max(self.rounds.get(s, 0), other.rounds.get(s, 0)) for s in sites}
        return replace(self, rounds=dict(sorted(counts.items())))

    def statement(self) -> dict[str, Any]:
        """For manifests and pages."""
        return {
            **asdict(self),
            "unit": UNIT,
            "assumption": ASSUMPTION,
            "accountant": accountant_name(),
            "epsilon": {site: self.epsilon(site) for site in self.rounds},
            "largest_epsilon": self.largest,
        }

    def worth(self) -> str:
        """What epsilon is worth here, in plain words."""
        sites = max(len(self.rounds), 1)
        # Best guess under (epsilon, delta), both answers being as likely.
        sure = 100 * (1 - (1 - self.delta) / (1 + math.exp(min(self.largest, 700.0))))
        ratio = self.noise_multiplier * math.sqrt(self.numbers) / sites
        return (
            f"epsilon {self.largest:.3g} at delta {self.delta:g} for one whole site of {sites}: "
            "who would toss a coin about whether a site sent anything is, after studying the "
            f"weights, right at most {sure:.1f} times in 100. With three to ten sites it is "
            "hygiene rather than protection: no site can hide among so few, a delta not far below "
            f"1 / {sites} says little, and the noise of a merge of all is {ratio:.3g} times as "
            "long as the longest step that the sites together may take, so the less epsilon, the "
            "less is learned."
        )


def reserve(folder: Path, base: Checkpoint, merge: MergeConfig, sites: Sequence[str]) -> None:
    """Count a noised merge for its sites; on disk (fsync) when this returns.

    Raises:
        CheckpointError: the run's account is damaged or of another plan.
    """
    settings = merge.central_privacy
    if not settings.enabled:
        return
    account = CentralAccount(
        clip_norm=settings.clip_norm,
        noise_multiplier=settings.noise_multiplier,
        delta=settings.delta,
        numbers=count_numbers(base.weights, merge.uploaded_groups),
    )
    for held in (_in_file(folder), _in_manifest(base.manifest.extra)):
        if held is not None and replace(held, rounds={}) != replace(account, rounds={}):
            raise _damaged("is of another plan")
        account = account if held is None else account.joined(held)
    first = not account.rounds
    counts = {**account.rounds, **{site: account.rounds.get(site, 0) + 1 for site in sites}}
    account = replace(account, rounds=dict(sorted(counts.items())))
    write_text(folder / FILE, json.dumps(account.statement(), indent=1, sort_keys=True) + "\n")
    log.log(
        logging.WARNING if first else logging.INFO,
        "central privacy, round %d: %s",
        base.round,
        account.worth(),
    )


def account_of(folder: Path, extra: Mapping[str, Any] | None = None) -> CentralAccount | None:
    """The run's account, of file and manifest the greater counts; None without noised merges.

    Raises:
        CheckpointError: the file is damaged.
    """
    found = [held for held in (_in_file(folder), _in_manifest(extra or {})) if held is not None]
    return found[0].joined(found[-1]) if found else None


def told_of(folder: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says of it; nothing without noised merges.

    Args:
        folder: of the run.
        before: ``extra`` of the manifest before, should the file be gone.
    """
    account = account_of(folder, before)
    return {} if account is None else {EXTRA: account.statement()}


def epsilon_metric(folder: Path) -> dict[str, float]:
    """For the row of a merge; nothing without noised merges."""
    account = account_of(folder)
    return {} if account is None else {"central_epsilon": account.largest}


def _in_file(folder: Path) -> CentralAccount | None:
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return CentralAccount.read(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise _damaged("is damaged") from None


def _in_manifest(extra: Mapping[str, Any]) -> CentralAccount | None:
    """Manifests are sealed; what is no account there was never written by this version."""
    try:
        return CentralAccount.read(extra[EXTRA])
    except (KeyError, ValueError):
        return None


def _damaged(fact: str) -> CheckpointError:
    return CheckpointError(
        f"the run's {FILE} {fact}, so nobody can say what the merges cost the sites. Restore it "
        "from a copy of the run folder, or start under another name."
    )

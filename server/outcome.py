"""What became of a round: for ``on_round`` and as rows of ``metrics.jsonl``."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agssd_core.config import Cohort
from server.central_accounts import epsilon_metric
from server.exchange import RoundExchange
from server.late import LateReplies
from server.merge import MergeResult

_KINDS = ("site", "refusal", "merge")


@dataclass(frozen=True)
class RoundOutcome:
    """What ``on_round`` is told.

    Attributes:
        cohort: whose round it was.
        merged: False when the quorum was missed and the weights stayed as they were.
        sites: whose updates were admitted.
        refusals: site -> class of reason.
        metrics: site -> what it measured.
    """

    cohort: Cohort
    round: int
    rounds: int
    merged: bool
    sites: tuple[str, ...]
    refusals: Mapping[str, str]
    metrics: Mapping[str, Mapping[str, float]]
    seconds: float


def round_rows(
    exchange: RoundExchange,
    late: LateReplies,
    *,
    outcome: RoundOutcome,
    result: MergeResult | None,
) -> Iterator[dict[str, Any]]:
    """A row for each admitted update, each refusal, each late reply, and one for the merge."""
    spool, enrolment = exchange.spool, exchange.loop.book.enrolment.sites
    shares = result.report.get("shares", {}) if result is not None else {}
    totals = {"bytes_up": 0.0, "bytes_down": 0.0}
    common = {"round": outcome.round, "cohort": exchange.rules.cohort}
    for site in outcome.sites:
        note = spool.note(site)
        for name in totals:
            totals[name] += note.get(name, 0.0)
        counts = enrolment[site]
        yield {
            **common,
            "kind": "site",
            "site": site,
            "metrics": dict(spool.header(site).metrics),
            "patient_count": counts.patient_count,
            "volume_count": counts.volume_count,
            "share": float(shares.get(site, 0.0)),
            **note,
        }
    for site, reason in sorted(outcome.refusals.items()):
        yield {**common, "kind": "refusal", "site": site, "reason": reason, "metrics": {}}
    for site, number, reason in sorted(late.arrived):
        metrics = {"age": float(outcome.round - number)}
        yield {**common, "kind": "refusal", "site": site, "reason": reason, "metrics": metrics}
    yield {
        **common,
        "kind": "merge",
        "site": None,
        "merged": outcome.merged,
        "metrics": {
            "merged": float(outcome.merged),
            "sites": float(len(outcome.sites)),
            "late_merged": float(len(late.stale)),
            **({} if result is None else epsilon_metric(exchange.loop.store.folder)),
        },
        "shares": {site: float(share) for site, share in shares.items() if math.isfinite(share)},
        "seconds": outcome.seconds,
        **totals,
    }


def outcomes_of(
    rows: Iterable[Mapping[str, Any]], *, rounds: int, first: int
) -> list[RoundOutcome]:
    """Closed rounds from ``first`` on, read back from ``metrics.jsonl`` by another process."""
    by_round: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_round.setdefault(int(row["round"]), []).append(row)
    found = []
    for number in sorted(number for number in by_round if number >= first):
        kinds = {kind: [r for r in by_round[number] if r["kind"] == kind] for kind in _KINDS}
        for merge in kinds["merge"][-1:]:
            found.append(
                RoundOutcome(
                    cohort=merge["cohort"],
                    round=number,
                    rounds=rounds,
                    merged=bool(merge["merged"]),
                    sites=tuple(str(row["site"]) for row in kinds["site"]),
                    refusals={str(row["site"]): str(row["reason"]) for row in kinds["refusal"]},
                    metrics={str(row["site"]): row["metrics"] for row in kinds["site"]},
                    seconds=float(merge["seconds"]),
                )
            )
    return found

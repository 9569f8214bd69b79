"""What a run's numbers mean, in words: is it healthy, which site is not, what to do.

The rules read only what sites report. They can show that something is wrong; that the features
are useful only a downstream task can show.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from server.admission import REASONS
from server.agssd_verdicts import judge_agssd
from server.anaus_verdicts import judge_anaus
from server.attendance import expected_absence, missed_rounds, refusal_remedy
from server.finding import Verdict, named
from server.run_record import RunRecord

__all__ = ["Verdict", "gravest_first", "headline", "judge"]


def judge(run: RunRecord) -> list[Verdict]:
    """All findings, the gravest first."""
    if not run.rounds:
        return [_no_rounds()]
    found = [
        *_progress(run),
        *(judge_anaus(run) if run.cohort == "us" else judge_agssd(run)),
        *_broken(run),
        *_refusals(run),
        *_absences(run),
    ]
    return gravest_first(found)


def gravest_first(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Findings that call for action, then those that deserve a look, then the good news."""
    order = {"bad": 0, "watch": 1, "good": 2}
    return sorted(verdicts, key=lambda verdict: order[verdict.level])


def headline(verdicts: list[Verdict]) -> Verdict:
    """The whole run in one sentence."""
    worst = verdicts[0].level if verdicts else "good"
    concerned = sorted(
        {site for verdict in verdicts[:] if verdict.level == worst for site in verdict.sites}
    )
    where = f" Concerned: {named(concerned)}." if concerned and worst != "good" else ""
    text = {
        "good": "The run is healthy by every rule that this page applies.",
        "watch": "The run works; something deserves a look.",
        "bad": "The run needs action before its weights are used.",
    }[worst]
    return Verdict(worst, text + where)


def _no_rounds() -> Verdict:
    return Verdict(
        "watch",
        "No round has been completed yet.",
        "Start the run, or continue it; the page is written again after every round.",
    )


def _progress(run: RunRecord) -> Iterator[Verdict]:
    planned, done = run.setting("federation.rounds"), run.completed_rounds
    unmerged = len(run.merges) - done
    if done == 0:
        yield Verdict(
            "bad",
            "No round has ended with merged weights.",
            "See the refusals below, or lower federation.min_sites to what can be reached.",
        )
    elif isinstance(planned, int) and done < planned and not unmerged:
        yield Verdict(
            "watch",
            f"{done} of {planned} planned rounds are done.",
            "Run the same command again to continue from the newest checkpoint.",
        )
    elif not unmerged:
        yield Verdict("good", f"All {done} rounds closed and were merged.")
    if unmerged and done:
        yield Verdict(
            "watch",
            f"{unmerged} round(s) closed without enough usable updates; weights stayed as they "
            "were.",
            "Look at late and refused updates by site; raise federation.deadline_s or lower "
            "federation.min_sites.",
        )


def _broken(run: RunRecord) -> Iterator[Verdict]:
    broken = {site.name: {name for row in site.rows for name in row.broken} for site in run.sites}
    sites = tuple(name for name, metrics in broken.items() if metrics)
    if sites:
        names = sorted({metric for metrics in broken.values() for metric in metrics})
        yield Verdict(
            "bad",
            f"{named(sites)} reported values that are not finite ({', '.join(names[:4])}).",
            refusal_remedy("non-finite", run.cohort),
            sites,
        )


def _refusals(run: RunRecord) -> Iterator[Verdict]:
    """A finding for each reason, in the words of the gate that refused."""
    found: dict[str, Counter[str]] = {}
    for site in run.sites:
        for row in site.refusals:
            if not expected_absence(row.reason):
                found.setdefault(row.reason, Counter())[site.name] += 1
    for reason, sites in sorted(found.items()):
        why = REASONS.get(reason, "the site or the gate declined")
        yield Verdict(
            "watch",
            f"Refused ({reason}): {named(list(sites))}, {sum(sites.values())} time(s). Meaning: "
            f"{why}. Merged weights are as if those updates had never come.",
            refusal_remedy(reason, run.cohort) + " Repeated refusals of one site deserve a call.",
            tuple(sites),
        )


def _absences(run: RunRecord) -> Iterator[Verdict]:
    if run.setting("federation.sites_per_round", 0):
        return
    missed = tuple(site.name for site in run.sites if missed_rounds(run, site))
    if missed:
        yield Verdict(
            "watch",
            f"{named(missed)} did not answer in time in every round.",
            "Compare their seconds per round with federation.deadline_s, and ask whether the "
            "machine was busy or off.",
            missed,
        )

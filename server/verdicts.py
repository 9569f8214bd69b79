"""What a run's numbers mean, in words: is it healthy, which site is not, what to do.

The rules read only what sites report. They can show that something is wrong; that the features
are useful only a downstream task can show.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from server.admission import REASONS
from server.attendance import REFUSAL_REMEDY, expected_absence, missed_rounds
from server.curves import short
from server.run_record import RunRecord, SiteRecord

Level = Literal["good", "watch", "bad"]
REC_RATIO_GOAL = 0.7
RANK_SHARE = 0.5
_HEADS = {"information_cls": "cls", "information_patch": "patch"}


@dataclass(frozen=True)
class Verdict:
    """One finding: a level, a fact, a remedy, and the sites it is about."""

    level: Level
    fact: str
    remedy: str = ""
    sites: tuple[str, ...] = field(default=())


def judge(run: RunRecord) -> list[Verdict]:
    """All findings, the gravest first."""
    if not run.rounds:
        return [_no_rounds()]
    found = [
        *_progress(run),
        *_collapse(run),
        *_reconstruction(run),
        *_rank(run),
        *_broken(run),
        *_refusals(run),
        *_absences(run),
    ]
    order = {"bad": 0, "watch": 1, "good": 2}
    return sorted(found, key=lambda verdict: order[verdict.level])


def headline(verdicts: list[Verdict]) -> Verdict:
    """The whole run in one sentence."""
    worst = verdicts[0].level if verdicts else "good"
    concerned = sorted(
        {site for verdict in verdicts[:] if verdict.level == worst for site in verdict.sites}
    )
    where = f" Concerned: {_named(concerned)}." if concerned and worst != "good" else ""
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


def _collapse(run: RunRecord) -> Iterator[Verdict]:
    """The gates of the collapse monitor: information in the targets of each head that trains."""
    gate = float(run.setting("monitor.gate_nat", 0.1))
    window = run.setting("monitor.window", 256)
    judged = [site for site in run.sites if _window_is_full(site, window)]
    if not judged:
        yield Verdict(
            "watch",
            "The collapse monitor has no verdict yet: no site's window is full.",
            f"It needs {window} volumes at a site (monitor.window); train on.",
        )
        return
    collapsed = False
    for metric, head in _trained_heads(run).items():
        below = {
            site.name: value for site in judged if (value := _information(site, metric)) <= gate
        }
        if below:
            collapsed = True
            yield _collapsed(run, head, below)
    flagged = tuple(site.name for site in judged if site.last("collapsed"))
    if flagged and not collapsed:
        yield Verdict(
            "bad",
            f"The collapse monitor at {_named(flagged)} failed a gate other than information: "
            "the marginal entropy of targets, the effective rank or the spread of cls tokens.",
            "See the curves of rank and spread, and the site's log, which names the gate.",
            flagged,
        )
    elif not collapsed:
        some = "" if len(judged) == len(run.sites) else f" ({len(judged)} sites judged so far)"
        yield Verdict(
            "good",
            f"No site has collapsed{some}: the information in the targets of every trained head "
            f"is above its gate of {short(gate)} nat in the newest round. That is necessary, not "
            "a proof of learning.",
        )


def _information(site: SiteRecord, metric: str) -> float:
    value = site.last(metric)
    return math.inf if value is None else value


def _trained_heads(run: RunRecord) -> dict[str, str]:
    return {m: head for m, head in _HEADS.items() if run.setting(f"agssd.loss.{head}", 1.0) > 0}


def _window_is_full(site: SiteRecord, window: int) -> bool:
    measured = any(site.last(metric) is not None for metric in _HEADS)
    filled = site.last("monitor_volumes")
    return measured and (filled is None or filled >= window)


def _collapsed(run: RunRecord, head: str, below: dict[str, float]) -> Verdict:
    listed = ", ".join(f"{name} {short(value)}" for name, value in list(below.items())[:6])
    more = f" and {len(below) - 6} more" if len(below) > 6 else ""
    everywhere = len(below) == len(run.sites)
    norm = "ema" if head == "cls" else "volume"
    recipe = (
        f"Keep target.teacher_temperature at 0.04, set head.input_norm_{head} = {norm}, raise "
        "training.batch_size or lower teacher.ema_momentum, and start again from an earlier round."
    )
    local = (
        "First check that this site's volumes differ from each other and that their windowing "
        "is right; then as for all sites: "
    )
    return Verdict(
        "bad",
        f"Collapse of the {head} head at {listed}{more} (information in nat): "
        f"{_kind(run, head, tuple(below))}. A smoothly falling loss does not contradict this.",
        recipe if everywhere else local + recipe[0].lower() + recipe[1:],
        tuple(below),
    )


def _kind(run: RunRecord, head: str, names: tuple[str, ...]) -> str:
    """Uniform collapse leaves the entropy of the mean target high, constant collapse low."""
    sites = [site for site in run.sites if site.name in names]
    means = [site.last(f"entropy_{head}_marginal") for site in sites]
    known = [value for value in means if value is not None]
    prototypes = run.setting("agssd.head.prototypes")
    if not known or not prototypes:
        return "targets no longer depend on what is seen"
    if sum(known) / len(known) < 0.5 * math.log(prototypes):
        return "everything falls on a few prototypes (constant collapse)"
    return "every target is nearly the same wide distribution (uniform collapse)"


def _reconstruction(run: RunRecord) -> Iterator[Verdict]:
    last = {site.name: site.last("rec_ratio") for site in run.sites}
    known = {name: value for name, value in last.items() if value is not None}
    if not known:
        return
    late = 2 * run.completed_rounds >= float(run.setting("federation.rounds", 0))
    stuck = tuple(name for name, value in known.items() if value >= 1 and late)
    slow = tuple(
        name for name, value in known.items() if value > REC_RATIO_GOAL and name not in stuck
    )
    if stuck:
        yield Verdict(
            "bad",
            f"At {_named(stuck)} the reconstruction of hidden tokens is no better than one grey "
            "value for each volume.",
            "Train longer; if it does not fall, raise loss.rec or the learning rate and look at "
            "the windowing of these scans.",
            stuck,
        )
    if slow:
        yield Verdict(
            "watch",
            f"At {_named(slow)} the reconstruction error is still above {REC_RATIO_GOAL:g} of "
            "that of the best single grey value.",
            "Usual early in a run; train on, and look again past the middle of the planned rounds.",
            slow,
        )
    if not stuck and not slow:
        yield Verdict(
            "good",
            f"Every site reconstructs hidden tokens with at most {REC_RATIO_GOAL:g} of the error "
            "of the best single grey value.",
        )


def _rank(run: RunRecord) -> Iterator[Verdict]:
    fallen = tuple(
        site.name
        for site in run.sites
        if (site.first("effective_rank") or 0) > 0
        and (site.last("effective_rank") or 0) < RANK_SHARE * (site.first("effective_rank") or 0)
    )
    if fallen:
        yield Verdict(
            "watch",
            f"The effective rank of teacher tokens at {_named(fallen)} is under "
            f"{RANK_SHARE:.0%} of where it began: features may be losing dimensions.",
            "Follow the curve; if information falls too, lower the learning rate.",
            fallen,
        )


def _broken(run: RunRecord) -> Iterator[Verdict]:
    broken = {site.name: {name for row in site.rows for name in row.broken} for site in run.sites}
    sites = tuple(name for name, metrics in broken.items() if metrics)
    if sites:
        names = sorted({metric for metrics in broken.values() for metric in metrics})
        yield Verdict(
            "bad",
            f"{_named(sites)} reported values that are not finite ({', '.join(names[:4])}).",
            "Lower training.optimiser.learning_rate, or train with precision = fp32.",
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
            f"Refused ({reason}): {_named(list(sites))}, {sum(sites.values())} time(s). Meaning: "
            f"{why}. Merged weights are as if those updates had never come.",
            REFUSAL_REMEDY.get(reason, "Compare software version and configuration with the site.")
            + " Repeated refusals of one site deserve a call.",
            tuple(sites),
        )


def _absences(run: RunRecord) -> Iterator[Verdict]:
    if run.setting("federation.sites_per_round", 0):
        return
    missed = tuple(site.name for site in run.sites if missed_rounds(run, site))
    if missed:
        yield Verdict(
            "watch",
            f"{_named(missed)} did not answer in time in every round.",
            "Compare their seconds per round with federation.deadline_s, and ask whether the "
            "machine was busy or off.",
            missed,
        )


def _named(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"

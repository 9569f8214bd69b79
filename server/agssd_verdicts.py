"""What AG-SSD's numbers mean: information in the targets, reconstruction, rank of tokens."""

import math
from collections.abc import Iterator

from agssd_core.curves import short
from server.finding import Verdict, named
from server.run_record import RunRecord, SiteRecord

REC_RATIO_GOAL = 0.7
RANK_SHARE = 0.5
_HEADS = {"information_cls": "cls", "information_patch": "patch"}


def judge_agssd(run: RunRecord) -> Iterator[Verdict]:
    """The rules of the CT and MR cohort."""
    yield from _collapse(run)
    yield from _reconstruction(run)
    yield from _rank(run)


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
            f"The collapse monitor at {named(flagged)} failed a gate other than information: "
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
            f"At {named(stuck)} the reconstruction of hidden tokens is no better than one grey "
            "value for each volume.",
            "Train longer; if it does not fall, raise loss.rec or the learning rate and look at "
            "the windowing of these scans.",
            stuck,
        )
    if slow:
        yield Verdict(
            "watch",
            f"At {named(slow)} the reconstruction error is still above {REC_RATIO_GOAL:g} of "
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
            f"The effective rank of teacher tokens at {named(fallen)} is under "
            f"{RANK_SHARE:.0%} of where it began: features may be losing dimensions.",
            "Follow the curve; if information falls too, lower the learning rate.",
            fallen,
        )

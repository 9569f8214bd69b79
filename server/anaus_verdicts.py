"""What ANAUS's numbers mean: do projections still tell anatomies apart, and do views overlap."""

from collections.abc import Iterator

from agssd_core.curves import short
from server.finding import Verdict, named
from server.run_record import RunRecord, SiteRecord

RANK_SHARE = 0.25
SPREAD = 0.05
VALID_SHARE = 0.5
_RECIPE = (
    "Keep anaus.loss.align on, raise anaus.batch_size or lower anaus.optimiser.learning_rate, and "
    "start again from an earlier round."
)


def judge_anaus(run: RunRecord) -> Iterator[Verdict]:
    """The rules of the ultrasound cohort."""
    yield from _collapse(run)
    yield from _early_rank(run)
    yield from _overlap(run)
    yield from _anatomies(run)


def _collapse(run: RunRecord) -> Iterator[Verdict]:
    """The gates of the collapse monitor, once its window is full."""
    window = run.setting("monitor.window", 256)
    judged = [site for site in run.sites if _window_is_full(site, window)]
    if not judged:
        yield Verdict(
            "watch",
            "The collapse monitor has no verdict yet: no site's window is full.",
            f"It needs {window} frames at a site (monitor.window); train on.",
        )
        return
    gap = float(run.setting("monitor.gate_gap", 0.02))
    found = [*_apart(judged, gap), *_spread(judged), *_rank(judged)]
    yield from found
    named_already = {site for verdict in found for site in verdict.sites}
    flagged = [s.name for s in judged if s.last("collapsed") and s.name not in named_already]
    if flagged:
        yield Verdict(
            "bad",
            f"The collapse monitor at {named(flagged)} failed a gate in the newest round.",
            "See that site's log, which names the gate. " + _RECIPE,
            tuple(flagged),
        )
    if not found and not flagged:
        some = "" if len(judged) == len(run.sites) else f" ({len(judged)} sites judged so far)"
        yield Verdict("good", f"No site has collapsed{some}: {_lead(judged, gap)}")


def _lead(judged: list[SiteRecord], gap: float) -> str:
    leads = [value for site in judged if (value := site.last("anatomy_gap")) is not None]
    if not leads:
        return "spread and rank of the projections hold. That is no proof of learning."
    return (
        "two views of one anatomy lie closer together than different anatomies of a frame, by "
        f"{short(min(leads))} of cosine or more (the gate is {short(gap)}). That is necessary, "
        "not a proof of learning."
    )


def _apart(judged: list[SiteRecord], gap: float) -> Iterator[Verdict]:
    # Frames that hold one anatomy each have no other to be compared with.
    low = {
        site.name: value
        for site in judged
        if (value := site.last("anatomy_gap")) is not None
        and value <= gap
        and site.last("other_anatomy_cosine") != 0
    }
    if low:
        listed = ", ".join(f"{name} {short(value)}" for name, value in list(low.items())[:6])
        yield Verdict(
            "bad",
            f"Anatomies are not told apart at {listed}: two views of one anatomy lie no closer "
            f"together than different anatomies of a frame (lead of the cosine; the gate is "
            f"{short(gap)}). A smoothly falling loss does not contradict this.",
            "First look at this site's label maps: do they follow what is seen? Then: "
            + _RECIPE[0].lower()
            + _RECIPE[1:],
            tuple(low),
        )


def _spread(judged: list[SiteRecord]) -> Iterator[Verdict]:
    flat = tuple(site.name for site in judged if _below(site, "projection_std", SPREAD))
    if flat:
        yield Verdict(
            "bad",
            f"At {named(flat)} all projections are nearly one vector (spread of {SPREAD:g} or "
            "less on the unit sphere).",
            _RECIPE,
            flat,
        )


def _rank(judged: list[SiteRecord]) -> Iterator[Verdict]:
    fallen = tuple(s.name for s in judged if _below(s, "effective_rank_share", RANK_SHARE))
    if fallen:
        yield Verdict(
            "bad",
            f"The effective rank of the teacher's projections at {named(fallen)} is under "
            f"{RANK_SHARE:.0%} of where it began: anatomies lie in ever fewer dimensions.",
            _RECIPE,
            fallen,
        )


def _early_rank(run: RunRecord) -> Iterator[Verdict]:
    """A rank that has fallen before the monitor judges deserves a look, not more."""
    window = run.setting("monitor.window", 256)
    fallen = tuple(
        site.name
        for site in run.sites
        if not _window_is_full(site, window) and _below(site, "effective_rank_share", RANK_SHARE)
    )
    if fallen:
        yield Verdict(
            "watch",
            f"The effective rank at {named(fallen)} is under {RANK_SHARE:.0%} of where it began, "
            "but the monitor's window is not full yet.",
            "Follow the curve over the next rounds.",
            fallen,
        )


def _overlap(run: RunRecord) -> Iterator[Verdict]:
    few = tuple(site.name for site in run.sites if _below(site, "valid_share", VALID_SHARE))
    if few:
        yield Verdict(
            "watch",
            f"At {named(few)} under {VALID_SHARE:.0%} of the frames gave two views that overlap "
            "enough, so core-region prediction learns from few of them.",
            "Raise anaus.augment.min_scale or anaus.overlap.tries, or lower "
            "anaus.overlap.min_share.",
            few,
        )


def _anatomies(run: RunRecord) -> Iterator[Verdict]:
    bare = tuple(site.name for site in run.sites if _below(site, "anatomies_per_view", 1.0))
    if bare:
        yield Verdict(
            "watch",
            f"At {named(bare)} a view holds less than one anatomy on average, so there is little "
            "to align.",
            "Look at the site's label maps; lower lpsam's thresholds, give other label maps, or "
            "use anaus.labels = superpixels.",
            bare,
        )


def _below(site: SiteRecord, metric: str, least: float) -> bool:
    value = site.last(metric)
    return value is not None and value < least


def _window_is_full(site: SiteRecord, window: int) -> bool:
    filled = site.last("monitor_frames")
    return site.last("anatomy_gap") is not None and (filled is None or filled >= window)

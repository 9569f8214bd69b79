"""The table of what privacy costs: a row for each model, a column for each question."""

from collections.abc import Mapping, Sequence

from agssd_core.config import RunConfig
from simulation.compare.judge import CONTROLS
from simulation.compare.private import (
    CONTINUED,
    EPSILONS,
    LEVELS,
    NOISELESS,
    PLAIN,
    SCRATCH,
    SOURCES,
    name_of,
)
from simulation.compare.results import Result
from simulation.compare.summary import Summary, budget_of, difference, head, line, shown, summarise

Pair = tuple[str, str]
UNTRAINED = {SCRATCH: "random", CONTINUED: "start"}
"""Of each source: the column with what its models start from."""


def privacy_table(results: Sequence[Result], settings: RunConfig) -> str:
    """The whole comparison as Markdown."""
    summaries = summarise(results, settings)
    parts = [
        f"# {settings.name}: what privacy costs",
        budget_of(results, settings),
        _terms(settings),
        "## Held-out scans, all sites",
        _main_table(summaries),
        "Mean and 95 % interval over seeds (Student's t). *scratch* starts from random weights, "
        "*continued* from the checkpoint. *plain* is the ordinary step; *noiseless* is the private "
        "step without its noise, and protects nobody either. *informative*: some trained model "
        "leads position, intensity and the untrained network by more than "
        f"{settings.compare.margin:g}.",
        "## Differences, paired by seed",
        "What training added to where it started:",
        _differences(summaries, _gains()),
        "What the recipe, and then the noise, took away:",
        _differences(summaries, _costs()),
        "Bold: zero lies outside the interval.",
        "## What it cost, by site",
        _spent(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _terms(settings: RunConfig) -> str:
    privacy, init = settings.privacy, settings.init
    told = (
        f"Unit: patient. delta {privacy.delta:g}; {privacy.expected_batch:g} patients a step on "
        f"average; clipped to {privacy.max_grad_norm:g}. Every site has its own noise, the least "
        "with which the whole plan costs epsilon at its number of patients. The starting "
        f"checkpoint has weights {str(init.digest)[:16]}..."
    )
    if not privacy.secure_noise:
        told += (
            " Noise and draws follow from the seeds, so that the comparison repeats; models that "
            "protect anybody take them from the operating system."
        )
    return told


def _main_table(summaries: Sequence[Summary]) -> str:
    names = [name_of(level, source) for source in SOURCES for level in LEVELS]
    names += ["start", "random", *CONTROLS]
    rows = [head(["model", *(_title(summary) for summary in summaries)])]
    for name in names:
        values = [
            shown(own.metrics.get(summary.main, {})) if (own := summary.columns.get(name)) else "-"
            for summary in summaries
        ]
        rows.append([line([name, *values])])
    verdicts = ["yes" if summary.informative else "**no**" for summary in summaries]
    rows.append([line(["*informative*", *verdicts])])
    return "\n".join(text for row in rows for text in row)


def _title(summary: Summary) -> str:
    return f"{summary.title} ({summary.main.replace('_', ' ')})"


def _gains() -> list[Pair]:
    pairs = [
        (name_of(level, source), UNTRAINED[source])
        for source in reversed(SOURCES)
        for level in LEVELS
    ]
    return [*pairs, ("start", "random")]


def _costs() -> list[Pair]:
    found = []
    for source in reversed(SOURCES):
        plain, noiseless = name_of(PLAIN, source), name_of(NOISELESS, source)
        found.append((noiseless, plain))
        found += [(name_of(f"epsilon-{epsilon}", source), noiseless) for epsilon in EPSILONS]
    return found


def _differences(summaries: Sequence[Summary], pairs: Sequence[Pair]) -> str:
    rows = [head(["difference", *(_title(summary) for summary in summaries)])]
    for one, other in pairs:
        values = [difference(summary, one, other, "all sites") for summary in summaries]
        rows.append([line([f"{one} - {other}", *values])])
    return "\n".join(text for row in rows for text in row)


def _spent(results: Sequence[Result]) -> str:
    """Each site's noise, rate and epsilon by level; seeds differ in who is held out."""
    found: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for result in results:
        for site, told in result.facts.get("privacy", {}).items():
            own = found.setdefault((result.cell.variant, site), [])
            if told not in own:
                own.append(told)
    rows = [head(["model", "site", "patients drawn a step / patients", "noise", "epsilon"])]
    for (variant, site), told in found.items():
        if "privacy_epsilon" in told[0]:
            columns = [
                _range([each[key] for each in told])
                for key in ("privacy_rate", "privacy_sigma", "privacy_epsilon")
            ]
            rows.append([line([variant, site, *columns])])
    return "\n".join(text for row in rows for text in row)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"

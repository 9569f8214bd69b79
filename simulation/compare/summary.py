"""From raw numbers to a table: arms side by side, with intervals over seeds, worst sites named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from agssd_core.config import RunConfig
from agssd_core.evaluation.interval import Interval, mean_interval, paired_difference
from simulation.compare.judge import CONTROLS
from simulation.compare.results import Result

METRICS = ("dice", "hd95_mm", "balanced_accuracy", "accuracy", "auc")
UNTRAINED = ("random", "start")
AS_CONFIGURED = "federated"
_NO_VALUE = "-"

Question = tuple[str, str, float]
PerSeed = Mapping[int, float]


@dataclass(frozen=True)
class Answers:
    """One column of one question: values by seed.

    Attributes:
        metrics: metric -> seed -> value over all held-out scans; of arm ``alone`` the mean over
            the sites' own models.
        sites: site -> seed -> main metric on that site's held-out scans; of arm ``alone`` what
            the site's own model reaches.
    """

    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    sites: dict[str, dict[int, float]] = field(default_factory=dict)

    def only(self) -> dict[int, float]:
        """By seed, where all labels are at one site; empty otherwise."""
        return dict(next(iter(self.sites.values()))) if len(self.sites) == 1 else {}

    def worst(self) -> dict[int, float]:
        """The lowest site of each seed that has two or more."""
        seeds = {seed for own in self.sites.values() for seed in own}
        found = {}
        for seed in sorted(seeds):
            values = [own[seed] for own in self.sites.values() if seed in own]
            if len(values) > 1:
                found[seed] = min(values)
        return found


@dataclass(frozen=True)
class Summary:
    """One question: the answers of every arm or variant, and of the controls.

    Attributes:
        main: metric by which arms are compared.
        informative: whether a trained arm leads every control by more than the margin; None where
            the question has no controls (fine-tuning).
    """

    question: Question
    main: str
    columns: Mapping[str, Answers]
    informative: bool | None

    @property
    def title(self) -> str:
        """The question in words."""
        task, method, fraction = self.question
        return f"{task}, {method}" + (f" {fraction:.0%}" if method == "finetune" else "")


def summarise(results: Sequence[Result], settings: RunConfig) -> list[Summary]:
    """Group raw numbers by question and column; questions keep the order of the tasks."""
    order = {task.name: place for place, task in enumerate(settings.compare.tasks)}
    questions: dict[Question, list[Result]] = {}
    for result in results:
        cell = result.cell
        questions.setdefault((cell.task, cell.method, cell.fraction), []).append(result)
    return [
        _summary(question, questions[question], settings.compare.margin)
        for question in sorted(questions, key=lambda q: (order.get(q[0], 99), q[1], q[2]))
    ]


def _summary(question: Question, results: Sequence[Result], margin: float) -> Summary:
    columns: dict[str, Answers] = {}
    for name in dict.fromkeys(_column(result) for result in results):
        columns[name] = _answers([r for r in results if _column(r) == name])
    main = results[0].outcome.main
    return Summary(question, main, columns, _informative(columns, main, margin))


def _column(result: Result) -> str:
    return result.cell.variant or result.cell.arm


def _answers(results: Sequence[Result]) -> Answers:
    found = Answers()
    for seed in sorted({result.cell.seed for result in results}):
        own = [result for result in results if result.cell.seed == seed]
        for metric in METRICS:
            values = [r.outcome.metrics[metric] for r in own if metric in r.outcome.metrics]
            if values:
                found.metrics.setdefault(metric, {})[seed] = sum(values) / len(values)
        for result in own:
            for site, metrics in result.outcome.per_site.items():
                if result.cell.site in ("", site) and result.outcome.main in metrics:
                    found.sites.setdefault(site, {})[seed] = metrics[result.outcome.main]
    return found


def _informative(columns: Mapping[str, Answers], main: str, margin: float) -> bool | None:
    controls = [columns[name] for name in CONTROLS if name in columns]
    if not controls:
        return None
    bars = [*controls, *([columns["random"]] if "random" in columns else [])]
    trained = [own for name, own in columns.items() if name not in (*CONTROLS, *UNTRAINED)]
    best = max((_mean(own.metrics.get(main, {})) for own in trained), default=0.0)
    return best > max(_mean(own.metrics.get(main, {})) for own in bars) + margin


def _mean(values: PerSeed) -> float:
    return sum(values.values()) / len(values) if values else 0.0


def comparison_table(results: Sequence[Result], settings: RunConfig) -> str:
    """The whole comparison as Markdown."""
    summaries = summarise(results, settings)
    parts = [
        f"# {settings.name}",
        budget_of(results, settings),
        "## Held-out scans, all sites",
        _main_table(summaries),
        f"Mean and 95 % interval over seeds (Student's t). A task is *not informative* where no "
        f"trained arm leads position, intensity and the untrained network by more than "
        f"{settings.compare.margin:g}. Of arm alone, over all sites, the mean of all sites' own "
        "models.",
        _students(results),
        "## Differences, paired by seed",
        _difference_table(summaries),
        "## Sites",
        _site_table(summaries),
        "## Collapse monitor, last round",
        _monitor_lines(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def budget_of(results: Sequence[Result], settings: RunConfig) -> str:
    """Cohort, updates, seeds and folds in words."""
    plan = settings.for_cohort(settings.cohorts[0]).federation
    seeds = sorted({result.cell.seed for result in results})
    return (
        f"Cohort {settings.cohorts[0]}; {plan.rounds} rounds x {plan.steps_per_round} steps = "
        f"{plan.total_steps} optimiser updates for every trained model; seeds "
        f"{', '.join(map(str, seeds))}; held-out fold 1 of {settings.compare.data.folds} for each "
        "seed in turn."
    )


def _main_table(summaries: Sequence[Summary]) -> str:
    columns = _columns(summaries)
    lines = head(["task", "judged by", "metric", *columns, "informative"])
    for summary in summaries:
        told = {None: _NO_VALUE, True: "yes", False: "**not informative**"}[summary.informative]
        for metric in METRICS:
            if not any(metric in own.metrics for own in summary.columns.values()):
                continue
            values = [
                shown(summary.columns[name].metrics.get(metric, {}))
                if name in summary.columns
                else _NO_VALUE
                for name in columns
            ]
            verdict = told if metric == summary.main else ""
            lines.append(line([*_named(summary), metric.replace("_", " "), *values, verdict]))
    return "\n".join(lines)


def _difference_table(summaries: Sequence[Summary]) -> str:
    pairs = [("federated", name) for name in _columns(summaries) if name != AS_CONFIGURED]
    pairs = [(one, other) for one, other in pairs if other not in CONTROLS]
    lines = head(["task", "judged by", "metric", *(f"{a} - {b}" for a, b in pairs)])
    for summary in summaries:
        for what in _OF:
            values = [difference(summary, one, other, what) for one, other in pairs]
            if any(value != _NO_VALUE for value in values):
                metric = summary.main.replace("_", " ")
                lines.append(line([*_named(summary), f"{metric}, {what}", *values]))
    return "\n".join(lines)


def difference(summary: Summary, one: str, other: str, what: str) -> str:
    """Two columns' difference paired by seed, ``what`` of ``_OF``; bold beyond 0."""
    if one not in summary.columns or other not in summary.columns:
        return _NO_VALUE
    found = [_OF[what](summary.columns[name], summary.main) for name in (one, other)]
    seeds = sorted(found[0].keys() & found[1].keys())
    if not seeds:
        return _NO_VALUE
    interval = paired_difference([found[0][s] for s in seeds], [found[1][s] for s in seeds])
    beyond = interval.low > 0 or interval.high < 0
    return f"**{_written(interval, signed=True)}**" if beyond else _written(interval, signed=True)


_OF: Mapping[str, Callable[[Answers, str], PerSeed]] = {
    "all sites": lambda own, main: own.metrics.get(main, {}),
    "the only site": lambda own, _: own.only(),
    "worst site": lambda own, _: own.worst(),
}


def _site_table(summaries: Sequence[Summary]) -> str:
    columns = _columns(summaries)
    lines = head(["task", "judged by", "site", *columns])
    several = False
    for summary in summaries:
        sites = sorted({site for own in summary.columns.values() for site in own.sites})
        for site in sites:
            values = [
                shown(own.sites.get(site, {}))
                if (own := summary.columns.get(name)) is not None
                else _NO_VALUE
                for name in columns
            ]
            lines.append(line([*_named(summary), site, *values]))
        if len(sites) > 1:
            several = True
            named = [_worst_named(summary.columns.get(name)) for name in columns]
            lines.append(line([*_named(summary), "*worst site*", *named]))
    told = "Of arm alone, a site's own model on that site's held-out scans."
    if not several:
        told += " Fewer than two sites hold labels of held-out patients, so no site is the worst."
    return "\n".join([*lines, "", told])


def _worst_named(answers: Answers | None) -> str:
    """The site with the lowest mean over seeds."""
    means = {} if answers is None else {s: _mean(own) for s, own in answers.sites.items() if own}
    if len(means) < 2:
        return _NO_VALUE
    worst = min(sorted(means), key=lambda site: means[site])
    return f"{worst} {means[worst]:.3f}"


def _students(results: Sequence[Result]) -> str:
    """Which columns are of another network than the others."""
    names = [_column(each) for each in results if each.facts.get("network") == "student"]
    told = ", ".join(dict.fromkeys(names))
    return f"Judged by the merged student, as teachers stay at the sites: {told}." if told else ""


def _monitor_lines(results: Sequence[Result]) -> str:
    lines: dict[str, None] = {}
    for result in results:
        for site, found in result.facts.get("monitor", {}).items():
            told = ", ".join(f"{name} {value:.3g}" for name, value in sorted(found.items()))
            model = "-".join(p for p in (result.cell.arm, result.cell.variant) if p)
            lines[f"- seed {result.cell.seed}, {model}, {site}: {told}"] = None
    return "\n".join(lines)


def _columns(summaries: Sequence[Summary]) -> list[str]:
    found = dict.fromkeys(name for summary in summaries for name in summary.columns)
    last = [name for name in ("random", *CONTROLS) if name in found]
    return [name for name in found if name not in last] + last


def _named(summary: Summary) -> tuple[str, str]:
    task, method, fraction = summary.question
    return task, f"{method} {fraction:.0%}" if method == "finetune" else method


def shown(values: PerSeed) -> str:
    """Mean and interval over seeds."""
    return _written(mean_interval(list(values.values()))) if values else _NO_VALUE


def _written(interval: Interval, *, signed: bool = False) -> str:
    mean = f"{interval.mean:+.3f}" if signed else f"{interval.mean:.3f}"
    half = (interval.high - interval.low) / 2
    return mean if interval.count < 2 else f"{mean} ± {half:.3f}"


def head(names: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(names), f"|{'---|' * len(names)}"]


def line(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"

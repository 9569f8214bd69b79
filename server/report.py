"""The page that a coordinator reads: one file, no script, nothing fetched, no pixel of an image.

Everything comes from ``metrics.jsonl`` and the newest manifest of each cohort. Names and reasons
come from sites, so the template escapes them all.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import BaseLoader, Environment, FileSystemLoader, StrictUndefined

from agssd_core import curves
from agssd_core.measures import CohortMeasures, Measure, measures_of
from agssd_core.weights import write_text
from server.attendance import expected_absence, missed_rounds
from server.cohorts import run_folders
from server.finding import Verdict
from server.run_record import METRICS_FILE, RunRecord, SiteRecord, read_runs
from server.verdicts import gravest_first, headline, judge

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parent


def write_server_report(run_folder: Path) -> Path:
    """Write ``report.html`` from the run folder alone, without any picture.

    Returns:
        The page's path; an earlier page is replaced in one move.
    """
    return write_page(run_folder, FileSystemLoader(TEMPLATES), template="report.html", more={})


def write_page(
    run_folder: Path, loader: BaseLoader, *, template: str, more: Mapping[str, Any]
) -> Path:
    """Render a template over the run's context and write it atomically.

    Args:
        run_folder: holds ``metrics.jsonl`` and ``checkpoints``, or a folder with both for each
            cohort.
        loader: finds the template and the page that it extends.
        template: its name.
        more: further names for the template.
    """
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short=_short, size=_size, duration=_duration, percent=_percent)
    page = environment.get_template(template).render(**_context(run_folder), **more)
    file = run_folder / REPORT_FILE
    write_text(file, page)
    return file


def _context(run_folder: Path) -> dict[str, Any]:
    runs = read_runs(run_folder)
    cohorts = [_cohort(run, alone=len(runs) == 1) for run in runs]
    verdicts = gravest_first(chain.from_iterable(cohort["verdicts"] for cohort in cohorts))
    sites = [site for cohort in cohorts for site in cohort["sites"]]
    return {
        "name": runs[0].name,
        "cohorts": cohorts,
        "written": _written(run_folder),
        "headline": headline(verdicts),
        "damaged_lines": sum(run.damaged_lines for run in runs),
        "site_count": len({site["name"] for site in sites}),
        "up": sum(site["up"] for site in sites),
        "down": sum(site["down"] for site in sites),
        "seconds": sum(site["seconds"] for site in sites),
    }


def _cohort(run: RunRecord, *, alone: bool) -> dict[str, Any]:
    """One cohort's part of the page; ``anchor`` keeps element ids of several apart."""
    verdicts = judge(run)
    styles = _styles(run, verdicts)
    shown = measures_of(run.cohort)
    return {
        "run": run,
        "shown": shown,
        "anchor": "" if alone else f"{run.cohort}-",
        "headline": headline(verdicts),
        "verdicts": verdicts,
        "legend": _legend(styles),
        "monitor": _charts(run, shown.monitor, styles),
        "losses": _charts(run, shown.losses, styles),
        "workings": _charts(run, shown.workings, styles),
        "sites": [_site_line(run, site, styles[site.name]) for site in run.sites],
        "newest": [_newest(run, site) for site in run.sites],
        "columns": [shown.titles[metric] for metric in shown.in_table],
        "shares": _shares(run),
        "facts": _facts(run, shown),
        "merge": _merge_facts(run),
        "config_text": json.dumps(run.config, indent=2, sort_keys=True) if run.config else "",
    }


def _styles(run: RunRecord, verdicts: list[Verdict]) -> dict[str, int | None]:
    """Up to eight sites have a line style each; in a crowd only sites with a finding do."""
    names = [site.name for site in run.sites]
    if len(names) <= curves.MAX_COLOURED:
        return {name: number for number, name in enumerate(names)}
    few = [v.sites for v in verdicts if v.level != "good" and len(v.sites) <= len(names) // 5]
    chosen = list(dict.fromkeys(chain.from_iterable(few)))[: curves.MAX_COLOURED // 2]
    return {name: chosen.index(name) if name in chosen else None for name in names}


def _legend(styles: Mapping[str, int | None]) -> list[tuple[str, str]]:
    entries = [(curves.swatch(style), name) for name, style in styles.items() if style is not None]
    if any(style is None for style in styles.values()):
        entries.append((curves.swatch(None), "each other site"))
        entries.append((curves.MEDIAN_SWATCH, "median and middle half of all sites"))
    return entries


def _charts(
    run: RunRecord, measures: Iterable[Measure], styles: Mapping[str, int | None]
) -> list[dict[str, Any]]:
    rounds = (run.rounds[0], run.rounds[-1]) if run.rounds else None
    together = measures_of(run.cohort).together
    found = []
    for measure in measures:
        gate = None if measure.gate is None else float(run.setting(*measure.gate))
        lines = [
            curves.Line(site.name, site.values(measure.metric), styles[site.name])
            for site in run.sites
        ]
        chart = curves.line_chart(
            lines,
            title=measure.title,
            gate=gate,
            gate_label="" if gate is None else f"gate {curves.short(gate)}",
            rounds=rounds,
            within=_values(run, together) if measure.metric in together else (),
        )
        if chart:
            found.append({"measure": measure, "chart": chart})
    return found


def _values(run: RunRecord, metrics: Iterable[str]) -> list[float]:
    """All values of metrics whose charts share their axis."""
    return [v for metric in metrics for site in run.sites for v in site.values(metric).values()]


def _site_line(run: RunRecord, site: SiteRecord, style: int | None) -> dict[str, Any]:
    refused = Counter(r.reason for r in site.refusals if not expected_absence(r.reason))
    late = sum("late" in r.reason.lower() for r in site.refusals)
    return {
        "name": site.name,
        "swatch": curves.swatch(style),
        "patients": site.patient_count,
        "volumes": site.volume_count,
        "taken": len(site.rows),
        "late": late,
        "missed": None
        if run.setting("federation.sites_per_round", 0)
        else max(0, missed_rounds(run, site) - late),
        "refused": sum(refused.values()),
        "reasons": ", ".join(f"{reason} {count}" for reason, count in refused.most_common(3)),
        "resets": int(sum(row.metrics.get("optimiser_reset", 0) for row in site.rows)),
        "up": site.total("bytes_up"),
        "down": site.total("bytes_down"),
        "seconds": site.total("seconds"),
        "share": _shares(run).get(site.name),
    }


def _newest(run: RunRecord, site: SiteRecord) -> dict[str, Any]:
    cells = []
    for metric in measures_of(run.cohort).in_table:
        values = [v for other in run.sites for v in other.values(metric).values()]
        limits = (min(values), max(values)) if values else (0.0, 1.0)
        rounds = (run.rounds[0], run.rounds[-1]) if run.rounds else (0, 0)
        spark = curves.sparkline(site.values(metric), limits=limits, rounds=rounds)
        cells.append((site.last(metric), spark))
    return {"name": site.name, "cells": cells}


def _shares(run: RunRecord) -> dict[str, float]:
    """Weights p_k of the newest round that was merged."""
    for source in (*(row.extra for row in run.merges[::-1]), run.manifest):
        shares = source.get("shares")
        if isinstance(shares, Mapping) and shares:
            return {str(k): float(v) for k, v in shares.items() if isinstance(v, (int, float))}
    return {}


def _facts(run: RunRecord, shown: CohortMeasures) -> list[tuple[str, str]]:
    found = [(label, run.setting(path)) for path, label in shown.settings]
    return [(label, _plain(value)) for label, value in found if value is not None]


def _merge_facts(run: RunRecord) -> list[tuple[str, str]]:
    """Scalars of the newest merge and the digests that the manifest holds."""
    found: list[tuple[str, str]] = []
    if run.merges:
        row = run.merges[-1]
        found.append(("Newest round", str(row.round)))
        found += [
            (_label(name), curves.short(value)) for name, value in sorted(row.metrics.items())
        ]
        found += [
            (_label(name), _plain(value))
            for name, value in sorted(row.extra.items())
            if isinstance(value, str)
        ]
    found += [
        (_label(name), _plain(value))
        for name, value in sorted(run.manifest.items())
        if isinstance(value, (str, int, float)) and name != "config"
    ]
    for table in ("digests", "versions"):
        entries = run.manifest.get(table)
        if isinstance(entries, Mapping):
            found += [
                (f"{_label(table)}, {name}", _plain(value))
                for name, value in sorted(entries.items())
            ]
    return found


def _label(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " x ".join(str(part) for part in value)
    return curves.short(value) if isinstance(value, float) else str(value)


def _written(run_folder: Path) -> str:
    files = [folder / METRICS_FILE for folder in run_folders(run_folder).values()]
    times = [file.stat().st_mtime for file in files if file.is_file()]
    return f"{datetime.fromtimestamp(max(times), tz=UTC):%Y-%m-%d %H:%M UTC}" if times else ""


def _short(value: float | None) -> str:
    return "-" if value is None else curves.short(value, trim=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{curves.short(count)} {unit}"
        count /= 1000
    return f"{curves.short(count)} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{curves.short(round(seconds, 1))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

"""What a run folder tells: rows of ``metrics.jsonl``, the enrolment, the newest manifest.

Nothing here trusts the folder: a torn last line, an unknown key, a missing number or a row that
is not a row is left out and counted, and the page is written all the same.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.cohorts import run_folders

METRICS_FILE = "metrics.jsonl"
ENROLMENT_FILE = "enrolment.json"
KINDS = ("site", "merge", "refusal")
_NOT_DRAWN = frozenset({"round", "cohort", "site", "kind", "metrics"})


@dataclass(frozen=True)
class Row:
    """One line of ``metrics.jsonl``; ``extra`` holds every key that is not named here.

    Attributes:
        metrics: finite numbers only; ``broken`` names those that were not finite.
    """

    round: int
    cohort: str
    site: str | None
    kind: str
    metrics: Mapping[str, float]
    broken: tuple[str, ...]
    extra: Mapping[str, Any]

    def number(self, name: str) -> float | None:
        """A number from the metrics or the row itself, None when there is none.

        A site's own ``seconds`` are those of its training; the row's include its waiting.
        """
        value: Any = self.metrics.get(name, self.extra.get(name))
        return float(value) if _is_finite(value) else None

    @property
    def reason(self) -> str:
        """Class of a refusal, ``unknown`` when the row names none."""
        return str(self.extra.get("reason") or "unknown")


@dataclass(frozen=True)
class SiteRecord:
    """One site's rows in round order, one for each round, and what was refused or missed."""

    name: str
    rows: tuple[Row, ...]
    refusals: tuple[Row, ...]
    patient_count: int | None
    volume_count: int | None

    def values(self, metric: str) -> dict[int, float]:
        """Round -> value, of the rounds that have one."""
        return {row.round: row.metrics[metric] for row in self.rows if metric in row.metrics}

    def last(self, metric: str) -> float | None:
        """The newest value."""
        return next((row.metrics[metric] for row in self.rows[::-1] if metric in row.metrics), None)

    def first(self, metric: str) -> float | None:
        """The oldest value."""
        return next((row.metrics[metric] for row in self.rows if metric in row.metrics), None)

    def total(self, name: str) -> float:
        """Sum over the rounds taken, 0 when never recorded."""
        return sum(row.number(name) or 0.0 for row in self.rows)


@dataclass(frozen=True)
class RunRecord:
    """A whole run.

    Attributes:
        sites: sorted by name.
        merges: rows of rounds that were closed, one for each round.
        manifest: newest checkpoint's, empty when there is none; ``config`` likewise.
        damaged_lines: lines that could not be read.
    """

    name: str
    sites: tuple[SiteRecord, ...]
    merges: tuple[Row, ...]
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    damaged_lines: int

    @property
    def cohort(self) -> str:
        """Whose run it is, as its rows, its manifest or its configuration say."""
        rows = [*self.merges, *(row for site in self.sites for row in (*site.rows, *site.refusals))]
        said = (
            *(row.cohort for row in rows[-1:]),
            self.manifest.get("cohort"),
            self.setting("federation.cohort"),
        )
        return next((text for text in said if isinstance(text, str) and text), "ct-mr")

    @property
    def completed_rounds(self) -> int:
        """Rounds that ended with merged weights."""
        return sum(_was_merged(row) for row in self.merges)

    @property
    def rounds(self) -> tuple[int, ...]:
        """Every round that has a row."""
        rows = [*self.merges, *(row for site in self.sites for row in (*site.rows, *site.refusals))]
        return tuple(sorted({row.round for row in rows}))

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted name."""
        node: Any = self.config
        for part in path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node


def read_runs(run_folder: Path) -> tuple[RunRecord, ...]:
    """Read every cohort of a run, under the name of the run's folder; at least one record."""
    name = run_folder.resolve().name
    return tuple(
        replace(read_run(folder), name=name) for folder in run_folders(run_folder).values()
    )


def read_run(run_folder: Path) -> RunRecord:
    """Read what is there; an empty folder gives a record without rounds."""
    rows, damaged = _read_rows(run_folder / METRICS_FILE)
    manifest = _newest_manifest(run_folder / "checkpoints")
    return RunRecord(
        name=run_folder.resolve().name,
        sites=_sites(rows, _read_mapping(run_folder / ENROLMENT_FILE)),
        merges=_one_per_round(row for row in rows if row.kind == "merge"),
        manifest=manifest,
        config=_config(manifest),
        damaged_lines=damaged,
    )


def _read_rows(file: Path) -> tuple[list[Row], int]:
    if not file.is_file():
        return [], 0
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [_row(line) for line in lines if line.strip()]
    return [row for row in rows if row is not None], sum(row is None for row in rows)


def _row(line: str) -> Row | None:
    try:
        content = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        return None
    number, site = content.get("round"), content.get("site")
    if not isinstance(number, int) or not isinstance(site, str | None):
        return None
    given = content.get("metrics")
    metrics = given if isinstance(given, dict) else {}
    return Row(
        round=number,
        cohort=str(content.get("cohort", "")),
        site=site,
        kind=content["kind"],
        metrics={name: float(value) for name, value in metrics.items() if _is_finite(value)},
        broken=tuple(sorted(name for name, value in metrics.items() if _is_broken(value))),
        extra={key: value for key, value in content.items() if key not in _NOT_DRAWN}
        | {name: value for name, value in metrics.items() if not isinstance(value, (int, float))},
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _one_per_round(rows: Iterable[Row]) -> tuple[Row, ...]:
    """A resumed run writes the interrupted round again: the newer row counts."""
    newest = {row.round: row for row in rows}
    return tuple(newest[number] for number in sorted(newest))


def _sites(rows: list[Row], enrolment: Mapping[str, Any]) -> tuple[SiteRecord, ...]:
    """Every site that has a row or was enrolled."""
    names = sorted({row.site for row in rows if row.site is not None} | set(enrolment))
    return tuple(
        _site(name, [row for row in rows if row.site == name], enrolment.get(name))
        for name in names
    )


def _site(name: str, rows: list[Row], enrolled: Any) -> SiteRecord:
    refused = {(row.round, row.reason): row for row in rows if row.kind == "refusal"}
    taken = _one_per_round(row for row in rows if row.kind == "site")
    return SiteRecord(
        name=name,
        rows=taken,
        refusals=tuple(refused[key] for key in sorted(refused)),
        patient_count=_count("patient_count", taken, enrolled),
        volume_count=_count("volume_count", taken, enrolled),
    )


def _count(key: str, rows: tuple[Row, ...], enrolled: Any) -> int | None:
    """Patients or volumes: as enrolled, else as the newest row says."""
    if isinstance(enrolled, Mapping) and _is_finite(enrolled.get(key)):
        return int(enrolled[key])
    found = next((row.number(key) for row in rows[::-1] if row.number(key) is not None), None)
    return None if found is None else int(found)


def _newest_manifest(checkpoints: Path) -> dict[str, Any]:
    files = sorted(checkpoints.glob("round-*/manifest.json"), reverse=True)
    return next((content for file in files if (content := _read_mapping(file))), {})


def _read_mapping(file: Path) -> dict[str, Any]:
    """A JSON object, empty when the file is missing, damaged or something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _config(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    config = manifest.get("config")
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError:
            return {}
    return config if isinstance(config, Mapping) else {}


def _was_merged(row: Row) -> bool:
    """A round without quorum leaves a merge row that says so."""
    return row.extra.get("merged", row.metrics.get("merged", 1)) not in (0, False)

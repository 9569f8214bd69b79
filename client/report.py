"""The site's own page: what its rounds measured. It is written to the site's disk and stays there.

One file, no script, nothing fetched. It holds pictures of the site's own scans, so only the owner
of the files can read it, and it is kept as the scans are.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agssd_core import curves
from agssd_core.errors import CatalogueError
from agssd_core.measures import Measure, measures_of
from agssd_core.weights import write_text
from client.history import RoundNote, read_history
from client.memory import RunMemory

if TYPE_CHECKING:
    from client.own_pictures import OwnPictures

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Chart:
    """A metric's heading, a sentence on it, its curve as SVG and its newest value."""

    title: str
    note: str
    svg: str
    newest: str


@dataclass(frozen=True)
class OwnRun:
    """One run as this site saw it; times are local.

    Attributes:
        pictures: of the newest run of a cohort; None for the others.
    """

    name: str
    cohort: str
    rounds: int
    first: str
    newest: str
    groups: tuple[tuple[str, tuple[Chart, ...]], ...]
    damaged: int
    pictures: "OwnPictures | None" = None


def write_site_report(site: Path, *, pictures: bool = True) -> Path:
    """Write ``report.html`` into a site's folder, mode 0600.

    Args:
        site: its folder.
        pictures: draw two of its scans with the networks of the newest run of each cohort.

    Returns:
        The page's path; an earlier page is replaced in one move.

    Raises:
        CatalogueError: the site has taken part in no round yet.
    """
    folders = sorted(path for path in (site / "federation").glob("*") if path.is_dir())
    runs = [run for folder in folders if (run := _run(folder)) is not None]
    if not runs:
        raise CatalogueError(
            "the site has no history of a round yet. Take part in one with `agssd-site run`."
        )
    runs.sort(key=lambda run: run.newest, reverse=True)
    if pictures:
        runs = _with_pictures(site, runs)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        runs=runs,
        written=f"{datetime.now(UTC).astimezone():%Y-%m-%d %H:%M}",
    )
    file = site / REPORT_FILE
    write_text(file, page, private=True)
    return file


def _with_pictures(site: Path, runs: list[OwnRun]) -> list[OwnRun]:
    """Those of each cohort's newest run are drawn; torch is loaded here and not before."""
    from client.own_pictures import own_pictures

    seen: set[str] = set()
    drawn = []
    for run in runs:
        if run.cohort not in seen:
            seen.add(run.cohort)
            run = replace(run, pictures=own_pictures(site, site / "federation" / run.name))
        drawn.append(run)
    return drawn


def _run(folder: Path) -> OwnRun | None:
    notes, damaged = read_history(folder)
    if not notes:
        return None
    cohort = RunMemory(folder).cohort() or "ct-mr"
    shown = measures_of(cohort)
    known = (*shown.monitor, *shown.losses, *shown.workings)
    named = {measure.metric for measure in known}
    names = sorted({name for note in notes.values() for name in note.metrics} - named)
    others = tuple(Measure(name, name.replace("_", " "), "") for name in names)
    parts = (
        ("Is it healthy?", shown.monitor),
        ("Losses", shown.losses),
        ("Workings", shown.workings),
        ("Everything else", others),
    )
    groups = ((title, _charts(measures, notes)) for title, measures in parts)
    times = [note.time for note in notes.values()]
    return OwnRun(
        folder.name,
        cohort,
        len(notes),
        _moment(min(times)),
        _moment(max(times)),
        tuple((title, charts) for title, charts in groups if charts),
        damaged,
    )


def _charts(measures: tuple[Measure, ...], notes: dict[int, RoundNote]) -> tuple[Chart, ...]:
    found = []
    for measure in measures:
        values = {
            number: note.metrics[measure.metric]
            for number, note in notes.items()
            if measure.metric in note.metrics
        }
        svg = curves.line_chart([curves.Line("this site", values, 0)], title=measure.title)
        if svg:
            newest = curves.short(values[max(values)])
            found.append(Chart(measure.title, measure.note, svg, newest))
    return tuple(found)


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC).astimezone():%Y-%m-%d %H:%M}"

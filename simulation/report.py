"""The coordinator's page with pictures: only a simulation holds both the run and the scans."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import FileSystemLoader

from agssd_core.config import Cohort, RunConfig
from agssd_core.data.catalogue import open_catalogue
from agssd_core.errors import AgssdError, CheckpointError
from agssd_core.evaluation.panels import StepOfRun
from agssd_core.evaluation.site_pictures import (
    Draw,
    ShownScan,
    drawer,
    next_step,
    shown_scan,
)
from server.cohorts import cohort_folders
from server.manifest import Checkpoint
from server.report import TEMPLATES, write_page
from server.store import RunStore

log = logging.getLogger(__name__)

PICTURES_FOLDER = "pictures"
# Beyond this many sites one scan each keeps the page at a size that a browser likes.
_SITES_WITH_TWO_SCANS = 8


@dataclass(frozen=True)
class ShownSite:
    """One site's scans, or why there are none."""

    name: str
    scans: tuple[ShownScan, ...]
    problem: str = ""


@dataclass(frozen=True)
class ShownCohort:
    """One cohort's pictures.

    Attributes:
        round: that starts from the checkpoint whose networks are shown.
        problem: why there are no pictures at all.
    """

    round: int
    sites: tuple[ShownSite, ...]
    problem: str = ""


def write_report(run_folder: Path, *, sites: Mapping[str, Path], config: RunConfig) -> Path:
    """Write ``report.html`` with pictures, and the pictures as files beside it.

    The pictures show the step that would come next in each cohort: its views, its mask or its
    overlap, and what the newest merged student and teacher make of them. A site whose pictures
    cannot be made is named on the page with the reason; the page is written all the same.

    Args:
        run_folder: of the run.
        sites: name -> folder of the prepared site.
        config: of the run.

    Returns:
        The page's path.
    """
    torch.set_num_threads(config.threads)
    folders = cohort_folders(run_folder, config)
    shown = {}
    for name, folder in folders.items():
        place = run_folder / PICTURES_FOLDER / (name if len(folders) > 1 else "")
        shown[name] = _cohort(folder, config.for_cohort(name), sites=sites, pictures=place)
    return write_page(
        run_folder,
        FileSystemLoader([Path(__file__).parent, TEMPLATES]),
        template="report_pictures.html",
        more={"shown_cohorts": shown},
    )


def _cohort(
    folder: Path, config: RunConfig, *, sites: Mapping[str, Path], pictures: Path
) -> ShownCohort:
    cohort = config.federation.cohort
    checkpoint, problem = _newest(folder)
    if checkpoint is None:
        return ShownCohort(0, (), problem)
    draw = drawer(checkpoint.weights, config)
    own = {name: path for name, path in sorted(sites.items()) if _may_belong(path, cohort)}
    count = 2 if len(own) <= _SITES_WITH_TWO_SCANS else 1
    place = _empty(pictures)
    shown = tuple(
        _site(path, draw, at=next_step(config, name, checkpoint.round), count=count, folder=place)
        for name, path in own.items()
    )
    return ShownCohort(checkpoint.round, shown)


def _may_belong(site: Path, cohort: Cohort) -> bool:
    """Whether a site has scans for the cohort; one that cannot be opened is named on the page."""
    try:
        return bool(open_catalogue(site).patients_of(cohort))
    except AgssdError:
        return True


def _newest(run_folder: Path) -> tuple[Checkpoint | None, str]:
    try:
        found = RunStore(run_folder).latest()
    except CheckpointError as error:
        return None, str(error)
    return found, "" if found is not None else "There is no checkpoint to show pictures of."


def _site(path: Path, draw: Draw, *, at: StepOfRun, count: int, folder: Path) -> ShownSite:
    try:
        drawn = draw(path, at, count)
    except AgssdError as error:
        log.warning("no pictures of site %s (%s)", at.site, type(error).__name__)
        return ShownSite(at.site, (), str(error))
    for place, (_, pictures) in enumerate(drawn, start=1):
        for picture in pictures:
            (folder / f"{at.site}-{place}-{picture.name}.png").write_bytes(picture.png)
    scans = [shown_scan(heading, pictures) for heading, pictures in drawn]
    return ShownSite(at.site, tuple(scans))


def _empty(folder: Path) -> Path:
    """Pictures of an earlier page would be taken for those of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.png"):
        file.unlink()
    return folder

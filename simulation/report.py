"""The coordinator's page with pictures: only a simulation holds both the run and the scans."""

import base64
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import FileSystemLoader

from agssd_core.config import Cohort, RunConfig
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.frames import SiteFrames
from agssd_core.errors import AgssdError, CheckpointError
from agssd_core.evaluation.drawing import Picture
from agssd_core.evaluation.panels import StepOfRun, step_panels
from agssd_core.evaluation.pictures import draw_pictures
from agssd_core.evaluation.us_panels import frame_panels
from agssd_core.evaluation.us_pictures import draw_frame_pictures, sources_in_words
from agssd_core.models.anaus import AnausPair
from agssd_core.models.student_teacher import StudentTeacher
from agssd_core.training.anaus_build import build_pair
from agssd_core.training.build import build_model
from agssd_core.weights import group
from server.cohorts import cohort_folders
from server.manifest import Checkpoint
from server.report import TEMPLATES, write_page
from server.store import RunStore

log = logging.getLogger(__name__)

PICTURES_FOLDER = "pictures"
# Beyond this many sites one scan each keeps the page at a size that a browser likes.
_SITES_WITH_TWO_SCANS = 8
# Draws (site's folder, step, how many scans): a heading and pictures for each.
Draw = Callable[[Path, StepOfRun, int], list[tuple[str, tuple[Picture, ...]]]]


@dataclass(frozen=True)
class ShownPicture:
    """A picture as the page embeds it."""

    title: str
    text: str
    uri: str


@dataclass(frozen=True)
class ShownScan:
    """The pictures of one volume or frame."""

    heading: str
    pictures: tuple[ShownPicture, ...]


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


def load_model(checkpoint: Checkpoint, config: RunConfig) -> StudentTeacher:
    """The merged student and teacher of a checkpoint of the CT and MR cohort."""
    model = build_model(config.agssd, seed=config.seed)
    weights = checkpoint.weights
    model.load_shared_weights(weights, include_teacher=bool(group(weights, "teacher")))
    return model.eval()


def load_pair(checkpoint: Checkpoint, config: RunConfig) -> AnausPair:
    """The merged student and teacher of a checkpoint of the ultrasound cohort."""
    pair = build_pair(config.anaus, seed=config.seed)
    weights = checkpoint.weights
    pair.load_shared_weights(weights, include_teacher=bool(group(weights, "teacher")))
    return pair


def _cohort(
    folder: Path, config: RunConfig, *, sites: Mapping[str, Path], pictures: Path
) -> ShownCohort:
    cohort = config.federation.cohort
    checkpoint, problem = _newest(folder)
    if checkpoint is None:
        return ShownCohort(0, (), problem)
    draw = _of_frames(checkpoint, config) if cohort == "us" else _of_volumes(checkpoint, config)
    own = {name: path for name, path in sorted(sites.items()) if _may_belong(path, cohort)}
    count = 2 if len(own) <= _SITES_WITH_TWO_SCANS else 1
    place = _empty(pictures)
    shown = tuple(
        _site(path, draw, at=_next_step(config, name, checkpoint.round), count=count, folder=place)
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


def _next_step(config: RunConfig, site: str, number: int) -> StepOfRun:
    """The first step of the round that starts from this checkpoint."""
    us = config.federation.cohort == "us"
    return StepOfRun(
        seed=config.seed,
        site=site,
        step=number * config.federation.steps_per_round,
        total_steps=config.federation.total_steps,
        batch_size=config.anaus.batch_size if us else config.training.batch_size,
    )


def _of_volumes(checkpoint: Checkpoint, config: RunConfig) -> Draw:
    model = load_model(checkpoint, config)

    def draw(path: Path, at: StepOfRun, count: int) -> list[tuple[str, tuple[Picture, ...]]]:
        volumes = SiteVolumes.open(path, config.data)
        panels = step_panels(model, volumes, agssd=config.agssd, at=at, count=count)
        return [
            (f"Volume {place} of {len(panels)}, {found.modality}", draw_pictures(found))
            for place, found in enumerate(panels, start=1)
        ]

    return draw


def _of_frames(checkpoint: Checkpoint, config: RunConfig) -> Draw:
    pair = load_pair(checkpoint, config)

    def draw(path: Path, at: StepOfRun, count: int) -> list[tuple[str, tuple[Picture, ...]]]:
        frames = SiteFrames.open(path, config.data, labels=config.anaus.labels)
        panels = frame_panels(pair, frames, anaus=config.anaus, at=at, count=count)
        labels = sources_in_words(frames.label_source)
        return [
            (f"Frame {place} of {len(panels)}, labels by {labels}", draw_frame_pictures(found))
            for place, found in enumerate(panels, start=1)
        ]

    return draw


def _site(path: Path, draw: Draw, *, at: StepOfRun, count: int, folder: Path) -> ShownSite:
    try:
        drawn = draw(path, at, count)
    except AgssdError as error:
        log.warning("no pictures of site %s (%s)", at.site, type(error).__name__)
        return ShownSite(at.site, (), str(error))
    for place, (_, pictures) in enumerate(drawn, start=1):
        for picture in pictures:
            (folder / f"{at.site}-{place}-{picture.name}.png").write_bytes(picture.png)
    scans = [ShownScan(heading, tuple(map(_embedded, pictures))) for heading, pictures in drawn]
    return ShownSite(at.site, tuple(scans))


def _embedded(picture: Picture) -> ShownPicture:
    coded = base64.b64encode(picture.png).decode("ascii")
    return ShownPicture(picture.title, picture.text, f"data:image/png;base64,{coded}")


def _empty(folder: Path) -> Path:
    """Pictures of an earlier page would be taken for those of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.png"):
        file.unlink()
    return folder

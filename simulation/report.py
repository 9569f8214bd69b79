"""The coordinator's page with pictures: only a simulation holds both the run and the scans."""

import base64
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import FileSystemLoader

from agssd_core.config import RunConfig
from agssd_core.data.cache import SiteVolumes
from agssd_core.errors import AgssdError, CheckpointError
from agssd_core.evaluation.panels import StepOfRun, step_panels
from agssd_core.evaluation.pictures import Picture, draw_pictures
from agssd_core.models.student_teacher import StudentTeacher
from agssd_core.training.build import build_model
from agssd_core.weights import group
from server.manifest import Checkpoint
from server.report import TEMPLATES, write_page
from server.store import RunStore

log = logging.getLogger(__name__)

PICTURES_FOLDER = "pictures"
# Beyond this many sites one volume each keeps the page at a size that a browser likes.
_SITES_WITH_TWO_VOLUMES = 8


@dataclass(frozen=True)
class ShownPicture:
    """A picture as the page embeds it."""

    title: str
    text: str
    uri: str


@dataclass(frozen=True)
class ShownVolume:
    """One volume's pictures."""

    heading: str
    pictures: tuple[ShownPicture, ...]


@dataclass(frozen=True)
class ShownSite:
    """One site's volumes, or why there are none."""

    name: str
    volumes: tuple[ShownVolume, ...]
    problem: str = ""


def write_report(run_folder: Path, *, sites: Mapping[str, Path], config: RunConfig) -> Path:
    """Write ``report.html`` with pictures, and the pictures as files beside it.

    The pictures show the step that would come next: its crops, its mask, and what the newest
    merged student and teacher make of them. A site whose pictures cannot be made is named on the
    page with the reason; the page is written all the same.

    Args:
        run_folder: of the run.
        sites: name -> folder of the prepared site.
        config: of the run.

    Returns:
        The page's path.
    """
    checkpoint, problem = _newest(run_folder)
    shown: list[ShownSite] = []
    if checkpoint is not None:
        torch.set_num_threads(config.threads)
        model = load_model(checkpoint, config)
        folder = _empty(run_folder / PICTURES_FOLDER)
        count = 2 if len(sites) <= _SITES_WITH_TWO_VOLUMES else 1
        for name, path in sorted(sites.items()):
            at = _next_step(config, name, checkpoint.round)
            shown.append(_site(path, model, at=at, config=config, count=count, folder=folder))
    number = checkpoint.round if checkpoint is not None else 0
    return write_page(
        run_folder,
        FileSystemLoader([Path(__file__).parent, TEMPLATES]),
        template="report_pictures.html",
        more={"picture_sites": shown, "picture_round": number, "picture_problem": problem},
    )


def load_model(checkpoint: Checkpoint, config: RunConfig) -> StudentTeacher:
    """The merged student and teacher of a checkpoint."""
    model = build_model(config.agssd, seed=config.seed)
    weights = checkpoint.weights
    model.load_shared_weights(weights, include_teacher=bool(group(weights, "teacher")))
    return model.eval()


def _newest(run_folder: Path) -> tuple[Checkpoint | None, str]:
    try:
        found = RunStore(run_folder).latest()
    except CheckpointError as error:
        return None, str(error)
    return found, "" if found is not None else "There is no checkpoint to show pictures of."


def _next_step(config: RunConfig, site: str, number: int) -> StepOfRun:
    """The first step of the round that starts from this checkpoint."""
    return StepOfRun(
        seed=config.seed,
        site=site,
        step=number * config.federation.steps_per_round,
        total_steps=config.federation.total_steps,
        batch_size=config.training.batch_size,
    )


def _site(
    path: Path,
    model: StudentTeacher,
    *,
    at: StepOfRun,
    config: RunConfig,
    count: int,
    folder: Path,
) -> ShownSite:
    try:
        volumes = SiteVolumes.open(path, config.data)
        panels = step_panels(model, volumes, agssd=config.agssd, at=at, count=count)
    except AgssdError as error:
        log.warning("no pictures of site %s (%s)", at.site, type(error).__name__)
        return ShownSite(at.site, (), str(error))
    shown = []
    for place, found in enumerate(panels, start=1):
        pictures = draw_pictures(found)
        for picture in pictures:
            (folder / f"{at.site}-{place}-{picture.name}.png").write_bytes(picture.png)
        heading = f"Volume {place} of {len(panels)}, {found.modality}"
        shown.append(ShownVolume(heading, tuple(_embedded(picture) for picture in pictures)))
    return ShownSite(at.site, tuple(shown))


def _embedded(picture: Picture) -> ShownPicture:
    coded = base64.b64encode(picture.png).decode("ascii")
    return ShownPicture(picture.title, picture.text, f"data:image/png;base64,{coded}")


def _empty(folder: Path) -> Path:
    """Pictures of an earlier page would be taken for those of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.png"):
        file.unlink()
    return folder

"""Pictures of one site's scans under a run's networks, for a page that stays with the scans."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agssd_core.config import RunConfig
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.frames import SiteFrames
from agssd_core.evaluation.drawing import Picture
from agssd_core.evaluation.panels import StepOfRun, step_panels
from agssd_core.evaluation.pictures import draw_pictures
from agssd_core.evaluation.us_panels import frame_panels
from agssd_core.evaluation.us_pictures import draw_frame_pictures, sources_in_words
from agssd_core.models.anaus import AnausPair
from agssd_core.models.pair import NetworkPair
from agssd_core.models.student_teacher import StudentTeacher
from agssd_core.training.anaus_build import build_pair
from agssd_core.training.build import build_model
from agssd_core.weights import Weights, group

Draw = Callable[[Path, StepOfRun, int], list[tuple[str, tuple[Picture, ...]]]]
"""Draws (site's folder, step, how many scans): a heading and pictures for each."""


@dataclass(frozen=True)
class ShownPicture:
    """A picture as a page embeds it."""

    title: str
    text: str
    uri: str


@dataclass(frozen=True)
class ShownScan:
    """The pictures of one volume or frame."""

    heading: str
    pictures: tuple[ShownPicture, ...]


def drawer(weights: Weights, config: RunConfig) -> Draw:
    """What draws a site's scans with these networks.

    Args:
        weights: student and state, and the teacher where there is one.
        config: of the cohort.

    Raises:
        WeightsError: the weights do not fit the configuration.
    """
    us = config.federation.cohort == "us"
    return _of_frames(weights, config) if us else _of_volumes(weights, config)


def next_step(config: RunConfig, site: str, number: int) -> StepOfRun:
    """The first step of the round that starts from checkpoint ``number``."""
    us = config.federation.cohort == "us"
    return StepOfRun(
        seed=config.seed,
        site=site,
        step=number * config.federation.steps_per_round,
        total_steps=config.federation.total_steps,
        batch_size=config.anaus.batch_size if us else config.training.batch_size,
    )


def shown_scan(heading: str, pictures: tuple[Picture, ...]) -> ShownScan:
    """The pictures of a scan, embedded."""
    return ShownScan(heading, tuple(map(_embedded, pictures)))


def load_model(weights: Weights, config: RunConfig) -> StudentTeacher:
    """Student and teacher of the CT and MR cohort; without a teacher it is the student."""
    model = build_model(config.agssd, seed=config.seed)
    _load(model, weights)
    return model.eval()


def load_pair(weights: Weights, config: RunConfig) -> AnausPair:
    """Student and teacher of the ultrasound cohort; without a teacher it is the student."""
    pair = build_pair(config.anaus, seed=config.seed)
    _load(pair, weights)
    return pair


def _load(pair: NetworkPair, weights: Weights) -> None:
    teacher = bool(group(weights, "teacher"))
    pair.load_shared_weights(weights, include_teacher=teacher)
    if not teacher:
        pair.update_teacher(ema_momentum=0.0)


def _of_volumes(weights: Weights, config: RunConfig) -> Draw:
    model = load_model(weights, config)

    def draw(path: Path, at: StepOfRun, count: int) -> list[tuple[str, tuple[Picture, ...]]]:
        volumes = SiteVolumes.open(path, config.data)
        panels = step_panels(model, volumes, agssd=config.agssd, at=at, count=count)
        return [
            (f"Volume {place} of {len(panels)}, {found.modality}", draw_pictures(found))
            for place, found in enumerate(panels, start=1)
        ]

    return draw


def _of_frames(weights: Weights, config: RunConfig) -> Draw:
    pair = load_pair(weights, config)

    def draw(path: Path, at: StepOfRun, count: int) -> list[tuple[str, tuple[Picture, ...]]]:
        frames = SiteFrames.open(path, config.data, labels=config.anaus.labels)
        panels = frame_panels(pair, frames, anaus=config.anaus, at=at, count=count)
        labels = sources_in_words(frames.label_source)
        return [
            (f"Frame {place} of {len(panels)}, labels by {labels}", draw_frame_pictures(found))
            for place, found in enumerate(panels, start=1)
        ]

    return draw


def _embedded(picture: Picture) -> ShownPicture:
    coded = base64.b64encode(picture.png).decode("ascii")
    return ShownPicture(picture.title, picture.text, f"data:image/png;base64,{coded}")

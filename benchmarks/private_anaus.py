"""ANAUS's private step and the ordinary step of the same patients' terms, for ``bench_dp``.

One frame a patient, GroupNorm, negatives from the patient's own frame: the terms of the private
recipe in both, so that their gradients can be held against each other.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agssd_core.config import RunConfig, parse_config
from agssd_core.noise import NoiseStream
from agssd_core.training.anaus_build import build_lars, build_pair
from agssd_core.training.anaus_step import AnausLearner
from agssd_core.training.privacy.anaus_losses import (
    PatientFrame,
    frame_losses,
    idle_parameters,
    patient_frame,
)
from agssd_core.training.privacy.gradients import ClippedSum
from agssd_core.training.privacy.mechanism import set_private_gradients
from agssd_core.views.us_batch import UsBatch
from benchmarks.bench_anaus import made_batch


def configured(mode: str, *, quick: bool) -> RunConfig:
    """The tiny preset with eight patients, or four."""
    batch = 4 if quick else 8
    return parse_config(
        {
            "preset": "tiny",
            "cohorts": ["us"],
            "anaus": {"backbone": {"norm": "group"}, "share_statistics": False},
            "privacy": {
                "enabled": True,
                "mode": mode,
                "expected_batch": batch,
                "max_grad_norm": 1e6,
            },
        }
    ).for_cohort("us")


def private_way(config: RunConfig) -> Callable[[], Tensor]:
    """Clip, sum, noise, step; gives the mean gradient before the noise."""
    learner, frames = _learner(config), _frames(config)
    privacy, stream = config.privacy, NoiseStream.from_system()
    student = learner.pair.student
    clipped = ClippedSum(student, max_grad_norm=privacy.max_grad_norm, mode=privacy.mode)

    def losses(chosen: Sequence[int]) -> Tensor:
        return frame_losses(learner.pair, [frames[place] for place in chosen], config.anaus)

    def run() -> Tensor:
        clipped.add(losses, len(frames))
        mean = torch.cat([total.flatten() for total in clipped.totals()]) / len(frames)
        set_private_gradients(clipped.parameters, clipped.totals(), privacy, stream)
        learner.optimiser.step()
        learner.pair.update_teacher(ema_momentum=1.0)
        clipped.reset()
        return mean

    return run


def ordinary_way(config: RunConfig) -> Callable[[], Tensor]:
    """One backward pass of the mean of the same losses, and a step."""
    learner, frames = _learner(config), _frames(config)
    trained = [item for item in learner.pair.student.parameters() if item.requires_grad]

    def run() -> Tensor:
        learner.optimiser.zero_grad(set_to_none=True)
        frame_losses(learner.pair, frames, config.anaus).mean().backward()
        learner.optimiser.step()
        learner.pair.update_teacher(ema_momentum=1.0)
        return torch.cat([item.grad.flatten() for item in trained if item.grad is not None])

    return run


def _learner(config: RunConfig) -> AnausLearner:
    """Equal weights every time, which steps leave as they are: every repetition does the same."""
    pair = build_pair(config.anaus, seed=0)
    for item in idle_parameters(pair.student, config.anaus):
        item.requires_grad = False
    optimiser = build_lars(pair, config.anaus)
    for each in optimiser.param_groups:
        each["lr"] = 0.0
    return AnausLearner(pair=pair, optimiser=optimiser, anaus=config.anaus)


def _frames(config: RunConfig) -> list[PatientFrame]:
    """One frame of each patient."""
    batch = made_batch(int(config.privacy.expected_batch), size=config.anaus.augment.size)
    return [
        patient_frame(_alone(batch, place), config.anaus, torch.Generator().manual_seed(place))
        for place in range(len(batch))
    ]


def _alone(batch: UsBatch, place: int) -> UsBatch:
    """A batch of one of its frames."""
    of_views = {"views", "view_labels", "boxes", "flipped"}  # (2, B, ...)
    one = slice(place, place + 1)
    parts = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    ids = parts.pop("view_ids").unflatten(0, (2, len(batch)))[:, one].flatten(0, 1)
    return UsBatch(
        view_ids=ids,
        **{name: item[:, one] if name in of_views else item[one] for name, item in parts.items()},
    )

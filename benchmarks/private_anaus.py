"""ANAUS's private step and the ordinary step of the same patients' terms, for ``bench_dp``.

One frame a patient, GroupNorm, negatives from the patient's own frame: the terms of the private
recipe in both, so that their gradients can be held against each other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from agssd_core.config import RunConfig, parse_config
from agssd_core.noise import NoiseStream
from agssd_core.training.anaus_build import build_lars, build_pair
from agssd_core.training.anaus_step import AnausLearner
from agssd_core.training.privacy.anaus_losses import PatientFrame, frame_losses, patient_frame
from agssd_core.training.privacy.anaus_round import PrivateAnaus
from agssd_core.views.seeds import rng_for, torch_generator_for
from agssd_core.views.us_batch import cut_us_batch
from tests.support.us import MemoryFrames

# The weights stay as they are, so every repetition does the same.
RATES = (0.0, 1.0)
FRAMES_OF_A_PATIENT = 2


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
    reader, learner = _reader(config), _learner(config)
    step, frames = PrivateAnaus(config, reader, learner, site="a"), _frames(config, reader)
    stream = NoiseStream.from_system()

    def run() -> Tensor:
        step.add(frames)
        mean = torch.cat([total.flatten() for total in step.clipped.totals()]) / len(frames)
        step.finish(RATES, stream)
        return mean

    return run


def ordinary_way(config: RunConfig) -> Callable[[], Tensor]:
    """One backward pass of the mean of the same losses, and a step."""
    reader, learner = _reader(config), _learner(config)
    frames = _frames(config, reader)
    for group in learner.optimiser.param_groups:
        group["lr"] = RATES[0]

    def run() -> Tensor:
        learner.optimiser.zero_grad(set_to_none=True)
        frame_losses(learner.pair, frames, config.anaus).mean().backward()
        learner.optimiser.step()
        learner.pair.update_teacher(ema_momentum=RATES[1])
        found = [item.grad for item in learner.pair.student.parameters() if item.grad is not None]
        return torch.cat([each.flatten() for each in found])

    return run


def _learner(config: RunConfig) -> AnausLearner:
    """Equal weights every time."""
    pair = build_pair(config.anaus, seed=0)
    return AnausLearner(pair=pair, optimiser=build_lars(pair, config.anaus), anaus=config.anaus)


def _reader(config: RunConfig) -> MemoryFrames:
    return MemoryFrames(int(config.privacy.expected_batch) * FRAMES_OF_A_PATIENT)


def _frames(config: RunConfig, reader: MemoryFrames) -> list[PatientFrame]:
    """One frame of each patient."""
    found = []
    for frame in range(0, len(reader), FRAMES_OF_A_PATIENT):

        def draws(purpose: str, frame: int = frame) -> list[object]:
            return [rng_for(0, "a", purpose, frame)]

        batch = cut_us_batch(reader, config.anaus, [frame], draws)
        generator = torch_generator_for(0, "regions", frame)
        found.append(patient_frame(batch, config.anaus, generator))
    return found

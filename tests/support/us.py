"""Ultrasound frames in memory, small settings, and the whole objective as the plainest loops."""

from dataclasses import dataclass

import numpy as np
import torch

from agssd_core.config import parse_config
from agssd_core.models.anaus import level_of
from agssd_core.training.anaus_build import build_lars, build_pair
from agssd_core.training.anaus_round import AnausTrainer
from agssd_core.training.anaus_step import AnausLearner
from agssd_core.views.us_batch import UsBatch
from tests.support.anatomy import plain_alignment
from tests.support.training import merged

SMALL_US = {
    "preset": "tiny",
    "cohorts": ["us"],
    "anaus": {
        "backbone": {"width": 8, "norm": "batch", "groups": 4},
        "augment": {"size": 64},
        "regions": {"scales": [2, 4, 8, 16], "per_view": 4},
        "head": {"hidden_projector": 32, "projection": 16, "hidden_predictor": 32, "fpn": 12},
        "batch_size": 4,
        "optimiser": {"learning_rate": 0.5},
    },
    "training": {"loader_workers": 0},
    "monitor": {"window": 16},
}


@dataclass(frozen=True)
class MemoryFrameInfo:
    clip: str
    number: int
    patient: str
    vendor: str
    shape: tuple[int, int]


class MemoryFrames:
    """Frames with a few bright and dark blobs on speckle, and the blobs as anatomies."""

    def __init__(self, count=6, *, shape=(72, 88), seed=0, labels=True):
        rng = np.random.default_rng(seed)
        self.images, self.maps, infos = [], [], []
        rows, columns = np.mgrid[: shape[0], : shape[1]]
        for number in range(count):
            label = np.ones(shape, np.uint8)
            for name in range(2, 5):
                centre, radius = rng.uniform(0.2, 0.8, 2) * shape, rng.uniform(8, 16, 2)
                inside = ((rows - centre[0]) / radius[0]) ** 2
                label[inside + ((columns - centre[1]) / radius[1]) ** 2 < 1] = name
            level = np.array([0, 90, 40, 150, 220])[label]
            speckle = rng.rayleigh(0.8, shape)
            self.images.append(np.clip(level * speckle, 1, 255).astype(np.uint8))
            self.maps.append(label if labels else np.zeros(shape, np.uint8))
            infos.append(MemoryFrameInfo(f"clip{number}", 0, f"p{number // 2}", "GE", shape))
        self.infos = tuple(infos)

    def __len__(self):
        return len(self.infos)

    def read_frame(self, index):
        return self.images[index]

    def read_labels(self, index):
        return self.maps[index]


def us_config(**changes):
    """``SMALL_US`` with parts replaced, as the ``us`` cohort sees it."""
    return parse_config(merged(SMALL_US, changes)).for_cohort("us")


def us_trainer(frames=None, *, site="a", sites=1, **changes):
    return AnausTrainer(us_config(**changes), frames or MemoryFrames(), site=site, sites=sites)


def us_learner(config, *, dtype=torch.float32):
    pair = build_pair(config.anaus, seed=config.seed).to(dtype)
    return AnausLearner(pair=pair, optimiser=build_lars(pair, config.anaus), anaus=config.anaus)


def as_type(batch: UsBatch, dtype) -> UsBatch:
    for name in ("views", "damaged", "clean"):
        setattr(batch, name, getattr(batch, name).to(dtype))
    return batch


def plain_terms(pair, batch, regions, anaus):
    """Alignment and core region with dense maps and one Python loop for everything else."""
    size = batch.views.shape[-1]
    frames = len(batch)
    views = batch.views.flatten(0, 1)
    student, teacher = _dense(pair.student, views), _dense(pair.teacher, views)
    damaged, clean = _dense(pair.student, batch.damaged), _dense(pair.teacher, batch.clean)
    align = context = 0.0
    for each in regions:
        level = level_of(each.scale, size)
        ids = each.drawn.ids
        guess = _projected(pair.student, student[level], each.views, ids, level)
        goal = _projected(pair.teacher, teacher[level], each.views, ids, level).detach()
        align = align + plain_alignment(
            guess.view(2, frames, *guess.shape[1:]),
            goal.view(2, frames, *goal.shape[1:]),
            ids.view(2, frames, -1),
            anaus.loss.temperature,
        )
        ids = each.drawn_overlap.ids
        guess = _projected(pair.student, damaged[level], each.overlap, ids, level)
        goal = _projected(pair.teacher, clean[level], each.overlap, ids, level).detach()
        context = context + _core_region(guess, goal, ids, batch.valid)
    return align, context


def _dense(network, frames):
    return network.pyramid(network.maps(frames))


def _projected(network, dense, scale, ids, level):
    """(N, K, C): the mean of a dense map over the cells that a drawn id owns, cell by cell."""
    rows = []
    for frame in range(ids.shape[0]):
        for wanted in ids[frame].tolist():
            owned = [
                dense[frame, :, i, j]
                for i in range(dense.shape[2])
                for j in range(dense.shape[3])
                if wanted > 0 and int(scale.ids[frame, scale.owner[frame, i, j]]) == wanted
            ]
            if not owned:  # nothing was drawn: what stands in the place of row 0
                owned = [
                    dense[frame, :, i, j]
                    for i in range(dense.shape[2])
                    for j in range(dense.shape[3])
                    if int(scale.owner[frame, i, j]) == 0
                ]
            rows.append(torch.stack(owned).mean(dim=0))
    found = torch.stack(rows).view(*ids.shape, -1)
    head = network.projector_coarse if level == 3 else network.projector_fine
    found = head(found)
    return found if network.predictor is None else network.predictor(found)


def _core_region(predictions, targets, ids, valid):
    costs = [
        (predictions[frame, draw] - targets[frame, draw]).square().mean()
        for frame in range(ids.shape[0])
        for draw in range(ids.shape[1])
        if bool(valid[frame]) and int(ids[frame, draw]) > 0
    ]
    return sum(costs) / max(len(costs), 1)

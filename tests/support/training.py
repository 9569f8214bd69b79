"""Small bodies, tiny settings and ready trainers for the training tests."""

import numpy as np
import torch

from agssd_core.config import parse_config
from agssd_core.training.agssd_step import Learner, StepRandomness, train_step
from agssd_core.training.build import build_model, build_optimiser, resolve
from agssd_core.training.schedules import schedule_at
from agssd_core.training.site_round import SiteTrainer
from agssd_core.views.batch import make_batch
from agssd_core.views.seeds import torch_generator_for
from tests.support.volumes import MemoryVolumes, memory_info

# Half the width of the tiny preset's heads: a step takes a third of the time.
SMALL = {
    "preset": "tiny",
    "agssd": {
        "model": {
            "width": 24,
            "depth": 2,
            "heads": 2,
            "pos_embed": "learnable",
            "decoder": "linear",
        },
        "cvac": {"global_size": [24, 24, 24], "local_size": [16, 16, 16], "n_local": 1},
        "cvaa": {"min_inner": 1},
        "head": {"prototypes": 32, "hidden": 32, "bottleneck": 16},
    },
    "training": {
        "batch_size": 2,
        "loader_workers": 0,
        "optimiser": {"learning_rate": 5e-4},
    },
    "monitor": {"window": 16},
}


def body_volumes(count=8, *, shape=(44, 48, 40), seed=0):
    """Bodies of different size, place and contrast, with organs and a bright spine, in air."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    arrays, infos = [], []
    for number in range(count):
        array = np.zeros(shape, np.float32)

        def paint(centre, radii, value, array=array):
            inside = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii, strict=True))
            array[inside < 1] = value

        size = rng.uniform(0.6, 0.95, 3)
        paint(rng.uniform(-0.05, 0.05, 3), size, rng.uniform(0.35, 0.5))
        for _ in range(int(rng.integers(3, 7))):
            paint(rng.uniform(-0.5, 0.5, 3), rng.uniform(0.15, 0.35, 3), rng.uniform(0.2, 0.8))
        paint((0, -0.45, 0), (0.12, 0.12, 2.0), rng.uniform(0.85, 1.0))
        arrays.append(array)
        infos.append(
            memory_info(
                shape,
                modality="CT" if number % 2 else "MR",
                body=array > 0.1,
                patient=f"p-{number}",
            )
        )
    return MemoryVolumes(arrays, infos)


def merged(base, changes):
    """A nested mapping with parts replaced."""
    found = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if nested else value
    return found


def small_config(**changes):
    """``SMALL`` with parts replaced, as in ``small_config(agssd={"loss": {"cls": 0}})``."""
    return parse_config(merged(SMALL, changes))


def small_trainer(volumes=None, *, site="a", **changes):
    return SiteTrainer(small_config(**changes), volumes or body_volumes(), site=site)


def small_learner(config, *, dtype=torch.float32):
    model = build_model(config.agssd, seed=config.seed, training=config.training).train().to(dtype)
    return Learner(
        model=model,
        optimiser=build_optimiser(model, config.training.optimiser),
        agssd=config.agssd,
        training=config.training,
        resolved=resolve(config.agssd, config.training.batch_size),
    )


def batch_of(config, volumes=None, *, step=0, site="a"):
    return make_batch(
        volumes or body_volumes(),
        config.agssd,
        seed=config.seed,
        site=site,
        step=step,
        batch_size=config.training.batch_size,
    )


def randomness(config, *, step=0, site="a"):
    return StepRandomness(
        torch_generator_for(config.seed, site, "masks", step),
        torch_generator_for(config.seed, site, "depth", step, 0),
    )


def one_step(learner, config, batch, *, step=0, total_steps=10, alpha=2.0):
    schedule = schedule_at(
        config.agssd,
        config.training.optimiser,
        base_learning_rate=1e-3,
        step=step,
        total_steps=total_steps,
    )
    return train_step(
        learner, batch, schedule, step=step, alpha=alpha, randomness=randomness(config, step=step)
    )


def bits(weights):
    """Arrays by name as bytes, for comparisons that forgive nothing."""
    return {name: array.tobytes() for name, array in weights.items()}

"""Tiny private learners in float64, and the plainest reference: one patient at a time."""

import dataclasses

import torch

from agssd_core.config import parse_config
from agssd_core.training.agssd_step import Learner
from agssd_core.training.build import build_model, build_optimiser
from agssd_core.training.distributed import ProcessGroup
from agssd_core.training.mixed_precision import EncoderPrecision
from agssd_core.training.privacy.agssd_losses import some_patients
from agssd_core.training.privacy.agssd_step import (
    PrivateStep,
    StepSettings,
    freeze_unused,
    resolve_private,
)
from agssd_core.training.schedules import StepSchedule
from agssd_core.training.student_pass import StudentRule, student_terms
from agssd_core.views.patient_batch import make_patient_batch
from agssd_core.views.seeds import torch_generator_for
from tests.support.training import SMALL, body_volumes, merged

PRIVATE = merged(
    SMALL,
    {
        "agssd": {
            "eaam": {"kappa": 0},
            "cvac": {"global_size": [24, 16, 16], "local_size": [8, 16, 8], "n_local": 2},
            "loss": {"patch": 1.0, "cls": 1.0},
        },
        "privacy": {"enabled": True, "expected_batch": 4, "physical_batch": 4, "delta": 0.01},
    },
)
RATES = StepSchedule(
    learning_rate=1e-3,
    weight_decay=0.04,
    ema_momentum=0.9,
    teacher_temperature=0.04,
    beta=0.3,
    prototypes_frozen=False,
)
SETTINGS = StepSettings(RATES, step=3, alpha=2.0)


def private_config(**changes):
    return parse_config(merged(PRIVATE, changes))


def private_learner(config, *, dtype=torch.float64):
    """A learner with an open gate and a centre, so that every term and layer has a gradient."""
    model = build_model(config.agssd, seed=config.seed).train().to(dtype)
    with torch.no_grad():
        torch.manual_seed(5)
        for item in model.student.parameters():
            item.add_(0.02 * torch.randn_like(item))
        if model.student.cvaa is not None:
            model.student.cvaa.gate.weight.fill_(0.5)
        model.state.centre_cls.normal_(std=0.1)
    return Learner(
        model=model,
        optimiser=build_optimiser(model, config.training.optimiser),
        agssd=config.agssd,
        training=config.training,
        resolved=resolve_private(config.agssd),
    )


def private_step(config, *, dtype=torch.float64):
    return PrivateStep(private_learner(config, dtype=dtype), config.privacy)


def patient_batch(config, patients=4, *, step=3, seed=0, dtype=torch.float64):
    volumes = body_volumes(patients, seed=seed)
    batch = make_patient_batch(
        volumes,
        config.agssd,
        seed=config.seed,
        site="a",
        step=step,
        chosen=[(info.patient, number) for number, info in enumerate(volumes.infos)],
    )
    changed = {
        field.name: getattr(batch, field.name).to(dtype)
        for field in dataclasses.fields(batch)
        if getattr(batch, field.name).dtype == torch.float32
    }
    return dataclasses.replace(batch, **changed)


def generators(count, *, step=3):
    return [torch_generator_for(0, "a", "masks", step, f"p-{number}") for number in range(count)]


def prepared(step, batch):
    return step.prepared(batch, SETTINGS, generators(len(batch)))


def loop_gradients(config, micro):
    """(patients, numbers): each patient alone through the ordinary step's losses, without hooks."""
    learner = private_learner(config)
    freeze_unused(learner.model.student, config.agssd)
    trained = [item for item in learner.model.student.parameters() if item.requires_grad]
    rule = StudentRule(learner.agssd, learner.resolved, RATES.beta, ProcessGroup())
    found = []
    for patient in range(len(micro.batch)):
        terms = student_terms(
            learner.model.student,
            some_patients(micro, [patient]),
            rule,
            autocast=EncoderPrecision(torch.device("cpu"), bf16=False),
            generator=torch.Generator(),
        )
        gradients = torch.autograd.grad(
            terms["loss"], trained, allow_unused=True, materialize_grads=True
        )
        found.append(torch.cat([each.flatten() for each in gradients]))
    return torch.stack(found)


def clipped_loop(rows, limit):
    """Sum of rows, each scaled down to the limit."""
    norm = rows.norm(dim=1, keepdim=True)
    return (rows * (limit / norm).clamp(max=1)).sum(dim=0)


def flat(tensors):
    return torch.cat([each.flatten() for each in tensors])

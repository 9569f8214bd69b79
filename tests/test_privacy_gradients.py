"""Gradients patient by patient: exact for every layer, and never more than C of anybody."""

import math

import pytest
import torch

from agssd_core.training.privacy.agssd_losses import PatientRule, patient_losses, some_patients
from tests.support.privacy import (
    RATES,
    SETTINGS,
    clipped_loop,
    flat,
    generators,
    loop_gradients,
    patient_batch,
    prepared,
    private_config,
    private_step,
)

MODES = ("hooks", "fast-gradient-clipping")
VARIANTS = {
    "plain": {},
    "fixed positions, deep decoder": {
        "model": {"pos_embed": "sincos", "decoder": "transformer"},
        "cvac": {"global_size": [24, 24, 24], "local_size": [16, 16, 16]},
    },
    "student keys, hard": {"cvaa": {"kv_source": "student", "geom_bias": "hard"}},
    "no fusion": {"cvaa": {"mode": "off"}},
    "edges, per patch": {"loss": {"edge_weight": 1.0, "norm_pix": True}},
    "some views unmasked": {"eaam": {"mask_prob": 0.5}},
}


def slow_and_fast(mode, changes, *, limit, patients=4):
    config = private_config(agssd=changes, privacy={"mode": mode, "max_grad_norm": limit})
    step = private_step(config)
    batch = patient_batch(config, patients)
    micro = prepared(step, batch)
    rows = loop_gradients(config, micro)
    step.add(batch, SETTINGS, generators(patients))
    return rows, flat(step.clipped.totals())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_sum_is_that_of_patients_taken_one_by_one(mode, name):
    """Without clipping: every parameter, all views, all terms."""
    rows, total = slow_and_fast(mode, VARIANTS[name], limit=1e6)
    assert rows.norm(dim=1).min() > 0.1
    torch.testing.assert_close(total, rows.sum(dim=0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_each_patient_is_clipped_by_its_whole_gradient(mode):
    rows, _ = slow_and_fast(mode, {}, limit=1e6)
    limit = float(rows.norm(dim=1).median())  # clips some and not others
    rows, total = slow_and_fast(mode, {}, limit=limit)
    exact = clipped_loop(rows, limit)
    torch.testing.assert_close(total, exact, rtol=0, atol=2e-5 * limit)


def test_every_trained_parameter_gets_a_gradient_of_its_own():
    config = private_config()
    step = private_step(config)
    micro = prepared(step, patient_batch(config))
    rows = loop_gradients(config, micro)
    names = [
        name for name, item in step.learner.model.student.named_parameters() if item.requires_grad
    ]
    widths = [item.numel() for item in step.clipped.parameters]
    dead = [
        name
        for name, part in zip(names, rows.split(widths, dim=1), strict=True)
        if not part.abs().sum()
    ]
    # Softmax ignores what all keys share, so the key half of a bias gets next to nothing.
    assert [name for name in dead if "bias" not in name] == []


@pytest.mark.parametrize("mode", MODES)
def test_physical_batches_change_nothing(mode):
    totals = []
    for size in (4, 1):
        config = private_config(privacy={"mode": mode})
        step = private_step(config)
        batch = patient_batch(config)
        for start in range(0, 4, size):
            step.add(batch.narrow(start, size), SETTINGS, generators(4)[start : start + size])
        totals.append(flat(step.clipped.totals()))
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_is_not_finite_counts_as_nothing(mode):
    config = private_config(privacy={"mode": mode})
    step = private_step(config)
    micro = prepared(step, patient_batch(config))
    student = step.learner.model.student
    rule = PatientRule(config.agssd, standardised=True, beta=RATES.beta)

    def losses(chosen):
        factor = torch.tensor([1.0, math.inf, 1.0, 1.0], dtype=torch.float64)[list(chosen)]
        return patient_losses(student, some_patients(micro, chosen), rule) * factor

    step.clipped.add(losses, 4)
    with_damaged = flat(step.clipped.totals()).clone()
    rows = loop_gradients(config, micro)
    exact = clipped_loop(rows[[0, 2, 3]], config.privacy.max_grad_norm)
    torch.testing.assert_close(with_damaged, exact, rtol=0, atol=1e-4)


def test_damaged_voxels_stop_nobody():
    config = private_config()
    step = private_step(config)
    batch = patient_batch(config)
    batch.globals_seen[0, 1, 0, 3, 3, 3] = math.nan
    batch.globals_clean[1, 1, 0, 3, 3, 3] = math.inf
    step.add(batch, SETTINGS, generators(4))
    assert flat(step.clipped.totals()).isfinite().all()
    assert flat(step.clipped.totals()).norm() > 1

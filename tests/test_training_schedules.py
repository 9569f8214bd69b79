"""Schedules are pure functions of the global step."""

import math

import pytest

from agssd_core.config import OptimiserConfig, TeacherConfig
from agssd_core.config.agssd import CvaaConfig, TargetConfig
from agssd_core.training import schedules
from agssd_core.training.build import base_learning_rate, resolve
from tests.support.volumes import tiny_agssd


def rate(step, total=100, **changes):
    settings = {"peak": 1.0, "low": 0.1, "warmup": 0.1} | changes
    return schedules.learning_rate(step, total, **settings)


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(10) == pytest.approx(1.0)
    assert rate(55) == pytest.approx(0.55)
    assert rate(100) == pytest.approx(0.1)
    assert all(rate(s) >= rate(s + 1) for s in range(10, 99))
    assert rate(5, warmup=0.0) < 1.0
    # A floor above the peak must not make the rate rise.
    assert rate(99, low=5.0) == pytest.approx(1.0)


def test_ema_momentum_rises_over_all_steps_of_the_run():
    teacher = TeacherConfig(ema_momentum=0.9, ema_momentum_end=1.0)
    values = [teacher.momentum_at(step, 40) for step in range(41)]
    assert values[0] == pytest.approx(0.9)
    assert values[20] == pytest.approx(0.95)
    assert values[-1] == pytest.approx(1.0)
    assert values == sorted(values)
    product = math.prod(values[5:15])
    assert teacher.momentum_product(5, 10, 40) == pytest.approx(product)


def test_teacher_temperature_is_constant_or_ramps():
    assert schedules.teacher_temperature(TargetConfig(), 3, 10) == 0.04
    ramp = TargetConfig(teacher_temperature_end=0.07, teacher_temperature_ramp=0.5)
    found = [schedules.teacher_temperature(ramp, step, 100) for step in (0, 25, 50, 99)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_beta_fades_in_only_when_fusing():
    found = [schedules.fused_share(CvaaConfig(), step, 100) for step in (0, 5, 10, 15, 99)]
    assert found == pytest.approx([0, 0, 0.25, 0.5, 0.5])
    assert schedules.fused_share(CvaaConfig(mode="off"), 50, 100) == 0


def test_prototypes_are_frozen_in_the_first_percent():
    assert schedules.frozen_steps(0.01, 200) == 2
    assert schedules.frozen_steps(0.01, 10) == 1
    assert schedules.frozen_steps(0.0, 10) == 0


def test_a_lost_optimiser_warms_up_again_and_a_new_one_does_not():
    assert [schedules.rewarm_factor(s, 40, 4) for s in (40, 41, 43, 44)] == [0.25, 0.5, 1.0, 1.0]
    assert schedules.rewarm_factor(0, 0, 4) == 1.0


@pytest.mark.parametrize(
    ("batch", "cls", "patch", "centre"),
    [
        (7, "ema", "volume", "volume"),
        (8, "batch", "batch", "center"),
    ],
)
def test_auto_follows_the_number_of_views(batch, cls, patch, centre):
    found = resolve(tiny_agssd(), batch)
    assert (found.input_norm_cls, found.input_norm_patch) == (cls, patch)
    assert (found.target_cls, found.target_patch) == ("center", centre)


def test_explicit_choices_stay():
    agssd = tiny_agssd(head={"input_norm_cls": "none"}, target={"patch": "none"})
    found = resolve(agssd, 2)
    assert (found.input_norm_cls, found.target_patch) == ("none", "none")


def test_learning_rate_rule_counts_views_of_all_sites():
    rule = OptimiserConfig()
    assert base_learning_rate(rule, batch_size=32, sites=4) == pytest.approx(5e-4)
    assert base_learning_rate(rule, batch_size=1, sites=1) == pytest.approx(5e-4 * 2 / 256)
    assert base_learning_rate(OptimiserConfig(learning_rate=0.01), batch_size=1, sites=9) == 0.01

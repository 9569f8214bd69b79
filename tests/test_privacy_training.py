"""Private training of a site: who is drawn, what is spent, what moves and what may be told."""

import math

import numpy as np
import pytest
import torch

from agssd_core.accounting import epsilon, joint_sigma
from agssd_core.errors import BudgetError, TrainingError
from agssd_core.noise import NoiseStream
from agssd_core.training.checkpoint import StateStamp, read_site_state
from agssd_core.training.privacy.sampling import PatientSampler
from agssd_core.training.site_round import SiteTrainer
from agssd_core.views.patient_batch import make_patient_batch
from client.purse import reason_of
from tests.support.privacy import (
    SETTINGS,
    generators,
    patient_batch,
    private_config,
    private_step,
)
from tests.support.training import body_volumes
from tests.support.volumes import MemoryVolumes, memory_info

TOLD = {
    "private",
    "privacy_epsilon",
    "privacy_sigma",
    "privacy_rate",
    "learning_rate",
    "ema_momentum",
    "teacher_temperature",
    "beta",
    "optimiser_reset",
}


def trainer(volumes=None, *, site="a", **changes):
    return SiteTrainer(private_config(**changes), volumes or body_volumes(), site=site)


def scans(*patients):
    return [memory_info((8, 8, 8), patient=patient) for patient in patients]


def sampler(*patients, physical_batch=4):
    return PatientSampler(scans(*patients), seed=0, site="a", physical_batch=physical_batch)


def stream(*words):
    return NoiseStream.repeatable(0, *words)


def test_every_patient_is_drawn_alone_with_the_same_probability():
    names = [f"p-{number}" for number in range(20)]
    steps = 4000
    drawn = np.zeros((steps, len(names)))
    for chunk in sampler(*names, physical_batch=100).draw(range(steps), rate=0.3, stream=stream()):
        for name in chunk.patients:
            drawn[chunk.step, names.index(name)] += 1
    assert set(np.unique(drawn)) == {0, 1}
    np.testing.assert_allclose(drawn.mean(axis=0), 0.3, atol=0.03)
    together = np.corrcoef(drawn.T)[~np.eye(len(names), dtype=bool)]
    assert np.abs(together).max() < 0.08
    sizes = drawn.sum(axis=1)
    assert sizes.var() == pytest.approx(20 * 0.3 * 0.7, rel=0.1)  # binomial, not a fixed batch


def test_chunks_hold_whole_patients_and_every_step_ends_once():
    names = [f"p-{number}" for number in range(9)]
    chunks = list(sampler(*names, physical_batch=2).draw(range(3), rate=1.0, stream=stream()))
    for step in range(3):
        own = [chunk for chunk in chunks if chunk.step == step]
        assert sorted(name for chunk in own for name in chunk.patients) == names
        assert [chunk.last for chunk in own] == [False] * (len(own) - 1) + [True]
        assert max(len(chunk.patients) for chunk in own) == 2


def test_a_patient_with_many_scans_is_one_unit():
    chunks = list(sampler("b", "a", "a", "a").draw(range(200), rate=1.0, stream=stream()))
    assert all(chunk.patients == ("a", "b") for chunk in chunks)
    assert {chunk.scans[0] for chunk in chunks} == {1, 2, 3}  # each scan has its turn
    assert {chunk.scans[1] for chunk in chunks} == {0}


def test_a_step_that_draws_nobody_still_is_one():
    (chunk,) = sampler("a", "b").draw(range(1), rate=0.0, stream=stream())
    assert (chunk.patients, chunk.last) == ((), True)


def test_views_and_masks_of_a_patient_do_not_depend_on_who_else_is_drawn():
    config, volumes = private_config(), body_volumes(4)

    def cut(*numbers):
        return make_patient_batch(
            volumes, config.agssd, seed=0, site="a", step=3,
            chosen=[(f"p-{number}", number) for number in numbers],
        )  # fmt: skip

    alone, together = cut(2), cut(0, 1, 2, 3)
    assert torch.equal(alone.globals_seen[:, 0], together.globals_seen[:, 2])
    assert torch.equal(alone.locals_seen[:, 0], together.locals_seen[:, 2])
    step = private_step(config, dtype=torch.float32)
    masks = step.prepared(together, SETTINGS, generators(4)).hidden.mask
    own = step.prepared(alone, SETTINGS, generators(4)[2:3]).hidden.mask
    assert torch.equal(masks[:, 2], own[:, 0])


def test_a_step_of_nobody_is_noise_of_the_promised_size():
    config = private_config(
        privacy={"noise_multiplier": 3.0, "max_grad_norm": 0.5, "expected_batch": 6}
    )
    step = private_step(config)
    seen = {}

    def keep(*_):
        seen["gradient"] = torch.cat([p.grad.flatten() for p in step.clipped.parameters])

    step.learner.optimiser.register_step_pre_hook(keep)
    before = [item.clone() for item in step.clipped.parameters]
    step.finish(SETTINGS, stream("nobody"))
    assert seen["gradient"].std() == pytest.approx(3.0 * 0.5 / 6, rel=0.03)
    assert all(
        not torch.equal(old, new) for old, new in zip(before, step.clipped.parameters, strict=True)
    )


def test_pull_and_teacher_follow_after_the_noise():
    config = private_config(federation={"merge": {"student": "fedprox", "prox_mu": 100.0}})
    step = private_step(config)
    learner = step.learner
    learner.anchor = [item.detach() - 1 for item in learner.model.student.parameters()]
    learner.prox_mu = 100.0
    gradients = []
    learner.optimiser.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in step.clipped.parameters]))
    )
    step.add(patient_batch(config), SETTINGS, generators(4))
    step.finish(SETTINGS, stream("pull"))
    # Far above C / expected batch: the pull was not clipped.
    assert gradients[0].mean() == pytest.approx(100, rel=0.01)


def test_statistics_of_patients_are_not_kept():
    site = trainer()
    site.train_steps(0, 2, 4)
    state = site.learner.model.state
    assert float(state.density_std) == 0
    assert not state.centre_patch.any()
    assert not state.cls_mean.any()
    assert state.centre_cls.any()  # the noised one


def test_only_what_follows_from_the_plan_is_told():
    site = trainer()
    told = site.train_steps(0, 2, 4)
    assert told.keys() == TOLD
    other = trainer(body_volumes(seed=9))
    again = other.train_steps(0, 2, 4)
    assert told == again  # other patients, same numbers
    assert all(math.isfinite(value) for value in told.values())


def test_a_round_is_paid_for_before_anything_is_drawn():
    volumes = body_volumes()
    site, asked = trainer(volumes), []

    def spend(sigma_eff, q, steps):
        asked.append((sigma_eff, q, steps, len(volumes.reads)))

    site.spend_through(spend)
    told = site.train_steps(0, 2, 4)
    assert asked == [(joint_sigma(1.0, 4.0), 4 / 8, 2, 0)]
    assert told["privacy_epsilon"] == pytest.approx(epsilon([asked[0][:3]], delta=0.01))
    site.train_steps(2, 2, 4)
    assert len(asked) == 2


def test_without_a_ledger_a_round_says_so(caplog):
    trainer().train_steps(0, 1, 4)
    assert "1 steps at sigma_eff 0.9701, q 0.5; accounted, not enforced" in caplog.text


def test_a_spend_that_refuses_stops_the_round_with_nothing_changed():
    site = trainer()
    before = {name: array.copy() for name, array in site.shared_weights().items()}

    def refuse(sigma_eff, q, steps):
        raise BudgetError("the budget is spent")

    site.spend_through(refuse)
    with pytest.raises(BudgetError, match="budget is spent"):
        site.train_steps(0, 2, 4)
    for name, array in site.shared_weights().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"privacy": {"expected_batch": 9}}, "expected_batch = 9 patients a step is more"),
        ({"privacy": {"delta": 0.1}}, "is not below 1 / patients"),
    ],
)
def test_plans_that_cannot_be_kept_are_refused(changes, remedy):
    volumes = body_volumes(12) if "delta" in changes["privacy"] else None
    with pytest.raises(TrainingError, match=remedy):
        trainer(volumes, **changes)


def test_a_plan_beyond_the_budget_is_declined_for_its_budget():
    site = trainer(privacy={"epsilon_budget": 0.5})
    with pytest.raises(BudgetError, match=r"Raise privacy\.noise_multiplier") as refused:
        site.train_steps(0, 2, 400)
    assert reason_of(refused.value) == "budget"


def test_secure_noise_never_repeats_and_repeatable_noise_is_marked(tmp_path):
    runs = []
    for _ in range(2):
        site = trainer()
        site.train_steps(0, 1, 4)
        runs.append(site.shared_weights()["student/encoder.norm.weight"])
    assert not np.array_equal(*runs)

    repeated = []
    for _ in range(2):
        site = trainer(privacy={"secure_noise": False})
        told = site.train_steps(0, 1, 4)
        assert told["private"] == 0
        repeated.append(site.shared_weights())
    for name, array in repeated[0].items():
        np.testing.assert_array_equal(array, repeated[1][name])
    stamp = StateStamp("r", 0, "p")
    site.save_state(tmp_path, stamp)
    assert read_site_state(tmp_path, stamp).numbers["private"] == 0


def test_a_state_that_was_not_private_stays_so(tmp_path):
    open_, stamp = trainer(privacy={"secure_noise": False}), StateStamp("r", 0, "p")
    open_.train_steps(0, 1, 4)
    open_.save_state(tmp_path, stamp)
    site = trainer()
    assert site.load_state(tmp_path, stamp)
    assert site.train_steps(1, 1, 4)["private"] == 0
    assert trainer().train_steps(0, 1, 4)["private"] == 1


def test_physical_batches_and_modes_give_the_same_weights():
    found = []
    for changes in (
        {"physical_batch": 8},
        {"physical_batch": 1},
        {"mode": "fast-gradient-clipping"},
    ):
        site = trainer(privacy={"secure_noise": False, **changes})
        site.train_steps(0, 2, 4)
        found.append(site.shared_weights())
    for other in found[1:]:
        for name, array in found[0].items():
            np.testing.assert_allclose(array, other[name], rtol=0, atol=2e-4)


def test_volumes_of_one_patient_count_once():
    arrays = body_volumes(8).arrays
    infos = [memory_info(a.shape, patient=f"p-{n // 2}") for n, a in enumerate(arrays)]
    with pytest.raises(TrainingError, match="is more than"):
        trainer(MemoryVolumes(arrays, infos), privacy={"expected_batch": 5})


def test_a_term_that_is_off_is_frozen_and_not_shaken_by_noise():
    site = trainer(agssd={"loss": {"cls": 0}}, privacy={"centre_ratio": 0})
    before = site.shared_weights()
    site.train_steps(0, 2, 4)
    after = site.shared_weights()
    name = "student/head_cls.mlp.0.weight"
    np.testing.assert_array_equal(before[name], after[name])
    name = "student/head_patch.mlp.0.weight"
    assert not np.array_equal(before[name], after[name])
    assert not after["state/centre_cls"].any()


def test_every_site_takes_the_least_noise_for_its_own_patients():
    plan = {"privacy": {"target_epsilon": 3.0, "epsilon_budget": 3.0, "delta": 0.01}}
    told = [trainer(body_volumes(patients), **plan).train_steps(0, 1, 8) for patients in (4, 8)]
    few, many = (each["privacy_sigma"] for each in told)
    assert few > many > 0
    steps = private_config(**plan).federation.total_steps
    for sigma, rate in ((few, 1.0), (many, 0.5)):
        assert 2.98 < epsilon([(sigma, rate, steps)], delta=0.01) <= 3.0


def test_steps_without_noise_promise_nothing_and_ask_no_ledger():
    off = {"noise_multiplier": 0, "secure_noise": False, "epsilon_budget": 0}
    site = trainer(privacy=off)
    site.spend_through(lambda *_: pytest.fail("a ledger was asked"))
    told = site.train_steps(0, 2, 4)
    assert told["private"] == told["privacy_sigma"] == 0
    assert "privacy_epsilon" not in told

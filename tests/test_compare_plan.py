"""Which models a comparison trains, under one budget."""

import pytest

from agssd_core.config import parse_config
from agssd_core.errors import ConfigError
from simulation.compare.plan import (
    ABLATIONS,
    MERGING,
    Model,
    ablated_models,
    cohort_of,
    model_config,
    models_of,
    private_models,
    stamp_of,
)
from simulation.compare.private import starts_from_nothing

SITES = ["a", "b", "c"]


def settings(cohort="ct-mr", **more):
    plan = {"rounds": 4, "steps_per_round": 5, "deadline_s": 60}
    return parse_config({"preset": "tiny", "cohorts": [cohort], "federation": plan, **more})


def test_every_arm_takes_the_same_number_of_updates():
    models = models_of(settings(), SITES, seed=3)
    assert [model.name for model in models] == [
        "federated",
        "pooled",
        "alone-a",
        "alone-b",
        "alone-c",
        "random",
    ]
    plans = [model_config(settings(), model, SITES).federation for model in models]
    assert {plan.total_steps for plan in plans} == {20}


@pytest.mark.parametrize("cohort", ["ct-mr", "us"])
def test_the_pooled_batch_is_the_sum_of_the_sites_batches(cohort):
    def batch(arm):
        config = model_config(settings(cohort), Model(0, arm), SITES)
        return config.anaus.batch_size if cohort == "us" else config.training.batch_size

    assert batch("pooled") == 3 * batch("federated")
    assert batch("alone") == batch("federated")


def test_all_sites_must_take_part_in_every_federated_round():
    plan = model_config(settings(), Model(0, "federated"), SITES).federation
    assert (plan.min_sites, plan.expected_sites) == (3, 3)
    alone = model_config(settings(), Model(0, "alone", "a"), SITES).federation
    assert (alone.min_sites, alone.expected_sites) == (1, 1)


@pytest.mark.parametrize("cohort", ["ct-mr", "us"])
def test_every_ablation_is_a_valid_configuration_of_its_own(cohort):
    models = [one for one in ablated_models(settings(cohort), seed=0) if one.arm == "federated"]
    configs = [model_config(settings(cohort), model, SITES) for model in models]
    names = {model.variant for model in models}
    assert names >= {*ABLATIONS[cohort], *MERGING}
    stamps = [stamp_of(config, "data") for config in configs]
    assert len(set(stamps)) == len(stamps)


def test_only_the_variants_asked_for_are_trained():
    asked = settings(compare={"variants": ["wire-int8", "no-cvac"]})
    names = [model.variant for model in ablated_models(asked, seed=0) if model.arm == "federated"]
    assert names == ["", "wire-int8", "no-cvac"]
    with pytest.raises(ConfigError, match="'alignment-only', which cohort ct-mr does not have"):
        ablated_models(settings(compare={"variants": ["alignment-only"]}), seed=0)


def test_what_else_is_compared_changes_no_model():
    def stamp(**compare):
        return stamp_of(model_config(settings(compare=compare), Model(0, "federated"), SITES), "d")

    assert stamp(seeds=[0, 1, 2, 3], workers=1, arms=["federated"]) == stamp()


def test_switches_reach_the_method():
    config = model_config(settings(), Model(0, "federated", variant="no-cvac-eaam-cvaa"), SITES)
    agssd = config.agssd
    assert (agssd.cvac.enabled, agssd.eaam.enabled, agssd.cvaa.mode) == (False, False, "off")
    only = model_config(settings("us"), Model(0, "federated", variant="alignment-only"), SITES)
    assert (only.anaus.loss.align, only.anaus.loss.context) == (1, 0)
    merge = model_config(settings(), Model(0, "federated", variant="fedema"), SITES)
    assert merge.federation.merge.teacher_rule == "local"


def test_two_cohorts_are_refused():
    both = parse_config({"preset": "tiny", "cohorts": ["ct-mr", "us"]})
    with pytest.raises(ConfigError, match=r"Use cohorts=\[ct-mr\] or cohorts=\[us\]"):
        cohort_of(both)


def test_the_stamp_follows_settings_and_data_but_not_the_name():
    first = model_config(settings(), Model(0, "federated"), SITES)
    renamed = first.model_copy(update={"name": "other"})
    other = model_config(settings(seed=1), Model(1, "federated"), SITES)
    assert stamp_of(first, "d") == stamp_of(renamed, "d")
    assert len({stamp_of(first, "d"), stamp_of(first, "e"), stamp_of(other, "d")}) == 3


@pytest.mark.parametrize("cohort", ["ct-mr", "us"])
def test_every_level_of_privacy_is_a_valid_run_at_matched_updates(cohort):
    start = settings(cohort, init={"digest": "a" * 64}, privacy={"secure_noise": False})
    models = private_models(start, seed=0)
    configs = {model.variant or model.arm: model_config(start, model, SITES) for model in models}
    assert len(configs) == 12
    trained = [config for name, config in configs.items() if name not in ("random", "start")]
    assert len({stamp_of(config, "data") for config in trained}) == 10
    for name, config in configs.items():
        assert config.federation.total_steps == 20
        assert bool(config.init.digest) == (name == "start" or name.endswith("-continued"))
        assert config.privacy.enabled == name.startswith(("epsilon", "noiseless"))
    assert {
        configs[f"epsilon-{wanted}-{source}"].privacy.target_epsilon - wanted
        for wanted in (8, 3, 1)
        for source in ("scratch", "continued")
    } == {0}
    assert configs["noiseless-scratch"].privacy.noise_multiplier == 0
    assert starts_from_nothing("plain-scratch")
    assert not starts_from_nothing("plain-continued")


def test_worth_of_privacy_needs_a_checkpoint():
    with pytest.raises(ConfigError, match=r"init\.checkpoint is empty"):
        private_models(settings(), seed=0)
    with pytest.raises(ConfigError, match=r"init\.checkpoint is empty"):
        models_of(settings(compare={"arms": ["start"]}), SITES, seed=0)

"""A configuration that would break the guarantee is refused, and told which part does."""

import pytest

from agssd_core.config import config_from_json, dump_config, parse_config
from agssd_core.errors import ConfigError
from tests.support.training import merged

AGSSD = {
    "preset": "tiny",
    "agssd": {"eaam": {"kappa": 0}},
    "privacy": {"enabled": True},
}
ANAUS = {"preset": "tiny", "cohorts": ["us"], "privacy": {"enabled": True}}
BROKEN = [
    ({"loss": {"koleo": 0.1}}, "Set agssd.loss.koleo = 0"),
    ({"loss": {"variance": 0.1}}, "Set agssd.loss.variance = 0"),
    ({"loss": {"align": 1.0}, "cvaa": {"mode": "align"}}, "Set agssd.loss.align = 0"),
    ({"loss": {"attn_sup": 0.1}}, "Set agssd.loss.attn_sup = 0"),
    ({"target": {"cls": "sinkhorn"}}, "Sinkhorn.*Set agssd.target.cls = auto"),
    ({"target": {"patch": "sinkhorn"}}, "Sinkhorn.*Set agssd.target.patch = volume"),
    ({"target": {"patch": "center"}}, "without noise.*Set agssd.target.patch = volume"),
    ({"head": {"input_norm_cls": "batch"}}, "Set agssd.head.input_norm_cls = none"),
    ({"head": {"input_norm_cls": "ema"}}, "running statistic.*input_norm_cls = none"),
    ({"head": {"input_norm_patch": "batch"}}, "Set agssd.head.input_norm_patch = volume"),
    ({"head": {"shared": True}}, "Set agssd.head.shared = false"),
    ({"eaam": {"kappa": 0.05}}, "adaptive mask ratio.*Set agssd.eaam.kappa = 0"),
    ({"model": {"masking": "drop"}}, "Set agssd.model.masking = replace"),
    ({"model": {"drop_path": 0.1}}, "stochastic depth.*Set agssd.model.drop_path = 0"),
    ({"cvaa": {"p_drop": 0.1}}, "Set agssd.cvaa.p_drop = 0"),
    ({"cvac": {"pairs_per_volume": 2}}, "Set agssd.cvac.pairs_per_volume = 1"),
    ({"target": {"cls": "none"}}, "only a noised one is private"),
]
LOOP = [
    ({"training": {"accumulate": 2}}, "gradient accumulation"),
    ({"training": {"processes": 2}}, "Set training.processes = 1"),
    ({"training": {"precision": "bf16"}}, "Set training.precision = fp32"),
    ({"training": {"compile": True}}, "Set training.compile = false"),
    ({"training": {"activation_checkpointing": True}}, "activation_checkpointing = false"),
    ({"monitor": {"stop_on_collapse": True}}, "Set it to false under privacy"),
    ({"privacy": {"centre_ratio": 0}}, "collapses without a centre"),
    ({"privacy": {"noise_multiplier": 0}}, "privacy.noise_multiplier = 0 promises nothing"),
    ({"privacy": {"epsilon_budget": 3, "target_epsilon": 4}}, "every site would decline"),
    ({"privacy": {"max_grad_norm": 0}}, "privacy.max_grad_norm = 0 lies outside"),
]


@pytest.mark.parametrize(("agssd", "remedy"), BROKEN, ids=str)
def test_parts_of_the_method_that_break_the_guarantee_are_refused(agssd, remedy):
    with pytest.raises(ConfigError, match=remedy):
        parse_config(merged(AGSSD, {"agssd": agssd}))
    parse_config(merged(AGSSD, {"agssd": agssd, "privacy": {"enabled": False}}))


@pytest.mark.parametrize(("changes", "remedy"), LOOP, ids=str)
def test_ways_to_train_that_break_the_guarantee_are_refused(changes, remedy):
    with pytest.raises(ConfigError, match=remedy):
        parse_config(merged(AGSSD, changes))


def test_everything_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config(merged(AGSSD, {"agssd": {"loss": {"koleo": 1}, "eaam": {"kappa": 0.05}}}))
    assert len(caught.value.problems) == 2


def test_a_centre_nobody_uses_is_not_paid_for():
    with pytest.raises(ConfigError, match=r"Set privacy\.centre_ratio = 0"):
        parse_config(merged(AGSSD, {"agssd": {"loss": {"cls": 0}}}))
    parse_config(merged(AGSSD, {"agssd": {"loss": {"cls": 0}}, "privacy": {"centre_ratio": 0}}))


def test_each_cohort_answers_for_its_own_method():
    """The other cohort's method is not trained, so it is not asked."""
    parse_config(ANAUS)
    with pytest.raises(ConfigError, match=r"BatchNorm.*Set anaus.backbone.norm = group"):
        parse_config(merged(ANAUS, {"anaus": {"backbone": {"norm": "batch"}}}))
    parse_config(merged(AGSSD, {"anaus": {"backbone": {"norm": "batch"}}}))
    with pytest.raises(ConfigError, match="share_statistics"):
        parse_config(
            merged(ANAUS, {"anaus": {"backbone": {"norm": "batch"}, "share_statistics": True}})
        )


def test_a_site_checks_what_it_is_sent():
    """An order's configuration is refused by the same rules, wherever it comes from."""
    text = dump_config(parse_config(AGSSD))
    assert config_from_json(text).privacy.enabled
    with pytest.raises(ConfigError, match="kappa"):
        config_from_json(text.replace('"kappa":0.0', '"kappa":0.05'))

"""Plans whose merges cannot be noised as promised are refused by name."""

import re
from pathlib import Path

import pytest
import yaml

from agssd_core.config import parse_config
from agssd_core.errors import ConfigError
from tests.support.central import AGSSD


def plan(**changes):
    merge = {"weighting": "uniform", "central_privacy": {"enabled": True}}
    federation = {"min_sites": 3, "merge": merge | changes.pop("merge", {})}
    content = {
        "preset": "tiny",
        "agssd": AGSSD | changes.pop("agssd", {}),
        "federation": federation | changes.pop("federation", {}),
    }
    return parse_config(content | changes)


def test_a_plan_of_equal_shares_and_late_noise_is_taken():
    for rule in ("fedavg", "fedprox", "fedema", "fedavgm", "fedadam", "fedyogi"):
        plan(merge={"student": rule})
    plan(federation={"wire": "int8"})
    plan(privacy={"enabled": True}, agssd={"head": {"input_norm_cls": "auto"}})


def test_the_plan_of_the_documentation_is_taken():
    page = Path(__file__).parents[1] / "docs" / "privacy.md"
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    assert parse_config(yaml.safe_load(block)).federation.merge.central_privacy.enabled


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"merge": {"student": "median"}}, "merge.student = median"),
        ({"merge": {"student": "trimmed-mean"}}, "merge.student = trimmed-mean"),
        ({"merge": {"student": "norm-clip"}}, "merge.student = norm-clip"),
        ({"merge": {"student": "l-dawa"}}, "merge.student = l-dawa"),
        (
            {"merge": {"student": "krum"}, "federation": {"min_sites": 5}},
            "merge.student = krum",
        ),
        ({"merge": {"weighting": "patients"}}, "merge.weighting = patients"),
        (
            {"merge": {"teacher": "server-ema"}, "federation": {"late": "stale"}},
            "federation.late = stale",
        ),
        ({"federation": {"max_update_norm": 1.0}}, "federation.max_update_norm"),
        ({"agssd": {"head": {"input_norm_cls": "ema"}}}, "agssd.head.input_norm_cls = ema"),
        ({"agssd": {"head": {"input_norm_cls": "auto"}}}, "agssd.head.input_norm_cls = auto"),
        ({"agssd": {"eaam": {"kappa": 0.1}}}, "agssd.eaam.kappa"),
        (
            {
                "cohorts": ["us"],
                "anaus": {"backbone": {"norm": "batch"}, "share_statistics": True},
            },
            "anaus.share_statistics",
        ),
        (
            {"merge": {"central_privacy": {"enabled": True, "delta": 0.4}}},
            "merge.central_privacy.delta",
        ),
        (
            {"merge": {"central_privacy": {"enabled": True, "noise_multiplier": 0}}},
            "merge.central_privacy.noise_multiplier",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_breaks_the_guarantee_is_refused_by_its_name(changes, part):
    merge = changes.get("merge", {})
    federation = changes.get("federation", {}) | {"merge": {"weighting": "uniform"} | merge}
    if "central_privacy" not in merge:
        federation["merge"]["central_privacy"] = {"enabled": True}
    with pytest.raises(ConfigError) as refused:
        plan(**{**changes, "federation": federation})
    assert any(problem.startswith(part) for problem in refused.value.problems)

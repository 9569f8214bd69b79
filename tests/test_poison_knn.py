"""What row 14's real runs rest on: the attack of every round, and what counts as holding."""

import os

import numpy as np
import pytest

from faults.poison_knn import BOUND, HOSTILE, SCANNERS, hostile_site, verdict
from tests.support.toy import Hospital, toy_weights

NAME = "student/head.w"


@pytest.mark.federation
def test_the_hostile_site_flips_its_step_in_every_round_from_that_rounds_base(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    sites = tuple((name, 3) for name in SCANNERS)
    run = Hospital(tmp_path / "x", sites, toy_weights(), rounds=3, min_sites=5)
    seen = {}

    def look(outcome):
        trained = {t.site: t.shared_weights()[NAME] for t in run.bench.trainers}
        seen[outcome.round] = trained

    run.run(hostile_site("sign flip x10", 0, run.store), on_round=look)
    assert run.reasons() == []
    assert sorted(seen) == [0, 1, 2]
    for number, trained in seen.items():
        base = run.store.load(number).weights[NAME]
        trained[HOSTILE] = base - 10 * (trained[HOSTILE] - base)
        merged = run.store.load(number + 1).weights[NAME]
        np.testing.assert_allclose(merged, np.mean(list(trained.values()), axis=0), atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "lost", "passed"),
    [
        ("krum", BOUND - 0.01, True),
        ("krum", BOUND + 0.01, False),
        ("krum", -0.2, True),
        ("fedavg", BOUND - 0.01, False),
        ("fedavg", BOUND + 0.01, True),
    ],
)
def test_a_robust_rule_must_hold_and_plain_averaging_must_fail(rule, lost, passed):
    found = verdict(rule, "noise", 0.9, 0.9 - lost)
    assert found.passed == passed
    assert found.figures == {"knn_clean": 0.9, "knn noise": 0.9 - lost}

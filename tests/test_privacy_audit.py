"""One run of the mechanism under attack: it keeps its promise, and broken ones are found out."""

import numpy as np
import pytest
import torch
from torch import nn

from agssd_core.accounting import epsilon, joint_sigma
from agssd_core.noise import NoiseStream
from agssd_core.training.privacy.audit import audit, lower_bound
from agssd_core.training.privacy.gradients import ClippedSum
from agssd_core.training.privacy.mechanism import NoisedCentre, set_private_gradients
from tests.support.privacy import private_config

CANARIES, DELTA, SIGMA, VIEWS = 1000, 1e-5, 2.0, 4
PHYSICAL = 250


class Attacked:
    """A linear network whose patients' gradients are canaries: long, and orthogonal.

    The released gradient shows each canary in a coordinate of its own, the best any attacker
    can wish for; so does the centre.
    """

    def __init__(self, *, noise=SIGMA, by_view=False, centre=None):
        self.privacy = private_config(
            privacy={"noise_multiplier": SIGMA, "expected_batch": 500, "delta": DELTA}
        ).privacy
        self.noise, self.by_view, self.centre = noise, by_view, centre
        self.stream = NoiseStream.repeatable(7, str(noise), str(by_view), str(centre))

    def __call__(self, included):
        chosen = np.flatnonzero(included)
        network = nn.Linear(CANARIES, 1, bias=False).double()
        clipped = ClippedSum(network, max_grad_norm=1.0, mode="hooks")
        for start in range(0, len(chosen), PHYSICAL):
            rows = 10 * torch.eye(CANARIES, dtype=torch.float64)[chosen[start : start + PHYSICAL]]
            for _ in range(VIEWS if self.by_view else 1):
                views = 1 if self.by_view else VIEWS
                clipped.add(
                    lambda _, rows=rows, views=views: sum(
                        network(rows)[:, 0] for _ in range(views)
                    ),
                    len(rows),
                )
        totals = clipped.totals()
        if self.noise:
            set_private_gradients(clipped.parameters, totals, self.privacy, self.stream)
            scores = network.weight.grad[0] * self.privacy.expected_batch / SIGMA**2
        else:
            scores = totals[0][0]
        if self.centre is not None:
            scores = scores + self._centre_scores(chosen)
        return scores.numpy()

    def _centre_scores(self, chosen):
        centre = torch.zeros(CANARIES, dtype=torch.float64)
        if self.centre == "noised":
            held = NoisedCentre(self.privacy, centre)
            held.add(10 * torch.eye(CANARIES, dtype=torch.float64)[chosen])
            held.move(centre, momentum=0.0, stream=self.stream)
            sigma = self.privacy.centre_ratio * SIGMA
            return centre * self.privacy.expected_batch / sigma**2
        centre[chosen] = 1e6  # seen as it is
        return centre


def bound(mechanism, guesses=100):
    return audit(
        mechanism,
        canaries=CANARIES,
        guesses=guesses,
        delta=DELTA,
        rng=np.random.default_rng(3),
    ).epsilon


PROMISED = epsilon([(SIGMA, 1.0, 1)], delta=DELTA)
WITH_CENTRE = epsilon([(joint_sigma(SIGMA, 4 * SIGMA), 1.0, 1)], delta=DELTA)


def test_the_mechanism_gives_away_something_but_no_more_than_promised():
    assert 0 < bound(Attacked()) <= PROMISED


def test_the_noised_centre_is_paid_for():
    assert PROMISED < WITH_CENTRE
    assert 0 < bound(Attacked(centre="noised")) <= WITH_CENTRE


@pytest.mark.parametrize(
    "broken",
    [Attacked(noise=0), Attacked(by_view=True), Attacked(centre="plain")],
    ids=["no noise", "views clipped one by one", "centre without noise"],
)
def test_a_broken_mechanism_is_found_out(broken):
    assert bound(broken) > 1.2 * WITH_CENTRE


def test_bounds_follow_the_binomial_tail():
    """All of 100 right: at epsilon the chance is (e^eps / (1 + e^eps))^100."""
    found = lower_bound(100, 100, canaries=100, delta=0.0, failure=0.05)
    assert (1 / (1 + np.exp(-found))) ** 100 == pytest.approx(0.05, rel=1e-6)
    assert lower_bound(100, 50, canaries=100, delta=0.0, failure=0.05) == pytest.approx(0, abs=1e-9)
    with_delta = lower_bound(100, 100, canaries=1000, delta=1e-5, failure=0.05)
    assert with_delta < found


def test_accounts_agree_with_published_values():
    """Opacus' own RDP for 500 patients and 1,000 steps, as its accountant prints it."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(2.0, 0.064, 1000)]
    assert epsilon([(2.0, 0.064, 1000)], delta=1.1e-3) == pytest.approx(
        accountant.get_epsilon(1.1e-3), rel=1e-3
    )
    assert epsilon([], delta=1e-5) == 0
    twice = epsilon([(2.0, 0.064, 1000)] * 2, delta=1.1e-3)
    assert twice == pytest.approx(epsilon([(2.0, 0.064, 2000)], delta=1.1e-3))
    assert joint_sigma(1.0, 4.0) == pytest.approx(0.970, abs=1e-3)
    assert joint_sigma(1.0) == 1

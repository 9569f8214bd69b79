"""Epsilon of private steps: against Opacus, against another library, and by its laws."""

import math
import warnings
from copy import deepcopy
from functools import partial

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.accounting import (
    ORDERS,
    _of_one_step,
    epsilon,
    joint_sigma,
    least_sigma,
    most_steps,
)
from agssd_core.errors import AccountingError

HISTORIES = [
    [(1.0, 0.032, 3000)],
    [(0.6, 0.064, 1000)],
    [(4.0, 0.0205, 5000)],
    [(1.3, 0.2, 40), (0.9, 0.05, 7), (1.3, 0.2, 13)],
    [(20.0, 1.0, 3)],
]
# Patients, rate, steps, delta, then epsilon at sigma 0.6, 1, 2 and 4, then sigma for 8, 3 and 1.
TABLE = [
    (500, 0.064, 1000, 1.1e-3, (41.4, 12.4, 3.94, 1.60), (1.26, 2.45, 5.94)),
    (2000, 0.032, 3000, 2.3e-4, (40.4, 11.3, 3.71, 1.56), (1.20, 2.35, 5.86)),
    (10000, 0.0256, 4000, 4e-5, (40.4, 11.3, 3.78, 1.62), (1.20, 2.39, 6.13)),
    (50000, 0.0205, 5000, 6.8e-6, (38.4, 10.7, 3.65, 1.59), (1.17, 2.34, 6.09)),
]


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_epsilon_is_that_of_opacus(history):
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    # A loaded state would alias the list that it was loaded from.
    accountant.load_state_dict({"history": deepcopy(history), "mechanism": accountant.mechanism()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = accountant.get_epsilon(1e-5, alphas=list(ORDERS))
        default = accountant.get_epsilon(1e-5)
    assert epsilon(history, delta=1e-5) == pytest.approx(same, rel=1e-12)
    assert epsilon(history, delta=1e-5) <= default * (1 + 1e-12)


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_epsilon_agrees_with_another_library(history):
    accounting = pytest.importorskip("dp_accounting")
    rdp = pytest.importorskip("dp_accounting.rdp")
    accountant = rdp.RdpAccountant(orders=list(ORDERS))
    for sigma, rate, steps in history:
        event = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(sigma))
        accountant.compose(accounting.SelfComposedDpEvent(event, steps))
    # At orders between integers the other library rounds up or gives up: seen where epsilon is
    # large.
    expected, found = accountant.get_epsilon(1e-5), epsilon(history, delta=1e-5)
    assert found <= expected * (1 + 1e-9)
    assert found == pytest.approx(expected, rel=0.01 if expected < 20 else 0.1)


@pytest.mark.parametrize(("sigma", "rate"), [(0.6, 0.064), (1.3, 0.2), (4.0, 0.02)])
@pytest.mark.parametrize("order", [1.6, 2.5, 7.3, 32])
def test_the_divergence_of_a_step_is_the_integral_that_defines_it(sigma, rate, order):
    with mpmath.workdps(30):
        ratio = partial(_ratio, sigma=sigma, rate=rate)
        bends = [-mpmath.inf, -5 * sigma, 0, 1, 5 * sigma, order, order + 30 * sigma]
        moment = mpmath.quad(lambda x: mpmath.npdf(x, 0, sigma) * ratio(x) ** order, bends)
        expected = float(mpmath.log(moment) / (order - 1))
    assert _of_one_step(sigma, rate)[ORDERS.index(order)] == pytest.approx(expected, rel=1e-6)


def _ratio(x, *, sigma, rate):
    """Density with the patient over density without, Mironov et al. 2019, Section 3."""
    return (1 - rate) + rate * mpmath.exp((2 * x - 1) / (2 * sigma**2))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} patients")
def test_published_budgets_are_reproduced(row):
    _, rate, steps, delta, spent, noises = row
    for sigma, expected in zip((0.6, 1.0, 2.0, 4.0), spent, strict=True):
        # Deltas were rounded to two digits.
        assert epsilon([(sigma, rate, steps)], delta=delta) == pytest.approx(expected, rel=0.01)
    for budget, expected in zip((8, 3, 1), noises, strict=True):
        found = least_sigma(budget, rate=rate, steps=steps, delta=delta)
        assert found == pytest.approx(expected, rel=0.01)


@given(
    sigma=st.floats(0.5, 30),
    rate=st.floats(0.001, 1),
    steps=st.integers(1, 3000),
    more=st.integers(1, 1000),
)
@settings(max_examples=8, deadline=None)
def test_more_steps_and_less_noise_never_cost_less(sigma, rate, steps, more):
    cost = epsilon([(sigma, rate, steps)], delta=1e-5)
    assert epsilon([(sigma, rate, steps + more)], delta=1e-5) >= cost >= 0
    assert epsilon([(sigma * 1.2, rate, steps)], delta=1e-5) <= cost
    assert epsilon([(sigma, rate, steps)], delta=1e-4) <= cost
    assert epsilon([(sigma, rate / 2, steps)], delta=1e-5) <= cost * (1 + 1e-9)
    # In parts or at once.
    parts = [(sigma, rate, steps), (sigma, rate, more)]
    assert epsilon(parts, delta=1e-5) == pytest.approx(
        epsilon([(sigma, rate, steps + more)], delta=1e-5)
    )


@pytest.mark.parametrize("history", [(), ((1.0, 0.02, 500),)], ids=["new", "old"])
def test_the_ways_back_end_just_within_the_budget(history):
    steps = most_steps(4.0, sigma=1.1, rate=0.03, delta=1e-5, history=history)
    assert epsilon([*history, (1.1, 0.03, steps)], delta=1e-5) <= 4.0
    assert epsilon([*history, (1.1, 0.03, steps + 1)], delta=1e-5) > 4.0
    sigma = least_sigma(4.0, rate=0.03, steps=300, delta=1e-5, history=history)
    assert epsilon([*history, (sigma, 0.03, 300)], delta=1e-5) <= 4.0
    assert epsilon([*history, (sigma * 0.999, 0.03, 300)], delta=1e-5) > 4.0


def test_a_spent_budget_affords_nothing():
    spent = [(1.0, 0.05, 2000)]
    assert most_steps(3.0, sigma=5.0, rate=0.01, delta=1e-5, history=spent) == 0
    with pytest.raises(AccountingError, match="fewer steps"):
        least_sigma(3.0, rate=0.01, steps=10, delta=1e-5, history=spent)


def test_two_gaussians_on_one_draw_cost_one_of_joint_noise():
    assert joint_sigma(1.0, 4.0) == pytest.approx(0.970, abs=5e-4)
    assert joint_sigma(2.0) == 2.0
    # At q = 1 RDP is linear in 1 / sigma^2, so the law is exact there.
    together = epsilon([(1.5, 1.0, 1), (2.5, 1.0, 1)], delta=1e-6)
    assert epsilon([(joint_sigma(1.5, 2.5), 1.0, 1)], delta=1e-6) == pytest.approx(together)
    # Counted as two independent draws it would look too cheap at small rates.
    apart = epsilon([(1.0, 0.01, 500), (1.0, 0.01, 500)], delta=1e-6)
    assert epsilon([(joint_sigma(1.0, 1.0), 0.01, 500)], delta=1e-6) > apart


def test_a_history_is_left_as_it_was():
    history = [(1.0, 0.1, 5)]
    epsilon(history, delta=1e-5)
    assert history == [(1.0, 0.1, 5)]
    assert epsilon([], delta=1e-5) == 0
    assert epsilon([(1.0, 0.1, 0)], delta=1e-5) == 0


@pytest.mark.parametrize(
    "part",
    [(0.0, 0.1, 5), (1.0, 0.0, 5), (1.0, 1.5, 5), (1.0, 0.1, -1), (math.nan, 0.1, 5)],
    ids=str,
)
def test_numbers_without_meaning_are_refused(part):
    with pytest.raises(AccountingError, match="must be above 0"):
        epsilon([part], delta=1e-5)
    with pytest.raises(AccountingError, match="1 / patients"):
        epsilon([(1.0, 0.1, 5)], delta=0.0)

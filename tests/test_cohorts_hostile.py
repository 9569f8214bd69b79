"""Nothing crosses from one cohort to the other, whatever a site answers or a server orders."""

import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from agssd_core.errors import OrderRefusedError
from agssd_core.protocol import PROTOCOL_VERSION, SiteQuery
from client.site import Site
from server import wire
from simulation.grid import Fault
from tests.support.hostile import forged, hostile
from tests.support.orders import config_for, order_for
from tests.support.toy import (
    BATCH,
    Consortium,
    Hospital,
    ToyBench,
    dump_config,
    toy_weights,
)

NAME = "student/predictor.w"
COHORTS = ("ct-mr", "us")


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def put(value):
    def change(weights):
        weights[NAME][1, 1] = value

    return change


def nothing(_weights):
    return None


def ct_weights(_weights):
    return toy_weights(7)


BAD = {
    "ct-weights": (hostile(ct_weights), "schema"),
    "ct-shapes": (hostile(lambda w: {n: np.zeros((4, 3), np.float32) for n in w}), "schema"),
    "extra-state": (hostile(lambda w: {**w, "state/centre": np.zeros(5, np.float32)}), "schema"),
    "claims-ct": (hostile(nothing, cohort="ct-mr"), "cohort"),
    "claims-none": (hostile(nothing, cohort=""), "cohort"),
    "ct-run": (hostile(nothing, run="run-ct-mr"), "run"),
    "ct-patients": (hostile(nothing, patient_count=3), "weight"),
    "nan": (hostile(put(np.nan)), "non-finite"),
    "huge": (hostile(put(1e30)), "magnitude"),
    "far": (hostile(lambda w: {n: a + (n == NAME) * 900 for n, a in w.items()}), "norm"),
    "base": (hostile(nothing, base_digest="0" * 64), "base"),
    "nonce": (hostile(nothing, nonce="0" * 32), "nonce"),
    "altered": (hostile(put(0.5), sealed=False), "digest"),
}


def consortium(folder):
    return Consortium(folder / "x", rounds=2, max_update_norm=5.0)


@pytest.fixture(scope="module")
def without_a(tmp_path_factory):
    """Site a misses ultrasound's round 1 and nothing else."""
    run = consortium(tmp_path_factory.mktemp("absent"))
    run.run(lambda name, cohort, group: Fault(offline=(name, cohort, group) == ("a", "us", "1")))
    return {name: run.of(name).digest() for name in COHORTS}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_to_ultrasound_is_refused_by_name(tmp_path, without_a, case):
    tamper, reason = BAD[case]
    struck = consortium(tmp_path)
    wanted = ("a", "us", "1")
    struck.run(lambda *message: Fault(tamper=tamper if message == wanted else None))
    assert struck.of("us").reasons() == [(1, "a", reason)]
    assert struck.of("ct-mr").reasons() == []
    assert {name: struck.of(name).digest() for name in COHORTS} == without_a


@pytest.mark.parametrize("case", ["nan", "claims", "far", "duplicate-name"])
def test_the_same_holds_for_ultrasound_by_itself(tmp_path, case):
    tampers = {
        "nan": (hostile(put(np.nan)), "non-finite"),
        "claims": (hostile(nothing, cohort="ct-mr"), "cohort"),
        "far": (hostile(lambda w: {n: a + (n == NAME) * 900 for n, a in w.items()}), "norm"),
        "duplicate-name": (hostile(nothing, site="a"), "site"),
    }
    tamper, reason = tampers[case]
    kwargs = {"rounds": 2, "max_update_norm": 5.0, "anaus": {"backbone": {"norm": "group"}}}
    struck, absent = Hospital(tmp_path / "x", **kwargs), Hospital(tmp_path / "y", **kwargs)
    wanted = ("b", "1")
    struck.run(lambda *message: Fault(tamper=tamper if message == wanted else None))
    absent.run(lambda *message: Fault(offline=message == wanted))
    assert struck.reasons() == [(1, "b", reason)]
    assert struck.digest() == absent.digest()


def honest_update(message):
    return wire.decode_reply(message, max_bytes=1 << 20)


def test_honest_updates_of_a_site_in_both_cohorts_swapped(tmp_path):
    """The answer to each order is the other cohort's, whole and properly sealed."""
    seen, struck = {}, consortium(tmp_path)

    def keep(cohort):
        def tamper(message):
            seen[cohort] = honest_update(message)
            return message

        return tamper

    def swap(cohort):
        def tamper(message):
            own = honest_update(message)
            other = seen["us" if cohort == "ct-mr" else "ct-mr"]
            # With the nonce of the order that it pretends to answer.
            return forged(
                replace(other, header=replace(other.header, nonce=own.header.nonce)), message
            )

        return tamper

    def faults(name, cohort, group):
        if name != "a" or group == "hello":
            return Fault()
        return Fault(tamper=keep(cohort) if group == "0" else swap(cohort))

    struck.run(faults)
    absent = consortium(tmp_path / "absent")
    absent.run(lambda name, _cohort, group: Fault(offline=(name, group) == ("a", "1")))
    for name in COHORTS:
        assert struck.of(name).reasons() == [(1, "a", "schema")]
        assert struck.of(name).digest() == absent.of(name).digest()


def test_even_with_one_schema_for_both_an_update_is_refused_in_the_other(tmp_path):
    """Only header fields tell them apart then, and each of them does."""
    run = Hospital(tmp_path, patients=(("a", 3), ("b", 3)), anaus=BATCH, rounds=1)
    other = Hospital(tmp_path / "other", patients=(("a", 3),), anaus=BATCH, rounds=1)
    site = Site(other.sites["a"], "a", other.bench)
    base = other.store.load(0).weights
    order = order_for(base, config=other.config, cohort="us", run="run-2", site="a")
    foreign = site.train_round(order, base)
    run.run(
        lambda name, group: Fault(
            tamper=(lambda message: forged(foreign, message))
            if (name, group) == ("a", "0")
            else None
        )
    )
    assert run.reasons() == [(0, "a", "run")]


def test_an_oversized_answer_is_refused_by_its_size(tmp_path):
    big = hostile(lambda w: {n: np.zeros(1 << 16, np.float32) for n in w})
    struck = consortium(tmp_path)
    wanted = ("a", "us", "1")
    struck.run(lambda *message: Fault(tamper=big if message == wanted else None))
    assert struck.of("us").reasons() == [(1, "a", "size")]


@pytest.mark.parametrize("late", ["discard", "stale"])
def test_a_late_reply_finds_its_own_cohort_while_the_other_is_open(tmp_path, late):
    """a answers ultrasound's round 0 after its deadline, while CT's rounds go on."""
    settings = {"late": late, "merge": {"teacher": "server-ema"}, "rounds": 4}
    run, whole = Consortium(tmp_path / "x", **settings), Consortium(tmp_path / "whole", **settings)
    delays = {("a", "us", "0"): 150.0, ("b", "ct-mr", "1"): 60.0, ("c", "ct-mr", "2"): 60.0}
    run.run(lambda *message: Fault(delay_s=delays.get(message, 0.0)))
    whole.run()
    assert run.of("ct-mr").digest() == whole.of("ct-mr").digest()
    assert run.of("ct-mr").reasons() == []
    word = "late" if late == "discard" else "late-merged"
    arrived = [reason for _, site, reason in run.of("us").reasons() if site == "a"]
    assert arrived[0] == "no-reply"
    assert set(arrived[1:]) <= {word, "late"}
    assert len(arrived) == 2
    assert not list((tmp_path / "x" / "run").glob("*/late-*"))
    assert not list((tmp_path / "x" / "run").glob("*/spool"))


# --- at the site


@pytest.fixture
def site(tmp_path):
    (tmp_path / "facts.json").write_text('{"patients": {"ct-mr": 7}}')
    return Site(tmp_path, "north", ToyBench())


def us_order(weights, **changes):
    config = config_for().for_cohort("us")
    return order_for(weights, config=config, cohort="us", run="run-us", **changes)


def test_an_order_of_a_cohort_that_the_site_has_nothing_for_is_refused(site):
    weights = toy_weights(cohort="us")
    with pytest.raises(OrderRefusedError, match="no scan for this cohort") as refused:
        site.train_round(us_order(weights), weights)
    assert refused.value.reason == "cohort"
    assert site.workbench.trainers == []
    assert not (site.folder / "federation").exists()


@pytest.mark.parametrize("cohort", ["us", "", "ct", "../x", "CT-MR"])
def test_a_hello_of_another_cohort_is_declined(site, cohort):
    with pytest.raises(OrderRefusedError) as refused:
        site.hello(SiteQuery(PROTOCOL_VERSION, cohort))
    assert refused.value.reason == "cohort"


def test_an_order_whose_plan_is_the_other_cohorts_is_refused(site):
    (site.folder / "facts.json").write_text('{"patients": {"ct-mr": 7, "us": 2}}')
    weights = toy_weights(cohort="us")
    order = replace(us_order(weights), config=dump_config(config_for()))
    with pytest.raises(OrderRefusedError) as refused:
        site.train_round(order, weights)
    assert refused.value.reason == "plan"


def test_a_run_of_one_cohort_is_not_taken_up_by_the_other(site):
    (site.folder / "facts.json").write_text('{"patients": {"ct-mr": 7, "us": 2}}')
    ct, us = toy_weights(), toy_weights(cohort="us")
    site.train_round(order_for(ct), ct)
    kept = {p: p.read_bytes() for p in (site.folder / "federation").rglob("*") if p.is_file()}
    with pytest.raises(OrderRefusedError, match="its own run") as refused:
        site.train_round(replace(us_order(us), run="run-1"), us)
    assert refused.value.reason == "run"
    assert {
        p: p.read_bytes() for p in (site.folder / "federation").rglob("*") if p.is_file()
    } == kept


def test_a_site_keeps_one_warm_trainer_for_each_cohort(site):
    (site.folder / "facts.json").write_text('{"patients": {"ct-mr": 7, "us": 2}}')
    ct, us = toy_weights(), toy_weights(cohort="us")
    config = config_for().for_cohort("us")
    for number in range(3):
        site.train_round(order_for(ct, number), ct)
        site.train_round(order_for(us, number, config, cohort="us", run="run-us"), us)
    assert [(t.us, t.steps_taken) for t in site.workbench.trainers] == [(False, 6), (True, 6)]
    # A failure of one costs the other nothing.
    site.workbench.trainers[1].fail = _raise
    with pytest.raises(KeyError):
        site.train_round(order_for(us, 3, config, cohort="us", run="run-us"), us)
    site.train_round(order_for(ct, 3), ct)
    assert [(t.us, t.steps_taken) for t in site.workbench.trainers] == [(False, 8), (True, 6)]
    site.train_round(order_for(us, 3, config, cohort="us", run="run-us"), us)
    assert [t.us for t in site.workbench.trainers] == [False, True, True]


def _raise(_step):
    raise KeyError("broken")


def test_runs_of_both_cohorts_train_in_turn_at_one_site(site):
    """Two processes at once, as a SuperNode may start them; here two threads."""
    (site.folder / "facts.json").write_text('{"patients": {"ct-mr": 7, "us": 2}}')
    busy, seen = set(), []

    def watch(_site, step):
        busy.add(threading.get_ident())
        seen.append(len(busy))
        time.sleep(0.1)
        busy.discard(threading.get_ident())

    ct, us = toy_weights(), toy_weights(cohort="us")
    orders = [(order_for(ct), ct), (us_order(us), us)]
    workers = [
        threading.Thread(target=Site(site.folder, "north", ToyBench(watch)).train_round, args=each)
        for each in orders
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [1, 1]

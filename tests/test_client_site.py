"""A site: which orders it takes, what it keeps, what it lets out."""

import errno
import os
from dataclasses import replace

import numpy as np
import pytest

from agssd_core.config import MergeConfig
from agssd_core.errors import CheckpointError, OrderRefusedError, TrainingError, WeightsError
from agssd_core.protocol import PROTOCOL_VERSION, SiteQuery
from agssd_core.weights import schema_of, weights_digest
from client import memory as memory_module
from client.outbound import leaving, release
from client.site import Site, named_site
from client.start import divergence, start_of_round
from tests.support.orders import config_for, order_for
from tests.support.sealing import weights_in
from tests.support.toy import ToyBench, toy_weights


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def site(tmp_path):
    (tmp_path / "facts.json").write_text('{"patients": 7}')
    return Site(tmp_path, "north", ToyBench())


def test_hello_gives_counts_and_name(site):
    hello = site.hello(SiteQuery(PROTOCOL_VERSION, "ct-mr", "n")).hello
    assert hello.nonce == "n"
    assert (hello.site, hello.patient_count, hello.cohort) == ("north", 7, "ct-mr")
    with pytest.raises(OrderRefusedError, match="cohort"):
        site.hello(SiteQuery(PROTOCOL_VERSION, "us"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": PROTOCOL_VERSION + 1}, "protocol"),
        ({"cohort": "us"}, "cohort"),
        ({"config": "{}x"}, "plan"),
        ({"config": '{"agsd": {}}'}, "plan"),
        ({"steps": 3}, "plan"),
        ({"steps": 0}, "plan"),
        ({"first_step": 1}, "plan"),
        ({"total_steps": 11}, "plan"),
        ({"round": 5, "first_step": 10}, "plan"),
        ({"round": -1, "first_step": -2}, "plan"),
        ({"base_digest": "0" * 64}, "base"),
        ({"run": "../../etc"}, "protocol"),
        ({"run": ""}, "protocol"),
    ],
    ids=str,
)
def test_an_order_that_does_not_fit_its_plan_is_refused(site, changes, reason):
    weights = toy_weights()
    with pytest.raises(OrderRefusedError) as refused:
        site.train_round(replace(order_for(weights), **changes), weights)
    assert refused.value.reason == reason
    assert site.workbench.trainers == []


def test_a_flipped_bit_in_the_base_is_refused(site):
    weights = toy_weights()
    order = order_for(weights)
    weights["student/head.w"].view(np.uint32)[0, 0] ^= 1
    with pytest.raises(OrderRefusedError, match="Send the order again"):
        site.train_round(order, weights)


def test_a_repeated_order_is_answered_from_disk_under_its_own_nonce(site, tmp_path):
    weights = toy_weights()
    first = site.train_round(order_for(weights), weights)
    # Another process: nothing is warm.
    again_order = order_for(weights)
    again = Site(tmp_path, "north", ToyBench()).train_round(again_order, weights)
    assert again.header == replace(first.header, nonce=again_order.nonce)
    assert weights_digest(weights_in(again)) == weights_digest(weights_in(first))
    assert len(site.workbench.trainers) == 1


def test_a_damaged_saved_reply_is_trained_again_to_the_same_bits(site, tmp_path):
    weights = toy_weights()
    first = site.train_round(order_for(weights), weights)
    reply = tmp_path / "federation" / "run-1" / "round-0000" / "reply.safetensors"
    content = bytearray(reply.read_bytes())
    content[-3] ^= 1
    reply.write_bytes(content)
    bench = ToyBench()
    again = Site(tmp_path, "north", bench).train_round(order_for(weights), weights)
    assert weights_digest(weights_in(again)) == weights_digest(weights_in(first))
    assert len(bench.trainers) == 1


def test_warm_and_cold_sites_train_to_the_same_bits(site, tmp_path):
    weights = toy_weights()
    (tmp_path / "cold").mkdir()
    (tmp_path / "cold" / "facts.json").write_text('{"patients": 7}')
    for number in range(3):
        warm = site.train_round(order_for(weights, number), weights)
        fresh = Site(tmp_path / "cold", "north", ToyBench())
        cold = fresh.train_round(order_for(weights, number), weights)
        assert weights_digest(weights_in(warm)) == weights_digest(weights_in(cold))
        assert cold.header.metrics["optimiser_reset"] == 0
        weights = weights_in(warm)
    assert len(site.workbench.trainers) == 1


def test_only_the_newest_round_stays_on_disk(site, tmp_path):
    weights = toy_weights()
    for number in range(3):
        site.train_round(order_for(weights, number), weights)
    kept = sorted(path.name for path in (tmp_path / "federation" / "run-1").glob("round-*"))
    assert kept == ["round-0002"]


def test_a_disk_that_is_full_before_anything_was_saved_is_said(site, tmp_path, monkeypatch):
    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/secret")

    monkeypatch.setattr(memory_module, "write_text", full)
    with pytest.raises(CheckpointError, match="Free disk space") as caught:
        site.train_round(order_for(toy_weights()), toy_weights())
    assert "secret" not in str(caught.value)


def test_a_full_disk_leaves_the_round_before(site, tmp_path, monkeypatch):
    weights = toy_weights()
    site.train_round(order_for(weights), weights)

    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(memory_module, "write_text", full)
    with pytest.raises(CheckpointError, match="Free disk space"):
        site.train_round(order_for(weights, 1), weights)
    monkeypatch.undo()
    last = memory_module.RunMemory.of(tmp_path, "run-1").last()
    assert last.round == 0
    update = site.train_round(order_for(weights, 1), weights)
    assert update.header.metrics["optimiser_reset"] == 0


@pytest.mark.parametrize("rule", ["average", "server-ema", "local", "copy"])
def test_a_teacher_leaves_only_where_the_server_averages_it(site, rule):
    weights = toy_weights()
    config = config_for(merge={"teacher": rule})
    update = site.train_round(order_for(weights, config=config), weights)
    groups = {name.split("/")[0] for name in weights_in(update)}
    assert groups == ({"student", "state"} | ({"teacher"} if rule == "average" else set()))


def test_a_local_teacher_goes_on_unless_a_round_was_missed(site):
    base = toy_weights()
    config = config_for(merge={"teacher": "local"})
    own = _teacher_started_from(site, [0, 1], base, config)
    assert weights_digest(own[1]) != weights_digest(own[0])  # not phi^r: its own, moved on
    (gap,) = _teacher_started_from(site, [3], base, config)  # round 2 was missed
    teacher = {name: array for name, array in base.items() if name.startswith("teacher/")}
    assert weights_digest(gap) == weights_digest(teacher)


def _teacher_started_from(site, rounds, base, config):
    started = []
    for number in rounds:
        bench = ToyBench()
        fresh = Site(site.folder, "north", bench)
        fresh.train_round(order_for(base, number, config=config), base)
        anchor = bench.trainers[0].anchor
        started.append({name: a for name, a in anchor.items() if name.startswith("teacher/")})
    return started


def test_fedema_mixes_by_tau_in_its_second_round(site):
    weights = toy_weights()
    config = config_for(merge={"student": "fedema", "ema_tau": 0.4})
    first = site.train_round(order_for(weights, 0, config), weights)
    second = site.train_round(order_for(weights, 1, config), weights)
    assert first.header.metrics["fedema_mixing"] == 0
    assert second.header.metrics["fedema_mixing"] == pytest.approx(0.4)
    merge = MergeConfig(student="fedema", ema_tau=0.4)
    start = start_of_round(
        weights, merge, own={**weights, **weights_in(first)}, first_divergence=0.0
    )
    expected = 0.4 * weights_in(first)["student/head.w"] + 0.6 * weights["student/head.w"]
    np.testing.assert_allclose(start.weights["student/head.w"], expected, rtol=1e-5)
    doubled = start_of_round(
        weights, merge, own={**weights, **weights_in(first)}, first_divergence=start.divergence / 9
    )
    assert doubled.mixing == 1.0  # capped


def test_divergence_is_relative_per_block_and_needs_no_conv_names():
    merged = {
        "student/encoder.blocks.0.w": np.full(4, 2.0, np.float32),
        "student/encoder.blocks.1.w": np.full(4, 100.0, np.float32),
        "student/encoder.blocks.1.bias": np.zeros(3, np.float32),
    }
    own = {
        "student/encoder.blocks.0.w": np.full(4, 3.0, np.float32),
        "student/encoder.blocks.1.w": np.full(4, 110.0, np.float32),
        "student/encoder.blocks.1.bias": np.zeros(3, np.float32),
    }
    assert divergence(own, merged) == pytest.approx((0.5 + 0.1) / 2)
    assert divergence(merged, merged) == 0
    assert divergence({}, {}) == 0


@pytest.mark.parametrize(
    ("change", "error", "remedy"),
    [
        ({"student/extra": np.zeros(2, np.float32)}, WeightsError, "surplus"),
        ({"student/head.w": np.zeros((5, 3), np.float32)}, WeightsError, "same model"),
        ({"student/head.w": np.full((3, 5), np.nan, np.float32)}, WeightsError, "not finite"),
    ],
    ids=["name", "shape", "nan"],
)
def test_the_door_out_lets_nothing_else_pass(change, error, remedy):
    weights = toy_weights()
    with pytest.raises(error, match=remedy):
        release(weights | change, **_door(weights), metrics={"loss": 1.0})


@pytest.mark.parametrize("metrics", [{"loss": np.inf}, {"a/b^c": 1.0}, {"x" * 49: 1.0}], ids=str)
def test_metrics_leave_as_finite_numbers_under_plain_names(metrics):
    weights = toy_weights()
    with pytest.raises(TrainingError, match="nothing was sent"):
        release(weights, **_door(weights), metrics=metrics)


def _door(weights):
    return {
        "order": order_for(weights),
        "schema": schema_of(leaving(weights, MergeConfig())),
        "site": "north",
        "patient_count": 7,
    }


def test_a_node_names_its_site_itself(tmp_path):
    bench = ToyBench()
    with pytest.raises(OrderRefusedError, match="agssd-site run"):
        named_site({}, workbench=bench)
    with pytest.raises(OrderRefusedError, match="--name"):
        named_site({"site": str(tmp_path), "name": "a b"}, workbench=bench)
    named = named_site({"site": str(tmp_path), "name": "north"}, workbench=bench)
    assert named is named_site({"site": str(tmp_path), "name": "north"}, workbench=bench)
    assert named.name == "north"

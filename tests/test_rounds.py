"""Rounds with real Flower messages: faults of the way cost a site its round and nobody else."""

import os

import pytest

from agssd_core.weights import weights_digest
from simulation.grid import Fault
from tests.support.toy import Hospital, ToyTrainer, toy_weights


def only(site, number, fault):
    """The fault strikes this site's message of this round."""
    return lambda name, group: fault if (name, group) == (site, str(number)) else Fault()


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def hospital(tmp_path):
    return lambda name="x", **kwargs: Hospital(tmp_path / name, **kwargs)


def test_two_runs_with_one_seed_end_with_the_same_digest(hospital):
    one, two = hospital("one"), hospital("two")
    assert one.run().weights_digest == two.run().weights_digest != weights_digest(toy_weights())
    assert one.run().merged_rounds == 3  # a finished run is not run again
    assert not (one.folder / "run" / "spool").exists()
    assert [trainer.steps_taken for trainer in one.bench.trainers] == [12, 12, 12]


def test_one_site_equals_plain_training_bit_for_bit(hospital):
    alone = hospital(patients=(("a", 3),), rounds=5)
    alone.run()
    plain = ToyTrainer(alone.config, site="a")
    plain.load(toy_weights())
    plain.train_steps(0, 20, 20)
    assert weights_digest(alone.weights()) == weights_digest(plain.shared_weights())


def test_order_of_arrival_changes_no_bit(hospital):
    one, two = hospital("one"), hospital("two")
    one.run()
    delays = {"a": 30.0, "b": 20.0, "c": 1.0}
    two.run(lambda name, group: Fault(delay_s=delays[name] if group != "hello" else 0))
    waited = {row["site"]: row["seconds"] for row in two.rows("site")}
    assert sorted(waited, key=waited.get) == ["c", "b", "a"]
    assert one.digest() == two.digest()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(offline=True), "no-reply"),
        (Fault(lost_reply=True), "no-reply"),
        (Fault(delay_s=1e6), "no-reply"),
    ],
    ids=["offline", "lost", "delayed"],
)
def test_a_missing_reply_merges_as_if_the_site_were_absent(hospital, fault, reason):
    struck = hospital("struck", rounds=1)
    absent = hospital("absent", rounds=1, patients=(("a", 3), ("c", 4)))
    struck.run(only("b", 0, fault))
    absent.run()
    assert struck.reasons() == [(0, "b", reason)]
    assert struck.digest() == absent.digest()


def test_a_site_that_missed_a_round_takes_part_in_the_next(hospital):
    struck = hospital()
    struck.run(only("b", 1, Fault(offline=True)))
    taken = [(row["round"], row["site"]) for row in struck.rows("site")]
    assert (2, "b") in taken
    assert (1, "b") not in taken
    resets = [row["metrics"]["optimiser_reset"] for row in struck.rows("site")]
    assert resets == [0.0] * 8  # its optimiser of round 0 goes on


def test_a_reply_within_the_deadline_is_waited_for(hospital):
    slow = hospital()
    slow.run(only("b", 1, Fault(delay_s=99.0)))
    assert slow.reasons() == []
    assert max(row["seconds"] for row in slow.rows("site")) == pytest.approx(99.0, abs=1.1)


def test_quorum_lost_leaves_the_weights_and_is_recorded(hospital):
    few = hospital(min_sites=3)
    few.run(only("b", 1, Fault(offline=True)))
    merged = [row["merged"] for row in few.rows("merge")]
    assert merged == [True, False, True]
    before, after = few.store.load(1), few.store.load(2)
    assert before.manifest.weights_digest == after.manifest.weights_digest
    assert after.manifest.sites == ()


def test_a_late_reply_is_journalled_and_discarded(hospital):
    late, lost = hospital("late"), hospital("lost")
    # b answers round 0 after its deadline of 100 s, while a keeps round 1 open.
    delays = {("b", "0"): 150.0, ("a", "1"): 90.0}
    late.run(lambda name, group: Fault(delay_s=delays.get((name, group), 0.0)))
    lost.run(only("b", 0, Fault(lost_reply=True)))
    assert (0, "b", "no-reply") in late.reasons()
    assert (1, "b", "late") in late.reasons()
    assert late.digest() == lost.digest()


def test_a_stale_reply_moves_the_merge_by_a_decayed_share(hospital):
    settings = {"late": "stale", "merge": {"teacher": "server-ema"}, "rounds": 2}
    delays = {("b", "0"): 150.0, ("a", "1"): 90.0}
    down = {("b", "1")}

    def faults(name, group):
        return Fault(delay_s=delays.get((name, group), 0.0), offline=(name, group) in down)

    stale = hospital("stale", **settings)
    stale.run(faults)
    discarded = hospital("discarded", **{**settings, "late": "discard"})
    discarded.run(faults)
    row = stale.rows("merge")[1]
    assert row["metrics"]["late_merged"] == 1
    assert (1, "b", "late-merged") in stale.reasons()
    # Counts 3, 2, 4 with b's halved once: a and c are held at 0.4 and leave 0.2, not 0.24.
    assert row["shares"]["b"] == pytest.approx(0.2)
    assert stale.digest() != discarded.digest()
    assert not list((stale.folder / "run").glob("late-*"))


def test_a_reply_lost_in_upload_is_ordered_again_and_answered_from_disk(hospital):
    struck, healthy = hospital("struck"), hospital("healthy")
    strikes = iter([True])

    def once(name, group):
        return Fault(upload_fails=(name, group) == ("b", "1") and next(strikes, False))

    struck.run(once)
    healthy.run()
    assert struck.digest() == healthy.digest()
    assert struck.reasons() == []
    assert [trainer.steps_taken for trainer in struck.bench.trainers] == [12, 12, 12]


def test_an_order_sent_again_leaves_the_rounds_end_where_it_was(hospital):
    """As when a site was killed and is on line again just before the deadline."""
    run = hospital(rounds=1)
    grid = run.grid(only("b", 0, Fault(upload_fails=True, delay_s=80.0)))
    run.run(grid=grid)
    assert grid.time.clock() < 110
    assert (0, "b", "no-reply") in run.reasons()
    assert set(run.rows("merge")[0]["shares"]) == {"a", "c"}


def _away(run, *, back, slow=0.0):
    """A grid whose site b loses round 0's order, is off line, and is back after so many seconds."""
    strikes = iter([True])

    def faults(name, group):
        if (name, group) == ("b", "0") and next(strikes, False):
            grid.offline.add("b")
        if name in grid.offline:  # what the SuperLink says of a node that is not there
            return Fault(upload_fails=True)
        return Fault(delay_s=slow if (name, group) == ("c", "0") else 0.0)

    grid = run.grid(faults)
    sleep = grid.time.sleep

    def wake(seconds):
        sleep(seconds)
        if grid.time.clock() >= back:
            grid.offline.discard("b")

    grid.time.sleep = wake
    return grid


@pytest.mark.parametrize(("back", "slow"), [(6.0, 0.0), (40.0, 60.0)], ids=["alone", "others"])
def test_a_site_that_was_killed_gets_its_order_again_when_it_is_back(hospital, back, slow):
    """The second time others still train, so the round is open anyway."""
    struck, healthy = hospital("struck", rounds=1), hospital("healthy", rounds=1)
    struck.run(grid=_away(struck, back=back, slow=slow))
    healthy.run()
    assert struck.reasons() == []
    assert struck.digest() == healthy.digest()


def test_a_site_that_does_not_come_back_holds_nobody_up(hospital):
    run = hospital(rounds=1)
    grid = _away(run, back=1e9)
    run.run(grid=grid)
    assert run.reasons() == [(0, "b", "lost")]
    assert grid.time.clock() < 30 < run.config.federation.deadline_s


def test_a_duplicated_order_is_trained_once(hospital):
    twice, healthy = hospital("twice"), hospital("healthy")
    twice.run(lambda _name, _group: Fault(twice=True))
    healthy.run()
    assert twice.digest() == healthy.digest()
    assert [trainer.steps_taken for trainer in twice.bench.trainers] == [12, 12, 12]


def test_a_patients_name_in_an_exception_does_not_reach_the_server(hospital, caplog):
    def fail(site, step):
        if site == "b" and step == 4:
            raise FileNotFoundError(private)

    private = "/pacs/MUELLER^HANS/1.2.840.113619"
    struck = hospital()
    struck.bench.fail = fail
    seen = []
    grid = struck.grid()
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: [seen.append(m) or m for m in pull(ids)]
    struck.run(grid=grid)
    assert struck.reasons() == [(1, "b", "site-error")]
    errors = [message.error.reason for message in seen if message.has_error()]
    assert errors == ["FileNotFoundError"]
    written = (struck.folder / "run" / "metrics.jsonl").read_text() + caplog.text
    assert private not in written


def test_a_half_trained_site_starts_again_from_its_disk(hospital):
    def fail(site, step):
        if site == "b" and step == 4 and fail.armed:
            fail.armed = False
            raise KeyError("broken")

    fail.armed = True
    struck = hospital(rounds=4)
    struck.bench.fail = fail
    struck.run()
    b_rows = [row for row in struck.rows("site") if row["site"] == "b"]
    assert [row["round"] for row in b_rows] == [0, 2, 3]
    assert [row["metrics"]["optimiser_reset"] for row in b_rows] == [0.0, 0.0, 0.0]

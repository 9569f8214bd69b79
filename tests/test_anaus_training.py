"""An ultrasound site's rounds: reproducible, resumable, and what stays at the site."""

import pytest

from agssd_core.errors import CollapseError, TrainingError
from agssd_core.training.checkpoint import StateStamp
from tests.support.training import bits
from tests.support.us import MemoryFrames, us_trainer

STAMP = StateStamp("run", 0, "plan")
TIMES = ("seconds", "frames_per_s")
NORMS = pytest.mark.parametrize("norm", ["batch", "group"])


def steady(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMES}


def with_norm(norm, **changes):
    return {"anaus": {"backbone": {"norm": norm}, **changes.pop("anaus", {})}, **changes}


@NORMS
@pytest.mark.parametrize("rule", ["average", "local"])
def test_resume_is_bit_exact(tmp_path, norm, rule):
    """Two rounds with a new process between them equal two rounds in one process."""
    changes = with_norm(norm, federation={"merge": {"teacher": rule}})
    frames = MemoryFrames()
    whole = us_trainer(frames, **changes)
    whole.train_steps(0, 3, 8)
    straight = whole.train_steps(3, 3, 8)

    first = us_trainer(frames, **changes)
    first.train_steps(0, 3, 8)
    first.save_state(tmp_path, STAMP)
    weights = first.shared_weights()
    if rule == "local":
        weights = {name: array for name, array in weights.items() if not name.startswith("teacher")}
    second = us_trainer(frames, **changes)
    second.load(weights)
    assert second.load_state(tmp_path, STAMP)
    resumed = second.train_steps(3, 3, 8)

    assert steady(resumed) == steady(straight)
    assert bits(second.shared_weights()) == bits(whole.shared_weights())
    kept = {n: b.numpy().tobytes() for n, b in second.learner.pair.norm_buffers().items()}
    assert kept == {n: b.numpy().tobytes() for n, b in whole.learner.pair.norm_buffers().items()}
    assert bool(kept) == (norm == "batch")


@NORMS
def test_one_call_equals_several(norm):
    plain, rounds = us_trainer(**with_norm(norm)), us_trainer(**with_norm(norm))
    plain.train_steps(0, 4, 4)
    for first in (0, 2):
        rounds.load(rounds.shared_weights())
        rounds.train_steps(first, 2, 4)
    assert bits(plain.shared_weights()) == bits(rounds.shared_weights())


def test_sites_and_seeds_train_differently_and_loader_threads_do_not_matter():
    def end(**changes):
        site = changes.pop("site", "a")
        trainer = us_trainer(site=site, **changes)
        trainer.train_steps(0, 2, 4)
        return bits(trainer.shared_weights())

    base = end()
    assert base == end()
    assert base == end(training={"loader_workers": 2})
    assert base != end(site="b")
    assert base != end(seed=1)


def test_a_lost_optimiser_warms_up_again(tmp_path):
    first = us_trainer()
    first.train_steps(0, 2, 8)
    first.save_state(tmp_path, STAMP)
    second = us_trainer(training={"optimiser": {"rewarm_steps": 4}})
    second.load(first.shared_weights())
    assert not second.load_state(tmp_path, StateStamp("other", 0, "plan"))
    lost = second.train_steps(2, 2, 8)
    kept = first.train_steps(2, 2, 8)
    assert lost["optimiser_reset"] == 1
    assert lost["learning_rate"] == pytest.approx(kept["learning_rate"] / 2)
    assert second.train_steps(4, 1, 8)["optimiser_reset"] == 0


def test_a_state_of_another_model_is_refused(tmp_path):
    trainer = us_trainer()
    trainer.train_steps(0, 1, 8)
    trainer.save_state(tmp_path, STAMP)
    wider = us_trainer(anaus={"head": {"hidden_predictor": 48}})
    with pytest.raises(TrainingError, match="another shape"):
        wider.load_state(tmp_path, STAMP)


def test_the_learning_rate_follows_byols_rule_over_all_sites():
    rates = [
        us_trainer(sites=sites, anaus={"optimiser": {"learning_rate": None, "warmup": 0}})
        .train_steps(0, 1, 8)["learning_rate"]
        for sites in (1, 3)
    ]  # fmt: skip
    assert rates == [pytest.approx(0.3 * 4 / 256), pytest.approx(0.3 * 12 / 256)]


def test_fedprox_pulls_towards_the_start_of_the_round():
    def distance(mu):
        merge = {"student": "fedprox", "prox_mu": mu}
        rate = {"optimiser": {"learning_rate": 0.1, "warmup": 0}}
        trainer = us_trainer(anaus=rate, federation={"merge": merge})
        start = trainer.shared_weights()
        trainer.load(start)
        trainer.train_steps(0, 6, 6)
        end = trainer.shared_weights()
        return sum(
            float(((end[n] - start[n]) ** 2).sum()) for n in start if n.startswith("student/")
        )

    assert distance(2.0) < 0.9 * distance(0.0)


def test_metrics_name_what_the_report_shows():
    found = us_trainer().train_steps(0, 4, 4)
    assert found["loss"] == pytest.approx(found["loss_align"] + found["loss_context"], rel=1e-5)
    assert found["same_anatomy_cosine"] - found["other_anatomy_cosine"] == pytest.approx(
        found["anatomy_gap"]
    )
    assert 1 <= found["anatomies_per_view"] <= 4
    assert found["monitor_frames"] == 16
    assert found["collapsed"] in (0, 1)


@pytest.mark.parametrize("stop", [False, True])
def test_a_gate_that_fails_is_a_metric_or_ends_the_round(stop):
    """No untrained model tells anatomies apart by a cosine of 1.5."""
    trainer = us_trainer(monitor={"stop_on_collapse": stop, "window": 16, "gate_gap": 1.5})
    if stop:
        with pytest.raises(CollapseError, match=r"anatomy_gap\). Keep anaus.loss.align on"):
            trainer.train_steps(0, 4, 8)
    else:
        assert trainer.train_steps(0, 4, 8)["collapsed"] == 1


def test_fewer_frames_than_a_batch_train():
    found = us_trainer(MemoryFrames(count=1)).train_steps(0, 1, 4)
    assert found["loss"] > 0

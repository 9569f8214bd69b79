"""Short trainings: what must be learnt, what must stay apart, and which settings must collapse."""

import math

import pytest

from agssd_core.errors import TrainingError
from tests.support.training import body_volumes, merged, small_trainer

LONG = {"training": {"batch_size": 8}, "monitor": {"window": 128}}
NO_CENTRE = {
    "agssd": {
        "head": {"input_norm_cls": "none", "input_norm_patch": "none"},
        "target": {"cls": "none", "patch": "none"},
    },
    "training": {"optimiser": {"learning_rate": 4e-3}},
}
BLUNT_TEACHER = {
    "agssd": {"target": {"teacher_temperature": 0.2, "teacher_temperature_end": 0.2}},
    "training": {"optimiser": {"learning_rate": 4e-3}},
}


def trained(steps, changes, *, volumes=None, parts=1):
    trainer = small_trainer(volumes or body_volumes(8), **merged(LONG, changes))
    each = steps // parts
    rows = [trainer.train_steps(part * each, each, steps) for part in range(parts)]
    return trainer, rows


def test_eight_volumes_can_be_learnt_by_heart():
    """T1: masked L1 falls to 0.7 of the best constant's, and everything stays finite."""
    changes = {
        "agssd": {
            "model": {"width": 48, "heads": 4},
            "cvac": {"n_local": 0, "flip": "none", "scale": [0.95, 1.05]},
        },
        "training": {"optimiser": {"learning_rate": 0.01}},
    }
    _, rows = trained(200, changes, volumes=body_volumes(8, shape=(26, 26, 26)), parts=10)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["rec_ratio"] <= 0.7
    assert rows[0]["rec_ratio"] > 1.2


def test_targets_tell_samples_apart_after_warm_up():
    """T2 and T6: the gates hold, both drifts are logged."""
    trainer, (row,) = trained(80, {})
    assert trainer.monitor.ready
    assert trainer.monitor.collapsed() == ()
    half = 0.5 * math.log(trainer.config.agssd.head.prototypes)
    for head in ("cls", "patch"):
        assert row[f"entropy_{head}_marginal"] > half
        assert row[f"information_{head}"] > 0.1
    assert row["effective_rank_share"] >= 0.5
    assert row["cls_std"] > 0
    assert 0 < row["drift"] < 1
    assert 0 < row["drift_fused"] < 1


@pytest.mark.parametrize("control", [NO_CENTRE, BLUNT_TEACHER], ids=["no centring", "T_t > T_s"])
def test_negative_controls_make_the_monitor_fire(control):
    """T3: without centring targets become constant; with a blunt teacher uniform."""
    trainer, (row,) = trained(60, control)
    assert "information_cls" in trainer.monitor.collapsed()
    assert row["collapsed"] == 1
    uniform = math.log(trainer.config.agssd.head.prototypes)
    if control is NO_CENTRE:
        assert row["entropy_patch_marginal"] < 0.5 * uniform
        # The collapsed run has the lowest loss: a falling loss is no evidence.
        assert row["loss_patch"] < 1.0
    else:
        assert row["entropy_cls"] > 0.95 * uniform


def test_a_run_stops_on_collapse_where_asked_to():
    stopping = merged(NO_CENTRE, {"monitor": {"stop_on_collapse": True}})
    with pytest.raises(TrainingError, match=r"Keep target\.teacher_temperature"):
        trained(60, stopping)


def test_edges_are_hidden_more_often_than_at_random():
    """T5, on the fourth of the tokens with the strongest edges."""
    always = {"agssd": {"eaam": {"schedule": "const"}}}
    _, (edgy,) = trained(10, always)
    _, (random,) = trained(10, {"agssd": {"eaam": {"enabled": False}}})
    assert edgy["edge_share"] >= 1.3 * random["edge_share"]
    assert random["edge_share"] == pytest.approx(random["mask_ratio"], abs=0.06)


def test_metrics_carry_the_agreed_names():
    _, (row,) = trained(2, {})
    agreed = {
        "loss", "loss_patch", "loss_cls", "loss_rec", "loss_patch_fused", "rec_ratio",
        "information_cls", "information_patch", "entropy_cls", "entropy_patch", "effective_rank",
        "cls_std", "drift", "drift_fused", "inner_mean", "overlap", "mask_ratio", "edge_share",
        "grad_norm", "learning_rate", "ema_momentum", "teacher_temperature", "beta", "seconds",
        "volumes_per_s", "optimiser_reset",
    }  # fmt: skip
    assert agreed <= set(row)
    assert all(isinstance(value, float) and math.isfinite(value) for value in row.values())

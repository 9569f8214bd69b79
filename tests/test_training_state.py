"""What a site keeps between rounds: resume is exact, damage is noticed, loss is said."""

import json

import pytest

from agssd_core.errors import CheckpointError, TrainingError
from agssd_core.training.checkpoint import StateStamp, read_site_state
from tests.support.training import bits, body_volumes, small_trainer

STAMP = StateStamp("run", 0, "plan")
TIMES = ("seconds", "volumes_per_s")


def steady(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMES}


@pytest.fixture(scope="module")
def volumes():
    return body_volumes(5)


@pytest.mark.parametrize("rule", ["average", "local"])
def test_resume_is_bit_exact(tmp_path, volumes, rule):
    """T4: two rounds with a new process between them equal two rounds in one process."""
    changes = {"federation": {"merge": {"teacher": rule}}, "agssd": {"model": {"drop_path": 0.2}}}
    whole = small_trainer(volumes, **changes)
    whole.train_steps(0, 3, 8)
    straight = whole.train_steps(3, 3, 8)

    first = small_trainer(volumes, **changes)
    first.train_steps(0, 3, 8)
    first.save_state(tmp_path, STAMP)
    weights = first.shared_weights()
    if rule == "local":
        weights = {name: array for name, array in weights.items() if not name.startswith("teacher")}
    second = small_trainer(volumes, **changes)
    second.load(weights)
    assert second.load_state(tmp_path, STAMP)
    resumed = second.train_steps(3, 3, 8)

    assert steady(resumed) == steady(straight)
    assert resumed["optimiser_reset"] == 0
    assert bits(second.shared_weights()) == bits(whole.shared_weights())


def test_one_call_equals_several(volumes):
    """Rounds only cut the steps; a plain run is one round."""
    plain, rounds = small_trainer(volumes), small_trainer(volumes)
    plain.train_steps(0, 4, 4)
    for first in (0, 2):
        rounds.load(rounds.shared_weights())
        rounds.train_steps(first, 2, 4)
    assert bits(plain.shared_weights()) == bits(rounds.shared_weights())


def test_sites_and_seeds_train_differently_and_loader_threads_do_not_matter(volumes):
    def end(**changes):
        site = changes.pop("site", "a")
        trainer = small_trainer(volumes, site=site, **changes)
        trainer.train_steps(0, 2, 4)
        return bits(trainer.shared_weights())

    base = end()
    assert base == end()
    assert base == end(training={"loader_workers": 2})
    assert base != end(site="b")
    assert base != end(seed=1)


@pytest.mark.parametrize("stamp", [
    StateStamp("other", 0, "plan"), StateStamp("run", 1, "plan"), StateStamp("run", 0, "other"),
])  # fmt: skip
def test_another_stamp_resets_the_optimiser_and_warms_up_again(tmp_path, volumes, stamp):
    first = small_trainer(volumes)
    first.train_steps(0, 2, 8)
    first.save_state(tmp_path, STAMP)
    second = small_trainer(volumes, training={"optimiser": {"rewarm_steps": 4}})
    second.load(first.shared_weights())
    assert not second.load_state(tmp_path, stamp)
    lost = second.train_steps(2, 2, 8)
    kept = first.train_steps(2, 2, 8)
    assert lost["optimiser_reset"] == 1
    assert lost["learning_rate"] == pytest.approx(kept["learning_rate"] / 2)
    assert second.train_steps(4, 1, 8)["optimiser_reset"] == 0


def test_nothing_saved_yet_is_no_reset_at_the_first_step(tmp_path, volumes):
    trainer = small_trainer(volumes)
    assert not trainer.load_state(tmp_path, STAMP)
    assert trainer.train_steps(0, 1, 8)["optimiser_reset"] == 0


@pytest.mark.parametrize("place", ["arrays", "manifest", "number", "missing", "truncated"])
def test_damage_is_noticed_and_treated_as_lost(tmp_path, volumes, place):
    trainer = small_trainer(volumes)
    trainer.train_steps(0, 1, 8)
    trainer.save_state(tmp_path, STAMP)
    assert read_site_state(tmp_path, STAMP) is not None
    (arrays,) = tmp_path.glob("state-*.safetensors")
    manifest = tmp_path / "manifest.json"
    if place == "arrays":
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 1
        arrays.write_bytes(content)
    elif place == "manifest":
        manifest.write_text("{")
    elif place == "number":
        content = json.loads(manifest.read_text())
        content["numbers"]["born"] = 7
        manifest.write_text(json.dumps(content))
    elif place == "missing":
        arrays.unlink()
    else:
        arrays.write_bytes(arrays.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="start with a fresh optimiser"):
        read_site_state(tmp_path, STAMP)
    assert not trainer.load_state(tmp_path, STAMP)
    assert trainer.train_steps(1, 1, 8)["optimiser_reset"] == 1


def test_a_new_state_replaces_the_old_and_a_failed_one_does_not(tmp_path, volumes, monkeypatch):
    trainer = small_trainer(volumes)
    trainer.train_steps(0, 1, 8)
    trainer.save_state(tmp_path, STAMP)
    later, before = StateStamp("run", 1, "plan"), sorted(tmp_path.iterdir())
    trainer.train_steps(1, 1, 8)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("agssd_core.training.checkpoint.write_text", full)
        with pytest.raises(CheckpointError, match="Free disk space"):
            trainer.save_state(tmp_path, later)
    assert sorted(tmp_path.iterdir()) == before
    assert read_site_state(tmp_path, STAMP) is not None
    trainer.save_state(tmp_path, later)
    assert read_site_state(tmp_path, STAMP) is None
    assert read_site_state(tmp_path, later) is not None
    assert len(list(tmp_path.iterdir())) == 2


def test_a_state_of_another_model_is_refused(tmp_path, volumes):
    trainer = small_trainer(volumes)
    trainer.train_steps(0, 2, 8)
    trainer.save_state(tmp_path, STAMP)
    wider = small_trainer(volumes, agssd={"head": {"hidden": 48}})
    with pytest.raises(TrainingError, match="another shape"):
        wider.load_state(tmp_path, STAMP)

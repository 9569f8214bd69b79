"""Runs that start from a checkpoint (``init.checkpoint``): what is taken, and what is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from agssd_core.config import config_from_json, dump_config, parse_config
from agssd_core.errors import CheckpointError, ConfigError
from agssd_core.weights import load_weights, save_weights, weights_digest
from server.start import with_start
from server.store import WEIGHTS, RunStore
from simulation.run import initialise


def config(tmp_path, name="run", *, cohorts=("us",), **more):
    return parse_config(
        {
            "preset": "tiny",
            "cohorts": list(cohorts),
            "name": name,
            "output": str(tmp_path),
            "federation": {"rounds": 2, "steps_per_round": 1},
            **more,
        }
    )


@pytest.fixture
def made(tmp_path):
    """Folder of a run of cohort us, and its weights of round 0."""
    folder, _ = initialise(config(tmp_path, "made", seed=5))
    return folder, RunStore(folder).load(0).weights


def begun(tmp_path, path, **more):
    folder, _ = initialise(config(tmp_path, init={"checkpoint": str(path)}, **more))
    return RunStore(folder).load(0)


@pytest.mark.parametrize(
    "part", ["", "checkpoints/round-0000", f"checkpoints/round-0000/{WEIGHTS}"]
)
def test_a_run_starts_from_a_run_a_checkpoint_or_its_file_and_says_so(tmp_path, made, part):
    folder, weights = made
    start = begun(tmp_path, folder / part)
    assert weights_digest(start.weights) == weights_digest(weights)
    saved = json.loads(start.manifest.config)
    assert saved["init"] == {"digest": weights_digest(weights)}
    assert str(folder) not in start.manifest.config


def test_a_run_goes_on_with_no_other_start(tmp_path, made):
    folder, weights = made
    begun(tmp_path, folder)
    other, _ = initialise(config(tmp_path, "other", seed=6))
    for init in ({"checkpoint": str(other)}, {}):
        with pytest.raises(CheckpointError, match=r"1 key\(s\) differ: init\.digest"):
            initialise(config(tmp_path, init=init))
    # The file may be gone by then; the digest says what it was.
    gone = config(
        tmp_path, init={"checkpoint": str(tmp_path / "gone"), "digest": weights_digest(weights)}
    )
    assert initialise(gone)[1] is False


def test_the_digest_must_be_the_checkpoints(tmp_path, made):
    init = {"checkpoint": str(made[0]), "digest": "0" * 64}
    with pytest.raises(CheckpointError, match=r"Name the checkpoint that the digest is of"):
        initialise(config(tmp_path, init=init))
    with pytest.raises(CheckpointError, match=r"init\.checkpoint does not say where it lies"):
        initialise(config(tmp_path, init={"digest": "0" * 64}))


def test_what_does_not_fit_is_named(tmp_path, made):
    more = {"anaus": {"head": {"projection": 32}}}
    with pytest.raises(CheckpointError, match=r"student/\S+ is float32\(.*64.*the model's.*32"):
        begun(tmp_path, made[0], **more)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path, made):
    _folder, weights = made
    encoder = tmp_path / "encoder.safetensors"
    save_weights(encoder, {"conv1.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(CheckpointError, match="an exported encoder lacks the heads"):
        begun(tmp_path, encoder)
    unpickled = tmp_path / "weights.pt"
    unpickled.write_bytes(pickle.dumps({"student/x": 1}))
    with pytest.raises(CheckpointError, match="not safetensors"):
        begun(tmp_path, unpickled)
    with pytest.raises(CheckpointError, match="holds no weights of cohort us"):
        begun(tmp_path, tmp_path / "nowhere")
    broken = {name: np.full_like(array, np.nan) for name, array in weights.items()}
    save_weights(tmp_path / "nan.safetensors", broken)
    with pytest.raises(CheckpointError, match="not finite"):
        begun(tmp_path, tmp_path / "nan.safetensors")


def test_a_changed_checkpoint_is_refused(tmp_path, made):
    place: Path = made[0] / "checkpoints" / "round-0000"
    weights = load_weights(place / WEIGHTS)
    name = next(iter(weights))
    save_weights(place / WEIGHTS, weights | {name: weights[name] + 1})
    with pytest.raises(CheckpointError, match="damaged"):
        begun(tmp_path, place)


def test_each_cohort_has_a_start_of_its_own(tmp_path, made):
    folder, weights = made
    both = ("ct-mr", "us")
    with pytest.raises(ConfigError, match=r"init\.checkpoint is one for 2 cohorts"):
        config(tmp_path, cohorts=both, init={"checkpoint": str(folder)})
    with pytest.raises(ConfigError, match=r"names cohort us, which the run does not train"):
        config(tmp_path, cohorts=("ct-mr",), init={"checkpoint": {"us": str(folder)}})
    with pytest.raises(CheckpointError, match=r"is of cohort us, and cohort ct-mr"):
        initialise(config(tmp_path, "wrong", cohorts=("ct-mr",), init={"checkpoint": str(folder)}))
    given = with_start(
        config(tmp_path, "both", cohorts=both, init={"checkpoint": {"us": str(folder)}})
    )
    run, _ = initialise(given)
    assert weights_digest(RunStore(run / "us").load(0).weights) == weights_digest(weights)
    sent = config_from_json(dump_config(given))
    assert sent.for_cohort("us").init.digest == weights_digest(weights)
    assert sent.for_cohort("ct-mr").init.digest == ""

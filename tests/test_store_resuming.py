"""Which configuration may resume a run, and its metrics afterwards."""

import pytest

from agssd_core.config import dump_config, parse_config
from agssd_core.errors import CheckpointError
from server.store import RunStore
from tests.support.checkpoints import (
    CONFIG,
    store_in,
)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "threads=2",
        "federation.rounds=21",
        "federation.merge.max_weight=0.5",
        "agssd.cvac.n_local=3",
        "training.batch_size=4",
        "preset=base",
    ],
)
def test_a_config_that_changes_the_result_cannot_resume(override, tmp_path):
    store = store_in(tmp_path)
    other = dump_config(parse_config({}, [override]))
    with pytest.raises(CheckpointError, match=override.split("=")[0].replace(".", r"\.")) as caught:
        store.resume(other)
    assert "Resume with the run's own configuration" in str(caught.value)
    assert store.rounds() == [0, 1]


@pytest.mark.parametrize(
    "override",
    ["name=other", "tracking.mlflow=true", "federation.deadline_s=5", "federation.keep=3"],
)
def test_a_config_that_changes_no_bit_may_resume(override, tmp_path):
    store = store_in(tmp_path)
    assert store.resume(dump_config(parse_config({}, [override]))).round == 1


def _rows(log, rounds):
    for index in rounds:
        for site in ("a", "b"):
            log.append({"round": index, "kind": "site", "site": site, "metrics": {"loss": 0.5}})


@pytest.mark.parametrize(
    "torn", [b"", b'{"round": 2, "ki', b'{"round": 0, "kind": "merge"}', b"\x00\xff\n", b"7\n"]
)
def test_a_resumed_runs_metrics_equal_an_uninterrupted_ones(torn, tmp_path):
    straight = RunStore(tmp_path / "straight")
    _rows(straight.metrics, range(4))
    store = store_in(tmp_path / "resumed", rounds=3)
    _rows(store.metrics, range(3))  # round 2 was written, its checkpoint was not
    with store.metrics.path.open("ab") as stream:
        stream.write(torn)
    assert len(store.metrics.rows()) >= 6
    checkpoint = store.resume(CONFIG)
    _rows(store.metrics, range(checkpoint.round, 4))
    kept = store.metrics.path.read_bytes()
    if torn.endswith(b"}"):
        assert kept.replace(torn + b"\n", b"") == straight.metrics.path.read_bytes()
    else:
        assert kept == straight.metrics.path.read_bytes()


def test_recovering_a_sound_file_leaves_it_alone(tmp_path):
    log = RunStore(tmp_path).metrics
    assert log.recover(0) == 0
    assert log.rows() == []
    _rows(log, range(2))
    before = log.path.stat().st_mtime_ns
    assert log.recover(2) == 0
    assert log.path.stat().st_mtime_ns == before
    assert log.recover(1) == 2


def test_a_metric_that_is_not_finite_is_refused(tmp_path):
    log = RunStore(tmp_path).metrics
    with pytest.raises(CheckpointError, match="could not be written"):
        log.append({"round": 0, "metrics": {"loss": float("nan")}})
    assert log.rows() == []

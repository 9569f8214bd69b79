"""The same apps on Flower's Ray simulation end with the digest of the in-process run."""

import psutil
import pytest

from server.store import RunStore
from simulation.engines import federate
from tests.support.federated import federated_config, started_run, two_sites

pytestmark = pytest.mark.federation


def _run(folder, sites, engine):
    config = federated_config(
        folder, simulation={"engine": engine, "workers": 2}, federation={"rounds": 2}
    )
    started_run(config, folder)
    told = []
    federate(config, sites, folder, on_round=told.append)
    for site in sites.values():
        (site / "federation" / "run-1").rename(site / "federation" / engine)
    return told


def test_ray_and_in_process_end_with_the_same_digest(tmp_path):
    sites = two_sites(tmp_path / "sites")
    before = set(psutil.Process().children(recursive=True))
    inside = _run(tmp_path / "inside", sites, "in-process")
    on_ray = _run(tmp_path / "ray", sites, "ray")
    left = set(psutil.Process().children(recursive=True)) - before
    ours = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    digests = {
        RunStore(tmp_path / name).load(2).manifest.weights_digest for name in ("inside", "ray")
    }
    assert len(digests) == 1
    assert digests.isdisjoint({RunStore(tmp_path / "ray").load(0).manifest.weights_digest})
    assert [(o.merged, o.sites) for o in inside] == [(True, ("north", "south"))] * 2
    assert [(o.round, o.merged, o.sites) for o in on_ray] == [
        (o.round, o.merged, o.sites) for o in inside
    ]
    assert not left
    assert not ours

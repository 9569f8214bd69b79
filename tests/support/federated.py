"""Two prepared phantom sites, a small AG-SSD configuration and its round-0 checkpoint."""

from agssd_core.config import dump_config, parse_config
from agssd_core.training.build import build_model
from server.manifest import RoundRecord
from server.store import RunStore
from tests.support.sites import FAST, make_site
from tests.support.training import SMALL, merged


def federated_config(folder, **changes):
    """Small enough for a step in a tenth of a second."""
    base = {
        "name": "run",
        "output": str(folder),
        "data": FAST.model_dump(),
        "federation": {"rounds": 2, "steps_per_round": 2, "expected_sites": 2, "poll_s": 0.2},
    }
    return parse_config(merged(merged(SMALL, base), changes))


def two_sites(folder):
    """Site name -> prepared folder: one CT, one MR."""
    return small_sites(folder, north="CT", south="MR")


def small_sites(folder, **modalities):
    """Site name -> prepared folder of three patients."""
    return {
        name: make_site(folder / name, modality, seed=number)
        for number, (name, modality) in enumerate(modalities.items())
    }


def started_run(config, folder, run="run-1"):
    """A run's folder with its round-0 checkpoint."""
    store = RunStore(folder)
    model = build_model(config.agssd, seed=config.seed)
    record = RoundRecord(run, 0, config.federation.cohort, dump_config(config))
    store.save_round(record, model.shared_weights())
    return store

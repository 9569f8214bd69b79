"""Train one model of a comparison by the client and server that hospitals run."""

from dataclasses import dataclass
from typing import Any

from agssd_core.config import RunConfig
from agssd_core.errors import RoundError
from agssd_core.evaluation.export_file import Network
from agssd_core.weights import Weights
from server.cohorts import cohort_stores
from simulation.compare.data import SeedData
from simulation.compare.plan import Model, model_config, stamp_of
from simulation.engines import federate
from simulation.run import initialise

_SPENT = ("privacy_epsilon", "privacy_sigma", "privacy_rate")
_SHOWN = (
    "collapsed",
    "rec_ratio",
    "information_cls",
    "information_patch",
    "anatomy_gap",
    "effective_rank_share",
)


@dataclass(frozen=True)
class Trained:
    """A model as it is judged.

    Attributes:
        config: it was trained with.
        facts: weights digest, optimiser updates, which network is judged, and by site the
            collapse monitor's last words and what privacy cost.
    """

    weights: Weights
    config: RunConfig
    facts: dict[str, Any]


def judged_network(config: RunConfig) -> Network:
    """The teacher, or the student where teachers stay at the sites and are never merged."""
    return "student" if config.federation.merge.teacher_rule == "local" else "teacher"


def config_of(settings: RunConfig, model: Model, data: SeedData) -> RunConfig:
    """A model's run; its folder's name holds a stamp, so that changed settings begin afresh."""
    config = model_config(settings, model, list(data.sites))
    name = f"{model.name}-{stamp_of(config, data.digest)[:8]}"
    return config.model_copy(update={"name": name, "output": str(data.folder / "runs")})


def pretrain(settings: RunConfig, model: Model, data: SeedData) -> Trained:
    """Train a model, or go on where a killed run stopped, or take what is finished.

    Raises:
        RoundError: a round missed its quorum, so the budget was not spent.
    """
    config = config_of(settings, model, data)
    folder, _ = initialise(config)
    rounds = 0 if model.arm in ("random", "start") else config.federation.rounds
    store = cohort_stores(folder, config)[config.federation.cohort]
    newest = store.latest(strict=True)
    if rounds and (newest is None or newest.round < rounds):
        federate(config, _sites(model, data), folder)
        newest = store.latest(strict=True)
    if newest is None or newest.round != rounds:
        raise RoundError("a model of the comparison has no checkpoint. Remove its folder, go on.")
    rows = [row for row in store.metrics.rows() if row.get("kind") == "site"]
    closed = {int(row["round"]) for row in rows}
    if len(closed) < rounds:
        raise RoundError(
            f"{rounds - len(closed)} of {rounds} round(s) of a model missed their quorum, so it "
            "had less than the budget. Its folder's metrics.jsonl says why."
        )
    facts: dict[str, Any] = {
        "weights": newest.manifest.weights_digest,
        "updates": rounds * config.federation.steps_per_round,
        "network": judged_network(config),
    }
    last = [row for row in rows if int(row["round"]) == rounds - 1]
    for fact, keys in (("monitor", _SHOWN), ("privacy", _SPENT)):
        told = {
            row["site"]: {key: row["metrics"][key] for key in keys if key in row["metrics"]}
            for row in last
        }
        facts[fact] = {site: own for site, own in told.items() if own}
    return Trained(newest.weights, config, facts)


def _sites(model: Model, data: SeedData) -> dict[str, Any]:
    if model.arm == "pooled":
        return {"pooled": data.pooled}
    if model.arm == "alone":
        return {model.site: data.sites[model.site]}
    return dict(data.sites)

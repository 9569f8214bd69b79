"""Pictures of the site's own scans for its own page; none of them is ever sent."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from agssd_core.config import config_from_json
from agssd_core.errors import AgssdError
from agssd_core.evaluation.site_pictures import ShownScan, drawer, next_step, shown_scan
from agssd_core.weights import Weights, group
from client.connection import load_connection, server_key
from client.delivered import held
from client.memory import RunMemory

log = logging.getLogger(__name__)

SCANS = 2


@dataclass(frozen=True)
class OwnPictures:
    """What is shown of one run.

    Attributes:
        networks: whose student and teacher are shown, in words.
        problem: why there are no pictures.
    """

    networks: str
    scans: tuple[ShownScan, ...]
    problem: str = ""


@dataclass(frozen=True)
class _Networks:
    round: int
    words: str
    weights: Weights


def own_pictures(site: Path, run: Path) -> OwnPictures:
    """Draw up to two of the site's scans with the networks of a run.

    The final checkpoint's networks where it was delivered, otherwise those that the site's own
    newest round ended with. What cannot be drawn is said on the page, which is written anyhow.

    Args:
        site: the site's folder, prepared.
        run: ``SITE/federation/RUN``.
    """
    memory = RunMemory(run)
    try:
        config = config_from_json(memory.config() or "")
        torch.set_num_threads(config.threads)
        found = _delivered(site, run.name) or _own(memory)
        if found is None:
            return OwnPictures("", (), "the networks of this run are not kept here any more.")
        at = next_step(config, _name(site), found.round)
        drawn = drawer(found.weights, config)(site, at, SCANS)
    except AgssdError as error:
        log.warning("no pictures (%s)", type(error).__name__)
        return OwnPictures("", (), str(error))
    whole = bool(group(found.weights, "teacher"))
    words = (
        found.words if whole else f"{found.words}; no teacher is held, the student stands for it"
    )
    return OwnPictures(words, tuple(shown_scan(*one) for one in drawn))


def _delivered(site: Path, run: str) -> _Networks | None:
    for one in held(site):
        said = one.certificate
        if said.run == run:
            weights = one.read(server_key(load_connection(site)))
            final = "final" if said.round == said.rounds else "delivered"
            return _Networks(said.round, f"the {final} checkpoint, round {said.round}", weights)
    return None


def _own(memory: RunMemory) -> _Networks | None:
    last = memory.last()
    if last is None:
        return None
    words = f"this site's own after round {last.round}, before merging"
    return _Networks(last.round + 1, words, memory.local(last.round))


def _name(site: Path) -> str:
    """As in training; views are drawn from it."""
    try:
        return load_connection(site).site
    except AgssdError:
        return site.resolve().name

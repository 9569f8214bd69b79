"""What a site keeps between rounds: optimiser, local teacher, monitor window, step counter.

Arrays go into ``state-DIGEST.safetensors``, everything else into ``manifest.json``, which names
that file and its SHA-256. The manifest is replaced last and in one rename, so a process killed
at any moment leaves either the old state or the new one. A state that is missing, damaged or
stamped for another run, round or plan is *treated as lost*: training goes on with a fresh
optimiser, warms up again and says so in the metric ``optimiser_reset``.
"""

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agssd_core.errors import CheckpointError, WeightsError
from agssd_core.weights import Weights, load_weights, save_weights, weights_digest, write_text

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StateStamp:
    """What a state belongs to; all three must match for it to be used again.

    Attributes:
        run: our own run id, stable across resumes.
        round: the round after which the state was saved.
        plan_hash: digest of the configuration that the site trains with.
    """

    run: str
    round: int
    plan_hash: str


@dataclass(frozen=True)
class SiteState:
    """Arrays by name, and small numbers (steps taken, the step an optimiser was born at)."""

    arrays: Weights
    numbers: dict[str, int]


def save_site_state(folder: Path, state: SiteState, stamp: StateStamp) -> None:
    """Write a state; until the last rename the previous one stays valid.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    # safetensors has no 0-d arrays worth the trouble; numpy scalars become length-1 arrays.
    arrays = {name: np.atleast_1d(array) for name, array in state.arrays.items()}
    digest = weights_digest(arrays)
    name = f"state-{digest[:16]}.safetensors"
    manifest = {
        "format": FORMAT,
        "stamp": asdict(stamp),
        "file": name,
        "digest": digest,
        "numbers": state.numbers,
    }
    manifest["seal"] = _seal(manifest)
    known = (folder / name).exists()  # an unchanged state is the file of the previous one
    try:
        save_weights(folder / name, arrays)
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    except (OSError, WeightsError):
        if not known:
            with suppress(OSError):
                (folder / name).unlink()
        raise CheckpointError(
            "the site's training state could not be written. Free disk space or mend the folder's "
            "permissions; the previous state is untouched."
        ) from None
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            with suppress(OSError):
                old.unlink()


def read_site_state(folder: Path, stamp: StateStamp) -> SiteState | None:
    """Read a state back, or None when none was saved under this stamp.

    Raises:
        CheckpointError: a state is there but damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.pop("seal") != _seal(manifest):
            raise _damaged()
        if manifest["stamp"] != asdict(stamp) or manifest["format"] != FORMAT:
            return None
        numbers = {str(name): int(value) for name, value in manifest["numbers"].items()}
        file, digest = folder / Path(manifest["file"]).name, manifest["digest"]
        arrays = load_weights(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, WeightsError):
        raise _damaged() from None
    if weights_digest(arrays) != digest:
        raise _damaged()
    return SiteState(arrays, numbers)


def recover_site_state(folder: Path, stamp: StateStamp) -> SiteState | None:
    """As ``read_site_state``, but a damaged state counts as lost; the log says which it was."""
    try:
        state = read_site_state(folder, stamp)
    except CheckpointError as error:
        log.warning("%s", error)
        return None
    if state is None:
        log.warning("no training state for round %d; the optimiser starts afresh", stamp.round)
    return state


def _seal(manifest: dict[str, Any]) -> str:
    """Digest of the manifest itself, so that a flipped byte in a number is seen too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _damaged() -> CheckpointError:
    return CheckpointError(
        "the site's training state is damaged (its digest differs or it cannot be parsed). It is "
        "treated as lost: delete it, or let training start with a fresh optimiser."
    )

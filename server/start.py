"""The checkpoint that a run starts from in place of random weights (``init.checkpoint``)."""

from pathlib import Path

import numpy as np

from agssd_core.config import Cohort, InitConfig, RunConfig
from agssd_core.errors import AgssdError, CheckpointError
from agssd_core.weights import ArraySpec, Weights, load_weights, schema_of, weights_digest
from server.cohorts import run_folders
from server.manifest import RunManifest
from server.store import MANIFEST, WEIGHTS, RunStore

_GROUPS = ("student/", "teacher/")


def with_start(config: RunConfig) -> RunConfig:
    """The configuration with the digest of every checkpoint that it starts from.

    The digest decides the result and is part of what checkpoints record, so a run that is gone on
    with must name the same. A checkpoint that is gone may be left out once ``init.digest`` is
    given.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or not the one of ``init.digest``.
    """
    found: dict[Cohort, str] = {}
    for cohort in config.cohorts:
        own = config.init.of(cohort)
        digest = str(own.digest)
        if own.checkpoint and (Path(str(own.checkpoint)).expanduser().exists() or not digest):
            digest = weights_digest(_read(Path(str(own.checkpoint)), cohort))
            if own.digest not in ("", digest):
                raise CheckpointError(
                    f"init.checkpoint holds weights {digest[:12]}..., init.digest says "
                    f"{str(own.digest)[:12]}.... Name the checkpoint that the digest is of."
                )
        if digest:
            found[cohort] = digest
    if not found:
        return config
    several = len(config.cohorts) > 1
    update = {"digest": found if several else found[config.cohorts[0]]}
    return config.model_copy(update={"init": config.init.model_copy(update=update)})


def start_weights(init: InitConfig, cohort: Cohort, fresh: Weights) -> Weights:
    """What a cohort's round 0 holds: the checkpoint's arrays, or the given ones without one.

    Args:
        init: the cohort's own.
        cohort: whose weights.
        fresh: random weights of the model that is to be trained.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, another one than ``init.digest``, or
            does not fit the model; the text names what does not fit.
    """
    if not init.checkpoint and not init.digest:
        return fresh
    if not init.checkpoint:
        raise CheckpointError(
            "init.digest names the checkpoint that the run starts from, and init.checkpoint does "
            "not say where it lies. Give its path."
        )
    weights = _read(Path(str(init.checkpoint)), cohort)
    if init.digest not in ("", weights_digest(weights)):
        raise CheckpointError(
            "init.checkpoint is not the checkpoint of init.digest. Name the one that it is of."
        )
    _require_fit(weights, fresh)
    return weights


def _read(path: Path, cohort: Cohort) -> Weights:
    path = path.expanduser()
    try:
        if path.is_file():
            return load_weights(path)
        if (path / WEIGHTS).is_file():
            return _of_checkpoint(path, cohort)
    except CheckpointError:
        raise
    except AgssdError as error:
        raise CheckpointError(f"init.checkpoint: {error}") from None
    folders = run_folders(path)
    folder = folders.get(cohort, folders.get(""))
    newest = RunStore(folder).latest(strict=True) if folder is not None else None
    if newest is None:
        raise CheckpointError(
            f"init.checkpoint holds no weights of cohort {cohort}. Name a run's folder, one of its "
            f"checkpoints/round-NNNN, or that one's {WEIGHTS}."
        )
    _require_cohort(newest.manifest.cohort, cohort)
    return newest.weights


def _of_checkpoint(folder: Path, cohort: Cohort) -> Weights:
    """One checkpoint's folder; where its manifest came with it, it must be whole."""
    weights, file = load_weights(folder / WEIGHTS), folder / MANIFEST
    if not file.is_file():
        return weights
    try:
        manifest = RunManifest.from_json(file.read_text(encoding="utf-8"))
        whole = manifest.weights_digest == weights_digest(weights)
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise CheckpointError(
            "init.checkpoint is damaged: weights and manifest do not belong together. Copy the "
            "checkpoint again, with both files."
        )
    _require_cohort(manifest.cohort, cohort)
    return weights


def _require_cohort(found: str, wanted: Cohort) -> None:
    if found != wanted:
        raise CheckpointError(
            f"init.checkpoint is of cohort {found}, and cohort {wanted} is to start from it. Name "
            f"one of {wanted}."
        )


def _require_fit(weights: Weights, fresh: Weights) -> None:
    if not all(any(name.startswith(group) for name in weights) for group in _GROUPS):
        raise CheckpointError(
            "init.checkpoint holds no student and teacher; an exported encoder lacks the heads and "
            "bears other names. Name a run's folder or one of its checkpoints."
        )
    found, wanted = ({s.name: s for s in schema_of(each)} for each in (weights, fresh))
    faults = [f"{name} is missing" for name in sorted(wanted.keys() - found)]
    faults += [f"{name} is not the model's" for name in sorted(found.keys() - wanted)]
    faults += [
        f"{name} is {_form(found[name])}, the model's {_form(wanted[name])}"
        for name in sorted(found.keys() & wanted.keys())
        if found[name] != wanted[name]
    ]
    if faults:
        shown = "; ".join(faults[:5]) + ("; ..." if len(faults) > 5 else "")
        raise CheckpointError(
            f"init.checkpoint does not fit the model ({len(faults)} array(s): {shown}). Use the "
            "preset and model settings of the run that made it."
        )
    if not all(np.isfinite(array).all() for array in weights.values()):
        raise CheckpointError(
            "init.checkpoint holds numbers that are not finite. Name an earlier round."
        )


def _form(spec: ArraySpec) -> str:
    return f"{spec.dtype}{tuple(spec.shape)}"

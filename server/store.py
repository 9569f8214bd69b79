"""Checkpoints of a run: ``runs/NAME/checkpoints/round-NNNN/{weights, server_state, manifest}``.

Checkpoint r holds what round r starts from: round 0 the initial weights, round r + 1 what
round r merged. A checkpoint appears whole or not at all: its files are written and synced in a
temporary folder, which is renamed, and the parent folder is synced.
"""

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from agssd_core.errors import AgssdError, CheckpointError
from agssd_core.weights import (
    Array,
    Weights,
    file_digest,
    load_weights,
    save_weights,
    schema_digest,
    schema_of,
    sync_folder,
    weights_digest,
    write_text,
)
from server.manifest import (
    FORMAT,
    Checkpoint,
    RoundRecord,
    RunManifest,
    package_versions,
    require_same_config,
)
from server.metrics_log import MetricsLog

log = logging.getLogger(__name__)

WEIGHTS, STATE, MANIFEST = "weights.safetensors", "server_state.safetensors", "manifest.json"


class RunStore:
    """A run's folder. Reading needs no lock; writing does (``writing``)."""

    def __init__(self, folder: Path, *, keep: int = 0) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self._keep = keep
        self._locked = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run's lock; it goes with the process, even a killed one.

        Raises:
            CheckpointError: another server is writing this run, or the folder is not writable.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"the run's folder cannot be written ({type(error).__name__}). Free disk space or "
                "mend the folder's permissions."
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise CheckpointError(
                "another server is writing this run, and a run has one writer. Wait for it to "
                "end, or give this run another name."
            ) from None
        self._locked = True
        try:
            yield
        finally:
            self._locked = False
            os.close(descriptor)

    def save_round(
        self, record: RoundRecord, weights: Weights, *, state: Weights | None = None
    ) -> RunManifest:
        """Write a checkpoint, replacing one of the same round, and drop those not kept.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; no part of the
                checkpoint is left, and those before it are untouched.
        """
        if not self._locked:
            with self.writing():
                return self.save_round(record, weights, state=state)
        target = self.checkpoints / f"round-{record.round:04d}"
        temporary = self.checkpoints / f".{target.name}.tmp"
        try:
            self._sweep()
            temporary.mkdir(parents=True)
            manifest = _write(temporary, record, weights, state or {})
            if target.exists():
                _retire(target)
            temporary.replace(target)
            sync_folder(self.checkpoints)
        except (OSError, AgssdError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of round {record.round} could not be written "
                f"({type(error).__name__}). Free disk space or mend the folder's permissions, "
                "then resume; earlier checkpoints are untouched."
            ) from None
        self._prune()
        return manifest

    def rounds(self) -> list[int]:
        """Rounds that have a checkpoint, ascending; none of them verified yet."""
        found = (re.fullmatch(r"round-(\d+)", path.name) for path in self.checkpoints.glob("r*"))
        return sorted(int(match[1]) for match in found if match)

    def load(self, round_index: int, *, verify: bool = True) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            CheckpointError: it is missing, damaged or not ours.
        """
        folder = self.checkpoints / f"round-{round_index:04d}"
        if not folder.is_dir():
            raise CheckpointError(
                f"round {round_index} has no checkpoint; there are {len(self.rounds())}. Name "
                "another round, or start the run."
            )
        manifest = self._manifest(folder, round_index)
        if verify:
            self._verify(folder, manifest)
        try:
            weights, state = load_weights(folder / WEIGHTS), load_weights(folder / STATE)
        except AgssdError:
            raise _damaged(round_index, "an array file cannot be read") from None
        return Checkpoint(manifest, weights, state)

    def latest(self, *, strict: bool = False) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are passed over with a warning.

        Args:
            strict: refuse to pass over a damaged one.

        Returns:
            None when the run has no checkpoint at all.

        Raises:
            CheckpointError: every checkpoint is damaged, or with ``strict`` the newest.
        """
        damaged: list[int] = []
        for round_index in reversed(self.rounds()):
            try:
                found = self.load(round_index)
            except CheckpointError as error:
                log.warning("%s", error)
                damaged.append(round_index)
            else:
                if damaged and strict:
                    raise _passed_over(damaged, found.round)
                return replace(found, passed_over=tuple(damaged))
        if damaged:
            raise CheckpointError(
                f"all {len(damaged)} checkpoints of the run are damaged. Restore one from a "
                "backup, or start again under another name."
            )
        return None

    def resume(self, config: str) -> Checkpoint | None:
        """Load the newest checkpoint to go on from; metrics of later rounds are removed.

        Writing is atomic, so damage is none of a killed server's doing. Training those rounds
        again is left to a person, because sites no longer hold their optimisers of that time.

        Args:
            config: canonical JSON of the configuration in hand.

        Returns:
            None for a run that has not begun.

        Raises:
            CheckpointError: the newest checkpoint is damaged, or the configuration differs in a
                key that matters; nothing is removed then.
        """
        checkpoint = self.latest(strict=True)
        if checkpoint is None:
            return None
        require_same_config(checkpoint.manifest, config)
        self.metrics.recover(checkpoint.round)
        return checkpoint

    def reader(self, round_index: int) -> Callable[[str], Array]:
        """One array at a time of a round's weights, verified once; for late updates' bases."""
        folder = self.checkpoints / f"round-{round_index:04d}"
        self._verify(folder, self._manifest(folder, round_index))
        return lambda name: load_weights(folder / WEIGHTS, names=[name])[name]

    @staticmethod
    def _manifest(folder: Path, round_index: int) -> RunManifest:
        try:
            manifest = RunManifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError):
            raise _damaged(round_index, "its manifest is missing or was altered") from None
        if manifest.round != round_index:
            raise _damaged(round_index, f"its manifest is that of round {manifest.round}")
        if manifest.format != FORMAT:
            raise CheckpointError(
                f"the checkpoint of round {round_index} has format {manifest.format}, this "
                f"version reads {FORMAT}. Use the version that wrote it."
            )
        return manifest

    @staticmethod
    def _verify(folder: Path, manifest: RunManifest) -> None:
        for name in (WEIGHTS, STATE):
            try:
                found = file_digest(folder / name)
            except OSError:
                raise _damaged(manifest.round, f"{name} is missing") from None
            if found != manifest.files.get(name):
                raise _damaged(manifest.round, f"{name} has another digest")

    def _sweep(self) -> None:
        """Remove what a killed writer left; the lock says that nobody else is writing."""
        for left in [*self.checkpoints.glob(".round-*.tmp"), *self.checkpoints.glob(".*.old")]:
            shutil.rmtree(left)

    def _prune(self) -> None:
        surplus = self.rounds()[: -self._keep - 1] if self._keep else []
        try:
            for round_index in surplus:
                _retire(self.checkpoints / f"round-{round_index:04d}")
            for left in self.checkpoints.glob(".*.old"):
                shutil.rmtree(left)
        except OSError as error:
            # The new checkpoint stands; what is left over goes with the next one.
            log.warning("an old checkpoint could not be removed (%s)", type(error).__name__)


def _write(folder: Path, record: RoundRecord, weights: Weights, state: Weights) -> RunManifest:
    save_weights(folder / WEIGHTS, weights)
    save_weights(folder / STATE, state)
    manifest = RunManifest(
        **{item.name: getattr(record, item.name) for item in fields(RoundRecord)},
        files={name: file_digest(folder / name) for name in (WEIGHTS, STATE)},
        weights_digest=weights_digest(weights),
        schema_digest=schema_digest(schema_of(weights)),
        versions=package_versions(),
    ).sealed()
    write_text(folder / MANIFEST, manifest.to_json())
    return manifest


def _retire(folder: Path) -> None:
    """Take a checkpoint away by a rename: a half-deleted one never looks like a checkpoint."""
    retired = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    folder.replace(retired)


def _damaged(round_index: int, fact: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint of round {round_index} is damaged: {fact}. Restore it from a backup, or "
        "resume from an earlier round."
    )


def _passed_over(damaged: list[int], whole: int) -> CheckpointError:
    folders = ", ".join(f"round-{number:04d}" for number in sorted(damaged))
    return CheckpointError(
        f"the newest {len(damaged)} checkpoint(s) of the run are damaged, the last whole one is "
        f"that of round {whole}. Restore {folders} from a backup, or move it out of checkpoints/ "
        f"to go on from round {whole}."
    )

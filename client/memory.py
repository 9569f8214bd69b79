"""What a site keeps of a run between rounds, on its own disk.

``SITE/federation/RUN/round-0003/`` holds the training state after round 3, the arrays that stay
at the site, the reply as it travelled, and what its coding left over. The reply's header is
written last and makes the folder whole: a process killed before that leaves the folder of the
round before as the newest, and the round is trained again to the same bits.
"""

import errno
import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from agssd_core.differences import Payload, unpack_whole
from agssd_core.envelope import SealedUpdate, require_payload
from agssd_core.errors import AgssdError, CheckpointError, OrderRefusedError
from agssd_core.protocol import UpdateHeader
from agssd_core.weights import Weights, load_weights, save_weights, weights_digest, write_text

_REPLY, _REPLY_ARRAYS, _LOCAL = "reply.json", "reply.safetensors", "local.safetensors"
_RESIDUAL = "residual.safetensors"
_CONFIG = "config.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class LastRound:
    """The newest round that a site finished.

    Attributes:
        first_divergence: FedEMA's d_k of the first round after one taken part in; 0 is unknown.
        residual_digest: of what the reply's coding left over; empty when it left nothing.
    """

    round: int
    plan_hash: str
    base_digest: str
    first_divergence: float
    residual_digest: str = ""


@dataclass(frozen=True)
class RunMemory:
    """One run's folder at a site."""

    folder: Path

    @classmethod
    def of(cls, site_folder: Path, run: str) -> "RunMemory":
        """The folder of a run.

        Raises:
            OrderRefusedError: the run's id could not be a folder's name.
        """
        if not _RUN_NAME.fullmatch(run):
            message = "the order's run id holds other characters than letters, digits, - and _."
            raise OrderRefusedError(message, reason="protocol")
        return cls(site_folder / "federation" / run)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process trains this run here (an orphan of a killed node may).

        Raises:
            CheckpointError: the disk was full, at any point of what is done under the lock.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise _not_saved(error) from None

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Wait until no other run trains at this site: one at a time has the processors."""
        with (self.folder.parent / "training.lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def round_folder(self, number: int) -> Path:
        """Where a round is kept."""
        return self.folder / f"round-{number:04d}"

    def state_folder(self, number: int) -> Path:
        """Where the trainer's state after a round is kept."""
        return self.round_folder(number) / "state"

    def last(self) -> LastRound | None:
        """The newest whole round; a damaged one counts as lost."""
        for folder in sorted(self.folder.glob("round-*"), reverse=True):
            found = self._read(folder)
            if found is not None:
                return found[0]
        return None

    def reply(self, number: int, *, plan_hash: str, base_digest: str) -> SealedUpdate | None:
        """The saved reply to an order for this round, plan and base, unsigned, if it is whole."""
        folder = self.round_folder(number)
        found = self._read(folder)
        if found is None or (found[0].plan_hash, found[0].base_digest) != (plan_hash, base_digest):
            return None
        header = found[1]
        try:
            payload = _payload(folder)
            require_payload(header, payload)
        except AgssdError:
            return None
        return SealedUpdate(header, payload)

    def residual(self, last: LastRound) -> Weights:
        """What the coding of a round's reply left over; nothing when it is lost or damaged."""
        try:
            residual = load_weights(self.round_folder(last.round) / _RESIDUAL)
        except AgssdError:
            return {}
        return residual if weights_digest(residual) == last.residual_digest else {}

    def local(self, number: int) -> Weights:
        """Arrays that the site ended a round with: those that stayed, and those of its reply.

        Raises:
            CheckpointError: the reply is lost.
            WeightsError: a file is missing or damaged.
        """
        folder = self.round_folder(number)
        kept = load_weights(folder / _LOCAL) if (folder / _LOCAL).is_file() else {}
        found = self._read(folder)
        if found is None:
            raise CheckpointError("the round's reply is lost. Wait for the next round to end.")
        # A reply of differences is no use without its base, so then everything is kept.
        sent = unpack_whole(_payload(folder)) if found[1].wire == "float32" else {}
        return {**sent, **kept}

    def config(self) -> str | None:
        """Canonical JSON of the configuration that the newest round was trained with."""
        file = self.folder / _CONFIG
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def cohort(self) -> str | None:
        """Whose run it is; None before its first round, or when that cannot be read."""
        try:
            return str(json.loads(self.config() or "{}")["federation"]["cohort"])
        except (ValueError, KeyError, TypeError):
            return None

    def keep_config(self, text: str) -> None:
        """Remember the configuration of the round that is about to be saved."""
        if self.config() != text:
            write_text(self.folder / _CONFIG, text)

    def begin(self, number: int) -> None:
        """Clear what a killed process left of this round."""
        shutil.rmtree(self.round_folder(number), ignore_errors=True)

    def commit(
        self, last: LastRound, update: SealedUpdate, *, local: Weights, residual: Weights
    ) -> None:
        """Make a round whole, then drop the rounds before it.

        Raises:
            CheckpointError: the disk is full; the round before is still whole.
        """
        folder = self.round_folder(last.round)
        if residual:
            last = replace(last, residual_digest=weights_digest(residual))
        content = {"last": asdict(last), "header": asdict(update.header)}
        parts = {name: np.frombuffer(data, np.uint8) for name, data in update.payload.items()}
        try:
            save_weights(folder / _REPLY_ARRAYS, parts)
            for name, arrays in ((_LOCAL, local), (_RESIDUAL, residual)):
                if arrays:
                    save_weights(folder / name, arrays)
            write_text(folder / _REPLY, json.dumps(content, indent=1, sort_keys=True))
        except (OSError, AgssdError) as error:
            raise _not_saved(error) from None
        for other in self.folder.glob("round-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def _read(self, folder: Path) -> tuple[LastRound, UpdateHeader] | None:
        file = folder / _REPLY
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            header = UpdateHeader.from_dict(content["header"])
            return LastRound(**content["last"]), header
        except (ValueError, KeyError, TypeError, AgssdError):
            return None


def _not_saved(error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the round could not be saved at the site ({type(error).__name__}). Free disk "
        "space; the round before is untouched and this one can be ordered again."
    )


def _payload(folder: Path) -> Payload:
    return {name: part.tobytes() for name, part in load_weights(folder / _REPLY_ARRAYS).items()}

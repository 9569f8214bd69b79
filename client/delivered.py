"""Final checkpoints that a site holds, as the coordinator signed them.

``SITE/delivered/RUN/round-NNNN/`` holds the weights and a manifest with the certificate and its
signature. A checkpoint appears whole or not at all, and what was taken stays until a later round
of the same run replaces it. The same two files make the folder that `agssd-site fetch` writes.
"""

import json
import logging
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import psutil
from safetensors import SafetensorError, safe_open

from agssd_core.config import Cohort
from agssd_core.delivery import Certificate
from agssd_core.envelope import verify
from agssd_core.errors import AgssdError, CheckpointError, OrderRefusedError
from agssd_core.protocol import PROTOCOL_VERSION
from agssd_core.signing import VerifyKey
from agssd_core.weights import (
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

log = logging.getLogger(__name__)

DELIVERED = "delivered"
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
CERTIFICATE, SIGNATURE = "certificate", "signature"
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_ROUND = re.compile(r"round-\d{4,6}")
_MOST_ROUNDS = 100_000


@dataclass(frozen=True)
class Signed:
    """A certificate and the coordinator's signature over it."""

    certificate: Certificate
    signature: str

    def require(self, key: VerifyKey) -> None:
        """Check who made it, and that it names a checkpoint.

        Raises:
            SignatureError: it is unsigned, altered, or another coordinator's.
            CheckpointError: run, cohort or round are none.
        """
        verify(self.certificate, self.signature, (key,))
        said = self.certificate
        plain = _RUN.fullmatch(said.run) and said.cohort in get_args(Cohort)
        if not plain or not 0 <= said.round <= said.rounds <= _MOST_ROUNDS:
            raise CheckpointError(
                "the delivery names no run, cohort or round that is known here. Use the same "
                "version as the coordinator."
            )

    def require_weights(self, weights: Weights) -> None:
        """Check that these are the weights it speaks of.

        Raises:
            CheckpointError: they are others.
        """
        said = self.certificate
        found = (schema_digest(schema_of(weights)), weights_digest(weights))
        if found != (said.schema_digest, said.weights_digest):
            raise CheckpointError(
                "the delivered weights are not those that the coordinator signed: they were "
                "damaged or altered. Have them delivered again."
            )


@dataclass(frozen=True)
class Delivered:
    """A checkpoint that lies in a folder."""

    folder: Path
    signed: Signed = field(repr=False)

    @property
    def certificate(self) -> Certificate:
        """What the coordinator says of it."""
        return self.signed.certificate

    def read(self, key: VerifyKey) -> Weights:
        """The weights, with signature and digests checked again.

        Raises:
            SignatureError, CheckpointError, WeightsError: they do not hold.
        """
        self.signed.require(key)
        weights = load_weights(self.folder / WEIGHTS)
        self.signed.require_weights(weights)
        return weights

    def whole(self) -> bool:
        """Whether the weights on disk are still those of the certificate."""
        try:
            self.signed.require_weights(load_weights(self.folder / WEIGHTS))
        except AgssdError:
            return False
        return True


def held(site: Path) -> list[Delivered]:
    """The newest checkpoint of each run that a site holds; nothing of it is checked yet."""
    newest: dict[str, Delivered] = {}
    for folder in sorted((site / DELIVERED).glob("*/round-*")):
        found = _read(folder) if _ROUND.fullmatch(folder.name) else None
        if found is not None:
            said, before = found.certificate, newest.get(found.certificate.run)
            if before is None or before.certificate.round < said.round:
                newest[said.run] = found
    return [newest[run] for run in sorted(newest)]


def require_newer(site: Path, certificate: Certificate) -> bool:
    """Whether to keep a checkpoint: it is newer than what is held of its run, or that is damaged.

    Raises:
        OrderRefusedError: ``older``, or ``conflict`` when another one of the same round is held.
    """
    for one in held(site):
        other = one.certificate
        if other.run != certificate.run:
            continue
        if certificate.round < other.round:
            raise OrderRefusedError(
                f"the delivery holds {certificate.round} round(s), the site holds {other.round} of "
                "this run already. Deliver the newest checkpoint.",
                reason="older",
            )
        if certificate.round == other.round:
            if certificate.weights_digest == other.weights_digest:
                return not one.whole()
            raise OrderRefusedError(
                f"the site holds other weights of round {other.round} of this run, signed by the "
                "same coordinator. Ask the coordinator which are right before removing any.",
                reason="conflict",
            )
    return True


def store(site: Path, signed: Signed, weights: Weights) -> Path:
    """Keep a checkpoint that was checked; earlier rounds of its run go.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; nothing is left, and
            what was held before still is.
    """
    said = signed.certificate
    folder = site / DELIVERED / said.run / f"round-{said.round:04d}"
    write_checkpoint(folder, signed, weights)
    for other in folder.parent.glob("round-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def write_checkpoint(folder: Path, signed: Signed, weights: Weights) -> None:
    """Write the two files into a folder in one move; what it held before is replaced.

    Raises:
        CheckpointError: as ``store``.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        _sweep(folder)
        temporary.mkdir(parents=True, mode=0o700)
        save_weights(temporary / WEIGHTS, weights)
        write_text(temporary / MANIFEST, _manifest(signed, file_digest(temporary / WEIGHTS)))
        if folder.exists():
            folder.replace(old)
        temporary.replace(folder)
        sync_folder(folder.parent)
    except (OSError, AgssdError) as error:
        if old.exists() and not folder.exists():
            with suppress(OSError):
                old.replace(folder)
        raise CheckpointError(
            f"the checkpoint could not be written ({type(error).__name__}). Free disk space or "
            "mend the folder's permissions; what was held before still is."
        ) from None
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Bring back or remove what a process that was killed in ``write_checkpoint`` left behind."""
    start = f".{folder.name}."
    for left in sorted(folder.parent.glob(".*")):
        process, _, kind = left.name.removeprefix(start).partition(".")
        known = left.name.startswith(start) and kind in ("tmp", "old") and process.isdigit()
        if not known:
            continue
        if int(process) != os.getpid() and psutil.pid_exists(int(process)):
            continue
        if kind == "old" and not folder.exists():
            left.replace(folder)
        else:
            shutil.rmtree(left, ignore_errors=True)


def require_replaceable(folder: Path) -> None:
    """Check that a folder to write to is new, empty or a checkpoint's.

    Raises:
        CheckpointError: it holds something else.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _read(folder))):
        raise CheckpointError(
            "the folder to write to holds something else. Name a new one, so that nothing is lost."
        )


def read_file(file: Path, key: VerifyKey) -> tuple[Signed, Weights]:
    """Read what `agssd-server deliver` wrote; the signature is checked before any weight.

    Raises:
        SignatureError: it is unsigned, altered, or another coordinator's.
        CheckpointError: it is no delivery, or its weights are not those that were signed.
        WeightsError: it is cut short.
    """
    try:
        with safe_open(file, framework="numpy") as stream:
            said = dict(stream.metadata() or {})
        content = json.loads(said[CERTIFICATE])
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError):
        raise CheckpointError(
            "the file is no delivery of a coordinator, or is damaged. Ask for one made with "
            "`agssd-server deliver RUN --out FILE`."
        ) from None
    signed = Signed(Certificate.from_dict(content), str(said.get(SIGNATURE, "")))
    signed.require(key)
    weights = load_weights(file)
    signed.require_weights(weights)
    return signed, weights


def _manifest(signed: Signed, digest: str) -> str:
    said = signed.certificate
    content: dict[str, Any] = {
        "run": said.run,
        "round": said.round,
        "config": said.config,
        "files": {WEIGHTS: digest},
        "protocol": PROTOCOL_VERSION,
        CERTIFICATE: asdict(said),
        SIGNATURE: signed.signature,
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _read(folder: Path) -> Delivered | None:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        certificate = Certificate.from_dict(content[CERTIFICATE])
        return Delivered(folder, Signed(certificate, str(content[SIGNATURE])))
    except (OSError, ValueError, KeyError, TypeError, AgssdError) as error:
        if folder.exists():
            log.warning("a delivered checkpoint cannot be read (%s)", type(error).__name__)
        return None

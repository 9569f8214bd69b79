"""The base that a site keeps, so that the next one can come as a difference to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError, safe_open

from agssd_core.config import Cohort
from agssd_core.errors import AgssdError, OrderRefusedError
from agssd_core.weights import Weights, load_weights, save_weights, weights_digest

_DIGEST = "weights_digest"


@dataclass(frozen=True)
class KeptBase:
    """``SITE/federation/base-COHORT.safetensors``: merged weights of one round, replaced whole."""

    file: Path

    @classmethod
    def of(cls, site_folder: Path, cohort: str) -> "KeptBase":
        """The file of a cohort.

        Raises:
            OrderRefusedError: it is no cohort, so its name must not become a file's.
        """
        if cohort not in get_args(Cohort):
            message = "the order's cohort is not known here. Use the same version."
            raise OrderRefusedError(message, reason="cohort")
        return cls(site_folder / "federation" / f"base-{cohort}.safetensors")

    def digest(self) -> str:
        """What the file says that it holds; empty when there is none."""
        try:
            with safe_open(self.file, framework="numpy") as stream:
                return str((stream.metadata() or {}).get(_DIGEST, ""))
        except (OSError, SafetensorError):
            return ""

    def read(self, digest: str) -> Weights | None:
        """The weights of this digest, checked; None when others are kept, or they are damaged."""
        if not digest or self.digest() != digest:
            return None
        try:
            weights = load_weights(self.file)
        except AgssdError:
            return None
        return weights if weights_digest(weights) == digest else None

    def keep(self, weights: Weights, digest: str) -> None:
        """Replace what is kept.

        Raises:
            WeightsError: the disk is full; what was kept before still is.
        """
        if self.digest() != digest:
            save_weights(self.file, weights, metadata={_DIGEST: digest})

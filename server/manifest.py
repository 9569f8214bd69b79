"""What a checkpoint says of itself, and whether a configuration may resume from it."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self

from agssd_core.config import config_from_json, dump_config
from agssd_core.config.federation import WAITING
from agssd_core.errors import CheckpointError, ConfigError
from agssd_core.weights import Weights

FORMAT = 1
PACKAGES = ("agssd-federation", "torch", "numpy", "flwr", "safetensors")

FREE_KEYS = (
    "name",
    "output",
    "tracking",
    "monitor.stop_on_collapse",
    "training.loader_workers",
    "simulation.workers",
    "simulation.engine",
    *(f"federation.{name}" for name in WAITING),
)
"""Keys that change no bit of the result, so a resumed run may differ in them."""

SITE_COUNT = "federation.expected_sites"
"""Part of the learning-rate rule at every site. 0 does not say it: a simulation counts its sites
itself, and a checkpoint of round 0 may be written before they are known."""


@dataclass(frozen=True)
class RoundRecord:
    """What the caller says of a checkpoint.

    Attributes:
        run: our own run id, stable across resumes.
        round: the round that starts from these weights.
        config: canonical JSON of the RunConfig (``dump_config``).
        sites, shares: who was merged into these weights, with which p_k; empty for round 0.
        extra: anything plain that a resumed server needs (JSON).
    """

    run: str
    round: int
    cohort: str
    config: str
    sites: tuple[str, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunManifest(RoundRecord):
    """A checkpoint's manifest: the record, and what the store found out itself.

    Attributes:
        files: SHA-256 of each file; weights_digest, schema_digest: of the arrays.
        versions: packages that wrote it.
        digest: SHA-256 over all the rest, so that a flipped byte shows here too.
    """

    format: int = FORMAT
    files: dict[str, str] = field(default_factory=dict)
    weights_digest: str = ""
    schema_digest: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    digest: str = ""

    def sealed(self) -> Self:
        """The same manifest with its digest filled in."""
        content = asdict(self) | {"digest": ""}
        text = json.dumps(content, sort_keys=True)
        return replace(self, digest=hashlib.sha256(text.encode()).hexdigest())

    def to_json(self) -> str:
        """As written to the checkpoint."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a manifest; ``ValueError`` or ``TypeError`` when it is none, or was altered."""
        content = json.loads(text)
        manifest = cls(**(content | {"sites": tuple(content["sites"])}))
        if manifest.sealed() != manifest:
            raise ValueError("altered")
        return manifest


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read; ``passed_over`` are newer rounds that were damaged."""

    manifest: RunManifest
    weights: Weights = field(repr=False)
    state: Weights = field(repr=False)
    passed_over: tuple[int, ...] = ()

    @property
    def round(self) -> int:
        """The round that starts from here."""
        return self.manifest.round


def package_versions() -> dict[str, str]:
    """Versions of what took part; a package that is not installed is left out."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def require_same_config(manifest: RunManifest, config: str) -> None:
    """Refuse to resume with a configuration that would change the result.

    Both are reduced to their cohort's own part first, so the other cohort's settings are free.

    Args:
        manifest: the checkpoint's.
        config: canonical JSON of the configuration in hand.

    Raises:
        CheckpointError: naming the keys that differ.
    """
    differing = config_differences(_own(manifest.config), _own(config))
    if differing:
        shown = "; ".join(differing[:5]) + ("; ..." if len(differing) > 5 else "")
        raise CheckpointError(
            f"the run was started with another configuration ({len(differing)} key(s) differ: "
            f"{shown}). Resume with the run's own configuration, or start under another name."
        )


def config_differences(saved: str, current: str) -> list[str]:
    """Keys that matter and differ, as ``key = current, was saved``."""
    before, now = _flat(json.loads(saved)), _flat(json.loads(current))
    return [
        f"{key} = {now.get(key)!r}, was {before.get(key)!r}"
        for key in sorted(before.keys() | now)
        if before.get(key) != now.get(key)
        and not _is_free(key)
        and not (key == SITE_COUNT and 0 in (before.get(key), now.get(key)))
    ]


def _own(text: str) -> str:
    """What a configuration says of its own cohort; as it stands when it is of another version."""
    try:
        config = config_from_json(text)
    except ConfigError:
        return text
    return dump_config(config.for_cohort(config.federation.cohort))


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)

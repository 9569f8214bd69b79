"""The gate: what an update must be before any arithmetic sees it.

One bad site costs that site its round and nobody else theirs. ``server.envelope`` has checked the
envelope before an array was decoded; here, in this order: duplicate, size, enrolment, schema,
finite values, norms, merging weight, identity of the order, digest of the arrays,
metrics, statement of privacy.
"""

import math
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from agssd_core.differences import Wire, size_limit
from agssd_core.errors import ProtocolError, UpdateRejectedError, WeightsError
from agssd_core.privacy_statement import PrivacyStatement
from agssd_core.protocol import PROTOCOL_VERSION, SiteUpdate, UpdateHeader
from agssd_core.signing import VerifyKey
from agssd_core.weights import (
    Schema,
    Weights,
    group,
    require_schema,
    schema_digest,
    schema_of,
    weights_digest,
)

REASONS: Mapping[str, str] = {
    "size": "the update is larger than the cap",
    "site": "the site is not enrolled or was not asked",
    "signature": "the reply is not signed by the site's own key",
    "wire": "the arrays travel in another form than ordered",
    "duplicate": "the site's update of this round is already admitted",
    "schema": "array names, shapes or types differ from the base",
    "non-finite": "an array holds NaN or infinity",
    "magnitude": "a value is larger than any weight can sensibly be",
    "norm": "the update moved further than the limit",
    "weight": "the patient count is not the enrolled one",
    "protocol": "another version of the protocol",
    "run": "an update of another run",
    "cohort": "an update of another cohort",
    "round": "an update of another round",
    "steps": "another number of optimiser steps than ordered",
    "base": "the update started from other weights",
    "nonce": "the update does not answer this order",
    "digest": "the arrays are not those that the header names",
    "metrics": "a metric is not a finite number under a plain name",
    "privacy": "its statement of privacy is none",
}

MAX_ABS_VALUE = 1e6
"""Refused by default, with no norm limit set: weights, centres and logits' statistics stay below
1e3 in any run that still learns, and 1e30 would pass a check for finite values."""

MAX_METRICS = 256
_METRIC_NAME = re.compile(r"[a-z0-9_]{1,64}")
_BESIDE_ARRAYS = 1 << 16  # bytes of slack


@dataclass(frozen=True)
class AdmissionRules:
    """What this round's updates are held against.

    Attributes:
        base: weights that the round started from; also the schema, for the ``groups`` sent.
        groups: groups that a site sends, ``MergeConfig.uploaded_groups``.
        run, cohort, round, steps, base_digest: as in the order.
        nonces: per site that was asked, the nonce of its order.
        enrolled: per enrolled site, its patient count.
        max_update_norm: greatest L2 norm of the student's and of the teacher's difference,
            relative to the base's norm of that group; 0 is no limit.
        max_bytes: cap on the arrays' bytes; 0 is what the schema needs plus a little.
        wire: the form in which updates travel.
        keys: per site, the keys by one of which its replies must be signed; None on an unsigned
            connection. A site without keys is refused.
    """

    base: Weights = field(repr=False)
    groups: tuple[str, ...]
    run: str
    cohort: str
    round: int
    steps: int
    base_digest: str
    nonces: Mapping[str, str] = field(repr=False)
    enrolled: Mapping[str, int]
    max_update_norm: float = 0.0
    max_bytes: int = 0
    wire: Wire = "float32"
    keys: Mapping[str, Collection[VerifyKey]] | None = field(default=None, repr=False)

    def schema(self) -> Schema:
        """Names, shapes and types that an update must have."""
        return schema_of({n: a for n, a in self.base.items() if n.split("/", 1)[0] in self.groups})

    def byte_cap(self) -> int:
        """Most bytes that an update's decoded arrays may hold."""
        needed = sum(
            array.nbytes for n, array in self.base.items() if n.split("/", 1)[0] in self.groups
        )
        return self.max_bytes or needed + _BESIDE_ARRAYS

    def payload_cap(self) -> int:
        """Most bytes that an update's parts may declare and have, before any is decoded."""
        return self.max_bytes or size_limit(self.schema(), self.wire)


def admit(
    update: SiteUpdate, rules: AdmissionRules, *, admitted: Collection[str] = ()
) -> SiteUpdate:
    """Return the update unchanged, or say why it is refused.

    Args:
        update: as decoded; nothing about it is trusted.
        rules: the round's.
        admitted: sites whose update of this round is already held.

    Raises:
        UpdateRejectedError: with ``reason`` one of ``REASONS``.
    """
    if update.header.site in admitted:
        raise rejected(update.header, "duplicate", "one is enough; it was left out")
    _size(update, rules)
    require_asked(update.header, rules)
    _schema(update, rules)
    _values(update)
    _norms(update, rules)
    _weight(update, rules)
    require_order(update.header, rules)
    _digest(update)
    _metrics(update)
    _privacy(update)
    return update


def rejected(header: UpdateHeader, reason: str, detail: str) -> UpdateRejectedError:
    """The error of a refusal, with a plain name of the site."""
    site = _shown(header.site)
    return UpdateRejectedError(
        f"site '{site}': {REASONS[reason]} ({detail}). The round goes on without this site.",
        site=site,
        reason=reason,
    )


def _shown(text: object) -> str:
    """A name from outside, fit for a log line."""
    return re.sub(r"[^A-Za-z0-9._-]", "?", str(text))[:40]


def _size(update: SiteUpdate, rules: AdmissionRules) -> None:
    held = sum(array.nbytes for array in update.weights.values())
    if held > rules.byte_cap():
        raise rejected(update.header, "size", f"{held} bytes, cap {rules.byte_cap()}")


def require_asked(header: UpdateHeader, rules: AdmissionRules) -> None:
    """Refuse a site that is not enrolled or has no order."""
    if header.site not in rules.enrolled or header.site not in rules.nonces:
        raise rejected(header, "site", f"{len(rules.nonces)} sites have an order")


def _schema(update: SiteUpdate, rules: AdmissionRules) -> None:
    schema = rules.schema()
    try:
        require_schema(update.weights, schema)
    except WeightsError as error:
        raise rejected(update.header, "schema", str(error).rstrip(".")) from None
    if update.header.schema_digest != schema_digest(schema):
        raise rejected(update.header, "schema", "the header's schema digest is another")


def _values(update: SiteUpdate) -> None:
    for name, array in update.weights.items():
        # One reduction answers for NaN, infinity and size: NaN wins over every number.
        peak = float(np.abs(array).max(initial=0))
        if not math.isfinite(peak):
            raise rejected(update.header, "non-finite", f"in {name}")
        if peak > MAX_ABS_VALUE:
            detail = f"{peak:.3g} in {name}, limit {MAX_ABS_VALUE:g}"
            raise rejected(update.header, "magnitude", detail)


def _norms(update: SiteUpdate, rules: AdmissionRules) -> None:
    if rules.max_update_norm == 0:
        return
    # Student and teacher apart: in one norm the teacher's small differences would vanish.
    for name in ("student", "teacher"):
        moved = size = 0.0
        for key, array in group(update.weights, name).items():
            before = rules.base[key].astype(np.float64)
            difference = array.astype(np.float64) - before
            moved += float(np.sum(difference * difference))
            size += float(np.sum(before * before))
        limit = rules.max_update_norm * math.sqrt(size)
        if math.sqrt(moved) > limit:
            detail = f"{name} moved by {math.sqrt(moved):.4g}, limit {limit:.4g}"
            raise rejected(update.header, "norm", detail)


def _weight(update: SiteUpdate, rules: AdmissionRules) -> None:
    said, enrolled = update.header.patient_count, rules.enrolled[update.header.site]
    if said != enrolled:
        raise rejected(update.header, "weight", f"{said} said, {enrolled} enrolled")


def require_order(header: UpdateHeader, rules: AdmissionRules) -> None:
    """Refuse what does not answer this very order."""
    facts: dict[str, tuple[object, object]] = {
        "protocol": (header.protocol, PROTOCOL_VERSION),
        "run": (header.run, rules.run),
        "cohort": (header.cohort, rules.cohort),
        "round": (header.round, rules.round),
        "steps": (header.steps, rules.steps),
        "base": (header.base_digest, rules.base_digest),
        "nonce": (header.nonce, rules.nonces[header.site]),
        "wire": (header.wire, rules.wire),
    }
    for reason, (said, expected) in facts.items():
        if said != expected:
            detail = f"{_shown(said)[:12]} said, {_shown(expected)[:12]} expected"
            detail = "another order's" if reason == "nonce" else detail
            raise rejected(header, reason, detail)


def _digest(update: SiteUpdate) -> None:
    if weights_digest(update.weights) != update.header.weights_digest:
        raise rejected(update.header, "digest", "damaged on the way, or altered")


def _metrics(update: SiteUpdate) -> None:
    metrics = update.header.metrics
    if len(metrics) > MAX_METRICS:
        raise rejected(update.header, "metrics", f"{len(metrics)} metrics, limit {MAX_METRICS}")
    for name, value in metrics.items():
        # Names reach reports and files, so they are no place for markup or paths.
        if not _METRIC_NAME.fullmatch(str(name)) or not _is_number(value):
            raise rejected(update.header, "metrics", f"in {_shown(name)}")


def _privacy(update: SiteUpdate) -> None:
    if not update.header.privacy:
        return
    try:
        PrivacyStatement.checked(update.header.privacy)
    except ProtocolError:
        raise rejected(update.header, "privacy", "a field is missing or without meaning") from None


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN as well

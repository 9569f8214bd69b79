"""The only door out of a site: what is not on the list does not leave."""

import math
import re
from collections.abc import Mapping

import numpy as np

from agssd_core.config import MergeConfig
from agssd_core.config.policy import LeavesPolicy
from agssd_core.errors import TrainingError, WeightsError
from agssd_core.protocol import (
    PROTOCOL_VERSION,
    RoundOrder,
    SiteUpdate,
    UpdateHeader,
    uplink_groups,
)
from agssd_core.weights import (
    Schema,
    Weights,
    require_schema,
    schema_digest,
    schema_of,
    weights_digest,
)
from client.objections import metrics_that_leave, require_may_leave

MAX_METRICS = 128
_METRIC_NAME = re.compile(r"[a-z0-9_]{1,48}")


def leaving(weights: Weights, merge: MergeConfig) -> Weights:
    """The arrays that the merge rule asks for; a teacher stays unless the server averages it."""
    prefixes = tuple(f"{name}/" for name in uplink_groups(merge.teacher_rule))
    return {name: array for name, array in weights.items() if name.startswith(prefixes)}


def release(
    weights: Weights,
    *,
    order: RoundOrder,
    schema: Schema,
    site: str,
    patient_count: int,
    metrics: Mapping[str, float],
    leaves: LeavesPolicy | None = None,
) -> SiteUpdate:
    """Check what is about to leave and put it into its envelope.

    Args:
        weights: the trained arrays that shall leave.
        order: the order that they answer.
        schema: names, shapes and dtypes that may leave: those of the order's own weights.
        site: enrolled name.
        patient_count: patients behind the training data.
        metrics: name -> value; only short names and finite numbers leave.
        leaves: what the site's owner lets out; None sets no further limit.

    Raises:
        WeightsError: an array is not on the list, missing, of another shape or not finite.
        TrainingError: a metric is not a finite number under a plain name.
        OrderRefusedError: an array is one that the owner keeps.
    """
    require_schema(weights, schema)
    require_may_leave(schema, leaves)
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise WeightsError(
                f"array {name} is not finite after training; nothing was sent. Lower "
                "training.optimiser.learning_rate or train with precision = fp32."
            )
    header = UpdateHeader(
        protocol=PROTOCOL_VERSION,
        run=order.run,
        cohort=order.cohort,
        site=site,
        round=order.round,
        steps=order.steps,
        patient_count=patient_count,
        base_digest=order.base_digest,
        nonce=order.nonce,
        schema_digest=schema_digest(schema_of(weights)),
        weights_digest=weights_digest(weights),
        metrics=_plain_numbers(metrics_that_leave(metrics, leaves)),
    )
    return SiteUpdate(header, weights)


def _plain_numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    if len(metrics) > MAX_METRICS:
        raise TrainingError(f"{len(metrics)} metrics are more than {MAX_METRICS}. Send fewer.")
    plain: dict[str, float] = {}
    for name, value in sorted(metrics.items()):
        number = float(value)
        if not _METRIC_NAME.fullmatch(name) or not math.isfinite(number):
            raise TrainingError(
                "a metric is not a finite number under a short name; nothing was sent. Lower "
                "training.optimiser.learning_rate, or mend the metric."
            )
        plain[name] = number
    return plain

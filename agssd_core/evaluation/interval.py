"""Mean over seeds with Student's 95 % interval, and of paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from agssd_core.errors import ShapeError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and how sure it is.

    Attributes:
        low, high: ends of the interval; infinite where ``count`` is below 2.
        count: values that went in.
    """

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t-interval of the mean, for independent runs such as seeds.

    Raises:
        ShapeError: there is no value, or one that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ShapeError(
            f"an interval needs one finite value or more, not {array.size} with gaps. Leave out "
            "seeds that have no result."
        )
    mean, count = float(array.mean()), int(array.size)
    if count < 2:
        return Interval(mean, -np.inf, np.inf, count)
    error = float(array.std(ddof=1)) / np.sqrt(count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error)
    return Interval(mean, mean - half, mean + half, count)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Interval of ``first - second``, where both share seeds in the same order.

    Raises:
        ShapeError: the counts differ, or there is none.
    """
    if len(first) != len(second):
        raise ShapeError(
            f"{len(first)} and {len(second)} values cannot be paired. Compare the seeds that both "
            "have."
        )
    return mean_interval(np.subtract(first, second).tolist())

"""Time two ways of doing one thing, in turn, in one run: only their ratio means anything.

Seconds depend on the machine and on who else uses it; a ratio of interleaved repetitions hardly
does. The results are compared before anything is timed.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MIN_REPETITIONS = 3


@dataclass(frozen=True)
class Comparison:
    """How many times quicker ``fast`` was than ``slow``.

    Attributes:
        ratio: median of slow over median of fast.
        slow_ms, fast_ms: medians of one call, milliseconds.
        must: the ratio to reach; None promises nothing.
    """

    name: str
    ratio: float
    slow_ms: float
    fast_ms: float
    must: float | None = None
    stretch: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the promise is kept."""
        return self.must is None or self.ratio >= self.must

    def __str__(self) -> str:
        promise = "promises nothing" if self.must is None else f"must {self.must:g} x"
        if self.stretch is not None:
            promise += f", stretch {self.stretch:g} x"
        verdict = "" if self.passed else "  MISSED"
        return (
            f"{self.name}: {self.ratio:.2f} x ({self.slow_ms:.2f} ms vs {self.fast_ms:.2f} ms; "
            f"{promise}){verdict}"
        )


def compare(
    name: str,
    slow: Callable[[], Any],
    fast: Callable[[], Any],
    *,
    same: Callable[[Any, Any], None],
    repetitions: int = 5,
    calls: tuple[int, int] = (1, 1),
    goals: tuple[float | None, float | None] = (None, None),
) -> Comparison:
    """Check that both give the same, then time them in turn.

    Args:
        name: printed before the ratio.
        slow: the plain way.
        fast: our way.
        same: raises AssertionError when the two results differ; called before timing.
        repetitions: turns, at least 3.
        calls: calls of slow and of fast in one turn, for quick ones.
        goals: the ratios that must and that should be reached.
    """
    if repetitions < MIN_REPETITIONS:
        raise ValueError(f"{repetitions} repetitions are too few, at least 3 are needed")
    same(slow(), fast())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions):
        for way, count, taken in zip((slow, fast), calls, times, strict=True):
            begun = time.perf_counter()
            for _ in range(count):
                way()
            taken.append((time.perf_counter() - begun) / count)
    slow_s, fast_s = (statistics.median(taken) for taken in times)
    return Comparison(name, slow_s / fast_s, slow_s * 1e3, fast_s * 1e3, *goals)


def report(results: Sequence[Comparison]) -> int:
    """Print all comparisons; 1 when a promise is broken, for the exit code."""
    for result in results:
        print(result)
    return 0 if all(result.passed for result in results) else 1

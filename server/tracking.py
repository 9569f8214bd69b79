"""Copies of a run's rows under ``runs/NAME/tracking``, each round once.

``metrics.jsonl`` is the record, and the copies can be made from it at any time. A mark says up
to which round they are whole. Where it is missing (killed while copying) or ahead of the run
(which went back to an older checkpoint), the copies are made again from the first round.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from agssd_core.config import Cohort, TrackingConfig
from agssd_core.tracking import open_tracker
from agssd_core.weights import write_text
from server.outcome import RoundOutcome
from server.store import RunStore

TRACKING_FOLDER = "tracking"
_MARK = "copied-rounds"
_TOTALS = ("bytes_up", "bytes_down", "seconds", "share")

OnRound = Callable[[RoundOutcome], None]


@contextmanager
def tracking_rounds(
    config: TrackingConfig, store: RunStore, *, run: str, on_round: OnRound | None
) -> Iterator[OnRound | None]:
    """An ``on_round`` that first copies the closed round's rows; the given one without copies.

    Args:
        config: which copies to keep.
        store: the run's.
        run: name of the run in MLflow.
        on_round: called after the copies are made.

    Raises:
        ConfigError: a package is not installed.
    """
    if not (config.tensorboard or config.mlflow):
        yield on_round
        return
    copies = _Copies(config, store, run)
    try:
        copies.catch_up(max(store.rounds(), default=0))

        def copy_then_tell(outcome: RoundOutcome) -> None:
            copies.close_round(outcome.round)
            if on_round is not None:
                on_round(outcome)

        yield copy_then_tell
    finally:
        copies.tracker.close()


@contextmanager
def tracking_cohorts(
    config: TrackingConfig,
    stores: Mapping[Cohort, RunStore],
    *,
    run: str,
    on_round: OnRound | None,
) -> Iterator[OnRound]:
    """``tracking_rounds`` for every cohort of a run, each in its own folder.

    Args:
        config: which copies to keep.
        stores: the cohorts'.
        run: name of the run in MLflow; with several cohorts theirs follow it.
        on_round: called after the copies are made.

    Raises:
        ConfigError: a package is not installed.
    """
    with ExitStack() as opened:
        tell = {
            cohort: opened.enter_context(
                tracking_rounds(
                    config,
                    store,
                    run=f"{run}-{cohort}" if len(stores) > 1 else run,
                    on_round=on_round,
                )
            )
            for cohort, store in stores.items()
        }

        def close_round(outcome: RoundOutcome) -> None:
            told = tell[outcome.cohort]
            if told is not None:
                told(outcome)

        yield close_round


class _Copies:
    def __init__(self, config: TrackingConfig, store: RunStore, run: str) -> None:
        self._store = store
        self._mark_file = store.folder / TRACKING_FOLDER / _MARK
        self.tracker = open_tracker(config, self._mark_file.parent, run=run)

    def catch_up(self, closed: int) -> None:
        """Copy what is not copied of the first ``closed`` rounds."""
        copied = self._mark()
        if copied is None or copied > closed:
            self.tracker.clear()
            copied = 0
        self._copy(copied, closed)

    def close_round(self, number: int) -> None:
        """Copy a round that was just closed, and any before it that is not copied."""
        copied = self._mark()
        if copied is not None and copied > number:  # the run went back to an older checkpoint
            self._mark_file.unlink()
        self.catch_up(number + 1)

    def _copy(self, first: int, closed: int) -> None:
        if first >= closed:
            return
        self._mark_file.unlink(missing_ok=True)
        for row in self._store.metrics.rows():
            if first <= row["round"] < closed and row["kind"] in ("site", "merge"):
                place = f"sites/{row['site']}" if row["kind"] == "site" else "merge"
                self.tracker.log(_numbers(row), row["round"], prefix=place)
        self.tracker.flush()
        write_text(self._mark_file, f"{closed}\n")

    def _mark(self) -> int | None:
        try:
            return int(self._mark_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    totals = {name: float(row[name]) for name in _TOTALS if name in row}
    return {**row["metrics"], **totals}

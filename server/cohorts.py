"""The cohorts of a run side by side: each has its own folder, lock, enrolment and rounds.

With one cohort ``runs/NAME`` is that cohort's folder; with several it is ``runs/NAME/COHORT``.
Cohorts share the grid and nothing else.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Unpack, get_args

from agssd_core.config import Cohort, RunConfig
from agssd_core.errors import AgssdError, CheckpointError, RoundError
from server.collect import Exchange
from server.outcome import RoundOutcome
from server.rounds import How, RunSummary, each_round, run_rounds
from server.store import RunStore

log = logging.getLogger(__name__)

COHORTS: tuple[Cohort, ...] = get_args(Cohort)
STOP_S = 30.0
_SLICE_S = 0.5
_CHECKPOINTS = "checkpoints"

Rounds = Generator[RoundOutcome, None, RunSummary]
OnRound = Callable[[RoundOutcome], None]


def cohort_folders(folder: Path, config: RunConfig) -> dict[Cohort, Path]:
    """Where each cohort of a run keeps its checkpoints, in the order of the configuration.

    Raises:
        CheckpointError: the run was started with one cohort and now has several, or the reverse.
    """
    several = len(config.cohorts) > 1
    found = any((folder / name / _CHECKPOINTS).is_dir() for name in COHORTS)
    if (several and (folder / _CHECKPOINTS).is_dir()) or (not several and found):
        before, now = ("one cohort", "several") if several else ("several cohorts", "one")
        raise CheckpointError(
            f"the run was started with {before}, the configuration names {now}. Resume with the "
            "run's own cohorts, or start under another name."
        )
    return {name: folder / name if several else folder for name in config.cohorts}


def run_folders(folder: Path) -> dict[str, Path]:
    """The cohorts' folders of a run as it lies on disk; ``""`` names a run of one cohort."""
    found: dict[str, Path] = {
        name: folder / name for name in COHORTS if (folder / name / _CHECKPOINTS).is_dir()
    }
    return found or {"": folder}


def cohort_stores(folder: Path, config: RunConfig) -> dict[Cohort, RunStore]:
    """The store of each cohort of a run."""
    return {
        name: RunStore(place, keep=config.for_cohort(name).federation.keep)
        for name, place in cohort_folders(folder, config).items()
    }


def run_cohorts(
    grid: Exchange,
    config: RunConfig,
    folder: Path,
    *,
    on_round: OnRound | None = None,
    **how: Unpack[How],
) -> dict[Cohort, RunSummary]:
    """Run all rounds of every cohort that its newest checkpoint does not hold yet.

    A cohort that fails leaves the others running; its error is raised at the end.

    Args:
        grid: Flower's, or the in-process one.
        config: the whole configuration of the run.
        folder: the run's, whose cohorts have at least a round-0 checkpoint.
        on_round: told of every closed round, always in the calling thread.
        how: time, keys, and ``threads``: a thread for each cohort, so that none waits for another;
            False lets their rounds take turns in the calling thread. The bits are the same.

    Raises:
        CheckpointError: a cohort has no checkpoint, or was started with another configuration.
        RoundError: cohorts failed; the text says which and why.
    """
    stores = cohort_stores(folder, config)
    if len(stores) == 1:
        ((name, store),) = stores.items()
        own = config.for_cohort(name)
        return {name: run_rounds(grid, own, store, **how, on_round=on_round)}
    threads = how.get("threads", True)
    pause = _Pause(how.get("sleep", time.sleep))
    if threads:
        how["sleep"] = pause
    rounds = {
        name: each_round(grid, config.for_cohort(name), store, **how)
        for name, store in stores.items()
    }
    tell: OnRound = on_round or (lambda _outcome: None)
    ends = _in_threads(rounds, tell, pause) if threads else _in_turns(rounds, tell)
    _raise_failures({name: end for name, end in ends.items() if isinstance(end, Exception)})
    return {name: end for name, end in ends.items() if isinstance(end, RunSummary)}


class _Stopped(BaseException):
    """Ends a cohort's thread at its next pause; no handler of an error may catch it."""


class _Pause:
    """Sleeps in slices, so that an interrupted server is not held up by a long pause."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._sleep = sleep
        self.over = threading.Event()

    def __call__(self, seconds: float) -> None:
        left = seconds
        while True:
            if self.over.is_set():
                raise _Stopped
            self._sleep(min(left, _SLICE_S))
            left -= _SLICE_S
            if left <= 0:
                return


def _in_turns(
    rounds: Mapping[Cohort, Rounds], tell: OnRound
) -> dict[Cohort, RunSummary | Exception]:
    ends: dict[Cohort, RunSummary | Exception] = {}
    try:
        while len(ends) < len(rounds):
            for name in [name for name in rounds if name not in ends]:
                outcome, end = _next(name, rounds[name])
                if outcome is not None:
                    tell(outcome)
                elif end is not None:
                    ends[name] = end
    finally:
        for each in rounds.values():
            each.close()
    return ends


def _next(
    name: Cohort, rounds: Rounds
) -> tuple[RoundOutcome, None] | tuple[None, RunSummary | Exception]:
    try:
        return next(rounds), None
    except StopIteration as end:
        return None, end.value
    except Exception as error:  # noqa: BLE001 - raised when the other cohorts have ended
        reason = error if isinstance(error, AgssdError) else type(error).__name__
        log.error("cohort %s has ended early: %s", name, reason)
        return None, error


def _in_threads(
    rounds: Mapping[Cohort, Rounds], tell: OnRound, pause: _Pause
) -> dict[Cohort, RunSummary | Exception]:
    told: queue.SimpleQueue[tuple[Cohort, RoundOutcome | RunSummary | BaseException]]
    told = queue.SimpleQueue()
    workers = [
        threading.Thread(target=_work, args=(name, each, told), name=name, daemon=True)
        for name, each in rounds.items()
    ]
    for worker in workers:
        worker.start()
    ends: dict[Cohort, RunSummary | Exception] = {}
    try:
        while len(ends) < len(rounds):
            name, news = told.get()
            if isinstance(news, RoundOutcome):
                tell(news)
            elif isinstance(news, (RunSummary, Exception)):
                ends[name] = news
            else:
                raise news
    finally:
        pause.over.set()
        for worker in workers:
            worker.join(STOP_S)
    return ends


def _work(
    name: Cohort,
    rounds: Rounds,
    told: "queue.SimpleQueue[tuple[Cohort, RoundOutcome | RunSummary | BaseException]]",
) -> None:
    try:
        outcome, end = _next(name, rounds)
        while outcome is not None:
            told.put((name, outcome))
            outcome, end = _next(name, rounds)
        if end is not None:
            told.put((name, end))
    except BaseException as error:  # noqa: BLE001 - the calling thread raises it
        told.put((name, error))


def _raise_failures(failures: Mapping[Cohort, Exception]) -> None:
    """Raise what ended cohorts: a bug or a full disk as it is, our own errors as one."""
    errors = list(failures.values())
    for error in errors:
        if not isinstance(error, AgssdError):
            raise error
    said = " ".join(f"Cohort {name}: {error}" for name, error in failures.items())
    if errors and all(isinstance(error, CheckpointError) for error in errors):
        raise CheckpointError(said) from errors[0]
    if errors:
        raise RoundError(said) from errors[0]

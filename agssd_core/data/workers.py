"""A pool of processes in which a decoder that crashes costs only the scan it crashed on."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Protocol, TypeVar

PARENT_SECONDS = 0.5
CRASHED = "the image reader crashed on this scan. Export it again, or leave it out."


class Named(Protocol):
    """A piece of work, with a name of its own."""

    @property
    def name(self) -> str:
        """Unlike that of any other piece."""


JobT = TypeVar("JobT", bound=Named)
Work = Callable[[JobT], str | None]


def run_jobs(
    jobs: Sequence[JobT], work: Work[JobT], *, workers: int
) -> Iterator[tuple[JobT, str | None]]:
    """Do all jobs, in any order.

    Args:
        jobs: each is sent to a process.
        work: gives a reason why the job's scan cannot be used, or None; a module's function.
        workers: processes; with 1 the work is done in this one.

    Yields:
        Each job with what ``work`` gave, or with ``CRASHED``.
    """
    left = {job.name: job for job in jobs}
    if workers > 1 and len(jobs) > 1:
        try:
            for job, reason in _pooled(jobs, work, min(workers, len(jobs))):
                del left[job.name]
                yield job, reason
        except BrokenProcessPool:
            yield from _one_by_one(list(left.values()), work)
            return
    for job in left.values():
        yield job, work(job)


def _one_by_one(left: list[JobT], work: Work[JobT]) -> Iterator[tuple[JobT, str | None]]:
    """Where a decoder kills its process, only the scan to blame is lost.

    Where no process comes up at all (a program read from a pipe), the work is done in this one.
    """
    while left:
        with _pool(1) as pool:
            try:
                pool.submit(bool).result()
            except BrokenProcessPool:
                break
            try:
                while left:
                    reason = pool.submit(work, left[0]).result()
                    yield left.pop(0), reason
            except BrokenProcessPool:
                yield left.pop(0), CRASHED
    for job in left:
        yield job, work(job)


def _pooled(
    jobs: Sequence[JobT], work: Work[JobT], workers: int
) -> Iterator[tuple[JobT, str | None]]:
    pool = _pool(workers)
    try:
        futures = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = get_context("spawn")
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    )


def _end_with(parent: int) -> None:
    """Let a worker end when its parent was killed; it would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""Cutting the next steps' views while the current step trains."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from agssd_core.config import AgssdConfig
from agssd_core.views.batch import ViewBatch, make_batch
from agssd_core.views.reading import VolumeReader

T = TypeVar("T")


def prefetched(make: Callable[[int], T], steps: range, *, workers: int) -> Iterator[T]:
    """What ``make`` gives for every step, in order, up to ``workers`` steps ahead.

    Threads are enough: decompression and tensor arithmetic release the interpreter lock. An error
    in a thread is raised here, at its step. Leaving early or closing the iterator drops what was
    prefetched and ends the threads.
    """
    if workers == 0:
        yield from map(make, steps)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="agssd-views")
    ahead: deque[Future[T]] = deque()
    try:
        for step in steps:
            ahead.append(pool.submit(make, step))
            # One batch more than threads keeps all of them busy while a step trains.
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class BatchLoader:
    """Yields the batches of consecutive steps; the number of threads never changes a bit.

    The threads live only while :meth:`steps` is being read.
    """

    def __init__(
        self,
        volumes: VolumeReader,
        agssd: AgssdConfig,
        *,
        seed: int,
        site: str,
        batch_size: int,
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._volumes = volumes
        self._agssd = agssd
        self._seed = seed
        self._site = site
        self._batch_size = batch_size
        self._workers = workers
        self._share = share

    def steps(self, first: int, count: int) -> Iterator[ViewBatch]:
        """Batches of the global steps ``first`` to ``first + count``, in order.

        Errors and leaving early are as in :func:`prefetched`.
        """
        return prefetched(self._batch, range(first, first + count), workers=self._workers)

    def _batch(self, step: int) -> ViewBatch:
        return make_batch(
            self._volumes,
            self._agssd,
            seed=self._seed,
            site=self._site,
            step=step,
            batch_size=self._batch_size,
            share=self._share,
        )

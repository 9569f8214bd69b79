"""Cutting the next steps' views while the current step trains."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from agssd_core.config import AgssdConfig
from agssd_core.views.batch import ViewBatch, make_batch
from agssd_core.views.reading import VolumeReader


class BatchLoader:
    """Yields the batches of consecutive steps; the number of threads never changes a bit.

    Threads are enough: decompression and tensor arithmetic release the interpreter lock. They
    live only while :meth:`steps` is being read.
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

        An error in a thread is raised here, at its step. Leaving early or closing the iterator
        drops what was prefetched and ends the threads.
        """
        if self._workers == 0:
            yield from map(self._batch, range(first, first + count))
            return
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="agssd-views")
        ahead: deque[Future[ViewBatch]] = deque()
        waiting = iter(range(first, first + count))
        try:
            for step in waiting:
                ahead.append(pool.submit(self._batch, step))
                # One batch more than threads keeps all of them busy while a step trains.
                if len(ahead) > self._workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

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

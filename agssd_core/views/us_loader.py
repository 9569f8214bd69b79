"""Cutting the next steps' ultrasound views while the current step trains."""

from collections.abc import Iterator

from agssd_core.config.anaus import AnausConfig
from agssd_core.views.loader import prefetched
from agssd_core.views.us_batch import FrameReader, UsBatch, make_us_batch


class UsLoader:
    """Yields the batches of consecutive steps; the number of threads never changes a bit."""

    def __init__(
        self,
        frames: FrameReader,
        anaus: AnausConfig,
        *,
        seed: int,
        site: str,
        batch_size: int,
        workers: int = 0,
    ) -> None:
        self._frames = frames
        self._anaus = anaus
        self._seed = seed
        self._site = site
        self._batch_size = batch_size
        self._workers = workers

    def steps(self, first: int, count: int) -> Iterator[UsBatch]:
        """Batches of the global steps ``first`` to ``first + count``, in order.

        Errors and leaving early are as in :func:`~agssd_core.views.loader.prefetched`.
        """
        return prefetched(self._batch, range(first, first + count), workers=self._workers)

    def _batch(self, step: int) -> UsBatch:
        return make_us_batch(
            self._frames,
            self._anaus,
            seed=self._seed,
            site=self._site,
            step=step,
            batch_size=self._batch_size,
        )

"""The views of patients that take part in a private step, none of which depends on another."""

from collections.abc import Sequence

from agssd_core.config import AgssdConfig
from agssd_core.views.batch import ViewBatch, collate, cut_volume
from agssd_core.views.reading import VolumeReader
from agssd_core.views.seeds import rng_for


def make_patient_batch(
    volumes: VolumeReader,
    agssd: AgssdConfig,
    *,
    seed: int,
    site: str,
    step: int,
    chosen: Sequence[tuple[str, int]],
) -> ViewBatch:
    """Cut one pair of views of each patient.

    A patient's views depend on (seed, site, step, patient), not on who else takes part.

    Args:
        volumes: the site's volumes.
        agssd: crops, augmentation, patch size.
        seed: of the run.
        site: name of the site; part of the seed.
        step: global step.
        chosen: (patient, index of one of its volumes), at least one.
    """
    items = []
    for patient, index in chosen:
        rng = rng_for(seed, site, "views", step, patient)
        items += cut_volume(volumes, index, agssd, [rng])
    return collate(items, agssd)

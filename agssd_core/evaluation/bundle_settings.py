"""Preprocessing's part of the configuration as a plain dataclass.

In a bundle, which has no pydantic, it stands in the place of ``agssd_core.config.data``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """How images are brought to the form of pre-training.

    Attributes:
        spacing_mm: voxel edges of the prepared volume, in RAS order.
        ct_window_hu: CT values that map to 0 and 1.
        mr_percentiles: percentiles of the MR body that map to 0 and 1.
        foreground_margin: voxels round the body's box; of no effect on predictions.
        max_side: a larger ultrasound sector is shrunk until its longer side has so many pixels.
    """

    spacing_mm: tuple[float, float, float]
    ct_window_hu: tuple[float, float]
    mr_percentiles: tuple[float, float]
    foreground_margin: int
    max_side: int

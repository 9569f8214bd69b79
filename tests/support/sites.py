"""Prepared phantom sites for tests, made in about a second."""

import hashlib
from pathlib import Path

from agssd_core.config.data import DataConfig
from agssd_core.config.simulation import PhantomSiteConfig
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import prepare_site
from simulation.phantoms import write_phantom_site

SIZE = (40, 40, 32)
SPACING_MM = (6.0, 6.0, 7.0)
FAST = DataConfig(spacing_mm=(6.0, 6.0, 6.0), chunk=32, foreground_margin=2)


def make_raw_site(folder, modality="CT", patients=3, seed=0, *, file_format="nifti", **changes):
    """Write raw phantom scans below ``folder`` and return it. ``modality`` may be a tuple."""
    given = {
        "name": changes.pop("name", folder.name),
        "modalities": (modality,) if isinstance(modality, str) else modality,
        "format": file_format,
        "patients": patients,
        "size": SIZE,
        "spacing_mm": SPACING_MM,
        **changes,
    }
    write_phantom_site(folder, PhantomSiteConfig(**given), seed=seed)
    return folder


def make_site(folder, modality="CT", patients=3, seed=0, config: DataConfig = FAST) -> Path:
    """A site that is ready for ``SiteVolumes.open(folder, config)``.

    The site's secret follows from the seed, so volume names and their order do too.
    """
    raw = make_raw_site(folder.with_name(f"{folder.name}-raw"), modality, patients, seed)
    secret = hashlib.sha256(f"test {seed}".encode()).digest()
    index_folders(folder, [raw], secret=secret)
    prepare_site(folder, config)
    return folder

"""Phantom hospitals: folders of raw scans that differ in modality, scanner, spacing and size."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from agssd_core.config.simulation import PhantomSiteConfig
from simulation.phantom_anatomy import Labels, Patient, draw_patient, label_map
from simulation.phantom_files import ScanLabel, nifti_image, ras_affine, write_dicom, write_nifti
from simulation.phantom_images import LOOKS, ct_image, mr_image
from simulation.phantom_ultrasound import US_LOOKS, UsPhantom, make_us_phantom
from simulation.phantom_us_anatomy import draw_us_patient
from simulation.phantom_us_files import (
    UsScanLabel,
    write_us_dicom,
    write_us_png,
    write_us_video,
)


@dataclass(frozen=True)
class Phantom:
    """One phantom scan in memory.

    Attributes:
        image: (D, H, W) int16 in RAS order; HU for CT.
        labels: organ of every voxel, an index into ``phantom_anatomy.LABEL_NAMES``.
        affine: (4, 4) voxel index -> RAS millimetres.
    """

    name: str
    modality: str
    patient: Patient
    image: NDArray[np.int16]
    labels: Labels
    affine: NDArray[np.float64]


def make_phantom(site: PhantomSiteConfig, number: int, modality: str, *, seed: int) -> Phantom:
    """Make one scan; the same arguments give the same bits.

    A patient's CT and MR show the same body.
    """
    extent = tuple(n * mm for n, mm in zip(site.size, site.spacing_mm, strict=True))
    body = np.random.default_rng(_seed(seed, site.name, number))
    patient = draw_patient(body, (extent[0], extent[1], extent[2]))
    labels = label_map(patient, size=site.size, spacing_mm=site.spacing_mm)
    draw = ct_image if modality == "CT" else mr_image
    look_seed = _seed(seed, site.name, number, modality)
    image = draw(labels, LOOKS[site.scanner], seed=look_seed)
    affine = np.asarray(ras_affine(site.size, site.spacing_mm), dtype=np.float64)
    name = f"{site.name}-{number:04d}"
    return Phantom(name, modality, patient, image, labels, affine)


def make_us_clip(site: PhantomSiteConfig, number: int, clip: int, *, seed: int) -> UsPhantom:
    """Make one ultrasound clip; the same arguments give the same bits.

    Clips of a patient show the same anatomy from other places. Every second one is a still, and
    all are where the site writes ``png``.
    """
    patient = draw_us_patient(np.random.default_rng(_seed(seed, site.name, number, "US")))
    still = site.format == "png" or clip % 2 == 1
    return make_us_phantom(
        patient,
        US_LOOKS[site.scanner],
        anatomy=site.anatomy,
        frames=1 if still else site.frames,
        name=f"Phantom^{site.name}-{number:04d}",
        seed=_seed(seed, site.name, number, "US", clip),
    )


def write_phantom_site(
    folder: Path, site: PhantomSiteConfig, *, seed: int, labels_folder: Path | None = None
) -> int:
    """Write a site's raw scans: a folder for each patient, a series or file for each modality.

    Args:
        folder: where to write; existing files of the same names are replaced.
        site: the hospital.
        seed: of the run.
        labels_folder: where to put organ label maps, for probes: NIfTI for volumes, and for
            ultrasound arrays as ``agssd-site delineate --labels`` takes them; None writes none.

    Returns:
        Number of scans written.
    """
    if labels_folder is not None:
        labels_folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for number in range(site.patients):
        for modality in site.modalities:
            if modality == "US":
                written += _write_clips(folder, site, number, seed=seed, labels=labels_folder)
            else:
                _write_volume(folder, site, number, modality, seed=seed, labels=labels_folder)
                written += 1
    return written


def _write_volume(
    folder: Path,
    site: PhantomSiteConfig,
    number: int,
    modality: str,
    *,
    seed: int,
    labels: Path | None,
) -> None:
    phantom = make_phantom(site, number, modality, seed=seed)
    label = ScanLabel(
        patient=phantom.name,
        modality=modality,
        spacing_mm=site.spacing_mm,
        look=LOOKS[site.scanner],
        uid_seed=f"{seed}/{phantom.name}/{modality}",
    )
    place = folder / phantom.name
    if site.format == "dicom":
        write_dicom(place / modality, phantom.image, label)
    else:
        write_nifti(place / f"{modality}_image.nii.gz", phantom.image, label)
    if labels is not None:
        name = f"{phantom.name}_{modality}_labels.nii.gz"
        nib.save(nifti_image(phantom.labels, phantom.affine), labels / name)


def _write_clips(
    folder: Path, site: PhantomSiteConfig, number: int, *, seed: int, labels: Path | None
) -> int:
    """All clips of one patient, and one label map for each frame of them where asked for."""
    name = f"{site.name}-{number:04d}"
    for clip in range(site.clips):
        phantom = make_us_clip(site, number, clip, seed=seed)
        label = UsScanLabel(name, clip, US_LOOKS[site.scanner], f"{seed}/{name}/US")
        place = folder / name / "US"
        if site.format == "dicom":
            file = write_us_dicom(place, phantom, label)
        elif site.format == "video" and len(phantom.frames) > 1:
            file = write_us_video(place, phantom, label)
        else:
            file = write_us_png(place, phantom, label)
        if labels is not None:
            _write_labels(labels / file.relative_to(folder), phantom.labels)
    return site.clips


def _write_labels(file: Path, labels: NDArray[np.uint8]) -> None:
    """Label maps (F, H, W) of a clip as ``.npy``, named as the clip is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file.with_suffix(".npy"), labels, allow_pickle=False)


def _seed(*parts: object) -> int:
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

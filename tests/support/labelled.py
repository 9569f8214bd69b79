"""Phantom scans with organ outlines as labelled sets."""

import numpy as np

from agssd_core.config import DataConfig, PhantomSiteConfig
from agssd_core.data.preprocess import FOREGROUND_STEP, preprocess, resample
from agssd_core.data.volume import canonical_volume
from agssd_core.evaluation.labelled import LabelledScan, LabelledSet, store_scan
from agssd_core.training.anaus_build import build_pair
from agssd_core.training.build import build_model
from simulation.phantoms import make_phantom, make_us_clip

HELD_OUT = 2


def volumes(folder, data: DataConfig, *, patients=5, modality="CT", organ=None):
    """Prepared phantoms; label ``side``: which half was kept of the volume."""
    site = PhantomSiteConfig(name="a", size=(48, 48, 32), spacing_mm=(6.0, 6.0, 6.0))
    found = []
    for number in range(patients):
        phantom = make_phantom(site, number, modality, seed=0)
        volume = canonical_volume(phantom.image, phantom.affine, modality=modality)
        prepared = preprocess(volume, data)
        layers = [
            resample((phantom.labels == value).astype(np.float32), phantom.affine,
                     spacing_mm=data.spacing_mm)[0] >= 0.5
            for value in (organ or range(1, int(phantom.labels.max()) + 1))
        ]  # fmt: skip
        mask = np.zeros(prepared.array.shape, np.uint8)
        for value, layer in enumerate(layers, start=1):
            mask[layer] = value
        inside = prepared.mask
        for axis, extent in enumerate(mask.shape):
            inside = inside.repeat(FOREGROUND_STEP, axis=axis).take(range(extent), axis=axis)
        scan = _scan(folder, f"ct{number}", number, patients, modality, data.spacing_mm)
        found.append(store_scan(scan, prepared.array, inside=inside, mask=mask))
    return LabelledSet(tuple(found))


def frames(folder, *, patients=8, bright_class=False):
    """Ultrasound frames cut to their sector, with the phantom's own outlines."""
    site = PhantomSiteConfig(name="u", modalities=("US",), format="png", clips=1)
    found = []
    for number in range(patients):
        clip = make_us_clip(site, number, 0, seed=0)
        rows, columns = np.flatnonzero(clip.sector.any(1)), np.flatnonzero(clip.sector.any(0))
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        image = np.where(clip.sector, clip.frames[0].mean(-1), 0).astype(np.uint8)[box]
        if bright_class and number % 2:
            image = (image // 3).astype(np.uint8)
        scan = _scan(folder, f"us{number}", number, patients, "US", None)
        mask = np.ascontiguousarray(clip.labels[0][box])
        inside = np.ascontiguousarray(clip.sector[box])
        found.append(store_scan(scan, np.ascontiguousarray(image), inside=inside, mask=mask))
    return LabelledSet(tuple(found))


def checkpoint(config, seed=0):
    """Round-0 weights of a run's model."""
    us = config.federation.cohort == "us"
    model = build_pair(config.anaus, seed=seed) if us else build_model(config.agssd, seed=seed)
    return model.shared_weights()


def _scan(folder, name, number, patients, modality, spacing):
    return LabelledScan(
        scan=name,
        patient=f"p{number}",
        site="ab"[number % 2],
        split="test" if number >= patients - HELD_OUT else "train",
        modality=modality,
        labels={"parity": ("even", "odd")[number % 2]},
        file=folder / f"{name}.npz",
        spacing_mm=spacing,
    )

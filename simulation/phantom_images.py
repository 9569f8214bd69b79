"""From a phantom's label map to what a CT or MR scanner would show."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from simulation.phantom_anatomy import AIR, FLUID, KIDNEY, LABEL_NAMES, LIVER, VESSEL, Labels

#       air  muscle fat lung liver kidney spleen heart bone vessel lesion brain fluid gas
HU = (-1000, 55, -100, -820, 60, 40, 50, 45, 700, 45, 30, 38, 8, -950)
T1 = (0, 300, 900, 60, 420, 260, 240, 280, 90, 120, 220, 480, 110, 0)
T2 = (0, 180, 560, 70, 220, 480, 430, 260, 60, 70, 620, 420, 950, 0)
PD = (0, 520, 800, 120, 560, 640, 620, 560, 150, 300, 660, 700, 760, 0)


@dataclass(frozen=True)
class ScannerLook:
    """What tells one scanner's images from another's.

    Attributes:
        blur_voxels: width of the point-spread function.
        noise_hu: of CT.
        noise_share, bias, gain: of MR: noise over the brightest tissue, depth of the shading,
            arbitrary units for 1.
        weighting: MR value of each label.
        couch: whether CT shows the table top.
    """

    vendor: str
    model: str
    blur_voxels: float
    noise_hu: float
    noise_share: float
    bias: float
    gain: float
    weighting: tuple[int, ...]
    couch: bool = False


LOOKS = {
    "a": ScannerLook("GE MEDICAL SYSTEMS", "Phantom A", 0.55, 18, 0.015, 0.2, 1.0, T1, couch=True),
    "b": ScannerLook("Philips", "Phantom B", 0.8, 32, 0.03, 0.4, 3.1, T2),
    "c": ScannerLook("SIEMENS", "Phantom C", 0.45, 10, 0.05, 0.3, 0.4, PD, couch=True),
}


def ct_image(labels: Labels, look: ScannerLook, *, seed: int) -> NDArray[np.int16]:
    """HU of a phantom, with or without contrast agent."""
    rng = np.random.default_rng(seed)
    values = np.array(HU, dtype=np.float32)
    agent = rng.choice([0.0, 1.0]) * rng.uniform(0.5, 1.0)
    values[VESSEL] += 190 * agent
    values[KIDNEY] += 120 * agent
    values[LIVER] += 45 * agent
    values[1:-1] += rng.normal(0, 6, size=len(values) - 2)
    tissue = values[labels] + _texture(labels.shape, rng) * 14 * (labels != AIR)
    if look.couch:
        _add_couch(tissue, labels)
    seen = gaussian_filter(tissue, look.blur_voxels)
    seen += rng.normal(0, look.noise_hu, size=seen.shape).astype(np.float32)
    return np.asarray(np.clip(np.rint(seen), -1024, 3071), dtype=np.int16)


def mr_image(labels: Labels, look: ScannerLook, *, seed: int) -> NDArray[np.int16]:
    """Magnitude image of a phantom in arbitrary units, shaded by the coil, with Rician noise."""
    rng = np.random.default_rng(seed)
    values = np.array(look.weighting, dtype=np.float32)
    values *= np.exp(rng.normal(0, 0.08, size=len(LABEL_NAMES))).astype(np.float32)
    if look.weighting is T1 and rng.random() < 0.3:
        values[[VESSEL, LIVER, FLUID]] *= np.array([4.0, 1.3, 0.8], dtype=np.float32)
    tissue = values[labels] * (1 + 0.06 * _texture(labels.shape, rng))
    shaded = gaussian_filter(tissue, look.blur_voxels) * _shading(labels.shape, look.bias, rng)
    sigma = look.noise_share * float(values.max())
    real = shaded + rng.normal(0, sigma, size=shaded.shape)
    other = rng.normal(0, sigma, size=shaded.shape)
    gain = look.gain * rng.uniform(0.7, 1.4)
    return np.asarray(np.clip(np.rint(np.hypot(real, other) * gain), 0, 32767), dtype=np.int16)


def _texture(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    noise = gaussian_filter(rng.normal(size=shape).astype(np.float32), 1.2)
    return np.asarray(noise / noise.std(), dtype=np.float32)


def _shading(shape: tuple[int, ...], depth: float, rng: np.random.Generator) -> NDArray[np.float32]:
    coarse = rng.normal(size=(3, 3, 3))
    field = zoom(coarse, [side / 3 for side in shape], order=1, grid_mode=True, mode="nearest")
    return np.asarray(np.exp(depth * field / max(float(np.abs(field).max()), 1e-6)), np.float32)


def _add_couch(tissue: NDArray[np.float32], labels: Labels) -> None:
    """A flat table top behind the patient, where there is room for one."""
    seen = np.flatnonzero((labels != AIR).any(axis=(0, 2)))
    level = int(seen[0]) - 2 if len(seen) else -1
    if level >= 0:
        inner = slice(labels.shape[0] // 8, -(labels.shape[0] // 8))
        tissue[inner, level, :] = np.where(
            labels[inner, level, :] == AIR, -150, tissue[inner, level, :]
        )

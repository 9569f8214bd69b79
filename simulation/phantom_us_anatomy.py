"""What an ultrasound phantom's beam meets: stylised heart, breast and muscle, in millimetres.

x runs across the probe, z from the skin into the body. A patient is the anatomy with its own
sizes and places; a view adds a plane and a phase, so frames of a clip move.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
UsLabels = NDArray[np.uint8]

NONE, VENTRICLE, MYOCARDIUM, ATRIUM, RIGHT_HEART, SKIN, FAT, GLAND, MUSCLE = range(9)
LESION, APONEUROSIS, DEEP_MUSCLE, BONE = range(9, 13)
US_LABEL_NAMES = (
    *("none", "left ventricle", "myocardium", "left atrium", "right heart"),
    *("skin", "fat", "gland", "muscle", "lesion", "aponeurosis", "deep muscle", "bone"),
)
# Depth of view, mm.
DEPTH_MM = {"heart": 150.0, "breast": 42.0, "muscle": 52.0}


@dataclass(frozen=True)
class UsPatient:
    """Twelve numbers in [-1, 1] that make one patient; each anatomy reads them as it likes."""

    traits: tuple[float, ...]

    def of(self, number: int, middle: float, spread: float) -> float:
        """A size or place: ``middle`` give or take ``spread``."""
        return middle + spread * self.traits[number]


def draw_us_patient(rng: np.random.Generator) -> UsPatient:
    """Draw a patient."""
    return UsPatient(tuple(float(value) for value in rng.uniform(-1, 1, size=12)))


def paint(anatomy: str, patient: UsPatient, x: Plane, z: Plane, *, phase: float) -> UsLabels:
    """Name the structure at every place.

    Args:
        anatomy: ``heart``, ``breast`` or ``muscle``.
        patient: whose.
        x: places across the probe, mm.
        z: places into the body, mm, of the same shape.
        phase: of heartbeat, breath or contraction, [0, 1).

    Returns:
        uint8, values index ``US_LABEL_NAMES``; 0 is tissue without a name.
    """
    return _PAINTERS[anatomy](patient, x, z, float(np.sin(2 * np.pi * phase)))


def fibres(anatomy: str, patient: UsPatient, x: Plane, z: Plane, *, phase: float) -> Plane:
    """Bright stripes of muscle fascicles and glandular septa, decibels to add."""
    if anatomy == "heart":
        return np.zeros_like(x)
    if anatomy == "breast":
        wave = np.sin(x / patient.of(0, 1.9, 0.4) + np.sin(z / 2.1)) * np.cos(z / 1.3)
        return np.asarray(5.0 * wave, dtype=np.float32)
    angle = math.radians(patient.of(1, 17, 6) + 3 * math.sin(2 * math.pi * phase))
    across = x * np.sin(angle) + z * np.cos(angle)
    stripes = np.sin(2 * np.pi * across / patient.of(2, 3.0, 0.6))
    return np.asarray(9.0 * np.clip(stripes, 0, 1) ** 3, dtype=np.float32)


def _heart(patient: UsPatient, x: Plane, z: Plane, beat: float) -> UsLabels:
    """Four chambers as seen from the apex."""
    turn = math.radians(patient.of(0, 0, 9))
    across = x * np.cos(turn) - (z - 70) * np.sin(turn)
    down = x * np.sin(turn) + (z - 70) * np.cos(turn)
    squeeze = 1 - 0.16 * (0.5 + 0.5 * beat)
    wide, long = patient.of(1, 20, 4) * squeeze, patient.of(2, 40, 5) * (0.5 + 0.5 * squeeze)
    wall = patient.of(3, 9, 2) / squeeze
    left, right = patient.of(4, -12, 3), patient.of(5, 25, 3)
    valves = 34.0
    labels = np.zeros(x.shape, dtype=np.uint8)
    above, below = down < valves, down >= valves + 2
    labels[_ellipse(across, down, (right, 2), (18, 36)) & above] = MYOCARDIUM
    labels[_ellipse(across, down, (left, 0), (wide + wall, long + wall)) & above] = MYOCARDIUM
    labels[
        _ellipse(across, down, (right + 2, 5), (14, 31)) & above & (across > left + wide + 5)
    ] = RIGHT_HEART
    labels[_ellipse(across, down, (left, 4), (wide, long)) & above] = VENTRICLE
    round_ = patient.of(6, 19, 3) * (2 - squeeze) * 0.9
    labels[_ellipse(across, down, (left + 2, 53), (round_, round_ * 0.95)) & below] = ATRIUM
    labels[_ellipse(across, down, (right + 3, 51), (16, 16)) & below & (labels == 0)] = RIGHT_HEART
    return labels


def _breast(patient: UsPatient, x: Plane, z: Plane, breath: float) -> UsLabels:
    """Skin, fat, gland with a lesion, chest muscle and ribs."""
    down = z + 0.35 * breath
    labels = np.full(x.shape, FAT, dtype=np.uint8)
    labels[down < 1.8] = SKIN
    top = patient.of(0, 8, 2) + 1.3 * np.sin(x / 5 + 3 * patient.traits[1])
    bottom = patient.of(2, 25, 2) + 1.0 * np.sin(x / 8 + 2 * patient.traits[3])
    labels[(down > top) & (down < bottom)] = GLAND
    chest = patient.of(4, 29, 1.5) + 0.06 * x * patient.traits[5]
    labels[(down > chest) & (down < chest + 8)] = MUSCLE
    labels[down >= chest + 8] = NONE
    ribs = np.mod(x + 11 * patient.traits[6] + 10, 20) - 10
    labels[_ellipse(ribs, down - chest, (0, 10.5), (4.5, 2.6))] = BONE
    if patient.traits[7] > -0.5:
        size, place = patient.of(8, 4.5, 2), (patient.of(9, 0, 9), patient.of(10, 16, 2.5))
        angle = np.arctan2(down - place[1], x - place[0])
        # Harmless ones are smooth, the others lobed.
        edge = 1 + (0.18 if patient.traits[7] > 0.3 else 0.0) * np.cos(3 * angle)
        labels[np.hypot((x - place[0]) / 1.3, down - place[1]) < size * edge] = LESION
    return labels


def _muscle(patient: UsPatient, x: Plane, z: Plane, pull: float) -> UsLabels:
    """Skin, fat, two bellies between aponeuroses, bone."""
    labels = np.full(x.shape, MUSCLE, dtype=np.uint8)
    slope = 0.05 * patient.traits[0] * x
    fat = patient.of(1, 6.5, 2)
    middle = patient.of(2, 23, 2.5) + 1.1 * pull + 0.8 * np.sin(x / 14) + slope
    deep = patient.of(3, 38, 2) + 0.6 * np.sin(x / 11 + 2) - slope
    thick = patient.of(4, 1.1, 0.25)
    labels[z > middle] = DEEP_MUSCLE
    labels[z < fat] = FAT
    labels[z < 1.8] = SKIN
    for level in (fat + 0.5, middle, deep):
        labels[np.abs(z - level) < thick] = APONEUROSIS
    labels[z > deep + thick] = NONE
    centre = (patient.of(5, 3, 8), patient.of(6, 52, 2))
    labels[_ellipse(x, z, centre, (13, 9))] = BONE
    return labels


def _ellipse(
    x: Plane, z: Plane, centre: tuple[float, float], radii: tuple[float, float]
) -> NDArray[np.bool_]:
    return np.asarray(
        ((x - centre[0]) / radii[0]) ** 2 + ((z - centre[1]) / radii[1]) ** 2 < 1, dtype=np.bool_
    )


_PAINTERS: dict[str, Callable[[UsPatient, Plane, Plane, float], UsLabels]] = {
    "heart": _heart,
    "breast": _breast,
    "muscle": _muscle,
}

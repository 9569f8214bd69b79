"""Anatomical phantoms: label maps of a stylised body, different for every patient.

One standing body is described in millimetres (x to the right, y to the front, z upwards from the
soles). A patient is that body with its own size, build, pose, organs present or absent and
lesions; a scan sees one region of it. Without such diversity there is nothing for a cls token to
tell apart.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Size3 = tuple[int, int, int]
Triple = tuple[float, float, float]
Grid = NDArray[np.float32]
Labels = NDArray[np.uint8]

AIR, MUSCLE, FAT, LUNG, LIVER, KIDNEY, SPLEEN, HEART, BONE, VESSEL, LESION, BRAIN, FLUID, GAS = (
    range(14)
)
LABEL_NAMES = (
    *("air", "muscle", "fat", "lung", "liver", "kidney", "spleen"),
    *("heart", "bone", "vessel", "lesion", "brain", "fluid", "gas"),
)
# Region: height of its middle and half the body's width there, mm.
REGIONS = {
    "head": (1600.0, 85.0),
    "thorax": (1290.0, 175.0),
    "abdomen": (1080.0, 165.0),
    "pelvis": (900.0, 175.0),
    "thighs": (640.0, 170.0),
}
# Ellipsoids: label, centre, radii, chance of being there.
ORGANS: tuple[tuple[int, Triple, Triple, float], ...] = (
    (LUNG, (-82, 0, 1300), (58, 78, 130), 1.0),
    (LUNG, (82, 0, 1300), (58, 78, 130), 0.92),
    (HEART, (-22, 28, 1255), (52, 45, 58), 1.0),
    (VESSEL, (-10, 5, 1335), (20, 38, 24), 0.9),
    (LIVER, (58, 15, 1120), (82, 72, 68), 1.0),
    (SPLEEN, (-105, -35, 1130), (30, 42, 48), 0.8),
    (FLUID, (-55, 40, 1105), (45, 32, 40), 0.7),
    (KIDNEY, (62, -48, 1050), (28, 25, 52), 0.85),
    (KIDNEY, (-62, -48, 1060), (28, 25, 52), 0.85),
    (GAS, (-40, 60, 1000), (38, 22, 26), 0.6),
    (GAS, (70, 55, 985), (24, 18, 40), 0.5),
    (FLUID, (0, 35, 870), (48, 40, 42), 0.85),
    (GAS, (0, -45, 880), (22, 22, 40), 0.5),
    (BRAIN, (0, 5, 1618), (66, 84, 72), 1.0),
    (FLUID, (14, 5, 1625), (8, 34, 16), 0.9),
    (FLUID, (-14, 5, 1625), (8, 34, 16), 0.9),
    (GAS, (0, 72, 1545), (20, 16, 24), 0.9),
)
LESION_HOSTS = (LUNG, LIVER, KIDNEY, SPLEEN, BRAIN, MUSCLE)


@dataclass(frozen=True)
class Patient:
    """Everything that makes one phantom patient; drawn by ``draw_patient``."""

    region: str
    scale: float
    build: tuple[float, float]
    fat_mm: float
    turn: NDArray[np.float64]
    shift_mm: Triple
    present: tuple[bool, ...]
    jitter: NDArray[np.float64]
    arms: bool
    lesions: tuple[tuple[int, float, float], ...]
    seed: int


def draw_patient(rng: np.random.Generator, extent_mm: Triple) -> Patient:
    """Draw a patient whose chosen region about fills a field of view of this extent."""
    region = str(rng.choice(list(REGIONS)))
    _, half_width = REGIONS[region]
    fill = min(extent_mm[0], extent_mm[1] * 1.4) / (2 * half_width) * rng.uniform(0.82, 1.06)
    present = tuple(bool(rng.random() < chance) for *_, chance in ORGANS)
    count = int(rng.integers(0, 5))
    hosts = rng.integers(0, len(LESION_HOSTS), size=count)
    lesions = tuple((LESION_HOSTS[host], rng.uniform(6, 22), rng.random()) for host in hosts)
    return Patient(
        region=region,
        scale=float(min(fill, 1.25)),
        build=(rng.uniform(0.88, 1.1), rng.uniform(0.85, 1.15)),
        fat_mm=rng.uniform(6, 32),
        turn=_rotation(rng.normal(0, [0.06, 0.06, 0.16])),
        shift_mm=(rng.normal(0, 8), rng.normal(0, 8), rng.uniform(-60, 60)),
        present=present,
        jitter=rng.normal(0, 1, size=(len(ORGANS), 6)),
        arms=bool(rng.random() < 0.3),
        lesions=lesions,
        seed=int(rng.integers(2**31)),
    )


def label_map(patient: Patient, *, size: Size3, spacing_mm: Triple) -> Labels:
    """Paint a patient's region on a grid.

    Returns:
        (D, H, W) uint8 in RAS order, values index ``LABEL_NAMES``.
    """
    x, y, z = _body_coordinates(patient, size, spacing_mm)
    labels = np.zeros(size, dtype=np.uint8)
    depth = _paint_body(labels, patient, x, y, z)
    _paint_bones(labels, depth, x, y, z)
    for number, (label, centre, radii, _) in enumerate(ORGANS):
        if patient.present[number]:
            moved = np.asarray(centre) + patient.jitter[number, :3] * 6
            sized = np.asarray(radii) * np.exp(patient.jitter[number, 3:] * 0.12)
            inside = _ellipsoid(x, y, z, moved, sized) & (depth > 6) & (labels != BONE)
            labels[inside] = label
    _paint_vessels(labels, x, y, z)
    _paint_lesions(labels, patient, spacing_mm)
    return labels


def _body_coordinates(patient: Patient, size: Size3, spacing_mm: Triple) -> tuple[Grid, Grid, Grid]:
    axes = [
        (np.arange(count) - (count - 1) / 2) * step
        for count, step in zip(size, spacing_mm, strict=True)
    ]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    placed = (grid - np.asarray(patient.shift_mm)) @ patient.turn / patient.scale
    middle, _ = REGIONS[patient.region]
    # Build stretches the body across and from front to back, not along its height.
    x = placed[..., 0] / patient.build[0]
    y = placed[..., 1] / patient.build[1]
    return x.astype(np.float32), y.astype(np.float32), (placed[..., 2] + middle).astype(np.float32)


def _paint_body(labels: Labels, patient: Patient, x: Grid, y: Grid, z: Grid) -> Grid:
    """Paint fat and muscle; returns about how deep each voxel lies under the skin, mm."""
    waist = 150 + 18 * np.cos((z - 1340) / 160) + 14 * np.cos((z - 880) / 90)
    parts = [
        _depth(np.hypot(x / waist, y / (0.68 * waist)), 110, (z > 800) & (z < 1450)),
        _depth(np.hypot(x / 58, (y + 5) / 62), 58, (z > 1380) & (z < 1540)),
        _depth(np.sqrt((x / 82) ** 2 + ((y - 8) / 104) ** 2 + ((z - 1610) / 118) ** 2), 85, z > 0),
    ]
    thigh = 78 + 0.06 * (z - 640)
    parts += [
        _depth(np.hypot((x - side * 88) / thigh, y / (1.08 * thigh)), 78, z < 880)
        for side in (-1, 1)
    ]
    if patient.arms:
        parts += [
            _depth(np.hypot((x - side * 205) / 36, (y + 5) / 38), 36, (z > 760) & (z < 1400))
            for side in (-1, 1)
        ]
    depth = np.max(parts, axis=0)
    head = z > 1490
    labels[depth > 0] = FAT
    labels[depth > np.where(head, 4.0, patient.fat_mm)] = MUSCLE
    return np.asarray(depth, dtype=np.float32)


def _depth(radius: Grid, size_mm: float, where: NDArray[np.bool_]) -> Grid:
    return np.where(where, (1 - radius) * size_mm, -1.0).astype(np.float32)


def _paint_bones(labels: Labels, depth: Grid, x: Grid, y: Grid, z: Grid) -> None:
    disc = np.mod(z, 34) < 6
    spine = (np.hypot(x, y + 72) < 22) & (z > 850) & (z < 1540) & ~disc
    chest = (z > 1180) & (z < 1440)
    ribs = chest & (depth > 14) & (depth < 22) & (np.mod(z + 0.5 * y, 30) < 12)
    radius = np.sqrt((x / 72) ** 2 + ((y - 6) / 92) ** 2 + ((z - 1618) / 86) ** 2)
    skull = (radius > 0.96) & (radius < 1.07) & (z > 1540)
    wings = _ellipsoid(np.abs(x), y, z, (92, -25, 925), (26, 52, 62))
    wings &= ~_ellipsoid(np.abs(x), y, z, (78, 0, 925), (24, 52, 62))
    shaft = (np.hypot(np.abs(x) - 92, y) < 17) & (z < 860)
    femoral_head = _ellipsoid(np.abs(x), y, z, (84, 0, 868), (26, 26, 26))
    for bone in (spine, ribs, skull, wings, shaft, femoral_head):
        labels[bone & (depth > 3)] = BONE


def _paint_vessels(labels: Labels, x: Grid, y: Grid, z: Grid) -> None:
    torso = (z > 960) & (z < 1330)
    aorta = (np.hypot(x + 14, y + 40) < 12) & torso
    cava = (np.hypot(x - 16, y + 34) < 12) & torso & (z < 1230)
    femoral = (np.hypot(np.abs(x) - 70, y - 38) < 7) & (z < 850)
    for vessel in (aorta, cava, femoral):
        labels[vessel & (labels == MUSCLE)] = VESSEL


def _paint_lesions(labels: Labels, patient: Patient, spacing_mm: Triple) -> None:
    for host, radius_mm, choice in patient.lesions:
        inside = np.argwhere(labels == host)
        if not len(inside):
            continue
        centre = inside[int(choice * len(inside))]
        reach = np.maximum(radius_mm * patient.scale / np.asarray(spacing_mm), 1.0)
        low = np.maximum(0, np.floor(centre - reach)).astype(int)
        box = tuple(
            slice(start, int(np.ceil(mid + far)) + 1)
            for start, mid, far in zip(low, centre, reach, strict=True)
        )
        part = labels[box]
        steps = np.indices(part.shape).reshape(3, -1).T + low - centre
        ball = (np.sum((steps / reach) ** 2, axis=1) <= 1).reshape(part.shape)
        part[ball & (part == host)] = LESION


def _ellipsoid(
    x: Grid,
    y: Grid,
    z: Grid,
    centre: NDArray[np.float64] | Triple,
    radii: NDArray[np.float64] | Triple,
) -> NDArray[np.bool_]:
    return np.asarray(
        ((x - centre[0]) / radii[0]) ** 2
        + ((y - centre[1]) / radii[1]) ** 2
        + ((z - centre[2]) / radii[2]) ** 2
        < 1
    )


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation about x, then y, then z; radians."""
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result

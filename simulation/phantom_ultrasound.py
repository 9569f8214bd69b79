"""Ultrasound phantoms: speckled clips of a moving anatomy, as a scanner's screen shows them.

Echoes are made along the beams: scatterers of random phase give the amplitude's Rayleigh
distribution, structures attenuate what lies behind them, and the beams are then converted to a
fan or a rectangle on a screen with burned-in text.

Source: Burckhardt 1978, doi:10.1109/T-SU.1978.30978 (speckle is Rayleigh distributed).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

from simulation.phantom_us_anatomy import DEPTH_MM, Plane, UsLabels, UsPatient, fibres, paint
from simulation.phantom_us_screen import draw_screen

#       none  LV  myoc. LA  right skin fat gland muscle lesion apon. deep bone
ECHO_DB = (-21, -46, -14, -46, -45, -4, -20, -10, -18, -31, -1, -19, 2)
LOSS_DB_MM = (0.05, 0.0, 0.06, 0.0, 0.0, 0.1, 0.06, 0.1, 0.08, 0.1, 0.15, 0.08, 4.0)
_SAMPLES, _LINES = 260, 144
# Share of the scatterers' power that is new in every frame.
_RENEWED = 0.12
_TOP, _BOTTOM, _SIDE = 30, 22, 44


@dataclass(frozen=True)
class UsLook:
    """What tells one scanner's frames from another's.

    Attributes:
        canvas: (rows, columns) of the screen.
        gain_db: added to every echo. range_db: from black to white.
        speckle: width of the point-spread function, (along, across) beams, samples.
        half_angle: of a fan, degrees. radius_mm: of the probe's face; 0 is a phased array.
        width_mm: of a linear probe.
    """

    vendor: str
    model: str
    canvas: tuple[int, int]
    gain_db: float
    range_db: float
    speckle: tuple[float, float]
    half_angle: float
    radius_mm: float
    width_mm: float


US_LOOKS = {
    "a": UsLook("GE MEDICAL SYSTEMS", "Phantom UA", (264, 352), 2, 58, (1.0, 1.3), 37, 0, 38),
    "b": UsLook("Philips", "Phantom UB", (300, 400), -3, 48, (1.5, 2.2), 44, 12, 50),
    "c": UsLook("SIEMENS", "Phantom UC", (240, 320), 3, 66, (0.8, 1.8), 31, 45, 44),
}


@dataclass(frozen=True)
class UsPhantom:
    """One clip, or a still, in memory.

    Attributes:
        frames: (F, H, W, 3) uint8, the whole screen.
        labels: (F, H, W) uint8, indices into ``US_LABEL_NAMES``; 0 outside the sector.
        sector: (H, W), where the beams reach.
        pixel_mm: edge of a pixel.
    """

    frames: NDArray[np.uint8]
    labels: UsLabels
    sector: NDArray[np.bool_]
    pixel_mm: float


@dataclass(frozen=True)
class _Scan:
    """Places of one probe, mm: of the beams' samples and of the screen's pixels."""

    beam_x: Plane
    beam_z: Plane
    pixel_x: Plane
    pixel_z: Plane
    sector: NDArray[np.bool_]
    sample: tuple[Plane, Plane]
    pixel_mm: float
    step_mm: float


def make_us_phantom(
    patient: UsPatient, look: UsLook, *, anatomy: str, frames: int, name: str, seed: int
) -> UsPhantom:
    """Make one clip; the same arguments give the same bits.

    Args:
        patient: whose.
        look: of which scanner.
        anatomy: ``heart`` gives a fan, ``breast`` and ``muscle`` a linear probe's rectangle.
        frames: of one heartbeat, breath or contraction; 1 is a still.
        name: made up, burned in outside the sector.
        seed: of the view and the speckle.
    """
    rng = np.random.default_rng(seed)
    scan = _fan(look, anatomy) if anatomy == "heart" else _rectangle(look, anatomy)
    moved = rng.normal(0, 0.02, size=2) * DEPTH_MM[anatomy]
    start = float(rng.random())
    scatterers = _scatterers(rng)
    shown, named = [], []
    for number in range(frames):
        phase = start + number / max(frames, 2)
        drift = round(2 * np.sin(2 * np.pi * phase))
        fresh = np.sqrt(1 - _RENEWED) * np.roll(scatterers, drift, axis=0)
        fresh += np.sqrt(_RENEWED) * _scatterers(rng)
        beams = _beams(
            (scan.beam_x + moved[0], scan.beam_z + moved[1] * 0.3),
            patient,
            look,
            anatomy=anatomy,
            phase=phase,
            scatterers=fresh,
            step_mm=scan.step_mm,
        )
        grey = map_coordinates(beams, scan.sample, order=1, mode="nearest")
        shown.append(np.where(scan.sector, np.rint(grey), 0).astype(np.uint8))
        places = (scan.pixel_x + moved[0], scan.pixel_z + moved[1] * 0.3)
        named.append(np.where(scan.sector, paint(anatomy, patient, *places, phase=phase), 0))
    screen = draw_screen(look.canvas, name=name, model=look.model, depth_mm=DEPTH_MM[anatomy])
    pictures = np.where(
        scan.sector[None, :, :, None], np.stack(shown)[..., None], screen[None]
    ).astype(np.uint8)
    return UsPhantom(pictures, np.stack(named).astype(np.uint8), scan.sector, scan.pixel_mm)


def _beams(
    places: tuple[Plane, Plane],
    patient: UsPatient,
    look: UsLook,
    *,
    anatomy: str,
    phase: float,
    scatterers: NDArray[np.complex64],
    step_mm: float,
) -> Plane:
    """Grey values 0 to 255 along the beams, (samples, lines)."""
    labels = paint(anatomy, patient, *places, phase=phase)
    echo = np.asarray(ECHO_DB, dtype=np.float32)[labels]
    echo += fibres(anatomy, patient, *places, phase=phase) * (echo > -25)
    behind = np.cumsum(np.asarray(LOSS_DB_MM, dtype=np.float32)[labels], axis=0) * step_mm
    # The scanner makes up for the usual loss with depth, so fluid brightens what lies behind it.
    usual = 0.055 * step_mm * np.arange(len(labels), dtype=np.float32)[:, None]
    level = gaussian_filter(echo, 0.6) - (behind - usual)
    seen = scatterers * 10 ** (level / 20)
    spread = look.speckle
    real, other = gaussian_filter(seen.real, spread), gaussian_filter(seen.imag, spread)
    # A point-spread function averages power away; put the mean back.
    power = 4 * np.pi * spread[0] * spread[1]
    amplitude = np.hypot(real, other) * np.sqrt(max(power, 1.0)) + 1e-4
    grey = (20 * np.log10(amplitude) + look.gain_db + look.range_db - 4) / look.range_db
    return np.asarray(np.clip(grey, 0, 1) * 255, dtype=np.float32)


def _scatterers(rng: np.random.Generator) -> NDArray[np.complex64]:
    parts = rng.standard_normal((2, _SAMPLES, _LINES), dtype=np.float32)
    return np.asarray((parts[0] + 1j * parts[1]) / np.sqrt(2), dtype=np.complex64)


def _pixels(canvas: tuple[int, int], pixel_mm: float) -> tuple[Plane, Plane]:
    """Places of the screen's pixels with the skin under the text and the beam in the middle."""
    rows, columns = np.indices(canvas, dtype=np.float32)
    return (columns - (canvas[1] - 1) / 2) * pixel_mm, (rows - _TOP) * pixel_mm


def _fan(look: UsLook, anatomy: str) -> _Scan:
    depth, half = DEPTH_MM[anatomy], np.radians(look.half_angle)
    sunk = look.radius_mm * (1 - np.cos(half))
    tall = (depth + sunk) / (look.canvas[0] - _TOP - _BOTTOM)
    wide = 2 * (look.radius_mm + depth) * np.sin(half) / (look.canvas[1] - 2 * _SIDE)
    pixel_mm = float(max(tall, wide))
    deep = np.linspace(0, depth, _SAMPLES, dtype=np.float32)[:, None] + look.radius_mm
    turn = np.linspace(-half, half, _LINES, dtype=np.float32)[None, :]
    x, down = _pixels(look.canvas, pixel_mm)
    # The rim of a curved face lies higher on the screen than its middle.
    z = down - sunk
    reach, angle = np.hypot(x, z + look.radius_mm), np.arctan2(x, z + look.radius_mm)
    into = reach - look.radius_mm
    sector = (into >= 0) & (into <= depth) & (np.abs(angle) <= half) & (z > -sunk - 1)
    sample = (into / depth * (_SAMPLES - 1), (angle / half + 1) / 2 * (_LINES - 1))
    beam_x, beam_z = deep * np.sin(turn), deep * np.cos(turn) - look.radius_mm
    return _Scan(beam_x, beam_z, x, z, sector, sample, pixel_mm, depth / _SAMPLES)


def _rectangle(look: UsLook, anatomy: str) -> _Scan:
    depth, width = DEPTH_MM[anatomy], look.width_mm
    tall = depth / (look.canvas[0] - _TOP - _BOTTOM)
    pixel_mm = float(max(tall, width / (look.canvas[1] - 2 * _SIDE)))
    x, z = _pixels(look.canvas, pixel_mm)
    sector = (z >= 0) & (z <= depth) & (np.abs(x) <= width / 2)
    sample = (z / depth * (_SAMPLES - 1), (x / width + 0.5) * (_LINES - 1))
    beam_x, beam_z = np.meshgrid(
        np.linspace(-width / 2, width / 2, _LINES, dtype=np.float32),
        np.linspace(0, depth, _SAMPLES, dtype=np.float32),
    )
    return _Scan(beam_x, beam_z, x, z, sector, sample, pixel_mm, depth / _SAMPLES)

"""Find the sector: the part of an ultrasound frame that holds echoes.

Names, dates, rulers, logos and colour bars stand beside it and are blanked with everything else
outside. A scanner's screen has a few flat grey levels; echoes leave them over wide, dense areas,
text only in thin strokes. So: pixels off the flat levels, their density in small cells, an
opening that removes what is thin, the largest area that is left, and its convex hull, cut where
a curved probe's face bends inwards.

What this cannot do: text written *over* lit tissue stays, and a photograph of a screen has no
flat levels, so that all of it counts as sector.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from agssd_core.errors import ClipError

Frames = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Reals = NDArray[np.float32]

WORKING_SIDE = 320
# Share of a screen that one flat level must fill to be background, and how much of the levels
# around it: dark tissue spreads over many levels, a background is one.
LEVEL_SHARE, LEVEL_PEAK = 0.02, 0.8
DENSE, DENSITY_CELLS = 0.55, 5
OPENING_SHARE = 0.022
ROUGH_SHARE = 0.15
SMOOTH_SHARE, TOP_SHARE = 0.05, 0.1
# Blocks of JPEG and MPEG have 8 pixels.
EDGE_LEVELS, RINGING_PIXELS, RINGING_LEVELS, BLACK = 120, 9, 24, 8
MOVING_LEVELS = 1.5
LEAST_SHARE = 0.05
RECTANGLE_SHARE = 0.97
FACE_SLOPE = 0.35
BORDER_SHARE = 0.12
STRAY_LEVEL, STRAY_SHARE = 100, 0.12


def find_sector(samples: Frames, coloured: Mask | None = None) -> Mask:
    """The echo area of a clip.

    Args:
        samples: (N, H, W) grey frames spread over the clip, the whole screen or a region of it.
        coloured: (N, H, W) strongly saturated pixels (Doppler, colour bars), which say nothing.

    Returns:
        (H, W) True inside; one piece, with holes only where a word near the edge was cut out.

    Raises:
        ClipError: no echo area can be told from the background.
    """
    side = max(samples.shape[1:])
    cell = max(1, -(-side // WORKING_SIDE))
    middle = samples[len(samples) // 2]
    rough = _spread(middle)
    noise = _noise(rough)
    off = _off_background(samples, rough, noise)
    textured = _cells(rough > noise, cell)
    active = _active(off, cell)
    plain = _shaded_screen((textured < SMOOTH_SHARE) & (active > DENSE))
    active = active * ~plain
    dense = _dense(active)
    main = _echoes(_solid(dense), textured, _moving(samples, cell))
    if main is not None and coloured is not None:
        # A colour bar that touches the sector is cut off; flow lies between grey echoes.
        grey = [one & ~colour for one, colour in zip(off, coloured, strict=True)]
        main &= _dense(_active(grey, cell) * ~plain)
    if main is None or main.mean() < LEAST_SHARE:
        raise ClipError(
            f"no echo area of at least {LEAST_SHARE:.0%} of the picture was found (a blank "
            "screen, a page of text, or a probe in air). Leave the file out, or export the "
            "images of the examination."
        )
    main = ndimage.binary_fill_holes(main)
    hull = _hull(main)
    echoes = main | (dense & hull)
    found = _outline(hull, echoes)
    joined = ndimage.binary_propagation(main, mask=echoes)
    found = _without_strays(found, joined, _stray_cells(samples, active, cell))
    if not found.all():
        # Half a cell's doubt at the edge is settled against the screen beside it.
        found = ndimage.binary_erosion(found, border_value=1)
    grown = found.repeat(cell, axis=0).repeat(cell, axis=1)
    return np.asarray(grown[: samples.shape[1], : samples.shape[2]])


def _spread(frame: Frames) -> Frames:
    """Highest less lowest value of 3 x 3 pixels."""
    high = ndimage.maximum_filter(frame, 3, mode="nearest")
    return np.asarray(high - ndimage.minimum_filter(frame, 3, mode="nearest"))


def _noise(rough: Frames) -> int:
    """What a flat area may vary: 2 levels, more where the quietest edge of the screen is noisy."""
    width = max(2, round(0.015 * max(rough.shape)))
    strips = (rough[:width], rough[-width:], rough[:, :width], rough[:, -width:])
    quietest = min(float(np.median(strip)) for strip in strips)
    return 2 if quietest <= 1 else round(min(1.5 * quietest + 1, 6))


def _background(frame: Frames, rough: Frames, noise: int) -> Mask:
    """(256,) True for grey levels of the screen's flat areas, as wide as the noise."""
    counts = np.bincount(frame[rough <= noise], minlength=256).astype(float)
    reach = noise // 2
    near = np.convolve(counts, np.ones(2 * reach + 1), "same")
    around = np.convolve(counts, np.ones(2 * reach + 13), "same")
    peaks = (near >= LEVEL_SHARE * frame.size) & (near >= LEVEL_PEAK * around)
    return np.asarray(ndimage.binary_dilation(peaks, iterations=noise))


def _off_background(samples: Frames, rough: Frames, noise: int) -> list[Mask]:
    """Pixels of every frame that are not the screen's.

    Lossy compression rings round text: within a block of a strong edge, what is nearly as dark as
    a black screen or as bright as a white one still counts as the screen.
    """
    middle = samples[len(samples) // 2]
    background = _background(middle, rough, noise)
    rung = background.copy()
    rung[:RINGING_LEVELS] |= background[:BLACK].any()
    rung[256 - RINGING_LEVELS :] |= background[256 - BLACK :].any()
    edges = ndimage.maximum_filter(rough, RINGING_PIXELS) >= EDGE_LEVELS
    return [~np.where(edges, rung[frame], background[frame]) for frame in samples]


def _shaded_screen(smooth: Mask) -> Mask:
    """Smooth cells that reach the upper edge: a screen of graded colour, never an echo."""
    labels, _ = ndimage.label(smooth)
    at_top = np.bincount(labels[0], minlength=1)
    wide = np.flatnonzero(at_top >= TOP_SHARE * labels.shape[1])
    return np.asarray(np.isin(labels, wide[wide > 0]))


def _active(off: Sequence[Mask], cell: int) -> Reals:
    """Share of every cell's pixels and frames that are off the background."""
    total = sum(_cells(frame, cell) for frame in off)
    return np.asarray(total / np.float32(len(off)), dtype=np.float32)


def _moving(samples: Frames, cell: int) -> Mask | None:
    """Cells that change over the clip; None where nothing does."""
    if len(samples) < 2:
        return None
    moving = np.stack([_cells(frame, cell) for frame in samples]).std(axis=0) > MOVING_LEVELS
    return moving if moving.mean() > LEAST_SHARE / 2 else None


def _cells(values: NDArray[np.generic], cell: int) -> Reals:
    """Means of cell x cell pixels; the last ones repeat the edge."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, -rows % cell), (0, -columns % cell)), mode="edge")
    high, wide = padded.shape[0] // cell, padded.shape[1] // cell
    return np.asarray(padded.reshape(high, cell, wide, cell).mean((1, 3), dtype=np.float32))


def _dense(active: Reals) -> Mask:
    """Cells whose neighbourhood is mostly off the background."""
    return np.asarray(ndimage.uniform_filter(active, DENSITY_CELLS, mode="nearest") > DENSE)


def _solid(dense: Mask) -> Mask:
    """Without what is thinner than text is high."""
    radius = max(3, round(OPENING_SHARE * max(dense.shape)))
    # Padding lets an area that the image's edge cuts off keep its corners.
    wide = np.pad(dense, 2 * radius, mode="edge")
    opened = ndimage.binary_opening(ndimage.binary_closing(wide, _disc(2)), _disc(radius))
    return np.asarray(opened[2 * radius : -2 * radius, 2 * radius : -2 * radius])


def _disc(radius: int) -> Mask:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(x * x + y * y <= radius * radius + radius / 2)


def _echoes(solid: Mask, textured: Reals, moving: Mask | None) -> Mask | None:
    """The largest textured area, and others above or below it that are about as wide.

    In a clip what moves counts most; fluid may part one sector into two areas.
    """
    labels, count = ndimage.label(solid)
    if not count:
        return None
    numbers = np.arange(1, count + 1)
    size = ndimage.sum_labels(solid, labels, numbers)
    rough = ndimage.mean(textured, labels, numbers) >= ROUGH_SHARE
    lively = np.zeros(count)
    score = size * rough
    if moving is not None:
        lively = ndimage.mean(moving, labels, numbers)
        score = score * (lively + 0.02)
    best = int(np.argmax(score))
    if score[best] <= 0:
        return None
    columns = [place[1] for place in ndimage.find_objects(labels)]
    chosen = [
        index + 1
        for index in range(count)
        if score[index] >= 0.02 * score[best]
        and _stacked(columns[index], columns[best], moves=bool(lively[index] > 0.5))
    ]
    return np.asarray(np.isin(labels, chosen))


def _stacked(columns: slice, others: slice, *, moves: bool) -> bool:
    """Whether columns lie within the others and, unless they move, span at least half of them."""
    width = columns.stop - columns.start
    common = min(columns.stop, others.stop) - max(columns.start, others.start)
    wide = moves or width >= 0.5 * (others.stop - others.start)
    return bool(common >= 0.9 * width and wide)


def _outline(hull: Mask, echoes: Mask) -> Mask:
    """The sector's shape: a rectangle, or the convex hull below a curved probe's face."""
    rows, columns = np.flatnonzero(hull.any(1)), np.flatnonzero(hull.any(0))
    box = np.zeros_like(hull)
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    if hull.sum() >= RECTANGLE_SHARE * box.sum():
        return box
    # The first echo of every column, freed of single outliers, where the hull's edge is level.
    face = np.where(echoes.any(0), echoes.argmax(0), 0)
    smooth = ndimage.median_filter(face, max(3, len(columns) // 16), mode="nearest")
    first = np.where(hull.any(0), hull.argmax(0), 0)
    level = np.abs(np.gradient(first.astype(float))) < FACE_SLOPE
    cut = np.clip(np.minimum(smooth, face), first, first + round(0.15 * len(rows)))
    limit = np.where(level, cut, first)
    return np.asarray(hull & (np.arange(len(hull))[:, None] >= limit))


def _hull(main: Mask) -> Mask:
    y, x = np.nonzero(main & ~ndimage.binary_erosion(main))
    corners = [np.stack([x + a, y + b], axis=1) for a in (-0.5, 0.5) for b in (-0.5, 0.5)]
    try:
        sides = ConvexHull(np.concatenate(corners)).equations
    except QhullError:
        return main
    rows, columns = np.mgrid[: main.shape[0], : main.shape[1]]
    inside = np.ones(main.shape, dtype=bool)
    for a, b, c in sides:
        inside &= a * columns + b * rows + c <= 1e-6
    return inside


def _stray_cells(samples: Frames, active: Reals, cell: int) -> Mask:
    """Cells that hold bright strokes."""
    bright = _cells(samples.max(axis=0) >= STRAY_LEVEL, cell)
    return np.asarray((bright > 0) & (active > STRAY_SHARE))


def _without_strays(found: Mask, echoes: Mask, strays: Mask) -> Mask:
    """Cut out bright pieces near the edge that hang together with no echo: glyphs, ticks, marks."""
    rim = max(2, round(BORDER_SHARE * min(np.ptp(np.nonzero(found), axis=1) + 1)))
    inner = ndimage.binary_erosion(np.pad(found, 1), iterations=rim)[1:-1, 1:-1]
    loose = found & ~inner & strays & ~ndimage.binary_dilation(echoes, iterations=2)
    # The rest of a word that begins at the edge goes with it.
    words = ndimage.binary_dilation(found & strays & ~echoes, iterations=2)
    cut = ndimage.binary_propagation(
        ndimage.binary_dilation(loose, iterations=2), mask=words | loose
    )
    labels, count = ndimage.label(found & ~cut)
    sizes = ndimage.sum_labels(labels > 0, labels, np.arange(1, count + 1))
    kept = ndimage.binary_fill_holes(labels == int(np.argmax(sizes)) + 1)
    return np.asarray(kept & ~cut)

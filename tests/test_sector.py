"""The sector: everything of the tissue, nothing of the text, or a refusal."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from agssd_core.data.sector import find_sector
from agssd_core.errors import ClipError
from tests.support.us_screens import SHAPE, cine, fan, rectangle, screen, write_text

SHAPES = {
    "curved": fan(),
    "phased": fan(face=1, angle=42),
    "wide": fan(face=120, depth=150, angle=30),
    "linear": rectangle(),
}


def _jpeg(frame, quality=80):
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, format="JPEG", quality=quality)
    return np.array(Image.open(stream))


def _agreement(found, inside):
    return (found & inside).sum() / (found | inside).sum()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("background", [0, 56, 255])
@pytest.mark.parametrize("lossy", [False, True], ids=["png", "jpeg"])
def test_the_sector_is_found_and_holds_no_text(name, background, lossy):
    inside = SHAPES[name]
    frame = screen(inside, background=background)
    found = find_sector((_jpeg(frame) if lossy else frame)[None])
    assert _agreement(found, inside) > 0.93
    # Compression blurs an edge over a few pixels.
    near = ndimage.binary_dilation(inside, iterations=5 if lossy else 1)
    assert not (found & ~near).any()


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_one_piece_without_holes(name):
    found = find_sector(screen(SHAPES[name])[None])
    assert ndimage.label(found)[1] == 1
    assert (ndimage.binary_fill_holes(found) == found).all()


def test_a_noisy_or_shaded_screen_is_no_echo():
    inside = SHAPES["linear"]
    noisy = screen(inside).astype(int) + np.random.default_rng(0).integers(0, 4, SHAPE)
    shaded = np.broadcast_to(np.linspace(30, 90, SHAPE[0])[:, None], SHAPE).astype(np.uint8)
    shaded = write_text(np.where(inside, screen(inside, text=False), shaded))
    for frame in (np.clip(noisy, 0, 255).astype(np.uint8), shaded):
        found = find_sector(frame[None])
        assert _agreement(found, inside) > 0.93
        assert not (found & ~inside).any()


def test_fluid_inside_stays_and_the_curved_face_is_cut():
    inside = SHAPES["wide"]
    frame = screen(inside)
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    frame[np.hypot(rows - 120, columns - 160) < 30] = 0
    pen = Image.fromarray(frame)
    # A name in the hollow above the face, between its corners.
    ImageDraw.Draw(pen).text((143, 20), "ANNA", font=ImageFont.load_default(8), fill=230)
    found = find_sector(np.array(pen)[None])
    assert _agreement(found, inside) > 0.93
    assert not (found & ~ndimage.binary_dilation(inside, iterations=3)).any()


def test_two_areas_that_fluid_parts_are_one_sector():
    inside = SHAPES["linear"]
    frame = screen(inside)
    frame[90:150] = np.where(inside[90:150], 0, frame[90:150])
    assert _agreement(find_sector(frame[None]), inside) > 0.93


def test_text_in_a_dark_corner_of_the_sector_is_cut_out():
    inside = SHAPES["linear"]
    frame = screen(inside)
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    # Shadow: a bay of the echoes that their hull spans.
    frame[(np.abs(rows - 130) < 60) & (columns < 150)] = 0
    pen = Image.new("L", SHAPE[::-1])
    ImageDraw.Draw(pen).text((92, 124), "ANNA", font=ImageFont.load_default(10), fill=230)
    written = np.array(pen)
    found = find_sector(np.maximum(frame, written)[None])
    assert found[110, 140]
    assert not (found & (written >= 100)).any()


def test_a_colour_bar_at_the_edge_is_cut_off():
    inside = SHAPES["linear"]
    frame = screen(inside)
    coloured = np.zeros(SHAPE, dtype=bool)
    coloured[60:160, 230:246] = True
    frame[coloured] = np.random.default_rng(1).integers(60, 200, coloured.sum())
    assert (find_sector(frame[None]) & coloured).any()
    found = find_sector(frame[None], coloured[None])
    assert not (found & coloured).any()
    assert _agreement(found, inside) > 0.9


def test_in_a_clip_what_moves_counts_not_the_larger_picture():
    inside = np.zeros(SHAPE, dtype=bool)
    inside[60:180, 190:300] = True
    frames = cine(inside, 5, text=False)
    still = np.random.default_rng(7).integers(20, 200, (150, 160), dtype=np.uint8)
    frames[:, 50:200, 10:170] = still
    found = find_sector(frames)
    assert not (found[:, :172]).any()
    assert _agreement(found, inside) > 0.9
    assert find_sector(frames[:1])[100, 100]


def test_a_cropped_image_is_all_sector():
    tissue = screen(np.ones(SHAPE, dtype=bool), text=False)
    assert find_sector(tissue[None]).all()


def _page(fill, ground):
    page = Image.new("L", (800, 600), ground)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for row in range(10, 590, 16):
        pen.text((10, row), "Report of all findings, Mueller Anna: liver normal. " * 2, fill, font)
    return np.array(page)


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros(SHAPE, dtype=np.uint8),
        np.full(SHAPE, 90, dtype=np.uint8),
        write_text(np.zeros(SHAPE, dtype=np.uint8)),
        _page(220, 0),
        _page(0, 255),
        _jpeg(_page(220, 0)),
        _jpeg(_page(0, 255)),
        screen(fan(depth=12)),
    ],
    ids=["black", "grey", "text", "page", "white page", "jpeg", "white jpeg", "in air"],
)
def test_without_echoes_there_is_no_sector(frame):
    with pytest.raises(ClipError, match="Leave the file out, or export the images"):
        find_sector(frame[None])

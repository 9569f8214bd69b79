"""What a scanner writes round the sector: a name, a date, settings, a grey and a colour bar."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_TEXT = (205, 210, 215)
_DIM = (150, 155, 160)


def draw_screen(
    canvas: tuple[int, int], *, name: str, model: str, depth_mm: float
) -> NDArray[np.uint8]:
    """Everything but the sector.

    Args:
        canvas: (rows, columns).
        name: made up; what blanking must remove.
        model: of the scanner.
        depth_mm: of view, for the ruler.

    Returns:
        (rows, columns, 3) uint8.
    """
    rows, columns = canvas
    image = Image.new("RGB", (columns, rows))
    pen = ImageDraw.Draw(image)
    small, usual = ImageFont.load_default(9), ImageFont.load_default(11)
    pen.text((4, 2), name.upper(), font=usual, fill=_TEXT)
    pen.text((4, 15), f"ID {_number(name):06d}", font=small, fill=_DIM)
    pen.text((columns - 96, 2), "2024-01-02 12:00", font=small, fill=_TEXT)
    pen.text((columns - 96, 14), model, font=small, fill=_DIM)
    pen.text((4, rows - 14), "MI 0.9  TIS 0.4", font=small, fill=_DIM)
    pen.text((columns - 84, rows - 14), f"{depth_mm / 10:.1f} cm  42 Hz", font=small, fill=_DIM)
    _grey_bar(pen, (8, rows // 4), rows // 3)
    _colour_bar(pen, (columns - 14, rows // 4), rows // 3)
    _ruler(pen, columns - 34, rows, int(depth_mm // 10))
    return np.asarray(image)


def _number(name: str) -> int:
    """A number that looks like an identifier and follows from the name."""
    return sum((place + 1) * ord(letter) * 37 for place, letter in enumerate(name)) % 1_000_000


def _grey_bar(pen: ImageDraw.ImageDraw, corner: tuple[int, int], height: int) -> None:
    for row in range(height):
        grey = 255 - round(255 * row / max(height - 1, 1))
        pen.line([(corner[0], corner[1] + row), (corner[0] + 8, corner[1] + row)], fill=(grey,) * 3)


def _colour_bar(pen: ImageDraw.ImageDraw, corner: tuple[int, int], height: int) -> None:
    for row in range(height):
        share = row / max(height - 1, 1)
        colour = (
            (255, round(200 * (1 - 2 * share)), 0)
            if share < 0.5
            else (0, round(200 * (2 * share - 1)), 255)
        )
        pen.line([(corner[0], corner[1] + row), (corner[0] + 8, corner[1] + row)], fill=colour)


def _ruler(pen: ImageDraw.ImageDraw, column: int, rows: int, centimetres: int) -> None:
    first, last = 30, rows - 22
    for mark in range(centimetres + 1):
        row = round(first + (last - first) * mark / max(centimetres, 1))
        pen.line([(column, row), (column + (7 if mark % 5 == 0 else 4), row)], fill=_TEXT)

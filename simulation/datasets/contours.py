"""LIDC-IDRI's readings: outlines that up to four readers drew around nodules on CT slices.

An XML file holds one ``readingSession`` a reader. A nodule of at least 3 mm is outlined slice by
slice (``roi`` with an ``edgeMap`` of column and row for each pixel, counted from 0); smaller ones
and non-nodules are single points. A slice is named by ``imageSOP_UID``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray
from skimage import draw

from agssd_core.data.deidentify import Pseudonymiser
from agssd_core.data.label_volume import canonical_grid
from agssd_core.data.series import StoredFile, stack_affine
from agssd_core.errors import DataError

MAX_XML_BYTES = 64 << 20
MIN_OUTLINE = 3
_draw: Any = draw


def parse_reading(path: Path) -> ET.Element:
    """An XML file without definitions of its own.

    Raises:
        DataError: it is damaged, absurdly large, or defines entities.
    """
    content = path.read_bytes() if path.stat().st_size <= MAX_XML_BYTES else b""
    # A zero byte would hide the words below in another encoding.
    if not content or any(each in content for each in (b"<!DOCTYPE", b"<!ENTITY", b"\0")):
        raise DataError(
            "a reading is no plain XML: empty, too large, or with definitions of its own, which "
            "could fill the memory. Download it again, or leave it out."
        )
    try:
        return ET.fromstring(content)  # noqa: S314 - no entity can be defined without the above
    except ET.ParseError:
        raise DataError("a reading is damaged XML. Download it again, or leave it out.") from None


def text_of(element: ET.Element, tag: str) -> str:
    """Stripped text of the first descendant of this name in any name space; empty if none."""
    found = element.find(f".//{{*}}{tag}")
    return (found.text or "").strip() if found is not None else ""


def outlined_nodules(reading: ET.Element) -> list[list[ET.Element]]:
    """For each reader the nodules that they outlined (more than a point)."""
    readers = []
    for session in reading.findall(".//{*}readingSession"):
        nodules = session.findall("{*}unblindedReadNodule")
        readers.append([each for each in nodules if any(_outlines(each))])
    return readers


def read_contours(
    path: Path, files: Sequence[StoredFile], names: Pseudonymiser
) -> NDArray[np.uint8]:
    """Where more than half of the readers saw a nodule.

    The outline itself is the first pixel outside a nodule, so it does not count; outlines of
    exclusion cut holes.

    Args:
        path: XML file of the series.
        files: the series' slices.
        names: whose pseudonyms ``files`` bear.

    Returns:
        (D, H, W) uint8 of 0 and 1 in RAS order.

    Raises:
        DataError: the file is damaged, or most of its outlines lie on slices that are missing.
    """
    readers = outlined_nodules(parse_reading(path))
    affine, order = stack_affine(file.header for file in files)
    levels = {files[file].header.instance: level for level, (file, _) in enumerate(order)}
    header = files[0].header
    votes = np.zeros((header.columns, header.rows, len(order)), dtype=np.uint8)
    drawn = 0
    for nodules in readers:
        seen = np.zeros(votes.shape, dtype=bool)
        for nodule in nodules:
            drawn += _draw_nodule(seen, nodule, levels, names)
        votes += seen
    if not drawn and any(readers):
        raise DataError(
            "the reading's outlines lie on no slice of the series: it belongs to another series. "
            "Download both again, or leave the scan out."
        )
    majority = (votes * 2 > len(readers)).astype(np.uint8)
    return canonical_grid(majority, affine)[0]


def _draw_nodule(
    seen: NDArray[np.bool_], nodule: ET.Element, levels: dict[str, int], names: Pseudonymiser
) -> int:
    """Fill a nodule's outlines on the slices that there are; returns how many were filled."""
    inside = np.zeros_like(seen)
    holes = np.zeros_like(seen)
    count = 0
    for roi, points in _outlines(nodule):
        level = levels.get(names.key("instance", text_of(roi, "imageSOP_UID")))
        if level is None:
            continue
        excluded = text_of(roi, "inclusion").upper() == "FALSE"
        plane = (holes if excluded else inside)[:, :, level]
        plane |= _interior(points, plane.shape)
        count += 1
    seen |= inside & ~holes
    return count


def _outlines(nodule: ET.Element) -> Iterator[tuple[ET.Element, NDArray[np.intp]]]:
    for roi in nodule.iterfind("{*}roi"):
        edges = roi.findall("{*}edgeMap")
        if len(edges) < MIN_OUTLINE:
            continue
        try:
            points = [
                (int(text_of(each, "xCoord")), int(text_of(each, "yCoord"))) for each in edges
            ]
        except ValueError:
            raise DataError("an outline has points that are no numbers. Leave it out.") from None
        yield roi, np.array(points, dtype=np.intp)


def _interior(points: NDArray[np.intp], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pixels (column, row) within a closed outline, without the outline."""
    filled = np.zeros(shape, dtype=bool)
    filled[_draw.polygon(points[:, 0], points[:, 1], shape)] = True
    edge = _draw.polygon_perimeter(points[:, 0], points[:, 1], shape=shape, clip=True)
    filled[edge] = False
    return filled

"""Stills of ultrasound and the sheets that describe them, as their adapters look for them."""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agssd_core.data.clips import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from agssd_core.data.quiet import quiet_readers
from agssd_core.errors import DataError
from simulation.datasets.rows import Mask, Source, SourceKind
from simulation.datasets.tables import below, visible

JPEG_THRESHOLD = 127.0
MAX_SHEET_BYTES = 32 << 20
MAX_SHEET_ROWS = 100_000


def pictures(folder: Path) -> list[Path]:
    """Images of a folder by name, hidden files left out; none where there is no such folder."""
    return [path for path in visible(folder) if path.suffix.casefold() in IMAGE_SUFFIXES]


def pictures_by_stem(folder: Path) -> dict[str, Path]:
    """Images of a folder by their names without suffix."""
    return {path.stem: path for path in pictures(folder)}


def recording_kind(path: Path) -> SourceKind | None:
    """Whether a file is an image or a video by its name; None for neither."""
    suffix = path.suffix.casefold()
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix in IMAGE_SUFFIXES else None


def folder_with(root: Path, names: Iterable[str], *, depth: int = 2) -> Path | None:
    """The nearest folder, ``root`` first, that holds all these names; case does not matter."""
    wanted = {name.casefold() for name in names}
    level = [root]
    for _ in range(depth + 1):
        for folder in level:
            if wanted <= {entry.name.casefold() for entry in visible(folder)}:
                return folder
        level = [entry for folder in level for entry in visible(folder) if entry.is_dir()]
    return None


def entry_named(folder: Path, name: str) -> Path:
    """An entry of a folder whatever its case; the plain path where there is none."""
    for entry in visible(folder):
        if entry.name.casefold() == name.casefold():
            return entry
    return folder / name


def image_mask(root: Path, file: Path, value: int) -> Mask:
    """The mask in an image file; compression blurs the edges of JPEG, so its middle counts."""
    threshold = JPEG_THRESHOLD if file.suffix.casefold() in (".jpg", ".jpeg") else 0.0
    return Mask(Source(below(root, file), "image"), value, threshold)


def number_of(text: str) -> int | None:
    """The last number in a text, such as 12 in ``000012.png`` or ``case 12``; None without."""
    found = re.findall(r"\d+", re.sub(r"\.\w{3,4}$|\.0+$", "", text.strip()))
    return int(found[-1]) if found else None


def research_package(name: str, what: str) -> Any:
    """Import a package that only who reads public data sets needs.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"{name} is not installed, so {what} cannot be read. Install the extra `research`: pip "
            "install 'agssd-federation[research]'."
        ) from None


def read_sheet(file: Path) -> list[list[str]]:
    """Cells of the first sheet of an .xlsx file as text, empty lines left out.

    Raises:
        DataError: it is no such file, or far too large.
    """
    openpyxl = research_package("openpyxl", "sheets (.xlsx)")
    with quiet_readers():
        try:
            if file.stat().st_size > MAX_SHEET_BYTES:
                raise ValueError
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            try:
                cells = book.worksheets[0].iter_rows(max_row=MAX_SHEET_ROWS, values_only=True)
                rows = [
                    ["" if cell is None else str(cell).strip() for cell in row] for row in cells
                ]
            finally:
                book.close()
        except Exception as error:  # noqa: BLE001 - a damaged sheet may break the reader anywhere
            raise DataError(
                f"a sheet of the data set is no readable .xlsx ({type(error).__name__}): damaged, "
                f"or above {MAX_SHEET_BYTES >> 20} MB. Download it again."
            ) from None
    return [row for row in rows if any(row)]


def _text(cell: object) -> str:
    return "" if cell is None else str(cell).strip()

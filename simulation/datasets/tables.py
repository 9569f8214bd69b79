"""Files that describe a data set: tables, listings, and a tally of what was left out."""

import csv
import re
from collections import Counter
from pathlib import Path

from agssd_core.errors import DataError

Table = list[dict[str, str]]
# Words that mean an empty cell.
_NOTHING = frozenset({"", "na", "n/a", "nan", "none", "null", "?"})


class Tally:
    """Counts reasons; one line each in ``lines``, in the order of first use."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, reason: str, count: int = 1) -> None:
        """Count a reason; it names no patient."""
        if count:
            self._counts[reason] += count

    @property
    def lines(self) -> tuple[str, ...]:
        """Such as ``3 scan(s) without outlines``, where the reason says what is counted."""
        return tuple(f"{count} {reason}" for reason, count in self._counts.items())


def read_table(file: Path) -> Table:
    """Rows of a CSV file with a header line; commas, semicolons or tabs between the cells.

    Blanks round names and cells are dropped, and so are lines with nothing in them. A short line
    has empty cells at its end.

    Raises:
        DataError: it cannot be read as a table.
    """
    try:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            header = stream.readline()
            stream.seek(0)
            mark = max(",;\t", key=header.count)
            lines = list(csv.reader(stream, delimiter=mark))
    except (OSError, csv.Error) as error:
        raise DataError(
            f"a table of the data set cannot be read ({type(error).__name__}). Unpack it again, or "
            "save it as CSV in UTF-8."
        ) from None
    names = [name.strip() for name in lines[0]] if lines else []
    rows = []
    for line in lines[1:]:
        cells = [cell.strip() for cell in line] + [""] * (len(names) - len(line))
        if any(cells):
            rows.append(dict(zip(names, cells, strict=False)))
    return rows


def said(cell: str) -> str:
    """A cell's text, empty where it stands for a missing value."""
    return "" if cell.strip().casefold() in _NOTHING else cell.strip()


def number_text(cell: str) -> str:
    """A whole number without its point (``1.0`` -> ``1``), any other text as it is."""
    text = said(cell)
    return text.split(".")[0] if re.fullmatch(r"-?\d+\.0*", text) else text


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, in the order of names, without the hidden files of archives.

    A folder that is missing or may not be opened holds nothing.
    """
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []


def folders_named(root: Path, pattern: str, *, depth: int) -> list[Path]:
    """Folders whose whole name fits a pattern, at most ``depth`` levels below ``root``.

    What lies in a folder that fits is not searched.
    """
    found, level = [], [root]
    for _ in range(depth):
        below = [entry for folder in level for entry in visible(folder) if entry.is_dir()]
        found += [entry for entry in below if re.fullmatch(pattern, entry.name)]
        level = [entry for entry in below if not re.fullmatch(pattern, entry.name)]
    return found


def below(root: Path, file: Path) -> str:
    """The path of a file below the root, with ``/``."""
    return file.relative_to(root).as_posix()


def scan_name(text: str) -> str:
    """Text as a scan's name: letters, digits and ``._-``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_.") or "scan"


def nifti_file(folder: Path, stem: str) -> Path | None:
    """The file ``stem.nii.gz`` or ``stem.nii`` of a folder.

    Some copies of the BraTS data hold a folder of that name around the file; it is looked into.
    """
    for suffix in (".nii.gz", ".nii"):
        file = folder / f"{stem}{suffix}"
        if file.is_file():
            return file
        inner = [entry for entry in visible(file) if entry.name.endswith((".nii", ".nii.gz"))]
        if len(inner) == 1:
            return inner[0]
    return None

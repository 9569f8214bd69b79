"""HMC-QU: echocardiography of one hospital with infarctions, and outlines of some clips.

Names of folders, sheets, their columns and the array ``predicted`` of the masks (frames first, of
the one heart beat from ``Reference Frame`` on, squeezed to 224 x 224) are verified by published
loaders; the words in the sheets' cells are from memory. The clip's name up to the first blank or
``_`` is the person; the views ``A4C`` and ``A2C`` share people.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from agssd_core.errors import DataError
from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Mask,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below, folders_named, scan_name, visible
from simulation.datasets.us_files import read_sheet, recording_kind

VIEWS = ("A4C", "A2C")
CLASSES = ("MI", "non-MI")
INFO = DatasetInfo(
    name="hmc-qu",
    title="HMC-QU",
    modalities=("US",),
    size="322 clips (162 A4C, 160 A2C), 109 with outlines, 1 GB",
    licence="as the Kaggle page says; registration there",
    url="https://www.kaggle.com/datasets/aysendegerli/hmcqu-dataset",
    site="one hospital (Hamad); Philips and GE, not told apart",
    site_verified=True,
    layout=(
        "HMC-QU/A4C/NAME.avi, HMC-QU/A2C/NAME.avi, A4C.xlsx, A2C.xlsx",
        "LV Ground-truth Segmentation Masks/Mask_NAME.mat (array predicted)",
    ),
    citation="Degerli et al. 2024, Biomedical Signal Processing and Control 87",
    structures={1: "left ventricular wall"},
    labels={"infarction": CLASSES},
)
MASK_KEY = "predicted"
_YES, _NO = ("mi", "1", "1.0", "yes", "true"), ("non-mi", "non mi", "0", "0.0", "no", "false")


@dataclass(frozen=True)
class _Line:
    """What a sheet says of a clip: infarction, and the first frame of the beat, counted from 1."""

    infarction: str = ""
    first: int | None = None
    facts: dict[str, str] = field(default_factory=dict)


def read(root: Path) -> DatasetRows:
    """Every clip of both views.

    Raises:
        DataError: no folder of a view with clips.
    """
    tally = Tally()
    masks = {
        file.stem.removeprefix("Mask_").strip().casefold(): file
        for folder in folders_named(root, r"(?i).*segmentation masks.*", depth=3)
        for file in sorted(folder.rglob("Mask_*.mat"))
    }
    rows: list[Row] = []
    for view in VIEWS:
        lines = _sheet(root, view, tally)
        clips = [
            file
            for folder in folders_named(root, view, depth=3)
            for file in visible(folder)
            if recording_kind(file) == "video"
        ]
        rows += [_row(root, file, view, lines, masks, tally) for file in clips]
    if not rows:
        raise wrong_layout(INFO, "no clip such as HMC-QU/A4C/NAME.avi")
    return sorted_rows(rows, tally.lines)


def _row(
    root: Path,
    file: Path,
    view: str,
    lines: dict[str, _Line],
    masks: dict[str, Path],
    tally: Tally,
) -> Row:
    name = file.stem.strip().casefold()
    line = lines.get(name, _Line())
    if not line.infarction:
        tally.add("clip(s) that no sheet calls MI or non-MI")
    outlines: tuple[Mask, ...] = ()
    if name in masks and view == "A4C":
        if line.first is None:
            # Outlines over the wrong beat are worse than none.
            tally.add("clip(s) without outlines: the sheet names no first frame of theirs")
        else:
            source = Source(below(root, masks[name]), "mat", index=line.first - 1, key=MASK_KEY)
            outlines = (Mask(source, 1),)
    return Row(
        scan=scan_name(f"{view}-{file.stem}"),
        patient=re.split(r"[_\s]", file.stem.strip())[0],
        modality="US",
        source=Source(below(root, file), "video"),
        sequence=view,
        labels={"infarction": line.infarction} if line.infarction else {},
        masks=outlines,
        facts=line.facts,
    )


def _sheet(root: Path, view: str, tally: Tally) -> dict[str, _Line]:
    """Lines of a view's sheet by the clip's name."""
    places = [root, *(entry for entry in visible(root) if entry.is_dir())]
    files = [place / f"{view}.xlsx" for place in places if (place / f"{view}.xlsx").is_file()]
    if not files:
        tally.add(f"sheet missing: {view}.xlsx")
        return {}
    try:
        table = read_sheet(files[0])
    except DataError:
        tally.add(f"sheet unreadable: {view}.xlsx")
        return {}
    names = _names(table)
    if "echo" not in names:
        tally.add(f"sheet without a column ECHO: {view}.xlsx")
        return {}
    clip = names.index("echo")
    lines = {}
    for cells in table:
        if len(cells) > clip and cells[clip] and cells[clip].casefold() != "echo":
            stem = re.sub(r"\.avi$", "", cells[clip], flags=re.IGNORECASE)
            lines[stem.strip().casefold()] = _line(dict(zip(names, cells, strict=False)))
    return lines


def _names(table: list[list[str]]) -> list[str]:
    """Names of the columns in small letters; none where no line holds ECHO."""
    for cells in table:
        names = [" ".join(cell.casefold().split()) for cell in cells]
        if "echo" in names:
            return names
    return []


def _line(cells: dict[str, str]) -> _Line:
    flags = {
        name: cell.casefold() for name, cell in cells.items() if re.fullmatch(r"seg ?\d", name)
    }
    known = {name: flag in _YES for name, flag in flags.items() if flag in (*_YES, *_NO)}
    infarction = ""
    if any(known.values()):
        infarction = CLASSES[0]
    elif known and len(known) == len(flags):
        infarction = CLASSES[1]
    first = next((cell for name, cell in cells.items() if _is_first(name)), "")
    number = int(float(first)) if re.fullmatch(r"\d+(\.0*)?", first) else 0
    facts = {name.replace(" ", ""): CLASSES[not hurt] for name, hurt in known.items()}
    return _Line(infarction, number or None, facts)


def _is_first(name: str) -> bool:
    # One heading stands over both the first and the last frame in some copies.
    return "reference" in name or name == "one cardiac-cycle frames"


ADAPTER = Adapter(INFO, read)

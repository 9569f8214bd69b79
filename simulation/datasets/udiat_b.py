"""UDIAT-B (data set B of Yap et al.): breast ultrasound of one centre with outlines of lesions.

The folders, the sheet's name and its column ``Type`` are verified by published loaders; the sheet's
other columns are from memory: images are matched by the column whose name speaks of images or
numbers, or by the first one. The data set numbers images, not people.
"""

from pathlib import Path

from agssd_core.errors import DataError
from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below, scan_name, visible
from simulation.datasets.us_files import (
    entry_named,
    folder_with,
    image_mask,
    number_of,
    pictures,
    pictures_by_stem,
    read_sheet,
)

CLASSES = ("benign", "malignant")
INFO = DatasetInfo(
    name="udiat-b",
    title="UDIAT-B (data set B of Yap et al.)",
    modalities=("US",),
    size="163 images (109 benign, 54 malignant), 30 MB",
    licence="by a signed agreement with the authors; not to be passed on",
    url="https://helward.mmu.ac.uk/STAFF/M.Yap/dataset.php",
    site="one hospital (Parc Tauli, Siemens ACUSON Sequoia C512)",
    site_verified=True,
    layout=(
        "BUS/original/000001.png, BUS/GT/000001.png, BUS/DatasetB.xlsx (column Type); or all of "
        "these here",
    ),
    citation="Yap et al. 2018, IEEE JBHI 22(4)",
    structures={1: "lesion"},
    labels={"pathology": CLASSES},
)


def read(root: Path) -> DatasetRows:
    """Every image.

    Raises:
        DataError: no folder of images.
    """
    top = folder_with(root, ("original", "GT"))
    if top is None:
        raise wrong_layout(INFO, "no folder with original and GT in it")
    tally = Tally()
    masks = pictures_by_stem(entry_named(top, "GT"))
    types = _types(top, tally)
    rows = []
    for file in pictures(entry_named(top, "original")):
        pathology = types.get(number_of(file.name))
        if file.stem not in masks:
            tally.add("image(s) without outlines")
        if pathology is None:
            tally.add("image(s) without a pathology")
        rows.append(
            Row(
                scan=scan_name(file.stem),
                patient=scan_name(file.stem),
                modality="US",
                source=Source(below(root, file), "image"),
                vendor="Siemens",
                labels={"pathology": pathology} if pathology else {},
                masks=(image_mask(root, masks[file.stem], 1),) if file.stem in masks else (),
            )
        )
    if not rows:
        raise wrong_layout(INFO, "no image such as original/000001.png")
    tally.add("image(s) counted as a patient each: the data set numbers no people", len(rows))
    return sorted_rows(rows, tally.lines)


def _types(top: Path, tally: Tally) -> dict[int | None, str]:
    """Pathology by the image's number."""
    sheets = [
        file for folder in (top, top.parent) for file in visible(folder) if file.suffix == ".xlsx"
    ]
    if not sheets:
        tally.add("sheet missing: DatasetB.xlsx")
        return {}
    try:
        lines = read_sheet(sheets[0])
    except DataError:
        tally.add("sheet unreadable: DatasetB.xlsx")
        return {}
    heads = [number for number, line in enumerate(lines) if "type" in _folded(line)]
    if not heads:
        tally.add("sheet without a column Type: DatasetB.xlsx")
        return {}
    names = _folded(lines[heads[0]])
    image = next(
        (i for i, name in enumerate(names) if any(word in name for word in ("image", "num", "id"))),
        0,
    )
    types: dict[int | None, str] = {}
    for line in lines[heads[0] + 1 :]:
        cells = line + [""] * (len(names) - len(line))
        kind, number = cells[names.index("type")].casefold(), number_of(cells[image])
        if kind in CLASSES and number is not None:
            types[number] = kind
    return types


def _folded(line: list[str]) -> list[str]:
    return [cell.casefold() for cell in line]


ADAPTER = Adapter(INFO, read)

"""DDTI: thyroid ultrasound with outlines of nodules, in both layouts that are about.

The original (``1.xml`` with polygons for ``1_1.jpg``, ``1_2.jpg``) has a file a case, its tags and
polygons verified by published loaders; a case is taken for a person. TI-RADS grades below 4 are
benign, as users of the data set count; an empty grade occurs and gives no label. The repackaged
one (``1_or_data``, verified) has masks as PNG, ``category.csv`` whose columns are from memory, and
numbers no people.
"""

import re
from pathlib import Path

from agssd_core.errors import DataError
from simulation.datasets.polygons import Polygon, read_polygons
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
from simulation.datasets.tables import Tally, below, read_table, scan_name, visible
from simulation.datasets.us_files import (
    entry_named,
    folder_with,
    image_mask,
    number_of,
    pictures,
    pictures_by_stem,
)

GRADES = ("1", "2", "3", "4a", "4b", "4c", "5")
CLASSES = ("benign", "malignant")
REPACKAGED = "1_or_data"
INFO = DatasetInfo(
    name="ddti",
    title="DDTI",
    modalities=("US",),
    size="480 images of 390 cases (original) or 637 images (repackaged), 0.1 GB",
    licence="open access with citation; none formal",
    url="http://cimalab.unal.edu.co/applications/thyroid/",
    site="one hospital (IDIME, Bogota)",
    site_verified=False,
    layout=(
        "original: 1.xml (tirads, mark, image, svg) and 1_1.jpg, 1_2.jpg in one folder",
        f"repackaged: {REPACKAGED}/image/0000.PNG, {REPACKAGED}/mask/0000.PNG, "
        f"{REPACKAGED}/category.csv",
    ),
    citation="Pedraza et al. 2015, Proc. SPIE 9287",
    structures={1: "nodule"},
    labels={"tirads": GRADES, "pathology": CLASSES},
)
_IMAGE = re.compile(r"(?P<case>\d+)_(?P<number>\d+)")


def read(root: Path) -> DatasetRows:
    """Every image of the layout that is found, the original first.

    Raises:
        DataError: neither layout.
    """
    tally = Tally()
    rows = _original(root, tally)
    if not rows:
        top = folder_with(root, ("image", "mask"))
        rows = _repackaged(root, top, tally) if top is not None else []
    if not rows:
        raise wrong_layout(INFO, f"neither 1.xml with 1_1.jpg, nor {REPACKAGED}/image/0000.PNG")
    return sorted_rows(rows, tally.lines)


def _original(root: Path, tally: Tally) -> list[Row]:
    folders = [root, *(entry for entry in visible(root) if entry.is_dir())]
    rows: dict[str, Row] = {}
    for folder in folders:
        cases = {file.stem: file for file in visible(folder) if file.suffix.lower() == ".xml"}
        images: dict[str, list[tuple[str, Path]]] = {}
        for file in pictures(folder):
            named = _IMAGE.fullmatch(file.stem)
            if named and cases:
                images.setdefault(named["case"], []).append((named["number"], file))
        tally.add("case(s) without an image", len(set(cases) - set(images)))
        for case, numbered in images.items():
            for row in _case(root, case, cases.get(case), numbered, tally):
                rows.setdefault(row.scan, row)
    return list(rows.values())


def _case(
    root: Path, case: str, file: Path | None, images: list[tuple[str, Path]], tally: Tally
) -> list[Row]:
    grade, outlines = _reading(file, tally)
    labels = _labels(grade)
    if not labels:
        tally.add("image(s) without a TI-RADS grade", len(images))
    rows = []
    for number, image in images:
        masks: tuple[Mask, ...] = ()
        if file is not None and outlines.get(number):
            masks = (Mask(Source(below(root, file), "polygons", key=number), 1),)
        else:
            tally.add("image(s) without outlines")
        rows.append(
            Row(
                scan=scan_name(image.stem),
                patient=case,
                modality="US",
                source=Source(below(root, image), "image"),
                labels=labels,
                masks=masks,
                facts={"nodules": str(len(outlines.get(number, ())))},
            )
        )
    return rows


def _reading(file: Path | None, tally: Tally) -> tuple[str, dict[str, list[Polygon]]]:
    if file is None:
        tally.add("case(s) without a file of outlines")
        return "", {}
    try:
        return read_polygons(file)
    except DataError:
        tally.add("case(s) with a damaged file of outlines")
        return "", {}


def _labels(grade: str) -> dict[str, str]:
    grade = grade.strip().casefold()
    if grade not in GRADES:
        return {}
    return {"tirads": grade, "pathology": CLASSES[grade[0] in "45"]}


def _repackaged(root: Path, top: Path, tally: Tally) -> list[Row]:
    masks = pictures_by_stem(entry_named(top, "mask"))
    classes = _categories(top, tally)
    rows = []
    for file in pictures(entry_named(top, "image")):
        if file.stem not in masks:
            tally.add("image(s) without outlines")
        pathology = classes.get(number_of(file.name))
        rows.append(
            Row(
                scan=scan_name(file.stem),
                patient=scan_name(file.stem),
                modality="US",
                source=Source(below(root, file), "image"),
                labels={"pathology": pathology} if pathology else {},
                masks=(image_mask(root, masks[file.stem], 1),) if file.stem in masks else (),
            )
        )
    tally.add("image(s) counted as a patient each: this layout numbers no people", len(rows))
    return rows


def _categories(top: Path, tally: Tally) -> dict[int | None, str]:
    """Class by the image's number, from the first and the last column of ``category.csv``."""
    file = next(
        (f / "category.csv" for f in (top, top.parent) if (f / "category.csv").is_file()), None
    )
    if file is None:
        tally.add("table missing: category.csv")
        return {}
    names = {"0": CLASSES[0], "1": CLASSES[1], CLASSES[0]: CLASSES[0], CLASSES[1]: CLASSES[1]}
    classes: dict[int | None, str] = {}
    for line in read_table(file):
        cells = list(line.values())
        name = names.get(cells[-1].casefold().removesuffix(".0"))
        if name and number_of(cells[0]) is not None:
            classes[number_of(cells[0])] = name
    if not classes:
        tally.add("table without classes that are known: category.csv")
    return classes


ADAPTER = Adapter(INFO, read)

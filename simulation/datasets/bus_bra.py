"""BUS-BRA: breast ultrasound of four scanners with outlines, biopsies and official folds.

The layout, columns and folds are verified (``kFold`` in ``5-fold-cv.csv`` and ``10-fold-cv.csv``).
A case is a person; the folds keep cases whole.
"""

from pathlib import Path

from agssd_core.data.deidentify import vendor_name
from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below, number_text, read_table, said, scan_name
from simulation.datasets.us_files import folder_with, image_mask, pictures_by_stem

CLASSES = ("benign", "malignant")
TABLE = "bus_data.csv"
INFO = DatasetInfo(
    name="bus-bra",
    title="BUS-BRA",
    modalities=("US",),
    size="1875 images of 1064 patients, 0.4 GB",
    licence="CC BY 4.0 as Zenodo says",
    url="https://zenodo.org/records/8231412",
    site="scanner (column Device, 4 of them)",
    site_verified=True,
    layout=(
        "BUSBRA/Images/bus_0001-l.png, BUSBRA/Masks/mask_0001-l.png",
        "BUSBRA/bus_data.csv (ID, Case, Pathology, BIRADS, Device, Side), BUSBRA/5-fold-cv.csv; "
        "or all of these here",
    ),
    citation="Gomez-Flores et al. 2024, Medical Physics 51(4)",
    structures={1: "lesion"},
    labels={"pathology": CLASSES, "birads": ("1", "2", "3", "4", "5")},
)
_FACTS = {"Histology": "histology", "Side": "side"}


def read(root: Path) -> DatasetRows:
    """Every image that the table names.

    Raises:
        DataError: no table or no folder of images.
    """
    top = folder_with(root, (TABLE, "Images"))
    if top is None:
        raise wrong_layout(INFO, f"no folder with {TABLE} and Images in it")
    tally = Tally()
    images, masks = pictures_by_stem(top / "Images"), pictures_by_stem(top / "Masks")
    folds = _folds(top, tally)
    rows: dict[str, Row] = {}
    for line in read_table(top / TABLE):
        name = line.get("ID", "").removesuffix(".png")
        if name in rows or name not in images:
            tally.add("line(s) of the table without an image of their own")
            continue
        mask = masks.get(name.replace("bus_", "mask_", 1))
        if mask is None:
            tally.add("image(s) without outlines")
        rows[name] = Row(
            scan=scan_name(name),
            patient=number_text(line.get("Case", "")) or name.rsplit("-", 1)[0],
            modality="US",
            source=Source(below(root, images[name]), "image"),
            site=said(line.get("Device", "")),
            vendor=_vendor(line.get("Device", "")),
            labels=_labels(line, tally),
            masks=(image_mask(root, mask, 1),) if mask else (),
            facts={**_facts(line), **folds.get(name, {})},
        )
    tally.add("image(s) that the table does not name", len(set(images) - set(rows)))
    if not rows:
        raise wrong_layout(INFO, f"no image in Images that {TABLE} names")
    tally.add("image(s) of an unknown scanner", sum(not row.site for row in rows.values()))
    return sorted_rows(list(rows.values()), tally.lines)


def _folds(top: Path, tally: Tally) -> dict[str, dict[str, str]]:
    """Facts ``fold_5`` and ``fold_10`` by the image's ID."""
    facts: dict[str, dict[str, str]] = {}
    for count in (5, 10):
        file = top / f"{count}-fold-cv.csv"
        if not file.is_file():
            tally.add("list(s) of folds missing")
            continue
        for line in read_table(file):
            fold = number_text(line.get("kFold", ""))
            if fold:
                name = line.get("ID", "").removesuffix(".png")
                facts.setdefault(name, {})[f"fold_{count}"] = fold
    return facts


def _labels(line: dict[str, str], tally: Tally) -> dict[str, str]:
    labels = {}
    pathology = line.get("Pathology", "").casefold()
    if pathology in CLASSES:
        labels["pathology"] = pathology
    else:
        tally.add("image(s) without a pathology")
    grade = number_text(line.get("BIRADS", ""))
    if grade in INFO.labels["birads"]:
        labels["birads"] = grade
    return labels


def _facts(line: dict[str, str]) -> dict[str, str]:
    return {
        name: said(line[column]) for column, name in _FACTS.items() if said(line.get(column, ""))
    }


def _vendor(device: str) -> str:
    found = vendor_name(device) if said(device) else "other"
    return "" if found == "other" else found


ADAPTER = Adapter(INFO, read)

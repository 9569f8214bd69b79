"""M&Ms: short-axis cine MR of the heart from five centres and four makers.

Folders, file names, the table's columns ``External code``, ``Vendor``, ``Centre``, ``ED``, ``ES``
and that phases count from 0 are verified in loaders; other columns and the values of the outlines
are from memory. Images and outlines are 4D; outlines are filled in at both phases only.
"""

from pathlib import Path

import nibabel as nib

from agssd_core.data.deidentify import vendor_name
from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Mask,
    OfficialSplit,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import (
    Tally,
    below,
    folders_named,
    nifti_file,
    number_text,
    read_table,
    said,
)

TABLE = "*Dataset_information_diagnosis_opendataset.csv"
VENDORS = {"A": "Siemens", "B": "Philips", "C": "GE", "D": "Canon"}
INFO = DatasetInfo(
    name="mnms",
    title="M&Ms",
    modalities=("MR",),
    size="345 patients, 2 outlined phases each, about 10 GB",
    licence="free for research after registration",
    url="https://www.ub.edu/mnms/",
    site="column Centre of the table, 1 to 5",
    site_verified=True,
    layout=(
        "Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz and A0S9V9_sa_gt.nii.gz; also "
        "Training/Unlabeled, Validation, Testing",
        "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv, here or one folder down",
    ),
    citation="Campello et al. 2021, IEEE TMI 40(12)",
    structures={1: "left ventricle", 2: "myocardium", 3: "right ventricle"},
    labels={"pathology": ("NOR", "HCM", "DCM", "Other")},
)
_SPLITS: dict[str, OfficialSplit] = {
    "training": "train",
    "validation": "validation",
    "testing": "test",
}


def read(root: Path) -> DatasetRows:
    """Both phases of every patient that the table knows.

    Raises:
        DataError: no table, no column ``External code`` or no patient's folder.
    """
    tables = sorted([*root.glob(TABLE), *root.glob(f"*/{TABLE}")])
    if not tables:
        raise wrong_layout(INFO, "no table of patients")
    people = {said(cells.get("External code", "")): cells for cells in read_table(tables[0])}
    people.pop("", None)
    if not people:
        raise wrong_layout(INFO, "the table has no column External code, or nobody in it")
    tally = Tally()
    rows: dict[str, Row] = {}
    folders = folders_named(root, r"([A-Z]\d){3}", depth=4)
    for folder in folders:
        for row in _patient(root, folder, people.get(folder.name), tally):
            if row.scan in rows:
                tally.add("scan(s) left out the second time: two folders of one name")
            rows.setdefault(row.scan, row)
    if not rows:
        raise wrong_layout(INFO, "no patient's folder such as Training/Labeled/A0S9V9")
    tally.add(
        "patient(s) of the table have no folder", len(people.keys() - {f.name for f in folders})
    )
    return sorted_rows(list(rows.values()), tally.lines)


def _patient(root: Path, folder: Path, cells: dict[str, str] | None, tally: Tally) -> list[Row]:
    image = nifti_file(folder, f"{folder.name}_sa")
    if image is None:
        tally.add("patient(s) left out: no image")
        return []
    if cells is None:
        tally.add("patient(s) left out: not in the table, so their phases are unknown")
        return []
    frames = _frames(image)
    gt = nifti_file(folder, f"{folder.name}_sa_gt")
    if gt is None:
        tally.add("patient(s) without outlines")
    rows = []
    for phase in ("ED", "ES"):
        number = number_text(cells.get(phase, ""))
        if not number.isdigit() or int(number) >= frames:
            tally.add("phase(s) left out: not in the table or not in the image")
            continue
        rows.append(_row(root, (image, gt), phase, index=int(number), cells=cells))
    if len(rows) == 2 and rows[0].source.index == rows[1].source.index:
        tally.add("phase(s) left out: both have the same number")
        return rows[:1]
    return rows


def _row(
    root: Path,
    files: tuple[Path, Path | None],
    phase: str,
    *,
    index: int,
    cells: dict[str, str],
) -> Row:
    image, gt = files
    patient = cells["External code"]
    letter = said(cells.get("Vendor", ""))
    pathology = said(cells.get("Pathology", ""))
    vendor = VENDORS.get(letter) or vendor_name(cells.get("VendorName", ""))
    outlines = Source(below(root, gt), "nifti", index=index) if gt else None
    parts = [part.casefold() for part in (root.name, *image.relative_to(root).parts)]
    return Row(
        scan=f"{patient}-{phase}",
        patient=patient,
        modality="MR",
        source=Source(below(root, image), "nifti", index=index),
        site=number_text(cells.get("Centre", "")),
        vendor="" if vendor == "other" else vendor,
        sequence=phase,
        labels={"pathology": pathology} if pathology else {},
        masks=(Mask(outlines),) if outlines else (),
        split=next((_SPLITS[part] for part in parts if part in _SPLITS), ""),
        facts={
            name.casefold(): said(cells[name])
            for name in ("Vendor", "Age", "Sex", "Height", "Weight")
            if said(cells.get(name, ""))
        },
    )


def _frames(image: Path) -> int:
    """Volumes in a file by its header; 0 where it is damaged."""
    try:
        shape = nib.load(image).shape  # type: ignore[attr-defined]
    except (OSError, ValueError, EOFError, nib.filebasedimages.ImageFileError):
        return 0
    return int(shape[3]) if len(shape) == 4 else 0


ADAPTER = Adapter(INFO, read)

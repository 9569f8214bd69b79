"""TotalSegmentator 2: CT of the whole body with up to 117 structures.

The table (columns image_id, age, gender, institute, study_type, split), the folders and the list of
structures are verified; columns of later releases (pathology, manufacturer) are from memory. The
number of a structure is its place in the sorted list; files of other names are passed over with a
note, missing ones are no fault (the small release has fewer).
"""

from pathlib import Path

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
    visible,
)

_SIDED = (
    *(
        "adrenal_gland",
        "autochthon",
        "clavicula",
        "femur",
        "hip",
        "humerus",
        "iliopsoas",
        "scapula",
    ),
    *("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "kidney", "kidney_cyst"),
    *("iliac_artery", "iliac_vena", "brachiocephalic_vein", "common_carotid_artery"),
    *("subclavian_artery", "lung_upper_lobe", "lung_lower_lobe"),
)
_SINGLE = (
    *("aorta", "atrial_appendage_left", "brachiocephalic_trunk", "brain", "colon", "duodenum"),
    *("costal_cartilages", "esophagus", "gallbladder", "heart", "inferior_vena_cava", "liver"),
    *("lung_middle_lobe_right", "pancreas", "portal_vein_and_splenic_vein", "prostate", "skull"),
    *("pulmonary_vein", "sacrum", "small_bowel", "spinal_cord", "spleen", "sternum", "stomach"),
    *("superior_vena_cava", "thyroid_gland", "trachea", "urinary_bladder", "vertebrae_S1"),
)
CLASSES = tuple(
    sorted(
        [f"{name}_{side}" for name in _SIDED for side in ("left", "right")]
        + [f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13)]
        + [f"vertebrae_C{number}" for number in range(1, 8)]
        + [f"vertebrae_T{number}" for number in range(1, 13)]
        + [f"vertebrae_L{number}" for number in range(1, 6)]
        + list(_SINGLE)
    )
)
VALUES = {name: value for value, name in enumerate(CLASSES, start=1)}
INFO = DatasetInfo(
    name="totalsegmentator",
    title="TotalSegmentator 2 (CT)",
    modalities=("CT",),
    size="1228 patients, about 24 GB",
    licence="CC BY 4.0",
    url="https://zenodo.org/records/10047292",
    site="column institute of meta.csv",
    site_verified=True,
    layout=(
        "meta.csv (image_id, institute, split, ...; separated by ; or ,)",
        "s0000/ct.nii.gz",
        "s0000/segmentations/<structure>.nii.gz, up to 117",
    ),
    citation="Wasserthal et al. 2023, doi:10.1148/ryai.230024",
    structures={value: name for name, value in VALUES.items()},
    shares_patients_with=("flare23",),
)
_SPLITS: dict[str, OfficialSplit] = {"train": "train", "val": "validation", "test": "test"}


def read(root: Path) -> DatasetRows:
    """Every patient with a scan.

    Raises:
        DataError: no folder such as s0000 with a scan, or a table that cannot be read.
    """
    folders = folders_named(root, r"s\d{4}", depth=2)
    if not any(nifti_file(folder, "ct") for folder in folders):
        raise wrong_layout(INFO, "no file such as s0000/ct.nii.gz")
    tally = Tally()
    table = _table(root)
    rows = []
    for folder in folders:
        file = nifti_file(folder, "ct")
        if file is None:
            tally.add("patient(s) left out: no ct.nii.gz")
            continue
        rows.append(_row(root, folder, file, table.get(folder.name), tally))
    missing = len(table.keys() - {row.patient for row in rows})
    tally.add("patient(s) of meta.csv have no scan", missing)
    return sorted_rows(rows, tally.lines)


def _table(root: Path) -> dict[str, dict[str, str]]:
    files = sorted([*root.glob("meta.csv"), *root.glob("*/meta.csv")])
    return {cells.get("image_id", ""): cells for cells in read_table(files[0])} if files else {}


def _row(root: Path, folder: Path, file: Path, cells: dict[str, str] | None, tally: Tally) -> Row:
    tally.add("patient(s) stand not in meta.csv: site and split unknown", int(cells is None))
    cells = cells or {}
    maker = said(cells.get("manufacturer", ""))
    kept = {"gender": "sex", "study_type": "study_type", "pathology": "pathology"}
    facts = {
        name: said(cells[column]) for column, name in kept.items() if said(cells.get(column, ""))
    }
    age = number_text(cells.get("age", ""))
    return Row(
        scan=folder.name,
        patient=folder.name,
        modality="CT",
        source=Source(below(root, file), "nifti"),
        site=said(cells.get("institute", "")),
        vendor=vendor_name(maker) if maker else "",
        masks=_masks(root, folder / "segmentations", tally),
        split=_SPLITS.get(cells.get("split", "").casefold(), ""),
        facts={**facts, **({"age": age} if age else {})},
    )


def _masks(root: Path, folder: Path, tally: Tally) -> tuple[Mask, ...]:
    masks = []
    for file in visible(folder):
        name = file.name.removesuffix(".gz").removesuffix(".nii")
        if name == file.name:
            continue
        if name not in VALUES:
            tally.add("outline(s) passed over: of no structure of version 2")
            continue
        masks.append(Mask(Source(below(root, file), "nifti"), value=VALUES[name], threshold=0.5))
    tally.add("patient(s) without outlines", int(not masks))
    return tuple(masks)


ADAPTER = Adapter(INFO, read)

"""AMOS 2022: abdominal CT and MR of several hospitals and scanners.

Folders, the tables and their columns Site and Manufacturer are verified in a published loader, and
that amos_5437 and amos_5514 are damaged. From memory: imagesVa and labelsVa, and that numbers tell
the modality (below 500 CT; 500 to 600 MR; unlabelled 5000 to 6899 CT, above MR).
"""

import re
from pathlib import Path

from agssd_core.data.deidentify import vendor_name
from simulation.datasets.ct_files import (
    NO_OUTLINES,
    first_folder,
    honest_splits,
    numbered_files,
    outlines,
)
from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    OfficialSplit,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below, folders_named, read_table, said

INFO = DatasetInfo(
    name="amos22",
    title="AMOS 2022",
    modalities=("CT", "MR"),
    size="500 CT and 100 MR with outlines, more without, about 24 GB",
    licence="CC BY 4.0",
    url="https://zenodo.org/records/7262581",
    site="column Site of labeled_data_meta_0000_0599.csv and its like",
    site_verified=True,
    layout=(
        "amos22/{imagesTr,labelsTr,imagesVa,labelsVa,imagesTs}/amos_0001.nii.gz",
        "labeled_data_meta_0000_0599.csv, unlabeled_data_meta_5000_5399.csv, ... (amos_id, Site, "
        "Manufacturer), here or in amos22, optional",
        "amos22_unlabeled_.../amos_5000.nii.gz, optional",
    ),
    citation="Ji et al. 2022, arXiv:2206.08023",
    structures={
        1: "spleen",
        2: "right kidney",
        3: "left kidney",
        4: "gallbladder",
        5: "oesophagus",
        6: "liver",
        7: "stomach",
        8: "aorta",
        9: "inferior vena cava",
        10: "pancreas",
        11: "right adrenal gland",
        12: "left adrenal gland",
        13: "duodenum",
        14: "bladder",
        15: "prostate or uterus",
    },
    shares_patients_with=("flare23",),
)
DAMAGED = frozenset({5437, 5514})
_PARTS: tuple[tuple[str, OfficialSplit], ...] = (
    ("Tr", "train"),
    ("Va", "validation"),
    ("Ts", "test"),
)
_FIRST_MR, _FIRST_UNLABELLED, _FIRST_UNLABELLED_MR = 500, 5000, 6900
_SCAN = r"amos_(\d{4})"


def read(root: Path) -> DatasetRows:
    """The scans of all parts, with site and vendor where a table names them.

    Raises:
        DataError: no folder imagesTr, no scan, or a table that cannot be read.
    """
    top = first_folder(root, "imagesTr", "amos22")
    if top is None:
        raise wrong_layout(INFO, "no folder amos22/imagesTr")
    tally = Tally()
    table = _table(root)
    rows = []
    for part, split in _PARTS:
        rows += _rows(root, top / f"images{part}", split, table, tally)
    for folder in folders_named(root, r"(?i).*unlabell?ed.*|imagesU\w*", depth=2):
        rows += _rows(root, folder, "", table, tally)
    if not rows:
        raise wrong_layout(INFO, "no file such as amos_0001.nii.gz in amos22/imagesTr")
    tally.add("scan(s) of unknown site: not in a table", sum(not row.site for row in rows))
    return sorted_rows(honest_splits(rows, tally), tally.lines)


def _table(root: Path) -> dict[int, dict[str, str]]:
    """Cells by the number of the scan."""
    pattern = "*labeled_data_meta*.csv"
    table = {}
    for file in sorted([*root.glob(pattern), *root.glob(f"*/{pattern}")]):
        if file.name.startswith("."):
            continue
        for cells in read_table(file):
            number = re.search(r"(\d+)(\.0)?$", cells.get("amos_id", ""))
            if number:
                table[int(number[1])] = cells
    return table


def _rows(
    root: Path,
    folder: Path,
    split: OfficialSplit,
    table: dict[int, dict[str, str]],
    tally: Tally,
) -> list[Row]:
    rows = []
    labels = folder.with_name(folder.name.replace("images", "labels"))
    for file, match in numbered_files(folder, _SCAN):
        number = int(match[1])
        if number in DAMAGED:
            tally.add("scan(s) left out: known to be damaged in the release")
            continue
        masks = outlines(root, labels, match[0]) if labels != folder else ()
        tally.add(NO_OUTLINES, int(split == "train" and not masks))
        cells = table.get(number, {})
        maker = said(cells.get("Manufacturer", ""))
        model = said(cells.get("Manufacturer's Model Name", ""))
        rows.append(
            Row(
                scan=match[0],
                patient=match[1],
                modality="MR" if _is_mr(number) else "CT",
                source=Source(below(root, file), "nifti"),
                site=said(cells.get("Site", "")),
                vendor=vendor_name(maker or model) if maker or model else "",
                masks=masks,
                split=split,
                facts={"scanner": model} if model else {},
            )
        )
    return rows


def _is_mr(number: int) -> bool:
    if number >= _FIRST_UNLABELLED:
        return number >= _FIRST_UNLABELLED_MR
    return number >= _FIRST_MR


ADAPTER = Adapter(INFO, read)

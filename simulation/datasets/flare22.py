"""FLARE 2022: abdominal CT, 50 with outlines, 2000 without, 50 to tune on.

Folders and names are verified in a published description; the numbers of the outlines are from
memory.
"""

from pathlib import Path

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
from simulation.datasets.tables import Tally, below, folders_named

ORGANS = {
    1: "liver",
    2: "right kidney",
    3: "spleen",
    4: "pancreas",
    5: "aorta",
    6: "inferior vena cava",
    7: "right adrenal gland",
    8: "left adrenal gland",
    9: "gallbladder",
    10: "oesophagus",
    11: "stomach",
    12: "duodenum",
    13: "left kidney",
}
INFO = DatasetInfo(
    name="flare22",
    title="FLARE 2022",
    modalities=("CT",),
    size="2100 scans, 100 with outlines, several hundred GB",
    licence="free after registration; no commercial use",
    url="https://flare22.grand-challenge.org",
    site="unknown",
    site_verified=True,
    layout=(
        "Training/FLARE22_LabeledCase50/images/FLARE22_Tr_0001_0000.nii.gz",
        "Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_0001.nii.gz",
        "Training/FLARE22_UnlabeledCase1-1000/Case_00001_0000.nii.gz, optional",
        "Tuning/{images/FLARETs_0001_0000.nii.gz,labels/FLARETs_0001.nii.gz}, optional",
    ),
    citation="Ma et al. 2024, doi:10.1016/S2589-7500(24)00154-7",
    structures=ORGANS,
    # Its scans were collected from other public sets; which is not published case by case.
    shares_patients_with=("msd", "kits", "flare23"),
)


def read(root: Path) -> DatasetRows:
    """The scans of all three parts; fact ``part`` names it.

    Raises:
        DataError: no folder Training, or no scan in its parts.
    """
    top = first_folder(root, "Training", "FLARE22", "FLARE2022", "FLARE22Train")
    if top is None:
        raise wrong_layout(INFO, "no folder Training")
    tally = Tally()
    rows = []
    for folder in folders_named(top / "Training", r"FLARE22_Labell?edCase.*", depth=1):
        rows += _rows(root, folder, ("labelled", "train"), tally)
    for folder in folders_named(top / "Training", r"FLARE22_Unlabell?edCase.*", depth=1):
        rows += _rows(root, folder, ("unlabelled", "train"), tally)
    rows += _rows(root, top / "Tuning", ("tuning", "validation"), tally)
    if not rows:
        raise wrong_layout(
            INFO, "no file such as FLARE22_Tr_0001_0000.nii.gz in FLARE22_LabeledCase50/images"
        )
    return sorted_rows(honest_splits(rows, tally), tally.lines)


def _rows(root: Path, folder: Path, part: tuple[str, OfficialSplit], tally: Tally) -> list[Row]:
    rows = []
    images = folder / "images" if (folder / "images").is_dir() else folder
    for file, match in numbered_files(images, r"(FLARE22_Tr_\d+|FLARETs_\d+|Case_\d+)(?:_0000)?"):
        masks = outlines(root, folder / "labels", match[1])
        tally.add(NO_OUTLINES, int(part[0] == "labelled" and not masks))
        rows.append(
            Row(
                scan=match[1],
                patient=match[1],
                modality="CT",
                source=Source(below(root, file), "nifti"),
                masks=masks,
                split=part[1],
                facts={"part": part[0]},
            )
        )
    return rows


ADAPTER = Adapter(INFO, read)

"""FLARE 2023: abdominal CT with outlines of some organs and tumours each.

Folders and names are verified in a published description, except those within ``validation``.

Outlines are partial: 0 means that nothing was outlined there, **not** that nothing is there. A scan
may show a liver that nobody outlined. Rows with outlines have the fact ``partial_labels``; a metric
that counts 0 as background misjudges them.
"""

from pathlib import Path

from simulation.datasets.ct_files import (
    NO_OUTLINES,
    first_folder,
    honest_splits,
    numbered_files,
    outlines,
)
from simulation.datasets.flare22 import ORGANS
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
from simulation.datasets.tables import Tally, below

INFO = DatasetInfo(
    name="flare23",
    title="FLARE 2023",
    modalities=("CT",),
    size="2200 scans with partial outlines, 1800 without, 100 to validate, several hundred GB",
    licence="free after registration; no commercial use",
    url="https://codalab.lisn.upsaclay.fr/competitions/12239",
    site="unknown",
    site_verified=True,
    layout=(
        "imagesTr2200/FLARE23_0001_0000.nii.gz",
        "labelsTr2200/FLARE23_0001.nii.gz (partial: 0 is not background)",
        "unlabeledTr1800/FLARE23_2201_0000.nii.gz, optional",
        "validation/FLARE23Ts_0001_0000.nii.gz, optional",
    ),
    citation="Ma et al. 2024, arXiv:2408.12534",
    structures={**ORGANS, 14: "tumour"},
    # Its scans were collected from other public sets; which is not published case by case.
    shares_patients_with=("msd", "kits", "flare22", "amos22", "totalsegmentator"),
)
PARTIAL = "not outlined organs are 0"


def read(root: Path) -> DatasetRows:
    """The scans of all parts; fact ``part`` names it.

    Raises:
        DataError: no folder imagesTr2200, or no scan.
    """
    top = first_folder(root, "imagesTr2200", "FLARE23", "FLARE2023")
    if top is None:
        raise wrong_layout(INFO, "no folder imagesTr2200")
    tally = Tally()
    labels = top / "labelsTr2200"
    rows = _rows(root, top / "imagesTr2200", labels, ("labelled", "train"))
    tally.add(NO_OUTLINES, sum(not row.masks for row in rows))
    rows += _rows(root, top / "unlabeledTr1800", None, ("unlabelled", "train"))
    rows += _validation(root, top / "validation")
    if not rows:
        raise wrong_layout(INFO, "no file such as FLARE23_0001_0000.nii.gz in imagesTr2200")
    tally.add(
        "scan(s) with partial outlines: 0 is not background",
        sum("partial_labels" in row.facts for row in rows),
    )
    return sorted_rows(honest_splits(rows, tally), tally.lines)


def _validation(root: Path, folder: Path) -> list[Row]:
    images = folder / "images" if (folder / "images").is_dir() else folder
    return _rows(root, images, folder / "labels", ("validation", "validation"))


def _rows(
    root: Path, folder: Path, labels: Path | None, part: tuple[str, OfficialSplit]
) -> list[Row]:
    rows = []
    for file, match in numbered_files(folder, r"(FLARE23(?:Ts)?_\d+)(?:_0000)?"):
        masks = outlines(root, labels, match[1]) if labels is not None else ()
        partial = {"partial_labels": PARTIAL} if masks and part[0] == "labelled" else {}
        rows.append(
            Row(
                scan=match[1],
                patient=match[1],
                modality="CT",
                source=Source(below(root, file), "nifti"),
                masks=masks,
                split=part[1],
                facts={"part": part[0], **partial},
            )
        )
    return rows


ADAPTER = Adapter(INFO, read)

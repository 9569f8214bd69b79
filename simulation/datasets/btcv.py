"""BTCV (Synapse multi-organ): abdominal CT of one hospital.

The tree is verified in a published description; that the numbers of the outlines stand for the
structures named below is from memory. The slices of TransUNet's form (``train_npz``) are no scans
and are not read.
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
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below

INFO = DatasetInfo(
    name="btcv",
    title="BTCV (Synapse multi-organ)",
    modalities=("CT",),
    size="50 patients, 30 with outlines, about 4 GB",
    licence="free after registration at Synapse, with its terms of use",
    url="https://www.synapse.org/#!Synapse:syn3193805",
    site="one hospital (Vanderbilt)",
    site_verified=False,
    layout=(
        "RawData/Training/img/img0001.nii.gz",
        "RawData/Training/label/label0001.nii.gz",
        "RawData/Testing/img/img0061.nii.gz, optional",
    ),
    citation="Landman et al. 2015, Multi-Atlas Labeling Beyond the Cranial Vault",
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
        10: "portal and splenic vein",
        11: "pancreas",
        12: "right adrenal gland",
        13: "left adrenal gland",
    },
)


def read(root: Path) -> DatasetRows:
    """The scans of the training and, where it is there, of the test folder.

    Raises:
        DataError: no folder RawData/Training/img, or no scan in it.
    """
    raw = first_folder(root, "Training/img", "RawData", "Abdomen/RawData")
    if raw is None:
        raise wrong_layout(INFO, "no folder RawData/Training/img")
    tally = Tally()
    rows = [*_rows(root, raw / "Training", tally), *_rows(root, raw / "Testing", tally)]
    if not rows:
        raise wrong_layout(INFO, "no file such as img0001.nii.gz in RawData/Training/img")
    return sorted_rows(honest_splits(rows, tally), tally.lines)


def _rows(root: Path, folder: Path, tally: Tally) -> list[Row]:
    rows = []
    for file, match in numbered_files(folder / "img", r"img(\d{4})"):
        masks = outlines(root, folder / "label", f"label{match[1]}")
        training = folder.name == "Training"
        tally.add(NO_OUTLINES, int(training and not masks))
        rows.append(
            Row(
                scan=f"img{match[1]}",
                patient=match[1],
                modality="CT",
                source=Source(below(root, file), "nifti"),
                masks=masks,
                split="train" if training else "test",
            )
        )
    return rows


ADAPTER = Adapter(INFO, read)

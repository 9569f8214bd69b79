"""BUSI: breast ultrasound of one hospital with outlines of lesions.

The layout is verified. The data set numbers images, not people, and has several images of some, so
a person may stand on both sides of a split; the notes say so. Some images have several masks, which
are united; masks of normal images are empty.
"""

import re
from pathlib import Path

from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below, scan_name
from simulation.datasets.us_files import folder_with, image_mask, pictures

CLASSES = ("benign", "malignant", "normal")
INFO = DatasetInfo(
    name="busi",
    title="BUSI",
    modalities=("US",),
    size="780 images of 600 women, 0.3 GB",
    licence="none at the source; copies say CC0 (Kaggle) or CC BY 4.0 (MedMNIST)",
    url="https://scholar.cu.edu.eg/?q=afahmy/pages/dataset",
    site="one hospital (Baheya)",
    site_verified=True,
    layout=(
        "Dataset_BUSI_with_GT/benign/benign (1).png, benign (1)_mask.png, benign (1)_mask_1.png",
        "Dataset_BUSI_with_GT/malignant, Dataset_BUSI_with_GT/normal; or the three folders here",
    ),
    citation="Al-Dhabyani et al. 2020, Data in Brief 28",
    structures={1: "lesion"},
    labels={"pathology": CLASSES},
)
_MASK = re.compile(r"^(?P<image>.+?)_mask(?:_\d+)?$", re.IGNORECASE)


def read(root: Path) -> DatasetRows:
    """Every image of the three classes.

    Raises:
        DataError: no folder of the classes.
    """
    top = folder_with(root, CLASSES)
    if top is None:
        raise wrong_layout(INFO, "no folder with benign, malignant and normal in it")
    tally = Tally()
    rows = [row for name in CLASSES for row in _of_class(root, top, name, tally)]
    if not rows:
        raise wrong_layout(INFO, "no image such as benign/benign (1).png")
    tally.add("image(s) counted as a patient each: the data set numbers no people", len(rows))
    return sorted_rows(rows, tally.lines)


def _of_class(root: Path, top: Path, name: str, tally: Tally) -> list[Row]:
    files = pictures(top / name)
    masks: dict[str, list[Path]] = {}
    for file in files:
        named = _MASK.match(file.stem)
        if named:
            masks.setdefault(named["image"], []).append(file)
    images = [file for file in files if not _MASK.match(file.stem)]
    tally.add("image(s) without outlines", sum(1 for file in images if file.stem not in masks))
    tally.add("set(s) of outlines without an image", len(set(masks) - {i.stem for i in images}))
    return [
        Row(
            scan=scan_name(file.stem),
            patient=scan_name(file.stem),
            modality="US",
            source=Source(below(root, file), "image"),
            labels={"pathology": name},
            masks=tuple(image_mask(root, mask, 1) for mask in masks.get(file.stem, ())),
        )
        for file in images
    ]


ADAPTER = Adapter(INFO, read)

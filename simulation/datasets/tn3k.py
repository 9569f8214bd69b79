"""TN3K: thyroid ultrasound with outlines of nodules.

Folders and the lists of folds are verified, and so are the tables of classes (no header; 0 benign,
1 malignant), which come with a later release. Masks are JPEG files: what is above 127 counts. The
data set numbers images, not people, though 3493 images are of 2421 patients.
"""

import csv
import json
from pathlib import Path

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
from simulation.datasets.tables import Tally, below, scan_name
from simulation.datasets.us_files import (
    folder_with,
    image_mask,
    number_of,
    pictures,
    pictures_by_stem,
)

CLASSES = ("benign", "malignant")
FOLDS = 5
MAX_LIST_BYTES = 16 << 20
INFO = DatasetInfo(
    name="tn3k",
    title="TN3K",
    modalities=("US",),
    size="3493 images of 2421 patients (2879 to train, 614 to test), 0.4 GB",
    licence="for research; the repository names no licence of the images",
    url="https://github.com/haifangong/TRFE-Net-for-thyroid-nodule-segmentation",
    site="unknown",
    site_verified=True,
    layout=(
        "tn3k/trainval-image/0000.jpg, tn3k/trainval-mask/0000.jpg, tn3k/test-image, "
        "tn3k/test-mask; or these here",
        "optional: tn3k-trainval-fold0.json to -fold4.json, label4trainval.csv, label4test.csv",
    ),
    citation="Gong et al. 2023, Computers in Biology and Medicine 155",
    structures={1: "nodule"},
    labels={"pathology": CLASSES},
)
_PARTS: dict[str, OfficialSplit] = {"trainval": "train", "test": "test"}


def read(root: Path) -> DatasetRows:
    """Every image of both parts.

    Raises:
        DataError: no folder of images to train.
    """
    top = folder_with(root, ("trainval-image",))
    if top is None:
        raise wrong_layout(INFO, "no folder trainval-image")
    tally = Tally()
    rows = [row for part in _PARTS for row in _of_part(root, top, part, tally)]
    if not rows:
        raise wrong_layout(INFO, "no image such as trainval-image/0000.jpg")
    tally.add("image(s) counted as a patient each: the data set numbers no people", len(rows))
    return sorted_rows(rows, tally.lines)


def _of_part(root: Path, top: Path, part: str, tally: Tally) -> list[Row]:
    images, masks = pictures(top / f"{part}-image"), pictures_by_stem(top / f"{part}-mask")
    classes = _classes(top / f"label4{part}.csv")
    folds = _folds(top, tally) if part == "trainval" else {}
    if not images:
        tally.add(f"part(s) without images: {part}")
    tally.add("image(s) without outlines", sum(1 for file in images if file.stem not in masks))
    tally.add("image(s) without a class", sum(1 for file in images if file.stem not in classes))
    return [
        Row(
            scan=scan_name(f"{part}-{file.stem}"),
            patient=scan_name(f"{part}-{file.stem}"),
            modality="US",
            source=Source(below(root, file), "image"),
            labels={"pathology": classes[file.stem]} if file.stem in classes else {},
            masks=(image_mask(root, masks[file.stem], 1),) if file.stem in masks else (),
            split=_PARTS[part],
            facts=_fact(folds, number_of(file.name)),
        )
        for file in images
    ]


def read_split(file: Path) -> dict[str, list[int]]:
    """Lists ``train`` and ``val`` of image numbers; empty where the file is missing or damaged."""
    try:
        if file.stat().st_size > MAX_LIST_BYTES:
            return {}
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        return {
            part: [int(str(each).split(".")[0]) for each in content.get(part, ())]
            for part in ("train", "val")
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _folds(top: Path, tally: Tally) -> dict[int, str]:
    """The fold that an image is held out in, by its number."""
    folds: dict[int, str] = {}
    for fold in range(FOLDS):
        held_out = read_split(top / f"tn3k-trainval-fold{fold}.json").get("val", [])
        if not held_out:
            tally.add("list(s) of a fold missing or damaged")
        folds.update(dict.fromkeys(held_out, str(fold)))
    return folds


def _fact(folds: dict[int, str], number: int | None) -> dict[str, str]:
    return {"fold": folds[number]} if number in folds else {}


def _classes(file: Path) -> dict[str, str]:
    """Class by the image's name without suffix."""
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        lines = [line for line in csv.reader(stream) if len(line) > 1]
    numbers = {"0": CLASSES[0], "1": CLASSES[1]}
    found = {Path(line[0].strip()).stem: line[-1].strip().casefold() for line in lines}
    named = {stem: numbers.get(text.removesuffix(".0"), text) for stem, text in found.items()}
    return {stem: name for stem, name in named.items() if name in CLASSES}


ADAPTER = Adapter(INFO, read)

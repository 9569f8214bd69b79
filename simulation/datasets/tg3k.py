"""TG3K: thyroid ultrasound with outlines of the gland.

The layout is verified; that the images are frames of 16 videos is from memory. No published file
says which frame is of which video, so each image is its own patient: frames that look the same may
stand on both sides of any split, the official one too, and the notes say so.
"""

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
from simulation.datasets.tn3k import read_split
from simulation.datasets.us_files import (
    folder_with,
    image_mask,
    number_of,
    pictures,
    pictures_by_stem,
)

LIST = "tg3k-trainval.json"
INFO = DatasetInfo(
    name="tg3k",
    title="TG3K",
    modalities=("US",),
    size="3585 images of 16 videos, 0.2 GB",
    licence="for research; the repository names no licence of the images",
    url="https://github.com/haifangong/TRFE-Net-for-thyroid-nodule-segmentation",
    site="unknown",
    site_verified=True,
    layout=(
        "tg3k/thyroid-image/0000.jpg, tg3k/thyroid-mask/0000.jpg; or these here",
        f"optional: tg3k/{LIST} (train and val, lists of numbers)",
    ),
    citation="Gong et al. 2023, Computers in Biology and Medicine 155",
    structures={1: "thyroid gland"},
)
_SPLITS: dict[str, OfficialSplit] = {"train": "train", "val": "validation"}


def read(root: Path) -> DatasetRows:
    """Every image.

    Raises:
        DataError: no folder of images.
    """
    top = folder_with(root, ("thyroid-image",))
    if top is None:
        raise wrong_layout(INFO, "no folder thyroid-image")
    tally = Tally()
    masks = pictures_by_stem(top / "thyroid-mask")
    splits: dict[int | None, OfficialSplit] = {
        number: _SPLITS[part]
        for part, numbers in read_split(top / LIST).items()
        for number in numbers
    }
    if not splits:
        tally.add(f"list missing or damaged: {LIST}")
    rows = []
    for file in pictures(top / "thyroid-image"):
        if file.stem not in masks:
            tally.add("image(s) without outlines")
        rows.append(
            Row(
                scan=scan_name(file.stem),
                patient=scan_name(file.stem),
                modality="US",
                source=Source(below(root, file), "image"),
                masks=(image_mask(root, masks[file.stem], 1),) if file.stem in masks else (),
                split=splits.get(number_of(file.name), ""),
            )
        )
    if not rows:
        raise wrong_layout(INFO, "no image such as thyroid-image/0000.jpg")
    tally.add(
        "image(s) counted as a patient each, though they are frames of few videos: scores on "
        "held-out images are too good",
        len(rows),
    )
    return sorted_rows(rows, tally.lines)


ADAPTER = Adapter(INFO, read)

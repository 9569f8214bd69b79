"""Butterfly (MIT GrandHack 2018): nine organs and views, portable scanners of one maker.

The folders ``training`` and ``test`` with one folder a person and one a class are verified; of the
classes' folder names only some are, so others are told by a word in them. Where ``training`` was
unpacked into several folders, all are read. A number that stands in both parts is taken for one
person, who then counts as training.
"""

import re
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
from simulation.datasets.tables import Tally, below, folders_named, scan_name, visible
from simulation.datasets.us_files import pictures

# A word of the folder's name, without separators -> the class.
WORDS = {
    "morison": "morisons_pouch",
    "bladder": "bladder",
    "plax": "plax",
    "4ch": "4ch",
    "2ch": "2ch",
    "ivc": "ivc",
    "carotid": "carotid",
    "lung": "lungs",
    "thyroid": "thyroid",
}
INFO = DatasetInfo(
    name="butterfly",
    title="Butterfly (MIT GrandHack 2018)",
    modalities=("US",),
    size="about 41 000 images of 31 people",
    licence="solely for the MIT GrandHack 2018; not to be published again",
    url="https://github.com/ButterflyNetwork/MITGrandHack2018",
    site="unknown",
    site_verified=True,
    layout=(
        "butterfly_dataset/training/12/bladder/img001.png: part, number of the person, class",
        "butterfly_dataset/test/...; parts here or at most two folders down, several allowed",
    ),
    citation="Butterfly Network, MIT GrandHack 2018",
    labels={"view": tuple(WORDS.values())},
)
_PART = r"(?i)(?:.*[-_])?(?:train|training|test)\d*"


def read(root: Path) -> DatasetRows:
    """Every image below a person's folder.

    Raises:
        DataError: no folder of a part with people in it.
    """
    tally = Tally()
    people = _people(root)
    both = {folder.name for folder, split in people if split == "test"} & {
        folder.name for folder, split in people if split == "train"
    }
    tally.add("person(s) in both parts, counted as training", len(both))
    rows: dict[str, Row] = {}
    for folder, split in people:
        for row in _of_person(root, folder, "train" if folder.name in both else split, tally):
            if row.scan in rows:
                tally.add("image(s) left out the second time: two of one person, class and name")
            rows.setdefault(row.scan, row)
    if not rows:
        raise wrong_layout(INFO, "no image such as training/12/bladder/img001.png")
    return sorted_rows(list(rows.values()), tally.lines)


def _people(root: Path) -> list[tuple[Path, OfficialSplit]]:
    """Folders of people, named by numbers, and the part that each lies in."""
    people: list[tuple[Path, OfficialSplit]] = []
    parts = folders_named(root, _PART, depth=3)
    if not parts and re.fullmatch(_PART, root.name):
        parts = [root]
    for part in parts:
        split: OfficialSplit = "train" if "train" in part.name.casefold() else "test"
        # An archive may hold a folder of its own name.
        numbered = folders_named(part, r"\d+", depth=3)
        people += [(folder, split) for folder in numbered]
    return people


def _of_person(root: Path, folder: Path, split: OfficialSplit, tally: Tally) -> list[Row]:
    rows = []
    for named in (entry for entry in visible(folder) if entry.is_dir()):
        plain = "".join(letter for letter in named.name.casefold() if letter.isalnum())
        view = next((view for word, view in WORDS.items() if word in plain), "")
        files = pictures(named)
        if not view:
            tally.add("image(s) without a class: the folder's name is none", len(files))
        rows += [
            Row(
                scan=scan_name(f"{folder.name}-{split}-{named.name}-{file.stem}"),
                patient=folder.name,
                modality="US",
                source=Source(below(root, file), "image"),
                vendor="Butterfly",
                sequence=view,
                labels={"view": view} if view else {},
                split=split,
            )
            for file in files
        ]
    return rows


ADAPTER = Adapter(INFO, read)

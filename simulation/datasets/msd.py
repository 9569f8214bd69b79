"""Medical Segmentation Decathlon: ten tasks, here all that lie below the root.

Names of folders and files and ``dataset.json`` are verified in a published copy of one task. That
Task01 holds four channels and Task05 two is from memory; ``dataset.json`` decides where it is
there. Outlines have each task's own numbers: facts ``structure_1``, ... say what they are.
Nothing tells whether a person stands in two tasks; four come from one hospital (07 to 10).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simulation.datasets.ct_files import NO_OUTLINES, honest_splits, numbered_files, outlines
from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Mask,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below, scan_name, visible

INFO = DatasetInfo(
    name="msd",
    title="Medical Segmentation Decathlon",
    modalities=("CT", "MR"),
    size="2633 scans in ten tasks, about 100 GB",
    licence="CC BY-SA 4.0",
    url="http://medicaldecathlon.com",
    site="unknown; fact task names the ten tasks, each of one or few hospitals",
    site_verified=True,
    layout=(
        "TaskNN_Name/{imagesTr,labelsTr,imagesTs}/name_NNN.nii.gz, for one task or several",
        "TaskNN_Name/dataset.json; the root may also be one such folder",
    ),
    citation="Antonelli et al. 2022, doi:10.1038/s41467-022-30695-9",
    structures={value: f"structure {value} of the task" for value in range(1, 11)},
    shares_patients_with=("brats21", "fets22", "flare22", "flare23", "medmnist3d"),
)
_TASK = r"Task(0[1-9]|10)_\w+"
_CHANNELS = {"01": ("FLAIR", "T1w", "T1gd", "T2w"), "05": ("T2", "ADC")}
_OF_MR = frozenset({"01", "02", "04", "05"})


@dataclass(frozen=True)
class _Task:
    folder: Path
    modality: Literal["CT", "MR"]
    # Names of the volumes of a 4D file; one or none where files are 3D.
    channels: tuple[str, ...]
    facts: Mapping[str, str]


def read(root: Path) -> DatasetRows:
    """The scans of all tasks; a channel of a 4D file is a row of its own, of the same patient.

    Raises:
        DataError: no folder of a task, or no scan in any.
    """
    if re.fullmatch(_TASK, root.resolve().name):
        folders = [root]
    else:
        folders = [each for each in visible(root) if re.fullmatch(_TASK, each.name)]
    if not any((folder / "imagesTr").is_dir() for folder in folders):
        raise wrong_layout(INFO, "no folder such as Task09_Spleen/imagesTr")
    tally = Tally()
    rows = []
    for folder in folders:
        task = _task(folder, tally)
        found = [*_rows(root, task, "Tr", tally), *_rows(root, task, "Ts", tally)]
        rows += honest_splits(found, tally)
    if not rows:
        raise wrong_layout(INFO, "no file such as spleen_2.nii.gz in imagesTr")
    return sorted_rows(rows, tally.lines)


def _task(folder: Path, tally: Tally) -> _Task:
    """What a task is, by its ``dataset.json`` or else by its number."""
    name = folder.resolve().name
    number = name[4:6]
    said = _described(folder / "dataset.json")
    if not said:
        tally.add("task(s) without a readable dataset.json: channels by the task's number")
    channels = _numbered(said.get("modality")) or dict(enumerate(_CHANNELS.get(number, ())))
    labels = {value: text for value, text in _numbered(said.get("labels")).items() if value > 0}
    return _Task(
        folder=folder,
        modality="MR" if number in _OF_MR else "CT",
        channels=tuple(channels[index] for index in sorted(channels)),
        facts={"task": name, **{f"structure_{value}": text for value, text in labels.items()}},
    )


def _described(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _numbered(table: object) -> dict[int, str]:
    """``{"0": "FLAIR", ...}``, empty where it is anything else."""
    if not isinstance(table, dict) or not all(str(key).isdigit() for key in table):
        return {}
    return {int(key): str(text) for key, text in table.items()}


def _rows(root: Path, task: _Task, part: Literal["Tr", "Ts"], tally: Tally) -> list[Row]:
    rows = []
    for file, match in numbered_files(task.folder / f"images{part}", r"\w+?_\d+"):
        masks = outlines(root, task.folder / f"labels{part}", match[0])
        tally.add(NO_OUTLINES, int(part == "Tr" and not masks))
        rows += _channels(root, task, file, match[0], masks, part)
    return rows


def _channels(
    root: Path, task: _Task, file: Path, stem: str, masks: tuple[Mask, ...], part: str
) -> list[Row]:
    several = len(task.channels) > 1
    number = task.facts["task"].split("_")[0]
    return [
        Row(
            scan=scan_name("-".join(filter(None, (number, stem, channel if several else "")))),
            patient=f"{number}-{stem}",
            modality=task.modality,
            source=Source(below(root, file), "nifti", index=index if several else None),
            sequence=channel if channel not in ("CT", "MRI") else "",
            masks=masks,
            split="train" if part == "Tr" else "test",
            facts=task.facts,
        )
        for index, channel in enumerate(task.channels or ("",))
    ]


ADAPTER = Adapter(INFO, read)

"""MedMNIST3D: six sets of small cubes with classes and an official split.

File names, arrays and classes are verified in the authors' package. Every cube is its own patient:
which come from one person is not published, though the official split keeps people apart. The same
cube in 28 and in 64 voxels is one patient.

Two sets are shapes without grey values (adrenal, vessel) and one is electron microscopy of a rat
(synapse); they count as the modality whose grey values need no unit, or that they were drawn on,
and the fact ``content`` tells them apart.
"""

import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.node import ScanModality
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
from simulation.datasets.tables import Tally, below, visible


@dataclass(frozen=True)
class _Set:
    modality: ScanModality
    content: str
    classes: tuple[str, ...]


SETS = {
    "organ": _Set(
        "CT",
        "image",
        (
            *("liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder"),
            *("heart", "lung-right", "lung-left", "spleen", "pancreas"),
        ),
    ),
    "nodule": _Set("CT", "image", ("benign", "malignant")),
    "adrenal": _Set("CT", "shape", ("normal", "hyperplasia")),
    "fracture": _Set(
        "CT",
        "image",
        ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture"),
    ),
    "vessel": _Set("MR", "shape", ("vessel", "aneurysm")),
    "synapse": _Set("MR", "electron microscopy", ("inhibitory synapse", "excitatory synapse")),
}
SPLITS: dict[str, OfficialSplit] = {"train": "train", "val": "validation", "test": "test"}
INFO = DatasetInfo(
    name="medmnist3d",
    title="MedMNIST3D",
    modalities=("CT", "MR"),
    size="9,998 cubes of 28 or 64 voxels a side in six sets, 0.1 GB or 1.5 GB",
    licence="CC BY 4.0",
    url="https://medmnist.com/",
    site="unknown; fact set names the six sets",
    site_verified=True,
    layout=(
        "{organ,nodule,adrenal,fracture,vessel,synapse}mnist3d.npz or ..._64.npz, one or more, "
        "with the arrays {train,val,test}_{images,labels}",
    ),
    citation="Yang et al. 2023, Sci Data 10:41",
    labels={name: kind.classes for name, kind in SETS.items()},
    shares_patients_with=("lidc-idri", "luna16", "msd"),
)
_FILE = re.compile(rf"({'|'.join(SETS)})mnist3d(?:_(\d+))?\.npz")
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def read(root: Path) -> DatasetRows:
    """A row for each cube. Opens labels and the headers of images.

    Raises:
        DataError: no file of one of the sets.
    """
    tally = Tally()
    rows: list[Row] = []
    named = [(file, _FILE.fullmatch(file.name)) for file in visible(root)]
    found = [(file, match) for file, match in named if match is not None and file.is_file()]
    for file, match in found:
        for part in SPLITS:
            try:
                classes, side = _labels(file, part)
            except _DAMAGE:
                tally.add("part(s) of a set left out: damaged, or images and labels differ")
                continue
            known = SETS[match.group(1)].classes
            tally.add(
                "cube(s) with a class that the set does not have; they have none here",
                sum(not 0 <= number < len(known) for number in classes),
            )
            rows += [
                _row(root, file, match, part, index=index, number=number, side=side)
                for index, number in enumerate(classes)
            ]
    if not rows:
        raise wrong_layout(INFO, "no whole file such as organmnist3d.npz")
    return sorted_rows(rows, tally.lines)


def _labels(file: Path, part: str) -> tuple[list[int], int]:
    """Class of each cube of a part, and the voxels of a side.

    Raises:
        ValueError: labels and images do not belong together, or images are no cubes of bytes.
    """
    # np.load would leave a damaged archive open.
    with zipfile.ZipFile(file) as archive:
        with archive.open(f"{part}_labels.npy") as stream:
            labels: NDArray[np.integer] = np.lib.format.read_array(stream, allow_pickle=False)
        with archive.open(f"{part}_images.npy") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    cubes = len(shape) == 4 and len(set(shape[1:])) == 1 and dtype == np.uint8
    if not cubes or labels.size != shape[0]:
        raise ValueError
    return [int(number) for number in labels.ravel()], int(shape[1])


def _row(
    root: Path,
    file: Path,
    match: re.Match[str],
    part: str,
    *,
    index: int,
    number: int,
    side: int,
) -> Row:
    name = match.group(1)
    kind = SETS[name]
    return Row(
        scan=f"{name}{side}-{part}-{index:04d}",
        patient=f"{name}-{part}-{index:04d}",
        modality=kind.modality,
        source=Source(below(root, file), "npz", index=index, key=f"{part}_images"),
        sequence=name,
        labels={name: kind.classes[number]} if 0 <= number < len(kind.classes) else {},
        split=SPLITS[part],
        facts={"set": name, "size": str(side), "content": kind.content},
    )


ADAPTER = Adapter(INFO, read)

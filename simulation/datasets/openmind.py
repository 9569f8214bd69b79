"""OpenMind: 114,000 brain images gathered from 800 data sets of OpenNeuro.

Folders and the columns of ``openneuro_metadata.csv`` are verified in the authors' own loader:
paths in it lie below the folder ``OpenMind``. Many cells are empty. A person is one subject of one
data set; people who took part in two cannot be known. Images of positron tomography are left out.
The anatomy mask covers what is body in the image; it is the only outline.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from agssd_core.data.deidentify import vendor_name
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
from simulation.datasets.tables import Tally, below, number_text, read_table, said, scan_name

TABLE = "openneuro_metadata.csv"
INFO = DatasetInfo(
    name="openmind",
    title="OpenMind",
    modalities=("MR",),
    size="34,000 people, 114,000 images, about 1,000 GB",
    licence="CC BY 4.0",
    url="https://huggingface.co/datasets/AnonRes/OpenMind",
    site="OpenNeuro data set, such as ds000001: one or few scanners each",
    site_verified=True,
    layout=(
        f"{TABLE} with the columns unique_id, modality, image_path, anat_mask_path, ...",
        "OpenMind/ds000001/sub-01/[ses-01/]anat/*.nii.gz",
    ),
    citation="Wald et al. 2025, arXiv:2412.17041",
    structures={1: "anatomy"},
    labels={"sex": ("male", "female"), "health": ()},
)
_OTHER = frozenset({"pet", "ct"})
_SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}
# Fact -> column of the table.
_FACTS = {
    "age": "age",
    "quality": "image_quality_score",
    "derived_from": "derived_from",
    "field_tesla": "magnetic_field_strength",
    "model": "model_name",
}


def read(root: Path) -> DatasetRows:
    """The images of the table that are on disk; a part of the download will do.

    Raises:
        DataError: no table, no column ``image_path`` or no image.
    """
    if not (root / TABLE).is_file():
        raise wrong_layout(INFO, f"no file {TABLE}")
    table = read_table(root / TABLE)
    if table and "image_path" not in table[0]:
        raise wrong_layout(INFO, f"{TABLE} has no column image_path")
    folder = root / "OpenMind" if (root / "OpenMind").is_dir() else root
    tally = Tally()
    rows: dict[str, Row] = {}
    for cells in table:
        row = _row(root, folder, cells, tally)
        if row is None:
            continue
        if row.scan in rows:
            tally.add("image(s) left out: listed twice")
        rows.setdefault(row.scan, row)
    if not rows:
        raise wrong_layout(INFO, "no image of the table below OpenMind")
    return sorted_rows(list(rows.values()), tally.lines)


def _row(root: Path, folder: Path, cells: Mapping[str, str], tally: Tally) -> Row | None:
    sequence = said(cells.get("modality", ""))
    if sequence.casefold() in _OTHER:
        tally.add("image(s) left out: no MR")
        return None
    path = _inside(cells["image_path"])
    if path is None or not (folder / path).is_file():
        tally.add("image(s) of the table are not on disk")
        return None
    dataset = said(cells.get("unique_id", ""))[:8] or path.parts[0]
    if not re.fullmatch(r"ds\d{6}", dataset):
        dataset = path.parts[0]
    subject = next((part for part in path.parts if part.startswith("sub-")), "")
    scan = scan_name(said(cells.get("unique_id", "")) or path.as_posix())
    return Row(
        scan=scan,
        patient=f"{dataset}-{subject}" if subject else scan,
        modality="MR",
        source=Source(below(root, folder / path), "nifti"),
        site=dataset,
        vendor=_vendor(cells),
        sequence=sequence,
        labels=_labels(cells),
        masks=_masks(root, folder, cells, tally),
        facts={
            name: number_text(cells[column])
            for name, column in _FACTS.items()
            if said(cells.get(column, ""))
        },
    )


def _inside(text: str) -> PurePosixPath | None:
    """A path of the table; None if it is empty or leads out of the folder."""
    path = PurePosixPath(said(text))
    return None if path.is_absolute() or ".." in path.parts or not path.parts else path


def _labels(cells: Mapping[str, str]) -> dict[str, str]:
    sex = _SEXES.get(said(cells.get("sex", "")).casefold(), "")
    health = said(cells.get("health_status", ""))
    return {**({"sex": sex} if sex else {}), **({"health": health} if health else {})}


def _vendor(cells: Mapping[str, str]) -> str:
    found = vendor_name(cells.get("manufacturer", ""))
    return "" if found == "other" else found


def _masks(root: Path, folder: Path, cells: Mapping[str, str], tally: Tally) -> tuple[Mask, ...]:
    path = _inside(cells.get("anat_mask_path", ""))
    if path is None:
        return ()
    if not (folder / path).is_file():
        tally.add("anatomy mask(s) are not on disk")
        return ()
    return (Mask(Source(below(root, folder / path), "nifti"), value=1),)


ADAPTER = Adapter(INFO, read)

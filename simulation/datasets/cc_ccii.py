"""CC-CCII: chest CT of COVID-19 (NCP), other pneumonia (CP) and healthy people, as pictures.

Classes, folders and names of slices are verified in published loaders; the names that the parts of
the download unpack to are from memory. Known faults of the release: slices that are missing or
doubled. Slices are taken in the order of their numbers; missing numbers are counted in the fact
``missing_slices`` and in a note. Pictures hold no Hounsfield units and no spacing: ``reading`` says
how they are scaled, and 0.7 x 0.7 x 3 mm (a chest of usual size) is assumed.
"""

import re
from pathlib import Path

from simulation.datasets.grids import numbered_slices, slice_number
from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below, folders_named, scan_name, visible

INFO = DatasetInfo(
    name="cc-ccii",
    title="CC-CCII",
    modalities=("CT",),
    size="about 2700 patients, 4200 scans, 600000 slices, about 80 GB",
    licence="unclear; free for research",
    url="http://ncov-ai.big.ac.cn/download",
    site="unknown: several Chinese hospitals, not published for each case",
    site_verified=True,
    layout=(
        "{CP,NCP,Normal}/<patient>/<scan>/<number>.png or .jpg; parts such as NCP-1 may lie beside "
        "each other",
    ),
    citation="Zhang et al. 2020, doi:10.1016/j.cell.2020.04.045",
    labels={"class": ("Normal", "CP", "NCP")},
)
ASSUMED_SPACING_MM = "0.7 0.7 3"
MIN_SLICES = 8
_CLASS = r"(CP|NCP|Normal)(?:-\d+)?"


def read(root: Path) -> DatasetRows:
    """Every scan of at least eight slices.

    Raises:
        DataError: no folder of a class, or no slice in any.
    """
    tally = Tally()
    folders = folders_named(root, _CLASS, depth=2)
    if not folders:
        raise wrong_layout(INFO, "no folder CP, NCP or Normal")
    rows: dict[str, Row] = {}
    for folder in folders:
        for patient in _patients(folder):
            for scan in visible(patient):
                row = _row(root, scan, tally) if scan.is_dir() else None
                if row is None:
                    continue
                tally.add("scan(s) left out: a copy lies in another part", int(row.scan in rows))
                rows.setdefault(row.scan, row)
    if not rows:
        raise wrong_layout(INFO, "no slice such as NCP/1/10/0001.png")
    classes: dict[str, set[str]] = {}
    for row in rows.values():
        classes.setdefault(row.patient, set()).add(row.labels["class"])
    doubtful = sum(len(each) > 1 for each in classes.values())
    tally.add("patient number(s) stand in two classes and are taken for one person", doubtful)
    return sorted_rows(list(rows.values()), tally.lines)


def _patients(folder: Path) -> list[Path]:
    """Folders of patients; a part such as NCP-1 may hold a folder NCP around them."""
    inner = [each for each in visible(folder) if re.fullmatch(_CLASS, each.name)]
    found = [patient for each in inner or [folder] for patient in visible(each)]
    return [patient for patient in found if patient.is_dir()]


def _row(root: Path, folder: Path, tally: Tally) -> Row | None:
    slices = numbered_slices(folder)
    if len(slices) < MIN_SLICES:
        tally.add(f"scan(s) left out: fewer than {MIN_SLICES} slices")
        return None
    numbers = {slice_number(path) for path in slices}
    missing = max(numbers) - min(numbers) + 1 - len(numbers)
    doubled = len(slices) - len(numbers)
    if doubled:
        tally.add("scan(s) left out: a slice number stands twice")
        return None
    tally.add("scan(s) with gaps in the numbers of their slices", int(missing > 0))
    patient = folder.parent
    kind = re.fullmatch(_CLASS, patient.parent.name)
    name = kind[1] if kind is not None else ""
    return Row(
        scan=scan_name(f"{name}-{patient.name}-{folder.name}"),
        patient=patient.name,
        modality="CT",
        source=Source(below(root, folder), "slices"),
        labels={"class": name},
        facts={
            "spacing_mm": ASSUMED_SPACING_MM,
            **({"missing_slices": str(missing)} if missing else {}),
        },
    )


ADAPTER = Adapter(INFO, read)

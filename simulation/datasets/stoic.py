"""STOIC 2021: chest CT of patients suspected of COVID-19.

The number of scans is verified; folders, columns and fields of the headers are from memory, so
``reference.csv`` may lie anywhere below the root and age and sex may be missing.
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
from simulation.datasets.tables import Tally, below, number_text, read_table, visible

INFO = DatasetInfo(
    name="stoic",
    title="STOIC 2021",
    modalities=("CT",),
    size="2000 patients with one scan each (of 10735), about 280 GB",
    licence="CC BY-NC 4.0 (from memory)",
    url="https://registry.opendata.aws/stoic2021-training/",
    site="unknown: 20 French hospitals, not published for each case",
    site_verified=False,
    layout=(
        "data/mha/<PatientID>.mha",
        "metadata/reference.csv (PatientID, probCOVID, probSevere)",
    ),
    citation="Revel et al. 2021, doi:10.1148/radiol.2021210384",
    labels={"covid": ("negative", "positive"), "severe": ("no", "yes")},
    layout_verified=False,
)
MAX_HEADER_BYTES = 1 << 14
_CLASSES = {
    "probCOVID": ("covid", {"0": "negative", "1": "positive"}),
    "probSevere": ("severe", {"0": "no", "1": "yes"}),
}


def read(root: Path) -> DatasetRows:
    """Every scan, with the classes that the reference gives it.

    Raises:
        DataError: no .mha file, or a reference that cannot be read.
    """
    folders = (root / "data" / "mha", root / "mha")
    files = [
        file
        for folder in folders
        for file in visible(folder)
        if re.fullmatch(r"[\w-]+\.mha", file.name)
    ]
    if not files:
        raise wrong_layout(INFO, "no file such as data/mha/1234.mha")
    tally = Tally()
    reference = _reference(root)
    rows = []
    for file in files:
        labels = reference.get(file.stem, {})
        tally.add("scan(s) without a row in reference.csv: no classes", int(not labels))
        rows.append(
            Row(
                scan=file.stem,
                patient=file.stem,
                modality="CT",
                source=Source(below(root, file), "itk"),
                labels=labels,
                facts=_facts(file),
            )
        )
    missing = len(reference.keys() - {file.stem for file in files})
    tally.add("row(s) of reference.csv without a scan", missing)
    return sorted_rows(rows, tally.lines)


def _reference(root: Path) -> dict[str, dict[str, str]]:
    files = [*root.glob("reference.csv"), *root.glob("*/reference.csv")]
    table = {}
    for cells in read_table(files[0]) if files else ():
        labels = {}
        for column, (name, classes) in _CLASSES.items():
            found = classes.get(number_text(cells.get(column, "")))
            if found:
                labels[name] = found
        patient = number_text(cells.get("PatientID", ""))
        if patient and labels:
            table[patient] = labels
    return table


def _facts(file: Path) -> dict[str, str]:
    """Age and sex in the text at the start of the file; what is not there is left out."""
    with file.open("rb") as stream:
        text = stream.read(MAX_HEADER_BYTES).split(b"ElementDataFile")[0].decode("latin-1")
    facts = {}
    for name, pattern in (("age", r"0*(\d{1,3})Y?"), ("sex", r"([MF])")):
        field = rf"(?im)^(?:Patient)?{name}\s*=\s*{pattern}\s*$"
        match = re.search(field, text)
        if match:
            facts[name] = match[1]
    return facts


ADAPTER = Adapter(INFO, read)

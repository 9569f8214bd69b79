"""FeTS 2022: the patients of BraTS 2021 with the institution that each comes from.

Folders, file names, both partition tables and the number of patients at each of the 23
institutions are verified. ``partitioning_2.csv`` cuts the large institutions by tumour size
into 33 parts. The values of the outlines are those of BraTS 2021. Validation patients stand in no
partition and have no outlines, so there is no split; the fact ``release`` marks them.
"""

from collections.abc import Mapping
from pathlib import Path

from simulation.datasets.brats21 import STRUCTURES, glioma_rows
from simulation.datasets.rows import Adapter, DatasetInfo, DatasetRows, sorted_rows
from simulation.datasets.tables import Tally, number_text, read_table, said

INFO = DatasetInfo(
    name="fets22",
    title="FeTS 2022",
    modalities=("MR",),
    size="1251 patients with outlines and 219 without, 4 sequences each, about 13 GB",
    licence="free after registration",
    url="https://www.synapse.org/fets2022",
    site="institution, 1 to 23, by partitioning_1.csv",
    site_verified=True,
    layout=(
        "FeTS2022_00000/FeTS2022_00000_{flair,t1,t1ce,t2,seg}.nii.gz, here or below "
        "MICCAI_FeTS2022_TrainingData",
        "partitioning_1.csv and partitioning_2.csv (Partition_ID, Subject_ID), here or in the same "
        "folder",
    ),
    citation="Pati et al. 2021, arXiv:2105.05874",
    structures=STRUCTURES,
    shares_patients_with=("brats21", "msd"),
)
PARTITIONS = ("partition_1", "partition_2")


def read(root: Path) -> DatasetRows:
    """The scans of every patient's folder, with both partitions as facts.

    Raises:
        DataError: no patient's folder, or a table that cannot be read.
    """
    tally = Tally()
    notes = []
    tables = {}
    for number, name in enumerate(PARTITIONS, start=1):
        tables[name], problem = _partition(root, f"partitioning_{number}.csv", tally)
        notes += [problem] if problem else []

    def said_of(patient: str) -> tuple[str, Mapping[str, str]]:
        facts = {name: table[patient] for name, table in tables.items() if patient in table}
        return facts.get(PARTITIONS[0], ""), facts

    rows = glioma_rows(root, INFO, r"FeTS2022_\d{5}", said_of=said_of, tally=tally)
    seen = {row.patient for row in rows}
    for name, table in tables.items():
        tally.add(f"patient(s) of {name} have no folder", len(table.keys() - seen))
    training = {row.patient for row in rows if row.facts.get("release") != "validation"}
    for name, table in tables.items():
        if table:
            tally.add(f"training patient(s) stand not in {name}", len(training - table.keys()))
    return sorted_rows(rows, (*notes, *tally.lines))


def _partition(root: Path, name: str, tally: Tally) -> tuple[dict[str, str], str]:
    """Part of each patient by name, and why there is none.

    A patient in two parts is in neither: which is right cannot be known.
    """
    found = sorted([*root.glob(name), *root.glob(f"*/{name}"), *root.glob(f"*/*/{name}")])
    if not found:
        return {}, f"no {name}: its parts are unknown"
    table: dict[str, str] = {}
    twice = set()
    for cells in read_table(found[0]):
        patient = said(cells.get("Subject_ID", ""))
        part = number_text(cells.get("Partition_ID", ""))
        if table.get(patient, part) != part:
            twice.add(patient)
        if patient and part:
            table[patient] = part
    tally.add(f"patient(s) stand in two parts of {name} and count as in none", len(twice))
    return {patient: part for patient, part in table.items() if patient not in twice}, ""


ADAPTER = Adapter(INFO, read)

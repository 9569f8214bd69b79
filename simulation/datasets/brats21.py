"""BraTS 2021: glioma in four MR sequences, co-registered and without the skull.

Folders, file names and the values of the outlines are verified, and so are the names of the
columns in ``BraTS21-17_Mapping.csv`` that say institution and collection. That table comes apart
from the images; without it the site is unknown. No split: the outlines of the validation release
were never published, so a test set of it could judge no segmentation. Its scans are marked by the
fact ``release``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

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
from simulation.datasets.tables import (
    Tally,
    below,
    folders_named,
    nifti_file,
    number_text,
    read_table,
    said,
)

SEQUENCES = ("flair", "t1", "t1ce", "t2")
STRUCTURES = {1: "necrotic core", 2: "oedema", 4: "enhancing tumour"}
MAPPING = "BraTS21-17_Mapping.csv"
INFO = DatasetInfo(
    name="brats21",
    title="BraTS 2021",
    modalities=("MR",),
    size="1251 patients with outlines and 219 without, 4 sequences each, about 13 GB",
    licence="free after registration; some copies say CC BY-NC-SA 4.0",
    url="https://www.synapse.org/brats",
    site=f"institution number in {MAPPING}; unknown without it, see fets22",
    site_verified=True,
    layout=(
        "BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz, here or up to two folders "
        "down",
        f"{MAPPING}, optional, here or one folder down",
    ),
    citation="Baid et al. 2021, arXiv:2107.02314",
    structures=STRUCTURES,
    shares_patients_with=("fets22", "msd"),
)
# What a table says of a patient: site, and facts by name.
Said = tuple[str, Mapping[str, str]]


def read(root: Path) -> DatasetRows:
    """The scans of every patient's folder.

    Raises:
        DataError: no patient's folder, or a table that cannot be read.
    """
    tally = Tally()
    table = _mapping(root)
    rows = glioma_rows(
        root, INFO, r"BraTS2021_\d{5}", said_of=lambda patient: table.get(patient), tally=tally
    )
    notes = () if table else (f"no {MAPPING}: sites are unknown",)
    return sorted_rows(rows, (*notes, *tally.lines))


def _mapping(root: Path) -> dict[str, Said]:
    found = [*root.glob(MAPPING), *root.glob(f"*/{MAPPING}")]
    if not found:
        return {}
    table: dict[str, Said] = {}
    for cells in read_table(found[0]):
        patient = said(cells.get("BraTS2021", ""))
        collection = _starting(cells, "Data Collection")
        facts = {"collection": collection} if collection else {}
        if patient:
            table[patient] = (number_text(_starting(cells, "Site No")), facts)
    return table


def _starting(cells: Mapping[str, str], start: str) -> str:
    """The cell below the first heading that begins so; headings go on with an explanation."""
    return next((said(cell) for name, cell in cells.items() if name.startswith(start)), "")


def glioma_rows(
    root: Path,
    info: DatasetInfo,
    pattern: str,
    *,
    said_of: Callable[[str], Said | None],
    tally: Tally,
) -> list[Row]:
    """Rows of all patients' folders, one a sequence.

    Args:
        root: of the data set.
        info: of the data set, for the error.
        pattern: that the names of patients' folders fit.
        said_of: what tables say of a patient; None where they say nothing.
        tally: takes what is left out or doubted.

    Raises:
        DataError: no patient's folder.
    """
    rows: dict[str, Row] = {}
    folders = folders_named(root, pattern, depth=3)
    if not folders:
        raise wrong_layout(info, f"no folder such as {info.layout[0].split('/', 1)[0]}")
    for folder in folders:
        if f"{folder.name}-{SEQUENCES[0]}" in rows:
            tally.add("patient(s) left out the second time: two folders of one name")
            continue
        for row in _patient(root, folder, said_of(folder.name), tally):
            rows[row.scan] = row
    return list(rows.values())


def _patient(root: Path, folder: Path, words: Said | None, tally: Tally) -> list[Row]:
    site, facts = words or ("", {})
    release = _release(root, folder)
    seg = nifti_file(folder, f"{folder.name}_seg")
    if seg is None and release != "validation":
        tally.add("patient(s) without outlines")
    rows = []
    for sequence in SEQUENCES:
        file = nifti_file(folder, f"{folder.name}_{sequence}")
        if file is None:
            tally.add(f"patient(s) without the sequence {sequence}")
            continue
        rows.append(
            Row(
                scan=f"{folder.name}-{sequence}",
                patient=folder.name,
                modality="MR",
                source=Source(below(root, file), "nifti"),
                site=site,
                sequence=sequence,
                masks=(Mask(Source(below(root, seg), "nifti")),) if seg else (),
                facts={**({"release": release} if release else {}), **facts},
            )
        )
    return rows


def _release(root: Path, folder: Path) -> str:
    """``training`` or ``validation`` by the folders above; empty where they do not say."""
    above = [root.name, *folder.relative_to(root).parts[:-1]]
    for name in reversed([part.casefold() for part in above]):
        for word in ("validation", "training"):
            if word in name:
                return word
    return ""


ADAPTER = Adapter(INFO, read)

"""ADNI: brains on the way to Alzheimer's disease, from about 60 sites.

The way a download comes about is verified; folders, file names and the columns of the collection's
table are from memory, so folders between subject and image may be named anything. The site is the
first three digits of the subject's number.
"""

import re
from pathlib import Path

from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Row,
    Source,
    SourceKind,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import (
    Table,
    Tally,
    below,
    folders_named,
    number_text,
    read_table,
    said,
    scan_name,
    visible,
)

INFO = DatasetInfo(
    name="adni",
    title="ADNI",
    modalities=("MR",),
    size="more than 2,000 people; a collection holds what its maker chose",
    licence="ADNI data use agreement; may not be passed on",
    url="https://adni.loni.usc.edu/",
    site="first three digits of the subject's number",
    site_verified=False,
    layout=(
        "ADNI/002_S_0295/MP-RAGE/2006-04-18_08_20_30.0/I13722/ with one *.nii or the *.dcm of one "
        "series",
        "the collection's table (*.csv with the columns Image Data ID, Subject, Group, Sex, Age, "
        "Visit, Modality, Description), optional, here or one folder down",
    ),
    citation="Jack et al. 2008, J Magn Reson Imaging 27(4)",
    labels={"diagnosis": ("CN", "SMC", "EMCI", "MCI", "LMCI", "AD"), "sex": ("male", "female")},
    layout_verified=False,
)
_SUBJECT = r"(\d{3})_S_\d{4,5}"
_IMAGE = r"[IS]\d+"
_KEY = "Image Data ID"
_MR = frozenset({"", "mri", "mr"})
_SEXES = {"m": "male", "f": "female", "male": "male", "female": "female"}


def read(root: Path) -> DatasetRows:
    """Every MR image, with what the collection's table says of it.

    Raises:
        DataError: no subject's folder with an image, or a table that cannot be read.
    """
    tally = Tally()
    table = _collection(root)
    rows: dict[str, Row] = {}
    seen = set()
    for subject in folders_named(root, _SUBJECT, depth=4):
        for folder in folders_named(subject, _IMAGE, depth=4):
            row = _row(root, subject, folder, table, tally)
            if row is None:
                continue
            seen.add(row.facts["image"])
            if row.scan in rows:
                tally.add("image(s) left out the second time: in two parts of the download")
            rows.setdefault(row.scan, row)
    if not rows:
        raise wrong_layout(INFO, "no MR image in a folder such as 002_S_0295/.../I13722")
    notes = () if table else ("no collection's table: diagnoses are unknown",)
    wanted = {image for image, cells in table.items() if _is_mr(cells)}
    tally.add("MR image(s) of the table have no file", len(wanted - seen))
    if table:
        tally.add("image(s) stand not in the table", len(seen - table.keys()))
    return sorted_rows(list(rows.values()), (*notes, *tally.lines))


def _collection(root: Path) -> dict[str, dict[str, str]]:
    """Lines of all tables of images below the root, by the image's number without its letter."""
    lines: Table = []
    for file in [*visible(root), *(file for folder in visible(root) for file in visible(folder))]:
        if file.suffix.casefold() == ".csv" and file.is_file():
            lines += [cells for cells in read_table(file) if _KEY in cells]
    return {cells[_KEY].lstrip("Ii"): cells for cells in lines if said(cells[_KEY])}


def _is_mr(cells: dict[str, str]) -> bool:
    return said(cells.get("Modality", "")).casefold() in _MR


def _row(
    root: Path, subject: Path, folder: Path, table: dict[str, dict[str, str]], tally: Tally
) -> Row | None:
    file, kind = _pixels(folder, tally)
    if file is None:
        return None
    name = file.name if kind == "nifti" else _slices(folder)[0].name
    number = _number(folder, name)
    cells = table.get(number, {})
    if not _is_mr(cells) or (not cells and re.search(r"_(PT|PET)_", name)):
        tally.add("image(s) left out: no MR")
        return None
    steps = folder.relative_to(subject).parts
    description = said(cells.get("Description", "")) or steps[0]
    labels = {
        "diagnosis": said(cells.get("Group", "")),
        "sex": _SEXES.get(cells.get("Sex", "").casefold(), ""),
    }
    facts = {
        "image": number,
        "visit": said(cells.get("Visit", "")),
        "age": number_text(cells.get("Age", "")),
        "type": said(cells.get("Type", "")),
    }
    return Row(
        scan=scan_name(f"{subject.name}-I{number}"),
        patient=subject.name,
        modality="MR",
        source=Source(below(root, file), kind),
        site=subject.name[:3],
        sequence=description,
        labels={name: text for name, text in labels.items() if text},
        facts={name: text for name, text in facts.items() if text},
    )


def _pixels(folder: Path, tally: Tally) -> tuple[Path | None, SourceKind]:
    """The NIfTI file of an image's folder, or the folder itself if it holds DICOM files."""
    volumes = [file for file in visible(folder) if file.name.endswith((".nii", ".nii.gz"))]
    if len(volumes) > 1:
        tally.add("image folder(s) hold several volumes; the first by name is taken")
    if volumes:
        return volumes[0], "nifti"
    if _slices(folder):
        return folder, "dicom"
    tally.add("image folder(s) left out: neither NIfTI nor DICOM files")
    return None, "nifti"


def _slices(folder: Path) -> list[Path]:
    return [file for file in visible(folder) if file.suffix.casefold() == ".dcm"]


def _number(folder: Path, file: str) -> str:
    """The image's number: of the folder ``I13722``, else of a file ``..._I13722.nii``."""
    found = re.search(r"_I(\d+)\.", file)
    if folder.name.startswith("I") or found is None:
        return folder.name.removeprefix("I")
    return found.group(1)


ADAPTER = Adapter(INFO, read)

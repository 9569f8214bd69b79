"""OASIS-1: brains of 416 people from 18 to 96 years, a hundred of them with dementia.

Two layouts. The original discs: folders and the names of the RAW and T88 images are verified, the
names below FSL_SEG and the keys of a session's text file are from memory. The copy made for
neurite: file names are verified, the values of ``seg4`` are from memory.

One row a session: the brain in atlas space with its outlines if it is there (T88_111, aligned),
else the image that comes nearest to the scanner's. The four RAW images are repeats of one scan.
Outlines of neurite get the numbers of FSL_SEG; its cortex and deep grey matter are one.
"""

import re
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
    visible,
)

TABLE = "oasis_cross-sectional*.csv"
INFO = DatasetInfo(
    name="oasis1",
    title="OASIS-1",
    modalities=("MR",),
    size="416 people, 436 sessions, about 16 GB; neurite's copy 414 people, 6.6 GB",
    licence="OASIS data use agreement",
    url="https://sites.wustl.edu/oasisbrains/",
    site="one site",
    site_verified=True,
    layout=(
        "disc1/OAS1_0001_MR1/{RAW, PROCESSED/MPRAGE/T88_111, FSL_SEG}/*.hdr and *.img, or",
        "OASIS_OAS1_0001_MR1/{aligned_norm,aligned_seg4,norm,seg4}.nii.gz",
        "oasis_cross-sectional.csv, optional, here or one folder down",
    ),
    citation="Marcus et al. 2007, J Cogn Neurosci 19(9)",
    structures={1: "cerebrospinal fluid", 2: "grey matter", 3: "white matter"},
    labels={"cdr": ("0", "0.5", "1", "2"), "sex": ("male", "female")},
    layout_verified=False,
)
_SESSION = r"(?:OASIS_)?(OAS1_\d{4})_(MR\d)"
# Image below a session's folder, its kind, and where its outlines lie; the first found is taken.
_IMAGES = (
    ("PROCESSED/MPRAGE/T88_111", "*_t88_masked_gfc.hdr", "t88"),
    ("PROCESSED/MPRAGE/T88_111", "*_t88_gfc.hdr", "t88"),
    ("PROCESSED/MPRAGE/SUBJ_111", "*.hdr", "subject"),
    ("RAW", "*_mpr-1_anon.hdr", "raw"),
    ("RAW", "*_mpr-*_anon.hdr", "raw"),
)
_NEURITE = (("aligned_norm", "aligned_seg4", "aligned"), ("norm", "seg4", "conformed"))
_SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}


def read(root: Path) -> DatasetRows:
    """One row for each session.

    Raises:
        DataError: no session's folder with an image, or a table that cannot be read.
    """
    tally = Tally()
    tables = sorted([*root.glob(TABLE), *root.glob(f"*/{TABLE}")])
    people = {said(cells.get("ID", "")): cells for cells in read_table(tables[0])} if tables else {}
    notes = [] if tables else ["no oasis_cross-sectional.csv: text files of sessions are read"]
    rows: dict[str, Row] = {}
    for folder in folders_named(root, _SESSION, depth=3):
        named = re.fullmatch(_SESSION, folder.name)
        if named is None:
            continue
        row = _row(root, folder, named, people, tally)
        if row is None:
            tally.add("session(s) left out: no whole image")
        elif row.scan in rows:
            tally.add("session(s) left out the second time: two folders of one name")
        else:
            rows[row.scan] = row
    if not rows:
        raise wrong_layout(INFO, "no folder OAS1_0001_MR1 or OASIS_OAS1_0001_MR1 with an image")
    tally.add(
        "session(s) without a rating of dementia (cdr); most are of young people",
        sum("cdr" not in row.labels for row in rows.values()),
    )
    return sorted_rows(list(rows.values()), (*notes, *tally.lines))


def _row(
    root: Path,
    folder: Path,
    named: re.Match[str],
    people: dict[str, dict[str, str]],
    tally: Tally,
) -> Row | None:
    found = _neurite(root, folder) or _original(root, folder)
    if found is None:
        return None
    source, masks, space = found
    if not masks:
        tally.add("session(s) without outlines")
    patient, session = named.groups()
    person = people.get(f"{patient}_{session}") or _text(folder / f"{patient}_{session}.txt")
    cdr = number_text(person.get("CDR", ""))
    sex = _SEXES.get(person.get("M/F", "").casefold(), "")
    age = number_text(person.get("Age", "") or person.get("AGE", ""))
    return Row(
        scan=f"{patient}_{session}",
        patient=patient,
        modality="MR",
        source=source,
        vendor="Siemens",
        sequence="T1",
        labels={**({"cdr": cdr} if cdr else {}), **({"sex": sex} if sex else {})},
        masks=masks,
        facts={"space": space, **({"age": age} if age else {})},
    )


def _neurite(root: Path, folder: Path) -> tuple[Source, tuple[Mask, ...], str] | None:
    for name, outlines, space in _NEURITE:
        image, seg = nifti_file(folder, name), nifti_file(folder, outlines)
        if image is None:
            continue
        if seg is None:
            return Source(below(root, image), "nifti"), (), space
        values = Source(below(root, seg), "nifti")
        # 1 cortex, 2 deep grey matter, 3 white matter, 4 fluid: later ones lie over earlier ones.
        masks = (Mask(values, 2, 0.0), Mask(values, 3, 2.0), Mask(values, 1, 3.0))
        return Source(below(root, image), "nifti"), masks, space
    return None


def _original(root: Path, folder: Path) -> tuple[Source, tuple[Mask, ...], str] | None:
    for place, pattern, space in _IMAGES:
        images = _whole(folder / place, pattern)
        if images:
            outlines = _whole(folder / "FSL_SEG", "*_fseg.hdr") if space == "t88" else []
            masks = tuple(Mask(Source(below(root, file), "analyze")) for file in outlines[:1])
            return Source(below(root, images[0]), "analyze"), masks, space
    return None


def _whole(folder: Path, pattern: str) -> list[Path]:
    """Headers with their pixels beside them."""
    return [
        file
        for file in visible(folder)
        if file.match(pattern) and file.with_suffix(".img").is_file()
    ]


def _text(file: Path) -> dict[str, str]:
    """A session's text file: ``KEY:  value`` lines."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {
        name.strip(): said(value)
        for name, mark, value in (line.partition(":") for line in lines)
        if mark
    }


ADAPTER = Adapter(INFO, read)

"""ACDC: short-axis cine MR of the heart, five groups of patients.

Folders, file names and groups are verified. The keys of ``Info.cfg`` are from memory: one that is
missing leaves the phase or the group unknown. Frames at the end of diastole and of systole come
as files with outlines; where such a file is missing, the volume of the 4D file is taken instead,
without outlines. The other phases of the cycle look almost the same and are no rows.
"""

import re
from pathlib import Path

from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Mask,
    OfficialSplit,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below, folders_named, nifti_file, said, visible

GROUPS = ("NOR", "MINF", "DCM", "HCM", "RV")
INFO = DatasetInfo(
    name="acdc",
    title="ACDC",
    modalities=("MR",),
    size="150 patients, 2 outlined phases each, about 2.3 GB",
    licence="free for research; CC BY-NC-SA 4.0 as the challenge's page says",
    url="https://www.creatis.insa-lyon.fr/Challenge/acdc/",
    site="one hospital (Dijon), two Siemens scanners that are not told apart",
    site_verified=True,
    layout=(
        "training/patient001/patient001_4d.nii.gz, _frame01.nii.gz, _frame01_gt.nii.gz, Info.cfg; "
        "folder training or testing here or one folder down",
    ),
    citation="Bernard et al. 2018, IEEE TMI 37(11)",
    structures={1: "right ventricle", 2: "myocardium", 3: "left ventricle"},
    labels={"pathology": GROUPS},
)
_SPLITS: dict[str, OfficialSplit] = {"training": "train", "testing": "test"}
_PHASES = ("ED", "ES")


def read(root: Path) -> DatasetRows:
    """Both phases of every patient.

    Raises:
        DataError: no patient's folder.
    """
    tally = Tally()
    rows: dict[str, Row] = {}
    for folder in folders_named(root, r"patient\d{3}", depth=3):
        found = _patient(root, folder, tally)
        if not found:
            tally.add("patient(s) without a usable frame")
        if any(row.scan in rows for row in found):
            tally.add("patient(s) left out the second time: two folders of one name")
            continue
        rows.update({row.scan: row for row in found})
    if not rows:
        raise wrong_layout(INFO, "no frame of a patient such as training/patient001")
    return sorted_rows(list(rows.values()), tally.lines)


def _patient(root: Path, folder: Path, tally: Tally) -> list[Row]:
    info = _info(folder / "Info.cfg")
    phases = {int(info[phase]): phase for phase in _PHASES if info.get(phase, "").isdigit()}
    if len(phases) < len(_PHASES):
        tally.add("patient(s) whose Info.cfg does not name both phases")
    group = info.get("Group", "").upper()
    if group not in GROUPS:
        tally.add("patient(s) without a group")
    sources = _frames(root, folder)
    missing = [frame for frame in phases if frame not in sources]
    whole = nifti_file(folder, f"{folder.name}_4d")
    for frame in missing if whole else ():
        tally.add("frame(s) taken from the 4D file, without outlines")
        sources[frame] = (Source(below(root, whole or folder), "nifti", index=frame - 1), None)
    rows = []
    for frame, (source, outline) in sorted(sources.items()):
        if outline is None and source.index is None:
            tally.add("frame(s) without outlines")
        rows.append(
            Row(
                scan=f"{folder.name}-frame{frame:02d}",
                patient=folder.name,
                modality="MR",
                source=source,
                vendor="Siemens",
                sequence=phases.get(frame, ""),
                labels={"pathology": group} if group in GROUPS else {},
                masks=(Mask(outline),) if outline else (),
                split=_SPLITS.get(folder.parent.name, ""),
                facts={
                    name.casefold(): info[name] for name in ("Height", "Weight") if info.get(name)
                },
            )
        )
    return rows


def _frames(root: Path, folder: Path) -> dict[int, tuple[Source, Source | None]]:
    """Image and outlines by the frame's number, which counts from 1."""
    found: dict[int, tuple[Source, Source | None]] = {}
    for file in visible(folder):
        named = re.fullmatch(rf"({folder.name}_frame(\d+))\.nii(\.gz)?", file.name)
        if named and file.is_file():
            outline = nifti_file(folder, f"{named.group(1)}_gt")
            mask = Source(below(root, outline), "nifti") if outline else None
            found[int(named.group(2))] = (Source(below(root, file), "nifti"), mask)
    return found


def _info(file: Path) -> dict[str, str]:
    """Keys and values of ``Info.cfg``; empty where it is missing or damaged."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): said(value) for name, value in pairs}


ADAPTER = Adapter(INFO, read)

"""POCUS (covid19_ultrasound): lung ultrasound from many sources.

Verified: file names, both layouts (``pocus_videos/convex/Cov-...``; ``pocus_images/Convex/covid``
with frames of videos) and the columns of ``dataset_metadata.csv``, which misses files. The class is
the name's start. The site is the source that the name speaks of, else the host of the file's URL,
else unknown. People are numbered in the table; without a line there, clips whose names differ in a
counter only are one person, and frames of a video are one with it: too few people rather than one
on both sides of a split.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import (
    Tally,
    below,
    folders_named,
    read_table,
    said,
    scan_name,
    visible,
)
from simulation.datasets.us_files import recording_kind

CLASSES = {"cov": "covid", "pneu": "pneumonia", "reg": "regular", "vir": "viral"}
TABLE = "dataset_metadata.csv"
MAX_DEPTH = 4
INFO = DatasetInfo(
    name="pocus",
    title="POCUS (covid19_ultrasound)",
    modalities=("US",),
    size="about 200 videos and 60 images, 0.4 GB",
    licence="per file, see its fact licence; much is CC BY-NC 4.0, some none",
    url="https://github.com/jannisborn/covid19_ultrasound",
    site="source named in the file's name (northumbria, avi, atlas, litfl, neuruppin, ...)",
    site_verified=True,
    layout=(
        "data/pocus_videos/convex/Cov-Atlas-Day+1.gif, data/pocus_images/linear/Reg_....png",
        "or data/pocus_images/Convex/covid/Cov-Atlas-Day+1.gif_frame3.jpg",
        f"optional: data/{TABLE} (Filename, License, Patient ID / Name, ...)",
    ),
    citation="Born et al. 2021, Applied Sciences 11(2)",
    labels={"pathology": tuple(CLASSES.values())},
)
_SOURCES = {
    "neuruppin": r"pat\d+_?image|(?:^|[-_])image_\d{6}",
    "northumbria": "northumbria",
    "avi": r"(?:^|[-_])avi[-_]",
    "atlas": "atlas",
    "butterfly": "butterfly",
    "grepmed": r"grep|gred-",
    "litfl": "liftl|litfl",
    "clarius": "clarius",
    "radiopaedia": r"radiopa?ed",
    "youtube": "youtube",
    "everyday": "everyday",
    "bcpocus": "bcpocus",
    "combatting": "combatting",
    "volpicelli": r"volp[ei]celli",
    "denault": "denault",
    "pregnant": "pregnant",
    "clinicalreview": "clinicalreview",
    "advances": "advances",
    "rippey": "rippey",
}
_FRAME = re.compile(r"_?frame_?\d+$", re.IGNORECASE)
_SUFFIX = re.compile(r"\.(?:mp4|avi|mov|gif|mpe?g|jpe?g|png)$", re.IGNORECASE)
# One counter or remark at the end of a name; several are taken off one after the other.
_COUNTER = re.compile(
    r"(?:[-_ ]*(?:vid|video|clip|mov|image|img|day|example|v)?[-_ +]*\(?(?<!\d)\d+\)?"
    r"|[-_ ]*(?:trimmed|crop))$",
    re.IGNORECASE,
)
_FOLDERS = r"(?i)pocus_(?:videos|images)"


def read(root: Path) -> DatasetRows:
    """Every video and image whose name starts with a class.

    Raises:
        DataError: no folder of videos or images with such a file.
    """
    tally = Tally()
    table = _table(root, tally)
    folders = folders_named(root, _FOLDERS, depth=2)
    if re.fullmatch(_FOLDERS, root.name):
        folders.append(root)
    rows: dict[str, Row] = {}
    for top in folders:
        for file in _files(top):
            row = _row(root, top, file, table, tally)
            if row is not None and row.scan in rows:
                tally.add("file(s) left out: two names that differ in signs only")
            elif row is not None:
                rows[row.scan] = row
    if not rows:
        raise wrong_layout(INFO, "no file such as pocus_videos/convex/Cov-....mp4")
    tally.add("file(s) of an unknown source", sum(not row.site for row in rows.values()))
    return sorted_rows(list(rows.values()), tally.lines)


def _files(folder: Path, depth: int = MAX_DEPTH) -> list[Path]:
    """Files at most so many folders down, through links too."""
    entries = visible(folder)
    inner = [entry for entry in entries if entry.is_dir() and depth]
    deeper = [file for entry in inner for file in _files(entry, depth - 1)]
    return [entry for entry in entries if entry.is_file()] + deeper


def _row(
    root: Path, top: Path, file: Path, table: dict[str, dict[str, str]], tally: Tally
) -> Row | None:
    kind = recording_kind(file)
    if kind is None:
        return None
    pathology = _class(file.name)
    if not pathology:
        tally.add("file(s) left out: the name starts with no class")
        return None
    recording = _recording(file.name)
    line = table.get(recording.casefold(), {})
    if table and not line:
        tally.add(f"file(s) without a line in {TABLE}")
    inner = file.relative_to(top).as_posix().casefold()
    probe = next((name for name in ("convex", "linear") if name in inner.split("/")), "")
    facts = {
        "probe": probe or said(line.get("Probe", "")),
        "licence": said(line.get("License", "")),
    }
    return Row(
        scan=scan_name(f"{top.name.casefold()}-{probe}-{file.name}"),
        patient=_patient(recording, line),
        modality="US",
        source=Source(below(root, file), kind),
        site=_site(recording, line),
        vendor="Butterfly" if "butterfly" in recording.casefold() else "",
        labels={"pathology": pathology},
        facts={name: fact for name, fact in facts.items() if fact},
    )


def _table(root: Path, tally: Tally) -> dict[str, dict[str, str]]:
    """Lines of the table by the recording's name in small letters."""
    places = (root / TABLE, root / "data" / TABLE, root.parent / TABLE)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        tally.add(f"table missing: {TABLE}")
        return {}
    lines = {_recording(line.get("Filename", "")).casefold(): line for line in read_table(file)}
    return {name: line for name, line in lines.items() if name}


def _recording(name: str) -> str:
    """A file's name without suffixes and number of a frame: the video that it is, or is of."""
    stem = _SUFFIX.sub("", name.strip())
    return _SUFFIX.sub("", _FRAME.sub("", stem)).strip()


def _class(name: str) -> str:
    start = re.match(r"([a-z]+)[-_]", name.casefold())
    return CLASSES.get(start[1], "") if start else ""


def _site(recording: str, line: dict[str, str]) -> str:
    for site, pattern in _SOURCES.items():
        if re.search(pattern, recording, re.IGNORECASE):
            return site
    try:
        host = urlsplit(line.get("URL (Video Name)", "").split()[0]).hostname or ""
    except (ValueError, IndexError):
        return ""
    return host.removeprefix("www.")


def _patient(recording: str, line: dict[str, str]) -> str:
    number = said(line.get("Patient ID / Name", ""))
    if number and number.casefold() != "nd":
        return scan_name(f"{said(line.get('Source ID', '')) or 'x'}.{number}")
    numbered = re.search(r"pat\d+(?=_?image)", recording, re.IGNORECASE)
    if numbered:
        return numbered[0].casefold()
    left, before = recording, ""
    while left != before:
        before, left = left, _COUNTER.sub("", left)
    if not re.search(r"[-_].", left):
        # A class alone is no person, but a class of one source may be.
        site = _site(recording, line)
        left = f"{left}-{site}" if site else recording
    return scan_name(left).casefold()


ADAPTER = Adapter(INFO, read)

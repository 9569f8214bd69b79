"""LIDC-IDRI: chest CT with nodules that up to four readers outlined.

The field of the maker (DICOM Manufacturer) and the elements of the readings are verified; the tree
of folders is from memory, so series are looked for at any depth below a patient's folder, and
readings in the series' folders or below LIDC-XML-only (matched by the series' number).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from xml.etree.ElementTree import Element

import pydicom

from agssd_core.data.deidentify import vendor_name
from agssd_core.data.dicom import looks_like_dicom
from agssd_core.data.quiet import quiet_readers
from agssd_core.errors import DataError
from simulation.datasets.contours import outlined_nodules, parse_reading, text_of
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
from simulation.datasets.tables import Tally, below, folders_named, visible

INFO = DatasetInfo(
    name="lidc-idri",
    title="LIDC-IDRI",
    modalities=("CT",),
    size="1010 patients, 1018 CT series, about 125 GB",
    licence="CC BY 3.0",
    url="https://www.cancerimagingarchive.net/collection/lidc-idri/",
    site="maker of the scanner (DICOM Manufacturer): GE, Philips, Siemens, Canon (Toshiba)",
    site_verified=True,
    layout=(
        "LIDC-IDRI/LIDC-IDRI-0001/<study>/<series>/1-001.dcm; the root may also be LIDC-IDRI",
        "one .xml file in each series, or LIDC-XML-only/.../*.xml",
    ),
    citation="Armato et al. 2011, doi:10.1118/1.3528204",
    structures={1: "nodule"},
    labels={"nodule": ("absent", "present"), "malignancy": ("low", "high")},
    shares_patients_with=("luna16", "medmnist3d"),
    layout_verified=False,
)
PATIENT = r"LIDC-IDRI-\d{4}"
_FIELDS = ["Modality", "Manufacturer", "SeriesInstanceUID"]
# Of a nodule's likelihood of malignancy, 1 to 5, by its readers.
_INDETERMINATE = 3


@dataclass(frozen=True)
class Series:
    """One CT series of a patient.

    Attributes:
        number: SeriesInstanceUID; stays in this process.
    """

    folder: Path
    patient: str
    number: str
    vendor: str


def read(root: Path) -> DatasetRows:
    """Every CT series, its maker, and its readings.

    Label ``nodule`` is present where more than half of the readers outlined one (3 mm or more).
    Label ``malignancy``: each reader's highest rating, the median of the readers; above 3 of 5 is
    high, below it low, 3 is no class.

    Raises:
        DataError: no patient's folder, or no CT series in any.
    """
    tally = Tally()
    found = list(find_series(root, tally))
    if not found:
        raise wrong_layout(INFO, "no CT series below a folder such as LIDC-IDRI/LIDC-IDRI-0001")
    apart = _readings_apart(root, tally)
    counts: dict[str, int] = {}
    rows = []
    for series in found:
        counts[series.patient] = counts.get(series.patient, 0) + 1
        reading = _reading_within(series, tally) or apart.get(series.number)
        tally.add("series without readings: no outlines and classes", int(reading is None))
        rows.append(_row(root, series, counts[series.patient], reading))
    tally.add("patient(s) with several series", sum(count > 1 for count in counts.values()))
    return sorted_rows(rows, tally.lines)


def find_series(root: Path, tally: Tally) -> Iterator[Series]:
    """CT series below the patients' folders; of each one file's header is read."""
    for patient in folders_named(root, PATIENT, depth=2):
        for folder in sorted({file.parent for file in patient.rglob("*.dcm")}):
            header = _header(folder)
            if header is None:
                tally.add("folder(s) left out: no readable DICOM file")
            elif header.get("Modality") != "CT":
                tally.add("series left out: no CT (radiographs)")
            else:
                yield Series(
                    folder,
                    patient.name,
                    header.get("SeriesInstanceUID", ""),
                    vendor_name(header.get("Manufacturer", "")),
                )


def _header(folder: Path) -> dict[str, str] | None:
    """A few fields of the first file that can be read."""
    for file in visible(folder):
        if file.suffix != ".dcm" or not looks_like_dicom(file):
            continue
        try:
            with quiet_readers():
                data = pydicom.dcmread(file, specific_tags=_FIELDS, stop_before_pixels=True)
                return {name: str(data.get(name) or "").strip() for name in _FIELDS}
        except Exception:  # noqa: BLE001, S112 - a damaged file may break the reader anywhere
            continue
    return None


def _readings_apart(root: Path, tally: Tally) -> dict[str, tuple[Path, Element]]:
    """Readings of the archive that holds nothing else, by the number of their series."""
    found = {}
    for folder in folders_named(root, r"LIDC-XML-only|tcia-lidc-xml", depth=2):
        for file in sorted(folder.rglob("*.xml")):
            reading = _ct_reading(file, tally)
            if reading is not None:
                number = text_of(reading, "SeriesInstanceUid")
                found[number or text_of(reading, "SeriesInstanceUID")] = (file, reading)
    return found


def _reading_within(series: Series, tally: Tally) -> tuple[Path, Element] | None:
    for file in visible(series.folder):
        if file.suffix.lower() == ".xml":
            reading = _ct_reading(file, tally)
            if reading is not None:
                return file, reading
    return None


def _ct_reading(file: Path, tally: Tally) -> Element | None:
    """None for the readings of radiographs, and for damaged files."""
    if file.name.startswith("."):
        return None
    try:
        reading = parse_reading(file)
    except DataError:
        tally.add("reading(s) left out: no plain, whole XML")
        return None
    return reading if reading.tag.rpartition("}")[2] == "LidcReadMessage" else None


def _row(root: Path, series: Series, count: int, reading: tuple[Path, Element] | None) -> Row:
    masks: tuple[Mask, ...] = ()
    labels: Mapping[str, str] = {}
    if reading is not None:
        masks = (Mask(Source(below(root, reading[0]), "contours"), value=1),)
        labels = _labels(reading[1])
    return Row(
        scan=f"{series.patient}-{count}",
        patient=series.patient,
        modality="CT",
        source=Source(below(root, series.folder), "dicom"),
        site=series.vendor if series.vendor != "other" else "",
        vendor=series.vendor,
        labels=labels,
        masks=masks,
    )


def _labels(reading: Element) -> dict[str, str]:
    readers = outlined_nodules(reading)
    if not readers:
        return {}
    seen = sum(bool(nodules) for nodules in readers)
    labels = {"nodule": "present" if 2 * seen > len(readers) else "absent"}
    highest = [max(ratings) for ratings in map(_ratings, readers) if ratings]
    if highest and median(highest) != _INDETERMINATE:
        labels["malignancy"] = "high" if median(highest) > _INDETERMINATE else "low"
    return labels


def _ratings(nodules: list[Element]) -> list[int]:
    said = [text_of(nodule, "malignancy") for nodule in nodules]
    return [int(text) for text in said if text in {"1", "2", "3", "4", "5"}]


ADAPTER = Adapter(INFO, read)

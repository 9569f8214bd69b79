"""What is known of one scan of a public data set before any pixel is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agssd_core.config.node import ScanModality
from agssd_core.errors import DataError

SourceKind = Literal[
    "nifti",  # 3D, or one volume of a 4D file by ``index``
    "itk",  # .mha, .mhd, .nrrd
    "analyze",  # .hdr and .img
    "npz",  # one row, by ``index``, of the array ``key``
    "dicom",  # a folder that holds one series
    "slices",  # a folder of PNG or JPEG slices, in the order of their numbers
    "image",  # one ultrasound frame
    "video",
    "mat",  # the array ``key`` of a MATLAB file, frames last
    "polygons",  # outlines in an XML file, in pixels
    "contours",  # LIDC-IDRI's readings of one series
]
OfficialSplit = Literal["", "train", "validation", "test"]


@dataclass(frozen=True)
class Source:
    """Where pixels lie.

    Attributes:
        path: below the data set's root, with ``/``; a folder for ``dicom`` and ``slices``.
        index: which volume of a 4D file or which row of an array; None where there is one.
        key: name of the array in an ``npz`` or ``mat`` file, or of the image in ``polygons``.
    """

    path: str
    kind: SourceKind
    index: int | None = None
    key: str = ""


@dataclass(frozen=True)
class Mask:
    """One file of outlines.

    Attributes:
        value: what its pixels above ``threshold`` become; None keeps the file's whole numbers.
            Masks of one value are united; later masks lie over earlier ones.
        threshold: in the file's own numbers; JPEG masks need 127.
    """

    source: Source
    value: int | None = None
    threshold: float = 0.0


@dataclass(frozen=True)
class Row:
    """One scan: a volume of CT or MR, or a clip or still of ultrasound.

    Attributes:
        scan: unique in the data set; letters, digits, ``._-``.
        patient: as the data set numbers people; where it does not, the scan is its own patient.
        site: hospital, scanner or collection that it comes from; empty is unknown.
        vendor: of the scanner, one of ``deidentify.VENDORS``, where it is known.
        sequence: MR sequence, view or phase, such as ``flair`` or ``2CH``.
        labels: classes by the name of what is classified, such as {"pathology": "benign"}.
        masks: outlines of structures, named in ``DatasetInfo.structures``.
        split: the data set's own.
        facts: anything else to divide by, such as {"partition_2": "7"}.
    """

    scan: str
    patient: str
    modality: ScanModality
    source: Source
    site: str = ""
    vendor: str = ""
    sequence: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    masks: tuple[Mask, ...] = ()
    split: OfficialSplit = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetRows:
    """What an adapter found, in the order of ``scan``.

    Attributes:
        notes: what was left out or doubted, one line each with a count; no patient is named.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetInfo:
    """What a researcher wants to know before downloading.

    Attributes:
        name: as commands call it.
        size: patients, scans and GB as published, in words.
        licence: in words, with conditions such as registration.
        url: where to get it.
        site: what the site column is, in words; "one hospital" or "unknown" where it is none.
        site_verified: the site column was read in a published copy or loader, not from memory.
        layout: the folders and files that the adapter expects, one line each.
        structures: value of a mask -> name.
        labels: name of a classification -> classes.
        shares_patients_with: names of data sets in which the same people appear.
        layout_verified: as ``site_verified``, for the layout.
    """

    name: str
    title: str
    modalities: tuple[ScanModality, ...]
    size: str
    licence: str
    url: str
    site: str
    site_verified: bool
    layout: tuple[str, ...]
    citation: str
    structures: Mapping[int, str] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shares_patients_with: tuple[str, ...] = ()
    layout_verified: bool = True


@dataclass(frozen=True)
class Adapter:
    """A data set: its facts, and how its rows are found below a root."""

    info: DatasetInfo
    read: Callable[[Path], DatasetRows]


def wrong_layout(info: DatasetInfo, problem: str) -> DataError:
    """The error for a root that does not look as the data set is published.

    Args:
        info: of the data set.
        problem: what was not found where, relative to the root.
    """
    expected = "\n".join(f"  {line}" for line in info.layout)
    return DataError(
        f"this is not {info.title} in its official layout: {problem}. Expected below the folder "
        f"named:\n{expected}\nUnpack the download again, or name the folder that holds these."
    )


def sorted_rows(rows: Sequence[Row], notes: Sequence[str] = ()) -> DatasetRows:
    """Rows in the order of ``scan``.

    Raises:
        DataError: two rows have the same name.
    """
    ordered = sorted(rows, key=lambda row: row.scan)
    names = {row.scan for row in ordered}
    if len(names) < len(ordered):
        raise DataError(
            f"{len(ordered) - len(names)} scan(s) stand twice in the data set. Unpack each part "
            "of the download once."
        )
    return DatasetRows(tuple(ordered), tuple(notes))

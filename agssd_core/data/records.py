"""What the catalogue knows of one scan: a volume of CT or MR, or an ultrasound clip."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from agssd_core.data.volume import Modality

if TYPE_CHECKING:  # the clip readers load decoders, which who only counts scans does not need
    from agssd_core.data.clips import ClipKind


@dataclass(frozen=True)
class VolumeRecord:
    """One scan of the catalogue.

    Attributes:
        volume: pseudonym, also the stem of its cache files.
        patient: pseudonym; equal at sites that share a secret.
        kind: ``dicom`` or ``nifti``.
        shape: stored size; (columns, rows, slices) for DICOM.
        spacing_mm: of the stored axes.
        fingerprint: changes when a source file does.
    """

    volume: str
    patient: str
    study: str
    modality: Modality
    vendor: str
    model: str
    kind: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    fingerprint: str

    @property
    def name(self) -> str:
        """The volume's pseudonym."""
        return self.volume


@dataclass(frozen=True)
class ClipRecord:
    """One ultrasound clip of the catalogue; a still image is a clip of one frame.

    Attributes:
        clip: pseudonym, also the stem of its cache files.
        patient: pseudonym; equal at sites that share a secret.
        kind: ``us-dicom``, ``image`` or ``video``.
        frames: as the source's header says, before any is thinned out.
        rows, columns: of the source, pixels.
        fingerprint: changes when the source file does.
    """

    clip: str
    patient: str
    study: str
    vendor: str
    model: str
    kind: "ClipKind"
    frames: int
    rows: int
    columns: int
    fingerprint: str

    @property
    def name(self) -> str:
        """The clip's pseudonym."""
        return self.clip

    @property
    def modality(self) -> Literal["US"]:
        """Ultrasound."""
        return "US"


ScanRecord = VolumeRecord | ClipRecord


@dataclass(frozen=True)
class Skipped:
    """Something that was left out; ``reference`` is its public name."""

    reference: str
    reason: str
    paths: tuple[str, ...] = ()


def record_json(record: ScanRecord) -> str:
    """A record as the catalogue stores it."""
    return json.dumps(asdict(record))


def volume_record(text: str) -> VolumeRecord:
    """Undo ``record_json`` for a volume."""
    plain = json.loads(text)
    return VolumeRecord(
        **{**plain, "shape": tuple(plain["shape"]), "spacing_mm": tuple(plain["spacing_mm"])}
    )


def clip_record(text: str) -> ClipRecord:
    """Undo ``record_json`` for a clip."""
    return ClipRecord(**json.loads(text))

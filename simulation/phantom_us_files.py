"""Write ultrasound phantoms as hospitals have them: DICOM clips and stills, PNG, mp4."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from simulation.phantom_files import STUDY_DATE
from simulation.phantom_ultrasound import UsLook, UsPhantom

_FRAME_MS = 40.0
_JPEG_QUALITY = 92
# Region Data Type and Region Spatial Format of two-dimensional tissue, DICOM PS3.3 C.8.5.5.
_TISSUE, _PLANE, _CENTIMETRES = 1, 1, 3


@dataclass(frozen=True)
class UsScanLabel:
    """Whose clip it is, and which one."""

    patient: str
    number: int
    look: UsLook
    uid_seed: str


def write_us_png(folder: Path, phantom: UsPhantom, label: UsScanLabel) -> Path:
    """Write the first frame as a PNG file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{label.patient}_{label.number:02d}.png"
    Image.fromarray(phantom.frames[0]).save(file)
    _write_sidecar(file, label)
    return file


def write_us_video(folder: Path, phantom: UsPhantom, label: UsScanLabel) -> Path:
    """Write a clip as mp4 (MPEG-4 part 2); one thread, so equal phantoms give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{label.patient}_{label.number:02d}.mp4"
    rows, columns = phantom.frames.shape[1:3]
    with av.open(str(file), "w", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=round(1000 / _FRAME_MS))
        stream.width, stream.height, stream.pix_fmt = columns, rows, "yuv420p"
        stream.bit_rate = 6_000_000
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for frame in phantom.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    _write_sidecar(file, label)
    return file


def write_us_dicom(folder: Path, phantom: UsPhantom, label: UsScanLabel) -> Path:
    """Write a clip or a still with made-up identifying fields.

    Every other one is RLE with its ultrasound region described, the rest is JPEG without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{label.number:04d}.dcm"
    data = _identified(label, frames=len(phantom.frames))
    _describe_pixels(data, phantom.frames)
    if label.number % 2 == 0:
        data.SequenceOfUltrasoundRegions = [_region(phantom)]
        data.PhotometricInterpretation = "RGB"
        data.PixelData = phantom.frames.tobytes()
        data.compress(RLELossless, generate_instance_uid=False)
    else:
        data.PhotometricInterpretation = "YBR_FULL_422"
        data.LossyImageCompression = "01"
        data.LossyImageCompressionMethod = "ISO_10918_1"
        data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        data.PixelData = encapsulate([_jpeg(frame) for frame in phantom.frames])
        data["PixelData"].VR = "OB"
    data.save_as(file, enforce_file_format=True)
    return file


def _write_sidecar(file: Path, label: UsScanLabel) -> None:
    """Say whose it is, which pictures themselves cannot."""
    sidecar = {
        "PatientID": label.patient,
        "Manufacturer": label.look.vendor,
        "ManufacturersModelName": label.look.model,
    }
    file.with_suffix(".json").write_text(json.dumps(sidecar), encoding="utf-8")


def _identified(label: UsScanLabel, *, frames: int) -> FileDataset:
    storage = UltrasoundMultiFrameImageStorage if frames > 1 else UltrasoundImageStorage
    seeds = [label.uid_seed, str(label.number)]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=seeds)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID = storage
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID = generate_uid(entropy_srcs=[label.patient, label.uid_seed, "us study"])
    data.SeriesInstanceUID = generate_uid(entropy_srcs=[*seeds, "series"])
    data.PatientName = f"Phantom^{label.patient}"
    data.PatientID = label.patient
    data.PatientBirthDate = "19600229"
    data.PatientSex = "O"
    data.InstitutionName = "Phantom General Hospital"
    data.ReferringPhysicianName = "Phantom^Referrer"
    data.AccessionNumber = "PH0002"
    data.StudyID = "2"
    data.StudyDate = STUDY_DATE
    data.StudyTime = "120000"
    data.Modality = "US"
    data.Manufacturer = label.look.vendor
    data.ManufacturerModelName = label.look.model
    data.SeriesNumber = label.number + 1
    data.InstanceNumber = 1
    data.ImageType = ["ORIGINAL", "PRIMARY"]
    data.BurnedInAnnotation = "YES"
    if frames > 1:
        data.NumberOfFrames = frames
        data.FrameTime = _FRAME_MS
        data.FrameIncrementPointer = 0x00181063  # FrameTime
    return data


def _describe_pixels(data: FileDataset, frames: NDArray[np.uint8]) -> None:
    data.SamplesPerPixel = 3
    data.PlanarConfiguration = 0
    data.Rows, data.Columns = frames.shape[1:3]
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelRepresentation = 0


def _region(phantom: UsPhantom) -> Dataset:
    """The sector's bounding box, as scanners describe it."""
    rows, columns = np.nonzero(phantom.sector)
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = _PLANE, _TISSUE, 0
    region.RegionLocationMinX0, region.RegionLocationMinY0 = int(columns.min()), int(rows.min())
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = int(columns.max()), int(rows.max())
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = _CENTIMETRES
    region.PhysicalDeltaX = region.PhysicalDeltaY = phantom.pixel_mm / 10
    return region


def _jpeg(frame: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, format="JPEG", quality=_JPEG_QUALITY, subsampling="4:2:2")
    return stream.getvalue()

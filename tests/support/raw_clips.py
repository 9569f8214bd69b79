"""Small ultrasound files for tests: speckle on a black screen, as PNG, GIF and DICOM."""

import hashlib
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from agssd_core.config.data import DataConfig
from agssd_core.config.frames import FramesConfig
from agssd_core.data.clip_cache import read_clip_entry
from agssd_core.data.index import index_folders
from agssd_core.data.label_cache import ClipLabels, write_labels
from agssd_core.data.prepare import prepare_site

SMALL = DataConfig(
    spacing_mm=(6.0, 6.0, 6.0),
    chunk=32,
    foreground_margin=2,
    frames=FramesConfig(max_side=128, min_side=32, similarity=1.0),
)
US_MULTI_FRAME = "1.2.840.10008.5.1.4.1.1.3.1"


def screens(frames=1, *, seed=0):
    """(F, 120, 160) grey screens with 90 x 120 pixels of speckle, unlike from frame to frame."""
    rng = np.random.default_rng(seed)
    shown = np.zeros((frames, 120, 160), dtype=np.uint8)
    shown[:, 15:105, 20:140] = np.clip(rng.rayleigh(60, (frames, 90, 120)), 20, 250)
    return shown


def write_png(file: Path, *, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(screens(seed=seed)[0]).save(file)
    return file


def write_gif(file: Path, frames=4, *, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(screen) for screen in screens(frames, seed=seed))
    first.save(file, save_all=True, append_images=rest)
    return file


def write_us_dicom(file: Path, frames=3, *, seed=0, patient="Doe-4711", instance=None, **fields):
    """One multi-frame file; ``instance`` ends its SOPInstanceUID."""
    shown = screens(frames, seed=seed)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = US_MULTI_FRAME
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{seed if instance is None else instance}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = US_MULTI_FRAME, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PatientID, data.PatientName = "US", patient, "Doe^John"
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.4", f"1.2.5.{seed}"
    data.Manufacturer, data.ManufacturerModelName = "GE Vingmed", "Vivid E9"
    data.Rows, data.Columns, data.NumberOfFrames = *shown.shape[1:], frames
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = shown.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    file.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(file, data)
    return file


def make_raw_clips(folder: Path, patients=2):
    """For every patient a still, a GIF of 4 frames and a DICOM clip of 3; 3 clips each."""
    for number in range(patients):
        seed = 10 * number
        write_png(folder / f"patient{number}_still.png", seed=seed)
        write_gif(folder / f"patient{number}_loop.gif", seed=seed + 1)
        write_us_dicom(folder / f"{number}.dcm", seed=seed + 2, patient=f"patient{number}")
    return folder


def make_clip_site(folder: Path, patients=2, config: DataConfig = SMALL):
    """A site that is ready for ``SiteFrames.open(folder, config, need_labels=False)``.

    The site's secret is always the same, so the names of clips and their order are too.
    """
    raw = make_raw_clips(folder.with_name(f"{folder.name}-raw"), patients)
    index_folders(folder, [raw], secret=hashlib.sha256(b"test clips").digest())
    prepare_site(folder, config)
    return folder


def label_clip(site: Path, clip: str, *, source="lpsam", digest="d", value=1, config=SMALL):
    """Give a prepared clip label maps: ``value`` everywhere in the sector."""
    entry = read_clip_entry(site, clip)
    maps = np.broadcast_to(entry.sector() * np.uint8(value), entry.shape).copy()
    labels = ClipLabels(clip, maps, ({value: 0.75},) * entry.shape[0], source, digest)
    return write_labels(site, labels, config=config)

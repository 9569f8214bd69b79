"""Ultrasound screens with a known sector and burned-in text, written in every format."""

import io
from pathlib import Path

import av
import numpy as np
import pydicom
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit
from scipy import ndimage

SHAPE = (240, 320)
NAME = "MUELLER ANNA 12.03.1961"
SINGLE, MULTI = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.3.1"


def fan(shape=SHAPE, *, face=30, depth=190, angle=38):
    """A curved probe's sector; ``face`` is the radius of its face, pixels."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    across, down = columns - shape[1] / 2, rows - 30 + face
    radius = np.hypot(across, down)
    turned = np.abs(np.degrees(np.arctan2(across, down)))
    return (radius >= face) & (radius <= face + depth) & (turned <= angle)


def rectangle(shape=SHAPE):
    """A linear probe's sector."""
    inside = np.zeros(shape, dtype=bool)
    inside[40:215, 90:230] = True
    return inside


def speckle(shape, rng, shade=60):
    """Grey tissue, darker with depth, uint8 and nowhere below 20."""
    noise = [ndimage.gaussian_filter(rng.normal(size=shape), 1.1) for _ in range(2)]
    amplitude = np.hypot(*noise)
    grey = 40 * np.log2(amplitude / amplitude.mean() + 0.1) + 130
    return np.clip(grey - np.linspace(0, shade, shape[0])[:, None], 20, 255).astype(np.uint8)


def screen(inside, *, seed=0, background=0, text=True):
    """(H, W) one grey screen; text and a grey bar stand beside the sector."""
    frame = np.full(inside.shape, background, dtype=np.uint8)
    frame[inside] = speckle(inside.shape, np.random.default_rng(seed))[inside]
    return write_text(frame, light=background < 128) if text else frame


def write_text(frame, *, light=True):
    """Burn in what scanners do."""
    image = Image.fromarray(frame)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    fill = 230 if light else 10
    for row, line in enumerate((NAME, "ID 0815 4711", "GENERAL HOSPITAL")):
        pen.text((3, 2 + 11 * row), line[:11], font=font, fill=fill)
        pen.text((250, 2 + 11 * row), line[-11:], font=font, fill=fill)
    pen.text((3, 226), "MI 0.9 TIS 0.4", font=font, fill=fill)
    written = np.array(image)
    written[60:150, 6:14] = np.linspace(255, 0, 90)[:, None]
    written[50:210:16, 306:312] = fill
    return written


def cine(inside, frames=6, **options):
    """(F, H, W) screens whose tissue differs from frame to frame."""
    return np.stack([screen(inside, seed=number, **options) for number in range(frames)])


def write_image(file: Path, frame, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame).save(file, **options)
    return file


def write_pages(file: Path, frames):
    """Frames as a GIF or a TIFF, by the name."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(file, save_all=True, append_images=rest)
    return file


def write_video(file: Path, frames, *, codec="mpeg4", **options):
    """Grey or RGB frames as a video of high quality."""
    with av.open(str(file), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 20_000_000
        for frame in frames:
            colour = np.stack([frame] * 3, axis=-1) if frame.ndim == 2 else frame
            container.mux(stream.encode(av.VideoFrame.from_ndarray(colour, format="rgb24")))
        container.mux(stream.encode())
    return file


def dicom(frames, photometric="MONOCHROME2", **fields) -> FileDataset:
    """An uncompressed file in memory: frames (F, H, W) or (F, H, W, 3), as they are stored."""
    count, samples = len(frames), 3 if frames.ndim == 4 else 1
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = fields.get("SOPClassUID", MULTI if count > 1 else SINGLE)
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = "1.2.3.4", ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3.4"
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.5", "1.2.6"
    data.Modality, data.PatientID, data.PatientName = "US", "4711", "Mueller^Anna"
    data.Manufacturer, data.ManufacturerModelName = "Philips Medical Systems", "EPIQ 7C"
    data.BurnedInAnnotation = "YES"
    data.Rows, data.Columns = frames.shape[1:3]
    if count > 1:
        data.NumberOfFrames = count
    data.SamplesPerPixel, data.PhotometricInterpretation = samples, photometric
    if samples == 3:
        data.PlanarConfiguration = 0
    bits = frames.dtype.itemsize * 8
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(frames.dtype.kind == "i")
    data.PixelData = frames.tobytes()
    data["PixelData"].VR = "OB" if bits == 8 else "OW"
    for name, value in fields.items():
        setattr(data, name, value)
    return data


def save(data: FileDataset, file: Path) -> Path:
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file


def as_jpeg(data: FileDataset, frames) -> FileDataset:
    """Replace the pixels by JPEG baseline without offset table, the first frame in two pieces."""
    streams = []
    for frame in frames:
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, format="JPEG", quality=95, subsampling=0)
        streams.append(stream.getvalue())
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.PixelData = encapsulate(streams, has_bot=False)
    return data


def region(top, left, bottom, right, *, kind=1, plane=1) -> Dataset:
    """A region as the header describes it; both corners lie inside."""
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = plane, kind, 0
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    return item


def whole(clip, shape=SHAPE):
    """Frames and sector of a prepared clip that was not shrunk, back in the source's place."""
    top, left, height, width = clip.box
    frames = np.zeros((len(clip.frames), *shape), dtype=np.uint8)
    sector = np.zeros(shape, dtype=bool)
    place = (slice(top, top + height), slice(left, left + width))
    frames[:, *place], sector[place] = clip.frames, clip.sector
    return frames, sector

"""Read outlines over ultrasound frames, and write frames that the house cannot index itself."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import io

from agssd_core.data.frame_source import (
    MAX_CLIP_FRAMES,
    Pixels,
    bits_used,
    check_size,
    eight_bits,
    readable_clip,
)
from agssd_core.data.still import FORMATS
from agssd_core.errors import DataError
from agssd_core.weights import write_bytes
from simulation.datasets.grids import source_file
from simulation.datasets.polygons import fill_polygons, read_polygons
from simulation.datasets.rows import Mask, Row, Source
from simulation.datasets.us_files import research_package

# (F, H, W) of any numbers.
Stack = NDArray[Any]
MAX_VALUE = 255
MAX_CLIP_VALUES = 1 << 30


def read_image_masks(
    root: Path, row: Row, *, shape: tuple[int, int], frames: int
) -> NDArray[np.uint8]:
    """Read the outlines of one still or clip, united as ``Mask`` says.

    A file with fewer masks than the clip has frames lies over the frames from ``source.index`` on,
    or from the first. Arrays of MATLAB files are stretched to the frame, for HMC-QU publishes them
    for frames that were squeezed into a square; every other mask must have the frame's size.

    Args:
        root: folder of the data set.
        row: one of its rows of ultrasound.
        shape: (H, W) of the stored frames, pixels.
        frames: how many the clip has; 1 for a still.

    Returns:
        (F, H, W) uint8; 0 where nothing is outlined.

    Raises:
        DataError: a file is missing or damaged, has another size than the frames, or holds numbers
            that are no structures.
    """
    check_size(shape[0], shape[1], frames)
    _require_fitting(frames * shape[0] * shape[1])
    united = np.zeros((frames, *shape), dtype=np.uint8)
    for mask in row.masks:
        values = _mask_stack(root, mask, shape)
        start = 0 if mask.source.kind in ("nifti", "itk") else mask.source.index or 0
        _require_over(values.shape, united.shape, start)
        part = united[start : start + len(values)]
        inside = values > mask.threshold
        part[inside] = mask.value if mask.value is not None else _structures(values, inside)
    return united


def write_frames_from(root: Path, row: Row, folder: Path) -> Path:
    """Write a 2D image or a sequence of NIfTI or ITK as a PNG or a lossless TIFF of many frames.

    Depth runs down: the files' first axis is the column, their second the row, their third time.
    An existing file is written anew; one that was cut short is never left behind.

    Args:
        root: folder of the data set.
        row: one of its rows of ultrasound, kind ``nifti`` or ``itk``.
        folder: where to write; must exist.

    Returns:
        The file, which ``clips.load_clip`` reads as kind ``image`` with the same pixels.

    Raises:
        DataError: the file is missing, damaged, or holds no grey values of 8 to 16 bits.
    """
    stack = _grey_stack(_read_stack(source_file(root, row.source), row.source))
    path = folder / f"{row.scan}{'.png' if len(stack) == 1 else '.tif'}"
    pages = [Image.fromarray(frame) for frame in stack]
    written = BytesIO()
    if len(pages) == 1:
        pages[0].save(written, format="PNG")
    else:
        pages[0].save(
            written,
            format="TIFF",
            save_all=True,
            append_images=pages[1:],
            compression="tiff_deflate",
        )
    write_bytes(path, written.getvalue())
    return path


def _mask_stack(root: Path, mask: Mask, shape: tuple[int, int]) -> Stack:
    source = mask.source
    path = source_file(root, source)
    if source.kind == "polygons":
        polygons = read_polygons(path)[1].get(source.key, [])
        return fill_polygons(polygons, shape)[None].astype(np.uint8)
    stack = _read_stack(path, source)
    if source.kind == "mat" and stack.shape[1:] != shape:
        return _stretched(stack, shape)
    return stack


def _read_stack(path: Path, source: Source) -> Stack:
    reader = _READERS.get(source.kind)
    if reader is None and source.kind != "mat":
        raise DataError(
            f"a file of kind {source.kind} holds no frames that are read here. Read it with the "
            "reader of volumes or of clips."
        )
    with readable_clip():
        return reader(path) if reader is not None else _read_mat(path, source.key)


def _read_image(path: Path) -> Stack:
    """One mask; grey levels as they are stored, the brightest channel of colours."""
    with Image.open(path, formats=FORMATS) as stored:
        check_size(stored.height, stored.width)
        image = ImageOps.exif_transpose(stored)
        if image.mode == "1":
            return np.array(image.convert("L"))[None]
        if image.mode in ("L", "P", "I", "I;16", "I;16B"):
            return np.array(image)[None]
        # What is transparent is nothing, whatever colour it hides.
        colours = np.array(image.convert("RGBA"))
        return np.where(colours[..., 3] > 0, colours[..., :3].max(-1), 0)[None]


def _read_nifti(path: Path) -> Stack:
    image: Any = nib.load(path)
    if np.dtype(image.header.get_data_dtype()).kind not in "iufb":
        raise _no_frames()
    high = _column_first(tuple(int(side) for side in image.shape))
    return np.asarray(image.dataobj).reshape(high).transpose(2, 1, 0)


def _read_itk(path: Path) -> Stack:
    sitk = research_package("SimpleITK", ".mhd and .mha files")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # noqa: FBT003 - the library's own
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1:
        raise _no_frames()
    size = _column_first(tuple(int(side) for side in reader.GetSize()))
    stack: Stack = sitk.GetArrayFromImage(reader.Execute())
    return stack.reshape(size[::-1])


def _read_mat(path: Path, key: str) -> Stack:
    """An array of frames in MATLAB's format; of three sides the one unlike the others is time."""
    shapes = {name: shape for name, shape, _ in io.whosmat(path)}
    if key not in shapes:
        raise DataError("the file lacks an array that the rows name. Download it again.")
    shape = tuple(shapes[key])
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) != 3:
        raise _no_frames()
    last = shape[0] == shape[1] != shape[2]
    high, wide = shape[:2] if last else shape[1:]
    check_size(high, wide, shape[2] if last else shape[0])
    _require_fitting(shape[0] * shape[1] * shape[2])
    stored = io.loadmat(path, variable_names=[key])[key]
    if not isinstance(stored, np.ndarray) or stored.dtype.kind not in "iufb":
        raise _no_frames()
    stack = stored.reshape(shape)
    return np.moveaxis(stack, -1, 0) if last else stack


_READERS: dict[str, Callable[[Path], Stack]] = {
    "image": _read_image,
    "nifti": _read_nifti,
    "itk": _read_itk,
}


def _column_first(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(columns, rows, frames), once they are known to fit into memory."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3):
        raise _no_frames()
    frames = shape[2] if len(shape) == 3 else 1
    check_size(shape[1], shape[0], frames)
    _require_fitting(shape[0] * shape[1] * frames)
    return shape[0], shape[1], frames


def _grey_stack(stack: Stack) -> Pixels:
    values = np.rint(stack) if stack.dtype.kind == "f" else stack
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise DataError(
            "the frames hold values that are no grey (whole numbers of 8 to 16 bits, none below "
            "0). Leave the scan out."
        )
    return eight_bits(values, bits_used(values))


def _stretched(stack: Stack, shape: tuple[int, int]) -> Stack:
    """Each frame on another grid over the same field of view, nearest neighbours."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.intp)
        for new, old in zip(shape, stack.shape[1:], strict=True)
    )
    return stack[:, rows[:, None], columns]


def _require_over(mask: tuple[int, ...], clip: tuple[int, ...], start: int) -> None:
    if mask[1:] != clip[1:]:
        raise DataError(
            f"a mask has {mask[1:]} pixels and its frame {clip[1:]}, they must be equal. Download "
            "both again, or leave the scan out."
        )
    if start < 0 or start + mask[0] > clip[0]:
        raise DataError(
            f"{mask[0]} mask(s) from frame {start} on do not fit a clip of {clip[0]} frame(s). "
            "Download both again, or leave the scan out."
        )


def _require_fitting(values: int) -> None:
    if values > MAX_CLIP_VALUES:
        raise DataError(
            f"the frames have {values} pixels in all, {MAX_CLIP_VALUES} are read, of at most "
            f"{MAX_CLIP_FRAMES} frames. Leave the scan out."
        )


def _structures(values: Stack, inside: NDArray[np.bool_]) -> NDArray[np.uint8]:
    chosen = np.asarray(values[inside], dtype=np.float64)
    whole = np.rint(chosen)
    if chosen.size and (np.abs(whole - chosen).max() > 1e-3 or whole.max() > MAX_VALUE):
        raise DataError(
            f"a mask holds numbers that are no structures (whole numbers up to {MAX_VALUE}). "
            "Download it again, or leave the scan out."
        )
    return whole.astype(np.uint8)


def _no_frames() -> DataError:
    return DataError(
        "the file holds no grey frames (rows and columns, and time where it is a sequence). Leave "
        "the scan out."
    )

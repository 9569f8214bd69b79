"""Crops of 96 voxels a side: our cache against the online path and against other stores.

The ratio to the online path grows with the scan, so the scan is a usual body CT. All files are in
the page cache: an uncompressed file mapped into memory is then the quickest to read, and on a disk
that has to be waited for the smaller one is.

Run: ``python -m benchmarks.bench_cache``
"""

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import zarr
from monai.data import PersistentDataset
from numpy.typing import NDArray

from agssd_core.config.data import DataConfig
from agssd_core.config.simulation import PhantomSiteConfig
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.cache_file import cache_folder
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import prepare_site
from agssd_core.data.preprocess import HU_RANGE, resample
from benchmarks.timing import compare, report
from simulation.phantoms import make_phantom

SIZE = (96, 96, 96)
CONFIG = DataConfig()
PHANTOM = PhantomSiteConfig(
    name="bench", patients=1, size=(256, 256, 130), spacing_mm=(1.6, 1.6, 2.5)
)
SPACING_MM = (0.8, 0.8, 2.5)
MIN_CROPS_PER_S = 200.0

Start = tuple[int, int, int]
Array = NDArray[Any]
Reader = Callable[[Start], Array]


def main() -> int:
    """Build the stores, compare, print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        file = _write_scan(place / "raw")
        index_folders(place / "site", [place / "raw"])
        prepare_site(place / "site", CONFIG)
        volumes = SiteVolumes.open(place / "site", CONFIG)
        shape = volumes.infos[0].shape
        whole = volumes.read_crop(0, (0, 0, 0), shape)
        print(_sizes(file, place / "site", shape), flush=True)
        rivals: list[tuple[str, Reader, float | None, int]] = [
            ("online NIfTI load + orient + resample + crop", _online(file), 100.0, 1),
            ("zarr, LZ4, 64-voxel chunks", _zarr(place, whole), None, 10),
            ("MONAI PersistentDataset", _persistent(place, whole), None, 10),
            ("mmap of a float32 .npy", _mapped(place, whole), None, 50),
            ("mmap of a 16-bit .npy", _mapped_16(place, whole), None, 50),
        ]
        results = []
        for name, reader, must, calls in rivals:
            ours, theirs = _places(shape), _places(shape)
            results.append(
                compare(
                    f"96-voxel crop, {name} vs our cache",
                    lambda reader=reader, theirs=theirs: reader(next(theirs)),
                    lambda ours=ours: volumes.read_crop(0, next(ours), SIZE),
                    same=lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
                    calls=(calls, 50),
                    goals=(must, None),
                )
            )
    rate = 1e3 / min(result.fast_ms for result in results)
    print(f"our cache: {rate:.0f} crops/s on one core (must {MIN_CROPS_PER_S:.0f})")
    return max(report(results), int(rate < MIN_CROPS_PER_S))


def _sizes(file: Path, site: Path, shape: Start) -> str:
    (packed,) = cache_folder(site).glob("*.b2nd")
    stored = "x".join(map(str, nib.load(file).shape))
    spacing = "x".join(map(str, SPACING_MM))
    cached = "x".join(map(str, shape))
    raw_mb, packed_mb = np.prod(shape) * 2 / 1e6, packed.stat().st_size / 1e6
    return (
        f"scan: CT of {stored} voxels of {spacing} mm, .nii.gz of {file.stat().st_size / 1e6:.0f} "
        f"MB; cached: {cached} voxels of 1.5 mm, {packed_mb:.1f} MB ({raw_mb:.1f} MB as .npy)"
    )


def _write_scan(folder: Path) -> Path:
    """A CT of 512 x 512 x 130 voxels of 0.8 x 0.8 x 2.5 mm, a usual size for a body."""
    phantom = make_phantom(PHANTOM, 0, "CT", seed=0)
    fine = phantom.image.repeat(2, axis=0).repeat(2, axis=1)
    noise = np.random.default_rng(0).normal(0, 10, size=fine.shape).astype(np.int16)
    folder.mkdir()
    file = folder / "bench_ct.nii.gz"
    nib.save(nib.Nifti1Image(fine + noise, np.diag([-SPACING_MM[0], *SPACING_MM[1:], 1.0])), file)
    return file


def _places(shape: Start) -> Iterator[Start]:
    rng = np.random.default_rng(0)
    limits = [side - 96 for side in shape]
    drawn = [tuple(int(rng.integers(0, limit + 1)) for limit in limits) for _ in range(64)]
    return itertools.cycle(drawn)


def _cut(array: Any, start: Start) -> Any:
    return array[tuple(slice(first, first + 96) for first in start)]


def _online(file: Path) -> Reader:
    """What a loader without a cache does for every crop; windowing only the crop."""

    def read(start: Start) -> Array:
        image = nib.as_closest_canonical(nib.load(file))
        values = np.clip(image.get_fdata(dtype=np.float32), *HU_RANGE)
        array, _ = resample(values, image.affine, spacing_mm=CONFIG.spacing_mm)
        low, high = CONFIG.ct_window_hu
        return np.clip((_cut(array, start) - low) / (high - low), 0, 1)

    return read


def _zarr(place: Path, whole: Array) -> Reader:
    store = zarr.create_array(
        place / "store.zarr",
        shape=whole.shape,
        chunks=(64, 64, 64),
        dtype="uint16",
        compressors=zarr.codecs.BloscCodec(cname="lz4", shuffle="shuffle"),
    )
    store[:] = _to_16(whole)
    return lambda start: _cut(store, start) * np.float32(1 / 65535)


def _persistent(place: Path, whole: Array) -> Reader:
    np.save(place / "persistent.npy", whole)
    data = PersistentDataset(
        [str(place / "persistent.npy")],
        transform=lambda path: torch.from_numpy(np.load(path)),
        cache_dir=place / "persistent",
    )
    return lambda start: _cut(data[0], start).numpy().copy()


def _mapped(place: Path, whole: Array) -> Reader:
    np.save(place / "float.npy", whole)
    array = np.load(place / "float.npy", mmap_mode="r")
    return lambda start: np.array(_cut(array, start))


def _mapped_16(place: Path, whole: Array) -> Reader:
    np.save(place / "short.npy", _to_16(whole))
    array = np.load(place / "short.npy", mmap_mode="r")
    return lambda start: _cut(array, start) * np.float32(1 / 65535)


def _to_16(whole: Array) -> Array:
    return np.rint(whole * 65535).astype(np.uint16)


if __name__ == "__main__":
    sys.exit(main())

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from agssd_core.config import DataConfig
from agssd_core.config.frames import FramesConfig
from agssd_core.data.pairs import ImageMaskPairs, read_pair
from agssd_core.data.preprocess import FULL_SCALE, preprocess
from agssd_core.errors import DataError
from agssd_core.evaluation.labelled import read_labelled
from simulation.datasets.reading import read_volume
from simulation.datasets.rows import Mask, Row, Source
from simulation.labelled import write_labelled
from simulation.partition import Placed
from tests.support.raw_clips import write_gif, write_png

DATA = DataConfig(
    spacing_mm=(4.0, 4.0, 4.0),
    frames=FramesConfig(max_side=96, min_side=32, similarity=0.98),
)


def _ct(root, name="ct1"):
    """A box of bone in soft tissue in air, at 2 x 2 x 3 mm, stored left to right reversed."""
    image = np.full((60, 48, 40), -1000, np.int16)
    image[6:54, 6:42, 4:36] = 40
    image[12:30, 14:34, 10:26] = 900
    outline = np.zeros(image.shape, np.uint8)
    outline[12:30, 14:34, 10:26] = 5
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(image, affine), root / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(outline, affine), root / f"{name}_seg.nii.gz")
    return Row(
        scan=name,
        patient=f"p-{name}",
        modality="CT",
        source=Source(f"{name}.nii.gz", "nifti"),
        labels={"side": "left"},
        masks=(Mask(Source(f"{name}_seg.nii.gz", "nifti")),),
    )


def _still(root, name="us1"):
    write_png(root / f"{name}.png")
    mask = np.zeros((120, 160), np.uint8)
    mask[40:70, 50:90] = 255
    Image.fromarray(mask).save(root / f"{name}_mask.png")
    masks = (Mask(Source(f"{name}_mask.png", "image"), value=1, threshold=127),)
    return Row(name, f"p-{name}", "US", Source(f"{name}.png", "image"), masks=masks)


def _clip(root, name="clip1"):
    write_gif(root / f"{name}.gif", frames=7)
    return Row(name, f"p-{name}", "US", Source(f"{name}.gif", "video"), labels={"view": "apical"})


def _write(root, *rows, data=DATA, progress=None):
    placed = [Placed(row, "a", "train") for row in rows]
    return write_labelled(root, placed, data, root / "labelled", progress=progress)


def test_a_volume_is_what_training_sees_and_its_mask_lies_on_the_same_grid(tmp_path):
    row = _ct(tmp_path)
    (scan,) = _write(tmp_path, row).scans
    arrays = scan.load()
    seen = preprocess(read_volume(tmp_path, row), DATA)
    np.testing.assert_allclose(arrays.image, seen.array / FULL_SCALE, atol=1e-6)
    assert scan.spacing_mm == pytest.approx((4.0, 4.0, 4.0))
    assert (scan.patient, scan.site, scan.labels) == ("p-ct1", "a", {"side": "left"})
    assert scan.outlined == (5,)
    # Bone is 0.95 and tissue 0.52 of the window: the edge is a little below halfway.
    bone, mask = arrays.image > 0.73, arrays.mask == 5
    assert 2 * (bone & mask).sum() / (bone.sum() + mask.sum()) > 0.97
    assert mask.sum() * 64 == pytest.approx(18 * 20 * 16 * 12, rel=0.1)
    assert arrays.inside[bone].all()
    assert not arrays.inside.all()


def test_a_still_and_its_mask_are_cut_as_for_the_delineator(tmp_path):
    (scan,) = _write(tmp_path, _still(tmp_path)).scans
    (pair,) = ImageMaskPairs.open([tmp_path]).pairs
    expected = read_pair(pair, DATA.frames, structures="union")
    arrays = scan.load()
    assert max(arrays.image.shape) == 96
    np.testing.assert_allclose(arrays.image, expected.frame / 255, atol=1e-6)
    np.testing.assert_array_equal(arrays.mask == 1, expected.structures[0])
    np.testing.assert_array_equal(arrays.inside, expected.sector)
    assert scan.spacing_mm is None


def test_a_clip_gives_three_frames_of_one_patient(tmp_path):
    scans = _write(tmp_path, _clip(tmp_path)).scans
    assert [scan.scan for scan in scans] == ["clip1.f0000", "clip1.f0003", "clip1.f0006"]
    assert {scan.patient for scan in scans} == {"p-clip1"}
    assert all(scan.load().mask is None for scan in scans)


def test_what_is_ready_is_not_done_again_and_what_is_not_is(tmp_path):
    rows = [_ct(tmp_path), _still(tmp_path), _clip(tmp_path)]
    first, seen = _write(tmp_path, *rows), []
    before = {scan.file: scan.file.stat().st_mtime_ns for scan in first.scans}
    again = _write(tmp_path, *rows, progress=lambda *counts: seen.append(counts))
    assert again == first
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert read_labelled(tmp_path / "labelled").scans == first.scans
    first.scans[1].file.write_bytes(b"cut")  # a frame of the clip
    assert _write(tmp_path, *rows) == first
    assert first.scans[1].load().image.any()
    finer = _write(tmp_path, *rows, data=DATA.model_copy(update={"spacing_mm": (3.0,) * 3}))
    volume = next(scan for scan in finer.scans if scan.modality == "CT")
    assert volume.load().image.shape == (40, 32, 40)


def test_a_scan_that_cannot_be_read_is_listed_and_the_others_go_on(tmp_path):
    rows = [_ct(tmp_path, "a"), _ct(tmp_path, "b"), _still(tmp_path)]
    (tmp_path / "a.nii.gz").write_bytes(b"nothing")
    found = _write(tmp_path, *rows)
    assert [scan.scan for scan in found.scans] == ["b", "us1"]
    assert list(found.skipped) == ["a"]
    assert str(tmp_path) not in found.skipped["a"]
    with pytest.raises(DataError, match="Check the data set"):
        _write(tmp_path, rows[0])


def test_nothing_but_whole_files_is_left_behind(tmp_path):
    _write(tmp_path, _ct(tmp_path), _clip(tmp_path))
    names = sorted(file.name for file in (tmp_path / "labelled").iterdir())
    assert names == [
        "clip1.f0000.npz",
        "clip1.f0003.npz",
        "clip1.f0006.npz",
        "clip1.json",
        "ct1.json",
        "ct1.npz",
    ]

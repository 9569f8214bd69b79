"""Preparing and reading back: exactness and settings."""

import concurrent.futures
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.config.data import DataConfig
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.cache_file import cache_folder, data_stamp
from agssd_core.data.nifti import read_nifti
from agssd_core.data.prepare import prepare_site
from agssd_core.data.preprocess import preprocess
from agssd_core.errors import CacheError, ShapeError
from tests.support.sites import FAST, make_site


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("prepare") / "site", ("CT", "MR"), patients=2)


@pytest.fixture(scope="module")
def volumes(shared_site):
    return SiteVolumes.open(shared_site, FAST)


def _whole(volumes, index):
    return volumes.read_crop(index, (0, 0, 0), volumes.infos[index].shape)


def test_the_cache_holds_what_preprocessing_gave(shared_site, volumes):
    assert [info.volume for info in volumes.infos] == sorted(info.volume for info in volumes.infos)
    raw = shared_site.with_name("site-raw")
    expected = {}
    for file in raw.rglob("*.nii.gz"):
        modality = file.name[:2]
        prepared = preprocess(read_nifti(file, modality=modality), FAST)
        expected[prepared.array.tobytes()] = prepared
    assert len(volumes) == len(expected) == 4
    for index, info in enumerate(volumes.infos):
        found = np.rint(_whole(volumes, index) * 65535).astype(np.uint16)
        prepared = expected.pop(found.tobytes())
        np.testing.assert_array_equal(info.affine, prepared.affine)
        assert info.foreground_start == prepared.foreground_start
        assert info.foreground_integral[-1, -1, -1] == prepared.mask.sum()


def test_values_lie_in_the_unit_interval(volumes):
    for index in range(len(volumes)):
        values = _whole(volumes, index)
        assert values.dtype == np.float32
        assert values.min() == 0.0
        assert 0.5 < values.max() <= 1.0


@settings(max_examples=60, deadline=None)
@given(
    start=st.tuples(*[st.integers(-50, 60)] * 3),
    size=st.tuples(*[st.integers(1, 50)] * 3),
    index=st.integers(0, 3),
)
def test_a_crop_is_the_volume_with_its_edge_repeated(volumes, start, size, index):
    whole = _whole(volumes, index)
    places = [
        np.clip(np.arange(first, first + side), 0, extent - 1)
        for first, side, extent in zip(start, size, whole.shape, strict=True)
    ]
    crop = volumes.read_crop(index, start, size)
    np.testing.assert_array_equal(crop, whole[np.ix_(*places)])


def test_threads_read_the_same_crops_of_one_volume(volumes):
    """blosc2 guards its context; should a later one let two threads in, this meets them."""
    boxes = [((n % 7, n % 5, n % 3), (30, 30, 30)) for n in range(400)]
    serial = [volumes.read_crop(0, *box) for box in boxes]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            threaded = list(pool.map(lambda box: volumes.read_crop(0, *box), boxes))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(serial, threaded, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_empty_crop_is_refused(volumes):
    with pytest.raises(ShapeError, match="Ask for 1 or more"):
        volumes.read_crop(0, (0, 0, 0), (4, 0, 4))


def test_patients_can_be_kept_apart(volumes):
    one = volumes.infos[0].patient
    kept = volumes.keep(frozenset({one}))
    assert len(kept) == 2
    assert {info.patient for info in kept.infos} == {one}


def test_the_integral_counts_the_body(volumes):
    info = volumes.infos[0]
    mask = np.diff(np.diff(np.diff(info.foreground_integral, axis=0), axis=1), axis=2)
    assert set(np.unique(mask)) == {0, 1}
    assert info.foreground_integral[3, 4, 5] == mask[:3, :4, :5].sum()
    assert mask.shape == tuple(-(-side // info.foreground_step) for side in info.shape)


def test_prepare_does_nothing_twice_and_redoes_other_settings(tmp_path):
    site = make_site(tmp_path / "site", patients=2)
    times = {path: path.stat().st_mtime_ns for path in cache_folder(site).iterdir()}
    report = prepare_site(site, FAST)
    assert (report.prepared, report.unchanged) == (0, 2)
    assert times == {path: path.stat().st_mtime_ns for path in cache_folder(site).iterdir()}
    other = FAST.model_copy(update={"ct_window_hu": (-200.0, 300.0)})
    with pytest.raises(CacheError, match=r"2 of 2 .* Run `agssd-site prepare SITE`"):
        SiteVolumes.open(site, other)
    assert prepare_site(site, other).prepared == 2
    assert len(SiteVolumes.open(site, other)) == 2


def test_every_setting_but_the_folders_and_ultrasound_is_in_the_stamp():
    plain = data_stamp(DataConfig())
    for name in DataConfig.model_fields:
        value = {"sites": {"a": "/x"}, "chunk": 32, "foreground_margin": 3}.get(name)
        value = value or {"frames": {"max_side": 300}}.get(name)
        value = value or {"spacing_mm": (1, 1, 2)}.get(name) or (1.0, 90.0)
        changed = data_stamp(DataConfig(**{name: value}))
        assert (changed == plain) == (name in ("sites", "frames")), name
